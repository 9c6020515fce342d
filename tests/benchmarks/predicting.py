"""`unet predict` compared with its upper bounds and with alternatives, in images per second.

    python -m venv VENV && VENV/bin/pip install -e . 'monai==1.6.*'
    VENV/bin/python tests/benchmarks/predicting.py --work DIR
    VENV/bin/python tests/benchmarks/predicting.py --work DIR --parts pipeline --images 2000
    VENV/bin/python tests/benchmarks/predicting.py --work DIR --parts memory list

JPEG images of 512 x 512, generated once in DIR; two classes; float32. Every round runs each
contender of a part once, in a fresh interpreter.

`forward`: a U-Net of two levels and width 4 (the preset small) that sees the red channel, with
hand-set weights so that its masks are realistic: blobs, 2 kB as PNG.

    forward             the network on batches of four normalised images in memory, in a process
                        that keeps freed memory, as ours does
    forward-default-allocator
                        `forward` in a process that returns freed memory
    loop                image by image: open with Pillow, network, argmax, write the PNG with
                        Pillow; in the manner of milesial/Pytorch-UNet's predict.py
    monai               SlidingWindowInferer(512, overlap 0.25, Gaussian) in a loop over a
                        DataLoader with two workers; argmax; Pillow writes the PNG; skipped if MONAI
                        is not installed
    predict             `unet predict`, mask shards
    predict --png       `unet predict`, mask shards and a PNG for each image

`pipeline`: the network is replaced by a single 1 x 1 convolution on the red channel.

    codec               two processes read and decode each JPEG, compare the red channel with 127,
                        and encode the mask as PNG, with the functions of `unet predict`
    pointwise           `unet predict`, mask shards
    no-network          `unet predict` whose logits are an expanded view of one precomputed field:
                        times decoding, transfer between processes, the choice of classes, encoding
                        and writing
    no-device           `unet predict` whose masks are such a view: without the choice of classes
                        too, it times the work of the CPUs beside a GPU, except for copies

`codec`, `forward`, `loop` and `monai` are timed after all imports and loading. `unet predict` is
timed twice: `total` is its process from start to end, including imports and checkpoint; `steady` is
the time from the end of its first shard to the end of its last.

`memory`: the peak memory of `unet predict` for 1,000 and for 10,000 images of 32 x 32, of the main
process (VmHWM) and of all of its processes together (Pss, sampled every tenth of a second).

`list`: `unet predict` of a list of 1,000,000 paths, of which the first 10,000 exist: seconds until
the list is read, until the first shard is started, and until it is finished; it is then stopped.
"""

import argparse
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from packing import row
from PIL import Image
from tiling import alone
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipelines.inference import tiles
from pipelines.model.load import LoadedModel
from pipelines.runtime.devices import hold_memory
from shards.images.files import ImageFormat
from shards.images.pixels import decode_image
from shards.masks.png import encode_mask
from unet import DataSpec, PredictedMasks, UNet
from unet.tiling import stack_tiles

REPO = Path(__file__).resolve().parents[2]
SIDE, TINY = 512, 32
BATCH = 4
WORKERS = 2
SPEC = DataSpec(
    classes=("background", "foreground"),
    palette=((0, 0, 0), (255, 51, 51)),
    channels="RGB",
    mean=(0.5, 0.5, 0.5),
    std=(0.29, 0.29, 0.29),
    crop_size=SIDE,
)
LISTED, PRESENT = 1_000_000, 10_000


class Job(NamedTuple):
    """Input and output of a contender."""

    checkpoint: Path
    images: Path
    out: Path
    """Does not exist yet."""


@dataclass(frozen=True, slots=True)
class Contender:
    label: str
    part: str
    measure: Callable[[Job], dict[str, float]]
    """Runs the contender; returns images per second, by what was timed."""


