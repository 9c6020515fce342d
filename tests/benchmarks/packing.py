"""`unet pack` and `unet check` compared with their peers on the same generated pairs.

    python tests/benchmarks/packing.py --work DIR
    python tests/benchmarks/packing.py --work DIR --pairs 200 --only decode shardwriter

Pairs of 512 x 512: JPEG images of 100-140 kB and PNG masks of a few kB, generated once in DIR.
Every round runs each contender once, with two processes if it has workers:

    decode              only opens and loads image and mask with Pillow
    check               `unet check`
    pack                `unet pack`, which decodes and checks everything and rewrites masks
    shardwriter         webdataset.ShardWriter in a plain loop, one process; copies bytes
    headers-canonical   `unet pack --verify headers`; copies masks
    headers-rewritten   `unet pack --verify headers`; rewrites masks
    litdata             litdata.optimize; copies bytes; skipped if litdata is not installed
    tarfile             Python's tarfile; copies bytes into one tar per process

Times include the processes that a call starts and what it imports late, but not the import of its
module: each call runs in a fresh interpreter that has already done this. litdata runs with its
defaults, which spawn workers that import everything again; `litdata-forked` forks them.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from shards.masks.palettes import default_palette
from shards.masks.png import encode_mask

SIDE = 512
WORKERS = 2
CHUNK = 50
CLASSES = ("background", "foreground")


@dataclass(frozen=True, slots=True)
class Data:
    """Folders of the pairs, and their file names without extension."""

    images: Path
    binary: Path
    canonical: Path
    stems: tuple[str, ...]

    def read(self, stem: str) -> tuple[bytes, bytes]:
        image, mask = self.images / f"{stem}.jpg", self.binary / f"{stem}.png"
        return image.read_bytes(), mask.read_bytes()


@dataclass(frozen=True, slots=True)
class Contender:
    label: str
    measure: Callable[[Data, Path], float]
    """Writes into a folder that does not exist yet; returns seconds."""
    copies: bool = True
    """Whether its output contains every image."""


def blobs(rng: np.random.Generator, cells: int, bands: int) -> NDArray[np.float32]:
    """Draw smooth random fields [SIDE, SIDE, bands] between 0 and 255."""
    small = rng.integers(0, 256, (bands, cells, cells), dtype=np.uint8)
    size = (SIDE, SIDE)
    fields = [Image.fromarray(band).resize(size, Image.Resampling.BICUBIC) for band in small]
    return np.stack([np.asarray(field, dtype=np.float32) for field in fields], axis=-1)


def draw(number: int) -> dict[str, bytes]:
    """Generate the files of a pair, by the names of their folders."""
    rng = np.random.default_rng(number)
    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * rng.uniform(16, 24)
    pixels = (25 + 0.8 * blobs(rng, 8, 3) + noise).clip(0, 255).astype(np.uint8)
    index = (blobs(rng, 3, 1)[..., 0] > 140).astype(np.uint8)
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(image, "JPEG", quality=88)
    Image.fromarray(index * 255).save(mask, "PNG")
    return {
        "images": image.getvalue(),
        "masks_binary": mask.getvalue(),
        "masks_canonical": encode_mask(index, default_palette(CLASSES)),
    }


def path_of(folder: Path, kind: str, number: int) -> Path:
    return folder / kind / f"{number:06d}{'.jpg' if kind == 'images' else '.png'}"


def save_pair(folder: Path, number: int) -> None:
    for kind, data in draw(number).items():
        path_of(folder, kind, number).write_bytes(data)


def prepare(work: Path, pairs: int) -> Data:
    """Return the pairs, generated if missing; reads all of them into the page cache."""
    folder = work / f"pairs-{pairs}"
    first = draw(0)
    # Regenerate pairs of an older version, with other images or another mask format.
    if not folder.is_dir() or any(
        path_of(folder, kind, 0).read_bytes() != data for kind, data in first.items()
    ):
        part = work / f"pairs-{pairs}.part"
        for old in (folder, part):
            shutil.rmtree(old, ignore_errors=True)
        for kind in first:
            (part / kind).mkdir(parents=True)
        with ProcessPoolExecutor() as executor:
            saved = executor.map(partial(save_pair, part), range(pairs), chunksize=16)
            for _ in tqdm(saved, desc="generate", unit="pair", total=pairs):
                pass
        part.rename(folder)
    for kind in first:
        sizes = [len(path_of(folder, kind, number).read_bytes()) for number in range(pairs)]
        print(f"{kind}: {min(sizes):,} to {max(sizes):,} bytes", file=sys.stderr)
    return Data(
        images=folder / "images",
        binary=folder / "masks_binary",
        canonical=folder / "masks_canonical",
        stems=tuple(f"{number:06d}" for number in range(pairs)),
    )


def decode(data: Data, stem: str) -> None:
    for path in (data.images / f"{stem}.jpg", data.binary / f"{stem}.png"):
        with Image.open(path) as image:
            image.load()


def measure_decode(data: Data, out: Path) -> float:
    start = time.perf_counter()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("fork")) as executor:
        for _ in executor.map(partial(decode, data), data.stems, chunksize=CHUNK):
            pass
    return time.perf_counter() - start


def measure_unet(verb: str, data: Data, out: Path, masks: str, flags: Sequence[str]) -> float:
    main = import_module(f"pipelines.{verb}").main
    folders = ("--images", data.images, "--masks", getattr(data, masks), "--out", out)
    argv = [*map(str, folders), *flags, "--workers", str(WORKERS)]
    start = time.perf_counter()
    code = main(argv)
    seconds = time.perf_counter() - start
    if code != 0:
        raise RuntimeError(f"unet {verb} ended with {code}")
    return seconds


def measure_check(data: Data, out: Path) -> float:
    return measure_unet("check", data, out, "binary", ("--mask-format", "binary"))


def measure_pack(data: Data, out: Path) -> float:
    return measure_unet("pack", data, out, "binary", ("--mask-format", "binary"))


def measure_headers_canonical(data: Data, out: Path) -> float:
    flags = ("--mask-format", "index", "--classes", *CLASSES, "--verify", "headers")
    return measure_unet("pack", data, out, "canonical", flags)


def measure_headers_rewritten(data: Data, out: Path) -> float:
    flags = ("--mask-format", "binary", "--verify", "headers")
    return measure_unet("pack", data, out, "binary", flags)


def measure_shard_writer(data: Data, out: Path) -> float:
    from webdataset.writer import ShardWriter

    start = time.perf_counter()
    out.mkdir()
    with ShardWriter(f"{out}/%06d.tar", maxcount=10**9, maxsize=256 * 2**20) as writer:
        for stem in data.stems:
            image, mask = data.read(stem)
            info = {"source": f"{stem}.jpg", "width": SIDE, "height": SIDE}
            members = {"jpg": image, "mask.png": mask, "json": json.dumps(info).encode()}
            writer.write({"__key__": stem, **members})
    return time.perf_counter() - start


def litdata_sample(data: Data, stem: str) -> dict[str, bytes]:
    image, mask = data.read(stem)
    return {"image": image, "mask": mask}


def measure_litdata(data: Data, out: Path, start_method: str | None = None) -> float:
    # litdata empties both folders at the start; the default ones, `chunks` and `data` in the
    # temporary folder, may belong to others.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(out / "cache" / "chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(out / "cache" / "data")
    from litdata import optimize

    start = time.perf_counter()
    optimize(
        fn=partial(litdata_sample, data),
        inputs=list(data.stems),
        output_dir=str(out / "chunks"),
        chunk_bytes="64MB",
        num_workers=WORKERS,
        start_method=start_method,
    )
    return time.perf_counter() - start


def write_tar(data: Data, stems: Sequence[str], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for stem in stems:
            for extension, content in zip(("jpg", "mask.png"), data.read(stem), strict=True):
                member = tarfile.TarInfo(f"{stem}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def measure_tarfile(data: Data, out: Path) -> float:
    start = time.perf_counter()
    out.mkdir()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("fork")) as executor:
        tars = [
            executor.submit(write_tar, data, data.stems[rank::WORKERS], out / f"{rank}.tar")
            for rank in range(WORKERS)
        ]
        for tar in tars:
            tar.result()
    return time.perf_counter() - start


CONTENDERS = {
    "decode": Contender("decode only, 2 processes", measure_decode, copies=False),
    "check": Contender("`unet check`", measure_check, copies=False),
    "pack": Contender("`unet pack`", measure_pack),
    "shardwriter": Contender("`webdataset.ShardWriter`, 1 process", measure_shard_writer),
    "headers-canonical": Contender(
        "`unet pack --verify headers`, masks canonical", measure_headers_canonical
    ),
    "headers-rewritten": Contender(
        "`unet pack --verify headers`, masks rewritten", measure_headers_rewritten
    ),
    "litdata": Contender("`litdata.optimize`, 2 workers", measure_litdata),
    "litdata-forked": Contender(
        "`litdata.optimize`, 2 workers, forked", partial(measure_litdata, start_method="fork")
    ),
    "tarfile": Contender("bare `tarfile`, 2 processes", measure_tarfile),
}

GOALS = (
    ("check", "decode", 0.6),
    ("headers-canonical", "shardwriter", 3.0),
    ("headers-canonical", "litdata", 5.0),
    ("headers-rewritten", "shardwriter", 1.0),
)
"""Contender, peer, and the targeted ratio of their speeds."""


def in_this_process(name: str, data: Data, out: Path, log: Path) -> float:
    """Run one measurement in this process, with its output and its workers' redirected to `log`."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    return CONTENDERS[name].measure(data, out)


