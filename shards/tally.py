"""What pictures and masks hold: one pair read by the rules, and the sums over many of them."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.border import BorderRule
from shards.images import (
    DEEP_MODES,
    ImageFormat,
    ImageRule,
    StoredImage,
    read_image,
    scale_table,
)
from shards.index import SizeCount, merge_sizes
from shards.masks import CanonicalMask, MaskFormat, read_mask
from shards.sample import IGNORE, Channels, DataError, Palette

Histogram = NDArray[np.int64]
DEEP = "I;16"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRule:
    """What may stand in a shard, and as what."""

    images: ImageRule
    masks: MaskFormat | None
    """None: there are no masks."""
    palette: Palette
    resize_mask: bool = False
    """A mask of another size than its picture is brought to it, by nearest neighbour."""
    border: BorderRule | None = None
    """Masks get a border map, for which they are decoded; None: they get none."""


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A picture and its mask, checked."""

    image: StoredImage
    mask: CanonicalMask | None
    digest: str
    """sha256 of the picture file's bytes; empty where it cannot have an equal."""


def read_sample(
    image: bytes,
    mask: bytes | None,
    rule: SampleRule,
    image_where: str,
    mask_where: str,
    *,
    pixels: bool = True,
    unique: bool = False,
) -> ReadSample:
    """A pair of files as it goes into a shard; `pixels=False` believes ordinary headers.

    `unique` says that no other picture file has this size, so that no digest is needed.

    Raises DataError for anything about it that `rule` does not cover.
    """
    stored = read_image(image, rule.images, image_where, pixels=pixels)
    digest = "" if unique else hashlib.sha256(image).hexdigest()
    if mask is None or rule.masks is None:
        return ReadSample(stored, None, digest)
    changed = rule.images.resize is not None or rule.resize_mask
    pixels = pixels or changed or rule.border is not None
    canonical = read_mask(
        mask, rule.masks, rule.palette, mask_where, rule=rule.images, pixels=pixels
    )
    if canonical.size != stored.full_size:
        scaled = is_scaled(canonical.size, stored.full_size)
        if not (scaled and rule.resize_mask):
            turned = canonical.size == stored.full_size[::-1] and "turned" in stored.notes
            raise DataError(
                f"{mask_where} is {canonical.size[0]} x {canonical.size[1]}, its picture "
                f"{image_where} {stored.full_size[0]} x {stored.full_size[1]}; "
                + (
                    "the picture was turned as its EXIF orientation says: --exif ignore leaves it"
                    if turned
                    else "give both one size, or add --resize-mask"
                    if scaled
                    else "neither is the other scaled: crop or pad one, or find the right mask"
                )
            )
        stored = replace(stored, notes=(*stored.notes, "mask"))
    if canonical.size != stored.size:
        canonical = canonical.resized(stored.size)
    return ReadSample(stored, canonical, digest)


