"""Checkpoints of a run: written under a temporary name, renamed when complete, resumed from.

RUN/checkpoints/step-00012000/
    model.safetensors, config.json   the weights that are scored and used (or their average)
    training.pt                      raw weights, optimizer, loss scaler
    state.json                       TrainState
RUN/checkpoints/last, best           relative links, replaced atomically

They are copied to host memory and written in the background.
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

from pipelines.runtime.errors import RunError, UsageError, refuse_changed_settings
from pipelines.runtime.failures import is_device_error, is_killed_worker, out_of_memory
from pipelines.runtime.run_folder import CHECKPOINT_STATE, RunFolder
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
    """The state of a run besides its tensors, equal on all ranks."""

    step: int
    """Optimizer steps completed."""
    position: int
    """Samples of the stream consumed: the position at which the next global batch starts."""
    seconds: float
    """Wall-clock time of training, summed over resumes."""
    validated: int
    """Step of the last validation."""
    best: float | None
    """Best validation score so far."""
    tracking_id: str | None
    """Id of the tracker's run, which a resume continues."""
    fixed: dict[str, Any]
    """Settings that must not change on resume, by flag name."""
    stale: int = 0
    """Validations since the best one."""


class Checkpoints:
    """The checkpoints of one run folder. Only the main process saves, and one at a time.

    `save` copies to host memory and returns; a thread writes, flushes, renames, links and prunes.
    A checkpoint is on the disk when `wait` returns. An error of the thread is raised by `wait`,
    `raise_failure` or the next `save`. The host memory is allocated once (see `HostBuffers`): four
    times the weights with AdamW and an average.

    Leaving the context waits for the thread, and raises its error, or logs it if the context is
    left with another error.
    """

    def __init__(self, run: RunFolder, keep: int, keep_every: int | None = None) -> None:
        """Open the checkpoints of a run folder.

        Args:
            run: the run folder.
            keep: number of latest checkpoints to keep.
            keep_every: checkpoints at multiples of this step are kept too.
        """
        self.run, self.keep, self.keep_every = run, keep, keep_every
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
        # Dropped, because the traceback of its error would keep the run, and so its lock, alive.
        writing, self.writing = self.writing, None
        failure = writing.exception() if writing is not None else None
        if error is None and failure is not None:
            raise failure
        if failure not in (None, error):
            logger.warning("%s", failure)

    @property
    def exist(self) -> bool:
        """Whether the run has saved a checkpoint."""
        return self.run.last.is_dir()

    def save(
        self, state: TrainState, learner: Learner, scaler: GradScaler | None, *, is_best: bool
    ) -> None:
        """Wait for the previous checkpoint, copy this one to host memory and start to write it.

        Raises RunError if the previous one could not be written.
        """
        self.wait()
        snapshot = self.buffers.take(learner, scaler)
        self.writing = self.writer.submit(self.publish, state, snapshot, is_best=is_best)

    def wait(self) -> None:
        """Wait until the checkpoint that was saved last is complete on the disk.

        Raises RunError if it could not be written; the previous one is intact.
        """
        if self.writing is not None:
            self.writing.result()

    def raise_failure(self) -> None:
        """Raise the RunError of a failed write. Never waits, so that each step can call it."""
        if self.writing is not None and self.writing.done():
            self.writing.result()

    def publish(self, state: TrainState, snapshot: Snapshot, *, is_best: bool) -> None:
        """Write a checkpoint, link `last` (and `best`) to it, then remove old checkpoints.

        Raises RunError if it cannot be written; the previous one is intact.
        """
        final = self.run.checkpoints / f"step-{state.step:08d}"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            self.write(final, temporary, state, snapshot)
            for link in (self.run.last, self.run.best) if is_best else (self.run.last,):
                replace_link(link, final.name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not is_disk_error(error):
                raise
            free = shutil.disk_usage(self.run.checkpoints).free / 2**20
            raise RunError(
                f"{final} cannot be written ({error}); {free:,.0f} MiB are free there: free some "
                "space, then rerun the same command to resume from the previous checkpoint"
            ) from error
        self.prune()

    def write(self, final: Path, temporary: Path, state: TrainState, snapshot: Snapshot) -> None:
        """Write a checkpoint under a temporary name, flush it to the disk and rename it."""
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        snapshot.write(temporary)
        write_json(temporary / CHECKPOINT_STATE, asdict(state))
        for file in temporary.iterdir():
            flush_to_disk(file)
        if final.exists():
            # This step was saved before: with equal weights, but perhaps before its validation.
            write_json(final / CHECKPOINT_STATE, asdict(state))
            shutil.rmtree(temporary)
        else:
            temporary.rename(final)

    def prune(self) -> None:
        """Remove old checkpoints, except the targets of `last` and `best` and every n-th step."""
        links = (self.run.last, self.run.best)
        linked = {os.readlink(link) for link in links if link.is_symlink()}
        for path in sorted(self.run.checkpoints.glob("step-*"))[: -self.keep]:
            step = int(path.name.removeprefix("step-"))
            permanent = self.keep_every is not None and step % self.keep_every == 0
            if path.name not in linked and not permanent:
                shutil.rmtree(path)

    def resume(
        self, fixed: dict[str, Any], learner: Learner, scaler: GradScaler | None, data: str = ""
    ) -> TrainState:
        """Load the last checkpoint into `learner`; return a fresh state if there is none.

        `data`: folder or URL of the data set, for messages.

        Raises DataError if the checkpoint is damaged, UsageError naming a setting that differs
        from the run that wrote it.
        """
        if not self.exist:
            return TrainState(
                step=0,
                position=0,
                seconds=0.0,
                validated=0,
                best=None,
                tracking_id=None,
                fixed=fixed,
            )
        state, training = self.read_last()
        new = json.loads(json.dumps(fixed, sort_keys=True))
        if new.get("manifest") != state.fixed.get("manifest"):
            differences = describe_other_data(self.run.config, state.fixed["manifest"], data)
            raise UsageError(
                f"--run-dir {self.run.path}: was trained on other data: {differences}; resume with "
                "that data, or train in another --run-dir (--init-from reuses the weights)"
            )
        refuse_changed_settings(
            str(self.run.path),
            old=state.fixed,
            new=new,
            elsewhere="start in another --run-dir",
            hint=" (--init-from takes its weights)",
        )
        learner.load_state_dict(training)
        if scaler is not None and training["scaler"] is not None:
            scaler.load_state_dict(training["scaler"])
        return state

    def read_last(self) -> tuple[TrainState, dict[str, Any]]:
        """Read state and tensors of the last checkpoint. Raises DataError if it is damaged."""
        folder = self.run.last
        try:
            state = TrainState(**json.loads((folder / CHECKPOINT_STATE).read_bytes()))
            training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        except OSError as error:
            raise DataError(f"{folder} is incomplete: {error}") from error
        except Exception as error:  # torch's reader raises whatever the bytes provoke
            what = " ".join(str(error).split())[:200]
            raise DataError(
                f"{folder.resolve()}: {CHECKPOINT_STATE} or {TRAINING} is damaged ({what}); "
                f"point {folder} at an older checkpoint"
            ) from error
        return state, training


def lower_priority() -> None:
    """Give the calling thread a tenth of the share that others have of a busy core.

    Where all cores compute, a thread beside the threads of an operator holds each of its barriers
    up: a step of 0.2 s took 1.7 s while a checkpoint was written. Idle cores serve it as before.
    """
    if sys.platform == "linux":  # elsewhere a priority is that of the process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def is_disk_error(error: Exception) -> bool:
    """Whether an error that was raised while writing a checkpoint is about the disk.

    torch raises a bare RuntimeError if the disk is full. Copying weights from a device raises its
    earlier asynchronous errors, and the signal handler of a killed worker may raise at any time.
    """
    return not (out_of_memory(error) or is_device_error(error) or is_killed_worker(error))


def replace_link(link: Path, target: str) -> None:
    """Create a relative symbolic link, replacing an old one atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
