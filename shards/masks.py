"""Mask formats: what people have on disk -> class indices, by a declared rule and never a guess."""

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.headers import PNG_BEGIN, PNG_END, read_header
from shards.images import DEEP_MODES, ImageRule, load, open_image
from shards.sample import IGNORE, Colour, DataError, Palette, Uint8

MaskKind = Literal["binary", "index", "values", "palette", "rgb"]

ANY = ImageRule()
"""Canonical masks are single upright frames."""

LOSSY = ("JPEG", "MPO")
"""File formats whose pixel values are near what was drawn, not equal to it."""

MANY_COLOURS = 64
"""More unknown colours than this are noise of a lossy file, not classes that were forgotten."""

FEW_VALUES = 16
"""So many comparisons of a whole mask take less time than one look-up of each pixel."""

Values = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFormat:
    """How pixel values of mask files are to be read."""

    kind: MaskKind
    """`binary`: 0 and one other value. `index`: the value is the class. `values`, `palette`, `rgb`:
    see below."""
    num_classes: int
    """Classes, background included."""
    values: tuple[int, ...] = ()
    """`values` only: the pixel value of class 0, 1, 2, ..."""
    colours: tuple[tuple[int, ...], ...] = ()
    """`rgb`: the colour (R, G, B or R, G, B, A) of each class. `palette`: the same, and a file in
    which an index has another colour is refused."""
    ignore_colours: tuple[tuple[int, ...], ...] = ()
    """`rgb` only: colours that become 255 (ignored)."""
    invert: bool = False
    """`binary` only: 0 is class 1 and the other value class 0."""
    threshold: int | None = None
    """`binary` only: values from here up are foreground, whatever else occurs."""
    ignore_value: int | None = None
    """Pixel value that becomes 255 (ignored)."""
    unknown: Literal["error", "ignore"] = "error"
    """What has no class: an error, or 255 (ignored)."""
    tolerance: int = 0
    """`values` and `rgb`: how far, in each channel, a pixel may be from the value of its class."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= 255:
            raise ValueError(f"there must be 2 to 255 classes, got {self.num_classes}")
        if self.kind == "binary" and self.num_classes != 2:
            raise ValueError(f"binary masks have 2 classes, got {self.num_classes} names")
        if self.kind in ("palette", "rgb") and len(self.colours) != self.num_classes:
            raise ValueError(
                f"{len(self.colours)} colours for {self.num_classes} classes; give one for each"
            )
        if self.kind == "values" and len(self.values) != self.num_classes:
            raise ValueError(
                f"{len(self.values)} mask values for {self.num_classes} classes; give one for each"
            )
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"a mask value stands for two classes: {self.values}")
        for value in (*self.values, self.threshold, self.ignore_value):
            if value is not None and not 0 <= value <= 65535:
                raise ValueError(f"mask values are 0 to 65535, got {value}")
        of_classes = range(self.num_classes) if self.kind in ("index", "palette") else self.values
        if self.ignore_value in of_classes:
            raise ValueError(f"--ignore-value {self.ignore_value} is also the value of a class")
        self.refuse_strangers()
        self.refuse_overlap()

    def refuse_strangers(self) -> None:
        """Raise ValueError for settings that belong to another kind."""
        belongs = {
            "mask values belong to `values`": (bool(self.values), ("values",)),
            "--invert and --mask-threshold belong to `binary`": (
                self.invert or self.threshold is not None,
                ("binary",),
            ),
            "--colours belongs to `rgb`": (bool(self.colours), ("rgb", "palette")),
            "--ignore-value belongs to formats of values; name a colour `ignore` in --colours": (
                self.ignore_value is not None,
                ("binary", "index", "values", "palette"),
            ),
            "--unknown has no meaning for two classes": (
                self.unknown == "ignore",
                ("index", "values", "palette", "rgb"),
            ),
            "--tolerance belongs to `values` and `rgb`": (self.tolerance != 0, ("values", "rgb")),
        }
        for what, (used, kinds) in belongs.items():
            if used and self.kind not in kinds:
                raise ValueError(f"{what}; the format is `{self.kind}`")

    def refuse_overlap(self) -> None:
        """Raise ValueError where a pixel could be near two classes."""
        if not 0 <= self.tolerance <= 255:
            raise ValueError(f"--tolerance is 0 to 255, got {self.tolerance}")
        ignored = () if self.ignore_value is None else (self.ignore_value,)
        colours = (*self.colours, *self.ignore_colours) if self.kind == "rgb" else ()
        entries = (*((value,) for value in (*self.values, *ignored)), *colours)
        if len({len(entry) for entry in colours}) > 1:
            raise ValueError("--colours: give all colours three numbers, or all of them four")
        for one, other in combinations(entries, 2):
            apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
            if apart <= 2 * self.tolerance:
                raise ValueError(
                    f"{shown(one)} and {shown(other)} are {apart} apart"
                    + (f", too near for --tolerance {self.tolerance}" if apart else "")
                )

    def read(self, image: Image.Image, where: str) -> "ClassMap":
        """A decoded mask -> its classes. Raises DataError for what has none, with pixel counts."""
        if self.kind == "rgb":
            return self.read_colours(image, where)
        if self.kind == "palette" and image.mode != "P":
            raise DataError(
                f"{where} has no palette (mode {image.mode}); use --mask-format "
                + ("rgb with --colours" if image.mode in ("RGB", "RGBA") else "index")
            )
        pixels = mask_values(image, where)
        counts = count_values(pixels)
        table = self.table(counts, where)
        unknown = np.flatnonzero((table < 0) & (counts > 0))
        if len(unknown) and self.unknown == "error":
            raise DataError(
                f"{where} holds values without a class: {tally(counts, unknown)}; "
                + self.remedy(unknown, image.mode)
            )
        table[table < 0] = IGNORE
        if self.kind == "palette":
            self.refuse_other_palette(image, counts, where)
        present = np.flatnonzero(counts)
        by_class = np.bincount(table[present], weights=counts[present], minlength=256)
        if (table[present] == present).all():
            index = pixels.astype(np.uint8, copy=False)
        else:
            index = look_up(pixels, present, table.astype(np.uint8))
        return ClassMap(index, by_class.astype(np.int64), tuple(present.tolist()))

    def table(self, counts: NDArray[np.int64], where: str) -> NDArray[np.int64]:
        """Class of each pixel value [256 or 65536] in a file with these counts; -1: it has none."""
        table = np.full(len(counts), -1, dtype=np.int64)
        levels = np.arange(len(counts))
        match self.kind:
            case "binary":
                table[:] = self.binary_table(counts, levels, where)
            case "values":
                for number, value in enumerate(self.values):
                    table[np.abs(levels - value) <= self.tolerance] = number
            case _:
                table[: self.num_classes] = np.arange(self.num_classes)
        if self.ignore_value is not None:
            table[np.abs(levels - self.ignore_value) <= self.tolerance] = IGNORE
        return table

    def binary_table(
        self, counts: NDArray[np.int64], levels: NDArray[np.int64], where: str
    ) -> NDArray[np.int64]:
        """Class of each pixel value in this file."""
        if self.threshold is None:
            present = np.flatnonzero(counts)
            foreground = present[(present != 0) & (present != self.ignore_value)]
            if len(foreground) > 1:
                raise DataError(
                    f"{where} is not binary, it holds {tally(counts, present)}; "
                    "use --mask-threshold 128 if the edges are blurred, else --mask-format values"
                )
        bound = 1 if self.threshold is None else self.threshold
        return ((levels >= bound) ^ self.invert).astype(np.int64)

    def read_colours(self, image: Image.Image, where: str) -> "ClassMap":
        """A decoded mask in the colours of a table -> its classes."""
        mode = "RGBA" if len(self.colours[0]) == 4 else "RGB"
        if mode == "RGB":
            refuse_transparency(image, where)
        if image.mode in DEEP_MODES:
            raise DataError(f"{where} is 16-bit grey, not in colour; use --mask-format values")
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise DataError(f"{where} has mode {image.mode}; masks in colour are RGB, RGBA or P")
        if image.mode == "P":
            refuse_short_palette(image, where)
        shades, counts, runs, lengths = count_colours(image, mode)
        colours = shades[:, : len(mode)]
        classes = self.classes_of(colours)
        unknown = np.flatnonzero(classes < 0)
        if len(unknown) and self.unknown == "error":
            order = unknown[np.argsort(-counts[unknown], kind="stable")]
            shares = ", ".join(f"{shown(colours[i])}: {counts[i]:,} px" for i in order[:5])
            more = f" and {len(order) - 5:,} more" if len(order) > 5 else ""
            raise DataError(
                f"{where} holds colours without a class: {shares}{more}; "
                + (
                    "so many come from lossy or smoothed edges: --tolerance 30, or --unknown ignore"
                    if len(order) > MANY_COLOURS
                    else "name them in --colours (`ignore: [r, g, b]` counts nowhere), or add "
                    "--unknown ignore"
                )
            )
        classes[unknown] = IGNORE
        by_class = np.bincount(classes, weights=counts, minlength=256).astype(np.int64)
        index = np.repeat(classes[runs].astype(np.uint8), lengths)
        return ClassMap(index.reshape(image.height, image.width), by_class, ())

    def classes_of(self, colours: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class of each colour [N, 3 or 4]; -1 where none is within the tolerance."""
        classes = np.full(len(colours), -1, dtype=np.int64)
        numbers = (*range(self.num_classes), *(IGNORE for _ in self.ignore_colours))
        for number, colour in zip(numbers, (*self.colours, *self.ignore_colours), strict=True):
            near = (np.abs(colours - np.array(colour)) <= self.tolerance).all(axis=1)
            classes[near] = number
        return classes

    def refuse_other_palette(
        self, image: Image.Image, counts: NDArray[np.int64], where: str
    ) -> None:
        """Raise DataError where an index that occurs has another colour than was declared."""
        found = palette_of(image)
        for number in np.flatnonzero(counts[: self.num_classes]):
            colour = found[number] if number < len(found) else None
            if colour != self.colours[number]:
                seen = "no colour" if colour is None else shown(colour)
                raise DataError(
                    f"{where} shows index {number} in {seen}, others in "
                    f"{shown(self.colours[number])}, so one number may mean two classes; "
                    "go by the colours: --mask-format rgb with --colours"
                )

    def remedy(self, unknown: NDArray[np.int64], mode: str) -> str:
        """The likeliest way out for values that have no class."""
        if len(unknown) == 1:
            return f"if these pixels do not count, add --ignore-value {unknown[0]}"
        if mode == "P":
            return "they are palette indices: name them all, or go by colours: --mask-format rgb"
        if self.kind == "index":
            return (
                f"{self.num_classes} classes allow 0 to {self.num_classes - 1}: "
                "name them all with --classes, or use --mask-format values"
            )
        return "name them all with --mask-values and --classes, or add --unknown ignore"

    def source_values(self, foreground: int | None) -> tuple[int, ...]:
        """The pixel value that stands for each class in the files; () for colours.

        `foreground` is the one value other than 0 that binary masks held, None if they differ.
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
    """The classes of one mask."""

    index: Uint8
    """Class indices [H, W], 255 = ignore."""
    pixels: NDArray[np.int64]
    """Pixels of each index [256]."""
    values: tuple[int, ...]
    """Pixel values that the file held; () for colours."""


@dataclass(frozen=True, slots=True)
class CanonicalMask:
    """A mask as it goes into a shard."""

    size: tuple[int, int]
    """(width, height)."""
    mode: str
    """Pillow's mode of the file."""
    own: bytes | None
    """The file's bytes, where they are canonical already."""
    classes: ClassMap | None
    """None where only the header was looked at."""

    def resized(self, size: tuple[int, int]) -> "CanonicalMask":
        """The same at another (width, height), by nearest neighbour."""
        assert self.classes is not None
        index = np.asarray(
            Image.fromarray(self.classes.index).resize(size, Image.Resampling.NEAREST)
        )
        classes = ClassMap(index, count_values(index), self.classes.values)
        return CanonicalMask(size, self.mode, None, classes)

    def encode(self, palette: Palette) -> bytes:
        """PNG of mode P."""
        if self.own is not None:
            return self.own
        assert self.classes is not None
        return encode_mask(self.classes.index, palette)


