"""The headers of a tar (USTAR, PAX, GNU), walked in bounded time and memory.

`tarfile` reads headers of any claimed size into memory, goes back for negative sizes, takes
quadratic time for some PAX records and keeps every member: it trusts its input too much.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from shards.sample import DataError

BLOCK = 512
MAX_EXTENDED_BYTES = 2**20
"""Size of the records or the long name before a member."""
MAX_PADDING_BYTES = 2**26
"""Zeros after the end marker; a record of GNU tar has 10 KiB by default."""
MAX_DIGITS = 19
"""Decimal digits of a PAX size or record length."""
COPY_REMEDY = "copy or write it again"
OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
GNU_MAGIC = b"ustar  \0"
FILE_TYPES, FOLDER_TYPE, SPARSE_TYPE = b"\x0007", b"5", b"S"
WITHOUT_DATA = b"123456"
"""Types of links, devices, folders and pipes: whatever size they state, the next header follows."""
RECORD_TYPES, GLOBAL_TYPE, LONG_NAME_TYPE, LONG_LINK_TYPE = b"xX", b"g", b"L", b"K"
EXTENDED_TYPES = RECORD_TYPES + GLOBAL_TYPE + LONG_NAME_TYPE + LONG_LINK_TYPE

Kind = Literal["file", "folder", "sparse", "other"]


class TarMember(NamedTuple):
    """A member of a tar."""

    name: str
    offset: int
    """Offset of its first byte of data."""
    size: int
    kind: Kind
    """`other` is a link, a device, a pipe or of a type that is not known."""


@dataclass(slots=True)
class Extension:
    """What headers before a member state about it, or global ones about all later members."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False

    def merge(self, other: "Extension") -> None:
        """Fill in what only the other one states."""
        self.name = other.name if self.name is None else self.name
        self.size = other.size if self.size is None else self.size
        self.sparse |= other.sparse


@dataclass(slots=True)
class TarWalk:
    """The position in a tar whose headers are walked."""

    file: BinaryIO
    path: Path | str
    """Path or URL, for messages."""
    length: int
    """Size of the file in bytes."""
    place: int = 0
    """Offset of the next header."""
    num_members: int = 0
    common: Extension = field(default_factory=Extension)
    """From global headers."""

    def refuse(self, problem: str) -> DataError:
        """Make the error for a damaged tar."""
        return DataError(f"{self.path} is truncated or not a tar ({problem}); {COPY_REMEDY}")

    def read_header(self) -> bytes | None:
        """Read the next header; None at the end marker. Raises DataError if there is neither."""
        self.file.seek(self.place)
        block = self.file.read(BLOCK)
        if len(block) < BLOCK and not self.place:
            raise self.refuse("truncated header" if block else "empty file")
        if len(block) < BLOCK:
            raise DataError(
                f"{self.path} is truncated: no end marker after {self.num_members} members; "
                f"{COPY_REMEDY}"
            )
        if not block.strip(b"\0"):
            return None
        if not has_valid_checksum(block):
            if not self.place:
                raise self.refuse("invalid header")
            raise DataError(
                f"{self.path} is damaged: no tar header at byte {self.place:,}; {COPY_REMEDY}"
            )
        self.place += BLOCK
        return block

    def skip(self, size: int) -> None:
        """Move past data and its padding. Raises DataError if the file ends before."""
        self.place += size + -size % BLOCK
        if self.place > self.length:
            raise self.refuse("unexpected end of data")

    def read_size(self, block: bytes) -> int:
        """Return the size in a header. Raises DataError if it is not a number or negative."""
        size = read_stated_size(block)
        if size is None:
            raise self.refuse(f"invalid size in the header at byte {self.place - BLOCK:,}")
        return size

    def read_extension(self, block: bytes) -> Extension:
        """Read what an extended header states. Raises DataError if it is damaged or too large."""
        size, begin = self.read_size(block), self.place
        if size > MAX_EXTENDED_BYTES:
            raise DataError(
                f"{self.path} has an extended header of {size:,} bytes at byte "
                f"{begin - BLOCK:,}, more than the limit of {MAX_EXTENDED_BYTES:,}; {COPY_REMEDY}"
            )
        self.skip(size)
        data = self.file.read(size)
        kind = block[156:157]
        if kind == LONG_NAME_TYPE:
            return Extension(name=decode_name(data))
        if kind == LONG_LINK_TYPE:
            return Extension()
        try:
            return parse_records(data)
        except ValueError as error:
            raise self.refuse(f"{error} at byte {begin - BLOCK:,}") from error

    def read_member(self) -> TarMember | None:
        """Read the headers of the next member; None at the end marker.

        Raises DataError if the tar is truncated or damaged.
        """
        stated, extended = Extension(), False
        while block := self.read_header():
            if block[156:157] not in EXTENDED_TYPES:
                break
            extension = self.read_extension(block)
            if block[156:157] == GLOBAL_TYPE:
                extension.merge(self.common)
                self.common = extension
            else:
                stated.merge(extension)
                extended = True
        if block is None:
            if extended:
                raise self.refuse("no member after an extended header")
            return None
        stated.merge(self.common)
        return self.finish_member(block, stated)

    def finish_member(self, block: bytes, stated: Extension) -> TarMember:
        """Combine the header of a member with what extended headers state, and skip its data."""
        letter = block[156:157]
        name = read_stated_name(block)
        is_folder = letter == FOLDER_TYPE or (letter == b"\0" and name.endswith("/"))
        name = name if stated.name is None else stated.name
        size = self.read_size(block) if stated.size is None else stated.size
        if letter == SPARSE_TYPE:
            more = block[482]
            while more:
                self.file.seek(self.place)
                self.skip(BLOCK)
                more = self.file.read(BLOCK)[504]
        offset = self.place
        if letter not in WITHOUT_DATA and not is_folder:
            self.skip(size)
        self.num_members += 1
        if is_folder:
            return TarMember(name.rstrip("/"), offset, size, "folder")
        if stated.sparse or letter == SPARSE_TYPE:
            return TarMember(name, offset, size, "sparse")
        return TarMember(name, offset, size, "file" if letter in FILE_TYPES else "other")

    def refuse_data_after_end(self) -> None:
        """Raise DataError if anything but a bounded number of zeros follows the end marker."""
        if self.length - self.place > MAX_PADDING_BYTES:
            raise DataError(
                f"{self.path} has {self.length - self.place:,} bytes after its end marker at byte "
                f"{self.place:,}; split it, or write it again"
            )
        self.file.seek(self.place)
        while block := self.file.read(2**20):
            if block.strip(b"\0"):
                raise DataError(
                    f"{self.path} has data after its end marker at byte {self.place:,}, as "
                    "concatenated tars do; split it, or write it again"
                )


