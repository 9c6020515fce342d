"""An opened data set: where its shards lie, what they hold, and how they are read."""

import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from accelerate import Accelerator

from pipelines.loading.stages import require_mask
from pipelines.runtime.processes import num_workers
from pipelines.runtime.progress import progress
from shards.cache import ShardCache, download_chunks, refuse_changed_shard
from shards.manifest import Manifest, ShardInfo
from shards.order import Address, EvalPlan, Order
from shards.reader import ShardReader, open_shard
from shards.sample import Sample, Uint8
from shards.store import Store, is_url

MOST_WORKERS = 8
"""Decoding processes of a rank unless said otherwise; a GPU's training step needs no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingOptions:
    """How shards are read."""

    workers: int | None = None
    """Decoding processes per rank. Default: its share of the CPUs, at most 8."""
    cache_dir: Path | None = None
    """Local folder that keeps whole shards of a URL, shared by all processes of a machine."""
    cache_bytes: int = 100_000_000_000
    """Maximum size of the cache folder in bytes."""
    verify_shards: bool = False
    """Before anything else, read every shard once and compare its sha256 with the manifest."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be >= 0, got {self.workers}")
        if self.cache_bytes < 1:
            raise ValueError(f"--cache-bytes must be >= 1, got {self.cache_bytes}")

    def refuse_local_cache(self, data: str) -> None:
        """Raise ValueError if shards in a local folder are to be cached."""
        if self.cache_dir is not None and not is_url(data):
            raise ValueError(f"--cache-dir is for --data at a URL; {data} is a local folder")


@dataclass(frozen=True, slots=True)
class DataSet:
    """A manifest and the way to its shards. Picklable."""

    store: Store
    manifest: Manifest
    cache: ShardCache | None
    """Keeps whole remote shards; None: they are read by range requests, or are local."""
    workers: int
    """Processes of each rank that read and decode."""

    def reader(self, split: str, *, borders: bool = False) -> ShardReader:
        """A reader of the shards of a split, perhaps with its border maps.

        Raises DataError where it has no samples.
        """
        shards = self.manifest.split(split, self.store).shards
        return ShardReader(self.store, shards, self.cache, borders=borders)

    def samples(self, split: str, positions: Iterable[int]) -> Iterator[tuple[Sample, Uint8]]:
        """Yield the samples at some positions of a split, each with its mask, uint8 [H, W].

        Raises DataError if a sample cannot be read or has no mask.
        """
        reader, num_classes = self.reader(split), len(self.manifest.classes)
        starts = [*accumulate((shard.samples for shard in reader.shards), initial=0)]
        for position in positions:
            shard = bisect_right(starts, position) - 1
            raw = reader.read(Address(position, shard, position - starts[shard]))
            sample = raw.decode(self.manifest.image_format, num_classes)
            yield sample, require_mask(sample.mask, raw)


def open_data(
    place: str,
    options: LoadingOptions,
    manifest: Manifest,
    splits: Sequence[str],
    accelerator: Accelerator,
    in_use: int,
    remedy: str,
) -> DataSet:
    """Open a data set for this rank, and verify its shards if `options` ask for it.

    Args:
        place: folder or URL of the shards.
        options: how they are read.
        manifest: its manifest.
        splits: the splits that will be read.
        accelerator: provides rank and world size.
        in_use: bytes of shards that the ranks of this machine read from at a time; a smaller cache
            would fetch them again and again, and is not used.
        remedy: rest of the warning about a cache that is too small.

    Raises DataError naming a shard that differs from the manifest.
    """
    workers = default_workers(accelerator) if options.workers is None else options.workers
    cache, warning = None, ""
    if is_url(place):
        cache, warning = choose_cache(place, options, in_use, remedy)
    if warning and accelerator.is_main_process:
        print(warning, file=sys.stderr)
    data = DataSet(Store(place), manifest, cache, workers)
    if options.verify_shards:
        verify(data, splits, accelerator)
    return data


def choose_cache(
    place: str, options: LoadingOptions, in_use: int, remedy: str
) -> tuple[ShardCache | None, str]:
    """Return the cache of remote data, or None and a line that explains why it is not used."""
    ranges = f"{place} is read by range requests"
    if options.cache_dir is None:
        return None, f"{ranges}; --cache-dir DIR keeps shards here ({in_use:,} bytes at a time)"
    if options.cache_bytes < in_use:
        return None, (
            f"{ranges}: --cache-bytes {options.cache_bytes} is less than the {in_use:,} bytes of "
            f"shards that are read at a time; {remedy}"
        )
    return ShardCache(options.cache_dir, options.cache_bytes), ""


def train_in_use(order: Order, manifest: Manifest, accelerator: Accelerator, chunk: int) -> int:
    """Bytes of shards that training and validation use at one time on this machine.

    `chunk`: images that validation gives to a rank together.
    """
    weights = [shard.bytes for shard in manifest.splits["train"].shards]
    local, world = local_ranks(), accelerator.num_processes
    first = accelerator.process_index // local * local
    ranks = range(first, min(first + local, world))
    shards = manifest.splits["val"].shards
    plans = [EvalPlan(tuple(s.samples for s in shards), chunk, rank, world) for rank in ranks]
    validation = {
        shard for plan in plans for shard in plan.upcoming_shards(plan.chunk_bounds()[0] * chunk)
    }
    validated = sum(shards[shard].bytes for shard in validation)
    return order.max_weight_in_use(weights, ranks, world) + validated


def split_in_use(manifest: Manifest, split: str) -> int:
    """Bytes of shards that going through a split in order uses at one time on this machine."""
    sizes = [shard.bytes for shard in manifest.splits[split].shards]
    # A rank's workers are at most at a border between two shards.
    return min(sum(sizes), 2 * local_ranks() * max(sizes))


def verify(data: DataSet, splits: Sequence[str], accelerator: Accelerator) -> None:
    """Compare the sha256 of all shards with the manifest's, each on one rank.

    Raises DataError naming the first that differs.
    """
    shards = list(chain.from_iterable(data.manifest.splits[name].shards for name in splits))
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    total = sum(shard.bytes for shard in mine)
    with (
        ThreadPoolExecutor(max(1, data.workers)) as threads,
        progress(
            total=total, desc="verify shards", unit="byte", disable=not accelerator.is_main_process
        ) as bar,
    ):
        for shard in threads.map(lambda shard: verify_shard(data.store, shard), mine):
            bar.update(shard.bytes)


def verify_shard(store: Store, shard: ShardInfo) -> ShardInfo:
    """Raise DataError unless a shard has the bytes that were packed."""
    if store.local is not None:
        with open_shard(store.local / shard.name, shard) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        digest = hashlib.sha256()
        for data in download_chunks(shard, store):
            digest.update(data)
        found = digest.hexdigest()
    refuse_changed_shard(found, shard, store)
    return shard


def default_workers(accelerator: Accelerator) -> int:
    """Decoding processes for one rank: its share of the CPUs, one where the CPU also computes."""
    if accelerator.device.type == "cpu":
        return 1
    return min(MOST_WORKERS, rank_cpus())


def rank_cpus() -> int:
    """The share of one rank of the CPUs that this process may use; at least 1."""
    return max(1, num_workers(0, sys.maxsize) // local_ranks())


def local_ranks() -> int:
    """Ranks on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
