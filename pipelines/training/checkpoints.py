"""Checkpoints of a run: written aside, renamed when whole, resumed from the last one.

RUN/checkpoints/step-00012000/
    model.safetensors, config.json   the weights that are scored and used (averaged if that is on)
    training.pt                      raw weights, optimizer, loss scaler
    state.json                       TrainState
RUN/checkpoints/last, best           relative links, replaced atomically

They are copied to host memory and written beside training.
"""

import json
import logging
import os
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch.amp.grad_scaler import GradScaler

from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.failures import is_device_error, is_killed_worker, out_of_memory
from pipelines.runtime.run_folder import CHECKPOINTS, CONFIG, STATE
from pipelines.training.optim import Learner
from pipelines.training.other_data import describe_other_data
from pipelines.training.snapshot import TRAINING, HostBuffers, Snapshot
from shards.sample import DataError
from shards.writer import flush_to_disk, write_json

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the thread that writes; 0 is that of training."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that a run is besides its tensors; the same on all ranks."""

    step: int
    """Optimizer steps made."""
    position: int
    """Samples of the stream consumed: where the next global batch begins."""
    seconds: float
    """Wall-clock time trained, resumes added up."""
    validated: int
    """Step of the last validation."""
    best: float | None
    """Best validation score so far."""
    tracking_id: str | None
    """The tracker's run, continued on resume."""
    fixed: dict[str, Any]
    """What must not change on resume, by name."""
    stale: int = 0
    """Validations since the best one."""


