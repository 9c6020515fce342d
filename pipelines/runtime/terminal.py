"""The streams of a command: nothing that others named reaches a terminal or a log unescaped."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shards.text import MAX_LINE, escape_text

MAX_OUTPUT = 100_000
"""Characters of a line on stdout, where commands are printed to be copied."""
CURSOR = re.compile(r"\n*|(?:\x1b\[A)+")
"""What tqdm writes to move between bars."""
STYLE = re.compile(r"(\x1b\[[0-9;]*m)")


class SafeStream:
    """A text stream whose lines are escaped and bounded in length.

    Args:
        stream: where the text is written.
        limit: characters of a line.
    """

    def __init__(self, stream: Any, limit: int) -> None:
        self.stream, self.limit = stream, limit
        self.styled = False
        """Whether colours are kept, on a terminal: only while flags are parsed."""

    def write(self, text: str) -> int:
        """Write text; progress bars may return to the start of their line."""
        if not CURSOR.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            parts = STYLE.split(text[len(start) :]) if self.styled else [text[len(start) :]]
            parts[::2] = [escape_text(part, self.limit) for part in parts[::2]]
            text = start + "".join(parts)
        return self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


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


@contextmanager
def keep_styles() -> Iterator[None]:
    """Let colours through to terminals in this block."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, SafeStream)]
    for stream in streams:
        stream.styled = stream.isatty()
    try:
        yield
    finally:
        for stream in streams:
            stream.styled = False
