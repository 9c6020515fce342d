"""Mask formats: from the pixel values of mask files to class indices, by declared rules only."""

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.headers import PNG_END, PNG_START, read_image_header
from shards.images import GREY16_MODES, ImageRule, load_pixels, open_image
from shards.sample import IGNORE, Colour, DataError, Palette, Uint8

MaskKind = Literal["binary", "index", "values", "palette", "rgb"]

CANONICAL_RULE = ImageRule()
"""Canonical masks are single upright frames."""

LOSSY_FORMATS = ("JPEG", "MPO")
"""File formats whose pixel values are only close to those that were saved."""

MAX_CLASS_COLOURS = 64
"""More unknown colours than this are compression noise, not forgotten classes."""

MAX_COMPARED_VALUES = 16
"""Up to this many values, comparing the entire mask is faster than a table look-up per pixel."""

Values = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFormat:
    """How the pixel values of mask files are read. Raises ValueError for contradictory settings."""

    kind: MaskKind
    """`binary`: 0 and one other value. `index`: the value is the class index. `values`, `palette`,
    `rgb`: see below."""
    num_classes: int
    """Number of classes, including the background."""
    values: tuple[int, ...] = ()
    """`values` only: the pixel value of class 0, 1, 2, ..."""
    colours: tuple[tuple[int, ...], ...] = ()
    """`rgb`: the colour (R, G, B or R, G, B, A) of each class. `palette`: the palette colour of
    each class; a file with another colour at one of these indices is refused."""
    ignore_colours: tuple[tuple[int, ...], ...] = ()
    """`rgb` only: colours that become 255 (ignored)."""
    invert: bool = False
    """`binary` only: 0 is class 1 and the other value class 0."""
    threshold: int | None = None
    """`binary` only: values >= this are foreground, and any values may occur."""
    ignore_value: int | None = None
    """Pixel value that becomes 255 (ignored)."""
    unknown: Literal["error", "ignore"] = "error"
    """Pixels without a class: an error, or 255 (ignored)."""
    tolerance: int = 0
    """`values` and `rgb`: maximum difference, per channel, between a pixel and its class value."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= 255:
            raise ValueError(f"there must be 2 to 255 classes, got {self.num_classes}")
        if self.kind == "binary" and self.num_classes != 2:
            raise ValueError(f"binary masks have 2 classes, got {self.num_classes} names")
        if self.kind in ("palette", "rgb") and len(self.colours) != self.num_classes:
            raise ValueError(
                f"{len(self.colours)} colours for {self.num_classes} classes; give one per class"
            )
        if self.kind == "values" and len(self.values) != self.num_classes:
            raise ValueError(
                f"{len(self.values)} mask values for {self.num_classes} classes; give one per class"
            )
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"each class needs a mask value of its own, got {self.values}")
        for value in (*self.values, self.threshold, self.ignore_value):
            if value is not None and not 0 <= value <= 65535:
                raise ValueError(f"mask values must be 0 to 65535, got {value}")
        class_values = range(self.num_classes) if self.kind in ("index", "palette") else self.values
        if self.ignore_value in class_values:
            raise ValueError(f"--ignore-value {self.ignore_value} is also the value of a class")
        self.refuse_inapplicable_settings()
        self.refuse_overlapping_classes()

    def refuse_inapplicable_settings(self) -> None:
        """Raise ValueError for settings that apply to another kind only."""
        applicable = {
            "mask values apply to `values` only": (bool(self.values), ("values",)),
            "--invert and --mask-threshold apply to `binary` only": (
                self.invert or self.threshold is not None,
                ("binary",),
            ),
            "--colours applies to `rgb` only": (bool(self.colours), ("rgb", "palette")),
            "--ignore-value applies to values, not colours; use `ignore` in --colours": (
                self.ignore_value is not None,
                ("binary", "index", "values", "palette"),
            ),
            "--unknown does not apply to two classes": (
                self.unknown == "ignore",
                ("index", "values", "palette", "rgb"),
            ),
            "--tolerance applies to `values` and `rgb` only": (
                self.tolerance != 0,
                ("values", "rgb"),
            ),
        }
        for problem, (used, kinds) in applicable.items():
            if used and self.kind not in kinds:
                raise ValueError(f"{problem}; the format is `{self.kind}`")

    def refuse_overlapping_classes(self) -> None:
        """Raise ValueError if a pixel could be within the tolerance of two classes."""
        if not 0 <= self.tolerance <= 255:
            raise ValueError(f"--tolerance must be 0 to 255, got {self.tolerance}")
        ignored = () if self.ignore_value is None else (self.ignore_value,)
        colours = (*self.colours, *self.ignore_colours) if self.kind == "rgb" else ()
        entries = (*((value,) for value in (*self.values, *ignored)), *colours)
        if len({len(entry) for entry in colours}) > 1:
            raise ValueError("--colours: either all colours have three numbers, or all have four")
        for one, other in combinations(entries, 2):
            distance = max(abs(a - b) for a, b in zip(one, other, strict=True))
            if distance <= 2 * self.tolerance:
                raise ValueError(
                    f"{format_colour(one)} and {format_colour(other)} differ by {distance}, too "
                    f"little for --tolerance {self.tolerance}"
                    if distance
                    else f"{format_colour(one)} is listed twice"
                )

    def map_classes(self, image: Image.Image, where: str) -> "ClassMap":
        """Convert a decoded mask to class indices.

        Raises DataError, with pixel counts, for pixels that have no class.
        """
        if self.kind == "rgb":
            return self.map_colours(image, where)
        if self.kind == "palette" and image.mode != "P":
            raise DataError(
                f"{where} has no palette (mode {image.mode}); use --mask-format "
                + ("rgb with --colours" if image.mode in ("RGB", "RGBA") else "index")
            )
        pixels = read_stored_values(image, where)
        counts = count_pixel_values(pixels)
        table = self.build_table(counts, where)
        unknown = np.flatnonzero((table < 0) & (counts > 0))
        if len(unknown) and self.unknown == "error":
            raise DataError(
                f"{where} has values without a class: {format_counts(counts, unknown)}; "
                + self.suggest_remedy(unknown, image.mode)
            )
        table[table < 0] = IGNORE
        if self.kind == "palette":
            self.refuse_other_palette(image, counts, where)
        present = np.flatnonzero(counts)
        by_class = np.bincount(table[present], weights=counts[present], minlength=256)
        if (table[present] == present).all():
            index = pixels.astype(np.uint8, copy=False)
        else:
            index = apply_table(pixels, present, table.astype(np.uint8))
        return ClassMap(index, by_class.astype(np.int64), tuple(present.tolist()))

    def build_table(self, counts: NDArray[np.int64], where: str) -> NDArray[np.int64]:
        """Build the table [256 or 65536] from pixel value to class index, -1 if it has none.

        Args:
            counts: pixels of each value in the file.
            where: name of the file in error messages.
        """
        table = np.full(len(counts), -1, dtype=np.int64)
        levels = np.arange(len(counts))
        match self.kind:
            case "binary":
                table[:] = self.build_binary_table(counts, levels, where)
            case "values":
                for index, value in enumerate(self.values):
                    table[np.abs(levels - value) <= self.tolerance] = index
            case _:
                table[: self.num_classes] = np.arange(self.num_classes)
        if self.ignore_value is not None:
            table[np.abs(levels - self.ignore_value) <= self.tolerance] = IGNORE
        return table

    def build_binary_table(
        self, counts: NDArray[np.int64], levels: NDArray[np.int64], where: str
    ) -> NDArray[np.int64]:
        """Build the table from pixel value to class index 0 or 1."""
        if self.threshold is None:
            present = np.flatnonzero(counts)
            foreground = present[(present != 0) & (present != self.ignore_value)]
            if len(foreground) > 1:
                raise DataError(
                    f"{where} is not binary: it has {format_counts(counts, present)}; "
                    "use --mask-threshold 128 if the edges are blurred, else --mask-format values"
                )
        bound = 1 if self.threshold is None else self.threshold
        return ((levels >= bound) ^ self.invert).astype(np.int64)

    def map_colours(self, image: Image.Image, where: str) -> "ClassMap":
        """Convert a decoded colour mask to class indices by the table of colours."""
        mode = "RGBA" if len(self.colours[0]) == 4 else "RGB"
        if mode == "RGB":
            refuse_transparent_pixels(image, where)
        if image.mode in GREY16_MODES:
            raise DataError(f"{where} is 16-bit grey, not in colour; use --mask-format values")
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise DataError(f"{where} has mode {image.mode}; colour masks must be RGB, RGBA or P")
        if image.mode == "P":
            refuse_short_palette(image, where)
        rgba, counts, runs, lengths = count_colours(image, mode)
        colours = rgba[:, : len(mode)]
        classes = self.match_colours(colours)
        unknown = np.flatnonzero(classes < 0)
        if len(unknown) and self.unknown == "error":
            order = unknown[np.argsort(-counts[unknown], kind="stable")]
            examples = ", ".join(
                f"{format_colour(colours[i])}: {counts[i]:,} px" for i in order[:5]
            )
            more = f" and {len(order) - 5:,} more" if len(order) > 5 else ""
            raise DataError(
                f"{where} has colours without a class: {examples}{more}; "
                + (
                    "so many come from lossy compression or smoothed edges: add --tolerance 30, "
                    "or --unknown ignore"
                    if len(order) > MAX_CLASS_COLOURS
                    else "list them in --colours (as `ignore: [r, g, b]` to ignore one), or "
                    "add --unknown ignore"
                )
            )
        classes[unknown] = IGNORE
        by_class = np.bincount(classes, weights=counts, minlength=256).astype(np.int64)
        index = np.repeat(classes[runs].astype(np.uint8), lengths)
        return ClassMap(index.reshape(image.height, image.width), by_class, ())

    def match_colours(self, colours: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class index of each colour [N, 3 or 4]; -1 if none is within the tolerance."""
        classes = np.full(len(colours), -1, dtype=np.int64)
        indices = (*range(self.num_classes), *(IGNORE for _ in self.ignore_colours))
        for index, colour in zip(indices, (*self.colours, *self.ignore_colours), strict=True):
            near = (np.abs(colours - np.array(colour)) <= self.tolerance).all(axis=1)
            classes[near] = index
        return classes

    def refuse_other_palette(
        self, image: Image.Image, counts: NDArray[np.int64], where: str
    ) -> None:
        """Raise DataError if an index that occurs has another colour than declared."""
        palette = read_palette(image)
        for index in np.flatnonzero(counts[: self.num_classes]):
            colour = palette[index] if index < len(palette) else None
            if colour != self.colours[index]:
                actual = "no colour" if colour is None else format_colour(colour)
                raise DataError(
                    f"{where} has {actual} at palette index {index}, other files have "
                    f"{format_colour(self.colours[index])}, so an index may stand for two classes; "
                    "read the colours instead: --mask-format rgb with --colours"
                )

    def suggest_remedy(self, unknown: NDArray[np.int64], mode: str) -> str:
        """Return the most likely remedy for values that have no class."""
        if len(unknown) == 1:
            return f"to ignore these pixels, add --ignore-value {unknown[0]}"
        if mode == "P":
            return (
                "they are palette indices: name them all with --classes, or read the colours: "
                "--mask-format rgb"
            )
        if self.kind == "index":
            return (
                f"{self.num_classes} classes allow 0 to {self.num_classes - 1}: "
                "name them all with --classes, or use --mask-format values"
            )
        return "name them all with --mask-values and --classes, or add --unknown ignore"

    def source_values(self, foreground: int | None) -> tuple[int, ...]:
        """Return the pixel value of each class in the files; () for colours.

        `foreground` is the value other than 0 in binary masks, None if files differ.
        """
        match self.kind:
            case "binary":
                pair = (0, 255 if foreground is None else foreground)
                return pair[::-1] if self.invert else pair
            case "index" | "palette":
                return tuple(range(self.num_classes))
            case "values":
                return self.values
            case "rgb":
                return ()


