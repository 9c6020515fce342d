"""JSON files larger than memory: the elements of their top-level arrays, with their bytes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.local_files import open_file
from shards.sample import DataError

WINDOW = 8 * 2**20
"""Number of bytes per read."""
MAX_ELEMENT = 512 * 2**20
"""Larger elements are refused: an element has to fit into memory several times."""
SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a top-level array of a JSON file, or a top-level value without elements."""

    key: str
    """Top-level key; empty if the file is an array."""
    value: Any
    start: int
    stop: int
    """The bytes [start, stop) of the file."""
    in_array: bool


class JsonReader:
    """Reads a JSON file element by element; memory is bounded by the largest element."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.offset, self.at = "", 0, 0
        self.decoder = json.JSONDecoder()

    def fill(self, more: int = WINDOW) -> bool:
        """Read more of the file; returns whether there was more."""
        # Latin-1: a character is a byte, so that positions are those of the file.
        data = self.file.read(more).decode("latin-1")
        self.offset += self.at
        self.text, self.at = self.text[self.at :] + data, 0
        return bool(data)

    def peek(self) -> str:
        """Skip white space and return the next character. Raises DataError at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                raise DataError(
                    f"{self.path} ends in the middle of its JSON, after {self.offset:,} bytes; "
                    "it was cut off: export or copy it again"
                )

    def take(self, expected: str) -> str:
        """Skip white space and one of the expected characters. Raises DataError for others."""
        found = self.peek()
        if found not in expected:
            raise self.damaged(self.at)
        self.at += 1
        return found

    def damaged(self, at: int) -> DataError:
        """Build the error for text that is not JSON."""
        near = self.text[at : at + 12].encode("latin-1").decode("utf-8", "replace")
        return DataError(
            f"{self.path} is not valid JSON at byte {self.offset + at:,}: {near!r}; export it again"
        )

    def read_value(self) -> tuple[Any, int, int]:
        """Read a value; returns it with the first byte and the one after the last."""
        self.peek()
        more = WINDOW
        while True:
            try:
                value, stop = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                inside = error.pos < len(self.text) - 64 and "Unterminated" not in error.msg
                if inside or len(self.text) - self.at > MAX_ELEMENT:
                    raise self.damaged(error.pos) from error
                more *= 2
                if not self.fill(more):
                    raise DataError(
                        f"{self.path} ends in the middle of its JSON, after "
                        f"{self.offset + len(self.text):,} bytes; it was cut off: export or copy "
                        "it again"
                    ) from error
                continue
            except RecursionError as error:
                raise DataError(f"{self.path} is nested too deeply; export it again") from error
            # A number may continue beyond the window.
            if stop == len(self.text) and self.fill():
                continue
            text = self.text[self.at : stop]
            start = self.offset + self.at
            self.at = stop
            return decode_text(value, text, self), start, start + len(text)


def decode_text(value: Any, text: str, reader: JsonReader) -> Any:
    """Return a value decoded from Latin-1, or decode its text as UTF-8 if that differs."""
    if text.isascii():
        return value
    try:
        return json.loads(text.encode("latin-1").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{reader.path} is not UTF-8 text; save it as UTF-8") from error


def read_elements(path: Path) -> Iterator[Element]:
    """Yield the elements of the arrays at the top of a JSON file, and its other values there.

    Raises DataError for a file that is not JSON in UTF-8, is cut off, or has a key twice.
    """
    with open_file(path) as file:
        start = file.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16 text; save it as UTF-8")
        if not start:
            raise DataError(f"{path} is empty; export it again")
        reader = JsonReader(file, path)
        reader.offset = 3 if start[:3] == b"\xef\xbb\xbf" else 0
        file.seek(reader.offset)
        if reader.peek() == "[":
            yield from read_array(reader, "")
        elif reader.peek() == "{":
            yield from read_object(reader)
        else:
            raise reader.damaged(reader.at)
        while reader.at < len(reader.text) or reader.fill():
            if reader.text[reader.at] not in SPACE:
                raise reader.damaged(reader.at)
            reader.at += 1


def read_object(reader: JsonReader) -> Iterator[Element]:
    """Yield the values of the object at the top of a file."""
    reader.take("{")
    seen: set[str] = set()
    if reader.peek() == "}":
        reader.take("}")
        return
    while True:
        if reader.peek() != '"':
            raise reader.damaged(reader.at)
        key, _, _ = reader.read_value()
        if key in seen:
            raise DataError(f"{reader.path} has the key {key!r} twice; merge the two")
        seen.add(key)
        reader.take(":")
        if reader.peek() == "[":
            yield from read_array(reader, key)
        else:
            value, start, stop = reader.read_value()
            yield Element(key, value, start, stop, in_array=False)
        if reader.take(",}") == "}":
            return


def read_array(reader: JsonReader, key: str) -> Iterator[Element]:
    """Yield the elements of an array, or an empty list for one without elements."""
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        yield Element(key, [], reader.offset + reader.at, reader.offset + reader.at, in_array=False)
        return
    while True:
        value, start, stop = reader.read_value()
        yield Element(key, value, start, stop, in_array=True)
        if reader.take(",]") == "]":
            return
