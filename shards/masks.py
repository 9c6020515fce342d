"""Mask formats: what people have on disk -> class indices, by a declared rule and never a guess."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from shards.sample import (
    IGNORE,
    DataError,
    Palette,
    Uint8,
    encode_mask,
    load,
    open_image,
    palette_bytes,
)

MaskKind = Literal["binary", "index", "values"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFormat:
    """How pixel values of mask files are to be read."""

    kind: MaskKind
    """`binary`: 0 and one other value. `index`: the value is the class. `values`: see below."""
    num_classes: int
    """Classes, background included."""
    values: tuple[int, ...] = ()
    """`values` only: the pixel value of class 0, 1, 2, ..."""
    invert: bool = False
    """`binary` only: 0 is class 1 and the other value class 0."""
    threshold: int | None = None
    """`binary` only: values from here up are foreground, whatever else occurs."""
    ignore_value: int | None = None
    """Pixel value that becomes 255 (ignored)."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= 255:
            raise ValueError(f"there must be 2 to 255 classes, got {self.num_classes}")
        if self.kind == "binary" and self.num_classes != 2:
            raise ValueError(f"binary masks have 2 classes, got {self.num_classes} names")
        if self.kind == "values" and len(self.values) != self.num_classes:
            raise ValueError(
                f"{len(self.values)} mask values for {self.num_classes} classes; give one for each"
            )
        if self.kind == "values" and len(set(self.values)) != len(self.values):
            raise ValueError(f"a mask value stands for two classes: {self.values}")
        for value in (*self.values, self.threshold, self.ignore_value):
            if value is not None and not 0 <= value <= 255:
                raise ValueError(f"mask values are 0 to 255, got {value}")
        of_classes = range(self.num_classes) if self.kind == "index" else self.values
        if self.ignore_value in of_classes:
            raise ValueError(f"--ignore-value {self.ignore_value} is also the value of a class")
        if self.kind != "values" and self.values:
            raise ValueError(f"mask values belong to the format `values`, not to `{self.kind}`")
        if self.kind != "binary" and (self.invert or self.threshold is not None):
            raise ValueError(
                f"--invert and --mask-threshold belong to `binary`, not to `{self.kind}`"
            )

    def to_index(self, pixels: Uint8, where: str) -> Uint8:
        """Pixel values uint8 [H, W] -> class indices uint8 [H, W].

        Raises DataError naming the values that have no class, with their pixel counts.
        """
        counts = np.bincount(pixels.ravel(), minlength=256)
        table = np.full(256, -1)
        match self.kind:
            case "binary":
                table[:] = self.binary_table(counts, where)
            case "index":
                table[: self.num_classes] = np.arange(self.num_classes)
            case "values":
                table[list(self.values)] = np.arange(self.num_classes)
        if self.ignore_value is not None:
            table[self.ignore_value] = IGNORE
        unknown = np.flatnonzero((table < 0) & (counts > 0))
        if len(unknown):
            raise DataError(
                f"{where} holds values without a class: {tally(counts, unknown)}; "
                + self.remedy(unknown)
            )
        return table.astype(np.uint8)[pixels]

    def binary_table(self, counts: np.ndarray, where: str) -> np.ndarray:
        """Class of each pixel value [256] in this file."""
        if self.threshold is None:
            present = np.flatnonzero(counts)
            foreground = present[(present != 0) & (present != self.ignore_value)]
            if len(foreground) > 1:
                raise DataError(
                    f"{where} is not binary, it holds {tally(counts, present)}; "
                    "use --mask-threshold 128 if the edges are blurred, else --mask-format values"
                )
        bound = 1 if self.threshold is None else self.threshold
        is_foreground = np.arange(256) >= bound
        return (is_foreground ^ self.invert).astype(int)

    def remedy(self, unknown: np.ndarray) -> str:
        """The likeliest way out for values that have no class."""
        if len(unknown) == 1:
            return f"if these pixels do not count, add --ignore-value {unknown[0]}"
        if self.kind == "index":
            return (
                f"{self.num_classes} classes allow 0 to {self.num_classes - 1}: "
                "name them all with --classes, or use --mask-format values"
            )
        return "name them all with --mask-values and --classes"

    def source_values(self, foreground: int | None) -> tuple[int, ...]:
        """The pixel value that stands for each class in the files.

        `foreground` is the one value other than 0 that binary masks held, None if they differ.
        """
        match self.kind:
            case "binary":
                pair = (0, 255 if foreground is None else foreground)
                return pair[::-1] if self.invert else pair
            case "index":
                return tuple(range(self.num_classes))
            case "values":
                return self.values


