"""`pack`, `train`, `predict` killed at observed moments: the rerun makes equal bytes.

A moment is a number of files or of lines of progress that exist when the kill is sent. The default
run has a few; `pytest -m faults tests/faults` runs the matrix.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from shards.leftovers import process_space, remove_leftovers

TARGETS = ["group", "worker", pytest.param("rank", marks=pytest.mark.ranks)]
SHORT = (1, 9)
LONG = tuple(range(1, 21))
TRAIN = ("--steps", 24, "--log-every", 1, "--eval-every", 5, "--tracking.backend", "none")


WEIGHTS = "checkpoints/last/model.safetensors"


def moments(short: tuple[int, ...]) -> list[Any]:
    rest = [n for n in LONG if n not in short]
    return [*short, *(pytest.param(n, marks=pytest.mark.faults) for n in rest)]


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def strike(process: Any, target: str, kill: Callable[[Any], None]) -> str:
    """Kill the group, or one child that is a worker or a rank; returns stderr."""
    if target == "group":
        kill(process)
        return ""
    with suppress(psutil.NoSuchProcess, IndexError):
        psutil.Process(process.pid).children()[-1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    return err


def shared_memory() -> set[str]:
    """Names in /dev/shm after what a start removes, without semaphores of other programs."""
    remove_leftovers()
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    return draw(tmp_path_factory.mktemp("images"), 24, size=(48, 48))


def run_until_killed(
    start: Callable[[], Any], progress: Callable[[], int], moment: int, target: str, kill, wait_for
) -> None:
    before = shared_memory()
    process = start()
    wait_for(lambda: progress() >= moment or process.poll() is not None, "progress", 120)
    assert process.poll() is None, "the command ended before its moment"
    err = strike(process, target, kill)
    kill(process)
    assert "Traceback" not in err
    ours = f"-{process_space()}-{process.pid}-"
    assert not [name for name in shared_memory() - before if "unet-" not in name or ours in name]


@pytest.mark.parametrize("target", ["group", "worker"])
@pytest.mark.parametrize("moment", moments(SHORT))
def test_pack(
    moment: int, target: str, images: Path, call, spawn, kill, wait_for, content, tmp_path: Path
) -> None:
    flags = ["--images", images / "images", "--masks", images / "masks"]
    flags += ["--mask-format", "binary", "--samples-per-shard", 2]
    out = tmp_path / "out"
    run_until_killed(
        lambda: spawn("pack", *flags, "--workers", 2, "--out", out),
        *(lambda: count_files(out), moment, target, kill, wait_for),
    )
    rerun = call("pack", *flags, "--workers", 1, "--out", out)
    assert rerun.code == 0, rerun.err
    assert call("pack", *flags, "--workers", 1, "--out", tmp_path / "once").code == 0
    assert content(out) == content(tmp_path / "once")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("moment", moments((4,)))
def test_predict(
    moment: int,
    target: str,
    images: Path,
    make_checkpoint,
    call,
    spawn,
    spawn_ranks,
    kill,
    wait_for,
    content,
    tmp_path: Path,
) -> None:
    flags = ["--checkpoint", make_checkpoint(), "--input", images / "images"]
    flags += ["--samples-per-shard", 1]
    out = tmp_path / "out"
    ranks, workers = target == "rank", 2 if target == "worker" else 0
    more = [*flags, "--workers", workers, "--out", out]
    run_until_killed(
        lambda: spawn_ranks(2, "predict", *more) if ranks else spawn("predict", *more),
        *(lambda: count_files(out), moment, target, kill, wait_for),
    )
    rerun = call("predict", *flags, "--workers", 0, "--out", out)
    assert rerun.code == 0, rerun.err
    assert call("predict", *flags, "--workers", 0, "--out", tmp_path / "once").code == 0
    assert content(out) == content(tmp_path / "once")


@pytest.fixture(scope="module")
def train_flags(shards: Path, tiny: tuple[str, ...]) -> Callable[[Path, int], list[object]]:
    """Makes the flags of a training in a run folder, with a number of workers."""

    def make(run: Path, workers: int) -> list[object]:
        return [*("--data", shards, "--run-dir", run, "--workers", workers), *tiny, *TRAIN]

    return make


@pytest.fixture(scope="module")
def trained_once(
    train_flags, launch, call, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], bytes]:
    """Returns the weights of a training on some ranks that nothing interrupted."""

    @cache
    def train(ranks: int) -> bytes:
        run = tmp_path_factory.mktemp("once") / "run"
        flags = train_flags(run, 0)
        ended = launch(2, "train", *flags) if ranks == 2 else call("train", *flags)
        assert ended.code == 0, ended.err
        return (run / WEIGHTS).read_bytes()

    return train


@pytest.mark.faults
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("moment", LONG)
def test_train(
    moment: int,
    target: str,
    train_flags,
    trained_once: Callable[[int], bytes],
    call,
    launch,
    spawn,
    spawn_ranks,
    kill,
    wait_for,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    ranks, workers = 2 if target == "rank" else 1, 2 if target == "worker" else 0
    flags = train_flags(run, workers)
    run_until_killed(
        lambda: spawn_ranks(2, "train", *flags) if ranks == 2 else spawn("train", *flags),
        *(lambda: count_lines(run / "metrics.jsonl"), moment, target, kill, wait_for),
    )
    flags = train_flags(run, 0)
    rerun = launch(2, "train", *flags) if ranks == 2 else call("train", *flags)
    assert rerun.code == 0, rerun.err
    assert (run / WEIGHTS).read_bytes() == trained_once(ranks)
