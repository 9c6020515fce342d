"""Size and mode of ordinary JPEG and PNG files from their headers, far faster than with Pillow.

`unet pack --verify headers` relies on it. Files with an orientation, transparency, CMYK, 16 bits,
several images or a missing end are not recognised and have to be decoded.
"""

import struct
from dataclasses import dataclass
from typing import Literal

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PLAIN_CHUNKS = (b"PLTE", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"sBIT", b"bKGD", b"IDAT")
"""PNG chunks that leave the meaning of the pixels to the header."""
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
FRAME_MARKERS = (0xC0, 0xC1, 0xC2)
"""Markers of baseline, extended and progressive frames (ITU-T T.81, table B.1)."""
METADATA_PREFIXES = (b"Exif\0", b"http", b"MPF\0")
"""First bytes of application segments that may hold an orientation or further images."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The header of an ordinary file."""

    size: tuple[int, int]
    """(width, height)."""
    mode: Literal["L", "RGB", "P"]
    palette: bytes = b""
    """Three bytes per colour, for mode P."""


def read_image_header(data: bytes) -> ImageHeader | None:
    """Read the header of an ordinary JPEG or PNG; None for any other file."""
    try:
        if data.startswith(JPEG_START) and data.endswith(JPEG_END):
            return read_jpeg_header(data)
        if data.startswith(PNG_START) and data.endswith(PNG_END):
            return read_png_header(data)
    except struct.error:
        return None
    return None


def read_jpeg_header(data: bytes) -> ImageHeader | None:
    """Walk the segments of a JPEG up to the frame header (ITU-T T.81, B.1.1.4)."""
    offset = 2
    while True:
        prefix, marker, length = struct.unpack_from(">BBH", data, offset)
        if prefix != 0xFF or length < 2:
            return None
        if marker in FRAME_MARKERS:
            bits, height, width, num_bands = struct.unpack_from(">BHHB", data, offset + 4)
            if bits != 8 or not width or not height or num_bands not in (1, 3):
                return None
            return ImageHeader((width, height), "L" if num_bands == 1 else "RGB")
        application = 0xE1 <= marker <= 0xEF
        ordinary = application or marker in (0xE0, 0xDB, 0xC4, 0xDD, 0xFE)
        if not ordinary or (application and data.startswith(METADATA_PREFIXES, offset + 4)):
            return None
        offset += 2 + length


def read_png_header(data: bytes) -> ImageHeader | None:
    """Walk all chunks of a PNG: an orientation may follow the pixels (W3C 2025, 5.3 and 11)."""
    width, height, bits, colour_type = struct.unpack_from(">IIBB", data, 16)
    palette = b""
    offset = 33
    while True:
        length, kind = struct.unpack_from(">I4s", data, offset)
        if kind == b"IEND":
            break
        if kind not in PLAIN_CHUNKS:
            return None
        if kind == b"PLTE":
            palette = data[offset + 8 : offset + 8 + length]
        offset += 12 + length
    match colour_type, bits:
        case 0, 8:
            return ImageHeader((width, height), "L")
        case 2, 8:
            return ImageHeader((width, height), "RGB")
        case 3, _ if palette:
            return ImageHeader((width, height), "P", palette)
        case _:
            return None
