"""Which folders below a folder hold images and which their masks, judged by names."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from shards.folders.split_names import SPLIT_NAMES, SPLITS, find_named_split
from shards.folders.suffixes import Fit, find_fit
from shards.folders.walk import walk_files
from shards.images.files import IMAGE_EXTENSIONS
from shards.local_files import describe_no_directory
from shards.sample import DataError

MAX_DEPTH, MAX_FOLDERS = 3, 40
"""Folders that are compared: the first 40 within three levels."""
SPLIT_WORDS = re.compile("|".join(sorted(SPLIT_NAMES, key=len, reverse=True)), re.IGNORECASE)
MIN_SHARE = 0.3
"""Layouts with fewer pairs than this share of the largest are not proposed."""
DECOYS = (
    *("object", "instance", "inst", "color", "colour", "viz", "vis", "overlay", "center", "edge"),
    *("fov", "roi", "depth", "2nd", "second", "unlabel", "pred", "bound"),
)
LABELS = (
    *("label", "annot", "anno", "gt", "ground", "truth", "seg", "manual", "target", "lesion"),
    *("1st", "class"),
)
MASKS = ("mask", "msk", "matte", "_fg")
IMAGES = ("image", "img", "rgb", "input", "jpeg", "photo", "original", "raw", "sat")


@dataclass(frozen=True, slots=True)
class Layout:
    """Folders of images, those of their masks in the same order, and what pairs them."""

    images: tuple[str, ...]
    masks: tuple[str, ...]
    """Relative paths, `.` for the folder itself."""
    fit: Fit
    rank: tuple[float, ...]
    """The highest is proposed."""

    @property
    def mask_place(self) -> str:
        """Describe where the masks are."""
        fit = self.fit
        name = f"{fit.mask_prefix}*{fit.mask_suffix}"
        return " ".join(self.masks) + (f" ({name})" if fit.mask_words else "")

    @property
    def shows_images(self) -> bool:
        """Whether the names of the images are not those of masks."""
        words = self.fit.image_words if self.images == self.masks else " ".join(self.images)
        return score_mask(words) <= 1


@dataclass(frozen=True, slots=True)
class FolderContent:
    """What lies below a folder."""

    layouts: list[Layout]
    """The most likely first."""
    images: list[str]
    """Relative paths of all image files, masks included."""
    others: list[str]
    """Relative paths of all other files."""
    num_folders: int
    """Folders that contain image files, directly or below; more than 40 are not all compared."""


def find_layouts(root: Path) -> FolderContent:
    """Find the layouts below a folder.

    Raises DataError if the folder is missing or contains no images.
    """
    if not root.is_dir():
        raise DataError(f"FOLDER {root}: {describe_no_directory(root)}")
    files = sorted(walk_files(str(root)))
    images = [name for name in files if os.path.splitext(name.lower())[1] in IMAGE_EXTENSIONS]
    folders, num_folders = group_by_folder(images)
    if not folders:
        extensions = Counter(os.path.splitext(name)[1].lower() for name in files)
        what = ", ".join(
            f"{count} {ext or 'without extension'}" for ext, count in extensions.items()
        )
        raise DataError(f"{root} contains no images; it has {what or 'no files'}")
    groups: dict[tuple[object, ...], list[tuple[str, str]]] = defaultdict(list)
    for one, other in product(folders, folders):
        if contains(other, one) or not may_share_split(one, other):
            continue
        if find_fit(names_beside(folders, one, other), folders[other], shared=one == other).pairs:
            groups[pattern_of(one, other)].append((one, other))
    layouts = [make_layout(folders, members) for members in groups.values()]
    most = max((layout.fit.pairs for layout in layouts), default=0)
    kept = [layout for layout in layouts if layout.fit.pairs >= max(2, MIN_SHARE * most)]
    kept.sort(key=lambda layout: layout.rank, reverse=True)
    return FolderContent(kept, images, sorted({*files} - {*images}), num_folders)


def group_by_folder(names: Iterable[str]) -> tuple[dict[str, list[str]], int]:
    """Return {folder: names below it} of the folders near the top, and the number of all."""
    every: set[str] = set()
    folders: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        parts = name.split("/")[:-1]
        every.add("/".join(parts))
        for depth in range(min(len(parts), MAX_DEPTH) + 1):
            folder = "/".join(parts[:depth]) or "."
            folders[folder].append(name if not depth else name[len(folder) + 1 :])
    near = sorted(folders, key=lambda f: (f != ".", f.count("/"), f))[:MAX_FOLDERS]
    return {folder: folders[folder] for folder in near}, len(every | folders.keys() - {"."})


def find_split_words(path: str) -> set[str]:
    """Return the splits that parts of a path name: `trainannot` is train."""
    return {SPLIT_NAMES[word.lower()] for word in SPLIT_WORDS.findall(path)}


def may_share_split(one: str, other: str) -> bool:
    """Return whether two folders do not name different splits: `train` and `valannot` do."""
    splits = find_split_words(one), find_split_words(other)
    return not all(splits) or bool(splits[0] & splits[1])


def contains(outer: str, inner: str) -> bool:
    """Return whether a folder is above another one."""
    return outer != inner and (outer == "." or inner.startswith(f"{outer}/"))


def names_beside(folders: dict[str, list[str]], one: str, other: str) -> list[str]:
    """Return the names below a folder without those of another folder inside it."""
    if not contains(one, other):
        return folders[one]
    inside = "" if one == "." else f"{one}/"
    return [name for name in folders[one] if not f"{inside}{name}".startswith(f"{other}/")]


def pattern_of(one: str, other: str) -> tuple[object, ...]:
    """Return what pairs of folders of several splits have in common: `*/images`, `*/masks`."""
    shared = os.path.commonpath([one, other]) if one != other else os.path.dirname(one)
    if not any(map(find_named_split, one.split("/"))):
        return (one, other)
    ends = (path[len(shared) :].lstrip("/") for path in (one, other))
    return (shared.count("/"), bool(shared), *(SPLIT_WORDS.sub("*", end) for end in ends))


def make_layout(folders: dict[str, list[str]], members: list[tuple[str, str]]) -> Layout:
    """Fit one rule to all pairs of folders of a layout, and rank it."""
    images, masks = zip(*sorted(members, key=rank_split), strict=True)
    shared = images == masks
    left = [
        f"{i}/{name}"
        for i, one in enumerate(images)
        for name in names_beside(folders, one, masks[i])
    ]
    right = [f"{i}/{name}" for i, other in enumerate(masks) for name in folders[other]]
    fit = find_fit(left, right, shared=shared)
    if shared and score_mask(fit.image_words) > score_mask(fit.mask_words):
        fit = replace(
            fit,
            image_suffix=fit.mask_suffix,
            mask_suffix=fit.image_suffix,
            image_prefix=fit.mask_prefix,
            mask_prefix=fit.image_prefix,
        )
    if shared and is_photo(fit.mask_ext) > is_photo(fit.image_ext):
        fit = replace(fit, image_ext=fit.mask_ext, mask_ext=fit.image_ext)
    mask_words = f"{'' if shared else ' '.join(masks)} {fit.mask_words}"
    image_words = f"{'' if shared else ' '.join(images)} {fit.image_words}"
    coverage = fit.pairs / max(1, len(set(right)))
    score = score_mask(mask_words) - score_mask(image_words) + coverage
    depth = sum(one.count("/") + (one != ".") for one in images) / len(images)
    return Layout(images, masks, fit, (score, -len(images), fit.pairs, depth))


def rank_split(folders: tuple[str, str]) -> tuple[int, tuple[str, str]]:
    """Sort folders by split: train, val, test."""
    found = find_split_words(folders[0])
    return next((i for i, split in enumerate(SPLITS) if split in found), 0), folders


def is_photo(extension: str | None) -> bool:
    """Return whether files with this extension are more likely images than masks."""
    return extension in (".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def score_mask(words: str) -> int:
    """Score how likely names are those of masks: labels above masks above images and decoys."""
    lower = words.lower()
    if any(word in lower for word in DECOYS):
        return -1 if "unlabel" not in lower else 1
    if any(word in lower for word in LABELS):
        return 4
    if any(word in lower for word in MASKS):
        return 2
    return -2 if any(word in lower for word in IMAGES) else 0


def list_pairs(layout: Layout, names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the image and the mask of each pair of a layout whose names begin differently.

    `names`: relative paths of all image files. A name that several files share is left out.
    """
    pairs: list[tuple[str, str]] = []
    fit = layout.fit
    for images, masks in zip(layout.images, layout.masks, strict=True):
        left, right = (
            index_without_prefix(names, folder, prefix)
            for folder, prefix in ((images, fit.image_prefix), (masks, fit.mask_prefix))
        )
        pairs += [
            (left[rest][0], right[rest][0])
            for rest in sorted(left.keys() & right.keys())
            if len(left[rest]) == len(right[rest]) == 1
        ]
    return pairs


def index_without_prefix(names: Iterable[str], folder: str, prefix: str) -> dict[str, list[str]]:
    """Return {path in the folder, without prefix and extension: names}."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if folder == "." or name.startswith(f"{folder}/"):
            below = name if folder == "." else name[len(folder) + 1 :]
            place, slash, last = os.path.splitext(below)[0].rpartition("/")
            if last.startswith(prefix):
                found[place + slash + last.removeprefix(prefix)].append(name)
    return found
