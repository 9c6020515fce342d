"""Pairs of images and masks, their splits, and the separation of a folder that mixes both."""

import csv
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.images import IMAGE_EXTENSIONS, UNSUPPORTED_EXTENSIONS
from shards.sample import DataError, encode_key

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Accepted names of split folders and split lists."""

DEFAULT_VAL_FRACTION = 0.1

MAX_LISTED = 20
"""Problems listed in one message; the others are only counted."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask, if it has one. Small: a million pairs fit into memory."""

    source: str
    """Path of the image relative to the image folder, with extension and `/` as separator."""
    mask: str | None
    """Path of the mask relative to the mask folder."""

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


def find_pairs(images: Path, masks: Path | None, rule: PairRule) -> Pairing:
    """Pair the files of two folders, searched recursively; both may be the same folder.

    Raises DataError if a folder is missing or has no images, or if no image has a mask.
    """
    refused: list[str] = []
    names = list_images(images, refused)
    if masks is None:
        image_names, _ = group_by_stem(names, rule, images, refused, mask=False)
        pairs = [Pair(name, None) for name in image_names.values()]
        return Pairing(images, None, drop_key_collisions(pairs, images, refused), [], refused)
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
        names = list_images(masks, refused)
        mask_names, rest = group_by_stem(names, rule, masks, refused, mask=True)
        unpaired += [f"{masks / name} does not match the rule for masks" for name in rest]
    unpaired += [
        f"{images / image_names[stem]} has no mask in {masks}"
        for stem in sorted(image_names.keys() - mask_names.keys())
    ]
    unpaired += [
        f"{masks / mask_names[stem]} has no image in {images}"
        for stem in sorted(mask_names.keys() - image_names.keys())
    ]
    common = image_names.keys() & mask_names.keys()
    if not common and not refused:
        raise DataError(
            f"no image in {images} has a mask of the same name in {masks} (for example: "
            f"{first_name(image_names)} and {first_name(mask_names)}); "
            "see --mask-suffix, --pair-regex and --pairs"
        )
    pairs = [Pair(image_names[stem], mask_names[stem]) for stem in common]
    return Pairing(images, masks, drop_key_collisions(pairs, images, refused), unpaired, refused)


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


def read_pair_lists(files: Sequence[Path], images: Path | None, masks: Path | None) -> Pairing:
    """Read pairs from files with an image and its mask on each line.

    `.csv` and `.tsv` are split at commas and tabs, all others at white space. Empty lines, lines
    that start with # and a first line `image,mask` are skipped. Paths are relative to `images` and
    `masks`, or to the folder of the list if these are None. Raises DataError for a line that is not
    a pair.
    """
    image_paths, mask_paths = [], []
    for file in files:
        here = file.parent.resolve()
        for image, mask in read_pair_columns(file):
            image_paths.append(os.path.normpath((images or here).resolve() / image))
            mask_paths.append(os.path.normpath((masks or here).resolve() / mask))
    if not image_paths:
        raise DataError(f"{files[0]} lists no pairs; write an image and its mask on each line")
    image_root, mask_root = (
        find_common_root(image_paths, images or files[0].parent),
        find_common_root(mask_paths, masks or files[0].parent),
    )
    refused: list[str] = []
    partner: dict[str, str] = {}
    pairs = []
    for image, mask in zip(image_paths, mask_paths, strict=True):
        wrong = [problem for path in (image, mask) if (problem := explain_unusable_path(path))]
        if image in partner:
            wrong.append(f"{image} is listed twice")
        elif mask in partner:
            wrong.append(f"{mask} is listed for {partner[mask]} and for {image}")
        refused += wrong
        if not wrong:
            partner |= {image: mask, mask: image}
            pairs.append(Pair(relative_path(image, image_root), relative_path(mask, mask_root)))
    pairs = drop_key_collisions(pairs, image_root, refused)
    return Pairing(image_root, mask_root, pairs, [], refused)


def explain_unusable_path(path: str) -> str | None:
    """Return what is wrong with a path in a list of pairs; None if it can be used."""
    if not os.path.isfile(path):
        return f"{path} is listed but does not exist"
    if os.path.splitext(path)[1].lower() not in IMAGE_EXTENSIONS:
        return f"{path} does not have an image extension ({' '.join(sorted(IMAGE_EXTENSIONS))})"
    return None


