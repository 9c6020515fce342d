"""Indexable image inputs: files, data sets or foreign tars, local or at a URL."""

import bisect
import hashlib
import json
import os
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from shards.local_files import open_file
from shards.manifest import ShardInfo, read_manifest
from shards.order import Address
from shards.reader import ShardReader, iter_keys
from shards.sample import DataError, encode_key, is_safe_path
from shards.store import ByteRange, Store, is_url

MAX_FILE_BYTES = 8 * 2**30
"""Larger files are refused: the largest allowed image is smaller even uncompressed."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The bytes of one input image."""

    key: str
    source: str
    """Relative path that its outputs are named after."""
    data: bytes


class Inputs(Protocol):
    """An ordered list of images, identical on every rank. Picklable and small."""

    @property
    def remote(self) -> bool:
        """Whether images come from a URL.

        Remote clients have threads and connections that do not survive a fork; worker processes
        then need another start method.
        """
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def name(self, number: int) -> str:
        """Return the location of image `number`, for messages."""
        ...

    def read(self, number: int) -> EncodedImage:
        """Read image `number`. Raises DataError or OSError."""
        ...

    def digest(self) -> str:
        """Return a hash of the list."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to print: files and members that are not inputs."""
        ...


class Names(Sequence[str]):
    """A sequence of strings in one block of memory.

    A million paths take their bytes plus eight each, pickle quickly, and stay shared with forked
    processes, where the reference counts of a list of objects would cause copies.
    """

    def __init__(self, names: Iterable[str]) -> None:
        data, sizes, rest = bytearray(), array("q", [0]), iter(names)
        # In blocks: a list of all of them would take more memory than the result.
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
        start, end = int(self.ends[number]), int(self.ends[number + 1]) - 1
        return self.data[start:end].decode("utf-8", "surrogateescape")

    def digest(self) -> str:
        """Return the sha256 of the strings, one per line."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class FileInputs:
    """Images in files."""

    root: str
    """Prefix that makes a source a path or URL: empty, or ending in a slash."""
    sources: Names
    """Sorted, with `/` between parts."""
    notes: tuple[str, ...] = ()

    @property
    def remote(self) -> bool:
        """Whether the inputs are at a URL."""
        return is_url(self.root)

    def __len__(self) -> int:
        return len(self.sources)

    def name(self, number: int) -> str:
        """Return the path or URL."""
        return self.root + self.sources[number]

    def read(self, number: int) -> EncodedImage:
        """Read the file."""
        source, name = self.sources[number], self.name(number)
        data = read_url(name) if self.remote else read_file(name)
        return EncodedImage(encode_key(source), source, data)

    def digest(self) -> str:
        """Return a hash of the names: a rerun is the same job even if an image has disappeared."""
        return self.sources.digest()


def read_url(url: str) -> bytes:
    """Read a remote file. Raises DataError or OSError if it is unreachable."""
    folder, _, name = url.rpartition("/")
    return Store(folder).read(name)


def read_file(path: str) -> bytes:
    """Read a local file. Raises OSError, and DataError for what cannot be an image."""
    with open_file(path, 0) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
            raise DataError(f"{path} has {size:,} bytes, more than any image; remove it")
        return file.read()


class ShardInputs:
    """Images of a data set of shards, of one split or all.

    Raises DataError if the split is missing, or if the first sample of a split has no image.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, place: Store | Path | str, split: str | None = None) -> None:
        manifest = read_manifest(place)
        self.manifest_digest = manifest.digest
        self.image_format = manifest.image_format
        splits = manifest.splits.values() if split is None else [manifest.split(split, place)]
        shards: list[ShardInfo] = [shard for info in splits for shard in info.shards]
        self.reader = ShardReader(place, shards, borders=False)
        self.starts = [0, *accumulate(shard.samples for shard in shards)]
        first = {info.shards[0].name for info in splits if info.samples}
        self.refuse_missing_images([n for n, s in enumerate(shards) if s.name in first])

    def refuse_missing_images(self, shards: Sequence[int]) -> None:
        """Raise DataError if the first sample of a shard has a mask but no image."""
        for shard, offsets in self.reader.open_offsets(shards).items():
            entry = offsets[0] if len(offsets) else None
            if entry is not None and entry.image is entry.mask:
                raise DataError(
                    f"{self.reader.shard_path(shard)} has masks without images, as predictions "
                    "have; predict the images, or rerun unet predict --include-image"
                )

    def list_keys(self) -> Iterator[str]:
        """Yield the key of every sample."""
        return (key for _, key in iter_keys(self.reader))

    @property
    def remote(self) -> bool:
        """Whether the shards are at a URL."""
        return self.reader.store.local is None

    def __len__(self) -> int:
        return self.starts[-1]

    def address(self, number: int) -> Address:
        """Return shard and row of image `number`."""
        shard = bisect.bisect_right(self.starts, number) - 1
        return Address(number, shard, number - self.starts[shard])

    def name(self, number: int) -> str:
        """Return shard and row, for messages."""
        address = self.address(number)
        return f"{self.reader.shard_path(address.shard)}, sample {address.row}"

    def read(self, number: int) -> EncodedImage:
        """Read the image of the sample."""
        raw = self.reader.read(self.address(number))
        source = str(raw.parse_info().get("source", f"{raw.key}.{raw.extension}"))
        return EncodedImage(encode_key(source), source, raw.require_image())

    def digest(self) -> str:
        """Return the sha256 of the manifest, which holds those of the shards."""
        return self.manifest_digest


