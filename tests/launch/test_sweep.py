"""launch/wandb/sweep.yaml: `training.tracking`, driven by the agent of wandb, without a server."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.runtime.command import parse
from pipelines.runtime.yaml_flags import to_plain
from pipelines.train import TrainConfig
from pipelines.training.tracking import flatten
from tests.pipelines.test_tracking import inspect

REPO = Path(__file__).parents[2]
SWEEP = yaml.safe_load((REPO / "launch" / "wandb" / "sweep.yaml").read_text())
wandb_agent = pytest.importorskip("wandb.wandb_agent")
sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")


def iter_values() -> list[dict[str, Any]]:
    """Every combination of the values and bounds of the sweep, as the server would send it."""
    options = [
        [p["value"]] if "value" in p else p.get("values", [p.get("min"), p.get("max")])
        for p in SWEEP["parameters"].values()
    ]
    return [dict(zip(SWEEP["parameters"], values, strict=True)) for values in product(*options)]


def run_agent(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict]:
    """Let the agent of wandb handle the command to start a run; return what it would start."""
    started: dict[str, Any] = {}

    class Process:
        def __init__(self, **named: Any) -> None:
            started.update(named)

    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(name, "abcd1234")  # the agent changes them
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent._sweep_command, agent._function, agent._in_jupyter = [*SWEEP["command"]], None, False
    agent._run_processes, agent._forward_signals = {}, False
    command = {"run_id": "run5678", "program": None, "type": "run"}
    agent._command_run({**command, "args": {name: {"value": v} for name, v in values.items()}})
    return started["command"], started["env"]


def test_every_run_of_the_sweep_is_a_command_of_unet_train() -> None:
    for values in iter_values():
        flags = sweeps.create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in values.items()}}
        )["args"]
        assert all(re.fullmatch(r"--[\w.-]+=.+", flag) for flag in flags)
        config = flatten(to_plain(parse(TrainConfig, ["--run-dir", "RUN", *flags], "train")))
        for name, value in values.items():
            assert config[name.replace("-", "_")] == value


def test_hyperband_and_search_watch_a_metric_that_is_logged() -> None:
    assert SWEEP["metric"] == {"name": "val/dice", "goal": "maximize"}
    assert SWEEP["early_terminate"]["type"] == "hyperband"
    assert SWEEP["method"] in ("bayes", "random", "grid")


def test_the_agent_starts_runs_of_its_own_id_with_its_settings(
    shards: Path, tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    values = iter_values()[-1] | {"data": str(shards), "steps": 1, "workers": 0}
    values |= {
        name.removeprefix("--"): value for name, value in zip(tiny[::2], tiny[1::2], strict=True)
    }
    values["tracking.backend"] = "wandb"
    command, environment = run_agent(values, monkeypatch)
    assert command[:2] == ["bash", "-c"]
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "unet").write_text(f'#!/bin/sh\nexec {sys.executable} -m pipelines.cli "$@"\n')
    (scripts / "unet").chmod(0o755)
    environment |= {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    run_dir = tmp_path / "sweeps" / "abcd1234" / "run5678"
    monkeypatch.undo()  # what the agent set is not for the reader
    (run,) = (run_dir / "wandb").glob("offline-run-*-run5678")
    records = inspect(run)
    settings: dict[str, Any] = {}
    for record in records:
        settings |= record.get("config", {}).get("update", {})
    assert settings["optim.lr"] == values["optim.lr"] == 0.01
    assert any("val/dice" in str(record) for record in records if record["type"] == "history")
