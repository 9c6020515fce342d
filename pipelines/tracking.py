"""Where the numbers of a run go: always metrics.jsonl, and a tracker through Accelerate."""

import json
import logging
import netrc
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate import Accelerator

from pipelines.checkpoint import TrainState
from shards.writer import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """The tracker."""

    backend: Literal["wandb", "none"] = "wandb"
    """wandb: online with a key (WANDB_API_KEY or `wandb login`), else offline in the run folder."""
    project: str = "unet"
    """Project that the run appears under."""

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
        self.accelerator, self.path = accelerator, run_dir / "metrics.jsonl"
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
            self.attempt(
                lambda: accelerator.init_trackers(
                    config.project, config=resolved, init_kwargs={"wandb": arguments}
                )
            )

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Numbers of a step: a line of metrics.jsonl, and the tracker's curves."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        known = {name: value for name, value in values.items() if value is not None}
        self.attempt(lambda: self.accelerator.log(known, step=step))

    def finish(self) -> None:
        """Close the tracker; the process group goes with it. The last thing that a rank does."""
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


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will make again, and a last line that was cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
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
