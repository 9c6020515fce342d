"""What `check` and `pack` are given: folders of pictures and masks, and the rules to read them."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.config import UsageError, load_yaml, refuse_url
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
"""A colour of this name in a colour table counts nowhere."""

PROBLEMS = "problems.txt"
"""File that lists all problems where a message shows the first twenty."""


ABOUT_MASKS = (
    *("mask_suffix", "mask_ext", "pair_regex", "skip_unpaired", "mask_format", "mask_values"),
    *("mask_threshold", "invert", "ignore_value", "colours", "unknown", "tolerance", "classes"),
    *("resize_mask", "val_fraction", "test_fraction", "group_by", "fold", "split_file"),
    "split_folders",
)
"""Fields that mean nothing for pictures alone."""

ABOUT_NAMES = (
    *("image_suffix", "mask_suffix", "image_ext", "mask_ext", "pair_regex", "skip_unpaired"),
)
"""Fields that tell which names belong together."""


@dataclass(frozen=True, slots=True)
class ColourTable:
    """The colour of each class, as `--colours` names them."""

    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, ...], ...] = ()
    ignore_colours: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureConfig:
    """What pictures may hold, and how they are to be decoded."""

    image_range: tuple[int, int] | None = None
    """Values of 16-bit pictures that become black and white: 0 65535."""
    image_percentiles: tuple[float, float] | None = None
    """The same, as percentiles of all pixels of 16-bit pictures, measured now."""
    alpha: AlphaPolicy = "refuse"
    """Pictures with transparent pixels. drop: take the colours under them."""
    max_pixels: int = MAX_PIXELS
    """Pictures that claim more pixels are refused unopened."""
    workers: int = 0
    """Processes; 0 means one for each CPU."""

    def __post_init__(self) -> None:
        if self.image_range is not None and self.image_percentiles is not None:
            raise ValueError("--image-range and --image-percentiles say the same; give one")
        low, high = self.image_range or self.image_percentiles or (0, 100)
        if not 0 <= low < high <= (65535 if self.image_range else 100):
            raise ValueError(
                "--image-range is LOW HIGH within 0 65535, --image-percentiles within 0 100"
            )
        if self.workers < 0:
            raise ValueError("--workers must not be below 0")

    @property
    def is_deep(self) -> bool:
        """Whether a rule for 16-bit pictures was declared."""
        return self.image_range is not None or self.image_percentiles is not None

    def image_format(self, total: SampleStatistics) -> ImageFormat:
        """How every picture is decoded, from what was declared and measured."""
        bounds = self.image_range
        if GREY16 not in total.levels:
            bounds = None
        elif self.image_percentiles is not None:
            bounds = percentile_range(total.levels[GREY16], self.image_percentiles)
        channels = "RGB" if "RGB" in total.channels else "L"
        return ImageFormat(channels, self.alpha, bounds, self.max_pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(PictureConfig):
    """Pictures and masks, and how they are to be read."""

    images: Path | None = None
    """Folder of the pictures, searched recursively. With --pairs, the folder where the listed
    paths begin; left out, they begin at the list's own."""
    masks: Path | None = None
    """Folder of the masks: same paths but for the extension. May be the folder of the pictures."""
    pairs: tuple[Path, ...] = ()
    """Files with a picture and its mask on each line (.csv, .tsv, or white space between)."""
    image_suffix: str = ""
    """What a picture's name ends with, before the extension, that its mask's does not."""
    mask_suffix: str = ""
    """What a mask's name ends with, before the extension, that its picture's does not."""
    image_ext: str | None = None
    """Only files with this ending are pictures: .jpg."""
    mask_ext: str | None = None
    """Only files with this ending are masks: .png."""
    pair_regex: str | None = None
    """A picture and a mask in whose paths it finds the same (its groups, else the whole match)
    belong together."""
    skip_unpaired: bool = False
    """Leave out pictures without mask and masks without picture instead of refusing."""

    mask_format: MaskKind | Literal["auto"] | None = None
    """How masks are to be read. binary: 0 and one other value. index: the value is the class.
    values: --mask-values lists them. palette: palette pictures, the index is the class, one
    palette for all. rgb: --colours lists them. auto: look at every mask, propose, and stop."""
    mask_values: tuple[int, ...] = ()
    """Pixel value of class 0, 1, 2, ... (format `values`)."""
    mask_threshold: int | None = None
    """Values from here up are foreground (format `binary`, for masks with soft edges)."""
    invert: bool = False
    """In binary masks, 0 is class 1 and the other value class 0."""
    ignore_value: int | None = None
    """Pixel value that counts nowhere, neither in training nor in scores."""
    colours: Path | None = None
    """YAML, JSON or CSV file of `name: [r, g, b]`, in the order of the classes (format `rgb`);
    a colour called `ignore` counts nowhere."""
    unknown: Literal["error", "ignore"] = "error"
    """Values and colours without a class: refused, or they count nowhere."""
    tolerance: int = 0
    """How far a value or each channel of a colour may be off (formats `values` and `rgb`, JPEG)."""
    classes: tuple[str, ...] = ()
    """Class names from class 0 on. One called `background` enters no mean score."""
    resize_mask: bool = False
    """Bring masks of another size than their picture, but of its shape, to it, by nearest
    neighbour."""

    exif: ExifPolicy = "upright"
    """Pictures with an EXIF orientation. ignore: take the pixels as they lie in the file."""
    frame: int | None = None
    """Which frame of files with several (TIFF stacks, GIF), from 0; left out: they are refused."""
    resize: int | None = None
    """Scale the longer side down to this many pixels."""
    val_fraction: float = DEFAULT_VAL_FRACTION
    """Share of the samples for the split val, by a hash of the name."""
    test_fraction: float = 0.0
    """Share of the samples for the split test."""
    group_by: str | None = None
    """Regular expression; pictures in whose path it finds the same text stay in one split."""
    fold: str | None = None
    """i/k: cut k folds by the hash of the name; fold i, from 1, is val."""
    split_file: tuple[Path, ...] = ()
    """A CSV with the columns path,split; or lists called train.txt, val.txt, test.txt."""
    split_folders: bool = False
    """The first folder of a picture's path is its split: train, val, test."""

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        if self.images is None and not self.pairs:
            raise ValueError("--images FOLDER is missing (or --pairs FILE)")
        for path in (self.images, self.masks, *self.pairs):
            if path is not None:
                refuse_url("pictures are read from folders:", path)
        if self.has_masks and self.mask_format is None:
            raise ValueError(
                "--masks needs --mask-format binary, index, values, palette or rgb; "
                "--mask-format auto looks at them and proposes one"
            )
        if not self.has_masks:
            self.refuse_idle(ABOUT_MASKS, "needs --masks: unlabelled pictures have none")
        if self.pairs:
            self.refuse_idle(ABOUT_NAMES, "does nothing beside --pairs, which names every pair")
        if (self.mask_format == "rgb") != (self.colours is not None):
            raise ValueError("--mask-format rgb and --colours FILE belong together")
        self.pair_rule()
        self.split_rule()
        self.image_rule()
        if self.mask_format not in (None, "auto", "palette"):
            self.mask_rule()
        elif self.mask_format == "palette":
            self.mask_rule(((0, 0, 0),) * len(self.class_names()))

    @property
    def has_masks(self) -> bool:
        """Whether there are masks."""
        return self.masks is not None or bool(self.pairs)

    @property
    def table(self) -> ColourTable:
        """What --colours holds. Raises ValueError where it is no table."""
        return ColourTable() if self.colours is None else read_colour_table(self.colours)

    def refuse_idle(self, names: Sequence[str], why: str) -> None:
        """Raise ValueError where one of these flags is given, which would do nothing."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')} {why}")

    def pair_rule(self) -> PairRule:
        """How masks are found for pictures."""
        return PairRule(
            image_suffix=self.image_suffix,
            mask_suffix=self.mask_suffix,
            image_ext=self.image_ext,
            mask_ext=self.mask_ext,
            regex=self.pair_regex,
        )

    def split_rule(self) -> SplitRule:
        """Which split a pair is in."""
        return SplitRule(
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            group_by=self.group_by,
            fold=None if self.fold is None else parse_part("--fold", self.fold),
            files=self.split_file,
            by_folder=self.split_folders,
        )

    def image_rule(self) -> ImageRule:
        """What pictures may be."""
        return ImageRule(
            alpha=self.alpha,
            allow_16_bit=self.is_deep,
            exif=self.exif,
            frame=self.frame,
            resize=self.resize,
            max_pixels=self.max_pixels,
        )

    def class_names(self) -> tuple[str, ...]:
        """The names given, or those that the format implies."""
        if self.mask_format == "rgb":
            if self.classes:
                raise ValueError("--classes: the names are those in --colours")
            return self.table.classes
        if self.classes or self.mask_format in (None, "auto"):
            return self.classes
        match self.mask_format:
            case "binary":
                return ("background", "foreground")
            case "values" if not self.mask_values:
                raise ValueError(
                    "--mask-format values needs --mask-values, that of class 0, 1, 2, ..."
                )
            case "values":
                return tuple(f"class {value}" for value in self.mask_values)
            case kind:
                raise ValueError(f"--mask-format {kind} needs --classes, the names from class 0 on")

    def mask_rule(self, palette: Sequence[tuple[int, ...]] = ()) -> MaskFormat:
        """The declared mask format; `palette`: the colours of the classes, for that format."""
        assert self.mask_format not in (None, "auto")
        names = self.class_names()
        if len(set(names)) != len(names):
            raise ValueError(f"two classes have one name: {' '.join(names)}")
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

    def find_pairs(self) -> Pairing:
        """The pairs, and what is none. Raises DataError where there is nothing to pair."""
        if self.pairs:
            return read_pair_lists(self.pairs, self.images, self.masks)
        assert self.images is not None
        return find_pairs(self.images, self.masks, self.pair_rule())

    def sample_rule(self, pairing: Pairing) -> SampleRule:
        """How every pair is read. Raises DataError where the first mask's palette cannot be."""
        names = self.class_names()
        masks, palette = None, default_palette(names)
        if self.mask_format == "palette":
            assert pairing.masks is not None
            first = pairing.masks / str(pairing.pairs[0].mask)
            palette = first_palette(first, len(names), self.image_rule())
            masks = self.mask_rule(palette)
        elif self.mask_format not in (None, "auto"):
            masks = self.mask_rule()
            if masks.kind == "rgb":
                palette = tuple((c[0], c[1], c[2]) for c in masks.colours)
        return SampleRule(
            images=self.image_rule(), masks=masks, palette=palette, resize_mask=self.resize_mask
        )


