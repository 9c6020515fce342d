"""`train`, `training.validation`.

Training without a validation split: refused with the flag that allows it, then complete.
"""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def train_only(call, cells: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cells as a data set of one split."""
    folder = tmp_path_factory.mktemp("train_only")
    split = folder / "split.csv"
    split.write_text("path,split\n" + "".join(f"p{i:03d}.png,train\n" for i in range(12)))
    ended = call(
        "pack",
        *("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary"),
        *("--split-file", split, "--workers", 1, "--out", folder / "shards"),
    )
    assert ended.code == 0, ended.err
    return folder / "shards"


def test_an_empty_val_split_is_refused_with_its_remedies(
    train_only: Path, call, tiny, tmp_path: Path
) -> None:
    ended = call("train", "--data", train_only, "--run-dir", tmp_path / "r", *tiny, "--steps", 2)
    assert ended.code == 1
    assert "no samples in the split 'val'" in ended.err
    assert "--val-fraction" in ended.err
    assert "--no-val" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_run_without_validation_saves_reports_and_predicts_with_its_last_checkpoint(
    train_only: Path, cells: Path, call, tiny, metrics, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    flags = ("--data", train_only, "--run-dir", run, *tiny, "--workers", 0, "--no-val")
    more = ("--eval-every", 2, "--log-every", 1)
    ended = call("train", *flags, *more, "--steps", 3)
    assert ended.code == 0, ended.err
    assert "finished at step 3" in ended.out
    assert "unet predict" in ended.out
    assert "--split val" not in ended.out
    assert not (run / "checkpoints" / "best").is_symlink()
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert (state["step"], state["best"]) == (3, None)
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [
        *("step-00000002", "step-00000003"),
    ]
    assert not [line for line in metrics(run) if "val/dice" in line]
    assert (run / "report.html").exists()
    assert "--split val" not in (run / "report.html").read_text()
    again = call("train", *flags, *more, "--steps", 3)
    assert again.code == 0
    assert "had already finished at step 3" in again.out
    used = call(
        "predict",
        *("--checkpoint", run, "--input", cells / "images", "--out", tmp_path / "o"),
        *("--workers", 0),
    )
    assert used.code == 0, used.err
    scored = call("evaluate", "--checkpoint", run, "--data", train_only, "--split", "train")
    assert scored.code == 0, scored.err


def test_patience_without_validation_is_refused(
    train_only: Path, call, tiny, tmp_path: Path
) -> None:
    ended = call(
        "train",
        *("--data", train_only, "--run-dir", tmp_path / "r", *tiny),
        *("--no-val", "--patience", 3),
    )
    assert ended.code == 2
    assert "--patience 3: counts validations" in ended.err
