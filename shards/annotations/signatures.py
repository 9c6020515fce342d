"""Which annotation format a file has, judged by its content."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

from shards.annotations.json_stream import read_elements
from shards.annotations.regions import AnnotationFormat
from shards.folders.walk import walk_files
from shards.local_files import open_file
from shards.sample import DataError

MAX_FILES = 5
"""Files of a folder that are looked at."""
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


def require_file(path: Path, kind: AnnotationFormat, suffix: str) -> None:
    """Raise DataError unless `path` is a file; names the format of a folder or of XML."""
    if path.is_dir():
        found = recognise_folder(path)
        if found is not None:
            raise DataError(f"{path} is a folder of {found} files; use --annotation-format {found}")
        raise DataError(
            f"{path} is a directory; --annotation-format {kind} reads one file (*{suffix})"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct --annotations")
    if kind != "cvat" and recognise_file(path) == "cvat":
        raise DataError(f"{path} is cvat; use --annotation-format cvat")


def require_folder(path: Path, kind: AnnotationFormat, contents: str) -> None:
    """Raise DataError unless `path` is a folder; names the format of a file."""
    if path.is_file():
        found = recognise_file(path)
        if found is not None and found != kind:
            raise DataError(f"{path} is {found}; use --annotation-format {found}")
        raise DataError(
            f"{path} is a file; --annotation-format {kind} reads a folder with {contents}"
        )
    if not path.is_dir():
        raise DataError(f"{path} does not exist; correct --annotations")


def recognise_folder(folder: Path) -> AnnotationFormat | None:
    """Return the annotation format of the first files of a folder, None if it has none."""
    names = (name for name in walk_files(str(folder)) if name.lower().endswith((".json", ".txt")))
    for name in islice(names, MAX_FILES):
        if (kind := recognise_file(folder / name)) is not None:
            return kind
    return None


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
