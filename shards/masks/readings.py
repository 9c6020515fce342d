"""How mask files relate their values to classes, compared across a data set.

A format is declared once, but each file brings its own palette, depth and foreground value: where
they differ, one value or colour may stand for two classes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeVar

import numpy as np

from shards.masks.formats import ClassMap, MaskFormat
from shards.masks.palettes import format_colour, read_palette
from shards.masks.stored import StoredMask
from shards.sample import IGNORE, Colour

Key = TypeVar("Key", bound=Hashable)

MAX_SHOWN = 5
"""Values or colours that a message lists."""


@dataclass(frozen=True, order=True, slots=True)
class Reading:
    """A value of a mask file and the class that it became."""

    index: int
    """Class index, 255 = ignored."""
    value: int
    bits: int
    """Bits per value that the file uses."""
    colour: Colour | None = None
    """Palette colour of the value."""

    @property
    def is_extreme(self) -> bool:
        """Whether the value is 1 or the largest of its depth, as foreground usually is."""
        return self.value in (1, 2**self.bits - 1)


@dataclass(frozen=True, slots=True)
class Occurrence:
    """Mask files with one reading."""

    masks: int
    first: str
    """The first of their names in alphabetical order."""

    def __add__(self, other: "Occurrence") -> "Occurrence":
        return Occurrence(self.masks + other.masks, min(self.first, other.first))

    def __str__(self) -> str:
        return f"{self.masks} masks (first: {self.first})"


Readings = Mapping[Reading, Occurrence]


def list_readings(
    mask_format: MaskFormat, mask: StoredMask, classes: ClassMap
) -> tuple[Reading, ...]:
    """List the readings of one mask that have to agree with those of others; () for `rgb`."""
    if mask.image.mode == "P" and mask_format.kind != "rgb":
        return list_palette_readings(mask, classes)
    if mask_format.kind != "binary":
        return ()
    if mask_format.threshold is not None:
        return (Reading(1, mask_format.threshold, find_threshold_bits(mask_format, classes)),)
    pairs = zip(classes.values, classes.indices, strict=True)
    return tuple(
        Reading(index, value, mask.bits) for value, index in pairs if value and index != IGNORE
    )


def list_palette_readings(mask: StoredMask, classes: ClassMap) -> tuple[Reading, ...]:
    """List the palette indices in use with their colours; those without a colour are omitted."""
    palette = read_palette(mask.image)
    return tuple(
        Reading(index, value, 8, palette[value])
        for value, index in zip(classes.values, classes.indices, strict=True)
        if value < len(palette)
    )


def find_threshold_bits(mask_format: MaskFormat, classes: ClassMap) -> int:
    """Return 16 if a threshold scaled to 16 bits would change the classes of a mask, else 8."""
    threshold = mask_format.threshold or 0
    values = np.array(classes.values)
    between = (values >= threshold) & (values < threshold * 257)
    return 16 if values.max(initial=0) > 255 and threshold < 256 and between.any() else 8


def compare_readings(
    readings: Readings, classes: Sequence[str], mask_format: MaskFormat
) -> tuple[list[str], list[str]]:
    """Compare the readings of all masks of a data set.

    Args:
        readings: how often each occurs.
        classes: class names by index.
        mask_format: the declared format.

    Returns:
        Disagreements by which a class would be wrong, each with a remedy; and differences that do
        not change a class, each with counts.
    """
    problems, notes = compare_palettes(readings, classes)
    if mask_format.kind == "binary" and mask_format.threshold is None:
        more = compare_foregrounds(readings)
        problems += more[0]
        notes += more[1]
    depths = sum_by(readings, lambda reading: reading.bits)
    if mask_format.threshold is not None and len(depths) > 1:
        problems.append(
            f"--mask-threshold {mask_format.threshold} would apply to {depths[8]} of 8 bits and "
            f"to {depths[16]} of 16 bits; save all masks with one depth"
        )
    return problems, notes


def compare_palettes(readings: Readings, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Compare palette colours: a colour of two classes is a problem if palettes differ."""
    coloured = {reading: n for reading, n in readings.items() if reading.colour is not None}
    uses = sum_by(coloured, lambda reading: (reading.index, reading.colour))
    num_colours = Counter(index for index, _ in uses)
    num_classes = Counter(colour for _, colour in uses)
    differing = [use for use in sorted(uses) if num_colours[use[0]] > 1]
    swapped = [use for use in differing if num_classes[use[1]] > 1]
    if swapped:
        colour = swapped[0][1]
        assert colour is not None
        where = " and ".join(
            f"{name_class(index, classes)} in {uses[index, colour]}"
            for index, other in sorted(uses)
            if other == colour
        )
        return [
            f"palettes differ: by its index, {format_colour(colour)} is {where}; read the colours "
            "instead: --mask-format rgb with --colours"
        ], []
    if not differing:
        return [], []
    listed = ", ".join(
        f"{name_class(index, classes)} is {format_colour(colour)} in {uses[index, colour]}"
        for index, colour in differing[:MAX_SHOWN]
        if colour is not None
    )
    more = f" and {len(differing) - MAX_SHOWN} more" * (len(differing) > MAX_SHOWN)
    return [], [f"palettes differ, and masks are read by index: {listed}{more}"]


def compare_foregrounds(readings: Readings) -> tuple[list[str], list[str]]:
    """Compare the foreground values of binary masks.

    They may differ where each is 1 or the largest value, or where all have the same colour.
    """
    foreground = {reading: n for reading, n in readings.items() if reading.value}
    values = sum_by(foreground, lambda reading: reading.value)
    if len(values) < 2:
        return [], []
    listed = " and ".join(f"{value} in {values[value]}" for value in sorted(values)[:MAX_SHOWN])
    more = f" and {len(values) - MAX_SHOWN} more values" * (len(values) > MAX_SHOWN)
    colours = {reading.colour for reading in foreground}
    same_colour = len(colours) == 1 and None not in colours
    if same_colour or all(reading.is_extreme for reading in foreground):
        return [], [f"the value of the foreground differs and is read as one class: {listed}{more}"]
    return [
        f"the value of the foreground differs: {listed}{more}; if they are one class, add "
        "--mask-threshold 1, else use --mask-format values"
    ], []


def sum_by(readings: Readings, key: Callable[[Reading], Key]) -> dict[Key, Occurrence]:
    """Sum the occurrences of readings with the same key."""
    groups: dict[Key, list[Occurrence]] = defaultdict(list)
    for reading, occurrence in readings.items():
        groups[key(reading)].append(occurrence)
    return {name: reduce(add, group) for name, group in groups.items()}


def name_class(index: int, classes: Sequence[str]) -> str:
    """Return the name of a class index."""
    return classes[index] if index < len(classes) else "ignored"
