"""Which picture belongs to which mask, which split a pair is in, how a mixed folder is parted."""

import csv
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.images import IMAGE_EXTENSIONS, OTHER_EXTENSIONS
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
"""What folders and lists of a split are called."""

VAL_FRACTION = 0.1
"""Share of val unless said otherwise."""

MOST_SHOWN = 20
"""Names listed in one message; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and, where there is one, its mask. A million of them fit into memory."""

    source: str
    """Path of the picture below the folder of pictures, with extension, `/` between parts."""
    mask: str | None
    """Path of the mask below the folder of masks."""

    @property
    def key(self) -> str:
        """Its key in a shard."""
        return encode_key(self.source)


@dataclass(frozen=True, slots=True)
class Pairing:
    """Pairs, and what is none."""

    images: Path
    """Folder below which the pictures lie."""
    masks: Path | None
    """Folder below which the masks lie."""
    pairs: list[Pair]
    """Sorted by path."""
    unpaired: list[str]
    """Pictures without mask and masks without picture, a line each."""
    refused: list[str]
    """Files with a name that two share, or of a kind that is not read, a line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRule:
    """How a mask is found for a picture: by the path without extension, unless said otherwise."""

    image_suffix: str = ""
    """What a picture's name ends with, before the extension, that its mask's does not."""
    mask_suffix: str = ""
    """What a mask's name ends with, before the extension, that its picture's does not."""
    image_ext: str | None = None
    """Only files with this ending are pictures."""
    mask_ext: str | None = None
    """Only files with this ending are masks."""
    regex: str | None = None
    """What it finds in both paths (its groups, else the whole match) must be equal."""

    def __post_init__(self) -> None:
        if self.regex is not None:
            check_regex("--pair-regex", self.regex)

    @property
    def tells_masks(self) -> bool:
        """Whether it tells masks from pictures that lie in one folder."""
        return self.image_suffix != self.mask_suffix or dotted(self.image_ext) != dotted(
            self.mask_ext
        )

    def stem(self, name: str, *, mask: bool) -> str | None:
        """What is equal for a picture and its mask; None where `name` is not of that side."""
        stem, found_ext = os.path.splitext(name)
        ext = dotted(self.mask_ext if mask else self.image_ext)
        suffix = self.mask_suffix if mask else self.image_suffix
        if not stem.endswith(suffix) or (ext is not None and found_ext.lower() != ext):
            return None
        if self.regex is None:
            return stem.removesuffix(suffix)
        match = re.search(self.regex, name)
        if match is None:
            return None
        return "\0".join(match.groups("")) if match.re.groups else match.group()


def check_regex(flag: str, expression: str) -> None:
    """Raise ValueError where a regular expression is none."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{flag} {expression!r} is no pattern: {error}") from error


def dotted(extension: str | None) -> str | None:
    """`PNG`, `png` and `.png` mean `.png`."""
    return None if extension is None else "." + extension.lower().lstrip(".")


def find_pairs(images: Path, masks: Path | None, rule: PairRule) -> Pairing:
    """Pairs of the files of two folders, searched recursively; the two may be one.

    Raises DataError where a folder is missing or empty, or nothing belongs together.
    """
    refused: list[str] = []
    names = list_images(images, refused)
    if masks is None:
        pictures, _ = by_stem(names, rule, images, refused, mask=False)
        pairs = [Pair(name, None) for name in pictures.values()]
        return Pairing(images, None, unique_keys(pairs, images, refused), [], refused)
    unpaired: list[str] = []
    if masks.resolve() == images.resolve():
        if not rule.tells_masks:
            raise DataError(
                f"pictures and masks share the folder {images}; tell them apart with --mask-suffix "
                "or --image-ext and --mask-ext, or part them: unet separate"
            )
        # The side with the narrower rule chooses first; the other takes what is left.
        masks_first = bool(rule.mask_suffix or rule.mask_ext)
        one, others = by_stem(names, rule, images, refused, mask=masks_first)
        other, strange = by_stem(others, rule, images, refused, mask=not masks_first)
        drawn, pictures = (one, other) if masks_first else (other, one)
        unpaired += [f"{images / name} is neither picture nor mask by the rule" for name in strange]
    else:
        pictures, strange = by_stem(names, rule, images, refused, mask=False)
        drawn, odd = by_stem(list_images(masks, refused), rule, masks, refused, mask=True)
        unpaired += [f"{images / name} is no picture by the rule" for name in strange]
        unpaired += [f"{masks / name} is no mask by the rule" for name in odd]
    unpaired += [
        f"{images / pictures[stem]} has no mask in {masks}"
        for stem in sorted(pictures.keys() - drawn.keys())
    ]
    unpaired += [
        f"{masks / drawn[stem]} has no picture in {images}"
        for stem in sorted(drawn.keys() - pictures.keys())
    ]
    both = pictures.keys() & drawn.keys()
    if not both and not refused:
        raise DataError(
            f"no picture in {images} has a mask of the same name in {masks}: "
            f"{first(pictures)} and {first(drawn)}, for example; "
            "see --mask-suffix, --pair-regex and --pairs"
        )
    pairs = [Pair(pictures[stem], drawn[stem]) for stem in both]
    return Pairing(images, masks, unique_keys(pairs, images, refused), unpaired, refused)


