"""The manifest of a data set (`index.json`) and the byte offsets of a shard (`.idx`)."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from shards.images import ImageFormat
from shards.sample import BORDER_EXTENSION, INFO_EXTENSION, MASK_EXTENSION, DataError, Palette
from shards.store import Store

MANIFEST = "index.json"
FORMAT = "unet-shards"
VERSION = 2

MOST_SIZES = 4096
"""Sizes of pictures that a manifest tells apart; beyond, they are rounded down together."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str
    pixels: tuple[int, ...]
    """Mask pixels of each class, then of ignore; empty where unlabelled."""


@dataclass(frozen=True, slots=True)
class SizeCount:
    """How many pictures have one size and mode."""

    width: int
    height: int
    mode: str
    images: int


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: `train`, `val`, `test`, `unlabelled` or `predicted`."""

    shards: tuple[ShardInfo, ...]
    sizes: tuple[SizeCount, ...]
    """Sizes of the pictures, the commonest first."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of shards holds. Written last: a folder without it is no data set."""

    classes: tuple[str, ...]
    """Class names by index."""
    palette: Palette
    """RGB colour of each class."""
    image_format: ImageFormat
    """How every picture is decoded."""
    mask_format: dict[str, Any]
    """The declared format of the mask files, and `source_values`: the pixel value of each class."""
    mean: tuple[float, ...]
    """Mean of each channel over the train split (all splits where it is empty), pixels in 0-1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, pixels in 0-1."""
    splits: dict[str, SplitInfo]
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Sources of pictures that are equal byte for byte, at most a thousand groups of twenty."""
    verified: Literal["full", "headers"] = "full"
    """Whether every pixel was looked at; with `headers`, mean and std come from a sample."""
    border_sigma: float | None = None
    """Pixels, of the samples' border maps; None: they have none."""
    border_classes: tuple[str, ...] = ()
    """Classes whose connected components are cells in the border maps."""
    digest: str = field(default="", compare=False)
    """sha256 of the file that this was read from."""

    def split(self, name: str, place: object) -> SplitInfo:
        """A split that has samples. Raises DataError naming those there are, and the place."""
        if name not in self.splits or not self.splits[name].samples:
            there = ", ".join(k for k, v in self.splits.items() if v.samples)
            raise DataError(f"{place} has no samples in the split {name!r}, only in: {there}")
        return self.splits[name]


def write_manifest(store: Store, manifest: Manifest, within: str | None = None) -> None:
    """Write `index.json` into a folder, whole or not at all; `within`: see `Store.write`."""
    plain = asdict(manifest)
    del plain["digest"]
    if manifest.border_sigma is None:
        # So that programs which know nothing of border maps read it.
        del plain["border_sigma"], plain["border_classes"]
    for info in plain["splits"].values():
        info["samples"] = sum(shard["samples"] for shard in info["shards"])
    text = json.dumps({"format": FORMAT, "version": VERSION, **plain}, indent=1) + "\n"
    store.write(MANIFEST, text.encode(), within)


