"""Declared mask formats: how the values of a file become class indices."""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from shards.images.tiff import GREY16_MODES
from shards.masks.counts import Values, count_colours, count_pixel_values, format_counts
from shards.masks.palettes import format_colour, read_palette, refuse_short_palette
from shards.masks.stored import StoredMask, refuse_ambiguous_transparency, refuse_transparent_pixels
from shards.sample import IGNORE, DataError, Uint8

MaskKind = Literal["binary", "index", "values", "palette", "rgb"]
MAX_CLASS_COLOURS = 64
"""More unknown colours than this are compression noise, not forgotten classes."""
MIN_CLASS_SHARE = 100
"""A value of at least one pixel in 100 may be a class."""
MAX_COMPARED_VALUES = 16
"""Up to this many values, comparing the entire mask is faster than a table look-up per pixel."""


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
            raise ValueError(f"--classes: there must be 2 to 255 classes, got {self.num_classes}")
        if self.kind == "binary" and self.num_classes != 2:
            raise ValueError(f"--classes: a binary mask has 2 classes, got {self.num_classes}")
        if self.kind in ("palette", "rgb") and len(self.colours) != self.num_classes:
            raise ValueError(
                f"{'--colours: ' * (self.kind == 'rgb')}{len(self.colours)} colours for "
                f"{self.num_classes} classes; give one per class"
            )
        if self.kind == "values" and len(self.values) != self.num_classes:
            raise ValueError(
                f"--mask-values: {len(self.values)} mask values for {self.num_classes} classes; "
                "give one per class"
            )
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"--mask-values: a class needs its own value, got {self.values}")
        given = {
            "--mask-values": self.values,
            "--mask-threshold": (self.threshold,),
            "--ignore-value": (self.ignore_value,),
        }
        for flag, values in given.items():
            for value in values:
                if value is not None and not 0 <= value <= 65535:
                    raise ValueError(f"{flag}: mask values must be 0 to 65535, got {value}")
        class_values = range(self.num_classes) if self.kind in ("index", "palette") else self.values
        if self.ignore_value in class_values:
            raise ValueError(
                f"--ignore-value {self.ignore_value} is also the value of a class; choose another"
            )
        self.refuse_inapplicable_settings()
        self.refuse_overlapping_classes()

    def refuse_inapplicable_settings(self) -> None:
        """Raise ValueError for settings that apply to another kind only."""
        applicable = {
            "--mask-values applies to `values` only": (bool(self.values), ("values",)),
            "--invert applies to `binary` only": (self.invert, ("binary",)),
            "--mask-threshold applies to `binary` only": (
                self.threshold is not None,
                ("binary",),
            ),
            "--colours applies to `rgb` only": (bool(self.colours), ("rgb", "palette")),
            "--ignore-value applies to values, not colours; use `ignore` in --colours": (
                self.ignore_value is not None,
                ("binary", "index", "values", "palette"),
            ),
            "--unknown does not apply to binary masks": (
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
                flag = "--colours: " if self.kind == "rgb" else ""
                raise ValueError(
                    f"{format_colour(one)} and {format_colour(other)} differ by {distance}, too "
                    f"little for --tolerance {self.tolerance}; lower it"
                    if distance
                    else f"{flag}{format_colour(one)} is listed twice; remove one"
                )

    def map_classes(self, mask: StoredMask, where: str) -> "ClassMap":
        """Convert a decoded mask to class indices.

        Raises DataError, with pixel counts, for pixels that have no class.
        """
        image = mask.image
        if self.kind == "rgb":
            return self.map_colours(image, where)
        if self.threshold is not None and self.threshold > mask.max_value:
            raise DataError(
                f"{where} has values up to {mask.max_value} (mode {image.mode}), below "
                f"--mask-threshold {self.threshold}, so that it would have no foreground; "
                "drop --mask-threshold, or save all masks with 8 bits"
            )
        if self.kind == "palette" and image.mode != "P":
            raise DataError(
                f"{where} has no palette (mode {image.mode}); use --mask-format "
                + ("rgb with --colours" if image.mode in ("RGB", "RGBA") else "index")
            )
        pixels = mask.read_values(where)
        counts = count_pixel_values(pixels)
        table = self.build_table(counts, where)
        unknown = np.flatnonzero((table < 0) & (counts > 0))
        if len(unknown) and self.unknown == "error":
            raise DataError(
                f"{where} has values without a class: {format_counts(counts, unknown)}; "
                + self.suggest_remedy(counts, unknown, image.mode)
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
        values, indices = tuple(present.tolist()), tuple(table[present].tolist())
        return ClassMap(index, by_class.astype(np.int64), values, indices)

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

    def map_colours(self, image: Image, where: str) -> "ClassMap":
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
            if mode == "RGB":
                refuse_ambiguous_transparency(image, where)
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
        return ClassMap(index.reshape(image.height, image.width), by_class)

    def match_colours(self, colours: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the class index of each colour [N, 3 or 4]; -1 if none is within the tolerance."""
        classes = np.full(len(colours), -1, dtype=np.int64)
        indices = (*range(self.num_classes), *(IGNORE for _ in self.ignore_colours))
        for index, colour in zip(indices, (*self.colours, *self.ignore_colours), strict=True):
            near = (np.abs(colours - np.array(colour)) <= self.tolerance).all(axis=1)
            classes[near] = index
        return classes

    def refuse_other_palette(self, image: Image, counts: NDArray[np.int64], where: str) -> None:
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

    def suggest_remedy(
        self, counts: NDArray[np.int64], unknown: NDArray[np.int64], mode: str
    ) -> str:
        """Return the most likely remedy for values that have no class.

        A value is only to be ignored if it is rare: any other may be a class.
        """
        if mode == "P" and len(unknown) > 1:
            return (
                "they are palette indices: name them all with --classes, or read the colours: "
                "--mask-format rgb"
            )
        if np.count_nonzero(counts) == 2 and counts[0] and len(unknown) == 1:
            return "with 0 and one other value, the format is --mask-format binary"
        if MIN_CLASS_SHARE * counts[unknown].sum() < counts.sum():
            return "if these few pixels belong to no class, add --unknown ignore"
        if self.kind == "values":
            return "name them all with --mask-values and --classes"
        return (
            f"{self.num_classes} classes allow 0 to {self.num_classes - 1}: "
            "name them all with --classes, or use --mask-format values"
        )

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
    values: tuple[int, ...] = ()
    """Pixel values that occur in the file; () for colours."""
    indices: tuple[int, ...] = ()
    """Class index of each of these values."""


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
