"""The order of samples: a pure function of sizes, seed and position, for any number of ranks.

Only shard sizes are needed, no data sets.
"""

import pickle
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards.order
from shards.order import MAX_FULL_SHUFFLE, ORDER_VERSION, Address, EvalPlan, Order, TrainPlan

UNEVEN = (5, 1, 12, 0, 7, 3)
LARGE = (100,) * 180

# shard.row of every position.
SMALL_0 = "1.1 1.0 2.2 0.0 2.0 0.1 2.1 2.3 1.2 0.2 0.4 0.3"
SMALL_1 = "0.2 2.3 2.1 1.0 0.1 0.0 1.1 0.3 1.2 0.4 2.2 2.0"
# position: (shard, row).
PINNED = {
    0: (20, 59),
    1: (20, 250),
    95: (21, 531),
    96: (20, 54),
    97: (20, 256),
    20999: (29, 355),
    21000: (14, 46),
    21001: (14, 229),
    10000000: (19, 28),
    1000000000000: (6, 506),
}
SUBSTITUTES = [(5, 17, 697), (10000000, 11, 234)]


def rank_batches(order, batch_size, rank, world, count, *, start=0, workers=1):
    """Return the first batches of a rank, merged over its workers as by DataLoader."""
    plan = TrainPlan(order, batch_size, rank, world, start)
    streams = [plan.batches(w, workers) for w in range(workers)]
    merged = chain.from_iterable(zip(*streams, strict=True))
    return list(islice(merged, count))


def global_batches(order, size, world, count, **options):
    """Return the union of all ranks' batches for each step, in the order of positions."""
    ranks = [
        rank_batches(order, size // world, rank, world, count, **options) for rank in range(world)
    ]
    return [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]


def epoch(order, number=0):
    n = order.num_samples
    return [order.locate(p)[1:] for p in range(number * n, (number + 1) * n)]


def all_rows(sizes):
    return [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


# ------------------------------------------------------------------------------------ the stream


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    lanes=st.sampled_from([1, 2, 5, 96]),
    number=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_every_sample_occurs_once_per_epoch(sizes, lanes, number, seed):
    order = Order(tuple(sizes), seed, lanes)
    assert sorted(epoch(order, number)) == all_rows(sizes)


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (LARGE, 50),
        (LARGE, 4096),
        ((MAX_FULL_SHUFFLE + 1,), 7),
        ((1,) * (MAX_FULL_SHUFFLE + 5), 100),
        ((9000, 0, 8000), 50),
    ],
)
def test_every_sample_of_a_large_data_set_occurs_once_per_epoch(sizes, window):
    order = Order(sizes, 0, window=window)
    assert order.num_samples > MAX_FULL_SHUFFLE
    assert sorted(epoch(order, 1)) == all_rows(sizes)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("start", [0, 24, 25])
def test_any_number_of_ranks_draws_the_same_global_batches(world, start):
    order = Order(UNEVEN, 1)
    expected = [
        [order.locate(start + 24 * step + i) for i in range(24)]
        for step in range(5)  # several epochs: N = 28
    ]
    assert global_batches(order, 24, world, 5, start=start) == expected


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_data_set_smaller_than_a_global_batch_is_repeated(world):
    order = Order((2, 1), 0)
    batches = global_batches(order, 8, world, 3)
    assert [a.position for a in chain.from_iterable(batches)] == list(range(24))
    for number in range(8):
        some = list(chain.from_iterable(batches))[3 * number : 3 * number + 3]
        assert sorted(a[1:] for a in some) == all_rows((2, 1))


def test_a_single_sample_is_drawn_forever():
    assert set(chain.from_iterable(epoch(Order((1,), 5), e) for e in range(4))) == {(0, 0)}


