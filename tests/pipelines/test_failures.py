"""`runtime.failures`, `runtime.errors`.

What torch raises about the machine ends in one line that names the remedy; ranks leave.
"""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C import _DistBackendError, _DistStoreError
from torch._dynamo.exc import TorchDynamoException

from pipelines.runtime import failures
from pipelines.runtime.command import run_command
from pipelines.runtime.errors import REFUSED, RunError
from pipelines.runtime.failures import (
    describe,
    is_out_of_memory,
    leave_process_group,
    summarise_error,
)

REPO = Path(__file__).resolve().parents[2]

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."),
    torch.OutOfMemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find an engine to execute this computation"),
]
DUPLICATE = _DistBackendError(
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, invalid usage (run with "
    "NCCL_DEBUG=WARN for details), NCCL version 2.20.5\nncclInvalidUsage: This usually reflects "
    "invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both "
    "on CUDA device 10"
)
UNHANDLED = _DistBackendError(
    "NCCL error in: NCCLUtils.hpp:275, unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
    ", NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 2 'out of memory'"
)
REMOTE = _DistBackendError(
    "NCCL error in: NCCLUtils.hpp:275, remote process exited or there was a network error, NCCL "
    "version 2.20.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer"
)
ASSERTED = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported "
    "at some other API call, so the stacktrace below might be incorrect.\n\nFor debugging ..."
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_is_recognised_in_all_its_words(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    assert describe(error).startswith("the GPU is out of memory (")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError(ASSERTED),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        MemoryError("out of memory"),
        OSError("out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "problem", "remedy"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a data loading worker died (DataLoader worker (pid 7) is killed by signal",
            "if memory ran out, lower --workers",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "a data loading worker died (DataLoader worker (pid(s) 7, 8) exited unexpectedly)",
            "rerun the same command",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                "dataloader's workers are out of shared memory. Please try to raise your shared "
                "memory limit."
            ),
            "a data loading worker died: shared memory (/dev/shm) is full",
            "docker run --shm-size 8g",
        ),
        (
            DUPLICATE,
            "two ranks use the same GPU (Duplicate GPU detected : rank 1 and rank 0 both on",
            "--num_processes",
        ),
        (UNHANDLED, "NCCL failed (Cuda failure 2 'out of memory')", "NCCL_DEBUG=WARN"),
        (
            REMOTE,
            "another rank exited or is unreachable (socketProgress: Connection closed",
            "see its last message for the cause",
        ),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            "another rank exited or is unreachable ([../gloo/transport",
            "see its last message for the cause",
        ),
        (
            _DistStoreError("wait timeout after 60000ms, timed out"),
            "another rank exited or is unreachable, or did not answer within --rank-timeout",
            "see its last message for the cause",
        ),
        (
            torch.AcceleratorError(ASSERTED),
            "the GPU failed (CUDA error: device-side assert triggered); rerun",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (RuntimeError(ASSERTED), "the GPU failed (CUDA error: device", "CUDA_LAUNCH_BLOCKING=1"),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
            "the GPU failed (cuDNN error: CUDNN_STATUS_EXECUTION_FAILED)",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (
            TorchDynamoException(
                "backend='inductor' raised:\nRuntimeError: Failed to find C compiler. Please "
                "specify via CC environment variable.\n\nSet TORCHDYNAMO_VERBOSE=1 for ..."
            ),
            "--compile: torch.compile failed (backend='inductor' raised: RuntimeError: Failed to "
            "find C compiler. Please specify via CC environment variable.)",
            "apt-get install g++ python3-dev",
        ),
        (
            TorchDynamoException("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "the GPU is out of memory (CUDA out of memory.",
            "nvidia-smi",
        ),
        (
            RuntimeError(
                "upsample_bilinear2d_backward_out_cuda does not have a deterministic "
                "implementation, but you set 'torch.use_deterministic_algorithms(True)'."
            ),
            "--deterministic: upsample_bilinear2d_backward_out_cuda does not have a determin",
            "run without it",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_each_known_error_has_a_line_with_its_remedy(
    error: RuntimeError, problem: str, remedy: str
) -> None:
    line = describe(error)
    assert line is not None
    assert line.startswith(problem)
    assert remedy in line
    assert "\n" not in line


def test_an_unknown_error_keeps_its_traceback() -> None:
    assert describe(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("variable", "error"),
    [
        ("CUDA_LAUNCH_BLOCKING", RuntimeError(ASSERTED)),
        ("TORCHDYNAMO_VERBOSE", TorchDynamoException("backend='inductor' raised")),
    ],
)
def test_who_asked_torch_for_the_traceback_gets_it(
    variable: str, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert describe(error) is not None
    monkeypatch.setenv(variable, "1")
    assert describe(error) is None


def test_a_long_message_is_cut_and_an_empty_one_has_a_name() -> None:
    assert summarise_error(RuntimeError("one\ntwo")) == "one"
    assert summarise_error(RuntimeError("\none raised:\n  two\nthree")) == "one raised: two"
    assert summarise_error(RuntimeError("one:")) == "one:"
    assert summarise_error(RuntimeError("x" * 1000)) == "x" * 200
    assert summarise_error(torch.OutOfMemoryError()) == "OutOfMemoryError"


@dataclass(frozen=True)
class Nothing:
    """No settings."""


def failing(error: Exception) -> int:
    def run(config: Nothing) -> int:
        raise error

    return run_command(Nothing, run, [], "train")


def test_a_known_error_ends_a_command_with_1_and_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing(torch.AcceleratorError(ASSERTED)) == REFUSED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("unet train: the GPU failed (CUDA error: device-side assert")
    assert printed.err.count("\n") == 1


def test_an_unknown_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_compiling_without_a_compiler_names_what_is_missing(
    shards: Path, tiny, tmp_path: Path
) -> None:
    given = ["--data", shards, "--run-dir", tmp_path / "run", *tiny, "--workers", 0, "--compile"]
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.train", *map(str, given), "--steps", "1"],
        cwd=REPO,
        env={
            **{name: value for name, value in os.environ.items() if name not in ("CC", "CXX")},
            "PATH": str(tmp_path),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == REFUSED, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        "unet train: --compile: torch.compile failed (InvalidCxxCompiler: No working C++ compiler"
    )
    assert "apt-get install g++ python3-dev" in ended.stderr


# ---- leaving the other ranks


def pretend_group(monkeypatch: pytest.MonkeyPatch, destroy: object) -> None:
    state = SimpleNamespace(destroy_process_group=destroy)
    module = SimpleNamespace(is_initialized=lambda: True, PartialState=lambda: state)
    monkeypatch.setitem(sys.modules, "accelerate.state", module)


def test_a_command_that_fails_destroys_its_process_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    destroyed: list[str] = []
    pretend_group(monkeypatch, lambda: destroyed.append(capsys.readouterr().err))
    assert failing(RunError("step 3: loss not finite")) == REFUSED
    # After its line, which matters more.
    assert destroyed == ["unet train: step 3: loss not finite\n"]


def test_a_group_that_cannot_be_left_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(failures, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", codes.append)
    pretend_group(monkeypatch, lambda: time.sleep(1))
    leave_process_group(1)
    assert codes == [1]


def test_who_has_no_group_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", pytest.fail)
    monkeypatch.delitem(sys.modules, "accelerate.state", raising=False)
    leave_process_group(1)
    module = SimpleNamespace(is_initialized=lambda: False, PartialState=pytest.fail)
    monkeypatch.setitem(sys.modules, "accelerate.state", module)
    leave_process_group(1)


FAILING_RANK = """
import sys, time
from dataclasses import dataclass
import torch
from pipelines.runtime.command import RunError, run_command
from pipelines.runtime.devices import start

@dataclass(frozen=True)
class Nothing:
    '''No settings.'''

def run(config):
    accelerator = start(rank_timeout=1)
    accelerator.wait_for_everyone()
    if accelerator.process_index:
        print("met", flush=True)
        time.sleep(100)
    raise RunError("step 3: loss not finite")

code = run_command(Nothing, run, [], "train")
print("initialized:", torch.distributed.is_initialized())
sys.exit(code)
"""


@pytest.mark.ranks
def test_a_rank_that_fails_leaves_one_that_hangs() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}

    def rank(number: int) -> subprocess.Popen[str]:
        environment = {**about, "RANK": number, "LOCAL_RANK": number, "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(
            [sys.executable, "-c", FAILING_RANK],
            cwd=REPO,
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    ranks = [rank(0), rank(1)]
    try:
        out, err = ranks[0].communicate(timeout=60)
        assert ranks[1].poll() is None
        assert ranks[0].returncode == REFUSED
        assert out == "initialized: False\n"
        assert err.endswith("unet train: step 3: loss not finite\n")
        assert "Traceback" not in err
    finally:
        ranks[1].kill()
        ranks[1].communicate()
