"""Which annotation format a file has, judged by its content."""

import json
import re
from pathlib import Path
from typing import Any

from shards.annotations.json_stream import read_elements
from shards.annotations.regions import AnnotationFormat
from shards.local_files import open_file
from shards.sample import DataError

MAX_PEEKED = 2000
"""Number of elements that are examined."""
YOLO_LINE = re.compile(rb"\s*[0-9]{1,6}(\.0*)?([ \t]+[-+.0-9eE]+){4,}\s*")
"""A line of YOLO: a class and at least four numbers."""


def name_other_format(path: Path, expected: str) -> str:
    """Return `; it looks like X: use --annotation-format X`, or another remedy."""
    found = recognise_file(path)
    if found is None or found == expected:
        return "; export it again"
    return f"; it is {found}: use --annotation-format {found}"


def recognise_file(path: Path) -> AnnotationFormat | None:
    """Return the annotation format of a file, None if it has none of those."""
    with open_file(path) as file:
        if path.suffix.lower() == ".txt":
            return "yolo" if YOLO_LINE.fullmatch(file.readline(2**20)) else None
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"<":
        return "cvat" if b"<annotations" in start else None
    return recognise_json(path) if start[:1] in (b"{", b"[") else None


def recognise_json(path: Path) -> AnnotationFormat | None:
    """Return the annotation format of a JSON file, None if it has none of those."""
    keys: dict[str, Any] = {}
    try:
        for number, element in enumerate(read_elements(path)):
            keys.setdefault(element.key, element.value)
            if number > MAX_PEEKED or (element.key == "" and element.in_array):
                break
    except (DataError, json.JSONDecodeError):
        # What could be read may be enough; the error is reported when the file is read for good.
        pass
    first = keys.get("")
    if (
        isinstance(first, dict)
        and "data" in first
        and {"annotations", "completions"} & first.keys()
    ):
        return "label-studio"
    if "shapes" in keys or "imageData" in keys:
        return "labelme"
    if {"images", "categories"} <= keys.keys() or "annotations" in keys:
        return "coco"
    return None