def read_manifest(place: Store | Path | str) -> Manifest:
    """The manifest of a folder of shards, on disk or at a URL.

    Raises DataError where there is none, where it is none of ours or of a newer version.
    """
    store = Store(place)
    if store.local is not None and not store.local.is_dir():
        raise DataError(f"{store} is no folder of shards: it does not exist")
    path = store.path(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError as error:
        raise DataError(
            f"{store} is no data set: it has no {MANIFEST} (unet pack writes it last)"
        ) from error
    try:
        plain = json.loads(data)
        if plain.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a manifest of shards that unet pack wrote")
        if (version := plain.pop("version")) != VERSION:
            remedy = "update it" if version > VERSION else "pack the data set again"
            raise DataError(f"{path} has version {version}, this program reads {VERSION}; {remedy}")
        splits = {name: read_split(info) for name, info in plain.pop("splits").items()}
        tuples = {
            name: to_tuple(plain.pop(name))
            for name in ("classes", "palette", "mean", "std", "duplicates")
        }
        # Manifests written before there were border maps do not name them.
        tuples["border_classes"] = to_tuple(plain.pop("border_classes", []))
        form = plain.pop("image_format")
        return Manifest(
            **plain,
            **tuples,
            image_format=ImageFormat(**{**form, "range": to_tuple(form["range"])}),
            splits=splits,
            digest=hashlib.sha256(data).hexdigest(),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); pack the data set again") from error


def read_split(plain: dict[str, Any]) -> SplitInfo:
    """A split from its JSON."""
    shards = tuple(
        ShardInfo(**{**shard, "pixels": tuple(shard["pixels"])}) for shard in plain["shards"]
    )
    return SplitInfo(shards, tuple(SizeCount(**size) for size in plain["sizes"]))


def to_tuple(value: Any) -> Any:
    """JSON lists become tuples, at any depth."""
    return tuple(to_tuple(item) for item in value) if isinstance(value, list) else value


class MemberRange(NamedTuple):
    """Where one member's bytes lie in a shard."""

    extension: str
    offset: int
    size: int
    name: str


class SampleRange(NamedTuple):
    """Where one sample's members lie in a shard."""

    key: str
    image: MemberRange
    mask: MemberRange | None
    info: MemberRange | None
    """None in shards that others wrote."""
    border: MemberRange | None
    """None where no border maps were asked for."""


class ShardIndex:
    """The `.idx` of one shard, parsed a sample at a time.

    Args:
        data: its content.
        path: where it lies.
        reread: it is a local file, whose lines are read again when they are asked for; else the
            content is kept.

    Raises DataError where the content is no whole index.
    """

    def __init__(self, data: bytes, path: str, *, reread: bool = False) -> None:
        header, _, _ = data.partition(b"\n")
        version, _, count = header.partition(b" ")
        newlines = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        # Four bytes a line: a data set of a million samples has as many in each process.
        self.ends = newlines.astype(np.uint32)
        whole = data.endswith(b"\n") and count.isdigit() and int(count) == len(self.ends) - 1
        if version != b"v1.2" or not whole:
            raise DataError(f"{path} is cut or no index of version v1.2; pack the data set again")
        self.path, self.data = path, None if reread else data

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return len(self.data or b"") + self.ends.nbytes

    def line(self, row: int) -> bytes:
        """The line of sample `row`. Raises OSError where its file has gone."""
        begin, end = int(self.ends[row]) + 1, int(self.ends[row + 1])
        if self.data is not None:
            return self.data[begin:end]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(begin)
            return file.read(end - begin)

    def __getitem__(self, row: int) -> SampleRange:
        """The members of sample `row`. Raises DataError where one that is needed is missing."""
        try:
            words = self.line(row).decode().split(" ")
            members = [
                MemberRange(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3])
                for i in range(0, len(words), 4)
            ]
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{self.path}, line {row + 2} is damaged; pack it again") from error
        others = (MASK_EXTENSION, INFO_EXTENSION, BORDER_EXTENSION)
        images = [m for m in members if m.extension not in others]
        mask, info, border = (
            next((m for m in members if m.extension == extension), None) for extension in others
        )
        # Predictions without their pictures are samples too: the mask stands in as the picture.
        image = images[0] if images else mask
        if image is None or len(images) > 1:
            raise DataError(
                f"{self.path}, line {row + 2}: a sample has {len(images)} pictures, not one; "
                "pack it again"
            )
        key = image.name.removesuffix(f".{image.extension}")
        return SampleRange(key, image, mask, info, border)


def read_index(shard: Path) -> ShardIndex:
    """The index beside a shard on disk. Raises DataError where there is none."""
    path = shard.with_suffix(".idx")
    try:
        return ShardIndex(path.read_bytes(), str(path), reread=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); pack the data set again") from error


def merge_sizes(counts: Sequence[SizeCount]) -> tuple[SizeCount, ...]:
    """The counts of several shards added up, the commonest size first.

    More than `MOST_SIZES` are rounded down to multiples of 2, 4, 8, ... until few enough are left:
    a manifest stays small however odd its pictures are.
    """
    total: Counter[tuple[int, int, str]] = Counter()
    for size in counts:
        total[size.width, size.height, size.mode] += size.images
    step = 1
    while len(total) > MOST_SIZES:
        step *= 2
        coarse: Counter[tuple[int, int, str]] = Counter()
        for (width, height, mode), images in total.items():
            # A side below the step stays 1, so that no picture vanishes.
            rounded = (max(1, width // step * step), max(1, height // step * step), mode)
            coarse[rounded] += images
        total = coarse
    ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    return tuple(SizeCount(*kind, images) for kind, images in ordered)
