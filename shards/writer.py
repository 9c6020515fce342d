"""One shard, written as a whole or not at all, the same bytes each time."""

import fcntl
import hashlib
import io
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
        handle = os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The lock dies with its process, so a killed writer leaves nothing that blocks.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its writer may have renamed the file to its final name.
            if not os.path.samestat(os.fstat(handle), os.stat(self.temporary)):
                raise FileNotFoundError(self.temporary)
        except (BlockingIOError, FileNotFoundError) as error:
            os.close(handle)
            raise DataError(
                f"another process is writing {self.path}; wait for it or stop it"
            ) from error
        os.ftruncate(handle, 0)
        self.stream = HashingStream(os.fdopen(handle, "wb"))
        self.tar = tarfile.open(fileobj=self.stream, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: {extension: bytes}, stored side by side in the order of their names."""
        entries = []
        for extension, data in sorted(members.items()):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            member.mtime = 0
            member.mode = 0o644
            offset = self.tar.offset + tarfile.BLOCKSIZE
            self.tar.addfile(member, io.BytesIO(data))
            entries.append(f"{extension} {offset} {len(data)} {member.name}")
        self.lines.append(" ".join(entries))

    def seal(self) -> ShardFile:
        """Finish the file and write its index; the rename follows when the block is left."""
        self.tar.close()
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


class HashingStream(io.RawIOBase):
    """A file that knows the sha256 and the size of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write and count."""
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def flush_to_disk(self) -> None:
        """Return when the bytes would survive a power cut."""
        self.file.flush()
        os.fsync(self.file.fileno())


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
