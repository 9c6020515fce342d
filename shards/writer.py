"""One shard, written as a whole or not at all, the same bytes each time."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from shards.sample import DataError


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A finished shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes `OUT/NAME.tar` and its `.idx` (DALI's webdataset index v1.2).

    Everything goes to a temporary name; leaving the block without an exception flushes it and
    renames it, the index first, so that a tar that exists is whole and has its index. Members are
    USTAR with time 0, owner 0 and mode 0644: the same samples give the same bytes.
    Raises DataError if another process is writing the same shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.lines: list[str] = []
        self.sealed = False

    def __enter__(self) -> Self:
        handle = claim(self.temporary)
        if handle is None:
            raise DataError(f"another process is writing {self.path}; wait for it or stop it")
        os.ftruncate(handle, 0)
        self.stream = HashingStream(os.fdopen(handle, "wb"))
        return self

    def add(
        self, key: str, members: Mapping[str, bytes], unlisted: Mapping[str, bytes] | None = None
    ) -> None:
        """Append a sample: {extension: bytes}, stored side by side in the order of their names.

        `unlisted` are members that belong to no sample for our readers: the index leaves them out.
        """
        unlisted = unlisted or {}
        blocks, words = [], []
        offset = self.stream.size
        for extension, data in sorted([*members.items(), *unlisted.items()]):
            name = f"{key}.{extension}"
            blocks += [tar_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
            if extension not in unlisted:
                words.append(f"{extension} {offset + tarfile.BLOCKSIZE} {len(data)} {name}")
            offset += sum(map(len, blocks[-3:]))
        self.stream.write(b"".join(blocks))
        self.lines.append(" ".join(words))

    def seal(self) -> ShardFile:
        """Finish the file and write its index; the rename follows when the block is left."""
        end = 2 * tarfile.BLOCKSIZE
        self.stream.write(bytes(end + -(self.stream.size + end) % tarfile.RECORDSIZE))
        self.stream.flush_to_disk()
        index = "\n".join([f"v1.2 {len(self.lines)}", *self.lines]) + "\n"
        # Its temporary name needs no more than the shard's: one lock guards both.
        write_atomically(self.path.with_suffix(".idx"), index.encode(), unique="")
        self.sealed = True
        return ShardFile(
            self.path.name, len(self.lines), self.stream.size, self.stream.digest.hexdigest()
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if not self.sealed:
                    self.seal()
                os.replace(self.temporary, self.path)
            else:
                self.temporary.unlink(missing_ok=True)
        finally:
            # Last, since closing gives up the lock.
            self.stream.file.close()


def claim(path: Path) -> int | None:
    """A handle of a file, made if need be, that this process alone writes; None if another does.

    The claim ends when the handle is closed, and with its process.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # The lock dies with its process, so a killed writer leaves nothing that blocks.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, its writer may have renamed or removed the file.
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def blank_header() -> bytes:
    """What `tarfile` writes before a nameless empty file: time 0, owner 0, mode 0644."""
    member = tarfile.TarInfo()
    member.mtime, member.mode = 0, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


BLANK = blank_header()
BLANK_SUM = sum(BLANK[:148]) + 8 * ord(" ") + sum(BLANK[156:])
"""The check sum is taken with eight spaces in its own place (POSIX.1-1988, ustar format)."""


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a file in a tar: those of `tarfile`, in a tenth of its time.

    Raises ValueError for a name of more than 100 bytes.
    """
    raw, digits = name.encode(), b"%011o" % size
    if len(raw) > tarfile.LENGTH_NAME or len(digits) > 11:
        raise ValueError(f"{name} with {size:,} bytes is too long or too large for a tar member")
    check = BLANK_SUM + sum(raw) + sum(digits) - 11 * ord("0")
    head = raw.ljust(100, b"\0") + BLANK[100:124] + digits + BLANK[135:148]
    return head + b"%06o\0 " % check + BLANK[156:]


class HashingStream:
    """A file that knows the sha256 and the size of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Write and count."""
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def flush_to_disk(self) -> None:
        """Return when the bytes would survive a power cut."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if os.fstat(self.file.fileno()).st_size != self.size:
            raise OSError(errno.EIO, "not all bytes were written")


def write_atomically(
    path: Path,
    data: bytes,
    *,
    durable: bool = True,
    within: Path | None = None,
    unique: str | None = None,
) -> None:
    """A file that is there whole or not at all, however its writer ends.

    Args:
        path: its final name.
        data: its content.
        durable: it is also on disk when this returns, should the power fail.
        within: folder on the same disk for the temporary file, which a kill leaves behind; a
            folder that is removed at the end of a job removes it too.
        unique: what keeps the temporary files of several writers apart; by default random.
    """
    unique = secrets.token_hex(4) if unique is None else unique
    temporary = (within or path.parent) / f".{path.name}.{unique}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, plain: Any, within: Path | None = None) -> None:
    """JSON for people and machines, whole or not at all, the same bytes for the same content."""
    write_atomically(path, (json.dumps(plain, indent=1) + "\n").encode(), within=within)