def read_mask(
    data: bytes,
    form: MaskFormat,
    palette: Palette,
    where: str,
    *,
    rule: ImageRule = ANY,
    pixels: bool = True,
) -> CanonicalMask:
    """A mask file in canonical form; its own bytes where it is canonical already.

    Args:
        data: the file's bytes.
        form: the declared mask format.
        palette: the manifest's.
        where: names the file in messages.
        rule: what holds for pictures: frames, EXIF orientation, most pixels.
        pixels: False believes a header that says what a canonical mask's would.

    Raises DataError for what the declared format does not cover.
    """
    if not pixels and (header := read_header(data)) is not None:
        ours = header.mode == "P" and palette_bytes(palette).startswith(header.palette)
        plain = form.kind in ("index", "palette") and form.ignore_value in (None, IGNORE)
        if ours and plain and header.size[0] * header.size[1] <= rule.max_pixels:
            return CanonicalMask(header.size, "P", data, None)
    opened = open_image(data, where, rule)
    own_palette = header_palette(opened) if opened.format == "PNG" else b""
    looks_canonical = bool(own_palette) and palette_bytes(palette).startswith(own_palette)
    if opened.format in LOSSY and form.tolerance == 0 and form.threshold is None:
        remedy = {"binary": "--mask-threshold 128", "rgb": "--tolerance 30"}
        raise DataError(
            f"{where} is a JPEG, whose values are near the true ones but not equal; save masks as "
            f"PNG, or add {remedy.get(form.kind, '--mask-format values and --tolerance 10')}"
        )
    mode = opened.mode
    image, oriented = load(opened, where, rule.exif)
    classes = form.read(image, where)
    if form.kind == "binary" and mode == "P" and not form.invert:
        refuse_inverted(image, classes.values, where)
    same = classes.values == tuple(np.flatnonzero(classes.pixels).tolist())
    canonical = (
        looks_canonical
        and not oriented
        and getattr(opened, "n_frames", 1) == 1
        and same
        and form.kind != "rgb"
        and max(classes.values) < len(own_palette) // 3
        and np.array_equal(classes.index, mask_values(image, where))
    )
    return CanonicalMask(image.size, mode, data if canonical else None, classes)


