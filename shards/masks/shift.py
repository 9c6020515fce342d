"""The shift of masks against their images, by fractions of a pixel.

Annotation tools and conversion easily introduce an offset of half a pixel, which is invisible.
Flips and quarter turns in training average it out: the network predicts borders where images show
them, half a pixel beside those of the masks that it is scored by.

Measured by the correlation ratio: the share of the variance of the grey values that the classes
explain (Roche et al., "The correlation ratio as a new similarity measure for multimodal image
registration", MICCAI 1998). The mask is moved by whole pixels; the vertex of the paraboloid through
the best position and its neighbours is the shift. Shadows, and light that brightens one side of
objects, look like a shift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from shards.sample import IGNORE, Uint8

MAX_IMAGES = 64
"""Images of a data set that are compared, at most."""
MIN_IMAGES = 8
"""Images that must be comparable, at least."""
REACH = 3
"""Pixels by which masks are moved in each direction; a shift of up to 2.5 pixels is found."""
SPAN = 2 * REACH + 1
WINDOW = 17
"""Side in pixels of the window whose mean is subtracted, so that shading counts little."""
SIDE = 384
"""Only the middle of larger images is compared."""
MIN_PIXELS = 0.5
"""From here on, a mask moved by one pixel explains its image better."""
MIN_ERRORS = 5.0
"""Standard errors that a shift must exceed. Images of one stack or video are not independent, so
the true error is larger than the one that is estimated."""
SECOND_PEAK = 0.5
"""Height of a second peak, relative to the first, from which on the shift is unclear."""

Floats = NDArray[np.float64]
Ratios = NDArray[np.float64]
"""Correlation ratios of an image [SPAN, SPAN]. Entry [REACH + d, REACH + r] is that of a shift by
d pixels down and r to the right."""


@dataclass(frozen=True, slots=True)
class Shift:
    """The shift of the masks of a data set against the images; the mean over images."""

    down: float
    """Pixels; negative: up."""
    right: float
    """Pixels; negative: to the left."""
    error: float
    """Standard error of the larger of the two, in pixels."""
    images: int
    """Images that were compared."""

    @property
    def vertical(self) -> bool:
        """Whether the shift down or up is large enough to matter, and certain."""
        return self.is_large(self.down)

    @property
    def horizontal(self) -> bool:
        """Whether the shift to the left or right is large enough to matter, and certain."""
        return self.is_large(self.right)

    def is_large(self, pixels: float) -> bool:
        """Whether a shift of some pixels matters."""
        return abs(pixels) >= max(MIN_PIXELS, MIN_ERRORS * self.error)

    def __str__(self) -> str:
        """What matters of it, as in `down by 1.0 and to the left by 0.7 pixels`."""
        parts = []
        if self.vertical:
            parts.append(f"{'down' if self.down > 0 else 'up'} by {abs(self.down):.1f}")
        if self.horizontal:
            side = "right" if self.right > 0 else "left"
            parts.append(f"to the {side} by {abs(self.right):.1f}")
        return f"{' and '.join(parts)} pixels"


def choose_images(count: int) -> list[int]:
    """Choose the images of a data set that are compared, evenly spread: their positions."""
    return [i for i in sorted({k * count // MAX_IMAGES for k in range(MAX_IMAGES)}) if i < count]


def compare_positions(image: NDArray[Any], mask: Uint8) -> Ratios | None:
    """Compute the correlation ratios of an image [H, W] or [H, W, C] and its mask [H, W].

    All positions are compared by the same pixels. None if there are none, because the image is too
    small or the mask ignores too much, if they have no contrast, or all are of one class.
    """
    image, mask = crop_middle(image), crop_middle(mask)
    if min(mask.shape) <= WINDOW:
        return None
    valid = mask != IGNORE
    kept = sliding_window_view(valid, (SPAN, SPAN)).all(axis=(2, 3))
    grey = image.astype(np.float64) if image.ndim == 2 else image.mean(axis=2)
    share = average_windows(valid.astype(np.float64))
    inside = (slice(REACH, -REACH), slice(REACH, -REACH))
    local = (average_windows(grey * valid)[inside] / np.maximum(share[inside], 1e-9))[kept]
    values = grey[inside][kept] - local
    if values.size == 0:
        return None
    values -= values.mean()
    total = float(values @ values)
    if total <= 1e-6 * values.size or np.ptp(mask[valid]) == 0:
        return None
    rows, columns = (side - 2 * REACH for side in mask.shape)
    ratios = np.empty((SPAN, SPAN))
    for down, right in np.ndindex(ratios.shape):
        classes = mask[down : down + rows, right : right + columns][kept]
        counts, sums = np.bincount(classes, minlength=256), np.bincount(classes, values, 256)
        ratios[down, right] = (sums**2 / np.maximum(1, counts)).sum() / total
    return ratios


def crop_middle(array: NDArray[Any]) -> NDArray[Any]:
    """Crop [H, W, ...] to the part that is compared."""
    height, width = array.shape[:2]
    left, top, right, bottom = find_middle(width, height)
    return array[top:bottom, left:right]


def find_middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the middle of an image, at most SIDE x SIDE."""
    left, top = max(0, width - SIDE) // 2, max(0, height - SIDE) // 2
    return left, top, min(width, left + SIDE), min(height, top + SIDE)