@dataclass(frozen=True, slots=True)
class CanonicalMask:
    """A mask as it goes into a shard."""

    data: bytes
    """PNG of mode P."""
    index: Uint8
    """Class indices [H, W]."""
    values: tuple[int, ...]
    """Pixel values that the file held."""


def read_mask(data: bytes, rule: MaskFormat, palette: Palette, where: str) -> CanonicalMask:
    """A mask file in canonical form; its own bytes where it is canonical already.

    Raises DataError for what the declared format does not cover.
    """
    image, _ = load(opened := open_image(data, where), where)
    pixels = mask_pixels(image, where)
    index = rule.to_index(pixels, where)
    if rule.kind == "binary" and opened.mode == "P" and not rule.invert:
        refuse_inverted(image, pixels, where)
    canonical = (
        opened.format == "PNG"
        and image.mode == "P"
        and np.array_equal(index, pixels)
        and bytes(image.getpalette("RGB") or ()) == palette_bytes(palette)
    )
    values = tuple(np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)).tolist())
    return CanonicalMask(data if canonical else encode_mask(index, palette), index, values)


def refuse_inverted(image: Image.Image, pixels: Uint8, where: str) -> None:
    """Raise DataError where a black and white palette has white as its index 0.

    Programs that save a black and white picture as GIF may number the colours so; read as it
    stands, such a mask has foreground and background swapped.
    """
    colours = bytes(image.getpalette("RGB") or ())
    foreground = int(pixels.max())
    shown = colours[3 * foreground : 3 * foreground + 3]
    if foreground and colours[:3] == b"\xff\xff\xff" and shown == b"\0\0\0":
        raise DataError(
            f"{where} has white as its index 0, so background and foreground may be swapped; "
            "add --invert if white is the foreground, else save it without a palette"
        )


def mask_pixels(image: Image.Image, where: str) -> Uint8:
    """The stored values uint8 [H, W]: indices of a palette, never the luminance of its colours."""
    match image.mode:
        case "1":
            return np.asarray(image).astype(np.uint8)
        case "L" | "P":
            return np.asarray(image)
        case "I;16" | "I;16B" | "I;16L" | "I":
            wide = np.asarray(image)
            if wide.min() < 0 or wide.max() > 255:
                raise DataError(
                    f"{where} holds values up to {wide.max()}; at most 255 classes are supported"
                )
            return wide.astype(np.uint8)
        case "RGB" | "RGBA" | "LA":
            bands = np.asarray(image)
            colours = bands[..., : 3 if image.mode != "LA" else 1]
            if (colours == colours[..., :1]).all():
                return np.ascontiguousarray(colours[..., 0])
            raise DataError(
                f"{where} is a colour picture (mode {image.mode}); colour tables are not supported "
                "yet: convert it to class indices"
            )
        case mode:
            raise DataError(f"{where} has mode {mode}; masks are modes 1, L, P, I;16 or grey RGB")


def tally(counts: np.ndarray, values: np.ndarray) -> str:
    """`0: 1,234 px, 255: 5 px`, at most five of them, the commonest first."""
    order = values[np.argsort(-counts[values], kind="stable")]
    shown = ", ".join(f"{v}: {counts[v]:,} px" for v in order[:5])
    return shown + (f" and {len(order) - 5} more" if len(order) > 5 else "")