def first(names: dict[str, str]) -> str:
    """The first of some names, for a message."""
    return min(names.values(), default="nothing")


def unique_keys(pairs: Iterable[Pair], images: Path, refused: list[str]) -> list[Pair]:
    """Pairs in order, those left out that would share a key in the shards (`a.png`, `a.jpg`)."""
    by_key: dict[str, Pair] = {}
    doubles = set()
    for pair in sorted(pairs, key=lambda p: p.source):
        stem = os.path.splitext(pair.source)[0]
        if stem in by_key:
            refused.append(f"{images / by_key[stem].source} and {pair.source} have one name")
            doubles.add(stem)
        by_key[stem] = pair
    return [pair for stem, pair in by_key.items() if stem not in doubles]


def by_stem(
    names: Iterable[str], rule: PairRule, folder: Path, refused: list[str], *, mask: bool
) -> tuple[dict[str, str], list[str]]:
    """{what pairs: relative path} of one side, and the names that are not of that side.

    Names that share what pairs are left out, and told in `refused`.
    """
    stems: dict[str, str] = {}
    others: list[str] = []
    doubles: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = rule.stem(name, mask=mask)
        if stem is None:
            others.append(name)
        elif stem in stems:
            doubles[stem].append(name)
        else:
            stems[stem] = name
    for stem, more in sorted(doubles.items()):
        refused.append(f"{folder / stems.pop(stem)} and {', '.join(more)} have one name")
    return stems, others


def read_pair_lists(files: Sequence[Path], images: Path | None, masks: Path | None) -> Pairing:
    """Pairs from files with a picture and its mask a line.

    `.csv` and `.tsv` are split at commas and tabs, all else at white space; empty lines, lines
    that begin with # and a first line `image,mask` are passed over. Relative paths begin at
    `images` and `masks`, where these are given, else at the list's own folder. Raises DataError
    for lines that are no pair.
    """
    pictures, drawn = [], []
    for file in files:
        here = file.parent.resolve()
        for one, other in read_columns(file):
            pictures.append(os.path.normpath((images or here).resolve() / one))
            drawn.append(os.path.normpath((masks or here).resolve() / other))
    if not pictures:
        raise DataError(f"{files[0]} lists no pair; write a picture and its mask on each line")
    image_root, mask_root = (
        root_of(pictures, images or files[0].parent),
        root_of(drawn, masks or files[0].parent),
    )
    refused: list[str] = []
    partner: dict[str, str] = {}
    pairs = []
    for picture, mask in zip(pictures, drawn, strict=True):
        wrong = [problem for path in (picture, mask) if (problem := why_not_listed(path))]
        if picture in partner:
            wrong.append(f"{picture} is listed twice")
        elif mask in partner:
            wrong.append(f"{mask} is listed for {partner[mask]} and for {picture}")
        refused += wrong
        if not wrong:
            partner |= {picture: mask, mask: picture}
            pairs.append(Pair(relative(picture, image_root), relative(mask, mask_root)))
    return Pairing(image_root, mask_root, unique_keys(pairs, image_root, refused), [], refused)


