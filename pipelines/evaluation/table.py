"""Scores as tables, JSON and metric names."""

from dataclasses import asdict
from typing import Any

from pipelines.evaluation.intervals import Bounds, Intervals, describe_intervals
from unet.metrics import Scores
from unet.surface import Surface


def show(value: float | None) -> str:
    """Format a score in eight characters."""
    return "     n/a" if value is None else f"{value:8.4f}"


def show_bounds(bounds: Bounds) -> str:
    """Format an interval in 18 characters; blank if there is none."""
    return " " * 18 if bounds is None else f"{f'{bounds[0]:.4f}-{bounds[1]:.4f}':>18}"


def headline(scores: Scores, split: str) -> str:
    """Format the mean scores in a line."""
    dice, iou = show(scores.macro.dice).strip(), show(scores.macro.iou).strip()
    return f"{split}/dice {dice}, {split}/iou {iou}"


def show_surface(hd95: float | None, surface_dice: float | None, failures: int) -> str:
    """Format the three boundary columns of the table."""
    distance = f"{'n/a':>9}" if hd95 is None else f"{hd95:9.2f}"
    return f"{distance}{show(surface_dice)}{failures:8d}"


def table(
    scores: Scores, surface: Surface | None = None, intervals: Intervals | None = None
) -> str:
    """Format the scores as a table: a line per class, then the means.

    HD95, in pixels, and surface Dice are means over images in every line.
    """
    width = max(12, *(len(c.name) for c in scores.classes)) + 2
    more = "" if surface is None else "     HD95   sDice  failed"
    bounds = "" if intervals is None else f"{f'{intervals.level:.0%} interval':>18}"
    lines = [f"{'class':<{width}}    Dice{bounds}     IoU{bounds}    prec.  recall{more}"]
    for i, c in enumerate(scores.classes):
        dice, iou = show_intervals(intervals, c.name)
        line = f"{c.name:<{width}}{show(c.dice)}{dice}{show(c.iou)}{iou}"
        line += f"{show(c.precision)}{show(c.recall)}"
        if surface is not None:
            s = surface.classes[i]
            line += show_surface(s.hd95, s.surface_dice, s.surface_failures)
        lines.append(line if i in scores.counted else f"{line}  (in no mean)")
    blank = " " * len(bounds)
    for name, mean, (dice, iou) in (
        ("macro", scores.macro, show_intervals(intervals)),
        ("micro", scores.micro, (blank, blank)),
        ("per image", scores.per_image, (blank, blank)),
    ):
        lines.append(f"{name:<{width}}{show(mean.dice)}{dice}{show(mean.iou)}{iou}".rstrip())
    if surface is not None:
        means = show_surface(surface.hd95, surface.surface_dice, surface.surface_failures)
        lines[-1] = lines[-1].ljust(len(lines[0]) - len(more)) + means
    return "\n".join(lines if intervals is None else [*lines, describe_intervals(intervals)])


def show_intervals(intervals: Intervals | None, name: str | None = None) -> tuple[str, str]:
    """Format the intervals of Dice and IoU of a class; None: of the macro means."""
    if intervals is None:
        return "", ""
    own = intervals.macro if name is None else intervals.classes[name]
    return show_bounds(own.dice), show_bounds(own.iou)


def to_plain(
    scores: Scores, surface: Surface | None = None, intervals: Intervals | None = None
) -> dict[str, Any]:
    """Return the content of `scores.json`."""
    plain = scores.to_plain()
    if intervals is not None:
        plain["intervals"] = asdict(intervals)
    if surface is not None:
        plain["surface_tolerance"] = surface.tolerance
        plain["per_image"] |= {"hd95": surface.hd95, "surface_dice": surface.surface_dice}
        plain["surface_failures"] = surface.surface_failures
        for c in surface.classes:
            plain["classes"][c.name] |= {
                "hd95": c.hd95,
                "surface_dice": c.surface_dice,
                "surface_failures": c.surface_failures,
            }
    return plain


def named(scores: Scores, split: str) -> dict[str, float | None]:
    """Return the scores by their names in metrics.jsonl and the tracker."""
    values = {f"{split}/dice": scores.macro.dice, f"{split}/iou": scores.macro.iou}
    for c in scores.classes:
        values[f"{split}/dice/{c.name}"] = c.dice
        values[f"{split}/iou/{c.name}"] = c.iou
    return values
