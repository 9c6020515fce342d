"""Options of `check` and `pack`: folders of images and masks, and how to read them."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.config import Flat, UsageError, load_yaml, refuse_unused, refuse_url
from shards.images import MAX_PIXELS, AlphaPolicy, ExifPolicy, ImageFormat, ImageRule, open_image
from shards.masks import MaskFormat, MaskKind, default_palette, read_palette
from shards.pairs import (
    DEFAULT_VAL_FRACTION,
    Pairing,
    PairRule,
    SplitRule,
    find_pairs,
    read_pair_lists,
)
from shards.sample import DataError
from shards.store import Store
from shards.tally import GREY16, SampleRule, SampleStatistics, percentile_range

IGNORED_NAME = "ignore"
"""Name of a colour whose pixels are ignored."""

PROBLEMS = "problems.txt"
"""File that lists all problems; a message shows only the first 20."""


MASK_NAMES = ("mask_suffix", "mask_ext", "pair_regex", "skip_unpaired")
"""Fields of `PairingOptions` that have no effect without masks."""


@dataclass(frozen=True, slots=True)
class ColourTable:
    """Colour of each class, as listed in the file of `--colours`."""

    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, ...], ...] = ()
    ignore_colours: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingOptions:
    """Where images and masks are, and which belong together."""

    images: Path | None = None
    """Folder of the images, searched recursively. With --pairs: the folder that listed paths are
    relative to; default: the folder of the list."""
    masks: Path | None = None
    """Folder of the masks: same relative paths, any extension. May be the folder of the images."""
    pairs: tuple[Path, ...] = ()
    """Files with an image and its mask on each line (.csv, .tsv, or separated by white space)."""
    image_suffix: str = ""
    """End of an image's name, before the extension, that its mask's name lacks."""
    mask_suffix: str = ""
    """End of a mask's name, before the extension, that its image's name lacks: _mask."""
    image_ext: str | None = None
    """Only files with this extension are images: .jpg."""
    mask_ext: str | None = None
    """Only files with this extension are masks: .png."""
    pair_regex: str | None = None
    """Regular expression; an image and a mask belong together if it matches the same text in both
    paths (its groups, else the complete match)."""
    skip_unpaired: bool = False
    """Skip images without a mask and masks without an image instead of refusing them."""

    def __post_init__(self) -> None:
        if self.images is None and not self.pairs:
            raise ValueError("--images FOLDER or --pairs FILE is required")
        paths = [("--images", self.images), ("--masks", self.masks)]
        for flag, path in [*paths, *(("--pairs", path) for path in self.pairs)]:
            if path is not None:
                refuse_url(flag, path)
        if self.pairs:
            reason = "has no effect with --pairs, which lists every pair"
            refuse_unused(self, reason, "image_suffix", "image_ext", *MASK_NAMES)
        self.make_rule()

    @property
    def has_masks(self) -> bool:
        """Whether the images have masks."""
        return self.masks is not None or bool(self.pairs)

    def make_rule(self) -> PairRule:
        """Build the rule that finds the mask of an image."""
        return PairRule(
            image_suffix=self.image_suffix,
            mask_suffix=self.mask_suffix,
            image_ext=self.image_ext,
            mask_ext=self.mask_ext,
            regex=self.pair_regex,
        )

    def find_pairs(self) -> Pairing:
        """Find all pairs. Raises DataError if there are no images."""
        if self.pairs:
            return read_pair_lists(self.pairs, self.images, self.masks)
        assert self.images is not None
        return find_pairs(self.images, self.masks, self.make_rule())


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOptions:
    """How masks are read: their format and their classes."""

    mask_format: MaskKind | Literal["auto"] | None = None
    """binary: 0 and one other value. index: the pixel value is the class index. values:
    --mask-values lists the value of each class. palette: the palette index is the class index, and
    all masks share one palette. rgb: --colours lists the colours. auto: read all masks, propose
    flags, and stop."""
    classes: tuple[str, ...] = ()
    """Class names, from class 0 on. A class called `background` is excluded from mean scores."""
    mask_values: tuple[int, ...] = ()
    """Pixel value of class 0, 1, 2, ... (format `values`)."""
    mask_threshold: int | None = None
    """Values from here up are foreground (format `binary`, for masks with soft edges)."""
    invert: bool = False
    """In binary masks, 0 is class 1 and the other value class 0."""
    ignore_value: int | None = None
    """Pixel value that is ignored in training and in scores."""
    colours: Path | None = None
    """YAML, JSON or CSV file of `name: [r, g, b]`, in the order of the classes (format `rgb`);
    pixels of a colour called `ignore` are ignored."""
    unknown: Literal["error", "ignore"] = "error"
    """Values and colours that belong to no class: refuse the mask, or ignore these pixels."""
    tolerance: int = 0
    """How far a value or each channel of a colour may be off (formats `values` and `rgb`, JPEG)."""
    resize_mask: bool = False
    """Resize masks that differ from their image in size but not in shape (nearest neighbour)."""

    def __post_init__(self) -> None:
        if (self.mask_format == "rgb") != (self.colours is not None):
            raise ValueError("--mask-format rgb requires --colours FILE, and the reverse")
        if self.mask_format not in (None, "auto", "palette"):
            self.make_format()
        elif self.mask_format == "palette":
            self.make_format(((0, 0, 0),) * len(self.class_names()))

    @property
    def table(self) -> ColourTable:
        """The table in --colours, else an empty one. Raises ValueError for an invalid file."""
        return ColourTable() if self.colours is None else read_colour_table(self.colours)

    def class_names(self) -> tuple[str, ...]:
        """Class names by index, from the flags or implied by the mask format."""
        if self.mask_format == "rgb":
            if self.classes:
                raise ValueError("--classes has no effect with --colours, which names the classes")
            return self.table.classes
        if self.classes or self.mask_format in (None, "auto"):
            return self.classes
        match self.mask_format:
            case "binary":
                return ("background", "foreground")
            case "values" if not self.mask_values:
                raise ValueError(
                    "--mask-format values needs --mask-values: that of class 0, 1, 2, ..."
                )
            case "values":
                return tuple(f"class {value}" for value in self.mask_values)
            case kind:
                raise ValueError(
                    f"--mask-format {kind} needs --classes: the names, from class 0 on"
                )

    def make_format(self, palette: Sequence[tuple[int, ...]] = ()) -> MaskFormat:
        """Build the mask format; `palette`: colours of the classes, for the format `palette`."""
        assert self.mask_format not in (None, "auto")
        names = self.class_names()
        if len(set(names)) != len(names):
            raise ValueError(f"--classes: duplicate name in {' '.join(names)}")
        return MaskFormat(
            kind=self.mask_format,
            num_classes=len(names),
            values=self.mask_values,
            colours=tuple(palette) or self.table.colours,
            ignore_colours=self.table.ignore_colours,
            invert=self.invert,
            threshold=self.mask_threshold,
            ignore_value=self.ignore_value,
            unknown=self.unknown,
            tolerance=self.tolerance,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """Which images are accepted, and how 16-bit values are scaled."""

    alpha: AlphaPolicy = "refuse"
    """Images with transparent pixels: refuse them, or drop the alpha channel."""
    image_range: tuple[int, int] | None = None
    """16-bit values that become 0 and 255, such as 0 65535."""
    image_percentiles: tuple[float, float] | None = None
    """The range of 16-bit values, as percentiles over all pixels of the data set."""
    max_pixels: int = MAX_PIXELS
    """Images whose header declares more pixels are refused before decoding."""

    def __post_init__(self) -> None:
        if self.image_range is not None and self.image_percentiles is not None:
            raise ValueError("--image-range and --image-percentiles exclude each other")
        low, high = self.image_range or self.image_percentiles or (0, 100)
        if not 0 <= low < high <= (65535 if self.image_range else 100):
            raise ValueError(
                "--image-range must be LOW HIGH within 0 65535, --image-percentiles within 0 100"
            )
        self.make_rule()

    def make_rule(
        self, *, exif: ExifPolicy = "upright", frame: int | None = None, resize: int | None = None
    ) -> ImageRule:
        """Build the rule that decides which images are accepted and how they are stored."""
        return ImageRule(
            alpha=self.alpha,
            allow_16_bit=self.image_range is not None or self.image_percentiles is not None,
            exif=exif,
            frame=frame,
            resize=resize,
            max_pixels=self.max_pixels,
        )

    def make_format(self, total: SampleStatistics) -> ImageFormat:
        """Build the format that all images are decoded to; `total`: tally of all images."""
        bounds = self.image_range
        if GREY16 not in total.levels:
            bounds = None
        elif self.image_percentiles is not None:
            bounds = percentile_range(total.levels[GREY16], self.image_percentiles)
        channels = "RGB" if "RGB" in total.channels else "L"
        return ImageFormat(channels, self.alpha, bounds, self.max_pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeometryOptions:
    """Orientation, frame and size of the images."""

    exif: ExifPolicy = "upright"
    """Images with an EXIF orientation: rotate them upright, or ignore the orientation."""
    frame: int | None = None
    """Frame of multi-frame files (TIFF stacks, GIF), from 0; default: such files are refused."""
    resize: int | None = None
    """Scale images and masks down so that the longer side has this many pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitOptions:
    """How samples are split into train, val and test."""

    val_fraction: float = DEFAULT_VAL_FRACTION
    """Fraction of the samples in val, chosen by a hash of the key."""
    test_fraction: float = 0.0
    """Fraction of the samples in test."""
    group_by: str | None = None
    """Regular expression; images in whose paths it matches the same text stay in one split."""
    fold: str | None = None
    """i/k: of k folds, chosen by a hash of the key, fold i (from 1) is val."""
    split_file: tuple[Path, ...] = ()
    """A CSV file with the columns path,split; or lists named train.txt, val.txt, test.txt."""
    split_folders: bool = False
    """The first folder in an image's path names its split: train, val, test."""

    def __post_init__(self) -> None:
        self.make_rule()

    def make_rule(self) -> SplitRule:
        """Build the rule that assigns pairs to splits."""
        return SplitRule(
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            group_by=self.group_by,
            fold=None if self.fold is None else parse_part("--fold", self.fold),
            files=self.split_file,
            by_folder=self.split_folders,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Images and masks, and how they are paired, read and split."""

    pairing: Flat[PairingOptions]
    mask: Flat[MaskOptions] = field(default_factory=MaskOptions)
    image: Flat[ImageOptions] = field(default_factory=ImageOptions)
    geometry: Flat[GeometryOptions] = field(default_factory=GeometryOptions)
    split: Flat[SplitOptions] = field(default_factory=SplitOptions)

    def __post_init__(self) -> None:
        if not self.pairing.has_masks:
            reason = "needs --masks"
            refuse_unused(self.pairing, reason, *MASK_NAMES)
            refuse_unused(self.mask, reason)
            refuse_unused(self.split, reason)
        elif self.mask.mask_format is None:
            raise ValueError(
                "--masks needs --mask-format binary, index, values, palette or rgb; "
                "--mask-format auto reads the masks and proposes one"
            )
        self.image_rule()

    def image_rule(self) -> ImageRule:
        """Build the rule that decides which images are accepted and how they are stored."""
        geometry = self.geometry
        return self.image.make_rule(
            exif=geometry.exif, frame=geometry.frame, resize=geometry.resize
        )

    def sample_rule(self, pairing: Pairing) -> SampleRule:
        """Build the rule by which every pair is read.

        Raises:
            UsageError: the palette of the first mask contradicts the flags.
            DataError: the first mask cannot be read or has no palette.
        """
        names = self.mask.class_names()
        masks, palette = None, default_palette(names)
        if self.mask.mask_format == "palette":
            assert pairing.masks is not None
            first = pairing.masks / str(pairing.pairs[0].mask)
            palette = read_first_palette(first, len(names), self.image_rule())
            try:
                masks = self.mask.make_format(palette)
            except ValueError as error:
                raise UsageError(str(error)) from error
        elif self.mask.mask_format not in (None, "auto"):
            masks = self.mask.make_format()
            if masks.kind == "rgb":
                palette = tuple((c[0], c[1], c[2]) for c in masks.colours)
        return SampleRule(
            images=self.image_rule(),
            masks=masks,
            palette=palette,
            resize_mask=self.mask.resize_mask,
        )


def parse_part(flag: str, text: str) -> tuple[int, int]:
    """Parse `2/5` into (2, 5). Raises ValueError for anything else."""
    number, slash, count = text.partition("/")
    if not slash or not re.fullmatch("[0-9]+/[0-9]+", text):
        raise ValueError(f"{flag} must be i/n, such as 2/5, got {text!r}")
    if not 1 <= int(number) <= int(count):
        raise ValueError(f"{flag} must be i/n with i from 1 to n, got {text!r}")
    return int(number), int(count)


def read_first_palette(
    path: Path, num_classes: int, rule: ImageRule
) -> tuple[tuple[int, int, int], ...]:
    """Read the colours of the classes from a mask's palette; missing ones are grey.

    Raises DataError if the mask has no palette.
    """
    image = open_image(path.read_bytes(), str(path), rule)
    if image.mode != "P":
        raise DataError(
            f"{path} has no palette (mode {image.mode}); use --mask-format index, or rgb with "
            "--colours"
        )
    colours = read_palette(image)[:num_classes]
    return colours + ((128, 128, 128),) * (num_classes - len(colours))


@cache
def read_colour_table(path: Path) -> ColourTable:
    """Read classes and colours from a YAML, JSON or CSV file. Raises ValueError if invalid."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = (
            read_csv_rows(text) if path.suffix.lower() == ".csv" else read_mapped_rows(path, text)
        )
    except OSError as error:
        raise ValueError(f"--colours {path}: {error.strerror}") from error
    except (yaml.YAMLError, json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--colours {path}: {' '.join(str(error).split())}") from error
    classes, colours, ignored = [], [], []
    for name, numbers in rows:
        integers = isinstance(numbers, list) and all(type(part) is int for part in numbers)
        if not integers or len(numbers) not in (3, 4) or not all(0 <= n <= 255 for n in numbers):
            raise ValueError(
                f"--colours {path}: {name} is {numbers}; expected [r, g, b] or [r, g, b, a], each "
                "0 to 255"
            )
        if name.lower() == IGNORED_NAME:
            ignored.append(tuple(numbers))
        else:
            classes.append(name)
            colours.append(tuple(numbers))
    if len(classes) < 2:
        raise ValueError(
            f"--colours {path} lists {len(classes)} classes; expected at least two, as "
            "`name: [r, g, b]` or, in a CSV file, `name,r,g,b` on each line"
        )
    return ColourTable(tuple(classes), tuple(colours), tuple(ignored))


def read_csv_rows(text: str) -> list[tuple[str, Any]]:
    """Parse lines `name,r,g,b` into (name, numbers); a header line is skipped."""
    rows: list[tuple[str, Any]] = []
    for number, words in enumerate(csv.reader(text.splitlines(), strict=True)):
        words = [word.strip() for word in words]
        numeric = [word.isdigit() for word in words[1:]]
        if not any(words) or (number == 0 and not any(numeric)):
            continue
        rows.append((words[0], [int(w) if w.isdigit() else w for w in words[1:]]))
    return rows


def load_json(text: str) -> Any:
    """Parse a JSON text. Raises ValueError for a duplicate key."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        duplicates = [name for name in names if names.count(name) > 1]
        if duplicates:
            raise ValueError(f"duplicate key {duplicates[0]}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=refuse_duplicates)


def read_mapped_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    """Parse a YAML or JSON mapping into (name, numbers)."""
    plain = load_json(text) if path.suffix.lower() == ".json" else load_yaml(text)
    if not isinstance(plain, dict) or not plain:
        raise ValueError(f"--colours {path}: expected `name: [r, g, b]` lines")
    return [(str(name), numbers) for name, numbers in plain.items()]


def save_problems(problems: Sequence[str], store: Store, name: str = PROBLEMS) -> str:
    """Write all problems to a file, one per line; returns its path."""
    lines = (problem.replace("\n", "\\n") for problem in problems)
    text = "".join(f"{line}\n" for line in lines)
    store.write(name, text.encode("utf-8", "surrogateescape"))
    return store.path(name)
