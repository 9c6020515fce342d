"""`train`, `training.checkpoints`.

Training survives kills at any moment, full disks, unwritable folders and a lost rank.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipelines.training import tracking

REPO = Path(__file__).resolve().parents[2]


def argv(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[str]:
    flags = ["--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, "--log-every", 1]
    return [str(flag) for flag in (*flags, "--tracking.pictures", 0, *more)]


def learned(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, their average, the optimizer's moments."""
    training = torch.load(run_dir / "checkpoints" / "last" / "training.pt", weights_only=True)

    def tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, part in value.items():
                yield from tensors(f"{name}.{key}", part)

    return dict(tensors("", training))


def assert_same(run_dir: Path, expected: Path) -> None:
    ours, theirs = learned(run_dir), learned(expected)
    assert len(theirs) > 50
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def losses(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


# ---- killed


def killed_at(moment: int, arguments: list[str]) -> None:
    """Trains, and dies by SIGKILL at that call of what a checkpoint is written with."""
    from pipelines import train
    from pipelines.training import checkpoints
    from shards import writer

    count = 0

    def deadly(action: Any) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*given, **named)

        return counting

    torch.save = deadly(torch.save)
    writer.flush_to_disk = deadly(writer.flush_to_disk)
    checkpoints.write_state = deadly(checkpoints.write_state)
    checkpoints.replace_link = deadly(checkpoints.replace_link)
    checkpoints.shutil.rmtree = deadly(checkpoints.shutil.rmtree)
    Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
    Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
    os._exit(train.main(arguments))


