"""Local files, opened only if they are files: a pipe or a device may never answer."""

import io
import os
import stat
from pathlib import Path
from typing import cast

from shards.sample import DataError

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def refuse_special(path: Path | str) -> None:
    """Raise DataError for a pipe, socket or device, or a link to one; nothing is opened."""
    refuse_kind(path, os.stat(path).st_mode)


def refuse_kind(path: Path | str, mode: int) -> None:
    """Raise DataError if the mode of a path is that of a pipe, socket or device."""
    if (kind := KINDS.get(stat.S_IFMT(mode))) is not None:
        raise DataError(f"{path} is {kind}, not a file; remove it")


def describe_no_directory(path: Path) -> str:
    """Return problem and remedy of a path that should be a directory and is not."""
    if path.exists():
        return f"is a file, not a directory; use its directory {path.parent}"
    return "does not exist; check the path"


def open_file(path: Path | str, buffering: int = -1) -> io.BufferedReader | io.FileIO:
    """Open a file for reading. Raises OSError, and DataError for a pipe, socket or device."""
    refuse_special(path)
    # The path may have been replaced since: without this flag, opening a pipe waits for a writer.
    file = open(path, "rb", buffering, opener=open_at_once)  # noqa: SIM115 (returned open)
    try:
        refuse_kind(path, os.fstat(file.fileno()).st_mode)
    except DataError:
        file.close()
        raise
    return cast(io.BufferedReader | io.FileIO, file)


def open_at_once(path: str, flags: int) -> int:
    """Open a path for `open`, without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_file(path: Path | str) -> bytes:
    """Read a file. Raises OSError, and DataError for a pipe, socket or device."""
    with open_file(path, 0) as file:
        return file.read()


def read_text(path: Path | str, encoding: str = "utf-8-sig") -> str:
    """Read a text file, line ends unified. Raises as `read_file`, and UnicodeDecodeError."""
    return read_file(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def refuse_special_files(folder: Path) -> None:
    """Raise DataError if an entry of a folder is a pipe, socket or device, or a link to one."""
    for path in folder.iterdir():
        if path.exists():
            refuse_special(path)
