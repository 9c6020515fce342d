"""`model.build`: which networks and losses a run can have: each trains and resumes."""

import json
import os
import signal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines.model.build import build_loss, class_pixels
from pipelines.training.budget import Budget
from shards.manifest import read_manifest
from shards.reader import ShardReader
from unet import LossConfig, UNet

PAPER = (
    *("--model.preset", "paper", "--model.base-channels", "2", "--model.depth", "2"),
    *("--global-batch-size", "2", "--tracking.backend", "none"),
)


def argv(data: Path, run_dir: Path, flags: tuple[str, ...], *more: object) -> list[object]:
    steps = ("--steps", 4, "--log-every", 1, "--eval-every", 4)
    return ["--data", data, "--run-dir", run_dir, *flags, "--workers", 0, *steps, *more]


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def config_of(run_dir: Path) -> Any:
    return UNet.from_pretrained(run_dir / "checkpoints" / "last").config


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    path = run_dir / "checkpoints" / "last" / "training.pt"
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="session")
def touching(tmp_path_factory: pytest.TempPathFactory, call) -> Path:
    """Shards of images with cells three pixels apart, and their border maps."""
    folder = tmp_path_factory.mktemp("touching")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    mask = np.zeros((48, 48), np.uint8)
    for corner in (4, 20, 36):
        mask[4:44, corner - 3 : corner + 10] = 255
    for number in range(8):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 100, mask.shape) + mask // 2
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"p{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"p{number}.png")
    split = folder / "split.csv"
    rows = [f"p{number}.png,{'val' if number < 2 else 'train'}" for number in range(8)]
    split.write_text("\n".join(["path,split", *rows]) + "\n")
    out = folder / "shards"
    ended = call(
        "pack",
        *("--images", folder / "images", "--masks", folder / "masks", "--mask-format", "binary"),
        *("--split-file", split, "--border-sigma", 5, "--workers", 1, "--out", out),
    )
    assert ended.code == 0, ended.err
    return out


def test_the_network_of_2015_trains_resumes_and_is_scored_at_full_size(
    shards: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ended = call("train", *argv(shards, whole, PAPER))
    assert ended.code == 0, ended.err
    assert (config_of(whole).padding, config_of(whole).dropout) == ("valid", 0.5)
    # The whole of 48 x 48 images, and a margin of 20 pixels on each side.
    assert "crop_size: 88" in (whole / "config.yaml").read_text()
    scores = call("evaluate", "--checkpoint", whole, "--data", shards, "--workers", 0)
    assert scores.code == 0, scores.err
    plain = json.loads((whole / "scores.json").read_text())
    assert sum(map(sum, plain["confusion"])) == 4 * 48 * 48

    # Dropout too is the same after a resume.
    advance = Budget.advance

    def request_stop(self: Budget) -> int | None:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            self.next_agreement = 2
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Budget, "advance", request_stop)
        assert call("train", *argv(shards, parts, PAPER)).code == 75
    assert call("train", *argv(shards, parts, PAPER)).code == 0
    assert losses(parts) == losses(whole)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in weights_of(parts).items())


def test_a_crop_that_valid_convolutions_cannot_take_is_refused_with_the_nearest(
    shards: Path, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path / "run", PAPER, "--crop-size", 66))
    assert ended.code == 2
    assert "--crop-size: padding valid requires sides of 28 + 4b pixels, got 66" in ended.message
    assert "the nearest are 64 and 68" in ended.message


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (("--model.norm", "batch"), "norm", "batch"),
        (("--model.up", "bilinear"), "up", "bilinear"),
        (("--model.activation", "silu"), "activation", "silu"),
        (("--model.dropout", "0.25"), "dropout", 0.25),
    ],
)
def test_the_network_is_what_was_asked_for(
    flags, field, value, shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path / "run", tiny, *flags))
    assert ended.code == 0, ended.err
    assert getattr(config_of(tmp_path / "run"), field) == value


