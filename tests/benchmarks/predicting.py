"""`unet predict` beside what it could be at best and what is done elsewhere: pictures a second.

    python -m venv VENV && VENV/bin/pip install -e . 'monai==1.6.*'
    VENV/bin/python tests/benchmarks/predicting.py --work DIR
    VENV/bin/python tests/benchmarks/predicting.py --work DIR --parts pipeline --pictures 2000
    VENV/bin/python tests/benchmarks/predicting.py --work DIR --parts memory list

JPEG pictures of 512 x 512, drawn once into DIR; two classes; float32. Every round runs each
contender of a part once, in an interpreter of its own.

`forward`: a U-Net of two levels and width 4 (the preset small), its weights set by hand so that
masks are such as people have: blobs, 2 kB as PNG. It sees the red channel.

    forward             the network on four normalised pictures at a time that lie in memory, in a
                        process that keeps freed memory, as ours does
    forward, memory given back
                        the same as PyTorch comes
    loop                picture by picture: Pillow opens it, the network, argmax, Pillow writes the
                        PNG; in the manner of milesial/Pytorch-UNet's predict.py
    monai               SlidingWindowInferer(512, overlap 0.25, Gaussian) in a loop over a
                        DataLoader with two workers; argmax; Pillow writes the PNG; left out where
                        MONAI is not installed
    predict             `unet predict`, mask shards
    predict --png       the same, and a PNG for each picture

`pipeline`: the network replaced by one 1 x 1 convolution that looks at the red channel.

    codec               two processes read and decode each JPEG, compare the red channel with 127,
                        and encode the mask as PNG, with the functions that ours uses
    pointwise           `unet predict`, mask shards
    no-network          `unet predict` whose logits are an expanded view of one field, computed
                        once: what is timed is decoding, the hand-over between processes, the choice
                        of classes, encoding and writing
    no-device           `unet predict` whose masks are such a view: the choice of classes is left
                        out too; what remains is what the CPUs do beside a GPU, but for copies

`codec`, `forward`, `loop` and `monai` are timed from when everything is imported and loaded.
`unet predict` is given twice: `whole` is its process from start to end, imports and checkpoint
included; `steady` is what it does between the end of its first shard and the end of its last.

`memory`: the most that `unet predict` takes for 1,000 and for 10,000 pictures of 32 x 32, of its
own process (VmHWM) and of all of its processes together (Pss, looked at every tenth of a second).

`list`: `unet predict` of a list of 1,000,000 paths, of which the first 10,000 are there: seconds
until the list is read, until the first shard is begun and until it is there; it is then stopped.
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

from pipelines.checkpoint import LoadedModel
from pipelines.devices import hold_memory
from shards.images import ImageFormat, decode_image
from shards.masks import encode_mask
from unet import DataSpec, Masks, UNet
from unet.tiling import stack

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
    """What a contender is given."""

    checkpoint: Path
    pictures: Path
    out: Path
    """Not there yet."""


@dataclass(frozen=True, slots=True)
class Contender:
    label: str
    part: str
    measure: Callable[[Job], dict[str, float]]
    """Does the work and returns pictures a second, by what was timed."""


def draw(number: int, folder: Path, side: int) -> None:
    """A JPEG of 100 to 140 kB, for a side of 512, whose red channel tells blobs from the rest."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
    field = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    pixels = rng.normal(110, 20, (side, side, 3))
    pixels[..., 0] = np.where(field > 127, 200, 55) + rng.normal(0, 10, (side, side))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(folder / f"{number:07d}.jpg", quality=85)


def prepare(work: Path, count: int, side: int) -> Path:
    """A folder of pictures, drawn if it is not there; read once, into the page cache."""
    folder = work / f"pictures-{side}-{count}"
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with ProcessPoolExecutor() as executor:
            drawn = executor.map(partial(draw, folder=part, side=side), range(count), chunksize=16)
            for _ in tqdm(drawn, desc="draw", unit="picture", total=count):
                pass
        part.rename(folder)
    sizes = [len(path.read_bytes()) for path in folder.iterdir()]
    print(f"{folder}: {min(sizes):,} to {max(sizes):,} bytes", file=sys.stderr)
    return folder


