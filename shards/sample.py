"""A sample: its key, its decoded form, the names of its members, and the error for bad data."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from shards.text import escape_line

Channels = Literal["L", "RGB"]
Colour = tuple[int, int, int]
Palette = tuple[Colour, ...]
Uint8 = NDArray[np.uint8]
IGNORE = 255
"""Mask value of pixels that are excluded from losses and metrics."""
MAX_KEY_BYTES = 90
"""A key and the longest extension must fit into the 100 bytes of a USTAR name."""
PLAIN_SOURCE = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+\.[A-Za-z0-9]+")
"""The common case: a path whose key is the path itself without its extension."""
MASK_EXTENSION = "mask.png"
BORDER_EXTENSION = "border.png"
INFO_EXTENSION = "json"
PROBABILITY_MEMBER = re.compile(r".+\.probability-\d+\.png", re.DOTALL)
"""Names of the probability maps that `unet predict` adds on request: not images of a sample."""


class DataError(Exception):
    """Data is refused. The message is one line: the path, the problem and the remedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A decoded sample."""

    key: str
    image: Uint8
    """[H, W, C], C = 1 or 3."""
    mask: Uint8 | None
    """Class indices [H, W], 255 = ignore; None if unlabelled."""


def encode_key(source: str) -> str:
    """Return the key of an image: its relative path without extension, safe as a tar member name.

    Every character except `A-Z a-z 0-9 _ - /` is percent-encoded, which is reversible, so no two
    paths share a key. A key of more than 90 bytes is replaced by `%sha256-` and the hash of the
    path, which no encoded path can equal; the sample's json holds the full path.
    """
    if PLAIN_SOURCE.fullmatch(source) and len(source) <= MAX_KEY_BYTES:
        return source.rpartition(".")[0]
    stem = str(PurePosixPath(source).with_suffix(""))
    # quote() never encodes . and ~; webdataset splits names at the first dot.
    key = quote(stem, safe="/", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    if len(key) <= MAX_KEY_BYTES:
        return key
    return "%sha256-" + hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()


def is_safe_path(path: str) -> bool:
    """Return whether a path from a shard stays inside the folder that it is joined to."""
    try:
        path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    pure = PurePosixPath(path)
    return (
        bool(pure.parts)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and "\0" not in path
        # Elsewhere a backslash is a character like any other.
        and (os.sep == "/" or "\\" not in path)
    )


MAX_LISTED, MAX_NAMED = 20, 3
"""Lines of problems in one message, and names in a line that stands for several."""
VARIABLE = re.compile(
    r"(?<!\w)'[^']*'(?!\w)|(?<=lists )\S.*(?=, which)|\S*/\S*[^\s),.:;]"
    r"|\S+\.[A-Za-z]\w{1,4}\b[^\s),:;]*|[\w.%-]*\d(?:,\d{3})*[\w%-]*"
)
"""What differs between near-equal problems: a quoted name, a path, a file name, a key or number."""


class AggregateDataError(DataError):
    """Several problems with the same remedy. The message lists the first 20, `problems` all."""

    def __init__(self, problems: Sequence[str], remedy: str) -> None:
        super().__init__(format_problems(problems, remedy))
        self.problems, self.remedy = list(problems), remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return AggregateDataError, (self.problems, self.remedy)


def format_problems(problems: Sequence[str], remedy: str) -> str:
    """Format one problem as one line, several as a list of the first 20 below the remedy."""
    if len(problems) == 1:
        return f"{escape_line(problems[0])}; {remedy}"
    return "\n  ".join([f"{len(problems)} problems ({remedy}):", *list_problems(problems)])


def list_problems(problems: Sequence[str]) -> list[str]:
    """Return the first 20 lines of problems.

    Those that differ only in names and numbers are one line: the first of them, how many more there
    are, and what differs in the next two.
    """
    groups: dict[str, list[str]] = {}
    for problem in map(escape_line, problems):
        groups.setdefault(VARIABLE.sub("*", problem), []).append(problem)
    units = [*groups.values()]
    more = sum(map(len, units[MAX_LISTED:]))
    lines = [unit[0] if len(unit) == 1 else join_similar(unit) for unit in units[:MAX_LISTED]]
    return [*lines, *([f"and {more} more"] if more else [])]


def join_similar(problems: Sequence[str]) -> str:
    """Format problems that differ only in names and numbers as one line."""
    first = VARIABLE.findall(problems[0])
    others = [
        " ".join(
            name for name, known in zip(VARIABLE.findall(text), first, strict=True) if name != known
        )
        for text in problems[1:MAX_NAMED]
    ]
    if not any(others):
        return f"{problems[0]} ({len(problems)} times)"
    more = ", ..." if len(problems) > MAX_NAMED else ""
    also = f"(and {len(problems) - 1} more: {', '.join(others)}{more})"
    problem, semicolon, remedy = problems[0].partition("; ")
    return f"{problem} {also}{semicolon}{remedy}"
