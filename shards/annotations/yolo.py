"""YOLO segmentation: one text file for each image, a line `class x y x y ...` for each region."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.annotations.polygons import Points, read_points
from shards.annotations.regions import ImageRegions, Outline, Region
from shards.annotations.runs import Size
from shards.annotations.scan import Scan
from shards.annotations.signatures import require_folder
from shards.folders.walk import walk_files
from shards.local_files import read_file
from shards.sample import DataError

NAMES_FILE = "classes.txt"
MAX_RELATIVE = 2.0
"""Coordinates beyond this are not fractions of the image but pixels."""


def scan_yolo(folder: Path, classes: tuple[str, ...]) -> Scan:
    """Find the files of a folder, and count their classes; a damaged file becomes a problem.

    Args:
        folder: folder of the text files.
        classes: name of class 0, 1, 2, ...
    """
    require_folder(folder, "yolo", "a text file for each image")
    scan = Scan(declared=tuple(str(number) for number in range(len(classes))))
    scan.names = {str(number): name for number, name in enumerate(classes)}
    names = sorted(n for n in walk_files(str(folder)) if n.lower().endswith(".txt"))
    for name in names:
        if name.rpartition("/")[2] == NAMES_FILE:
            continue
        path = folder / name
        try:
            labels = [label for label, _, _ in read_lines(read_file(path))]
        except DataError as error:
            scan.problems.append(f"{path}, {error}")
            continue
        scan.add(name[: -len(".txt")], name, (), labels, str(path))
    if not scan.records and not scan.problems:
        raise DataError(f"{folder} contains no text files; correct --annotations")
    return scan


def read_lines(data: bytes) -> Iterator[tuple[str, Points, str]]:
    """Yield class, fractions [N, 2] and name of each region. Raises DataError naming the line."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("line 1: it is not UTF-8 text; export it again") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        where = f"line {number}"
        if not re.fullmatch(r"[0-9]{1,6}(\.0*)?", words[0]):
            raise DataError(f"{where}: {words[0]!r} is not a class number; export it again")
        if len(words) == 5:
            raise DataError(
                f"{where}: it is a bounding box (class, x, y, width, height), and boxes do not "
                "make masks; export segmentation labels"
            )
        if len(words) < 7:
            raise DataError(
                f"{where}: {len(words) - 1} coordinates are fewer than three points; correct it"
            )
        try:
            points = read_points([float(word) for word in words[1:]])
        except (DataError, ValueError) as error:
            text = error if isinstance(error, DataError) else "it has words that are not numbers"
            raise DataError(f"{where}: {text}; correct it") from error
        if np.abs(points).max() > MAX_RELATIVE:
            raise DataError(
                f"{where}: coordinates reach {np.abs(points).max():g}; YOLO's are fractions of the "
                "image, 0 to 1"
            )
        yield str(int(float(words[0]))), points, where


def read_yolo(data: bytes, size: Size) -> ImageRegions:
    """Parse the file of an image of (width, height). Raises DataError naming a damaged line."""
    regions = [
        Region(label, Outline((points * size,)), where) for label, points, where in read_lines(data)
    ]
    return ImageRegions(None, regions)
