"""Mask files as they are stored: what a viewer would show instead is undone or refused."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.images.files import ExifPolicy, load_pixels
from shards.images.tiff import GREY16_MODES, PHOTOMETRIC, iter_strings, read_tiff_tags
from shards.masks.counts import Values
from shards.masks.palettes import read_palette
from shards.sample import DataError

PHOTOMETRIC_NAMES = {
    6: "YCbCr",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32844: "LogL",
    32845: "LogLuv",
}
"""Values of the TIFF tag PhotometricInterpretation whose samples Pillow converts to colours."""
LEVEL_STEPS = {1: 255, 2: 85, 4: 17}
"""Bits per pixel -> the step between grey levels to which Pillow stretches them."""
LOSSY_FORMATS = ("JPEG", "MPO")
LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg")
"""Pillow's names of TIFF compressions that change values."""
TRANSPARENT = (
    "has transparent pixels, which may stand for a class; declare it with --mask-format rgb and "
    "colours of four numbers, or flatten the mask"
)
WHITE_IS_ZERO = "white_is_zero"
"""Note on masks whose file asks viewers to show 0 as white."""


@dataclass(frozen=True, slots=True)
class StoredMask:
    """A decoded mask file, before its values become classes."""

    image: Image.Image
    """Rotated upright or as stored; grey levels are stretched to 8 bits, but never inverted."""
    bits: int = 8
    """Bits per value: 1, 2, 4, 8, 16 or 32."""
    orientation: int = 0
    """EXIF orientation 2 to 8 of the file, 0 if it is upright."""
    notes: tuple[str, ...] = ()
    """Keys of NOTES."""

    @property
    def max_value(self) -> int:
        """The largest value that the file can hold; of palettes, the last index."""
        if self.image.mode == "P":
            return max(1, len(read_palette(self.image)) - 1)
        return 2**self.bits - 1

    def read_values(self, where: str) -> Values:
        """Return the stored values [H, W]: palette indices, never the luminance of their colours.

        Grey levels of 2 and 4 bits are 0 to 3 and 0 to 15.

        Raises DataError if the mask is in colour or its values do not fit into 16 bits.
        """
        values = read_stored_values(self.image, where)
        if self.image.mode == "L" and self.bits in LEVEL_STEPS:
            return values // np.uint8(LEVEL_STEPS[self.bits])
        return values


def load_mask(opened: Image.Image, where: str, exif: ExifPolicy = "upright") -> StoredMask:
    """Decode an opened mask file to its stored values.

    Raises DataError if the file is damaged, or if Pillow cannot give its stored values.
    """
    raw_mode = next(
        (word for tile in getattr(opened, "tile", []) for word in iter_strings(tile[3])), ""
    )
    refuse_converted_values(opened, raw_mode, where)
    inverted = opened.mode in ("1", "L") and "I" in raw_mode.partition(";")[2]
    notes = (WHITE_IS_ZERO,) if read_tiff_tags(opened).get(PHOTOMETRIC) == 0 else ()
    bits = count_bits(opened.mode, raw_mode)
    image, orientation = load_pixels(opened, where, exif)
    if raw_mode.startswith("RGBa") and image.getchannel("A").getextrema()[0] != 255:
        raise DataError(
            f"{where} has colours multiplied by alpha, which cannot be restored exactly; "
            "flatten the mask"
        )
    if inverted:
        pixels = np.asarray(image)
        image = Image.fromarray(~pixels)
    return StoredMask(image, bits, orientation, notes)


def count_bits(mode: str, raw_mode: str) -> int:
    """Return the bits per value of a file from Pillow's mode and raw mode."""
    if mode in GREY16_MODES:
        return 32 if "32" in raw_mode else 16
    if mode == "1":
        return 1
    depth = raw_mode.partition(";")[2].rstrip("IR")
    return int(depth) if mode == "L" and depth in ("2", "4") else 8