def save_model(folder: Path, preset: str = "small", **changes: int) -> Path:
    """A network that costs what any of its size does, and whose masks are the blobs.

    Masks of random weights are noise, which takes Pillow longer to encode than to predict. Only
    the first channel is set by hand: GPUs are faster with zeros.
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
                # After a norm: so that no activation cuts anything away.
                weight.fill_(2)
        model.head.weight.zero_()
        model.head.weight[1, 0] = 1
        model.head.bias.copy_(torch.tensor([2.0, 0.0]))
    model.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------- what others would do


@contextmanager
def timed(job: Job, rates: dict[str, float]) -> Iterator[None]:
    """Pictures a second of what is done meanwhile."""
    count = len([*job.pictures.iterdir()])
    begun = time.perf_counter()
    yield
    rates["loaded"] = count / (time.perf_counter() - begun)


def load(job: Job) -> UNet:
    return UNet.from_pretrained(str(job.checkpoint)).eval()


@torch.inference_mode()
def measure_forward(job: Job, *, held: bool) -> dict[str, float]:
    if held:
        hold_memory()
    model, rates = load(job), {}
    paths = sorted(job.pictures.iterdir())[: 4 * BATCH]
    pixels = [np.asarray(Image.open(path)) for path in paths]
    ready = SPEC.normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).contiguous()
    batches = ready.split(BATCH)
    model(batches[0])
    with timed(job, rates):
        for number in range(-(-len([*job.pictures.iterdir()]) // BATCH)):
            model(batches[number % len(batches)])
    return rates


def normalised(path: Path) -> Tensor:
    """float32 [3, H, W]."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
    mean, std = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (SPEC.mean, SPEC.std)
    )
    return torch.from_numpy((pixels / 255 - mean) / std)


def save_mask(logits: Tensor, job: Job, name: str) -> None:
    """argmax of [1, K, H, W] as a PNG."""
    mask = logits.argmax(dim=1)[0].to(torch.uint8).numpy()
    Image.fromarray(mask * 255).save(job.out / f"{name}.png")


@torch.inference_mode()
def measure_loop(job: Job) -> dict[str, float]:
    model, rates = load(job), {}
    job.out.mkdir()
    with timed(job, rates):
        for path in sorted(job.pictures.iterdir()):
            save_mask(model(normalised(path)[None]), job, path.stem)
    return rates


class Pictures(Dataset[tuple[str, Tensor]]):
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
        for (name,), image in DataLoader(Pictures(job.pictures), num_workers=WORKERS):
            save_mask(inferer(image, model), job, name)
    return rates


def code(path: Path) -> int:
    """The size of the mask of a picture."""
    pixels = decode_image(path.read_bytes(), ImageFormat("RGB"), str(path))
    return len(encode_mask((pixels[..., 0] > 127).astype(np.uint8), SPEC.palette))


def measure_codec(job: Job, workers: int = WORKERS) -> dict[str, float]:
    rates: dict[str, float] = {}
    paths = sorted(job.pictures.iterdir())
    with timed(job, rates), ProcessPoolExecutor(workers, get_context("fork")) as executor:
        sizes = [*executor.map(code, paths, chunksize=16)]
    print(f"masks of {statistics.mean(sizes):,.0f} bytes", file=sys.stderr)
    return rates


# ------------------------------------------------------------------------------------------- ours


def command(job: Job, per_shard: int, verb: Sequence[str]) -> list[str]:
    told = ("--checkpoint", job.checkpoint, "--input", job.pictures, "--out", job.out)
    size = ("--batch-size", BATCH, "--samples-per-shard", per_shard)
    return [sys.executable, *verb, *map(str, (*told, *size))]


