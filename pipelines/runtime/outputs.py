"""Outputs of a verb: checked before its work starts, compared with those of the previous run."""

import errno
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.runtime.errors import RunError, UsageError, refuse_url
from shards.sample import DataError
from shards.store import is_url
from shards.writer import write_atomically

ANOTHER = "choose another"
"""Remedy for an output that cannot be written."""
NAME_ERRORS = frozenset(
    {
        *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ELOOP),
        *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    }
)
"""Errors of one name; with others, such as a full disk, the next file fails too."""
UNCHANGED, REPLACED = " (unchanged)", " (replaced the previous one)"


def require_writable(flag: str, folder: Path, remedy: str = ANOTHER) -> None:
    """Raise RunError unless files can be written to a folder, existing or to be created.

    Creates nothing: what is probed is the folder, or its nearest existing parent.

    Args:
        flag: the flag that names the folder, for the message.
        folder: the folder.
        remedy: how to choose another folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path_exists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{existing} is a file" if existing.is_file() else error.strerror
        raise RunError(f"{flag} {folder} cannot be written to: {reason}; {remedy}") from error


def path_exists(path: Path) -> bool:
    """Return whether a path exists; False if one of its parents is a file or not readable."""
    try:
        return path.exists()
    except OSError:
        return False


def require_writable_file(flag: str, file: Path, remedy: str = ANOTHER) -> None:
    """Raise UsageError if an output file is a folder, RunError if its folder is not writable."""
    if file.is_dir():
        raise UsageError(f"{flag} {file} is a directory; {flag} takes the file to write")
    require_writable(flag, file.parent, remedy)


@contextmanager
def refuse_unusable_name(path: Path) -> Iterator[None]:
    """Raise DataError if writing `path` in this block fails because of its name.

    The name is too long for the file system, or another file has the name of one of its folders.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        raise DataError(f"{path} cannot be written ({error.strerror}); rename the image") from error


def read_previous(file: Path) -> bytes | None:
    """Read the result of a previous run; None if there is none."""
    return file.read_bytes() if file.is_file() else None


def compare(previous: bytes | None, data: bytes) -> str:
    """Describe what happened to the previous result, as the end of a line; empty without one."""
    if previous is None:
        return ""
    return UNCHANGED if previous == data else REPLACED


def write_result(file: Path, data: bytes) -> str:
    """Write a result atomically, creating its folder; returns the description of `compare`."""
    previous = read_previous(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, data)
    return compare(previous, data)


def refuse_bad_output(flag: str, place: str) -> None:
    """Raise ValueError for an output that is a URL of another protocol, or names no folder."""
    if not is_url(place):
        refuse_url(flag, place)
    elif re.search(r"://$|[?*\[\]]", place):
        raise ValueError(f"{flag} {place}: a URL must name a bucket and contain none of ? * [ ]")
