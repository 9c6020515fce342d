"""The demo: deterministic sample images, and the full workflow as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import demo
from pipelines.demo import (
    LABELLED,
    UNSEEN,
    DemoConfig,
    draw_cells,
    draw_samples,
    make_launch_command,
    run_step,
)
from pipelines.runtime.errors import RunError
from shards.manifest import read_manifest


def test_the_same_seed_draws_the_same_cells() -> None:
    one, two = (draw_cells(np.random.default_rng(3), 64) for _ in range(2))
    other = draw_cells(np.random.default_rng(4), 64)
    for first, second, different in zip(one, two, other, strict=True):
        assert first.tobytes() == second.tobytes()
        assert first.tobytes() != different.tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_the_mask_is_where_the_cells_are(seed: int) -> None:
    image, mask = (np.asarray(drawn) for drawn in draw_cells(np.random.default_rng(seed), 128))
    assert image.shape == mask.shape == (128, 128)
    assert set(np.unique(mask)) == {0, 255}
    assert 0.03 < (mask == 255).mean() < 0.7
    assert image[mask == 255].mean() > image[mask == 0].mean() + 25


def test_only_missing_images_are_drawn(tmp_path: Path, content) -> None:
    config = DemoConfig(out=tmp_path, size=64)
    draw_samples(tmp_path, config)
    files = content(tmp_path)
    assert len(files) == 2 * LABELLED + UNSEEN
    removed = tmp_path / "images" / "007.png"
    removed.unlink()
    before = (tmp_path / "images" / "008.png").stat().st_mtime_ns
    draw_samples(tmp_path, config)
    assert content(tmp_path) == files
    assert (tmp_path / "images" / "008.png").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_refused(call, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"")
    ended = call("demo", "--out", tmp_path)
    assert ended.code == 2
    assert ended.err == f"unet demo: --out {tmp_path}: holds other files; choose another --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_without_a_gpu_two_ranks_join_one_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    command, environment, shown = make_launch_command("pipelines.train")
    assert environment == {"ACCELERATE_USE_CPU": "true"}
    assert command[-2:] == shown[-2:] == ["-m", "pipelines.train"]
    assert "--multi_gpu" in command
    assert command[command.index("--num_processes") + 1] == "2"


def test_a_failed_step_is_named_with_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="unet pack failed with exit code 2"):
        run_step("pack", "--nonsense")
    captured = capfd.readouterr()
    assert "$ unet pack --nonsense" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", 32), "--size must be >= 64, got 32"),
        (("--steps", 0), "--steps must be >= 1, got 0"),
    ],
)
def test_invalid_sizes_are_refused(arguments, message, call, tmp_path: Path) -> None:
    ended = call("demo", "--out", tmp_path / "demo", *arguments)
    assert ended.code == 2
    assert message in ended.message
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def run_in_process(call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `python -m pipelines.VERB` in this process; training is launched as ever."""
    start = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[:2] != [sys.executable, "-m"] or not command[2].startswith("pipelines."):
            return start(command, **options)
        ended = call(command[2].removeprefix("pipelines."), *command[3:])
        print(ended.err, file=sys.stderr)
        return subprocess.CompletedProcess(command, ended.code)

    monkeypatch.setattr("pipelines.demo.subprocess.run", run)


@pytest.mark.ranks
@pytest.mark.usefixtures("run_in_process")
def test_the_full_workflow(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code = demo.main([str(word) for word in ("--out", out, "--size", 64, "--steps", 4)])
    stdout, stderr = capfd.readouterr()
    assert code == 0, stderr
    for verb in ("pack", "evaluate", "predict", "report"):
        assert f"$ unet {verb} " in stdout
    assert "accelerate launch" in stdout
    scores = json.loads((out / "run" / "scores.json").read_text())
    assert f"images: {scores['classes']['cell']['dice']:.4f}" in stdout
    page = (out / "run" / "report.html").read_text()
    assert "The best checkpoint on all val images" in page
    assert "Chosen from all val images" in page
    assert read_manifest(out / "masks").splits["predicted"].samples == UNSEEN
    for kind in ("png", "overlay"):
        files = sorted((out / "masks" / kind).iterdir())
        assert len(files) == UNSEEN
        assert Image.open(files[0]).size == (64, 64)
