"""`training.tracking`, `evaluation.examples`.

Tracking: metrics.jsonl always, wandb on request; a failing tracker does not end the run.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.runtime.wandb_run import has_wandb_key
from pipelines.training import tracking
from pipelines.training.tracking import drop_lines_after

WANDB = Path(sys.executable).parent / "wandb"


def inspect(run: Path) -> list[dict[str, Any]]:
    """The records of a wandb run, as wandb itself reads them."""
    command = [WANDB, "leet", "inspect", "--json", run]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def argv(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    given = ["--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, "--log-every", 1]
    return [*given, "--tracking.backend", "wandb", *more]


def test_without_a_key_wandb_writes_the_same_numbers_offline_and_a_resume_resumes_with_the_run(
    shards: Path, tiny, call, metrics, tmp_path: Path
) -> None:
    assert call("train", *argv(shards, tmp_path, tiny, "--steps", 2)).code == 0
    assert call("train", *argv(shards, tmp_path, tiny, "--steps", 3)).code == 0
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    # One curve: both parts have one id (wandb appends -1 if both begin in one second).
    assert len({run.name.split("-")[3] for run in runs}) == 1
    history: dict[int, dict[str, Any]] = {}
    for run in runs:
        records = inspect(run)
        config, *_ = (r["config"]["update"] for r in records if "steps" in str(r.get("config")))
        assert (config["global_batch_size"], config["optim.schedule"]) == (4, "cosine")
        for record in (r["history"] for r in records if r["type"] == "history"):
            values = record["values"] if "values" in record else record["item"]
            history.setdefault(values["_step"], {}).update(values)
    lines: dict[int, dict[str, Any]] = {}
    for line in metrics(tmp_path):
        lines.setdefault(line["step"], {}).update(line)
    assert set(lines) == set(history) - {0} == {1, 2, 3}
    # The first batch of the run, once, and images of each validation.
    for name, steps in (("train/first_batch", {0: 4}), ("val/pictures", {2: 4, 3: 4})):
        counts = {step: values.get(f"{name}.count") for step, values in history.items()}
        assert {step: count for step, count in counts.items() if count} == steps
    for step, line in lines.items():
        for name in set(line) - {"step"}:
            assert history[step][name] == pytest.approx(line[name])


def test_the_first_batch_and_validation_can_be_looked_at_without_a_tracker(
    trained: Path, shards: Path
) -> None:
    files = {path.name: Image.open(path) for path in (trained / "pictures").iterdir()}
    assert files["train-first_batch.png"].size == (32, 4 * 32)
    # image, truth, prediction and difference of all four
    assert files["val-pictures.png"].size == (4 * 48 + 3 * 8, 4 * 48)


def test_images_can_be_left_out(shards: Path, tiny, call, tmp_path: Path) -> None:
    flags = ("--steps", 1, "--tracking.pictures", 0, "--tracking.backend", "none")
    assert call("train", *argv(shards, tmp_path, tiny), *flags).code == 0
    assert not (tmp_path / "pictures").exists()


def test_drawing_changes_nothing_of_what_is_learned(
    shards: Path, tiny, call, metrics, tmp_path: Path
) -> None:
    found = []
    for number in (0, 3):
        run_dir = tmp_path / str(number)
        flags = ("--steps", 4, "--eval-every", 2, "--tracking.pictures", number)
        arguments = argv(shards, run_dir, tiny, *flags, "--model.dropout", 0.5)
        ended = call("train", *arguments, "--tracking.backend", "none", "--optim.ema-decay", 0)
        assert ended.code == 0, ended.err
        found.append([line.get("train/loss", line.get("val/dice")) for line in metrics(run_dir)])
    assert found[0] == found[1]


def test_tensorboard_gets_the_same_numbers_and_images(
    shards: Path, tiny, call, metrics, tmp_path: Path
) -> None:
    flags = ("--tracking.backend", "tensorboard", "--steps", 2)
    ended = call("train", *argv(shards, tmp_path, tiny)[:-2], *flags)
    assert ended.code == 0, ended.err
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for line in metrics(tmp_path):
        for name in set(line) - {"step"}:
            values = {event.step: event.value for event in events.Scalars(name)}
            assert values[line["step"]] == pytest.approx(line[name])
    assert {"train/first_batch", "val/pictures"} <= {*events.Tags()["images"]}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    flags = ("--tracking.backend", "tensorboard")
    ended = call("train", *argv(shards, tmp_path / "run", tiny)[:-2], *flags)
    assert ended.code == 2
    assert "pip install 'unet-shards[tensorboard]'" in ended.message
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_uploaded_if_that_is_asked_for(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 1, "--tracking.artifact"))
    assert ended.code == 0, ended.err
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    artifacts = [record["artifact"] for record in inspect(run) if record["type"] == "artifact"]
    (artifact,) = (one for one in artifacts if one["type"] == "model")
    assert artifact["name"].endswith("-best")
    saved = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert saved >= {"model.safetensors", "config.json", "state.json", "training.pt"}


class Broken:
    """Stands for a tracker that fails from some call on."""

    def __init__(self, *fails: str) -> None:
        self.fails = fails

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ConnectionError("the tracker is down")

        def start(accelerator: Any, *_: Any, **__: Any) -> None:
            accelerator.trackers.append(
                SimpleNamespace(
                    name="wandb",
                    tracker=MagicMock(),
                    log_images=lambda *_, **__: None,
                    log_table=lambda *_, **__: None,
                    finish=fail if "finish" in self.fails else lambda: None,
                )
            )

        for name in ("record_data", "record_model", "draw_masks"):
            monkeypatch.setattr(tracking, name, lambda *_, **__: None)
        for name, works in (("init_trackers", start), ("log", lambda *_, **__: None)):
            monkeypatch.setattr(Accelerator, name, fail if name in self.fails else works)


@pytest.mark.parametrize(
    "fails", [("init_trackers",), ("log",), ("finish",), ("init_trackers", "log")]
)
def test_a_tracker_that_fails_does_not_end_the_run_and_is_reported_once(
    fails: tuple[str, ...],
    shards: Path,
    tiny,
    call,
    metrics,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    Broken(*fails).install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 3))
    assert ended.code == 0
    assert len([r for r in caplog.records if "the tracker is down" in r.getMessage()]) == 1
    assert [line["step"] for line in metrics(tmp_path) if "train/loss" in line] == [1, 2, 3]


def test_without_a_tracker_nothing_of_it_is_made(trained: Path) -> None:
    assert not (trained / "wandb").exists()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n', 3),
        ('{"step": 1}\n{"step": 2, "train/lo', 1),
        ('{"step": 1}\nnull\n', 1),
        ("", 0),
    ],
)
def test_lines_of_steps_that_will_be_made_again_are_dropped(
    text: str, kept: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    drop_lines_after(path, 2)
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:kept])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "damage",
    ["null", "{", "[" * 100_000, "\xff", '{"step": -1}', '{"step": "2"}', '{"step": 1, "a": []}'],
)
def test_damaged_lines_are_removed_and_reported(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2, "a": NaN}}\n', encoding="latin-1")
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": NaN}\n'
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {path}: 1 damaged lines were removed, the first: line 2 (")
    assert warning.count("\n") == 1


def test_a_file_that_is_missing_is_not_made(tmp_path: Path) -> None:
    drop_lines_after(tmp_path / "metrics.jsonl", 2)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("key", "file", "known"),
    [
        ("abc", None, True),
        ("", None, False),
        ("", "machine api.wandb.ai login user password secret\n", True),
        ("", "machine example.org login user password secret\n", False),
        ("", "this is not a netrc", False),
    ],
)
def test_wandb_is_online_only_where_it_has_a_key(
    key: str, file: str | None, known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))
    if file is not None:
        (tmp_path / ".netrc").write_text(file)
        (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key() == known


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_the_mode_follows_the_key_unless_it_is_reported(
    environment: dict[str, str],
    mode: str,
    shards: Path,
    tiny,
    call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Broken().install(monkeypatch)
    monkeypatch.setattr(
        Accelerator,
        "init_trackers",
        lambda _, project, config, init_kwargs: given.append(init_kwargs["wandb"]),
    )
    run_dir = tmp_path / "run"
    assert call("train", *argv(shards, run_dir, tiny, "--steps", 1)).code == 0
    ((arguments),) = given
    assert arguments["mode"] == mode
    assert (arguments["dir"], arguments["name"]) == (str(run_dir), "run")
    assert tracking.TrackingConfig(backend="none").trackers() == []
