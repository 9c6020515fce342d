"""DALI's index of a shard (`.idx`, v1.2): where each member of each sample lies."""

import hashlib
import posixpath
from array import array
from copy import copy
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from shards.local_files import open_file, read_file
from shards.sample import BORDER_EXTENSION, INFO_EXTENSION, MASK_EXTENSION, DataError
from shards.tar_headers import read_stated_name, read_stated_size

OTHERS = (MASK_EXTENSION, INFO_EXTENSION, BORDER_EXTENSION)
"""Extensions of members that are not the image."""


class MemberRange(NamedTuple):
    """Byte range of one member in a shard."""

    extension: str
    offset: int
    size: int
    name: str


class SampleRange(NamedTuple):
    """Byte ranges of the members of one sample in a shard."""

    key: str
    image: MemberRange
    mask: MemberRange | None
    info: MemberRange | None
    """None in shards written by other programs."""
    border: MemberRange | None
    """None if no border maps were requested."""


class ShardOffsets:
    """The `.idx` of one shard, parsed one sample at a time.

    Args:
        data: content of the file.
        path: path or URL of the file.
        reread: the file is local, and each line is read again when it is needed; otherwise the
            content is kept in memory.

    Raises DataError if the content is truncated or not an `.idx`.
    """

    def __init__(self, data: bytes, path: str, *, reread: bool = False) -> None:
        header, _, _ = data.partition(b"\n")
        version, _, count = header.partition(b" ")
        newlines = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        # 4 bytes per line: a data set of a million samples has as many lines in each process.
        self.ends = newlines.astype(np.uint32)
        complete = data.endswith(b"\n") and count.isdigit() and int(count) == len(self.ends) - 1
        if version != b"v1.2" or not complete:
            raise DataError(f"{path} is truncated or not a v1.2 .idx; pack the data set again")
        self.path, self.data = path, None if reread else data
        self.rows: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ends) - 1 if self.rows is None else len(self.rows)

    def select(self, rows: tuple[int, ...]) -> Self:
        """Return the offsets of the samples in some rows, numbered from 0."""
        selected = copy(self)
        selected.rows = rows
        return selected

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.data or b"") + self.ends.nbytes

    def line(self, row: int) -> bytes:
        """Return the line of sample `row`. Raises OSError if the file can no longer be read."""
        start, end = int(self.ends[row]) + 1, int(self.ends[row + 1])
        if self.data is not None:
            return self.data[start:end]
        with open_file(self.path, 0) as file:
            file.seek(start)
            return file.read(end - start)

    def __getitem__(self, row: int) -> SampleRange:
        """Return the members of sample `row`. Raises DataError if a required one is missing."""
        row = row if self.rows is None else self.rows[row]
        try:
            words = self.line(row).split(b" ")
            members = [
                MemberRange(
                    words[i].decode(),
                    parse_decimal(words[i + 1]),
                    parse_decimal(words[i + 2]),
                    words[i + 3].decode(),
                )
                for i in range(0, len(words), 4)
            ]
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{self.path}, line {row + 2} is damaged; pack it again") from error
        images = [m for m in members if m.extension not in OTHERS]
        mask, info, border = (
            next((m for m in members if m.extension == extension), None) for extension in OTHERS
        )
        # Predictions stored without their images are samples too: the mask doubles as the image.
        image = images[0] if images else mask
        if image is None or len(images) > 1:
            raise DataError(
                f"{self.path}, line {row + 2}: a sample has {len(images)} images, expected 1; "
                "pack it again"
            )
        if (problem := find_contradiction(image, members)) is not None:
            raise DataError(f"{self.path}, line {row + 2}: {problem}; pack it again")
        key = image.name.removesuffix(f".{image.extension}")
        return SampleRange(key, image, mask, info, border)


def parse_decimal(word: bytes) -> int:
    """Parse decimal digits, without the signs, blanks and underscores that `int` takes.

    Raises ValueError for anything else.
    """
    if not word.isdigit() or len(word) > 19:
        raise ValueError("not a decimal number")
    return int(word)


def find_contradiction(image: MemberRange, members: list[MemberRange]) -> str | None:
    """Describe members that cannot be those of one sample; None if they can."""
    if len({member.extension for member in members}) < len(members):
        return "a sample has two members of one extension"
    for member in members:
        # A mask of another program has an extension of its own.
        named = member.name.lower().endswith(f".{member.extension.lower()}")
        if not named and member.extension != MASK_EXTENSION:
            return f"{member.name} is listed as .{member.extension}"
    if len(members) > 1:
        # Without an image, the mask of another program no longer gives the key.
        by_name = image.extension != MASK_EXTENSION
        key = posixpath.normpath(image.name[: -len(image.extension) - 1]) + "."
        for member in members:
            if by_name and not posixpath.normpath(member.name).startswith(key):
                return f"{member.name} and {image.name} have different keys"
            if member is not image and member.offset == image.offset:
                return f"{member.name} and {image.name} are the same bytes"
    elif image.extension != MASK_EXTENSION and image.name.endswith(f".{MASK_EXTENSION}"):
        return f"{image.name} is a mask, listed as an image"
    return None


def refuse_other_header(block: bytes, member: MemberRange, where: str) -> None:
    """Raise DataError if the tar header before a member has another name or size."""
    stated = read_stated_name(block)
    # Other programs shorten names that do not fit, and state them before.
    shortened = not member.name.isascii() or len(member.name) > 100
    if read_stated_size(block) != member.size or (stated != member.name and not shortened):
        raise DataError(
            f"{where}: the .idx lists {member.name} with {member.size:,} bytes at byte "
            f"{member.offset:,}, but the tar has another member there; copy or pack the data set "
            "again"
        )


def check_offsets(offsets: ShardOffsets, data: bytes, sha256: str | None) -> ShardOffsets:
    """Return the offsets of a shard, checked.

    Raises DataError if the `.idx` is not the one in the manifest or, where that has no sha256 of
    it, if a member is listed twice.
    """
    if sha256 is not None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(
                f"{offsets.path} does not match the manifest (sha256); copy or pack it again"
            )
        return offsets
    starts = array("q")
    for line in data.split(b"\n")[1:]:
        # Damaged lines are reported when they are read.
        words = line.split(b" ")[1::4]
        starts.extend(int(word) for word in words if word.isdigit() and len(word) < 19)
    if len(np.unique(np.frombuffer(starts, np.int64))) < len(starts):
        raise DataError(f"{offsets.path} lists a member twice; copy or pack it again")
    return offsets


def read_offsets(shard: Path, sha256: str | None = None) -> ShardOffsets:
    """Read the `.idx` of a shard on disk; `sha256`: as in the manifest, if it has one.

    Raises DataError if it is missing, unreadable or changed.
    """
    path = shard.with_suffix(".idx")
    try:
        data = read_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); pack the data set again") from error
    return check_offsets(ShardOffsets(data, str(path), reread=True), data, sha256)