def refuse_inverted(image: Image.Image, values: tuple[int, ...], where: str) -> None:
    """Raise DataError where a black and white palette has white as its index 0.

    Programs that save a black and white picture as GIF may number the colours so; read as it
    stands, such a mask has foreground and background swapped.
    """
    colours = palette_of(image)
    foreground = max(values)
    shown_as = colours[foreground] if foreground < len(colours) else None
    if foreground and colours[:1] == ((255, 255, 255),) and shown_as == (0, 0, 0):
        raise DataError(
            f"{where} has white as its index 0, so background and foreground may be swapped; "
            "add --invert if white is the foreground, else save it without a palette"
        )


def mask_values(image: Image.Image, where: str) -> Values:
    """The stored values [H, W]: indices of a palette, never the luminance of its colours."""
    match image.mode:
        case "1":
            return np.asarray(image).astype(np.uint8)
        case "L" | "P":
            return np.asarray(image)
        case "I;16" | "I;16B" | "I;16L" | "I":
            wide = np.asarray(image)
            if wide.min() < 0 or wide.max() > 65535:
                raise DataError(
                    f"{where} holds values from {wide.min()} to {wide.max()}; masks hold 0 to 65535"
                )
            return wide.astype(np.uint8) if wide.max() < 256 else wide.astype(np.uint16)
        case "RGB" | "RGBA" | "LA":
            refuse_transparency(image, where)
            bands = np.asarray(image)
            colours = bands[..., : 3 if image.mode != "LA" else 1]
            if (colours == colours[..., :1]).all():
                return np.ascontiguousarray(colours[..., 0])
            raise DataError(
                f"{where} is in colour (mode {image.mode}); use --mask-format rgb with --colours, "
                "a table of the colour of each class"
            )
        case mode:
            raise DataError(f"{where} has mode {mode}; masks are modes 1, L, P, I;16, RGB or RGBA")


