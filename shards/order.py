"""Which sample when: a pure function of shard sizes, seed and position.

The training stream is endless. Position p = epoch * N + j; global batch s is the positions
[s * G, (s + 1) * G); rank r of W takes the positions p = r (mod W). Within an epoch

1. the shards are permuted with (seed, epoch);
2. their samples, in that order, are cut into L lanes of consecutive samples, lane l having
   ceil((N - l) / L) of them; cuts may fall inside a shard;
3. each lane is shuffled inside windows (a data set of at most 16,384 samples is instead permuted
   as a whole before the cut);
4. j is sample j // L of lane j mod L.

Nothing here depends on the number of ranks or workers, and a rank draws from one lane in gcd(L, W):
where W divides L it owns these lanes, and reads its own shards and (borders aside) no others.
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
WHOLE = 16_384
"""Up to this many samples are permuted as a whole."""


SHARDS, SAMPLES, IN_WINDOW, SUBSTITUTE = range(4)
"""Keep the random numbers of different uses apart."""


class Address(NamedTuple):
    """One sample of a stream."""

    position: int
    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one training stream."""

    sizes: tuple[int, ...]
    """Samples in each shard."""
    seed: int
    lanes: int = LANES
    window: int = WINDOW
    num_samples: int = field(init=False)
    """Samples in an epoch."""
    _epochs: dict[int, "Epoch"] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", sum(self.sizes))
        if self.num_samples == 0:
            raise ValueError("a stream needs at least one sample")
        if self.lanes < 1 or self.window < 1:
            raise ValueError(
                f"lanes and window must be at least 1, got {self.lanes}, {self.window}"
            )

    def locate(self, position: int) -> Address:
        """The sample at a position of the stream."""
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
            shuffled = window_permutation(width, self.seed, epoch, lane, window)
            place = start + first + int(shuffled[offset])
        slot = int(np.searchsorted(starts, place, side="right")) - 1
        return Address(position, int(shards[slot]), place - int(starts[slot]))

    def substitute(self, position: int, attempt: int) -> Address:
        """Another sample for a position whose own cannot be used; attempts count from 1."""
        words = np.random.SeedSequence((self.seed, position, attempt, SUBSTITUTE))
        draw = int(words.generate_state(1, np.uint64)[0]) % self.num_samples
        start = position - position % self.num_samples
        return self.locate(start + draw)._replace(position=position)

    def window_of(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a position: all lanes come to their windows together."""
        epoch, j = divmod(position, self.num_samples)
        return epoch, 0 if self.num_samples <= WHOLE else j // self.lanes // self.window

    def next_window(self, epoch: int, window: int) -> tuple[int, int]:
        """(epoch, window) of what comes after a window."""
        longest = -(-self.num_samples // self.lanes)
        last = self.num_samples <= WHOLE or (window + 1) * self.window >= longest
        return (epoch + 1, 0) if last else (epoch, window + 1)

    def shards_of(self, epoch: int, window: int, ranks: Sequence[int], world: int) -> list[int]:
        """Shards that some ranks read in a window, each once, in the order of their first lanes."""
        if self.num_samples <= WHOLE:
            return [int(shard) for shard in self.epoch(epoch).shards if self.sizes[shard]]
        # Position p belongs to rank p mod W, and to lane (p - epoch * N) mod L: with rank and lane
        # it is fixed modulo what divides both.
        step = gcd(self.lanes, world)
        mine = {(rank - epoch * self.num_samples) % step for rank in ranks}
        lanes = [lane for lane in range(self.lanes) if lane % step in mine]
        length, longer = divmod(self.num_samples, self.lanes)
        shards, starts, _ = self.epoch(epoch)
        found: dict[int, None] = {}
        for lane in lanes:
            start, size = lane * length + min(lane, longer), length + (lane < longer)
            first, end = window * self.window, min((window + 1) * self.window, size)
            if first >= end:
                continue
            # Shards without samples share the place of the next; the last of equals is meant.
            low = int(np.searchsorted(starts, start + first, side="right")) - 1
            high = int(np.searchsorted(starts, start + end - 1, side="right"))
            found.update((int(s), None) for s in shards[low:high] if self.sizes[s])
        return list(found)

    def most_in_use(self, weights: Sequence[int], ranks: Sequence[int], world: int) -> int:
        """The most that the shards weigh which some ranks read in a window and the next one.

        Over the windows of the first epoch; `weights`: of each shard, such as its bytes.
        """
        most, now = 0, (0, 0)
        shards = {*self.shards_of(*now, ranks, world)}
        while now[0] == 0:
            now = self.next_window(*now)
            before, shards = shards, {*self.shards_of(*now, ranks, world)}
            most = max(most, sum(weights[shard] for shard in before | shards))
        return most

    def epoch(self, epoch: int) -> "Epoch":
        """The order of the shards in an epoch; the last two are remembered."""
        if epoch not in self._epochs:
            shards = permutation(len(self.sizes), self.seed, epoch, SHARDS)
            permuted = np.asarray(self.sizes, dtype=np.int64)[shards]
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            samples = None
            if self.num_samples <= WHOLE:
                samples = permutation(self.num_samples, self.seed, epoch, SAMPLES)
            self._epochs[epoch] = Epoch(shards, np.cumsum(permuted) - permuted, samples)
        return self._epochs[epoch]


class Epoch(NamedTuple):
    """The permuted shards of an epoch."""

    shards: NDArray[np.uint32]
    starts: NDArray[np.int64]
    """First place of each in the permuted order."""
    samples: NDArray[np.uint32] | None
    """What stands at each place of the lanes, where the samples are permuted as a whole."""


def permutation(size: int, *words: int) -> NDArray[np.uint32]:
    """A permutation of range(size) drawn from the words.

    PCG64's raw stream and SeedSequence are promised to stay the same in all versions of numpy;
    `Generator.permutation` is not.
    """
    draws = np.random.PCG64(np.random.SeedSequence(words)).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.uint32)


@lru_cache(maxsize=512)
def window_permutation(
    size: int, seed: int, epoch: int, lane: int, window: int
) -> NDArray[np.uint32]:
    """The order inside a window of a lane; those of the lanes of now and next are remembered."""
    return permutation(size, seed, epoch, IN_WINDOW, lane, window)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The endless batches of one rank; worker w of n yields its batches w, w + n, ..."""

    order: Order
    batch_size: int
    """Samples in a batch of this rank."""
    rank: int
    world: int
    start: int
    """Position of the stream that the first global batch begins with."""
    _upcoming: dict[tuple[int, int], list[int]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def batches(self, worker: int, num_workers: int) -> Iterator[list[Address]]:
        """The addresses of this worker's batches, without end."""
        first = self.start + (self.rank - self.start) % self.world
        batch = worker
        while True:
            begin = first + batch * self.batch_size * self.world
            yield [self.order.locate(begin + i * self.world) for i in range(self.batch_size)]
            batch += num_workers

    def upcoming(self, position: int) -> list[int]:
        """The shards that this rank reads in the window of a position, then those of the next."""
        now = self.order.window_of(position)
        if now not in self._upcoming:
            both = (now, self.order.next_window(*now))
            shards = (self.order.shards_of(*one, [self.rank], self.world) for one in both)
            self._upcoming.clear()
            self._upcoming[now] = list(dict.fromkeys(chain.from_iterable(shards)))
        return self._upcoming[now]


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """Every sample once, in the order of the shards.

    The split is cut into chunks of consecutive samples, and rank r of W takes the chunks
    [r M / W, (r + 1) M / W) of M. Samples that share a forward pass are so the same for any W,
    and with them every last bit of the result. Unpadded; a rank may have none.
    """

    sizes: tuple[int, ...]
    chunk: int
    rank: int
    world: int

    def batches(self, worker: int, num_workers: int) -> Iterator[list[Address]]:
        """The addresses of this worker's chunks."""
        starts = np.cumsum((0, *self.sizes))
        num_samples = int(starts[-1])
        first, last = self.chunks()
        for chunk in range(first + worker, last, num_workers):
            places = range(chunk * self.chunk, min((chunk + 1) * self.chunk, num_samples))
            shards = np.searchsorted(starts, places, side="right") - 1
            yield [
                Address(place, int(shard), place - int(starts[shard]))
                for place, shard in zip(places, shards, strict=True)
            ]

    def chunks(self) -> tuple[int, int]:
        """This rank's first chunk, and that after its last."""
        num_chunks = -(-sum(self.sizes) // self.chunk)
        first, last = (r * num_chunks // self.world for r in (self.rank, self.rank + 1))
        return first, last

    def upcoming(self, position: int) -> list[int]:
        """The shards that this rank reads from a position on, in order."""
        last = self.chunks()[1] * self.chunk
        ends = np.cumsum(self.sizes)
        return [s for s, end in enumerate(ends) if end > position and end - self.sizes[s] < last]
