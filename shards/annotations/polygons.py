"""Polygons as pixels, by COCO's rule."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shards.annotations.runs import Ints, Runs, Size
from shards.sample import DataError

Points = NDArray[np.float64]
"""Corners [N, 2], x and y in pixels, (0, 0) the corner of the image."""
MAX_POINTS = 1_000_000
"""Polygons with more corners are refused: real outlines have at most some thousand."""
MAX_COORDINATE = 1_000_000.0
"""Coordinates farther from the image are refused: drawing an outline takes time in its length."""
MAX_OUTLINE = 20_000_000.0
"""Maximum number of pixels of an outline."""
SCALE = 5
"""COCO draws outlines in five times the resolution."""


@dataclass(frozen=True, slots=True)
class OutlineFlaws:
    """Flaws of an outline, for the report."""

    clipped: bool = False
    """Whether it extends beyond the image."""
    degenerate: str = ""
    """Why it has no area; empty if it has one."""


def read_points(values: object) -> Points:
    """Convert `[x, y, x, y, ...]` or `[[x, y], ...]` to corners.

    Raises DataError for anything else, NaN and infinity, and too many or too distant corners.
    """
    if not isinstance(values, list | np.ndarray):
        raise DataError("its polygon is not a list of numbers")
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError("its polygon is not a list of numbers") from error
    if numbers.size > 2 * MAX_POINTS:
        raise DataError(
            f"its polygon has {numbers.size // 2:,} points; the limit is {MAX_POINTS:,}"
        )
    if numbers.ndim == 1:
        if len(numbers) % 2:
            raise DataError(f"its polygon has {len(numbers)} numbers, an odd count")
        numbers = numbers.reshape(-1, 2)
    if numbers.ndim != 2 or numbers.shape[1] != 2:
        raise DataError("its polygon is not a list of x and y")
    if not np.isfinite(numbers).all():
        raise DataError("its polygon has NaN or infinite coordinates")
    if len(numbers) and np.abs(numbers).max() > MAX_COORDINATE:
        worst = float(numbers.flat[np.abs(numbers).argmax()])
        raise DataError(f"its polygon has the coordinate {worst:g}, far outside of any image")
    return numbers


def find_flaws(points: Points, size: Size | None) -> OutlineFlaws:
    """Check whether a polygon extends beyond the image of (width, height), and has an area.

    `size` None: the size of the image is not known.
    """
    clipped = (
        size is not None
        and len(points) > 0
        and bool((points < 0).any() or (points > np.array(size)).any())
    )
    if len(points) < 3:
        return OutlineFlaws(clipped, f"{len(points)} points")
    x, y = (points - points[0]).T
    far = np.argmax(x * x + y * y)
    return OutlineFlaws(clipped, "" if (x * y[far] != y * x[far]).any() else "no area")


def draw_polygon(points: Points, size: Size) -> Runs:
    """Return the pixels of a polygon in an image of (width, height), those of pycocotools.

    The rule of `rleFrPoly` in cocoapi/common/maskApi.c: corners are rounded at five times the
    resolution, edges are drawn there, and each column is filled between its crossings. The extra is
    not needed: pycocotools allocates by the coordinates and crashes the process on distant ones.
    Here long outlines are refused, and edges are drawn in chunks; tests compare the pixels.

    Raises DataError for an outline too long to draw.
    """
    width, height = size
    corners = (SCALE * points + 0.5).astype(np.int64)
    if not len(corners):
        return Runs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    ends = np.roll(corners, -1, axis=0)
    lengths = np.abs(ends - corners).max(axis=1)
    if lengths.sum() > MAX_OUTLINE * SCALE:
        raise DataError(
            f"its polygon has an outline of {lengths.sum() // SCALE:,} pixels; the limit is "
            f"{MAX_OUTLINE:,.0f}"
        )
    crossings = [
        find_crossings(corners[part], ends[part], lengths[part], size)
        for part in split_edges(lengths)
    ]
    # Between two chunks no crossing is lost: the last corner of one is the first of the next.
    flat = np.sort(np.concatenate(crossings))
    total = width * height
    flat = np.append(flat, np.full(1 + (len(flat) + 1) % 2, total))
    starts, stops = flat[0:-1:2], flat[1::2]
    return join_runs(starts[: len(stops)], stops)


def split_edges(lengths: Ints, chunk: int = 4_000_000) -> list[slice]:
    """Cut edges into chunks of about `chunk` steps, so that memory is bounded."""
    groups = np.cumsum(lengths) // chunk
    bounds = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(lengths)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def find_crossings(starts: Ints, ends: Ints, lengths: Ints, size: Size) -> Ints:
    """Return where edges cross the middle of a column, as x * height + y, in no order.

    Args:
        starts: first corner [N, 2] of each edge in fivefold resolution.
        ends: last corner of each edge.
        lengths: steps of each edge.
        size: (width, height) of the image.
    """
    width, height = size
    delta = np.abs(ends - starts)
    flat = delta[:, 0] >= delta[:, 1]
    # Steps along the longer side; edges are drawn from their smaller end whatever their direction.
    near = np.where(flat, starts[:, 0], starts[:, 1])
    far = np.where(flat, ends[:, 0], ends[:, 1])
    flip = near > far
    one = np.where(flip[:, None], ends, starts)
    two = np.where(flip[:, None], starts, ends)
    rise = np.where(flat, two[:, 1] - one[:, 1], two[:, 0] - one[:, 0])
    slope = rise / np.maximum(lengths, 1)
    count = lengths + 1
    edge = np.repeat(np.arange(len(starts)), count)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    step = np.where(flip[edge], lengths[edge] - step, step)
    base = np.where(flat, one[:, 1], one[:, 0])
    across = (base[edge] + slope[edge] * step + 0.5).astype(np.int64)
    along = step + np.where(flat, one[:, 0], one[:, 1])[edge]
    u = np.where(flat[edge], along, across)
    v = np.where(flat[edge], across, along)
    moved = np.flatnonzero(u[1:] != u[:-1]) + 1
    before, after = u[moved - 1], u[moved]
    x = np.where(after < before, after, after - 1)
    # The middle of a column: x / 5 - 0.4 is an integer.
    kept = ((x - 2) % SCALE == 0) & (x >= 2) & ((x - 2) // SCALE < width)
    moved, x = moved[kept], (x[kept] - 2) // SCALE
    y = np.minimum(v[moved], v[moved - 1])
    y = np.ceil(np.clip((y + 0.5) / SCALE - 0.5, 0, height)).astype(np.int64)
    return x * height + y


def join_runs(starts: Ints, stops: Ints) -> Runs:
    """Drop empty runs and join adjacent ones."""
    filled = stops > starts
    starts, stops = starts[filled], stops[filled]
    if not len(starts):
        return Runs(starts, stops)
    gaps = starts[1:] > stops[:-1]
    return Runs(starts[np.append(True, gaps)], stops[np.append(gaps, True)])
