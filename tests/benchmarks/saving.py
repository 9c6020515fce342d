"""What a checkpoint costs the steps around it: written at once, and beside training.

    python tests/benchmarks/saving.py --work DIR
    python tests/benchmarks/saving.py --work DIR --device cuda --side 512 --batch 8

Real training steps (forward, backward, AdamW, average of the weights) of the network alone, on one
batch that lies ready, and saves as `unet train` makes them: `modern` has a training state of 500 MB
and, with the weights to use, a checkpoint of 620 MB. `at once` waits for each write, as training
did before; `beside` does not.

The slow disk is simulated: before each file is flushed (fsync) the thread that writes sleeps for
as long as a disk of so many MB/s (--disk) would take for its bytes. That takes no CPU time, as
waiting for a disk takes none. `none` is the disk of DIR as it is.

Each contender saves `--saves` times, each time after `--steps` steps at least, and once the write
before is complete. The first save, which allocates the host memory, is in a column of its own.
After each write the saved weights are compared with those of the moment of the save, bit by bit.
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

from pipelines import checkpoint
from pipelines.checkpoint import Checkpoints, TrainState
from pipelines.devices import hold_memory
from pipelines.optim import Learner, OptimConfig, build_learner
from unet import UNet

MODES = ("at once", "beside")


@dataclass(slots=True)
class Times:
    """Seconds, of one contender on one disk."""

    plain: list[float] = field(default_factory=list)
    """Of steps while nothing is written."""
    saving: list[float] = field(default_factory=list)
    """Of each step that saves, the save included."""
    meanwhile: list[float] = field(default_factory=list)
    """Of steps while a checkpoint is written."""
    written: list[float] = field(default_factory=list)
    """From the beginning of each save until it is complete."""


def disk(rate: float | None) -> Callable[[Path], None]:
    """What flushes a file on a disk of so many MB/s; None: as the disk is."""
    flush = checkpoint.flush_to_disk

    def slow(file: Path) -> None:
        if rate is not None:
            time.sleep(file.stat().st_size / (rate * 1e6))
        flush(file)

    return slow


def build_step(given: argparse.Namespace, learner: Learner) -> Callable[[], None]:
    """One training step, complete on return."""
    device = torch.device(given.device)
    image = torch.rand(given.batch, 3, given.side, given.side, device=device)
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


def measure(given: argparse.Namespace, mode: str, folder: Path) -> Times:
    """Train and save."""
    torch.manual_seed(0)
    model = UNet.from_preset(given.preset, in_channels=3, num_classes=2).to(given.device)
    learner = build_learner(model, OptimConfig())
    step, times = build_step(given, learner), Times()
    state = TrainState(0, 0, 0.0, 0, None, None, {})
    with Checkpoints(folder, keep=1) as checkpoints:
        for number in range(given.saves):
            for _ in range(given.steps):
                times.plain.append(timed(step))
            expected = {name: t.clone() for name, t in learner.model.state_dict().items()}
            begun = time.perf_counter()
            checkpoints.save(replace(state, step=number), learner, None, is_best=False)
            writing = checkpoints.writing
            assert writing is not None
            if mode == "at once":
                checkpoints.wait()
            step()
            times.saving.append(time.perf_counter() - begun)
            while not writing.done():
                times.meanwhile.append(timed(step))
            times.written.append(time.perf_counter() - begun)
            file = checkpoints.folder / "last" / checkpoint.TRAINING
            found = torch.load(file, map_location=given.device, weights_only=True)["model"]
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # The first ones warm up.
    del times.plain[: min(3, given.steps - 1)]
    return times


def timed(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def table(found: dict[tuple[str, str], Times]) -> list[str]:
    """A line for each contender on each disk."""
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
    parser.add_argument("--steps", type=int, default=20, help="before each save")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--disk", type=float, default=50.0, help="MB/s of the slow disk")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.device == "cpu":
        hold_memory()
    flush, found = checkpoint.flush_to_disk, {}
    for name, rate in (("none", None), (f"{given.disk:g} MB/s", given.disk)):
        for mode in MODES:
            checkpoint.flush_to_disk = disk(rate)
            with tempfile.TemporaryDirectory(dir=given.work) as folder:
                found[name, mode] = measure(given, mode, Path(folder))
            checkpoint.flush_to_disk = flush
    what = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor()
    print(
        f"{date.today()}, {what}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {given.preset}, batch {given.batch} of {given.side} x {given.side}\n"
    )
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
