"""One shard, written atomically and byte-identical for the same samples."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from shards.documents import Count, Name, Sha256
from shards.sample import DataError


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A finished shard."""

    name: Name
    samples: Count
    bytes: Count
    sha256: Sha256
    idx_sha256: Sha256 | None = None
    """None in reports that were written before it was recorded."""


class ShardWriter:
    """Context manager that writes `OUT/NAME.tar` and its `.idx` (DALI's webdataset index v1.2).

    Everything is written under a temporary name. Leaving the block without an exception flushes
    and renames it, the `.idx` first, so that a tar that exists is complete and has its `.idx`.
    Members are USTAR with time 0, owner 0 and mode 0644: the same samples give the same bytes.
    Raises DataError if another process is writing the same shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.lines: list[str] = []
        self.sealed = False

    def __enter__(self) -> Self:
        with name_path(self.path):
            handle = try_lock_file(self.temporary)
        if handle is None:
            raise DataError(f"another process is writing {self.path}; wait for it or stop it")
        os.ftruncate(handle, 0)
        self.stream = HashingStream(os.fdopen(handle, "wb"))
        return self

    def add(
        self, key: str, members: Mapping[str, bytes], unlisted: Mapping[str, bytes] | None = None
    ) -> None:
        """Append a sample: {extension: bytes}, stored as adjacent members in the order of names.

        `unlisted` members are stored too, but left out of the `.idx`: our readers ignore them.
        """
        unlisted = unlisted or {}
        blocks, words = [], []
        offset = self.stream.size
        for extension, data in sorted([*members.items(), *unlisted.items()]):
            name = f"{key}.{extension}"
            header = build_tar_header(name, len(data))
            blocks += [header, data, bytes(-len(data) % tarfile.BLOCKSIZE)]
            if extension not in unlisted:
                words.append(f"{extension} {offset + tarfile.BLOCKSIZE} {len(data)} {name}")
            offset += sum(map(len, blocks[-3:]))
        with name_path(self.path):
            self.stream.write(b"".join(blocks))
        self.lines.append(" ".join(words))

    def seal(self) -> ShardFile:
        """Finish the file and write its `.idx`; it is renamed when the block is left."""
        end = 2 * tarfile.BLOCKSIZE
        with name_path(self.path):
            self.stream.write(bytes(end + -(self.stream.size + end) % tarfile.RECORDSIZE))
            self.stream.flush_to_disk()
        index = ("\n".join([f"v1.2 {len(self.lines)}", *self.lines]) + "\n").encode()
        # The lock of the shard also protects the temporary name of its .idx.
        offsets = self.path.with_suffix(".idx")
        write_atomically(offsets, index, unique=offsets.name)
        self.sealed = True
        return ShardFile(
            self.path.name,
            len(self.lines),
            self.stream.size,
            self.stream.digest.hexdigest(),
            hashlib.sha256(index).hexdigest(),
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
            # Last, since closing the file releases the lock.
            self.stream.file.close()


def open_lock_file(path: Path) -> int:
    """Open a file to lock it, creating it if needed; its content is kept.

    Raises DataError if it is a link, which could stand for the file of another program, or not a
    file; OSError if it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise DataError(f"{path} is a link, not a lock; remove it") from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        kind = "has a second name" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise DataError(f"{path} {kind}, so it is not a lock of unet; remove it")
    return handle


def try_lock_file(path: Path) -> int | None:
    """Open a file, creating it if needed, and lock it; None if another process holds the lock.

    The lock is released when the returned descriptor is closed or its process ends. Raises as
    `open_lock_file`.
    """
    handle = open_lock_file(path)
    try:
        # The lock dies with its process, so a killed writer blocks nobody.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its writer may have renamed or removed the file between open and lock.
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def build_blank_header() -> bytes:
    """Build the header that `tarfile` writes for an empty file without a name or timestamp."""
    member = tarfile.TarInfo()
    member.mtime, member.mode = 0, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


BLANK_HEADER = build_blank_header()
BLANK_CHECKSUM = sum(BLANK_HEADER[:148]) + 8 * ord(" ") + sum(BLANK_HEADER[156:])
"""The checksum field itself counts as eight spaces (POSIX.1-1988, ustar format)."""


def build_tar_header(name: str, size: int) -> bytes:
    """Build the 512-byte header of a tar member, as `tarfile` does but ten times faster.

    Raises ValueError if the name has more than 100 bytes or the size does not fit.
    """
    raw, digits = name.encode(), b"%011o" % size
    if len(raw) > tarfile.LENGTH_NAME or len(digits) > 11:
        raise ValueError(f"{name} with {size:,} bytes is too long or too large for a tar member")
    checksum = BLANK_CHECKSUM + sum(raw) + sum(digits) - 11 * ord("0")
    head = raw.ljust(100, b"\0") + BLANK_HEADER[100:124] + digits + BLANK_HEADER[135:148]
    return head + b"%06o\0 " % checksum + BLANK_HEADER[156:]


class HashingStream:
    """A file opened for writing that tracks the sha256 and the size of its content."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Write bytes and update hash and size."""
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def flush_to_disk(self) -> None:
        """Flush to disk, so that the content survives a power failure."""
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
    """Write a file that is either complete or absent, however its writer ends.

    Args:
        path: final path.
        data: content.
        durable: flush to disk before returning, so that the file survives a power failure.
        within: folder on the same disk for the temporary file, which remains if the process is
            killed; removing that folder at the end of a job removes it too.
        unique: temporary name that differs between concurrent writers; default: random.
    """
    unique = secrets.token_hex(8) if unique is None else unique
    # Not longer than the final name, which may have as many bytes as a name can have.
    temporary = (within or path.parent) / f".{unique}.tmp"
    try:
        with name_path(path):
            with temporary.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def name_path(path: Path) -> Iterator[None]:
    """Name a path in the OSErrors of a block that name none (a full disk) or a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (
            error.filename is None or is_temporary(Path(os.fsdecode(error.filename)))
        ):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def is_temporary(path: Path) -> bool:
    """Return whether a path is a temporary file of ours, or in a temporary folder of ours."""
    return any(part.startswith(".") and part.endswith(".tmp") for part in path.parts)


def write_json(path: Path, plain: Any, within: Path | None = None) -> None:
    """Write indented JSON atomically; equal content gives equal bytes."""
    write_atomically(path, (json.dumps(plain, indent=1) + "\n").encode(), within=within)


def flush_to_disk(file: Path) -> None:
    """Flush a written file to disk, so that it survives a power failure."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
