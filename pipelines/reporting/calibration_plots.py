"""Reliability diagram, precision and recall, and thresholds on the page."""

from typing import Any

from pipelines.evaluation.calibration import Calibration, CurvePoint, Reliability, read_calibration
from pipelines.reporting.charts import Plot, Series

MAX_CURVES = 6
"""Curves in a plot: as many as have a style of their own."""


def make_plots(scores: dict[str, Any] | None) -> tuple[Plot, ...]:
    """Return the plots of the calibration in scores.json, none without it."""
    calibration = read_calibration(scores) if scores else None
    if calibration is None or scores is None:
        return ()
    names = [name for name in calibration.classes if name in scores["counted"]][:MAX_CURVES]
    plots = (
        plot_reliability(calibration, names[: MAX_CURVES - 1]),
        plot_precision(calibration, names),
        plot_thresholds(calibration),
    )
    return tuple(plot for plot in plots if plot is not None and plot.series)


def describe_plots(scores: dict[str, Any] | None) -> str:
    """Describe the calibration in scores.json in a sentence or two; empty without it."""
    calibration = read_calibration(scores) if scores else None
    if calibration is None:
        return ""
    parts = []
    if calibration.ece is not None:
        parts.append(f"The ECE of the confidence is {calibration.ece:.4f}.")
    if calibration.temperature != 1:
        parts.append(f"Probabilities are at the temperature {calibration.temperature:g}.")
    if (sweep := calibration.sweep) is not None and sweep.best.dice is not None:
        parts.append(
            f"The best threshold of {sweep.of} on this split is {sweep.best.threshold:g}: Dice "
            f"{sweep.best.dice:.4f}."
        )
    if len(calibration.classes) > MAX_CURVES:
        parts.append(f"At most {MAX_CURVES} curves are drawn; scores.json has all classes.")
    return " ".join(parts)


def plot_reliability(calibration: Calibration, names: list[str]) -> Plot:
    """Return the share of pixels of each class by their probability."""
    curves = [("confidence", calibration.confidence)]
    curves += [(name, calibration.classes[name].bins) for name in names]
    series = [trace_bins(name, bins) for name, bins in curves]
    return Plot(
        "Reliability",
        "probability",
        "share of pixels of the class",
        tuple(one for one in series if one.x),
        diagonal=True,
    )


def trace_bins(name: str, bins: tuple[Reliability, ...]) -> Series:
    """Return the bins with pixels as a curve."""
    known = [
        (one.probability, one.share)
        for one in bins
        if one.probability is not None and one.share is not None
    ]
    return Series(name, [x for x, _ in known], [y for _, y in known])


def plot_precision(calibration: Calibration, names: list[str]) -> Plot:
    """Return precision over recall of each class."""
    series = []
    for name in names:
        known = [
            (point.recall, point.precision)
            for point in calibration.classes[name].curve
            if point.recall is not None and point.precision is not None
        ]
        if known:
            average = calibration.classes[name].average_precision
            shown = name if average is None else f"{name} (average {average:.4f})"
            series.append(Series(shown, [x for x, _ in known], [y for _, y in known]))
    return Plot("Precision and recall", "recall", "precision", tuple(series))


def plot_thresholds(calibration: Calibration) -> Plot | None:
    """Return Dice, precision and recall of the second of two classes over the threshold."""
    if calibration.sweep is None:
        return None
    curve = calibration.classes[calibration.sweep.of].curve

    def trace(name: str, values: list[tuple[CurvePoint, float | None]]) -> Series:
        known = [(point.threshold, value) for point, value in values if value is not None]
        return Series(name, [x for x, _ in known], [y for _, y in known])

    series = (
        trace("Dice", [(point, point.dice) for point in curve]),
        trace("precision", [(point, point.precision) for point in curve]),
        trace("recall", [(point, point.recall) for point in curve]),
    )
    return Plot("Thresholds", "threshold", "score", tuple(one for one in series if one.x))
