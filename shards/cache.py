"""Whole shards of a remote data set on a local disk, shared by all processes of a machine.

A shard is known by its sha256, so that data sets share a folder. It is written to a `.part` beside
its place, checked and renamed; the writer holds a lock that dies with it, so that no two processes
fetch one shard and what a killed one leaves is neither trusted nor waited for. The size of all
files together stays below the limit: the shards that were read longest ago go first.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from shards.index import ShardInfo
from shards.sample import DataError
from shards.store import ByteRange, Store
from shards.writer import claim

CHUNK = 4 * 2**20
"""Bytes of one request for a part of a shard."""
AT_ONCE = 4
"""Such requests that are under way together."""
IN_USE = 60.0
"""Seconds after which a shard that nobody has read may make room for others."""
RETRY = 1.0
"""Seconds between looks at shards that another process is fetching."""


class ShardCache:
    """The shards in a folder. Small and picklable.

    Args:
        folder: made when the first shard comes.
        limit: bytes that all its files may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, shard: ShardInfo) -> Path:
        """Where a shard stands once it is here."""
        return self.folder / f"{shard.sha256}.tar"

    def open(self, shard: ShardInfo) -> FileIO | None:
        """A handle of the shard, None where it is not here. Raises DataError as `fetch`."""
        try:
            # Unbuffered; closes itself when nobody holds it any more.
            file = FileIO(self.path(shard))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.unusable(error) from error
        if os.fstat(file.fileno()).st_size != shard.bytes:
            file.close()
            return None
        mark_read(file)
        return file

    def holds(self, shard: ShardInfo) -> bool:
        """Whether a shard is here, whole: somebody else may have cut it."""
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def fetch(
        self, shard: ShardInfo, store: Store, keep: Collection[ShardInfo] = ()
    ) -> bool | None:
        """Bring a shard here, unless it is.

        Args:
            shard: what is wanted.
            store: where it comes from.
            keep: shards that must not make room for it.

        Returns:
            True where it is here now, False where another process is bringing it, None where there
            is no room that could be made without shards that are in use.

        Raises:
            DataError: it cannot be read, is not what the manifest says, or cannot be written here.
        """
        try:
            return self.holds(shard) or self.bring(shard, store, keep)
        except OSError as error:
            raise self.unusable(error) from error

    def bring(self, shard: ShardInfo, store: Store, keep: Collection[ShardInfo]) -> bool | None:
        """The same, for a shard that was not here just now; OSError where it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(shard)
        part = path.with_suffix(".part")
        handle = claim(part)
        if handle is None:
            return False
        with os.fdopen(handle, "wb") as file:
            renamed = False
            try:
                if self.holds(shard):
                    return True
                # What a killed process left is no room that somebody else takes.
                os.ftruncate(handle, 0)
                if not self.make_room(shard.bytes, handle, {self.path(other) for other in keep}):
                    return None
                digest = hashlib.sha256()
                for data in pieces(shard, store):
                    digest.update(data)
                    file.write(data)
                refuse_changed(digest.hexdigest(), shard, store)
                file.flush()
                os.fsync(handle)
                os.replace(part, path)
                renamed = True
                return True
            finally:
                # While it is still claimed: later it may be another process's.
                if not renamed:
                    part.unlink(missing_ok=True)

    def make_room(self, size: int, handle: int, keep: Collection[Path]) -> bool:
        """Give a file of this process its size, once others have made room for it."""
        with self.locked():
            for part in self.folder.glob("*.part"):
                remove_abandoned(part)
            files = self.files()
            used = sum(taken for _, taken, _ in files)
            now = time.time()
            for last_read, freed, path in sorted(files):
                if used + size <= self.limit or last_read > now - IN_USE:
                    break
                if path.suffix == ".tar" and path not in keep:
                    path.unlink(missing_ok=True)
                    used -= freed
            if used + size > self.limit:
                return False
            os.ftruncate(handle, size)
            return True

    def files(self) -> list[tuple[float, int, Path]]:
        """When each shard, whole or in part, was last read or written; its bytes; its path."""
        while True:
            found = [path for path in self.folder.iterdir() if path.suffix in (".tar", ".part")]
            try:
                stats = [path.stat() for path in found]
            except FileNotFoundError:
                # One has got its final name meanwhile.
                continue
            return [
                (stat.st_mtime, stat.st_size, path) for stat, path in zip(stats, found, strict=True)
            ]

    def unusable(self, error: OSError) -> DataError:
        """What to say where the folder fails us."""
        return DataError(
            f"{self.folder} cannot be written: {error.strerror or error}; choose another "
            "--cache-dir, or lower --cache-bytes"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes that make room in this folder."""
        with (self.folder / ".lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def mark_read(file: FileIO) -> None:
    """Note that a shard is in use."""
    # Another user's file, or one on a disk that is only read, says only when it came.
    with suppress(OSError):
        os.utime(file.fileno())


def remove_abandoned(part: Path) -> bool:
    """Remove a file if the process that was writing it is gone; whether it was."""
    handle = claim(part)
    if handle is None:
        return False
    part.unlink(missing_ok=True)
    os.close(handle)
    return True


def refuse_changed(sha256: str, shard: ShardInfo, store: Store) -> None:
    """Raise DataError where a shard's bytes are not those that were packed."""
    if sha256 != shard.sha256:
        raise DataError(
            f"{store.path(shard.name)} is not what the manifest says (sha256); "
            "copy or pack it again"
        )


def pieces(shard: ShardInfo, store: Store) -> Iterator[bytes]:
    """The bytes of a remote shard, in order. Raises DataError where they are too few."""
    chunks = [
        ByteRange(shard.name, begin, min(begin + CHUNK, shard.bytes))
        for begin in range(0, shard.bytes, CHUNK)
    ]
    for first in range(0, len(chunks), AT_ONCE):
        some = chunks[first : first + AT_ONCE]
        for chunk, data in zip(some, store.read_ranges(some), strict=True):
            if chunk.begin + len(data) != chunk.end:
                raise DataError(f"{store.path(shard.name)} ends too early; copy or pack it again")
            yield data


class Fetcher:
    """Brings shards into a cache, one after the other, in a thread that ends when it is closed."""

    def __init__(self, cache: ShardCache, store: Store) -> None:
        self.cache, self.store = cache, store
        self.wanted: list[ShardInfo] = []
        self.missing: deque[ShardInfo] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.failure: Exception | None = None
        threading.Thread(target=self.work, daemon=True).start()

    def want(self, shards: Sequence[ShardInfo]) -> None:
        """Fetch these, the first first, and forget what was wanted before."""
        with self.changed:
            self.wanted, self.missing = [*shards], deque(shards)
            self.changed.notify()

    def close(self) -> None:
        """Let the thread end after the shard that it is at."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def check(self) -> None:
        """Raise what has ended the thread, DataError as a rule."""
        if self.failure is not None:
            raise self.failure

    def work(self) -> None:
        """The thread."""
        try:
            while True:
                with self.changed:
                    if self.closed:
                        return
                    if not self.missing:
                        self.changed.wait()
                        continue
                    wanted, missing = self.wanted, self.missing
                    shard = missing.popleft()
                # What is read sooner must not make room for what is read later.
                sooner = wanted[: wanted.index(shard)]
                fetched = self.cache.fetch(shard, self.store, sooner)
                if not fetched:
                    # In turn where there is no room yet, else after what nobody is at.
                    self.look_again(shard, missing, first=fetched is None)
        except Exception as error:  # told to who reads
            self.failure = error

    def look_again(self, shard: ShardInfo, missing: deque[ShardInfo], *, first: bool) -> None:
        """Put back a shard that another process is fetching, or that has no room yet."""
        with self.changed:
            (missing.appendleft if first else missing.append)(shard)
            if not self.closed:
                self.changed.wait(RETRY if first else RETRY / len(missing))
