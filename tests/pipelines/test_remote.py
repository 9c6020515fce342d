"""`loading.dataset`, `runtime.verification`.

Data at a URL: batches and scores of the local copy, by range requests or out of the cache.
"""

import re
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice, pairwise
from math import gcd
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.order
import shards.requests
from pipelines.loading.augment import AugmentConfig
from pipelines.loading.batches import train_batches
from pipelines.loading.dataset import DataSet, LoadingOptions, choose_cache, open_data
from pipelines.loading.stages import Batch
from shards.cache import ShardCache
from shards.manifest import read_manifest
from shards.offsets import ShardOffsets
from shards.order import Order, TrainPlan
from shards.reader import SampleSource, list_sample_members, plan_reads
from shards.store import Store

s3fs = pytest.importorskip("s3fs")
URL = "s3://bucket/data"
Asked = tuple[Any, ...]
"""File, first and last byte; None: no range, or to the end."""


class Proxy(BaseHTTPRequestHandler):
    """In front of the S3 server: logs requests, and fails on request."""

    protocol_version = "HTTP/1.1"
    behind: ClassVar[str]
    asked: ClassVar[list[Asked]]
    fails: ClassVar[Callable[[Asked], int | None]]
    """The status to answer with, 0 to cut the connection, None to do what is asked."""

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        asked = (Path(self.path).name, *(int(byte) if byte else None for byte in (first, last)))
        self.asked.append(asked)
        status, body, headers = Proxy.fails(asked), b"", {"Content-Length": "0"}
        if status == 0:
            self.close_connection = True
            return
        if status is None:
            behind = HTTPConnection(self.behind)
            behind.request(self.command, self.path, headers=dict(self.headers))
            answer = behind.getresponse()
            status, body, headers = answer.status, answer.read(), dict(answer.headers)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value if name != "Connection" else "keep-alive")
        self.end_headers()
        with suppress(OSError):  # who asked may have been killed
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    @classmethod
    def whole(cls) -> Counter[str]:
        """How many times each shard was fetched whole."""
        return Counter(name for name, begin, _ in cls.asked if name[-4:] == ".tar" and not begin)


@pytest.fixture(scope="module")
def put(s3: str, shards: Path) -> Callable[..., str]:
    """put(name, file=bytes) -> the URL of a copy of the shards with these files, None for none."""

    def make(name: str, **files: bytes | None) -> str:
        packed = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
        for file, data in {**packed, **files}.items():
            if data is not None:
                s3fs.S3FileSystem(endpoint_url=s3).pipe_file(f"bucket/{name}/{file}", data)
        return f"s3://bucket/{name}"

    return make


@pytest.fixture(scope="module", autouse=True)
def server(s3: str, put: Callable[..., str]) -> Iterator[None]:
    """The proxy, before the shards at URL."""
    assert put("data") == URL
    Proxy.behind = s3.removeprefix("http://")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> type[Proxy]:
    Proxy.asked, Proxy.fails = [], lambda asked: None
    monkeypatch.setattr(Proxy, "log_message", lambda *given: None)
    monkeypatch.setattr(shards.requests, "RETRY_DELAYS", (1e-3,) * 3)
    return Proxy


def data_set(place: object, *, workers: int = 0, cache: ShardCache | None = None) -> DataSet:
    store = Store(str(place))
    return DataSet(store, read_manifest(store), cache, workers)


def plan_of(data: DataSet, rank: int = 0, world: int = 1) -> TrainPlan:
    sizes = tuple(shard.samples for shard in data.manifest.splits["train"].shards)
    return TrainPlan(Order(sizes, 0), 2, rank, world, 0)


def some(drawn: Iterator[Batch]) -> list[tuple[Any, ...]]:
    """The next nine batches, as bytes."""
    nine = islice(drawn, 9)
    return [(b.position.tolist(), *(t.numpy().tobytes() for t in (b.image, b.mask))) for b in nine]


