"""COCO: instances (polygons and run-length encodings), and panoptic annotations with their PNGs."""

import json
from array import array
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from shards.annotations.json_stream import read_elements
from shards.annotations.panoptic import list_segments, read_panoptic
from shards.annotations.polygons import read_points
from shards.annotations.regions import ImageRegions, Outline, Region, Stencil
from shards.annotations.runs import Runs, Size, counts_to_runs, decode_counts
from shards.annotations.scan import Scan
from shards.annotations.signatures import name_other_format, require_file
from shards.sample import DataError, is_safe_path

PNG_START = b"\x89PNG\r\n\x1a\n"
"""Separates the JSON of a panoptic record from its PNG: JSON cannot contain these bytes."""
KEYS = ("images", "annotations", "categories")


class CocoIndex:
    """Byte positions of the images and annotations of a file, and how they are linked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scan = Scan()
        self.keys: set[str] = set()
        self.images: dict[Any, tuple[Any, int, int]] = {}
        """(file name, start, stop) by id."""
        self.owners: list[Any] = []
        """Image id of each annotation."""
        self.labels: list[str] = []
        self.segments: dict[int, tuple[str, tuple[str, ...]]] = {}
        """Panoptic: PNG and labels of the segments, by number of the annotation."""
        self.starts, self.stops, self.ids = array("q"), array("q"), array("q")

    def add(self, key: str, value: Any, start: int, stop: int) -> None:
        """Add an image, a category or an annotation."""
        where = f"{self.path}: {key}[{start:,}]"
        if not isinstance(value, dict):
            raise DataError(f"{self.path}, byte {start:,}: an entry of {key} is not an object")
        if key == "annotations":
            self.add_annotation(value, start, stop)
            return
        identity = value.get("id")
        if not isinstance(identity, int | str):
            raise DataError(f"{where} has no id; add it")
        if key == "categories":
            self.add_category(str(identity), value)
        elif identity in self.images:
            raise DataError(f"{self.path}: two images have the id {identity!r}; renumber them")
        else:
            self.images[identity] = (value.get("file_name"), start, stop)

    def add_category(self, label: str, value: dict[str, Any]) -> None:
        """Add a category."""
        name = value.get("name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{self.path}: category {label} has no name; add it")
        if label in self.scan.names:
            raise DataError(f"{self.path}: two categories have the id {label}; renumber them")
        if name in self.scan.names.values():
            raise DataError(f"{self.path}: two categories are called {name!r}; merge or rename one")
        self.scan.names[label] = name

    def add_annotation(self, value: dict[str, Any], start: int, stop: int) -> None:
        """Add the position of an annotation."""
        name = value.get("id", "without id")
        panoptic = "segments_info" in value
        for key in ("image_id",) if panoptic else ("image_id", "category_id"):
            if not isinstance(value.get(key), int | str):
                raise DataError(f"{self.path}: annotation {name} has no {key}; add it")
        if panoptic:
            self.add_segments(value)
        self.owners.append(value["image_id"])
        self.labels.append("" if panoptic else str(value["category_id"]))
        self.starts.append(start)
        self.stops.append(stop)
        if isinstance(name, int) and abs(name) < 2**63:
            self.ids.append(name)

    def add_segments(self, value: dict[str, Any]) -> None:
        """Add the PNG and the labels of a panoptic annotation."""
        where = f"{self.path}: annotation of image {value['image_id']}"
        name = value.get("file_name")
        if not isinstance(name, str) or not name or not is_safe_path(name):
            raise DataError(f"{where} has the file_name {name!r}, not a relative path; correct it")
        try:
            labels = tuple(str(entry["category_id"]) for entry in list_segments(value))
        except DataError as error:
            raise DataError(f"{where}: {error}; correct it") from error
        self.segments[len(self.owners)] = name, labels

    def find_segments(self, own: list[int], where: str) -> tuple[str | None, list[str]]:
        """Return the panoptic PNG of an image, None without one, and the labels of its regions.

        Raises DataError for an image with a panoptic annotation and another one.
        """
        if not any(number in self.segments for number in own):
            return None, [self.labels[number] for number in own]
        if len(own) > 1:
            raise DataError(f"{where} has {len(own)} annotations, one panoptic; keep that one")
        name, labels = self.segments[own[0]]
        # As in COCO's archives, a folder named like the JSON lies beside it.
        return f"{self.path.stem}/{name}", list(labels)

    def finish(self) -> Scan:
        """Group the annotations by image and build the records."""
        if missing := [key for key in ("images", "annotations") if key not in self.keys]:
            raise DataError(
                f"{self.path} is not COCO: it has no {missing[0]!r}"
                + name_other_format(self.path, "coco")
            )
        ids, counts = np.unique(np.array(self.ids, dtype=np.int64), return_counts=True)
        if (repeated := ids[counts > 1]).size:
            raise DataError(
                f"{self.path}: {len(repeated)} annotation ids occur twice, the first: "
                f"{repeated[0]}; renumber the annotations"
            )
        self.refuse_unknown_ids()
        folder = self.path.with_suffix("")
        if self.segments and not folder.is_dir():
            raise DataError(
                f"{self.path} is panoptic, but its PNG files are not in {folder}; move them there"
            )
        members: dict[Any, list[int]] = {}
        for number, owner in enumerate(self.owners):
            members.setdefault(owner, []).append(number)
        for identity, (name, start, stop) in self.images.items():
            own = members.pop(identity, [])
            spans = [start, stop]
            for number in own:
                spans += (self.starts[number], self.stops[number])
            where = f"{self.path}: image {identity}"
            png, labels = self.find_segments(own, where)
            self.scan.add(name, self.path.name, tuple(spans), labels, where, png)
        self.scan.declared = tuple(self.scan.names)
        return self.scan

    def refuse_unknown_ids(self) -> None:
        """Raise DataError for annotations of images or categories that the file does not list."""
        orphans = Counter(str(owner) for owner in self.owners if owner not in self.images)
        labels = chain(self.labels, *(labels for _, labels in self.segments.values()))
        strangers = Counter(label for label in labels if label and label not in self.scan.names)
        for key, place, missing in (
            ("image", "images", orphans),
            ("category", "categories", strangers),
        ):
            if missing:
                listed = ", ".join(f"{identity}: {n}" for identity, n in missing.most_common(5))
                raise DataError(
                    f"{self.path}: {missing.total()} annotations have an unlisted {key}_id "
                    f"({listed}); add it to {place}, or remove them"
                )


def scan_coco(path: Path) -> Scan:
    """Index a COCO file: reads it once, and keeps positions, not annotations.

    Raises DataError for another format, damaged JSON, and ids that do not fit.
    """
    require_file(path, "coco", ".json")
    index = CocoIndex(path)
    for element in read_elements(path):
        index.keys.add(element.key)
        if element.key in KEYS:
            if element.value == [] and not element.in_array:
                continue
            if not element.in_array:
                raise DataError(
                    f"{path} is not COCO: {element.key!r} is not a list"
                    + name_other_format(path, "coco")
                )
            index.add(element.key, element.value, element.start, element.stop)
    return index.finish()


def read_coco(data: bytes) -> ImageRegions:
    """Parse the record of an image: its entry in `images`, its annotations, its panoptic PNG.

    Raises DataError for an image without a size and for annotations that cannot be drawn.
    """
    text, start, rest = data.partition(PNG_START)
    image, *annotations = json.loads(b"[" + text + b"]")
    size = read_size(image)
    if annotations and "segments_info" in annotations[0]:
        return read_panoptic(annotations[0], start + rest, size)
    regions = [read_annotation(annotation, size) for annotation in annotations]
    return ImageRegions(size, regions, small_on_top=True)


def read_size(image: dict[str, Any]) -> Size:
    """Return (width, height) of an entry in `images`. Raises DataError if it has none."""
    width, height = image.get("width"), image.get("height")
    if (
        not (isinstance(width, int | float) and isinstance(height, int | float))
        or not (width > 0 and height > 0)
        or width != int(width)
        or height != int(height)
    ):
        raise DataError(
            f"image {image.get('id')} has the size {width} x {height}; correct its width and height"
        )
    return int(width), int(height)


def read_annotation(annotation: dict[str, Any], size: Size) -> Region:
    """Parse an annotation. Raises DataError naming it if it cannot be drawn."""
    where = f"annotation {annotation.get('id', 'without id')}"
    try:
        shape = read_segmentation(annotation, size)
    except DataError as error:
        raise DataError(f"{where}: {error}; correct or remove it") from error
    crowd = bool(annotation.get("iscrowd"))
    return Region(str(annotation["category_id"]), shape, where, crowd)


def read_segmentation(annotation: dict[str, Any], size: Size) -> Outline | Stencil:
    """Parse the segmentation of an annotation: polygons, or a run-length encoding."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        runs = read_rle(segmentation, size)
        return Stencil(lambda _: runs)
    if not segmentation:
        raise DataError(
            "it has a bounding box only, no segmentation; boxes do not make masks"
            if annotation.get("bbox")
            else "it has no segmentation"
        )
    if not isinstance(segmentation, list):
        raise DataError(f"its segmentation is {type(segmentation).__name__}, not a list or an RLE")
    if not isinstance(segmentation[0], list):
        raise DataError("its polygon must be a list in a list: [[x, y, x, y, ...]]")
    return Outline(tuple(read_points(part) for part in segmentation))


def read_rle(segmentation: dict[str, Any], size: Size) -> Runs:
    """Decode a run-length encoding. Raises DataError if it does not fit the image."""
    declared, counts = segmentation.get("size"), segmentation.get("counts")
    if declared != [size[1], size[0]]:
        raise DataError(
            f"its RLE has the size {declared}, but [height, width] of its image is "
            f"[{size[1]}, {size[0]}]"
        )
    if isinstance(counts, str):
        try:
            return counts_to_runs(decode_counts(counts.encode("ascii")), size)
        except UnicodeEncodeError as error:
            raise DataError(
                "its compressed RLE has characters that the encoding does not use"
            ) from error
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise DataError("its RLE has no counts: a list of integers or a compressed string")
    if any(abs(count) > 2**40 for count in counts):
        raise DataError("its RLE has a count beyond any image")
    return counts_to_runs(np.array(counts, dtype=np.int64), size)
