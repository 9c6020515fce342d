"""`unet train` compared with bare loops: the cost of the loop, and the gain of a second rank.

    python tests/benchmarks/training.py --work DIR
    python tests/benchmarks/training.py --work DIR --only one two --rounds 3
    python tests/benchmarks/training.py --work DIR --preset modern --side 512 --batch 16 \
        --steps 200 --only bare memory train milesial                       # on a GPU

Pairs of 512 x 512 (those of packing.py) are packed into DIR once. Every round runs each contender
once, in a fresh process; the default network is the preset `small`:

    bare      a loop of forward, default loss, backward and AdamW step on one batch in memory
    memory    `unet train` on batches in memory, with augmentation, clipping, weight averaging,
              metrics.jsonl and wandb (offline) as in any run
    train     `unet train` on shards, with one loader worker
    milesial  a bare loop with the network of milesial/Pytorch-UNet and its optimizer, RMSprop
    one       `accelerate launch` with one rank of one thread, without loader workers
    apart     two independent runs of `one` side by side: the limit of the cores
    two       one run with two ranks of one thread, and twice the global batch

Rates are samples/s: for `bare` and `milesial` after a warm-up of 10 steps, for the others the
median over the lines of metrics.jsonl, ten steps each, without the first two. On a GPU the
precision is bf16, all networks except milesial's are compiled and in channels_last, and model
FLOP/s utilisation is printed: three times the FLOPs of a forward pass, relative to the measured
rate of a matrix product.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import date
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from milesial import Milesial
from network import matrix_rate
from packing import prepare, row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines import pack, train
from pipelines.loading.stages import Batch
from pipelines.runtime.devices import hold_memory
from pipelines.training import setup
from shards.manifest import MANIFEST
from unet import LossConfig, SegmentationLoss, UNet

PAIRS = 64
EVERY = 10
"""Steps between two lines of metrics.jsonl."""
GPU = torch.cuda.is_available()


def data_set(work: Path) -> Path:
    """Return the shards, packed if missing."""
    data, out = prepare(work, PAIRS), work / f"shards-{PAIRS}"
    if not (out / MANIFEST).exists():
        flags = ["--images", data.images, "--masks", data.binary, "--mask-format", "binary"]
        assert pack.main([str(flag) for flag in (*flags, "--val-fraction", 0.1, "--out", out)]) == 0
    return out


def flags(arguments: argparse.Namespace, run_dir: Path, batch: int) -> list[str]:
    """Make the flags of `unet train`."""
    fast = ("--compile", "--channels-last") if GPU else ()
    values = [
        *("--data", arguments.work / f"shards-{PAIRS}", "--run-dir", run_dir, *fast),
        *(
            "--model.preset",
            arguments.preset,
            "--crop-size",
            arguments.side,
            "--steps",
            arguments.steps,
        ),
        *("--global-batch-size", batch, "--log-every", EVERY, "--eval-every", 10**9),
    ]
    return [str(flag) for flag in values]


def rate(run_dir: Path) -> tuple[float, float]:
    """Read samples/s and the share of time spent waiting for data."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if "train/loss" in line][2:]
    medians = (
        statistics.median(line[name] for line in steady)
        for name in ("train/samples_per_second", "train/data_wait")
    )
    return next(medians), next(medians)


