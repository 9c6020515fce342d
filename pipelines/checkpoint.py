"""Checkpoints of a run: written aside, renamed when whole, resumed from the last one.

RUN/checkpoints/step-00012000/
    model.safetensors, config.json   the weights that are scored and used (averaged if that is on)
    training.pt                      raw weights, optimizer, loss scaler
    state.json                       TrainState
RUN/checkpoints/last, best           relative links, replaced atomically

They are copied to host memory and written beside training.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch.amp.grad_scaler import GradScaler

from pipelines.config import RunError, UsageError
from pipelines.failures import is_device_error, is_killed_worker, out_of_memory
from pipelines.optim import Learner
from pipelines.snapshot import TRAINING, HostBuffers, Snapshot
from shards.images import ImageFormat
from shards.sample import DataError
from shards.writer import write_json
from unet import DataSpec, UNet, weights

CHECKPOINTS = "checkpoints"
STATE = "state.json"

logger = logging.getLogger(__name__)


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
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
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
        self, fixed: dict[str, Any], learner: Learner, scaler: GradScaler | None
    ) -> TrainState:
        """Load the last checkpoint into `learner`; a fresh state where there is none.

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
            state = TrainState(**json.loads((folder / STATE).read_text()))
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


def flush_to_disk(file: Path) -> None:
    """Return when a file's bytes would survive a power cut."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model to evaluate or predict with."""

    model: UNet
    spec: DataSpec
    digest: str
    """sha256 of its weights file."""

    @property
    def image_format(self) -> ImageFormat:
        """How pictures are decoded for it."""
        return ImageFormat(self.spec.channels, self.spec.alpha, self.spec.image_range)


def load_model(checkpoint: str) -> LoadedModel:
    """The model of a run folder (its `best`, else `last`), a checkpoint folder or a hub id.

    Raises DataError saying what is missing or damaged.
    """
    try:
        folder = weights.find_folder(str(find_checkpoint(checkpoint)))
        model = UNet.from_pretrained(str(folder))
        with (folder / weights.WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"--checkpoint {checkpoint}: {error}") from error
    except OSError as error:
        raise DataError(
            f"--checkpoint {checkpoint} is no folder and was not found on the hub: {error}"
        ) from error
    if model.spec is None:
        raise DataError(
            f"--checkpoint {checkpoint}: config.json says nothing of classes and pixels"
        )
    return LoadedModel(model, model.spec, digest)


def require_spec(model: UNet) -> DataSpec:
    """What a model that was built for data, or loaded here, knows of its data."""
    assert model.spec is not None
    return model.spec


def find_checkpoint(checkpoint: str) -> Path | str:
    """The folder with the weights, or the hub id as it is."""
    folder = Path(checkpoint)
    if (folder / CHECKPOINTS).is_dir():
        for name in ("best", "last"):
            if (folder / CHECKPOINTS / name).is_dir():
                return (folder / CHECKPOINTS / name).resolve()
        raise DataError(f"--checkpoint {checkpoint}: this run has saved no checkpoint yet")
    if not folder.is_dir() and (
        folder.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1
    ):
        raise DataError(f"--checkpoint {checkpoint} does not exist")
    if not folder.is_dir() and "/" not in checkpoint:
        raise DataError(
            f"--checkpoint {checkpoint} is neither a folder here nor a hub id (owner/name)"
        )
    return folder if folder.is_dir() else checkpoint


class RunLock:
    """One run at a time in a run folder; the lock dies with its process."""

    def __init__(self, run_dir: Path) -> None:
        """Raises RunError where another process holds it, or where nothing can be written."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.file = (run_dir / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"--run-dir {run_dir} cannot be written to: {error.strerror}; choose another"
            ) from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process is training in {run_dir}; wait for it or choose another"
            ) from error