def test_an_epoch_may_end_inside_a_batch():
    order = Order((5, 5), 0)
    first, second = global_batches(order, 8, 2, 2)
    assert [a.position for a in first + second] == list(range(16))
    assert len({a[1:] for a in first + second[:2]}) == 10


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_only_splits_the_batches_of_a_rank(accumulate):
    order, world = Order(UNEVEN, 2), 3
    for rank in range(world):
        full = rank_batches(order, 8, rank, world, 4)
        parts = rank_batches(order, 8 // accumulate, rank, world, 4 * accumulate)
        assert list(chain.from_iterable(parts)) == list(chain.from_iterable(full))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_workers_yields_the_same_sequence(workers, world):
    order = Order(UNEVEN, 3)
    for rank in range(world):
        expected = rank_batches(order, 4, rank, world, 20, start=7, workers=1)
        found = rank_batches(order, 4, rank, world, 20, start=7, workers=workers)
        assert found == expected


@pytest.mark.parametrize("step", [1, 5, 17])
def test_resuming_seeks_also_with_another_number_of_ranks(step):
    order = Order(UNEVEN, 4)
    before = global_batches(order, 12, 2, 20)
    after = global_batches(order, 12, 3, 20 - step, start=12 * step)
    assert after == before[step:]


def test_each_epoch_has_another_order():
    for order in (Order((40,), 0), Order((1,) * 40, 0), Order((10, 10, 20), 0)):
        orders = [tuple(epoch(order, e)) for e in range(5)]
        assert len(set(orders)) == 5
        assert tuple(all_rows(order.sizes)) not in orders


def test_each_seed_has_another_order():
    assert len({tuple(epoch(Order((40,), seed))) for seed in range(5)}) == 5


def test_the_order_does_not_depend_on_previous_calls():
    fresh, used = Order(LARGE, 9), Order(LARGE, 9)
    for position in range(90_000, 0, -7777):
        used.locate(position)
    for position in (0, 17_999, 18_000, 71_999, 1_000_000):
        assert used.locate(position) == fresh.locate(position)
    assert used == fresh


def test_an_order_survives_pickling():
    order = Order(UNEVEN, 6)
    order.locate(3)
    plan = pickle.loads(pickle.dumps(TrainPlan(order, 2, 0, 1, 0)))
    assert list(islice(plan.batches(0, 1), 9)) == rank_batches(order, 2, 0, 1, 9)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_if_the_world_size_divides_the_lanes_ranks_read_few_shards(world, number):
    order = Order(LARGE, 5)
    n = order.num_samples
    per_rank = [
        [order.locate(p)[1:] for p in range(number * n, (number + 1) * n) if p % world == rank]
        for rank in range(world)
    ]
    # Together, each sample once.
    assert sorted(chain.from_iterable(per_rank)) == all_rows(LARGE)
    touched = [{shard for shard, _ in samples} for samples in per_rank]
    # Only a shard at the border of two lanes is read by two ranks.
    assert sum(map(len, touched)) <= len(LARGE) + order.lanes
    # A lane of n / 96 consecutive samples touches n / 96 / 100 shards and one at its border.
    max_touched = order.lanes // world * (-(-n // order.lanes // 100) + 1)
    assert max(map(len, touched)) <= max_touched < len(LARGE)


@pytest.mark.parametrize(("num_shards", "max_ratio"), [(100, 2.0), (400, 1.3)])
def test_eight_ranks_together_fetch_few_shards_twice(num_shards, max_ratio):
    rng = np.random.default_rng(num_shards)
    sizes = rng.integers(30_000 // num_shards, 50_000 // num_shards, num_shards)
    order = Order(tuple(sizes.tolist()), 3)
    n = order.num_samples
    assert n > MAX_FULL_SHUFFLE
    for number in (0, 1):
        where = (order.locate(p) for p in range(number * n, (number + 1) * n))
        pairs = {(address.position % 8, address.shard) for address in where}
        assert len(pairs) <= max_ratio * num_shards


def test_a_lane_is_read_window_by_window():
    order = Order((20_000,), 0, lanes=4, window=50)
    rows = [order.locate(4 * i).row for i in range(5000)]  # lane 0 of a single shard
    for first in range(0, 5000, 50):
        assert sorted(rows[first : first + 50]) == list(range(first, first + 50))
    assert rows != sorted(rows)


# ------------------------------------------------------------------------------- upcoming shards


@pytest.fixture
def windowed(monkeypatch):
    """Return an order of a small data set that is cut into lanes and windows like a large one."""
    monkeypatch.setattr(shards.order, "MAX_FULL_SHUFFLE", 0)
    return Order((6, 0, 11, 1, 9, 9, 0, 2), 4, lanes=6, window=3)


def by_window(order, epochs, ranks, world):
    """Return {(epoch, window): shards that these ranks read in it}, by enumerating positions."""
    read = {}
    for p in range(epochs * order.num_samples):
        if p % world in ranks:
            read.setdefault(order.locate_window(p), set()).add(order.locate(p).shard)
    return read


@pytest.mark.parametrize(
    ("ranks", "world"), [([0], 1), ([1], 2), ([0], 3), ([0, 1], 3), ([4], 6), ([1, 2, 5], 6)]
)
def test_the_shards_of_a_window_are_those_that_are_read_in_it(windowed, ranks, world):
    for (epoch, window), shards_read in by_window(windowed, 4, ranks, world).items():
        found = windowed.shards_in_window(epoch, window, ranks, world)
        assert set(found) == shards_read
        assert len(found) == len(shards_read)


def test_if_the_world_size_does_not_divide_the_lanes_more_shards_may_be_listed(windowed):
    for (epoch, window), shards_read in by_window(windowed, 3, [1], 4).items():
        assert shards_read <= set(windowed.shards_in_window(epoch, window, [1], 4))


def test_a_small_data_set_is_a_single_window():
    order = Order(UNEVEN, 0)
    assert sorted(order.shards_in_window(3, 0, [1], 2)) == [0, 1, 2, 4, 5]
    assert {order.locate_window(p) for p in range(28)} == {(0, 0)}
    assert order.next_window(0, 0) == (1, 0)


def test_windows_follow_each_other_in_reading_order(windowed):
    seen = list(dict.fromkeys(windowed.locate_window(p) for p in range(3 * windowed.num_samples)))
    assert seen == sorted(seen)
    assert [windowed.next_window(*one) for one in seen[:-1]] == seen[1:]


@pytest.mark.parametrize(("ranks", "world"), [([0], 1), ([1], 2), ([0, 2], 3), ([0], 6)])
def test_the_maximum_weight_in_use_is_that_of_two_consecutive_windows(windowed, ranks, world):
    weights = [100 + 7 * shard for shard in range(8)]
    read = pairwise(by_window(windowed, 2, ranks, world).items())
    both = [now | then for ((epoch, _), now), (_, then) in read if epoch == 0]
    expected = max(sum(weights[shard] for shard in some) for some in both)
    assert windowed.max_weight_in_use(weights, ranks, world) == expected


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3), (5, 6)])
def test_a_train_plan_lists_the_shards_of_this_window_then_of_the_next(windowed, rank, world):
    plan = TrainPlan(windowed, 1, rank, world, 0)
    read = by_window(windowed, 4, [rank], world)
    for p in range(rank, 3 * windowed.num_samples, world):
        now = windowed.locate_window(p)
        soon = windowed.next_window(*now)
        found = plan.upcoming_shards(p)
        assert len(found) == len(set(found))
        assert set(found[: len(read[now])]) == read[now]
        # The last window may be too short for every rank to read from it.
        assert set(found) == read[now] | read.get(soon, set())


