"""Shuffled training loaders compared with their peers on the same generated pairs.

    pip install litdata mosaicml-streaming simplejpeg
    python tests/benchmarks/loading.py --work DIR
    python tests/benchmarks/loading.py --work DIR --pairs 200 --rounds 1 --only limit ours

The pairs are those of packing.py: 512 x 512, JPEG images and canonical PNG masks. Every loader
yields decoded batches of 16, uint8, with two worker processes:

    limit        two processes that only decode bytes in memory, with Pillow; no batches
    ours         pipelines.loading.batches.train_batches on shards of `unet pack`, decoding with
    Pillow
    ours-turbo   `ours`, decoding with simplejpeg
    webdataset   WebDataset(shardshuffle=100).shuffle(1000) and WebLoader on the same shards, with
                 torch's collate function, which is faster than its own
    litdata      StreamingDataset(shuffle=True) and StreamingDataLoader on the same bytes
    mosaicml     the StreamingDataset(shuffle=True) of mosaicml-streaming and DataLoader on them
    folder       a plain Dataset on the folders and DataLoader(shuffle=True)

Peers decode with Pillow, masks as class indices. All data are prepared once, in DIR, and are in the
page cache. Every round runs each contender once, in a fresh interpreter that has imported its
packages. The time to the first batch includes the construction of the loader. Throughput is
measured from then until nine tenths of the samples have arrived. The rest is loaded too, and every
byte of every batch is read: a loader that misses a sample or yields different pixels is an error.
"""

import argparse
import hashlib
import io
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

# Decoding modules, and packing.py with them, are imported late: processes without simplejpeg must
# hide it first.
if TYPE_CHECKING:
    from packing import Data

    from shards.raw import RawSample

SIDE = 512
WORKERS = 2
BATCH = 16
SHARDS = 8
TIMED = 0.9
"""Share of the samples that is timed: towards the end, workers run out of work."""

Arrays = Sequence[Any]
"""Image and mask, or a batch of each; numpy or torch."""


class Measured(NamedTuple):
    speed: float
    """Samples per second."""
    first: float | None = None
    """Seconds to the first batch."""
    pixels: str = ""
    """Digest of all pixels, independent of the order of the samples."""


class Contender(NamedTuple):
    format: str
    """Format of the prepared data."""
    packages: tuple[str, ...]
    """Imported before the clock starts; a contender with a missing package is skipped."""
    load: Callable[[Path], Iterable[Arrays]] | None
    """Makes the loader; None: decodes without one."""


