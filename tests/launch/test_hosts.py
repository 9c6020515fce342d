"""launch/hosts.sh on several hosts: network namespaces connected by a switch."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
HOSTS = REPO / "launch" / "hosts.sh"
SWITCH, A, B = "10.213.0.1", "10.213.0.2", "10.213.0.3"
"""The switch has an address too, so that it can run the rendezvous."""

# Each test starts six processes or more that load torch.
pytestmark = [pytest.mark.hosts, pytest.mark.ranks, pytest.mark.timeout(900)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """Hosts A and B on a switch; the cable of each can be unplugged."""

    def __init__(self) -> None:
        tag = f"unet{os.getpid()}"
        self.names = {SWITCH: f"{tag}s", A: f"{tag}a", B: f"{tag}b"}

    def build(self) -> None:
        switch = self.names[SWITCH]
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "lan", "type", "bridge")
        ip("-n", switch, "link", "set", "lan", "up")
        ip("-n", switch, "address", "add", f"{SWITCH}/24", "dev", "lan")
        for address in (A, B):
            name, port = self.names[address], self.port(address)
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth7", "netns", name)
            ip("-n", switch, "link", "set", port, "master", "lan", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth7")
            ip("-n", name, "link", "set", "eth7", "up")

    def port(self, address: str) -> str:
        return f"to{address[-1]}"

    def cable(self, address: str, state: str) -> None:
        """Silently drop packets to and from a host (`down`), or deliver them again (`up`)."""
        ip("-n", self.names[SWITCH], "link", "set", self.port(address), state)

    def remove(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2")
    network = Network()
    try:
        network.build()
    except subprocess.CalledProcessError as error:
        network.remove()
        pytest.skip(f"needs permission to create network namespaces (root): {error.stderr.strip()}")
    yield network
    network.remove()


class Host:
    """launch/hosts.sh running on a host, and its log."""

    def __init__(
        self, network: Network, address: str, log: Path, *arguments: object, **environment: str
    ) -> None:
        self.log = log
        # There is no name server here, and lookups would take long to fail.
        within = 'mount --bind /dev/null /etc/resolv.conf; exec "$@"'
        command = ["ip", "netns", "exec", network.names[address], "sh", "-c", within, "-"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, HOSTS, *map(str, arguments)],
                cwd="/",
                env={
                    **os.environ,
                    "PYTHONPATH": str(REPO),
                    "ACCELERATE_USE_CPU": "true",
                    "PET_NPROC_PER_NODE": "1",
                    # Shorter timeouts than in production.
                    "PET_RDZV_CONF": "keep_alive_interval=1,last_call_timeout=3",
                    **environment,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def has_printed(self, words: str) -> bool:
        return words in self.output

    def line(self, words: str) -> str:
        """Return the only line with these words."""
        (line,) = [line for line in self.output.splitlines() if words in line]
        return line


@pytest.fixture
def host(
    network: Network, tmp_path: Path, kill: Callable[..., None]
) -> Iterator[Callable[..., Host]]:
    """Starts launch/hosts.sh on a host; kills what still runs at the end of the test."""
    started: list[Host] = []

    def start(address: str, *arguments: object, **environment: str) -> Host:
        log = tmp_path / f"{len(started)}-{address}.log"
        started.append(Host(network, address, log, *arguments, **environment))
        return started[-1]

    yield start
    for address in (A, B):
        network.cable(address, "up")
    for one in started:
        if one.process.poll() is None:
            kill(one.process)
        # Shown if the test fails.
        lines = [line for line in one.output.splitlines() if "%  step" not in line]
        print(f"---- {one.log.name}: {one.process.returncode}", *lines, sep="\n")


@pytest.fixture
def train_flags(shards: Path, tiny: tuple[str, ...]) -> Callable[..., list[object]]:
    def make(run_dir: Path, steps: int, *more: object) -> list[object]:
        often = ("--log-every", 1, "--save-every", 25, "--eval-every", 1_000_000)
        # Makes the weights independent of the length of the run.
        constant = ("--optim.schedule", "constant", "--optim.warmup", 0)
        return [
            *("--data", shards, "--run-dir", run_dir, *tiny, "--workers", 0, "--steps", steps),
            *("--tracking.pictures", 0, *often, *constant, *more),
        ]

    return make


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of the complete lines of metrics.jsonl."""
    log = run_dir / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


