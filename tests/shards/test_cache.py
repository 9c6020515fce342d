"""The shard cache. A local folder stands in for a remote store, through file://."""

import filecmp
import gc
import os
import threading
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import shards.cache
import shards.order
import shards.requests
from shards.cache import ShardCache, try_lock_file
from shards.order import Address, EvalPlan, Order, TrainPlan
from shards.reader import SampleSource, ShardReader
from shards.sample import DataError
from shards.store import Store

SIZES, Process = (2,) * 12, get_context("fork").Process


class RemoteData:
    """Shards of one size at a URL, a cache, and the log of requests by all processes."""

    def __init__(self, made, place):
        self.folder, manifest, self.content = made
        self.infos, self.store = manifest.splits["train"].shards, Store(f"file://{self.folder}")
        self.size, self.log, self.place = (
            self.infos[0].bytes,
            place / "requests.txt",
            place / "cache",
        )
        self.errors = []
        self.log.touch()

    def before(self, name, start):
        if name == "train-000001.tar" and self.errors:
            raise self.errors.pop()

    def requests(self):
        """Return (name, start) of all requests."""
        return [(n, int(start)) for n, start in map(str.split, self.log.read_text().splitlines())]

    def fetches(self):
        """Count the fetches of each complete shard (only these start at 0)."""
        return Counter(
            name for name, start in self.requests() if name.endswith(".tar") and not start
        )

    def sample_requests(self):
        """Count the requests for samples (these start at tar blocks after the first)."""
        return sum(1 for _, start in self.requests() if start and start % 512 == 0)

    def cache(self, fitting=99.0):
        return ShardCache(self.place, round(fitting * self.size))

    def reader(self, cache=None):
        return ShardReader(self.store, self.infos, cache or self.cache())

    def fetch(self, number, cache=None):
        return (cache or self.cache()).fetch(self.infos[number], self.store)

    def path(self, number):
        return self.cache().path(self.infos[number])

    def cached(self):
        """Return the numbers of the cached shards."""
        return {number for number in range(len(SIZES)) if self.path(number).exists()}

    def used(self):
        return sum(path.stat().st_size for path in self.place.iterdir())

    def is_intact(self, number):
        return filecmp.cmp(self.path(number), self.folder / self.infos[number].name, False)

    def check(self, *raws):
        for raw in raws:
            assert (raw.image, raw.mask) == self.content[raw.key]


@pytest.fixture
def data(make_shards, tmp_path, monkeypatch):
    """A data set read through file://."""
    cat_file, data = LocalFileSystem.cat_file, RemoteData(make_shards(SIZES), tmp_path)

    def answer(system, path, start=None, end=None, **options):
        with data.log.open("a") as log:
            log.write(f"{Path(path).name} {start}\n")
        data.before(Path(path).name, start)
        return cat_file(system, path, start=start, end=end, **options)

    monkeypatch.setattr(LocalFileSystem, "cat_file", answer)
    monkeypatch.setattr(shards.requests, "RETRY_DELAYS", (1e-4,) * 4)
    monkeypatch.setattr(shards.cache, "RETRY_SECONDS", 0.01)
    return data


def test_a_shard_is_cached_under_its_sha256_and_fetched_once(data):
    assert [data.fetch(number) for number in (0, 1, 0, 1)] == [True] * 4
    assert {*os.listdir(data.place)} == {".lock", data.path(0).name, data.path(1).name}
    assert data.fetches() == {"train-000000.tar": 1, "train-000001.tar": 1}
    assert (data.path(1).stem, data.is_intact(1)) == (data.infos[1].sha256, True)


def test_concurrent_processes_fetch_each_shard_once(data, wait_for):
    def fetch_all():
        (reader := data.reader()).prefetch([*range(12)])
        wait_for(lambda: reader.prefetched and len(data.cached()) == 12, "caching of all shards")

    processes = [Process(target=fetch_all, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert data.fetches() == {info.name: 1 for info in data.infos}


def test_memory_urls_are_cached_too(data):
    system = fsspec.filesystem("memory")
    system.put(str(data.folder), "/remote", recursive=True)
    for cache in (None, data.cache()):
        reader = ShardReader("memory://remote", data.infos, cache)
        raws = [raw for some in SampleSource(reader, EvalPlan(SIZES, 5, 0, 1)) for raw in some]
        assert [raw.key for raw in raws] == list(data.content)
        data.check(*raws)
    system.rm("/remote", recursive=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            " does not match the manifest",
        ),
        (lambda path: os.truncate(path, 5000), " .*; copy or pack"),
        (Path.unlink, ".*; copy or pack"),
    ],
)
def test_a_changed_shard_is_named_and_not_cached(data, wait_for, damage, message):
    damage(data.folder / data.infos[1].name)
    reader = data.reader()
    reader.prefetch([1])
    wait_for(lambda: reader.prefetcher and reader.prefetcher.failure, "failure")
    # The next read raises what failed in the background.
    with pytest.raises(DataError, match=f"^{data.store}/train-000001.tar{message}"):
        reader.read(Address(0, 0, 0))
    assert (data.fetches(), data.used()) == ({"train-000001.tar": 1}, 0)