@dataclass(frozen=True, slots=True)
class TarInputs:
    """Images in tars without a manifest, by the offsets of their members."""

    tars: tuple[str, ...]
    """Paths or URLs."""
    members: Names
    """Member name of each image."""
    places: NDArray[np.int64]
    """int64 [N, 5]: index of the tar, offset and size of the image, and of its json (size 0:
    none)."""
    problems: tuple[tuple[str, str], ...]
    """Tar and problem of each unreadable member. They count as inputs, so that they are
    reported."""
    notes: tuple[str, ...] = ()

    @property
    def remote(self) -> bool:
        """Whether the inputs are at a URL."""
        return is_url(self.tars[0])

    def __len__(self) -> int:
        return len(self.members) + len(self.problems)

    def name(self, number: int) -> str:
        """Return tar and member, for messages."""
        if number >= len(self.members):
            return self.problems[number - len(self.members)][0]
        return f"{self.tars[int(self.places[number, 0])]}: {self.members[number]}"

    def read(self, number: int) -> EncodedImage:
        """Read the member, and the json of its sample, which may name a longer path."""
        if number >= len(self.members):
            raise DataError(self.problems[number - len(self.members)][1])
        tar, start, size, info_start, info_size = self.places[number].tolist()
        if not size:
            raise DataError(f"{self.name(number)} is empty; write the tar without it")
        wanted = [(start, start + size), (info_start, info_start + info_size)]
        data, *info = read_pieces(self.tars[tar], wanted if info_size else wanted[:1])
        if len(data) != size:
            raise DataError(
                f"{self.name(number)} ends too early; the tar is truncated, copy it again"
            )
        key, extension = member_key(self.members[number])
        source = read_source(info[0], key) if info else None
        source = source or f"{key}.{extension}"
        return EncodedImage(encode_key(source), source, data)

    def digest(self) -> str:
        """Return a hash of the offsets and names of all members, tar by tar."""
        whole = hashlib.sha256(json.dumps([self.tars, self.problems]).encode())
        whole.update(self.places.astype("<i8").tobytes())
        whole.update(self.members.data)
        return whole.hexdigest()


def read_pieces(path: str, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read byte ranges [start, end) of a file; shorter where the file ends before."""
    if is_url(path):
        folder, _, name = path.rpartition("/")
        return Store(folder).read_ranges([ByteRange(name, *piece) for piece in wanted])
    with open_file(path, 0) as file:
        return [os.pread(file.fileno(), end - start, start) for start, end in wanted]


def member_key(name: str) -> tuple[str, str]:
    """Split the member name of an image into key and lower-case extension."""
    key, _, extension = name.rpartition(".")
    return posixpath.normpath(key), extension.lower()


def read_source(data: bytes, key: str) -> str | None:
    """Return the path that the json of a sample names, if it matches the key."""
    try:
        info: Any = json.loads(data)
    except (ValueError, RecursionError):
        return None
    source = info.get("source") if isinstance(info, dict) else None
    if not isinstance(source, str) or not is_safe_path(source):
        return None
    return source if key in (encode_key(source), posixpath.splitext(source)[0]) else None
