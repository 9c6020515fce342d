"""A million pairs: time and memory of the plan and the manifest, which should grow linearly.

    python tests/benchmarks/packing_scale.py --work DIR --pairs 100000 1000000

Generates that many pairs of tiny, distinct images (8 x 8) in DIR, runs `unet pack` on them in a
fresh process, and prints the seconds until the plan is fixed, the seconds from the last shard to
the manifest, the peak memory, and the size of the manifest. Shards are simulated (a report with a
digest for each image) unless --shards writes them. Files of an earlier run are reused. Needs two
inodes per pair.
"""

import argparse
import hashlib
import resource
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from pipelines.packing.plan import PlannedShard
    from pipelines.packing.shard_job import PackRule

SIDE = 8
FOLDER = 1000
"""Pairs per folder."""


def draw(work: Path, pairs: int) -> None:
    """Write the missing pairs; all images are distinct."""
    marker = work / f".drawn-{pairs}"
    if marker.exists():
        return
    for start in tqdm(range(0, pairs, FOLDER), desc=f"generate {pairs:,}", unit="folder"):
        name = f"patient_{start // FOLDER:05d}"
        for part in ("images", "masks"):
            (work / part / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, min(start + FOLDER, pairs)):
            pixels = number.to_bytes(8, "big") * SIDE
            stem = f"{name}/slice_{number:07d}.png"
            (work / "images" / stem).write_bytes(png(pixels))
            mask = bytes(255 if byte & 1 else 0 for byte in pixels)
            (work / "masks" / stem).write_bytes(png(mask))
    marker.touch()


def png(pixels: bytes) -> bytes:
    """Encode 8 x 8 grey pixels as PNG."""
    rows = b"".join(b"\0" + pixels[i : i + SIDE] for i in range(0, SIDE * SIDE, SIDE))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def simulate(shards: "Sequence[PlannedShard]", rule: "PackRule", _: object) -> None:
    """Write what packing leaves behind: an empty shard and its report."""
    from pipelines.packing.plan import WORK_DIR
    from pipelines.packing.shard_job import REPORT_SUFFIX, ShardReport
    from shards.statistics import SampleStatistics
    from shards.writer import ShardFile

    for planned in shards:
        count = len(planned.samples)
        tally = SampleStatistics()
        tally.digests = [hashlib.sha256(s.source.encode()).hexdigest() for s in planned.samples]
        tally.sizes[SIDE, SIDE, "L"] = count
        tally.channels.add("L")
        tally.levels["L"] = np.full(256, count * SIDE * SIDE // 256, dtype=np.int64)
        tally.pixels[0] = count * SIDE * SIDE
        file = ShardFile(planned.name, count, 3584 * count, "0" * 64)
        report = ShardReport(planned.split, rule.plan, file, tally, [])
        rule.store.write(f"{WORK_DIR}/{planned.name}{REPORT_SUFFIX}", report.to_json())
        rule.store.write(planned.name, b"")


def pack(work: Path, out: Path, write_shards: bool) -> None:
    """Pack in this process and print time and memory."""
    from pipelines import pack as verb

    marks: dict[str, float] = {}

    def timed(name: str) -> None:
        function = getattr(verb, name)

        def call(*arguments: object, **named: object) -> object:
            marks[f"{name} starts"] = time.monotonic()
            result = function(*arguments, **named)
            marks[f"{name} ends"] = time.monotonic()
            return result

        setattr(verb, name, call)

    if not write_shards:
        verb.pack_shards = simulate
    for name in ("fix_plan", "finish_data_set"):
        timed(name)
    start = time.monotonic()
    code = verb.main(
        [
            *("--images", str(work / "images"), "--masks", str(work / "masks")),
            *("--mask-format", "binary", "--out", str(out)),
        ]
    )
    if code != 0:
        sys.exit(code)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    manifest = (out / "index.json").stat().st_size
    print(
        f"planned in {marks['fix_plan ends'] - start:.1f} s, manifest in "
        f"{marks['finish_data_set ends'] - marks['finish_data_set starts']:.1f} s, total "
        f"{time.monotonic() - start:.1f} s; peak memory {memory:,.0f} MiB; "
        f"manifest {manifest / 1e6:.2f} MB",
        flush=True,
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument(
        "--shards", action="store_true", help="write the shards instead of simulating them"
    )
    arguments = parser.parse_args()
    for pairs in arguments.pairs:
        work = arguments.work / str(pairs)
        draw(work, pairs)
        out = work / "shards"
        shutil.rmtree(out, ignore_errors=True)
        print(f"{pairs:,} pairs:", flush=True)
        process = get_context("spawn").Process(target=pack, args=(work, out, arguments.shards))
        process.start()
        process.join()
        shutil.rmtree(out, ignore_errors=True)
        if process.exitcode != 0:
            sys.exit(f"packing {pairs:,} pairs exited with {process.exitcode}")


if __name__ == "__main__":
    main()
