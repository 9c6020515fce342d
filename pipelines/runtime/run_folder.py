"""A run folder: the paths of its files, and its lock."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.runtime.errors import RunError
from shards.writer import open_lock_file

SCORES = "scores.json"
"""Name of the scores that `unet evaluate` writes, in a run folder or elsewhere."""
CHECKPOINT_STATE = "state.json"
"""Name of the state in the folder of a checkpoint."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of the files in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A line of JSON per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        """How the run ended, JSON."""
        return self.path / "state.json"

    @property
    def environment(self) -> Path:
        """Versions and devices, JSON."""
        return self.path / "environment.json"

    @property
    def scores(self) -> Path:
        """Scores of the best checkpoint, written by `unet evaluate`, JSON."""
        return self.path / SCORES

    @property
    def report(self) -> Path:
        """The run as one page, HTML."""
        return self.path / "report.html"

    @property
    def images(self) -> Path:
        """Folder of the first batch and of validation images, drawn for people."""
        return self.path / "pictures"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Link to the last checkpoint."""
        return self.checkpoints / "last"

    @property
    def best(self) -> Path:
        """Link to the checkpoint with the best validation score."""
        return self.checkpoints / "best"


class RunLock:
    """Allows one training process in a run folder; released when the process ends."""

    def __init__(self, folder: RunFolder) -> None:
        """Raises RunError if another process holds the lock or the folder is not writable."""
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            self.file = os.fdopen(open_lock_file(folder.path / ".lock"), "w")
        except OSError as error:
            reason = "it is a file" if folder.path.is_file() else error.strerror
            raise RunError(
                f"--run-dir {folder.path} cannot be written to: {reason}; choose another --run-dir"
            ) from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process is training in {folder.path}; wait for it or choose another"
            ) from error
