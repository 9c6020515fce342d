"""The demo: pictures that are always the same, and every step of the road as users take it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import RunError
from pipelines.demo import LABELLED, UNSEEN, DemoConfig, draw_all, draw_cells, launch_command, step
from shards.index import read_manifest


def test_the_same_seed_draws_the_same_cells() -> None:
    one, two = (draw_cells(np.random.default_rng(3), 64) for _ in range(2))
    other = draw_cells(np.random.default_rng(4), 64)
    for first, second, different in zip(one, two, other, strict=True):
        assert first.tobytes() == second.tobytes()
        assert first.tobytes() != different.tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_is_where_the_cells_are(seed: int) -> None:
    picture, mask = (np.asarray(image) for image in draw_cells(np.random.default_rng(seed), 128))
    assert picture.shape == mask.shape == (128, 128)
    assert set(np.unique(mask)) == {0, 255}
    assert 0.03 < (mask == 255).mean() < 0.7
    assert picture[mask == 255].mean() > picture[mask == 0].mean() + 25


def test_only_what_is_missing_is_drawn(tmp_path: Path, content) -> None:
    config = DemoConfig(out=tmp_path, size=64)
    draw_all(tmp_path, config)
    files = content(tmp_path)
    assert len(files) == 2 * LABELLED + UNSEEN
    lost = tmp_path / "images" / "007.png"
    lost.unlink()
    before = (tmp_path / "images" / "008.png").stat().st_mtime_ns
    draw_all(tmp_path, config)
    assert content(tmp_path) == files
    assert (tmp_path / "images" / "008.png").stat().st_mtime_ns == before


def test_without_a_gpu_two_ranks_are_started_that_know_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    command, environment, shown = launch_command("pipelines.train")
    assert environment == {"ACCELERATE_USE_CPU": "true"}
    assert command[-2:] == shown[-2:] == ["-m", "pipelines.train"]
    assert "--multi_gpu" in command
    assert command[command.index("--num_processes") + 1] == "2"


def test_a_step_that_fails_is_named_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="unet pack ended with exit code 2"):
        step("pack", "--nonsense")
    captured = capfd.readouterr()
    assert "$ unet pack --nonsense" in captured.out


@pytest.mark.parametrize("given", [("--size", 32), ("--steps", 0)])
def test_sizes_that_make_no_sense_are_refused(given, call, tmp_path: Path) -> None:
    ended = call("demo", "--out", tmp_path / "demo", *given)
    assert ended.code == 2
    assert "--size must be at least 64 and --steps at least 1" in ended.said
    assert not (tmp_path / "demo").exists()


@pytest.mark.ranks
def test_the_whole_road(spawn, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = spawn("demo", "--out", out, "--size", 64, "--steps", 4)
    said, complaint = process.communicate(timeout=600)
    assert process.returncode == 0, complaint
    for verb in ("pack", "evaluate", "predict", "report"):
        assert f"$ unet {verb} " in said
    assert "accelerate launch" in said
    scores = json.loads((out / "run" / "scores.json").read_text())
    assert f"pictures: {scores['classes']['cell']['dice']:.4f}" in said
    page = (out / "run" / "report.html").read_text()
    assert "The best checkpoint on all val pictures" in page
    assert "From all val pictures" in page
    assert read_manifest(out / "masks").splits["predicted"].samples == UNSEEN
    for kind in ("png", "overlay"):
        pictures = sorted((out / "masks" / kind).iterdir())
        assert len(pictures) == UNSEEN
        assert Image.open(pictures[0]).size == (64, 64)
