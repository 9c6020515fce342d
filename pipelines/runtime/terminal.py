"""The streams of a command: names from others are escaped before they reach a terminal or a log."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from shards.text import MAX_LINE, escape_line, escape_text

MAX_OUTPUT = 100_000
"""Characters of a line on stdout, where commands are printed to be copied."""
CURSOR = re.compile(r"\n*|(?:\x1b\[A)+")
"""What tqdm writes to move between bars."""


class SafeStream:
    """A text stream whose lines are escaped and bounded in length.

    Args:
        stream: where the text is written.
        limit: characters of a line.
    """

    def __init__(self, stream: Any, limit: int) -> None:
        self.stream, self.limit = stream, limit

    def write(self, text: str) -> int:
        """Write text; progress bars may return to the start of their line."""
        if not CURSOR.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            text = start + escape_text(text[len(start) :], self.limit)
        return self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def print_lines(lines: Iterable[str], file: Any = None) -> None:
    """Print each of some lines as one line: a line feed in a file name makes no other."""
    for line in lines:
        print(escape_line(line, limit=None), file=file)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Escape what is written to stdout and stderr in this block."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, SafeStream):
        # `unet demo` runs other verbs.
        yield
        return
    sys.stdout, sys.stderr = SafeStream(sys.stdout, MAX_OUTPUT), SafeStream(sys.stderr, MAX_LINE)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
