"""Versions and devices of this machine: `environment.json` of a run folder."""

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipelines.runtime.run_folder import RunFolder
from shards.writer import write_json

PACKAGES = (
    *("unet-shards", "torch", "accelerate", "webdataset", "torchmetrics", "numpy", "pillow"),
    *("safetensors", "wandb"),
)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text file; none if it does not exist."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file


def write_environment(folder: RunFolder, accelerator: Accelerator) -> None:
    """Write RUN/environment.json. Call it on the main process."""
    write_json(folder.environment, describe_environment(accelerator))


def describe_environment(accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Describe versions and devices of this process, and its ranks if `accelerator` is given."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    plain: dict[str, Any] = {
        "gpus": gpus,
        "cpu": cpu_name(lines_of(Path("/proc/cpuinfo"))),
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "platform": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **dict(versions())},
    }
    if accelerator is not None:
        plain["ranks"] = accelerator.num_processes
        plain["device"] = accelerator.device.type
        plain["precision"] = accelerator.mixed_precision
    return plain


def cpu_name(cpuinfo: Iterable[str]) -> str:
    """Return the CPU model on Linux, elsewhere the architecture."""
    for line in cpuinfo:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def versions() -> Iterator[tuple[str, str]]:
    """Yield the versions of the packages that determine results."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            # Our own package, when run from its sources.
            continue
