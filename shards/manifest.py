"""The manifest of a data set (`index.json`) and the byte offsets of a shard (`.idx`)."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.images.files import ImageFormat
from shards.sample import DataError, Palette
from shards.store import Store

MANIFEST = "index.json"
FORMAT = "unet-shards"
VERSION = 2
READING_RULES = ("exif", "frame", "resize")
"""Fields of `image_format` that manifests had not at first."""
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
    for name in READING_RULES:
        # As border maps: absent where it is the default.
        if plain["image_format"][name] == getattr(
            ImageFormat(manifest.image_format.channels), name
        ):
            del plain["image_format"][name]
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


def rare_classes(manifest: Manifest) -> tuple[int, ...]:
    """The classes that occur in training, less the commonest; all but the first if not counted."""
    counted = [shard.pixels for shard in manifest.splits["train"].shards if shard.pixels]
    if not counted:
        return tuple(range(1, len(manifest.classes)))
    pixels = np.sum(counted, axis=0)[: len(manifest.classes)]
    return tuple(int(c) for c in np.flatnonzero(pixels) if c != pixels.argmax())


def common_side(split: SplitInfo) -> int:
    """The longest side of a square that half of the images hold."""
    total = sum(size.images for size in split.sizes)
    held = 0
    for size in sorted(split.sizes, key=lambda s: -min(s.width, s.height)):
        held += size.images
        if 2 * held >= total:
            return min(size.width, size.height)
    raise AssertionError("a split with samples has sizes")
