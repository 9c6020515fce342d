"""A mask drawn over its image."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from shards.sample import IGNORE, Colour, Palette, Uint8

CANDIDATES: Palette = (
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)),
    *((255, 128, 0), (128, 255, 0), (0, 255, 128), (0, 128, 255), (128, 0, 255), (255, 0, 128)),
)
"""Colours of classes whose own colour does not stand out."""
MIN_CONTRAST = 100
"""Distance in RGB from which a colour stands out."""
NUM_SAMPLED = 20_000
"""Pixels that are compared with a colour."""
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


def choose_overlay_colours(images: Sequence[Uint8], palette: Palette) -> Palette:
    """Replace class colours that do not stand out from the images.

    A colour stands out if at most 5 % of the pixels are near it. Its replacement is the candidate
    that is farthest from these pixels and from the colours of other classes. Black classes (the
    background) are not drawn and stay black; with more than 12 classes, no colour is replaced.

    Args:
        images: uint8 [H, W, 3], at least one.
        palette: RGB colour of each class.
    """
    drawn = [index for index, colour in enumerate(palette) if any(colour)]
    if len(drawn) > len(CANDIDATES):
        return palette
    step = max(1, sum(image[..., 0].size for image in images) // NUM_SAMPLED)
    pixels = np.concatenate([image.reshape(-1, 3)[::step] for image in images]).astype(np.float32)

    def measure_contrast(colour: Colour) -> float:
        return float(np.quantile(np.linalg.norm(pixels - colour, axis=1), 0.05))

    def measure_distance(colour: Colour, others: Sequence[Colour]) -> float:
        return min((math.dist(colour, other) for other in others), default=math.inf)

    colours = list(palette)
    dull = [index for index in drawn if measure_contrast(palette[index]) < MIN_CONTRAST]
    for index in dull:
        others = [colours[other] for other in drawn if other not in dull or other < index]
        colours[index] = max(
            CANDIDATES,
            key=lambda colour: min(measure_contrast(colour), measure_distance(colour, others)),
        )
    return tuple(colours)


def find_outline(mask: Uint8) -> np.ndarray:
    """Whether one of the four neighbours of a pixel has another class, bool [H, W]."""
    edge = np.zeros(mask.shape, dtype=bool)
    across, along = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= along
    edge[:-1] |= along
    return edge
