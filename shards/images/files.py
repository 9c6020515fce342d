"""Image files: validated on open, stored losslessly as they are, decoded deterministically."""

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from shards.images.cost import estimate_decoding
from shards.images.encoding import downscale_image, encode_png
from shards.images.headers import detect_unread_format, read_image_header
from shards.images.memory import refuse_memory
from shards.images.tiff import (
    GREY16_MODES,
    PHOTOMETRIC,
    is_truncated_to_8_bits,
    max_bits_per_sample,
    read_tiff_tags,
    refuse_inverted_16_bit,
    refuse_many_frames,
    refuse_tiff_tags,
    repeats_8_bits,
)
from shards.sample import Channels, DataError

IMAGE_EXTENSIONS = frozenset(
    {
        *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    }
)
"""Extensions, in lower case, of files that are read as images or masks."""
VOLUME = "a volume; export each slice as a PNG of 8 or 16 bits"
SLIDE = "a microscope or slide scanner container; export its images as TIFF or PNG"
UNSUPPORTED = "an image in an unsupported format; convert it to PNG or TIFF"
UNSUPPORTED_EXTENSIONS = {
    **dict.fromkeys((".dcm", ".dicom", ".mha", ".mhd", ".nii", ".nii.gz", ".nrrd"), VOLUME),
    **dict.fromkeys((".czi", ".lif", ".nd2", ".ndpi", ".oib", ".svs", ".vsi"), SLIDE),
    **dict.fromkeys(
        (".avif", ".dng", ".exr", ".heic", ".heif", ".jp2", ".npy", ".npz"), UNSUPPORTED
    ),
    **dict.fromkeys((".pbm", ".pcx", ".pgm", ".pnm", ".ppm"), UNSUPPORTED),
    **dict.fromkeys((".psd", ".ras", ".sgi", ".tga", ".xbm", ".xcf", ".xpm"), UNSUPPORTED),
}
"""Extensions of files that hold images but cannot be read: refused by name, not skipped."""
PILLOW_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The only Pillow decoders that see a file: hostile data cannot choose a more obscure one."""
MAX_PIXELS = 1_000_000_000
"""Images with more pixels are refused before they are decoded: a small file can claim any size."""
EXIF_ORIENTATION = 0x0112
ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Keys of `Image.info` whose values may hold an orientation."""
UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""The transposition that undoes each EXIF orientation."""
AlphaPolicy = Literal["refuse", "drop"]
ExifPolicy = Literal["upright", "ignore"]

# MAX_PIXELS is checked for every image, with its name; Pillow's limit would only warn.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How image files are converted to arrays. Stored in the manifest and in every checkpoint."""

    channels: Channels
    """Channels that every image is converted to."""
    alpha: AlphaPolicy = "refuse"
    """Transparent pixels: refused, or kept in their colour."""
    range: tuple[int, int] | None = None
    """16-bit values that become 0 and 255; None: 16-bit images are refused."""
    max_pixels: int = MAX_PIXELS
    """Images that declare more pixels are refused."""
    exif: ExifPolicy = "upright"
    """Files with an EXIF orientation: rotated upright, or not. Like `frame` and `resize`, of files
    only: images in shards are stored as these rules made them."""
    frame: int | None = None
    """Index of the frame of files with several; None: they are refused."""
    resize: int | None = None
    """Pixels that the longer side of a file is scaled down to."""

    def file_rule(self) -> "ImageRule":
        """Return the rule by which files are read."""
        return ImageRule(
            alpha=self.alpha,
            allow_16_bit=self.range is not None,
            exif=self.exif,
            frame=self.frame,
            resize=self.resize,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRule:
    """Which images may be packed, and how they are changed."""

    alpha: AlphaPolicy = "refuse"
    """Images with transparent pixels: refused, or stored with alpha and decoded without it."""
    allow_16_bit: bool = False
    """Whether a rule for 16-bit images was declared."""
    exif: ExifPolicy = "upright"
    """Images with an EXIF orientation: rotated upright, or stored unrotated."""
    frame: int | None = None
    """Index of the frame to take from files with several; None: such files are refused."""
    resize: int | None = None
    """Pixels that the longer side is scaled down to."""
    max_pixels: int = MAX_PIXELS
    """Images that declare more pixels are refused."""

    def __post_init__(self) -> None:
        if self.frame is not None and self.frame < 0:
            raise ValueError(f"--frame must be >= 0, got {self.frame}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"--resize must be >= 1 pixel, got {self.resize}")
        if self.max_pixels < 1:
            raise ValueError(f"--max-pixels must be >= 1, got {self.max_pixels}")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the form in which it is written to a shard."""

    data: bytes
    extension: str | None
    """Extension that `data` needs, in lower case; None: that of the file."""
    image: Image.Image | None
    """Decoded, upright and at its final size; None if only the header was read."""
    size: tuple[int, int]
    """(width, height)."""
    full_size: tuple[int, int]
    """(width, height) before it was scaled down."""
    mode: str
    """Pillow's mode."""
    channels: Channels
    notes: tuple[str, ...] = ()
    """What packing changed or decoding will change: keys of NOTES."""
    orientation: int = 0
    """EXIF orientation 2 to 8 of the file, 0 if it is upright."""


def check_image_range(bounds: tuple[int, int] | None) -> None:
    """Raise ValueError for a range of 16-bit values that is empty or not within 0 65535."""
    if bounds is not None and not 0 <= bounds[0] < bounds[1] <= 65535:
        raise ValueError(
            f"--image-range {bounds[0]} {bounds[1]}: must be LOW HIGH within 0 65535, LOW < HIGH"
        )


NOTES = {
    "turned": "with an EXIF orientation are stored upright, as PNG",
    "unturned": "with an EXIF orientation are stored unrotated, as PNG without it",
    "frame": "with several frames are stored as a single frame, as PNG",
    "narrowed": "repeat 8 bits in each 16-bit channel and are stored with 8 bits, as PNG",
    "resized": "are scaled down and stored as PNG",
    "mask": "have a mask of another size, resized to theirs by nearest neighbour",
    "alpha": "have transparent pixels; alpha is kept in the shard and dropped when decoding",
    "colour": "are CMYK or YCbCr; kept in the shard and converted to RGB when decoding",
    "white_is_zero": "have a TIFF mask shown with white as 0; its values are read as stored",
    "clipped": "have annotations that leave the image, which are clipped",
    "degenerate": "have annotations without an area, which draw nothing",
    "deep": "have 16 bits; kept in the shard and scaled to 8 bits when decoding",
}


def open_image(data: bytes, where: str, rule: ImageRule) -> Image.Image:
    """Open an image or mask and select its frame, without decoding it.

    Raises DataError if it is not an image, has too many pixels, several frames, unsupported bands
    or a georeference; `where` names the file in the message.
    """
    refuse_many_frames(data, where)
    try:
        image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
        num_frames = getattr(image, "n_frames", 1)
        tags = read_tiff_tags(image)
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke
        raise DataError(f"{where} {explain_unreadable(data)}") from error
    refuse_image_size(image, tags, rule, where)
    # The further frames of a camera's MPO are previews and depth maps of the first.
    several = num_frames > 1 and image.format != "MPO"
    if several and rule.frame is not None:
        if rule.frame >= num_frames:
            raise DataError(
                f"{where} has {num_frames} frames, but --frame is {rule.frame} (counted from 0); "
                "lower it"
            )
        try:
            image.seek(rule.frame)
            tags = read_tiff_tags(image)
        except Exception as error:  # seeking decodes the frames before
            raise DataError(f"{where} is damaged ({error}); repair or remove it") from error
        refuse_image_size(image, tags, rule, where)
    refuse_tiff_tags(tags, len(image.getbands()), where)
    if several and rule.frame is None:
        raise DataError(
            f"{where} has {num_frames} frames; add --frame 0 to use the first frame of each file"
        )
    if image.format == "PNG" and image.mode == "P" and image.palette is None:
        raise DataError(f"{where} has lost its palette; repair or remove it")
    truncated = image.mode not in GREY16_MODES and is_truncated_to_8_bits(image, tags)
    if truncated and not repeats_8_bits(data, image):
        raise DataError(
            f"{where} has 16 bits per colour channel, of which 8 would be lost silently; "
            "convert it to 8 bits per channel, or to 16-bit grey"
        )
    return image


def refuse_image_size(image: Image.Image, tags: Any, rule: ImageRule, where: str) -> None:
    """Raise DataError if an image declares too many pixels, or takes too much memory to decode."""
    if image.width * image.height > rule.max_pixels:
        raise DataError(
            f"{where} declares {image.width} x {image.height} pixels, more than the limit of "
            f"{rule.max_pixels:,}; split it into smaller images, or raise --max-pixels"
        )
    refuse_memory(estimate_decoding(image, tags), image.size, where)


def explain_unreadable(data: bytes) -> str:
    """Return the problem and the remedy for bytes that Pillow cannot open."""
    if not data:
        return "is empty; repair or remove it"
    if (kind := detect_unread_format(data)) is not None:
        return f"is {kind}, a format that is not read; convert it to PNG, TIFF or 8-bit JPEG"
    if data[128:132] == b"DICM" or data[344:347] in (b"n+1", b"ni1"):
        return "is a medical volume (DICOM, NIfTI); export its slices as 8-bit or 16-bit PNG"
    if data[:4] in (b"II*\0", b"MM\0*"):
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
            file = io.BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
            refuse_tiff_tags(tags, 1 if tags.get(PHOTOMETRIC) in (0, 1) else 4, "")
            bits = max_bits_per_sample(tags)
        except DataError as error:
            return str(error).strip()
        except Exception:  # an unreadable directory gives no reason
            bits = 0
        if bits > 8:
            return f"is a {bits}-bit TIFF that cannot be decoded; convert it to 8 bits or PNG"
    return "is not a readable image; repair or remove it"


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 if it has none or an invalid one."""
    # Pillow takes as long to parse nothing as to open the image.
    if image.format != "TIFF" and not image.info.keys() & ORIENTATION_KEYS:
        return 1
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if value in UNDO_ORIENTATION else 1


def load_pixels(
    image: Image.Image, where: str, exif: ExifPolicy = "upright"
) -> tuple[Image.Image, int]:
    """Decode all pixels, rotated upright or as stored.

    Returns the image and its EXIF orientation: 2 to 8, or 0 if it is upright. Raises DataError
    if the file is damaged.
    """
    try:
        # A PNG's orientation may follow its pixels; load() applies that of a TIFF and drops it.
        before = 1 if image.format == "PNG" else read_orientation(image)
        image.load()
        after = read_orientation(image)
        if exif == "upright":
            loaded = ImageOps.exif_transpose(image) if after != 1 else image
        else:
            loaded = image.transpose(UNDO_ORIENTATION[before]) if before != after == 1 else image
        orientation = after if after != 1 else before
        return loaded, 0 if orientation == 1 else orientation
    except MemoryError as error:
        raise DataError(
            f"{where} takes more memory to decode than is free; use fewer --workers, or split it "
            "into smaller images"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke
        raise DataError(f"{where} is damaged ({error}); repair or remove it") from error


def read_image(data: bytes, rule: ImageRule, where: str, *, pixels: bool = True) -> StoredImage:
    """Check an image file and return it as it is stored: with its original bytes where possible.

    Args:
        data: the file's bytes.
        rule: which images are accepted and how they are changed.
        where: name of the file in error messages.
        pixels: False trusts the header of an ordinary JPEG or PNG and decodes all other files.

    Raises DataError for anything that `rule` does not cover.
    """
    if not pixels and rule.resize is None and (header := read_image_header(data)) is not None:
        size = header.size
        if header.mode != "P" and size[0] * size[1] <= rule.max_pixels:
            return StoredImage(data, None, None, size, size, header.mode, header.mode)
    opened = open_image(data, where, rule)
    refuse_inverted_16_bit(opened, where)
    several = getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
    tags = read_tiff_tags(opened)
    narrowed = opened.mode not in GREY16_MODES and is_truncated_to_8_bits(opened, tags)
    image, orientation = load_pixels(opened, where, rule.exif)
    full_size = image.size
    channels, notes = inspect_image(image, rule.alpha, rule.allow_16_bit, where)
    if orientation:
        notes.append("turned" if rule.exif == "upright" else "unturned")
    if several:
        notes.append("frame")
    if narrowed:
        notes.append("narrowed")
    if rule.resize is not None and max(image.size) > rule.resize:
        image = downscale_image(image, rule.resize, channels)
        notes.append("resized")
    extension = None
    if {"turned", "unturned", "frame", "narrowed", "resized"} & set(notes):
        if image.mode in ("CMYK", "YCbCr"):
            image = image.convert("RGB")
        data, extension = encode_png(image), "png"
    return StoredImage(
        data,
        extension,
        image,
        image.size,
        full_size,
        image.mode,
        channels,
        tuple(notes),
        orientation,
    )


def inspect_image(
    image: Image.Image, alpha: AlphaPolicy, allow_16_bit: bool, where: str
) -> tuple[Channels, list[str]]:
    """Return the channels of a decoded image and its notes (keys of NOTES).

    Raises DataError for an image of which something would be lost silently.
    """
    notes = []
    if image.mode in GREY16_MODES:
        pixels = np.asarray(image)
        values = f"values from {pixels.min()} to {pixels.max()}"
        if pixels.min() < 0 or pixels.max() > 65535:
            raise DataError(f"{where} has {values}; convert it to 16-bit grey")
        if not allow_16_bit:
            raise DataError(
                f"{where} has more than 8 bits per pixel (mode {image.mode}, {values}); choose "
                "which values become black and white, such as --image-range 0 65535"
            )
        if alpha == "refuse" and "transparency" in image.info:
            raise DataError(
                f"{where} has a transparent grey value; add --alpha drop to keep it as opaque"
            )
        return "L", ["deep"]
    if image.mode in ("CMYK", "YCbCr"):
        return "RGB", ["colour"]
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        wanted = "8- or 16-bit grey" if image.mode == "F" else "RGB"
        raise DataError(
            f"{where} has mode {image.mode}, which is not supported; convert it to {wanted}"
        )
    if image.has_transparency_data:
        min_alpha, _ = image.convert("RGBA").getchannel("A").getextrema()
        if min_alpha != 255:
            if alpha == "refuse":
                raise DataError(
                    f"{where} has transparent pixels; flatten it onto a background, or add "
                    "--alpha drop to keep them in their colour"
                )
            notes.append("alpha")
    if image.mode in ("P", "PA"):
        colours = np.asarray(image.convert("RGB"))
        return "L" if (colours == colours[..., :1]).all() else "RGB", notes
    return "RGB" if image.mode in ("RGB", "RGBA") else "L", notes
