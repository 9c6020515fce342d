"""`training.checkpoints`: what is lost or damaged in a run folder, and what a rerun makes of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

LENGTH = ("--eval-every", 2, "--keep-checkpoints", 9, "--tracking.pictures", 0)


@pytest.fixture(scope="module")
def finished(shards: Path, tiny, call, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    given = ("--data", shards, "--run-dir", run, *tiny, *LENGTH, "--steps", 6)
    assert call("train", *given).code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def to_folder(link: Path) -> None:
    target = link.resolve()
    link.unlink()
    shutil.copytree(target, link)


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def resume(call, shards: Path, run: Path, tiny):
    return call("train", "--data", shards, "--run-dir", run, *tiny, *LENGTH, "--steps", 8)


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "last lost": (lambda run: (run / "checkpoints/last").unlink(), 6, "last does not exist"),
    "last dangling": (
        lambda run: shutil.rmtree(step(run, 6)) or os.path.lexists(run / "checkpoints/last"),
        4,
        "last does not exist",
    ),
    "training state cut": (
        lambda run: os.truncate(step(run, 6) / "training.pt", 1000),
        4,
        "training.pt is damaged",
    ),
    "training state flipped": (
        lambda run: flip(step(run, 6) / "training.pt"),
        4,
        "training.pt is damaged: its sha256 is another",
    ),
    "weights flipped": (
        lambda run: flip(step(run, 6) / "model.safetensors"),
        4,
        "model.safetensors is damaged: its sha256 is another",
    ),
    "state emptied": (lambda run: (step(run, 6) / "state.json").write_text(""), 4, "is damaged"),
    "state of a wrong type": (
        lambda run: (step(run, 6) / "state.json").write_text('{"step": "6"}'),
        4,
        "is damaged",
    ),
    "two damaged": (
        lambda run: [os.truncate(step(run, n) / "training.pt", 9) for n in (4, 6)],
        2,
        "training.pt is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_training_resumes_from_the_newest_intact_checkpoint_and_reports_it(
    case: str, run: Path, shards: Path, tiny, call, metrics
) -> None:
    damage, found, message = DAMAGES[case]
    damage(run)
    ended = resume(call, shards, run, tiny)
    assert ended.code == 0, ended.err
    assert message in ended.err
    assert f"resuming from {step(run, found)} instead" in ended.err
    steps = [line["step"] for line in metrics(run) if "train/loss" in line]
    assert steps[-1] == 8
    last = run / "checkpoints" / "last"
    assert last.is_symlink()
    assert json.loads((last / "state.json").read_text())["step"] == 8
    assert call("train", "--data", shards, "--run-dir", run, *tiny, *LENGTH, "--steps", 8).code == 0


def test_folders_in_place_of_the_links_become_links_again(
    run: Path, shards: Path, tiny, call
) -> None:
    for name in ("last", "best"):
        to_folder(run / "checkpoints" / name)
    ended = resume(call, shards, run, tiny)
    assert ended.code == 0, ended.err
    assert (run / "checkpoints" / "last").is_symlink()
    assert step(run, 6).is_dir()


def test_a_run_without_an_intact_checkpoint_is_refused_not_started_again(
    run: Path, shards: Path, tiny, call
) -> None:
    for number in (2, 4, 6):
        os.truncate(step(run, number) / "training.pt", 9)
    before = (run / "metrics.jsonl").read_bytes()
    ended = resume(call, shards, run, tiny)
    assert ended.code == 1
    assert "is intact" in ended.err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_flipped_weights_are_not_used(verb: str, run: Path, shards: Path, call, tmp_path) -> None:
    flip((run / "checkpoints" / "best").resolve() / "model.safetensors")
    data = ("--data",) if verb == "evaluate" else ("--input",)
    ended = call(verb, "--checkpoint", run, *data, shards, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "model.safetensors" in ended.err


def test_a_checkpoint_without_checksums_is_resumed(run: Path, shards: Path, tiny, call) -> None:
    for file in run.glob("checkpoints/step-*/checksums.json"):
        file.unlink()
    ended = resume(call, shards, run, tiny)
    assert ended.code == 0, ended.err
    assert "instead" not in ended.err
