"""Which square of an image becomes a training crop, and cutting it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.loading.augment import AugmentConfig, Purpose, factor, uniform
from shards.images.pixels import DecodedImage
from shards.sample import IGNORE, Uint8


@dataclass(frozen=True, slots=True)
class Box:
    """A square of an image that becomes a crop; it may reach beyond the picture."""

    left: int
    top: int
    side: int


@dataclass(frozen=True, slots=True)
class Cropper:
    """Cuts a square out of each image and its mask."""

    config: AugmentConfig
    size: int
    """Side of the crops in pixels."""
    fill: tuple[int, ...]
    """Colour around images that are smaller than a crop."""
    rare: tuple[int, ...]
    """Classes that some crops are centred on."""
    seed: int
    margin: int = 0
    """Pixels on each side of a crop that are context only, for networks without padding. They may
    lie beyond the image, which is then mirrored, as in the paper of 2015 (figure 2)."""

    def __call__(self, image: DecodedImage, mask: Uint8, position: int) -> tuple[Uint8, Uint8]:
        """The crop of the sample at a position of the stream.

        Args:
            image: of any size.
            mask: uint8 [H, W], of the same size.
            position: where the sample stands in the stream.

        Returns:
            uint8 [size, size, C] and [size, size]; what the image does not cover is `fill`, or
            mirrored where there is a margin, and 255.
        """
        box = self.place(mask, position)
        return self.cut_image(image, box), self.cut_mask(mask, box)

    def place(self, mask: Uint8, position: int) -> Box:
        """Where the crop of the sample at a position lies in its image; mask: uint8 [H, W]."""
        height, width = mask.shape
        draws = uniform(self.seed, position, Purpose.CROP, 5)
        side = self.side(draws[2:4], min(height, width) + 2 * self.margin)
        margin = self.scaled_margin(side)
        room = [length - (side - 2 * margin) for length in mask.shape]
        corner = [int(draw * (max(0, most) + 1)) for draw, most in zip(draws, room, strict=False)]
        if draws[4] < self.config.foreground_share and max(room) > 0:
            center = self.rare_pixel(mask, position)
            if center is not None:
                half = side // 2 - margin
                corner = [
                    min(max(0, c - half), max(0, most))
                    for c, most in zip(center, room, strict=True)
                ]
        top, left = (
            # An image that is too small lies in the middle.
            first - margin if most >= 0 else -((side - length) // 2)
            for first, most, length in zip(corner, room, (height, width), strict=True)
        )
        return Box(left, top, side)

    def scaled_margin(self, side: int) -> int:
        """The margin in pixels of an image of which `side` become a crop."""
        return round(self.margin * side / self.size)

    def cut_image(self, image: DecodedImage, box: Box) -> Uint8:
        """The part of an image in a box, uint8 [size, size, C]."""
        width, height = image.size
        inside = clipped(box, height, width)
        around = beyond(box, height, width)
        part = padded(image.crop(*inside), around, None if self.margin else self.fill)
        return self.resized(part, Image.Resampling.BILINEAR)

    def cut_mask(self, mask: Uint8, box: Box) -> Uint8:
        """The part of a mask in a box, uint8 [size, size]; 255 beyond it."""
        left, top, right, bottom = clipped(box, *mask.shape)
        part = padded(mask[top:bottom, left:right], beyond(box, *mask.shape), (IGNORE,))
        return self.resized(part, Image.Resampling.NEAREST)

    def cut_border(self, border: Uint8, box: Box) -> Uint8:
        """The part of a border map in a box, uint8 [size, size]; 0 beyond it."""
        left, top, right, bottom = clipped(box, *border.shape)
        part = padded(border[top:bottom, left:right], beyond(box, *border.shape), (0,))
        return self.resized(part, Image.Resampling.BILINEAR)

    def resized(self, part: Uint8, how: Image.Resampling) -> Uint8:
        """A square array [h, w] or [h, w, C] with the side of the crops."""
        if len(part) == self.size:
            return part
        flat = part[..., 0] if part.shape[2:] == (1,) else part
        image = Image.fromarray(np.ascontiguousarray(flat)).resize((self.size, self.size), how)
        return np.asarray(image).reshape(self.size, self.size, *part.shape[2:])

    def side(self, draws: NDArray[np.float64], shorter: int) -> int:
        """Side of what a crop shows; more than `size` only as far as the image reaches."""
        if draws[0] >= self.config.warp_share:
            return self.size
        side = max(1, round(self.size * factor(draws[1], self.config.scale)))
        return min(side, max(self.size, shorter))

    def rare_pixel(self, mask: Uint8, position: int) -> tuple[int, int] | None:
        """Row and column of some pixel of a rare class, None where the mask holds none."""
        draws = uniform(self.seed, position, Purpose.FOREGROUND, len(self.rare) + 1)
        for place in np.argsort(draws[1:], kind="stable"):
            found = np.flatnonzero(mask == self.rare[place])
            if len(found):
                row, column = divmod(int(found[int(draws[0] * len(found))]), mask.shape[1])
                return row, column
        return None


def clipped(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """What of a box lies in an image: left, top, right, bottom."""
    right, bottom = min(width, box.left + box.side), min(height, box.top + box.side)
    return max(0, box.left), max(0, box.top), right, bottom


def beyond(box: Box, height: int, width: int) -> list[tuple[int, int]]:
    """How far a box reaches beyond an image: (above, below), (left, right)."""
    ends = ((box.top, height), (box.left, width))
    return [(max(0, -begin), max(0, begin + box.side - length)) for begin, length in ends]


def padded(pixels: Uint8, around: list[tuple[int, int]], fill: tuple[int, ...] | None) -> Uint8:
    """An array [h, w] or [h, w, C] with more pixels around it, of one colour; None: mirrored."""
    if not any(map(any, around)):
        return pixels
    if fill is None:
        return np.pad(pixels, [*around, (0, 0)], mode="reflect")
    (above, below), (left, right) = around
    height, width = pixels.shape[:2]
    shape = (above + height + below, left + width + right)
    colour = np.array(fill, dtype=np.uint8)
    whole = np.broadcast_to(colour, (*shape, len(fill))).reshape(*shape, *pixels.shape[2:]).copy()
    whole[above : above + height, left : left + width] = pixels
    return whole
