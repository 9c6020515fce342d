"""A mask file -> the canonical mask of the shard format."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from shards.images.files import ImageRule, open_image
from shards.images.headers import read_image_header
from shards.masks.counts import count_pixel_values
from shards.masks.formats import ClassMap, MaskFormat
from shards.masks.palettes import format_colour, palette_bytes, read_header_palette, read_palette
from shards.masks.png import CANONICAL_RULE, encode_mask
from shards.masks.readings import Reading, list_readings
from shards.masks.stored import describe_loss, load_mask
from shards.sample import IGNORE, DataError, Palette


@dataclass(frozen=True, slots=True)
class CanonicalMask:
    """A mask in the form in which it is written to a shard."""

    size: tuple[int, int]
    """(width, height)."""
    mode: str
    """Pillow's mode of the file."""
    original: bytes | None
    """The file's bytes if they are already canonical, else None."""
    class_map: ClassMap | None
    """None if only the header was read."""
    orientation: int = 0
    """EXIF orientation 2 to 8 of the file, 0 if it is upright."""
    notes: tuple[str, ...] = ()
    """What reading undid: keys of NOTES."""
    readings: tuple[Reading, ...] = ()
    """What has to agree with the other masks of the data set."""

    def resize(self, size: tuple[int, int]) -> "CanonicalMask":
        """Resize to (width, height) by nearest neighbour."""
        assert self.class_map is not None
        index = np.asarray(
            Image.fromarray(self.class_map.index).resize(size, Image.Resampling.NEAREST)
        )
        class_map = replace(self.class_map, index=index, pixels=count_pixel_values(index))
        return replace(self, size=size, original=None, class_map=class_map)

    def encode(self, palette: Palette) -> bytes:
        """Encode as PNG of mode P; canonical bytes are returned unchanged."""
        if self.original is not None:
            return self.original
        assert self.class_map is not None
        return encode_mask(self.class_map.index, palette)


def read_mask(
    data: bytes,
    mask_format: MaskFormat,
    palette: Palette,
    where: str,
    *,
    rule: ImageRule = CANONICAL_RULE,
    pixels: bool = True,
) -> CanonicalMask:
    """Convert a mask file to canonical form; a canonical file keeps its bytes.

    Args:
        data: the file's bytes.
        mask_format: the declared mask format.
        palette: the manifest's.
        where: name of the file in error messages.
        rule: the rule for images: frame, EXIF orientation and maximum number of pixels.
        pixels: False trusts a header equal to that of a canonical mask.

    Raises DataError for anything that the declared format does not cover.
    """
    if not pixels and (header := read_image_header(data)) is not None:
        ours = header.mode == "P" and palette_bytes(palette).startswith(header.palette)
        plain = mask_format.kind in ("index", "palette") and mask_format.ignore_value in (
            None,
            IGNORE,
        )
        if ours and plain and header.size[0] * header.size[1] <= rule.max_pixels:
            return CanonicalMask(header.size, "P", data, None)
    opened = open_image(data, where, rule)
    file_palette = read_header_palette(opened) if opened.format == "PNG" else b""
    looks_canonical = bool(file_palette) and palette_bytes(palette).startswith(file_palette)
    if loss := describe_loss(opened, data):
        refuse_exact_format(mask_format, where, loss)
    mode = opened.mode
    stored = load_mask(opened, where, rule.exif)
    image = stored.image
    class_map = mask_format.map_classes(stored, where)
    if mask_format.kind == "binary" and mode == "P" and not mask_format.invert:
        refuse_inverted_palette(image, class_map.values, where)
    same = class_map.values == tuple(np.flatnonzero(class_map.pixels).tolist())
    canonical = (
        looks_canonical
        and not stored.orientation
        and getattr(opened, "n_frames", 1) == 1
        and same
        and mask_format.kind != "rgb"
        and max(class_map.values) < len(file_palette) // 3
        and np.array_equal(class_map.index, stored.read_values(where))
    )
    original = data if canonical else None
    readings = list_readings(mask_format, stored, class_map)
    return CanonicalMask(
        image.size, mode, original, class_map, stored.orientation, stored.notes, readings
    )


def refuse_exact_format(mask_format: MaskFormat, where: str, loss: str) -> None:
    """Raise DataError if a format needs exact values, which a lossy file (`loss`) does not have."""
    if mask_format.tolerance == 0 and mask_format.threshold is None:
        remedies = {"binary": "--mask-threshold 128", "rgb": "--tolerance 30"}
        remedy = remedies.get(mask_format.kind, "--mask-format values and --tolerance 10")
        raise DataError(
            f"{where} is {loss}, whose values are not exact; save masks as PNG, or add {remedy}"
        )


def refuse_inverted_palette(image: Image.Image, values: tuple[int, ...], where: str) -> None:
    """Raise DataError if the foreground is black and index 0 has another colour.

    Programs that reduce an image to two colours number them in any order, so that reading the
    indices may swap foreground and background.
    """
    colours = read_palette(image)
    foreground = max(values)
    foreground_colour = colours[foreground] if foreground < len(colours) else None
    if foreground and colours[0] != (0, 0, 0) and foreground_colour == (0, 0, 0):
        name = "white" if colours[0] == (255, 255, 255) else format_colour(colours[0])
        raise DataError(
            f"{where} has {name} at palette index 0, so background and foreground may be swapped; "
            f"add --invert if {name} is the foreground, else save it without a palette"
        )