def write_shards(data: "Data", out: Path) -> None:
    folders = ("--images", data.images, "--masks", data.binary, "--out", out)
    flags = ("--mask-format", "binary", "--val-fraction", 0)
    size = ("--samples-per-shard", -(-len(data.stems) // SHARDS))
    if import_module("pipelines.pack").main([*map(str, (*folders, *flags, *size))]) != 0:
        raise RuntimeError("unet pack failed")


def read_pair(data: "Data", stem: str) -> dict[str, bytes]:
    """Read the bytes that the shards contain too."""
    image, mask = data.images / f"{stem}.jpg", data.canonical / f"{stem}.png"
    return {"image": image.read_bytes(), "mask": mask.read_bytes()}


def write_litdata(data: "Data", out: Path) -> None:
    # litdata empties both folders at the start; the default ones may belong to others.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(out / "cache" / "chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(out / "cache" / "data")
    import_module("litdata").optimize(
        fn=partial(read_pair, data),
        inputs=list(data.stems),
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=WORKERS,
        start_method="fork",
    )


def write_mds(data: "Data", out: Path) -> None:
    columns = {"image": "bytes", "mask": "bytes"}
    with import_module("streaming").MDSWriter(out=str(out), columns=columns) as writer:
        for stem in data.stems:
            writer.write(read_pair(data, stem))


FORMATS = {"shards": write_shards, "litdata": write_litdata, "mds": write_mds}
"""Writers of all formats except `folders`."""


def decode(image: bytes, mask: bytes) -> Arrays:
    return [np.asarray(Image.open(io.BytesIO(data))) for data in (image, mask)]


def load_ours(folder: Path) -> Iterator[Arrays]:
    from pipelines.loading.augment import AugmentConfig
    from pipelines.loading.batches import train_batches
    from pipelines.loading.dataset import DataSet
    from shards.manifest import read_manifest
    from shards.order import Order, TrainPlan
    from shards.store import Store

    data = DataSet(Store(folder), read_manifest(folder), None, WORKERS)
    order = Order(tuple(shard.samples for shard in data.reader("train").shards), seed=0)
    plan = TrainPlan(order, BATCH, rank=0, world=1, start=0)
    uncropped = AugmentConfig(foreground_share=0, warp_share=0)
    batches = train_batches(data, plan, crop_size=SIDE, augment=uncropped, seed=0)
    for batch in islice(batches, -(-order.num_samples // BATCH)):
        yield batch.image.permute(0, 2, 3, 1), batch.mask


def load_webdataset(folder: Path) -> Iterable[Arrays]:
    wds = import_module("webdataset")
    shards = sorted(map(str, folder.glob("train-*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=100).shuffle(1000).to_tuple("jpg", "mask.png")
    dataset = dataset.map(lambda members: decode(*members)).batched(BATCH, default_collate)
    return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)


def decoding(dataset: type[Any]) -> type[Any]:
    class Decoding(dataset):
        def __getitem__(self, index: Any) -> Arrays:
            return decode(**super().__getitem__(index))

    return Decoding


def load_litdata(folder: Path) -> Iterable[Arrays]:
    litdata = import_module("litdata")
    dataset = decoding(litdata.StreamingDataset)(str(folder), shuffle=True)
    return litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)


def load_mosaicml(folder: Path) -> Iterable[Arrays]:
    kind = decoding(import_module("streaming").StreamingDataset)
    dataset = kind(local=str(folder), shuffle=True, batch_size=BATCH)
    return DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)


class Folder(Dataset[Arrays]):
    def __init__(self, folder: Path) -> None:
        files = [sorted((folder / kind).iterdir()) for kind in ("images", "masks_canonical")]
        self.pairs = list(zip(*files, strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Arrays:
        return [np.asarray(Image.open(path)) for path in self.pairs[index]]


def load_folder(folder: Path) -> Iterable[Arrays]:
    return DataLoader(Folder(folder), batch_size=BATCH, shuffle=True, num_workers=WORKERS)


OURS = ("pipelines.loading.batches",)
CONTENDERS = {
    "limit": Contender("shards", (), None),
    "ours": Contender("shards", OURS, load_ours),
    "ours-turbo": Contender("shards", (*OURS, "simplejpeg"), load_ours),
    "webdataset": Contender("shards", ("webdataset",), load_webdataset),
    "litdata": Contender("litdata", ("litdata",), load_litdata),
    "mosaicml": Contender("mds", ("streaming",), load_mosaicml),
    "folder": Contender("folders", (), load_folder),
}
PEERS = ("webdataset", "litdata", "mosaicml", "folder")
GOALS = (("ours", "limit", 0.85), ("ours", "", 1.6), ("ours-turbo", "limit", 1.0))
"""Contender, peer (the best one if empty), and the targeted ratio of their speeds."""


def fingerprints(batch: Arrays) -> list[int]:
    """Compute a number for each sample to which all of its bytes contribute."""
    image, mask = map(torch.as_tensor, batch)
    sides = (len(image), SIDE, SIDE)
    assert (image.shape, mask.shape) == ((*sides, 3), sides)
    assert image.dtype == mask.dtype == torch.uint8
    words = [part.reshape(len(part), -1).view(torch.int64).sum(1) for part in (image, mask)]
    return (words[0] * 31 + words[1]).tolist()


def measure_loader(load: Callable[[Path], Iterable[Arrays]], folder: Path, pairs: int) -> Measured:
    torch.set_num_threads(1)
    # Making them writable would cost a copy.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    seen: list[int] = []
    times: list[tuple[int, float]] = []
    start = time.perf_counter()
    for batch in load(folder):
        seen += fingerprints(batch)
        times.append((len(seen), time.perf_counter() - start))
    distinct = sorted(set(seen))
    if len(distinct) != pairs or len(seen) >= pairs + BATCH:
        raise RuntimeError(f"{len(seen)} samples, {len(distinct)} of them distinct, of {pairs}")
    timed = next(one for one in times if one[0] >= TIMED * pairs)
    (num_first, first), (num_last, last) = times[0], timed
    digest = hashlib.sha256(repr(distinct).encode()).hexdigest()
    return Measured((num_last - num_first) / (last - first), first, digest)


def decode_only(raws: "Sequence[RawSample]") -> None:
    for data in (data for raw in raws for data in (raw.image, raw.mask) if data):
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def measure_limit(folder: Path, pairs: int) -> Measured:
    from shards.manifest import read_manifest
    from shards.order import Address
    from shards.reader import ShardReader

    shards = read_manifest(folder).split("train", folder).shards
    rows = [(shard, row) for shard, info in enumerate(shards) for row in range(info.samples)]
    raws = ShardReader(folder, shards).read_all([Address(0, *row) for row in rows])
    fork = get_context("fork").Process
    processes = [fork(target=decode_only, args=(raws[w::WORKERS],)) for w in range(WORKERS)]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode != 0 for process in processes):
        raise RuntimeError("a decoding process failed")
    return Measured(pairs / (time.perf_counter() - start))


def measure(name: str, folder: Path, pairs: int) -> Measured:
    _, packages, load = CONTENDERS[name]
    for package in packages:
        import_module(package)
    return measure_loader(load, folder, pairs) if load else measure_limit(folder, pairs)


def set_up_process(turbo: bool) -> None:
    """Initialise a fresh process."""
    # Keeps the output of packages out of the tables.
    os.dup2(2, 1)
    # By default a spawned process spawns its workers; a script forks them.
    set_start_method("fork", force=True)
    if not turbo:
        cast(dict[str, object], sys.modules)["simplejpeg"] = None


def alone(turbo: bool, function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh interpreter, with or without simplejpeg."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=set_up_process, initargs=(turbo,)) as executor:
        return executor.submit(function, *arguments).result()


def prepare_format(name: str, data: "Data") -> Path:
    """Return the folder of a data format, written if missing; reads it into the page cache."""
    pairs = data.images.parent
    # Inside the folder of the pairs, so that it is removed with it when they are regenerated.
    folder = pairs if name == "folders" else pairs / "loading" / name
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        alone(False, FORMATS[name], data, part)
        part.rename(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()
    return folder


def tables(measured: dict[str, list[Measured]]) -> Iterator[str]:
    from packing import row

    yield row("loader", "samples/s, median", "min - max", "seconds to the first batch")
    yield row(*["---"] * 4)
    speeds = {name: [one.speed for one in rounds] for name, rounds in measured.items()}
    median = {name: statistics.median(rounds) for name, rounds in speeds.items()}
    for name, rounds in speeds.items():
        firsts = [one.first for one in measured[name] if one.first is not None]
        first = f"{statistics.median(firsts):.2f}" if firsts else ""
        yield row(name, f"{median[name]:,.0f}", f"{min(rounds):,.0f} - {max(rounds):,.0f}", first)
    yield from ("", row("ratio of speeds", "of the medians", "of each round", "goal"))
    yield row(*["---"] * 4)
    best = max((name for name in PEERS if name in median), key=median.__getitem__, default="")
    for ours, other, goal in GOALS:
        peer = other or best
        if {ours, peer} <= median.keys():
            rounds = [a / b for a, b in zip(speeds[ours], speeds[peer], strict=True)]
            ratio, each = median[ours] / median[peer], ", ".join(f"{one:.2f}" for one in rounds)
            yield row(f"{ours} / {peer}", f"{ratio:.2f}", each, f"at least {goal:.2f}")


def main() -> None:
    from packing import prepare

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for pairs and shards")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    arguments = parser.parse_args()
    data = prepare(arguments.work.resolve(), arguments.pairs)
    measured: dict[str, list[Measured]] = {}
    for name in arguments.only:
        if all(map(find_spec, CONTENDERS[name].packages)):
            measured[name] = []
        else:
            print(f"{name} is skipped: its package is not installed", file=sys.stderr)
    for number in range(1, arguments.rounds + 1):
        for name, rounds in measured.items():
            folder = prepare_format(CONTENDERS[name].format, data)
            rounds.append(alone(name == "ours-turbo", measure, name, folder, arguments.pairs))
            progress = f"round {number} of {arguments.rounds}, {name}: {rounds[-1].speed:,.0f}"
            print(f"{progress} samples/s", file=sys.stderr, flush=True)
    optional = {"litdata": "litdata", "mosaicml": "mosaicml-streaming", "ours-turbo": "simplejpeg"}
    packages = ["torch", "pillow", "webdataset", *(optional[n] for n in measured if n in optional)]
    print(
        f"{date.today()}, {arguments.pairs:,} pairs, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages)
    )
    print("", *tables(measured), sep="\n")
    pixels = {name: rounds[-1].pixels for name, rounds in measured.items() if rounds[-1].pixels}
    if len({*pixels.values()}) > 1:
        raise SystemExit(f"loaders yield different pixels: {pixels}")


if __name__ == "__main__":
    main()
