"""Options of `check` and `pack`: folders of images and masks, and how to read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipelines.packing.annotation_options import AnnotationOptions, LayoutOptions, read_annotated
from pipelines.packing.colours import ColourTable, read_colour_table, read_first_palette
from pipelines.packing.image_options import GeometryOptions, ImageOptions
from pipelines.packing.split_options import DuplicateOptions, SplitOptions
from pipelines.runtime.errors import UsageError
from pipelines.runtime.yaml_flags import Flat, refuse_unused, settings_of
from shards.annotations.source import Annotated
from shards.folders.pair_lists import read_pair_lists
from shards.folders.pairs import Pairing, PairRule, find_pairs, find_pairs_in_folders
from shards.folders.split_names import Split, find_declared_splits
from shards.folders.splits import SplitRule
from shards.images.files import ImageFormat, ImageRule
from shards.masks.formats import MaskFormat, MaskKind
from shards.masks.palettes import default_palette
from shards.statistics import SampleRule, SampleStatistics

MASK_NAMES = ("mask_suffix", "mask_ext", "pair_regex", "skip_unpaired")
"""Fields of `PairingOptions` that have no effect without masks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingOptions:
    """Images, masks and their pairing."""

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
        if self.masks and not self.pairs and not self.images:
            raise ValueError(
                "--masks needs --images: the folder of the images, which may be the same folder"
            )
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
    """Mask format and classes."""

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
    pixels of a colour called `ignore` are ignored. Or a known table: voc, cityscapes, camvid (its
    original 31 colours), ade20k (149 colours: road and skyscraper share one)."""
    unknown: Literal["error", "ignore", "background"] = "error"
    """Values, colours and annotations that belong to no class: refuse them, ignore their pixels, or
    (annotations only) leave them background."""
    tolerance: int = 0
    """How far a value or each channel of a colour may be off (formats `values` and `rgb`, JPEG)."""
    resize_mask: bool = False
    """Resize masks that differ from their image in size but not in shape (nearest neighbour)."""
    allow_absent_classes: bool = False
    """Accept classes that have no pixel in any mask; default: they are an error."""

    def __post_init__(self) -> None:
        if self.mask_format is not None and self.unknown == "background":
            raise ValueError("--unknown background applies to --annotations only")
        if self.mask_format == "rgb" and self.colours is None:
            raise ValueError(
                "--mask-format rgb needs --colours FILE, the colour of each class (or voc, "
                "cityscapes, camvid); --mask-format auto proposes one"
            )
        if self.mask_format != "rgb" and self.colours is not None:
            now = "" if self.mask_format is None else f", not {self.mask_format}"
            raise ValueError(f"--colours {self.colours} needs --mask-format rgb{now}")
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
            unknown="ignore" if self.unknown == "ignore" else "error",
            tolerance=self.tolerance,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Images and masks, and how they are paired, read and split."""

    pairing: Flat[PairingOptions]
    annotation: Flat[AnnotationOptions] = field(default_factory=AnnotationOptions)
    layout: Flat[LayoutOptions] = field(default_factory=LayoutOptions)
    mask: Flat[MaskOptions] = field(default_factory=MaskOptions)
    image: Flat[ImageOptions] = field(default_factory=ImageOptions)
    geometry: Flat[GeometryOptions] = field(default_factory=GeometryOptions)
    split: Flat[SplitOptions] = field(default_factory=SplitOptions)
    duplicate: Flat[DuplicateOptions] = field(default_factory=DuplicateOptions)

    def __post_init__(self) -> None:
        if self.layout.layout is not None:
            self.refuse_folders()
        elif self.annotation.annotations:
            self.refuse_masks()
        elif not self.pairing.has_masks:
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

    @property
    def names_classes(self) -> bool:
        """Whether annotations or a layout name the classes, which are known once these are read."""
        return bool(self.annotation.annotations) or self.layout.layout is not None

    @property
    def has_masks(self) -> bool:
        """Whether the images have masks or annotations."""
        return self.pairing.has_masks or self.names_classes

    @property
    def proposes(self) -> bool:
        """Whether flags are proposed, and nothing is written."""
        layout = self.layout.layout
        return self.mask.mask_format == "auto" or (layout is not None and layout[0] == "auto")

    def require_input(self) -> None:
        """Raise ValueError if no images are declared."""
        if self.layout.layout is None:
            self.pairing.require_input()

    def refuse_masks(self) -> None:
        """Raise ValueError for settings that have no effect with annotations."""
        images = self.pairing.images
        if self.pairing.has_masks or not images:
            raise ValueError("--annotations needs --images FOLDER, without --masks and --pairs")
        self.annotation.refuse_folders(images)
        self.annotation.declared_splits(images)
        reason = "has no effect with --annotations, which name their images"
        refuse_unused(self.pairing, reason, "image_suffix", "image_ext", *MASK_NAMES[:-1])
        used = {"classes", "unknown", "resize_mask", "allow_absent_classes"}
        others = {setting.name for setting, _ in settings_of(self.mask)} - used
        refuse_unused(self.mask, "has no effect with --annotations", *others)

    def refuse_folders(self) -> None:
        """Raise ValueError for settings that have no effect with a layout."""
        others = {setting.name for setting, _ in settings_of(self.pairing)} - {"skip_unpaired"}
        refuse_unused(self.pairing, "has no effect with --layout, which names the folders", *others)
        used = {"classes", "resize_mask", "allow_absent_classes"}
        others = {setting.name for setting, _ in settings_of(self.mask)} - used
        refuse_unused(self.mask, "has no effect with --layout, which declares the masks", *others)
        refuse_unused(self.annotation, "has no effect with --layout")

    def find_annotated(self) -> Annotated:
        """Read the annotations, once in a run. Raises DataError if they cannot be used."""
        images, mask = self.pairing.images, self.mask
        return read_annotated(
            self.annotation.make_sources(images, mask.classes, mask.unknown),
            tuple(self.annotation.declared_splits(images)),
        )

    def find_pairs(self) -> Pairing:
        """Find all pairs. Raises DataError if there are no images."""
        if (known := self.layout.find(self.mask.classes)) is not None:
            return known.pairing
        if self.annotation.annotations:
            return self.find_annotated().pairing
        return self.pairing.find_pairs()

    def class_names(self) -> tuple[str, ...]:
        """Class names by index, from the flags, the annotations or the layout."""
        if (known := self.layout.find(self.mask.classes)) is not None:
            return known.classes
        if self.annotation.annotations:
            return self.find_annotated().classes
        return self.mask.class_names()

    def make_split_rule(self) -> SplitRule:
        """Build the rule that assigns pairs to splits; a layout may declare groups."""
        rule = self.split.make_rule()
        known = self.layout.find(self.mask.classes)
        if known is not None and rule.group_by is None:
            return replace(rule, group_by=known.group_by)
        return rule

    @property
    def allow_absent_classes(self) -> bool:
        """Whether classes may have no pixel: where data name them, none can be misread."""
        return self.mask.allow_absent_classes or self.names_classes

    def describe_input(self) -> list[str]:
        """Return what annotations or a layout leave out, one line each."""
        known = self.layout.find(self.mask.classes)
        if known is None and not self.annotation.annotations:
            return []
        notes = list(known.notes if known is not None else self.find_annotated().notes)
        if self.pairing.skip_unpaired and (unpaired := self.find_pairs().unpaired):
            notes.append(f"{len(unpaired)} files without a partner are skipped: {unpaired[0]}")
        return notes

    def describe_splits(self) -> list[str]:
        """Return a line if several lists or folders do not decide the splits, else nothing."""
        pairing, split = self.pairing, self.split
        flag, paths = ("--pairs", pairing.pairs) if pairing.pairs else ("--images", pairing.images)
        declared = pairing.declared_splits()
        if (annotations := self.annotation.annotations) and len(paths) == 1:
            flag, paths = "--annotations", annotations
            declared = self.annotation.declared_splits(pairing.images)
        if len(paths) < 2 or not self.has_masks:
            return []
        names = " ".join(map(str, paths))
        by_flag = "--split-file" if split.split_file else "--split-folders"
        if split.split_file or split.split_folders:
            return [f"{flag} {names}: {by_flag} defines the splits, not these names"]
        if any(declared):
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
        names = self.class_names()
        masks, palette, annotations = None, default_palette(names), None
        if (known := self.layout.find(self.mask.classes)) is not None:
            masks, palette = known.masks, known.palette
        elif self.annotation.annotations:
            annotations = self.find_annotated().rule
            masks = MaskFormat(kind="index", num_classes=len(names))
        elif self.mask.mask_format == "palette":
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
            annotations=annotations,
        )
