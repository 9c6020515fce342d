"""`train`, `training.setup`, `training.options`, `training.fold_runs`, `evaluation.held_out`.

`--fold` holds out a part of train and val; `--folds` trains all, one after the other.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from pipelines import train as train_verb


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
        assert (ended.code, "was created with --fold 2/3" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("fold", "message"), [("1/1", "at least 2 folds"), ("3", "must be like 2/5")]
)
def test_a_wrong_fold_is_refused(fold: str, message: str, shards, tiny, call, tmp_path) -> None:
    ended = train(call, shards, tmp_path, tiny, "--fold", fold)
    assert (ended.code, message in ended.message) == (2, True)


ALL = ("--folds", 3, "--steps", 4)


@pytest.fixture(scope="module")
def runs(shards, tiny, call, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    ended = train(call, shards, folder, tiny, *ALL)
    assert ended.code == 0, ended.err
    assert "12 images of cross-validated" in ended.out
    assert f"next: unet predict --checkpoint {folder}" in ended.out
    return folder


def test_all_folds_equal_single_ones_and_end_in_one_table(
    runs, shards, tiny, call, tmp_path
) -> None:
    for number in (1, 2, 3):
        run = tmp_path / f"fold-{number}"
        ended = train(call, shards, run, tiny, "--fold", f"{number}/3", "--steps", 4)
        assert ended.code == 0, ended.err
        assert weights(run) == weights(runs / run.name)
    argv = ("--checkpoint", tmp_path, "--data", shards, "--workers", 0)
    assert call("evaluate", *argv, "--split", "cross-validated").code == 0
    for name in ("scores.json", "scores.csv"):
        assert (tmp_path / name).read_bytes() == (runs / name).read_bytes()
    assert json.loads((runs / "state.json").read_text())["finished"]


def test_finished_folds_are_skipped_with_a_line(runs, shards, tiny, call) -> None:
    before = [weights(runs / f"fold-{number}") for number in (1, 2, 3)]
    ended = train(call, shards, runs, tiny, *ALL)
    assert ended.code == 0, ended.err
    for number in (1, 2, 3):
        assert f"fold-{number} had already finished at step 4" in ended.out
    assert "scores.csv (unchanged)" in ended.out
    assert [weights(runs / f"fold-{number}") for number in (1, 2, 3)] == before


def test_an_interrupted_fold_is_resumed(
    runs, shards, tiny, call, spawn, wait_for, tmp_path
) -> None:
    argv = ("--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0, "--log-every", 1)
    more = ("--eval-every", 2, "--folds", 3)
    # So many steps that the signal arrives in the second fold.
    process = spawn("train", *argv, *more, "--steps", 60)
    wait_for((tmp_path / "fold-2" / "metrics.jsonl").exists, "the second fold")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "interrupted; rerun the same command: it skips the folds that are finished" in out
    assert not json.loads((tmp_path / "state.json").read_text())["finished"]
    assert not (tmp_path / "fold-3").exists()
    assert not (tmp_path / "scores.json").exists()
    ended = train(call, shards, tmp_path, tiny, "--folds", 3, "--steps", 60)
    assert ended.code == 0, ended.err
    assert "fold-1 had already finished at step 60" in ended.out
    assert json.loads((tmp_path / "state.json").read_text())["finished"]
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == 12


def test_a_signal_after_the_last_step_of_a_fold_is_not_lost(
    shards, tiny, call, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_report(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "report"

    monkeypatch.setattr(train_verb, "write_report_safely", write_report)
    ended = train(call, shards, tmp_path, tiny, *ALL)
    assert ended.code == 75, ended.err
    assert not (tmp_path / "fold-2").exists()


@pytest.mark.ranks
def test_two_ranks_train_all_folds(shards, tiny, launch, tmp_path) -> None:
    argv = ("--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0, "--eval-every", 2)
    ended = launch(2, "train", *argv, *ALL)
    assert ended.code == 0, ended.err
    assert ended.out.count("finished at step 4") == 3
    assert ended.out.count("12 images of cross-validated") == 1
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == 12


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--folds", 1), "--folds must be >= 2, got 1"),
        (("--folds", 3, "--fold", "1/3"), "drop one"),
    ],
)
def test_wrong_folds_are_refused(argv: tuple, message: str, shards, tiny, call, tmp_path) -> None:
    ended = train(call, shards, tmp_path, tiny, *argv)
    assert (ended.code, message in ended.message) == (2, True)


def test_a_folder_of_other_runs_is_refused(runs, trained, shards, tiny, call) -> None:
    ended = train(call, shards, runs, tiny, "--folds", 2)
    assert (ended.code, "has fold-3, which is none of --folds 2" in ended.message) == (2, True)
    ended = train(call, shards, trained, tiny, "--folds", 2)
    assert (ended.code, "is a run itself" in ended.message) == (2, True)


def test_weights_that_may_have_seen_the_held_out_images_are_warned_of(
    runs, shards, tiny, call, tmp_path
) -> None:
    source = runs / "fold-1"
    for fold, warned in (("2/3", True), ("1/3", False)):
        argv = ("--fold", fold, "--steps", 1, "--init-from", source)
        ended = train(call, shards, tmp_path / fold[0], tiny, *argv)
        assert ended.code == 0, ended.err
        assert (f"it has seen images that fold {fold} holds out" in ended.err) is warned


def test_folds_are_refused_in_a_sweep(
    shards, tiny, call, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    flags = ("--folds", 2, "--tracking.backend", "wandb")
    ended = train(call, shards, tmp_path / "runs", tiny, *flags)
    assert ended.code == 2
    assert "--folds 2: a wandb agent starts one run per process, not 2; sweep with" in ended.message
    assert not (tmp_path / "runs").exists()
