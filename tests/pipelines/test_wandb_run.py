"""`training.wandb_run`, `evaluation.validation`, `model.lineage`, `inference.wandb_job`.

What a wandb run holds, as wandb reads it back.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.inference import wandb_job
from pipelines.model.lineage import name_artifact, name_checkpoint
from pipelines.training import tracking
from pipelines.training.wandb_run import describe_run
from tests.pipelines.test_tracking import inspect


@dataclass(frozen=True)
class Stored:
    """An offline run as wandb reads it back."""

    folder: Path
    records: list[dict[str, Any]]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def history(self) -> dict[int, dict[str, Any]]:
        steps: dict[int, dict[str, Any]] = {}
        for one in self.all("history"):
            values = one["values"] if "values" in one else one["item"]
            steps.setdefault(values["_step"], {}).update(values)
        return steps


def read_run(run_dir: Path) -> Stored:
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    return Stored(folder, inspect(folder))


@pytest.fixture(scope="module")
def train_fold(
    tmp_path_factory: pytest.TempPathFactory, call: Callable[..., Any], shards: Path, tiny
) -> tuple[Path, Stored]:
    run_dir = tmp_path_factory.mktemp("study") / "RUNS" / "second"
    ended = call(
        "train",
        *("--data", shards, "--run-dir", run_dir, *tiny, "--workers", 0, "--log-every", 1),
        *("--steps", 2, "--fold", "2/3", "--tracking.backend", "wandb"),
        *("--tracking.tags", "baseline", "cells", "--tracking.notes", "Why: a first look."),
    )
    assert ended.code == 0, ended.err
    return run_dir, read_run(run_dir)


def test_a_fold_is_in_the_group_of_its_folder_with_tags_and_notes(
    train_fold: tuple[Path, Stored],
) -> None:
    run = train_fold[1].all("run")[0]
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("second", "RUNS", "fold")
    assert (run["tags"], run["notes"]) == (["baseline", "cells"], "Why: a first look.")


def test_the_settings_have_the_names_of_their_flags(train_fold: tuple[Path, Stored]) -> None:
    config, *_ = (
        record["config"]["update"]
        for record in train_fold[1].records
        if "optim.lr" in str(record.get("config"))
    )
    assert (config["fold"], config["model.preset"], config["augment.scale"]) == (
        *("2/3", "small", 1.25),
    )
    assert config["tracking.tags"] == ["baseline", "cells"]
    assert config["network.parameters"] > 1000
    assert not [name for name, value in config.items() if isinstance(value, dict)]


def test_validation_images_have_both_masks_as_layers_with_class_names(
    train_fold: tuple[Path, Stored],
) -> None:
    run = train_fold[1]
    layers = run.history[2]["val/pictures.all_masks"]
    assert len(layers) == 4
    for masks in layers:
        assert {*masks} == {"prediction", "ground_truth"}
        for layer in masks.values():
            indices = np.array(Image.open(run.folder / "files" / layer["path"]))
            assert indices.shape == (48, 48)
            assert {*np.unique(indices)} <= {0, 1}
    truth = np.array(Image.open(run.folder / "files" / layers[0]["ground_truth"]["path"]))
    assert {*np.unique(truth)} == {0, 1}
    labels = json.dumps(run.records)
    assert "val/pictures_wandb_delimeter_ground_truth" in labels
    assert "val/pictures_wandb_delimeter_prediction" in labels


def test_the_table_has_the_scores_of_every_validation_image_lowest_first(
    train_fold: tuple[Path, Stored], call: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    run_dir, run = train_fold
    path = run.history[2]["val/images.path"]
    table = json.loads((run.folder / "files" / path).read_text())
    classes = ("background", "foreground")
    scores = [f"{kind}/{name}" for kind in ("dice", "iou") for name in classes]
    assert table["columns"] == ["key", "width", "height", "group", "dice", "iou", *scores]
    last = run_dir / "checkpoints" / "last"
    flags = ("--checkpoint", last, "--data", shards, "--split", "val", "--out", tmp_path)
    assert call("evaluate", *flags).code == 0
    with (tmp_path / "scores.csv").open() as file:
        expected = {line["key"]: line for line in csv.DictReader(file)}
    assert {row[0] for row in table["data"]} == {*expected}
    dice = table["columns"].index("dice")
    assert [row[dice] for row in table["data"]] == sorted(row[dice] for row in table["data"])
    for row in table["data"]:
        own = expected[row[0]]
        assert row[1:4] == [48, 48, None]
        for name, value in zip(table["columns"][4:], row[4:], strict=True):
            assert value == (pytest.approx(float(own[name])) if own[name] else None), name


def test_the_summary_keeps_the_highest_validation_score(train_fold: tuple[Path, Stored]) -> None:
    metrics = {one["name"]: one for one in train_fold[1].all("metric") if "name" in one}
    assert {"val/dice", "val/iou"} <= {*metrics}
    assert metrics["val/dice"]["summary"] == {"max": True}


def test_data_is_an_input_and_the_model_an_output_by_reference_and_digest(
    train_fold: tuple[Path, Stored], shards: Path
) -> None:
    run_dir, run = train_fold
    found = {one["type"]: one for one in run.all("artifact")}
    assert {*found} >= {"dataset", "model"}
    weights = (run_dir / "checkpoints" / "best").resolve() / "model.safetensors"
    for kind, file in (("dataset", shards / "index.json"), ("model", weights)):
        (entry,) = found[kind]["manifest"]["contents"]
        assert entry["ref"] == file.resolve().as_uri()
        assert entry["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert "local_path" not in entry
        assert json.loads(found[kind]["metadata"])["sha256"] == entry["digest"]
    assert found["dataset"].get("use_after_commit") is True
    assert not found["model"].get("use_after_commit")
    assert found["dataset"]["name"] == f"data-{shards.name}"


def refer(artifact: dict[str, Any]) -> tuple[str, str, str, bool]:
    """Name, URL and sha256 of what an artifact refers to, and whether it is an input."""
    (entry,) = artifact["manifest"]["contents"]
    assert "local_path" not in entry
    assert json.loads(artifact["metadata"])["sha256"] == entry["digest"]
    used = bool(artifact.get("use_after_commit"))
    return artifact["name"], entry["ref"], entry["digest"], used


def reference(name: str, file: Path, *, used: bool) -> tuple[str, str, str, bool]:
    file = file.resolve()
    return name, file.as_uri(), hashlib.sha256(file.read_bytes()).hexdigest(), used


def test_a_prediction_job_leads_from_model_and_data_to_masks(
    train_fold: tuple[Path, Stored], call: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    run_dir, trained = train_fold
    (model,) = (refer(one) for one in trained.all("artifact") if one["type"] == "model")
    masks = tmp_path / "MASKS"
    flags = ("--input", shards, "--split", "val", "--out", masks, "--workers", 0)
    command = ("predict", "--checkpoint", run_dir, *flags, "--wandb-project", "cells")
    ended = call(*command)
    assert ended.code == 0, ended.err
    run = read_run(masks)
    found = {refer(one) for one in run.all("artifact")}
    assert found == {
        (*model[:3], True),
        reference(f"data-{shards.name}", shards / "index.json", used=True),
        reference("data-MASKS", masks / "index.json", used=False),
    }
    started = run.all("run")[0]
    assert (started["project"], started["job_type"]) == ("cells", "predict")
    summary = {k: v for record in run.all("summary") for k, v in record["update"].items()}
    assert (summary["images"], summary["errors"]) == (4, 0)
    # A rerun of the finished job continues the same run.
    assert call(*command).code == 0
    runs = (masks / "wandb").glob("offline-run-*")
    assert {path.name.split("-", 3)[3].removesuffix("-1") for path in runs} == {started["run_id"]}


def test_a_checkpoint_that_is_not_the_best_has_a_name_of_its_own(
    train_fold: tuple[Path, Stored], tmp_path: Path
) -> None:
    best = (train_fold[0] / "checkpoints" / "best").resolve()
    run_id = train_fold[1].all("run")[0]["run_id"]
    assert name_checkpoint(best) == f"{run_id}-best"
    other = tmp_path / "checkpoints" / "step-00000001"
    shutil.copytree(best, other)
    assert name_checkpoint(other) == f"{run_id}-step-00000001"
    (other / "state.json").unlink()
    assert name_checkpoint(other) == "model-step-00000001"


def test_masks_are_complete_if_wandb_fails(
    trained: Path,
    shards: Path,
    call: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(wandb_job, "start_wandb", fail)
    flags = ("--input", shards, "--split", "val", "--out", tmp_path, "--workers", 0)
    ended = call("predict", "--checkpoint", trained, *flags, "--wandb-project", "cells")
    assert ended.code == 0
    assert "warning: the job was not recorded in wandb (no space); the masks in" in ended.err
    assert (tmp_path / "index.json").exists()


def test_long_tables_are_cut_with_a_count(
    shards: Path, tiny, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MAX_ROWS", 3)
    ended = call(
        "train",
        *("--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0, "--steps", 1),
        *("--tracking.backend", "wandb", "--tracking.group", "all"),
    )
    assert ended.code == 0, ended.err
    assert (
        "tracking: val/images has the 3 images of lowest Dice, and leaves out 1; unet evaluate "
        "writes all to scores.csv"
    ) in ended.err.splitlines()
    run = read_run(tmp_path)
    assert run.history[1]["val/images.nrows"] == 3
    assert run.all("run")[0]["run_group"] == "all"
    assert run.all("run")[0]["job_type"] == "train"


def test_the_group_of_a_fold_is_the_folder_of_its_run() -> None:
    run_dir = Path("/home/RUNS/fold-2")
    assert describe_run(run_dir, "2/5", None) == {
        "name": "fold-2",
        "group": "RUNS",
        "job_type": "fold",
    }
    assert describe_run(run_dir, "2/5", "study")["group"] == "study"
    assert describe_run(run_dir, None, None) == {
        "name": "fold-2",
        "group": None,
        "job_type": "train",
    }


def test_names_of_artifacts_have_no_other_characters() -> None:
    assert name_artifact("data", "cells of März/2") == "data-cells_of_M_rz_2"
    assert len(name_artifact("data", "x" * 300)) == 128


@pytest.mark.parametrize(
    "flags",
    [("--tracking.tags", "a"), ("--tracking.notes", "a"), ("--tracking.group", "a")],
)
def test_flags_of_wandb_are_refused_without_it(flags, call, tmp_path: Path) -> None:
    given = ("--data", tmp_path, "--run-dir", tmp_path / "run", "--tracking.backend", "none")
    ended = call("train", *given, *flags)
    assert ended.code == 2
    assert f"{flags[0]} needs --tracking.backend wandb" in ended.message
