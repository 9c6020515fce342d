"""Shapes other than polygons of COCO's rule: those that Pillow draws, rectangles and ellipses."""

import math
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from shards.annotations.polygons import MAX_COORDINATE, Points
from shards.annotations.runs import Runs, Size, find_mask_runs
from shards.sample import DataError

PillowShape = Literal["polygon", "rectangle", "circle", "line"]


def draw_with_pillow(kind: PillowShape, points: Points, size: Size, line_width: int = 0) -> Runs:
    """Return the pixels of a shape as LabelMe draws it (`labelme.utils.shape_to_mask`).

    Args:
        kind: `circle` has its centre and a point on it, `rectangle` two opposite corners.
        points: corners [N, 2].
        size: (width, height) of the image.
        line_width: pixels, for `line`.
    """
    canvas = Image.new("L", size)
    draw = ImageDraw.Draw(canvas)
    corners = [(x, y) for x, y in points.tolist()]
    match kind:
        case "circle":
            (cx, cy), (px, py) = corners
            radius = math.sqrt((cx - px) ** 2 + (cy - py) ** 2)
            box = [cx - radius, cy - radius, cx + radius, cy + radius]
            draw.ellipse(box, outline=1, fill=1)
        case "rectangle":
            (x, y), (u, v) = corners
            draw.rectangle([min(x, u), min(y, v), max(x, u), max(y, v)], outline=1, fill=1)
        case "line":
            draw.line(corners, fill=1, width=line_width)
        case "polygon":
            draw.polygon(corners, outline=1, fill=1)
    left, top, right, bottom = canvas.getbbox() or (0, 0, 0, 0)
    drawn = np.asarray(canvas.crop((left, top, right, bottom))) > 0
    return find_mask_runs(drawn, left, top, size)


def rotate_box(x: float, y: float, width: float, height: float, degrees: float) -> Points:
    """Return the corners of a rectangle, rotated clockwise around (x, y), its top left corner."""
    corners = np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])
    if degrees:
        angle = math.radians(degrees)
        sine, cosine = math.sin(angle), math.cos(angle)
        corners = corners @ np.array([[cosine, sine], [-sine, cosine]])
    return corners + np.array([x, y])


def draw_ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float, size: Size) -> Runs:
    """Return the pixels whose centre is in an ellipse, rotated clockwise around its centre.

    Args:
        cx: centre, in pixels from the left.
        cy: centre, in pixels from the top.
        rx: horizontal radius.
        ry: vertical radius.
        degrees: rotation.
        size: (width, height) of the image.
    """
    width, height = size
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    # a dx^2 + 2 b dx dy + c dy^2 <= 1
    a = (cosine / rx) ** 2 + (sine / ry) ** 2
    b = sine * cosine * (1 / rx**2 - 1 / ry**2)
    c = (sine / rx) ** 2 + (cosine / ry) ** 2
    columns = np.arange(width)
    dx = columns + 0.5 - cx
    root = (b * dx) ** 2 - c * (a * dx**2 - 1)
    inside = root >= 0
    columns, dx, root = columns[inside], dx[inside], np.sqrt(root[inside])
    low, high = ((-b * dx + sign * root) / c + cy - 0.5 for sign in (-1, 1))
    first = np.clip(np.ceil(low), 0, height).astype(np.int64)
    last = np.clip(np.floor(high) + 1, 0, height).astype(np.int64)
    filled = last > first
    base = columns[filled] * height
    return Runs(base + first[filled], base + last[filled])


def read_numbers(values: dict[str, object], *names: str) -> list[float]:
    """Return numbers by name. Raises DataError if one is missing, not finite or far too large."""
    numbers = []
    for name in names:
        try:
            number = float(values[name])  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"its {name} is {values.get(name)!r}, not a number") from error
        if not math.isfinite(number):
            raise DataError(f"its {name} is {number}, not finite")
        if abs(number) > MAX_COORDINATE:
            raise DataError(f"its {name} is {number:g}, far outside of any image")
        numbers.append(number)
    return numbers
