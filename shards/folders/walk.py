"""Files below a folder, and the lines of lists."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shards.images.files import IMAGE_EXTENSIONS, UNSUPPORTED_EXTENSIONS
from shards.local_files import describe_no_directory, read_text
from shards.sample import DataError

ANNOTATIONS = frozenset({".json", ".xml", ".npy", ".npz", ".mat", ".svg", ".yaml", ".yml", ".h5"})
"""Extensions of files that may hold annotations."""


def describe_annotations(names: Iterable[str], remedy: str) -> list[str]:
    """Describe files that may be annotations but are not read, in at most one line."""
    found = Counter(os.path.splitext(name)[1].lower() for name in names)
    counts = [f"{found[ext]} {ext}" for ext in sorted(ANNOTATIONS & found.keys())]
    return [f"{', '.join(counts)} files are not read: {remedy}"] if counts else []


def split_columns(line: str, delimiter: str | None) -> list[str]:
    """Split a line at a delimiter, or at white space if it is None; [] if it is not valid CSV."""
    try:
        return line.split() if delimiter is None else next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file. Raises DataError if it is not UTF-8."""
    try:
        return read_text(file).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; save it as UTF-8") from error


def find_common_root(paths: Sequence[str], preferred: Path) -> Path:
    """Return `preferred` if it contains all paths, else the deepest folder that does."""
    root = str(preferred.resolve())
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Path(root if os.path.commonpath([common, root]) == root else common)


def relative_path(path: str, root: Path) -> str:
    """Return a path relative to `root`, with `/` as separator."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def list_images(
    folder: Path,
    refused: list[str] | None = None,
    notes: list[str] | None = None,
    *,
    flag: str = "",
) -> list[str]:
    """List the relative paths of all images below a folder, without hidden files, sorted.

    Files in unsupported image formats are reported in `refused`, and files that may be annotations
    in `notes`, if these are given. Raises DataError, with the `flag` that names the folder, if it
    is missing or has neither.
    """
    if not folder.is_dir():
        where = f"{flag} {folder}:" if flag else str(folder)
        raise DataError(f"{where} {describe_no_directory(folder)}")
    names, others = [], []
    for name in walk_files(str(folder)):
        lower = name.lower()
        if os.path.splitext(lower)[1] in IMAGE_EXTENSIONS:
            names.append(name)
        elif refused is not None:
            problem = next(
                (p for ext, p in UNSUPPORTED_EXTENSIONS.items() if lower.endswith(ext)), None
            )
            if problem is None:
                others.append(name)
            else:
                refused.append(f"{folder / name} is {problem}")
    if not names and not refused:
        raise DataError(f"{folder} contains no images ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    if notes is not None:
        remedy = f"masks are image files; if they are annotations, run unet check {folder}"
        notes += [f"{folder}: {line}" for line in describe_annotations(others, remedy)]
    return sorted(names)


def walk_files(folder: str) -> Iterator[str]:
    """Yield the relative path of every file that is not hidden; follows links but not cycles."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while todo:
        below, ancestors = todo.pop()
        path = f"{folder}/{below}"
        stat = os.stat(path)
        here = (stat.st_dev, stat.st_ino)
        if here in ancestors:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    todo.append((f"{below}{entry.name}/", ancestors | {here}))
                else:
                    yield below + entry.name
