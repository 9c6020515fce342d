"""Pictures by number: in files, in a data set or in tars that others wrote; here or at a URL."""

import bisect
import hashlib
import json
import os
import posixpath
import stat
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from shards.index import ShardInfo, read_manifest
from shards.order import Address
from shards.reader import ShardReader
from shards.sample import DataError, encode_key, is_safe_path
from shards.store import ByteRange, Store, is_url

MOST_BYTES = 8 * 2**30
"""A file that is larger is no picture: no more pixels are taken than fit, uncompressed."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The bytes of one input."""

    key: str
    source: str
    """Relative path that the results are named after."""
    data: bytes


class Inputs(Protocol):
    """An ordered list of pictures, the same on every rank. Picklable and small."""

    @property
    def remote(self) -> bool:
        """Whether pictures come from a URL.

        Its client has threads and connections that do not survive a fork, so processes that read
        are to be started in another way.
        """
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def name(self, number: int) -> str:
        """Where picture `number` lies, for messages."""
        ...

    def read(self, number: int) -> Picture:
        """Read picture `number`. Raises DataError or OSError."""
        ...

    def digest(self) -> str:
        """A hash of what the list says."""
        ...


class Names(Sequence[str]):
    """Strings in one block of memory.

    A million paths take their own bytes and eight each, are pickled in a moment, and stay shared
    with forked processes, which would copy a list of objects by looking at it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        data, sizes, rest = bytearray(), array("q", [0]), iter(names)
        # Some at a time: a list of all would take more than they do.
        while some := [name.encode("utf-8", "surrogateescape") for name in islice(rest, 4096)]:
            data += b"\n".join([*some, b""])
            sizes.extend(len(name) + 1 for name in some)
        self.data, self.ends = bytes(data), np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin, end = int(self.ends[number]), int(self.ends[number + 1]) - 1
        return self.data[begin:end].decode("utf-8", "surrogateescape")

    def digest(self) -> str:
        """sha256 over the strings, a line each."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class FileInputs:
    """Pictures in files."""

    root: str
    """What comes before each source to make its path or URL: nothing, or all up to a slash."""
    sources: Names
    """Sorted, with `/` between parts."""

    @property
    def remote(self) -> bool:
        """Whether they lie at a URL."""
        return is_url(self.root)

    def __len__(self) -> int:
        return len(self.sources)

    def name(self, number: int) -> str:
        """The path or URL."""
        return self.root + self.sources[number]

    def read(self, number: int) -> Picture:
        """Read the file."""
        source, name = self.sources[number], self.name(number)
        data = read_url(name) if self.remote else read_file(name)
        return Picture(encode_key(source), source, data)

    def digest(self) -> str:
        """Of the names; two runs over one list are one job even if a picture has vanished."""
        return self.sources.digest()


def read_url(url: str) -> bytes:
    """A remote file. Raises DataError or OSError where it is out of reach."""
    folder, _, name = url.rpartition("/")
    return Store(folder).read(name)


def read_file(path: str) -> bytes:
    """A local file. Raises OSError, and DataError for what cannot be a picture."""
    # Opening a pipe that nobody writes to would last for ever.
    with open(path, "rb", opener=lambda path, how: os.open(path, how | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} is a pipe or a device, not a file; remove it")
        if found.st_size > MOST_BYTES:
            raise DataError(f"{path} has {found.st_size:,} bytes, more than any picture; remove it")
        return file.read()


class ShardInputs:
    """Pictures in a data set of shards, all splits."""

    def __init__(self, place: Store | Path | str) -> None:
        manifest = read_manifest(place)
        self.manifest_digest = manifest.digest
        shards: list[ShardInfo] = [s for split in manifest.splits.values() for s in split.shards]
        self.reader = ShardReader(place, shards, borders=False)
        self.starts = [0, *accumulate(shard.samples for shard in shards)]

    @property
    def remote(self) -> bool:
        """Whether the shards lie at a URL."""
        return self.reader.store.local is None

    def __len__(self) -> int:
        return self.starts[-1]

    def address(self, number: int) -> Address:
        """Where picture `number` lies."""
        shard = bisect.bisect_right(self.starts, number) - 1
        return Address(number, shard, number - self.starts[shard])

    def name(self, number: int) -> str:
        """Shard and row."""
        address = self.address(number)
        return f"{self.reader.where(address.shard)}, sample {address.row}"

    def read(self, number: int) -> Picture:
        """Read the sample's picture."""
        raw = self.reader.read(self.address(number))
        source = str(raw.describe().get("source", f"{raw.key}.{raw.extension}"))
        return Picture(encode_key(source), source, raw.image)

    def digest(self) -> str:
        """Of the manifest, which holds every shard's own."""
        return self.manifest_digest


@dataclass(frozen=True, slots=True)
class TarInputs:
    """Pictures in tars without a manifest, by the places of their members."""

    tars: tuple[str, ...]
    """Paths or URLs."""
    members: Names
    """Of each picture, its name in the tar."""
    places: NDArray[np.int64]
    """[N, 5]: number of the tar, offset and size of the picture, of its json (size 0: none)."""
    problems: tuple[tuple[str, str], ...]
    """Tar, and what is wrong with a member: inputs too, which cannot be read."""

    @property
    def remote(self) -> bool:
        """Whether they lie at a URL."""
        return is_url(self.tars[0])

    def __len__(self) -> int:
        return len(self.members) + len(self.problems)

    def name(self, number: int) -> str:
        """Tar and member."""
        if number >= len(self.members):
            return self.problems[number - len(self.members)][0]
        return f"{self.tars[int(self.places[number, 0])]}: {self.members[number]}"

    def read(self, number: int) -> Picture:
        """Read the member, and the json of its sample, which may know of a longer path."""
        if number >= len(self.members):
            raise DataError(self.problems[number - len(self.members)][1])
        tar, begin, size, info_begin, info_size = self.places[number].tolist()
        if not size:
            raise DataError(f"{self.name(number)} is empty; write the tar without it")
        wanted = [(begin, begin + size), (info_begin, info_begin + info_size)]
        data, *info = read_pieces(self.tars[tar], wanted if info_size else wanted[:1])
        if len(data) != size:
            raise DataError(f"{self.name(number)} ends too early; the tar was cut, copy it again")
        key, extension = member_key(self.members[number])
        source = read_source(info[0], key) if info else None
        source = source or f"{key}.{extension}"
        return Picture(encode_key(source), source, data)

    def digest(self) -> str:
        """Of the places and names of all members, tar by tar."""
        whole = hashlib.sha256(json.dumps([self.tars, self.problems]).encode())
        whole.update(self.places.astype("<i8").tobytes())
        whole.update(self.members.data)
        return whole.hexdigest()


def read_pieces(path: str, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
    """Pieces of a file, from one byte to before another; short where it ends before."""
    if is_url(path):
        folder, _, name = path.rpartition("/")
        return Store(folder).read_ranges([ByteRange(name, *piece) for piece in wanted])
    with open(path, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), end - begin, begin) for begin, end in wanted]


def member_key(name: str) -> tuple[str, str]:
    """Key and extension, in lower case, of a picture in a tar."""
    key, _, extension = name.rpartition(".")
    return posixpath.normpath(key), extension.lower()


def read_source(data: bytes, key: str) -> str | None:
    """The path that a sample's json names, if it is what its key was made of."""
    try:
        info: Any = json.loads(data)
    except (ValueError, RecursionError):
        return None
    source = info.get("source") if isinstance(info, dict) else None
    if not isinstance(source, str) or not is_safe_path(source):
        return None
    return source if key in (encode_key(source), posixpath.splitext(source)[0]) else None
