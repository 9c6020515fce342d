"""Limits of the card, and training steps without a loader: ours and those of public loops."""

import gc
import os
import platform
import shutil
import statistics
import subprocess
import sysconfig
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_bench import TUNED, Bench, NotApplicableError
from gpu_observe import counted_syncs
from learning_loops import dice_loss
from milesial import Milesial
from network import matrix_rate, seconds, synchronise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import make_batch, make_step

from unet import UNet

KERNELS = 12
"""Kernels listed per profile."""
REQUIRED = ("accelerate", "torchmetrics", "webdataset", "msgspec", "safetensors", "PIL", "jinja2")
OPTIONAL = ("wandb", "simplejpeg", "segmentation_models_pytorch", "scipy", "onnxruntime")


# -------------------------------------------------------------------------- the limits of the card


def card(bench: Bench) -> None:
    """Report the machine and the two rates that limit everything else."""
    device, cuda = bench.device, bench.device.type == "cuda"
    bench.report("device", torch.cuda.get_device_name() if cuda else platform.processor() or "CPU")
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            # Must not cost the figures below, which all others are compared with.
            bench.report("driver, memory", f"nvidia-smi failed: {error}"[:200])
        else:
            bench.report("driver, memory", answer.stdout.strip())
    bench.report("torch", f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    bench.report("Python", platform.python_version())
    bench.report("cores", len(os.sched_getaffinity(0)), "", "16")
    shared = shutil.disk_usage("/dev/shm").free / 2**30
    bench.report("free in /dev/shm", shared, "GiB", "> 2")
    dtype = torch.bfloat16 if cuda else torch.float32
    rate = matrix_rate(device, dtype, bench.sizes.matrix)
    bench.report("matrix rate", rate, "TFLOP/s", "700-800")
    source = torch.randn(bench.sizes.copied // 4, device=device)
    target = torch.empty_like(source)
    spent = seconds(lambda: target.copy_(source), device, 10)
    bench.report("copy, read and write", 2 * bench.sizes.copied / spent / 1e12, "TB/s", "2.6-2.9")


def compiler(bench: Bench) -> None:
    """Check that torch.compile works: a norm and a ReLU, compared with eager mode."""
    bench.report("C compiler", shutil.which("gcc") or shutil.which("cc") or "none", "", "found")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    bench.report("Python.h", "found" if header.exists() else "missing", "", "found")
    bench.report("triton", version("triton") if find_spec("triton") else "none", "", "3.6")
    layer = nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.ReLU()).to(bench.device)
    image = torch.randn(2, 8, 64, 64, device=bench.device)
    start = time.perf_counter()
    difference = (torch.compile(layer, backend=bench.backend)(image) - layer(image)).abs().max()
    bench.report("maximum difference from eager", difference.item(), "", "< 1e-5")
    bench.report("first compilation", time.perf_counter() - start, "s", "< 20")
    if not difference < 1e-4:
        raise RuntimeError(f"compiled and eager differ by {difference.item()}")


def packages(bench: Bench) -> None:
    """Report versions of packages. Raises RuntimeError if a required one cannot be imported."""
    missing = []
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found = getattr(import_module(name), "__version__", "found")
        except Exception as error:  # a broken package may raise anything
            found = f"{type(error).__name__}: {error}"[:120]
            missing += [name] if name in REQUIRED else []
        bench.report(name, str(found))
    if missing:
        raise RuntimeError(f"cannot be imported: {', '.join(missing)}")


# ----------------------------------------------------------------------------------- training steps


def ours(
    bench: Bench,
    *,
    batch: int | None = None,
    channels_last: bool = False,
    compiled: bool = False,
    norm: str = "instance",
    expected: str = "",
) -> None:
    """Time the bare step of `unet train`: forward, default loss, backward, AdamW."""

    def build() -> UNet:
        config = {"norm": norm, **bench.sizes.network}
        return UNet.from_preset("modern", in_channels=3, num_classes=2, **config)

    free_memory()
    model, size = build().to(bench.device), bench.batch(batch)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if compiled:
        model.compile(backend=bench.backend, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = make_step(model, optimizer, Namespace(batch=size, side=bench.sizes.side), bench.device)
    report_step(bench, step, size, count_flops(build, bench.sizes.side), expected=expected)


def public(bench: Bench, *, channels_last: bool = False) -> None:
    """Time the step of public single-file U-Nets: RMSprop, float16 autocast, GradScaler, clipping.

    As in milesial/Pytorch-UNet, except for `loss.item()` at every step, which would synchronise.
    """
    free_memory()
    size, cuda = bench.sizes.batch, bench.device.type == "cuda"
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = Milesial(3, 2, bench.sizes.width).to(bench.device)
    model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999, foreach=True
    )
    scaler = torch.amp.GradScaler(bench.device.type, enabled=cuda)
    image, mask = make_batch(Namespace(batch=size, side=bench.sizes.side))
    image = (image.to(bench.device).float() / 255).to(memory_format=form)
    mask = mask.to(bench.device).long()

    def step() -> None:
        with torch.autocast(bench.device.type, enabled=cuda):
            logits = model(image)
            loss = F.cross_entropy(logits, mask) + dice_loss(logits.float(), mask)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    flops = count_flops(lambda: Milesial(3, 2, bench.sizes.width), bench.sizes.side)
    report_step(bench, step, size, flops, syncs="1, of GradScaler")


def smp(bench: Bench) -> None:
    """Time our bare step with a segmentation_models_pytorch U-Net with resnet34."""
    if find_spec("segmentation_models_pytorch") is None:
        raise NotApplicableError("segmentation_models_pytorch cannot be imported")
    free_memory()
    build = import_module("segmentation_models_pytorch").Unet
    config = {"encoder_name": "resnet34", "encoder_weights": None, "in_channels": 3, "classes": 2}
    model, size = build(**config).to(bench.device), bench.sizes.batch
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = make_step(model, optimizer, Namespace(batch=size, side=bench.sizes.side), bench.device)
    report_step(bench, step, size, count_flops(lambda: build(**config), bench.sizes.side))


def report_step(
    bench: Bench,
    step: Callable[[], None],
    batch: int,
    flops: float,
    *,
    expected: str = "",
    syncs: str = "0",
) -> None:
    """Time and profile a step, with and without cudnn.benchmark, which `unet train` uses.

    Args:
        bench: receives the figures.
        step: makes one step.
        batch: samples of a step.
        flops: of a sample, forward and backward.
        expected: time of a step.
        syncs: expected synchronisations of a step.
    """
    device, cuda = bench.device, bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    bench.report("first step", synchronise(device) - start, "s")
    times = step_times(step, device, bench.sizes.warmup, bench.sizes.steps)
    spent = statistics.median(times)
    bench.report("step, median", spent * 1e3, "ms", expected)
    bench.report("step, min - max", f"{min(times) * 1e3:.1f} - {max(times) * 1e3:.1f}", "ms")
    bench.report("samples/s", batch / spent)
    if cuda:
        used = torch.cuda.max_memory_allocated() / 2**30
        bench.report("peak memory", used, "GiB", "24-28 at batch 32")
    with counted_syncs() as found:
        step()
    bench.report("synchronisations per step", found.total(), "", syncs)
    torch.backends.cudnn.benchmark = True
    try:
        tuned = step_times(step, device, bench.sizes.warmup, bench.sizes.steps)
    finally:
        torch.backends.cudnn.benchmark = False
    change, spent = statistics.median(tuned) / spent - 1, statistics.median(tuned)
    bench.report("cudnn.benchmark changes a step by", f"{change:+.1%}", "", "0 to -15 %")
    bench.report(TUNED, batch / spent)
    rate = batch * flops / spent / 1e12
    bench.report("rate, cudnn.benchmark", rate, "TFLOP/s")
    bench.report_ratio("share of the matrix rate", rate, "limits", "card", "matrix rate")
    bench.report("kernels of a step", list_kernels(step, device))


def free_memory() -> None:
    """Free the models of earlier rows, which compiled code and reference cycles keep alive."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def step_times(
    step: Callable[[], None], device: torch.device, warmup: int, steps: int
) -> list[float]:
    """Return seconds per step; on a GPU measured by events, without synchronising."""
    for _ in range(warmup):
        step()
    if device.type != "cuda":
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def list_kernels(step: Callable[[], None], device: torch.device) -> str:
    """List the kernels of a step by descending time."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        step()
        synchronise(device)
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == kind]
    found = sorted(events, key=lambda event: getattr(event, spent), reverse=True)
    total = sum(getattr(event, spent) for event in found)
    listed = [
        f"{event.key[:70]} {getattr(event, spent) / 1e3:.2f} ms in {event.count}"
        for event in found[:KERNELS]
    ]
    return "; ".join([f"all {total / 1e3:.1f} ms", *listed])


def count_flops(build: Callable[[], nn.Module], side: int) -> float:
    """Count FLOPs of a forward and backward pass of one sample, on the meta device."""
    with torch.device("meta"):
        # Of two: batch norm refuses a map of one pixel.
        model, image = build(), torch.empty(2, 3, side, side)
        with FlopCounterMode(display=False) as counter:
            logits: Tensor = model(image)
            logits.float().mean().backward()
    return counter.get_total_flops() / 2
