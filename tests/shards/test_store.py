"""Stores: folders on disk and at URLs behave alike, and files appear atomically."""

import os
import pickle
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import shards.requests
from shards.sample import DataError
from shards.store import Store, is_url

KINDS = ["local", "file", "memory"]


@pytest.fixture
def place(tmp_path):
    """place(kind) -> path or URL of a new folder; `file` represents non-atomic protocols."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield lambda kind: {
        "local": str(tmp_path / "out"),
        "file": f"file://{tmp_path}/url",
        "memory": "memory://bucket/out",
    }[kind]
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=KINDS)
def store(request, place):
    """An empty store of each kind."""
    made = Store(place(request.param))
    made.create_folder()
    return made


def staged(store, name, data):
    with store.staging() as folder:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        store.upload(file, name)


# ----------------------------------------------------------------------------- every kind of store


def test_an_empty_store_has_no_files(store):
    assert store.names() == []
    assert store.names("below") == []
    assert not store.exists("a.txt")
    store.remove("a.txt")
    with pytest.raises(FileNotFoundError):
        store.read("a.txt")


def test_written_files_can_be_listed_and_read(store):
    store.write("b.txt", b"two")
    store.write("a.txt", b"")
    store.write("parts/deep/c.txt", b"three")
    assert store.names() == ["a.txt", "b.txt", "parts"]
    assert store.names("parts") == ["deep"]
    assert store.names("parts/deep") == ["c.txt"]
    assert [store.read(n) for n in ("a.txt", "b.txt", "parts/deep/c.txt")] == [
        b"",
        b"two",
        b"three",
    ]
    assert store.exists("parts/deep/c.txt")
    assert not store.exists("parts/deep/d.txt")


def test_writing_a_file_again_replaces_it(store):
    store.write("a.txt", b"a longer text")
    store.write("a.txt", b"new")
    assert (store.read("a.txt"), store.names()) == (b"new", ["a.txt"])


def test_staged_files_are_uploaded(store):
    data = os.urandom(200_000)
    staged(store, "train-000000.tar", data)
    staged(store, "parts/p.json", b"{}")
    assert store.read("train-000000.tar") == data
    assert store.names("parts") == ["p.json"]
    staged(store, "train-000000.tar", b"again")
    assert store.read("train-000000.tar") == b"again"


def test_files_and_folders_are_removed(store):
    for name in ("a.txt", "parts/x/b.txt", "parts/c.txt"):
        store.write(name, b"x")
    store.remove("parts")
    assert store.names() == ["a.txt"]
    assert not store.exists("parts/c.txt")
    store.remove("a.txt")
    store.remove("a.txt")
    assert store.names() == []


def test_write_if_absent_writes_once(store):
    assert store.write_if_absent("job.json", [b"fi", b"rst"]) is True
    assert store.write_if_absent("job.json", [b"second"]) is False
    assert (store.read("job.json"), store.names()) == (b"first", ["job.json"])


def test_write_if_absent_leaves_nothing_if_its_lines_fail(store):
    def lines():
        yield b"half"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        store.write_if_absent("plan.txt", lines())
    assert store.names() == []
    assert store.write_if_absent("plan.txt", iter([b"complete"])) is True


def test_a_store_is_picklable_and_has_its_path_as_text(store, place):
    store.write("a.txt", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("a.txt") == b"x"
    assert str(copy) == str(store)
    assert store.path("a.txt") == f"{store}/a.txt"


def test_changes_by_other_processes_are_visible(store):
    # Clients cache listings, which must not be stale.
    assert store.names() == []
    other = Store(str(store))
    other.write("a.txt", b"x")
    assert (store.names(), store.exists("a.txt")) == (["a.txt"], True)
    other.remove("a.txt")
    assert (store.names(), store.exists("a.txt")) == ([], False)


# ---------------------------------------------------------------------------------- on disk


def test_a_local_store_is_its_own_staging_folder(place):
    store = Store(place("local"))
    store.create_folder()
    with store.staging() as folder:
        assert folder == Path(place("local")) == store.local
    assert folder.exists()


def test_a_local_file_is_written_atomically(place, monkeypatch):
    store = Store(place("local"))
    store.write("a.txt", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write("a.txt", b"new")
    assert (store.read("a.txt"), store.names()) == (b"old", ["a.txt"])


def test_a_temporary_file_may_be_in_a_folder_that_is_removed_later(place, monkeypatch):
    store = Store(place("local"))
    store.write("parts/x", b"")
    replaced, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: replaced.append(Path(a).parent) or replace(a, b)
    )
    store.write("index.json", b"{}", "parts")
    assert replaced == [store.local / "parts"]
    assert store.read("index.json") == b"{}"


def test_of_two_concurrent_writers_exactly_one_succeeds(place, monkeypatch):
    store = Store(place("local"))
    store.create_folder()
    link = os.link

    def link_after_rival(aside, path):
        Path(path).write_bytes(b"rival")
        link(aside, path)

    monkeypatch.setattr(os, "link", link_after_rival)
    assert store.write_if_absent("job.json", [b"mine"]) is False
    assert (store.read("job.json"), store.names()) == (b"rival", ["job.json"])


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").write_text("x")
    store = Store(f"{tmp_path}/file{below}")
    with pytest.raises(DataError) as caught:
        store.create_folder()
    assert str(caught.value) == f"{store} is a file, not a directory; choose another --out"


# ---------------------------------------------------------------------------------- at a URL


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a", True),
        ("memory://x", True),
        ("file:///tmp/x", True),
        ("hf+x.1://x", True),
        ("out", False),
        ("/data/out", False),
        ("a:b//c", False),
        ("./s3://x", False),
        ("S3://x", False),
    ],
)
def test_urls_are_distinguished_from_paths(text, url):
    assert is_url(text) == url
    assert (Store(text).local is None) == url


def test_a_trailing_slash_of_a_url_is_ignored():
    assert str(Store("s3://bucket/out/")) == "s3://bucket/out"
    assert Store("s3://bucket/out/").path("a") == "s3://bucket/out/a"


def test_the_staging_folder_of_a_url_is_removed(place):
    store = Store(place("memory"))
    with store.staging() as folder:
        (folder / "a").write_text("x")
    assert not folder.exists()


def test_non_atomic_protocols_rename_after_the_upload(place, monkeypatch):
    store = Store(place("file"))
    seen, move = [], LocalFileSystem.mv
    put = LocalFileSystem.put_file

    def put_file(self, file, target, *rest, **options):
        put(self, file, target, *rest, **options)
        seen.append(("put", Path(target).name, store.exists("a.tar")))

    def mv(self, one, other, **options):
        seen.append(("mv", Path(one).name, Path(other).name))
        move(self, one, other, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    monkeypatch.setattr(LocalFileSystem, "mv", mv)
    staged(store, "a.tar", b"x" * 1000)
    assert seen == [("put", "a.tar.part", False), ("mv", "a.tar.part", "a.tar")]
    assert store.names() == ["a.tar"]


def test_atomic_protocols_upload_without_a_rename(place, monkeypatch):
    def mv(*_):
        raise AssertionError("a copy costs as much as the upload")

    monkeypatch.setattr(MemoryFileSystem, "mv", mv, raising=False)
    store = Store(place("memory"))
    staged(store, "a.tar", b"x")
    assert store.names() == ["a.tar"]


SYSTEMS = {"file": LocalFileSystem, "memory": MemoryFileSystem}


@pytest.mark.parametrize("kind", SYSTEMS)
def test_an_incomplete_upload_is_refused_and_removed(place, monkeypatch, kind):
    store = Store(place(kind))

    def put_file(self, file, target, **_):
        self.pipe_file(target, Path(file).read_bytes()[:-1])

    with monkeypatch.context() as patch:
        patch.setattr(SYSTEMS[kind], "put_file", put_file)
        with pytest.raises(DataError) as caught:
            staged(store, "a.tar", b"x" * 1000)
    assert str(caught.value) == (
        f"{store}/a.tar is incomplete: 999 of 1,000 bytes were uploaded; "
        "rerun the same command to resume"
    )
    assert store.names() == []
    staged(store, "a.tar", b"x" * 1000)
    assert store.names() == ["a.tar"]


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("method", ["put_file", "info"])
def test_a_failed_upload_is_reported_in_one_line_and_leaves_no_part(
    place, monkeypatch, kind, method
):
    store = Store(place(kind))
    monkeypatch.setattr(shards.requests, "RETRY_DELAYS", ())

    def fail(*_, **__):
        raise ConnectionError("reset by\n  peer")

    with monkeypatch.context() as patch:
        patch.setattr(SYSTEMS[kind], method, fail)
        with pytest.raises(DataError) as caught:
            staged(store, "a.tar", b"x" * 1000)
    assert str(caught.value) == (
        f"{store}/a.tar: reset by peer; check address, credentials and network, "
        "then rerun the same command to resume"
    )
    if (kind, method) != ("memory", "info"):
        # If only the size request fails, the file itself is complete.
        assert store.names() == []


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("cat_file", lambda store: store.read("a")),
        ("exists", lambda store: store.exists("a")),
        ("ls", lambda store: store.names()),
        ("rm", lambda store: store.remove("a")),
    ],
)
def test_any_exception_of_a_client_is_reported_in_one_line(place, monkeypatch, method, call):
    store = Store(place("memory"))
    store.write("a", b"x")

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(MemoryFileSystem, method, fail)
    with pytest.raises(DataError) as caught:
        call(store)
    text = str(caught.value)
    assert text.startswith(str(store))
    assert text.endswith(
        ": RuntimeError; check address, credentials and network, then rerun the same command to "
        "resume"
    )


def test_an_unknown_protocol_is_named():
    with pytest.raises(DataError, match=r"nope://x cannot be reached: Protocol not known: nope"):
        Store("nope://x").names()


def test_a_protocol_whose_package_is_missing_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://b cannot be reached: Install s3fs to access S3"):
        Store("s3://b").exists("a")
