"""The network compared with that of milesial/Pytorch-UNet, of the same width.

    python tests/benchmarks/network.py                      # CPU, float32
    python tests/benchmarks/network.py --dtype bfloat16
    python tests/benchmarks/network.py --device cuda --dtype bfloat16 --batch 16 --side 512

Forward (evaluation mode, no gradients) and forward + backward (training mode, mean of the logits as
the loss), 3 input channels, 2 classes, 31 M parameters each. `ours` is the preset modern; `ours,
batch norm` uses the norm of milesial. On a GPU, ours is also measured compiled and in
channels_last. The rate of a matrix product of the same dtype is printed for reference.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date

import torch
from milesial import Milesial
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unet import UNet


def build(device: torch.device) -> dict[str, nn.Module]:
    """Make the contenders."""
    data = {"in_channels": 3, "num_classes": 2}
    models: dict[str, nn.Module] = {
        "milesial": Milesial(3, 2),
        "ours": UNet.from_preset("modern", **data),
        "ours, batch norm": UNet.from_preset("modern", **data, norm="batch"),
    }
    models = {name: model.to(device) for name, model in models.items()}
    if device.type == "cuda":
        for name in ("ours", "ours, batch norm"):
            fast = UNet.from_preset(
                "modern", **data, norm="instance" if name == "ours" else "batch"
            )
            fast = fast.to(device, memory_format=torch.channels_last)
            fast.compile()
            models[f"{name}, compiled"] = fast
    return models


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time one call after a first one for warm-up, with the device synchronised."""
    work()
    start = synchronise(device)
    for _ in range(repeats):
        work()
    return (synchronise(device) - start) / repeats


def synchronise(device: torch.device) -> float:
    """Wait for the device; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Measure TFLOP/s of a product of two square matrices; default side: by the device."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(side, side, device=device, dtype=dtype)
    with torch.inference_mode():
        # The clock of a GPU rises under load.
        seconds(lambda: a @ a, device, 3)
        return 2 * side**3 / seconds(lambda: a @ a, device, 20) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    models = {n: m for n, m in build(device).items() if n in (arguments.only or [n])}
    image = torch.randn(arguments.batch, 3, arguments.side, arguments.side, device=device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)

    def forward(model: nn.Module) -> Tensor:
        x = image
        if "compiled" in name_of[model]:
            x = image.contiguous(memory_format=torch.channels_last)
        with autocast:
            return model(x)

    def inference(model: nn.Module) -> None:
        model.eval()
        with torch.inference_mode():
            forward(model)

    def training(model: nn.Module) -> None:
        model.train()
        forward(model).float().mean().backward()
        model.zero_grad()

    name_of = {model: name for name, model in models.items()}
    times: dict[tuple[str, str], list[float]] = {}
    flops = 0
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        next(iter(models.values())).eval()(image)
        flops = counter.get_total_flops()
    for _ in range(arguments.rounds):
        for name, model in models.items():
            for kind, work in (("forward", inference), ("forward + backward", training)):
                spent = seconds(lambda m=model, w=work: w(m), device, arguments.repeats)
                times.setdefault((kind, name), []).append(spent)
    what = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(
        f"{date.today()}, {what}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{arguments.dtype}, batch {arguments.batch}, {arguments.side} x {arguments.side}; a "
        f"matrix product of this dtype: {matrix_rate(device, dtype):.2f} TFLOP/s\n"
    )
    print("| pass | network | images/s | TFLOP/s | relative to milesial (each round) |")
    print("| --- | --- | --- | --- | --- |")
    for (kind, name), spent in times.items():
        median = statistics.median(spent)
        work = flops * (1 if kind == "forward" else 3)
        peer = times.get((kind, "milesial"), spent)
        ratios = [b / a for a, b in zip(spent, peer, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"| {kind} | {name} | {arguments.batch / median:.2f} | {work / median / 1e12:.3f} | "
            f"{statistics.median(ratios):.2f} ({each}) |"
        )


if __name__ == "__main__":
    main()
