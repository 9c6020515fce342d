"""Shared memory that workers cannot use is found out before they start."""

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runtime import shared_memory
from pipelines.runtime.shared_memory import MIN_FREE, usable_workers

pytestmark = pytest.mark.skipif(not Path("/dev/shm").exists(), reason="needs Linux")
Usage = namedtuple("Usage", "free")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    shared_memory.report.cache_clear()
    yield
    shared_memory.report.cache_clear()


def test_missing_shared_memory_leaves_no_workers_and_one_line(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path / "missing")
    flags = ("--data", shards, "--run-dir", tmp_path / "run", *tiny, "--workers", 2, "--steps", 2)
    ended = call("train", *flags)
    assert ended.code == 0, ended.err
    lines = [line for line in ended.err.splitlines() if "missing" in line]
    assert len(lines) == 1
    assert "cannot be written to (No such file or directory): no worker processes" in lines[0]
    assert "--shm-size" in lines[0]


@pytest.mark.parametrize(
    ("free", "needed", "workers"),
    [(MIN_FREE - 1, 0, 0), (MIN_FREE, 0, 2), (MIN_FREE, MIN_FREE + 1, 0)],
)
def test_shared_memory_must_hold_the_batches_on_their_way(
    free: int, needed: int, workers: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: Usage(free))
    assert usable_workers(2, needed) == workers
    assert ("MiB free of" in capsys.readouterr().err) == (workers == 0)
