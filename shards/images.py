"""Picture files: opened with suspicion, kept as they are where nothing is lost, decoded alike."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from shards.headers import JPEG_BEGIN, read_header
from shards.sample import Channels, DataError, Uint8

try:
    import simplejpeg
except ImportError:  # the extra `turbo`
    simplejpeg = None

IMAGE_EXTENSIONS = frozenset(
    {
        *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    }
)
"""Endings, in lower case, of files that are taken for pictures or masks."""

VOLUME = "a volume; write its slices as PNG (8 or 16 bits), a file each"
SLIDE = "a microscope's or slide scanner's container; export its pictures as TIFF or PNG"
OTHER = "a picture of a kind that is not read; convert it to PNG or TIFF"

OTHER_EXTENSIONS = {
    **dict.fromkeys((".dcm", ".dicom", ".mha", ".mhd", ".nii", ".nii.gz", ".nrrd"), VOLUME),
    **dict.fromkeys((".czi", ".lif", ".nd2", ".ndpi", ".oib", ".svs", ".vsi"), SLIDE),
    **dict.fromkeys((".avif", ".dng", ".exr", ".heic", ".heif", ".jp2", ".npy", ".npz"), OTHER),
    **dict.fromkeys((".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".ras", ".tga", ".xcf"), OTHER),
}
"""Endings of files that hold pictures but are not read: refused by name, not passed over."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The Pillow decoders that may see a file: an archive cannot choose a more obscure one."""

MAX_PIXELS = 1_000_000_000
"""Pictures with more pixels are refused unopened: a small file can claim any size."""

DEEP_MODES = ("I;16", "I;16B", "I;16L", "I")
"""Pillow's modes of grey pictures with more than 8 bits."""

EXIF_ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
EXIF_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Where Pillow keeps what may hold an orientation."""
SAMPLES_PER_PIXEL = 277
GEO_TAGS = (33550, 33922, 34264, 34735)
"""ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory (GeoTIFF 1.1, section 7)."""

UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What takes back the turn of an EXIF orientation."""

Alpha = Literal["refuse", "drop"]
Exif = Literal["upright", "ignore"]

# Ours is checked for every picture, with its name; Pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How picture files become arrays; a manifest carries it, and every checkpoint."""

    channels: Channels
    """What every picture is converted to."""
    alpha: Alpha = "refuse"
    """Transparent pixels: refused, or taken in their colour."""
    range: tuple[int, int] | None = None
    """Values of 16-bit pictures that become 0 and 255; None: such pictures are refused."""
    max_pixels: int = MAX_PIXELS
    """Pictures that claim more are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRule:
    """What may be packed, and what is done to it."""

    alpha: Alpha = "refuse"
    """Pictures with transparent pixels: refused, or kept, and decoded without their alpha."""
    deep: bool = False
    """Whether a rule for 16-bit pictures was declared."""
    exif: Exif = "upright"
    """Pictures with an EXIF orientation: turned, or taken as their pixels lie."""
    frame: int | None = None
    """Which frame of files that hold several; None: they are refused."""
    resize: int | None = None
    """The longer side is scaled down to this many pixels."""
    max_pixels: int = MAX_PIXELS
    """Pictures that claim more are refused."""

    def __post_init__(self) -> None:
        if self.frame is not None and self.frame < 0:
            raise ValueError(f"--frame counts from 0, got {self.frame}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"--resize is a number of pixels, got {self.resize}")
        if self.max_pixels < 1:
            raise ValueError(f"--max-pixels must be above 0, got {self.max_pixels}")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture as it goes into a shard."""

    data: bytes
    extension: str | None
    """Of `data`, in lower case; None: that of the file."""
    image: Image.Image | None
    """Decoded, upright and of its final size; None where only its header was looked at."""
    size: tuple[int, int]
    """(width, height)."""
    full_size: tuple[int, int]
    """(width, height) before it was scaled down."""
    mode: str
    """Pillow's."""
    channels: Channels
    notes: tuple[str, ...] = ()
    """What was done to it or will be at decoding, for people: see NOTES."""


NOTES = {
    "turned": "with an EXIF orientation are stored upright, as PNG",
    "unturned": "with an EXIF orientation are stored as their pixels lie, as PNG without it",
    "frame": "with several frames are stored as one frame, as PNG",
    "resized": "are scaled down, stored as PNG",
    "mask": "have a mask of another size, brought to theirs by nearest neighbour",
    "alpha": "have transparent pixels; the alpha is kept in the shard and dropped when decoded",
    "colour": "are CMYK or YCbCr; kept in the shard and converted to RGB when decoded",
    "deep": "have 16 bits; kept in the shard and scaled to 8 bits when decoded",
}


