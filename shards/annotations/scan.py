"""What a first pass over annotations finds: the image of each record, and where its bytes are."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from shards.sample import DataError, is_safe_path

Spans = tuple[int, ...]
"""Bytes of a file: start, stop, start, stop, ...; () for the complete file."""
MAX_RECORD = 512 * 2**20
"""Maximum number of bytes of the annotations of one image."""


@dataclass(frozen=True, slots=True)
class Record:
    """The annotations of one image."""

    image: str
    """Path of the image, as the annotation names it."""
    file: str
    """File that holds the record, relative to the folder of the annotations."""
    spans: Spans
    num_regions: int
    segments: str | None = None
    """PNG that belongs to the record, relative to the same folder; None: there is none."""


@dataclass(slots=True)
class Scan:
    """The records of some annotations, and their classes."""

    records: list[Record] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    """Number of regions of each label."""
    declared: tuple[str, ...] | None = None
    """Labels in the order in which the annotations declare them; None if they do not."""
    names: dict[str, str] = field(default_factory=dict)
    """Class name of each label, where they differ."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of skipped entries, by kind."""
    problems: list[str] = field(default_factory=list)
    """Records that are refused, one line each."""

    def add(
        self,
        image: object,
        file: str,
        spans: Spans,
        labels: Iterable[str],
        where: str,
        segments: str | None = None,
    ) -> None:
        """Add a record; one whose image has no usable path becomes a problem."""
        if not isinstance(image, str) or not image:
            self.problems.append(f"{where} names no image file; correct it")
            return
        path = os.path.normpath(image).replace(os.sep, "/")
        if not is_safe_path(path):
            self.problems.append(
                f"{where} names the image {image!r}, which is not inside the folder of images; "
                "use relative paths"
            )
            return
        found = list(labels)
        self.labels.update(found)
        self.records.append(Record(path, file, spans, len(found), segments))


def read_spans(file: BinaryIO, spans: Spans) -> bytes:
    """Read the bytes of a record from an open file, a comma between its parts; () for all bytes.

    Raises DataError for a record too large for memory.
    """
    spans = spans or (0, os.fstat(file.fileno()).st_size)
    total = sum(spans[1::2]) - sum(spans[::2])
    if total > MAX_RECORD:
        raise DataError(
            f"{file.name} has {total:,} bytes for one image; the limit is {MAX_RECORD:,}"
        )
    bounds = zip(spans[::2], spans[1::2], strict=True)
    return b",".join(os.pread(file.fileno(), stop - start, start) for start, stop in bounds)
