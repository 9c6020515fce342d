"""Shuffled training loaders beside their peers, in turn, on the same generated pairs.

    pip install litdata mosaicml-streaming simplejpeg
    python tests/benchmarks/loading.py --work DIR
    python tests/benchmarks/loading.py --work DIR --pairs 200 --rounds 1 --only limit ours

The pairs are those of packing.py: 512 x 512, JPEG pictures and canonical PNG masks. Every loader
yields decoded batches of 16, uint8, with two worker processes:

    limit        two processes that only decode, with Pillow, bytes that are in memory; no batches
    ours         pipelines.batches.train_batches on shards of `unet pack`, decoding with Pillow
    ours-turbo   the same where simplejpeg can be imported
    webdataset   WebDataset(shardshuffle=100).shuffle(1000) and WebLoader on the same shards; its
                 batches are collated by torch, which is faster than its own way
    litdata      StreamingDataset(shuffle=True) and StreamingDataLoader on the same bytes
    mosaicml     mosaicml-streaming's StreamingDataset(shuffle=True) and DataLoader, likewise
    folder       a plain Dataset on the folders and DataLoader(shuffle=True)

Peers decode with Pillow, masks as class indices. All data are prepared once, in DIR, and are in the
page cache. Every round runs each contender once, in a fresh interpreter that has imported what it
needs. The first batch is timed from making the loader; the speed is that from then until nine
tenths of the samples are there. The rest is drawn too, and every byte of every batch read: a
loader that misses a sample or yields other pixels is an error.
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

# What decodes, and packing.py with it, is imported where it is used: processes that must do
# without simplejpeg hide it first.
if TYPE_CHECKING:
    from packing import Data

    from shards.reader import RawSample

SIDE = 512
WORKERS = 2
BATCH = 16
SHARDS = 8
TIMED = 0.9
"""Share of the samples with which the clock stops: at the end, workers run out of work."""

Arrays = Sequence[Any]
"""Picture and mask, or a batch of each; numpy or torch."""


class Measured(NamedTuple):
    speed: float
    """Samples a second."""
    first: float | None = None
    """Seconds to the first batch."""
    pixels: str = ""
    """A digest of all pixels, whatever the order of the samples."""


class Contender(NamedTuple):
    form: str
    """The prepared data that it reads."""
    packages: tuple[str, ...]
    """Imported before the clock starts; where one is missing, it is left out."""
    load: Callable[[Path], Iterable[Arrays]] | None
    """None: decodes without a loader."""


def write_shards(data: "Data", out: Path) -> None:
    folders = ("--images", data.images, "--masks", data.binary, "--out", out)
    flags = ("--mask-format", "binary", "--val-fraction", 0)
    most = ("--samples-per-shard", -(-len(data.stems) // SHARDS))
    if import_module("pipelines.pack").main([*map(str, (*folders, *flags, *most))]) != 0:
        raise RuntimeError("unet pack failed")


def read_pair(data: "Data", stem: str) -> dict[str, bytes]:
    """The bytes that are in the shards too."""
    picture, mask = data.images / f"{stem}.jpg", data.canonical / f"{stem}.png"
    return {"image": picture.read_bytes(), "mask": mask.read_bytes()}


def write_litdata(data: "Data", out: Path) -> None:
    # It empties both folders, which by default are others' too, when it starts.
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


FORMS = {"shards": write_shards, "litdata": write_litdata, "mds": write_mds}
"""How the forms other than `folders` are made."""


def decode(image: bytes, mask: bytes) -> Arrays:
    return [np.asarray(Image.open(io.BytesIO(data))) for data in (image, mask)]


def load_ours(folder: Path) -> Iterator[Arrays]:
    from pipelines.augment import AugmentConfig
    from pipelines.batches import train_batches
    from pipelines.dataset import DataSet
    from shards.index import read_manifest
    from shards.order import Order, TrainPlan
    from shards.store import Store

    data = DataSet(Store(folder), read_manifest(folder), None, WORKERS)
    order = Order(tuple(shard.samples for shard in data.reader("train").shards), seed=0)
    plan = TrainPlan(order, BATCH, rank=0, world=1, start=0)
    whole = AugmentConfig(foreground_share=0, warp_share=0)
    batches = train_batches(data, plan, crop_size=SIDE, augment=whole, seed=0)
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


OURS = ("pipelines.batches",)
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
"""Contender, peer (the best if empty), and how many times the peer's speed is aimed at."""


