"""Image files -> arrays, exactly as training and prediction see them."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.images.cost import estimate_array
from shards.images.files import (
    ImageFormat,
    ImageRule,
    inspect_image,
    load_pixels,
    open_image,
    read_image,
    read_orientation,
)
from shards.images.headers import JPEG_START, read_image_header
from shards.images.memory import memory_limit
from shards.images.tiff import GREY16_MODES, refuse_inverted_16_bit
from shards.sample import Uint8

try:
    import simplejpeg
except ImportError:  # the extra `turbo`
    simplejpeg = None


Size = tuple[int, int]
"""(width, height)."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image that is decoded and upright, but not yet converted to the data set's channels."""

    pixels: Image.Image | Uint8
    """A Pillow image of any mode, or an array [H, W, C] in the data set's channels."""
    image_format: ImageFormat

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        if isinstance(self.pixels, Image.Image):
            return self.pixels.size
        height, width, _ = self.pixels.shape
        return width, height

    def crop(self, left: int, top: int, right: int, bottom: int) -> Uint8:
        """Convert a region (right and bottom excluded) to uint8 [H, W, C] in the final channels."""
        if not isinstance(self.pixels, Image.Image):
            return self.pixels[top:bottom, left:right]
        box = (left, top, right, bottom)
        entire = box == (0, 0, *self.pixels.size)
        return to_array(self.pixels if entire else self.pixels.crop(box), self.image_format)


def decode_unconverted(data: bytes, image_format: ImageFormat, where: str) -> DecodedImage:
    """Decode an image file without converting its pixels yet.

    Raises DataError if the file is damaged or not covered by the format.
    """
    if (pixels := decode_with_simplejpeg(data, image_format)) is not None:
        return DecodedImage(pixels, image_format)
    rule = ImageRule(alpha=image_format.alpha, max_pixels=image_format.max_pixels)
    opened = open_image(data, where, rule)
    refuse_inverted_16_bit(opened, where)
    image, _ = load_pixels(opened, where)
    inspect_image(image, image_format.alpha, image_format.range is not None, where)
    return DecodedImage(image, image_format)


def decode_with_simplejpeg(data: bytes, image_format: ImageFormat) -> Uint8 | None:
    """Decode an ordinary JPEG with simplejpeg (extra `turbo`), to the same pixels as Pillow.

    Returns uint8 [H, W, C]; None for every file that is left to Pillow, including damaged ones.
    """
    if simplejpeg is None or not data.startswith(JPEG_START):
        return None
    if (header := probe_upright_jpeg(data)) is None:
        return None
    (width, height), mode = header
    # RGB -> L is left to Pillow: the luma stored in a JPEG differs from what Pillow computes.
    if mode not in ("L", image_format.channels) or width * height > image_format.max_pixels:
        return None
    if estimate_array(width, height) > memory_limit():
        # Refused by Pillow's path.
        return None
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if image_format.channels == "L" else "RGB")
    except ValueError:
        return None


def probe_upright_jpeg(data: bytes) -> tuple[tuple[int, int], str] | None:
    """Return ((width, height), mode) of a JPEG that needs no rotation; None for other files."""
    # Far faster than Pillow, but does not recognise files with metadata.
    if (header := read_image_header(data)) is not None:
        return header.size, header.mode
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        upright = image.format == "JPEG" and read_orientation(image) == 1
    except Exception:  # Pillow's decoders raise whatever the bytes provoke
        return None
    return (image.size, image.mode) if upright else None


def decode_image(data: bytes, image_format: ImageFormat, where: str) -> Uint8:
    """Decode an image file to uint8 [H, W, C] in the data set's channels (L: C = 1, RGB: C = 3).

    Raises DataError if the file is damaged or not covered by the format.
    """
    decoded = decode_unconverted(data, image_format, where)
    return decoded.crop(0, 0, *decoded.size)


def decode_file(data: bytes, image_format: ImageFormat, where: str) -> tuple[Uint8, Size]:
    """Decode an image file that was not packed, to the array that packing it would have given.

    Returns uint8 [H, W, C] and (width, height) before it was scaled down. Raises DataError as
    `decode_image`.
    """
    rule = image_format.file_rule()
    if rule.exif == "upright" and rule.frame is None and rule.resize is None:
        pixels = decode_image(data, image_format, where)
        return pixels, (pixels.shape[1], pixels.shape[0])
    stored = read_image(data, rule, where, pixels=False)
    if stored.extension is None and stored.image is not None:
        return to_array(stored.image, image_format), stored.full_size
    return decode_image(stored.data, image_format, where), stored.full_size


def to_array(image: Image.Image, image_format: ImageFormat) -> Uint8:
    """Convert a decoded image to uint8 [H, W, C] in the channels of the format."""
    if image.mode in GREY16_MODES:
        assert image_format.range is not None
        table = build_scale_table(image_format.range)
        grey = table[np.asarray(image).astype(np.uint16)][:, :, None]
        return grey if image_format.channels == "L" else np.repeat(grey, 3, axis=2)
    # Pillow converts CMYK to grey only by way of RGB.
    if image.mode in ("CMYK", "YCbCr") and image_format.channels == "L":
        image = image.convert("RGB")
    converted = (
        image if image.mode == image_format.channels else image.convert(image_format.channels)
    )
    pixels = np.asarray(converted)
    return pixels[:, :, None] if image_format.channels == "L" else pixels


def build_scale_table(bounds: tuple[int, int]) -> Uint8:
    """Build the table [65536] from 16-bit values to 8 bits: linear, `low` -> 0, `high` -> 255."""
    low, high = bounds
    levels = (np.arange(65536) - low) * (255 / max(1, high - low))
    return levels.clip(0, 255).round().astype(np.uint8)
