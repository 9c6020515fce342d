"""Tiled prediction compared with MONAI: seconds and peak memory.

    python -m venv VENV && VENV/bin/pip install -e . 'monai==1.6.*'
    VENV/bin/python tests/benchmarks/tiling.py
    VENV/bin/python tests/benchmarks/tiling.py --side 1024 --rounds 1 --models tiny
    python tests/benchmarks/tiling.py --memory

One RGB image of 4,096 x 4,096 random bytes, two classes, tiles of 512 with an overlap of 0.25,
Gaussian blending with sigma = tile / 8; the same random weights for all, in float32. Networks:

    small   the preset: 16 base channels, four levels
    tiny    4 base channels, two levels

Contenders, each with 1 and with 4 tiles in a forward pass:

    ours    as in `unet predict`: `predict_mask` on uint8 pixels, in a process that keeps freed
            memory; returns the mask and its mean confidence
    monai   `sliding_window_inference` on the normalised image, then argmax as uint8; no softmax
    monai, memory kept
            `monai` in a process that keeps freed memory, so that only the tiling differs

Without MONAI only ours is measured. Each runs once per round, in a fresh interpreter, after a
forward pass of one tile. Memory is the peak of the process (VmHWM) above its size at the start,
when it held the network and the image; Linux only. Masks differ where tiles start at different
pixels: on random bytes, the prediction of a random network depends on its pooling grid.

`--memory` instead predicts 20,000 x 20,000 pixels of twelve classes, with default tiles and a
trivial network, in a process that keeps freed memory and in one that does not.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packing import row
from torch import Tensor

from pipelines.runtime.devices import hold_memory
from unet import DataSpec, TileConfig, UNet, UNetConfig, predict_mask

TILE, OVERLAP = 512, 0.25
MODELS: dict[str, dict[str, Any]] = {"small": {}, "tiny": {"base_channels": 4, "depth": 2}}
SPEC = DataSpec(
    classes=("background", "foreground"),
    palette=((0, 0, 0), (255, 0, 0)),
    channels="RGB",
    mean=(0.5, 0.5, 0.5),
    std=(0.29, 0.29, 0.29),
    crop_size=TILE,
)
BATCHES = (1, 4)


class Measured(NamedTuple):
    seconds: float
    megabytes: float
    """Peak memory above that at the start."""
    mask: bytes


def predict_ours(forward: Callable[[Tensor], Tensor], image: Tensor, batch_size: int) -> Tensor:
    config = TileConfig(tile=TILE, overlap=OVERLAP, batch_size=batch_size)
    mask, _ = predict_mask(forward, image, config, UNetConfig())
    return mask


def predict_monai(
    normalise: Callable[[Tensor], Tensor],
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    batch_size: int,
) -> Tensor:
    logits = import_module("monai.inferers").sliding_window_inference(
        normalise(image), TILE, batch_size, model, OVERLAP, mode="gaussian", sigma_scale=0.125
    )
    return logits.argmax(dim=1).to(torch.uint8)


def memory(kind: str) -> float:
    """Read the MB of this process: current VmRSS, or VmHWM, the peak since its last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(kind)) * 1024e-6


@torch.inference_mode()
def measure(name: str, model_name: str, batch_size: int, side: int) -> Measured:
    if name != "monai":
        hold_memory()
    if name != "ours":
        import_module("monai.inferers")
    torch.manual_seed(0)
    model = UNet.from_preset("small", in_channels=3, num_classes=2, **MODELS[model_name]).eval()
    image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)

    def forward(tiles: Tensor) -> Tensor:
        return model(SPEC.normalise(tiles))

    # Resets the peak, see proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    baseline = memory("VmRSS")
    forward(image[..., :TILE, :TILE])
    start = time.perf_counter()
    if name == "ours":
        mask = predict_ours(forward, image, batch_size)
    else:
        mask = predict_monai(SPEC.normalise, model, image, batch_size)
    seconds = time.perf_counter() - start
    return Measured(seconds, memory("VmHWM") - baseline, mask.numpy().tobytes())


