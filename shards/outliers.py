"""Files that stand out in a data set: often an overview or another stray file.

Extremes are kept in bounded memory and merged in any order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shards.documents import Byte, Count, Positive
from shards.sample import IGNORE, Channels

NUM_KEPT = 4
"""Files that are kept of each kind of extreme."""
MIN_AREA_RATIO = 4
"""Images are outliers if they have this many times the pixels of the next smaller one."""
MIN_CLASS_SHARE = 0.1
"""A mask is an outlier if it holds more than this share of all pixels of a class."""
MIN_MEAN_RATIO = 4
"""It also has this many times the pixels of an average mask with that class."""


@dataclass(frozen=True, slots=True)
class Outlier:
    """A file that stands out."""

    name: str
    """Path of the image."""
    reason: str


@dataclass(frozen=True, slots=True)
class StoredExtremes:
    """`Extremes` as JSON."""

    channels: dict[Channels, Count]
    coloured: list[str]
    largest: list[tuple[Positive, Positive, Positive, str]]
    shares: list[tuple[Byte, Positive, str]]


@dataclass(slots=True)
class Extremes:
    """The files of a data set that may be outliers."""

    channels: Counter[str] = field(default_factory=Counter)
    """Number of images with each number of channels."""
    coloured: list[str] = field(default_factory=list)
    """The first RGB images by name."""
    largest: list[tuple[int, int, int, str]] = field(default_factory=list)
    """Pixels, width, height and name of the largest images, the largest first."""
    shares: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Largest pixel count of each class index in one mask, and the name of its image."""

    def add(self, name: str, channels: Channels, size: tuple[int, int]) -> None:
        """Add an image; `size`: (width, height)."""
        self.merge(
            Extremes(
                Counter((channels,)),
                [name] if channels == "RGB" else [],
                [(size[0] * size[1], *size, name)],
            )
        )

    def add_mask(self, name: str, pixels: NDArray[np.int64]) -> None:
        """Add the pixel count [256] of each class index; `name`: of the image."""
        for index in np.flatnonzero(pixels[:IGNORE]).tolist():
            self.add_share(index, int(pixels[index]), name)

    def add_share(self, index: int, pixels: int, name: str) -> None:
        """Keep the mask with the most pixels of a class; the first by name of equal ones."""
        known = self.shares.get(index)
        if known is None or (-pixels, name) < (-known[0], known[1]):
            self.shares[index] = (pixels, name)

    def merge(self, other: "Extremes") -> None:
        """Add the extremes of other samples."""
        self.channels.update(other.channels)
        self.coloured = sorted([*self.coloured, *other.coloured])[:NUM_KEPT]
        ranked = sorted([*self.largest, *other.largest], key=lambda file: (-file[0], file[3]))
        self.largest = ranked[:NUM_KEPT]
        for index, (pixels, name) in other.shares.items():
            self.add_share(index, pixels, name)

    def find_outliers(
        self, classes: Sequence[str], pixels: Sequence[int], masks: Sequence[int]
    ) -> list[Outlier]:
        """Find the outliers.

        Args:
            classes: class names by index.
            pixels: pixels of each class in all masks.
            masks: number of masks in which each class occurs.
        """
        return [
            *self.find_coloured(),
            *self.find_large(),
            *self.find_heavy(classes, pixels, masks),
        ]

    def find_coloured(self) -> list[Outlier]:
        """Find the few RGB images among grey ones, at most 1 % or a single one."""
        coloured, grey = self.channels["RGB"], self.channels["L"]
        if grey < 2 or coloured > max(1, (coloured + grey) // 100):
            return []
        reason = f"is RGB, {grey} images are grey: all become RGB"
        return [Outlier(name, reason) for name in self.coloured]

    def find_large(self) -> list[Outlier]:
        """Find the few images that are far larger than all others."""
        for count in range(len(self.largest) - 1, 0, -1):
            _, width, height, _ = self.largest[count]
            if self.largest[count - 1][0] >= MIN_AREA_RATIO * width * height:
                reason = f", no other image is larger than {width} x {height}"
                return [Outlier(n, f"is {w} x {h}{reason}") for _, w, h, n in self.largest[:count]]
        return []

    def find_heavy(
        self, classes: Sequence[str], pixels: Sequence[int], masks: Sequence[int]
    ) -> list[Outlier]:
        """Find masks that hold a large share of all pixels of a class."""
        found = []
        for index, name in enumerate(classes):
            count, source = self.shares.get(index, (0, ""))
            min_share = max(MIN_CLASS_SHARE, MIN_MEAN_RATIO / max(1, masks[index]))
            if count > min_share * pixels[index]:
                share = f"{100 * count / pixels[index]:.3g} %"
                reason = f"has {share} of all pixels of class {name!r}, which {masks[index]} masks"
                found.append(Outlier(source, f"{reason} contain"))
        return found

    def to_plain(self) -> dict[str, Any]:
        """Convert to a dict for JSON."""
        return {
            "channels": dict(sorted(self.channels.items())),
            "coloured": self.coloured,
            "largest": self.largest,
            "shares": [[index, *share] for index, share in sorted(self.shares.items())],
        }

    @classmethod
    def restore(cls, stored: StoredExtremes) -> Self:
        """Restore what `to_plain` returned."""
        shares = {index: (pixels, name) for index, pixels, name in stored.shares}
        return cls(Counter[str](stored.channels), stored.coloured, stored.largest, shares)
