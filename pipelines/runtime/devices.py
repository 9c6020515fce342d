"""Devices: the Accelerator, its precision, and a check that all ranks belong to one job."""

import ctypes
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env

from pipelines.runtime.errors import UsageError
from unet.tiling import BATCH_SIZE

GPU_BATCH_SIZE = 16
"""Default number of images or tiles per forward pass on a GPU; fewer leave it idle between kernel
launches."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from malloc.h."""


def start(
    accumulate: int = 1,
    *,
    trackers: Sequence[str] = (),
    project_dir: Path | None = None,
    rank_timeout: float | None = None,
) -> Accelerator:
    """Create the Accelerator of this process.

    The launcher sets process count and precision; without one, a GPU or CPU that computes in bf16
    uses it. On a CPU, the process keeps freed memory.

    Args:
        accumulate: passes per optimizer step.
        trackers: names of Accelerate's trackers.
        project_dir: folder in which trackers write.
        rank_timeout: minutes that a rank waits for the others in a collective; None: the default
            of the backend, for ranks that never wait.

    Raises:
        UsageError: the processes were not connected to one job, or would share a GPU.
    """
    refuse_shared_gpus()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    # Gradients are views of the buckets that DDP reduces: no second copy in memory.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if rank_timeout is not None:
        # A millisecond more: Accelerate ignores a timeout equal to NCCL's default, 10 minutes, and
        # the default of Gloo is 30.
        timeout = timedelta(minutes=rank_timeout, milliseconds=1)
        handlers.append(InitProcessGroupKwargs(timeout=timeout))
    accelerator = Accelerator(
        mixed_precision=None if launched else native_precision(),
        gradient_accumulation_steps=accumulate,
        log_with=list(trackers) or None,
        project_dir=project_dir,
        kwargs_handlers=handlers,
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UsageError(
            f"{world} processes were launched, but each would run a job of its own; "
            "without GPUs set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        )
    if accelerator.device.type == "cpu":
        hold_memory()
    return accelerator


def refuse_rank_timeout(minutes: float) -> None:
    """Raise ValueError unless `--rank-timeout` is a number above 0."""
    if not 0 < minutes < inf:
        raise ValueError(f"--rank-timeout must be a number > 0, got {minutes}")


def native_precision() -> Literal["bf16", "no"]:
    """Return bf16 if the device computes in it natively, else no (float32).

    V100 and T4 only emulate it, without tensor cores. CPUs with AVX512_BF16 and AMX make
    1.6 times the steps in it (tests/benchmarks). It depends on what the device can do
    and not on a timing, so that a resumed run continues in the same precision.
    """
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "no"


def refuse_shared_gpus() -> None:
    """Raise UsageError if more processes were launched on this machine than it has GPUs.

    Accelerate would assign one GPU to several ranks, which NCCL refuses minutes later.
    """
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > gpus:
        world = int(os.environ.get("WORLD_SIZE", local))
        have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UsageError(
            f"--num_processes {world}: this machine has {have}, but {local} processes were "
            "launched on it; run accelerate launch with --num_processes "
            f"{world // local * gpus}"
        )


def use_deterministic(enabled: bool) -> None:
    """Enable or disable deterministic algorithms: bit-identical results on the same GPU.

    Must be called before CUDA is initialised: cuBLAS reads its environment variable only then.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if enabled != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled


def hold_memory() -> None:
    """Make malloc keep freed memory for later allocations (mallopt(3)); no effect outside glibc.

    By default, glibc returns large blocks to the system at once and faults them in again, page by
    page, for each layer: a sixth of the time of a training step on a CPU, half of some predictions.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def choose_batch_size(wanted: int | None, device: torch.device) -> int:
    """Return the number of images or tiles per forward pass; default: 16 on CUDA GPUs, else 4."""
    return wanted or (GPU_BATCH_SIZE if device.type == "cuda" else BATCH_SIZE)


def choose_channels_last(wanted: bool | None, device: torch.device, *, compiled: bool) -> bool:
    """Return whether to keep feature maps channels-last; default: for compiled CUDA networks only.

    Without compilation, instance norm converts every map back to contiguous [B, C, H, W].
    """
    return (compiled and device.type == "cuda") if wanted is None else wanted
