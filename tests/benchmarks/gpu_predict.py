"""`unet predict` on a GPU from end to end, and stage by stage."""

import resource
import shutil
import signal
import time

import numpy as np
import torch
from gpu_bench import Bench
from gpu_process import Process, observed, verb
from gpu_steps import forget, step_times
from gpu_train import report_seen
from network import seconds
from PIL import Image
from predicting import SIDE, SPEC, Job, measure_codec, prepare, save_model, steady_rate

from shards.images import ImageFormat, decode_image
from shards.masks import encode_mask
from shards.writer import ShardWriter
from unet import TileConfig, UNet, predict_mask

REPEATS = 3
"""Batches of which a forward pass is timed at once."""


def job(bench: Bench, name: str) -> Job:
    """Images of 512 x 512, drawn once, and a `modern` that finds the blobs in them."""
    checkpoint = bench.work / "checkpoint"
    if not checkpoint.is_dir():
        save_model(checkpoint, "modern", **bench.sizes.network)
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)
    return Job(checkpoint, prepare(bench.work, bench.sizes.images, SIDE), out)


def load(given: Job, bench: Bench, *, channels_last: bool) -> UNet:
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = UNet.from_pretrained(str(given.checkpoint)).to(bench.device).eval()
    model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
    return model


def pixels_of(given: Job, count: int) -> list[np.ndarray]:
    """The first images, uint8 [H, W, C]."""
    paths = sorted(given.pictures.iterdir())[:count]
    return [decode_image(path.read_bytes(), ImageFormat("RGB"), path.name) for path in paths]


def batch_of(given: Job, bench: Bench) -> torch.Tensor:
    """uint8 [B, C, H, W] on the CPU."""
    pixels = np.stack(pixels_of(given, bench.sizes.predicted))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def forward(bench: Bench) -> None:
    """The bare forward pass of the batches that `unet predict` makes, which lie ready."""
    given, device = job(bench, "forward"), bench.device
    image = SPEC.normalise(batch_of(given, bench).to(device))
    for name, channels_last, compiled, expected in (
        ("eager", False, False, "550"),
        ("eager, channels_last", True, False, ""),
        ("compiled, channels_last", True, True, "830"),
    ):
        forget()
        model = load(given, bench, channels_last=channels_last)
        if compiled:
            model.compile(backend=bench.backend, dynamic=False)

        def step(model: UNet = model) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                model(image)

        times = step_times(step, device, bench.sizes.warmup, bench.sizes.steps)
        bench.report(name, len(image) / sorted(times)[len(times) // 2], "images/s", expected)


def predict(bench: Bench, *, compiled: bool = False) -> None:
    """A folder to shards: images/s beside the bare forward pass; looked at meanwhile."""
    given = job(bench, "predicted")
    fast = ("--compile", "--channels-last") if compiled else ()
    way = "compiled, channels_last" if compiled else "eager"
    measure(bench, given, "predict", fast)
    bench.report_ratio(
        "of the bare forward pass",
        bench.known[bench.step, bench.row, "first to last shard"],
        *("predict", "forward", way),
        "goal 0.90",
    )


def ceiling(bench: Bench) -> None:
    """The same with a 1 x 1 convolution for a network: what the pipeline could do at most."""
    given = job(bench, "ceiling")
    measure(bench, given, "pointwise", ())
    workers = bench.known.get(("limits", "card", "cores"), 2)
    rate = measure_codec(given, workers)["loaded"]
    bench.report(f"decode and encode only, {workers} processes", rate, "images/s")


def measure(bench: Bench, given: Job, what: str, more: tuple[str, ...]) -> None:
    """Run `unet predict`, or its stand-in, and look at it after the first shard."""
    seen, count = bench.work / "predict-seen.json", len([*given.pictures.iterdir()])
    told = ("--checkpoint", given.checkpoint, "--input", given.pictures, "--out", given.out)
    size = ("--batch-size", bench.sizes.predicted, "--samples-per-shard", bench.sizes.per_shard)
    started = observed(what, seen)
    with Process(bench, [*started, *told, *size, *more]) as process:
        first = given.out / "predicted-000000.tar"
        bench.report("first shard after", process.until(first.exists, "its first shard"), "s")
        process.signal(signal.SIGUSR2)
        spent = process.wait()
    rate = steady_rate(given.out, count)
    bench.report("first to last shard", rate, "images/s", "goal 1000")
    bench.report("the whole command", count / spent, "images/s, start included")
    report_seen(bench, seen)


@torch.inference_mode()
def stages(bench: Bench) -> None:
    """What each stage of `unet predict` takes for an image, on one core or on the GPU, alone."""
    given, device, count = job(bench, "stages"), bench.device, bench.sizes.stage_images
    began = time.perf_counter()
    pixels = pixels_of(given, count)
    bench.report("read and decode", per_image(began, count), "ms of a core")

    batch = batch_of(given, bench)
    size = len(batch)
    pinned = batch.pin_memory() if device.type == "cuda" else batch
    spent = seconds(lambda: pinned.to(device, non_blocking=True), device, REPEATS)
    bench.report("copy to the device", spent / size * 1e3, "ms")
    model = load(given, bench, channels_last=False)

    def passed(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(SPEC.normalise(image))

    image, tiles = batch.to(device), TileConfig(batch_size=size)
    mask, _ = predict_mask(passed, image, tiles)
    spent = seconds(lambda: passed(image), device, REPEATS)
    bench.report("normalise and forward pass", spent / size * 1e3, "ms")
    spent = seconds(lambda: predict_mask(passed, image, tiles), device, REPEATS)
    bench.report("the same, softmax and choice of class", spent / size * 1e3, "ms")
    spent = seconds(lambda: mask.cpu(), device, REPEATS)
    bench.report("copy back", spent / size * 1e3, "ms")

    masks = [(one[..., 0] > 127).astype(np.uint8) for one in pixels]
    began = time.perf_counter()
    encoded = [encode_mask(one, SPEC.palette) for one in masks]
    bench.report("encode", per_image(began, count), "ms of a core", "0.35-0.70")
    began = time.perf_counter()
    with ShardWriter(bench.work / "stage.tar") as writer:
        for number, png in enumerate(encoded):
            writer.add(f"{number:06d}", {"mask.png": png, "json": b"{}"})
        writer.seal()
    bench.report("write", per_image(began, count), "ms")


def per_image(began: float, count: int) -> float:
    """Milliseconds of each of some images."""
    return (time.perf_counter() - began) / count * 1e3


def large(bench: Bench) -> None:
    """One image of 20,000 x 20,000."""
    given, side = job(bench, "large"), bench.sizes.large
    pixels = pixels_of(given, 1)[0]
    times = -(-side // len(pixels))
    path = bench.work / "large.jpg"
    Image.fromarray(np.tile(pixels, (times, times, 1))[:side, :side]).save(path, quality=85)
    told = ("--checkpoint", given.checkpoint, "--input", path, "--out", given.out)
    with Process(bench, [*verb("predict"), *told]) as process:
        spent = process.wait()
    bench.report("the whole command", spent, "s")
    bench.report("rate", side**2 / spent / 1e6, "megapixels/s, start included")
    # In KiB, of the largest process that this one waited for.
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    bench.report("memory of the largest process so far", most, "GiB")
