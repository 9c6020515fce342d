"""Train, val or test: by list, by folder, by hash."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.folders.pairs import Pair, validate_regex
from shards.folders.split_names import SPLIT_NAMES, SPLITS, Split, find_named_split
from shards.folders.walk import read_lines, split_columns
from shards.sample import AggregateDataError, DataError

DEFAULT_VAL_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
    """How pairs are assigned to splits: by files, by folders, or by a hash.

    Raises ValueError for contradictory settings.
    """

    val_fraction: float | None = None
    """Fraction of samples in val; None: 0.1, or what files, folders or names of lists declare."""
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
        val_fraction = self.hashed_fraction
        for flag, share in (
            ("--val-fraction", val_fraction),
            ("--test-fraction", self.test_fraction),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{flag} must be between 0 and 1, got {share}")
        if (val_fraction if self.fold is None else 0) + self.test_fraction >= 1:
            raise ValueError(
                f"--test-fraction {self.test_fraction:g}: with --val-fraction "
                f"{0 if self.fold else val_fraction:g}, nothing is left to train on; lower one"
            )
        if self.group_by is not None:
            validate_regex("--group-by", self.group_by)
        if self.fold is not None and not (1 <= self.fold[0] <= self.fold[1] >= 2):
            raise ValueError(
                "--fold must be i/k with i from 1 to k and at least 2 folds, such as 2/5"
            )
        sources = {"--split-file": bool(self.files), "--split-folders": self.by_folder}
        flags = [flag for flag, used in sources.items() if used]
        if len(flags) > 1:
            raise ValueError(f"{' and '.join(flags)} both define the splits; use one of them")
        if self.fold is not None and self.val_fraction is not None:
            raise ValueError("--val-fraction has no effect with --fold; remove one of them")
        if flags and self.test_fraction:
            raise ValueError(f"--test-fraction has no effect with {flags[0]}; remove one of them")

    @property
    def hashed_fraction(self) -> float:
        """Fraction of samples that the hash assigns to val."""
        return DEFAULT_VAL_FRACTION if self.val_fraction is None else self.val_fraction

    def assign_splits(
        self, pairs: Sequence[Pair], notes: list[str] | None = None
    ) -> tuple[list[Split], list[str | None]]:
        """Return the split and the group of each pair.

        Declared splits (files, folders, names of lists) are kept, except that `val_fraction` and
        `fold` cut val out of a declared train. A val of a fraction that would be empty takes
        the next sample (or group) of train by hash, which is reported in `notes`, if it is given.

        Raises DataError for a pair without a split, and for settings that contradict the declared
        splits.
        """
        groups = [extract_group(p.source, self.group_by) for p in pairs]
        names = [p.key if group is None else group for p, group in zip(pairs, groups, strict=True)]
        declared = self.read_declared(pairs, notes)
        cut = self.fold is not None or bool(self.val_fraction)
        if declared is None:
            splits: list[Split] = [self.hash_split(name) for name in names]
        else:
            refuse_divided_groups(groups, declared)
            self.refuse_unused(set(declared))
            splits = [
                self.hash_split(name) if cut and split == "train" else split
                for name, split in zip(names, declared, strict=True)
            ]
        if (cut or declared is None) and self.fold is None and self.hashed_fraction > 0:
            note = self.fill_val(splits, names)
            if note and notes is not None:
                notes.append(note)
        return splits, groups

    def read_declared(
        self, pairs: Sequence[Pair], notes: list[str] | None = None
    ) -> list[Split] | None:
        """Return the splits that files, folders or the names of lists declare, None without any."""
        if self.files:
            return read_split_files(self.files, pairs, notes)
        if self.by_folder:
            return read_split_folders(pairs)
        named: list[Split] = [pair.split for pair in pairs if pair.split is not None]
        return named if named and len(named) == len(pairs) else None

    def refuse_unused(self, declared: set[Split]) -> None:
        """Raise DataError for a setting that has no effect on declared splits."""
        flag = "--fold" if self.fold is not None else "--val-fraction"
        if (self.fold is not None or self.val_fraction) and "val" in declared:
            raise DataError(
                f"{flag} cuts val out of train, but the data declare val; remove {flag}, or "
                "declare these samples as train"
            )
        if self.test_fraction:
            raise DataError(
                "--test-fraction has no effect on declared splits; remove it, or declare test"
            )

    def fill_val(self, splits: list[Split], names: Sequence[str]) -> str | None:
        """Move the next sample (or group) of train by hash into an empty val; returns a note.

        `splits` is changed in place. Nothing is moved out of a train that has only one.
        """
        train = {name for name, split in zip(names, splits, strict=True) if split == "train"}
        if "val" in splits or len(train) < 2:
            return None
        chosen = min(train, key=hash_fraction)
        moved = [i for i, name in enumerate(names) if name == chosen]
        for i in moved:
            splits[i] = "val"
        what = chosen if len(moved) == 1 else f"{chosen} ({len(moved)} samples)"
        return (
            f"no sample hashes into val: {what}, of the lowest hash, is val; --val-fraction 0 "
            "leaves it empty"
        )

    def hash_split(self, name: str) -> Split:
        """Return the split of a key or group by its hash, so that adding data never changes it."""
        fraction = hash_fraction(name)
        if self.fold is None:
            if fraction < self.hashed_fraction:
                return "val"
            return "test" if fraction < self.hashed_fraction + self.test_fraction else "train"
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


def read_split_files(
    files: Sequence[Path], pairs: Sequence[Pair], notes: list[str] | None = None
) -> list[Split]:
    """Read the split of each pair from a CSV `path,split`, or from lists named after their split.

    Paths are those of the images, relative, with or without extension, or lead to an existing file
    (absolute, or from the folder of the list). If no path of a file does, as in lists of another
    machine, its paths are compared without their first folders, which is reported in `notes`, if
    it is given. Raises DataError for images that no file lists, unknown paths, duplicates and
    unknown splits.
    """
    sources = {os.path.splitext(p.source)[0]: p.source for p in pairs}
    sources |= {p.source: p.source for p in pairs}
    listed: dict[str, tuple[Split, str]] = {}
    problems = []
    for file in files:
        lines = [*parse_split_file(file, sources)]
        found = match_listed([name for _, name, _ in lines], file, sources, notes)
        for (number, name, split), source in zip(lines, found, strict=True):
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


def match_listed(
    names: Sequence[str], file: Path, sources: dict[str, str], notes: list[str] | None
) -> list[str | None]:
    """Return the image of each path in a split file, None for a path that is none of the images."""
    found = [sources.get(name) or find_listed_file(file.parent / name, sources) for name in names]
    if any(found):
        return found
    found = [find_longest_end(name, sources) for name in names]
    if notes is not None and any(found):
        name, source = next((n, s) for n, s in zip(names, found, strict=True) if s)
        notes.append(
            f"{file}: no listed path exists here; {len(names) - found.count(None)} of {len(names)} "
            f"are read without their first folders: {name} is {source}"
        )
    return found


def find_listed_file(path: Path, sources: dict[str, str]) -> str | None:
    """Return the image that the path of an existing file leads to."""
    return find_longest_end(os.path.normpath(path), sources) if path.is_file() else None


def find_longest_end(path: str, sources: dict[str, str]) -> str | None:
    """Return the image whose relative path is the longest end of a path."""
    windows = re.match(r"[A-Za-z]:[\\/]", path)
    parts = (path.replace("\\", "/") if windows else path).split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((sources[end] for end in ends if end in sources), None)


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
    split = find_named_split(file.stem)
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
