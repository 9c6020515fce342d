"""`folds`: each sample of train and val is held out once, and groups stay together."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.folds import assign_folds, balance
from shards.manifest import Manifest, read_manifest
from shards.reader import ShardReader, iter_keys
from shards.sample import DataError


def keys(data: Path, manifest: Manifest, split: str) -> list[str]:
    return [key for _, key in iter_keys(ShardReader(data, manifest.splits[split].shards))]


def test_every_sample_is_held_out_exactly_once(shards: Path) -> None:
    manifest = read_manifest(shards)
    everything = sorted(keys(shards, manifest, "train") + keys(shards, manifest, "val"))
    folds = assign_folds(shards, manifest, 5)
    held = []
    for number in range(1, 6):
        view = folds.hold_out(number)
        val = keys(shards, view, "val")
        assert sorted(keys(shards, view, "train") + val) == everything
        assert len(val) in (2, 3)
        assert view.digest == manifest.digest
        held += val
    assert sorted(held) == everything


def test_a_part_of_a_shard_reads_the_bytes_of_its_samples(shards: Path) -> None:
    manifest = read_manifest(shards)
    whole = {
        raw.key: raw.image
        for split in ("train", "val")
        for reader in [ShardReader(shards, manifest.splits[split].shards)]
        for raw in reader.read_all([address for address, _ in iter_keys(reader)])
    }
    reader = ShardReader(shards, assign_folds(shards, manifest, 3).hold_out(2).splits["val"].shards)
    found = reader.read_all([address for address, _ in iter_keys(reader)])
    assert len(found) == 4
    assert all(raw.image == whole[raw.key] for raw in found)


def test_groups_are_never_divided(draw, call, tmp_path: Path) -> None:
    cells = draw(tmp_path / "cells", 12, name="patient{:03d}")
    argv = ("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary")
    more = ("--group-by", r"\d\d(?=\d\.)", "--val-fraction", 0, "--samples-per-shard", 5)
    out = tmp_path / "shards"
    ended = call("pack", *argv, *more, "--workers", 1, "--out", out)
    assert ended.code == 0, ended.err
    folds = assign_folds(out, read_manifest(out), 2)
    held = [keys(out, folds.hold_out(number), "val") for number in (1, 2)]
    # p000-p009 are one group, p010 and p011 the other.
    assert sorted(map(len, held)) == [2, 10]
    with pytest.raises(DataError, match="has 2 groups in train and val, too few for 3 folds"):
        assign_folds(out, read_manifest(out), 3)


def test_folds_of_groups_are_balanced_and_do_not_depend_on_the_order() -> None:
    sizes = Counter({("group", str(n)): int(n % 7 + 1) for n in range(60)})
    folds = balance(sizes, 5)
    held = [sum(sizes[unit] for unit in folds if folds[unit] == n) for n in range(1, 6)]
    assert max(held) - min(held) <= 1
    assert balance(Counter(dict(reversed(sizes.items()))), 5) == folds
    assert np.unique([*folds.values()]).tolist() == [1, 2, 3, 4, 5]
