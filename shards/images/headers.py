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


UNREAD_FORMATS = (
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (0, b"8BPS", "Photoshop"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF\r\n", "HDF5"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%PDF", "PDF"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"\0\0\x01\0", "an icon"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"<svg", "SVG"),
    *((0, b"P%d" % n + end, "PNM") for n in range(1, 8) for end in (b"\n", b" ", b"\r")),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftyphev", "HEIF"),
    (4, b"ftypmif1", "HEIF or AVIF"),
    (4, b"ftypmsf1", "HEIF or AVIF"),
)
"""(offset, first bytes, name) of formats that Pillow is not allowed to read, or cannot."""


def detect_unread_format(data: bytes) -> str | None:
    """Return the name of an image format that is not read; None for others and damaged files."""
    for offset, magic, name in UNREAD_FORMATS:
        if data.startswith(magic, offset):
            return name
    return detect_unread_jpeg(data) if data.startswith(JPEG_START) else None


def detect_unread_jpeg(data: bytes) -> str | None:
    """Return the kind of a JPEG of other than 8 bits, lossless or arithmetic-coded, else None."""
    offset = 2
    while offset + 5 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:
            offset += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits = data[offset + 4]
            if marker in (0xC3, 0xC7, 0xCB, 0xCF):
                return f"a lossless JPEG of {bits} bits"
            return None if bits == 8 else f"a JPEG of {bits} bits"
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return None