def measure_once(name: str, data: Data, work: Path) -> float:
    """Measure one contender in a fresh interpreter, with nothing left to be flushed to disk."""
    contender = CONTENDERS[name]
    out, log = work / f"out-{name}", work / f"{name}.log"
    shutil.rmtree(out, ignore_errors=True)
    # Ours flushes to disk, and would wait for unwritten data of the others.
    os.sync()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        try:
            seconds = executor.submit(in_this_process, name, data, out, log).result()
        except (Exception, SystemExit) as error:
            raise SystemExit(f"{name} failed ({error!r}); its output is in {log}") from error
    if contender.copies:
        num_bytes = sum(path.stat().st_size for path in data.images.iterdir())
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        if written < num_bytes:
            raise SystemExit(f"{name} wrote {written:,} bytes of {num_bytes:,}; see {log}")
    shutil.rmtree(out, ignore_errors=True)
    return seconds


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def speed_table(seconds: dict[str, list[float]], pairs: int) -> list[str]:
    lines = [
        row("contender", "pairs/s, median", "min - max", "seconds of each round"),
        row(*["---"] * 4),
    ]
    for name, raw in seconds.items():
        speeds = [pairs / one for one in raw]
        lines.append(
            row(
                CONTENDERS[name].label,
                f"{statistics.median(speeds):,.0f}",
                f"{min(speeds):,.0f} - {max(speeds):,.0f}",
                ", ".join(f"{one:.2f}" for one in raw),
            )
        )
    return lines


