"""An opened data set: its manifest and readers of its shards, for one rank."""

import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from accelerate import Accelerator

from pipelines.loading.stages import require_mask
from pipelines.runtime.processes import num_workers, refuse_negative_workers
from pipelines.runtime.verification import verify_shards
from pipelines.runtime.yaml_flags import refuse_unused
from shards.cache import ShardCache
from shards.manifest import Manifest
from shards.order import Address, EvalPlan, Order
from shards.reader import ShardReader
from shards.requests import REMOTE_TIMEOUT
from shards.sample import Sample, Uint8
from shards.store import Store, is_url

MAX_WORKERS = 8
"""Maximum default number of decoding processes per rank; one GPU needs no more to train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingOptions:
    """Data loading."""

    workers: int | None = None
    """Decoding processes per rank. Default: its share of the CPUs, at most 8; without a GPU, 1."""
    cache_dir: Path | None = None
    """Local folder that caches the shards of a URL, shared by all processes of a machine."""
    cache_bytes: int = 100_000_000_000
    """Maximum size of the cache folder in bytes."""
    remote_timeout: float = REMOTE_TIMEOUT
    """Seconds for a request to a bucket, retries included."""
    max_memory: str | None = None
    """Memory for decoding images, such as 8GiB, shared by the processes of this machine; an image
    that takes more is refused before decoding. Default: 40 % of what is free."""
    verify_shards: bool = False
    """First read every shard and compare its sha256 with the manifest."""

    def __post_init__(self) -> None:
        refuse_negative_workers(self.workers or 0)
        if self.cache_bytes < 1:
            raise ValueError(f"--cache-bytes must be >= 1, got {self.cache_bytes}")
        if self.cache_dir is None:
            refuse_unused(self, "has no effect without --cache-dir", "cache_bytes")

    def refuse_local_cache(self, data: str) -> None:
        """Raise ValueError if shards in a local folder are to be cached."""
        if self.cache_dir is not None and not is_url(data):
            raise ValueError(f"--cache-dir applies to data at a URL; {data} is a local folder")


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
    """Open a data set for this rank; verifies its shards if `options.verify_shards` is set.

    Prints to stderr if a remote data set is read without a cache.

    Args:
        place: folder or URL of the shards.
        options: how they are read.
        manifest: manifest of the data set.
        splits: splits that will be read.
        accelerator: rank and number of ranks.
        in_use: bytes of shards that the ranks of this machine read concurrently; a smaller
            cache would fetch the same shards repeatedly and is not used.
        remedy: what to change if the cache is too small, for the message.

    Raises:
        DataError: a shard does not match the manifest.
    """
    workers = default_workers(accelerator) if options.workers is None else options.workers
    cache, warning = None, ""
    if is_url(place):
        cache, warning = choose_cache(place, options, in_use, remedy)
    if warning and accelerator.is_main_process:
        print(warning, file=sys.stderr)
    data = DataSet(Store(place), manifest, cache, workers)
    if options.verify_shards:
        verify_shards(
            data.store,
            [*chain.from_iterable(manifest.splits[name].shards for name in splits)],
            threads=workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
    return data


def choose_cache(
    place: str, options: LoadingOptions, in_use: int, remedy: str
) -> tuple[ShardCache | None, str]:
    """Return the cache for remote data; if None, also the reason in one line."""
    ranges = f"{place} is read by range requests"
    if options.cache_dir is None:
        return None, f"{ranges}; --cache-dir DIR keeps its shards on disk ({in_use:,} bytes)"
    if options.cache_bytes < in_use:
        return None, (
            f"{ranges}: --cache-bytes {options.cache_bytes} is less than the {in_use:,} bytes of "
            f"shards in use at the same time; {remedy}"
        )
    return ShardCache(options.cache_dir, options.cache_bytes), ""


def train_bytes_in_use(
    order: Order,
    manifest: Manifest,
    splits: Sequence[str],
    accelerator: Accelerator,
    chunk: int,
) -> int:
    """Return the bytes of shards that training and validation on this machine read concurrently.

    `splits`: those in use; `chunk`: consecutive validation images per rank.
    """
    weights = [shard.bytes for shard in manifest.splits["train"].shards]
    local, world = local_ranks(), accelerator.num_processes
    first = accelerator.process_index // local * local
    ranks = range(first, min(first + local, world))
    shards = manifest.splits["val"].shards if "val" in splits else ()
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
