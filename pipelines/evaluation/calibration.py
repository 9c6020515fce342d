"""Calibration of a split: reliability, thresholds and precision-recall from integer histograms.

For each class, a pixel is taken as one of the class or not, with the probability of the class. 20
bins of equal width divide the probabilities, as in MONAI. The expected calibration error (ECE) is
    sum over bins of  pixels / all pixels * |mean probability - share of pixels of the class|
over all pixels of the split that are not 255 (not averaged over images, as MONAI does). That of the
confidence takes the probability of the predicted class, and the share of right predictions (Guo et
al., 2017).

Precision and recall at a threshold k / 1000 are those of the pixels with at least that probability.
The average precision is the sum over thresholds of precision times gain in recall, as in
scikit-learn, whose thresholds are all probabilities that occur.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.findings import Finding, format_csv
from pipelines.evaluation.intervals import Integers
from pipelines.evaluation.per_image import Floats
from pipelines.evaluation.table import show
from shards.documents import Count, Positive, convert
from unet.calibration import LEVELS, UNIT, CalibrationCounts, Histograms
from unet.metrics import sum_over_ranks

CALIBRATION_CSV = "calibration.csv"
BINS = 20
"""Bins of the reliability diagram."""
CURVE = tuple(sorted({1, LEVELS - 1, *range(20, LEVELS, 20)}))
"""Levels of the thresholds in scores.json."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """The pixels of a bin."""

    pixels: Count
    probability: float | None
    """Mean probability; None without pixels."""
    share: float | None
    """Share of the pixels that are of the class, or predicted right."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The pixels with at least a probability, predicted as the class."""

    threshold: float
    precision: float | None
    recall: float | None
    dice: float | None


@dataclass(frozen=True, slots=True)
class ClassCalibration:
    """Calibration of the probability of a class."""

    ece: float | None
    average_precision: float | None
    bins: tuple[Reliability, ...]
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class ThresholdSweep:
    """The threshold of the second class with the highest Dice, of 0.001 ... 0.999."""

    of: str
    """Name of the second class."""
    best: CurvePoint
    half: CurvePoint
    """At the threshold 0.5."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of a split: the entry `calibration` of scores.json."""

    temperature: float
    """At which the probabilities were taken; 1 unless --calibrated."""
    num_pixels: Count
    ece: float | None
    """Of the confidence."""
    confidence: tuple[Reliability, ...]
    classes: dict[str, ClassCalibration]
    sweep: ThresholdSweep | None
    """With two classes."""
    levels: Positive = LEVELS