def draw(number: int, folder: Path, side: int) -> None:
    """Write a JPEG whose red channel shows blobs: 100 to 140 kB for a side of 512."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
    field = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    pixels = rng.normal(110, 20, (side, side, 3))
    pixels[..., 0] = np.where(field > 127, 200, 55) + rng.normal(0, 10, (side, side))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(folder / f"{number:07d}.jpg", quality=85)


def prepare(work: Path, count: int, side: int) -> Path:
    """Return a folder of images, generated if missing; reads it into the page cache."""
    folder = work / f"images-{side}-{count}"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with ProcessPoolExecutor() as executor:
            drawn = executor.map(partial(draw, folder=part, side=side), range(count), chunksize=16)
            for _ in tqdm(drawn, desc="generate", unit="image", total=count):
                pass
        part.rename(folder)
    sizes = [len(path.read_bytes()) for path in folder.iterdir()]
    print(f"{folder}: {min(sizes):,} to {max(sizes):,} bytes", file=sys.stderr)
    return folder


def save_model(folder: Path, preset: str = "small", **changes: int) -> Path:
    """Save a network of ordinary cost whose masks are the blobs.

    Random weights would give noise, which takes Pillow longer to encode than the network to
    predict. Only the first channel is hand-set: GPUs compute faster with zeros.
    """
    data: dict[str, Any] = {"in_channels": 3, "num_classes": len(SPEC.classes), "spec": SPEC}
    model = UNet.from_preset(preset, **data, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.shape[-2:] == (3, 3) and not name.startswith("bottom"):
                # Passes on the first channel: red.
                weight[0].zero_()
                weight[0, 0, 1, 1] = 1
            if ".conv." in name and name.endswith("bias"):
                # After a norm: shifts all values above 0, so that ReLU keeps them.
                weight.fill_(2)
        model.head.weight.zero_()
        model.head.weight[1, 0] = 1
        model.head.bias.copy_(torch.tensor([2.0, 0.0]))
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------ alternatives


@contextmanager
def timed(job: Job, rates: dict[str, float]) -> Iterator[None]:
    """Record the images per second of the enclosed block in `rates`."""
    count = len([*job.images.iterdir()])
    start = time.perf_counter()
    yield
    rates["loaded"] = count / (time.perf_counter() - start)


def load(job: Job) -> UNet:
    return UNet.from_pretrained(str(job.checkpoint)).eval()


@torch.inference_mode()
def measure_forward(job: Job, *, held: bool) -> dict[str, float]:
    if held:
        hold_memory()
    model, rates = load(job), {}
    paths = sorted(job.images.iterdir())[: 4 * BATCH]
    pixels = [np.asarray(Image.open(path)) for path in paths]
    ready = SPEC.normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).contiguous()
    batches = ready.split(BATCH)
    model(batches[0])
    with timed(job, rates):
        for number in range(-(-len([*job.images.iterdir()]) // BATCH)):
            model(batches[number % len(batches)])
    return rates


def normalised(path: Path) -> Tensor:
    """Read a normalised image, float32 [3, H, W]."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
    mean, std = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (SPEC.mean, SPEC.std)
    )
    return torch.from_numpy((pixels / 255 - mean) / std)


def save_mask(logits: Tensor, job: Job, name: str) -> None:
    """Write the argmax of logits [1, K, H, W] as PNG."""
    mask = logits.argmax(dim=1)[0].to(torch.uint8).numpy()
    Image.fromarray(mask * 255).save(job.out / f"{name}.png")


@torch.inference_mode()
def measure_loop(job: Job) -> dict[str, float]:
    model, rates = load(job), {}
    job.out.mkdir()
    with timed(job, rates):
        for path in sorted(job.images.iterdir()):
            save_mask(model(normalised(path)[None]), job, path.stem)
    return rates


