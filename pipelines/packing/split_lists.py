"""Lists beside the images that declare splits, and whether they fit the images."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.folders.pairs import Pair, Pairing
from shards.folders.split_names import SPLIT_NAMES, SPLITS, Split, find_named_split
from shards.folders.splits import SplitRule, parse_split_file
from shards.local_files import open_file
from shards.sample import AggregateDataError, DataError

MAX_NAMED = 3
"""Lists that are named in one note."""


def propose_splits(
    pairing: Pairing, root: Path, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Propose the split flags that lists or folders suggest, and list what is unsure.

    `names`: files below `root` that are not images.
    """
    declared = {pair.split for pair in pairing.pairs if pair.split is not None}
    flags: list[str] = []
    firsts = {pair.source.partition("/")[0].lower() for pair in pairing.pairs if "/" in pair.source}
    if not declared and firsts and firsts <= SPLIT_NAMES.keys() and not pairing.refused:
        flags, declared = ["--split-folders"], {SPLIT_NAMES[name] for name in firsts}
    notes: list[str] = []
    if not declared:
        lists, splits, notes = choose_lists(pairing.pairs, root, names)
        if lists:
            flags, declared = ["--split-file", *map(str, lists)], set(splits)
    if "train" in declared and "val" not in declared:
        flags += ["--val-fraction", "0.1"]
        notes.append("the data declare no val: 10 % of train become val")
    if not declared:
        notes.append("no splits found: 10 % become val, by hash; see --group-by and --split-file")
    return flags, notes


def choose_lists(
    pairs: Sequence[Pair], root: Path, names: Sequence[str]
) -> tuple[list[Path], list[Split], list[str]]:
    """Choose the lists that give every pair one split; also describes lists that do not."""
    notes: list[str] = []
    chosen: list[Path] = []
    others: list[Path] = []
    splits: list[Split] = []
    for lists in find_lists(root, names):
        words = " ".join(map(str, lists))
        if chosen:
            others += lists
            continue
        try:
            lists = [path for path in lists if lists_any(path, pairs)]
            if lists:
                splits, _ = SplitRule(files=tuple(lists)).assign_splits(pairs, notes)
                chosen = lists
        except AggregateDataError as error:
            count = len(error.problems)
            more = f" and {count - 1} more problems" if count > 1 else ""
            notes.append(f"{words}: not used, {error.problems[0]}{more}")
        except DataError as error:
            notes.append(f"{words}: not used, {error}")
    if others:
        names = " ".join(map(str, others[:MAX_NAMED])) + " ..." * (len(others) > MAX_NAMED)
        notes.append(f"{len(others)} other lists that are named after splits are not used: {names}")
    return chosen, splits, notes


def lists_any(path: Path, pairs: Sequence[Pair]) -> bool:
    """Return whether a list contains any image of the pairs, by the end of its path."""
    stems = {stem_of(pair.source) for pair in pairs}
    known = {pair.source: pair.source for pair in pairs}
    return any(stem_of(name) in stems for _, name, _ in parse_split_file(path, known))


def stem_of(name: str) -> str:
    """Return the name of a file without folders and extension."""
    return Path(name).stem


def find_lists(root: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Yield each CSV `path,split`, then lists of one folder that differ only in their split."""
    groups: dict[tuple[Path, str], list[tuple[int, Path]]] = {}
    for path in (root / name for name in names):
        if path.suffix.lower() not in (".csv", ".txt"):
            continue
        with open_file(path) as file:
            header = file.readline().decode("utf-8-sig", "replace")
        if {"path", "split"} <= {word.strip() for word in header.split(",")}:
            yield [path]
            continue
        split = find_named_split(path.stem)
        if split and path.suffix.lower() == ".txt":
            form = re.sub("|".join(SPLIT_NAMES), "*", path.stem.lower(), count=1)
            groups.setdefault((path.parent, form), []).append((SPLITS.index(split), path))
    # `Segmentation/train.txt` before `Main/aeroplane_train.txt`.
    ranked = sorted(groups.items(), key=lambda item: ("seg" not in str(item[0]).lower(), item[0]))
    yield from ([path for _, path in sorted(paths)] for _, paths in ranked)