def is_scaled(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one (width, height) is the other scaled, but for a pixel of the smaller one."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


class Tally:
    """Adds up what samples hold, in integers: the sums do not depend on the order."""

    def __init__(self) -> None:
        self.pixels: Histogram = np.zeros(256, dtype=np.int64)
        """Mask pixels of each class index."""
        self.images: Histogram = np.zeros(256, dtype=np.int64)
        """Masks in which each class index occurs."""
        self.levels: dict[str, Histogram] = {}
        """`L` [256], `RGB` [768] and `I;16` [65536]: picture pixels of each level."""
        self.sizes: Counter[tuple[int, int, str]] = Counter()
        self.mask_modes: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.values: set[int] = set()
        """Pixel values that the mask files held."""
        self.digests: list[str] = []
        """sha256 of each picture, in order; empty where a sample was left out or is unique."""
        self.channels: set[Channels] = set()

    def add(self, sample: ReadSample) -> None:
        """Count a sample in."""
        image = sample.image
        self.sizes[*image.size, image.mode] += 1
        self.notes.update(image.notes)
        self.digests.append(sample.digest)
        self.channels.add(image.channels)
        if image.image is not None:
            kind, levels = count_levels(image.image, image.channels)
            self.levels[kind] = self.levels.get(kind, 0) + levels
        if sample.mask is not None:
            self.mask_modes[sample.mask.mode] += 1
            if sample.mask.classes is not None:
                self.pixels += sample.mask.classes.pixels
                self.images += sample.mask.classes.pixels > 0
                self.values.update(sample.mask.classes.values)

    def leave_out(self) -> None:
        """Note the place of a sample that is not packed."""
        self.digests.append("")

    def merge(self, other: "Tally") -> None:
        """Count in what another tally counted."""
        self.pixels += other.pixels
        self.images += other.images
        for kind, levels in other.levels.items():
            self.levels[kind] = self.levels.get(kind, 0) + levels
        self.sizes.update(other.sizes)
        self.mask_modes.update(other.mask_modes)
        self.notes.update(other.notes)
        self.values |= other.values
        self.digests += other.digests
        self.channels |= other.channels

    def size_counts(self) -> tuple[SizeCount, ...]:
        """How many pictures have one size and mode, the commonest first."""
        return merge_sizes([SizeCount(*kind, images) for kind, images in self.sizes.items()])

    def class_pixels(self, num_classes: int) -> tuple[int, ...]:
        """Mask pixels of each class, then of ignore."""
        return (*self.pixels[:num_classes].tolist(), int(self.pixels[IGNORE]))

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "pixels": self.pixels.tolist(),
            "images": self.images.tolist(),
            "levels": {kind: levels.tolist() for kind, levels in sorted(self.levels.items())},
            "sizes": [[*kind, images] for kind, images in sorted(self.sizes.items())],
            "mask_modes": dict(sorted(self.mask_modes.items())),
            "notes": dict(sorted(self.notes.items())),
            "values": sorted(self.values),
            "digests": self.digests,
            "channels": sorted(self.channels),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The tally that `to_plain` made."""
        tally = cls()
        tally.pixels = np.array(plain["pixels"], dtype=np.int64)
        tally.images = np.array(plain["images"], dtype=np.int64)
        tally.levels = {k: np.array(v, dtype=np.int64) for k, v in plain["levels"].items()}
        tally.sizes = Counter({(w, h, mode): images for w, h, mode, images in plain["sizes"]})
        tally.mask_modes = Counter(plain["mask_modes"])
        tally.notes = Counter(plain["notes"])
        tally.values = set(plain["values"])
        tally.digests = plain["digests"]
        tally.channels = set(plain["channels"])
        return tally


def count_levels(image: Image.Image, channels: Channels) -> tuple[str, Histogram]:
    """Pixels of each level of a picture, and what kind of levels they are."""
    if image.mode in DEEP_MODES:
        return DEEP, np.bincount(np.asarray(image).ravel(), minlength=65536)
    picture = image if image.mode == channels else image.convert(channels)
    return channels, np.array(picture.histogram(), dtype=np.int64)


def merge_tallies(tallies: Iterable[Tally]) -> Tally:
    """All of them in one."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total


def percentile_range(levels: Histogram, percentiles: tuple[float, float]) -> tuple[int, int]:
    """The 16-bit values below which `percentiles` per cent of the pixels lie."""
    total = np.cumsum(levels)
    # At least one pixel: 0 per cent is the least value that occurs.
    low, high = (int(np.searchsorted(total, max(1, total[-1] * p / 100))) for p in percentiles)
    low = min(low, 65534)
    return low, max(min(high, 65535), low + 1)


def statistics(
    levels: dict[str, Histogram], form: ImageFormat
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels decoded by `form` and in 0-1.

    Grey pictures count for each channel of RGB. Integer sums, so the order does not matter.
    """
    grey = levels.get("L", np.zeros(256, dtype=np.int64)).copy()
    if DEEP in levels:
        assert form.range is not None
        deep = np.bincount(scale_table(form.range), weights=levels[DEEP], minlength=256)
        grey += deep.astype(np.int64)
    coloured = levels.get("RGB", np.zeros(768, dtype=np.int64)).reshape(3, 256)
    channels = [grey] if form.channels == "L" else [grey + band for band in coloured]
    scale = np.arange(256, dtype=np.int64)
    means, deviations = [], []
    for band in channels:
        count, total, squares = (int((band * power).sum()) for power in (1, scale, scale**2))
        mean = total / max(1, count)
        means.append(round(mean / 255, 6))
        deviations.append(round(max(0.0, squares / max(1, count) - mean**2) ** 0.5 / 255, 6))
    return tuple(means), tuple(deviations)


def find_duplicates(digests: Iterable[str], sources: Iterable[str]) -> dict[str, list[str]]:
    """{sha256: sources} of pictures whose bytes are equal, names in order."""
    seen: set[bytes] = set()
    twice: set[bytes] = set()
    digests = list(digests)
    for digest in digests:
        raw = bytes.fromhex(digest)
        (twice if raw in seen else seen).add(raw)
    groups: dict[str, list[str]] = {}
    for digest, source in zip(digests, sources, strict=True):
        if digest and bytes.fromhex(digest) in twice:
            groups.setdefault(digest, []).append(source)
    return groups