def open_image(data: bytes, where: str, rule: ImageRule) -> Image.Image:
    """A picture or mask, opened but not decoded, its frame chosen.

    Raises DataError for what is no picture, has too many pixels, frames, bands or a georeference;
    `where` names the file in the message.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        num_frames = getattr(image, "n_frames", 1)
        tags = tags_of(image)
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke
        raise DataError(f"{where} {why_unreadable(data)}") from error
    refuse_size(image, rule, where)
    # The further frames of a camera's MPO are previews and depth maps of the first.
    several = num_frames > 1 and image.format != "MPO"
    if several and rule.frame is not None:
        if rule.frame >= num_frames:
            raise DataError(f"{where} holds {num_frames} frames, none {rule.frame}; lower --frame")
        try:
            image.seek(rule.frame)
            tags = tags_of(image)
        except Exception as error:  # seeking decodes the frames before
            raise DataError(f"{where} is damaged ({error}); repair or remove it") from error
        refuse_size(image, rule, where)
    refuse_tags(tags, len(image.getbands()), where)
    if several and rule.frame is None:
        raise DataError(
            f"{where} holds {num_frames} frames; add --frame 0 to take the first of each file"
        )
    if image.format == "PNG" and image.mode == "P" and image.palette is None:
        raise DataError(f"{where} has lost its palette; repair or remove it")
    if image.mode in DEEP_MODES and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        raise DataError(f"{where} stores white as 0, with 16 bits; save it with black as 0")
    if image.mode not in DEEP_MODES and is_cut_to_8_bits(image, tags):
        raise DataError(
            f"{where} has 16 bits a channel in colour, of which 8 would be lost unsaid; "
            "convert it to 8 bits a channel, or to 16-bit grey"
        )
    return image


def tags_of(image: Image.Image) -> Any:
    """The tags of a TIFF's frame; none for other formats."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def refuse_size(image: Image.Image, rule: ImageRule, where: str) -> None:
    """Raise DataError where a picture claims too many pixels."""
    if image.width * image.height > rule.max_pixels:
        raise DataError(
            f"{where} claims {image.width} x {image.height} pixels, more than "
            f"{rule.max_pixels:,}; cut it into smaller pictures, or raise --max-pixels"
        )


def refuse_tags(tags: Any, num_bands: int, where: str) -> None:
    """Raise DataError where TIFF tags tell of what Pillow would leave out or we would lose."""
    samples = int(tags.get(SAMPLES_PER_PIXEL, num_bands))
    if samples > max(num_bands, 1):
        raise DataError(
            f"{where} has {samples} bands; pictures have 1 (grey), 3 (RGB) or an alpha besides: "
            "write the bands that are meant to a file of their own"
        )
    if any(tag in tags for tag in GEO_TAGS):
        raise DataError(
            f"{where} carries a georeference (GeoTIFF), which would be lost; "
            "export it as plain TIFF or PNG"
        )


def why_unreadable(data: bytes) -> str:
    """What is wrong with bytes that Pillow cannot open, and what to do."""
    if not data:
        return "is empty; repair or remove it"
    if data[128:132] == b"DICM" or data[344:347] in (b"n+1", b"ni1"):
        return "is a medical volume (DICOM, NIfTI); write its slices as 8-bit or 16-bit PNG"
    if data[:4] in (b"II*\0", b"MM\0*"):
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
            file = io.BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
            refuse_tags(tags, 1 if tags.get(PHOTOMETRIC) in (0, 1) else 4, "")
            bits = bits_of(tags)
        except DataError as error:
            return str(error).strip()
        except Exception:  # a directory that cannot be read tells nothing
            bits = 0
        if bits > 8:
            return f"is a TIFF of {bits} bits that cannot be decoded; convert it to 8 bits or PNG"
    return "is no picture that can be read; repair or remove it"


def bits_of(tags: Any) -> int:
    """The most bits that a channel has, as the tags of a TIFF say."""
    return int(np.ravel(tags.get(BITS_PER_SAMPLE, 8)).max())


def is_cut_to_8_bits(image: Image.Image, tags: Any) -> bool:
    """Whether Pillow reads 16 bits a channel into 8, as tags or the codec's raw mode tell."""
    if tags and bits_of(tags) > 8 and image.mode != "F":
        return True
    tiles = getattr(image, "tile", [])
    return any(";16" in word for tile in tiles for word in words_of(tile[3]))