@pytest.mark.parametrize("world", [1, 2, 3, 9])
@pytest.mark.parametrize("chunk", [1, 4])
def test_an_eval_plan_lists_the_remaining_shards(world, chunk):
    for rank in range(world):
        plan = EvalPlan((5, 1, 12, 7, 3), chunk, rank, world)
        chunks = list(plan.batches(0, 1))
        for number, some in enumerate(chunks):
            remaining = list(dict.fromkeys(a.shard for a in chain.from_iterable(chunks[number:])))
            assert plan.upcoming_shards(some[0].position) == remaining


def test_each_attempt_draws_another_substitute():
    order = Order(UNEVEN, 2)
    for position in (0, 27, 28, 1000):
        found = [order.draw_substitute(position, attempt) for attempt in range(1, 17)]
        assert found == [Order(UNEVEN, 2).draw_substitute(position, a) for a in range(1, 17)]
        assert {address.position for address in found} == {position}
        assert len({address[1:] for address in found}) > 8
        assert {address[1:] for address in found} <= set(all_rows(UNEVEN))
    drawn = [order.draw_substitute(position, 1)[1:] for position in range(2000)]
    times = [drawn.count(sample) for sample in all_rows(UNEVEN)]
    assert min(times) > 2000 / 28 / 2


def test_the_order_is_pinned():
    # Resumed runs depend on it: if it has to change, so has ORDER_VERSION.
    assert ORDER_VERSION == 1
    for number, expected in enumerate((SMALL_0, SMALL_1)):
        found = epoch(Order((5, 3, 4), seed=7, lanes=4), number)
        assert " ".join(f"{shard}.{row}" for shard, row in found) == expected
    large = Order((700,) * 30, seed=3, lanes=96, window=64)
    assert {p: tuple(large.locate(p)[1:]) for p in PINNED} == PINNED
    assert [tuple(large.draw_substitute(p, 2)) for p in (5, 10**7)] == SUBSTITUTES


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_an_empty_stream_is_refused(sizes):
    with pytest.raises(ValueError, match="a stream needs at least one sample"):
        Order(sizes, 0)


