"""Planning and drawing COCO annotations: time and peak memory.

    python tests/benchmarks/annotations.py --images 100000 --polygons 1000000

Writes a COCO file of random polygons of 30 corners and one tiny image per entry into a temporary
folder (or --folder), reads it as `unet pack` does before work starts, then draws some of the masks.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from shards.annotations.scan import read_spans
from shards.annotations.source import AnnotationSource

WIDTH, HEIGHT, CORNERS = 640, 480, 30


def write_json(path: Path, num_images: int, num_polygons: int) -> None:
    """Write the annotations one by one, in an order that scatters those of an image."""

    def entries() -> Iterator[str]:
        rng = np.random.default_rng(0)
        angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        for number in range(num_polygons):
            radius = rng.uniform(5, 80, (CORNERS, 1))
            points = rng.uniform((0, 0), (WIDTH, HEIGHT)) + radius * circle
            yield json.dumps(
                {
                    "id": number,
                    "image_id": number % num_images,
                    "category_id": 1 + number % 80,
                    "segmentation": [points.round(2).ravel().tolist()],
                    "area": 1.0,
                    "bbox": [0.0, 0.0, 9.0, 9.0],
                    "iscrowd": 0,
                }
            )

    with path.open("w") as file:
        images = (
            json.dumps({"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT})
            for n in range(num_images)
        )
        file.write('{"images": [')
        write_joined(file, images)
        file.write('], "annotations": [')
        write_joined(file, entries())
        categories = [{"id": n, "name": f"class {n}"} for n in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def write_joined(file: TextIO, entries: Iterator[str]) -> None:
    """Write entries with commas between them."""
    for number, entry in enumerate(entries):
        file.write(f", {entry}" if number else entry)


def main() -> None:
    """Generate, plan and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--polygons", type=int, default=20_000)
    parser.add_argument("--drawn", type=int, default=500, help="masks to draw")
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = flags.folder or Path(temporary)
        path, images = root / "instances.json", root / "images"
        if not path.exists():
            images.mkdir(parents=True)
            for number in range(flags.images):
                (images / f"{number}.png").touch()
            write_json(path, flags.images, flags.polygons)
        before = time.perf_counter()
        found = AnnotationSource(path=path, kind="coco", images=images).find()
        seconds = time.perf_counter() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        size = path.stat().st_size / 2**20
        print(
            f"plan: {size:,.0f} MiB of JSON, {len(found.pairing.pairs):,} images, {seconds:.1f} s"
        )
        print(f"peak memory: {peak:.2f} GiB")
        chosen = found.pairing.pairs[:: max(1, len(found.pairing.pairs) // flags.drawn)]
        before = time.perf_counter()
        with path.open("rb") as file:
            for pair in chosen:
                found.rule.read_mask(read_spans(file, pair.spans), (WIDTH, HEIGHT), pair.source)
        each = (time.perf_counter() - before) / len(chosen)
        print(f"draw: {1000 * each:.2f} ms a mask of {WIDTH} x {HEIGHT}, one process")


if __name__ == "__main__":
    main()