def words_of(arguments: object) -> Iterator[str]:
    """The strings among a codec's arguments."""
    if isinstance(arguments, str):
        yield arguments
    elif isinstance(arguments, tuple):
        yield from (item for item in arguments if isinstance(item, str))


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none."""
    # Pillow takes as long to parse nothing as to open the picture.
    if image.format != "TIFF" and not image.info.keys() & EXIF_KEYS:
        return 1
    value = image.getexif().get(EXIF_ORIENTATION, 1)
    return value if value in UNTURN else 1


def load(image: Image.Image, where: str, exif: Exif = "upright") -> tuple[Image.Image, bool]:
    """All pixels decoded, upright or as they lie; and whether an EXIF orientation told them apart.

    Raises DataError on a damaged file.
    """
    try:
        # A PNG's orientation may follow its pixels; a TIFF is turned, and it forgotten, by load().
        before = 1 if image.format == "PNG" else orientation_of(image)
        image.load()
        after = orientation_of(image)
        if exif == "upright":
            turned = ImageOps.exif_transpose(image) if after != 1 else image
        else:
            turned = image.transpose(UNTURN[before]) if before != after == 1 else image
        return turned, before != 1 or after != 1
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke
        raise DataError(f"{where} is damaged ({error}); repair or remove it") from error


def read_image(data: bytes, rule: ImageRule, where: str, *, pixels: bool = True) -> StoredImage:
    """A picture file as it goes into a shard: its own bytes wherever they can stay.

    `pixels=False` believes the header of an ordinary JPEG or PNG and decodes all others. Raises
    DataError for what `rule` does not cover.
    """
    if not pixels and rule.resize is None and (header := read_header(data)) is not None:
        size = header.size
        if header.mode != "P" and size[0] * size[1] <= rule.max_pixels:
            return StoredImage(data, None, None, size, size, header.mode, header.mode)
    opened = open_image(data, where, rule)
    several = getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
    image, oriented = load(opened, where, rule.exif)
    full_size = image.size
    channels, notes = examine(image, rule.alpha, rule.deep, where)
    if oriented:
        notes.append("turned" if rule.exif == "upright" else "unturned")
    if several:
        notes.append("frame")
    if rule.resize is not None and max(image.size) > rule.resize:
        image = scale_down(image, rule.resize, channels)
        notes.append("resized")
    extension = None
    if {"turned", "unturned", "frame", "resized"} & set(notes):
        if image.mode in ("CMYK", "YCbCr"):
            image = image.convert("RGB")
        data, extension = encode_png(image), "png"
    return StoredImage(
        data, extension, image, image.size, full_size, image.mode, channels, tuple(notes)
    )


def examine(image: Image.Image, alpha: Alpha, deep: bool, where: str) -> tuple[Channels, list[str]]:
    """The channels of a decoded picture and what is to be noted about it.

    Raises DataError for what would lose something unsaid.
    """
    notes = []
    if image.mode in DEEP_MODES:
        wide = np.asarray(image)
        held = f"values from {wide.min()} to {wide.max()}"
        if wide.min() < 0 or wide.max() > 65535:
            raise DataError(f"{where} holds {held}; convert it to 16-bit grey")
        if not deep:
            raise DataError(
                f"{where} has more than 8 bits a pixel (mode {image.mode}, {held}); say what "
                "becomes black and white: --image-range 0 65535, or --image-percentiles 0.5 99.5"
            )
        if alpha == "refuse" and "transparency" in image.info:
            raise DataError(f"{where} has a transparent grey; add --alpha drop to take it as it is")
        return "L", ["deep"]
    if image.mode in ("CMYK", "YCbCr"):
        return "RGB", ["colour"]
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        wanted = "8- or 16-bit grey" if image.mode == "F" else "RGB"
        raise DataError(
            f"{where} has mode {image.mode}, which is not supported; convert it to {wanted}"
        )
    if image.has_transparency_data:
        least, _ = image.convert("RGBA").getchannel("A").getextrema()
        if least != 255:
            if alpha == "refuse":
                raise DataError(
                    f"{where} has transparent pixels; flatten it onto a background, or take the "
                    "colours under them: --alpha drop"
                )
            notes.append("alpha")
    if image.mode in ("P", "PA"):
        colours = np.asarray(image.convert("RGB"))
        return "L" if (colours == colours[..., :1]).all() else "RGB", notes
    return "RGB" if image.mode in ("RGB", "RGBA") else "L", notes


def scale_down(image: Image.Image, longest: int, channels: Channels) -> Image.Image:
    """The longer side becomes `longest`; every pixel is the mean of the area that it covers."""
    size = scaled_size(image.size, longest)
    if image.mode in DEEP_MODES:
        scaled = Image.fromarray(np.asarray(image).astype(np.float32)).resize(
            size, Image.Resampling.BOX
        )
        return Image.fromarray(np.asarray(scaled).round().astype(np.uint16))
    return image.convert(channels).resize(size, Image.Resampling.BOX)


def scaled_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) with the longer side at most `longest`."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A picture whose pixels are decoded and upright, not yet in the data set's channels."""

    pixels: Image.Image | Uint8
    """Pillow's picture of any mode, or an array that is [H, W, C] already."""
    form: ImageFormat

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        if isinstance(self.pixels, Image.Image):
            return self.pixels.size
        height, width, _ = self.pixels.shape
        return width, height

    def region(self, left: int, top: int, right: int, bottom: int) -> Uint8:
        """A part, right and bottom excluded, as uint8 [H, W, C] in the data set's channels."""
        if not isinstance(self.pixels, Image.Image):
            return self.pixels[top:bottom, left:right]
        box = (left, top, right, bottom)
        whole = box == (0, 0, *self.pixels.size)
        return to_array(self.pixels if whole else self.pixels.crop(box), self.form)


