"""What `unet evaluate` finds out on request, besides the scores, in a form to print and write."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """A part of the results."""

    name: str
    """Its entry in scores.json."""
    plain: dict[str, Any]
    """The content of that entry."""
    table: str
    """The lines to print."""
    file: str
    """Name of the file beside scores.json."""
    content: bytes
    """Of that file."""


def format_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Format a CSV file in UTF-8; None is an empty cell."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(header)
    lines.writerows(rows)
    return text.getvalue().encode()