def batches(data: DataSet, *rank_and_world: int) -> Iterator[Batch]:
    plan = plan_of(data, *rank_and_world)
    return train_batches(data, plan, crop_size=32, augment=AugmentConfig(), seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_local_copy(workers: int, shards: Path, proxy: type[Proxy]) -> None:
    for rank in (0, 1):
        expected = some(batches(data_set(shards), rank, 2))
        assert len({image for _, image, _ in expected}) == 9
        assert some(batches(data_set(URL, workers=workers), rank, 2)) == expected
    assert not proxy.whole()
    assert {name for name, begin, _ in proxy.asked if begin is None} == {"index.json"}


@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_asks_for_its_samples_the_indexes_and_a_byte_a_shard(rank, shards, proxy) -> None:
    data = data_set(URL)
    proxy.asked.clear()
    reader, plan, expected = data.reader("train"), plan_of(data, rank, 2), set[Asked]()
    # Eight samples, two ranks, batches of two.
    epoch: Any = SimpleNamespace(batches=lambda *_: islice(plan.batches(0, 1), 2))
    epoch.upcoming_shards = plan.upcoming_shards
    assert len([*SampleSource(reader, epoch)]) == 2
    for address in chain.from_iterable(epoch.batches()):
        info = reader.shards[address.shard]
        index = info.name.replace(".tar", ".idx")
        entry = ShardOffsets((shards / index).read_bytes(), index)[address.row]
        pieces = plan_reads(list_sample_members(entry))
        expected |= {(info.name, begin, end - 1) for begin, end in pieces}
        expected |= {(index, 0, None), (info.name, info.bytes - 1, info.bytes)}
    assert sorted(proxy.asked, key=str) == sorted(expected, key=str)


def test_an_epoch_after_the_first_asks_for_no_sample(shards, proxy, wait_for, tmp_path) -> None:
    expected = some(batches(data_set(shards)))
    data = data_set(URL, workers=2, cache=ShardCache(tmp_path, 10**9))
    drawn = batches(data)
    assert some(drawn) == expected
    infos = data.manifest.splits["train"].shards
    here = {f"{info.sha256}.tar" for info in infos}
    wait_for(lambda: {path.name for path in tmp_path.glob("*.tar")} == here, "all shards here")
    del drawn
    assert proxy.whole() == {info.name: 1 for info in infos}
    proxy.asked.clear()
    # In processes of their own, which have read nothing yet.
    assert some(batches(data)) == expected
    ends = {(info.name, info.bytes - 1) for info in infos}
    assert {(name, begin) for name, begin, _ in proxy.asked if name.endswith(".tar")} == ends


STEPS = ("--steps", 6, "--log-every", 2, "--eval-every", 3)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line[name] for line in lines for name in line if name.startswith("train/loss")]


def test_training_and_scores_are_those_of_a_local_copy(
    proxy, shards, trained, tiny, call, metrics, tmp_path
) -> None:
    options = ("--data", URL, "--workers", 0, "--cache-dir", tmp_path / "cache", "--cache-bytes", 1)
    ended = call("train", *options, "--run-dir", tmp_path / "run", *tiny, *STEPS)
    assert ended.code == 0, ended.err
    assert losses(metrics(tmp_path / "run")) == losses(metrics(trained))
    packed = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert ended.err.count(f"--cache-bytes 1 is less than the {packed:,} bytes of shards") == 1
    assert (proxy.whole(), (tmp_path / "cache").exists()) == (Counter(), False)
    scores = set[bytes]()
    for place in (options, ("--data", shards)):
        assert call("evaluate", *place, "--checkpoint", trained, "--out", tmp_path).code == 0
        scores.add((tmp_path / "scores.json").read_bytes())
    assert len(scores) == 1


@pytest.mark.ranks
def test_two_ranks_train_as_one_and_share_a_cache(trained, tiny, launch, metrics, tmp_path) -> None:
    options = ("--data", URL, "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    ended = launch(2, "train", *options, *tiny, *STEPS, "--workers", 0)
    assert ended.code == 0, ended.err
    assert "range requests" not in ended.err
    ours, theirs = losses(metrics(tmp_path / "run")), losses(metrics(trained))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-5)


def test_requests_that_fail_twice_are_made_again_in_every_worker(shards, proxy) -> None:
    data = data_set(URL, workers=2)
    proxy.fails = lambda asked: {1: 503, 2: 0}.get(proxy.asked.count(asked))
    assert some(batches(data)) == some(batches(data_set(shards)))


@pytest.fixture
def refused(call, tiny, tmp_path: Path) -> Callable[..., str]:
    """The one line that `unet train` ends with, after the lines about the cache."""

    def train(url: object, *more: object) -> str:
        options = ("--data", url, "--run-dir", tmp_path / "run", "--steps", 1, *tiny)
        ended = call("train", *options, "--workers", 0, *more)
        assert ended.code == 1
        lines = [line for line in ended.err.splitlines() if "by range requests" not in line]
        assert len(lines) == 1, ended.err
        return lines[0].removeprefix("unet train: ")

    return train


