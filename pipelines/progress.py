"""What a person sees of work that takes its time: a bar on a terminal, else a line now and then."""

import io
import sys
from typing import Any

from tqdm import tqdm

EVERY = 10.0
"""Seconds between two lines, and before the first one."""

LINE = "{desc}: {n:,} of {total:,} {unit}s, {rate_noinv:,.1f}/s, {remaining} left"


class Lines(io.TextIOBase):
    """Writes to stderr what tqdm would draw over what it drew before, each on its own line."""

    def write(self, text: str) -> int:
        """Write a line, where the text holds one."""
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


def progress(*given: Any, **options: Any) -> tqdm:
    """A `tqdm` with these arguments, among them `desc` and `unit`."""
    if not sys.stderr.isatty():
        # `miniters`: the time alone decides. `leave`: what the verb says last is the end.
        options |= {"file": Lines(), "bar_format": LINE, "miniters": 1, "leave": False}
        options |= {"mininterval": EVERY, "delay": EVERY}
    return tqdm(*given, **options)
