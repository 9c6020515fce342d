"""Paired comparison of two scorings of the same images.

The difference of a score is that of the second less that of the first, each from the summed counts
of the split. Its interval comes from a paired bootstrap: both are scored on the same resamples of
images or groups (`evaluation.intervals`). Its p-value is that of a sign-flip permutation test:
under the null hypothesis, the two results of an image are exchangeable, so that they are swapped at
random in 10,000 ways (in all 2^n ways where these are fewer), and p is the share of differences
that are at least as large, the observed one included.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.groups import number_groups
from pipelines.evaluation.intervals import (
    LEVEL,
    MAX_DRAWN,
    RESAMPLES,
    SEED,
    Bounds,
    Integers,
    Unit,
    bound_scores,
    count_units,
    divide_sums,
    pool_units,
    resample_sums,
)
from pipelines.evaluation.per_image import Floats, ImageScores, image_scores
from pipelines.evaluation.stored_scores import StoredScores
from pipelines.evaluation.table import show
from shards.sample import DataError
from unet.metrics import Empty

TOLERANCE = 1e-12
"""Differences of scores that are closer are equal: the error of a division is 1e-16."""
MAX_CHANGED = 20
MAX_NAMED = 3
"""Images that an error names."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of one score: second minus first; None if undefined."""

    first: float | None
    second: float | None
    difference: float | None
    interval: Bounds
    p_value: float | None


@dataclass(frozen=True, slots=True)
class ScoreDifferences:
    """The differences of the scores of a class, or of their means over classes."""

    dice: Difference
    iou: Difference
    undefined: int
    """Resamples without a difference, which the intervals leave out: the class occurs nowhere."""