@pytest.mark.parametrize(("lanes", "window"), [(0, 1), (1, 0)])
def test_invalid_lanes_and_windows_are_refused(lanes, window):
    message = f"lanes and window must be at least 1, got {lanes}, {window}"
    with pytest.raises(ValueError, match=message):
        Order((3,), 0, lanes, window)


# ------------------------------------------------------------------------------------ evaluation


def eval_chunks(sizes, chunk, rank, world, workers=1):
    plan = EvalPlan(sizes, chunk, rank, world)
    streams = [list(plan.batches(w, workers)) for w in range(workers)]
    merged = [s[i] for i in range(max(map(len, streams), default=0)) for s in streams if i < len(s)]
    assert sum(map(len, streams)) == len(merged)
    return merged


@given(
    sizes=st.lists(st.integers(0, 9), max_size=6).map(tuple),
    chunk=st.integers(1, 7),
    world=st.integers(1, 40),
)
def test_evaluation_reads_every_sample_exactly_once_for_any_world_size(sizes, chunk, world):
    chunks = list(
        chain.from_iterable(eval_chunks(sizes, chunk, rank, world) for rank in range(world))
    )
    # The same chunks in the same order as on one rank.
    assert chunks == eval_chunks(sizes, chunk, 0, 1)
    flat = list(chain.from_iterable(chunks))
    assert [a[1:] for a in flat] == all_rows(sizes)
    assert [a.position for a in flat] == list(range(sum(sizes)))
    assert all(len(c) == chunk for c in chunks[:-1])


def test_chunks_are_distributed_evenly_and_ranks_may_have_none():
    counts = [len(eval_chunks((3, 2), 2, rank, 8)) for rank in range(8)]
    assert sum(counts) == 3
    assert set(counts) == {0, 1}
    counts = [len(eval_chunks((100,), 3, rank, 8)) for rank in range(8)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_evaluation_yields_the_same_sequence_for_any_number_of_workers(workers):
    for rank in range(3):
        assert eval_chunks(UNEVEN, 2, rank, 3, workers) == eval_chunks(UNEVEN, 2, rank, 3)


def test_addresses_are_plain_integers():
    for address in (Order((3,), 0).locate(1), next(EvalPlan((3,), 2, 0, 1).batches(0, 1))[0]):
        assert isinstance(address, Address)
        assert [type(part) for part in address] == [int, int, int]
