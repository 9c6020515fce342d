"""`--verify-shards`: every shard's sha256 compared with the manifest."""

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.runtime.progress import progress
from shards.cache import download_chunks, refuse_changed_shard
from shards.manifest import ShardInfo
from shards.reader import ShardReader, open_shard
from shards.store import Store


def verify_shards(
    store: Store,
    shards: Sequence[ShardInfo],
    *,
    threads: int = 1,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Compare the sha256 of shards and of their `.idx` with the manifest, each shard on one rank.

    Prints to stderr if the manifest has no sha256 of an `.idx`. Raises DataError naming the first
    shard that differs.
    """
    mine = shards[rank::world]
    unknown = sum(shard.idx_sha256 is None for shard in shards)
    if unknown and rank == 0:
        print(
            f"{store}: index.json has no sha256 of {unknown} .idx files, as in data sets packed "
            "earlier; they are compared with the headers of the tars as samples are read",
            file=sys.stderr,
        )
    total = sum(shard.bytes for shard in mine)
    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        progress(total=total, desc="verify shards", unit="byte", disable=rank > 0) as bar,
    ):
        for shard in pool.map(lambda shard: verify_shard(store, shard), mine):
            bar.update(shard.bytes)


def verify_shard(store: Store, shard: ShardInfo) -> ShardInfo:
    """Return the shard. Raises DataError if its sha256 or its `.idx` differs from the manifest."""
    ShardReader(store, [shard]).open_offsets([0])
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
