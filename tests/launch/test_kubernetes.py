"""Recipes for Kubernetes: strictly valid, safe by default, and with commands that run."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.runtime.command import parse

validate = pytest.importorskip("kubernetes_validate")
trainer_api = pytest.importorskip("kubeflow_trainer_api.models")

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "launch" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
RECIPES: dict[str, dict[str, Any]] = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = sorted(name for name, recipe in RECIPES.items() if recipe["kind"] == "Job")
INDEXED = ("pack", "predict")
OLDEST = "1.33"
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD")


def dropped_keys(recipe: Any, parsed: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of keys in a recipe that are missing from its parsed form."""
    if isinstance(recipe, dict):
        for key, value in recipe.items():
            if isinstance(parsed, dict) and key in parsed:
                yield from dropped_keys(value, parsed[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(recipe, list):
        for number, (one, other) in enumerate(zip(recipe, parsed, strict=True)):
            yield from dropped_keys(one, other, f"{path}[{number}]")


def unknown_to_kubeflow(recipe: dict[str, Any]) -> list[str]:
    model = trainer_api.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(recipe))
    return [*dropped_keys(recipe, model.to_dict())]


def pod_of(name: str) -> dict[str, Any]:
    """Return the pod spec of a Job, or the patch that a TrainJob applies to its runtime."""
    spec = RECIPES[name]["spec"]
    if name in JOBS:
        return spec["template"]["spec"]
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def container_of(name: str) -> dict[str, Any]:
    """Return the only container, merged with the trainer in the case of a TrainJob."""
    (container,) = pod_of(name)["containers"]
    if name in JOBS:
        return container
    trainer = RECIPES[name]["spec"]["trainer"]
    return {**container, **trainer, "resources": trainer["resourcesPerNode"]}


def expand(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """Replace $(NAME) as Kubernetes does: unknown names are left alone."""
    return [
        re.sub(r"\$\(([^)]*)\)", lambda found: environment.get(found[1], found[0]), argument)
        for argument in arguments
    ]


def words_of(name: str) -> list[str]:
    """Return the arguments of `unet`, without --part, which a recipe's script adds."""
    container = container_of(name)
    if "command" not in container:
        return container["args"]
    verb = container["args"][1].removeprefix("unet-")
    return [verb, *container["args"][2:]]


def test_every_stage_has_a_recipe() -> None:
    assert set(RECIPES) == {"pack", "pack-finish", "predict", "train", "trainjob"}
    assert JOBS == ["pack", "pack-finish", "predict", "train"]


# ---- validity


@pytest.mark.parametrize("version", [OLDEST, validate.latest_version()])
@pytest.mark.parametrize("name", JOBS)
def test_jobs_pass_strict_validation(name: str, version: str) -> None:
    validate.validate(RECIPES[name], version, strict=True)


def test_strict_validation_finds_unknown_keys() -> None:
    for path in ("spec", "spec.template.spec", "spec.podFailurePolicy"):
        wrong = copy.deepcopy(RECIPES["predict"])
        inner = wrong
        for key in path.split("."):
            inner = inner[key]
        inner["unheardOf"] = 1
        with pytest.raises(validate.ValidationError):
            validate.validate(wrong, OLDEST, strict=True)


def test_the_trainjob_has_no_unknown_keys() -> None:
    recipe = RECIPES["trainjob"]
    assert recipe["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert recipe["spec"]["runtimeRef"]["name"] == "torch-distributed"
    assert unknown_to_kubeflow(recipe) == []
    wrong = copy.deepcopy(recipe)
    wrong["spec"]["trainer"]["numNode"] = 2
    patch = wrong["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["hostNetworks"] = True
    found = {path.rpartition(".")[2] for path in unknown_to_kubeflow(wrong)}
    assert found == {"numNode", "hostNetworks"}


def test_the_trainjob_sets_nothing_that_belongs_to_its_runtime() -> None:
    # The admission webhook of Kubeflow Trainer refuses these.
    names = {variable["name"] for variable in container_of("trainjob")["env"]}
    assert not [name for name in names if name.startswith("PET_")]
    (patched,) = pod_of("trainjob")["containers"]
    assert patched["name"] == "node"
    assert "env" not in patched


# ---- security


@pytest.mark.parametrize("name", RECIPES)
def test_no_pod_runs_as_root_or_may_escalate(name: str) -> None:
    user = re.findall(r"^USER (\d+)$", (REPO / "Dockerfile").read_text(), re.MULTILINE)[-1]
    pod, container = pod_of(name)["securityContext"], container_of(name)["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert str(pod["runAsUser"]) == user
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", RECIPES)
def test_the_image_tag_is_this_version(name: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (image,) = re.findall(r" image: (.+)$", (FOLDER / f"{name}.yaml").read_text(), re.MULTILINE)
    assert image.rpartition(":")[2] == project["version"]


@pytest.mark.parametrize("name", RECIPES)
def test_resources_are_limited_and_include_shared_memory(name: str) -> None:
    limits = container_of(name)["resources"]["limits"]
    assert {"cpu", "memory"} <= set(limits)
    volumes = {volume["name"]: volume for volume in pod_of(name).get("volumes", [])}
    mounts = {m["mountPath"]: m["name"] for m in container_of(name).get("volumeMounts", [])}
    assert set(mounts.values()) == set(volumes)
    if "nvidia.com/gpu" not in limits:
        return
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory"
    gibibytes = [int(size.removesuffix("Gi")) for size in (shared["sizeLimit"], limits["memory"])]
    assert 2 * gibibytes[0] < gibibytes[1]


@pytest.mark.parametrize("name", RECIPES)
def test_secrets_are_referenced_and_never_written_out(name: str) -> None:
    for variable in container_of(name).get("env", []):
        if SECRET.search(variable["name"]):
            assert set(variable) == {"name", "valueFrom"}
            assert set(variable["valueFrom"]) == {"secretKeyRef"}
    for source in container_of(name).get("envFrom", []):
        assert set(source) == {"secretRef"}
    named = json.dumps(RECIPES[name])
    assert ("s3://" in named) == ('"bucket"' in named)


# ---- exit codes


@pytest.mark.parametrize("name", [name for name in JOBS if name != "pack-finish"])
def test_exit_codes_have_the_documented_actions(name: str) -> None:
    spec = RECIPES[name]["spec"]
    # A podFailurePolicy requires it.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is None:
            assert rule == {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            }
            continue
        assert codes["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
        assert codes["operator"] == "In"
        actions |= dict.fromkeys(codes["values"], rule["action"])
    expected = {
        "pack": {2: "FailJob", 3: "FailIndex"},
        "predict": {2: "FailJob", 3: "FailIndex"},
        "train": {2: "FailJob", 75: "Ignore"},
    }
    assert actions == expected[name]
    assert ("backoffLimitPerIndex" in spec) == (spec.get("completionMode") == "Indexed")


def test_training_has_time_for_a_checkpoint_in_a_persistent_volume() -> None:
    for name in ("train", "trainjob"):
        assert pod_of(name)["terminationGracePeriodSeconds"] >= 60
        claims = [v for v in pod_of(name)["volumes"] if "persistentVolumeClaim" in v]
        (mount,) = {v["name"] for v in claims}
        (where,) = [
            m["mountPath"] for m in container_of(name)["volumeMounts"] if m["name"] == mount
        ]
        words = words_of(name)
        run_dir = words[words.index("--run-dir") + 1]
        run_dir = expand([run_dir], {"RUN_DIR": "/runs/RUN"})[0]
        assert Path(run_dir).is_relative_to(where)


# ---- commands


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_parses(name: str) -> None:
    verb, *arguments = words_of(name)
    parse(
        getattr(import_module(f"pipelines.{verb}"), f"{verb.capitalize()}Config"), arguments, verb
    )


def test_pack_finish_has_the_flags_of_pack() -> None:
    parts = words_of("pack")
    assert parts[-2] == "--workers"
    assert words_of("pack-finish") == [*parts[:-2], "--finish"]


@pytest.fixture
def unet_command(tmp_path: Path) -> dict[str, str]:
    """An environment in which `unet` and `python` run the code under test, as in the image."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, arguments in (("unet", "-m pipelines.cli"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}


def command_of(name: str, environment: Mapping[str, str], *arguments: object) -> list[str]:
    """Return the command of a pod, with other arguments in place of those of the recipe."""
    container = container_of(name)
    script, zero, *_ = container["args"]
    return [*container["command"], *expand([script], environment), zero, *map(str, arguments)]


@pytest.mark.parametrize("name", INDEXED)
def test_the_pods_of_an_indexed_job_run_its_parts(
    name: str, cells: Path, make_checkpoint, unet_command, call, content, tmp_path: Path
) -> None:
    flags = {
        "pack": ("--images", cells / "images", "--masks", cells / "masks"),
        "predict": ("--checkpoint", make_checkpoint(), "--input", cells / "images", "--workers", 0),
    }[name]
    flags = (*flags, "--samples-per-shard", 1)
    flags = (*flags, "--mask-format", "binary") if name == "pack" else flags
    single, out = tmp_path / "single", tmp_path / "out"
    assert call(name, *flags, "--out", single).code == 0
    num_shards, num_pods = len([*single.glob("*.tar")]), RECIPES[name]["spec"]["completions"]
    expected = 0
    for index in (0, num_pods - 1):
        environment = {**unet_command, "JOB_COMPLETION_INDEX": str(index)}
        ended = subprocess.run(
            command_of(name, environment, *flags, "--out", out),
            env=environment,
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ended.returncode == 0, ended.stderr
        assert f"part {index + 1}/{num_pods}:" in ended.stdout
        expected += len(range(index, num_shards, num_pods))
        assert len([*out.glob("*.tar")]) == expected
    assert call(name, *flags, "--out", out).code == 0
    assert content(out) == content(single)


@pytest.mark.ranks
def test_machines_stop_together_if_one_gets_sigterm_and_resume_together(
    shards: Path, tiny, unet_command, metrics, wait_for, kill, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def pods(steps: int) -> list[subprocess.Popen[str]]:
        """Start the command with PET_*, as Kubeflow's runtime does (its torch.go)."""
        started = []
        for node in range(2):
            environment = {
                **unet_command,
                "RUN_DIR": str(run_dir),
                "PET_NNODES": "2",
                "PET_NPROC_PER_NODE": "1",
                "PET_NODE_RANK": str(node),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
            flags = ("--data", shards, "--run-dir", run_dir, *tiny, "--workers", 0)
            more = ("--steps", steps, "--log-every", 1, "--eval-every", 10**6)
            started.append(
                subprocess.Popen(
                    command_of("trainjob", environment, *flags, *more),
                    env=environment,
                    cwd=REPO,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started

    both = pods(steps=10**6)
    try:
        wait_for((run_dir / "metrics.jsonl").exists, "the first steps")
        both[1].send_signal(signal.SIGTERM)
        outputs = [pod.communicate(timeout=200)[0] for pod in both]
    finally:
        for pod in both:
            kill(pod)
    assert [pod.returncode for pod in both] == [75, 75], outputs
    state = json.loads((run_dir / "state.json").read_text())
    assert state["finished"] is False
    step = state["step"]
    assert (run_dir / "checkpoints" / "last").resolve().name == f"step-{step:08d}"

    both = pods(steps=step + 2)
    outputs = [pod.communicate(timeout=200)[0] for pod in both]
    assert [pod.returncode for pod in both] == [0, 0], outputs
    assert json.loads((run_dir / "state.json").read_text())["finished"] is True
    steps = [line["step"] for line in metrics(run_dir) if "train/loss" in line]
    assert steps == [*range(1, step + 3)]