def why_not_listed(path: str) -> str | None:
    """What is wrong about a path in a list of pairs; None where nothing is."""
    if not os.path.isfile(path):
        return f"{path} is listed but is not there"
    if os.path.splitext(path)[1].lower() not in IMAGE_EXTENSIONS:
        return f"{path} is no picture by its ending ({' '.join(sorted(IMAGE_EXTENSIONS))})"
    return None


def read_columns(file: Path) -> Iterator[tuple[str, str]]:
    """The two columns of a list of pairs. Raises DataError naming a line that has not two."""
    delimiter = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = [word.strip() for word in split_line(line, delimiter)]
        if number == 1 and [word.lower() for word in words] == ["image", "mask"]:
            continue
        if len(words) != 2 or not all(words):
            raise DataError(
                f"{file}, line {number} holds {len(words)} names, not a picture and its mask; "
                + (
                    "names with spaces need a .csv or .tsv"
                    if delimiter is None
                    else f"part them with {'a comma' if delimiter == ',' else 'a tab'}"
                )
            )
        yield words[0], words[1]


def split_line(line: str, delimiter: str | None) -> list[str]:
    """The columns of a line, those of white space without a delimiter; none where it is no CSV."""
    try:
        return line.split() if delimiter is None else next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []


def read_lines(file: Path) -> list[str]:
    """The lines of a text file. Raises DataError where it is none."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8; save it as such") from error


def root_of(paths: Sequence[str], wanted: Path) -> Path:
    """`wanted` where all paths lie below it, else the deepest folder of which that is true."""
    root = str(wanted.resolve())
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Path(root if os.path.commonpath([common, root]) == root else common)


def relative(path: str, root: Path) -> str:
    """A path below `root`, with `/` between parts."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def list_images(folder: Path, refused: list[str] | None = None) -> list[str]:
    """Relative paths of all pictures below a folder, hidden ones left out, sorted.

    Raises DataError where there is none; files of kinds that hold pictures but are not read are
    told in `refused`, where it is given.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    found = []
    for name in walk(str(folder)):
        lower = name.lower()
        if os.path.splitext(lower)[1] in IMAGE_EXTENSIONS:
            found.append(name)
        elif refused is not None:
            what = next((w for ext, w in OTHER_EXTENSIONS.items() if lower.endswith(ext)), None)
            if what is not None:
                refused.append(f"{folder / name} is {what}")
    if not found and not refused:
        raise DataError(f"{folder} holds no picture ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    return sorted(found)


def walk(folder: str) -> Iterator[str]:
    """Path below `folder` of every file that is not hidden, links followed but for loops."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while todo:
        below, above = todo.pop()
        path = f"{folder}/{below}"
        stat = os.stat(path)
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    todo.append((f"{below}{entry.name}/", above | {here}))
                else:
                    yield below + entry.name


class ProblemsError(DataError):
    """Several problems of one kind; its text shows the first twenty, `lines` holds them all."""

    def __init__(self, lines: Sequence[str], remedy: str) -> None:
        super().__init__(listing(lines, remedy))
        self.lines, self.remedy = list(lines), remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return ProblemsError, (self.lines, self.remedy)


