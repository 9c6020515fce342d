"""Recipes: accelerate, the shell and a container builder accept them."""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pipelines.runtime.command import parse

REPO = Path(__file__).resolve().parents[1]


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", *patterns]
    lines = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [REPO / line for line in lines.splitlines()]


def test_accelerates_parser_accepts_the_configuration() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(REPO / "accelerate_config.yaml"))
    assert config.mixed_precision == "bf16"
    assert config.num_machines == 1
    assert config.num_processes >= 1
    assert not config.use_cpu
    assert str(config.distributed_type).endswith("MULTI_GPU")


def test_the_configuration_documents_its_use() -> None:
    header = (REPO / "accelerate_config.yaml").read_text().split("compute_environment")[0]
    assert "accelerate launch --config_file accelerate_config.yaml --num_processes" in header
    assert "ACCELERATE_USE_CPU=true" in header


CONSTRAINTS = [
    line
    for line in (REPO / "launch" / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def test_constraints_pin_versions_and_contain_no_address() -> None:
    text = (REPO / "launch" / "constraints.txt").read_text()
    assert not re.search(r"https?:|://|@|--(extra-)?index|find-links|-f ", text)
    assert "torch==2.13.0" in CONSTRAINTS
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line) for line in CONSTRAINTS)
    assert not [line for line in CONSTRAINTS if "+cpu" in line or "+cu" in line]


def test_every_dependency_is_pinned_to_an_allowed_version() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = [
        Requirement(text)
        for text in (
            *project["dependencies"],
            *(text for extra in project["optional-dependencies"].values() for text in extra),
        )
    ]
    assert len(wanted) > 14

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = {plain(name): version for name, version in (line.split("==") for line in CONSTRAINTS)}
    for requirement in wanted:
        assert plain(requirement.name) in pins, requirement.name
        assert requirement.specifier.contains(Version(pins[plain(requirement.name)]))


SCRIPTS = tracked("*.sh", "*.sbatch", ".ci/run")
HEADED = [
    *(path for path in SCRIPTS if path.parent.name != ".ci"),
    *tracked("launch/*.yaml", "Dockerfile", "accelerate_config.yaml"),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_stop_at_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    text = script.read_text()
    if text.startswith("#!"):
        assert "set -euo pipefail" in text
        assert script.stat().st_mode & 0o100


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [shellcheck, "--external-sources", script]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


def test_every_script_is_checked() -> None:
    shell = subprocess.run(
        ["git", "grep", "-lE", "^#!.*sh$"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(shell) > 6
    assert {REPO / name for name in shell} <= {*SCRIPTS}


@pytest.mark.parametrize("path", HEADED, ids=lambda path: path.name)
def test_a_recipe_has_a_header(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#!")]
    assert lines[0].startswith("# "), path


@pytest.mark.parametrize("recipe", tracked("launch/slurm/*.sbatch"), ids=lambda path: path.name)
def test_the_command_in_a_slurm_recipe_has_flags_of_its_verb(recipe: Path) -> None:
    header = "\n".join(line[1:] for line in recipe.read_text().splitlines() if line[:2] == "# ")
    joined = re.sub(r"\\\n\s*", " ", header)
    commands = re.findall(rf"sbatch .*launch/slurm/{recipe.name} (.*?)\)?$", joined, re.MULTILINE)
    assert commands
    config = getattr(import_module(f"pipelines.{recipe.stem}"), f"{recipe.stem.capitalize()}Config")
    for flags in commands:
        parse(config, shlex.split(flags), recipe.stem)


DOCKERFILE = re.sub(r"\\\n\s*", " ", (REPO / "Dockerfile").read_text())


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def test_the_container_can_use_another_base_and_does_not_run_as_root() -> None:
    (base,) = instructions("ARG")
    assert base.startswith("BASE=")
    assert instructions("FROM") == ["${BASE}"]
    assert instructions("USER")
    assert instructions("USER")[-1] not in ("root", "0")
    assert instructions("ENTRYPOINT") == ['["unet"]']


def ignored(name: str) -> bool:
    """Whether .dockerignore excludes a file: the last matching rule decides."""
    decision = False
    for line in (REPO / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        rule = line.removeprefix("!").removeprefix("**/")
        parts = Path(name).parts
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(fnmatch.fnmatch(path, rule) for path in (*above, *parts * line.startswith("**/"))):
            decision = not line.startswith("!")
    return decision


def test_every_copied_file_reaches_the_builder() -> None:
    copied = [words[:-1] for words in map(shlex.split, instructions("COPY"))]
    names = {name for names in copied for name in names}
    assert {"pyproject.toml", "unet", "shards", "pipelines"} <= names
    for name in names:
        files = [str(path.relative_to(REPO)) for path in tracked(name)]
        assert files, f"{name} is not in the checkout"
        assert not [file for file in files if ignored(file)]


def test_no_private_file_reaches_the_builder() -> None:
    for name in (".git/config", ".venv/bin/python", "demo/run/metrics.jsonl", "wandb/x", ".env"):
        assert ignored(name)
    assert ignored("unet/__pycache__/model.cpython-311.pyc")
    assert not ignored("unet/model.py")
