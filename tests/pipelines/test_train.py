"""`train`, `training.setup`, `training.options`, `training.other_data`, `training.step_failures`.

A training run: what it writes, how it is bounded, interrupted, resumed and refused.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from pipelines.evaluation import score
from pipelines.runtime.command import parse
from pipelines.training import budget
from pipelines.training.budget import Budget
from pipelines.training.flops import count_flops
from shards.manifest import read_manifest
from shards.offsets import read_offsets
from shards.reader import ShardReader
from unet import SegmentationLoss, UNet

Values = dict[str, Any]


def argv(data: Path | str, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    return ["--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, *more]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """All that a run has learned: weights, their average, the optimizer's moments."""
    folder = run_dir / "checkpoints" / "last"
    found: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for name, part in value.items():
                collect(f"{prefix}.{name}", part)

    collect("", torch.load(folder / "training.pt", weights_only=True))
    return found


def assert_equal(run_dir: Path, expected: Path) -> None:
    ours, theirs = tensors(run_dir), tensors(expected)
    assert len(theirs) > 50
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch):
    """Sends this process SIGTERM once a step is done."""

    def at(step: int) -> None:
        advance = Budget.advance

        def request_stop(self: Budget) -> int | None:
            if self.step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
                self.next_agreement = self.step + 1
            return advance(self)

        monkeypatch.setattr(Budget, "advance", request_stop)

    yield at
    monkeypatch.undo()


# ---- what a run writes


def test_metrics_have_the_names_that_are_promised(trained: Path, metrics) -> None:
    lines = metrics(trained)
    losses = [line for line in lines if "train/loss" in line]
    scores = [line for line in lines if "val/dice" in line]
    network = UNet.from_pretrained(trained / "checkpoints" / "last").config
    assert [line["step"] for line in losses] == [2, 4, 6]
    assert [line["step"] for line in scores] == [3, 6]
    for line in losses:
        assert set(line) == {
            *("step", "train/loss", "train/loss_cross_entropy", "train/loss_dice"),
            *("train/lr", "train/samples_per_second", "train/data_wait", "train/skipped"),
            *("train/memory_gib", "train/tflops"),
        }
        assert 0.01 < line["train/memory_gib"] < 100
        assert line["train/skipped"] == 0
        parts = line["train/loss_cross_entropy"] + line["train/loss_dice"]
        assert math.isclose(line["train/loss"], parts, rel_tol=1e-5)
        assert 0 <= line["train/data_wait"] <= 1
        assert line["train/samples_per_second"] > 0
        per_sample = line["train/tflops"] / line["train/samples_per_second"]
        assert per_sample == pytest.approx(count_flops(network, 1, 32) / 1e12)
    names = ("background", "foreground")
    for line in scores:
        assert set(line) == {
            *("step", "val/dice", "val/iou"),
            *(f"val/{score}/{name}" for score in ("dice", "iou") for name in names),
        }
        # `background` enters no mean.
        assert line["val/dice"] == line["val/dice/foreground"]


def test_the_run_folder_records_what_the_run_was_and_how_it_ended(trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["steps"] == 6
    assert config["crop_size"] == 32
    assert config["model"]["base_channels"] == 2
    state = json.loads((trained / "state.json").read_text())
    assert (state["finished"], state["step"], state["go_on"]) == (True, 6, None)


def test_a_run_ends_with_the_scores_of_each_class_and_three_commands_that_are_right(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 1))
    assert ended.code == 0
    for name in ("background", "foreground", "macro", "per image"):
        assert re.search(rf"^{name} +[01]\.\d{{4}}", ended.out, re.MULTILINE)
    commands = [line for line in ended.out.splitlines() if "unet " in line]
    assert len(commands) == 3
    for command, then in zip(commands, ("evaluate", "predict", "export"), strict=True):
        _, verb, *arguments = shlex.split(command.removeprefix("next:"))
        assert verb == then
        module = import_module(f"pipelines.{verb}")
        config = parse(getattr(module, f"{verb.capitalize()}Config"), arguments, verb)
        assert config.checkpoint == (str(tmp_path),)


