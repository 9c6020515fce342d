"""Tables of scores on the page: per class, with intervals, and per group."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipelines.evaluation.breakdown import PARTS_CSV, read_breakdown
from pipelines.evaluation.intervals import (
    Bounds,
    ClassIntervals,
    describe_intervals,
    read_intervals,
)
from pipelines.evaluation.objects import read_objects
from pipelines.reporting.charts import Series
from pipelines.reporting.checkpoint_results import CheckpointResults
from pipelines.reporting.page import Row, Table
from pipelines.reporting.run_record import RunRecord, number
from shards.sample import Palette

INTERVAL = "95 % interval"
MAX_PARTS = 100
"""Groups in the table of groups."""


def make_table(record: RunRecord, results: CheckpointResults) -> Table | None:
    """Return the scores of each class, of the best checkpoint or its validation, if any."""
    best = record.metrics.best
    if results.scores is not None and results.loaded is not None:
        return make_scored_table(record, results.of, results.scores, results.loaded.spec.palette)
    names = [name.removeprefix("val/dice/") for name in best if name.startswith("val/dice/")]
    if not names:
        return None
    rows = [Row(n, cells(best, f"val/dice/{n}", f"val/iou/{n}"), history(record, n)) for n in names]
    rows.append(Row("macro", cells(best, "val/dice", "val/iou"), is_mean=True))
    caption = f"Validation at step {best['step']:,.0f}."
    return Table(caption, ("Dice", "IoU"), tuple(rows))


def make_scored_table(
    record: RunRecord, of: str, scores: dict[str, Any], palette: Palette
) -> Table:
    """Return Dice, IoU, their intervals, precision, recall and share of pixels, by class."""
    pixels = [sum(line) for line in scores["confusion"]]
    intervals = read_intervals(scores)
    rows = []
    for place, (name, values) in enumerate(scores["classes"].items()):
        share = f"{pixels[place] / max(1, sum(pixels)):.1%}"
        own = intervals.classes[name] if intervals else None
        shown = (*score_cells(values, own), *cells(values, "precision", "recall"), share)
        note = "" if name in scores["counted"] else "not in the means"
        rows.append(Row(name, shown, history(record, name), palette[place], note))
    for name in ("macro", "micro", "per_image"):
        own = intervals.macro if intervals and name == "macro" else None
        rows.append(Row(name.replace("_", " "), score_cells(scores[name], own), is_mean=True))
    columns = ("Dice", INTERVAL, "IoU", INTERVAL, "Precision", "Recall", "Pixels")
    how = f" {describe_intervals(intervals).capitalize()}." if intervals else ""
    return Table(f"The best checkpoint on {of}.{how}", columns, tuple(rows))


def make_parts_table(scores: dict[str, Any] | None) -> Table | None:
    """Return the macro scores of each group or value of a column, if they were scored."""
    breakdown = read_breakdown(scores) if scores else None
    if breakdown is None:
        return None
    rows = [
        Row(
            part.value,
            (f"{part.num_images:,}", *score_cells(asdict(part.macro), part.intervals.macro)),
        )
        for part in breakdown.parts[:MAX_PARTS]
    ]
    more = len(breakdown.parts) - len(rows)
    caption = "Macro scores." + (f" {more:,} more are in {PARTS_CSV}." if more else "")
    columns = ("Images", "Dice", INTERVAL, "IoU", INTERVAL)
    return Table(caption, columns, tuple(rows), breakdown.per)


def describe_objects(scores: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the scores of connected components, if they were measured."""
    objects = read_objects(scores) if scores else None
    if objects is None:
        return
    yield "Class", objects.of
    counts = f"{objects.true:,} true, {objects.predicted:,} predicted"
    yield "Matched", f"{objects.matched:,} of {counts}, at IoU > {objects.iou:g}"
    names = ("precision", "recall", "f1")
    for name, shown in zip(names, cells(asdict(objects), *names), strict=True):
        yield name.capitalize(), shown
    if objects.count_error is not None and objects.count_bias is not None:
        error, bias = objects.count_error, objects.count_bias
        yield "Count error", f"{error:.2f} per image, bias {bias:+.2f}"
    areas = (("true", objects.true_area), ("predicted", objects.predicted_area))
    pixels = [f"{area:,.1f} pixels {of}" for of, area in areas if area is not None]
    if pixels:
        yield "Mean area", ", ".join(pixels)


def score_cells(scores: dict[str, Any], intervals: ClassIntervals | None) -> tuple[str, ...]:
    """Format Dice and IoU, each followed by its interval, if it has one."""
    dice, iou = (intervals.dice, intervals.iou) if intervals else (None, None)
    first, second = cells(scores, "dice", "iou")
    return first, bounds_cell(dice), second, bounds_cell(iou)


def bounds_cell(bounds: Bounds) -> str:
    """Format an interval; empty if there is none."""
    return "" if bounds is None else f"{bounds[0]:.4f}\u2013{bounds[1]:.4f}"


def history(record: RunRecord, name: str) -> Series | None:
    """Return the Dice of a class over the steps."""
    curve = record.metrics.curves.get(f"val/dice/{name}")
    return Series(f"Dice of {name}", curve.steps, curve.values) if curve else None


def cells(values: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Format scores; n/a if undefined."""
    scores = (number(values.get(name)) for name in names)
    return tuple("n/a" if score is None else f"{score:.4f}" for score in scores)
