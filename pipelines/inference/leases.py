"""Leases of ranks on their shards: others take over the unfinished shards of a stalled rank.

While a rank makes progress it counts up in a small file of its own. The others read that file once
they have nothing left to do, and measure with their own clock how long it stays the same, so that
neither clocks nor process ids are compared over hosts. Two ranks may make one shard: the later one
discards it and looks for what is missing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.inference.options import WORK_DIR
from shards.manifest import MANIFEST
from shards.store import Store

RENEWALS = 4
"""Renewals of a lease within its timeout."""


@dataclass(slots=True)
class Lease:
    """The lease of this rank, renewed from the loop that predicts."""

    store: Store
    rank: int
    seconds: float
    """The timeout."""
    renewed: float = field(default=float("-inf"), init=False)
    count: int = field(default=0, init=False)

    def renew(self) -> None:
        """Count up in the file of this rank, at most `RENEWALS` times in the timeout.

        Writes nothing if the others have completed the job, which has removed these files.
        """
        now = time.monotonic()
        if now - self.renewed >= self.seconds / RENEWALS:
            self.renewed, self.count = now, self.count + 1
            if not self.store.exists(MANIFEST):
                self.store.write(lease_name(self.rank), str(self.count).encode(), WORK_DIR)


def lease_name(rank: int) -> str:
    """Return the path of the file of a rank, relative to the output folder."""
    return f"{WORK_DIR}/rank-{rank}.lease"


def read_lease(store: Store, rank: int) -> bytes:
    """Read the file of a rank; empty if it does not exist."""
    try:
        return store.read(lease_name(rank))
    except FileNotFoundError:
        return b""


def wait_for_ranks(
    store: Store,
    shards: Mapping[int, Sequence[str]],
    seconds: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, list[str]]:
    """Wait until the other ranks have finished their shards, or have stalled.

    Args:
        store: the output folder.
        shards: names of the shards of each other rank.
        seconds: time without progress after which a rank has stalled.
        sleep: waits between two checks of the folder.

    Returns:
        The unfinished shards of the stalled ranks; empty if all shards exist.
    """
    last: dict[int, object] = {}
    since: dict[int, float] = {}
    while True:
        present, now = {*store.names()}, time.monotonic()
        missing = {
            rank: [name for name in names if name not in present]
            for rank, names in shards.items()
            if not present.issuperset(names)
        }
        for rank, names in missing.items():
            state = (len(names), read_lease(store, rank))
            if last.get(rank) != state:
                last[rank], since[rank] = state, now
        still = {rank: n for rank, n in missing.items() if now - since[rank] >= seconds}
        if len(still) == len(missing):
            return still
        sleep(min(10.0, seconds / 20))