def average_windows(values: Floats) -> Floats:
    """Average values [H, W] in the window around each, as far as it is in the image."""
    half = WINDOW // 2
    for axis in (0, 1):
        length = values.shape[axis]
        zero = np.zeros_like(values.take([0], axis))
        sums = np.concatenate([zero, values.cumsum(axis)], axis)
        end = np.minimum(np.arange(length) + half + 1, length)
        start = np.maximum(np.arange(length) - half, 0)
        count = (end - start).reshape((-1, 1) if axis == 0 else (1, -1))
        values = (sums.take(end, axis) - sums.take(start, axis)) / count
    return values


def find_shift(ratios: Sequence[Ratios]) -> Shift | None:
    """Find the shift of a data set from the ratios of its images.

    None if fewer than MIN_IMAGES could be compared, or if there is no single peak within reach.
    """
    if len(ratios) < MIN_IMAGES:
        return None
    surfaces = np.array(ratios)
    mean = surfaces.mean(axis=0)
    best = np.unravel_index(int(mean.argmax()), mean.shape)
    row, column = int(best[0]), int(best[1])
    if {row, column} & {0, SPAN - 1} or has_second_peak(mean):
        return None
    near = surfaces[:, row - 1 : row + 2, column - 1 : column + 2]
    # Jackknife: the means without one image each.
    vertices = find_vertex((near.sum(axis=0) - near) / (len(near) - 1))
    down, right = find_vertex(near.mean(axis=0))
    if not np.isfinite([down, right, *vertices.ravel()]).all():
        return None
    spread = vertices - vertices.mean(axis=1, keepdims=True)
    errors = np.sqrt((len(near) - 1) * (spread**2).mean(axis=1))
    return Shift(
        down=round(row - REACH + float(down), 2),
        right=round(column - REACH + float(right), 2),
        error=round(float(errors.max()), 3),
        images=len(near),
    )


def has_second_peak(surface: Floats) -> bool:
    """Whether a surface [SPAN, SPAN] has two peaks.

    It has under oblique light: borders are bright on one side of an object, dark on the other.
    """
    padded = np.pad(surface, 1, constant_values=-np.inf)
    peaks = surface[surface == sliding_window_view(padded, (3, 3)).max(axis=(2, 3))]
    heights = np.sort(peaks - surface.min())
    return len(heights) > 1 and heights[-2] > SECOND_PEAK * heights[-1]


def find_vertex(near: Floats) -> Floats:
    """Find the vertices [2, ...] of paraboloids through points [..., 3, 3] at -1, 0 and 1.

    NaN where the points have no maximum.
    """
    dy, dx = (near[..., 2, 1] - near[..., 0, 1]) / 2, (near[..., 1, 2] - near[..., 1, 0]) / 2
    dyy = near[..., 2, 1] - 2 * near[..., 1, 1] + near[..., 0, 1]
    dxx = near[..., 1, 2] - 2 * near[..., 1, 1] + near[..., 1, 0]
    dxy = (near[..., 2, 2] - near[..., 2, 0] - near[..., 0, 2] + near[..., 0, 0]) / 4
    det = dyy * dxx - dxy**2
    det = np.where((det > 0) & (dyy < 0), det, np.nan)
    return np.stack([dxy * dx - dxx * dy, dxy * dy - dyy * dx]) / det
