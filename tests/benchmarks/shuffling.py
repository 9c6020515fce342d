"""Quality of the shuffle: our order compared with webdataset's and a full permutation.

    python tests/benchmarks/shuffling.py --out shuffling.png
    python tests/benchmarks/shuffling.py --samples 20000 --shards 20

There are no images, only numbers: the position of every sample in the shards and in the stream of
two epochs. Ours is `shards.order` on one rank. webdataset's is its own stages on these numbers,
those of WebDataset(shardshuffle=100).shuffle(1000).batched(64) in a WebLoader with two workers; and
the same with the .unbatched().shuffle(1000).batched(64) that its documentation recommends.

    distance           in the stream, between neighbours in a shard, as a share of the stream
    shards per batch   number of different shards in a batch of 64
    epochs             correlation between the positions of a sample in two epochs
    met again          how often two samples of a batch share one in the next epoch too, as a
                       multiple of chance

The plot has a dot for each of several thousand samples: x is its position in the shards, y its
position in the first epoch.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packing import row
from PIL import Image, ImageDraw, ImageFont

from shards.order import Order

BATCH = 64
WORKERS = 2
BUFFER = 1000
EPOCHS = 2
SEED = 0

Streams = list[NDArray[np.int64]]
"""For each epoch, the sample numbers (in storage order) in the order of the stream."""


def ours(sizes: tuple[int, ...]) -> Streams:
    order, starts = Order(sizes, SEED), np.cumsum((0, *sizes))
    addresses = [order.locate(position) for position in range(EPOCHS * order.num_samples)]
    samples = [int(starts[address.shard]) + address.row for address in addresses]
    return list(np.array(samples).reshape(EPOCHS, -1))


def stock(sizes: tuple[int, ...], again: bool = False) -> Streams:
    # Its type stubs lack its exports.
    wds, starts = import_module("webdataset"), np.cumsum((0, *sizes))

    def read(shards: Iterator[dict[str, Any]]) -> Iterator[tuple[int]]:
        for shard in shards:
            number = int(shard["url"])
            yield from ((int(sample),) for sample in range(starts[number], starts[number + 1]))

    dataset = wds.DataPipeline(
        wds.SimpleShardList([str(number) for number in range(len(sizes))]),
        # As in WebDataset: a worker always gets the same shards in the same order.
        wds.split_by_worker,
        wds.shuffle(100, seed=SEED),
        read,
        wds.shuffle(BUFFER),
        wds.batched(BATCH),
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
    if again:
        loader = loader.unbatched().shuffle(BUFFER).batched(BATCH)
    return [np.concatenate([samples for (samples,) in loader]) for _ in range(EPOCHS)]


def permuted(sizes: tuple[int, ...]) -> Streams:
    rng = np.random.default_rng(SEED)
    return [rng.permutation(sum(sizes)) for _ in range(EPOCHS)]


SCHEMES: dict[str, Callable[[tuple[int, ...]], Streams]] = {
    "ours": ours,
    "webdataset": stock,
    "webdataset, reshuffled": lambda sizes: stock(sizes, again=True),
    "full permutation": permuted,
}


def figures(streams: Streams, sizes: tuple[int, ...]) -> list[str]:
    """Compute the cells of a scheme's row."""
    total, shard = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    places = [np.argsort(stream) for stream in streams]
    distance = np.abs(np.diff(places[0]))[shard[1:] == shard[:-1]] / total
    complete = total // BATCH * BATCH
    batches = np.sort(shard[streams[0][:complete]].reshape(-1, BATCH), axis=1)
    drawn = 1 + np.count_nonzero(np.diff(batches, axis=1), axis=1)
    first, second = (place // BATCH for place in places)
    _, met = np.unique(first * total + second, return_counts=True)
    _, sharing = np.unique(first, return_counts=True)
    pairs, again = ((count * (count - 1) // 2).sum() for count in (sharing, met))
    return [
        f"{np.median(distance):.3f}",
        f"{np.quantile(distance, 0.05):.4f}",
        f"{drawn.mean():.1f}",
        f"{drawn.min()}",
        f"{np.corrcoef(places[0], places[1])[0, 1]:.3f}",
        f"{again / pairs * (total - 1) / (BATCH - 1):.1f}",
    ]


def draw(schemes: dict[str, Streams], dots: int, out: Path) -> None:
    """Plot one panel per scheme, side by side; drawn at twice the size for smooth dots."""
    side, gap, edge, dot = 900, 60, 110, 3.5
    size = (len(schemes) * (side + gap) + gap, side + 2 * edge)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for number, (name, (stream, *_)) in enumerate(schemes.items()):
        left, places = gap + number * (side + gap), np.argsort(stream)
        pen.rectangle((left, edge, left + side, edge + side), fill="#f5f7fa", outline="#c9d1da")
        samples = np.linspace(0, len(stream) - 1, dots).astype(int)
        for sample, place in zip(samples.tolist(), places[samples].tolist(), strict=True):
            x, y = left + sample / len(stream) * side, edge + (1 - place / len(stream)) * side
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill="#1f5f99")
        pen.text((left, edge - 30), name, "#1c2733", ImageFont.load_default(50), anchor="ls")
    text = "x: position in the shards; y: position in the epoch"
    pen.text((gap, edge + side + 36), text, "#5b6875", ImageFont.load_default(40), anchor="lt")
    canvas.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS).quantize(32).save(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--out", type=Path, help="PNG of the plot")
    parser.add_argument("--dots", type=int, default=4000, help="samples per panel")
    arguments = parser.parse_args()
    borders = np.linspace(0, arguments.samples, arguments.shards + 1).astype(int)
    sizes = tuple(np.diff(borders).tolist())
    schemes = {name: scheme(sizes) for name, scheme in SCHEMES.items()}
    print(
        f"{date.today()}, {arguments.samples:,} samples in {arguments.shards:,} shards, "
        f"Python {platform.python_version()}, webdataset {version('webdataset')}\n"
    )
    titles = ("order", "distance, median", "5 %", "shards per batch, mean", "min", "epochs")
    print(row(*titles, "met again"), row(*["---"] * 7), sep="\n")
    for name, streams in schemes.items():
        if any(sorted(stream) != list(range(arguments.samples)) for stream in streams):
            raise SystemExit(f"{name} does not yield every sample once")
        print(row(name, *figures(streams, sizes)))
    if arguments.out is not None:
        draw(schemes, arguments.dots, arguments.out)


if __name__ == "__main__":
    main()
