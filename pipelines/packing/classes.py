"""Checks of the complete data set: masks that disagree, absent classes."""

from collections.abc import Sequence

from shards.masks.formats import MaskFormat
from shards.masks.readings import compare_readings
from shards.sample import IGNORE
from shards.statistics import SampleStatistics

IGNORED_REMEDY = "drop --ignore-value, --unknown ignore or `ignore` in --colours"
"""How to read ignored pixels as a class, in `check` and `pack`."""


def find_class_problems(
    names: Sequence[str],
    mask_format: MaskFormat | None,
    total: SampleStatistics,
    *,
    allow_absent: bool,
    remedy: str,
) -> tuple[list[str], list[str]]:
    """Compare how masks were read, and find classes without a pixel.

    Args:
        names: class names by index.
        mask_format: the declared format; None without masks.
        total: statistics of all samples.
        allow_absent: accept classes without a pixel.
        remedy: how to read ignored pixels as a class.

    Returns:
        Problems, each with a remedy, and notes.
    """
    if mask_format is None or not total.mask_modes:
        return [], []
    problems, notes = compare_readings(total.readings, names, mask_format)
    if not allow_absent and total.pixels.any():
        problems += list_absent_classes(names, mask_format, total, remedy)
    notes += [f"draws nothing: {remark}" for remark in total.remarks]
    return problems, notes


def list_absent_classes(
    names: Sequence[str], mask_format: MaskFormat, total: SampleStatistics, remedy: str
) -> list[str]:
    """Describe the classes without a pixel, one line each."""
    pixels = total.class_pixels(len(names))
    ignored = pixels[-1]
    masks = total.mask_modes.total()
    cause = "correct the flags of the mask format"
    if ignored:
        value = IGNORE if mask_format.ignore_value is None else mask_format.ignore_value
        share = f"{100 * ignored / sum(pixels):.3g} %"
        cause = f"{share} of the pixels are ignored: if {value} is a class, {remedy}"
    return [
        f"class {name!r} has no pixel in {masks} masks; {cause}, or add --allow-absent-classes"
        for name, count in zip(names, pixels, strict=False)
        if not count
    ]
