"""Folds: the samples of train and val, cut into k parts that are held out in turn.

The fold of a sample depends on the keys and groups of all samples of train and val alone. Samples
of one group, or without groups each sample, are a unit. Units are taken by size, then by the
sha256 of their name, and each goes to the fold that has the fewest samples so far. Test is never
touched.

No shard is rewritten: a fold is a manifest whose shards are parts of shards.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.documents import parse_json
from shards.manifest import Manifest, ShardInfo, ShardPart, SizeCount, SplitInfo, merge_size_counts
from shards.reader import ByteSpan, ShardReader
from shards.sample import DataError
from shards.store import Store

CUT = ("train", "val")
"""Splits that are cut into folds."""


@dataclass(frozen=True, slots=True)
class Folds:
    """Assignment of the samples of train and val to folds."""

    manifest: Manifest
    shards: tuple[ShardInfo, ...]
    """Of train, then of val."""
    of_shards: tuple[NDArray[np.int64], ...]
    """Fold of each sample of each shard, from 1."""
    count: int

    def part(self, folds: Sequence[int]) -> SplitInfo:
        """Return the samples of some folds as a split, in the order of the shards.

        Its sizes are those of train and val.
        """
        shards = []
        for shard, own in zip(self.shards, self.of_shards, strict=True):
            if rows := np.flatnonzero(np.isin(own, folds)).tolist():
                shards.append(take_part(shard, rows))
        sizes = [size for name in CUT for size in split_sizes(self.manifest, name)]
        return SplitInfo(tuple(shards), merge_size_counts(sizes))

    def hold_out(self, number: int) -> Manifest:
        """Return the manifest of a fold: its samples are val, those of the others train."""
        others = [fold for fold in range(1, self.count + 1) if fold != number]
        cut = {"train": self.part(others), "val": self.part([number])}
        return replace(self.manifest, splits={**self.manifest.splits, **cut})

    def concatenate(self, name: str) -> Manifest:
        """Return the manifest with one more split: the samples of fold 1, then those of fold 2, ...

        A shard is a part of several folds, and listed for each.
        """
        parts = [self.part([number]) for number in range(1, self.count + 1)]
        shards = tuple(shard for part in parts for shard in part.shards)
        splits = {**self.manifest.splits, name: SplitInfo(shards, parts[0].sizes)}
        return replace(self.manifest, splits=splits)

    def sizes(self) -> tuple[int, ...]:
        """Count the samples of each fold."""
        samples = np.bincount(np.concatenate(self.of_shards), minlength=self.count + 1)
        return tuple(samples[1:].tolist())


def assign_folds(place: Store | Path | str, manifest: Manifest, count: int) -> Folds:
    """Cut the samples of train and val into `count` folds. Reads every `.idx` and KEY.json.

    Raises DataError if there are fewer keys or groups than folds, or a file cannot be read.
    """
    names = [name for name in CUT if name in manifest.splits]
    shards = tuple(shard for name in names for shard in manifest.splits[name].shards)
    reader = ShardReader(place, shards)
    units = [read_units(reader, number) for number in range(len(shards))]
    sizes = Counter(unit for some in units for unit in some)
    if len(sizes) < count:
        what = "groups" if any(kind == "group" for kind, _ in sizes) else "samples"
        raise DataError(
            f"{reader.store} has {len(sizes)} {what} in train and val, too few for {count} folds"
        )
    folds = balance(sizes, count)
    of_shards = tuple(np.array([folds[unit] for unit in some], dtype=np.int64) for some in units)
    return Folds(manifest, shards, of_shards, count)


def balance(sizes: Counter[tuple[str, str]], count: int) -> dict[tuple[str, str], int]:
    """Assign units of some sizes to folds of about equal size: {unit: fold, from 1}."""

    def by_size(unit: tuple[str, str]) -> tuple[int, bytes]:
        return -sizes[unit], hashlib.sha256("\0".join(unit).encode()).digest()

    held, folds = [0] * count, dict[tuple[str, str], int]()
    for unit in sorted(sizes, key=by_size):
        fold = min(range(count), key=held.__getitem__)
        held[fold] += sizes[unit]
        folds[unit] = fold + 1
    return folds


def read_units(reader: ShardReader, shard: int) -> list[tuple[str, str]]:
    """Return what holds each sample of a shard together: ("group", its group) or ("key", its key).

    Raises DataError if a KEY.json is damaged.
    """
    offsets = reader.open_offsets([shard])[shard]
    entries = [offsets[row] for row in range(len(offsets))]
    infos = [entry.info for entry in entries]
    spans = [
        None if info is None else ByteSpan(shard, info.offset, info.offset + info.size)
        for info in infos
    ]
    read = reader.read_spans([span for span in spans if span is not None])
    units = []
    for entry, span in zip(entries, spans, strict=True):
        group = None
        if span is not None:
            try:
                group = parse_json(read[span]).get("group")
            except ValueError as error:
                raise DataError(
                    f"{reader.shard_path(shard)}: {entry.key}.json is damaged ({error}); pack it "
                    "again"
                ) from error
        units.append(("key", entry.key) if group is None else ("group", str(group)))
    return units


def take_part(shard: ShardInfo, rows: list[int]) -> ShardPart:
    """Return some samples of a shard; its pixels are counted for the whole shard."""
    whole = {field.name: getattr(shard, field.name) for field in fields(ShardInfo)}
    return ShardPart(**{**whole, "samples": len(rows)}, rows=tuple(rows), stored=shard.samples)


def split_sizes(manifest: Manifest, name: str) -> tuple[SizeCount, ...]:
    """Return the sizes of the images of a split; none if it does not exist."""
    return manifest.splits[name].sizes if name in manifest.splits else ()
