"""Shards of a remote data set cached on a local disk, shared by all processes of a machine.

A shard is stored under its sha256, so data sets can share a folder. It is written to a `.part`
file, verified and renamed. The writer holds a lock that is released when it exits, so that no two
processes fetch the same shard, and the file of a killed process is neither trusted nor waited for.
The total size of all files stays below the limit: the least recently read shards are evicted first.
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

from shards.manifest import ShardInfo
from shards.sample import DataError
from shards.store import ByteRange, Store
from shards.writer import open_lock_file, try_lock_file

REQUEST_BYTES = 4 * 2**20
"""Bytes of a shard per request."""
MAX_REQUESTS = 4
"""Requests in flight at once."""
IN_USE_SECONDS = 60.0
"""A shard that was read more recently than this is not evicted."""
RETRY_SECONDS = 1.0
"""Delay before looking again at a shard that another process is fetching."""


class ShardCache:
    """A folder of cached shards. Small and picklable.

    Args:
        folder: created when the first shard is fetched.
        limit: maximum total size of its files, in bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, shard: ShardInfo) -> Path:
        """Return the path of a shard in the cache, whether it is cached or not."""
        return self.folder / f"{shard.sha256}.tar"

    def open(self, shard: ShardInfo) -> FileIO | None:
        """Open a cached shard; None if it is not cached.

        Raises DataError if the folder cannot be used.
        """
        try:
            # Unbuffered; closed when it is garbage-collected.
            file = FileIO(self.path(shard))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.unusable_error(error) from error
        if os.fstat(file.fileno()).st_size != shard.bytes:
            file.close()
            return None
        mark_read(file)
        return file

    def contains(self, shard: ShardInfo) -> bool:
        """Return whether a shard is cached with its full size (a user may have truncated it)."""
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def fetch(
        self, shard: ShardInfo, store: Store, keep: Collection[ShardInfo] = ()
    ) -> bool | None:
        """Fetch a shard into the cache unless it is cached already.

        Args:
            shard: the shard to fetch.
            store: where it is fetched from.
            keep: shards that must not be evicted for it.

        Returns:
            True if it is cached now, False if another process is fetching it, None if there is not
            enough space without evicting shards that are in use.

        Raises:
            DataError: it cannot be read, does not match the manifest, or cannot be written here.
        """
        try:
            return self.contains(shard) or self.download(shard, store, keep)
        except OSError as error:
            raise self.unusable_error(error) from error

    def download(self, shard: ShardInfo, store: Store, keep: Collection[ShardInfo]) -> bool | None:
        """Download a shard that was not cached a moment ago; returns as `fetch`.

        Raises OSError if the folder cannot be written, DataError as `fetch`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(shard)
        part = path.with_suffix(".part")
        handle = try_lock_file(part)
        if handle is None:
            return False
        with os.fdopen(handle, "wb") as file:
            renamed = False
            try:
                if self.contains(shard):
                    return True
                # The leftovers of a killed process do not count as reserved space.
                os.ftruncate(handle, 0)
                keep_paths = {self.path(other) for other in keep}
                if not self.reserve_space(shard.bytes, handle, keep_paths):
                    return None
                digest = hashlib.sha256()
                for data in download_chunks(shard, store):
                    digest.update(data)
                    file.write(data)
                refuse_changed_shard(digest.hexdigest(), shard, store)
                file.flush()
                os.fsync(handle)
                os.replace(part, path)
                renamed = True
                return True
            finally:
                # While the lock is still held: afterwards it may be another process's file.
                if not renamed:
                    part.unlink(missing_ok=True)

    def reserve_space(self, size: int, handle: int, keep: Collection[Path]) -> bool:
        """Evict shards until `size` bytes fit, then extend the open file to that size.

        Returns whether there was enough space.
        """
        with self.eviction_lock():
            for part in self.folder.glob("*.part"):
                remove_abandoned(part)
            files = self.list_files()
            used = sum(taken for _, taken, _ in files)
            now = time.time()
            for last_read, freed, path in sorted(files):
                if used + size <= self.limit or last_read > now - IN_USE_SECONDS:
                    break
                if path.suffix == ".tar" and path not in keep:
                    path.unlink(missing_ok=True)
                    used -= freed
            if used + size > self.limit:
                return False
            os.ftruncate(handle, size)
            return True

    def list_files(self) -> list[tuple[float, int, Path]]:
        """List (time of the last read or write, bytes, path) of complete and partial shards."""
        while True:
            paths = [path for path in self.folder.iterdir() if path.suffix in (".tar", ".part")]
            try:
                stats = [path.stat() for path in paths]
            except FileNotFoundError:
                # One of them has been renamed.
                continue
            return [
                (stat.st_mtime, stat.st_size, path) for stat, path in zip(stats, paths, strict=True)
            ]

    def unusable_error(self, error: OSError) -> DataError:
        """Return the error for a cache folder that cannot be used."""
        return DataError(
            f"{self.folder} cannot be written: {error.strerror or error}; choose another "
            "--cache-dir, or lower --cache-bytes"
        )

    @contextmanager
    def eviction_lock(self) -> Iterator[None]:
        """Hold the exclusive lock for eviction in this folder, across processes."""
        with os.fdopen(open_lock_file(self.folder / ".lock"), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def mark_read(file: FileIO) -> None:
    """Record that a cached shard was read, in its modification time."""
    # The file of another user or on a read-only disk keeps the time of its download.
    with suppress(OSError):
        os.utime(file.fileno())


def remove_abandoned(part: Path) -> bool:
    """Remove a partial file if its writer is gone; returns whether it was removed."""
    handle = try_lock_file(part)
    if handle is None:
        return False
    part.unlink(missing_ok=True)
    os.close(handle)
    return True


def refuse_changed_shard(sha256: str, shard: ShardInfo, store: Store) -> None:
    """Raise DataError if the bytes of a shard are not those that were packed."""
    if sha256 != shard.sha256:
        raise DataError(
            f"{store.path(shard.name)} does not match the manifest (sha256); copy or pack it again"
        )


def download_chunks(shard: ShardInfo, store: Store) -> Iterator[bytes]:
    """Yield the bytes of a remote shard in order. Raises DataError if it is too short."""
    chunks = [
        ByteRange(shard.name, start, min(start + REQUEST_BYTES, shard.bytes))
        for start in range(0, shard.bytes, REQUEST_BYTES)
    ]
    for first in range(0, len(chunks), MAX_REQUESTS):
        batch = chunks[first : first + MAX_REQUESTS]
        for chunk, data in zip(batch, store.read_ranges(batch), strict=True):
            if chunk.start + len(data) != chunk.end:
                raise DataError(f"{store.path(shard.name)} is truncated; copy or pack it again")
            yield data


class ShardPrefetcher:
    """Fetches shards into a cache, one after the other, in a thread that ends when it is closed."""

    def __init__(self, cache: ShardCache, store: Store) -> None:
        self.cache, self.store = cache, store
        self.scheduled: list[ShardInfo] = []
        self.pending: deque[ShardInfo] = deque()
        self.condition = threading.Condition()
        self.closed = False
        self.failure: Exception | None = None
        threading.Thread(target=self.fetch_scheduled, daemon=True).start()

    def schedule(self, shards: Sequence[ShardInfo]) -> None:
        """Fetch these shards, in this order, in place of those scheduled before."""
        with self.condition:
            self.scheduled, self.pending = [*shards], deque(shards)
            self.condition.notify()

    def close(self) -> None:
        """Let the thread end after its current shard."""
        with self.condition:
            self.closed = True
            self.condition.notify()

    def raise_failure(self) -> None:
        """Raise the exception that ended the thread, if any; usually a DataError."""
        if self.failure is not None:
            raise self.failure

    def fetch_scheduled(self) -> None:
        """Fetch the scheduled shards until closed. Runs in the thread."""
        try:
            while True:
                with self.condition:
                    if self.closed:
                        return
                    if not self.pending:
                        self.condition.wait()
                        continue
                    scheduled, pending = self.scheduled, self.pending
                    shard = pending.popleft()
                # Shards that are read earlier must not be evicted for one that is read later.
                earlier = scheduled[: scheduled.index(shard)]
                fetched = self.cache.fetch(shard, self.store, earlier)
                if not fetched:
                    # Without space: the same shard again. Fetched by another process: others first.
                    self.reschedule(shard, pending, first=fetched is None)
        except Exception as error:  # raised again in the thread that reads
            self.failure = error

    def reschedule(self, shard: ShardInfo, pending: deque[ShardInfo], *, first: bool) -> None:
        """Put a shard back that another process is fetching or that did not fit, and wait."""
        with self.condition:
            (pending.appendleft if first else pending.append)(shard)
            if not self.closed:
                self.condition.wait(RETRY_SECONDS if first else RETRY_SECONDS / len(pending))
