"""Starting on devices: one Accelerator, the precision, and the proof that all ranks are one job."""

import ctypes
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from pipelines.config import UsageError

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

    Raises UsageError where processes were started that do not know of each other.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    handlers = []
    if rank_timeout is not None:
        # A millisecond more: Accelerate leaves out what equals NCCL's 10 minutes, and Gloo has 30.
        timeout = timedelta(minutes=rank_timeout, milliseconds=1)
        handlers.append(InitProcessGroupKwargs(timeout=timeout))
    accelerator = Accelerator(
        mixed_precision=None if launched else ("bf16" if has_bf16 else "no"),
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


def hold_memory() -> None:
    """Let this process keep what it frees, for what it allocates next (mallopt(3)).

    glibc gives large blocks back to the system at once and takes them anew, page by page, for each
    layer of each pass: on a CPU a sixth of a training step, half of some predictions. Elsewhere
    nothing happens.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
