"""What one sample is: its key, its members in a tar, and how bytes become arrays and back."""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Channels = Literal["L", "RGB"]
Palette = tuple[tuple[int, int, int], ...]
Uint8 = NDArray[np.uint8]

IGNORE = 255
"""Mask value of pixels that count nowhere."""

MAX_KEY_BYTES = 90
"""A key and the longest extension must fit the 100 bytes of a USTAR name."""

MAX_PIXELS = 1_000_000_000
"""Pictures with more pixels are refused unopened: a small file can claim any size."""

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings, in lower case, of files that are taken for pictures or masks."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The Pillow decoders that may see a file: an archive cannot choose a more obscure one."""

MASK_EXTENSION = "mask.png"
INFO_EXTENSION = "json"

EXIF_ORIENTATION = 0x0112

# Ours is checked for every picture, with its name; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None


class DataError(Exception):
    """Data that is refused. Its text is one line: what, where, what to do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A decoded sample."""

    key: str
    image: Uint8
    """[H, W, C], C = 1 or 3."""
    mask: Uint8 | None
    """Class indices [H, W], 255 = ignore; None where unlabelled."""


def encode_key(path: PurePosixPath) -> str:
    """The key of a picture: its relative path without extension, made safe for a tar member.

    Reversible: every character but `A-Z a-z 0-9 _ - /` is percent-encoded, so no two paths share
    a key. A key of more than 90 bytes becomes `%sha256-` and the hash of the path (no encoded
    path can look like that); the full path stands in the sample's json.
    """
    stem = str(path.with_suffix(""))
    # quote() leaves . and ~ alone whatever it is told; webdataset splits at the first dot.
    key = quote(stem, safe="/", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    if len(key) <= MAX_KEY_BYTES:
        return key
    return "%sha256-" + hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()


def decode_key(key: str) -> str | None:
    """The relative path without extension, or None where the key is a hash."""
    return None if key.startswith("%sha256-") else unquote(key, errors="surrogateescape")


def open_image(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture or mask, opened but not decoded.

    Raises DataError for what is no picture, has several frames or too many pixels; `where` names
    the file in the message.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        num_frames = getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke
        what = "is empty" if not data else "is no picture that can be read"
        raise DataError(f"{where} {what}; repair or remove it") from error
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{where} claims {image.width} x {image.height} pixels, more than {max_pixels:,}; "
            "cut it into smaller pictures"
        )
    if num_frames > 1:
        raise DataError(
            f"{where} holds {num_frames} frames; write the one that is meant to a file of its own"
        )
    return image


def load(image: Image.Image, where: str) -> tuple[Image.Image, bool]:
    """All pixels decoded, and upright as the EXIF orientation says; and whether it said so.

    Raises DataError on a damaged file.
    """
    try:
        # A PNG's orientation may follow its pixels; a TIFF is turned, and it forgotten, by load().
        before = 1 if image.format == "PNG" else image.getexif().get(EXIF_ORIENTATION, 1)
        image.load()
        after = image.getexif().get(EXIF_ORIENTATION, 1)
        upright = ImageOps.exif_transpose(image) if after not in (0, 1) else image
        return upright, before not in (0, 1) or after not in (0, 1)
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke
        raise DataError(f"{where} is damaged ({error}); repair or remove it") from error


def channels_of(image: Image.Image, where: str) -> Channels:
    """What a decoded picture holds. Raises DataError for what would lose something unsaid."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        raise DataError(
            f"{where} has more than 8 bits a pixel (mode {image.mode}), which is not supported "
            "yet; scale it to 8 bits"
        )
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise DataError(f"{where} has mode {image.mode}, which is not supported; convert it to RGB")
    if image.has_transparency_data:
        least, _ = image.convert("RGBA").getchannel("A").getextrema()
        if least != 255:
            raise DataError(f"{where} has transparent pixels; flatten it onto a background")
    if image.mode in ("P", "PA"):
        colours = np.asarray(image.convert("RGB"))
        return "L" if (colours == colours[..., :1]).all() else "RGB"
    return "RGB" if image.mode in ("RGB", "RGBA") else "L"


def decode_image(data: bytes, channels: Channels, where: str) -> Uint8:
    """Picture bytes -> uint8 [H, W, C] in the data set's channels (L: C = 1, RGB: C = 3)."""
    image, _ = load(open_image(data, where), where)
    channels_of(image, where)
    pixels = np.asarray(image if image.mode == channels else image.convert(channels))
    return pixels[:, :, None] if channels == "L" else pixels


def decode_mask(data: bytes, where: str) -> Uint8:
    """Bytes of a canonical mask (PNG, mode P or L) -> class indices uint8 [H, W]."""
    image, _ = load(open_image(data, where), where)
    if image.mode not in ("P", "L"):
        raise DataError(f"{where} is no canonical mask: mode {image.mode}, not P; pack it again")
    return np.asarray(image)


def encode_mask(mask: Uint8, palette: Palette) -> bytes:
    """Class indices uint8 [H, W] -> PNG of mode P, seen in the colours of its classes."""
    image = Image.fromarray(mask).copy()
    image.putpalette(palette_bytes(palette))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """A picture as PNG without metadata (an orientation already applied must not stay behind)."""
    clean = image.copy()
    clean.info.clear()
    out = io.BytesIO()
    clean.save(out, "PNG", exif=b"")
    return out.getvalue()


def palette_bytes(palette: Palette) -> bytes:
    """The 768 bytes of a PNG palette: the classes from 0, white for 255 (ignore), else grey."""
    table = np.full((256, 3), 128, dtype=np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 255
    return table.tobytes()


def default_palette(classes: tuple[str, ...]) -> Palette:
    """Distinct colours; black for `background` and for the first of two classes."""
    plain = len(classes) == 2 or (bool(classes) and classes[0].lower() == "background")
    return ((0, 0, 0),) * plain + tuple(colour(i) for i in range(len(classes) - plain))


def colour(index: int) -> tuple[int, int, int]:
    """The index-th colour: hues a golden ratio apart, every third ring darker."""
    hue = (index * 0.618034) % 1.0 * 6
    value = (255, 190, 225)[index % 3]
    rgb = [min(1.0, max(0.0, abs((hue + shift) % 6 - 3) - 1)) for shift in (0, 4, 2)]
    red, green, blue = (round(value * (0.2 + 0.8 * part)) for part in rgb)
    return red, green, blue


def is_safe_path(path: str) -> bool:
    """Whether a path from a shard stays inside the folder that it is joined to."""
    pure = PurePosixPath(path)
    return (
        bool(pure.parts)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and not re.search(r"[\x00\\]", path)
    )
