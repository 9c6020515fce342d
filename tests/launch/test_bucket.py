"""The complete workflow in a bucket: bytes, losses and scores equal those on disk."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

pytest.importorskip("s3fs")
pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("s3")]
URL = "s3://bucket"


def curve(lines: list[dict[str, Any]]) -> np.ndarray:
    """Return the total loss and its parts, one row per log line."""
    names = ("train/loss", "train/loss_cross_entropy", "train/loss_dice")
    return np.array([[line[name] for name in names] for line in lines if names[0] in line])


def test_the_workflow_in_a_bucket_equals_the_one_on_disk(
    *, cells: Path, split_file: Path, shards: Path, trained: Path, tiny, call, launch, content,
    objects, metrics, tmp_path: Path,
) -> None:  # fmt: skip
    ended = call(
        "pack",
        *("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary"),
        *("--split-file", split_file, "--samples-per-shard", 3, "--workers", 1),
        *("--out", f"{URL}/shards"),
    )
    assert ended.code == 0, ended.err
    packed = objects(f"{URL}/shards")
    assert len([name for name in packed if name.endswith(".tar")]) == 5
    assert packed == content(shards)

    # Two ranks read the bucket; `trained` is one rank that read the disk.
    run = tmp_path / "run"
    ended = launch(
        *(2, "train", "--data", f"{URL}/shards", "--run-dir", run, *tiny, "--workers", 0),
        *("--cache-dir", tmp_path / "cache", "--cache-bytes", 10**8),
        *("--steps", 6, "--log-every", 2, "--eval-every", 3),
    )
    assert ended.code == 0, ended.err
    assert curve(metrics(run)).shape == (3, 3)
    np.testing.assert_allclose(curve(metrics(run)), curve(metrics(trained)), rtol=0, atol=1e-5)

    scores = set[bytes]()
    for data in (f"{URL}/shards", shards):
        flags = ("--checkpoint", run, "--out", tmp_path, "--workers", 0)
        ended = call("evaluate", "--data", data, *flags)
        assert ended.code == 0, ended.err
        scores.add((tmp_path / "scores.json").read_bytes())
    assert len(scores) == 1

    fsspec.filesystem("s3").put(f"{cells}/images/", "bucket/images/", recursive=True)
    flags = ("--checkpoint", run, "--samples-per-shard", 3, "--png", "--workers", 0)
    ended = launch(2, "predict", *flags, "--input", f"{URL}/images", "--out", f"{URL}/masks")
    assert ended.code == 0, ended.err
    ended = call("predict", *flags, "--input", cells / "images", "--out", tmp_path / "masks")
    assert ended.code == 0, ended.err
    masks = objects(f"{URL}/masks")
    assert len([name for name in masks if name.endswith(".tar")]) == 4
    assert masks == content(tmp_path / "masks")
