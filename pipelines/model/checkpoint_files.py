"""The files of a checkpoint folder: their checksums, and which folders of a run are checkpoints."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipelines.runtime.run_folder import CHECKPOINT_STATE, RunFolder
from shards.documents import Sha256, convert, parse_json
from shards.local_files import open_file, read_file
from shards.sample import DataError
from shards.writer import write_json
from unet import weights

T = TypeVar("T")
CHECKSUMS = "checksums"
"""Name in the state of a checkpoint: the sha256 of each of its files, by name."""


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a checkpoint, with the sha256 of it and of the folder's other files."""
    others = [path for path in sorted(folder.iterdir()) if path.name != CHECKPOINT_STATE]
    checksums = {path.name: hash_file(path) for path in others}
    checksums[CHECKPOINT_STATE] = hash_plain(state)
    write_json(folder / CHECKPOINT_STATE, {**state, CHECKSUMS: checksums})


def read_state(folder: Path, kind: type[T]) -> tuple[T, dict[str, str]]:
    """Read the state of a checkpoint and the sha256 of its files; none in an older checkpoint.

    Raises DataError if it is missing, damaged or not of the form of `kind`.
    """
    path = folder / CHECKPOINT_STATE
    try:
        plain = parse_json(read_file(path))
        checksums = convert(plain.pop(CHECKSUMS, {}), dict[str, Sha256])
        if checksums and hash_plain(plain) != checksums.get(CHECKPOINT_STATE):
            raise ValueError("its values differ from their sha256")
        return convert(plain, kind), checksums
    except PermissionError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error})") from error


def verify_files(folder: Path, checksums: dict[str, str], names: Sequence[str]) -> None:
    """Raise DataError if a file is missing, or its sha256 differs from the one in `checksums`."""
    for name in names:
        path = folder / name
        try:
            changed = name in checksums and hash_file(path) != checksums[name]
        except PermissionError:
            raise
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
        if changed:
            raise DataError(f"{path} is damaged (it differs from its sha256 in {CHECKPOINT_STATE})")


def verify_model(folder: Path) -> None:
    """Raise DataError if weights or header differ from the checksums that were saved with them.

    Checkpoints from elsewhere and of earlier versions have none.
    """
    if (folder / CHECKPOINT_STATE).exists():
        _, checksums = read_state(folder, dict[str, Any])
        verify_files(folder, checksums, (weights.HEADER, weights.WEIGHTS))


def hash_file(path: Path) -> str:
    """Compute the sha256 of a file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_plain(plain: dict[str, Any]) -> str:
    """Compute the sha256 of a JSON object, whatever its layout."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def list_checkpoints(run: RunFolder) -> list[Path]:
    """List the checkpoint folders of a run, the newest first, whatever `last` and `best` are."""
    return sorted(
        (path for path in run.checkpoints.glob("step-*") if path.is_dir()),
        key=lambda path: (len(path.name), path.name),
        reverse=True,
    )


def find_best(run: RunFolder) -> Path | None:
    """Find the checkpoint with the best validation score by the states of a run, if any is left."""
    for folder in list_checkpoints(run):
        try:
            state, _ = read_state(folder, dict[str, Any])
        except DataError:
            continue  # a damaged one is reported when the run is resumed
        validated = state.get("best") is not None and state.get("validated") == state.get("step")
        if validated and state.get("stale") == 0:
            return folder
    return None
