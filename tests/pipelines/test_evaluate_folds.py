"""`evaluate`, `evaluation.held_out`, `evaluation.results`, `model.trained_fold`, `shards.folds`.

Models of folds are scored on images that they did not see, one by one or all folds as one table.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def runs(shards, tiny, call, tmp_path_factory) -> Path:
    """The runs of three folds; each holds out 4 of 12 images."""
    folder = tmp_path_factory.mktemp("runs")
    for number in (1, 2, 3):
        argv = ("--data", shards, "--run-dir", folder / f"fold-{number}", *tiny, "--workers", 0)
        ended = call("train", *argv, "--fold", f"{number}/3", "--steps", 6, "--eval-every", 3)
        assert ended.code == 0, ended.err
    return folder


def evaluate(call, shards: Path, *argv: object):
    return call("evaluate", "--data", shards, "--workers", 0, *argv)


def keys(out: Path) -> list[str]:
    with (out / "scores.csv").open(newline="") as file:
        return [row["key"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def each(runs, shards, call, tmp_path_factory) -> list[Path]:
    """The scores of each run on what it held out."""
    folders = []
    for number in (1, 2, 3):
        out = tmp_path_factory.mktemp("each")
        ended = evaluate(call, shards, "--checkpoint", runs / f"fold-{number}", "--out", out)
        assert ended.code == 0, ended.err
        place = f"--checkpoint {runs / f'fold-{number}'}"
        assert f"{place} is fold {number}/3: val is the 4 images that it held out" in ended.err
        folders.append(out)
    return folders


def test_val_of_one_run_is_what_its_fold_held_out(each, runs, shards, call, tmp_path) -> None:
    found = [keys(out) for out in each]
    assert [len(some) for some in found] == [4, 4, 4]
    assert sorted(key for some in found for key in some) == [f"p{n:03d}" for n in range(12)]
    ended = evaluate(
        call, shards, "--checkpoint", runs / "fold-1", "--split", "train", "--out", tmp_path
    )
    assert "train is the 8 images that it was trained on" in ended.err
    assert {*keys(tmp_path)} == {*found[1], *found[2]}
    last = json.loads((runs / "fold-2" / "metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads((each[1] / "scores.json").read_text())
    state = json.loads((runs / "fold-2" / "checkpoints" / "best" / "state.json").read_text())
    assert scores["macro"]["dice"] == pytest.approx(state["best"])
    assert last["step"] == 6


def test_predictions_of_one_fold_are_scored_on_what_it_held_out(
    runs, each, shards, cells, call, tmp_path
) -> None:
    argv = ("--checkpoint", runs / "fold-1", "--input", cells / "images", "--out", tmp_path)
    for _ in range(2):  # What was recorded about the fold is no other setting of a rerun.
        ended = call("predict", *argv, "--workers", 0)
        assert ended.code == 0, ended.err
    ended = evaluate(call, shards, "--predictions", tmp_path)
    assert ended.code == 0, ended.err
    assert f"the model of --predictions {tmp_path} is fold 1/3: val is the 4" in ended.err
    found, expected = ((out / "scores.json").read_text() for out in (tmp_path, each[0]))
    assert json.loads(found)["confusion"] == json.loads(expected)["confusion"]
    assert keys(tmp_path) == keys(each[0])


def test_predictions_of_several_folds_are_not_scored_on_what_they_trained_on(
    runs, shards, cells, call, tmp_path
) -> None:
    argv = ("--checkpoint", runs, "--input", cells / "images", "--out", tmp_path)
    assert call("predict", *argv, "--workers", 0).code == 0
    ended = evaluate(call, shards, "--predictions", tmp_path)
    assert (ended.code, "is fold 1/3 and was trained on a part of it" in ended.err) == (2, True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_several_folds_are_not_scored_on_what_they_trained_on(
    split: str, runs, make_checkpoint, shards, call, tmp_path
) -> None:
    others = ((runs,), (runs / "fold-1", runs / "fold-2"), (make_checkpoint(), runs / "fold-3"))
    for checkpoints in others:
        argv = ("--checkpoint", *checkpoints, "--split", split, "--out", tmp_path / "out")
        ended = evaluate(call, shards, *argv)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert f"--split {split}: --checkpoint {runs}" in ended.err
        assert "trained on a part of it" in ended.err
        assert "use --checkpoint RUNS --split cross-validated" in ended.err
    assert not (tmp_path / "out").exists()


def test_folds_of_other_data_are_scored_with_a_warning(runs, cells, call, tmp_path) -> None:
    argv = ("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary")
    more = ("--val-fraction", 0.4, "--workers", 1, "--out", tmp_path / "other")
    assert call("pack", *argv, *more).code == 0
    ended = evaluate(call, tmp_path / "other", "--checkpoint", runs, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "is fold 1/3 of other data than" in ended.err
    assert "that it was trained on is unknown" in ended.err


CROSS_VALIDATED = ("--split", "cross-validated")


def test_the_table_of_all_folds_is_the_sum_of_their_tables(
    runs, each, shards, call, tmp_path
) -> None:
    ended = evaluate(call, shards, "--checkpoint", runs, *CROSS_VALIDATED)
    assert ended.code == 0, ended.err
    assert "each image by the model of the fold, of 3, that held it out" in ended.err
    assert "12 images of cross-validated" in ended.out
    scores = json.loads((runs / "scores.json").read_text())
    parts = [json.loads((out / "scores.json").read_text()) for out in each]
    for name, counts in scores["classes"].items():
        for count in ("tp", "fp", "fn"):
            assert counts[count] == sum(part["classes"][name][count] for part in parts)
    tp, fp, fn = (scores["classes"]["foreground"][count] for count in ("tp", "fp", "fn"))
    assert scores["classes"]["foreground"]["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert scores["num_images"] == 12
    assert scores["intervals"]["num_units"] == 12
    assert keys(runs) == [key for out in each for key in keys(out)]
    rows = [(out / "scores.csv").read_text().splitlines()[1:] for out in each]
    assert (runs / "scores.csv").read_text().splitlines()[1:] == [r for some in rows for r in some]
    assert len([*(runs / "worst").iterdir()]) == 8


@pytest.mark.ranks
def test_two_ranks_give_the_same_table(runs, shards, call, launch, tmp_path) -> None:
    argv = ("--checkpoint", runs, *CROSS_VALIDATED, "--batch-size", 3)
    ended = evaluate(call, shards, *argv, "--out", tmp_path / "one")
    assert ended.code == 0, ended.err
    argv = (*argv, "--data", shards, "--workers", 0, "--out", tmp_path / "two")
    ended = launch(2, "evaluate", *argv)
    assert ended.code == 0, ended.err
    for name in ("scores.json", "scores.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_folders_of_runs_are_compared(runs, shards, call, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs, other, symlinks=True)
    for folder in (runs, other):
        assert evaluate(call, shards, "--checkpoint", folder, *CROSS_VALIDATED).code == 0
    argv = (runs, other, "--out", tmp_path / "comparison")
    ended = call("compare", *argv)
    assert ended.code == 0, ended.err
    plain = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert '"split": "cross-validated"' in json.dumps(plain)
    shutil.rmtree(other / "fold-3")
    ended = call("compare", *argv)
    assert (ended.code, "belongs to another checkpoint" in ended.err) == (1, True)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ((1, 3), "no model of fold 2/3; run unet train --fold 2/3"),
        ((1, 2, 2, 3), "are both fold 2/3; leave one out"),
        ((1, 2, 3, 0), "was not trained with --fold"),
    ],
)
def test_all_folds_are_needed_once(
    folds: tuple, message: str, runs, make_checkpoint, shards, call, tmp_path
) -> None:
    paths = [runs / f"fold-{number}" if number else make_checkpoint() for number in folds]
    ended = evaluate(call, shards, "--checkpoint", *paths, *CROSS_VALIDATED, "--out", tmp_path)
    assert (ended.code, message in ended.message) == (1, True), ended.err
    assert not [*tmp_path.iterdir()]


def test_folds_of_other_data_or_of_other_cuts_are_refused(
    runs, shards, cells, tiny, call, tmp_path
) -> None:
    argv = ("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary")
    other = tmp_path / "shards"
    more = ("--val-fraction", 0.4, "--workers", 1, "--out", other)
    assert call("pack", *argv, *more).code == 0
    ended = evaluate(call, other, "--checkpoint", runs, *CROSS_VALIDATED)
    assert (ended.code, "is fold 1/3 of other data than" in ended.err) == (1, True)
    fold = tmp_path / "fold"
    argv = ("--data", shards, "--run-dir", fold, *tiny, "--fold", "2/2", "--steps", 1)
    assert call("train", *argv, "--workers", 0).code == 0
    paths = (runs / "fold-1", fold)
    ended = evaluate(call, shards, "--checkpoint", *paths, *CROSS_VALIDATED, "--out", tmp_path)
    assert (ended.code, "they must be folds of one cut" in ended.message) == (1, True)


def test_flags_without_effect_are_refused(runs, shards, call) -> None:
    ended = evaluate(call, shards, "--predictions", runs, *CROSS_VALIDATED)
    assert (ended.code, "requires --checkpoint RUNS" in ended.message) == (2, True)
    argv = ("--checkpoint", runs, *CROSS_VALIDATED, "--ensemble-on", "host")
    ended = evaluate(call, shards, *argv)
    assert (ended.code, "--ensemble-on host has no effect" in ended.message) == (2, True)


def test_probabilities_of_all_folds_are_counted_once(runs, shards, call, tmp_path) -> None:
    ended = evaluate(
        call, shards, "--checkpoint", runs, *CROSS_VALIDATED, "--calibration", "--out", tmp_path
    )
    assert ended.code == 0, ended.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    calibration, own = scores["calibration"], scores["classes"]["foreground"]
    assert calibration["num_pixels"] == sum(map(sum, scores["confusion"])) == 12 * 48 * 48
    half = calibration["sweep"]["half"]
    assert [half[name] for name in ("dice", "precision", "recall")] == pytest.approx(
        [own[name] for name in ("dice", "precision", "recall")]
    )


def test_a_temperature_is_that_of_one_fold_fitted_on_what_it_held_out(
    runs, shards, call, tmp_path
) -> None:
    fold = shutil.copytree(runs / "fold-1", tmp_path / "fold-1", symlinks=True)
    argv = ("--checkpoint", fold, "--fit-temperature", "--out", tmp_path / "out")
    ended = evaluate(call, shards, *argv)
    assert ended.code == 0, ended.err
    stored = json.loads((fold / "checkpoints" / "best" / "temperature.json").read_text())
    assert stored["num_pixels"] == 4 * 48 * 48
    ended = evaluate(call, shards, "--checkpoint", runs, "--out", tmp_path, "--fit-temperature")
    assert (ended.code, "a temperature belongs to one checkpoint, got 3" in ended.err) == (2, True)
    ended = evaluate(call, shards, "--checkpoint", runs, *CROSS_VALIDATED, "--fit-temperature")
    assert (ended.code, "requires --split val" in ended.err) == (2, True)
