"""Cost of a checkpoint for the steps around it: written synchronously, and in the background.

    python tests/benchmarks/saving.py --work DIR
    python tests/benchmarks/saving.py --work DIR --device cuda --side 512 --batch 8

Real training steps (forward, backward, AdamW, average of the weights) of the network alone, on one
batch in memory, and checkpoints as `unet train` saves them: `modern` has a training state of 500 MB
and, with the weights for inference, a checkpoint of 620 MB. `synchronous` waits for each write;
`background` does not.

The slow disk is simulated: before each file is flushed (fsync), the writing thread sleeps for as
long as a disk with --disk MB/s would take for its bytes. This takes no CPU time, like waiting for a
disk. `as is` is the disk of DIR.

Each contender saves `--saves` times, each time after at least `--steps` steps and once the previous
write is complete. The first save, which allocates the host memory, has its own column. After each
write, the saved weights are compared bit by bit with those at the time of the save.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch
from packing import row

from pipelines.runtime.devices import hold_memory
from pipelines.runtime.run_folder import RunFolder
from pipelines.training import checkpoints as checkpoint_files
from pipelines.training.checkpoints import Checkpoints, TrainState
from pipelines.training.optim import Learner, OptimConfig, build_learner
from pipelines.training.snapshot import TRAINING
from unet import UNet

MODES = ("synchronous", "background")


@dataclass(slots=True)
class Times:
    """Times of one contender on one disk, in seconds."""

    plain: list[float] = field(default_factory=list)
    """Steps while nothing is written."""
    saving: list[float] = field(default_factory=list)
    """Steps that save, including the save."""
    meanwhile: list[float] = field(default_factory=list)
    """Steps while a checkpoint is written."""
    written: list[float] = field(default_factory=list)
    """From the start of a save until it is complete."""


def simulate_disk(rate: float | None) -> Callable[[Path], None]:
    """Return a function that flushes a file as a disk with `rate` MB/s would; None: no delay."""
    flush = checkpoint_files.flush_to_disk

    def slow(file: Path) -> None:
        if rate is not None:
            time.sleep(file.stat().st_size / (rate * 1e6))
        flush(file)

    return slow


def build_step(arguments: argparse.Namespace, learner: Learner) -> Callable[[], None]:
    """Return a function that makes one training step and waits until it is complete."""
    device = torch.device(arguments.device)
    image = torch.rand(arguments.batch, 3, arguments.side, arguments.side, device=device)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = learner.model(image)
        logits.float().square().mean().backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        assert learner.average is not None
        learner.average.update(learner.model, count)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(arguments: argparse.Namespace, mode: str, folder: Path) -> Times:
    """Time steps and saves of one contender."""
    torch.manual_seed(0)
    model = UNet.from_preset(arguments.preset, in_channels=3, num_classes=2).to(arguments.device)
    learner = build_learner(model, OptimConfig())
    step, times = build_step(arguments, learner), Times()
    state = TrainState(0, 0, 0.0, 0, None, None, {})
    with Checkpoints(RunFolder(folder), keep=1) as checkpoints:
        for number in range(arguments.saves):
            for _ in range(arguments.steps):
                times.plain.append(timed(step))
            expected = {name: t.clone() for name, t in learner.model.state_dict().items()}
            start = time.perf_counter()
            checkpoints.save(replace(state, step=number), learner, None, is_best=False)
            writing = checkpoints.writing
            assert writing is not None
            if mode == "synchronous":
                checkpoints.wait()
            step()
            times.saving.append(time.perf_counter() - start)
            while not writing.done():
                times.meanwhile.append(timed(step))
            times.written.append(time.perf_counter() - start)
            file = checkpoints.run.last / TRAINING
            found = torch.load(file, map_location=arguments.device, weights_only=True)["model"]
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # The first steps warm up.
    del times.plain[: min(3, arguments.steps - 1)]
    return times


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def table(found: dict[tuple[str, str], Times]) -> list[str]:
    """Format a table with one row per contender and disk."""
    titles = ("disk", "written", "step, median", "step with the first save", "with a later save")
    more = ("steps during a write: median", "longest", "complete after")
    lines = [row(*titles, *more), row(*["---"] * 8)]
    for (name, mode), times in found.items():
        later, meanwhile = times.saving[1:], times.meanwhile
        lines.append(
            row(
                name,
                mode,
                milliseconds(statistics.median(times.plain)),
                milliseconds(times.saving[0]),
                milliseconds(statistics.median(later)) if later else "",
                milliseconds(statistics.median(meanwhile)) if meanwhile else "",
                milliseconds(max(meanwhile)) if meanwhile else "",
                f"{statistics.median(times.written):.1f} s",
            )
        )
    return lines


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument("--preset", choices=("modern", "small"), default="modern")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps before each save")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--disk", type=float, default=100.0, help="MB/s of the slow disk")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cpu":
        hold_memory()
    flush, found = checkpoint_files.flush_to_disk, {}
    for name, rate in (("as is", None), (f"{arguments.disk:g} MB/s", arguments.disk)):
        for mode in MODES:
            checkpoint_files.flush_to_disk = simulate_disk(rate)
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                found[name, mode] = measure(arguments, mode, Path(folder))
            checkpoint_files.flush_to_disk = flush
    what = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
    print(
        f"{date.today()}, {what}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {arguments.preset}, batch {arguments.batch} of "
        f"{arguments.side} x {arguments.side}\n"
    )
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