def listing(problems: Sequence[str], remedy: str) -> str:
    """One line for one problem, else the first twenty, a line each, and what to do."""
    if len(problems) == 1:
        return f"{problems[0]}; {remedy}"
    more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    return "\n  ".join([f"{len(problems)} problems ({remedy}):", *problems[:MOST_SHOWN], *more])


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
    """Which split a pair is in: files that say it, else folders, else a hash."""

    val_fraction: float = VAL_FRACTION
    """Share of val."""
    test_fraction: float = 0.0
    """Share of test."""
    group_by: str | None = None
    """Regular expression; pictures in whose path it finds the same text stay together."""
    fold: tuple[int, int] | None = None
    """(i, k): the i-th of k folds, from 1, is val."""
    files: tuple[Path, ...] = ()
    """A CSV `path,split`, or lists called for their split, such as val.txt."""
    by_folder: bool = False
    """The first folder of a path is its split: `train`, `val`, `test`."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1 or not 0 <= self.test_fraction <= 1:
            raise ValueError("--val-fraction and --test-fraction are shares, 0 to 1")
        if (self.val_fraction if self.fold is None else 0) + self.test_fraction >= 1:
            raise ValueError("--val-fraction and --test-fraction leave nothing to train on")
        if self.group_by is not None:
            check_regex("--group-by", self.group_by)
        if self.fold is not None and not (1 <= self.fold[0] <= self.fold[1] >= 2):
            raise ValueError("--fold is i/k: fold i, from 1 to k, of k folds")
        ways = {
            "--fold": self.fold is not None,
            "--split-file": bool(self.files),
            "--split-folders": self.by_folder,
        }
        given = [flag for flag, used in ways.items() if used]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say the splits; give one of them")
        if given and self.val_fraction != VAL_FRACTION:
            raise ValueError(f"--val-fraction does nothing beside {given[0]}; leave one out")
        if given and self.fold is None and self.test_fraction:
            raise ValueError(f"--test-fraction does nothing beside {given[0]}; leave one out")

    def assign(self, pairs: Sequence[Pair]) -> tuple[list[Split], list[str | None]]:
        """The split and the group of each pair. Raises DataError for a pair that has none."""
        groups = [find_group(p.source, self.group_by) for p in pairs]
        if self.files or self.by_folder:
            splits = read_split_files(self.files, pairs) if self.files else split_folders(pairs)
            refuse_parted_groups(groups, splits)
            return splits, groups
        names = [p.key if group is None else group for p, group in zip(pairs, groups, strict=True)]
        return [self.by_hash(name) for name in names], groups

    def by_hash(self, name: str) -> Split:
        """The split of a key or group: adding data never moves one."""
        fraction = hash_fraction(name)
        if self.fold is None:
            if fraction < self.val_fraction:
                return "val"
            return "test" if fraction < self.val_fraction + self.test_fraction else "train"
        number, count = self.fold
        if fraction >= 1 - self.test_fraction:
            return "test"
        return "val" if int(fraction / (1 - self.test_fraction) * count) == number - 1 else "train"


def find_group(source: str, expression: str | None) -> str | None:
    """What `expression` finds in a path; None without an expression."""
    if expression is None:
        return None
    match = re.search(expression, source)
    if match is None:
        raise DataError(f"{source} does not match --group-by {expression!r}; widen the pattern")
    group = "\0".join(match.groups("")) if match.re.groups else match.group()
    return group.strip("\0").replace("\0", "/")


def refuse_parted_groups(groups: Sequence[str | None], splits: Sequence[Split]) -> None:
    """Raise DataError where a group spans two splits."""
    found: dict[str | None, set[Split]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        found[group].add(split)
    problems = [
        f"the group {group!r} is in {' and '.join(sorted(found[group]))}"
        for group in sorted(group for group in found if group is not None)
        if len(found[group]) > 1
    ]
    if problems:
        raise ProblemsError(problems, "correct the splits, or leave --group-by out")


def hash_fraction(name: str) -> float:
    """sha256 of a name, its first 8 bytes as a fraction of 2^64."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_folders(pairs: Sequence[Pair]) -> list[Split]:
    """The split that the first folder of each path names."""
    splits: list[Split] = []
    problems = []
    for pair in pairs:
        split = SPLIT_NAMES.get(pair.source.partition("/")[0].lower())
        if split is None or "/" not in pair.source:
            problems.append(f"{pair.source} lies in no folder called train, val or test")
        else:
            splits.append(split)
    if problems:
        raise ProblemsError(problems, "--split-folders needs them at the top of --images")
    return splits


def read_split_files(files: Sequence[Path], pairs: Sequence[Pair]) -> list[Split]:
    """The split of each pair from a CSV `path,split`, or from lists called for their split.

    A path is the picture's, relative, with or without extension. Raises DataError for pictures
    that no file names, lines without a picture, doubles and unknown splits.
    """
    sources = {os.path.splitext(p.source)[0]: p.source for p in pairs}
    sources |= {p.source: p.source for p in pairs}
    listed: dict[str, tuple[Split, str]] = {}
    problems = []
    for file in files:
        for number, name, split in read_splits(file, sources):
            source = sources.get(name)
            where = f"{file}, line {number}"
            if source is None:
                problems.append(f"{where} lists {name}, which is not there")
            elif source in listed:
                was, before = listed[source]
                problems.append(
                    f"{where}: {name} stands twice"
                    + (f", in {was} ({before}) and in {split}" if was != split else f" ({before})")
                )
            else:
                listed[source] = split, where
    what = " or ".join(map(str, files))
    problems += [f"{p.source} is not in {what}" for p in pairs if p.source not in listed]
    if problems:
        raise ProblemsError(problems, "every picture must be named once")
    return [listed[p.source][0] for p in pairs]


