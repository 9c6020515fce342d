"""Holds the cache's contract. Shards lie in a local folder, read by file:// as if it were far."""

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
import shards.store
from shards.cache import ShardCache, claim
from shards.order import Address, EvalPlan, Order, TrainPlan
from shards.reader import SampleSource, ShardReader
from shards.sample import DataError
from shards.store import Store

SIZES, Process = (2,) * 12, get_context("fork").Process


class Far:
    """Shards of one size at a URL, a cache, and all requests that any process has made."""

    def __init__(self, made, place):
        self.folder, manifest, self.content = made
        self.infos, self.store = manifest.splits["train"].shards, Store(f"file://{self.folder}")
        self.size, self.log, self.place = self.infos[0].bytes, place / "asked.txt", place / "cache"
        self.errors = []
        self.log.touch()

    def before(self, name, begin):
        if name == "train-000001.tar" and self.errors:
            raise self.errors.pop()

    def asked(self):
        """(name, begin) of all requests."""
        return [(n, int(begin)) for n, begin in map(str.split, self.log.read_text().splitlines())]

    def whole(self):
        """How many times each shard was fetched whole: samples begin behind a header."""
        return Counter(name for name, begin in self.asked() if name.endswith(".tar") and not begin)

    def samples(self):
        """How many samples were asked for, which begin where blocks of the tar do."""
        return sum(1 for _, begin in self.asked() if begin and begin % 512 == 0)

    def cache(self, fitting=99.0):
        return ShardCache(self.place, round(fitting * self.size))

    def reader(self, cache=None):
        return ShardReader(self.store, self.infos, cache or self.cache())

    def fetch(self, number, cache=None):
        return (cache or self.cache()).fetch(self.infos[number], self.store)

    def path(self, number):
        return self.cache().path(self.infos[number])

    def here(self):
        """The numbers of the shards that are in the cache."""
        return {number for number in range(len(SIZES)) if self.path(number).exists()}

    def used(self):
        return sum(path.stat().st_size for path in self.place.iterdir())

    def is_right(self, number):
        return filecmp.cmp(self.path(number), self.folder / self.infos[number].name, False)

    def check(self, *raws):
        for raw in raws:
            assert (raw.image, raw.mask) == self.content[raw.key]


@pytest.fixture
def data(make_shards, tmp_path, monkeypatch):
    """A data set that is asked for over file://."""
    cat_file, data = LocalFileSystem.cat_file, Far(make_shards(SIZES), tmp_path)

    def answer(system, path, start=None, end=None, **options):
        with data.log.open("a") as log:
            log.write(f"{Path(path).name} {start}\n")
        data.before(Path(path).name, start)
        return cat_file(system, path, start=start, end=end, **options)

    monkeypatch.setattr(LocalFileSystem, "cat_file", answer)
    monkeypatch.setattr(shards.store, "PAUSES", (1e-4,) * 4)
    monkeypatch.setattr(shards.cache, "RETRY", 0.01)
    return data


def test_a_shard_stands_under_its_sha256_and_is_asked_for_once(data):
    assert [data.fetch(number) for number in (0, 1, 0, 1)] == [True] * 4
    assert {*os.listdir(data.place)} == {".lock", data.path(0).name, data.path(1).name}
    assert data.whole() == {"train-000000.tar": 1, "train-000001.tar": 1}
    assert (data.path(1).stem, data.is_right(1)) == (data.infos[1].sha256, True)


def test_processes_that_want_the_same_shards_fetch_each_once(data, wait_for):
    def bring_all():
        (reader := data.reader()).expect([*range(12)])
        wait_for(lambda: reader.expected and len(data.here()) == 12, "all shards here")

    processes = [Process(target=bring_all, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert data.whole() == {info.name: 1 for info in data.infos}


def test_memory_urls_are_read_too(data):
    system = fsspec.filesystem("memory")
    system.put(str(data.folder), "/far", recursive=True)
    for cache in (None, data.cache()):
        reader = ShardReader("memory://far", data.infos, cache)
        raws = [raw for some in SampleSource(reader, EvalPlan(SIZES, 5, 0, 1)) for raw in some]
        assert [raw.key for raw in raws] == list(data.content)
        data.check(*raws)
    system.rm("/far", recursive=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), " is not what the manifest"),
        (lambda path: os.truncate(path, 5000), " .*; copy or pack"),
        (Path.unlink, ".*; copy or pack"),
    ],
)
def test_a_shard_that_is_not_what_was_packed_is_named_and_not_kept(data, wait_for, spoil, message):
    spoil(data.folder / data.infos[1].name)
    reader = data.reader()
    reader.expect([1])
    wait_for(lambda: reader.fetcher and reader.fetcher.failure, "failure")
    # What the background sees, the next read says.
    with pytest.raises(DataError, match=f"^{data.store}/train-000001.tar{message}"):
        reader.read(Address(0, 0, 0))
    assert (data.whole(), data.used()) == ({"train-000001.tar": 1}, 0)


