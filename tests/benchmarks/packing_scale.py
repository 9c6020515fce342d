"""A million pairs: time and memory of planning, packing and the manifest, and that they are linear.

    python tests/benchmarks/packing_scale.py --work DIR --pairs 100000 1000000

Draws that many pairs of tiny pictures (8 x 8, each another one) into DIR, packs them with
`unet pack` in a process of its own, and prints the seconds until the plan is fixed, the seconds of
the whole, the most memory that the planning process and the largest of its workers held, and the
size of the manifest. Files of an earlier run are used again. Needs two inodes a pair.
"""

import argparse
import resource
import shutil
import struct
import sys
import time
import zlib
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

SIDE = 8
FOLDER = 1000
"""Pairs in one folder."""


def draw(work: Path, pairs: int) -> None:
    """Write pairs that are not there yet; every picture differs from every other."""
    marker = work / f".drawn-{pairs}"
    if marker.exists():
        return
    for start in tqdm(range(0, pairs, FOLDER), desc=f"draw {pairs:,}", unit="folder"):
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
    """Grey PNG of 8 x 8 pixels."""
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


def pack(work: Path, out: Path, verify: str) -> None:
    """Pack in this process and say what it took."""
    from pipelines import pack as verb

    begun = time.monotonic()
    planned: list[float] = []
    fix_plan = verb.fix_plan

    def timed(*arguments: object) -> None:
        fix_plan(*arguments)  # type: ignore[arg-type]
        planned.append(time.monotonic() - begun)

    verb.fix_plan = timed  # type: ignore[assignment]
    code = verb.main(
        [
            *("--images", str(work / "images"), "--masks", str(work / "masks")),
            *("--mask-format", "binary", "--out", str(out), "--verify", verify),
        ]
    )
    if code != 0:
        sys.exit(code)
    seconds = time.monotonic() - begun
    mine, workers = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    manifest = (out / "index.json").stat().st_size
    print(
        f"planned in {planned[0]:.1f} s, packed in {seconds:.1f} s; most memory {mine:,.0f} MiB, "
        f"largest worker {workers:,.0f} MiB; manifest {manifest / 1e6:.2f} MB",
        flush=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--verify", choices=("full", "headers"), default="full")
    arguments = parser.parse_args()
    for pairs in arguments.pairs:
        work = arguments.work / str(pairs)
        draw(work, pairs)
        out = work / "shards"
        shutil.rmtree(out, ignore_errors=True)
        print(f"{pairs:,} pairs:", flush=True)
        process = get_context("spawn").Process(target=pack, args=(work, out, arguments.verify))
        process.start()
        process.join()
        shutil.rmtree(out, ignore_errors=True)
        if process.exitcode != 0:
            sys.exit(f"packing {pairs:,} pairs ended with {process.exitcode}")


if __name__ == "__main__":
    main()
