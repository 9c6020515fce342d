"""`runtime.devices`: what starting on a device changes in the process."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedDataParallelKwargs

from pipelines.runtime import devices
from pipelines.runtime.devices import start
from pipelines.runtime.errors import UsageError
from pipelines.training import passes, setup

FAULTS = """
import resource, torch
from pipelines.runtime.devices import hold_memory
hold_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere it does nothing")
def test_memory_of_one_forward_pass_serves_the_next() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    first, *later = map(int, done.stdout.split())
    # 128 MiB are 32,768 pages, unless those are huge. A block taken from the middle of what is
    # kept leaves too little beside it, so that the heap grows once or twice more.
    assert sum(later) < len(later) * first / 4


def test_gradients_of_several_ranks_lie_in_the_buckets_that_they_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stand_in(**named: Any) -> SimpleNamespace:
        return SimpleNamespace(num_processes=1, device=torch.device("cpu"), **named)

    monkeypatch.setattr(devices, "Accelerator", stand_in)
    (handler,) = start().kwargs_handlers  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(handler, DistributedDataParallelKwargs)
    assert handler.to_kwargs() == {"gradient_as_bucket_view": True}


TIMEOUT = """
import sys, torch
from pipelines.runtime.devices import start
start(rank_timeout=float(sys.argv[1]))
group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
print(group.options._timeout.total_seconds())
"""


@pytest.mark.ranks
@pytest.mark.parametrize("minutes", [0.5, 10])
def test_ranks_wait_for_each_other_for_the_given_minutes(minutes: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TIMEOUT, str(minutes)],
            env={
                **os.environ,
                "ACCELERATE_USE_CPU": "true",
                **{name: str(value) for name, value in about.items()},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [round(float(text)) for text in outputs] == [60 * minutes] * 2


# ---- a GPU that this machine need not have


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """CUDA with so many GPUs, and what a launcher would set."""

    def make(gpus: int, **environment: object) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return make


@pytest.mark.parametrize(
    ("gpus", "local", "world", "line"),
    [
        (1, 8, 8, "--num_processes 8: this machine has 1 GPU, but 8 processes were launched on"),
        (1, 8, 8, "run accelerate launch with --num_processes 1$"),
        (4, 8, 8, "this machine has 4 GPUs, .* with --num_processes 4$"),
        (4, 8, 16, "^--num_processes 16: this machine has 4 GPUs, .* with --num_processes 8$"),
    ],
)
def test_more_processes_than_gpus_are_refused_before_they_meet(
    gpus: int, local: int, world: int, line: str, pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(gpus, LOCAL_WORLD_SIZE=local, WORLD_SIZE=world)
    monkeypatch.setattr(devices, "Accelerator", pytest.fail)
    with pytest.raises(UsageError, match=line):
        devices.start()


@pytest.mark.parametrize(
    ("gpus", "environment"),
    [
        (8, {"LOCAL_WORLD_SIZE": 8, "WORLD_SIZE": 16}),
        (1, {}),
        (0, {"LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2}),
        (1, {"LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "ACCELERATE_USE_CPU": "true"}),
    ],
)
def test_processes_with_a_gpu_each_or_none_are_not_refused(
    gpus: int, environment: dict[str, object], pretend
) -> None:
    pretend(gpus, **environment)
    devices.refuse_shared_gpus()


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
def test_a_bare_start_takes_bf16_where_the_gpu_does_not_emulate_it(
    native: bool, expected: str, pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(1)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert devices.native_precision() == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
@pytest.mark.parametrize(("gpus", "environment"), [(0, {}), (1, {"ACCELERATE_USE_CPU": "true"})])
def test_a_bare_start_on_a_cpu_takes_bf16_where_it_is_native(
    gpus: int,
    environment: dict[str, str],
    native: bool,
    expected: str,
    pretend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(gpus, **environment)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert devices.native_precision() == expected


# ---- determinism


@pytest.fixture
def undeterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    devices.use_deterministic(False)


def settings() -> tuple[bool, bool, str | None]:
    cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    cudnn = torch.backends.cudnn.deterministic
    return torch.are_deterministic_algorithms_enabled(), cudnn, cublas


@pytest.mark.usefixtures("undeterministic")
def test_determinism_reaches_torch_cudnn_and_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    devices.use_deterministic(False)
    assert settings() == (False, False, None)
    devices.use_deterministic(True)
    assert settings() == (True, True, ":4096:8")
    devices.use_deterministic(False)
    assert settings()[:2] == (False, False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    devices.use_deterministic(True)
    assert settings() == (True, True, ":16:8")


@pytest.mark.usefixtures("undeterministic")
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_training_is_deterministic_where_that_is_asked_for(
    deterministic: bool, shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, benchmarks = [], []
    original_start, surround = setup.start, passes.TrainingPass.__call__

    def noting_start(*given: object, **more: object) -> object:
        # cuBLAS reads its variable when CUDA starts.
        found.append(settings())
        return original_start(*given, **more)

    def noting_pass(self: passes.TrainingPass, step: int) -> object:
        found.append(settings())
        benchmarks.append(self.benchmark)
        return surround(self, step)

    monkeypatch.setattr(setup, "start", noting_start)
    monkeypatch.setattr(passes.TrainingPass, "__call__", noting_pass)
    given = ("--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0, "--steps", 2)
    # Bilinear upsampling has no deterministic backward of its own on GPUs; torch replaces it.
    more = ("--model.up", "bilinear", "--deterministic" if deterministic else "--no-deterministic")
    ended = call("train", *given, *more)
    assert ended.code == 0, ended.err
    expected = (True, True, ":4096:8") if deterministic else (False, False, None)
    # At the start; each of two steps has a pass, and another block around its average.
    assert found == [expected] * 5
    assert benchmarks == [not deterministic] * 4
