"""`train`, `training.setup`, `training.options`: `--fold` holds out a part of train and val."""

import json
from pathlib import Path

import pytest


def train(call, data: Path, run: Path, tiny: tuple, *more: object):
    argv = ("--data", data, "--run-dir", run, *tiny, "--workers", 0, "--log-every", 1)
    return call("train", *argv, "--eval-every", 2, *more)


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def test_a_resumed_fold_equals_an_uninterrupted_one(shards, tiny, call, tmp_path: Path) -> None:
    fold = ("--fold", "2/3", "--optim.schedule", "constant")
    ended = train(call, shards, tmp_path / "whole", tiny, *fold, "--steps", 4)
    assert ended.code == 0, ended.err
    for steps in (2, 4):
        assert train(call, shards, tmp_path / "cut", tiny, *fold, "--steps", steps).code == 0
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    state = tmp_path / "cut" / "checkpoints" / "last" / "state.json"
    assert json.loads(state.read_text())["fixed"]["fold"] == "2/3"
    for other in (("--fold", "1/3"), ()):
        ended = train(call, shards, tmp_path / "cut", tiny, *other, *fold[2:], "--steps", 6)
        assert (ended.code, "was started with fold = 2/3" in ended.err) == (2, True)


@pytest.mark.parametrize(("fold", "message"), [("1/1", "at least 2 folds"), ("3", "must be i/n")])
def test_a_wrong_fold_is_refused(fold: str, message: str, shards, tiny, call, tmp_path) -> None:
    ended = train(call, shards, tmp_path, tiny, "--fold", fold)
    assert (ended.code, message in ended.message) == (2, True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_a_fold_may_have_been_trained_on_are_not_scored(
    split: str, shards, tiny, call, tmp_path
) -> None:
    run = tmp_path / "fold-2"
    assert train(call, shards, run, tiny, "--fold", "2/3", "--steps", 1).code == 0
    for checkpoint in (run, tmp_path):
        argv = ("--checkpoint", checkpoint, "--data", shards, "--split", split)
        ended = call("evaluate", *argv, "--out", tmp_path / "out")
        assert (ended.code, "trained with --fold 2/3" in ended.err) == (2, True)
    assert not (tmp_path / "out").exists()
