"""Memory that decoding an image takes, estimated from its header."""

from typing import Any

from PIL import Image

from shards.images.tiff import SAMPLES_PER_PIXEL, max_bits_per_sample

STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Bytes of a pixel in Pillow's memory; 4 in all other modes."""
CONVERTING_BYTES = 4 + 3 * 3 + 1
"""Bytes per pixel of what follows: a second image, rotated or in RGB, an RGB array of it, which
NumPy receives in blocks and joins, another or a comparison of it, and an alpha channel."""
WEBP_BYTES = 3 * 4
"""Bytes per pixel of libwebp's canvas and of its copies."""
COEFFICIENT_BYTES = 2
"""Bytes per value of a progressive JPEG, which libjpeg keeps until the last scan."""
TIFF_BUFFERS = 2
"""Copies of a strip or tile that libtiff and Pillow hold."""
TILE_WIDTH, TILE_LENGTH, ROWS_PER_STRIP = 322, 323, 278


def estimate_array(width: int, height: int) -> int:
    """Estimate the bytes that an 8-bit image takes to decode and convert, whatever its format."""
    return width * height * (4 + CONVERTING_BYTES)


def estimate_decoding(image: Image.Image, tags: Any) -> int:
    """Estimate the bytes that an opened image takes to decode, rotate and convert.

    Args:
        image: opened, not decoded.
        tags: of its current frame, if it is a TIFF.
    """
    pixel = STORED_BYTES.get(image.mode, 4) + CONVERTING_BYTES
    extra = 0
    if image.format == "WEBP":
        pixel += WEBP_BYTES
    elif image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        pixel += COEFFICIENT_BYTES * len(image.getbands())
    elif image.format == "TIFF":
        extra = estimate_tiff_buffer(image, tags)
    return image.width * image.height * pixel + extra


def estimate_tiff_buffer(image: Image.Image, tags: Any) -> int:
    """Estimate the bytes that the strips or tiles take, whose size a TIFF declares freely."""
    width, rows = image.width, image.height
    if TILE_WIDTH in tags or TILE_LENGTH in tags:
        width, rows = int(tags.get(TILE_WIDTH, width)), int(tags.get(TILE_LENGTH, rows))
    else:
        rows = min(rows, int(tags.get(ROWS_PER_STRIP, rows)))
    samples = int(tags.get(SAMPLES_PER_PIXEL, len(image.getbands())))
    return TIFF_BUFFERS * width * rows * max(1, samples) * -(-max_bits_per_sample(tags) // 8)