def test_the_written_configuration_gives_the_same_run_again(
    trained: Path, call, tmp_path: Path
) -> None:
    run_dir = tmp_path / "again"
    assert call("train", "--config", trained / "config.yaml", "--run-dir", run_dir).code == 0
    assert_equal(run_dir, trained)


def test_the_model_is_rebuilt_from_its_checkpoint_alone(trained: Path, shards: Path) -> None:
    model = UNet.from_pretrained(str(trained / "checkpoints" / "best"))
    manifest = read_manifest(shards)
    assert model.spec is not None
    assert model.spec.classes == manifest.classes
    assert model.spec.mean == manifest.mean
    assert model.spec.crop_size == 32
    assert not model.training
    with torch.inference_mode():
        logits = model(model.spec.normalise(torch.zeros(1, 3, 40, 33, dtype=torch.uint8)))
    assert logits.shape == (1, 2, 40, 33)


def test_the_links_are_relative_and_point_at_complete_checkpoints(trained: Path) -> None:
    for name in ("best", "last"):
        link = trained / "checkpoints" / name
        assert link.is_symlink()
        assert "/" not in os.readlink(link)
        assert {"model.safetensors", "config.json", "training.pt", "state.json"} <= {
            path.name for path in link.iterdir()
        }
    assert os.readlink(trained / "checkpoints" / "last") == "step-00000006"


