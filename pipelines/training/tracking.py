"""Metrics and images of a run: RUN/metrics.jsonl, and a tracker through Accelerate."""

import json
import logging
import netrc
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import yaml
from accelerate import Accelerator
from PIL import Image

from pipelines.runtime.errors import RunError, suggest_write_remedy
from pipelines.runtime.run_folder import RunFolder
from pipelines.runtime.yaml_flags import refuse_unused
from pipelines.training.checkpoints import TrainState
from shards.documents import Count
from shards.images.files import encode_png
from shards.local_files import read_file
from shards.writer import write_atomically

logger = logging.getLogger(__name__)

INIT_TIMEOUT = 10
"""Seconds for the server of wandb to start a run; otherwise the run is kept offline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Experiment tracking."""

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    """wandb: online with a key (WANDB_API_KEY or `wandb login`), else offline in the run folder.
    tensorboard: in the run folder; needs unet-shards[tensorboard]."""
    project: str = "unet"
    """Project that the run appears under."""
    pictures: int = 4
    """Number of images to draw of the first batch, as the network sees it, and of each validation,
    with mask and prediction; also written to RUN/pictures. 0: none."""
    artifact: bool = False
    """Upload the best checkpoint at the end (wandb)."""

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise ValueError(f"--tracking.pictures must be >= 0, got {self.pictures}")
        if self.backend == "none":
            reason = "has no effect with --tracking.backend none; remove one of the two"
            refuse_unused(self, reason, "project", prefix="tracking.")
        if self.artifact and self.backend != "wandb":
            raise ValueError("--tracking.artifact needs --tracking.backend wandb")
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
        state: TrainState,
    ) -> None:
        """Write RUN/config.yaml, truncate RUN/metrics.jsonl to the step of `state`, start tracking.

        `resolved`: the resolved configuration.
        """
        self.accelerator, self.config, self.folder = accelerator, config, folder
        self.run_id = state.tracking_id or uuid.uuid4().hex[:8]
        if accelerator.is_main_process:
            write_atomically(folder.config, yaml.safe_dump(resolved, sort_keys=False).encode())
            drop_lines_after(folder.metrics, state.step)
        self.alive = bool(config.trackers())
        if self.alive:
            self.attempt(lambda: self.start(resolved))

    def start(self, resolved: dict[str, Any]) -> None:
        """Start the tracker with the resolved configuration.

        A wandb run that cannot be online is kept offline; prints how to upload it.
        """
        if self.config.backend != "wandb":
            # tensorboard uses the project as a folder, and takes no nested settings.
            self.accelerator.init_trackers("tensorboard", config=flatten(resolved))
            return
        mode, reason = os.environ.get("WANDB_MODE"), ""
        if mode == "online" and not has_wandb_key():
            mode, reason = "offline", "wandb has no key (WANDB_API_KEY or wandb login)"
        mode = mode or ("online" if has_wandb_key() else "offline")
        try:
            self.start_wandb(resolved, mode)
        except Exception as error:  # whatever the server or its answers provoke
            if mode != "online":
                raise
            reason = f"wandb cannot start online ({' '.join(str(error).split())[:200]})"
            # Both hold the run that could not start. Accelerate has imported wandb.
            self.accelerator.trackers.clear()
            sys.modules["wandb"].teardown()
            self.start_wandb(resolved, "offline")
        if reason and self.accelerator.is_main_process:
            run: Any = self.accelerator.get_tracker("wandb", unwrap=True)
            print(
                f"tracking: {reason}; the run is kept offline, to upload it: "
                f"wandb sync {shlex.quote(str(Path(run.dir).parent))}",
                file=sys.stderr,
            )

    def start_wandb(self, resolved: dict[str, Any], mode: str) -> None:
        """Start a wandb run, or continue that of this id."""
        settings: dict[str, Any] = {"quiet": True, "init_timeout": INIT_TIMEOUT}
        arguments = {
            "dir": str(self.folder.path),
            "id": self.run_id,
            "name": self.folder.path.resolve().name,
            "resume": "allow",
            "mode": mode,
            "settings": settings,
        }
        self.accelerator.init_trackers(
            self.config.project, config=resolved, init_kwargs={"wandb": arguments}
        )

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
        if not (self.accelerator.is_main_process and self.config.pictures):
            return
        drawn = [*draw()]
        sheet = stack_images(drawn)
        path = self.folder.images / f"{name.replace('/', '-')}.png"
        try:
            self.folder.images.mkdir(exist_ok=True)
            write_atomically(path, encode_png(sheet), durable=False)
        except OSError as error:
            logger.warning("%s was not written, training continues: %s", path, error)
        if self.config.backend == "wandb":
            self.attempt(lambda: self.log_images({name: drawn}, step))
        elif self.alive:
            pixels = np.asarray(sheet)[None]
            self.attempt(lambda: self.log_images({name: pixels}, step, dataformats="NHWC"))

    def log_images(self, values: dict[str, Any], step: int, **named: Any) -> None:
        """Log images with every active tracker; `named`: its own arguments."""
        for tracker in self.accelerator.trackers:
            tracker.log_images(values, step=step, **named)

    def finish(self, best: Path) -> None:
        """Close the tracker; `best`: the best checkpoint, uploaded with --tracking.artifact."""
        if self.config.artifact and self.accelerator.is_main_process:
            self.attempt(lambda: upload(self.accelerator, best.resolve(), f"{self.run_id}-best"))
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


def upload(accelerator: Accelerator, folder: Path, name: str) -> None:
    """Upload a checkpoint to wandb as an artifact of the run."""
    run: Any = accelerator.get_tracker("wandb", unwrap=True)
    run.log_artifact(str(folder), name=name, type="model")


def stack_images(images: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically on a white background."""
    width, height = max(i.width for i in images), sum(i.height for i in images)
    sheet, top = Image.new("RGB", (width, height), (255, 255, 255)), 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def flatten(plain: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """Flatten nested settings to dotted names such as `optim.lr`."""
    flat = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": part for key, part in flatten(value).items()}
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
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


def has_wandb_key() -> bool:
    """Whether wandb can log in without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in known)
