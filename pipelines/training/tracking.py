"""Where the numbers of a run go: always metrics.jsonl, and a tracker through Accelerate."""

import json
import logging
import netrc
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from accelerate import Accelerator
from PIL import Image

from pipelines.runtime.errors import RunError
from pipelines.training.checkpoints import TrainState
from shards.images.files import encode_png
from shards.writer import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """The tracker."""

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    """wandb: online with a key (WANDB_API_KEY or `wandb login`), else offline in the run folder.
    tensorboard: in the run folder; needs unet-shards[tensorboard]."""
    project: str = "unet"
    """Project that the run appears under."""
    pictures: int = 4
    """Images of the first batch, as the network sees it, and of each validation, with true and
    predicted masks; in RUN/pictures too. 0 is off."""
    artifact: bool = False
    """Upload the best checkpoint at the end (wandb)."""

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise ValueError(f"tracking.pictures must not be below 0, got {self.pictures}")
        if self.artifact and self.backend != "wandb":
            raise ValueError("tracking.artifact needs tracking.backend wandb")
        if self.backend == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError(
                "tracking.backend tensorboard needs tensorboard: pip install "
                "'unet-shards[tensorboard]'"
            )

    def trackers(self) -> list[str]:
        """What Accelerate is told."""
        return [] if self.backend == "none" else [self.backend]


class Tracker:
    """Logs on the main process; a tracker that fails is dropped with a word and ends nothing."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrackingConfig,
        run_dir: Path,
        resolved: dict[str, Any],
        state: TrainState,
    ) -> None:
        """`resolved`: the configuration, written down; `state`: where the run stands."""
        self.accelerator, self.config = accelerator, config
        self.path, self.pictures = run_dir / "metrics.jsonl", run_dir / "pictures"
        self.run_id = state.tracking_id or uuid.uuid4().hex[:8]
        if accelerator.is_main_process:
            write_atomically(
                run_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode()
            )
            forget_after(self.path, state.step)
        self.alive = bool(config.trackers())
        if self.alive:
            mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
            arguments = {
                "dir": str(run_dir),
                "id": self.run_id,
                "name": run_dir.resolve().name,
                "resume": "allow",
                "mode": mode,
                "settings": {"quiet": True},
            }
            # tensorboard takes the project for a folder, and no groups of settings.
            wandb = config.backend == "wandb"
            self.attempt(
                lambda: accelerator.init_trackers(
                    config.project if wandb else "tensorboard",
                    config=resolved if wandb else flat(resolved),
                    init_kwargs={"wandb": arguments},
                )
            )

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Numbers of a step: a line of metrics.jsonl, and the tracker's curves."""
        if not self.accelerator.is_main_process:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}); mend that, and the same "
                "command goes on from the last checkpoint"
            ) from error
        known = {name: value for name, value in values.items() if value is not None}
        self.attempt(lambda: self.accelerator.log(known, step=step))

    def show(self, step: int, name: str, draw: Callable[[], Sequence[Image.Image]]) -> None:
        """Images of a step, drawn on the main process alone, if images are wanted.

        They are written to RUN/pictures, over those of the step before, and given to the tracker.
        """
        if not (self.accelerator.is_main_process and self.config.pictures):
            return
        drawn = [*draw()]
        sheet, file = stacked(drawn), f"{name.replace('/', '-')}.png"
        try:
            self.pictures.mkdir(exist_ok=True)
            write_atomically(self.pictures / file, encode_png(sheet), durable=False)
        except OSError as error:
            logger.warning("%s was not written, training goes on: %s", self.pictures / file, error)
        if self.config.backend == "wandb":
            self.attempt(lambda: self.log_images({name: drawn}, step))
        elif self.alive:
            pixels = np.asarray(sheet)[None]
            self.attempt(lambda: self.log_images({name: pixels}, step, dataformats="NHWC"))

    def log_images(self, values: dict[str, Any], step: int, **named: Any) -> None:
        """As Accelerate's trackers want them, each in its own way."""
        for tracker in self.accelerator.trackers:
            tracker.log_images(values, step=step, **named)

    def finish(self, best: Path) -> None:
        """Close the tracker; the process group goes with it. The last thing that a rank does.

        `best`: the best checkpoint, uploaded if that was asked for.
        """
        if self.config.artifact and self.accelerator.is_main_process:
            self.attempt(lambda: upload(self.accelerator, best.resolve(), f"{self.run_id}-best"))
        try:
            self.accelerator.end_training()
        except Exception as error:  # as in attempt
            logger.warning("the tracker did not end well, the run did: %s", error)

    def attempt(self, action: Callable[[], object]) -> None:
        """Do it if the tracker still works; say once if it does not."""
        if not self.alive:
            return
        try:
            action()
        except Exception as error:  # any tracker, any fault: training goes on without it
            self.alive = False
            logger.warning("tracking stopped, training goes on: %s", error)


def upload(accelerator: Accelerator, folder: Path, name: str) -> None:
    """Give a checkpoint to wandb, as an artifact of the run."""
    run: Any = accelerator.get_tracker("wandb", unwrap=True)
    run.log_artifact(str(folder), name=name, type="model")


def stacked(drawn: Sequence[Image.Image]) -> Image.Image:
    """Images below each other."""
    width, height = max(p.width for p in drawn), sum(p.height for p in drawn)
    sheet, top = Image.new("RGB", (width, height), (255, 255, 255)), 0
    for picture in drawn:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def flat(plain: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """A configuration without groups: `optim.lr` and the like."""
    found = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": part for key, part in flat(value).items()}
        else:
            found[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will make again, and a last line that was cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def has_wandb_key() -> bool:
    """Whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in known)