def test_a_run_can_be_moved(trained: Path, shards: Path, call, content, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-a", trained, moved], check=True)
    ended = call("evaluate", "--checkpoint", moved, "--data", shards, "--workers", 0)
    assert ended.code == 0
    assert (moved / "scores.json").exists()


def test_old_checkpoints_go_and_the_best_stays(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dice = iter([0.1, 0.9, 0.3, 0.4, 0.5])
    score_split = score.score

    def graded(*arguments: Any, **named: Any) -> Any:
        scores = score_split(*arguments, **named)
        object.__setattr__(scores.macro, "dice", next(dice))
        return scores

    monkeypatch.setattr(score, "score", graded)
    more = ("--steps", 5, "--eval-every", 1, "--keep-checkpoints", 2)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 0
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("best", "last", "step-00000002", "step-00000004", "step-00000005"),
    ]
    assert os.readlink(folder / "best") == "step-00000002"
    assert json.loads((tmp_path / "state.json").read_text())["best"] == 0.9


# ---- how it is bounded


def test_epochs_are_counted_in_steps_of_the_global_batch(
    shards: Path, tiny, call, metrics, tmp_path: Path
) -> None:
    # 8 training samples, 4 a step.
    assert call("train", *argv(shards, tmp_path, tiny, "--epochs", 1.5)).code == 0
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3


def test_minutes_end_a_run_with_a_learning_rate_of_almost_nothing(
    shards: Path, tiny, call, metrics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The clock of so short a run is looked at more often.
    monkeypatch.setattr(budget, "AGREE_SECONDS", 0.05)
    more = ("--minutes", 0.02, "--log-every", 1, "--eval-every", 100_000)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 0
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["finished"]
    assert state["seconds"] >= 1.2
    lines = metrics(tmp_path)
    assert "val/dice" in lines[-1]
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    assert rates[-1] < max(rates)
    # On a rerun, the time is up.
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert (ended.code, "had already finished" in ended.out) == (0, True)


# ---- interrupted and resumed


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_interrupted_run_resumes_identically(
    precision: str, shards: Path, tiny, call, interrupt, metrics, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--steps", 8, "--log-every", 1, "--eval-every", 3)
    assert call("train", *argv(shards, whole, tiny, *more)).code == 0
    interrupt(4)
    ended = call("train", *argv(shards, parts, tiny, *more))
    assert ended.code == 75
    assert "interrupted at step 4, checkpoint saved; rerun the same command" in ended.out
    state = json.loads((parts / "state.json").read_text())
    assert (state["finished"], state["step"]) == (False, 4)
    assert "rerun the same command" in state["go_on"]
    assert os.readlink(parts / "checkpoints" / "last") == "step-00000004"
    assert call("train", *argv(shards, parts, tiny, *more)).code == 0
    assert json.loads((parts / "state.json").read_text())["finished"]
    assert_equal(parts, whole)

    def losses(run_dir: Path) -> list[Values]:
        timed = {"train/samples_per_second", "train/data_wait", "train/memory_gib", "train/tflops"}
        return [{k: v for k, v in line.items() if k not in timed} for line in metrics(run_dir)]

    assert losses(parts) == losses(whole)
    assert json.loads((whole / "environment.json").read_text())["precision"] == precision


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_interrupted_at_its_last_step_is_scored_by_a_rerun(
    step: int, shards: Path, tiny, call, interrupt, metrics, tmp_path: Path
) -> None:
    # Step 3 is followed by a validation, step 5 is the last.
    interrupt(step)
    more = ("--steps", 5, "--eval-every", 3)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 75
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 0
    assert [line["step"] for line in metrics(tmp_path) if "val/dice" in line] == [3, 5]
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["finished"], state["step"]) == (True, 5)


def test_what_was_consumed_is_not_read_again(
    shards: Path, tiny, call, interrupt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    positions: list[int] = []
    read_all = ShardReader.read_all

    def noting(self: ShardReader, addresses: Any) -> Any:
        positions.extend(address.position for address in addresses)
        return read_all(self, addresses)

    monkeypatch.setattr(score, "score", lambda *_, **__: pytest.fail("nothing is scored here"))
    monkeypatch.setattr(ShardReader, "read_all", noting)
    interrupt(3)
    more = ("--steps", 100, "--eval-every", 1000)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 75
    assert positions == [*range(12)]
    positions.clear()
    monkeypatch.undo()
    monkeypatch.setattr(ShardReader, "read_all", noting)
    advance = Budget.advance

    def stop(self: Budget) -> int | None:
        self.stop_requested, self.next_agreement = self.step == 5, self.step + 1
        return advance(self)

    monkeypatch.setattr(Budget, "advance", stop)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 75
    assert positions == [*range(12, 24)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_interrupted_saves_and_reports_it(
    number: int, shards: Path, tiny, spawn, wait_for, call, metrics, tmp_path: Path
) -> None:
    more = ("--steps", 1_000_000, "--log-every", 1, "--eval-every", 1_000_000)
    process = spawn("train", *argv(shards, tmp_path, tiny, *more))
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, "the fourth step")
    # The run folder is taken as long as its process lives.
    second = call("train", *argv(shards, tmp_path, tiny, *more))
    assert second.code == 1
    assert "another process is training in" in second.err
    process.send_signal(number)
    message, complaint = process.communicate(timeout=200)
    assert process.returncode == 75, complaint
    assert "rerun the same command to resume" in message
    state = json.loads((tmp_path / "state.json").read_text())
    assert not state["finished"]
    assert (tmp_path / "checkpoints" / f"step-{state['step']:08d}" / "training.pt").exists()
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", state["step"] + 2))
    assert ended.code == 0
    assert metrics(tmp_path)[-1]["step"] == state["step"] + 2


def test_a_second_ctrl_c_ends_at_once_without_saving(shards: Path, tiny, tmp_path: Path) -> None:
    # In one step that never ends, nothing is agreed on.
    code = (
        "import sys, time; from pipelines.training.budget import Budget\n"
        "Budget.advance = lambda self: [print('waiting', flush=True), time.sleep(600)]\n"
        "from pipelines.train import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv(shards, tmp_path, tiny, "--steps", 9))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert "waiting" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while "Ctrl-C: saving a checkpoint" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "rerun the same command to resume" in message
    assert "Traceback" not in message
    assert not (tmp_path / "checkpoints" / "last").exists()


@pytest.mark.ranks
def test_ctrl_c_to_the_ranks_saves_one_checkpoint(
    shards: Path, tiny, spawn_ranks, wait_for, tmp_path: Path
) -> None:
    more = ("--steps", 1_000_000, "--log-every", 1, "--eval-every", 1_000_000)
    process = spawn_ranks(2, "train", *argv(shards, tmp_path, tiny, *more))
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, "the fourth step")
    for rank in psutil.Process(process.pid).children():
        rank.send_signal(signal.SIGINT)
    message, complaint = process.communicate(timeout=200)
    assert "checkpoint saved" in message, complaint
    assert "Traceback" not in complaint
    state = json.loads((tmp_path / "state.json").read_text())
    assert not state["finished"]
    assert (tmp_path / "checkpoints" / f"step-{state['step']:08d}" / "training.pt").exists()


@pytest.mark.parametrize("place", ["", "file://"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_all_its_processes_is_for_the_trainer_alone(
    shards: Path, tiny, spawn, wait_for, tmp_path: Path, place: str, number: int
) -> None:
    more = ("--steps", 1_000_000, "--log-every", 1, "--eval-every", 1_000_000, "--workers", 2)
    data = f"{place}{shards.resolve()}" if place else shards
    process = spawn("train", *argv(data, tmp_path, tiny, *more))
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, "the fourth step")
    os.killpg(process.pid, number)
    _, complaint = process.communicate(timeout=200)
    assert process.returncode == 75, complaint
    assert [*tmp_path.glob("checkpoints/step-*/training.pt")]


def test_a_warning_repeated_does_not_kill_what_is_about_to_end(
    shards: Path, tiny, spawn, wait_for, tmp_path: Path
) -> None:
    more = ("--steps", 1_000_000, "--log-every", 1, "--eval-every", 1_000_000)
    process = spawn("train", *argv(shards, tmp_path, tiny, *more))
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, "the fourth step")

    def ended() -> bool:
        process.send_signal(signal.SIGUSR1)
        return process.poll() is not None

    wait_for(ended, "the end of the run")
    _, complaint = process.communicate()
    assert process.returncode == 75, complaint
    assert not json.loads((tmp_path / "state.json").read_text())["finished"]


def test_after_sigkill_the_run_resumes_from_its_last_checkpoint(
    shards: Path, tiny, spawn, wait_for, kill, call, metrics, tmp_path: Path
) -> None:
    more = ("--log-every", 1, "--eval-every", 5)
    process = spawn("train", *argv(shards, tmp_path, tiny, "--steps", 1_000_000, *more))
    wait_for((tmp_path / "checkpoints" / "last" / "state.json").exists, "the first checkpoint")
    kill(process)
    step = json.loads((tmp_path / "checkpoints" / "last" / "state.json").read_text())["step"]
    # What a kill in the middle of a write leaves, of a step that the next run does not reach.
    unfinished = tmp_path / "checkpoints" / f".step-{step + 5:08d}.tmp"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "training.pt").write_bytes(b"half")
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", step + 2, *more))
    assert ended.code == 0, ended.err
    steps = [line["step"] for line in metrics(tmp_path) if "train/loss" in line]
    assert steps == [*range(1, step + 3)]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name[0] == "."]


def test_a_finished_run_is_left_as_it_is(trained: Path, shards: Path, tiny, call, content) -> None:
    before = content(trained)
    more = ("--steps", 6, "--log-every", 2, "--eval-every", 3)
    ended = call("train", *argv(shards, trained, tiny, *more))
    assert ended.code == 0
    assert "had already finished at step 6" in ended.out
    after = content(trained)
    assert before.keys() == after.keys()
    assert not [n for n in before if n.startswith("checkpoints") and before[n] != after[n]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("--seed", 1), "--seed 0"),
        (("--lanes", 4), "--lanes 96"),
        (("--window", 4), "--window 4096"),
        (("--global-batch-size", 8), "--global-batch-size 4"),
        (("--crop-size", 48), "--crop-size 32"),
        (("--model.preset", "modern", "--crop-size", 48), "--model.preset small"),
        (("--model.norm", "batch"), "no --model.norm"),
        (("--loss.dice", 0.5), "--loss.dice 1.0"),
        (("--optim.lr", 0.1), "--optim.lr 0.002"),
        (("--augment.rotation", 3), "--augment.rotation 15.0"),
    ],
)
def test_a_setting_that_must_not_change_is_refused_by_name(
    change: tuple[object, ...], name: str, trained: Path, shards: Path, tiny, call, content
) -> None:
    before = content(trained)
    ended = call("train", *argv(shards, trained, tiny, "--steps", 9, *change))
    assert ended.code == 2
    assert f"{change[0]} {change[1]}" in ended.err
    assert f": {trained} was created with {name}; keep that, or start in another" in ended.err
    assert "start in another --run-dir" in ended.err
    assert content(trained) == before


