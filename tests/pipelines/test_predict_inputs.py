"""`predict`, `evaluate`, `inference.inputs`: which images are taken, end to end."""

import shutil
from pathlib import Path

import pytest

from shards.manifest import read_manifest


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    return make_checkpoint()


def flags(checkpoint: Path, given: object, out: Path, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0, *more]


def test_masks_of_a_data_set_without_images_are_not_predicted_nor_scored(
    bright: Path, draw, call, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 3) / "images"
    masks = tmp_path / "masks"
    assert call("predict", *flags(bright, images, masks, "--png")).code == 0
    for given in (masks, masks / "png", f"{masks}/**/*.png"):
        ended = call("predict", *flags(bright, given, tmp_path / "again"))
        assert ended.code == 1, given
        assert "masks" in ended.err
        assert not (tmp_path / "again").exists()
    options = (
        "--data",
        masks,
        "--split",
        "predicted",
        "--out",
        tmp_path / "scores",
        "--workers",
        0,
    )
    ended = call("evaluate", "--checkpoint", bright, *options)
    assert ended.code == 1
    assert "has a mask but no image; unet predict --include-image stores both" in ended.err
    assert not (tmp_path / "scores" / "scores.json").exists()


def test_a_rerun_with_results_below_the_inputs_finds_the_same_inputs(
    bright: Path, draw, call, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 3) / "images"
    given = flags(bright, images, images / "out", "--png", "--overlay")
    assert (ended := call("predict", *given)).code == 0, ended.err
    before = content(images / "out")
    ended = call("predict", *given)
    assert ended.code == 0, ended.err
    assert "results of this job" in ended.err
    assert content(images / "out") == before
    ended = call("predict", *flags(bright, images, images, "--png"))
    assert ended.code == 2
    assert "is the folder of --input" in ended.err
    assert not (images / "index.json").exists()


def test_split_selects_and_out_split_names(bright: Path, shards, call, tmp_path: Path) -> None:
    given = flags(bright, shards, tmp_path, "--split", "val", "--out-split", "mine")
    assert (ended := call("predict", *given)).code == 0, ended.err
    ours, theirs = read_manifest(tmp_path).splits, read_manifest(shards).splits
    assert {name: split.samples for name, split in ours.items()} == {"mine": theirs["val"].samples}


def test_image_ext_selects_what_is_predicted(bright: Path, draw, call, tmp_path: Path) -> None:
    images = draw(tmp_path / "in", 3) / "images"
    first = min(images.iterdir())
    shutil.copy(first, images / "x.TIF")
    given = flags(bright, images, tmp_path / "out", "--image-ext", "tif")
    ended = call("predict", *given)
    assert read_manifest(tmp_path / "out").splits["predicted"].samples == 1, ended.err
