"""`predict`, `inference.job`: into a bucket, byte-identical to a local one, atomic, resumable."""

import json
import time
from pathlib import Path

import fsspec
import pytest

from shards.manifest import read_manifest

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("s3")

Objects = dict[str, bytes]

EVERYTHING = (
    *("--samples-per-shard", 2, "--png", "--overlay", "--include-image", "--min-area", 5),
    *("--probabilities", "png", "--min-confidence", 0.6),
)


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    """A model that finds what is above 127 in the red channel."""
    return make_checkpoint()


def argv(checkpoint: Path, given: object, out: object, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0, *more]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    """Seven images, one of which cannot be read."""
    folder = draw(tmp_path_factory.mktemp("images"), 7, size=(60, 80)) / "images"
    (folder / "p004.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def local(bright: Path, images: Path, call, content, tmp_path_factory) -> Objects:
    """What is to be there in the end."""
    out = tmp_path_factory.mktemp("local")
    assert call("predict", *argv(bright, images, out, *EVERYTHING)).code == 3
    return content(out)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_objects_are_those_of_a_local_prediction(
    workers: int, bright: Path, images: Path, local: Objects, objects, call
) -> None:
    url = f"s3://bucket/whole-{workers}"
    given = argv(bright, images, url, *EVERYTHING, "--workers", workers)
    ended = call("predict", *given)
    assert ended.code == 3, ended.err
    assert objects(url) == local
    assert f"6 masks in {url}" in ended.out
    assert f"1 inputs could not be read: {url}/errors.jsonl" in ended.out
    assert read_manifest(url).splits["predicted"].samples == 6
    # A rerun has the same result.
    assert call("predict", *given).code == 3
    assert objects(url) == local


def test_after_a_kill_the_objects_are_the_same_and_none_was_sent_twice(
    bright: Path, draw, objects, call, content, spawn, kill, wait_for, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 40, size=(160, 160)) / "images"
    more = ("--samples-per-shard", 1, "--batch-size", 1)
    assert call("predict", *argv(bright, images, tmp_path / "out", *more)).code == 0
    url = "s3://bucket/killed"
    system, root = fsspec.url_to_fs(url)

    def shards() -> dict[str, tuple[object, ...]]:
        system.invalidate_cache()
        found = system.find(root, detail=True).items()
        return {
            name: (entry["LastModified"], entry["ETag"])
            for name, entry in found
            if name.endswith(".tar")
        }

    process = spawn("predict", *argv(bright, images, url, *more))

    def two_are_there() -> bool:
        time.sleep(0.05)  # the server answers in this process: it is not asked all the time
        return len(shards()) >= 2

    wait_for(two_are_there, "shard 2", 60)
    kill(process)
    finished = shards()
    there = objects(url)
    assert "index.json" not in there
    assert "job.json" in there
    ended = call("predict", *argv(bright, images, url, *more))
    assert ended.code == 0, ended.err
    assert finished.items() <= shards().items()
    assert objects(url) == content(tmp_path / "out")


def test_another_job_in_the_same_place_is_refused_by_name(
    bright: Path, images: Path, objects, call
) -> None:
    url = "s3://bucket/started"
    assert call("predict", *argv(bright, images, url)).code == 3
    before = objects(url)
    ended = call("predict", *argv(bright, images, url, "--min-confidence", 0.7))
    assert ended.code == 2
    assert f"{url} was created with --min-confidence 0.0; keep that" in ended.err
    assert objects(url) == before


def test_a_place_with_other_shards_is_left_alone(bright: Path, images: Path, objects, call) -> None:
    url = "s3://bucket/others"
    system, root = fsspec.url_to_fs(url)
    system.pipe_file(f"{root}/train-000000.tar", b"theirs")
    ended = call("predict", *argv(bright, images, url))
    assert ended.code == 2
    assert f"{url} holds other shards" in ended.err
    assert objects(url) == {"train-000000.tar": b"theirs"}


def test_one_image_is_drawn_there_too(bright: Path, images: Path, objects, call) -> None:
    url = "s3://bucket/one"
    assert call("predict", *argv(bright, images / "p000.png", url)).code == 0
    assert objects(url)["p000.figure.png"].startswith(b"\x89PNG")


def test_a_missing_bucket_is_reported_in_one_line(bright: Path, images: Path, call) -> None:
    ended = call("predict", *argv(bright, images, "s3://nowhere/a"))
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert line.startswith("unet predict: s3://nowhere/a")
    assert "bucket" in line.lower()


def test_an_upload_that_fails_is_reported_and_resumes_later(
    bright: Path, images: Path, local: Objects, objects, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://bucket/failing"
    given = argv(bright, images, url, *EVERYTHING)
    put = s3fs.S3FileSystem._put_file

    async def fail(self, lpath, rpath, *given, **more):
        if rpath.endswith("000001.tar"):
            raise OSError(5, "the line is cut")
        return await put(self, lpath, rpath, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_put_file", fail)
        s3fs.S3FileSystem.clear_instance_cache()
        ended = call("predict", *given)
    s3fs.S3FileSystem.clear_instance_cache()
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert "the line is cut" in line
    assert "predicted-000001.tar" not in objects(url)
    assert "index.json" not in objects(url)
    assert call("predict", *given).code == 3
    assert objects(url) == local


def test_from_a_bucket_into_a_bucket(
    bright: Path, images: Path, local: Objects, objects, call
) -> None:
    system, root = fsspec.url_to_fs("s3://bucket/in")
    for path in images.iterdir():
        system.pipe_file(f"{root}/{path.name}", path.read_bytes())
    url = "s3://bucket/there"
    given = argv(bright, "s3://bucket/in", url, *EVERYTHING, "--workers", 1)
    ended = call("predict", *given)
    assert ended.code == 3, ended.err
    # The errors name the places of the inputs.
    names = [name for name in local if name.endswith((".tar", ".png"))]
    assert {name: objects(url)[name] for name in names} == {name: local[name] for name in names}
    (line,) = objects(url)["errors.jsonl"].decode().splitlines()
    assert json.loads(line)["input"] == "s3://bucket/in/p004.png"