def test_other_data_are_refused(
    trained: Path, cells: Path, split_file: Path, tiny, call, tmp_path: Path
) -> None:
    folders = ("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary")
    more = ("--split-file", split_file, "--seed", 7, "--workers", 1, "--out", tmp_path / "other")
    assert call("pack", *folders, *more).code == 0
    ended = call("train", *argv(tmp_path / "other", trained, tiny, "--steps", 9))
    assert ended.code == 2
    assert "was trained on other data: " in ended.err


# ---- what goes wrong


def test_a_loss_that_is_not_finite_stops_with_step_and_keys(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    criterion = SegmentationLoss.forward
    calls = 0

    def spoiled(self: Any, logits: Any, mask: torch.Tensor, border: Any) -> Any:
        nonlocal calls
        calls += 1
        finest, *coarser = logits
        return criterion(
            self, (finest * (float("nan") if calls == 3 else 1), *coarser), mask, border
        )

    monkeypatch.setattr(SegmentationLoss, "forward", spoiled)
    positions: list[tuple[int, str]] = []
    read_all = ShardReader.read_all

    def noting(self: ShardReader, addresses: Any) -> Any:
        raws = read_all(self, addresses)
        positions.extend((raw.position, raw.key) for raw in raws)
        return raws

    monkeypatch.setattr(ShardReader, "read_all", noting)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 2000, "--eval-every", 2000))
    assert ended.code == 1
    keys = dict(positions)
    assert "step 3: loss, cross_entropy, dice, gradient not finite" in ended.err
    assert f"its samples are {', '.join(keys[p] for p in range(8, 12))};" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (("--global-batch-size", 5, "--accumulate", 2), "1 ranks x 2 accumulated passes; 4 or 6"),
        (("--global-batch-size", 1, "--accumulate", 3), "1 ranks x 3 accumulated passes; 3 would"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_those_that_do(
    given: tuple[object, ...], remedy: str, shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path / "run", tiny, *given))
    assert ended.code == 2
    assert remedy in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_split_that_is_missing_is_named_with_those_there_are(
    missing: str, draw, tiny, call, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 2)
    split = "val" if missing == "train" else "train"
    lines = [f"p{i:03d}.png,{split}" for i in range(2)]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *lines]))
    folders = ("--images", folder / "images", "--masks", folder / "masks")
    more = ("--mask-format", "binary", "--split-file", tmp_path / "split.csv", "--workers", 1)
    assert call("pack", *folders, *more, "--out", tmp_path / "data").code == 0
    ended = call("train", *argv(tmp_path / "data", tmp_path / "run", tiny))
    assert ended.code == 1
    assert f"has no samples in the split '{missing}'; splits with samples: {split}" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_was_cut_is_named_in_one_line(
    workers: int, shards: Path, tiny, call, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", shards, data], check=True)
    for path in data.glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    given = argv(data, tmp_path / "run", tiny, "--steps", 2)
    ended = call("train", *given, "--workers", workers)
    assert ended.code == 1
    assert "bytes, but the manifest lists" in ended.err
    assert "Traceback" not in ended.err


# ---- data that went bad after packing


@pytest.fixture
def spoil(shards: Path, tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """A copy of the shards with images that do not decode, and how messages name these."""

    def spoiled(split: str, rows: tuple[int, ...]) -> tuple[Path, list[str]]:
        data, names = tmp_path / "data", []
        shutil.copytree(shards, data)
        for path in sorted(data.glob(f"{split}-*.tar")):
            index = read_offsets(path)
            with path.open("r+b") as file:
                for row in rows:
                    if row >= len(index):
                        continue
                    file.seek(index[row].image.offset)
                    file.write(bytes(16))
                    names.append(f"{path}: {index[row].key} ")
        return data, names

    return spoiled


SKIP = ("--bad-samples", "skip", "--max-bad-share", 1)


def skips(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("skipped: ")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_does_not_decode_ends_the_run_by_name(
    workers: int, spoil, tiny, call, tmp_path: Path
) -> None:
    data, names = spoil("train", (0,))
    # Two steps are the whole epoch.
    ended = call("train", *argv(data, tmp_path / "run", tiny, "--steps", 2, "--workers", workers))
    assert ended.code == 1
    assert any(name in ended.err.strip().splitlines()[-1] for name in names)
    assert "Traceback" not in ended.err


def test_skipped_samples_are_reported_and_counted_the_same_for_any_number_of_workers(
    spoil, tiny, call, metrics, tmp_path: Path
) -> None:
    data, names = spoil("train", (0,))
    more = ("--steps", 6, "--log-every", 2, "--eval-every", 3, *SKIP)
    found = []
    for workers in (0, 2):
        run_dir = tmp_path / f"run{workers}"
        ended = call("train", *argv(data, run_dir, tiny, *more, "--workers", workers))
        assert ended.code == 0, ended.err
        lines = [line for line in metrics(run_dir) if "train/loss" in line]
        counts = [line["train/skipped"] for line in lines]
        # Three epochs of eight samples, three of which are bad; some stood in for each other.
        assert 0 < counts[0] < counts[1] < counts[2] == len(skips(ended.err)) >= 9
        assert {name for name in names for line in skips(ended.err) if name in line} == {*names}
        found.append((counts, sorted(skips(ended.err)), [line["train/loss"] for line in lines]))
    assert found[0] == found[1]


@pytest.mark.parametrize("allowed", [(), ("--max-bad-share", 0), ("--max-bad-share", 0.3)])
def test_more_bad_samples_than_allowed_end_the_run_in_one_line(
    allowed: tuple[object, ...], spoil, tiny, call, tmp_path: Path
) -> None:
    data, _ = spoil("train", (0,))
    more = ("--steps", 50, "--log-every", 2, "--bad-samples", "skip", *allowed)
    ended = call("train", *argv(data, tmp_path / "run", tiny, *more))
    assert ended.code == 1
    assert skips(ended.err)
    last = ended.err.strip().splitlines()[-1]
    share = allowed[1] if allowed else 0.01
    assert f"samples could not be decoded, more than --max-bad-share {share}" in last
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_decodes_end_the_run_all_the_same(
    workers: int, spoil, tiny, call, tmp_path: Path
) -> None:
    data, names = spoil("train", (0, 1, 2))
    ended = call("train", *argv(data, tmp_path / "run", tiny, *SKIP, "--workers", workers))
    assert ended.code == 1
    last = ended.err.strip().splitlines()[-1]
    assert any(name in last for name in names)
    assert "(nor can 15 substitutes be decoded)" in last
    assert "Traceback" not in ended.err


def test_validation_skips_nothing(spoil, tiny, call, tmp_path: Path) -> None:
    data, names = spoil("val", (0,))
    ended = call("train", *argv(data, tmp_path / "run", tiny, "--steps", 2, *SKIP))
    assert ended.code == 1
    assert any(name in ended.err.strip().splitlines()[-1] for name in names)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_byte_is_found_by_verify_shards_alone(
    split: str, shards: Path, tiny, call, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    verified = argv(data, tmp_path / "run", tiny, "--steps", 1, "--verify-shards")
    assert call("train", *verified).code == 0
    path = sorted(data.glob(f"{split}-*.tar"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    assert call("train", *argv(data, tmp_path / "other", tiny, "--steps", 1)).code == 0
    for run_dir in ("other", "new"):
        ended = call("train", *argv(data, tmp_path / run_dir, tiny, *verified[-3:]))
        assert ended.code == 1
        assert f"{path} does not match the manifest (sha256); copy or pack it again" in ended.err
        assert "Traceback" not in ended.err


# ---- settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--steps", 0), "--steps must be > 0, got 0"),
        (("--minutes", -1), "--minutes must be > 0, got -1"),
        (("--epochs", 0), "--epochs must be > 0, got 0"),
        (("--crop-size", 0), "--crop-size must be > 0, got 0"),
        (("--global-batch-size", 0), "--global-batch-size must be > 0, got 0"),
        (("--log-every", 0), "--log-every must be >= 1, got 0"),
        (("--keep-checkpoints", 0), "--keep-checkpoints must be >= 1, got 0"),
        (("--max-bad-share", 1.5), "--max-bad-share must be in [0, 1], got 1.5"),
        (("--bad-samples", "ignore"), "ignore"),
        (("--workers", -1), "--workers must be >= 0, got -1"),
        (("--cache-bytes", 0), "--cache-bytes must be >= 1, got 0"),
        (("--cache-bytes", 9), "--cache-bytes has no effect without --cache-dir"),
        (
            ("--model.preset", "paper", "--tiles.overlap", 0.5),
            "--tiles.overlap has no effect with --model.preset paper",
        ),
        (("--cache-dir", "/tmp/c"), "--cache-dir applies to data at a URL; "),
        (
            ("--augment.foreground-share", 2),
            "--augment.foreground-share must be in [0, 1], got 2.0",
        ),
        (("--seed", -1), "--seed must be >= 0, got -1"),
        (("--optim.lr", 0), "--optim.lr must be > 0, got 0.0"),
        (("--optim.warmup", 1), "--optim.warmup must be in [0, 1), got 1"),
        (("--augment.scale", 0.5), "--augment.scale must be >= 1, got 0.5"),
        (("--loss.dice", -1), "--loss.dice must be a finite number >= 0, got -1"),
        (("--tiles.tile", 4), "--tiles.tile must be at least 16 pixels, got 4"),
        (("--model.preset", "papre"), "papre"),
        (("--patience", 0), "--patience must be >= 1, got 0"),
        (("--best-by", "accuracy"), "accuracy"),
        (("--model.depth", 0), "--model.depth must be at least 1, got 0"),
        (
            ("--loss.tversky-fp", 0.5),
            "--loss.tversky-fp has no effect without --loss.tversky",
        ),
        (("--optim.momentum", 0.9), "--optim.momentum has no effect with --optim.optimizer adamw"),
        (("--max-bad-share", 0.5), "--max-bad-share has no effect without --bad-samples skip"),
        (("--no-val", "--best-by", "iou"), "--best-by has no effect with --no-val"),
        (("--tracking.project", "p"), "--tracking.project has no effect with --tracking.backend n"),
        (
            ("--augment.scale", 1, "--augment.rotation", 0, "--augment.warp-share", 1),
            "--augment.warp-share has no effect: --augment.scale, ",
        ),
        (("--tracking.backend", "mlflow"), "mlflow"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    given: tuple[object, ...], message: str, shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path / "run", tiny, *given))
    assert ended.code == 2
    assert message in ended.message
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_refused(shards: Path, tiny, call, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    ended = call("train", *argv(shards, tmp_path / "run", tiny, "--steps", 1))
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.err