class Checkpoints:
    """The checkpoints of one run folder. Only the main process saves, and one at a time.

    `save` copies to host memory and returns; one thread writes, flushes, renames, links and prunes.
    Until `wait` has returned, what was saved may not be on the disk. A write that failed is raised
    by `wait`, by `raise_failure` and by the next `save`. The host memory is that of
    `HostBuffers`: four times the weights with AdamW and the average, and is used again.

    As a context, it does not end before its thread does; a failure is then raised, or, where the
    context ends with another error, logged.
    """

    def __init__(self, run_dir: Path, keep: int, keep_every: int | None = None) -> None:
        """`keep`: newest ones that stay; `keep_every`: those of steps that it divides stay too."""
        self.folder, self.keep, self.keep_every = run_dir / CHECKPOINTS, keep, keep_every
        self.buffers = HostBuffers()
        self.writer = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoints", initializer=lower_priority
        )
        self.writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: object, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.writer.shutdown()
        # Forgotten, since an error that knows its run would keep that run, and its lock, alive.
        writing, self.writing = self.writing, None
        failure = writing.exception() if writing is not None else None
        if error is None and failure is not None:
            raise failure
        if failure not in (None, error):
            logger.warning("%s", failure)

    @property
    def begun(self) -> bool:
        """Whether there is one."""
        return (self.folder / "last").is_dir()

    def save(
        self, state: TrainState, learner: Learner, scaler: GradScaler | None, *, is_best: bool
    ) -> None:
        """Copy a checkpoint to host memory and begin to write it, once the one before is written.

        Then `last`, and `best`, point at it, and old ones go. Raises the RunError of the one
        before, where that could not be written.
        """
        self.wait()
        snapshot = self.buffers.take(learner, scaler)
        self.writing = self.writer.submit(self.publish, state, snapshot, is_best=is_best)

    def wait(self) -> None:
        """Return when what was saved is complete on the disk.

        Raises RunError where it could not be written; the one before is as it was.
        """
        if self.writing is not None:
            self.writing.result()

    def raise_failure(self) -> None:
        """Raise the RunError of a write that has failed. Waits for nothing: for every step."""
        if self.writing is not None and self.writing.done():
            self.writing.result()

    def publish(self, state: TrainState, snapshot: Snapshot, *, is_best: bool) -> None:
        """Write one checkpoint and point `last`, and `best`, at it. Old ones go only afterwards.

        Raises RunError where it cannot be written; the one before is as it was.
        """
        final = self.folder / f"step-{state.step:08d}"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            self.write(final, temporary, state, snapshot)
            for name in ("last", "best") if is_best else ("last",):
                point(self.folder / name, final.name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not is_disk_error(error):
                raise
            free = shutil.disk_usage(self.folder).free / 2**20
            raise RunError(
                f"{final} cannot be written ({error}); {free:,.0f} MiB are free there: make room, "
                "and the same command goes on from the checkpoint before"
            ) from error
        self.prune()

    def write(self, final: Path, temporary: Path, state: TrainState, snapshot: Snapshot) -> None:
        """Write a checkpoint aside and rename it when all its bytes are on the disk."""
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        snapshot.write(temporary)
        write_json(temporary / STATE, asdict(state))
        for file in temporary.iterdir():
            flush_to_disk(file)
        if final.exists():
            # The same step again: the same weights, perhaps validated by now.
            write_json(final / STATE, asdict(state))
            shutil.rmtree(temporary)
        else:
            temporary.rename(final)

    def prune(self) -> None:
        """Remove all but the newest, those kept for good, and what `last` and `best` point at."""
        pinned = {
            os.readlink(link)
            for name in ("last", "best")
            if (link := self.folder / name).is_symlink()
        }
        steps = sorted(path for path in self.folder.glob("step-*"))
        for path in steps[: -self.keep]:
            step = int(path.name.removeprefix("step-"))
            for_good = self.keep_every is not None and step % self.keep_every == 0
            if path.name not in pinned and not for_good:
                shutil.rmtree(path)

    def resume(
        self, fixed: dict[str, Any], learner: Learner, scaler: GradScaler | None, data: str = ""
    ) -> TrainState:
        """Load the last checkpoint into `learner`; a fresh state where there is none.

        `data`: folder or URL of the data set, for messages.

        Raises UsageError naming what differs from the run that wrote it.
        """
        folder = self.folder / "last"
        if not self.begun:
            return TrainState(
                step=0,
                position=0,
                seconds=0.0,
                validated=0,
                best=None,
                tracking_id=None,
                fixed=fixed,
            )
        try:
            state = TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
            training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        except OSError as error:
            raise DataError(f"{folder} is no whole checkpoint: {error}") from error
        except Exception as error:  # torch's reader raises whatever the bytes provoke
            what = " ".join(str(error).split())[:200]
            raise DataError(
                f"{folder.resolve()}: {STATE} or {TRAINING} is damaged ({what}); "
                f"point {folder} at an older checkpoint"
            ) from error
        now = json.loads(json.dumps(fixed))
        differing = [
            name
            for name in sorted(now.keys() | state.fixed.keys())
            if now.get(name) != state.fixed.get(name)
        ]
        if unknown := sorted(now.keys() - state.fixed.keys()):
            raise UsageError(
                f"{self.folder.parent} was begun by a version of this program that did not know "
                f"{unknown[0]}; begin in another --run-dir (--init-from takes its weights)"
            )
        if "manifest" in differing:
            config = self.folder.parent / CONFIG
            differences = describe_other_data(config, state.fixed["manifest"], data)
            raise UsageError(
                f"--run-dir {self.folder.parent}: was trained on other data: {differences}; resume "
                "with that data, or train in another --run-dir (--init-from reuses the weights)"
            )
        if differing:
            name = differing[0]
            raise UsageError(
                f"{self.folder.parent} was begun with {name} = {state.fixed.get(name)}, now it is "
                f"{now.get(name)}; keep it, or begin in another --run-dir"
                + (f" (also: {', '.join(differing[1:])})" if differing[1:] else "")
            )
        learner.load_state_dict(training)
        if scaler is not None and training["scaler"] is not None:
            scaler.load_state_dict(training["scaler"])
        return state


def lower_priority() -> None:
    """Give the calling thread a tenth of the share that others have of a busy core.

    Where all cores compute, a thread beside the threads of an operator holds each of its barriers
    up: a step of 0.2 s took 1.7 s while a checkpoint was written. Idle cores serve it as before.
    """
    if sys.platform == "linux":  # elsewhere a priority is that of the process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def is_disk_error(error: Exception) -> bool:
    """Whether an error, raised while a checkpoint was written, is about the disk.

    torch raises a bare RuntimeError where a disk is full. Copying weights from a device raises what
    went wrong on it long before, and a worker may be killed at any time.
    """
    return not (out_of_memory(error) or is_device_error(error) or is_killed_worker(error))


def point(link: Path, target: str) -> None:
    """Make a relative symbolic link, replacing an old one in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