@dataclass(frozen=True, slots=True)
class ClassMap:
    """The class indices of one mask."""

    index: Uint8
    """Class indices [H, W], 255 = ignore."""
    pixels: NDArray[np.int64]
    """Pixel count of each index [256]."""
    values: tuple[int, ...]
    """Pixel values that occur in the file; () for colours."""


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

    def resize(self, size: tuple[int, int]) -> "CanonicalMask":
        """Resize to (width, height) by nearest neighbour."""
        assert self.class_map is not None
        index = np.asarray(
            Image.fromarray(self.class_map.index).resize(size, Image.Resampling.NEAREST)
        )
        class_map = ClassMap(index, count_pixel_values(index), self.class_map.values)
        return CanonicalMask(size, self.mode, None, class_map)

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
    if opened.format in LOSSY_FORMATS:
        refuse_exact_format(mask_format, where)
    mode = opened.mode
    image, oriented = load_pixels(opened, where, rule.exif)
    class_map = mask_format.map_classes(image, where)
    if mask_format.kind == "binary" and mode == "P" and not mask_format.invert:
        refuse_inverted_palette(image, class_map.values, where)
    same = class_map.values == tuple(np.flatnonzero(class_map.pixels).tolist())
    canonical = (
        looks_canonical
        and not oriented
        and getattr(opened, "n_frames", 1) == 1
        and same
        and mask_format.kind != "rgb"
        and max(class_map.values) < len(file_palette) // 3
        and np.array_equal(class_map.index, read_stored_values(image, where))
    )
    return CanonicalMask(image.size, mode, data if canonical else None, class_map)


