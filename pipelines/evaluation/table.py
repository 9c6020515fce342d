"""Scores as tables, JSON and metric names."""

from typing import Any

from unet import Scores, Surface


def show(value: float | None) -> str:
    """Format a score in eight characters."""
    return "     n/a" if value is None else f"{value:8.4f}"


def headline(scores: Scores, split: str) -> str:
    """Format the mean scores in a line."""
    dice, iou = show(scores.macro.dice).strip(), show(scores.macro.iou).strip()
    return f"{split}/dice {dice}, {split}/iou {iou}"


def show_surface(hd95: float | None, surface_dice: float | None, failures: int) -> str:
    """Format the three boundary columns of the table."""
    distance = f"{'n/a':>9}" if hd95 is None else f"{hd95:9.2f}"
    return f"{distance}{show(surface_dice)}{failures:8d}"


def table(scores: Scores, surface: Surface | None = None) -> str:
    """Format the scores as a table: a line per class, then the means.

    HD95, in pixels, and surface Dice are means over images in every line.
    """
    width = max(12, *(len(c.name) for c in scores.classes)) + 2
    more = "" if surface is None else "     HD95   sDice  failed"
    lines = [f"{'class':<{width}}    Dice     IoU    prec.  recall{more}"]
    for i, c in enumerate(scores.classes):
        line = f"{c.name:<{width}}{show(c.dice)}{show(c.iou)}{show(c.precision)}{show(c.recall)}"
        if surface is not None:
            s = surface.classes[i]
            line += show_surface(s.hd95, s.surface_dice, s.surface_failures)
        lines.append(line if i in scores.counted else f"{line}  (in no mean)")
    for name, mean in (
        ("macro", scores.macro),
        ("micro", scores.micro),
        ("per image", scores.per_image),
    ):
        lines.append(f"{name:<{width}}{show(mean.dice)}{show(mean.iou)}")
    if surface is not None:
        means = show_surface(surface.hd95, surface.surface_dice, surface.surface_failures)
        lines[-1] += f"{'':16}{means}"
    return "\n".join(lines)


def to_plain(scores: Scores, surface: Surface | None = None) -> dict[str, Any]:
    """Return the content of `scores.json`."""
    plain = scores.to_plain()
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
