"""On a GPU: a bare `unet train` uses bf16 where the card has it, learns, and is scored."""

import math
from pathlib import Path

import pytest
import torch

from pipelines.devices import start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_bare_start_takes_the_precision_of_the_card() -> None:
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    assert start().mixed_precision == expected


def test_training_and_scoring_run_on_the_card(shards: Path, tiny, call, metrics, tmp_path) -> None:
    ended = call("train", "--data", shards, "--run-dir", tmp_path, *tiny, "--steps", 20)
    assert ended.code == 0, ended.err
    losses = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    ended = call("evaluate", "--checkpoint", tmp_path, "--data", shards)
    assert ended.code == 0, ended.err


def test_switches_of_speed_run_on_the_card(shards: Path, tiny, call, metrics, tmp_path) -> None:
    for name, flags in {
        "compiled": ("--compile", "--channels-last"),
        "recomputed": ("--gradient-checkpointing",),
        "batch norm": ("--model.norm", "batch", "--channels-last"),
    }.items():
        run_dir = tmp_path / name
        more = (*flags, "--steps", 10, "--log-every", 1)
        ended = call("train", "--data", shards, "--run-dir", run_dir, *tiny, *more)
        assert ended.code == 0, ended.err
        losses = [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]
        assert all(math.isfinite(loss) for loss in losses)
