"""Pairs of images and masks, their splits, and the separation of a folder that mixes both."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards.folders.split_names import Split
from shards.folders.suffixes import describe_fit
from shards.folders.walk import list_images, relative_path
from shards.sample import DataError, encode_key


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask, if it has one. Small: a million pairs fit into memory."""

    source: str
    """Path of the image relative to the image folder, with extension and `/` as separator."""
    mask: str | None
    """Path of the mask relative to the mask folder."""
    split: Split | None = None
    """Split that the name of its list or folder declares."""
    spans: tuple[int, ...] = ()
    """Bytes of the mask's file that hold its annotations: start, stop, ...; () for all of it."""
    segments: str | None = None
    """PNG that follows these bytes, relative to the mask folder (panoptic COCO)."""

    @property
    def key(self) -> str:
        """Key of the sample in a shard."""
        return encode_key(self.source)


@dataclass(frozen=True, slots=True)
class Pairing:
    """The pairs of two folders, and the files that are not in a pair."""

    images: Path
    """Folder of the images."""
    masks: Path | None
    """Folder of the masks."""
    pairs: list[Pair]
    """Sorted by path."""
    unpaired: list[str]
    """Images without a mask and masks without an image, one message each."""
    refused: list[str]
    """Files whose names collide and files in unsupported formats, one message each."""
    notes: list[str] = field(default_factory=list)
    """What else was found or changed, one line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRule:
    """How the mask of an image is found: by default, by its path without extension.

    Raises ValueError if `regex` is not a valid regular expression.
    """

    image_suffix: str = ""
    """End of an image's name, before the extension, that the name of its mask does not have."""
    mask_suffix: str = ""
    """End of a mask's name, before the extension, that the name of its image does not have."""
    image_ext: str | None = None
    """Only files with this extension are images."""
    mask_ext: str | None = None
    """Only files with this extension are masks."""
    regex: str | None = None
    """Files are paired if its match (its groups, if it has any) is equal in both paths."""

    def __post_init__(self) -> None:
        if self.regex is not None:
            validate_regex("--pair-regex", self.regex)

    @property
    def distinguishes_masks(self) -> bool:
        """Whether the rule can distinguish images from masks in one folder."""
        return self.image_suffix != self.mask_suffix or normalise_extension(
            self.image_ext
        ) != normalise_extension(self.mask_ext)

    def pairing_stem(self, name: str, *, mask: bool) -> str | None:
        """Return the text that an image and its mask have in common.

        Returns None if `name` does not match the rule for masks (`mask=True`) or images.
        """
        stem, file_ext = os.path.splitext(name)
        ext = normalise_extension(self.mask_ext if mask else self.image_ext)
        suffix = self.mask_suffix if mask else self.image_suffix
        if not stem.endswith(suffix) or (ext is not None and file_ext.lower() != ext):
            return None
        if self.regex is None:
            return stem.removesuffix(suffix)
        match = re.search(self.regex, name)
        if match is None:
            return None
        return "\0".join(match.groups("")) if match.re.groups else match.group()


