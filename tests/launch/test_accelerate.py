"""The Accelerate configurations: Accelerate's parser accepts them, and their commands run."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from pipelines.runtime.command import parse
from pipelines.training.options import TrainConfig

REPO = Path(__file__).resolve().parents[2]
CPU, ONE_GPU, TWO_MACHINES = (
    f"launch/accelerate/{name}.yaml" for name in ("cpu", "one_gpu", "two_machines")
)
ALL = ("accelerate_config.yaml", CPU, ONE_GPU, TWO_MACHINES)


def resolve(*arguments: str) -> Namespace:
    """Resolve the arguments of `accelerate launch`, configuration file included."""
    parsed = launch_command_parser().parse_args(arguments)
    return _validate_launch_command(parsed)[0]


def header_commands(name: str) -> list[list[str]]:
    """Return the commands in a file's header, starting after `launch`."""
    lines = [line[1:] for line in (REPO / name).read_text().splitlines() if line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    commands = [shlex.split(line) for line in joined if re.search(r"accelerate launch .*-m ", line)]
    return [words[words.index("launch") + 1 :] for words in commands]


def test_every_configuration_is_tested() -> None:
    existing = {str(path.relative_to(REPO)) for path in (REPO / "launch" / "accelerate").iterdir()}
    assert existing == set(ALL[1:])


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines", "precision"),
    [
        ("accelerate_config.yaml", "MULTI_GPU", 8, 1, "bf16"),
        (CPU, "MULTI_GPU", 2, 1, "no"),
        (ONE_GPU, "NO", 1, 1, "bf16"),
        (TWO_MACHINES, "MULTI_GPU", 16, 2, "bf16"),
    ],
)
def test_accelerate_reads_a_configuration_as_its_header_describes(
    name: str, kind: str, processes: int, machines: int, precision: str
) -> None:
    config = load_config_from_file(str(REPO / name))
    assert config.distributed_type == kind
    assert config.use_cpu == (name == CPU)
    resolved = resolve("--config_file", str(REPO / name), "-m", "pipelines.train")
    assert (resolved.num_processes, resolved.num_machines) == (processes, machines)
    assert resolved.mixed_precision == precision
    assert resolved.multi_gpu == (kind == "MULTI_GPU")


@pytest.mark.parametrize("name", ALL)
def test_the_commands_in_a_header_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    commands = header_commands(name)
    assert commands
    assert any(name in words for words in commands)
    for words in commands:
        resolved = resolve(*words)
        assert (resolved.module, resolved.training_script) == (True, "pipelines.train")
        assert parse(TrainConfig, resolved.training_script_args, "train").run_dir == Path("RUN")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *map(str, arguments),
        ],
        cwd=REPO,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(run_dir: Path) -> int:
    """Return the number of ranks of a finished run."""
    assert json.loads((run_dir / "state.json").read_text())["finished"]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["device"] == "cpu"
    return environment["ranks"]


@pytest.fixture
def training(shards: Path, tiny: tuple[str, ...], tmp_path: Path) -> tuple[object, ...]:
    """Arguments of `accelerate launch` for a training of two steps."""
    flags = ("--data", shards, "--run-dir", tmp_path / "run", "--workers", 0, "--steps", 2)
    return ("-m", "pipelines.train", *flags, *tiny)


@pytest.mark.ranks
def test_the_configuration_for_cpus_trains_one_run_on_two_ranks(
    training: tuple[object, ...], port: int, tmp_path: Path
) -> None:
    arguments = ("--config_file", CPU, "--main_process_port", port, *training)
    process = launch(*arguments, ACCELERATE_USE_CPU="true")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("finished at step 2") == 1
    assert ranks_of(tmp_path / "run") == 2


@pytest.mark.ranks
def test_the_configuration_for_cpus_without_its_variable_is_refused(
    training: tuple[object, ...], port: int, tmp_path: Path
) -> None:
    process = launch("--config_file", CPU, "--main_process_port", port, *training)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "set ACCELERATE_USE_CPU=true" in err
    assert not (tmp_path / "run" / "state.json").exists()


@pytest.mark.ranks
def test_the_configuration_for_two_machines_joins_two_launchers_into_one_run(
    training: tuple[object, ...], port: int, tmp_path: Path
) -> None:
    # These machines have no GPU and one rank each.
    overrides = ("--num_processes", 2, "--mixed_precision", "no", "--main_process_port", port)
    machines = [
        launch(
            *("--config_file", TWO_MACHINES, "--machine_rank", rank, *overrides),
            *("--main_process_ip", "127.0.0.1", *training),
            ACCELERATE_USE_CPU="true",
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=200) for process in machines]
    assert [process.returncode for process in machines] == [0, 0], outputs
    assert [out.count("finished at step 2") for out, _ in outputs] == [1, 0]
    assert ranks_of(tmp_path / "run") == 2