@dataclass(frozen=True, slots=True)
class ImageChange:
    """The Dice of an image, averaged over the counted classes, in both scorings."""

    key: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first

    def to_plain(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {**asdict(self), "difference": self.difference}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two scorings of the same images, compared."""

    first: str
    second: str
    split: str
    num_images: int
    unit: Unit
    """What is resampled and swapped."""
    num_units: int
    """Images or groups with a pixel that is not 255."""
    num_permutations: int
    exact: bool
    """Whether all ways to swap were enumerated."""
    macro: ScoreDifferences
    classes: dict[str, ScoreDifferences]
    images: tuple[ImageChange, ...]
    """In the order of the split, without those whose Dice is undefined in either."""
    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = SEED

    def most_changed(self) -> tuple[ImageChange, ...]:
        """Return the 20 images whose Dice changed most, in either direction."""
        ranked = sorted(self.images, key=lambda image: (-abs(image.difference), image.key))
        return tuple(image for image in ranked[:MAX_CHANGED] if image.difference)

    def to_plain(self) -> dict[str, Any]:
        """Convert to the content of `comparison.json`: counts of images instead of all of them."""
        plain = asdict(self)
        del plain["images"]
        changes = np.sign([image.difference for image in self.images])
        plain["images"] = {
            "better": int((changes > 0).sum()),
            "worse": int((changes < 0).sum()),
            "equal": int((changes == 0).sum()),
            "undefined": self.num_images - len(self.images),
            "most_changed": [image.to_plain() for image in self.most_changed()],
        }
        return plain


def compare(first: StoredScores, second: StoredScores) -> Comparison:
    """Compare two scorings. Raises DataError, naming what differs, if they are not comparable."""
    refuse_unequal(first, second)
    order = {key: position for position, key in enumerate(second.keys)}
    rows = (first.rows, second.rows[[order[key] for key in first.keys]])
    units = number_groups(first.groups)
    counted, empty = first.counted, first.header.empty_policy
    counts = pair_units(rows, units)
    own = [divide_sums(part.sum(axis=0, keepdims=True).astype(float), counted, empty)
           for part in np.split(counts, 2, axis=1)]  # fmt: skip
    resampled = swapped = None
    exact = 2 ** len(counts) <= RESAMPLES
    if len(counts) > 1:
        resampled = subtract(resample_sums(counts), counted, empty)
        swapped = subtract_swapped(counts, counted, empty)
    macro = measure(own, resampled, swapped, None)
    classes = {name: measure(own, resampled, swapped, c) for c, name in enumerate(first.classes)}
    return Comparison(
        first=str(first.place),
        second=str(second.place),
        split=first.header.split,
        num_images=len(first.keys),
        unit="image" if units is None else "group",
        num_units=len(counts),
        num_permutations=0 if swapped is None else len(swapped.macro),
        exact=exact,
        macro=macro,
        classes=classes,
        images=tuple(list_changes(first.keys, rows, counted, empty)),
    )


def refuse_unequal(first: StoredScores, second: StoredScores) -> None:
    """Raise DataError if two scorings differ in split, data, classes, policy, images or masks."""
    a, b = first.header, second.header
    for what, one, other in (
        ("split", a.split, b.split),
        ("classes", ", ".join(a.classes), ", ".join(b.classes)),
        ("counted classes", ", ".join(a.counted), ", ".join(b.counted)),
        ("--empty", a.empty_policy, b.empty_policy),
    ):
        if one != other:
            raise DataError(
                f"{first.place} and {second.place} differ in {what}: {one}, and {other}; evaluate "
                "both on the same data with the same flags"
            )
    for one, other in ((first, second), (second, first)):
        known = {*other.keys}
        if lacking := [key for key in one.keys if key not in known]:
            raise DataError(
                f"{other.place} does not have {count_named(lacking)} of {one.place}; evaluate both "
                "on the same images"
            )
    order = {key: position for position, key in enumerate(second.keys)}
    masks = [mask_pixels(scores.rows) for scores in (first, second)]
    changed = [
        key
        for position, key in enumerate(first.keys)
        if (masks[0][position] != masks[1][order[key]]).any()
    ]
    if changed:
        raise DataError(
            f"{first.place} and {second.place} have other masks of {count_named(changed)}; "
            "evaluate both on the same data"
        )


def count_named(keys: list[str]) -> str:
    """Return the number of images and the first three keys."""
    more = ", ..." if len(keys) > MAX_NAMED else ""
    plural = "s" * (len(keys) != 1)
    return f"{len(keys)} image{plural} ({', '.join(keys[:MAX_NAMED])}{more})"


def mask_pixels(rows: NDArray[np.uint32]) -> Integers:
    """Return width, height and the mask's pixels of each class, int64 [N, 2 + K]."""
    tp, _, fn = np.split(rows[:, 2:].astype(np.int64), 3, axis=1)
    return np.concatenate([rows[:, :2].astype(np.int64), tp + fn], axis=1)


def pair_units(rows: tuple[NDArray[np.uint32], NDArray[np.uint32]], units: Integers | None
               ) -> Integers:  # fmt: skip
    """Sum the counts of both scorings over each unit: int64 [U, 4 K], first, then second."""
    # Both have the same masks, and so the same units without a valid pixel.
    return np.concatenate([count_units(part, units) for part in rows], axis=1)


def subtract(sums: Floats, counted: tuple[int, ...], empty: Empty) -> ImageScores:
    """Return the scores of the second less those of the first, of sums float64 [R, 4 K]."""
    first, second = (divide_sums(part, counted, empty) for part in np.split(sums, 2, axis=1))
    return ImageScores(second.macro - first.macro, second.classes - first.classes)


def subtract_swapped(counts: Integers, counted: tuple[int, ...], empty: Empty) -> ImageScores:
    """Return the differences after swapping the two scorings of units, int64 [U, 4 K].

    All ways are enumerated if there are at most 10,000, else 10,000 are drawn.
    """
    rng = np.random.default_rng(SEED)
    counts = pool_units(counts, rng)
    first, second = np.split(counts, 2, axis=1)
    change = (second - first).astype(np.float64)
    base, total = first.sum(axis=0), counts.sum(axis=0)
    whole = total[: len(base)] + total[len(base) :]
    differences = []
    for flips in iter_flips(len(counts), rng):
        own = base + flips.astype(np.float64) @ change
        differences.append(subtract(np.concatenate([own, whole - own], axis=1), counted, empty))
    return ImageScores(
        np.concatenate([d.macro for d in differences]),
        np.concatenate([d.classes for d in differences]),
    )


def iter_flips(num_units: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Yield which units are swapped, 0 or 1, in parts uint8 [R, U]."""
    if 2**num_units <= RESAMPLES:
        ways = np.arange(2**num_units)[:, None] >> np.arange(num_units)
        yield (ways & 1).astype(np.uint8)
        return
    size = max(1, MAX_DRAWN // num_units)
    for start in range(0, RESAMPLES, size):
        some = min(size, RESAMPLES - start)
        yield rng.integers(0, 2, (some, num_units), dtype=np.uint8)


def measure(
    own: list[ImageScores],
    resampled: ImageScores | None,
    swapped: ImageScores | None,
    index: int | None,
) -> ScoreDifferences:
    """Measure the differences of a class; None: of the macro means."""

    def pick(scores: ImageScores) -> Floats:
        return scores.macro if index is None else scores.classes[:, :, index]

    first, second = (pick(scores)[0] for scores in own)
    bounds = None if resampled is None else bound_scores(pick(resampled))
    found = []
    for column, interval in enumerate((bounds and bounds.dice, bounds and bounds.iou)):
        one, other = (None if value != value else value
                      for value in (float(first[column]), float(second[column])))  # fmt: skip
        difference = None if one is None or other is None else other - one
        p_value = None
        if difference is not None and swapped is not None:
            p_value = count_extreme(pick(swapped)[:, column], difference)
        found.append(
            Difference(one, other, difference, None if difference is None else interval, p_value)
        )
    return ScoreDifferences(*found, undefined=0 if bounds is None else bounds.undefined)


def count_extreme(swapped: Floats, difference: float) -> float:
    """Return the two-sided p-value of a difference among those after swapping, float64 [R].

    All 2^n ways include the observed one; it is added to 10,000 random ones. A difference that is
    undefined counts as extreme.
    """
    extreme = int((~(np.abs(swapped) < abs(difference) - TOLERANCE)).sum())
    added = 1 if len(swapped) == RESAMPLES else 0
    return (extreme + added) / (len(swapped) + added)


def list_changes(
    keys: tuple[str, ...],
    rows: tuple[NDArray[np.uint32], NDArray[np.uint32]],
    counted: tuple[int, ...],
    empty: Empty,
) -> Iterator[ImageChange]:
    """Yield the Dice of each image in both scorings, where both are defined."""
    both = [image_scores(part, counted, empty).macro[:, 0].tolist() for part in rows]
    for key, first, second in zip(keys, *both, strict=True):
        if first == first and second == second:
            yield ImageChange(key, first, second)


def format_comparison(comparison: Comparison) -> str:
    """Format the differences as a table: two lines per class, for Dice and IoU, then the means."""
    names = [*comparison.classes, "macro"]
    width = max(12, *(len(name) for name in names)) + 2
    level = f"{comparison.level:.0%} interval"
    lines = [
        f"{comparison.first} -> {comparison.second} ({comparison.num_images} images of "
        f"{comparison.split})",
        f"{'class':<{width}}           first  second  change{level:>20}       p",
    ]
    for name in names:
        own = comparison.macro if name == "macro" else comparison.classes[name]
        for score, found in (("Dice", own.dice), ("IoU", own.iou)):
            values = "".join(show(value) for value in (found.first, found.second))
            low, high = found.interval or (None, None)
            bounds = "" if low is None else f"{low:+.4f} to {high:+.4f}"
            p_value = "" if found.p_value is None else f"{found.p_value:.4f}"
            change = "n/a" if found.difference is None else f"{found.difference:+.4f}"
            lines.append(
                f"{name:<{width}}{score:<8}{values}{change:>8}{bounds:>20}{p_value:>8}".rstrip()
            )
    return "\n".join([*lines, describe_method(comparison)])


def describe_method(comparison: Comparison) -> str:
    """Describe in a line how intervals and p-values were made, or why there are none."""
    units = f"{comparison.num_units:,} {comparison.unit}s"
    if comparison.num_units < 2:
        return f"no intervals and p-values: they require 2 {comparison.unit}s with counted pixels"
    ways = f"{comparison.num_permutations:,}"
    ways = f"all {ways} sign flips" if comparison.exact else f"{ways} random sign flips"
    return f"{comparison.resamples:,} paired bootstrap resamples and {ways} of {units}"