def test_a_shard_that_is_deleted_later_is_named(data):
    reader = ShardReader(data.store, data.infos)
    reader.read(Address(0, 1, 0))
    (data.folder / data.infos[1].name).unlink()
    with pytest.raises(DataError, match=f"^{data.store}/train-000001.tar.*; copy or pack"):
        reader.read(Address(0, 1, 1))


def test_a_cache_dir_that_is_a_file_is_named_in_one_line(data):
    data.place.touch()
    with pytest.raises(DataError, match=f"^{data.place} cannot be written: .*--cache-dir"):
        data.reader().read(Address(0, 0, 0))


def test_the_first_batch_waits_neither_for_others_nor_for_a_complete_shard(data, wait_for):
    go, free = threading.Event(), [("train-000000.tar", 512), ("train-000000.idx", 0)]
    data.before = lambda name, start: start % 512 == 0 and (name, start) not in free and go.wait()
    batches = iter(SampleSource(data.reader(), EvalPlan(SIZES, 1, 0, 1)))
    try:
        data.check(*next(batches))
        assert not data.cached()
    finally:
        go.set()
    wait_for(lambda: len(data.cached()) == len(SIZES), "caching of all shards")
    assert len([data.check(*raws) for raws in batches]) == 23


def test_shards_of_the_current_and_next_window_are_prefetched(data, wait_for, monkeypatch):
    monkeypatch.setattr(shards.order, "MAX_FULL_SHUFFLE", 0)
    order = Order(SIZES, 0, lanes=2, window=4)
    batches = iter(SampleSource(data.reader(), TrainPlan(order, 2, 0, 1, 0)))
    next(batches)
    wait_for(lambda: len(data.cached()) == 8, "caching of two windows")
    assert data.cached() == {order.locate(position).shard for position in range(16)}
    assert len([next(batches) for _ in range(4)]) == 4
    wait_for(lambda: len(data.cached()) == 12, "caching of the third window")
    assert set(data.fetches().values()) == {1}


def test_shards_read_later_do_not_evict_those_read_earlier(data, wait_for, monkeypatch):
    # As if fetching were slow: no shard counts as recently read.
    monkeypatch.setattr(shards.cache, "IN_USE_SECONDS", 0)
    reader = data.reader(data.cache(3))
    for number in range(11):
        reader.prefetch([*range(number, 12)])
        wait_for(
            lambda soon={number, number + 1}: soon <= data.cached(),
            "caching of this shard and the next",
            5,
        )
        data.check(reader.read(Address(0, number, 0)))
    assert data.fetches() == {info.name: 1 for info in data.infos}


def test_a_garbage_collected_reader_leaves_no_thread(data, wait_for):
    before, reader = threading.active_count(), data.reader()
    reader.prefetch([0])
    wait_for(data.cached, "caching of the shard")
    del reader
    gc.collect()
    wait_for(lambda: threading.active_count() <= before, "the end of the thread", 5)


def test_the_limit_always_holds_and_the_least_recently_read_shard_is_evicted(data, monkeypatch):
    monkeypatch.setattr(shards.cache, "IN_USE_SECONDS", 0)
    cache, sizes = data.cache(3.1), []
    data.before = lambda name, start: start or name[-4:] != ".tar" or sizes.append(data.used())
    for number in range(3):
        data.fetch(number, cache)
        os.utime(data.path(number), (number, number))
    data.reader(cache).read_all([Address(0, 0, 0), Address(1, 0, 1)])
    for number, remaining in [(3, {0, 2, 3}), (4, {0, 3, 4})]:
        assert (data.fetch(number, cache), data.cached()) == (True, remaining)
    assert max(sizes) == data.used() == 3 * data.size


def test_a_fetch_reserves_its_space_at_the_start(data):
    cache, meanwhile = data.cache(1.9), []
    data.before = lambda name, start: (
        meanwhile or meanwhile.extend(data.fetch(number, cache) for number in (0, 1))
    )
    assert data.fetch(0, cache) is True
    # One is being fetched, and there is no space for the other.
    assert (meanwhile, data.cached()) == ([False, None], {0})


@pytest.mark.parametrize("reads", [1, 2])
def test_a_shard_that_was_just_read_is_not_evicted(data, reads):
    data.fetch(0)
    os.utime(data.path(0), (1, 1))
    data.check(*map(data.reader().read, [Address(0, 0, 0), Address(1, 0, 1)][:reads]))
    assert (data.fetch(1, data.cache(1)), data.cached()) == (None, {0})


