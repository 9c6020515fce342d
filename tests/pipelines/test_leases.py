"""`inference.leases`: a stalled rank is reported, and the others take over its shards."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import predict
from pipelines.inference.job import write_shard
from pipelines.inference.leases import Lease, lease_name, read_lease, wait_for_ranks
from pipelines.inference.options import WORK_DIR, ResultOptions
from shards.store import Store


def test_a_rank_that_makes_progress_is_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lease = Lease(store, 1, 0.4)
    looks = 0

    def work(seconds: float) -> None:
        nonlocal looks
        looks += 1
        time.sleep(0.05)
        lease.renew()
        if looks == 20:  # longer than the timeout
            (tmp_path / "b.tar").touch()

    assert wait_for_ranks(store, {1: ["b.tar"]}, 0.4, sleep=work) == {}
    assert looks == 20
    assert 2 <= int(read_lease(store, 1)) <= 20


def test_only_ranks_that_stand_still_are_returned_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    wanted = {0: ["a.tar"], 2: ["a.tar", "b.tar", "c.tar"]}
    start = time.monotonic()
    assert wait_for_ranks(Store(tmp_path), wanted, 0.2) == {2: ["b.tar", "c.tar"]}
    assert 0.2 <= time.monotonic() - start < 2


def test_a_lease_is_written_rarely(tmp_path: Path) -> None:
    lease = Lease(Store(tmp_path), 0, 100.0)
    for _ in range(1000):
        lease.renew()
    assert (tmp_path / lease_name(0)).read_bytes() == b"1"


def test_a_lease_is_not_written_into_a_complete_job(tmp_path: Path) -> None:
    (tmp_path / "index.json").touch()
    Lease(Store(tmp_path), 0, 100.0).renew()
    assert os.listdir(tmp_path) == ["index.json"]


@pytest.mark.parametrize("part", [(), ("--part", "1/3")], ids=["all shards", "one shard"])
def test_shards_that_others_made_while_a_rank_was_stopped_stay_as_they_are(
    part: tuple[str, ...], draw, make_checkpoint, call, content, monkeypatch, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 6, size=(20, 20)) / "images"
    flags = ["--checkpoint", make_checkpoint(), "--input", images, "--workers", 0]
    flags += ["--samples-per-shard", 2]
    (images / "broken.png").write_bytes(b"")
    alone, others, out = tmp_path / "alone", tmp_path / "others", tmp_path / "out"
    assert call("predict", *flags, "--out", alone).code == 3
    assert call("predict", *flags, *part, "--out", others).code == 3
    made: list[str] = []

    def stop_at_the_first(results: ResultOptions, store: Store, number: int, *more: Any) -> Any:
        if not made:
            shutil.copytree(others, out, dirs_exist_ok=True, ignore=lambda *_: ["job.json"])
            # As the rank that completes the job does.
            shutil.rmtree(out / WORK_DIR if not part else out / "none", ignore_errors=True)
        made.append(results.shard_name(number))
        return write_shard(results, store, number, *more)

    monkeypatch.setattr(predict, "write_shard", stop_at_the_first)
    assert call("predict", *flags, "--out", out).code == 3
    assert content(out) == content(alone)
    assert made.count("predicted-000000.tar") == 1


@pytest.mark.ranks
@pytest.mark.parametrize("last", [signal.SIGKILL, signal.SIGCONT], ids=["killed", "continued"])
def test_a_stopped_rank_neither_holds_a_job_nor_changes_it_later(
    last: signal.Signals,
    draw,
    make_checkpoint,
    call,
    spawn_ranks,
    wait_for,
    kill,
    content,
    tmp_path: Path,
) -> None:
    images = draw(tmp_path / "in", 24, size=(40, 40)) / "images"
    flags = ["--checkpoint", make_checkpoint(), "--input", images, "--workers", 0]
    flags += ["--samples-per-shard", 2]
    assert call("predict", *flags, "--out", tmp_path / "alone").code == 0
    out = tmp_path / "out"
    process = spawn_ranks(2, "predict", *flags, "--out", out, "--rank-timeout", 0.02)
    try:
        wait_for((out / lease_name(1)).exists, "the first image of rank 1")
        (stopped,) = (
            child for child in psutil.Process(process.pid).children() if rank_of(child) == "1"
        )
        os.kill(stopped.pid, signal.SIGSTOP)
        assert not (out / "index.json").exists()
        wait_for((out / "index.json").exists, "the manifest", 60)
        # What torch's launcher does 30 s after its SIGTERM.
        wait_for(lambda: not (out / ".predict").exists(), "the end of rank 0", 60)
        if last == signal.SIGKILL:
            time.sleep(0.2)
        os.kill(stopped.pid, last)
        _, err = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 1
    assert "rank 1 has made no progress for 0.02 minutes; rank 0 takes over its" in err
    assert (
        "rank 1 made no progress for --rank-timeout 0.02 minutes; the other ranks took over" in err
    )
    assert "Traceback" not in err
    made = content(out)
    assert made == content(tmp_path / "alone")
    assert call("predict", *flags, "--out", out).code == 0
    assert content(out) == made


def rank_of(process: psutil.Process) -> str | None:
    """The rank of a forked process: ranks are forked in order."""
    siblings = sorted(p.pid for p in process.parent().children())
    return str(siblings.index(process.pid))
