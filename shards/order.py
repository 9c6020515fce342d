"""The order of samples: a pure function of shard sizes, seed and position.

The training stream is endless. Position p = epoch * N + j; global batch s consists of the positions
[s * G, (s + 1) * G); rank r of W takes the positions p = r (mod W). Within an epoch

1. the shards are permuted with (seed, epoch);
2. their samples, in that order, are cut into L lanes of consecutive samples, where lane l has
   ceil((N - l) / L) samples; cuts may fall inside a shard;
3. each lane is shuffled within windows (a data set of at most 16,384 samples is instead fully
   permuted before the cut);
4. j is sample j // L of lane j mod L.

None of this depends on the number of ranks or workers. A rank draws from every gcd(L, W)-th lane:
if W divides L, it has these lanes, and except at their borders also their shards, to itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
LANES = 96
WINDOW = 4096
MAX_FULL_SHUFFLE = 16_384
"""Data sets of up to this many samples are fully permuted in each epoch."""


SHARDS, SAMPLES, IN_WINDOW, SUBSTITUTE = range(4)
"""Seed words that make the random numbers of different uses independent."""


class Address(NamedTuple):
    """Position of a sample in a stream, and its shard and row."""

    position: int
    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one training stream. Raises ValueError for an empty stream."""

    sizes: tuple[int, ...]
    """Number of samples in each shard."""
    seed: int
    lanes: int = LANES
    window: int = WINDOW
    num_samples: int = field(init=False)
    """Number of samples in an epoch."""
    _epochs: dict[int, "EpochOrder"] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", sum(self.sizes))
        if self.num_samples == 0:
            raise ValueError("a stream needs at least one sample")
        if self.lanes < 1 or self.window < 1:
            raise ValueError(
                f"lanes and window must be at least 1, got {self.lanes}, {self.window}"
            )

    def locate(self, position: int) -> Address:
        """Return the sample at a position of the stream."""
        num_samples = self.num_samples
        epoch, j = divmod(position, num_samples)
        index, lane = divmod(j, self.lanes)
        length, longer = divmod(num_samples, self.lanes)
        start = lane * length + min(lane, longer)
        shards, starts, samples = self.epoch(epoch)
        if samples is not None:
            place = int(samples[start + index])
        else:
            size = length + (lane < longer)
            window, offset = divmod(index, self.window)
            first = window * self.window
            width = min(self.window, size - first)
            shuffled = draw_window_permutation(width, self.seed, epoch, lane, window)
            place = start + first + int(shuffled[offset])
        slot = int(np.searchsorted(starts, place, side="right")) - 1
        return Address(position, int(shards[slot]), place - int(starts[slot]))

    def draw_substitute(self, position: int, attempt: int) -> Address:
        """Draw another sample for a position whose own cannot be used; `attempt` starts at 1."""
        words = np.random.SeedSequence((self.seed, position, attempt, SUBSTITUTE))
        draw = int(words.generate_state(1, np.uint64)[0]) % self.num_samples
        start = position - position % self.num_samples
        return self.locate(start + draw)._replace(position=position)

    def locate_window(self, position: int) -> tuple[int, int]:
        """Return (epoch, window) of a position; all lanes pass their windows in step."""
        epoch, j = divmod(position, self.num_samples)
        return epoch, 0 if self.num_samples <= MAX_FULL_SHUFFLE else j // self.lanes // self.window

    def next_window(self, epoch: int, window: int) -> tuple[int, int]:
        """Return the (epoch, window) that follows."""
        longest = -(-self.num_samples // self.lanes)
        last = self.num_samples <= MAX_FULL_SHUFFLE or (window + 1) * self.window >= longest
        return (epoch + 1, 0) if last else (epoch, window + 1)

    def shards_in_window(
        self, epoch: int, window: int, ranks: Sequence[int], world: int
    ) -> list[int]:
        """List the shards that these ranks read in a window, in the order of their first lanes."""
        if self.num_samples <= MAX_FULL_SHUFFLE:
            return [int(shard) for shard in self.epoch(epoch).shards if self.sizes[shard]]
        # Position p belongs to rank p mod W and to lane (p - epoch * N) mod L, so that
        # lane = rank - epoch * N modulo gcd(L, W).
        step = gcd(self.lanes, world)
        residues = {(rank - epoch * self.num_samples) % step for rank in ranks}
        lanes = [lane for lane in range(self.lanes) if lane % step in residues]
        length, longer = divmod(self.num_samples, self.lanes)
        shards, starts, _ = self.epoch(epoch)
        # A dict as an ordered set.
        in_window: dict[int, None] = {}
        for lane in lanes:
            start, size = lane * length + min(lane, longer), length + (lane < longer)
            first, end = window * self.window, min((window + 1) * self.window, size)
            if first >= end:
                continue
            # Empty shards have the same start as the next one; the last of equals has the sample.
            low = int(np.searchsorted(starts, start + first, side="right")) - 1
            high = int(np.searchsorted(starts, start + end - 1, side="right"))
            in_window.update((int(s), None) for s in shards[low:high] if self.sizes[s])
        return list(in_window)

    def max_weight_in_use(self, weights: Sequence[int], ranks: Sequence[int], world: int) -> int:
        """Return the maximum total weight of the shards read in a window and the next one.

        Args:
            weights: weight of each shard, such as its bytes.
            ranks: ranks that read.
            world: number of ranks.

        Returns:
            the maximum over the windows of the first epoch.
        """
        max_weight, now = 0, (0, 0)
        shards = {*self.shards_in_window(*now, ranks, world)}
        while now[0] == 0:
            now = self.next_window(*now)
            before, shards = shards, {*self.shards_in_window(*now, ranks, world)}
            max_weight = max(max_weight, sum(weights[shard] for shard in before | shards))
        return max_weight

    def epoch(self, epoch: int) -> "EpochOrder":
        """Return the order of the shards in an epoch; the last two epochs are cached."""
        if epoch not in self._epochs:
            shards = draw_permutation(len(self.sizes), self.seed, epoch, SHARDS)
            permuted = np.asarray(self.sizes, dtype=np.int64)[shards]
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            samples = None
            if self.num_samples <= MAX_FULL_SHUFFLE:
                samples = draw_permutation(self.num_samples, self.seed, epoch, SAMPLES)
            self._epochs[epoch] = EpochOrder(shards, np.cumsum(permuted) - permuted, samples)
        return self._epochs[epoch]


class EpochOrder(NamedTuple):
    """The permuted shards of an epoch."""

    shards: NDArray[np.uint32]
    starts: NDArray[np.int64]
    """First place of each shard in the permuted order."""
    samples: NDArray[np.uint32] | None
    """The sample at each place, if the data set is fully permuted."""


def draw_permutation(size: int, *words: int) -> NDArray[np.uint32]:
    """Draw a permutation of range(size), seeded by `words`.

    numpy guarantees that PCG64's raw stream and SeedSequence do not change between versions;
    `Generator.permutation` may change.
    """
    draws = np.random.PCG64(np.random.SeedSequence(words)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.uint32)


@lru_cache(maxsize=512)
def draw_window_permutation(
    size: int, seed: int, epoch: int, lane: int, window: int
) -> NDArray[np.uint32]:
    """Draw the order within a window of a lane; cached for the current and next lanes."""
    return draw_permutation(size, seed, epoch, IN_WINDOW, lane, window)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The endless batches of one rank; worker w of n yields its batches w, w + n, ..."""

    order: Order
    batch_size: int
    """Samples per batch of this rank."""
    rank: int
    world: int
    start: int
    """Position in the stream at which the first global batch starts."""
    _upcoming_shards: dict[tuple[int, int], list[int]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def batches(self, worker: int, num_workers: int) -> Iterator[list[Address]]:
        """Yield the addresses of this worker's batches, endlessly."""
        first = self.start + (self.rank - self.start) % self.world
        batch = worker
        while True:
            start = first + batch * self.batch_size * self.world
            yield [self.order.locate(start + i * self.world) for i in range(self.batch_size)]
            batch += num_workers

    def upcoming_shards(self, position: int) -> list[int]:
        """List the shards that this rank reads in the window of a position, then in the next."""
        now = self.order.locate_window(position)
        if now not in self._upcoming_shards:
            both = (now, self.order.next_window(*now))
            shards = (self.order.shards_in_window(*one, [self.rank], self.world) for one in both)
            self._upcoming_shards.clear()
            self._upcoming_shards[now] = list(dict.fromkeys(chain.from_iterable(shards)))
        return self._upcoming_shards[now]


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """Every sample once, in the order of the shards, without padding.

    The split is cut into M chunks of consecutive samples, and rank r of W takes the chunks
    [r M / W, (r + 1) M / W). The samples that share a forward pass are therefore the same for any
    W, and so is every bit of the result. A rank may have no chunk. With `num_chosen`, the split
    consists of that many samples, evenly spread.
    """

    sizes: tuple[int, ...]
    """Number of samples in each shard."""
    chunk: int
    """Samples per chunk."""
    rank: int
    world: int
    num_chosen: int | None = None
    """Number of samples, at most that of the split; None: all."""

    @property
    def num_samples(self) -> int:
        """Number of samples of all ranks."""
        return sum(self.sizes) if self.num_chosen is None else self.num_chosen

    def position(self, place: int) -> int:
        """Return the position in the split of a sample, by its place among the chosen ones."""
        return place if self.num_chosen is None else place * sum(self.sizes) // self.num_chosen

    def batches(self, worker: int, num_workers: int) -> Iterator[list[Address]]:
        """Yield the addresses of this worker's chunks."""
        starts = np.cumsum((0, *self.sizes))
        first, last = self.chunk_bounds()
        for chunk in range(first + worker, last, num_workers):
            places = range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.num_samples))
            positions = [self.position(place) for place in places]
            shards = np.searchsorted(starts, positions, side="right") - 1
            yield [
                Address(position, int(shard), position - int(starts[shard]))
                for position, shard in zip(positions, shards, strict=True)
            ]

    def chunk_bounds(self) -> tuple[int, int]:
        """Return this rank's first chunk and the one after its last."""
        num_chunks = -(-self.num_samples // self.chunk)
        first, last = (r * num_chunks // self.world for r in (self.rank, self.rank + 1))
        return first, last

    def upcoming_shards(self, position: int) -> list[int]:
        """List the shards that this rank reads from a position on, in order."""
        last = min(self.chunk_bounds()[1] * self.chunk, self.num_samples)
        last = self.position(last - 1) + 1 if last else 0
        ends = np.cumsum(self.sizes)
        return [s for s, end in enumerate(ends) if end > position and end - self.sizes[s] < last]
