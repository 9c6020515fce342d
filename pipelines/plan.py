"""`unet plan`: choose the settings of a run for a data set, this device and a number of minutes."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.model.build import ModelConfig, choose_crop_size
from pipelines.planning.facts import gather_facts
from pipelines.planning.plan_file import format_plan, format_trial, read_trial
from pipelines.planning.settings import MIN_STEPS, Setting, choose_settings
from pipelines.planning.trial import TRIAL_VERSION, Stopwatch, Trial
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import start
from pipelines.runtime.environment import cpu_name, lines_of
from pipelines.runtime.errors import UsageError
from pipelines.runtime.outputs import require_writable_file, write_result
from pipelines.training.options import GLOBAL_BATCH_SIZE
from shards.images.memory import measure_free, parse_memory
from shards.manifest import Manifest, read_manifest

FREE_SHARE = 0.8
"""Default of --memory, of what is free: the rest is for decoding, validation and the libraries."""
FEWEST_STEPS = MIN_STEPS / 2
"""Wider networks are not tried once fewer steps than this fit into the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Choose the settings of a run for a data set, this device and a number of minutes.

    Reads the manifest and up to 64 images and masks, times a few steps of networks of increasing
    width, and writes the settings as YAML, with a reason on every line. Then: unet train --config
    plan.yaml
    """

    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    minutes: float
    """Minutes that the run may train."""
    memory: str | None = None
    """Memory that a step may take, such as 24GiB: of the GPU, or of the process on a CPU. Default:
    80 % of what is free."""
    run_dir: Path = Path("run")
    """Run folder that the plan names."""
    out: Path = Path("plan.yaml")
    """File to write. Timings are recorded beside it, as .json."""
    timings: Path | None = None
    """The .json of another plan for the same data set: take its timings, so that the plan is
    reproduced, or made for other minutes, without the device."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"--minutes must be > 0, got {self.minutes}")
        if self.memory is not None:
            parse_memory(self.memory, "--memory")
        if self.memory is not None and self.timings is not None:
            raise ValueError("--memory has no effect with --timings, which were taken within one")
        if self.out.suffix not in (".yaml", ".yml"):
            raise ValueError(f"--out must end in .yaml, got {self.out}")


def run(config: PlanConfig) -> int:
    """Make the plan, write it, and print it with the command that trains by it."""
    require_writable_file("--out", config.out)
    manifest = read_manifest(config.data, "--data")
    facts = gather_facts(config.data, manifest)
    trial = time_device(config, manifest) if config.timings is None else read_trial(config.timings)
    if trial.manifest != manifest.digest:
        raise UsageError(
            f"--timings {config.timings} are of another data set than {config.data}; make a plan "
            "without --timings"
        )
    settings = [
        Setting("data", config.data, f"{facts.train:,} images for training"),
        Setting("run_dir", str(config.run_dir), "or another: --run-dir RUN"),
        *choose_settings(facts, trial.timings, config.minutes),
    ]
    header = [
        shlex.join(["unet", "plan", "--data", config.data, "--minutes", f"{config.minutes:g}"]),
        shlex.join(["unet", "train", "--config", str(config.out)]),
    ]
    plan, record = format_plan(header, settings, trial), config.out.with_suffix(".json")
    print(plan.decode(), end="")
    changed = write_result(config.out, plan)
    print(f"{config.out}{changed}, {record}{write_result(record, format_trial(trial))}")
    print(f"next: {shlex.join(['unet', 'train', '--config', str(config.out)])}")
    return 0


def time_device(config: PlanConfig, manifest: Manifest) -> Trial:
    """Time steps on the GPU, or without one on the CPU.

    Raises UsageError in a job of several processes, RunError if nothing fits into the memory.
    """
    accelerator = start()
    if accelerator.num_processes > 1:
        raise UsageError("unet plan times one device; run it without accelerate launch")
    device = accelerator.device
    preset = "small" if device.type == "cpu" else "modern"
    stopwatch = Stopwatch(
        accelerator,
        manifest,
        choose_crop_size(ModelConfig(preset=preset), None, manifest),
        GLOBAL_BATCH_SIZE[preset],
        limit_memory(config, device),
    )
    print(f"timing {describe_device(device)}", file=sys.stderr)
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    slowest = 60 * config.minutes / FEWEST_STEPS
    timings = tuple(stopwatch.time_widths(slowest))
    return Trial(TRIAL_VERSION, manifest.digest, describe_device(device), precision, timings)


def limit_memory(config: PlanConfig, device: torch.device) -> int:
    """Return the bytes that a step may take, and hold a GPU to them."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        free = total = measure_free()
    if config.memory is None:
        limit = int(FREE_SHARE * free)
    else:
        limit = parse_memory(config.memory, "--memory")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return limit


def describe_device(device: torch.device) -> str:
    """Name a device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name(lines_of(Path('/proc/cpuinfo')))}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(PlanConfig, run, argv, "plan")


if __name__ == "__main__":
    sys.exit(main())