def test_a_shard_that_stays_out_of_reach_is_named_in_one_line(proxy: type[Proxy], refused) -> None:
    proxy.fails = lambda asked: 503 if asked[0] == "train-000001.tar" else None
    line = refused(URL)
    assert line.startswith(f"{URL}/train-000001.tar: ")
    assert line.endswith("network, then rerun the same command to resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: None, ""),
        (lambda data: data[:5000], " has 5,000 bytes, but the manifest lists 30,720; copy or pack"),
        (
            lambda data: data + b"x",
            " has 30,721 bytes, but the manifest lists 30,720; copy or pack",
        ),
        (lambda data: data[:-1] + b"x", " does not match the manifest (sha256); copy or pack"),
    ],
    ids=["missing", "shorter", "longer", "changed"],
)
def test_a_shard_that_is_not_what_was_packed_is_named(
    change, message, shards, proxy, put, refused, request
) -> None:
    kind, name = request.node.callspec.id, "train-000001.tar"
    url = put(kind, **{name: change((shards / name).read_bytes())})
    line = refused(url, *["--verify-shards"] * (kind == "changed"))
    assert line.startswith(f"{url}/{name}{message}")
    assert line.endswith(" again")
    # Bytes of it, once by each of the two groups of batches that are read first.
    tries = [asked for asked in proxy.asked if asked[0] == name and asked[1] is not None]
    assert kind != "missing" or len(tries) <= 2


def test_a_local_shard_that_was_changed_is_named_too(shards: Path, refused, tmp_path: Path) -> None:
    path = Path(shutil.copytree(shards, tmp_path / "copy"), "val-000000.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    line = refused(path.parent, "--verify-shards")
    assert line == f"{path} does not match the manifest (sha256); copy or pack it again"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_cannot_be_written_is_reported_in_one_line(workers, refused, tmp_path) -> None:
    (tmp_path / "file").touch()
    line = refused(URL, "--cache-dir", tmp_path / "file", "--workers", workers, "--steps", 50)
    assert re.match(f"{tmp_path}/file cannot be written: .*--cache-dir", line)


def test_one_process_warns_once_of_what_would_change_the_cache(tmp_path: Path, capsys) -> None:
    options = LoadingOptions(workers=0, cache_dir=tmp_path / "cache", cache_bytes=99)
    assert choose_cache(URL, options, 99, "raise it")[1] == ""
    for main in (True, False):
        rank: Any = SimpleNamespace(is_main_process=main, process_index=0, num_processes=1)
        data = open_data(URL, options, read_manifest(URL), ["train"], rank, 1000, "raise it")
        assert data.cache is None
    assert capsys.readouterr().err == (
        f"{URL} is read by range requests: --cache-bytes 99 is less than the 1,000 bytes of "
        "shards in use at the same time; raise it\n"
    )


def in_windows(order: Order, ranks: Iterable[int], world: int) -> dict[tuple[int, int], set[int]]:
    """{(epoch, window): shards} of some ranks for three epochs, position by position."""
    found, whole = defaultdict[tuple[int, int], set[int]](set), shards.order.MAX_FULL_SHUFFLE
    for position in range(3 * order.num_samples):
        epoch, j = divmod(position, order.num_samples)
        window = 0 if order.num_samples <= whole else j // order.lanes // order.window
        found[epoch, window].update([order.locate(position).shard] * (position % world in ranks))
    return found


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=10).filter(any),
    numbers=st.tuples(*[st.integers(1, 6)] * 3),
    some=st.sets(st.integers(0, 5), min_size=1),
    whole=st.sampled_from([0, 20]),
)
def test_positions_determine_which_shards_are_in_use_and_next(sizes, numbers, some, whole) -> None:
    lanes, window, world = numbers
    ranks, order = sorted({rank % world for rank in some}), Order(tuple(sizes), 3, lanes, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.order, "MAX_FULL_SHUFFLE", whole)
        # All ranks may read a permutation of everything, and what ranks share that share lanes.
        step = gcd(lanes, world) if order.num_samples > whole else 1
        reading = [rank for rank in range(world) if rank % step in {one % step for one in ranks}]
        expected = in_windows(order, reading, world)
        for (epoch, number), found in expected.items():
            assert set(order.shards_in_window(epoch, number, ranks, world)) == found
        weights = [10 + 7 * number for number in range(len(sizes))]
        pairs = pairwise(expected.items())
        both = [now | then for ((epoch, _), now), (_, then) in pairs if epoch == 0]
        most = max(sum(weights[shard] for shard in found) for found in both)
        assert order.max_weight_in_use(weights, ranks, world) == most
        mine, plan = in_windows(order, ranks[:1], world), TrainPlan(order, 1, ranks[0], world, 0)
        windows = list(mine)
        for position in range(ranks[0], 2 * order.num_samples, world):
            now, upcoming = (
                windows.index(order.locate_window(position)),
                plan.upcoming_shards(position),
            )
            assert {*upcoming} >= mine[windows[now]] | mine[windows[now + 1]]
            assert len({*upcoming}) == len(upcoming)