def autocast() -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16) if GPU else nullcontext()


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, arguments: argparse.Namespace
) -> float:
    """Measure samples/s of forward, loss, backward and step on one batch."""
    step = make_step(model, optimizer, arguments, torch.device("cuda" if GPU else "cpu"))
    start = 0.0
    for number in range(-10, arguments.steps):
        if number == 0:
            start = now()
        step()
    return arguments.steps * arguments.batch / (now() - start)


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    arguments: argparse.Namespace,
    device: torch.device,
) -> Callable[[], None]:
    """Return a function that makes one step on a batch already on the device."""
    image, mask = make_batch(arguments)
    image, mask = (image.to(device).float() - 127) / 64, mask.to(device)
    criterion = SegmentationLoss(LossConfig(), (1,)).to(device)

    def step() -> None:
        with autocast():
            logits = model(image)
        loss, _ = criterion(logits, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def make_batch(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Make random images uint8 [B, 3, side, side] and masks uint8 [B, side, side]."""
    rng = np.random.default_rng(0)
    image = rng.integers(
        0, 256, (arguments.batch, 3, arguments.side, arguments.side), dtype=np.uint8
    )
    mask = rng.integers(0, 2, (arguments.batch, arguments.side, arguments.side), dtype=np.uint8)
    return torch.from_numpy(image), torch.from_numpy(mask)


def bare(arguments: argparse.Namespace) -> tuple[float, float]:
    hold_memory()
    model = UNet.from_preset(arguments.preset, in_channels=3, num_classes=2)
    if GPU:
        model.to("cuda").to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        model.compile()
    return loop(model, torch.optim.AdamW(model.parameters(), lr=2e-3), arguments), 0.0


def milesial(arguments: argparse.Namespace) -> tuple[float, float]:
    model = Milesial(3, 2).to("cuda" if GPU else "cpu")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-5, momentum=0.999, foreach=True)
    return loop(model, optimizer, arguments), 0.0


def memory(arguments: argparse.Namespace) -> tuple[float, float]:
    image, mask = make_batch(arguments)
    image, mask = (image.pin_memory(), mask.pin_memory()) if GPU else (image, mask)
    batch = Batch(image, mask, torch.arange(arguments.batch))
    setup.open_batches = lambda *_: repeat(batch)
    return in_this_process(arguments)


def in_this_process(arguments: argparse.Namespace, *more: str) -> tuple[float, float]:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        run_dir = Path(folder) / "run"
        code = train.main([*flags(arguments, run_dir, arguments.batch), *more])
        assert code == 0, code
        return rate(run_dir)


def from_shards(arguments: argparse.Namespace) -> tuple[float, float]:
    return in_this_process(arguments, *(() if GPU else ("--workers", "1")))


def ranks(arguments: argparse.Namespace, world: int) -> tuple[float, float]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    launcher = ["launch", "--num_processes", str(world), "--num_machines", "1"]
    if not GPU:
        environment["ACCELERATE_USE_CPU"] = "true"
        launcher += ["--mixed_precision", "no"]
    launcher += ["--multi_gpu"] if world > 1 else []
    launcher += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "pipelines.train"]
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        run_dir = Path(folder) / "run"
        train_flags = flags(arguments, run_dir, world * arguments.batch)
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        subprocess.run(
            [*program, *launcher, *train_flags, "--workers", "0"],
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return rate(run_dir)


def apart(arguments: argparse.Namespace) -> tuple[float, float]:
    with ThreadPoolExecutor(2) as executor:
        (first, waited), (second, also_waited) = executor.map(partial(ranks, arguments), (1, 1))
    return first + second, (waited + also_waited) / 2


CONTENDERS = {
    "bare": bare,
    "memory": memory,
    "train": from_shards,
    "milesial": milesial,
    "one": partial(ranks, world=1),
    "apart": apart,
    "two": partial(ranks, world=2),
}
RATIOS = (
    ("memory", "bare", 0.97),
    ("train", "bare", None),
    ("two", "one", 1.8),
    ("apart", "one", None),
    ("two", "apart", None),
)
RATIOS_GPU = (("memory", "bare", 0.97), ("train", "milesial", 2.0))


def flops(arguments: argparse.Namespace) -> float:
    """Count the FLOPs of a forward and backward pass of one sample."""
    model = UNet.from_preset(arguments.preset, in_channels=3, num_classes=2)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, arguments.side, arguments.side))
    return 3 * counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preset", default="small", choices=["small", "modern"])
    parser.add_argument("--side", type=int, default=256, help="side of a crop in pixels")
    parser.add_argument("--batch", type=int, default=2, help="samples per step and rank")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS)
    arguments = parser.parse_args()
    data_set(arguments.work)
    names = arguments.only or [name for name in CONTENDERS if GPU or name != "milesial"]
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                rates[name].append(executor.submit(CONTENDERS[name], arguments).result())
            print(f"{name}: {rates[name][-1][0]:.2f} samples/s", file=sys.stderr, flush=True)

    what = torch.cuda.get_device_name() if GPU else platform.processor() or "CPU"
    print(
        f"{date.today()}, {what}, torch {torch.__version__}; {arguments.preset}, crops of "
        f"{arguments.side} pixels, {arguments.batch} per step and rank, {arguments.steps} steps"
    )
    if GPU:
        peak, work = matrix_rate(torch.device("cuda"), torch.bfloat16), flops(arguments) / 1e12
        print(f"a matrix product in bf16: {peak:.0f} TFLOP/s; a sample: {work:.3f} TFLOP")
        used = {n: statistics.median(r for r, _ in rates[n]) * work / peak for n in names}
        print("utilisation: " + ", ".join(f"{n} {share:.2f}" for n, share in used.items()))
    print(f"\n{row('contender', 'samples/s, median', 'of each round', 'waited for data')}")
    print(row(*["---"] * 4))
    for name, measured in rates.items():
        each = ", ".join(f"{speed:.2f}" for speed, _ in measured)
        median, waited = (statistics.median(column) for column in zip(*measured, strict=True))
        print(row(name, f"{median:.2f}", each, f"{waited:.3f}"))
    print(f"\n{row('ratio', 'median', 'of each round', 'goal')}")
    print(row(*["---"] * 4))
    for ours, other, goal in RATIOS_GPU if GPU else RATIOS:
        if {ours, other} <= rates.keys():
            each = [a / b for (a, _), (b, _) in zip(rates[ours], rates[other], strict=True)]
            listed = ", ".join(f"{ratio:.2f}" for ratio in each)
            print(row(f"{ours} / {other}", f"{statistics.median(each):.2f}", listed, goal or ""))


if __name__ == "__main__":
    main()
