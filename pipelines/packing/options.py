"""Options of `check` and `pack`: folders of images and masks, and how to read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipelines.packing.colours import ColourTable, read_colour_table, read_first_palette
from pipelines.packing.duplicates import DuplicatePolicy
from pipelines.runtime.errors import UsageError, parse_part, refuse_url
from pipelines.runtime.yaml_flags import Flat, refuse_unused
from shards.folders.pairs import (
    Pairing,
    PairRule,
    find_pairs,
    find_pairs_in_folders,
    read_pair_lists,
)
from shards.folders.split_names import Split, find_declared_splits
from shards.folders.splits import SplitRule
from shards.images.files import (
    MAX_PIXELS,
    AlphaPolicy,
    ExifPolicy,
    ImageFormat,
    ImageRule,
    check_image_range,
)
from shards.masks.formats import MaskFormat, MaskKind
from shards.masks.palettes import default_palette
from shards.statistics import GREY16, SampleRule, SampleStatistics, percentile_range

MASK_NAMES = ("mask_suffix", "mask_ext", "pair_regex", "skip_unpaired")
"""Fields of `PairingOptions` that have no effect without masks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingOptions:
    """Where images and masks are, and which belong together."""

    images: tuple[Path, ...] = ()
    """Folders of the images, searched recursively; several whose names contain train, val or test
    set the split. With --pairs: the folder that listed paths are relative to; default: the folder
    of the list."""
    masks: tuple[Path, ...] = ()
    """Folders of the masks, as many as of the images and in the same order: same relative paths,
    any extension. May be the folder of the images."""
    pairs: tuple[Path, ...] = ()
    """Files with an image and its mask on each line (.csv, .tsv, or separated by white space);
    several whose names contain train, val or test set the split."""
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
        for flag in ("images", "masks", "pairs"):
            for path in getattr(self, flag):
                refuse_url(f"--{flag}", path)
        if self.masks and not self.pairs and len(self.images) != len(self.masks):
            raise ValueError(
                f"--images has {len(self.images)} folders and --masks {len(self.masks)}; list the "
                "masks of every folder of images, in the same order"
            )
        if self.pairs and max(len(self.images), len(self.masks)) > 1:
            raise ValueError("--images and --masks take one folder each with --pairs")
        self.declared_splits()
        if self.pairs:
            reason = "has no effect with --pairs, which lists every pair"
            refuse_unused(self, reason, "image_suffix", "image_ext", *MASK_NAMES)
        self.make_rule()

    def require_input(self) -> None:
        """Raise ValueError if no images are declared."""
        if not self.images and not self.pairs:
            raise ValueError("--images FOLDER or --pairs FILE is required")

    @property
    def has_masks(self) -> bool:
        """Whether the images have masks."""
        return bool(self.masks or self.pairs)

    def declared_splits(self) -> list[Split | None]:
        """Return the split that the name of each list, or else of each folder, declares."""
        flag, paths = ("--pairs", self.pairs) if self.pairs else ("--images", self.images)
        return find_declared_splits(flag, paths)

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
        splits = self.declared_splits()
        if self.pairs:
            images, masks = (next(iter(paths), None) for paths in (self.images, self.masks))
            return read_pair_lists(self.pairs, images, masks, splits)
        if len(self.images) == 1:
            return find_pairs(self.images[0], next(iter(self.masks), None), self.make_rule())
        return find_pairs_in_folders(self.images, self.masks, self.make_rule(), splits)


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
    allow_absent_classes: bool = False
    """Accept classes that have no pixel in any mask; default: they are an error."""

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
        check_image_range(self.image_range)
        low, high = self.image_percentiles or (0, 100)
        if not 0 <= low < high <= 100:
            raise ValueError(f"--image-percentiles {low:g} {high:g}: must be LOW HIGH within 0 100")
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

    val_fraction: float | None = None
    """Fraction of the samples in val, chosen by a hash of the key; default: 0.1. Where files,
    folders or names of lists declare splits: the fraction of train that becomes val; default: 0."""
    test_fraction: float = 0.0
    """Fraction of the samples in test."""
    group_by: str | None = None
    """Regular expression; images in whose paths it matches the same text stay in one split."""
    fold: str | None = None
    """i/k: of k folds of the samples (or of a declared train), chosen by a hash of the key, fold i
    (from 1) is val."""
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
class DuplicateOptions:
    """Identical images in different splits."""

    duplicates: DuplicatePolicy = "error"
    """Identical images in different splits: refuse them, or keep each with its group in the first
    of their splits (train, val, test)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Images and masks, and how they are paired, read and split."""

    pairing: Flat[PairingOptions]
    mask: Flat[MaskOptions] = field(default_factory=MaskOptions)
    image: Flat[ImageOptions] = field(default_factory=ImageOptions)
    geometry: Flat[GeometryOptions] = field(default_factory=GeometryOptions)
    split: Flat[SplitOptions] = field(default_factory=SplitOptions)
    duplicate: Flat[DuplicateOptions] = field(default_factory=DuplicateOptions)

    def __post_init__(self) -> None:
        if not self.pairing.has_masks:
            reason = "needs --masks"
            refuse_unused(self.pairing, reason, *MASK_NAMES)
            refuse_unused(self.mask, reason)
            refuse_unused(self.split, reason)
            refuse_unused(self.duplicate, reason)
        elif self.mask.mask_format is None:
            raise ValueError(
                "--masks needs --mask-format binary, index, values, palette or rgb; "
                "--mask-format auto reads the masks and proposes one"
            )
        self.image_rule()

    def describe_splits(self) -> list[str]:
        """Return a line if several lists or folders do not decide the splits, else nothing."""
        pairing, split = self.pairing, self.split
        flag, paths = ("--pairs", pairing.pairs) if pairing.pairs else ("--images", pairing.images)
        if len(paths) < 2 or not pairing.has_masks:
            return []
        names = " ".join(map(str, paths))
        by_flag = "--split-file" if split.split_file else "--split-folders"
        if split.split_file or split.split_folders:
            return [f"{flag} {names}: {by_flag} defines the splits, not these names"]
        if any(pairing.declared_splits()):
            return []
        return [
            f"{flag} {names}: no name contains train, val or test, so all samples are split by hash"
        ]

    def image_rule(self) -> ImageRule:
        """Build the rule that decides which images are accepted and how they are stored."""
        geometry = self.geometry
        return self.image.make_rule(
            exif=geometry.exif, frame=geometry.frame, resize=geometry.resize
        )

    def make_image_format(self, total: SampleStatistics) -> ImageFormat:
        """Build the format of all images, with the rules by which files are read."""
        geometry = self.geometry
        return replace(
            self.image.make_format(total),
            exif=geometry.exif,
            frame=geometry.frame,
            resize=geometry.resize,
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