def test_coarser_levels_are_supervised_except_in_the_network_of_2015(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    for name, flags, expected in (
        ("default", (), True),
        ("off", ("--model.no-deep-supervision",), False),
        ("paper", PAPER, False),
    ):
        run = tmp_path / name
        ended = call("train", *argv(shards, run, PAPER if name == "paper" else tiny, *flags))
        assert ended.code == 0, ended.err
        assert config_of(run).deep_supervision is expected
        recorded = yaml.safe_load((run / "config.yaml").read_text())["model"]
        assert recorded["deep_supervision"] is expected
    # One of them may start from the other.
    for name, source, more in (
        ("1", "off", ()),
        ("2", "default", ("--model.no-deep-supervision",)),
    ):
        flags = ("--init-from", tmp_path / source, *more)
        ended = call("train", *argv(shards, tmp_path / name, tiny, *flags))
        assert ended.code == 0, ended.err


def test_a_run_of_before_deep_supervision_is_resumed_without_it(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    run, off = tmp_path / "run", "--model.no-deep-supervision"
    assert call("train", *argv(shards, run, tiny, "--steps", 1, off)).code == 0
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert not [name for name in state["fixed"] if "deep_supervision" in name]
    ended = call("train", *argv(shards, run, tiny, "--steps", 2))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert off in ended.err
    ended = call("train", *argv(shards, run, tiny, "--steps", 2, off))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("switch", ["--channels-last", "--gradient-checkpointing", "--compile"])
def test_switches_of_speed_and_memory_change_no_loss(
    switch: str, shards: Path, tiny, call, tmp_path: Path
) -> None:
    plain, switched = tmp_path / "plain", tmp_path / "switched"
    # Half as many kernels to compile as at depth 2.
    network = (*tiny, "--model.depth", "1")
    assert call("train", *argv(shards, plain, network)).code == 0
    ended = call("train", *argv(shards, switched, network, switch))
    assert ended.code == 0, ended.err
    assert losses(switched) == pytest.approx(losses(plain), rel=1e-3)
    # A checkpoint does not record the setting.
    assert weights_of(switched).keys() == weights_of(plain).keys()
    again = call("train", *argv(shards, switched, network))
    assert "had already finished at step 4" in again.out


def test_gradient_checkpointing_and_batch_norm_are_refused_together(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    flags = ("--model.norm", "batch", "--gradient-checkpointing")
    ended = call("train", *argv(shards, tmp_path / "run", tiny, *flags))
    assert ended.code == 2
    assert "would update the running averages" in ended.message


def test_every_loss_is_logged_by_its_name(touching: Path, tiny, call, tmp_path: Path) -> None:
    flags = [f"--loss.{name}=0.5" for name in ("bce", "focal", "tversky", "label-smoothing")]
    weights = ("--loss.class-weights", "inverse", "--loss.border-weight", 10)
    ended = call("train", *argv(touching, tmp_path / "run", tiny, *flags, *weights))
    assert ended.code == 0, ended.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert {f"train/loss_{n}" for n in ("cross_entropy", "bce", "focal", "dice", "tversky")} <= (
        first.keys()
    )


def test_border_weights_raise_the_loss_between_cells_for_any_number_of_workers(
    touching: Path, tiny, call, tmp_path: Path
) -> None:
    found = {}
    for name, flags in {
        "plain": (),
        "weighted": ("--loss.border-weight", 10),
        "workers": ("--loss.border-weight", 10, "--workers", 2),
    }.items():
        run_dir = tmp_path / name
        arguments = argv(touching, run_dir, tiny, "--loss.dice", 0, *flags)
        ended = call("train", *arguments)
        assert ended.code == 0, ended.err
        found[name] = losses(run_dir)
    assert found["weighted"][0] > 1.2 * found["plain"][0]
    assert found["workers"] == found["weighted"]


def test_border_weights_need_border_maps(shards: Path, tiny, call, tmp_path: Path) -> None:
    ended = call("train", *argv(shards, tmp_path / "run", tiny, "--loss.border-weight", 10))
    assert ended.code == 2
    assert "has none; pack it with --border-sigma 5" in ended.message


@pytest.mark.parametrize(("name", "power"), [("inverse", 1.0), ("inverse_sqrt", 0.5)])
def test_class_weights_come_from_the_training_split(
    shards: Path, name: Literal["inverse", "inverse_sqrt"], power: float
) -> None:
    manifest = read_manifest(shards)
    weights = build_loss(LossConfig(class_weights=name), manifest).class_weights
    assert weights is not None
    common, rare = class_pixels(manifest)
    assert weights[1] / weights[0] == pytest.approx((common / rare) ** power)


def test_class_weights_need_counted_pixels(cells: Path, tiny, call, tmp_path: Path) -> None:
    ended = call(
        "pack",
        *("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary"),
        *("--verify", "headers", "--val-fraction", 0.4, "--workers", 1, "--out", tmp_path / "data"),
    )
    assert ended.code == 0, ended.err
    flags = ("--loss.class-weights", "inverse")
    ended = call("train", *argv(tmp_path / "data", tmp_path / "run", tiny, *flags))
    assert ended.code == 2
    assert "does not list; pack it with --verify full" in ended.message


def test_batch_norm_of_a_single_value_is_refused(shards: Path, tiny, call, tmp_path: Path) -> None:
    small = ("--crop-size", 4, "--global-batch-size", 2, "--accumulate", 2)
    ended = call("train", *argv(shards, tmp_path / "run", tiny, "--model.norm", "batch", *small))
    assert ended.code == 2
    assert "sees one value of each channel in crops of 4 pixels" in ended.message


@pytest.mark.ranks
def test_batch_norm_on_several_cpu_ranks_is_refused_by_one_of_them(
    shards: Path, tiny, launch, tmp_path: Path
) -> None:
    arguments = argv(shards, tmp_path / "run", tiny, "--model.norm", "batch")
    ended = launch(2, "train", *arguments)
    assert ended.code != 0
    assert ended.err.count("--model.norm batch is synchronised over ranks on GPUs only") == 1


def test_border_maps_are_read_only_where_they_are_used(
    touching: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = set()
    raw_sample = ShardReader.build_sample

    def noting(self: ShardReader, *arguments: Any) -> Any:
        raw = raw_sample(self, *arguments)
        seen.add(raw.border is not None)
        return raw

    monkeypatch.setattr(ShardReader, "build_sample", noting)
    for flags, expected in (((), {False}), (("--loss.border-weight", 10), {False, True})):
        seen.clear()
        ended = call("train", *argv(touching, tmp_path / str(len(flags)), tiny, *flags))
        assert ended.code == 0, ended.err
        # Validation has no use for them in either case.
        assert seen == expected
