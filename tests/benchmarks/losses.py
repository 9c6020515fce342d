"""Losses over regions: all classes at once, compared with a loop over the classes.

    python tests/benchmarks/losses.py                                   # CPU
    python tests/benchmarks/losses.py --device cuda --batch 32 --side 512

Forward and backward pass of the Dice loss on random logits, by number of classes; on a GPU also its
memory besides the logits and their gradient.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial

import torch
from torch import Tensor

from unet import losses

Sums = tuple[Tensor, Tensor, Tensor]


def sums_by_loop(logits: Tensor, mask: Tensor, counted: tuple[int, ...]) -> Sums:
    """Reference for `unet.losses.sum_regions`: a loop over the classes."""
    valid = mask != losses.IGNORE
    probability = logits.softmax(dim=1)
    overlap, predicted, true = [], [], []
    for index in counted:
        p = probability[:, index] * valid
        g = mask == index
        overlap.append((p * g).sum(dim=(1, 2)))
        predicted.append(p.sum(dim=(1, 2)))
        true.append(g.sum(dim=(1, 2)))
    return torch.stack(overlap, 1), torch.stack(predicted, 1), torch.stack(true, 1)


def dice(sums: Callable[[Tensor, Tensor], Sums], logits: Tensor, mask: Tensor) -> None:
    """Compute a Dice loss and its gradient."""
    overlap, predicted, true = sums(logits, mask)
    score = (2 * overlap + 1) / (predicted + true + 1)
    (1 - score).mean().backward()
    logits.grad = None


def measure(work: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float]:
    """Measure the median seconds of a call and, on a GPU, its peak memory in GiB."""
    spent = []
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    taken = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return statistics.median(spent), taken / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 20, 150])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    what = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(
        f"{date.today()}, {what}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"batch {arguments.batch}, {arguments.side} x {arguments.side}\n"
    )
    print("| classes | at once, ms | one by one, ms | ratio | at once, GiB | one by one, GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for classes in arguments.classes:
        shape = (arguments.batch, classes, arguments.side, arguments.side)
        logits = torch.randn(shape, device=device, requires_grad=True)
        mask = torch.randint(0, classes, (shape[0], *shape[2:]), device=device).to(torch.uint8)
        counted = tuple(range(1, classes))
        on_device = torch.tensor(counted, device=device)
        ways = (
            lambda x, y, c=on_device: losses.sum_regions(x, y, c),
            lambda x, y, c=counted: sums_by_loop(x, y, c),
        )
        (ours, our_memory), (theirs, their_memory) = (
            measure(partial(dice, way, logits, mask), device, arguments.repeats) for way in ways
        )
        print(
            f"| {classes} | {1e3 * ours:.2f} | {1e3 * theirs:.2f} | {theirs / ours:.2f} | "
            f"{our_memory:.2f} | {their_memory:.2f} |"
        )


if __name__ == "__main__":
    main()
