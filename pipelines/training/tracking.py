"""Metrics and images of a run: RUN/metrics.jsonl, and a tracker through Accelerate."""

import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import yaml
from accelerate import Accelerator
from PIL import Image

from pipelines.drawing.panels import Example, draw_panels, side_by_side
from pipelines.model.lineage import record_data, record_model
from pipelines.runtime.errors import RunError, suggest_write_remedy
from pipelines.runtime.run_folder import RunFolder
from pipelines.runtime.wandb_run import find_wandb_run, start_wandb
from pipelines.runtime.yaml_flags import refuse_unused
from pipelines.training.checkpoints import TrainState
from pipelines.training.wandb_run import describe_run, draw_masks, keep_maxima
from shards.documents import Count
from shards.images.files import encode_png
from shards.local_files import read_file
from shards.manifest import Manifest
from shards.writer import write_atomically

logger = logging.getLogger(__name__)

MAX_SIDE = 512
"""Longest side of a drawn validation image, in pixels."""
MAX_ROWS = 1000
"""Images in the table of scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Experiment tracking."""

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    """wandb: online with a key (WANDB_API_KEY or `wandb login`), else offline in the run folder.
    tensorboard: in the run folder; needs unet-shards[tensorboard]."""
    project: str = "unet"
    """Project that the run appears under."""
    group: str | None = None
    """Group of the run (wandb). Default: of a fold, the name of the folder of its run folder."""
    tags: tuple[str, ...] = ()
    """Tags of the run (wandb)."""
    notes: str | None = None
    """Notes on the run (wandb)."""
    pictures: int = 4
    """Number of images to draw of the first batch, as the network sees it, and of each validation,
    with mask and prediction; also written to RUN/pictures. 0: none."""
    artifact: bool = False
    """Upload the best checkpoint at the end (wandb). Otherwise only its path and sha256 are
    logged."""

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise ValueError(f"--tracking.pictures must be >= 0, got {self.pictures}")
        if self.backend == "none":
            reason = "has no effect with --tracking.backend none; remove one of the two"
            refuse_unused(self, reason, "project", prefix="tracking.")
        if self.backend != "wandb":
            names = ("group", "tags", "notes", "artifact")
            refuse_unused(self, "needs --tracking.backend wandb", *names, prefix="tracking.")
        if self.backend == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError(
                "--tracking.backend tensorboard needs tensorboard: pip install "
                "'unet-shards[tensorboard]'"
            )

    def trackers(self) -> list[str]:
        """Return the names of the trackers for Accelerate."""
        return [] if self.backend == "none" else [self.backend]