def refuse_exact_format(mask_format: MaskFormat, where: str) -> None:
    """Raise DataError if a format needs exact values, which a lossy file does not have."""
    if mask_format.tolerance == 0 and mask_format.threshold is None:
        remedies = {"binary": "--mask-threshold 128", "rgb": "--tolerance 30"}
        remedy = remedies.get(mask_format.kind, "--mask-format values and --tolerance 10")
        raise DataError(
            f"{where} is a JPEG, whose values are not exact; save masks as PNG, or add {remedy}"
        )


def refuse_inverted_palette(image: Image.Image, values: tuple[int, ...], where: str) -> None:
    """Raise DataError if a black and white palette has white at index 0.

    Programs that save a black and white image as GIF may number the colours in this order, so that
    reading the indices would swap foreground and background.
    """
    colours = read_palette(image)
    foreground = max(values)
    foreground_colour = colours[foreground] if foreground < len(colours) else None
    if foreground and colours[:1] == ((255, 255, 255),) and foreground_colour == (0, 0, 0):
        raise DataError(
            f"{where} has white at palette index 0, so background and foreground may be swapped; "
            "add --invert if white is the foreground, else save it without a palette"
        )


def read_stored_values(image: Image.Image, where: str) -> Values:
    """Return the stored values [H, W]: palette indices, never the luminance of their colours.

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
            raise DataError(
                f"{where} has transparent pixels, which may stand for a class; declare it with "
                "--mask-format rgb and colours of four numbers, or flatten the mask"
            )


def apply_table(pixels: Values, present: NDArray[np.int64], table: Uint8) -> Uint8:
    """Return `table[pixels]`, faster if few values are present, as in masks."""
    if len(present) > MAX_COMPARED_VALUES:
        return table[pixels]
    index: Uint8 | None = None
    for value in present:
        if table[value]:
            equal = (pixels == value).view(np.uint8)
            if table[value] != 1:
                equal *= table[value]
            if index is None:
                index = equal
            else:
                index |= equal
    return np.zeros(pixels.shape, dtype=np.uint8) if index is None else index


def count_pixel_values(pixels: Values) -> NDArray[np.int64]:
    """Count the pixels of each value: [256], or [65536] for 16 bits."""
    counts = np.zeros(256 if pixels.dtype == np.uint8 else 65536, dtype=np.int64)
    flat = pixels.ravel()
    # Most masks have two values, and comparing is twice as fast as finding runs.
    is_first = flat == flat[0]
    counts[flat[0]] = np.count_nonzero(is_first)
    second = flat[is_first.argmin()]
    counts[second] = np.count_nonzero(flat == second)
    if counts.sum() == len(flat):
        return counts
    values, lengths = find_runs(flat)
    return np.bincount(values, weights=lengths, minlength=len(counts)).astype(np.int64)


def count_colours(image: Image.Image, mode: str) -> tuple[NDArray[np.int64], ...]:
    """Count the pixels of each colour of an image converted to `mode`.

    Returns:
        colours (R, G, B, A) [N, 4], their pixel counts [N], and for each run of equal pixels the
        row of its colour and its length.
    """
    # Four bytes per pixel are one integer, and equal neighbours need only one look-up.
    codes, lengths = find_runs(np.asarray(image.convert(mode).convert("RGBA")).view("<u4").ravel())
    unique, runs = np.unique(codes, return_inverse=True)
    counts = np.bincount(runs, weights=lengths).astype(np.int64)
    return unique.view(np.uint8).reshape(-1, 4).astype(np.int64), counts, runs, lengths


def find_runs(flat: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the value and the length of each run of equal neighbours; masks have few runs."""
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], starts)) if len(flat) else starts
    return flat[starts], np.diff(np.append(starts, len(flat)))