@pytest.fixture
def reaches(wait_for: Callable[..., Any]) -> Callable[..., int]:
    """Waits until a run has reached a step; returns its current step."""

    def wait(run_dir: Path, step: int) -> int:
        def at() -> int:
            logged = losses(run_dir)
            return logged[-1][0] if logged and logged[-1][0] >= step else 0

        return wait_for(at, f"step {step}", seconds=200)

    return wait


def ranks(run_dir: Path) -> int:
    """Return the current number of ranks of a run."""
    return json.loads((run_dir / "environment.json").read_text())["ranks"]


def test_losses_equal_those_of_an_uninterrupted_run_after_a_host_died_and_returned(
    host: Callable[..., Host], train_flags, reaches, launch, kill, tmp_path: Path
) -> None:
    resumed, uninterrupted, steps = tmp_path / "resumed", tmp_path / "uninterrupted", 300
    a, b = (host(address, A, 2, *train_flags(resumed, steps)) for address in (A, B))
    reaches(resumed, 30)
    kill(b.process)
    b = host(B, A, 2, *train_flags(resumed, steps))
    assert a.process.wait(timeout=300) == 0
    assert b.process.wait(timeout=60) == 0
    assert "another rank exited or is unreachable" in a.line("unet train: ")
    assert ranks(resumed) == 2
    ended = launch(2, "train", *train_flags(uninterrupted, steps))
    assert ended.code == 0, ended.err
    assert losses(resumed) == losses(uninterrupted)
    assert len(losses(uninterrupted)) == steps
    assert json.loads((resumed / "state.json").read_text())["finished"]


def test_any_host_may_be_lost_if_another_machine_runs_the_rendezvous(
    host: Callable[..., Host], train_flags, reaches, wait_for, kill, tmp_path: Path
) -> None:
    run_dir, endless = tmp_path / "run", 1_000_000
    host(SWITCH, SWITCH, "keep")
    flags = train_flags(run_dir, endless)
    running = {address: host(address, SWITCH, "1:2", *flags) for address in (A, B)}
    reaches(run_dir, 30)
    assert ranks(run_dir) == 2
    # Both in turn: one of them has rank 0.
    for lost, left in ((A, B), (B, A)):
        before = len(running[left].output)
        kill(running[lost].process)
        wait_for(lambda: ranks(run_dir) == 1, "that the other host resumes alone", 200)
        assert "another rank has ended" in running[left].output[before:]
        at = losses(run_dir)[-1][0]
        reaches(run_dir, at + 30)
        running[lost] = host(lost, SWITCH, "1:2", *flags)
        wait_for(lambda: ranks(run_dir) == 2, "that the lost host is readmitted", 200)
        assert "interrupted at step" in running[left].output[before:]
        reaches(run_dir, losses(run_dir)[-1][0] + 30)
    # Read once, since the run continues.
    steps = [step for step, _ in losses(run_dir)]
    assert steps == [*range(1, len(steps) + 1)]


def test_a_host_that_is_cut_off_is_abandoned_and_rejoins_by_itself(
    host: Callable[..., Host], train_flags, reaches, wait_for, network: Network, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    flags = train_flags(run_dir, 1_000_000, "--rank-timeout", 0.5)
    a, b = (host(address, A, "1:2", *flags) for address in (A, B))
    at = reaches(run_dir, 30)
    network.cable(B, "down")
    for one in (a, b):
        wait_for(partial(one.has_printed, "--rank-timeout"), "that a rank exits with the reason")
        assert "is late by more than --rank-timeout" in one.output
        assert "Traceback" not in one.output
    wait_for(lambda: ranks(run_dir) == 1, "that the other host resumes alone")
    reaches(run_dir, at + 100)
    network.cable(B, "up")
    wait_for(lambda: ranks(run_dir) == 2, "that the host is readmitted", seconds=200)
    reaches(run_dir, losses(run_dir)[-1][0] + 30)
    assert a.process.poll() is None
    assert b.process.poll() is None


def test_without_restarts_a_host_that_is_cut_off_ends_the_job(
    host: Callable[..., Host], train_flags, reaches, network: Network, tmp_path: Path
) -> None:
    flags = train_flags(tmp_path / "run", 1_000_000, "--rank-timeout", 0.5)
    a, b = (host(address, A, 2, *flags, PET_MAX_RESTARTS="0") for address in (A, B))
    reaches(tmp_path / "run", 30)
    network.cable(B, "down")
    assert a.process.wait(timeout=120) == 1
    assert "is late by more than --rank-timeout" in a.line("unet train: ")
    network.cable(B, "up")
    assert b.process.wait(timeout=200) == 1
    assert "is late by more than --rank-timeout" in b.line("unet train (rank 1): ")
