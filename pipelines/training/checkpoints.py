"""Checkpoints of a run: written under a temporary name, renamed when complete, resumed from.

RUN/checkpoints/step-00012000/
    model.safetensors, config.json   the weights that are scored and used (or their average)
    training.pt                      raw weights, optimizer, loss scaler
    state.json                       TrainState, and the sha256 of all four
RUN/checkpoints/last, best           relative links, replaced atomically

They are copied to host memory and written in the background.
"""

import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import msgspec
from safetensors import SafetensorError
from torch.amp.grad_scaler import GradScaler

from pipelines.model.checkpoint_files import (
    find_best,
    list_checkpoints,
    read_state,
    verify_files,
    write_state,
)
from pipelines.runtime.command import launched_rank
from pipelines.runtime.errors import RunError, UsageError, refuse_changed_settings
from pipelines.runtime.failures import is_device_error, is_killed_worker, is_out_of_memory
from pipelines.runtime.run_folder import RunFolder
from pipelines.training.optim import Learner
from pipelines.training.other_data import describe_other_data
from pipelines.training.snapshot import TRAINING, HostBuffers, Snapshot
from pipelines.training.stored_training import read_training
from shards.documents import Count
from shards.sample import DataError
from shards.writer import flush_to_disk
from unet import UNet, weights

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the thread that writes; 0 is that of training."""

ABSENT = {"fold": None, "model.deep_supervision": False}
"""What settings are that the recorded ones of a run lack."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """The state of a run besides its tensors, equal on all ranks."""

    step: Count
    """Optimizer steps completed."""
    position: Count
    """Samples of the stream consumed: the position at which the next global batch starts."""
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    """Wall-clock time of training, summed over resumes."""
    validated: Count
    """Step of the last validation."""
    best: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    """Best validation score so far."""
    tracking_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,128}$")] | None
    """Id of the tracker's run, which a resume continues."""
    fixed: dict[str, Any]
    """Settings that must not change on resume, by flag name."""
    stale: Count = 0
    """Validations since the best one."""
    val_images: Count = 0
    """Images of each validation, chosen when the run started, so that scores can be compared; 0:
    all."""


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
        return self.run.last.is_dir() or bool(list_checkpoints(self.run))

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
        write_state(temporary, asdict(state))
        for file in temporary.iterdir():
            flush_to_disk(file)
        if self.is_complete(final):
            # This step was saved before: with equal weights, but perhaps before its validation.
            write_state(final, asdict(state))
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)

    def is_complete(self, folder: Path) -> bool:
        """Whether a checkpoint exists and its files match their checksums."""
        try:
            _, checksums = read_state(folder, TrainState)
            verify_files(folder, checksums, (TRAINING, weights.HEADER, weights.WEIGHTS))
        except DataError:
            return False
        return bool(checksums)

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

        If it is lost or damaged, prints that and loads the newest complete checkpoint. What a
        killed run was writing is removed.

        `data`: folder or URL of the data set, for messages.

        Raises DataError if no checkpoint is complete, UsageError naming a setting that differs
        from the run that wrote it.
        """
        if launched_rank() == 0:
            self.remove_leftovers()
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
        new = json.loads(json.dumps(fixed))
        damages: list[str] = []
        for folder in self.candidates():
            try:
                state, training = self.read(folder, new, learner, data)
            except DataError as error:
                damages.append(str(error))
                continue
            break
        else:
            raise DataError(
                f"--run-dir {self.run.path} has no complete checkpoint: {'; '.join(damages)}; "
                "restore one, or train in another --run-dir"
            )
        if launched_rank() == 0:
            self.report_replacement(folder, damages)
        learner.load_state_dict(training)
        if scaler is not None and training["scaler"] is not None:
            scaler.load_state_dict(training["scaler"])
        return state

    def remove_leftovers(self) -> None:
        """Remove the temporary folders and links of a run that was killed while it wrote."""
        for path in self.run.checkpoints.glob(".*.tmp"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def candidates(self) -> list[Path]:
        """List the checkpoints to resume from: the target of `last`, then the newest first."""
        newest = list_checkpoints(self.run)
        if not self.run.last.is_dir():
            return newest
        last = self.run.last.resolve()
        return [last, *(path for path in newest if path.resolve() != last)]

    def report_replacement(self, folder: Path, damages: Sequence[str]) -> None:
        """Print why training resumes from another checkpoint than `last`, and restore `best`."""
        last = self.run.last
        if not last.is_dir():
            state = f"is a link to {os.readlink(last)}, which is" if last.is_symlink() else "is"
            damages = [f"{last} {state} missing", *damages]
        if damages:
            print(
                f"warning: {'; '.join(damages)}; resuming from {folder.name}, the newest complete "
                "checkpoint",
                file=sys.stderr,
            )
        if not self.run.best.is_dir() and (best := find_best(self.run)) is not None:
            replace_link(self.run.best, best.name)
            print(
                f"{self.run.best} was missing; restored as a link to {best.name}", file=sys.stderr
            )

    def read(
        self, folder: Path, new: dict[str, Any], learner: Learner, data: str
    ) -> tuple[TrainState, dict[str, Any]]:
        """Read state and tensors of a checkpoint.

        Raises DataError if it is damaged, UsageError if the settings `new` differ from its own.
        """
        state, checksums = read_state(folder, TrainState)
        self.refuse_other_run(state, new, data)
        verify_files(folder, checksums, (TRAINING, weights.HEADER, weights.WEIGHTS))
        training = read_training(folder / TRAINING, learner)
        if not checksums:
            try:
                UNet.from_pretrained(str(folder))
            except (ValueError, FileNotFoundError) as error:
                raise DataError(str(error)) from error
        return state, training

    def refuse_other_run(self, state: TrainState, new: dict[str, Any], data: str) -> None:
        """Raise UsageError naming a setting in `new` that differs from the run of `state`."""
        if new.get("manifest") != state.fixed.get("manifest"):
            differences = describe_other_data(self.run.config, state.fixed["manifest"], data)
            raise UsageError(
                f"--run-dir {self.run.path}: was trained on other data: {differences}; resume with "
                "that data, or train in another --run-dir (--init-from reuses the weights)"
            )
        refuse_changed_settings(
            str(self.run.path),
            old={**ABSENT, **state.fixed},
            new={**ABSENT, **new},
            elsewhere="start in another --run-dir",
            hint=" (--init-from takes its weights)",
        )


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
    return not (is_out_of_memory(error) or is_device_error(error) or is_killed_worker(error))


def replace_link(link: Path, target: str) -> None:
    """Create a relative symbolic link, replacing an old one atomically."""
    temporary, copied = (link.with_name(f".{link.name}.{end}") for end in ("tmp", "copy.tmp"))
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if link.is_dir() and not link.is_symlink():
        # A copy without links (cp -rL) turned it into a folder.
        shutil.rmtree(copied, ignore_errors=True)
        link.rename(copied)
    temporary.replace(link)
    shutil.rmtree(copied, ignore_errors=True)