def measure_predict(
    job: Job, *, flags: Sequence[str] = (), network: str | None = None
) -> dict[str, float]:
    """`network`: of `STAND_INS`; None: the checkpoint's own."""
    count = len([*job.pictures.iterdir()])
    verb = ("-m", "pipelines.predict") if network is None else (__file__, network)
    # Some shards, however few the pictures.
    told = command(job, max(1, min(256, count // 8)), verb)
    begun = time.perf_counter()
    subprocess.run([*told, *flags], cwd=REPO, check=True)
    return {"whole": count / (time.perf_counter() - begun), "steady": steady_rate(job.out, count)}


def steady_rate(out: Path, count: int) -> float:
    """Masks a second between the end of the first shard and that of the last."""
    indexes = sorted(out.glob("*.idx"))
    first, *rest = (len(path.read_text().splitlines()) - 1 for path in indexes)
    if first + sum(rest) != count:
        raise RuntimeError(f"{first + sum(rest)} masks of {count} pictures")
    ends = [path.with_suffix(".tar").stat().st_mtime for path in (indexes[0], indexes[-1])]
    return sum(rest) / (ends[1] - ends[0])


def run_pointwise(argv: Sequence[str]) -> int:
    """`unet predict` with a convolution of 1 x 1 for a network."""
    predict: Any = import_module("pipelines.predict")
    load_model = predict.load_model

    def load_small(checkpoint: str) -> LoadedModel:
        loaded = load_model(checkpoint)
        small = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            small.weight.zero_()[1, 0] = 1
            small.bias.zero_()
        loaded.model.add_module("pointwise", small)
        loaded.model.forward = small.forward
        return loaded

    predict.load_model = load_small
    return predict.main(argv)


@cache
def field(height: int, width: int) -> Tensor:
    """float32 [height, width]: 50 times (0.5 less than a blob that is smooth, as in `draw`)."""
    small = torch.rand((1, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    return 50 * (nn.functional.interpolate(small, (height, width), mode="bicubic")[0, 0] - 0.5)


def run_without_network(argv: Sequence[str]) -> int:
    """`unet predict` with a forward pass that costs nothing: every image gets the same mask."""
    predict: Any = import_module("pipelines.predict")

    @cache
    def logits(height: int, width: int) -> Tensor:
        second = field(height, width)
        return torch.stack([torch.zeros_like(second), second])

    def make_forward(*_: object) -> Callable[[Tensor], Tensor]:
        return lambda image: logits(*image.shape[-2:]).expand(len(image), -1, -1, -1)

    predict.make_forward = make_forward
    return predict.main(argv)


def run_without_device(argv: Sequence[str]) -> int:
    """`unet predict` with masks that cost nothing but the batch of their images."""
    predict: Any = import_module("pipelines.predict")

    @cache
    def masks(count: int, height: int, width: int) -> Masks:
        classes = (field(height, width) > 0).to(torch.uint8).expand(count, -1, -1)
        counts = torch.tensor([[height * width - int(classes[0].sum()), int(classes[0].sum()), 0]])
        confidence = torch.full((count,), 0.9, dtype=torch.float64)
        return Masks(classes, confidence, None, None, counts.expand(count, -1))

    def predict_masks(_: object, images: Sequence[Tensor], *__: object, **___: object) -> Masks:
        batch = stack(images)
        return masks(len(batch), *batch.shape[-2:])

    predict.predict_masks = predict_masks
    return predict.main(argv)


STAND_INS = {
    "pointwise": run_pointwise,
    "no-network": run_without_network,
    "no-device": run_without_device,
}
"""What runs `unet predict` with something else for a network, by the name of its contender."""


CONTENDERS = {
    "forward": Contender("bare forward", "forward", partial(measure_forward, held=True)),
    "forward-given-back": Contender(
        "bare forward, memory given back", "forward", partial(measure_forward, held=False)
    ),
    "loop": Contender("picture by picture", "forward", measure_loop),
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
    ("predict", "forward-given-back", 0.85),
    ("predict", "loop", 1.1),
    ("predict-png", "loop", 1.1),
    ("predict", "monai", 2.0),
    ("predict-png", "monai", 2.0),
    ("pointwise", "codec", 0.75),
    ("no-network", "codec", 0.75),
    ("no-device", "codec", 0.75),
)
"""Contender, peer, and how many times the peer's speed is aimed at."""


def measure_once(name: str, job: Job) -> dict[str, float]:
    shutil.rmtree(job.out, ignore_errors=True)
    # Ours flushes to the disk what it writes, and would wait for what others left to be written.
    os.sync()
    rates = alone(CONTENDERS[name].measure, job)
    shutil.rmtree(job.out, ignore_errors=True)
    return rates


Rates = dict[tuple[str, str], list[float]]
"""{(contender, what was timed): pictures a second in each round}."""


def measure_part(part: str, job: Job, names: Sequence[str], rounds: int) -> Rates:
    rates: Rates = {}
    for number in range(1, rounds + 1):
        for name in names:
            for timed_what, rate in measure_once(name, job).items():
                rates.setdefault((name, timed_what), []).append(rate)
                word = f"round {number} of {rounds}, {part}, {name}, {timed_what}"
                print(f"{word}: {rate:.1f} pictures/s", file=sys.stderr, flush=True)
    return rates


def speed_table(rates: Rates) -> list[str]:
    titles = ("contender", "timed", "pictures/s, median", "min - max", "of each round")
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
        for timed_what in ("steady", "whole"):
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
    """MB of a process, 0 where it has gone meanwhile."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024e-6


def family(process: int) -> list[int]:
    """A process and all below it."""
    try:
        tasks = [*Path(f"/proc/{process}/task").iterdir()]
        below = [child for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [process, *(one for child in below for one in family(int(child)))]


class Watched:
    """A command that is looked at while it runs; ended with all that it started."""

    def __init__(self, told: Sequence[str]) -> None:
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            told, cwd=REPO, start_new_session=True, stdout=subprocess.DEVNULL
        )
        self.own = self.all = 0.0
        """Most MB so far: of the process, of all."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def until(self, there: Callable[[], bool]) -> float:
        """Look until something is there or the command has ended; seconds since it began."""
        while self.process.poll() is None and not there():
            process = self.process.pid
            self.own = max(self.own, memory_of(process, "status", "VmHWM"))
            every = (memory_of(one, "smaps_rollup", "Pss:") for one in family(process))
            self.all = max(self.all, sum(every))
            time.sleep(0.1)
        return self.seconds

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def memory_table(checkpoint: Path, work: Path, counts: Sequence[int]) -> list[str]:
    titles = ("inputs", "MB of its process", "MB of all processes", "seconds")
    lines = [row(*titles), row(*["---"] * len(titles))]
    for count in counts:
        job = Job(checkpoint, prepare(work, count, TINY), work / "out")
        shutil.rmtree(job.out, ignore_errors=True)
        watched = Watched(command(job, 256, ("-m", "pipelines.predict")))
        seconds = watched.until(lambda: False)
        if watched.process.returncode:
            raise SystemExit(f"unet predict ended with {watched.process.returncode}")
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
    job.pictures.write_text("\n".join(names) + "\n")
    passed: dict[str, list[float]] = {}
    memory: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        shutil.rmtree(job.out, ignore_errors=True)
        watched = Watched(command(job, 256, ("-m", "pipelines.predict")))
        stages = {
            "the list is read": lambda: (job.out / "job.json").exists(),
            "the first shard is begun": lambda: bool([*job.out.rglob("*predicted-000000*")]),
            "the first shard is there": lambda: (job.out / "predicted-000000.tar").exists(),
        }
        try:
            for stage, there in stages.items():
                passed.setdefault(stage, []).append(watched.until(there))
            if watched.process.poll() is not None:
                raise SystemExit(f"unet predict ended with {watched.process.returncode}")
        finally:
            watched.stop()
        memory.append((watched.own, watched.all))
        print(f"round {number} of {rounds}, list: {watched.seconds:.1f} s", file=sys.stderr)
    shutil.rmtree(job.out, ignore_errors=True)
    for stage, each in passed.items():
        median = statistics.median(each)
        lines.append(row(stage, f"{median:.1f}", ", ".join(f"{one:.1f}" for one in each)))
    own, every = map(max, zip(*memory, strict=True))
    return [*lines, "", f"Until then at most {own:,.0f} MB of its process, {every:,.0f} of all."]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in STAND_INS:
        raise SystemExit(STAND_INS[sys.argv[1]](sys.argv[2:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("forward", "pipeline", "memory", "list")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and results")
    parser.add_argument("--parts", nargs="+", choices=parts, default=["forward", "pipeline"])
    parser.add_argument("--pictures", type=int, default=400, help="of 512 x 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--inputs", nargs="+", type=int, default=[1_000, 10_000], help="of memory")
    arguments = parser.parse_args()
    if arguments.pictures < 16 or arguments.rounds < 1:
        parser.error("--pictures must be at least 16, --rounds 1")
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in CONTENDERS if name in arguments.only]
    if find_spec("monai") is None and "monai" in names:
        print("MONAI is left out: it is not installed", file=sys.stderr)
        names.remove("monai")
    checkpoint = save_model(work / "checkpoint", base_channels=4, depth=2)
    packages = ["torch", "pillow", *["monai"] * ("monai" in names)]
    print(
        f"{date.today()}, {arguments.pictures:,} pictures, {len(os.sched_getaffinity(0))} cores, "
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
            pictures = prepare(work, arguments.pictures, SIDE)
            rates = measure_part(
                part, Job(checkpoint, pictures, work / "out"), some, arguments.rounds
            )
            tables = [speed_table(rates), ratio_table(rates)]
        for table in tables:
            if table:
                print("", *table, sep="\n", flush=True)


if __name__ == "__main__":
    main()
