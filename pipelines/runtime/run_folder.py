"""A run folder: the names of its files, and its lock."""

import fcntl
from pathlib import Path

from pipelines.runtime.errors import RunError

CHECKPOINTS = "checkpoints"
STATE = "state.json"


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


CONFIG, METRICS, ENVIRONMENT = "config.yaml", "metrics.jsonl", "environment.json"