def validate_regex(flag: str, expression: str) -> None:
    """Raise ValueError naming the flag if a regular expression is invalid."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{flag} {expression!r} is not a regular expression: {error}") from error


def normalise_extension(extension: str | None) -> str | None:
    """Convert `PNG`, `png` and `.png` to `.png`."""
    return None if extension is None else "." + extension.lower().lstrip(".")


def list_missing(
    folder: Path, names: Mapping[str, str], others: Path, other_names: Mapping[str, str], what: str
) -> list[str]:
    """List the files of a folder, by stem, that have no mask or image in the other folder."""
    alone = sorted(names.keys() - other_names.keys())
    return [f"{folder / names[stem]} has no {what} in {others}" for stem in alone]


def find_pairs(images: Path, masks: Path | None, rule: PairRule) -> Pairing:
    """Pair the files of two folders, searched recursively; both may be the same folder.

    Raises DataError if a folder is missing or has no images, or if no image has a mask.
    """
    refused: list[str] = []
    notes: list[str] = []
    names = list_images(images, refused, notes, flag="--images")
    if masks is None:
        image_names, _ = group_by_stem(names, rule, images, refused, mask=False)
        pairs = [Pair(name, None) for name in image_names.values()]
        return Pairing(
            images, None, drop_key_collisions(pairs, images, refused), [], refused, notes
        )
    unpaired: list[str] = []
    if masks.resolve() == images.resolve():
        if not rule.distinguishes_masks:
            raise DataError(
                f"images and masks share the folder {images}; distinguish them with --mask-suffix "
                "or --image-ext and --mask-ext, or split the folder with unet separate"
            )
        # The side with the narrower rule chooses first, the other one gets what is left.
        masks_first = bool(rule.mask_suffix or rule.mask_ext)
        one, others = group_by_stem(names, rule, images, refused, mask=masks_first)
        other, rest = group_by_stem(others, rule, images, refused, mask=not masks_first)
        mask_names, image_names = (one, other) if masks_first else (other, one)
        unpaired += [
            f"{images / name} matches neither the rule for images nor that for masks"
            for name in rest
        ]
    else:
        image_names, rest = group_by_stem(names, rule, images, refused, mask=False)
        unpaired += [f"{images / name} does not match the rule for images" for name in rest]
        names = list_images(masks, refused, notes, flag="--masks")
        mask_names, rest = group_by_stem(names, rule, masks, refused, mask=True)
        unpaired += [f"{masks / name} does not match the rule for masks" for name in rest]
    unpaired += list_missing(images, image_names, masks, mask_names, "mask")
    unpaired += list_missing(masks, mask_names, images, image_names, "image")
    common = image_names.keys() & mask_names.keys()
    if not common and not refused:
        raise DataError(
            f"no image in {images} has a mask of the same name in {masks} (for example: "
            f"{first_name(image_names)} and {first_name(mask_names)}); "
            f"{describe_fit(image_names.values(), mask_names.values())}"
        )
    pairs = drop_key_collisions(
        (Pair(image_names[stem], mask_names[stem]) for stem in common), images, refused
    )
    return Pairing(images, masks, pairs, unpaired, refused, notes)


def find_pairs_in_folders(
    images: Sequence[Path], masks: Sequence[Path], rule: PairRule, splits: Sequence[Split | None]
) -> Pairing:
    """Pair several folders of images with as many folders of masks (or none), in order.

    Paths become relative to the deepest common folder; every pair of a folder gets its split.
    Raises DataError as `find_pairs`.
    """
    image_root, mask_root = common_folder(images), common_folder(masks)
    pairs: list[Pair] = []
    unpaired: list[str] = []
    refused: list[str] = []
    notes: list[str] = []
    for folder, mask_folder, split in zip(
        images, masks or [None] * len(images), splits, strict=True
    ):
        found = find_pairs(folder, mask_folder, rule)
        unpaired += found.unpaired
        refused += found.refused
        notes += found.notes
        for pair in found.pairs:
            mask = None
            if mask_folder is not None:
                mask = join_below(mask_root, mask_folder, str(pair.mask))
            pairs.append(Pair(join_below(image_root, folder, pair.source), mask, split))
    pairs = drop_key_collisions(pairs, image_root, refused)
    return Pairing(image_root, mask_root if masks else None, pairs, unpaired, refused, notes)


def common_folder(folders: Sequence[Path]) -> Path:
    """Return the deepest folder that contains all folders; the current folder if there are none."""
    return Path(os.path.commonpath([folder.absolute() for folder in folders] or [Path.cwd()]))


def join_below(root: Path, folder: Path, name: str) -> str:
    """Return the path of a file in `folder`, relative to `root`."""
    return os.path.normpath(f"{relative_path(str(folder.absolute()), root)}/{name}")


def first_name(names: dict[str, str]) -> str:
    """Return the first of some names, as an example in a message."""
    return min(names.values(), default="nothing")


def drop_key_collisions(pairs: Iterable[Pair], images: Path, refused: list[str]) -> list[Pair]:
    """Sort pairs, without those that would share a key in the shards (`a.png`, `a.jpg`).

    These are reported in `refused`.
    """
    by_stem: dict[str, Pair] = {}
    collisions = set()
    for pair in sorted(pairs, key=lambda p: p.source):
        stem = os.path.splitext(pair.source)[0]
        if stem in by_stem:
            refused.append(f"{images / by_stem[stem].source} and {pair.source} have the same name")
            collisions.add(stem)
        by_stem[stem] = pair
    return [pair for stem, pair in by_stem.items() if stem not in collisions]


def group_by_stem(
    names: Iterable[str], rule: PairRule, folder: Path, refused: list[str], *, mask: bool
) -> tuple[dict[str, str], list[str]]:
    """Group names by what pairs them.

    Returns {pairing stem: name} of images or masks, and the names that do not match their rule.
    Names with the same stem are left out and reported in `refused`.
    """
    stems: dict[str, str] = {}
    others: list[str] = []
    collisions: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = rule.pairing_stem(name, mask=mask)
        if stem is None:
            others.append(name)
        elif stem in stems:
            collisions[stem].append(name)
        else:
            stems[stem] = name
    for stem, more in sorted(collisions.items()):
        refused.append(f"{folder / stems.pop(stem)} and {', '.join(more)} have the same name")
    return stems, others