def refuse_converted_values(opened: Image.Image, raw_mode: str, where: str) -> None:
    """Raise DataError if Pillow would convert the stored values while decoding."""
    photometric = read_tiff_tags(opened).get(PHOTOMETRIC, 1)
    if photometric in PHOTOMETRIC_NAMES:
        raise DataError(
            f"{where} is a TIFF of {PHOTOMETRIC_NAMES[photometric]} samples, which are not the "
            "values of a mask; save it as PNG"
        )
    # Pillow takes a palette of grey levels for 1 or 8 bits per pixel, whatever the file has.
    stride = next(
        (tile[3][1] for tile in getattr(opened, "tile", []) if opened.format == "BMP"), None
    )
    bits = {"1": 1, "L": 8}.get(raw_mode)
    if type(stride) is int and bits is not None and opened.mode == raw_mode:
        expected = ((opened.width * bits + 31) >> 3) & ~3
        if stride != expected:
            raise DataError(
                f"{where} is a BMP whose palette has fewer colours than its bits per pixel allow, "
                "which cannot be decoded exactly; save it as PNG"
            )
    if opened.format == "GIF" and opened.tell() > 0 and opened.mode != "P":
        raise DataError(
            f"{where} is a GIF whose frame {opened.tell()} has no palette indices of its own; "
            "save the frame as PNG"
        )


def describe_loss(opened: Image.Image, data: bytes) -> str | None:
    """Describe the lossy compression of a mask file (`a JPEG`); None if its values are exact."""
    if opened.format in LOSSY_FORMATS:
        return "a JPEG"
    if opened.format == "TIFF" and opened.info.get("compression") in LOSSY_COMPRESSIONS:
        return f"a TIFF with {opened.info['compression'].removeprefix('tiff_').upper()} compression"
    if opened.format == "WEBP" and b"VP8 " in list_webp_chunks(data):
        return "a lossy WebP"
    return None


def list_webp_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the names of the top-level chunks of a WebP file (RFC 9649, section 2.3)."""
    offset = 12
    while offset + 8 <= len(data):
        yield data[offset : offset + 4]
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        offset += 8 + size + size % 2


def read_stored_values(image: Image.Image, where: str) -> Values:
    """Return the values [H, W] of a decoded mask: palette indices, never their luminance.

    Raises DataError if the mask is in colour or its values do not fit into 16 bits.
    """
    match image.mode:
        case "1":
            return np.asarray(image).astype(np.uint8)
        case "L" | "P":
            return np.asarray(image)
        case "I;16" | "I;16B" | "I;16L" | "I":
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise DataError(
                    f"{where} has values from {values.min()} to {values.max()}; "
                    "mask values must be 0 to 65535"
                )
            return values.astype(np.uint8) if values.max() < 256 else values.astype(np.uint16)
        case "RGB" | "RGBA" | "LA":
            refuse_transparent_pixels(image, where)
            bands = np.asarray(image)
            colours = bands[..., : 3 if image.mode != "LA" else 1]
            if (colours == colours[..., :1]).all():
                return np.ascontiguousarray(colours[..., 0])
            raise DataError(
                f"{where} is in colour (mode {image.mode}); use --mask-format rgb with --colours, "
                "a table with the colour of each class"
            )
        case mode:
            raise DataError(
                f"{where} has mode {mode}; masks must be of mode 1, L, P, I;16, RGB or RGBA"
            )


def refuse_transparent_pixels(image: Image.Image, where: str) -> None:
    """Raise DataError if an alpha channel is not constant."""
    if image.mode in ("RGBA", "LA"):
        min_alpha, max_alpha = image.getchannel("A").getextrema()
        if min_alpha != max_alpha:
            raise DataError(f"{where} {TRANSPARENT}")


def refuse_ambiguous_transparency(image: Image.Image, where: str) -> None:
    """Raise DataError if only alpha distinguishes two palette colours in use."""
    if "transparency" not in image.info:
        return
    used = np.unique(np.asarray(image.convert("RGBA")).reshape(-1, 4), axis=0)
    if len(np.unique(used[:, :3], axis=0)) < len(used):
        raise DataError(f"{where} {TRANSPARENT}")