def test_a_shard_without_space_is_fetched_in_turn_once_there_is_some(data, wait_for, monkeypatch):
    attempts, reserve_space = [], ShardCache.reserve_space
    monkeypatch.setattr(
        ShardCache, "reserve_space", lambda *a: attempts.append(a) or reserve_space(*a)
    )
    data.fetch(0)
    (reader := data.reader(data.cache(1))).prefetch([*range(1, 12)])
    wait_for(lambda: len(attempts) > 4, "attempts to reserve space")
    monkeypatch.setattr(shards.cache, "IN_USE_SECONDS", 0)
    wait_for(lambda: reader.prefetcher and data.cached() == {1}, "the shard", 5)
    assert [*data.fetches()] == ["train-000000.tar", "train-000001.tar"]


def test_a_reader_survives_the_eviction_of_its_shard_and_closes_it(data, monkeypatch):
    monkeypatch.setattr(shards.cache, "IN_USE_SECONDS", 0)
    data.fetch(0)
    reader = data.reader()
    data.check(reader.read(Address(0, 0, 0)))
    (file,) = reader.files.values()
    assert (data.fetch(1, data.cache(1)), data.sample_requests()) == (True, 0)
    data.check(reader.read(Address(0, 0, 1)))
    assert (file.closed, data.sample_requests(), data.cached()) == (True, 1, {1})


@pytest.mark.parametrize(("fitting", "fetched"), [(2, True), (1, None)])
def test_a_shard_that_is_completed_during_eviction_is_counted(data, monkeypatch, fitting, fetched):
    remove_abandoned, part = shards.cache.remove_abandoned, data.path(0).with_suffix(".part")
    data.place.mkdir()
    handle = try_lock_file(part)
    assert handle is not None
    os.ftruncate(handle, data.size)

    def complete_meanwhile(path):
        abandoned = remove_abandoned(path)
        if path == part and not data.cached():
            part.rename(data.path(0))
        return abandoned

    monkeypatch.setattr(shards.cache, "remove_abandoned", complete_meanwhile)
    assert data.fetch(1, data.cache(fitting)) is fetched
    assert data.used() <= data.cache(fitting).limit
    os.close(handle)


@pytest.mark.parametrize(("fitting", "number"), [(9, 0), (1, 0), (1, 1)])
def test_the_partial_file_of_a_killed_process_is_not_read_and_is_replaced(
    data, wait_for, monkeypatch, fitting, number
):
    monkeypatch.setattr(shards.cache, "REQUEST_BYTES", 1000)
    (gate, _), part, cache = os.pipe(), data.path(0).with_suffix(".part"), data.cache(fitting)
    data.before = lambda name, start: start == 6000 and os.read(gate, 1)
    process = Process(target=data.fetch, args=[0, cache], daemon=True)
    process.start()
    wait_for(lambda: ("train-000000.tar", 6000) in data.requests(), "half of the download")
    assert data.fetch(0, cache) is False
    process.kill()
    process.join()
    data.before = lambda name, start: None
    assert part.stat().st_size == data.size
    data.check(data.reader(cache).read(Address(0, 0, 0)))
    assert data.sample_requests() == 1
    # Fetching the same shard takes the file over, fetching another removes it.
    assert (data.fetch(number, cache), data.cached()) == (True, {number})
    assert (data.is_intact(number), part.exists()) == (True, False)


def test_a_shard_truncated_in_the_cache_is_fetched_again(data):
    data.fetch(0)
    os.truncate(data.path(0), 5000)
    data.check(data.reader().read(Address(0, 0, 1)))
    assert data.sample_requests() == 1
    for _ in range(2):
        assert (data.fetch(0), data.is_intact(0)) == (True, True)
        os.truncate(data.path(0), 5000)


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, OSError(5, "503")])
def test_temporary_failures_are_retried(data, error):
    data.errors[:] = [error] * 4
    data.check(*data.reader().read_all([Address(0, 0, 0), Address(1, 1, 0)]))
    # Successful parts are not repeated: the end of a shard is read five times, then the sample.
    assert sorted(Counter(name for name, _ in data.requests()).values()) == [1, 1, 2, 6]
    data.errors[:] = [error] * 4
    assert (data.fetch(1), data.is_intact(1)) == (True, True)


@pytest.mark.parametrize(("kind", "times"), [(ConnectionResetError, 5), (PermissionError, 1)])
def test_permanent_failures_name_the_shard_in_one_line(data, kind, times):
    data.errors[:] = [kind(5, "connection lost")] * 99
    problem = f"{data.store}/train-000001.tar: [Errno 5] connection lost"
    remedy = "check address, credentials and network, then rerun the same command to resume"
    addresses = [Address(0, 0, 0), Address(1, 1, 0)]
    for request in (lambda: data.fetch(1), lambda: data.reader().read_all(addresses)):
        with pytest.raises(DataError) as caught:
            request()
        assert str(caught.value) == f"{problem}; {remedy}"
    assert data.fetches() == {"train-000001.tar": times}
