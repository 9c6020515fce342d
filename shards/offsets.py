"""DALI's index of a shard (`.idx`, v1.2): where each member of each sample lies."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.sample import BORDER_EXTENSION, INFO_EXTENSION, MASK_EXTENSION, DataError


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

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return len(self.data or b"") + self.ends.nbytes

    def line(self, row: int) -> bytes:
        """Return the line of sample `row`. Raises OSError if the file can no longer be read."""
        start, end = int(self.ends[row]) + 1, int(self.ends[row + 1])
        if self.data is not None:
            return self.data[start:end]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)

    def __getitem__(self, row: int) -> SampleRange:
        """Return the members of sample `row`. Raises DataError if a required one is missing."""
        try:
            words = self.line(row).decode().split(" ")
            members = [
                MemberRange(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3])
                for i in range(0, len(words), 4)
            ]
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{self.path}, line {row + 2} is damaged; pack it again") from error
        others = (MASK_EXTENSION, INFO_EXTENSION, BORDER_EXTENSION)
        images = [m for m in members if m.extension not in others]
        mask, info, border = (
            next((m for m in members if m.extension == extension), None) for extension in others
        )
        # Predictions stored without their images are samples too: the mask doubles as the image.
        image = images[0] if images else mask
        if image is None or len(images) > 1:
            raise DataError(
                f"{self.path}, line {row + 2}: a sample has {len(images)} images, expected 1; "
                "pack it again"
            )
        key = image.name.removesuffix(f".{image.extension}")
        return SampleRange(key, image, mask, info, border)


def read_offsets(shard: Path) -> ShardOffsets:
    """Read the `.idx` of a shard on disk. Raises DataError if it is missing or unreadable."""
    path = shard.with_suffix(".idx")
    try:
        return ShardOffsets(path.read_bytes(), str(path), reread=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); pack the data set again") from error