def read_pair_columns(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the two columns of a list of pairs. Raises DataError for a line without exactly two."""
    delimiter = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = [word.strip() for word in split_columns(line, delimiter)]
        if number == 1 and [word.lower() for word in words] == ["image", "mask"]:
            continue
        if len(words) != 2 or not all(words):
            raise DataError(
                f"{file}, line {number}: expected 2 names, an image and its mask, got "
                f"{len(words)}; "
                + (
                    "names with spaces need a .csv or .tsv"
                    if delimiter is None
                    else f"separate them with {'a comma' if delimiter == ',' else 'a tab'}"
                )
            )
        yield words[0], words[1]


def split_columns(line: str, delimiter: str | None) -> list[str]:
    """Split a line at a delimiter, or at white space if it is None; [] if it is not valid CSV."""
    try:
        return line.split() if delimiter is None else next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file. Raises DataError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; save it as UTF-8") from error


def find_common_root(paths: Sequence[str], preferred: Path) -> Path:
    """Return `preferred` if it contains all paths, else the deepest folder that does."""
    root = str(preferred.resolve())
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Path(root if os.path.commonpath([common, root]) == root else common)


def relative_path(path: str, root: Path) -> str:
    """Return a path relative to `root`, with `/` as separator."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def list_images(folder: Path, refused: list[str] | None = None) -> list[str]:
    """List the relative paths of all images below a folder, without hidden files, sorted.

    Files in unsupported image formats are reported in `refused`, if it is given. Raises DataError
    if the folder is missing or has neither.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory")
    names = []
    for name in walk_files(str(folder)):
        lower = name.lower()
        if os.path.splitext(lower)[1] in IMAGE_EXTENSIONS:
            names.append(name)
        elif refused is not None:
            problem = next(
                (p for ext, p in UNSUPPORTED_EXTENSIONS.items() if lower.endswith(ext)), None
            )
            if problem is not None:
                refused.append(f"{folder / name} is {problem}")
    if not names and not refused:
        raise DataError(f"{folder} contains no images ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    return sorted(names)


def walk_files(folder: str) -> Iterator[str]:
    """Yield the relative path of every file that is not hidden; follows links but not cycles."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while todo:
        below, ancestors = todo.pop()
        path = f"{folder}/{below}"
        stat = os.stat(path)
        here = (stat.st_dev, stat.st_ino)
        if here in ancestors:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    todo.append((f"{below}{entry.name}/", ancestors | {here}))
                else:
                    yield below + entry.name


class AggregateDataError(DataError):
    """Several problems with the same remedy. The message lists the first 20, `problems` all."""

    def __init__(self, problems: Sequence[str], remedy: str) -> None:
        super().__init__(format_problems(problems, remedy))
        self.problems, self.remedy = list(problems), remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return AggregateDataError, (self.problems, self.remedy)


def format_problems(problems: Sequence[str], remedy: str) -> str:
    """Format one problem as one line, several as a list of the first 20 below the remedy."""
    if len(problems) == 1:
        return f"{problems[0]}; {remedy}"
    more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "\n  ".join([f"{len(problems)} problems ({remedy}):", *problems[:MAX_LISTED], *more])


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
    """How pairs are assigned to splits: by files, by folders, or by a hash.

    Raises ValueError for contradictory settings.
    """

    val_fraction: float = DEFAULT_VAL_FRACTION
    """Fraction of samples in val."""
    test_fraction: float = 0.0
    """Fraction of samples in test."""
    group_by: str | None = None
    """Regular expression; images with the same match in their path stay in the same split."""
    fold: tuple[int, int] | None = None
    """(i, k): fold i of k, counted from 1, is val."""
    files: tuple[Path, ...] = ()
    """A CSV `path,split`, or lists named after their split, such as val.txt."""
    by_folder: bool = False
    """The first folder of a path is its split: `train`, `val`, `test`."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1 or not 0 <= self.test_fraction <= 1:
            raise ValueError("--val-fraction and --test-fraction must be between 0 and 1")
        if (self.val_fraction if self.fold is None else 0) + self.test_fraction >= 1:
            raise ValueError("--val-fraction and --test-fraction leave nothing to train on")
        if self.group_by is not None:
            validate_regex("--group-by", self.group_by)
        if self.fold is not None and not (1 <= self.fold[0] <= self.fold[1] >= 2):
            raise ValueError("--fold must be i/k: fold i, from 1 to k, of k >= 2 folds")
        sources = {
            "--fold": self.fold is not None,
            "--split-file": bool(self.files),
            "--split-folders": self.by_folder,
        }
        flags = [flag for flag, used in sources.items() if used]
        if len(flags) > 1:
            raise ValueError(f"{' and '.join(flags)} both define the splits; use one of them")
        if flags and self.val_fraction != DEFAULT_VAL_FRACTION:
            raise ValueError(f"--val-fraction has no effect with {flags[0]}; remove one of them")
        if flags and self.fold is None and self.test_fraction:
            raise ValueError(f"--test-fraction has no effect with {flags[0]}; remove one of them")

    def assign_splits(self, pairs: Sequence[Pair]) -> tuple[list[Split], list[str | None]]:
        """Return the split and the group of each pair. Raises DataError for a pair without one."""
        groups = [extract_group(p.source, self.group_by) for p in pairs]
        if self.files or self.by_folder:
            splits = (
                read_split_files(self.files, pairs) if self.files else read_split_folders(pairs)
            )
            refuse_divided_groups(groups, splits)
            return splits, groups
        names = [p.key if group is None else group for p, group in zip(pairs, groups, strict=True)]
        return [self.hash_split(name) for name in names], groups

    def hash_split(self, name: str) -> Split:
        """Return the split of a key or group by its hash, so that adding data never changes it."""
        fraction = hash_fraction(name)
        if self.fold is None:
            if fraction < self.val_fraction:
                return "val"
            return "test" if fraction < self.val_fraction + self.test_fraction else "train"
        number, count = self.fold
        if fraction >= 1 - self.test_fraction:
            return "test"
        return "val" if int(fraction / (1 - self.test_fraction) * count) == number - 1 else "train"


def extract_group(source: str, expression: str | None) -> str | None:
    """Return the match of `expression` in a path, None without an expression.

    Raises DataError if it does not match.
    """
    if expression is None:
        return None
    match = re.search(expression, source)
    if match is None:
        raise DataError(f"{source} does not match --group-by {expression!r}; widen the pattern")
    group = "\0".join(match.groups("")) if match.re.groups else match.group()
    return group.strip("\0").replace("\0", "/")


def refuse_divided_groups(groups: Sequence[str | None], splits: Sequence[Split]) -> None:
    """Raise DataError if a group is in two splits."""
    splits_of: dict[str | None, set[Split]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        splits_of[group].add(split)
    problems = [
        f"the group {group!r} is in {' and '.join(sorted(splits_of[group]))}"
        for group in sorted(group for group in splits_of if group is not None)
        if len(splits_of[group]) > 1
    ]
    if problems:
        raise AggregateDataError(problems, "correct the splits, or remove --group-by")


def hash_fraction(name: str) -> float:
    """Return the first 8 bytes of the sha256 of a name as a fraction of 2^64."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_split_folders(pairs: Sequence[Pair]) -> list[Split]:
    """Return the split named by the first folder of each path. Raises DataError if none is."""
    splits: list[Split] = []
    problems = []
    for pair in pairs:
        split = SPLIT_NAMES.get(pair.source.partition("/")[0].lower())
        if split is None or "/" not in pair.source:
            problems.append(f"{pair.source} is not in a folder named train, val or test")
        else:
            splits.append(split)
    if problems:
        raise AggregateDataError(problems, "--split-folders needs them at the top of --images")
    return splits


def read_split_files(files: Sequence[Path], pairs: Sequence[Pair]) -> list[Split]:
    """Read the split of each pair from a CSV `path,split`, or from lists named after their split.

    Paths are those of the images, relative, with or without extension. Raises DataError for images
    that no file lists, unknown paths, duplicates and unknown splits.
    """
    sources = {os.path.splitext(p.source)[0]: p.source for p in pairs}
    sources |= {p.source: p.source for p in pairs}
    listed: dict[str, tuple[Split, str]] = {}
    problems = []
    for file in files:
        for number, name, split in parse_split_file(file, sources):
            source = sources.get(name)
            where = f"{file}, line {number}"
            if source is None:
                problems.append(f"{where} lists {name}, which is not one of the images")
            elif source in listed:
                was, before = listed[source]
                problems.append(
                    f"{where}: {name} is listed twice"
                    + (f", in {was} ({before}) and in {split}" if was != split else f" ({before})")
                )
            else:
                listed[source] = split, where
    what = " or ".join(map(str, files))
    problems += [f"{p.source} is not in {what}" for p in pairs if p.source not in listed]
    if problems:
        raise AggregateDataError(problems, "list every image exactly once")
    return [listed[p.source][0] for p in pairs]


def parse_split_file(file: Path, known: dict[str, str]) -> Iterator[tuple[int, str, Split]]:
    """Yield (line number, path, split) of a CSV `path,split` or of a list named after its split.

    `known`: paths of images, which may contain spaces. Raises DataError for a malformed file.
    """
    lines = read_lines(file)
    header = [word.strip() for word in split_columns(lines[0], ",")] if lines else []
    if {"path", "split"} <= set(header):
        for number, line in enumerate(lines[1:], 2):
            row = split_columns(line, ",") if line.strip() else [""] * len(header)
            if len(row) != len(header):
                raise DataError(
                    f"{file}, line {number} is not of the form {','.join(header)}: {line!r}; "
                    "correct it"
                )
            name, word = (row[header.index(column)].strip() for column in ("path", "split"))
            split: Split | None = next((s for s in SPLITS if s == word), None)
            if split is None and (name or word):
                raise DataError(
                    f"{file}, line {number}: {word!r} is not one of {', '.join(SPLITS)}; correct it"
                )
            if split is not None:
                yield number, name, split
        return
    split = SPLIT_NAMES.get(file.stem.lower())
    if split is None:
        raise DataError(
            f"{file} must start with the line path,split or be named train.txt, val.txt or "
            "test.txt; rename it or add that line"
        )
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            # In a list of pairs, the mask follows the image; names may contain spaces too.
            words = text.replace(",", " ").split()
            yield number, text if text in known or not words else words[0], split


@dataclass(frozen=True, slots=True)
class FileMove:
    """One file of a mixed folder and its destination."""

    source: Path
    target: Path
    is_mask: bool


def plan_separation(
    folder: Path,
    out: Path,
    *,
    mask_suffix: str | None = None,
    mask_pattern: str | None = None,
    image_ext: str | None = None,
    mask_ext: str | None = None,
) -> list[FileMove]:
    """Plan where each file of a folder that mixes images and masks is moved; moves nothing.

    A mask is a file with `mask_suffix` before its extension (removed from its name), a path that
    `mask_pattern` matches (replaced by the groups of the pattern, or stripped of the match), or a
    file with the extension `mask_ext`. Files already moved to `out` by an interrupted run count as
    partners. Raises DataError for files that match neither or both, and for unpaired files.
    """
    plan: list[FileMove] = []
    problems: list[str] = []
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    below = relative_path(str(out.resolve()), folder.resolve())
    outputs = ("images/", "masks/") if below == "." else (f"{below}/",)
    for name in list_images(folder):
        stem, ext = os.path.splitext(name)
        if name.startswith(outputs):
            continue
        if mask_suffix is not None:
            is_mask = stem.endswith(mask_suffix)
            stem = stem.removesuffix(mask_suffix) if is_mask else stem
        elif mask_pattern is not None:
            is_mask, stem = match_mask_stem(mask_pattern, stem)
        elif ext.lower() not in (image_ext, mask_ext):
            problems.append(f"{name} ends neither in {image_ext} nor in {mask_ext}")
            continue
        else:
            is_mask = ext.lower() == mask_ext
        side = sides[is_mask]
        if stem in side:
            problems.append(f"{side[stem]} and {name} have the same name")
        side[stem] = name
        target = out / ("masks" if is_mask else "images") / (stem + ext)
        plan.append(FileMove(folder / name, target, is_mask))
    images, masks = sides
    moved_images, moved_masks = list_stems(out / "images"), list_stems(out / "masks")
    without_mask = sorted(images.keys() - masks.keys() - moved_masks)
    without_image = sorted(masks.keys() - images.keys() - moved_images)
    problems += [f"{images[stem]} has no mask" for stem in without_mask]
    problems += [f"{masks[stem]} has no image" for stem in without_image]
    if problems:
        raise AggregateDataError(problems, f"correct the rule or the folder {folder}")
    return plan


def match_mask_stem(pattern: str, stem: str) -> tuple[bool, str]:
    """Return whether a pattern matches a path without extension, and the path that remains."""
    match = re.search(pattern, stem)
    if match is None:
        return False, stem
    if match.re.groups:
        return True, "".join(match.groups(""))
    return True, stem[: match.start()] + stem[match.end() :]


def list_stems(folder: Path) -> set[str]:
    """Return the relative paths, without extension, of the files in a folder that may not exist."""
    if not folder.is_dir():
        return set()
    return {os.path.splitext(name)[0] for name in walk_files(str(folder))}