def format_counts(counts: NDArray[np.int64], values: NDArray[np.int64]) -> str:
    """Format as `0: 1,234 px, 255: 5 px`, the five most common values first."""
    order = values[np.argsort(-counts[values], kind="stable")]
    listed = ", ".join(f"{v}: {counts[v]:,} px" for v in order[:5])
    return listed + (f" and {len(order) - 5:,} more" if len(order) > 5 else "")


def format_colour(colour: tuple[int, ...] | NDArray[np.int64]) -> str:
    """Format as `(255, 0, 0)`, or as the number itself if there is only one."""
    numbers = [str(int(part)) for part in colour]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


def read_header_palette(image: Image.Image) -> bytes:
    """Return the palette of an image of mode P without decoding it, as `getpalette` would."""
    return bytes(image.palette.palette) if image.mode == "P" and image.palette else b""


def refuse_short_palette(image: Image.Image, where: str) -> None:
    """Raise DataError if an index has no palette colour: Pillow would read it as black."""
    max_index, size = int(np.asarray(image).max()), len(read_palette(image))
    if max_index >= size:
        raise DataError(
            f"{where} has index {max_index}, but its palette has only {size} colours; "
            "save it again, or use --mask-format index"
        )


def read_palette(image: Image.Image) -> Palette:
    """Return the colours of an image of mode P, in the order of its indices."""
    numbers = image.getpalette("RGB") or []
    return tuple(
        (numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers) - 2, 3)
    )


