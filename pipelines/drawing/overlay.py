"""A mask drawn over its image."""

import numpy as np
from PIL import Image

from shards.sample import IGNORE, Palette, Uint8

TINT = 0.4
"""Opacity of the class colour inside a region; its outline is opaque."""


def draw_overlay(image: Uint8, mask: Uint8, palette: Palette) -> Image.Image:
    """Tint and outline each class in its colour.

    Args:
        image: uint8 [H, W, 1 or 3].
        mask: class indices uint8 [H, W]; ignored pixels are tinted grey.
        palette: RGB colour of each class; black classes (the background) are not drawn.

    Returns:
        An RGB image of size W x H.
    """
    base = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
    table = np.full((256, 3), 128, dtype=np.float32)
    table[: len(palette)] = palette
    opacity = np.zeros(256, dtype=np.float32)
    opacity[: len(palette)] = [TINT if any(colour) else 0 for colour in palette]
    opacity[IGNORE] = TINT
    alpha = opacity[mask][..., None]
    alpha[find_outline(mask) & (alpha[..., 0] > 0)] = 1
    return Image.fromarray((base * (1 - alpha) + table[mask] * alpha).round().astype(np.uint8))


def find_outline(mask: Uint8) -> np.ndarray:
    """Whether one of the four neighbours of a pixel has another class, bool [H, W]."""
    edge = np.zeros(mask.shape, dtype=bool)
    across, along = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    return edge
