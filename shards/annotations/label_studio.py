"""Label Studio: its JSON export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from shards.annotations.drawing import draw_ellipse, read_numbers, rotate_box
from shards.annotations.json_stream import read_elements
from shards.annotations.polygons import OutlineFlaws, read_points
from shards.annotations.regions import ImageRegions, Outline, Region, Stencil
from shards.annotations.runs import Size, decode_brush, find_mask_runs
from shards.annotations.scan import Scan
from shards.annotations.signatures import name_other_format, require_file
from shards.sample import DataError

BARE = ("polygon", "rectangle", "ellipse", "brush")
"""Types of results whose label is a result of its own with the same id."""
UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")
"""What Label Studio puts before the name of an uploaded file."""


def scan_label_studio(path: Path, annotator: str) -> Scan:
    """Index an export; a task that cannot be read becomes a problem.

    Args:
        path: the JSON file.
        annotator: `first`, `error`, or the id of the one whose annotation is used.

    Raises DataError for another format and damaged JSON.
    """
    require_file(path, "label-studio", ".json")
    scan = Scan()
    for number, element in enumerate(read_elements(path)):
        task = element.value
        if element.value == [] and not element.in_array and not element.key:
            continue
        if element.key or not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise DataError(
                f"{path} is not a JSON export of Label Studio"
                + name_other_format(path, "label-studio")
            )
        where = f"{path}: task {task.get('id', number)}"
        try:
            results = choose_results(task, annotator)
            labels = [read_labels(result)[0] for result in drawn_results(results)]
            image = find_image(task["data"])
        except DataError as error:
            scan.problems.append(f"{where}: {error}")
            continue
        others = len(results) - len(labels) - sum(r.get("type") in BARE for r in results)
        if others:
            scan.notes["results that are not regions (choices, text) are not drawn"] += others
        scan.add(image, path.name, (element.start, element.stop), labels, where)
    return scan


def find_image(data: dict[str, Any]) -> str:
    """Return the path of the image of a task, from its URL. Raises DataError without one."""
    values = [data["image"]] if "image" in data else list(data.values())
    urls = [value for value in values if isinstance(value, str)]
    if len(urls) != 1:
        raise DataError(f"its data name {len(urls)} files ({', '.join(sorted(data))}), not one")
    parts = urlsplit(urls[0])
    path = parse_qs(parts.query).get("d", [""])[0] or unquote(parts.path)
    return path.lstrip("/")


def choose_results(task: dict[str, Any], annotator: str) -> list[dict[str, Any]]:
    """Return the results of the annotation to use; [] if there is none.

    Raises DataError if there are several, and none is chosen.
    """
    if "annotations" not in task:
        raise DataError("it has no annotations; export `JSON`, not `JSON-MIN` or predictions")
    annotations = [
        entry
        for entry in task["annotations"] or []
        if isinstance(entry, dict) and not entry.get("was_cancelled")
    ]
    authors = [name_author(entry) for entry in annotations]
    if annotator not in ("first", "error"):
        annotations = [a for a, by in zip(annotations, authors, strict=True) if annotator in by]
        if len(annotations) > 1:
            raise DataError(f"annotator {annotator} has annotated it {len(annotations)} times")
    elif len(annotations) > 1 and annotator == "error":
        listed = ", ".join(by[0] for by in authors)
        raise DataError(
            f"it has {len(annotations)} annotations, by {listed}; choose with --annotator first or "
            "the id of one"
        )
    results = annotations[0].get("result") if annotations else []
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise DataError("its result is not a list of regions; export it again")
    return results


def name_author(annotation: dict[str, Any]) -> tuple[str, ...]:
    """Return what names the author of an annotation: the id and, if it is known, the email."""
    by = annotation.get("completed_by")
    if isinstance(by, dict):
        return str(by.get("id", "unknown")), str(by.get("email", "unknown"))
    return (str(by if by is not None else "unknown"),)


def drawn_results(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the results that are regions with a label. Raises DataError for those without."""
    labelled = {result.get("id") for result in results if read_labels(result)}
    for result in results:
        if read_labels(result):
            if len(read_labels(result)) > 1:
                names = ", ".join(read_labels(result))
                raise DataError(f"region {result.get('id')} has several labels: {names}; keep one")
            yield result
        elif (result.get("type") in BARE and result.get("id") not in labelled) or str(
            result.get("type")
        ).endswith("labels"):
            raise DataError(f"region {result.get('id')} has no label; add it")


def read_labels(result: dict[str, Any]) -> list[str]:
    """Return the labels of a result; [] if it is not a region."""
    kind, value = result.get("type"), result.get("value")
    if not isinstance(kind, str) or not kind.endswith("labels") or not isinstance(value, dict):
        return []
    names = value.get(kind)
    return [str(name) for name in names] if isinstance(names, list) else []


def read_label_studio(data: bytes, annotator: str) -> ImageRegions:
    """Parse a task. Raises DataError for regions that cannot be drawn."""
    size: Size | None = None
    regions = []
    for result in drawn_results(choose_results(json.loads(data), annotator)):
        label = read_labels(result)[0]
        where = f"region {result.get('id')} ({label})"
        try:
            own = read_size(result)
            if size is not None and own != size:
                raise DataError(f"its original size is {own}, that of another region {size}")
            size = own
            regions.append(Region(label, read_region(result["value"], own), where))
        except DataError as error:
            raise DataError(f"{where}: {error}; correct or remove it") from error
    return ImageRegions(size, regions)


def read_size(result: dict[str, Any]) -> Size:
    """Return (width, height) that a result declares for its image."""
    width, height = read_numbers(result, "original_width", "original_height")
    if width < 1 or height < 1:
        raise DataError(f"its original size is {width:g} x {height:g}")
    if result.get("image_rotation"):
        raise DataError(f"its image was rotated by {result['image_rotation']} degrees")
    return int(width), int(height)


def read_region(value: dict[str, Any], size: Size) -> Outline | Stencil:
    """Parse a region, whose coordinates are in percent of the image."""
    scale = np.array(size) / 100
    if "rle" in value:
        mask = decode_brush(value["rle"], size) > 0
        return Stencil(lambda image: find_mask_runs(mask, 0, 0, image))
    if "points" in value:
        return Outline((read_points(value["points"]) * scale,))
    turn = read_numbers({"rotation": 0, **value}, "rotation")[0]
    if "radiusX" in value:
        cx, cy, rx, ry = read_numbers(value, "x", "y", "radiusX", "radiusY") * np.tile(scale, 2)
        if rx <= 0 or ry <= 0:
            raise DataError(f"its radii are {rx:g} and {ry:g}")
        clipped = not (rx <= cx <= size[0] - rx and ry <= cy <= size[1] - ry)
        flaws = (OutlineFlaws(clipped),)
        return Stencil(lambda image: draw_ellipse(cx, cy, rx, ry, turn, image), flaws)
    if "width" in value:
        x, y, width, height = read_numbers(value, "x", "y", "width", "height") * np.tile(scale, 2)
        return Outline((rotate_box(x, y, width, height, turn),))
    raise DataError("it is a key point or another shape without an area")
