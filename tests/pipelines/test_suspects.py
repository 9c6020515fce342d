"""`evaluation.suspects`, `drawing.outlines`.

Doubtful masks: ranked by their disagreement with the model, listed and drawn.
"""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.drawing.contact_sheet import CELL
from pipelines.drawing.outlines import OUTLINES, draw_outlines
from pipelines.drawing.panels import Example
from pipelines.evaluation.suspects import rank_images

PLANTED = {"p002": "emptied", "p005": "shifted", "p009": "swapped"}


def plant(cells: Path, folder: Path) -> None:
    """Copy the cells with three wrong masks."""
    shutil.copytree(cells, folder)
    masks = {name: np.array(Image.open(cells / "masks" / f"{name}.png")) for name in PLANTED}
    wrong = {
        "p002": np.zeros_like(masks["p002"]),
        "p005": np.roll(masks["p005"], 12, axis=1),
        "p009": masks["p002"],
    }
    for name, mask in wrong.items():
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, cells, split_file, call) -> Path:
    """Shards of the cells, three of which have wrong masks."""
    root = tmp_path_factory.mktemp("planted")
    plant(cells, root / "cells")
    ended = call(
        "pack",
        *("--images", root / "cells" / "images", "--masks", root / "cells" / "masks"),
        *("--mask-format", "binary", "--split-file", split_file, "--samples-per-shard", 3),
        *("--workers", 1, "--out", root / "shards"),
    )
    assert ended.code == 0, ended.err
    return root / "shards"


def evaluate(call, data: Path, *argv: object):
    ended = call("evaluate", "--data", data, "--workers", 0, *argv)
    assert ended.code == 0, ended.err
    return ended


def read_lines(out: Path) -> list[dict[str, str]]:
    with (out / "suspects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("split", ["train", "val"])
def test_wrong_masks_are_ranked_first(split, planted, make_checkpoint, call, tmp_path) -> None:
    checkpoint = make_checkpoint()  # Finds the discs exactly.
    given = ("--checkpoint", checkpoint, "--split", split, "--out", tmp_path, "--suspects", 5)
    ended = evaluate(call, planted, *given)
    lines = read_lines(tmp_path)
    expected = {"train": {"p005", "p009"}, "val": {"p002"}}[split]
    assert {line["key"] for line in lines[: len(expected)]} == expected
    assert [int(line["rank"]) for line in lines] == [*range(1, len(lines) + 1)]
    scores = [float(line["score"]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert scores[len(expected) - 1] > 10
    assert {line["class"] for line in lines} == {"foreground"}
    if split == "val":
        assert (float(lines[0]["dice"]), lines[0]["only_in_mask"]) == (0, "0")
        assert int(lines[0]["only_in_prediction"]) > 50
    sheet = Image.open(tmp_path / "suspects.png")
    assert sheet.width >= 2 * CELL
    assert f"{len(lines)} suspects: {tmp_path / 'suspects.csv'}" in ended.out
    # Files of an earlier scoring do not stay beside another one.
    evaluate(call, planted, *given[:-2])
    assert not (tmp_path / "suspects.csv").exists()
    assert not (tmp_path / "suspects.png").exists()


def test_images_without_disagreement_are_no_suspects(
    shards, make_checkpoint, call, cells, tmp_path
) -> None:
    ended = call(
        "predict",
        *("--checkpoint", make_checkpoint(), "--input", shards, "--split", "val"),
        *("--include-image", "--out", tmp_path / "masks", "--workers", 0),
    )
    assert ended.code == 0, ended.err
    given = ("--split", "predicted", "--out", tmp_path / "out", "--suspects", 3)
    # The predictions as the data set: masks equal what the model predicts.
    ended = evaluate(call, tmp_path / "masks", "--predictions", tmp_path / "masks", *given)
    assert "no suspects: mask and prediction are equal in every image of predicted" in ended.out
    assert read_lines(tmp_path / "out") == []
    assert not (tmp_path / "out" / "suspects.png").exists()


def test_scores_of_hand_computed_counts() -> None:
    # tp, fp, fn of a background and of two classes: Dice 0.8, 0.6 and 0.4; 0.9, none and 0.9.
    counts = [
        ((9, 9, 9), (4, 2, 0), (9, 1, 1)),
        ((9, 9, 9), (6, 4, 4), (0, 0, 0)),
        ((9, 9, 9), (2, 0, 6), (9, 0, 2)),
        ((9, 9, 9), (0, 0, 0), (7, 0, 0)),
    ]
    rows = np.array([[9, 9, *np.array(image).T.ravel()] for image in counts], np.uint32)
    first, second, third = rank_images(rows, (1, 2))
    # Class 1: errors 0.2, 0.4, 0.6; median 0.4, MAD 0.2. Class 2: 0.1, 0.1, 0; MAD at least 0.01.
    assert (first.position, first.class_index) == (2, 1)
    assert (first.score, first.dice) == (pytest.approx(1), pytest.approx(0.4))
    assert (first.missing, first.added) == (6, 0)
    # Of equal scores, the larger error.
    assert (second.position, second.class_index, second.score) == (1, 1, 0)
    assert (third.position, third.class_index, third.score) == (0, 2, 0)


def test_a_class_that_is_difficult_everywhere_does_not_hide_another() -> None:
    # Dice of class 1 about 0.5 in all images, of class 2 about 0.95, but 0.8 in the last.
    rng = np.random.default_rng(0)
    rows = np.zeros((40, 11), np.uint32)
    for row in rows:
        row[3], row[6], row[9] = 100, *rng.integers(60, 140, 2)
        row[4], row[7], row[10] = 190, *rng.integers(5, 15, 2)
    rows[-1, [4, 7, 10]] = 160, 40, 40
    best, *_ = rank_images(rows, (1, 2))
    assert (best.position, best.class_index, best.dice) == (39, 2, 0.8)


def test_outlines_of_mask_and_prediction_have_their_own_colours() -> None:
    mask, prediction = np.zeros((2, 20, 20), np.uint8)
    mask[4:10, 4:10], prediction[4:10, 4:14] = 1, 1
    mask[16:] = 255
    grey = np.full((20, 20, 1), 90, np.uint8)
    (drawn,), palette = draw_outlines([Example("a", grey, mask, prediction)], 200)
    assert palette == OUTLINES
    pixels = np.array(drawn)
    assert tuple(pixels[7, 9]) == palette[0]
    assert tuple(pixels[7, 13]) == palette[1]
    assert tuple(pixels[7, 4]) == palette[2]
    assert tuple(pixels[7, 6]) == (90, 90, 90)
    # Large images are scaled down before they are outlined.
    large = [np.repeat(np.repeat(a, 30, 0), 30, 1) for a in (grey, mask, prediction)]
    (drawn,), _ = draw_outlines([Example("a", *large)], 200)
    assert drawn.size == (200, 200)
    assert (np.array(drawn)[75] == palette[0]).all(axis=1).any()


@pytest.mark.ranks
def test_suspects_are_equal_on_2_ranks(planted, make_checkpoint, call, launch, tmp_path) -> None:
    argv = ("--checkpoint", make_checkpoint(), "--data", planted, "--split", "train")
    argv += ("--suspects", 8, "--workers", 0)
    assert call("evaluate", *argv, "--out", tmp_path / "1").code == 0
    ended = launch(2, "evaluate", *argv, "--out", tmp_path / "2")
    assert ended.code == 0, ended.err
    for name in ("suspects.csv", "suspects.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
