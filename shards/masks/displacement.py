"""Whether masks are displaced against their images, by less than a few pixels.

An offset of half a pixel, which annotation and conversion leave easily, is not seen by eye. With
flips and quarter turns, however, a network learns the mean of all directions, and every border that
it predicts is off by that half pixel; without those flips, it learns the offset.

Measured by the correlation ratio: the share of the variance of the grey values that the classes
explain (Roche et al., "The correlation ratio as a new similarity measure for multimodal image
registration", MICCAI 1998). The mask is moved by whole pixels; the vertex of the parabola through
the best position and its neighbours is the displacement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.sample import IGNORE, Uint8

REACH = 3
"""Pixels by which masks are moved, in each direction."""
WINDOW = 17
"""Side in pixels of the window whose mean is subtracted: shading explains nothing of a border."""
SIDE = 512
"""Only the middle of larger images is compared."""
MIN_IMAGES = 8
"""Number of images that must agree."""
MIN_PIXELS = 0.5
"""Displacement that matters. Borders in depth, such as those of street scenes, reach 0.3."""
MIN_ERRORS = 5.0
"""Minimum of the displacement, in standard errors over the images."""

Floats = NDArray[np.float64]
Ratios = NDArray[np.float64]
"""Correlation ratios [2, 2 * REACH + 1] of an image: the mask moved down, and moved right."""


@dataclass(frozen=True, slots=True)
class Displacement:
    """Where masks lie, relative to what the images show; 0 where that is not clear."""

    down: float
    """Pixels; negative: above."""
    right: float
    """Pixels; negative: to the left."""
    images: int
    """Images that were compared."""

    def __str__(self) -> str:
        """The place, as in `0.6 pixels above the borders in 24 images`."""
        parts = []
        if self.down:
            parts.append(f"{abs(self.down):.1f} pixels {'below' if self.down > 0 else 'above'}")
        if self.right:
            side = "right" if self.right > 0 else "left"
            parts.append(f"{abs(self.right):.1f} pixels to the {side} of")
        return f"{' and '.join(parts)} the borders in {self.images} images"

    @property
    def orientation(self) -> Literal["upright", "fixed"]:
        """Augmentation that keeps it: flips left to right, or none."""
        return "fixed" if self.right else "upright"


def compare_positions(image: Uint8, mask: Uint8) -> Ratios | None:
    """Compute the correlation ratios of an image [H, W, C] and its mask [H, W] at all positions.

    None if the image is too small, or has no contrast or fewer than two classes.
    """
    height, width = mask.shape
    top, left = max(0, height - SIDE) // 2, max(0, width - SIDE) // 2
    image, mask = (a[top : top + SIDE, left : left + SIDE] for a in (image, mask))
    height, width = mask.shape
    if min(height, width) <= WINDOW or len(np.unique(mask[mask != IGNORE])) < 2:
        return None
    grey = image.mean(axis=2)
    inside = (slice(REACH, -REACH), slice(REACH, -REACH))
    values = np.ascontiguousarray((grey - average_windows(grey))[inside])

    def ratio(down: int, right: int) -> float:
        rows = slice(REACH + down, height - REACH + down)
        columns = slice(REACH + right, width - REACH + right)
        return correlation_ratio(values, mask[rows, columns])

    steps = range(-REACH, REACH + 1)
    found = np.array([[ratio(step, 0) for step in steps], [ratio(0, step) for step in steps]])
    return found if np.isfinite(found).all() else None


def average_windows(grey: Floats) -> Floats:
    """Average the values [H, W] in a window around each, as far as it is in the image."""
    half = WINDOW // 2
    for axis in (0, 1):
        length = grey.shape[axis]
        first = np.zeros_like(grey.take([0], axis))
        sums = np.concatenate([first, grey.cumsum(axis)], axis)
        end = np.minimum(np.arange(length) + half + 1, length)
        start = np.maximum(np.arange(length) - half, 0)
        count = (end - start).reshape((-1, 1) if axis == 0 else (1, -1))
        grey = (sums.take(end, axis) - sums.take(start, axis)) / count
    return grey


def correlation_ratio(values: Floats, mask: Uint8) -> float:
    """Share of the variance of values [H, W] that the classes of a mask [H, W] explain; or NaN."""
    counts = np.bincount(mask.ravel(), minlength=256)
    sums = np.bincount(mask.ravel(), values.ravel(), 256)
    squares = float(np.vdot(values, values))
    if counts[IGNORE]:
        ignored = values[mask == IGNORE]
        squares -= float(np.vdot(ignored, ignored))
    counts, sums = counts[:IGNORE], sums[:IGNORE]
    total = int(counts.sum())
    between = float((sums**2 / np.maximum(1, counts)).sum())
    mean = float(sums.sum()) ** 2 / max(1, total)
    return (between - mean) / (squares - mean) if squares - mean > 1e-6 * total else float("nan")


def find_displacement(ratios: Sequence[Ratios]) -> Displacement | None:
    """Find a displacement that the images agree on; None if there is none that matters."""
    if len(ratios) < MIN_IMAGES:
        return None
    down, right = (find_peak(np.array([of_image[axis] for of_image in ratios])) for axis in (0, 1))
    return Displacement(down, right, len(ratios)) if down or right else None


def find_peak(curves: Floats) -> float:
    """Return the position of the peak of the mean of curves [images, positions]; 0 if unclear."""
    mean = curves.mean(axis=0)
    best = int(mean.argmax())
    # Relief, as of oblique light, explains most on both sides of a border: two peaks.
    one_peak = (np.diff(mean[: best + 1]) > 0).all() and (np.diff(mean[best:]) < 0).all()
    if best in (0, 2 * REACH) or not one_peak:
        return 0.0
    near = curves[:, best - 1 : best + 2]
    # Jackknife: the means without one image each.
    means = (near.sum(axis=0) - near) / (len(near) - 1)
    peak = float(vertex(near.mean(axis=0)))
    without = vertex(means)
    error = float(np.sqrt((len(near) - 1) * np.mean((without - without.mean()) ** 2)))
    pixels = best - REACH + peak
    clear = abs(pixels) >= max(MIN_PIXELS, MIN_ERRORS * error)
    return round(pixels, 2) if clear else 0.0


def vertex(points: Floats) -> Floats:
    """Return where parabolas through points [..., 3] at -1, 0 and 1 have their vertex."""
    before, middle, after = np.moveaxis(points, -1, 0)
    curvature = before - 2 * middle + after
    return np.divide(
        (before - after) / 2, curvature, out=np.zeros_like(middle), where=curvature != 0
    )
