"""Exit codes and the errors that end a command in one line."""

import errno
import re
from collections.abc import Mapping
from typing import Any

REFUSED = 1
"""Exit code: refused data or a failed run."""
USAGE = 2
"""Exit code: wrong command or configuration."""
INCOMPLETE = 3
"""Exit code: the job finished but skipped some inputs."""
INTERRUPTED = 75
"""Exit code: interrupted; rerun to resume (EX_TEMPFAIL)."""
STOPPED = 130
"""Exit code: ended by Ctrl-C, without saving."""


class UsageError(Exception):
    """A wrong command or configuration; the message is one line: what, where, remedy."""


class RunError(Exception):
    """A failed run; the message is one line: what, where, remedy."""


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the names of settings that differ, in the order of `new`."""
    return [name for name in {**new, **old} if old.get(name) != new.get(name)]


NOT_FLAGS = {
    "inputs": "--input",
    "order_version": "order of the samples",
    "precision": "--mixed_precision",
    "reading": "reading of images",
}
"""Recorded settings whose names are not those of flags."""


def name_flag(name: str) -> str:
    """Return the flag of a recorded setting, or how a message calls it."""
    return NOT_FLAGS.get(name, "--" + name.replace("_", "-"))


def name_setting(name: str, value: Any) -> str:
    """Return a setting as a user would write it: `--optim.lr 0.1`, `--no-compile`, `no --fold`."""
    flag = name_flag(name)
    if value is None:
        return f"no {flag}"
    if isinstance(value, bool):
        prefix, dot, last = flag[2:].rpartition(".")
        return flag if value else f"--{prefix}{dot}no-{last}"
    if isinstance(value, Mapping):
        value = f"({', '.join(f'{key} {item}' for key, item in value.items()) or 'as trained'})"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def refuse_changed_settings(
    place: str, old: Mapping[str, Any], new: Mapping[str, Any], *, elsewhere: str, hint: str = ""
) -> None:
    """Raise UsageError if the output in `place` was created with other settings.

    Args:
        place: run folder or output folder.
        old: the recorded settings.
        new: the settings of this command, as JSON would restore them.
        elsewhere: the remedy: how to choose another place.
        hint: what else to know if that is the only remedy.
    """
    if unknown := [name for name in new if name not in old]:
        raise UsageError(
            f"{place} was created by a version of this program without the setting {unknown[0]}; "
            f"{elsewhere}{hint}"
        )
    if changed := changed_settings(old, new):
        name, *others = changed
        also = f" (also different: {', '.join(map(name_flag, others))})" if others else ""
        raise UsageError(
            f"{name_setting(name, new.get(name))}: {place} was created with "
            f"{name_setting(name, old.get(name))}; keep that, or {elsewhere}{also}"
        )


def refuse_url(flag: str, path: str) -> None:
    """Raise ValueError if a path is a URL of a protocol that is not supported."""
    if looks_like_url(path):
        raise ValueError(
            f"{flag} {path} is a URL of another protocol; use a local folder, or a URL such as "
            "s3://bucket/folder"
        )


def looks_like_url(path: str) -> bool:
    """Return whether a path begins like a URL, supported or not, perhaps with a slash too few."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is not None


WRITE_REMEDIES = {
    errno.ENOSPC: "free some space or choose another place, then rerun the same command",
    errno.EDQUOT: "free some space or raise the quota, then rerun the same command",
    errno.EROFS: "make it writable (mount -o remount,rw) or choose another place",
    errno.EACCES: "correct its permissions (chmod, chown) or choose another place",
    errno.EPERM: "correct its owner and permissions, or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n) or lower --workers",
}


def suggest_write_remedy(error: OSError) -> str:
    """Return a remedy for a failed write."""
    return WRITE_REMEDIES.get(
        error.errno or 0, "correct the cause, then rerun the same command to resume"
    )


def describe_os_error(error: OSError, place: object = None) -> str:
    """Describe a failed operation on a file in one line.

    A full disk, a read-only file system and missing permissions have a remedy; `place` is named if
    the error names no file.
    """
    path = error.filename or (place if error.errno in WRITE_REMEDIES else None)
    what = f"{path}: " * (path is not None) + (error.strerror or str(error))
    remedy = WRITE_REMEDIES.get(error.errno or 0)
    return what if remedy is None else f"{what}; {remedy}"


def describe_read_error(error: OSError, path: object = None) -> str:
    """Describe a failed read in one line; `path` defaults to the file that the error names."""
    remedy = "; make it readable (chmod +r)" * isinstance(error, PermissionError)
    return f"{path or error.filename} cannot be read: {error.strerror or error}{remedy}"


def parse_part(flag: str, text: str) -> tuple[int, int]:
    """Parse `2/5` into (2, 5). Raises ValueError for anything else."""
    number, slash, count = text.partition("/")
    if not slash or not re.fullmatch("[0-9]+/[0-9]+", text):
        raise ValueError(f"{flag} must be like 2/5, got {text!r}")
    if not 1 <= int(number) <= int(count):
        raise ValueError(f"{flag} {text}: the first number must be from 1 to the second")
    return int(number), int(count)