class ImageFolder(Dataset[tuple[str, Tensor]]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self.paths[index].stem, normalised(self.paths[index])


@torch.inference_mode()
def measure_monai(job: Job) -> dict[str, float]:
    inferer = import_module("monai.inferers").SlidingWindowInferer(
        SIDE, BATCH, overlap=0.25, mode="gaussian", sigma_scale=0.125
    )
    model, rates = load(job), {}
    job.out.mkdir()
    with timed(job, rates):
        for (name,), image in DataLoader(ImageFolder(job.images), num_workers=WORKERS):
            save_mask(inferer(image, model), job, name)
    return rates


def transcode(path: Path) -> int:
    """Decode an image and encode its mask; returns the size of the mask in bytes."""
    pixels = decode_image(path.read_bytes(), ImageFormat("RGB"), str(path))
    return len(encode_mask((pixels[..., 0] > 127).astype(np.uint8), SPEC.palette))


def measure_codec(job: Job, workers: int = WORKERS) -> dict[str, float]:
    rates: dict[str, float] = {}
    paths = sorted(job.images.iterdir())
    with ProcessPoolExecutor(workers, get_context("fork")) as executor:
        # All workers have started and have used the codecs before the clock starts.
        sizes = [*executor.map(transcode, paths[: 8 * workers])]
        with timed(job, rates):
            sizes = [*executor.map(transcode, paths, chunksize=16)]
    print(f"masks of {statistics.mean(sizes):,.0f} bytes", file=sys.stderr)
    return rates


# ------------------------------------------------------------------------------------------- ours


def command(job: Job, per_shard: int, verb: Sequence[str]) -> list[str]:
    paths = ("--checkpoint", job.checkpoint, "--input", job.images, "--out", job.out)
    size = ("--batch-size", BATCH, "--samples-per-shard", per_shard)
    return [sys.executable, *verb, *map(str, (*paths, *size))]


def measure_predict(
    job: Job, *, flags: Sequence[str] = (), network: str | None = None
) -> dict[str, float]:
    """Time `unet predict`; `network` is one of `STAND_INS`, or None for that of the checkpoint."""
    count = len([*job.images.iterdir()])
    verb = ("-m", "pipelines.predict") if network is None else (__file__, network)
    # Several shards, however few the images.
    words = command(job, max(1, min(256, count // 8)), verb)
    start = time.perf_counter()
    subprocess.run([*words, *flags], cwd=REPO, check=True)
    return {"total": count / (time.perf_counter() - start), "steady": steady_rate(job.out, count)}


def steady_rate(out: Path, count: int) -> float:
    """Compute masks per second between the end of the first shard and that of the last."""
    indexes = sorted(out.glob("*.idx"))
    first, *rest = (len(path.read_text().splitlines()) - 1 for path in indexes)
    if first + sum(rest) != count:
        raise RuntimeError(f"{first + sum(rest)} masks of {count} images")
    ends = [path.with_suffix(".tar").stat().st_mtime for path in (indexes[0], indexes[-1])]
    return sum(rest) / (ends[1] - ends[0])


def run_pointwise(argv: Sequence[str]) -> int:
    """Run `unet predict` with a 1 x 1 convolution as the network."""
    predict: Any = import_module("pipelines.predict")
    load_models = predict.load_models

    def load_small(checkpoints: Sequence[str], **options: Any) -> LoadedModel:
        loaded = load_models(checkpoints, **options)
        small = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            small.weight.zero_()[1, 0] = 1
            small.bias.zero_()
        loaded.model.add_module("pointwise", small)
        loaded.model.forward = small.forward
        return loaded

    predict.load_models = load_small
    return predict.main(argv)


@cache
def field(height: int, width: int) -> Tensor:
    """Return float32 [height, width]: 50 x (smooth noise - 0.5), the noise as in `draw`."""
    small = torch.rand((1, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    return 50 * (nn.functional.interpolate(small, (height, width), mode="bicubic")[0, 0] - 0.5)


def run_without_network(argv: Sequence[str]) -> int:
    """Run `unet predict` with a forward pass of no cost: every image gets the same mask."""
    predict: Any = import_module("pipelines.predict")

    @cache
    def logits(height: int, width: int) -> Tensor:
        second = field(height, width)
        return torch.stack([torch.zeros_like(second), second])

    def make_forward(*_: object) -> Callable[[Tensor], Tensor]:
        return lambda image: logits(*image.shape[-2:]).expand(len(image), -1, -1, -1)

    tiles.make_forward = make_forward
    return predict.main(argv)


def run_without_device(argv: Sequence[str]) -> int:
    """Run `unet predict` with masks of no cost, except for stacking their images."""
    predict: Any = import_module("pipelines.predict")

    @cache
    def masks(count: int, height: int, width: int) -> PredictedMasks:
        classes = (field(height, width) > 0).to(torch.uint8).expand(count, -1, -1)
        counts = torch.tensor([[height * width - int(classes[0].sum()), int(classes[0].sum()), 0]])
        confidence = torch.full((count,), 0.9, dtype=torch.float64)
        return PredictedMasks(classes, confidence, None, None, counts.expand(count, -1))

    def predict_masks(
        _: object, images: Sequence[Tensor], *__: object, **___: object
    ) -> PredictedMasks:
        batch = stack_tiles(images)
        return masks(len(batch), *batch.shape[-2:])

    tiles.predict_masks = predict_masks
    return predict.main(argv)


STAND_INS = {
    "pointwise": run_pointwise,
    "no-network": run_without_network,
    "no-device": run_without_device,
}
"""Functions that run `unet predict` with a substitute for the network, by contender."""


CONTENDERS = {
    "forward": Contender("bare forward", "forward", partial(measure_forward, held=True)),
    "forward-default-allocator": Contender(
        "bare forward, default allocator", "forward", partial(measure_forward, held=False)
    ),
    "loop": Contender("image by image", "forward", measure_loop),
    "monai": Contender("MONAI SlidingWindowInferer, 2 workers", "forward", measure_monai),
    "predict": Contender("`unet predict`", "forward", measure_predict),
    "predict-png": Contender(
        "`unet predict --png`", "forward", partial(measure_predict, flags=("--png",))
    ),
    "codec": Contender("decode and encode only, 2 processes", "pipeline", measure_codec),
    "pointwise": Contender(
        "`unet predict`, 1 x 1 convolution",
        "pipeline",
        partial(measure_predict, network="pointwise"),
    ),
    "no-network": Contender(
        "`unet predict` without a network",
        "pipeline",
        partial(measure_predict, network="no-network"),
    ),
    "no-device": Contender(
        "`unet predict` without what a GPU does",
        "pipeline",
        partial(measure_predict, network="no-device"),
    ),
}

GOALS = (
    ("predict", "forward", 0.85),
    ("predict", "forward-default-allocator", 0.85),
    ("predict", "loop", 1.1),
    ("predict-png", "loop", 1.1),
    ("predict", "monai", 2.0),
    ("predict-png", "monai", 2.0),
    ("pointwise", "codec", 0.75),
    ("no-network", "codec", 0.75),
    ("no-device", "codec", 0.75),
)
"""Contender, peer, and the targeted ratio of their speeds."""


def measure_once(name: str, job: Job) -> dict[str, float]:
    shutil.rmtree(job.out, ignore_errors=True)
    # Ours flushes to disk, and would wait for unwritten data of the others.
    os.sync()
    rates = alone(CONTENDERS[name].measure, job)
    shutil.rmtree(job.out, ignore_errors=True)
    return rates


Rates = dict[tuple[str, str], list[float]]
"""{(contender, what was timed): images per second in each round}."""


def measure_part(part: str, job: Job, names: Sequence[str], rounds: int) -> Rates:
    rates: Rates = {}
    for number in range(1, rounds + 1):
        for name in names:
            for timed_what, rate in measure_once(name, job).items():
                rates.setdefault((name, timed_what), []).append(rate)
                progress = f"round {number} of {rounds}, {part}, {name}, {timed_what}"
                print(f"{progress}: {rate:.1f} images/s", file=sys.stderr, flush=True)
    return rates


def speed_table(rates: Rates) -> list[str]:
    titles = ("contender", "timed", "images/s, median", "min - max", "of each round")
    lines = [row(*titles), row(*["---"] * len(titles))]
    for (name, timed_what), each in rates.items():
        lines.append(
            row(
                CONTENDERS[name].label,
                timed_what,
                f"{statistics.median(each):.1f}",
                f"{min(each):.1f} - {max(each):.1f}",
                ", ".join(f"{one:.1f}" for one in each),
            )
        )
    return lines


def ratio_table(rates: Rates) -> list[str]:
    titles = ("ratio of speeds", "timed", "of the medians", "of each round", "goal")
    lines = [row(*titles), row(*["---"] * len(titles))]
    for ours, peer, goal in GOALS:
        for timed_what in ("steady", "total"):
            mine, others = rates.get((ours, timed_what)), rates.get((peer, "loaded"))
            if mine is None or others is None:
                continue
            each = [a / b for a, b in zip(mine, others, strict=True)]
            lines.append(
                row(
                    f"{ours} / {peer}",
                    timed_what,
                    f"{statistics.median(mine) / statistics.median(others):.2f}",
                    ", ".join(f"{one:.2f}" for one in each),
                    f"at least {goal:.2f}",
                )
            )
    return lines if len(lines) > 2 else []


# ----------------------------------------------------------------------------- memory, first shard


def memory_of(process: int, file: str, kind: str) -> float:
    """Read the MB of a process; 0 if it has exited."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024e-6


def process_tree(process: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        tasks = [*Path(f"/proc/{process}/task").iterdir()]
        below = [child for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [process, *(one for child in below for one in process_tree(int(child)))]


class MonitoredCommand:
    """A command whose memory is sampled while it runs; `stop` kills it with its children."""

    def __init__(self, words: Sequence[str]) -> None:
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            words, cwd=REPO, start_new_session=True, stdout=subprocess.DEVNULL
        )
        self.own = self.all = 0.0
        """Peak MB so far: of the main process, of all processes."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def until(self, condition: Callable[[], bool]) -> float:
        """Sample until a condition is true or the command has ended; returns seconds so far."""
        while self.process.poll() is None and not condition():
            process = self.process.pid
            self.own = max(self.own, memory_of(process, "status", "VmHWM"))
            every = (memory_of(one, "smaps_rollup", "Pss:") for one in process_tree(process))
            self.all = max(self.all, sum(every))
            time.sleep(0.1)
        return self.seconds

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def memory_table(checkpoint: Path, work: Path, counts: Sequence[int]) -> list[str]:
    titles = ("inputs", "peak MB, main process", "peak MB, all processes", "seconds")
    lines = [row(*titles), row(*["---"] * len(titles))]
    for count in counts:
        job = Job(checkpoint, prepare(work, count, TINY), work / "out")
        shutil.rmtree(job.out, ignore_errors=True)
        watched = MonitoredCommand(command(job, 256, ("-m", "pipelines.predict")))
        seconds = watched.until(lambda: False)
        if watched.process.returncode:
            raise SystemExit(f"unet predict exited with {watched.process.returncode}")
        lines.append(
            row(f"{count:,}", f"{watched.own:,.0f}", f"{watched.all:,.0f}", f"{seconds:.1f}")
        )
    return lines


def list_table(checkpoint: Path, work: Path, rounds: int) -> list[str]:
    titles = ("seconds until", "median", "of each round")
    lines = [row(*titles), row(*["---"] * len(titles))]
    folder = prepare(work, PRESENT, TINY)
    job = Job(checkpoint, work / "list.txt", work / "out")
    names = (f"{folder.name}/{number:07d}.jpg" for number in range(LISTED))
    job.images.write_text("\n".join(names) + "\n")
    passed: dict[str, list[float]] = {}
    memory: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        shutil.rmtree(job.out, ignore_errors=True)
        watched = MonitoredCommand(command(job, 256, ("-m", "pipelines.predict")))
        stages = {
            "the list is read": lambda: (job.out / "job.json").exists(),
            "the first shard is started": lambda: bool([*job.out.rglob("*predicted-000000*")]),
            "the first shard is finished": lambda: (job.out / "predicted-000000.tar").exists(),
        }
        try:
            for stage, condition in stages.items():
                passed.setdefault(stage, []).append(watched.until(condition))
            if watched.process.poll() is not None:
                raise SystemExit(f"unet predict exited with {watched.process.returncode}")
        finally:
            watched.stop()
        memory.append((watched.own, watched.all))
        print(f"round {number} of {rounds}, list: {watched.seconds:.1f} s", file=sys.stderr)
    shutil.rmtree(job.out, ignore_errors=True)
    for stage, each in passed.items():
        median = statistics.median(each)
        lines.append(row(stage, f"{median:.1f}", ", ".join(f"{one:.1f}" for one in each)))
    own, every = map(max, zip(*memory, strict=True))
    return [
        *lines,
        "",
        f"Peak until then: {own:,.0f} MB main process, {every:,.0f} MB all processes.",
    ]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in STAND_INS:
        raise SystemExit(STAND_INS[sys.argv[1]](sys.argv[2:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("forward", "pipeline", "memory", "list")
    parser.add_argument("--work", type=Path, required=True, help="folder for images and results")
    parser.add_argument("--parts", nargs="+", choices=parts, default=["forward", "pipeline"])
    parser.add_argument("--images", type=int, default=400, help="number of images of 512 x 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--inputs",
        nargs="+",
        type=int,
        default=[1_000, 10_000],
        help="numbers of inputs for --parts memory",
    )
    arguments = parser.parse_args()
    if arguments.images < 16 or arguments.rounds < 1:
        parser.error("--images must be >= 16, --rounds >= 1")
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in CONTENDERS if name in arguments.only]
    if find_spec("monai") is None and "monai" in names:
        print("MONAI is skipped: it is not installed", file=sys.stderr)
        names.remove("monai")
    checkpoint = save_model(work / "checkpoint", base_channels=4, depth=2)
    packages = ["torch", "pillow", *["monai"] * ("monai" in names)]
    print(
        f"{date.today()}, {arguments.images:,} images, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages)
    )
    for part in arguments.parts:
        some = [name for name in names if CONTENDERS[name].part == part]
        if part == "memory":
            tables = [memory_table(checkpoint, work, arguments.inputs)]
        elif part == "list":
            tables = [list_table(checkpoint, work, arguments.rounds)]
        else:
            images = prepare(work, arguments.images, SIDE)
            rates = measure_part(
                part, Job(checkpoint, images, work / "out"), some, arguments.rounds
            )
            tables = [speed_table(rates), ratio_table(rates)]
        for table in tables:
            if table:
                print("", *table, sep="\n", flush=True)


if __name__ == "__main__":
    main()