class Tracker:
    """Logs on the main process. A tracker that fails is disabled with a warning."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrackingConfig,
        folder: RunFolder,
        resolved: dict[str, Any],
        network: dict[str, int | str | None],
        manifest: Manifest,
        state: TrainState,
    ) -> None:
        """Write RUN/config.yaml, truncate RUN/metrics.jsonl to the step of `state`, start tracking.

        `resolved`: the resolved configuration. `network`: facts about the model, by name, which the
        tracker shows beside it. `manifest`: of the data.
        """
        self.accelerator, self.config, self.folder = accelerator, config, folder
        self.manifest = manifest
        self.run_id = state.tracking_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        if accelerator.is_main_process:
            write_atomically(folder.config, yaml.safe_dump(resolved, sort_keys=False).encode())
            drop_lines_after(folder.metrics, state.step)
        self.alive = bool(config.trackers())
        if self.alive:
            self.attempt(lambda: self.start(resolved, network))

    def start(self, resolved: dict[str, Any], network: dict[str, int | str | None]) -> None:
        """Start the tracker with the resolved configuration and facts about the network."""
        settings = {**flatten(resolved), **network}
        if self.config.backend != "wandb":
            # tensorboard uses the project as a folder, and takes no lists.
            flat = {
                name: value if isinstance(value, str | int | float | bool) else str(value)
                for name, value in settings.items()
            }
            self.accelerator.init_trackers("tensorboard", config=flat)
            return
        run_dir = self.folder.path
        about = describe_run(run_dir.resolve(), resolved["fold"], self.config.group)
        start_wandb(
            self.accelerator,
            self.config.project,
            settings,
            **about,
            id=self.run_id,
            dir=str(run_dir),
            tags=[*self.config.tags],
            notes=self.config.notes,
        )
        if not self.accelerator.is_main_process:
            return
        keep_maxima(self.wandb_run, ("val/dice", "val/iou"))
        record_data(self.wandb_run, str(resolved["data"]), self.manifest)

    @property
    def wandb_run(self) -> Any:
        """The wandb run, on the main process."""
        return find_wandb_run(self.accelerator)

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Log the metrics of a step to metrics.jsonl and the tracker."""
        if not self.accelerator.is_main_process:
            return
        try:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.folder.metrics} cannot be written ({error.strerror}); "
                f"{suggest_write_remedy(error)}"
            ) from error
        known = {name: value for name, value in values.items() if value is not None}
        self.attempt(lambda: self.accelerator.log(known, step=step))

    def show(self, step: int, name: str, draw: Callable[[], Sequence[Image.Image]]) -> None:
        """Draw images of a step, on the main process, if --tracking.pictures is not 0.

        They are logged to the tracker and written to RUN/pictures, replacing those of the previous
        step.
        """
        if self.accelerator.is_main_process and self.config.pictures:
            drawn = [*draw()]
            self.log_drawn(step, name, drawn, lambda: self.log_images({name: drawn}, step))

    def show_examples(self, step: int, name: str, predict: Callable[[], Iterable[Example]]) -> None:
        """Draw image, mask, prediction and difference of a step, as `show`.

        In wandb the masks are layers over the image, with class names.
        """
        if not (self.accelerator.is_main_process and self.config.pictures):
            return
        examples, palette = [*predict()], self.manifest.palette
        drawn = [side_by_side(draw_panels(one, palette, MAX_SIDE)) for one in examples]

        def log_masks() -> None:
            images = [draw_masks(one, self.manifest, MAX_SIDE) for one in examples]
            self.accelerator.log({name: images}, step=step)

        self.log_drawn(step, name, drawn, log_masks)

    def log_drawn(
        self, step: int, name: str, drawn: Sequence[Image.Image], log_wandb: Callable[[], None]
    ) -> None:
        """Write images of a step into one file of RUN/pictures, and log them to the tracker."""
        sheet = stack_images(drawn)
        path = self.folder.images / f"{name.replace('/', '-')}.png"
        try:
            self.folder.images.mkdir(exist_ok=True)
            write_atomically(path, encode_png(sheet), durable=False)
        except OSError as error:
            logger.warning("%s was not written, training continues: %s", path, error)
        if self.config.backend == "wandb":
            self.attempt(log_wandb)
        elif self.alive:
            pixels = np.asarray(sheet)[None]
            self.attempt(lambda: self.log_images({name: pixels}, step, dataformats="NHWC"))

    def log_images(self, values: dict[str, Any], step: int, **named: Any) -> None:
        """Log images with every active tracker; `named`: its own arguments."""
        for tracker in self.accelerator.trackers:
            tracker.log_images(values, step=step, **named)

    @property
    def takes_tables(self) -> bool:
        """Whether the tracker shows tables; the same on all ranks."""
        return self.config.backend == "wandb"

    def show_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Log the first 1,000 rows of a table on the main process; prints how many are left out."""
        if not self.accelerator.is_main_process:
            return
        if self.alive and len(rows) > MAX_ROWS:
            print(
                f"tracking: {name} has the {MAX_ROWS:,} images of lowest Dice, and leaves out "
                f"{len(rows) - MAX_ROWS:,}; unet evaluate writes all to scores.csv",
                file=sys.stderr,
            )
        kept = [[*row] for row in rows[:MAX_ROWS]]
        self.attempt(lambda: self.log_table(name, [*columns], kept, step))

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table with wandb."""
        tracker: Any = self.accelerator.get_tracker("wandb")
        tracker.log_table(name, columns=columns, data=rows, step=step)

    def finish(self) -> None:
        """Close the tracker after logging the best checkpoint, or the last without validation."""
        if self.config.backend == "wandb" and self.accelerator.is_main_process:
            best = self.folder.best if self.folder.best.is_dir() else self.folder.last
            self.attempt(
                lambda: record_model(
                    self.wandb_run, best.resolve(), self.run_id, upload=self.config.artifact
                )
            )
        try:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except Exception as error:  # as in attempt
            logger.warning("the tracker could not be closed; the run is complete: %s", error)
        self.accelerator.trackers.clear()

    def attempt(self, action: Callable[[], object]) -> None:
        """Run an action of the tracker, unless it is disabled; an error disables it."""
        if not self.alive:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker raises: training does not depend on it
            self.alive = False
            logger.warning("tracking stopped, training continues: %s", error)


def stack_images(images: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically on a white background."""
    width, height = max(i.width for i in images), sum(i.height for i in images)
    sheet, top = Image.new("RGB", (width, height), (255, 255, 255)), 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def flatten(plain: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names such as `optim.lr`."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": part for key, part in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run repeats, and damaged ones.

    Prints how many are damaged, except for an incomplete last line, which a kill leaves behind.
    """
    if not path.exists():
        return
    kept, damages = [], []
    for number, line in enumerate(read_file(path).splitlines(keepends=True), 1):
        try:
            if parse_step(line) <= step:
                kept.append(line)
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n"):
                damages.append(f"line {number} ({error})")
    if damages:
        print(
            f"warning: {path}: {len(damages)} damaged lines were removed, the first: {damages[0]}",
            file=sys.stderr,
        )
    write_atomically(path, b"".join(kept))


def parse_step(line: bytes) -> int:
    """Return the step of a line of metrics.jsonl.

    Raises ValueError unless it is complete and holds a step and numbers; NaN and null are numbers
    that could not be computed.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it is incomplete")
    plain = msgspec.convert(json.loads(line), dict[str, Any], strict=True)
    step = msgspec.convert(plain.pop("step", None), Count, strict=True)
    msgspec.convert(plain, dict[str, float | None], strict=True)
    return step
