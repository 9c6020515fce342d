"""Image, mask and prediction side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.sample import IGNORE, Colour, Palette, Uint8

WRONG: Colour = (255, 0, 110)
"""Colour of wrongly predicted pixels."""
IGNORED: Colour = (128, 128, 128)
"""Colour of ignored pixels."""
GAP = 8
"""Pixels between panels."""


@dataclass(frozen=True, slots=True)
class Example:
    """An image with its mask and its prediction."""

    key: str
    image: Uint8
    """uint8 [H, W, 1 or 3]."""
    mask: Uint8
    """Class indices uint8 [H, W], 255 = ignore."""
    prediction: Uint8
    """Class indices uint8 [H, W]."""


def draw_panels(example: Example, palette: Palette, max_side: int) -> list[Image.Image]:
    """Draw image, mask, prediction and difference in RGB, no side longer than `max_side` pixels.

    The difference is the dimmed image with wrong and ignored pixels painted over.
    """
    image, mask, prediction = example.image, example.mask, example.prediction
    height, width = mask.shape
    factor = min(1.0, max_side / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    colours = np.full((256, 3), IGNORED, dtype=np.uint8)
    colours[: len(palette)] = palette
    dimmed = (image.mean(axis=2, keepdims=True) * 0.6).astype(np.uint8)
    difference = np.repeat(dimmed, 3, axis=2)
    difference[mask == IGNORE] = IGNORED
    difference[(mask != prediction) & (mask != IGNORE)] = WRONG
    parts = (np.broadcast_to(image, (height, width, 3)), colours[mask], colours[prediction])
    return [
        Image.fromarray(np.ascontiguousarray(part)).resize(size, Image.Resampling.BOX)
        for part in (*parts, difference)
    ]


def side_by_side(parts: Sequence[Image.Image]) -> Image.Image:
    """Join panels of equal size into one row."""
    width, height = parts[0].size
    row = Image.new("RGB", (len(parts) * (width + GAP) - GAP, height), (255, 255, 255))
    for number, part in enumerate(parts):
        row.paste(part, (number * (width + GAP), 0))
    return row
