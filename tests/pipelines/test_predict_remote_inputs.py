"""`inference.input_readers`: images at a URL, keys and masks as of a local copy, in workers."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

import shards.requests
from pipelines.inference.input_readers import EncodedImage
from pipelines.inference.inputs import find_inputs
from pipelines.runtime.errors import UsageError
from shards.sample import DataError

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("s3")
URL = "s3://bucket"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images at several depths, hidden files and others, a list and a tar of them."""
    root = tmp_path_factory.mktemp("images")
    images = root / "pics"
    for number, name in enumerate(
        ["a.png", "b.v2.png", "x/c.png", "x/y/d.png", *(f"n/{i:02}.png" for i in range(5))]
    ):
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (24, 20 + number, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    for name in (".hidden.png", "x/.thumbs/c.png", "notes.md"):
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no")
    (root / "list.txt").write_text("pics/a.png\n# not this\npics/x/c.png\n\npics/n/04.png\n")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "p-000000.tar", "w") as tar:
        for path in sorted((images / "n").iterdir()):
            tar.add(path, path.name)
    return root


@pytest.fixture(scope="module")
def put(s3: str) -> Callable[[Path, str], None]:
    """put(folder, below): a copy of all files of a folder at URL/below."""

    def copy(folder: Path, below: str) -> None:
        system = s3fs.S3FileSystem(endpoint_url=s3)
        for path in folder.rglob("*"):
            if path.is_file():
                system.pipe_file(f"bucket/{below}/{path.relative_to(folder)}", path.read_bytes())

    return copy


@pytest.fixture(scope="module", autouse=True)
def copied(s3: str, put, folder: Path, shards: Path) -> None:
    put(folder, "in")
    put(shards, "shards")


def read(given: object) -> list[EncodedImage]:
    inputs = find_inputs(str(given))
    assert inputs.remote == ("://" in str(given))
    return [inputs.read(number) for number in range(len(inputs))]


@pytest.mark.parametrize(
    "given",
    [
        *("pics", "pics/", "pics/a.png", "pics/x", "pics/*.png", "pics/?.png", "pics/**/*.png"),
        *("pics/*/0[1-3].png", "pics/n/0{0..2}.png", "pics/{a,x/c}.png", "list.txt"),
        *("tars", "tars/p-000000.tar", "tars/*.tar", "tars/p-{000000..000000}.tar"),
    ],
)
def test_what_is_given_means_the_same_at_a_url(given: str, folder: Path) -> None:
    expected = read(folder / given)
    assert expected
    assert read(f"{URL}/in/{given}") == expected
    assert find_inputs(f"{URL}/in/{given}").name(0).startswith(f"{URL}/in/")


def test_a_data_set_at_a_url_is_read_as_its_copy(shards: Path) -> None:
    assert read(f"{URL}/shards") == read(shards)
    assert len(read(f"{URL}/shards/val-*.tar")) == 4


def test_lists_may_name_urls_in_any_bucket_and_lie_at_urls(folder: Path, tmp_path: Path) -> None:
    fsspec.filesystem("s3").mkdir("bucket2")
    one, two = ((folder / name).read_bytes() for name in ("pics/a.png", "pics/x/c.png"))
    fsspec.filesystem("s3").pipe_file("bucket2/x/c.png", two)
    text = f"{URL}/in/pics/a.png\n# no\ns3://bucket2/x/c.png"
    (tmp_path / "list.txt").write_text(text)
    fsspec.filesystem("s3").pipe_file("bucket2/list.txt", text.encode())
    for given in (str(tmp_path / "list.txt"), "s3://bucket2/list.txt"):
        inputs = find_inputs(given)
        assert inputs.remote
        found = [inputs.read(number) for number in range(2)]
        # Called after what both have in common.
        assert [image.source for image in found] == ["bucket/in/pics/a.png", "bucket2/x/c.png"]
        assert [image.data for image in found] == [one, two]


@pytest.mark.parametrize(
    "given", ["s3://bucket/nothing", "s3://bucket/in/*.webp", "s3://b*/in/pics", "s3://nowhere/a"]
)
def test_what_is_missing_is_reported_as_of_files_here(given: str) -> None:
    with pytest.raises(UsageError, match=r"does not exist; use|matches no file; check") as caught:
        find_inputs(given)
    assert str(caught.value).startswith(f"--input {given}: ")


