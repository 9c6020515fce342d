"""The splits, and the names of lists and folders that declare them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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


def find_named_split(name: str) -> Split | None:
    """Return the split that a word of a file or folder name declares: `my-train_1` is train.

    Returns None if no word names a split, or if words name several.
    """
    words = re.split("[^a-z]+", name.lower())
    found: set[Split] = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def find_declared_splits(flag: str, paths: Sequence[Path]) -> list[Split | None]:
    """Return the split that the name of each of several lists or folders declares.

    All are None for a single path, and if no name declares a split. The name of a folder is read
    from its last part up: `train/images` is train. Raises ValueError if only some declare one.
    """
    splits: list[Split | None] = [
        next((s for part in (p.stem, *p.parts[-2::-1][:2]) if (s := find_named_split(part))), None)
        if flag == "--images"
        else find_named_split(path.stem)
        for path in paths
        for p in [path]
    ]
    if len(paths) < 2 or not any(splits):
        return [None] * len(paths)
    if None in splits:
        unnamed, named = (
            paths[splits.index(None)],
            next(p for p, s in zip(paths, splits, strict=True) if s),
        )
        raise ValueError(
            f"{flag} {unnamed}: its name declares no split, but that of {named} does; name all of "
            "them after train, val or test, or none"
        )
    return splits
