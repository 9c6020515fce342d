"""`store`: kind, files and byte ranges of an existing folder at a URL."""

import io
import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import shards.requests
from shards.sample import DataError
from shards.store import RemoteFile, Store

FILES = ("a.png", "b.PNG", "x/a.png", "x/y/c d.png", "x/[1].png", "xy/z.png", ".hidden/a.png")


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    """A folder at a URL with some files that contain their own names."""
    MemoryFileSystem.store.clear()
    made = Store(f"file://{tmp_path}/url" if request.param == "file" else "memory://bucket/in")
    for name in FILES:
        made.write(name, name.encode())
    yield made
    MemoryFileSystem.store.clear()


def test_the_kind_of_a_url_is_file_folder_or_none(store):
    assert store.kind() == "folder"
    assert Store(f"{store}/x").kind() == "folder"
    assert Store(f"{store}/x/a.png").kind() == "file"
    assert Store(f"{store}/x/b.png").kind() is None
    assert Store(f"{store}/x/").kind() == "folder"


def test_find_lists_all_files_at_any_depth(store):
    assert store.find() == sorted(FILES)
    assert Store(f"{store}/x").find() == ["[1].png", "a.png", "y/c d.png"]
    assert Store(f"{store}/nothing").find() == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a.png"]),
        ("x/*", ["x/[1].png", "x/a.png"]),
        ("*/?.png", [".hidden/a.png", "x/a.png", "xy/z.png"]),
        ("**/c*.png", ["x/y/c d.png"]),
        ("x/[[]1].png", ["x/[1].png"]),
        ("*.webp", []),
    ],
)
def test_a_pattern_matches_only_files(store, pattern, expected):
    assert store.find(pattern) == expected


def test_files_written_by_other_processes_are_found(store):
    before = store.find()
    Store(str(store)).write("new.png", b"")
    assert {*store.find()} - {*before} == {"new.png"}
    assert Store(f"{store}/new.png").kind() == "file"


def test_a_missing_file_is_named(store):
    with pytest.raises(FileNotFoundError) as caught:
        store.read("gone.png")
    assert caught.value.filename == f"{store}/gone.png"
    assert caught.value.strerror == "No such file or directory"
    with pytest.raises(FileNotFoundError):
        RemoteFile(store, "gone.png")


def test_a_remote_file_supports_random_access(store):
    data = os.urandom(100_000)
    store.write("data.bin", data)
    file = io.BufferedReader(RemoteFile(store, "data.bin"), 4096)
    assert file.read() == data
    for place, size in ((0, 10), (50_000, 9000), (50_100, 5), (99_990, 100), (100_000, 1), (7, 0)):
        assert file.seek(place) == place
        assert file.read(size) == data[place : place + size]
    assert file.seek(-10, os.SEEK_END) == 99_990
    assert file.read() == data[-10:]
    file.seek(5)
    file.seek(5, os.SEEK_CUR)
    assert (file.tell(), file.read(3)) == (10, data[10:13])


def test_reads_of_a_remote_file_are_retried_before_they_fail(store, monkeypatch):
    monkeypatch.setattr(shards.requests, "RETRY_DELAYS", (1e-3,) * 2)
    file, failures = RemoteFile(store, "a.png"), [OSError("reset"), OSError("reset")]
    system = type(fsspec.url_to_fs(str(store))[0])
    cat = system.cat_file

    def fail(self, *arguments, **options):
        if failures:
            raise failures.pop()
        return cat(self, *arguments, **options)

    monkeypatch.setattr(system, "cat_file", fail)
    assert file.read(3) == b"a.p"
    failures += [OSError("reset")] * 9
    with pytest.raises(OSError, match=f"{store}/a.png: reset; check address"):
        file.read(3)
    with pytest.raises(DataError, match=f"{store}/a.png: reset; check address"):
        store.read("a.png")
