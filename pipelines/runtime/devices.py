"""Starting on devices: one Accelerator, the precision, and the proof that all ranks are one job."""

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
"""Images or tiles of a forward pass on a GPU, which smaller ones leave idle between launches."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from malloc.h."""


def start(
    accumulate: int = 1,
    *,
    trackers: Sequence[str] = (),
    project_dir: Path | None = None,
    rank_timeout: float | None = None,
) -> Accelerator:
    """The Accelerator of this process.

    Process count and precision are the launcher's; without one, a GPU that has bf16 uses it. A
    process that computes on a CPU keeps the memory that it frees. `rank_timeout`: minutes that a
    rank waits for others; left out: the backend's own, for ranks that never meet.

    Raises UsageError where processes were started that do not know of each other, or that would
    have to share a GPU.
    """
    refuse_shared_gpus()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    # Gradients lie in the buckets that ranks exchange: no second copy, none of them copied there.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if rank_timeout is not None:
        # A millisecond more: Accelerate leaves out what equals NCCL's 10 minutes, and Gloo has 30.
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
            f"{world} processes were launched but each runs alone, {world} jobs side by side; "
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
    """bf16 where the GPU computes in it, else float32.

    V100 and T4 emulate it, without their matrix units.
    """
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def refuse_shared_gpus() -> None:
    """Raise UsageError where a launcher has started more processes here than there are GPUs.

    Accelerate would give a GPU to several ranks, and NCCL refuse that minutes later.
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
    """Make torch compute the same bits on the same GPU every time, or let it choose the fastest.

    Call it before CUDA starts: cuBLAS reads its variable only then.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if enabled != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled


def hold_memory() -> None:
    """Let this process keep what it frees, for what it allocates next (mallopt(3)).

    glibc gives large blocks back to the system at once and takes them anew, page by page, for each
    layer of each pass: on a CPU a sixth of a training step, half of some predictions. Elsewhere
    nothing happens.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def choose_batch_size(wanted: int | None, device: torch.device) -> int:
    """Images or tiles that a forward pass sees at once: where nobody said, 16 on CUDA GPUs."""
    return wanted or (GPU_BATCH_SIZE if device.type == "cuda" else BATCH_SIZE)


def choose_channels_last(wanted: bool | None, device: torch.device, *, compiled: bool) -> bool:
    """Whether maps are kept as [B, H, W, C] in memory: where nobody said, if it pays.

    It does in a compiled network on a CUDA GPU. Uncompiled, instance norm brings every map back to
    [B, C, H, W].
    """
    return (compiled and device.type == "cuda") if wanted is None else wanted
