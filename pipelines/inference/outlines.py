"""Outlines of objects as polygons, whose rings follow the borders of pixels: nothing is simplified.

The pixel in column c and row r covers c <= x <= c + 1, r <= y <= r + 1; (0, 0) is the top left
corner of the image, and y points down.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from unet.objects import Labels

Point = tuple[int, int]
"""x, y."""
Ring = list[Point]
"""Closed: the last point is the first one."""
Polygon = list[Ring]
"""The outer ring, then those of holes."""
Ints = NDArray[np.int64]


def trace_objects(labels: Labels, number: int) -> list[list[Polygon]]:
    """Trace the polygons of objects.

    Pixels of an object that touch at corners only are in different polygons. No ring touches
    itself; two rings of a polygon may touch at a corner. In numbers, outer rings run
    counterclockwise and holes clockwise, as RFC 7946 asks.

    Args:
        labels: number of the object of each pixel, from 1; 0: none; int32 [H, W].
        number: of objects.

    Returns:
        The polygons of each object, in the order of their first pixel.
    """
    from scipy import ndimage

    parts = np.empty(labels.shape, dtype=np.int32)
    # 4 neighbours.
    num_parts = int(ndimage.label(labels > 0, output=parts))  # pyright: ignore[reportArgumentType]
    first = np.full(num_parts + 1, -1, dtype=np.int64)
    flat = parts.reshape(-1)
    first[flat[::-1]] = np.arange(flat.size)[::-1]
    objects: list[list[Polygon]] = [[] for _ in range(number)]
    for part, starts, ends in split_edges(parts, num_parts):
        rings = [simplify(ring, labels.shape[1] + 1) for ring in join_edges(starts, ends)]
        # Exactly one ring is not a hole.
        rings.sort(key=measure_area, reverse=True)
        objects[int(labels.reshape(-1)[first[part]]) - 1].append(rings)
    return objects


def split_edges(parts: Labels, num_parts: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield each part with the starts and ends of its border's edges, the part to their left.

    A point (x, y) is the number y * (width + 1) + x.
    """
    padded = np.pad(parts, 1)
    stride = parts.shape[1] + 1
    owners, starts, ends = list[Ints](), list[Ints](), list[Ints]()
    # Neighbour (down, right); start and end of the edge, (right, down) of the pixel's corner.
    for (down, right), (x, y), (u, v) in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    ):
        height, width = parts.shape
        other = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        rows, columns = np.nonzero((parts > 0) & (parts != other))
        owners.append(parts[rows, columns].astype(np.int64))
        starts.append((rows + y) * stride + columns + x)
        ends.append((rows + v) * stride + columns + u)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    start, end = np.concatenate(starts)[order], np.concatenate(ends)[order]
    bounds = np.searchsorted(owner[order], np.arange(1, num_parts + 2)).tolist()
    for part in range(1, num_parts + 1):
        own = slice(bounds[part - 1], bounds[part])
        yield part, start[own].tolist(), end[own].tolist()


def join_edges(starts: list[int], ends: list[int]) -> Iterator[list[int]]:
    """Join edges to rings that pass no point twice; yields their points."""
    following: defaultdict[int, list[int]] = defaultdict(list)
    for start, end in zip(starts, ends, strict=True):
        following[start].append(end)
    for start in starts:
        path, place = [start], {start: 0}
        while following[path[-1]]:
            point = following[path[-1]].pop()
            if point not in place:
                place[point] = len(path)
                path.append(point)
                continue
            # The path has come back to a point: a ring is complete.
            ring = path[place[point] :]
            yield ring
            for done in ring[1:]:
                del place[done]
            del path[place[point] + 1 :]


def simplify(ring: list[int], stride: int) -> Ring:
    """Convert the points of a ring to (x, y), without those inside of a straight line; close it."""
    points = [(number % stride, number // stride) for number in ring]
    corners = [
        here
        for before, here, after in zip(
            [points[-1], *points[:-1]], points, [*points[1:], points[0]], strict=True
        )
        if not (before[0] == here[0] == after[0] or before[1] == here[1] == after[1])
    ]
    return [*corners, corners[0]]


def measure_area(ring: Ring) -> int:
    """Return twice the area of a ring; negative if it runs clockwise, in numbers."""
    return sum(x * v - u * y for (x, y), (u, v) in pairwise(ring))