def read_splits(file: Path, known: dict[str, str]) -> Iterator[tuple[int, str, Split]]:
    """(line, path, split) of a split file or list."""
    lines = read_lines(file)
    header = [word.strip() for word in split_line(lines[0], ",")] if lines else []
    if {"path", "split"} <= set(header):
        for number, line in enumerate(lines[1:], 2):
            row = split_line(line, ",") if line.strip() else [""] * len(header)
            if len(row) != len(header):
                raise DataError(
                    f"{file}, line {number} is not {','.join(header)}: {line!r}; correct it"
                )
            name, word = (row[header.index(column)].strip() for column in ("path", "split"))
            split: Split | None = next((s for s in SPLITS if s == word), None)
            if split is None and (name or word):
                raise DataError(
                    f"{file}, line {number}: {word!r} is none of {', '.join(SPLITS)}; correct it"
                )
            if split is not None:
                yield number, name, split
        return
    split = SPLIT_NAMES.get(file.stem.lower())
    if split is None:
        raise DataError(
            f"{file} must begin with the line path,split or be called train.txt, val.txt or "
            "test.txt; rename it or add that line"
        )
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            # A list of pairs names the mask after the picture; a name may also hold spaces.
            words = text.replace(",", " ").split()
            yield number, text if text in known or not words else words[0], split


@dataclass(frozen=True, slots=True)
class Separation:
    """One file of a mixed folder and where it goes."""

    source: Path
    target: Path
    is_mask: bool


def separate(
    folder: Path,
    out: Path,
    *,
    mask_suffix: str | None = None,
    mask_pattern: str | None = None,
    image_ext: str | None = None,
    mask_ext: str | None = None,
) -> list[Separation]:
    """Where each file of a folder that mixes pictures and masks belongs; moves nothing.

    A mask is what has the suffix before its extension (which it loses), what the pattern finds in
    its path (its name becomes the pattern's groups, or loses what was found), or what has the
    extension `mask_ext`. Files that an interrupted run has moved to `out` count as partners.
    Raises DataError for files that are neither or both, and for unpaired ones.
    """
    plan: list[Separation] = []
    problems: list[str] = []
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    inside: str | tuple[str, ...] = f"{relative(str(out.resolve()), folder.resolve())}/"
    if inside == "./":
        inside = ("images/", "masks/")
    for name in list_images(folder):
        stem, ext = os.path.splitext(name)
        if name.startswith(inside):
            continue
        if mask_suffix is not None:
            is_mask = stem.endswith(mask_suffix)
            stem = stem.removesuffix(mask_suffix) if is_mask else stem
        elif mask_pattern is not None:
            match = re.search(mask_pattern, stem)
            is_mask = match is not None
            if match is not None:
                kept = "".join(match.groups(""))
                stem = kept if match.re.groups else stem[: match.start()] + stem[match.end() :]
        elif ext.lower() not in (image_ext, mask_ext):
            problems.append(f"{name} ends neither in {image_ext} nor in {mask_ext}")
            continue
        else:
            is_mask = ext.lower() == mask_ext
        side = sides[is_mask]
        if stem in side:
            problems.append(f"{side[stem]} and {name} have one name")
        side[stem] = name
        target = out / ("masks" if is_mask else "images") / (stem + ext)
        plan.append(Separation(folder / name, target, is_mask))
    pictures, drawn = sides
    placed_images, placed_masks = placed_stems(out / "images"), placed_stems(out / "masks")
    alone = sorted(pictures.keys() - drawn.keys() - placed_masks)
    problems += [f"{pictures[stem]} has no mask" for stem in alone]
    alone = sorted(drawn.keys() - pictures.keys() - placed_images)
    problems += [f"{drawn[stem]} has no picture" for stem in alone]
    if problems:
        raise ProblemsError(problems, f"correct the rule or the folder {folder}")
    return plan


def placed_stems(folder: Path) -> set[str]:
    """What lies in a folder already, by path without extension."""
    return {os.path.splitext(name)[0] for name in walk(str(folder))} if folder.is_dir() else set()
