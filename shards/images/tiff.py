"""What a file declares about its samples and Pillow would lose without a warning."""

import io
import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from shards.sample import DataError

OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
RAW_MODES = {
    f"{bands};16{order}": f"{bands};16{other}"
    for bands in ("RGB", "RGBA", "RGBX")
    for order, other in OTHER_ORDER.items()
}
"""Pillow's raw modes of 16-bit colours -> those of the other byte order."""
GREY16_MODES = ("I;16", "I;16B", "I;16L", "I")
"""Pillow's modes of grey images with more than 8 bits."""
MAX_FRAMES = 10_000
"""Pillow compares the place of every frame with all before it: it takes minutes for 60,000."""
FIRST_OFFSETS = {
    b"II*\0": ("<", "I", 4, "H", 12),
    b"MM\0*": (">", "I", 4, "H", 12),
    b"II+\0": ("<", "Q", 8, "Q", 20),
    b"MM\0+": (">", "Q", 8, "Q", 20),
}
"""Start of a TIFF -> byte order, type of offsets, place of the first one, type of the number of
entries, and bytes of an entry (TIFF 6.0, section 2; BigTIFF)."""
BITS_PER_SAMPLE = 258
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
SAMPLES_PER_PIXEL = 277
GEO_TAGS = (33550, 33922, 34264, 34735)
"""ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory (GeoTIFF 1.1, section 7)."""


def read_tiff_tags(image: Image.Image) -> Any:
    """Return the tags of the current frame of a TIFF; an empty dict for other formats."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def refuse_tiff_tags(tags: Any, num_bands: int, where: str) -> None:
    """Raise DataError for TIFF bands that Pillow would ignore or a georeference that would be lost.

    Args:
        tags: of the frame.
        num_bands: bands that Pillow reads.
        where: name of the file in the message.
    """
    samples = int(tags.get(SAMPLES_PER_PIXEL, num_bands))
    if samples > max(num_bands, 1):
        raise DataError(
            f"{where} has {samples} bands; images have 1 (grey) or 3 (RGB), and optionally an "
            "alpha channel: export the bands that you need to a file of their own"
        )
    if any(tag in tags for tag in GEO_TAGS):
        raise DataError(
            f"{where} has a georeference (GeoTIFF), which would be lost; "
            "export it as plain TIFF or PNG"
        )


def max_bits_per_sample(tags: Any) -> int:
    """Return the largest number of bits of any channel in the tags of a TIFF."""
    return int(np.ravel(tags.get(BITS_PER_SAMPLE, 8)).max())


def is_truncated_to_8_bits(image: Image.Image, tags: Any) -> bool:
    """Return whether Pillow truncates 16-bit channels to 8, by the tags or the codec's raw mode."""
    if tags and max_bits_per_sample(tags) > 8 and image.mode != "F":
        return True
    tiles = getattr(image, "tile", [])
    return any(";16" in word for tile in tiles for word in iter_strings(tile[3]))


def repeats_8_bits(data: bytes, image: Image.Image) -> bool:
    """Return whether every 16-bit value of a colour image is k * 257, so that 8 bits hold it.

    Pillow keeps the high byte of each value; decoded in the other byte order, it keeps the low one.

    Args:
        data: the file's bytes.
        image: the file opened at its frame, not yet decoded.
    """
    if "transparency" in image.info or image.format not in ("PNG", "TIFF"):
        return False
    decoded = []
    try:
        for swap in (False, True):
            with Image.open(io.BytesIO(data), formats=(image.format,)) as copy:
                copy.seek(image.tell())
                raw_modes = {word for tile in copy.tile for word in iter_strings(tile[3])}
                if not raw_modes & RAW_MODES.keys():
                    return False
                if swap:
                    copy.tile = [tile._replace(args=swap_bytes(tile.args)) for tile in copy.tile]
                decoded.append(np.asarray(copy))
    except Exception:  # a damaged file is reported when it is decoded
        return True
    return np.array_equal(*decoded)


def swap_bytes(arguments: Any) -> Any:
    """Exchange the byte order of the raw mode among the arguments of a codec."""
    if isinstance(arguments, tuple):
        return tuple(map(swap_bytes, arguments))
    return RAW_MODES.get(arguments, arguments) if isinstance(arguments, str) else arguments


def iter_strings(arguments: object) -> Iterator[str]:
    """Yield the strings among the arguments of a codec."""
    if isinstance(arguments, str):
        yield arguments
    elif isinstance(arguments, tuple):
        yield from (item for item in arguments if isinstance(item, str))


def refuse_inverted_16_bit(image: Image.Image, where: str) -> None:
    """Raise DataError for a 16-bit TIFF with white as 0, which Pillow does not invert."""
    if image.mode in GREY16_MODES and read_tiff_tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise DataError(f"{where} is 16-bit with white as 0; save it with black as 0")


def refuse_many_frames(data: bytes, where: str) -> None:
    """Raise DataError for a TIFF with more than MAX_FRAMES directories, before Pillow opens it."""
    if (form := FIRST_OFFSETS.get(data[:4])) is None:
        return
    order, offset_type, place, count_type, entry_bytes = form
    count, next_offset = struct.Struct(order + count_type), struct.Struct(order + offset_type)
    seen: set[int] = set()
    try:
        (offset,) = next_offset.unpack_from(data, place)
        while offset and offset not in seen:
            seen.add(offset)
            if len(seen) > MAX_FRAMES:
                raise DataError(
                    f"{where} has more than {MAX_FRAMES:,} frames; export those that you need to "
                    "files of their own"
                )
            (entries,) = count.unpack_from(data, offset)
            (offset,) = next_offset.unpack_from(data, offset + count.size + entries * entry_bytes)
    except struct.error:
        # Damaged, as Pillow reports.
        return