def iter_members(file: BinaryIO, path: Path | str) -> Iterator[TarMember]:
    """Yield the members of an open tar; none of them is kept.

    Raises DataError if it is truncated, damaged or not a tar.
    """
    walk = TarWalk(file, path, file.seek(0, io.SEEK_END))
    while (member := walk.read_member()) is not None:
        yield member
    walk.refuse_data_after_end()


def read_stated_name(block: bytes) -> str:
    """Return the name in a header; headers before it may state a longer one."""
    name = decode_name(block[:100])
    # GNU's own format keeps times where USTAR keeps the folder.
    folder = "" if block[257:265] == GNU_MAGIC else decode_name(block[345:500])
    return f"{folder}/{name}" if folder else name


def read_stated_size(block: bytes) -> int | None:
    """Return the size in a header; None if it is not a number."""
    return parse_number(block[124:136])


def has_valid_checksum(block: bytes) -> bool:
    """Return whether a header has the sum of its bytes, unsigned or (as old programs) signed."""
    field = block[148:156]
    stated = parse_number(field)
    unsigned = sum(block) - sum(field) + 8 * ord(" ")
    if stated == unsigned:
        return True
    negative = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in field)
    return stated == unsigned - 256 * negative


def parse_number(field: bytes) -> int | None:
    """Parse a number of a header: octal, or binary with the first bit set; None for others."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = OCTAL.match(field)
    if digits is None or (digits.end() < len(field) and field[digits.end(1)] != 0):
        return None
    return int(digits[1] or b"0", 8)


def parse_records(data: bytes) -> Extension:
    """Parse PAX records, lines `LENGTH KEY=VALUE` (POSIX.1-2017, pax, extended header).

    Raises ValueError if they are damaged, or if a size is negative or not decimal.
    """
    found = Extension()
    place = 0
    while place < len(data) and data[place]:
        blank = data.find(b" ", place, place + MAX_DIGITS + 1)
        digits = data[place:blank]
        end = place + int(digits) if blank > place and digits.isdigit() else 0
        equals = data.find(b"=", blank, end)
        if not blank < equals < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("damaged PAX record")
        key, value = data[blank + 1 : equals], slice(equals + 1, end - 1)
        if key == b"path":
            found.name = decode_name(data[value]).rstrip("/")
        elif key == b"size":
            digits = data[value]
            if not digits.isdigit() or len(digits) > MAX_DIGITS:
                raise ValueError("PAX size that is not a decimal number")
            found.size = int(digits)
        elif key.startswith(b"GNU.sparse."):
            found.sparse = True
        place = end
    return found


def decode_name(data: bytes) -> str:
    """Decode a name up to its first zero byte; bytes that are not UTF-8 become surrogates."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
