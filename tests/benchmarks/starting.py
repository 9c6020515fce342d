"""Start and resume on a million samples: seconds to the first batch, and memory.

    python tests/benchmarks/starting.py --work DIR
    python tests/benchmarks/starting.py --work DIR --samples 20000 --rounds 1

Writes a data set of tiny samples (8 x 8) in 100 shards to DIR, once: 3 GB for a million. Then, in a
fresh process that has the imports of `unet train`, opens it at the start or in the middle of the
eighth epoch, without loader workers and with two, and takes the first batch of 16. The clock starts
before the manifest is read; files are in the page cache.

Memory is that of the process and its workers, minus that of the process after its imports, as
reported by the kernel (Pss_Anon and Pss_Shmem in smaps_rollup): shared pages count once, mapped
files do not count. It is measured at the first batch and after a hundred.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import import_module
from itertools import islice
from multiprocessing import active_children, get_context, set_start_method
from pathlib import Path

import numpy as np
from packing import row
from PIL import Image
from tqdm import tqdm

from shards.images.files import ImageFormat, encode_png
from shards.manifest import Manifest, ShardInfo, SizeCount, SplitInfo, write_manifest
from shards.masks.palettes import default_palette
from shards.masks.png import encode_mask
from shards.store import Store
from shards.writer import ShardWriter

SIDE = 8
SHARDS = 100
BATCH = 16
LATER = 100
"""Batches after which memory is measured again."""
CLASSES = ("background", "foreground")
WORKERS = (0, 2)
MIDDLE = 7.523456
"""Position of a resume, in epochs."""


def write_shard(folder: Path, number: int, samples: int) -> ShardInfo:
    image = encode_png(Image.new("RGB", (SIDE, SIDE), (90, 120, 150)))
    mask = encode_mask(np.eye(SIDE, dtype=np.uint8), default_palette(CLASSES))
    with ShardWriter(folder / f"train-{number:06}.tar") as writer:
        for sample in range(samples):
            key = f"patient_{number:03}/slice_{sample:06}"
            info = json.dumps({"source": f"{key}.png", "width": SIDE, "height": SIDE}).encode()
            writer.add(key, {"png": image, "mask.png": mask, "json": info})
        file = writer.seal()
    pixels = ((SIDE * SIDE - SIDE) * samples, SIDE * samples, 0)
    return ShardInfo(file.name, file.samples, file.bytes, file.sha256, pixels)


def prepare(work: Path, samples: int) -> Path:
    """Return the data set, written if missing; reads it into the page cache."""
    folder, part = work / f"samples-{samples}", work / f"samples-{samples}.part"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        numbers = tqdm(range(SHARDS), desc="write", unit="shard")
        shards = tuple(write_shard(part, number, samples // SHARDS) for number in numbers)
        sizes = (SizeCount(SIDE, SIDE, "RGB", samples // SHARDS * SHARDS),)
        manifest = Manifest(
            classes=CLASSES,
            palette=default_palette(CLASSES),
            image_format=ImageFormat("RGB"),
            mask_format={},
            mean=(0.35, 0.47, 0.59),
            std=(0.1, 0.1, 0.1),
            splits={"train": SplitInfo(shards, sizes)},
        )
        write_manifest(Store(part), manifest)
        part.rename(folder)
    for path in folder.iterdir():
        path.read_bytes()
    return folder


def memory() -> float:
    """Measure the MB of this process and its workers."""
    processes = [os.getpid(), *(child.pid for child in active_children())]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes]
    lines = [line.split() for rollup in rollups for line in rollup.splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:")) * 1024e-6


def set_up_process() -> None:
    # By default a spawned process spawns its workers; `unet train` forks them.
    set_start_method("fork", force=True)
    import_module("pipelines.train")


def measure(folder: Path, workers: int, start: int) -> tuple[float, float, float]:
    """Measure the seconds to the first batch, MB then, and MB after `LATER` batches."""
    from pipelines.loading.augment import AugmentConfig
    from pipelines.loading.batches import train_batches
    from pipelines.loading.dataset import DataSet
    from shards.manifest import read_manifest
    from shards.order import Order, TrainPlan

    imports, clock = memory(), time.perf_counter()
    data = DataSet(Store(folder), read_manifest(folder), None, workers)
    order = Order(tuple(shard.samples for shard in data.reader("train").shards), seed=0)
    plan = TrainPlan(order, BATCH, rank=0, world=1, start=start)
    batches = train_batches(data, plan, crop_size=SIDE, augment=AugmentConfig(), seed=0)
    batch = next(batches)
    seconds = time.perf_counter() - clock
    first = memory() - imports
    if batch.position.tolist() != list(range(start, start + BATCH)):
        raise RuntimeError(f"not the batch at {start}: {batch.position.tolist()}")
    for _ in islice(batches, LATER - 1):
        pass
    return seconds, first, memory() - imports


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = prepare(arguments.work.resolve(), arguments.samples)
    starts = (0, round(MIDDLE * arguments.samples))
    measured = {(workers, start): [] for workers in WORKERS for start in starts}
    for number in range(1, arguments.rounds + 1):
        for case, rounds in measured.items():
            with ProcessPoolExecutor(
                1, get_context("spawn"), initializer=set_up_process
            ) as executor:
                rounds.append(executor.submit(measure, folder, *case).result())
            print(f"round {number} of {arguments.rounds}, {case}", file=sys.stderr, flush=True)
    print(
        f"{date.today()}, {arguments.samples:,} samples in {SHARDS} shards, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}\n"
    )
    titles = ("workers", "position", "seconds to the first batch, median", "min - max")
    print(row(*titles, "MB at the first batch", f"MB after {LATER}"), row(*["---"] * 6), sep="\n")
    for (workers, start), rounds in measured.items():
        seconds, first, later = (sorted(values) for values in zip(*rounds, strict=True))
        span = f"{seconds[0]:.2f} - {seconds[-1]:.2f}"
        held = [f"{statistics.median(values):.0f}" for values in (first, later)]
        print(row(workers, f"{start:,}", f"{statistics.median(seconds):.2f}", span, *held))


if __name__ == "__main__":
    main()
