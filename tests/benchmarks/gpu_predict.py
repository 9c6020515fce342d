"""`unet predict` on a GPU, end to end and by stage."""

import resource
import shutil
import signal
import time

import numpy as np
import torch
from gpu_bench import Bench
from gpu_process import Process, observe_verb, verb
from gpu_steps import free_memory, step_times
from gpu_train import report_profile
from network import seconds
from PIL import Image
from predicting import SIDE, SPEC, Job, measure_codec, prepare, save_model, steady_rate

from shards.images.files import ImageFormat
from shards.images.pixels import decode_image
from shards.masks.png import encode_mask
from shards.writer import ShardWriter
from unet import TileConfig, UNet, predict_mask

REPEATS = 3
"""Calls that are timed together."""


def prepare_job(bench: Bench, name: str) -> Job:
    """Generate images of 512 x 512 once, and a `modern` network whose masks are their blobs."""
    checkpoint = bench.work / "checkpoint"
    if not checkpoint.is_dir():
        save_model(checkpoint, "modern", **bench.sizes.network)
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)
    return Job(checkpoint, prepare(bench.work, bench.sizes.images, SIDE), out)


def load_model(job: Job, bench: Bench, *, channels_last: bool) -> UNet:
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = UNet.from_pretrained(str(job.checkpoint)).to(bench.device).eval()
    model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
    return model


def read_images(job: Job, count: int) -> list[np.ndarray]:
    """Read the first images, uint8 [H, W, C]."""
    paths = sorted(job.images.iterdir())[:count]
    return [decode_image(path.read_bytes(), ImageFormat("RGB"), path.name) for path in paths]


