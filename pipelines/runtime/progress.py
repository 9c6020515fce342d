"""Progress bars on a terminal, else periodic lines."""

import io
import sys
from typing import Any

from tqdm import tqdm

LINE_INTERVAL = 10.0
"""Seconds before the first line and between lines."""
LINE = "{desc}: {n:,} of {total:,} {unit}s, {rate_noinv:,.1f}/s, {remaining} left"


class LineWriter(io.TextIOBase):
    """Prints each refresh of a tqdm bar as a line of its own on stderr."""

    def write(self, text: str) -> int:
        """Print the text unless it is blank."""
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


def progress(*arguments: Any, **options: Any) -> tqdm:
    """Create a `tqdm` with these arguments; `desc` and `unit` are required."""
    if not sys.stderr.isatty():
        # `miniters=1` leaves the rate to `mininterval`; the verb prints its own last line.
        options |= {"file": LineWriter(), "bar_format": LINE, "miniters": 1, "leave": False}
        options |= {"mininterval": LINE_INTERVAL, "delay": LINE_INTERVAL}
    return tqdm(*arguments, **options)
