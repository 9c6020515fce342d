"""Bootstrap intervals of scores over a split: images, or groups such as patients, are resampled.

A resample draws as many units as there are, with replacement; their integer counts are summed and
divided once, as those of the split are (`unet.metrics`). The interval holds the central 95 % of the
scores of 10,000 resamples (percentile method; Efron and Tibshirani, 1993, chapter 13). Units are
sorted by their counts first, so that the order of images has no influence, and sums are exact:
integers below 2^53 in float64.

More than 20,000 units are first pooled at random into 20,000 blocks of nearly equal size. The
variance of a sum over units is that of a sum over blocks, and the time stays at seconds.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.per_image import Floats, ImageScores, divide_counts
from shards.documents import Count, convert
from unet.metrics import Empty

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0
MAX_UNITS = 20_000
"""Units that are resampled one by one."""
MAX_DRAWN = 2**22
"""Units drawn at a time, so that memory does not grow with their number."""
Integers = NDArray[np.int64]
Unit = Literal["image", "group"]
Bounds = tuple[float, float] | None
"""Lower and upper bound; None without an interval."""


@dataclass(frozen=True, slots=True)
class ClassIntervals:
    """Intervals of the scores of a class, or of their means over classes."""

    dice: Bounds
    iou: Bounds
    undefined: Count
    """Resamples in which the class occurs nowhere and has no score; they are left out."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Bootstrap intervals of the scores of a split: the entry `intervals` of scores.json."""

    unit: Unit
    """What is resampled."""
    num_units: Count
    """Images or groups with a pixel that is not 255. There is no interval for fewer than two."""
    macro: ClassIntervals
    classes: dict[str, ClassIntervals]
    level: float = LEVEL
    resamples: Count = RESAMPLES
    seed: Count = SEED


def estimate_intervals(
    rows: NDArray[np.uint32],
    names: tuple[str, ...],
    counted: tuple[int, ...],
    empty: Empty = "skip",
    units: Integers | None = None,
) -> Intervals:
    """Estimate the intervals of the scores of a split.

    Args:
        rows: counts per image, uint32 [N, 2 + 3 K], as `ImageCounts.gather` returns them.
        names: of the K classes.
        counted: indices of the classes that enter the macro mean.
        empty: score of a class that is absent from mask and prediction.
        units: the group of each image, int64 [N], from 0; None: every image is a unit.
    """
    counts = count_units(rows, units)
    unit: Unit = "image" if units is None else "group"
    if len(counts) < 2:
        none = ClassIntervals(None, None, 0)
        return Intervals(unit, len(counts), none, dict.fromkeys(names, none))
    scores = divide_sums(resample_sums(counts), counted, empty)
    classes = {name: bound_scores(scores.classes[:, :, c]) for c, name in enumerate(names)}
    return Intervals(unit, len(counts), bound_scores(scores.macro), classes)


def describe_intervals(intervals: Intervals) -> str:
    """Describe in a line how the intervals were made, or why there are none."""
    units = f"{intervals.num_units:,} {intervals.unit}{'s' * (intervals.num_units != 1)}"
    if intervals.num_units < 2:
        return f"no intervals: they require 2 {intervals.unit}s with counted pixels, not {units}"
    return (
        f"{intervals.level:.0%} intervals: {intervals.resamples:,} bootstrap resamples of {units}"
    )


def read_intervals(scores: dict[str, Any]) -> Intervals | None:
    """Return the intervals in scores.json, if any. Raises ValueError if they are damaged."""
    plain = scores.get("intervals")
    intervals = None if plain is None else convert(plain, Intervals)
    if intervals is not None and [*intervals.classes] != [*scores["classes"]]:
        raise ValueError("intervals of other classes")
    return intervals


def count_units(rows: NDArray[np.uint32], units: Integers | None = None) -> Integers:
    """Sum counts over the images of each unit, without units that have no valid pixel.

    Returns int64 [U, 2 K]: true positives of K classes, then false positives + false negatives.
    """
    tp, fp, fn = np.split(rows[:, 2:].astype(np.int64), 3, axis=1)
    counts = np.concatenate([tp, fp + fn], axis=1)
    if units is not None:
        counts = sum_by(units, counts)
    return counts[counts.any(axis=1)]


def sum_by(units: Integers, counts: Integers) -> Integers:
    """Sum the rows of counts int64 [N, C] by unit, int64 [N] from 0, to int64 [U, C]."""
    order = np.argsort(units, kind="stable")
    starts = np.flatnonzero(np.diff(units[order], prepend=-1))
    return np.add.reduceat(counts[order], starts, axis=0)


def resample_sums(counts: Integers) -> Floats:
    """Sum counts int64 [U, C] over resamples of the units: float64 [10,000, C], exact integers."""
    rng = np.random.default_rng(SEED)
    values = pool_units(counts, rng).astype(np.float64)
    num_units = len(values)
    size = max(1, MAX_DRAWN // num_units)
    sums = np.empty((RESAMPLES, values.shape[1]))
    for start in range(0, RESAMPLES, size):
        some = min(size, RESAMPLES - start)
        drawn = rng.integers(0, num_units, (some, num_units))
        drawn += np.arange(some)[:, None] * num_units
        times = np.bincount(drawn.ravel(), minlength=some * num_units)
        sums[start : start + some] = times.reshape(some, num_units).astype(np.float64) @ values
    return sums


def pool_units(counts: Integers, rng: np.random.Generator) -> Integers:
    """Sort units by their counts int64 [U, C]; pool them into blocks if they are too many."""
    counts = counts[np.lexsort(counts.T)]
    if len(counts) <= MAX_UNITS:
        return counts
    block = np.arange(len(counts)) * MAX_UNITS // len(counts)
    return sum_by(block, counts[rng.permutation(len(counts))])


def divide_sums(sums: Floats, counted: tuple[int, ...], empty: Empty) -> ImageScores:
    """Divide sums of counts float64 [R, 2 K]; returns the scores of R resamples."""
    tp, wrong = np.split(sums, 2, axis=1)
    return divide_counts(tp, wrong, counted, empty)


def bound_scores(scores: Floats) -> ClassIntervals:
    """Return the intervals of Dice and IoU, float64 [R, 2]; NaN if undefined."""
    known = scores[~np.isnan(scores[:, 0])]
    undefined = len(scores) - len(known)
    if not len(known):
        return ClassIntervals(None, None, undefined)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(known, [tail, 1 - tail], axis=0).tolist()
    return ClassIntervals((low[0], high[0]), (low[1], high[1]), undefined)