def describe_histograms(
    histograms: Histograms, names: tuple[str, ...], temperature: float
) -> Calibration:
    """Compute the calibration of a split from its histograms of the classes `names`."""
    pixels, sums = histograms.pixels.numpy(), histograms.sums.numpy()
    bins = [make_bins(*row) for row in zip(pixels, sums, strict=True)]
    curves = [trace_curve(row) for row in pixels[:-1]]
    classes = {
        name: ClassCalibration(
            compute_ece(own), average_precision(row), own, tuple(curve[k - 1] for k in CURVE)
        )
        for name, own, row, curve in zip(names, bins, pixels, curves, strict=False)
    }
    sweep = None
    if len(names) == 2 and (best := find_best(curves[1])) is not None:
        sweep = ThresholdSweep(names[1], best, curves[1][LEVELS // 2 - 1])
    num_pixels = int(pixels[-1].sum())
    return Calibration(temperature, num_pixels, compute_ece(bins[-1]), bins[-1], classes, sweep)


def make_bins(pixels: Integers, sums: Integers) -> tuple[Reliability, ...]:
    """Join levels into bins.

    Args:
        pixels: int64 [1000, 2], without and with the class.
        sums: sums of probabilities int64 [1000], in 2^-24.
    """
    grouped = pixels.reshape(BINS, -1, 2).sum(axis=1).tolist()
    totals = sums.reshape(BINS, -1).sum(axis=1).tolist()
    bins = []
    for (without, with_class), total in zip(grouped, totals, strict=True):
        number = without + with_class
        means = (total / UNIT / number, with_class / number) if number else (None, None)
        bins.append(Reliability(number, *means))
    return tuple(bins)


def compute_ece(bins: tuple[Reliability, ...]) -> float | None:
    """Compute the expected calibration error; None without pixels."""
    number = sum(one.pixels for one in bins)
    gaps = (
        one.pixels * abs(one.probability - one.share)
        for one in bins
        if one.probability is not None and one.share is not None
    )
    return sum(gaps) / number if number else None


def count_above(pixels: Integers) -> tuple[Integers, Integers]:
    """Count the pixels at and above each level: without and with the class, int64 [1000] each."""
    above = pixels[::-1].cumsum(axis=0)[::-1]
    return above[:, 0], above[:, 1]


def trace_curve(pixels: Integers) -> list[CurvePoint]:
    """Return precision, recall and Dice at the thresholds 0.001 ... 0.999 from pixels [1000, 2]."""
    fp, tp = count_above(pixels)
    of_class = tp[0]
    columns = (
        divide(tp, tp + fp),
        divide(tp, np.full_like(tp, of_class)),
        divide(2 * tp, tp + fp + of_class),
    )
    rows = zip(*(column[1:] for column in columns), strict=True)
    return [CurvePoint(k / LEVELS, *row) for k, row in enumerate(rows, start=1)]


def divide(numerator: Integers, denominator: Integers) -> list[float | None]:
    """Divide integers [N]; None where the denominator is 0."""
    pairs = zip(numerator.tolist(), denominator.tolist(), strict=True)
    return [one / other if other else None for one, other in pairs]


def average_precision(pixels: Integers) -> float | None:
    """Compute the average precision from pixels int64 [1000, 2]; None if the class is absent."""
    fp, tp = count_above(pixels)
    if not tp[0]:
        return None
    gained: NDArray[np.int64] = -np.diff(tp, append=0)
    precision: Floats = tp / np.maximum(tp + fp, 1)
    return float((gained * precision).sum() / tp[0])


def find_best(curve: list[CurvePoint]) -> CurvePoint | None:
    """Return the point with the highest Dice, of equal ones the nearest to 0.5.

    Returns None if Dice is 0 or undefined at all thresholds.
    """
    known = [(point.dice, -abs(point.threshold - 0.5), point) for point in curve if point.dice]
    return max(known, key=lambda one: one[:2])[2] if known else None


def format_calibration(calibration: Calibration) -> str:
    """Format the table: ECE and average precision of each class, and the best threshold."""
    width = max(12, *map(len, calibration.classes)) + 2
    lines = [f"{'calibration':<{width}}     ECE  av. prec."]
    for name, own in calibration.classes.items():
        lines.append(f"{name:<{width}}{show(own.ece)}{show(own.average_precision):>11}")
    lines.append(f"{'confidence':<{width}}{show(calibration.ece)}")
    if calibration.temperature != 1:
        lines.append(f"at the temperature {calibration.temperature:g} of the checkpoint")
    if (sweep := calibration.sweep) is not None:
        lines.append(
            f"best threshold of {sweep.of} on this split: {sweep.best.threshold:g}, Dice "
            f"{show(sweep.best.dice).strip()}; at 0.5: {show(sweep.half.dice).strip()}"
        )
    return "\n".join(lines)


def list_levels(histograms: Histograms) -> Iterator[list[int | float]]:
    """Yield a row per level: its lower bound, then three numbers per class and of the confidence.

    The pixels, those of them that are of the class (predicted right), and the sum of their
    probabilities.
    """
    for level in range(LEVELS):
        cells: list[int | float] = [level / LEVELS]
        pairs = histograms.pixels[:, level].tolist()
        for (without, with_class), total in zip(
            pairs, histograms.sums[:, level].tolist(), strict=True
        ):
            cells += [without + with_class, with_class, total / UNIT]
        yield cells


def find_calibration(
    counts: CalibrationCounts, names: tuple[str, ...], temperature: float
) -> Finding:
    """Reduce the histograms of the classes `names` over all ranks and describe them.

    Every rank must call this.
    """
    histograms = Histograms(*sum_over_ranks(counts))
    calibration = describe_histograms(histograms, names, temperature)
    kinds = ("pixels", "true", "sum")
    columns = [*(f"{kind}/{name}" for name in names for kind in kinds), *kinds]
    return Finding(
        "calibration",
        asdict(calibration),
        format_calibration(calibration),
        CALIBRATION_CSV,
        format_csv(["probability", *columns], list_levels(histograms)),
    )


def read_calibration(scores: dict[str, Any]) -> Calibration | None:
    """Return the calibration in scores.json, if any. Raises ValueError if it is damaged."""
    plain = scores.get("calibration")
    calibration = None if plain is None else convert(plain, Calibration)
    if calibration is not None and [*calibration.classes] != [*scores["classes"]]:
        raise ValueError("calibration of other classes")
    return calibration
