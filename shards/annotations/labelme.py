"""LabelMe: one JSON file beside each image."""

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shards.annotations.drawing import PillowShape, draw_with_pillow
from shards.annotations.polygons import OutlineFlaws, Points, find_flaws, read_points
from shards.annotations.regions import ImageRegions, Region, Stencil
from shards.annotations.runs import Size, find_mask_runs
from shards.annotations.scan import Scan
from shards.annotations.signatures import name_other_format, require_folder
from shards.folders.walk import walk_files
from shards.images.files import ImageRule, load_pixels, open_image
from shards.local_files import read_file
from shards.sample import DataError

NUM_POINTS = {"circle": 2, "rectangle": 2, "oriented_rectangle": 4, "mask": 2}
"""Points of shapes that have a fixed number of them."""
LINES = ("line", "linestrip")


def scan_labelme(folder: Path) -> Scan:
    """Find the files of a folder, and count their labels; a damaged file becomes a problem."""
    require_folder(folder, "labelme", "a JSON file for each image")
    scan = Scan()
    for name in sorted(n for n in walk_files(str(folder)) if n.lower().endswith(".json")):
        path = folder / name
        try:
            shapes = load_labelme(read_file(path), path)["shapes"]
            labels = [read_label(shape, n) for n, shape in enumerate(shapes)]
        except DataError as error:
            scan.problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        scan.add(name[: -len(".json")], name, (), labels, str(path))
    if not scan.records and not scan.problems:
        raise DataError(f"{folder} contains no JSON files; correct --annotations")
    return scan


def load_labelme(data: bytes, path: Path | None = None) -> dict[str, Any]:
    """Parse a file. Raises DataError if it is not one of LabelMe."""
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "it is not valid JSON in UTF-8; it may be cut off: export it again"
        ) from error
    if not isinstance(plain, dict) or not isinstance(plain.get("shapes"), list):
        other = "" if path is None else name_other_format(path, "labelme")
        raise DataError(f"it is not a LabelMe file: it has no list 'shapes'{other}")
    return plain


def read_label(shape: Any, number: int) -> str:
    """Return the label of a shape. Raises DataError if it has none."""
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"shape {number} has no label; add it")
    return label


def read_labelme(data: bytes, line_width: int | None) -> ImageRegions:
    """Parse the file of an image.

    Args:
        data: the file's bytes.
        line_width: width in pixels in which lines are drawn; None: they are refused.

    Raises DataError for shapes that cannot be drawn.
    """
    plain = load_labelme(data)
    width, height = plain.get("imageWidth"), plain.get("imageHeight")
    size = None
    if width is not None or height is not None:
        if type(width) is not int or type(height) is not int or width < 1 or height < 1:
            raise DataError(f"imageWidth and imageHeight are {width} and {height}; correct them")
        size = width, height
    return ImageRegions(size, list(read_shapes(plain["shapes"], size, line_width)))


def read_shapes(shapes: list[Any], size: Size | None, line_width: int | None) -> Iterator[Region]:
    """Yield the regions of the shapes of a file."""
    for number, shape in enumerate(shapes):
        label = read_label(shape, number)
        where = f"shape {number} ({label})"
        kind = shape.get("shape_type") or "polygon"
        try:
            points = read_points(shape.get("points"))
            yield Region(label, read_shape(kind, points, shape, size, line_width), where)
        except DataError as error:
            raise DataError(f"{where}: {error}; correct or remove it") from error


def read_shape(
    kind: str, points: Points, shape: dict[str, Any], size: Size | None, line_width: int | None
) -> Stencil:
    """Parse a shape. Raises DataError for one without an area."""
    if kind in NUM_POINTS and len(points) != NUM_POINTS[kind]:
        raise DataError(f"a {kind} has {NUM_POINTS[kind]} points, this one {len(points)}")
    if kind in LINES:
        if line_width is None:
            raise DataError(f"it is a {kind}, which has no area: draw it with --line-width PIXELS")
        if len(points) < 2:
            return Stencil(draw_nothing, (OutlineFlaws(degenerate=f"{len(points)} points"),))
        return Stencil(lambda image: draw_with_pillow("line", points, image, line_width))
    if kind == "mask":
        return read_shape_mask(points, shape)
    if kind in ("polygon", "oriented_rectangle"):
        flaws = find_flaws(points, size)
        if len(points) < 3:
            return Stencil(draw_nothing, (flaws,))
        return Stencil(lambda image: draw_with_pillow("polygon", points, image), (flaws,))
    if kind not in ("circle", "rectangle"):
        raise DataError(f"it is a {kind}, which cannot be drawn as a region")
    drawn: PillowShape = "circle" if kind == "circle" else "rectangle"
    corners = points
    if kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        corners = np.stack([points[0] - radius, points[0] + radius])
    clipped = size is not None and bool((corners < 0).any() or (corners > np.array(size)).any())
    return Stencil(lambda image: draw_with_pillow(drawn, points, image), (OutlineFlaws(clipped),))


def draw_nothing(size: Size) -> Any:
    """Return no pixels."""
    return find_mask_runs(np.zeros((0, 0), dtype=np.bool_), 0, 0, size)


def read_shape_mask(points: Points, shape: dict[str, Any]) -> Stencil:
    """Parse a shape whose pixels are a PNG in base64, from its first to its second point."""
    text = shape.get("mask")
    try:
        data = base64.b64decode(text or "", validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError("its mask is not a PNG in base64") from error
    left, top, right, bottom = points.astype(np.int64).ravel().tolist()
    if not data:
        raise DataError("its mask is not a PNG in base64")
    limit = ImageRule(max_pixels=max(1, (right - left + 1) * (bottom - top + 1)))
    image, _ = load_pixels(open_image(data, "its mask", limit), "its mask")
    if image.size != (right - left + 1, bottom - top + 1):
        raise DataError(
            f"its mask is {image.width} x {image.height}, but its points span "
            f"{right - left + 1} x {bottom - top + 1}"
        )
    mask = np.asarray(image.convert("L")) > 0
    return Stencil(lambda size: find_mask_runs(mask, left, top, size))