def test_a_folder_without_images_is_refused(folder: Path) -> None:
    fsspec.filesystem("s3").pipe_file("bucket/none/notes.md", b"")
    with pytest.raises(DataError, match="s3://bucket/none contains no images"):
        find_inputs("s3://bucket/none")


@pytest.mark.parametrize("given", ["gs://bucket/pics", "nothing://bucket/pics"])
def test_what_cannot_be_reached_is_reported_in_one_line(given: str) -> None:
    with pytest.raises(DataError, match=f"{given} cannot be reached: ") as caught:
        find_inputs(given)
    assert "\n" not in str(caught.value)


def test_an_image_that_vanishes_is_an_error_of_its_own() -> None:
    fsspec.filesystem("s3").pipe({"bucket/gone/a.png": b"a", "bucket/gone/b.png": b"b"})
    inputs = find_inputs("s3://bucket/gone")
    fsspec.filesystem("s3").rm("bucket/gone/a.png")
    with pytest.raises(FileNotFoundError) as caught:
        inputs.read(0)
    assert (caught.value.filename, caught.value.strerror) == (
        "s3://bucket/gone/a.png",
        "No such file or directory",
    )
    assert inputs.read(1).data == b"b"


@pytest.mark.parametrize("given", ["in/pics", "in/tars", "shards"])
def test_what_fails_at_first_is_asked_for_again(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.requests, "RETRY_DELAYS", (1e-3,) * 3)
    expected, failed, cat = read(f"{URL}/{given}"), set[str](), s3fs.S3FileSystem._cat_file

    async def fail_once(self: Any, path: str, **more: Any) -> bytes:
        if (request := f"{path} {more}") not in failed:
            failed.add(request)
            raise OSError("connection reset")
        return await cat(self, path, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", fail_once)
    assert read(f"{URL}/{given}") == expected
    assert len(failed) >= len(expected)


def test_what_fails_for_good_is_an_error_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.requests, "RETRY_DELAYS", (1e-3,) * 3)
    every = [find_inputs(f"{URL}/{given}") for given in ("in/pics", "in/tars", "shards")]

    async def fail(*given: Any, **more: Any) -> bytes:
        raise OSError("connection reset")

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", fail)
    for inputs in every:
        with pytest.raises(DataError, match="connection reset; check address, credentials"):
            inputs.read(0)


@pytest.mark.parametrize("given", ["pics", "tars", "list.txt"])
def test_worker_processes_predict_from_a_url_what_they_do_from_a_copy(
    given: str, make_checkpoint, spawn, call, content, folder: Path, tmp_path: Path
) -> None:
    # The command has listed with a client of its own before it starts its workers.
    argv = ("--checkpoint", make_checkpoint(), "--samples-per-shard", 4)
    where = {"here": folder / given, "there": f"{URL}/in/{given}"}
    for name, place in where.items():
        more = ("--input", place, "--out", tmp_path / name, "--workers", 2)
        process = spawn("predict", *argv, *more)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f" masks in {tmp_path / name}" in out
    here, there = (content(tmp_path / name) for name in where)
    assert here.keys() == there.keys()
    assert sum(name.endswith(".tar") for name in here) > 0
    for name in here:
        # A job is identified by its list of inputs, which for tars holds their URLs.
        assert name == "job.json" or here[name] == there[name]


def test_bad_inputs_at_a_url_are_listed_and_the_job_continues(
    make_checkpoint, spawn, folder: Path, tmp_path: Path
) -> None:
    system = fsspec.filesystem("s3")
    good = (folder / "pics" / "a.png").read_bytes()
    system.pipe({"bucket/bad/a.png": good, "bucket/bad/b.png": b"", "bucket/bad/c.png": good[:99]})
    (tmp_path / "list.txt").write_text("\n".join(f"{URL}/bad/{name}.png" for name in "abcd"))
    argv = ("--checkpoint", make_checkpoint(), "--input", tmp_path / "list.txt", "--workers", 2)
    process = spawn("predict", *argv, "--out", tmp_path / "out")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["input"] for line in lines] == [f"{URL}/bad/{n}.png" for n in "bcd"]
    assert "No such file" in lines[-1]