def measure_memory(held: bool, height: int, width: int) -> float:
    """Measure the peak MB for twelve classes, including logits, without the image."""
    if held:
        hold_memory()
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    weights = torch.linspace(-1, 1, 12).view(1, 12, 1, 1)
    torch.ones(1).softmax(0)
    Path("/proc/self/clear_refs").write_text("5")
    baseline = memory("VmRSS")

    def forward(tiles: Tensor) -> Tensor:
        return tiles[:, :1].float() * weights

    classes, _ = predict_mask(forward, image, TileConfig(), UNetConfig())
    if classes.shape != (1, height, width):
        raise RuntimeError(f"classes of {tuple(classes.shape)}")
    return memory("VmHWM") - baseline


def set_up_process() -> None:
    # Keeps the output of packages out of the tables.
    os.dup2(2, 1)


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh interpreter."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=set_up_process) as executor:
        return executor.submit(function, *arguments).result()


def agreement(a: bytes, b: bytes) -> float:
    """Compute the share of equal pixels of two masks."""
    one, other = (torch.frombuffer(bytearray(mask), dtype=torch.uint8) for mask in (a, b))
    return (one == other).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=4096, help="side of the image in pixels")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--memory", action="store_true", help="only measure memory on a large image"
    )
    arguments = parser.parse_args()
    if arguments.memory:
        print(row("freed memory", "height", "width", "peak MB"), row(*["---"] * 4), sep="\n")
        for held, height in product((False, True), (5_000, 20_000)):
            peak = alone(measure_memory, held, height, 20_000)
            policy = "kept" if held else "returned"
            print(row(policy, f"{height:,}", "20,000", f"{peak:,.0f}"), flush=True)
        return
    has_monai = find_spec("monai") is not None
    names = ["ours", *["monai", "monai, memory kept"] * has_monai]
    if not has_monai:
        print("MONAI is skipped: it is not installed", file=sys.stderr)
    cases = [*product(names, BATCHES)]
    packages = ["torch", *["monai"] * has_monai]
    print(
        f"{date.today()}, {arguments.side:,} x {arguments.side:,}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages)
    )
    for model in arguments.models:
        measured: dict[tuple[str, int], list[Measured]] = {case: [] for case in cases}
        for number in range(1, arguments.rounds + 1):
            for (name, batch_size), rounds in measured.items():
                rounds.append(alone(measure, name, model, batch_size, arguments.side))
                progress = f"round {number} of {arguments.rounds}, {model}, {name}, {batch_size}"
                print(f"{progress}: {rounds[-1].seconds:.1f} s", file=sys.stderr, flush=True)
        report(model, measured)


def report(model: str, measured: dict[tuple[str, int], list[Measured]]) -> None:
    """Print the table of one network."""
    titles = ("tiling", "tiles per pass", "seconds, median", "min - max", "peak MB")
    print("", model, "", row(*titles, "time relative to ours"), row(*["---"] * 6), sep="\n")
    median = {
        case: statistics.median(one.seconds for one in rounds) for case, rounds in measured.items()
    }
    ours = min(seconds for (name, _), seconds in median.items() if name == "ours")
    for (name, batch_size), rounds in measured.items():
        seconds = [one.seconds for one in rounds]
        span = f"{min(seconds):.1f} - {max(seconds):.1f}"
        peak = f"{max(one.megabytes for one in rounds):,.0f}"
        took = median[name, batch_size]
        print(row(name, batch_size, f"{took:.1f}", span, peak, f"{took / ours:.2f}"))
    reference = measured["ours", BATCHES[0]][0].mask
    for case, rounds in measured.items():
        same = agreement(reference, rounds[0].mask)
        print(f"{case[0]}, {case[1]}: {same:.1%} of the pixels equal the first row")


if __name__ == "__main__":
    main()
