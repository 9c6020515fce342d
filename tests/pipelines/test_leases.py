"""`inference.leases`: a stalled rank is reported, and the others take over its shards."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from pipelines.inference.leases import Lease, lease_name, read_lease, wait_for_ranks
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


@pytest.mark.ranks
def test_a_stopped_rank_does_not_hold_a_job(
    draw, make_checkpoint, call, spawn_ranks, wait_for, kill, content, tmp_path: Path
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
        time.sleep(0.2)
        os.kill(stopped.pid, signal.SIGKILL)
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