def decode_mask(data: bytes, num_classes: int, where: str) -> Uint8:
    """Decode a canonical mask (PNG, mode P or L) to class indices uint8 [H, W].

    Raises DataError if it is not canonical or has an index without a class.
    """
    mask = unpack_mask(data)
    if mask is None:
        image, _ = load_pixels(open_image(data, where, CANONICAL_RULE), where)
        if image.mode not in ("P", "L"):
            raise DataError(
                f"{where} is not a canonical mask (mode {image.mode}, expected P); pack it again"
            )
        mask = np.asarray(image)
    if mask.max(initial=0) >= num_classes and ((mask >= num_classes) & (mask != IGNORE)).any():
        counts = count_pixel_values(mask)
        beyond = np.flatnonzero(counts[num_classes:IGNORE]) + num_classes
        raise DataError(
            f"{where} has values without a class: {format_counts(counts, beyond)}; pack the data "
            "set again (pack --verify full checks every pixel)"
        )
    return mask


def encode_mask(mask: Uint8, palette: Palette) -> bytes:
    """Encode class indices uint8 [H, W] as PNG of mode P in the colours of their classes.

    PNG, third edition (W3C 2025): colour type 3, no filter, no interlace. Few classes need few
    bits per pixel, and run-length encoding (zlib's Z_RLE) suits masks: a quarter of Pillow's time,
    and faster to decode.
    """
    height, width = mask.shape
    max_index = int(mask.max(initial=0))
    bits = next(bits for bits in (1, 2, 4, 8) if max_index < 2**bits)
    packed = pack_bits(mask, bits)
    rows = np.zeros((height, packed.shape[1] + 1), dtype=np.uint8)
    rows[:, 1:] = packed
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 3, 0, 0, 0)),
        (b"PLTE", palette_bytes(palette)[: 3 * 2**bits]),
        (b"IDAT", deflate.compress(rows.tobytes()) + deflate.flush()),
        (b"IEND", b""),
    )
    out = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        out += [struct.pack(">I", len(data)), kind, data]
        out.append(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
    return b"".join(out)


def pack_bits(mask: Uint8, bits: int) -> Uint8:
    """Pack values [H, W] of `bits` bits into bytes [H, ceil(W bits / 8)], high bits first."""
    if bits == 8:
        return mask
    if bits == 1:
        return np.packbits(mask, axis=1)
    per_byte = 8 // bits
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % per_byte)))
    packed = np.zeros((mask.shape[0], padded.shape[1] // per_byte), dtype=np.uint8)
    for place in range(per_byte):
        packed |= padded[:, place::per_byte] << (8 - bits * (place + 1))
    return packed


def unpack_mask(data: bytes) -> Uint8 | None:
    """Decode a PNG as written by `encode_mask` to class indices, in a third of Pillow's time.

    Returns None for every other file, including damaged ones.
    """
    try:
        width, height, bits = struct.unpack_from(">IIB", data, 16)
        (palette_length,) = struct.unpack_from(">I", data, 33)
        start = 45 + palette_length
        length, kind = struct.unpack_from(">I4s", data, start)
        # The kind and content of each chunk are followed by their checksum.
        spans = [(12, 29), (37, start - 4), (start + 4, start + 8 + length)]
        if any(struct.unpack_from(">I", data, b)[0] != zlib.crc32(data[a:b]) for a, b in spans):
            return None
    except struct.error:
        return None
    packed = data[start + 8 : start + 8 + length]
    ordinary = data.startswith(PNG_START) and data[37:41] == b"PLTE" and kind == b"IDAT"
    if not ordinary or data[25:29] != bytes((3, 0, 0, 0)) or bits not in (1, 2, 4, 8):
        return None
    if palette_length > 3 * 2**bits or data[start + 12 + length :] != PNG_END:
        return None
    if width * height > CANONICAL_RULE.max_pixels:
        return None
    row = 1 + -(-width * bits // 8)
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(packed, height * row + 1)
    except zlib.error:
        return None
    if len(raw) != height * row or not inflate.eof:
        return None
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(height, row)
    # The first byte of a row is its filter type.
    return None if rows[:, 0].any() else unpack_bits(rows[:, 1:], bits, width)


def unpack_bits(packed: Uint8, bits: int, width: int) -> Uint8:
    """Undo `pack_bits`; returns values [H, width]."""
    if bits == 8:
        return packed
    if bits == 1:
        return np.unpackbits(packed, axis=1, count=width)
    per_byte = 8 // bits
    mask = np.empty((packed.shape[0], packed.shape[1] * per_byte), dtype=np.uint8)
    for place in range(per_byte):
        mask[:, place::per_byte] = packed >> (8 - bits * (place + 1)) & (2**bits - 1)
    return mask[:, :width]


@lru_cache
def palette_bytes(palette: Palette) -> bytes:
    """Return the 768 bytes of a PNG palette: class colours, white for 255 (ignore), else grey."""
    table = np.full((256, 3), 128, dtype=np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 255
    return table.tobytes()


def default_palette(classes: tuple[str, ...]) -> Palette:
    """Return distinct colours: black for `background` or the first of two classes, then hues."""
    plain = len(classes) == 2 or (bool(classes) and classes[0].lower() == "background")
    return ((0, 0, 0),) * plain + tuple(generate_colour(i) for i in range(len(classes) - plain))


def generate_colour(number: int) -> Colour:
    """Generate the colour of a number: hues a golden ratio apart, in three levels of brightness."""
    hue = (number * 0.618034) % 1.0 * 6
    value = (255, 190, 225)[number % 3]
    rgb = [min(1.0, max(0.0, abs((hue + shift) % 6 - 3) - 1)) for shift in (0, 4, 2)]
    red, green, blue = (round(value * (0.2 + 0.8 * part)) for part in rgb)
    return red, green, blue
