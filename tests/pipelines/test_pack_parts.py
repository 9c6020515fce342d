"""`pack`, `packing.pack_options`.

Packing in parts or on a Dask cluster: byte-identical to packing in one process.
"""

import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.manifest import read_manifest

REPO = Path(__file__).resolve().parents[2]


def flags(folder: Path, out: Path, *more: object) -> list[object]:
    return [
        *("--images", folder / "images", "--masks", folder / "masks", "--out", out),
        *("--mask-format", "binary", "--samples-per-shard", 2, *more),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    return draw(tmp_path_factory.mktemp("images"), 30, size=(96, 96))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory, call, content):
    """Files of 30 samples in shards of 2, packed by one process without interruption."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert call("pack", *flags(folder, out, "--workers", 1)).code == 0
    assert len([*out.glob("*.tar")]) > 12
    return content(out)


@pytest.mark.parametrize("order", [*itertools.permutations((1, 2, 3))], ids=str)
def test_parts_in_any_order_write_the_same_bytes(
    order: tuple[int, ...], folder: Path, expected, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seen = 0
    for part in order:
        ended = call("pack", *flags(folder, out, "--part", f"{part}/3", "--workers", 1))
        assert ended.code == 0, ended.err
        assert re.search(rf"part {part}/3: \d+ shards are complete; after all parts", ended.out)
        assert not (out / "index.json").exists()
        assert len([*out.glob("*.tar")]) > seen
        seen = len([*out.glob("*.tar")])
    ended = call("pack", *flags(folder, out, "--finish"))
    assert ended.code == 0, ended.err
    assert content(out) == expected


def test_concurrent_parts_write_the_same_bytes(
    folder: Path, expected, spawn, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parts = [spawn("pack", *flags(folder, out, "--part", f"{i}/3")) for i in (1, 2, 3)]
    for process in parts:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    assert call("pack", *flags(folder, out, "--finish")).code == 0
    assert content(out) == expected


def test_without_finish_the_missing_shards_are_packed(
    folder: Path, expected, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call("pack", *flags(folder, out, "--part", "2/3", "--workers", 1)).code == 0
    ended = call("pack", *flags(folder, out, "--workers", 1))
    assert ended.code == 0, ended.err
    assert "shards exist already" in ended.out
    assert content(out) == expected


def test_finishing_too_early_names_what_is_missing(
    folder: Path, expected, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for part in (1, 3):
        assert call("pack", *flags(folder, out, "--part", f"{part}/3", "--workers", 1)).code == 0
    tars = {name for name in expected if name.endswith(".tar")}
    missing = sorted(tars - set(content(out)))
    ended = call("pack", *flags(folder, out, "--finish"))
    assert ended.code == 1
    assert ended.err.splitlines() == [
        f"unet pack: {out}: {len(missing)} of {len(tars)} shards are missing, first {missing[0]}; "
        "rerun the parts that pack them, then --finish"
    ]
    assert not (out / "index.json").exists()


def run_killed_part(shards: int, arguments: list[str]) -> None:
    """Pack a part, and get SIGKILL after a number of shards."""
    from pipelines import pack

    replace, count = os.replace, 0

    def counting(source: object, target: object) -> None:
        nonlocal count
        replace(source, target)  # type: ignore[arg-type]
        count += str(target).endswith(".tar")
        if count == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting  # type: ignore[assignment]
    os._exit(pack.main(arguments))


def test_a_killed_part_resumes(folder: Path, expected, call, content, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = [str(flag) for flag in flags(folder, out, "--workers", 1, "--part", "1/2")]
    process = multiprocessing.get_context("fork").Process(
        target=run_killed_part, args=(3, arguments)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(finished) == 3
    ended = call("pack", *arguments)
    assert ended.code == 0, ended.err
    assert {path: path.stat().st_ino for path in finished} == finished
    assert call("pack", *flags(folder, out, "--workers", 1, "--part", "2/2")).code == 0
    assert call("pack", *flags(folder, out, "--finish")).code == 0
    assert content(out) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--invert",), "other settings (mask format)"),
        (("--seed", 1), "other splits, shard sizes or seed"),
        (("--verify", "headers"), "other settings (verify)"),
    ],
)
def test_a_part_with_other_flags_is_refused(
    change: tuple[object, ...], message: str, folder: Path, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call("pack", *flags(folder, out, "--part", "1/3", "--workers", 1)).code == 0
    before = content(out)
    for rest in (("--part", "2/3"), ("--finish",)):
        ended = call("pack", *flags(folder, out, *change, *rest))
        assert ended.code == 1
        assert f"created from another plan: {message}" in ended.err
    assert content(out) == before


def run_stopped_part(arguments: list[str]) -> None:
    """Pack a part, and get SIGSTOP just before its first shard appears."""
    from pipelines import pack

    replace = os.replace

    def stopping(source: object, target: object) -> None:
        if str(target).endswith(".tar"):
            os.kill(os.getpid(), signal.SIGSTOP)
        replace(source, target)  # type: ignore[arg-type]

    os.replace = stopping  # type: ignore[assignment]
    os._exit(pack.main(arguments))


def test_a_plan_without_shards_is_replaced_if_no_process_uses_it(
    folder: Path, spawn, call, content, tmp_path: Path
) -> None:
    out, corrected = tmp_path / "out", ("--workers", 1, "--invert")
    arguments = [str(flag) for flag in flags(folder, out, "--workers", 1, "--part", "1/2")]
    process = multiprocessing.get_context("fork").Process(
        target=run_stopped_part, args=(arguments,)
    )
    process.start()
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    before = content(out)
    ended = call("pack", *flags(folder, out, *corrected, "--part", "2/2"))
    assert ended.code == 1
    assert (
        "another plan: other settings (mask format); another process is using that plan"
        in ended.err
    )
    assert content(out) == before
    process.kill()
    process.join()
    for part in [
        spawn("pack", *flags(folder, out, *corrected, "--part", f"{i}/2")) for i in (1, 2)
    ]:
        _, stderr = part.communicate(timeout=200)
        assert part.returncode == 0, stderr
    assert call("pack", *flags(folder, out, *corrected, "--finish")).code == 0
    assert call("pack", *flags(folder, tmp_path / "reference", *corrected)).code == 0
    assert content(out) == content(tmp_path / "reference")


def test_more_parts_than_shards_are_allowed(draw, call, tmp_path: Path) -> None:
    few = draw(tmp_path / "in", 2, size=(16, 16))
    arguments = flags(few, tmp_path / "out", "--val-fraction", 0, "--workers", 1)
    for part in (5, 1):
        ended = call("pack", *arguments, "--part", f"{part}/5")
        assert ended.code == 0, ended.err
    assert call("pack", *arguments, "--finish").code == 0
    assert read_manifest(tmp_path / "out").splits["train"].samples == 2


def test_bad_samples_of_all_parts_are_listed_at_the_end(draw, call, content, tmp_path) -> None:
    bad = draw(tmp_path / "in", 8, size=(16, 16))
    for number in (1, 6):
        (bad / "images" / f"p{number:03d}.png").write_bytes(b"")
    ended = call("pack", *flags(bad, tmp_path / "out", "--workers", 1, "--part", "1/1"))
    (listed,) = re.findall("all problems: (.+)", ended.err)
    assert len(Path(listed).read_text().splitlines()) == 2
    arguments = ("--keep-going", "--workers", 1)
    assert call("pack", *flags(bad, tmp_path / "reference", *arguments)).code == 3
    codes = {
        call("pack", *flags(bad, tmp_path / "out", *arguments, "--part", f"{part}/2")).code
        for part in (2, 1)
    }
    assert 3 in codes <= {0, 3}
    assert call("pack", *flags(bad, tmp_path / "out", *arguments, "--finish")).code == 3
    assert content(tmp_path / "out") == content(tmp_path / "reference")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--part", "4/3"),
            "--part 4/3: the first number must be from 1 to the second",
        ),
        (
            ("--part", "0/3"),
            "--part 0/3: the first number must be from 1 to the second",
        ),
        (("--part", "3"), "--part must be like 2/5, got '3'"),
        (("--part", "a/b"), "--part must be like 2/5, got 'a/b'"),
        (("--part", "1/2", "--finish"), "--part and --finish exclude each other"),
        (("--scheduler", "tcp://h:1", "--workers", 2), "--workers has no effect with --scheduler"),
    ],
)
def test_invalid_parts_are_refused(arguments, message: str, call, tmp_path: Path) -> None:
    ended = call("pack", *flags(tmp_path / "in", tmp_path / "out", *arguments))
    assert ended.code == 2
    assert message in ended.message
    assert not (tmp_path / "out").exists()


# ---- a Dask cluster


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory, wait_for, kill) -> Iterator[str]:
    """Address of a scheduler with two workers, started by the `dask` command."""
    pytest.importorskip("distributed")
    directory = tmp_path_factory.mktemp("dask")
    file = directory / "scheduler.json"
    here = ("--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file))

    def start(part: str, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", part, *here, *options],
            # Another working directory than that of `pack`, as on other machines.
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    started = [start("scheduler", "--port", "0")]
    try:
        wait_for(file.exists, "the scheduler")
        started += [start("worker", "--nthreads", "1", "--name", f"w{i}") for i in range(2)]
        from distributed import Client

        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(2, timeout=100)
            address = client.scheduler.address
        yield address
    finally:
        for process in reversed(started):
            kill(process)


def test_a_cluster_writes_the_same_bytes(
    scheduler: str, folder: Path, expected, call, content, tmp_path: Path
) -> None:
    ended = call("pack", *flags(folder, tmp_path / "out", "--scheduler", scheduler))
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == expected


def test_relative_folders_on_a_cluster_are_relative_to_the_command(
    scheduler: str, folder: Path, expected, call, content, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    below = Path(os.path.relpath(folder, tmp_path))
    ended = call("pack", *flags(below, Path("out"), "--scheduler", scheduler))
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == expected


def test_a_cluster_reports_bad_files_like_local_processes(
    scheduler: str, draw, call, tmp_path: Path
) -> None:
    bad = draw(tmp_path / "in", 6, size=(16, 16))
    for number in (1, 4):
        (bad / "images" / f"p{number:03d}.png").write_bytes(b"")
    here = call("pack", *flags(bad, tmp_path / "out", "--workers", 1))
    there = call("pack", *flags(bad, tmp_path / "out", "--scheduler", scheduler))
    assert here.code == there.code == 1
    assert here.err == there.err
    assert "p001.png is empty" in there.err


def test_an_unreachable_scheduler_is_reported_in_one_line(
    folder: Path, call, monkeypatch, capfd, tmp_path: Path
) -> None:
    distributed = pytest.importorskip("distributed")
    client = distributed.Client
    # `pack` itself waits longer, since the scheduler may be starting.
    monkeypatch.setattr(
        distributed, "Client", lambda *args, timeout, **named: client(*args, timeout=1, **named)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    ended = call("pack", *flags(folder, tmp_path / "out", "--scheduler", address))
    assert ended.code == 2
    assert ended.err == f"unet pack: --scheduler {address}: no answer; is the scheduler running?\n"
    assert capfd.readouterr().err == ""
    assert not [*(tmp_path / "out").glob("*.tar")]
