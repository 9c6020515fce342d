"""Training crops: choose a square of an image and cut it out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.loading.augment import AugmentConfig, Purpose, draw_factor, uniform
from shards.images.pixels import DecodedImage
from shards.sample import IGNORE, Uint8


@dataclass(frozen=True, slots=True)
class Box:
    """The square of an image that becomes a crop; it may extend beyond the image."""

    left: int
    top: int
    side: int


@dataclass(frozen=True, slots=True)
class Cropper:
    """Cuts a square out of an image, its mask and its border map."""

    config: AugmentConfig
    size: int
    """Side of the crops in pixels."""
    fill: tuple[int, ...]
    """Colour of the padding around images that are smaller than a crop."""
    rare: tuple[int, ...]
    """Classes that a share of the crops is centred on."""
    seed: int
    margin: int = 0
    """Pixels on each side of a crop that are context only, for networks without padding. Beyond the
    image they are mirrored, as in the U-Net paper (figure 2)."""

    def __call__(self, image: DecodedImage, mask: Uint8, position: int) -> tuple[Uint8, Uint8]:
        """Cut the crop of a sample.

        Args:
            image: H x W pixels.
            mask: uint8 [H, W].
            position: position of the sample in the stream, which seeds the crop.

        Returns:
            Image uint8 [size, size, C] and mask uint8 [size, size]. Beyond the image, the image is
            `fill`, or mirrored if there is a margin, and the mask is 255.
        """
        box = self.choose_box(mask, position)
        return self.cut_image(image, box), self.cut_mask(mask, box)

    def choose_box(self, mask: Uint8, position: int) -> Box:
        """Choose the crop of the sample at a position of the stream; mask: uint8 [H, W]."""
        height, width = mask.shape
        draws = uniform(self.seed, position, Purpose.CROP, 5)
        side = self.choose_side(draws[2:4], min(height, width) + 2 * self.margin)
        margin = self.scale_margin(side)
        limits = [length - (side - 2 * margin) for length in mask.shape]
        corner = [
            int(draw * (max(0, end) + 1)) for draw, end in zip(draws[:2], limits, strict=True)
        ]
        if draws[4] < self.config.foreground_share and max(limits) > 0:
            centre = self.draw_rare_pixel(mask, position)
            if centre is not None:
                half = side // 2 - margin
                corner = [
                    min(max(0, c - half), max(0, end))
                    for c, end in zip(centre, limits, strict=True)
                ]
        top, left = (
            # An image smaller than the crop is centred in it.
            first - margin if end >= 0 else -((side - length) // 2)
            for first, end, length in zip(corner, limits, (height, width), strict=True)
        )
        return Box(left, top, side)

    def scale_margin(self, side: int) -> int:
        """Return the margin in pixels of the image if `side` of them are resized to a crop."""
        return round(self.margin * side / self.size)

    def cut_image(self, image: DecodedImage, box: Box) -> Uint8:
        """Cut a box out of an image and resize it: uint8 [size, size, C]."""
        width, height = image.size
        inside = clip_box(box, height, width)
        padding = measure_padding(box, height, width)
        part = pad(image.crop(*inside), padding, None if self.margin else self.fill)
        return self.resize(part, Image.Resampling.BILINEAR)

    def cut_mask(self, mask: Uint8, box: Box) -> Uint8:
        """Cut a box out of a mask and resize it: uint8 [size, size]; 255 beyond the mask."""
        left, top, right, bottom = clip_box(box, *mask.shape)
        padding = measure_padding(box, *mask.shape)
        part = pad(mask[top:bottom, left:right], padding, (IGNORE,))
        return self.resize(part, Image.Resampling.NEAREST)

    def cut_border(self, border: Uint8, box: Box) -> Uint8:
        """Cut a box out of a border map and resize it: uint8 [size, size]; 0 beyond the map."""
        left, top, right, bottom = clip_box(box, *border.shape)
        padding = measure_padding(box, *border.shape)
        part = pad(border[top:bottom, left:right], padding, (0,))
        return self.resize(part, Image.Resampling.BILINEAR)

    def resize(self, part: Uint8, resampling: Image.Resampling) -> Uint8:
        """Resize a square array [s, s] or [s, s, C] to the size of the crops."""
        if len(part) == self.size:
            return part
        flat = part[..., 0] if part.shape[2:] == (1,) else part
        image = Image.fromarray(np.ascontiguousarray(flat)).resize(
            (self.size, self.size), resampling
        )
        return np.asarray(image).reshape(self.size, self.size, *part.shape[2:])

    def choose_side(self, draws: NDArray[np.float64], max_side: int) -> int:
        """Choose the side of a crop before resizing; more than `size` only up to `max_side`."""
        if draws[0] >= self.config.warp_share:
            return self.size
        side = max(1, round(self.size * draw_factor(draws[1], self.config.scale)))
        return min(side, max(self.size, max_side))

    def draw_rare_pixel(self, mask: Uint8, position: int) -> tuple[int, int] | None:
        """Draw a pixel (row, column) of a rare class; None if the mask has none."""
        draws = uniform(self.seed, position, Purpose.FOREGROUND, len(self.rare) + 1)
        for place in np.argsort(draws[1:], kind="stable"):
            pixels = np.flatnonzero(mask == self.rare[place])
            if len(pixels):
                row, column = divmod(int(pixels[int(draws[0] * len(pixels))]), mask.shape[1])
                return row, column
        return None


def clip_box(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """Clip a box to an image; returns left, top, right, bottom."""
    right, bottom = min(width, box.left + box.side), min(height, box.top + box.side)
    return max(0, box.left), max(0, box.top), right, bottom


def measure_padding(box: Box, height: int, width: int) -> list[tuple[int, int]]:
    """Return how far a box extends beyond an image: (above, below), (left, right) in pixels."""
    sides = ((box.top, height), (box.left, width))
    return [(max(0, -start), max(0, start + box.side - length)) for start, length in sides]


def pad(pixels: Uint8, padding: list[tuple[int, int]], fill: tuple[int, ...] | None) -> Uint8:
    """Pad an array [h, w] or [h, w, C] with a colour; None: mirror it."""
    if not any(map(any, padding)):
        return pixels
    if fill is None:
        return np.pad(pixels, [*padding, (0, 0)], mode="reflect")
    (above, below), (left, right) = padding
    height, width = pixels.shape[:2]
    shape = (above + height + below, left + width + right)
    colour = np.array(fill, dtype=np.uint8)
    whole = np.broadcast_to(colour, (*shape, len(fill))).reshape(*shape, *pixels.shape[2:]).copy()
    whole[above : above + height, left : left + width] = pixels
    return whole
