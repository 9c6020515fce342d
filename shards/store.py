"""A folder on disk or at any fsspec URL; files appear in it atomically."""

import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import fsspec

from shards.leftovers import temporary_folder
from shards.local_files import read_file
from shards.requests import (
    UPLOAD_RATE,
    finish_within,
    remote_timeout,
    retry,
    unreachable_error,
    wrap_store_errors,
)
from shards.sample import DataError
from shards.writer import name_path, write_atomically

ATOMIC_PROTOCOLS = ("abfs", "az", "gcs", "gs", "memory", "s3", "s3a")
"""Protocols whose uploads become visible only when complete; others upload under another name."""

T = TypeVar("T")


class ByteRange(NamedTuple):
    """The bytes [start, end) of a file; up to its end if `end` is None."""

    name: str
    start: int = 0
    end: int | None = None


def is_url(path: str) -> bool:
    """Return whether a path is a URL such as `s3://bucket/folder`."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


class Store:
    """A folder, local or remote. Small and picklable; connects in the process that uses it.

    Except for FileNotFoundError, all errors of remote file systems are raised as DataError.
    """

    def __init__(self, place: "Store | Path | str") -> None:
        place = str(place)
        self.place = place.rstrip("/") if is_url(place) else place
        self.local = None if is_url(place) else Path(place)
        self.timeout = remote_timeout()

    def __str__(self) -> str:
        return self.place

    def path(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""
        return f"{self.place}/{name}"

    def absolute(self) -> "Store":
        """Return the same folder by its absolute path, for processes in other working folders."""
        return self if self.local is None else Store(str(self.local.resolve()))

    def connect(self) -> tuple[Any, str]:
        """Return the fsspec file system and the folder's path in it.

        Raises DataError if the protocol is unknown or its package is not installed.
        """
        try:
            return fsspec.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise DataError(f"{self.place} cannot be reached: {error}") from error

    def retry(self, request: Callable[[], T]) -> T:
        """Make a remote request, with retries, within the timeout of this store."""
        return retry(request, self.timeout)

    def create_folder(self) -> None:
        """Create the folder, if it is local. Raises DataError if a file is in the way."""
        if self.local is None:
            return
        try:
            self.local.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(
                f"{self.local} is a file, not a directory; choose another --out"
            ) from error

    def names(self, below: str = "") -> list[str]:
        """List the names of the files in the folder, or in a subfolder, sorted."""
        if self.local is not None:
            folder = self.local / below
            return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        system, root = self.connect()
        with wrap_store_errors(self.place):
            system.invalidate_cache()
            try:
                paths = self.retry(lambda: system.ls(f"{root}/{below}".rstrip("/"), detail=False))
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def kind(self) -> Literal["file", "folder"] | None:
        """Return whether a URL is a folder or a single file; None if it does not exist."""
        system, root = self.connect()
        with wrap_store_errors(self.place):
            system.invalidate_cache()
            try:
                info = self.retry(lambda: system.info(root))
            except FileNotFoundError:
                return None
        return "file" if info["type"] == "file" else "folder"

    def find(self, pattern: str | None = None) -> list[str]:
        """List the relative paths of the files at a URL, at any depth or by a glob, sorted."""
        system, root = self.connect()

        def request() -> list[str]:
            system.invalidate_cache()
            if pattern is None:
                return system.find(root)
            infos = system.glob(f"{root}/{pattern}", detail=True)
            return [path for path, info in infos.items() if info["type"] == "file"]

        with wrap_store_errors(self.place):
            paths = self.retry(request)
            # A listing of millions of files would stay in memory.
            system.invalidate_cache()
        return sorted(path.removeprefix(f"{root}/") for path in paths)

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""
        if self.local is not None:
            return (self.local / name).exists()
        system, root = self.connect()
        with wrap_store_errors(self.path(name)):
            system.invalidate_cache()
            return self.retry(lambda: bool(system.exists(f"{root}/{name}")))

    def read(self, name: str) -> bytes:
        """Read a file. Raises FileNotFoundError if it does not exist."""
        if self.local is not None:
            return read_file(self.local / name)
        system, root = self.connect()

        def request() -> bytes:
            # s3fs makes two requests to read a single file, but one per file to read several.
            (answer,) = system.cat_ranges([f"{root}/{name}"], [None], [None], on_error="return")
            if isinstance(answer, BaseException):
                raise answer
            return answer

        with wrap_store_errors(self.path(name)):
            return self.retry(request)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read ranges of remote files concurrently; a result is short if its file ends before.

        Raises DataError naming a file that does not exist or is unreachable after retries.
        """
        system, root = self.connect()
        read: dict[ByteRange, bytes] = {}
        failed = self.place

        def request() -> None:
            nonlocal failed
            missing = [piece for piece in dict.fromkeys(ranges) if piece not in read]
            names, starts, ends = zip(*missing, strict=True) if missing else ((), (), ())
            paths = [f"{root}/{name}" for name in names]
            answers = system.cat_ranges(paths, [*starts], [*ends], on_error="return")
            read.update(
                (piece, answer)
                for piece, answer in zip(missing, answers, strict=True)
                if isinstance(answer, bytes)
            )
            for piece, answer in zip(missing, answers, strict=True):
                if isinstance(answer, BaseException):
                    failed = self.path(piece.name)
                    raise answer

        try:
            self.retry(request)
        except FileNotFoundError as error:
            raise DataError(f"{failed} does not exist; copy or pack the data set again") from error
        except Exception as error:  # each client library has its own exceptions
            raise unreachable_error(failed, error) from error
        return [read[piece] for piece in ranges]

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises FileNotFoundError if it does not exist."""
        if self.local is not None:
            return (self.local / name).stat().st_size
        system, root = self.connect()
        with wrap_store_errors(self.path(name)):
            system.invalidate_cache()
            return self.retry(lambda: int(system.info(f"{root}/{name}")["size"]))

    def write(self, name: str, data: bytes, within: str | None = None) -> None:
        """Write a small file atomically; `within`: subfolder for its temporary file, if local."""
        if self.local is not None:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            aside = None if within is None else self.local / within
            write_atomically(self.local / name, data, within=aside)
            return
        with temporary_folder() as folder:
            file = Path(folder, "file")
            file.write_bytes(data)
            self.upload(file, name)

    @contextmanager
    def staging(self, within: str = "") -> Iterator[Path]:
        """Provide a local folder for files to be uploaded: the store itself, if it is local.

        `within`: a subfolder of a local store, for a second writer of the same files.
        """
        if self.local is not None:
            (self.local / within).mkdir(parents=True, exist_ok=True)
            yield self.local / within
            return
        with temporary_folder() as folder:
            yield Path(folder)

    def upload(self, file: Path, name: str) -> None:
        """Upload a staged file atomically; does nothing if it was staged at its destination.

        Raises DataError if the upload fails or is incomplete.
        """
        if self.local is not None and file == self.local / name:
            return
        if self.local is not None:
            os.replace(file, self.local / name)
            return
        system, root = self.connect()
        target = f"{root}/{name}"
        protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
        aside = target if set(protocols) & set(ATOMIC_PROTOCOLS) else f"{target}.part"
        with wrap_store_errors(self.path(name)):
            if aside != target:
                # Not on buckets: they have no folders, and a mistyped bucket must not be created.
                system.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                seconds = self.timeout + file.stat().st_size / UPLOAD_RATE
                put = partial(system.put_file, str(file), aside)
                finish_within(put, seconds, self.timeout)
                size = self.retry(lambda: system.info(aside)["size"])
                if size != file.stat().st_size:
                    with suppress(Exception):  # the incomplete upload is reported in any case
                        system.rm(aside)
                    raise DataError(
                        f"{self.path(name)} is incomplete: {size:,} of {file.stat().st_size:,} "
                        "bytes were uploaded; rerun the same command to resume"
                    )
                if aside != target:
                    system.mv(aside, target)
            except Exception as error:
                if aside != target:
                    with suppress(Exception):
                        system.rm(aside)
                if isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"{self.path(name)}: {error}; create the bucket first, or correct its name"
                    ) from error
                raise

    def remove(self, name: str) -> None:
        """Remove a file or a folder with its contents; does nothing if it does not exist."""
        if self.local is not None:
            path = self.local / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        system, root = self.connect()
        with wrap_store_errors(self.path(name)), suppress(FileNotFoundError):
            system.invalidate_cache()
            self.retry(lambda: system.rm(f"{root}/{name}", recursive=True))

    def write_if_absent(self, name: str, lines: Iterable[bytes]) -> bool:
        """Write a file unless it exists; returns whether it was written.

        If several local processes try at once, exactly one succeeds.
        """
        if self.exists(name):
            return False
        with temporary_folder() as folder:
            if self.local is None:
                file = Path(folder, "file")
            else:
                file = self.local / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file = file.with_name(f".{secrets.token_hex(8)}.tmp")
            try:
                with name_path(self.local / name if self.local else file), file.open("wb") as out:
                    out.writelines(lines)
                    out.flush()
                    os.fsync(out.fileno())
                if self.local is not None:
                    return rename_if_absent(file, self.local / name)
                self.upload(file, name)
                return True
            finally:
                file.unlink(missing_ok=True)


class RemoteFile(io.RawIOBase):
    """A remote file with random access, read by range requests with the retries of its store."""

    def __init__(self, store: Store, name: str) -> None:
        """Raises DataError or FileNotFoundError if the file is unreachable or does not exist."""
        self.store, self.name = store, name
        self.place, self.size = 0, store.size(name)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the current position in bytes."""
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position in bytes and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer and return the number of bytes read. Raises OSError if retries fail."""
        end = min(self.place + len(buffer), self.size)
        if end <= self.place:
            return 0
        try:
            (data,) = self.store.read_ranges([ByteRange(self.name, self.place, end)])
        except DataError as error:
            # Readers of file objects expect OSError.
            raise OSError(str(error)) from error
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def rename_if_absent(file: Path, target: Path) -> bool:
    """Rename a file unless the target exists; returns whether it was renamed."""
    try:
        # Unlike a rename, a link never replaces the file of another process.
        os.link(file, target)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links (exFAT, some network mounts).
        os.replace(file, target)
    return True
