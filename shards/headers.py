"""What the headers of ordinary JPEG and PNG files say, found far faster than Pillow opens them.

What `pack --verify headers` believes. Anything out of the ordinary (an orientation, transparency,
CMYK, 16 bits, several pictures, a missing end) is left to be decoded.
"""

import struct
from dataclasses import dataclass
from typing import Literal

PNG_BEGIN = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PLAIN_CHUNKS = (b"PLTE", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"sBIT", b"bKGD", b"IDAT")
"""PNG chunks beside which no other changes how the pixels are read."""

JPEG_BEGIN, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of baseline, extended and progressive frames (ITU-T T.81, table B.1)."""
TELLING = (b"Exif\0", b"http", b"MPF\0")
"""How application segments begin that may hold an orientation or further pictures."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of an ordinary file says."""

    size: tuple[int, int]
    """(width, height)."""
    mode: Literal["L", "RGB", "P"]
    palette: bytes = b""
    """Three bytes a colour, for mode P."""


def read_header(data: bytes) -> Header | None:
    """The header of an ordinary JPEG or PNG; None for all else."""
    try:
        if data.startswith(JPEG_BEGIN) and data.endswith(JPEG_END):
            return read_jpeg(data)
        if data.startswith(PNG_BEGIN) and data.endswith(PNG_END):
            return read_png(data)
    except struct.error:
        return None
    return None


def read_jpeg(data: bytes) -> Header | None:
    """Walk the segments up to the frame (ITU-T T.81, B.1.1.4)."""
    at = 2
    while True:
        begin, marker, length = struct.unpack_from(">BBH", data, at)
        if begin != 0xFF or length < 2:
            return None
        if marker in FRAMES:
            bits, height, width, num_bands = struct.unpack_from(">BHHB", data, at + 4)
            if bits != 8 or not width or not height or num_bands not in (1, 3):
                return None
            return Header((width, height), "L" if num_bands == 1 else "RGB")
        application = 0xE1 <= marker <= 0xEF
        ordinary = application or marker in (0xE0, 0xDB, 0xC4, 0xDD, 0xFE)
        if not ordinary or (application and data.startswith(TELLING, at + 4)):
            return None
        at += 2 + length


def read_png(data: bytes) -> Header | None:
    """Walk the chunks, since an orientation may follow the pixels (PNG, W3C 2025, 5.3 and 11)."""
    width, height, bits, colour_type = struct.unpack_from(">IIBB", data, 16)
    palette = b""
    at = 33
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            break
        if kind not in PLAIN_CHUNKS:
            return None
        if kind == b"PLTE":
            palette = data[at + 8 : at + 8 + length]
        at += 12 + length
    match colour_type, bits:
        case 0, 8:
            return Header((width, height), "L")
        case 2, 8:
            return Header((width, height), "RGB")
        case 3, _ if palette:
            return Header((width, height), "P", palette)
        case _:
            return None