def refuse_transparency(image: Image.Image, where: str) -> None:
    """Raise DataError where an alpha channel says something."""
    if image.mode in ("RGBA", "LA"):
        least, most = image.getchannel("A").getextrema()
        if least != most:
            raise DataError(
                f"{where} has transparent pixels, which may mean a class; give them one with "
                "--mask-format rgb and colours of four numbers, or flatten it"
            )


def look_up(pixels: Values, present: NDArray[np.int64], table: Uint8) -> Uint8:
    """`table[pixels]`, faster where few values are present, as in masks."""
    if len(present) > FEW_VALUES:
        return table[pixels]
    index: Uint8 | None = None
    for value in present:
        if table[value]:
            found = (pixels == value).view(np.uint8)
            if table[value] != 1:
                found *= table[value]
            if index is None:
                index = found
            else:
                index |= found
    return np.zeros(pixels.shape, dtype=np.uint8) if index is None else index


def count_values(pixels: Values) -> NDArray[np.int64]:
    """Pixels of each value [256], [65536] for 16 bits."""
    counts = np.zeros(256 if pixels.dtype == np.uint8 else 65536, dtype=np.int64)
    flat = pixels.ravel()
    # Most masks hold two values, and to compare is twice as fast as to look for runs.
    for_first = flat == flat[0]
    counts[flat[0]] = np.count_nonzero(for_first)
    second = flat[for_first.argmin()]
    counts[second] = np.count_nonzero(flat == second)
    if counts.sum() == len(flat):
        return counts
    values, lengths = runs_of(flat)
    return np.bincount(values, weights=lengths, minlength=len(counts)).astype(np.int64)