def test_a_shard_that_vanishes_later_is_named(data):
    reader = ShardReader(data.store, data.infos)
    reader.read(Address(0, 1, 0))
    (data.folder / data.infos[1].name).unlink()
    with pytest.raises(DataError, match=f"^{data.store}/train-000001.tar.*; copy or pack"):
        reader.read(Address(0, 1, 1))


def test_a_cache_that_is_a_file_is_said_in_one_line(data):
    data.place.touch()
    with pytest.raises(DataError, match=f"^{data.place} cannot be written: .*--cache-dir"):
        data.reader().read(Address(0, 0, 0))


def test_a_batch_waits_for_no_other_and_for_no_whole_shard(data, wait_for):
    go, free = threading.Event(), [("train-000000.tar", 512), ("train-000000.idx", 0)]
    data.before = lambda name, begin: begin % 512 == 0 and (name, begin) not in free and go.wait()
    batches = iter(SampleSource(data.reader(), EvalPlan(SIZES, 1, 0, 1)))
    try:
        data.check(*next(batches))
        assert not data.here()
    finally:
        go.set()
    wait_for(lambda: len(data.here()) == len(SIZES), "all shards here")
    assert len([data.check(*raws) for raws in batches]) == 23


def test_the_shards_of_this_window_and_the_next_are_fetched_ahead(data, wait_for, monkeypatch):
    monkeypatch.setattr(shards.order, "WHOLE", 0)
    order = Order(SIZES, 0, lanes=2, window=4)
    batches = iter(SampleSource(data.reader(), TrainPlan(order, 2, 0, 1, 0)))
    next(batches)
    wait_for(lambda: len(data.here()) == 8, "two windows here")
    assert data.here() == {order.locate(position).shard for position in range(16)}
    assert len([next(batches) for _ in range(4)]) == 4
    wait_for(lambda: len(data.here()) == 12, "the third window here")
    assert set(data.whole().values()) == {1}


def test_what_is_read_later_does_not_push_out_what_is_read_sooner(data, wait_for, monkeypatch):
    # As where fetching takes long: nothing was read within the last minute.
    monkeypatch.setattr(shards.cache, "IN_USE", 0)
    reader = data.reader(data.cache(3))
    for number in range(11):
        reader.expect([*range(number, 12)])
        wait_for(lambda soon={number, number + 1}: soon <= data.here(), "this and the next", 5)
        data.check(reader.read(Address(0, number, 0)))
    assert data.whole() == {info.name: 1 for info in data.infos}


def test_a_reader_that_is_let_go_leaves_no_thread(data, wait_for):
    before, reader = threading.active_count(), data.reader()
    reader.expect([0])
    wait_for(data.here, "shard here")
    del reader
    gc.collect()
    wait_for(lambda: threading.active_count() <= before, "end of the thread", 5)


def test_the_bound_holds_at_every_moment_and_the_least_recently_read_goes_first(data, monkeypatch):
    monkeypatch.setattr(shards.cache, "IN_USE", 0)
    cache, most = data.cache(3.1), []
    data.before = lambda name, begin: begin or name[-4:] != ".tar" or most.append(data.used())
    for number in range(3):
        data.fetch(number, cache)
        os.utime(data.path(number), (number, number))
    data.reader(cache).read_all([Address(0, 0, 0), Address(1, 0, 1)])
    for number, left in [(3, {0, 2, 3}), (4, {0, 3, 4})]:
        assert (data.fetch(number, cache), data.here()) == (True, left)
    assert max(most) == data.used() == 3 * data.size


def test_what_is_being_fetched_takes_its_room_from_the_start(data):
    cache, meanwhile = data.cache(1.9), []
    data.before = lambda name, begin: (
        meanwhile or meanwhile.extend(data.fetch(number, cache) for number in (0, 1))
    )
    assert data.fetch(0, cache) is True
    # Another is bringing the one, and there is no room for the other.
    assert (meanwhile, data.here()) == ([False, None], {0})


@pytest.mark.parametrize("reads", [1, 2])
def test_a_shard_that_was_just_read_is_not_evicted(data, reads):
    data.fetch(0)
    os.utime(data.path(0), (1, 1))
    data.check(*map(data.reader().read, [Address(0, 0, 0), Address(1, 0, 1)][:reads]))
    assert (data.fetch(1, data.cache(1)), data.here()) == (None, {0})


