"""A folder that is written to, on disk or at any fsspec URL: files there are whole or absent."""

import errno
import io
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import fsspec

from shards.sample import DataError
from shards.writer import write_atomically

WHOLE_OR_NOT = ("abfs", "az", "gcs", "gs", "memory", "s3", "s3a")
"""Protocols whose uploads are seen only when they are complete; others get a name aside first."""


PAUSES = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Seconds before a read that failed is tried again, each half random."""

LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
"""Errors that waiting does not mend; so is an OSError with EINVAL, as S3 says of wrong ranges."""

T = TypeVar("T")


class ByteRange(NamedTuple):
    """Bytes `begin` to `end`, without the last, of a file; to its end where `end` is None."""

    name: str
    begin: int = 0
    end: int | None = None


def is_url(path: str) -> bool:
    """Whether a path is a URL such as `s3://bucket/folder`."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


class Store:
    """A folder, local or remote. Small and picklable; connects in the process that uses it."""

    def __init__(self, place: "Store | Path | str") -> None:
        place = str(place)
        self.place = place.rstrip("/") if is_url(place) else place
        self.local = None if is_url(place) else Path(place)

    def __str__(self) -> str:
        return self.place

    def path(self, name: str) -> str:
        """Where a file lies, for messages."""
        return f"{self.place}/{name}"

    def absolute(self) -> "Store":
        """The same folder, by a path that holds in processes with another working folder."""
        return self if self.local is None else Store(str(self.local.resolve()))

    def connect(self) -> tuple[Any, str]:
        """The fsspec file system and the folder's path in it.

        Raises DataError where the protocol is unknown or its package is not installed.
        """
        try:
            return fsspec.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise DataError(f"{self.place} cannot be reached: {error}") from error

    def make(self) -> None:
        """Make the folder, where folders are made. Raises DataError where a file is in the way."""
        if self.local is None:
            return
        try:
            self.local.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(
                f"{self.local} is a file, not a folder; choose another --out"
            ) from error

    def names(self, below: str = "") -> list[str]:
        """Names of the files in the folder, or in one below it, sorted."""
        if self.local is not None:
            folder = self.local / below
            return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        system, root = self.connect()
        with told(self.place):
            try:
                system.invalidate_cache()
                found = system.ls(f"{root}/{below}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def kind(self) -> Literal["file", "folder"] | None:
        """What a URL names: a folder, or against its nature a file; None: nothing."""
        system, root = self.connect()
        with told(self.place):
            system.invalidate_cache()
            try:
                found = patiently(lambda: system.info(root))
            except FileNotFoundError:
                return None
        return "file" if found["type"] == "file" else "folder"

    def find(self, pattern: str | None = None) -> list[str]:
        """Paths below a URL of its files at any depth, or of those a pattern names, sorted."""
        system, root = self.connect()

        def ask() -> list[str]:
            system.invalidate_cache()
            if pattern is None:
                return system.find(root)
            found = system.glob(f"{root}/{pattern}", detail=True)
            return [path for path, info in found.items() if info["type"] == "file"]

        with told(self.place):
            found = patiently(ask)
            # A listing of millions would stay in memory.
            system.invalidate_cache()
        return sorted(path.removeprefix(f"{root}/") for path in found)

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        if self.local is not None:
            return (self.local / name).exists()
        system, root = self.connect()
        with told(self.path(name)):
            system.invalidate_cache()
            return bool(system.exists(f"{root}/{name}"))

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        if self.local is not None:
            return (self.local / name).read_bytes()
        system, root = self.connect()

        def ask() -> bytes:
            # To read one file s3fs makes two requests, one to read several.
            (answer,) = system.cat_ranges([f"{root}/{name}"], [None], [None], on_error="return")
            if isinstance(answer, BaseException):
                raise answer
            return answer

        with told(self.path(name)):
            return patiently(ask)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Several pieces of remote files, asked for at once; short where a file ends before.

        Raises DataError naming one that is not there or stays out of reach.
        """
        system, root = self.connect()
        found: dict[ByteRange, bytes] = {}
        failed = self.place

        def ask() -> None:
            nonlocal failed
            missing = [piece for piece in dict.fromkeys(ranges) if piece not in found]
            names, begins, ends = zip(*missing, strict=True) if missing else ((), (), ())
            paths = [f"{root}/{name}" for name in names]
            answers = system.cat_ranges(paths, [*begins], [*ends], on_error="return")
            found.update(
                (piece, answer)
                for piece, answer in zip(missing, answers, strict=True)
                if isinstance(answer, bytes)
            )
            for piece, answer in zip(missing, answers, strict=True):
                if isinstance(answer, BaseException):
                    failed = self.path(piece.name)
                    raise answer

        try:
            patiently(ask)
        except FileNotFoundError as error:
            raise DataError(f"{failed} is not there; copy or pack the data set again") from error
        except Exception as error:  # every client library has exceptions of its own
            raise unreachable(failed, error) from error
        return [found[piece] for piece in ranges]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        if self.local is not None:
            return (self.local / name).stat().st_size
        system, root = self.connect()
        with told(self.path(name)):
            system.invalidate_cache()
            return patiently(lambda: int(system.info(f"{root}/{name}")["size"]))

    def write(self, name: str, data: bytes, within: str | None = None) -> None:
        """Write a small file; `within`: a local folder below this one for its temporary file."""
        if self.local is not None:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            aside = None if within is None else self.local / within
            write_atomically(self.local / name, data, within=aside)
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            file.write_bytes(data)
            self.upload(file, name)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for files that are to come here: this one itself, where it is local."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def upload(self, file: Path, name: str) -> None:
        """Bring a staged file here, whole or not at all; nothing to do where it is here already.

        Raises DataError where it fails or did not arrive whole.
        """
        if self.local is not None and file == self.local / name:
            return
        assert self.local is None
        system, root = self.connect()
        target = f"{root}/{name}"
        protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
        aside = target if set(protocols) & set(WHOLE_OR_NOT) else f"{target}.part"
        with told(self.path(name)):
            if aside != target:
                # Buckets have no folders, and a mistyped one is not to be made.
                system.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                system.put_file(str(file), aside)
                size = system.info(aside)["size"]
                if size != file.stat().st_size:
                    with suppress(Exception):  # whatever else, this is told
                        system.rm(aside)
                    raise DataError(
                        f"{self.path(name)} arrived with {size:,} of {file.stat().st_size:,} "
                        "bytes; the same command goes on"
                    )
                if aside != target:
                    system.mv(aside, target)
            except Exception as error:
                if aside != target:
                    with suppress(Exception):
                        system.rm(aside)
                if isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"{self.path(name)}: {error}; make the bucket first, or correct its name"
                    ) from error
                raise

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing where it is not there."""
        if self.local is not None:
            path = self.local / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        system, root = self.connect()
        with told(self.path(name)), suppress(FileNotFoundError):
            system.invalidate_cache()
            system.rm(f"{root}/{name}", recursive=True)

    def create(self, name: str, lines: Iterable[bytes]) -> bool:
        """Write a file unless one is there; whether it was written.

        Of several local processes that try at once, one does.
        """
        if self.exists(name):
            return False
        with tempfile.TemporaryDirectory() as folder:
            if self.local is None:
                file = Path(folder, "file")
            else:
                file = self.local / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
            try:
                with file.open("wb") as out:
                    out.writelines(lines)
                    out.flush()
                    os.fsync(out.fileno())
                if self.local is not None:
                    return put_once(file, self.local / name)
                self.upload(file, name)
                return True
            finally:
                file.unlink(missing_ok=True)


class RemoteFile(io.RawIOBase):
    """A remote file to read from any place, by range requests with the patience of its store."""

    def __init__(self, store: Store, name: str) -> None:
        """Raises DataError or FileNotFoundError where it is out of reach."""
        self.store, self.name = store, name
        self.place, self.size = 0, store.size(name)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = begin + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes. Raises OSError where that fails for good."""
        end = min(self.place + len(buffer), self.size)
        if end <= self.place:
            return 0
        try:
            (data,) = self.store.read_ranges([ByteRange(self.name, self.place, end)])
        except DataError as error:
            # What reads files expects errors of files.
            raise OSError(str(error)) from error
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def put_once(file: Path, target: Path) -> bool:
    """Give a file its final name unless that is taken; whether it was given."""
    try:
        # Unlike a rename, a link never replaces what another process has put there.
        os.link(file, target)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links (exFAT, some network mounts).
        os.replace(file, target)
    return True


def patiently(work: Callable[[], T]) -> T:
    """What `work` returns, tried again with growing pauses where that may help."""
    for pause in PAUSES:
        try:
            return work()
        except LASTING:
            raise
        except Exception as error:  # every client library has exceptions of its own
            if getattr(error, "errno", None) == errno.EINVAL:
                raise
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 (apart, not secret)
    return work()


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turns what a remote file system raises into one line."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        # Clients word it each in their own way.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from error
    except Exception as error:  # every client library has exceptions of its own
        raise unreachable(where, error) from error


def unreachable(where: str, error: Exception) -> DataError:
    """What a remote file system raised, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{where}: {reason}; check address, credentials and network, the same command goes on"
    )
