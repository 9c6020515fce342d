"""`train`, `evaluate`, `predict`.

Any number of ranks: the same batches, the same scores, the same files, printed once.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.offsets import read_offsets

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, draw, call) -> Path:
    """Three classes, 21 training images of two sizes, ignored pixels, one image all ignored."""
    root = tmp_path_factory.mktemp("uneven")
    draw(root, 18, values=(0, 128, 255), seed=1)
    draw(root, 8, values=(0, 128, 255), seed=2, size=(40, 56), name="q{:03d}")
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        mask = np.array(Image.open(path))
        mask[: 5 * (number % 7)] = 77
        if number == 3:
            mask[:] = 77
        Image.fromarray(mask).save(path)
    with (root / "split.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "split"))
        for number, path in enumerate(sorted((root / "images").iterdir())):
            rows.writerow((path.name, "val" if number % 5 == 4 else "train"))
    ended = call(
        "pack",
        *("--images", root / "images", "--masks", root / "masks", "--out", root / "shards"),
        *("--mask-format", "values", "--mask-values", 0, 128, 255, "--ignore-value", 77),
        *("--classes", "ground", "rim", "core", "--split-file", root / "split.csv"),
        *("--samples-per-shard", 4, "--workers", 1),
    )
    assert ended.code == 0, ended.err
    return root / "shards"


def training(data: Path, run_dir: Path, tiny: tuple[str, ...]) -> list[object]:
    return [
        *("--data", data, "--run-dir", run_dir, *tiny, "--steps", 8, "--log-every", 1),
        *("--eval-every", 4, "--optim.lr", 1e-2),
    ]


@pytest.fixture(scope="module")
def alone(uneven: Path, tiny, call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ended = call("train", *training(uneven, run_dir, tiny), "--workers", 0)
    assert ended.code == 0, ended.err
    return run_dir


def curve(lines: list[dict], *names: str) -> np.ndarray:
    return np.array([[line[name] for name in names] for line in lines if names[0] in line])


LOSSES = ("train/loss", "train/loss_cross_entropy", "train/loss_dice", "train/lr")


def assert_same_run(lines: list[dict], expected: list[dict]) -> None:
    """Equal samples in equal global batches give equal losses, step for step."""
    ours, theirs = curve(lines, *LOSSES), curve(expected, *LOSSES)
    assert ours.shape == theirs.shape == (8, 4)
    assert len(np.unique(theirs[:, 0])) == 8
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    ours, theirs = (curve(some, "val/dice", "val/iou") for some in (lines, expected))
    assert ours.shape == theirs.shape == (2, 2)
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_accumulation_changes_nothing(uneven, alone, tiny, call, metrics, tmp_path: Path) -> None:
    ended = call("train", *training(uneven, tmp_path, tiny), "--workers", 0, "--accumulate", 2)
    assert ended.code == 0
    assert_same_run(metrics(tmp_path), metrics(alone))


def test_the_number_of_workers_changes_nothing(
    uneven, alone, tiny, call, metrics, tmp_path: Path
) -> None:
    ended = call("train", *training(uneven, tmp_path, tiny), "--workers", 2)
    assert ended.code == 0
    np.testing.assert_array_equal(curve(metrics(tmp_path), *LOSSES), curve(metrics(alone), *LOSSES))


def test_two_ranks_train_on_the_same_batches_and_one_of_them_prints(
    uneven, alone, tiny, launch, call, metrics, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = launch(2, "train", *training(uneven, run_dir, tiny), "--workers", 1)
    assert ended.code == 0, ended.err
    assert_same_run(metrics(run_dir), metrics(alone))
    assert ended.out.count("finished at step 8") == 1
    assert json.loads((run_dir / "state.json").read_text())["finished"]
    # One rank resumes the run of two: more steps, the same folder.
    ended = call("train", *training(uneven, run_dir, tiny), "--workers", 0, "--steps", 10)
    assert ended.code == 0, ended.err
    assert [line["step"] for line in metrics(run_dir) if "train/loss" in line] == [*range(1, 11)]


def test_the_same_samples_are_skipped_and_counted_over_ranks(
    uneven, tiny, launch, call, metrics, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(uneven, data)
    for path in sorted(data.glob("train-*.tar")):
        with path.open("r+b") as file:
            file.seek(read_offsets(path)[0].image.offset)
            file.write(bytes(16))
    skip = ("--bad-samples", "skip", "--max-bad-share", 1, "--eval-every", 100)
    given = [*training(data, tmp_path / "1", tiny), *skip, "--workers", 0]
    alone = call("train", *given)
    assert alone.code == 0, alone.err
    given[3] = tmp_path / "2"
    several = launch(2, "train", *given)
    assert several.code == 0, several.err
    names = ("train/skipped", *LOSSES)
    expected = curve(metrics(tmp_path / "1"), *names)
    assert 3 < expected[-1, 0] == alone.err.count("skipped: ") == several.err.count("skipped: ")
    np.testing.assert_allclose(curve(metrics(tmp_path / "2"), *names), expected, atol=1e-5)


def test_scores_are_the_same_to_the_last_digit(
    uneven: Path, alone: Path, launch, call, tmp_path: Path
) -> None:
    argv = ("--checkpoint", alone, "--data", uneven, "--surface", "--empty", "one", "--out")
    assert call("evaluate", *argv, tmp_path / "1", "--workers", 0).code == 0
    expected = (tmp_path / "1" / "scores.json").read_bytes()
    scores = json.loads(expected)
    assert scores["num_images"] == 5
    assert scores["per_image"]["hd95"] > 0
    assert 0 < scores["per_image"]["surface_dice"] < 1
    # Five images go through the model in two batches: of three ranks one has none.
    for world in (2, 3):
        ended = launch(world, "evaluate", *argv, tmp_path / str(world))
        assert ended.code == 0, ended.err
        assert ended.out.count("scores.json") == 1
        assert (tmp_path / str(world) / "scores.json").read_bytes() == expected


def test_predictions_are_the_same_files(
    uneven: Path, alone: Path, draw, launch, call, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 7, size=(30, 44), seed=9) / "images"
    (images / "p900.png").write_bytes(b"no image")
    argv = ("--checkpoint", alone, "--input", images, "--samples-per-shard", 3, "--png")
    ended = call("predict", *argv, "--out", tmp_path / "1", "--workers", 0)
    assert ended.code == 3, ended.err
    expected = content(tmp_path / "1")
    assert len([name for name in expected if name.endswith(".tar")]) == 3
    for world in (2, 3):
        out = tmp_path / str(world)
        ended = launch(world, "predict", *argv, "--out", out)
        # A launcher would kill the other ranks, so only state.json reports the skipped inputs.
        assert ended.code == 0, ended.err
        assert "7 masks in" in ended.out
        assert json.loads((out / "state.json").read_text())["errors"] == 1
        assert content(out) == expected
        shutil.rmtree(out)


@pytest.mark.parametrize("then", [1, 3])
def test_predictions_resume_with_another_number_of_ranks_after_a_kill(
    then: int, alone: Path, draw, launch, spawn_ranks, call, kill, wait_for, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 30, size=(120, 120), seed=9) / "images"
    argv = ("--checkpoint", alone, "--input", images, "--samples-per-shard", 2, "--workers", 1)
    assert call("predict", *argv, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    process = spawn_ranks(2, "predict", *argv, "--out", out)
    wait_for(lambda: len([*out.glob("*.tar")]) >= 2, "the second shard")
    kill(process)
    there = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(there) >= 2
    assert not (out / "index.json").exists()
    if then == 1:
        ended = call("predict", *argv, "--out", out)
    else:
        ended = launch(then, "predict", *argv, "--out", out)
    assert ended.code == 0, ended.err
    assert {path: path.stat().st_ino for path in there} == there
    assert content(out) == content(tmp_path / "whole")


def test_processes_that_do_not_know_of_each_other_are_refused(
    uneven: Path, tiny, launch: Callable, tmp_path: Path
) -> None:
    ended = launch(
        2, "train", *training(uneven, tmp_path / "run", tiny), accelerate=True, use_cpu=False
    )
    assert ended.code != 0
    assert "2 processes were launched, but each would run a job of its own" in ended.err
    assert "ACCELERATE_USE_CPU=true" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_usage_error_is_reported_once(uneven: Path, tiny, launch, tmp_path: Path) -> None:
    given = training(uneven, tmp_path / "run", tiny)
    ended = launch(2, "train", *given, "--stepz", 3, accelerate=True)
    assert ended.code != 0
    assert ended.err.count("--stepz: unknown flag; did you mean --steps?") == 1


def test_a_global_batch_that_does_not_divide_is_reported_once(
    uneven: Path, tiny, launch, tmp_path: Path
) -> None:
    given = training(uneven, tmp_path / "run", tiny)
    ended = launch(2, "train", *given, "--global-batch-size", 5, accelerate=True)
    assert ended.code != 0
    assert ended.err.count("does not divide among 2 ranks x 1 accumulated passes; 4 or 6") == 1
