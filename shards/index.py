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

MAX_SIZES = 4096
"""Distinct image sizes that a manifest lists; if there are more, they are rounded down."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str
    pixels: tuple[int, ...]
    """Mask pixels of each class, then of ignore; empty if unlabelled."""


@dataclass(frozen=True, slots=True)
class SizeCount:
    """Number of images with one size and mode."""

    width: int
    height: int
    mode: str
    images: int


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: `train`, `val`, `test`, `unlabelled` or `predicted`."""

    shards: tuple[ShardInfo, ...]
    sizes: tuple[SizeCount, ...]
    """Sizes of the images, the most common first."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Description of a folder of shards. Written last: without it, a folder is not a data set."""

    classes: tuple[str, ...]
    """Class names by index."""
    palette: Palette
    """RGB colour of each class."""
    image_format: ImageFormat
    """How every image is decoded."""
    mask_format: dict[str, Any]
    """The declared format of the mask files, and `source_values`: the pixel value of each class."""
    mean: tuple[float, ...]
    """Mean of each channel over the train split (over all splits if train is empty), pixels 0-1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, pixels 0-1."""
    splits: dict[str, SplitInfo]
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Sources of images that are equal byte for byte: at most 1,000 groups of 20."""
    verified: Literal["full", "headers"] = "full"
    """Whether all pixels were checked; with `headers`, mean and std come from a sample."""
    border_sigma: float | None = None
    """Sigma of the border maps, in pixels; None: there are no border maps."""
    border_classes: tuple[str, ...] = ()
    """Classes whose connected components are cells in the border maps."""
    digest: str = field(default="", compare=False)
    """sha256 of the manifest file that was read."""

    def split(self, name: str, place: object) -> SplitInfo:
        """Return a split that has samples. Raises DataError naming `place` and all such splits."""
        if name not in self.splits or not self.splits[name].samples:
            available = ", ".join(k for k, v in self.splits.items() if v.samples)
            raise DataError(
                f"{place} has no samples in the split {name!r}; splits with samples: {available}"
            )
        return self.splits[name]


def write_manifest(store: Store, manifest: Manifest, within: str | None = None) -> None:
    """Write `index.json` into a folder, atomically; `within`: see `Store.write`."""
    plain = asdict(manifest)
    del plain["digest"]
    if manifest.border_sigma is None:
        # So that programs without support for border maps can read it.
        del plain["border_sigma"], plain["border_classes"]
    for info in plain["splits"].values():
        info["samples"] = sum(shard["samples"] for shard in info["shards"])
    text = json.dumps({"format": FORMAT, "version": VERSION, **plain}, indent=1) + "\n"
    store.write(MANIFEST, text.encode(), within)


def read_manifest(place: Store | Path | str) -> Manifest:
    """Read the manifest of a folder of shards, on disk or at a URL.

    Raises DataError if it is missing, damaged, not a manifest, or of another version.
    """
    store = Store(place)
    if store.local is not None and not store.local.is_dir():
        raise DataError(f"{store} does not exist or is not a directory; check the path")
    path = store.path(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError as error:
        raise DataError(
            f"{store} is not a data set: {MANIFEST} is missing (unet pack writes it last)"
        ) from error
    try:
        plain = json.loads(data)
        if plain.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a manifest written by unet pack")
        if (version := plain.pop("version")) != VERSION:
            remedy = "update unet-shards" if version > VERSION else "pack the data set again"
            raise DataError(
                f"{path} has version {version}, but this program reads version {VERSION}; {remedy}"
            )
        splits = {name: parse_split(info) for name, info in plain.pop("splits").items()}
        tuples = {
            name: to_tuple(plain.pop(name))
            for name in ("classes", "palette", "mean", "std", "duplicates")
        }
        # Manifests written before border maps existed do not have this field.
        tuples["border_classes"] = to_tuple(plain.pop("border_classes", []))
        image_format = plain.pop("image_format")
        return Manifest(
            **plain,
            **tuples,
            image_format=ImageFormat(**{**image_format, "range": to_tuple(image_format["range"])}),
            splits=splits,
            digest=hashlib.sha256(data).hexdigest(),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); pack the data set again") from error


def parse_split(plain: dict[str, Any]) -> SplitInfo:
    """Build a split from its JSON object."""
    shards = tuple(
        ShardInfo(**{**shard, "pixels": tuple(shard["pixels"])}) for shard in plain["shards"]
    )
    return SplitInfo(shards, tuple(SizeCount(**size) for size in plain["sizes"]))


def to_tuple(value: Any) -> Any:
    """Convert JSON lists to tuples, at any depth."""
    return tuple(to_tuple(item) for item in value) if isinstance(value, list) else value


class MemberRange(NamedTuple):
    """Byte range of one member in a shard."""

    extension: str
    offset: int
    size: int
    name: str


class SampleRange(NamedTuple):
    """Byte ranges of the members of one sample in a shard."""

    key: str
    image: MemberRange
    mask: MemberRange | None
    info: MemberRange | None
    """None in shards written by other programs."""
    border: MemberRange | None
    """None if no border maps were requested."""


class ShardOffsets:
    """The `.idx` of one shard, parsed one sample at a time.

    Args:
        data: content of the file.
        path: path or URL of the file.
        reread: the file is local, and each line is read again when it is needed; otherwise the
            content is kept in memory.

    Raises DataError if the content is truncated or not an `.idx`.
    """

    def __init__(self, data: bytes, path: str, *, reread: bool = False) -> None:
        header, _, _ = data.partition(b"\n")
        version, _, count = header.partition(b" ")
        newlines = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        # 4 bytes per line: a data set of a million samples has as many lines in each process.
        self.ends = newlines.astype(np.uint32)
        complete = data.endswith(b"\n") and count.isdigit() and int(count) == len(self.ends) - 1
        if version != b"v1.2" or not complete:
            raise DataError(f"{path} is truncated or not a v1.2 .idx; pack the data set again")
        self.path, self.data = path, None if reread else data

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.data or b"") + self.ends.nbytes

    def line(self, row: int) -> bytes:
        """Return the line of sample `row`. Raises OSError if the file can no longer be read."""
        start, end = int(self.ends[row]) + 1, int(self.ends[row + 1])
        if self.data is not None:
            return self.data[start:end]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)

    def __getitem__(self, row: int) -> SampleRange:
        """Return the members of sample `row`. Raises DataError if a required one is missing."""
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
        # Predictions stored without their images are samples too: the mask doubles as the image.
        image = images[0] if images else mask
        if image is None or len(images) > 1:
            raise DataError(
                f"{self.path}, line {row + 2}: a sample has {len(images)} images, expected 1; "
                "pack it again"
            )
        key = image.name.removesuffix(f".{image.extension}")
        return SampleRange(key, image, mask, info, border)


def read_offsets(shard: Path) -> ShardOffsets:
    """Read the `.idx` of a shard on disk. Raises DataError if it is missing or unreadable."""
    path = shard.with_suffix(".idx")
    try:
        return ShardOffsets(path.read_bytes(), str(path), reread=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); pack the data set again") from error


def merge_size_counts(counts: Sequence[SizeCount]) -> tuple[SizeCount, ...]:
    """Add up the size counts of several shards, the most common size first.

    If there are more than `MAX_SIZES` sizes, they are rounded down to multiples of 2, 4, 8, ...
    until few enough remain: a manifest stays small even if every image has a size of its own.
    """
    total: Counter[tuple[int, int, str]] = Counter()
    for size in counts:
        total[size.width, size.height, size.mode] += size.images
    step = 1
    while len(total) > MAX_SIZES:
        step *= 2
        coarse: Counter[tuple[int, int, str]] = Counter()
        for (width, height, mode), images in total.items():
            # A side shorter than the step stays 1, so that no size becomes 0.
            rounded = (max(1, width // step * step), max(1, height // step * step), mode)
            coarse[rounded] += images
        total = coarse
    ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    return tuple(SizeCount(*kind, images) for kind, images in ordered)