def open_pixels(data: bytes, form: ImageFormat, where: str) -> DecodedImage:
    """Decode a picture file, and convert nothing yet.

    Raises DataError for a damaged file and for what the format does not cover.
    """
    if (pixels := decode_turbo(data, form)) is not None:
        return DecodedImage(pixels, form)
    rule = ImageRule(alpha=form.alpha, max_pixels=form.max_pixels)
    image, _ = load(open_image(data, where, rule), where)
    examine(image, form.alpha, form.range is not None, where)
    return DecodedImage(image, form)


def decode_turbo(data: bytes, form: ImageFormat) -> Uint8 | None:
    """An ordinary JPEG by simplejpeg, where the extra `turbo` is installed: the same pixels sooner.

    None for all that is left to Pillow, damaged files among it.
    """
    if simplejpeg is None or not data.startswith(JPEG_BEGIN):
        return None
    if (found := upright_jpeg(data)) is None:
        return None
    (width, height), mode = found
    # RGB -> L is left to Pillow: the luma that a JPEG holds differs from what Pillow computes.
    if mode not in ("L", form.channels) or width * height > form.max_pixels:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if form.channels == "L" else "RGB")
    except ValueError:
        return None


def upright_jpeg(data: bytes) -> tuple[tuple[int, int], str] | None:
    """Size and mode of a JPEG whose pixels lie as they are to be seen; None for others."""
    # Far faster than Pillow, but knows nothing of files with metadata.
    if (header := read_header(data)) is not None:
        return header.size, header.mode
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        upright = image.format == "JPEG" and orientation_of(image) == 1
    except Exception:  # Pillow's decoders raise whatever the bytes provoke
        return None
    return (image.size, image.mode) if upright else None


def decode_image(data: bytes, form: ImageFormat, where: str) -> Uint8:
    """Picture bytes -> uint8 [H, W, C] in the data set's channels (L: C = 1, RGB: C = 3).

    Raises DataError for a damaged file and for what the format does not cover.
    """
    decoded = open_pixels(data, form, where)
    return decoded.region(0, 0, *decoded.size)


def to_array(image: Image.Image, form: ImageFormat) -> Uint8:
    """A decoded picture as uint8 [H, W, C]."""
    if image.mode in DEEP_MODES:
        assert form.range is not None
        grey = scale_table(form.range)[np.asarray(image).astype(np.uint16)][:, :, None]
        return grey if form.channels == "L" else np.repeat(grey, 3, axis=2)
    # Pillow turns CMYK into grey only by way of RGB.
    if image.mode in ("CMYK", "YCbCr") and form.channels == "L":
        image = image.convert("RGB")
    pixels = np.asarray(image if image.mode == form.channels else image.convert(form.channels))
    return pixels[:, :, None] if form.channels == "L" else pixels


def scale_table(bounds: tuple[int, int]) -> Uint8:
    """The 8-bit level of every 16-bit value [65536]: `low` and less 0, `high` and more 255."""
    low, high = bounds
    levels = (np.arange(65536) - low) * (255 / max(1, high - low))
    return levels.clip(0, 255).round().astype(np.uint8)


def encode_png(image: Image.Image) -> bytes:
    """A picture as PNG without metadata (an orientation already applied must not stay behind)."""
    if image.mode in DEEP_MODES:
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    # PNG has no palette beside an alpha channel.
    clean = image.convert("RGBA") if image.mode == "PA" else image.copy()
    clean.info.clear()
    out = io.BytesIO()
    clean.save(out, "PNG", exif=b"")
    return out.getvalue()