def ratio_table(seconds: dict[str, list[float]]) -> list[str]:
    lines = [row("ratio of speeds", "of the medians", "of each round", "goal"), row(*["---"] * 4)]
    measured = [goal for goal in GOALS if {*goal[:2]} <= seconds.keys()]
    for ours, peer, goal in measured:
        rounds = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
        lines.append(
            row(
                f"{ours} / {peer}",
                f"{statistics.median(seconds[peer]) / statistics.median(seconds[ours]):.2f}",
                ", ".join(f"{one:.2f}" for one in rounds),
                f"at least {goal:.2f}",
            )
        )
    return lines if measured else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for pairs and shards")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.rounds < 1:
        parser.error("--pairs and --rounds must be above 0")
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in CONTENDERS if name in arguments.only]
    if find_spec("litdata") is None:
        print("litdata is skipped: it is not installed", file=sys.stderr)
        names = [name for name in names if not name.startswith("litdata")]
    if not names:
        parser.error("no contender is left to measure")
    data = prepare(work, arguments.pairs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, arguments.rounds + 1):
        for name in names:
            seconds[name].append(measure_once(name, data, work))
            print(
                f"round {number} of {arguments.rounds}, {name}: {seconds[name][-1]:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    packages = ["numpy", "pillow", "webdataset", *["litdata"] * ("litdata" in names)]
    print(
        f"{date.today()}, {arguments.pairs:,} pairs, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages)
    )
    for table in (speed_table(seconds, arguments.pairs), ratio_table(seconds)):
        if table:
            print("", *table, sep="\n")


if __name__ == "__main__":
    main()
