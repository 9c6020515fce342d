"""An image with the outlines of its mask and of a prediction."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipelines.drawing.overlay import choose_overlay_colours, find_outline
from pipelines.drawing.panels import Example
from shards.sample import IGNORE, Palette, Uint8

OUTLINES: Palette = ((0, 255, 255), (255, 0, 255), (0, 255, 0))
"""Colours of the outline of the mask, of the prediction, and of both."""
LEGEND = ("mask", "prediction", "both")


def draw_outlines(examples: Sequence[Example], max_side: int) -> tuple[list[Image.Image], Palette]:
    """Draw images in RGB with both outlines, no side longer than `max_side` pixels.

    Returns the images and the colours of `LEGEND`: others than `OUTLINES` where these do not stand
    out from the images.
    """
    scaled = [scale(example, max_side) for example in examples]
    palette = choose_overlay_colours([image for image, _, _ in scaled], OUTLINES)
    drawn = []
    for image, mask, prediction in scaled:
        own, other = find_outline(mask), find_outline(prediction)
        pixels = image.copy()
        for where, colour in zip((own & ~other, other & ~own, own & other), palette, strict=True):
            pixels[where] = colour
        drawn.append(Image.fromarray(pixels))
    return drawn, palette


def scale(example: Example, max_side: int) -> tuple[Uint8, Uint8, Uint8]:
    """Scale an example down; returns its image [H, W, 3], mask and prediction [H, W].

    Where the mask is ignored, so is the prediction.
    """
    height, width = example.mask.shape
    factor = min(1.0, max_side / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = np.ascontiguousarray(np.broadcast_to(example.image, (height, width, 3)))
    prediction = np.where(example.mask == IGNORE, np.uint8(IGNORE), example.prediction)
    small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    mask, other = (
        np.asarray(Image.fromarray(part).resize(size, Image.Resampling.NEAREST))
        for part in (example.mask, prediction)
    )
    return np.asarray(small), mask, other