def parse_part(flag: str, text: str) -> tuple[int, int]:
    """`2/5` -> (2, 5). Raises ValueError for anything else."""
    number, slash, count = text.partition("/")
    if not slash or not re.fullmatch("[0-9]+/[0-9]+", text):
        raise ValueError(f"{flag} is i/n, such as 2/5, got {text!r}")
    if not 1 <= int(number) <= int(count):
        raise ValueError(f"{flag} counts from 1 to n, got {text!r}")
    return int(number), int(count)


def first_palette(
    path: Path, num_classes: int, rule: ImageRule
) -> tuple[tuple[int, int, int], ...]:
    """The colours of the classes in a mask's palette, grey where it holds fewer.

    Raises DataError where the mask has no palette.
    """
    image = open_image(path.read_bytes(), str(path), rule)
    if image.mode != "P":
        raise DataError(
            f"{path} has no palette (mode {image.mode}); use --mask-format index, or rgb with "
            "--colours"
        )
    found = read_palette(image)[:num_classes]
    return found + ((128, 128, 128),) * (num_classes - len(found))


@cache
def read_colour_table(path: Path) -> ColourTable:
    """The classes and colours of a YAML, JSON or CSV file. Raises ValueError for any other."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = csv_rows(text) if path.suffix.lower() == ".csv" else mapped_rows(path, text)
    except OSError as error:
        raise ValueError(f"--colours {path}: {error.strerror}") from error
    except (yaml.YAMLError, json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--colours {path}: {' '.join(str(error).split())}") from error
    classes, colours, ignored = [], [], []
    for name, numbers in rows:
        whole = isinstance(numbers, list) and all(type(part) is int for part in numbers)
        if not whole or len(numbers) not in (3, 4) or not all(0 <= n <= 255 for n in numbers):
            raise ValueError(
                f"--colours {path}: {name} is {numbers}; expected [r, g, b] of 0 to 255, or four"
            )
        if name.lower() == IGNORED_NAME:
            ignored.append(tuple(numbers))
        else:
            classes.append(name)
            colours.append(tuple(numbers))
    if len(classes) < 2:
        raise ValueError(
            f"--colours {path} names {len(classes)} classes; expected two or more, "
            "`name: [r, g, b]` or, in a CSV, `name,r,g,b` on each line"
        )
    return ColourTable(tuple(classes), tuple(colours), tuple(ignored))


def csv_rows(text: str) -> list[tuple[str, Any]]:
    """(name, numbers) of each line `name,r,g,b`; a first line of words is passed over."""
    rows: list[tuple[str, Any]] = []
    for number, words in enumerate(csv.reader(text.splitlines(), strict=True)):
        words = [word.strip() for word in words]
        numeric = [word.isdigit() for word in words[1:]]
        if not any(words) or (number == 0 and not any(numeric)):
            continue
        rows.append((words[0], [int(w) if w.isdigit() else w for w in words[1:]]))
    return rows


def load_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError for a key that stands there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands there twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def mapped_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    """(name, numbers) of a YAML or JSON mapping."""
    plain = load_json(text) if path.suffix.lower() == ".json" else load_yaml(text)
    if not isinstance(plain, dict) or not plain:
        raise ValueError(f"--colours {path}: expected lines `name: [r, g, b]`")
    return [(str(name), numbers) for name, numbers in plain.items()]


def save_problems(problems: Sequence[str], store: Store, name: str = PROBLEMS) -> str:
    """Write all problems into a file, a line each; returns where it is."""
    lines = (problem.replace("\n", "\\n") for problem in problems)
    text = "".join(f"{line}\n" for line in lines)
    store.write(name, text.encode("utf-8", "surrogateescape"))
    return store.path(name)


def check_rule(config: SourceConfig, pairing: Pairing) -> SampleRule:
    """How every pair is read; a contradiction with the first mask's palette is a usage error."""
    try:
        return config.sample_rule(pairing)
    except ValueError as error:
        raise UsageError(str(error)) from error
