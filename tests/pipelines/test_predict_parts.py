"""`predict`: in parts, by independent jobs; byte-identical to one process."""

import itertools
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import predict


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    """A model that finds what is above 127 in the red channel."""
    return make_checkpoint()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    """Thirteen images for seven shards; one, in the third shard, cannot be read."""
    folder = draw(tmp_path_factory.mktemp("images"), 13, size=(40, 60)) / "images"
    (folder / "p005.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def argv(bright: Path, images: Path) -> Callable[..., list[object]]:
    def flags(out: Path, *more: object) -> list[object]:
        return [
            *("--checkpoint", bright, "--input", images, "--out", out, "--workers", 0),
            *("--samples-per-shard", 2, "--png", *more),
        ]

    return flags


@pytest.fixture(scope="module")
def whole(argv, call, content, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one process."""
    out = tmp_path_factory.mktemp("whole")
    assert call("predict", *argv(out)).code == 3
    assert len([*out.glob("*.tar")]) == 7
    return content(out)


@pytest.mark.parametrize("order", [*itertools.permutations((1, 2, 3))], ids=str)
def test_parts_in_any_order_make_the_same_bytes_and_the_last_ends_the_job(
    order: tuple[int, ...], argv, whole, call, content, tmp_path: Path
) -> None:
    shards = {1: 3, 2: 2, 3: 2}
    there = 0
    for part in order:
        assert not (tmp_path / "index.json").exists()
        ended = call("predict", *argv(tmp_path, "--part", f"{part}/3"))
        # Part 3 has the input that cannot be read, whenever it runs.
        assert ended.code == (3 if part == 3 else 0), ended.err
        there += shards[part]
        assert len([*tmp_path.glob("*.tar")]) == there
        if part == order[-1]:
            assert f"12 masks in {tmp_path}" in ended.out
            assert "1 inputs could not be read" in ended.out
        else:
            assert ended.out.splitlines() == [
                f"part {part}/3: {shards[part]} shards finished; the last part writes the manifest"
            ]
    assert content(tmp_path) == whole


def test_parts_side_by_side_make_the_same_bytes(argv, whole, spawn, content, tmp_path) -> None:
    parts = [spawn("predict", *argv(tmp_path, "--part", f"{i}/3")) for i in (1, 2, 3)]
    for number, process in enumerate(parts, 1):
        _, complaint = process.communicate(timeout=200)
        assert process.returncode == (3 if number == 3 else 0), complaint
    assert content(tmp_path) == whole


def dying_part(arguments: list[str]) -> None:
    """Predicts a part, and dies by SIGKILL just before its second shard is there."""
    replace, count = os.replace, 0

    def counting(source: object, target: object) -> None:
        nonlocal count
        count += str(target).endswith(".tar")
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)  # type: ignore[arg-type]

    os.replace = counting  # type: ignore[assignment]
    os._exit(predict.main(arguments))


def test_a_part_that_died_holds_nobody_and_is_made_up_for(
    argv, whole, call, content, tmp_path: Path
) -> None:
    arguments = [str(flag) for flag in argv(tmp_path, "--part", "1/2")]
    process = multiprocessing.get_context("fork").Process(target=dying_part, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    ended = call("predict", *argv(tmp_path, "--part", "2/2"))
    assert ended.code == 0, ended.err
    there = {path: path.stat().st_ino for path in tmp_path.glob("*.tar")}
    assert sorted(path.name for path in there) == [
        f"predicted-{number:06d}.tar" for number in (0, 1, 3, 5)
    ]
    assert not (tmp_path / "index.json").exists()
    # Without --part: what is missing.
    assert call("predict", *argv(tmp_path)).code == 3
    assert {path: path.stat().st_ino for path in there} == there
    assert content(tmp_path) == whole


def test_a_rerun_of_a_part_does_nothing_twice_and_ends_as_before(
    argv, whole, call, content, tmp_path: Path
) -> None:
    for _ in range(2):
        ended = call("predict", *argv(tmp_path, "--part", "3/3"))
        assert ended.code == 3
        assert re.match(r"part 3/3: 2 shards finished", ended.out)
    # Cut otherwise on the way: the number of parts is not the job's.
    assert call("predict", *argv(tmp_path, "--part", "1/2")).code == 3
    assert call("predict", *argv(tmp_path, "--part", "2/2")).code == 0
    assert content(tmp_path) == whole
    assert call("predict", *argv(tmp_path, "--part", "2/2")).code == 0
    assert content(tmp_path) == whole


def test_more_parts_than_shards_do_no_harm(argv, whole, call, content, tmp_path: Path) -> None:
    for part in (9, *range(8, 0, -1)):
        ended = call("predict", *argv(tmp_path, "--part", f"{part}/9"))
        assert ended.code == (3 if part == 3 else 0), ended.err
    assert content(tmp_path) == whole


@pytest.mark.ranks
def test_the_ranks_of_a_part_share_its_shards(
    argv, whole, call, launch, content, tmp_path: Path
) -> None:
    ended = launch(2, "predict", *argv(tmp_path, "--part", "1/2"))
    assert ended.code == 0, ended.err
    made = {path.name for path in tmp_path.glob("*.tar")}
    assert made == {f"predicted-{number:06d}.tar" for number in (0, 2, 4, 6)}
    ended = launch(2, "predict", *argv(tmp_path, "--part", "2/2"))
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "state.json").read_text())["errors"] == 1
    assert content(tmp_path) == whole


def test_a_part_with_other_settings_is_refused(argv, call, content, tmp_path: Path) -> None:
    assert call("predict", *argv(tmp_path, "--part", "1/2")).code == 3
    before = content(tmp_path)
    ended = call("predict", *argv(tmp_path, "--part", "2/2", "--min-confidence", 0.7))
    assert ended.code == 2
    assert "was created with --min-confidence 0.0; keep that" in ended.err
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("4/3", "--part 4/3: the first number must be from 1 to the second"),
        ("0/3", "--part 0/3: the first number must be from 1 to the second"),
        ("3", "--part must be like 2/5, got '3'"),
    ],
)
def test_parts_that_make_no_sense_are_refused(
    part: str, message: str, argv, call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = call("predict", *argv(out, "--part", part))
    assert ended.code == 2
    assert message in ended.message
    assert not out.exists()
