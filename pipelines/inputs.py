"""What `unet predict` can be given: a picture, a folder, a glob, a list of paths, or shards."""

import bisect
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipelines.config import UsageError
from shards.index import MANIFEST, ShardInfo, read_manifest
from shards.order import Address
from shards.pairs import ProblemsError, list_images
from shards.reader import ShardReader
from shards.sample import DataError, encode_key

LIST_EXTENSIONS = (".txt", ".lst", ".list")


@dataclass(frozen=True, slots=True)
class Picture:
    """The bytes of one input."""

    key: str
    source: str
    """Relative path that the results are named after."""
    data: bytes


class Inputs(Protocol):
    """An ordered list of pictures, the same on every rank. Picklable and small."""

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


@dataclass(frozen=True, slots=True)
class FileInputs:
    """Pictures in files."""

    root: Path
    sources: Sequence[str]
    """Paths below `root`, sorted, with `/` between parts."""

    def __len__(self) -> int:
        return len(self.sources)

    def name(self, number: int) -> str:
        """The path."""
        return str(self.root / self.sources[number])

    def read(self, number: int) -> Picture:
        """Read the file."""
        source = self.sources[number]
        return Picture(encode_key(source), source, (self.root / source).read_bytes())

    def digest(self) -> str:
        """Of the names; two runs over one list are one job even if a picture has vanished."""
        return hash_lines(self.sources)


class ShardInputs:
    """Pictures in a data set of shards, all splits."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.manifest_digest = manifest.digest
        shards: list[ShardInfo] = [s for split in manifest.splits.values() for s in split.shards]
        self.reader = ShardReader(folder, shards)
        self.starts = [0, *accumulate(shard.samples for shard in shards)]

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


def find_inputs(given: str) -> Inputs:
    """The pictures that `--input` means.

    Raises UsageError where it means nothing, DataError where two pictures would share a result.
    """
    path = Path(given)
    if re.match(r"[a-z0-9]+://", given):
        raise UsageError(
            f"--input {given}: remote inputs are not supported yet; copy them here first"
        )
    if (path / MANIFEST).is_file():
        return ShardInputs(path)
    if path.is_dir():
        return file_inputs(path, list_images(path))
    if path.suffix.lower() in LIST_EXTENSIONS and path.is_file():
        return listed_inputs(path)
    if path.is_file():
        return file_inputs(path.parent, [path.name])
    if glob.has_magic(given):
        found = sorted(name for name in glob.glob(given, recursive=True) if os.path.isfile(name))
        if found:
            literal = Path(
                *[part for part in path.parts if not glob.has_magic(part)][: first_magic(path)]
            )
            return file_inputs(literal, [str(Path(name).relative_to(literal)) for name in found])
    raise UsageError(
        f"--input {given}: no picture, folder, list (.txt), pattern or folder of shards is there"
    )


def first_magic(path: Path) -> int:
    """Parts of a pattern before the first that has a wildcard."""
    return next(i for i, part in enumerate(path.parts) if glob.has_magic(part))


def listed_inputs(path: Path) -> FileInputs:
    """A file with one path a line; relative ones start at the file's folder."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no list of paths: it is not UTF-8 text") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"{path} lists no picture")
    absolute = [os.path.normpath(path.parent.resolve() / name) for name in names]
    root = Path(os.path.commonpath([os.path.dirname(name) for name in absolute]))
    return file_inputs(root, [str(Path(name).relative_to(root)) for name in absolute])


def file_inputs(root: Path, sources: Sequence[str]) -> FileInputs:
    """Sorted, with every key given once. Raises DataError naming those that would collide."""
    ordered = sorted(PurePosixPath(source).as_posix() for source in sources)
    stems: dict[str, str] = {}
    problems = []
    for source in ordered:
        stem = os.path.splitext(source)[0]
        if stem in stems:
            problems.append(f"{root / stems[stem]} and {source} would have one result")
        stems[stem] = source
    if problems:
        raise ProblemsError(problems, "rename one of each, or predict them into two folders")
    return FileInputs(root, ordered)


def hash_lines(lines: Sequence[str]) -> str:
    """sha256 over lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