def count_colours(image: Image.Image, mode: str) -> tuple[NDArray[np.int64], ...]:
    """Each colour (R, G, B, A) [N, 4] and its pixels [N]; the colour and the length of each run."""
    # Four bytes a pixel are one number, and equal neighbours need be looked up only once.
    codes, lengths = runs_of(np.asarray(image.convert(mode).convert("RGBA")).view("<u4").ravel())
    found, runs = np.unique(codes, return_inverse=True)
    counts = np.bincount(runs, weights=lengths).astype(np.int64)
    return found.view(np.uint8).reshape(-1, 4).astype(np.int64), counts, runs, lengths


def runs_of(flat: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The value and the length of each run of equal neighbours: few, in masks."""
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], starts)) if len(flat) else starts
    return flat[starts], np.diff(np.append(starts, len(flat)))


def tally(counts: NDArray[np.int64], values: NDArray[np.int64]) -> str:
    """`0: 1,234 px, 255: 5 px`, at most five of them, the commonest first."""
    order = values[np.argsort(-counts[values], kind="stable")]
    listed = ", ".join(f"{v}: {counts[v]:,} px" for v in order[:5])
    return listed + (f" and {len(order) - 5:,} more" if len(order) > 5 else "")


def shown(colour: tuple[int, ...] | NDArray[np.int64]) -> str:
    """`(255, 0, 0)`, or the number itself where there is one."""
    numbers = [str(int(part)) for part in colour]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


def header_palette(image: Image.Image) -> bytes:
    """The palette of a file of mode P that is not decoded yet (`getpalette` would decode it)."""
    return bytes(image.palette.palette) if image.mode == "P" and image.palette else b""


def refuse_short_palette(image: Image.Image, where: str) -> None:
    """Raise DataError where an index has no colour: Pillow would take it for black."""
    most, size = int(np.asarray(image).max()), len(palette_of(image))
    if most >= size:
        raise DataError(
            f"{where} holds index {most}, its palette only {size} colours; save it anew, or use "
            "--mask-format index"
        )


def palette_of(image: Image.Image) -> Palette:
    """The colours of a picture of mode P, in the order of its indices."""
    numbers = image.getpalette("RGB") or []
    return tuple(
        (numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers) - 2, 3)
    )


def decode_mask(data: bytes, num_classes: int, where: str) -> Uint8:
    """Bytes of a canonical mask (PNG, mode P or L) -> class indices uint8 [H, W].

    Raises DataError for what is none, and for an index that no class has.
    """
    mask = unpack_mask(data)
    if mask is None:
        image, _ = load(open_image(data, where, ANY), where)
        if image.mode not in ("P", "L"):
            raise DataError(
                f"{where} is no canonical mask: mode {image.mode}, not P; pack it again"
            )
        mask = np.asarray(image)
    if mask.max(initial=0) >= num_classes and ((mask >= num_classes) & (mask != IGNORE)).any():
        counts = count_values(mask)
        beyond = np.flatnonzero(counts[num_classes:IGNORE]) + num_classes
        raise DataError(
            f"{where} holds values without a class: {tally(counts, beyond)}; pack the data set "
            "again (pack --verify full looks at every pixel)"
        )
    return mask


def encode_mask(mask: Uint8, palette: Palette) -> bytes:
    """Class indices uint8 [H, W] -> PNG of mode P, seen in the colours of its classes.

    PNG, third edition (W3C 2025): colour type 3, no filter, no interlace. Few classes take few
    bits a pixel, and run lengths (zlib's Z_RLE) are what masks are made of: a quarter of Pillow's
    time, and faster to read ever after.
    """
    height, width = mask.shape
    most = int(mask.max(initial=0))
    bits = next(bits for bits in (1, 2, 4, 8) if most < 2**bits)
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
    """Values [H, W] of so many bits -> bytes [H, ceil(W bits / 8)], the leftmost value highest."""
    if bits == 8:
        return mask
    if bits == 1:
        return np.packbits(mask, axis=1)
    each = 8 // bits
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % each)))
    packed = np.zeros((mask.shape[0], padded.shape[1] // each), dtype=np.uint8)
    for place in range(each):
        packed |= padded[:, place::each] << (8 - bits * (place + 1))
    return packed


def unpack_mask(data: bytes) -> Uint8 | None:
    """Class indices of a PNG as `encode_mask` writes it, in a third of Pillow's time.

    None for every other file, damaged ones among them.
    """
    try:
        width, height, bits = struct.unpack_from(">IIB", data, 16)
        (palette_length,) = struct.unpack_from(">I", data, 33)
        begin = 45 + palette_length
        length, kind = struct.unpack_from(">I4s", data, begin)
        # Each chunk, from its kind on, is followed by its check sum.
        spans = [(12, 29), (37, begin - 4), (begin + 4, begin + 8 + length)]
        if any(struct.unpack_from(">I", data, b)[0] != zlib.crc32(data[a:b]) for a, b in spans):
            return None
    except struct.error:
        return None
    packed = data[begin + 8 : begin + 8 + length]
    ordinary = data.startswith(PNG_BEGIN) and data[37:41] == b"PLTE" and kind == b"IDAT"
    if not ordinary or data[25:29] != bytes((3, 0, 0, 0)) or bits not in (1, 2, 4, 8):
        return None
    if palette_length > 3 * 2**bits or data[begin + 12 + length :] != PNG_END:
        return None
    if width * height > ANY.max_pixels:
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
    # The first byte of a row names its filter.
    return None if rows[:, 0].any() else unpack_bits(rows[:, 1:], bits, width)


def unpack_bits(packed: Uint8, bits: int, width: int) -> Uint8:
    """What `pack_bits` packed, [H, width]."""
    if bits == 8:
        return packed
    if bits == 1:
        return np.unpackbits(packed, axis=1, count=width)
    each = 8 // bits
    mask = np.empty((packed.shape[0], packed.shape[1] * each), dtype=np.uint8)
    for place in range(each):
        mask[:, place::each] = packed >> (8 - bits * (place + 1)) & (2**bits - 1)
    return mask[:, :width]


@lru_cache
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


def colour(index: int) -> Colour:
    """The index-th colour: hues a golden ratio apart, every third ring darker."""
    hue = (index * 0.618034) % 1.0 * 6
    value = (255, 190, 225)[index % 3]
    rgb = [min(1.0, max(0.0, abs((hue + shift) % 6 - 3) - 1)) for shift in (0, 4, 2)]
    red, green, blue = (round(value * (0.2 + 0.8 * part)) for part in rgb)
    return red, green, blue
