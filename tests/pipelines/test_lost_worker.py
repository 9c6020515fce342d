"""`runtime.loader_workers`: a killed worker ends the command with one line, at any moment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# By itself, torch raises in the main thread at whatever line that is, here in the first forward
# pass. The error belongs to the next batch.
KILLED = """
import os, signal, sys
from importlib import import_module
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

from pipelines.loading import batches, stages
from unet import UNet

prefetch, verb, *arguments = sys.argv[1:]
command, forward = import_module(f"pipelines.{verb}"), UNet.forward

if prefetch == "prefetch":
    from pipelines.training import setup

    # As on a GPU, with memory that is not page-locked.
    load = batches.train_batches
    stages.Batch.pin_memory = lambda batch: batch
    setup.train_batches = lambda *given, **more: load(*given, **{**more, "pin": True})

def kill_one(model, image):
    if not active_children():
        return forward(model, image)
    UNet.forward = forward
    worker = active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(10):
        logits = model(image)
    print("forward")
    return logits

def stay(process):
    run(process)
    # A worker that has read everything would end by itself before it is killed.
    signal.pause()

UNet.forward, run, BaseProcess.run = kill_one, BaseProcess.run, stay
sys.exit(command.main(arguments))
"""


@pytest.fixture(scope="module")
def commands(
    trained: Path, shards: Path, cells: Path, tiny, tmp_path_factory
) -> dict[str, list[str]]:
    """The arguments of each verb, with two processes that read."""
    out = tmp_path_factory.mktemp("out")
    checkpoint = ("--checkpoint", trained, "--workers", 2)
    train = ("--data", shards, "--run-dir", out / "run", "--workers", 2, *tiny)
    given = {
        "train": (*train, "--steps", 1000, "--tracking.pictures", 0),
        "evaluate": (*checkpoint, "--data", shards, "--out", out / "scores"),
        "predict": (*checkpoint, "--input", cells / "images", "--out", out / "masks"),
    }
    return {verb: [str(argument) for argument in arguments] for verb, arguments in given.items()}


@pytest.mark.parametrize(
    ("verb", "prefetch"),
    [("train", "no"), ("train", "prefetch"), ("evaluate", "no"), ("predict", "no")],
)
def test_a_killed_worker_is_reported_in_one_line(
    verb: str, prefetch: str, commands: dict[str, list[str]]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, prefetch, verb, *commands[verb]],
        cwd=REPO,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == "forward\n", ended.stderr
    assert re.fullmatch(
        rf"unet {verb}: a data loading worker died \(DataLoader worker \(pid \d+\) is killed "
        r"by signal: Killed\.\); if memory ran out, lower --workers or raise the job's memory "
        r"limit, then rerun the same command\n",
        ended.stderr,
    ), ended.stderr
