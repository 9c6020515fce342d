"""An opened data set: its manifest and readers of its shards, for one rank."""

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import inf
from pathlib import Path

from accelerate import Accelerator

from pipelines.runtime.processes import num_workers
from pipelines.runtime.progress import progress
from shards.cache import ShardCache, download_chunks, refuse_changed_shard
from shards.manifest import Manifest, ShardInfo
from shards.order import EvalPlan, Order
from shards.reader import ShardReader, open_shard
from shards.store import Store, is_url

MAX_WORKERS = 8
"""Maximum default number of decoding processes per rank; one GPU needs no more to train."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Location of the data set and how it is read; shared by `unet train` and `unet evaluate`."""

    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    workers: int | None = None
    """Decoding processes per rank; default: its share of the CPUs, at most 8."""
    cache_dir: Path | None = None
    """Local folder that caches the shards of a URL, shared by all processes of a machine."""
    cache_bytes: int = 100_000_000_000
    """Maximum size of the cache folder in bytes."""
    verify_shards: bool = False
    """First read every shard and compare its sha256 with the manifest."""
    rank_timeout: float = 10
    """Minutes that a rank waits for the others before it exits. Must exceed the time of startup, of
    a checkpoint, and of the difference between ranks in validation."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be >= 0, got {self.workers}")
        if self.cache_bytes < 1:
            raise ValueError(f"cache_bytes must be > 0, got {self.cache_bytes}")
        if not 0 < self.rank_timeout < inf:
            raise ValueError(f"rank_timeout must be a number > 0, got {self.rank_timeout}")
        if self.cache_dir is not None and not is_url(self.data):
            raise ValueError(f"--cache-dir applies to data at a URL; {self.data} is a folder")


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set: its location, manifest and cache. Picklable."""

    store: Store
    manifest: Manifest
    cache: ShardCache | None
    """Cache of remote shards; None: they are local, or are read by range requests."""
    workers: int
    """Decoding processes per rank."""

    def reader(self, split: str, *, borders: bool = False) -> ShardReader:
        """Make a reader of a split; `borders`: read border maps too.

        Raises DataError if the split has no samples.
        """
        shards = self.manifest.split(split, self.store).shards
        return ShardReader(self.store, shards, self.cache, borders=borders)


def open_data(
    config: DataConfig,
    manifest: Manifest,
    splits: Sequence[str],
    accelerator: Accelerator,
    in_use: int,
    remedy: str,
) -> DataSet:
    """Open a data set for this rank; verifies its shards if `config.verify_shards` is set.

    Prints to stderr if a remote data set is read without a cache.

    Args:
        config: location and settings.
        manifest: manifest of the data set.
        splits: splits that will be read.
        accelerator: rank and number of ranks.
        in_use: bytes of shards that the ranks of this machine read concurrently; a smaller
            cache would fetch the same shards repeatedly and is not used.
        remedy: end of the message about a cache that is too small.

    Raises:
        DataError: a shard does not match the manifest.
    """
    workers = default_workers(accelerator) if config.workers is None else config.workers
    cache, warning = None, ""
    if is_url(config.data):
        cache, warning = choose_cache(config, in_use, remedy)
    if warning and accelerator.is_main_process:
        print(warning, file=sys.stderr)
    data = DataSet(Store(config.data), manifest, cache, workers)
    if config.verify_shards:
        verify(data, splits, accelerator)
    return data


def choose_cache(config: DataConfig, in_use: int, remedy: str) -> tuple[ShardCache | None, str]:
    """Return the cache for remote data; if None, also the reason in one line."""
    ranges = f"{config.data} is read by range requests"
    if config.cache_dir is None:
        return None, f"{ranges}; --cache-dir DIR caches shards locally ({in_use:,} bytes in use)"
    if config.cache_bytes < in_use:
        return None, (
            f"{ranges}: --cache-bytes {config.cache_bytes} is less than the {in_use:,} bytes of "
            f"shards in use at the same time; {remedy}"
        )
    return ShardCache(config.cache_dir, config.cache_bytes), ""


def train_bytes_in_use(
    order: Order, manifest: Manifest, accelerator: Accelerator, chunk: int
) -> int:
    """Return the bytes of shards that training and validation on this machine read concurrently.

    `chunk`: consecutive validation images per rank.
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


def split_bytes_in_use(manifest: Manifest, split: str) -> int:
    """Return the bytes of shards that a pass over a split on this machine reads concurrently."""
    sizes = [shard.bytes for shard in manifest.splits[split].shards]
    # The workers of a rank read from at most two adjacent shards.
    return min(sum(sizes), 2 * local_ranks() * max(sizes))


def verify(data: DataSet, splits: Sequence[str], accelerator: Accelerator) -> None:
    """Compare the sha256 of all shards with the manifest, each shard on one rank.

    Raises DataError naming the first shard that differs.
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
    """Return the shard. Raises DataError if its sha256 differs from the manifest."""
    if store.local is not None:
        with open_shard(store.local / shard.name, shard) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        digest = hashlib.sha256()
        for data in download_chunks(shard, store):
            digest.update(data)
        sha256 = digest.hexdigest()
    refuse_changed_shard(sha256, shard, store)
    return shard


def default_workers(accelerator: Accelerator) -> int:
    """Return the decoding processes of a rank: its share of the CPUs, or 1 without a GPU."""
    if accelerator.device.type == "cpu":
        return 1
    return min(MAX_WORKERS, rank_cpus())


def rank_cpus() -> int:
    """Return the share of a rank of the CPUs that this process may use; at least 1."""
    return max(1, num_workers(0, sys.maxsize) // local_ranks())


def local_ranks() -> int:
    """Return the number of ranks on this machine, set by the launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
