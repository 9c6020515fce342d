"""Endurance: 2,000 steps over many epochs and 20,000 predictions, each with flat resources.

`python tests/faults/endurance.py [STEPS IMAGES]` samples memory, descriptors and threads of the
command with its workers, and the names in /dev/shm. The last quarter of the samples is compared
with the second quarter: by then caches and pools are filled.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

INTERVAL = 0.25
"""Seconds between samples."""
MAX_GROWTH = 0.05
"""Growth of the memory that is noise of the allocator, as a share."""


class Sample(NamedTuple):
    """What a command and its workers hold at one moment."""

    memory: int
    """Resident bytes."""
    descriptors: int
    threads: int
    shared: int
    """Names in /dev/shm."""


def take_sample(process: psutil.Process) -> Sample:
    """Sum over a process and its descendants."""
    memory = descriptors = threads = 0
    for each in [process, *process.children(recursive=True)]:
        with each.oneshot():
            memory += each.memory_info().rss
            descriptors += each.num_fds()
            threads += each.num_threads()
    return Sample(memory, descriptors, threads, len(os.listdir("/dev/shm")))


def watch(verb: str, *flags: object) -> list[Sample]:
    """Run a verb and return the samples. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", f"pipelines.{verb}", *map(str, flags)]
    samples: list[Sample] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as started:
        process = psutil.Process(started.pid)
        while started.poll() is None:
            # A process may end while it is looked at.
            with suppress(psutil.Error):
                samples.append(take_sample(process))
            time.sleep(INTERVAL)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, command)
    return samples


def assert_flat(name: str, samples: list[Sample]) -> None:
    """Print the medians of the second and of the last quarter; fail if they grew."""
    quarter = len(samples) // 4
    assert quarter >= 10, f"{name}: {len(samples)} samples are too few"
    parts = samples[quarter : 2 * quarter], samples[-quarter:]
    for field in Sample._fields:
        before, after = (statistics.median(getattr(s, field) for s in part) for part in parts)
        print(f"{name:8} {field:12} {before:14,.0f} {after:14,.0f}", flush=True)
        limit = before * (1 + MAX_GROWTH) if field == "memory" else before + 2
        assert after <= limit, f"{name}: {field} grew from {before:,.0f} to {after:,.0f}"


def draw_images(folder: Path, count: int, masks: bool) -> None:
    """Write images of noise, and masks of their bright half, 32 x 32."""
    random = np.random.default_rng(0)
    for part in ("images", "masks") if masks else ("images",):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        pixels = random.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        if masks:
            mask = (pixels[..., 0] > 127).astype(np.uint8) * 255
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def main(steps: int, images: int) -> None:
    """Train and predict in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder / "train", 40, masks=True)
        draw_images(folder / "many", images, masks=False)
        pairs = ("--images", folder / "train" / "images", "--masks", folder / "train" / "masks")
        watch("pack", *pairs, "--mask-format", "binary", "--out", folder / "data")
        run = folder / "run"
        model = ("--model.preset", "small", "--model.base-channels", 2, "--model.depth", 1)
        batches = ("--crop-size", 32, "--global-batch-size", 4, "--workers", 1)
        often = ("--steps", steps, "--eval-every", steps // 20, "--log-every", 10)
        place = ("--data", folder / "data", "--run-dir", run, "--tracking.backend", "none")
        assert_flat("train", watch("train", *place, *model, *batches, *often))
        predict = ("--checkpoint", run, "--input", folder / "many" / "images", "--workers", 1)
        assert_flat("predict", watch("predict", *predict, "--out", folder / "masks"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ("2000", "20000")))