@pytest.fixture(scope="module")
def whole(shards: Path, tiny, call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing happened to; a checkpoint after each step."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert call("train", *argv(shards, run_dir, tiny, *SIX)).code == 0
    return run_dir


# Then what a run has learned does not depend on how long it was going to be.
CONSTANT = ("--optim.schedule", "constant", "--optim.warmup", 0)
SIX = ("--steps", 6, "--eval-every", 3, "--save-every", 1, "--keep-checkpoints", 1, *CONSTANT)


# From the first call to the last of the third checkpoint, the first that clears up after others.
@pytest.mark.parametrize("moment", [1, 2, 4, 7, 9, 10, 11, 13, 14, 17, 19, 21, 23, 25, 27, 30, 33])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    moment: int, whole: Path, shards: Path, tiny, call, metrics, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(
        target=killed_at, args=(moment, argv(shards, run_dir, tiny, *SIX))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    last = run_dir / "checkpoints" / "last"
    if last.exists():
        assert learned(run_dir)
        assert json.loads((last / "state.json").read_text())["step"] < 6
    ended = call("train", *argv(shards, run_dir, tiny, *SIX))
    assert ended.code == 0, ended.err
    assert_same(run_dir, whole)
    assert losses(metrics(run_dir)) == losses(metrics(whole))
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name[0] == "."]


@pytest.mark.ranks
def test_two_ranks_killed_in_an_epoch_resume_bit_for_bit_with_accumulation(
    shards: Path, tiny, launch, spawn_ranks, kill, wait_for, metrics, tmp_path: Path
) -> None:
    # Eight training samples, four a step: after eleven steps an epoch is half over.
    more = ("--save-every", 11, "--eval-every", 1_000_000, "--accumulate", 2, *CONSTANT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = spawn_ranks(2, "train", *argv(shards, parts, tiny, "--steps", 1_000_000, *more))
    saved = parts / "checkpoints" / "last" / "state.json"
    wait_for(saved.exists, "the first checkpoint")
    kill(process)
    step = json.loads(saved.read_text())["step"]
    assert step % 11 == 0
    for run_dir in (parts, whole):
        ended = launch(2, "train", *argv(shards, run_dir, tiny, "--steps", step + 9, *more))
        assert ended.code == 0, ended.err
    assert_same(parts, whole)
    assert losses(metrics(parts)) == losses(metrics(whole))


# ---- a rank that is lost


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("lost", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_where_one_rank_dies_or_hangs_the_other_ends_and_records_why(
    lost: int, how: signal.Signals, shards: Path, tiny, wait_for, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endless = ("--steps", 1_000_000, "--eval-every", 1_000_000)
    # Minutes. It is also how long ranks wait for each other at the start.
    arguments = argv(shards, tmp_path, tiny, *endless, "--rank-timeout", 0.3)

    def rank(number: int) -> subprocess.Popen[str]:
        about = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in about.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.train", *arguments],
            cwd=REPO,
            env={**os.environ, **environment, "ACCELERATE_MIXED_PRECISION": "no"},
            stderr=subprocess.PIPE,
            text=True,
        )

    ranks = [rank(0), rank(1)]
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, "the fourth step")
    ranks[lost].send_signal(how)
    _, message = ranks[1 - lost].communicate(timeout=120)
    ranks[lost].kill()
    ranks[lost].communicate()
    assert ranks[1 - lost].returncode == 1
    assert message.splitlines()[-1].startswith("unet train")
    assert "another rank exited or is unreachable" in message
    assert ("did not answer within --rank-timeout" in message) == (how == signal.SIGSTOP)
    assert "Traceback" not in message


@pytest.mark.ranks
def test_ranks_and_their_workers_exit_when_the_launcher_is_killed(
    shards: Path, tiny, call, spawn_ranks, wait_for, tmp_path: Path
) -> None:
    arguments = argv(shards, tmp_path, tiny, "--steps", 1_000_000, "--save-every", 2)
    launcher = spawn_ranks(2, "train", *arguments, "--workers", 1)
    saved = tmp_path / "checkpoints" / "last" / "state.json"
    wait_for(saved.exists, "the first checkpoint")
    started = psutil.Process(launcher.pid).children(recursive=True)
    assert len(started) >= 4
    launcher.kill()
    launcher.communicate()
    _, running = psutil.wait_procs(started, timeout=10)
    for process in running:
        process.kill()
    assert not running
    step = json.loads(saved.read_text())["step"]
    # The run folder is free again.
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", step, "--save-every", 2))
    assert ended.code == 0, ended.err


# ---- no room, no right


def limited(largest: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`unet train` where no file may grow beyond so many bytes, as on a disk that is full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    return subprocess.run(
        [sys.executable, "-m", "pipelines.train", *arguments],
        cwd=REPO,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
def test_a_full_disk_costs_the_checkpoint_that_found_it_full(
    file: str, whole: Path, shards: Path, tiny, call, content, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    more = ("--save-every", 2, "--eval-every", 6, *CONSTANT)
    assert call("train", *argv(shards, run_dir, tiny, "--steps", 2, *more)).code == 0
    saved = run_dir / "checkpoints" / "step-00000002"
    before = content(saved)
    largest = (saved / file).stat().st_size - 1
    ended = limited(largest, argv(shards, run_dir, tiny, "--steps", 6, *more))
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    message = ended.stderr.splitlines()[-1]
    assert message.startswith(f"unet train: {run_dir / 'checkpoints' / 'step-00000004'} cannot be")
    assert "free some space, then rerun the same command to resume" in message
    assert content(saved) == before
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        *("best", "last", "step-00000002"),
    ]
    ended = call("train", *argv(shards, run_dir, tiny, "--steps", 6, *more))
    assert ended.code == 0, ended.err
    assert_same(run_dir, whole)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU is out of memory (CUDA out"),
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            "the GPU failed (CUDA",
        ),
        (RuntimeError("CUDA error: unspecified launch failure"), "the GPU failed (CUDA error: uns"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a data loading"),
        (RuntimeError("[enforce fail at inline_container.cc:672]"), "CHECKPOINT cannot be written"),
    ],
    ids=str,
)
def test_what_fails_on_the_device_is_not_reported_as_a_full_disk(
    error: RuntimeError, line: str, shards: Path, tiny, call, monkeypatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 1))
    assert ended.code == 1
    checkpoints = tmp_path / "checkpoints"
    expected = line.replace("CHECKPOINT", str(checkpoints / "step-00000001"))
    assert ended.err.splitlines()[-1].startswith(f"unet train: {expected}")
    assert "Traceback" not in ended.err
    assert list(checkpoints.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_that_cannot_be_written_are_reported_in_one_line(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Else the device would be read from.
    monkeypatch.setattr(tracking, "drop_lines_after", lambda *_: None)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 2))
    assert ended.code == 1
    assert f"{tmp_path / 'metrics.jsonl'} cannot be written (No space left on device)" in ended.err
    (tmp_path / "metrics.jsonl").unlink()
    monkeypatch.undo()
    assert call("train", *argv(shards, tmp_path, tiny, "--steps", 2)).code == 0


def test_images_that_cannot_be_written_do_not_end_the_run(
    shards: Path, tiny, call, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "pictures").write_text("a file where a folder should be")
    more = ("--steps", 2, "--tracking.pictures", 2)
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 0, ended.err
    assert "train-first_batch.png was not written, training continues" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux does /sys refuse new files")
def test_a_run_folder_that_nothing_can_be_written_to_is_refused_at_once(
    shards: Path, tiny, call
) -> None:
    ended = call("train", *argv(shards, Path("/sys/run"), tiny, "--steps", 1))
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "--run-dir /sys/run cannot be written to" in ended.err


def test_a_report_that_cannot_be_written_does_not_make_a_failure_of_the_run(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    (tmp_path / "report.html").mkdir()
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 1))
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "state.json").read_text())["finished"]
    assert "no report" in ended.out + ended.err