def fingerprints(batch: Arrays) -> list[int]:
    """A number for each sample, to which every one of its bytes contributes."""
    image, mask = map(torch.as_tensor, batch)
    sides = (len(image), SIDE, SIDE)
    assert (image.shape, mask.shape) == ((*sides, 3), sides)
    assert image.dtype == mask.dtype == torch.uint8
    words = [part.reshape(len(part), -1).view(torch.int64).sum(1) for part in (image, mask)]
    return (words[0] * 31 + words[1]).tolist()


def measure_loader(load: Callable[[Path], Iterable[Arrays]], folder: Path, pairs: int) -> Measured:
    torch.set_num_threads(1)
    # A copy would make them writable, and slower.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    seen: list[int] = []
    times: list[tuple[int, float]] = []
    began = time.perf_counter()
    for batch in load(folder):
        seen += fingerprints(batch)
        times.append((len(seen), time.perf_counter() - began))
    distinct = sorted(set(seen))
    if len(distinct) != pairs or len(seen) >= pairs + BATCH:
        raise RuntimeError(f"{len(seen)} samples, {len(distinct)} of them distinct, of {pairs}")
    (few, first), (most, last) = times[0], next(one for one in times if one[0] >= TIMED * pairs)
    digest = hashlib.sha256(repr(distinct).encode()).hexdigest()
    return Measured((most - few) / (last - first), first, digest)


def decode_only(raws: "Sequence[RawSample]") -> None:
    for data in (data for raw in raws for data in (raw.image, raw.mask) if data):
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def measure_limit(folder: Path, pairs: int) -> Measured:
    from shards.index import read_manifest
    from shards.order import Address
    from shards.reader import ShardReader

    shards = read_manifest(folder).split("train", folder).shards
    rows = [(shard, row) for shard, info in enumerate(shards) for row in range(info.samples)]
    raws = ShardReader(folder, shards).read_all([Address(0, *row) for row in rows])
    fork = get_context("fork").Process
    processes = [fork(target=decode_only, args=(raws[w::WORKERS],)) for w in range(WORKERS)]
    began = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode != 0 for process in processes):
        raise RuntimeError("a process could not decode")
    return Measured(pairs / (time.perf_counter() - began))


def measure(name: str, folder: Path, pairs: int) -> Measured:
    _, packages, load = CONTENDERS[name]
    for package in packages:
        import_module(package)
    return measure_loader(load, folder, pairs) if load else measure_limit(folder, pairs)


def begin(turbo: bool) -> None:
    """Before anything else in a process."""
    # What packages print must not stand among the tables.
    os.dup2(2, 1)
    # A spawned process would spawn its workers in turn; a script forks them.
    set_start_method("fork", force=True)
    if not turbo:
        cast(dict[str, object], sys.modules)["simplejpeg"] = None


def alone(turbo: bool, function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a fresh interpreter, with simplejpeg or without."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=begin, initargs=(turbo,)) as executor:
        return executor.submit(function, *arguments).result()


def make(form: str, data: "Data") -> Path:
    """The folder of a form, written if it is not there; read once, into the page cache."""
    pairs = data.images.parent
    # Inside the folder of the pairs, and so removed with it when other pairs are drawn.
    folder = pairs if form == "folders" else pairs / "loading" / form
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        alone(False, FORMS[form], data, part)
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
            print(f"{name} is left out: its package is not installed", file=sys.stderr)
    for number in range(1, arguments.rounds + 1):
        for name, rounds in measured.items():
            folder = make(CONTENDERS[name].form, data)
            rounds.append(alone(name == "ours-turbo", measure, name, folder, arguments.pairs))
            word = f"round {number} of {arguments.rounds}, {name}: {rounds[-1].speed:,.0f}"
            print(f"{word} samples/s", file=sys.stderr, flush=True)
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
        raise SystemExit(f"not all yield the same pixels: {pixels}")


if __name__ == "__main__":
    main()