def test_what_has_no_room_at_first_comes_in_turn_when_there_is_some(data, wait_for, monkeypatch):
    looks, make_room = [], ShardCache.make_room
    monkeypatch.setattr(ShardCache, "make_room", lambda *a: looks.append(a) or make_room(*a))
    data.fetch(0)
    (reader := data.reader(data.cache(1))).expect([*range(1, 12)])
    wait_for(lambda: len(looks) > 4, "looks for room")
    monkeypatch.setattr(shards.cache, "IN_USE", 0)
    wait_for(lambda: reader.fetcher and data.here() == {1}, "the shard", 5)
    assert [*data.whole()] == ["train-000000.tar", "train-000001.tar"]


def test_a_reader_goes_on_where_its_shard_was_evicted_and_lets_it_go(data, monkeypatch):
    monkeypatch.setattr(shards.cache, "IN_USE", 0)
    data.fetch(0)
    reader = data.reader()
    data.check(reader.read(Address(0, 0, 0)))
    (file,) = reader.files.values()
    assert (data.fetch(1, data.cache(1)), data.samples()) == (True, 0)
    data.check(reader.read(Address(0, 0, 1)))
    assert (file.closed, data.samples(), data.here()) == (True, 1, {1})


@pytest.mark.parametrize(("fitting", "fetched"), [(2, True), (1, None)])
def test_a_shard_that_arrives_while_room_is_made_is_counted(data, monkeypatch, fitting, fetched):
    look, part = shards.cache.remove_abandoned, data.path(0).with_suffix(".part")
    data.place.mkdir()
    handle = claim(part)
    assert handle is not None
    os.ftruncate(handle, data.size)

    def arrives(path):
        abandoned = look(path)
        if path == part and not data.here():
            part.rename(data.path(0))
        return abandoned

    monkeypatch.setattr(shards.cache, "remove_abandoned", arrives)
    assert data.fetch(1, data.cache(fitting)) is fetched
    assert data.used() <= data.cache(fitting).limit
    os.close(handle)


@pytest.mark.parametrize(("fitting", "number"), [(9, 0), (1, 0), (1, 1)])
def test_what_a_kill_leaves_is_not_read_and_makes_way(data, wait_for, monkeypatch, fitting, number):
    monkeypatch.setattr(shards.cache, "CHUNK", 1000)
    (gate, _), part, cache = os.pipe(), data.path(0).with_suffix(".part"), data.cache(fitting)
    data.before = lambda name, begin: begin == 6000 and os.read(gate, 1)
    process = Process(target=data.fetch, args=[0, cache], daemon=True)
    process.start()
    wait_for(lambda: ("train-000000.tar", 6000) in data.asked(), "the middle")
    assert data.fetch(0, cache) is False
    process.kill()
    process.join()
    data.before = lambda name, begin: None
    assert part.stat().st_size == data.size
    data.check(data.reader(cache).read(Address(0, 0, 0)))
    assert data.samples() == 1
    # The same takes over, another removes.
    assert (data.fetch(number, cache), data.here()) == (True, {number})
    assert (data.is_right(number), part.exists()) == (True, False)


def test_a_shard_that_was_cut_in_the_cache_is_not_used_but_fetched_anew(data):
    data.fetch(0)
    os.truncate(data.path(0), 5000)
    data.check(data.reader().read(Address(0, 0, 1)))
    assert data.samples() == 1
    for _ in range(2):
        assert (data.fetch(0), data.is_right(0)) == (True, True)
        os.truncate(data.path(0), 5000)


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, OSError(5, "503")])
def test_requests_that_fail_at_first_are_made_again(data, error):
    data.errors[:] = [error] * 4
    data.check(*data.reader().read_all([Address(0, 0, 0), Address(1, 1, 0)]))
    # What was answered is not asked for again: a look at the end five times, then the sample.
    assert sorted(Counter(name for name, _ in data.asked()).values()) == [1, 1, 2, 6]
    data.errors[:] = [error] * 4
    assert (data.fetch(1), data.is_right(1)) == (True, True)


@pytest.mark.parametrize(("kind", "times"), [(ConnectionResetError, 5), (PermissionError, 1)])
def test_requests_that_always_fail_end_in_one_line_that_names_the_shard(data, kind, times):
    data.errors[:] = [kind(5, "the line is cut")] * 99
    said = f"{data.store}/train-000001.tar: [Errno 5] the line is cut; check address, credentials"
    addresses = [Address(0, 0, 0), Address(1, 1, 0)]
    for ask in (lambda: data.fetch(1), lambda: data.reader().read_all(addresses)):
        with pytest.raises(DataError) as caught:
            ask()
        assert str(caught.value) == f"{said} and network, the same command goes on"
    assert data.whole() == {"train-000001.tar": times}
