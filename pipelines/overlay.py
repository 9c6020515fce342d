"""Masks drawn over pictures, for people to look at."""

import numpy as np
from PIL import Image

from shards.sample import IGNORE, Palette, Uint8

TINT = 0.4
"""Opacity of a class's colour inside its outline."""


def draw_overlay(image: Uint8, mask: Uint8, palette: Palette) -> Image.Image:
    """A picture [H, W, 1 or 3] with each class tinted and outlined in its colour.

    Classes whose colour is black (the background) stay as they are; ignored pixels turn grey.
    """
    base = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
    table = np.full((256, 3), 128, dtype=np.float32)
    table[: len(palette)] = palette
    opacity = np.zeros(256, dtype=np.float32)
    opacity[: len(palette)] = [TINT if any(colour) else 0 for colour in palette]
    opacity[IGNORE] = TINT
    alpha = opacity[mask][..., None]
    alpha[outline(mask) & (alpha[..., 0] > 0)] = 1
    return Image.fromarray((base * (1 - alpha) + table[mask] * alpha).round().astype(np.uint8))


def outline(mask: Uint8) -> np.ndarray:
    """Whether a pixel [H, W] differs from its right or lower neighbour's class, or they from it."""
    edge = np.zeros(mask.shape, dtype=bool)
    across, along = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    return edge
