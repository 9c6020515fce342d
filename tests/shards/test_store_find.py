"""Holds the store's contract for what lies at a URL already: its kind, its files, parts of them."""

import io
import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import shards.store
from shards.sample import DataError
from shards.store import RemoteFile, Store

FILES = ("a.png", "b.PNG", "x/a.png", "x/y/c d.png", "x/[1].png", "xy/z.png", ".hidden/a.png")


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    """A folder at a URL with some files, each of which holds its own name."""
    MemoryFileSystem.store.clear()
    made = Store(f"file://{tmp_path}/url" if request.param == "file" else "memory://bucket/in")
    for name in FILES:
        made.write(name, name.encode())
    yield made
    MemoryFileSystem.store.clear()


def test_a_url_names_a_file_a_folder_or_nothing(store):
    assert store.kind() == "folder"
    assert Store(f"{store}/x").kind() == "folder"
    assert Store(f"{store}/x/a.png").kind() == "file"
    assert Store(f"{store}/x/b.png").kind() is None
    assert Store(f"{store}/x/").kind() == "folder"


def test_all_files_below_are_found(store):
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
def test_a_pattern_names_files_only(store, pattern, expected):
    assert store.find(pattern) == expected


def test_what_another_process_wrote_is_found(store):
    before = store.find()
    Store(str(store)).write("new.png", b"")
    assert {*store.find()} - {*before} == {"new.png"}
    assert Store(f"{store}/new.png").kind() == "file"


def test_a_file_that_is_not_there_is_named(store):
    with pytest.raises(FileNotFoundError) as caught:
        store.read("gone.png")
    assert caught.value.filename == f"{store}/gone.png"
    assert caught.value.strerror == "No such file or directory"
    with pytest.raises(FileNotFoundError):
        RemoteFile(store, "gone.png")


def test_a_remote_file_is_read_from_any_place(store):
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


def test_a_remote_file_that_fails_is_asked_for_again_and_then_an_error(store, monkeypatch):
    monkeypatch.setattr(shards.store, "PAUSES", (1e-3,) * 2)
    file, failures = RemoteFile(store, "a.png"), [OSError("reset"), OSError("reset")]
    system = type(fsspec.url_to_fs(str(store))[0])
    cat = system.cat_file

    def fail(self, *given, **more):
        if failures:
            raise failures.pop()
        return cat(self, *given, **more)

    monkeypatch.setattr(system, "cat_file", fail)
    assert file.read(3) == b"a.p"
    failures += [OSError("reset")] * 9
    with pytest.raises(OSError, match=f"{store}/a.png: reset; check address"):
        file.read(3)
    with pytest.raises(DataError, match=f"{store}/a.png: reset; check address"):
        store.read("a.png")