def make_batch(job: Job, bench: Bench) -> torch.Tensor:
    """Return the first images as a batch uint8 [B, C, H, W] on the CPU."""
    pixels = np.stack(read_images(job, bench.sizes.predicted))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def forward(bench: Bench) -> None:
    """Time the bare forward pass on a batch of the size that `unet predict` uses."""
    job, device = prepare_job(bench, "forward"), bench.device
    image = SPEC.normalise(make_batch(job, bench).to(device))
    for name, channels_last, compiled, expected in (
        ("eager", False, False, "550"),
        ("eager, channels_last", True, False, ""),
        ("compiled, channels_last", True, True, "830"),
    ):
        free_memory()
        model = load_model(job, bench, channels_last=channels_last)
        if compiled:
            model.compile(backend=bench.backend, dynamic=False)

        @torch.inference_mode()
        def step(model: UNet = model) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                model(image)

        times = step_times(step, device, bench.sizes.warmup, bench.sizes.steps)
        bench.report(name, len(image) / sorted(times)[len(times) // 2], "images/s", expected)


def predict(bench: Bench, *, compiled: bool = False) -> None:
    """Time and profile `unet predict`, from a folder to shards."""
    job = prepare_job(bench, "predicted")
    fast = ("--compile", "--channels-last") if compiled else ()
    way = "compiled, channels_last" if compiled else "eager"
    measure(bench, job, "predict", fast)
    bench.report_ratio(
        "of the bare forward pass",
        bench.known[bench.step, bench.row, "first to last shard"],
        *("predict", "forward", way),
        "goal 0.90",
    )


def ceiling(bench: Bench) -> None:
    """Time `unet predict` with a 1 x 1 convolution as network: the upper limit of the pipeline."""
    job = prepare_job(bench, "ceiling")
    measure(bench, job, "pointwise", ())
    workers = bench.known.get(("limits", "card", "cores"), 2)
    rate = measure_codec(job, workers)["loaded"]
    bench.report(f"decode and encode only, {workers} processes", rate, "images/s")


def measure(bench: Bench, job: Job, what: str, more: tuple[str, ...]) -> None:
    """Time `unet predict` or its substitute, profiled after the first shard."""
    seen, count = bench.work / "predict-seen.json", len([*job.images.iterdir()])
    flags = ("--checkpoint", job.checkpoint, "--input", job.images, "--out", job.out)
    size = ("--batch-size", bench.sizes.predicted, "--samples-per-shard", bench.sizes.per_shard)
    command = observe_verb(what, seen)
    with Process(bench, [*command, *flags, *size, *more]) as process:
        first = job.out / "predicted-000000.tar"
        bench.report("first shard after", process.wait_until(first.exists, "the first shard"), "s")
        process.signal(signal.SIGUSR2)
        spent = process.wait()
    rate = steady_rate(job.out, count)
    bench.report("first to last shard", rate, "images/s", "goal 1000")
    bench.report("entire command", count / spent, "images/s, including startup")
    if seen.exists():
        report_profile(bench, seen)
    else:
        bench.report("profiled for", 0.0, "s: the command had ended")


def stages(bench: Bench) -> None:
    """Time each stage of `unet predict` per image, alone, on one core or on the GPU."""
    job = prepare_job(bench, "stages")
    model = load_model(job, bench, channels_last=False)
    with torch.inference_mode():
        time_stages(bench, job, model)


def time_stages(bench: Bench, job: Job, model: UNet) -> None:
    """Time each stage, in inference mode."""
    device, count = bench.device, bench.sizes.stage_images
    start = time.perf_counter()
    pixels = read_images(job, count)
    bench.report("read and decode", per_image(start, count), "ms of a core")

    batch = make_batch(job, bench)
    size = len(batch)
    pinned = batch.pin_memory() if device.type == "cuda" else batch
    spent = seconds(lambda: pinned.to(device, non_blocking=True), device, REPEATS)
    bench.report("copy to the device", spent / size * 1e3, "ms")

    def forward_pass(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(SPEC.normalise(image))

    image, tiles = batch.to(device), TileConfig(batch_size=size)
    mask, _ = predict_mask(forward_pass, image, tiles, model.config)
    spent = seconds(lambda: forward_pass(image), device, REPEATS)
    bench.report("normalise and forward pass", spent / size * 1e3, "ms")
    spent = seconds(lambda: predict_mask(forward_pass, image, tiles, model.config), device, REPEATS)
    bench.report("forward pass, softmax and choice of class", spent / size * 1e3, "ms")
    spent = seconds(lambda: mask.cpu(), device, REPEATS)
    bench.report("copy back", spent / size * 1e3, "ms")

    masks = [(one[..., 0] > 127).astype(np.uint8) for one in pixels]
    start = time.perf_counter()
    encoded = [encode_mask(one, SPEC.palette) for one in masks]
    bench.report("encode", per_image(start, count), "ms of a core", "0.35-0.70")
    start = time.perf_counter()
    with ShardWriter(bench.work / "stage.tar") as writer:
        for number, png in enumerate(encoded):
            writer.add(f"{number:06d}", {"mask.png": png, "json": b"{}"})
        writer.seal()
    bench.report("write", per_image(start, count), "ms")


def per_image(start: float, count: int) -> float:
    """Return milliseconds per image since `start`."""
    return (time.perf_counter() - start) / count * 1e3


def large(bench: Bench) -> None:
    """Time `unet predict` of one image of 20,000 x 20,000."""
    job, side = prepare_job(bench, "large"), bench.sizes.large
    pixels = read_images(job, 1)[0]
    times = -(-side // len(pixels))
    path = bench.work / "large.jpg"
    Image.fromarray(np.tile(pixels, (times, times, 1))[:side, :side]).save(path, quality=85)
    flags = ("--checkpoint", job.checkpoint, "--input", path, "--out", job.out)
    with Process(bench, [*verb("predict"), *flags]) as process:
        spent = process.wait()
    bench.report("entire command", spent, "s")
    bench.report("rate", side**2 / spent / 1e6, "megapixels/s, including startup")
    # In KiB, of the largest child process so far.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    bench.report("memory of the largest process so far", peak, "GiB")
