"""Demands of 8, 64 and 512 GPUs on network, CPUs, storage and disk: computed, not measured.

    python tests/benchmarks/scaling.py --samples-per-second RATE
    python tests/benchmarks/scaling.py --samples-per-second 100 --preset modern --batch 16

RATE is the throughput of one GPU training alone, `train/samples_per_second` in `RUN/metrics.jsonl`.
Parameters and checkpoint are measured: the script builds the network, makes one step, and saves it
as a run does. Everything else is arithmetic, for W GPUs:

    step         batch / RATE, as if more GPUs cost nothing
    all-reduce   2 (W - 1) / W * gradient bytes / bandwidth: a ring (Patarasuk & Yuan 2009), limited
                 by what a machine sends to the next; float32 gradients. DDP overlaps it with the
                 backward pass, two thirds of a step; anything longer is exposed
    cores        RATE / decoding rate of a CPU core, per GPU
    reading      W * RATE * bytes per sample
    checkpoint   time that all ranks wait, as a share of the time: for rank 0's copy to host memory
                 and for what is not yet written when the next checkpoint is due
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from packing import row

from pipelines.runtime.run_folder import RunFolder
from pipelines.training.checkpoints import Checkpoints, TrainState
from pipelines.training.optim import OptimConfig, build_learner
from unet import DataSpec, UNet

WORLDS = (8, 64, 512)
SIDE = 64
"""Side of the image of the one step: large enough for any preset except `paper`."""
BACKWARD = 2 / 3
"""Share of a step spent in the backward pass: it has twice the FLOPs of the forward pass."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements on one device."""

    parameters: int
    checkpoint_bytes: int
    copy_seconds: float
    """Time to copy to host memory; measured on a CPU."""
    write_seconds: float
    """Time to write that copy to disk."""


def measure(preset: str) -> Measured:
    """Build a network, make one step to fill the optimizer state, and save a checkpoint."""
    spec = DataSpec(
        classes=("background", "cell"),
        palette=((0, 0, 0), (255, 0, 0)),
        channels="RGB",
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        crop_size=SIDE,
    )
    model = UNet.from_preset(preset, in_channels=3, num_classes=2, spec=spec)
    learner = build_learner(model, OptimConfig())
    model(torch.zeros(1, 3, SIDE, SIDE)).square().mean().backward()
    learner.optimizer.step()
    state = TrainState(1, 1, 0.0, 0, None, None, {})
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(RunFolder(Path(folder)), keep=1)
        checkpoints.save(state, learner, None, is_best=True)
        checkpoints.wait()
        start = time.perf_counter()
        checkpoints.save(replace(state, step=2), learner, None, is_best=False)
        copied = time.perf_counter()
        checkpoints.wait()
        written = time.perf_counter()
        saved = (Path(folder) / "checkpoints" / "step-00000002").iterdir()
        num_bytes = sum(file.stat().st_size for file in saved)
    parameters = sum(p.numel() for p in model.parameters())
    return Measured(parameters, num_bytes, copied - start, written - copied)


def table(arguments: argparse.Namespace, measured: Measured) -> list[str]:
    """Compute a table with one row per number of GPUs."""
    step = arguments.batch / arguments.samples_per_second
    gradients = 4 * measured.parameters
    links = [f"all-reduce at {bandwidth:g} GB/s" for bandwidth in arguments.bandwidth]
    titles = ("GPUs", "global batch", *links, "reading", "checkpoint")
    lines = [row(*titles), row(*["---"] * len(titles))]
    for world in WORLDS:
        reduces = []
        for bandwidth in arguments.bandwidth:
            seconds = 2 * (world - 1) / world * gradients / (bandwidth * 1e9)
            exposed = max(0.0, seconds - BACKWARD * step) / step
            reduces.append(f"{seconds * 1e3:.1f} ms, exposed {exposed:.0%}")
        reading = world * arguments.samples_per_second * arguments.sample_bytes
        between = arguments.eval_every * step
        pause = measured.copy_seconds + max(0.0, measured.write_seconds - between)
        share = pause / (between + pause)
        lines.append(
            row(
                str(world),
                f"{world * arguments.batch:,}",
                *reduces,
                f"{reading / 1e9:.2f} GB/s",
                f"{share:.1%} of the time",
            )
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples-per-second", type=float, required=True, help="of a single GPU")
    parser.add_argument("--preset", choices=("modern", "small"), default="modern")
    parser.add_argument("--batch", type=int, default=8, help="samples per GPU and step")
    parser.add_argument(
        "--decoded", type=float, default=305, help="samples/s that a core decodes (loading.py)"
    )
    parser.add_argument(
        "--sample-bytes", type=float, default=105e3, help="bytes of a sample in a shard"
    )
    parser.add_argument("--eval-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument(
        "--bandwidth",
        type=float,
        nargs="+",
        default=[1.25, 12.5, 50.0],
        help="GB/s from a machine to the next: 10, 100 and 400 Gb/s",
    )
    arguments = parser.parse_args()
    measured = measure(arguments.preset)
    print(
        f"{arguments.preset}, measured: {measured.parameters / 1e6:.1f} M parameters, gradients of "
        f"{4 * measured.parameters / 1e6:.0f} MB, a checkpoint of "
        f"{measured.checkpoint_bytes / 1e6:.0f} MB copied in {measured.copy_seconds:.2f} s and "
        f"written in {measured.write_seconds:.1f} s.\n"
        f"Computed for {arguments.samples_per_second:g} samples/s per GPU: a step of "
        f"{arguments.batch} takes {arguments.batch / arguments.samples_per_second * 1e3:.0f} ms, "
        f"and each GPU needs "
        f"{arguments.samples_per_second / arguments.decoded:.1f} cores for its loader.\n"
    )
    print(*table(arguments, measured), sep="\n")


if __name__ == "__main__":
    main()
