"""Samples checked by the rules of a data set, and statistics over many of them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.annotations.rule import AnnotationRule
from shards.documents import Byte, Count, Positive, convert
from shards.images.files import ImageFormat, ImageRule, StoredImage, read_image
from shards.images.pixels import build_scale_table
from shards.images.tiff import GREY16_MODES
from shards.manifest import Mode, SizeCount, merge_size_counts
from shards.masks.borders import BorderRule
from shards.masks.canonical import CanonicalMask, read_mask
from shards.masks.formats import MaskFormat
from shards.masks.readings import Occurrence, Reading
from shards.outliers import Extremes, Outlier, StoredExtremes
from shards.sample import IGNORE, MAX_LISTED, Channels, DataError, Palette

Histogram = NDArray[np.int64]
GREY16 = "I;16"
LEVELS = {"L": 256, "RGB": 768, GREY16: 65536}
"""Number of levels of each kind that are counted."""
Digest = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
PerIndex = Annotated[tuple[Count, ...], msgspec.Meta(min_length=256, max_length=256)]
"""A count for each class index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRule:
    """Which samples may be packed, and in which form."""

    images: ImageRule
    masks: MaskFormat | None
    """None: there are no masks. With annotations: that of the masks that are drawn."""
    palette: Palette
    resize_mask: bool = False
    """Whether a mask of another size than its image is resized to it, by nearest neighbour."""
    border: BorderRule | None = None
    """How border maps are computed, for which masks are decoded; None: no border maps."""
    annotations: AnnotationRule | None = None
    """How masks are drawn from annotations; None: masks are image files."""


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A checked image and its mask, in the form in which they are written to a shard."""

    image: StoredImage
    mask: CanonicalMask | None
    digest: str
    """sha256 of the image file; empty if no other file can be equal."""
    name: str = ""
    """Name of the image file in messages."""
    mask_name: str = ""
    """Name of the mask file in messages."""


def read_sample(
    image: bytes,
    mask: bytes | None,
    rule: SampleRule,
    image_where: str,
    mask_where: str,
    *,
    pixels: bool = True,
    unique: bool = False,
) -> StoredSample:
    """Check an image file and its mask file and return them as they are stored.

    Args:
        image: bytes of the image file.
        mask: bytes of the mask file or of the image's annotations, None if it has none.
        rule: the rules of the data set.
        image_where: name of the image file in error messages.
        mask_where: name of the mask file in error messages.
        pixels: False trusts ordinary headers instead of decoding.
        unique: no other image file has the same size in bytes, so that no digest is needed.

    Raises DataError for anything that `rule` does not cover.
    """
    stored = read_image(image, rule.images, image_where, pixels=pixels)
    digest = "" if unique else hashlib.sha256(image).hexdigest()
    if rule.annotations is not None:
        canonical = rule.annotations.read_mask(mask, stored.full_size, mask_where)
    elif mask is None or rule.masks is None:
        return StoredSample(stored, None, digest, image_where)
    else:
        changed = rule.images.resize is not None or rule.resize_mask
        pixels = pixels or changed or rule.border is not None
        canonical = read_mask(
            mask, rule.masks, rule.palette, mask_where, rule=rule.images, pixels=pixels
        )
    refuse_other_orientation(canonical, stored, rule, mask_where, image_where)
    stored = replace(stored, notes=(*stored.notes, *canonical.notes))
    if canonical.size != stored.full_size:
        scaled = has_same_aspect(canonical.size, stored.full_size)
        if not (scaled and rule.resize_mask):
            remedy = suggest_size_remedy(canonical.size, stored)
            raise DataError(
                f"{mask_where} is {canonical.size[0]} x {canonical.size[1]}, but its image "
                f"{image_where} is {stored.full_size[0]} x {stored.full_size[1]}; {remedy}"
            )
        stored = replace(stored, notes=(*stored.notes, "mask"))
    if canonical.size != stored.size:
        canonical = canonical.resize(stored.size)
    return StoredSample(stored, canonical, digest, image_where, mask_where)


def refuse_other_orientation(
    mask: CanonicalMask, image: StoredImage, rule: SampleRule, mask_where: str, image_where: str
) -> None:
    """Raise DataError if a mask alone is rotated by its EXIF orientation."""
    ignored = rule.images.exif == "ignore"
    if mask.orientation and mask.orientation != image.orientation and not ignored:
        has = f"EXIF orientation {image.orientation}" if image.orientation else "none"
        raise DataError(
            f"{mask_where} has EXIF orientation {mask.orientation}, but its image {image_where} "
            f"has {has}; remove the orientation from the mask, or add --exif ignore to read both "
            "as stored"
        )


def suggest_size_remedy(mask_size: tuple[int, int], image: StoredImage) -> str:
    """Return the most likely remedy for a mask of another size (width, height) than its image."""
    if mask_size == image.full_size[::-1] and "turned" in image.notes:
        return (
            "the image was rotated by its EXIF orientation: add --exif ignore to keep it unrotated"
        )
    if has_same_aspect(mask_size, image.full_size):
        return "give both the same size, or add --resize-mask"
    return "their aspect ratios differ: crop or pad one, or find the right mask"


def has_same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two (width, height) have the same aspect ratio, within a rounded pixel."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


@dataclass(frozen=True, slots=True)
class StoredStatistics:
    """`SampleStatistics` as JSON."""

    pixels: PerIndex
    images: PerIndex
    levels: dict[Literal["L", "RGB", "I;16"], tuple[Count, ...]]
    sizes: tuple[tuple[Positive, Positive, Mode, Positive], ...]
    mask_modes: dict[Mode, Count]
    notes: dict[str, Count]
    values: tuple[int, ...]
    readings: tuple[tuple[Byte, int, Count, tuple[Byte, Byte, Byte] | None, Positive, str], ...]
    remarks: list[str]
    digests: list[Digest]
    channels: tuple[Channels, ...]
    extremes: StoredExtremes


class SampleStatistics:
    """Statistics over samples, in integers, so that they do not depend on the order of merging."""

    def __init__(self) -> None:
        self.pixels: Histogram = np.zeros(256, dtype=np.int64)
        """Mask pixels of each class index."""
        self.images: Histogram = np.zeros(256, dtype=np.int64)
        """Number of masks in which each class index occurs."""
        self.levels: dict[str, Histogram] = {}
        """Image pixels of each level: `L` [256], `RGB` [768] and `I;16` [65536]."""
        self.sizes: Counter[tuple[int, int, str]] = Counter()
        """Number of images of each width, height and mode."""
        self.mask_modes: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.remarks: list[str] = []
        """The first annotations, by name, that draw nothing."""
        self.values: set[int] = set()
        """Pixel values that occur in the mask files."""
        self.readings: dict[Reading, Occurrence] = {}
        """How often each value became a class, and in which mask first."""
        self.digests: list[str] = []
        """sha256 of each image, in order; empty if the sample was omitted or is unique."""
        self.channels: set[Channels] = set()
        self.extremes = Extremes()

    def add(self, sample: StoredSample) -> None:
        """Add a sample."""
        image = sample.image
        self.sizes[*image.size, image.mode] += 1
        self.notes.update(image.notes)
        self.digests.append(sample.digest)
        self.channels.add(image.channels)
        self.extremes.add(sample.name, image.channels, image.full_size)
        if image.image is not None:
            kind, levels = count_levels(image.image, image.channels)
            self.levels[kind] = self.levels.get(kind, 0) + levels
        if sample.mask is not None:
            self.mask_modes[sample.mask.mode] += 1
            self.add_remarks(sample.mask.remarks)
            self.add_readings({r: Occurrence(1, sample.mask_name) for r in sample.mask.readings})
            if sample.mask.class_map is not None:
                self.pixels += sample.mask.class_map.pixels
                self.images += sample.mask.class_map.pixels > 0
                self.extremes.add_mask(sample.name, sample.mask.class_map.pixels)
                self.values.update(sample.mask.class_map.values)

    def add_readings(self, readings: Mapping[Reading, Occurrence]) -> None:
        """Add readings of masks."""
        for reading, occurrence in readings.items():
            known = self.readings.get(reading)
            self.readings[reading] = occurrence if known is None else known + occurrence

    def add_remarks(self, remarks: Iterable[str]) -> None:
        """Add annotations that draw nothing; keeps the first by name."""
        self.remarks = sorted([*self.remarks, *remarks])[:MAX_LISTED]

    def add_omitted(self) -> None:
        """Add an empty digest for a sample that is not packed, so that digests stay aligned."""
        self.digests.append("")

    def merge(self, other: "SampleStatistics") -> None:
        """Add the statistics of other samples."""
        self.pixels += other.pixels
        self.images += other.images
        for kind, levels in other.levels.items():
            self.levels[kind] = self.levels.get(kind, 0) + levels
        self.sizes.update(other.sizes)
        self.mask_modes.update(other.mask_modes)
        self.notes.update(other.notes)
        self.values |= other.values
        self.add_readings(other.readings)
        self.add_remarks(other.remarks)
        self.digests += other.digests
        self.channels |= other.channels
        self.extremes.merge(other.extremes)

    def find_outliers(self, classes: Sequence[str]) -> list[Outlier]:
        """Find the images that stand out; `classes`: names by index."""
        count = len(classes)
        return self.extremes.find_outliers(
            classes, self.pixels[:count].tolist(), self.images[:count].tolist()
        )

    def size_counts(self) -> tuple[SizeCount, ...]:
        """Return the number of images of each size and mode, the most common first."""
        return merge_size_counts([SizeCount(*kind, images) for kind, images in self.sizes.items()])

    def class_pixels(self, num_classes: int) -> tuple[int, ...]:
        """Return the mask pixels of each class, then of ignore."""
        return (*self.pixels[:num_classes].tolist(), int(self.pixels[IGNORE]))

    def to_plain(self) -> dict[str, Any]:
        """Convert to a dict for JSON."""
        return {
            "pixels": self.pixels.tolist(),
            "images": self.images.tolist(),
            "levels": {kind: levels.tolist() for kind, levels in sorted(self.levels.items())},
            "sizes": [[*kind, images] for kind, images in sorted(self.sizes.items())],
            "mask_modes": dict(sorted(self.mask_modes.items())),
            "notes": dict(sorted(self.notes.items())),
            "values": sorted(self.values),
            "readings": [
                [r.index, r.value, r.bits, r.colour, n.masks, n.first]
                for r, n in self.readings.items()
            ],
            "remarks": self.remarks,
            "digests": self.digests,
            "channels": sorted(self.channels),
            "extremes": self.extremes.to_plain(),
        }

    @classmethod
    def from_plain(cls, plain: Any) -> Self:
        """Restore what `to_plain` returned. Raises ValueError, naming the field, if damaged."""
        stored = convert(plain, StoredStatistics)
        for kind, levels in stored.levels.items():
            if len(levels) != LEVELS[kind]:
                raise ValueError(f"Expected {LEVELS[kind]} numbers - at `$.levels.{kind}`")
        statistics = cls()
        statistics.pixels = np.array(stored.pixels, dtype=np.int64)
        statistics.images = np.array(stored.images, dtype=np.int64)
        statistics.levels = {k: np.array(v, dtype=np.int64) for k, v in stored.levels.items()}
        statistics.sizes = Counter({(w, h, mode): n for w, h, mode, n in stored.sizes})
        statistics.mask_modes = Counter(stored.mask_modes)
        statistics.notes = Counter(stored.notes)
        statistics.values = {*stored.values}
        for index, value, bits, colour, masks, first in stored.readings:
            statistics.readings[Reading(index, value, bits, colour)] = Occurrence(masks, first)
        statistics.remarks, statistics.digests = stored.remarks, stored.digests
        statistics.channels = {*stored.channels}
        statistics.extremes = Extremes.restore(stored.extremes)
        return statistics


def count_levels(image: Image.Image, channels: Channels) -> tuple[str, Histogram]:
    """Count the pixels of each level of an image; returns the kind of levels and their counts."""
    if image.mode in GREY16_MODES:
        return GREY16, np.bincount(np.asarray(image).ravel(), minlength=65536)
    converted = image if image.mode == channels else image.convert(channels)
    return channels, np.array(converted.histogram(), dtype=np.int64)


def merge_statistics(parts: Iterable[SampleStatistics]) -> SampleStatistics:
    """Merge statistics into new ones."""
    total = SampleStatistics()
    for part in parts:
        total.merge(part)
    return total


def percentile_range(levels: Histogram, percentiles: tuple[float, float]) -> tuple[int, int]:
    """Return the 16-bit values at the given percentiles of the pixels, at least 1 apart."""
    total = np.cumsum(levels)
    # At least one pixel: the 0th percentile is the smallest value that occurs.
    low, high = (int(np.searchsorted(total, max(1, total[-1] * p / 100))) for p in percentiles)
    low = min(low, 65534)
    return low, max(min(high, 65535), low + 1)


MIN_DEVIATION = 1e-6
"""Of images of one colour, so that pixels can be divided by it."""


def compute_mean_std(
    levels: dict[str, Histogram], image_format: ImageFormat
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each channel, with pixels in 0-1.

    Args:
        levels: histograms as in `SampleStatistics.levels`; grey images count in each channel of
            RGB.
        image_format: how the images are decoded.

    Computed from integer sums, so that the result does not depend on the order of the images.
    """
    grey = levels.get("L", np.zeros(256, dtype=np.int64)).copy()
    if GREY16 in levels:
        assert image_format.range is not None
        table = build_scale_table(image_format.range)
        scaled = np.bincount(table, weights=levels[GREY16], minlength=256)
        grey += scaled.astype(np.int64)
    coloured = levels.get("RGB", np.zeros(768, dtype=np.int64)).reshape(3, 256)
    channels = [grey] if image_format.channels == "L" else [grey + band for band in coloured]
    scale = np.arange(256, dtype=np.int64)
    means, deviations = [], []
    for band in channels:
        count, total, squares = (int((band * power).sum()) for power in (1, scale, scale**2))
        mean = total / max(1, count)
        means.append(round(mean / 255, 6))
        deviation = max(0.0, squares / max(1, count) - mean**2) ** 0.5 / 255
        deviations.append(max(MIN_DEVIATION, round(deviation, 6)))
    return tuple(means), tuple(deviations)


def find_duplicates(digests: Iterable[str], sources: Iterable[str]) -> dict[str, list[str]]:
    """Return {sha256: sources} of images that are equal byte for byte, sources in order."""
    seen: set[bytes] = set()
    repeated: set[bytes] = set()
    digests = list(digests)
    for digest in digests:
        raw = bytes.fromhex(digest)
        (repeated if raw in seen else seen).add(raw)
    groups: dict[str, list[str]] = {}
    for digest, source in zip(digests, sources, strict=True):
        if digest and bytes.fromhex(digest) in repeated:
            groups.setdefault(digest, []).append(source)
    return groups
