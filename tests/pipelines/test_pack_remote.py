"""`pack`: to a remote store, atomic, byte-identical to local packing, one-line errors."""

import time
from pathlib import Path

import fsspec
import pytest

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("s3")

Objects = dict[str, bytes]


def flags(folder: Path, out: object, *more: object) -> list[object]:
    return [
        *("--images", folder / "images", "--masks", folder / "masks", "--out", out),
        *("--mask-format", "binary", "--samples-per-shard", 2, *more),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    return draw(tmp_path_factory.mktemp("images"), 16, size=(64, 64))


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory, call, content) -> Objects:
    """Files of 16 samples in shards of 2, packed into a local folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert call("pack", *flags(folder, out, "--workers", 1)).code == 0
    assert len([*out.glob("*.tar")]) > 7
    return content(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_objects_are_identical_to_locally_packed_files(
    workers: int, folder: Path, local: Objects, objects, call
) -> None:
    url = f"s3://bucket/workers{workers}/deep"
    ended = call("pack", *flags(folder, url, "--workers", workers))
    assert ended.code == 0, ended.err
    assert objects(url) == local
    left = {name.rpartition("/")[2] for name in objects("s3://bucket") if ".pack" in name}
    assert left == {"plan.json"}
    assert "next: unet train" not in ended.out


def test_after_a_kill_the_objects_are_identical_and_none_is_uploaded_twice(
    folder: Path, local: Objects, objects, spawn, kill, wait_for
) -> None:
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

    process = spawn("pack", *flags(folder, url, "--workers", 2))

    def two_exist() -> bool:
        time.sleep(0.05)  # the server runs in this process and needs time too
        return len(shards()) >= 2

    wait_for(two_exist, "shard 2", 30)
    kill(process)
    finished = shards()
    assert "index.json" not in objects(url)
    process = spawn("pack", *flags(folder, url, "--workers", 1))
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "shards exist already" in stdout
    assert finished.items() <= shards().items()
    assert objects(url) == local


def test_parts_and_finish_work_on_a_remote_store(
    folder: Path, local: Objects, objects, call
) -> None:
    url = "s3://bucket/parts"
    for part in (2, 1):
        ended = call("pack", *flags(folder, url, "--workers", 1, "--part", f"{part}/2"))
        assert ended.code == 0, ended.err
    assert call("pack", *flags(folder, url, "--finish")).code == 0
    assert objects(url) == local


def test_settings_that_differ_from_the_plan_are_refused(folder: Path, objects, call) -> None:
    url = "s3://bucket/started"
    assert call("pack", *flags(folder, url, "--workers", 1, "--part", "1/3")).code == 0
    before = objects(url)
    ended = call("pack", *flags(folder, url, "--workers", 1, "--invert"))
    assert ended.code == 1
    assert f"{url} was created from another plan: other settings (mask format)" in ended.err
    assert objects(url) == before


def test_a_finished_data_set_is_not_changed(folder: Path, objects, call) -> None:
    url = "s3://bucket/finished"
    assert call("pack", *flags(folder, url, "--workers", 1)).code == 0
    before = objects(url)
    ended = call("pack", *flags(folder, url, "--workers", 1, "--seed", 3))
    assert ended.code == 1
    assert f"{url} is already a data set" in ended.err
    assert objects(url) == before
    rerun = call("pack", *flags(folder, url, "--workers", 1))
    assert rerun.code == 0
    assert f"{url} is already packed with these settings" in rerun.out
    assert objects(url) == before


def test_problems_are_listed_in_the_remote_store(draw, objects, call, tmp_path: Path) -> None:
    bad = draw(tmp_path / "in", 6, size=(16, 16))
    for number in (1, 4):
        (bad / "images" / f"p{number:03d}.png").write_bytes(b"")
    arguments = flags(bad, "s3://bucket/bad", "--workers", 1)
    ended = call("pack", *arguments)
    assert ended.code == 1
    assert "all problems: s3://bucket/bad/problems.txt" in ended.err
    lines = objects("s3://bucket/bad")["problems.txt"].decode().splitlines()
    assert [name in line for line, name in zip(lines, ("p001.png", "p004.png"), strict=True)]
    ended = call("pack", *flags(bad, "s3://bucket/kept", "--workers", 1, "--keep-going"))
    assert ended.code == 3
    assert "index.json" in objects("s3://bucket/kept")


def test_a_missing_bucket_is_reported_in_one_line(folder: Path, call) -> None:
    ended = call("pack", *flags(folder, "s3://nowhere/a", "--workers", 1))
    assert ended.code == 1
    ((line),) = ended.err.splitlines()
    assert line.startswith("unet pack: s3://nowhere/a")
    assert "bucket" in line.lower()


def test_a_failed_upload_is_reported_and_can_be_resumed(
    folder: Path, local: Objects, objects, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://bucket/failing"
    arguments = flags(folder, url, "--workers", 1)
    assert call("pack", *arguments, "--part", "1/2").code == 0
    existing = {name for name in objects(url) if name.endswith(".tar")}
    assert existing
    put = s3fs.S3FileSystem._put_file

    async def fail(self, lpath, rpath, *args, **options):
        if rpath.endswith(".tar"):
            raise OSError(5, "the line is cut")
        return await put(self, lpath, rpath, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_put_file", fail)
        s3fs.S3FileSystem.clear_instance_cache()
        ended = call("pack", *arguments)
    s3fs.S3FileSystem.clear_instance_cache()
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "the line is cut; check address, credentials and network, then rerun" in ended.err
    assert {name for name in objects(url) if name.endswith(".tar")} == existing
    assert "index.json" not in objects(url)
    assert call("pack", *arguments).code == 0
    assert objects(url) == local


def test_an_unreachable_endpoint_is_reported_in_one_line(
    folder: Path, spawn, tmp_path: Path
) -> None:
    # One attempt, since no server will come up.
    gone = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    process = spawn("pack", *flags(folder, "s3://bucket/gone", "--workers", 1), **gone)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    ((line),) = stderr.splitlines()
    assert line.startswith("unet pack: s3://bucket/gone")
    assert "rerun the same command to resume" in line
