"""Writing shards: byte-identical and atomic."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.manifest import ShardInfo
from shards.offsets import read_offsets
from shards.order import Address
from shards.reader import ShardReader
from shards.sample import DataError, encode_key
from shards.writer import HashingStream, ShardWriter, open_lock_file, write_atomically, write_json

SAMPLES = {
    "b/x%2E0": {"png": b"image" * 300, "mask.png": b"mask", "json": b"{}"},
    "a": {"json": b"{}", "jpg": b"", "mask.png": b"m" * 512},
    "c": {"webp": b"unlabelled", "json": b"{}"},
}


def write(path, samples=SAMPLES):
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.add(key, members)
        return writer.seal()


def names(folder):
    return sorted(os.listdir(folder))


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = write(tmp_path / "one/train-000000.tar")
    reordered = {key: dict(reversed(members.items())) for key, members in SAMPLES.items()}
    two = write(tmp_path / "two/train-000000.tar", reordered)
    assert one == two
    for name in ("train-000000.tar", "train-000000.idx"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_bytes_of_a_shard_are_pinned(tmp_path):
    file = write(tmp_path / "s.tar", {"a": {"png": b"p", "json": b"{}"}})
    assert file.bytes == 10_240
    assert file.sha256 == "b9882a955345ed02124a36344f78e1f25901c66d6a3178c8ef28628dc3639aad"


def test_the_shard_file_describes_the_file_on_disk(tmp_path):
    file = write(tmp_path / "train-000000.tar")
    data = (tmp_path / "train-000000.tar").read_bytes()
    assert (file.name, file.samples, file.bytes) == ("train-000000.tar", 3, len(data))
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_members_are_adjacent_sorted_ustar_entries_without_owner_or_time(tmp_path):
    write(tmp_path / "s.tar")
    data = (tmp_path / "s.tar").read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [
        f"{key}.{extension}" for key, parts in SAMPLES.items() for extension in sorted(parts)
    ]
    for m in members:
        assert (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644)
        assert m.type == tarfile.REGTYPE
        assert data[m.offset + 257 : m.offset + 265] == b"ustar\x0000"


def test_the_idx_gives_the_offsets_of_all_members(tmp_path):
    write(tmp_path / "s.tar")
    data = (tmp_path / "s.tar").read_bytes()
    header, *lines = (tmp_path / "s.idx").read_text().splitlines()
    assert header == "v1.2 3"
    with tarfile.open(tmp_path / "s.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    found = []
    for line, (key, parts) in zip(lines, SAMPLES.items(), strict=True):
        words = line.split(" ")
        for i in range(0, len(words), 4):
            extension, offset, size, name = words[i], *map(int, words[i + 1 : i + 3]), words[i + 3]
            assert name == f"{key}.{extension}"
            assert data[offset : offset + size] == parts[extension]
            found.append((name, offset, size))
    assert found == expected


def test_the_final_name_appears_only_at_the_end(tmp_path):
    with ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("a", SAMPLES["a"])
        assert names(tmp_path) == [".s.tar.tmp"]
        writer.seal()
        assert not (tmp_path / "s.tar").exists()
    assert names(tmp_path) == ["s.idx", "s.tar"]


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("flush"))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(b.name) or replace(a, b))
    write(tmp_path / "s.tar")
    assert done == ["flush", "flush", "s.idx", "s.tar"]


def test_leaving_the_block_seals_the_shard(tmp_path):
    with ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("a", SAMPLES["a"])
    assert len(read_offsets(tmp_path / "s.tar")) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("sealed", [False, True])
def test_an_exception_leaves_no_shard(tmp_path, error, sealed):
    def fail():
        with ShardWriter(tmp_path / "s.tar") as writer:
            writer.add("a", SAMPLES["a"])
            if sealed:
                writer.seal()
            raise error

    with pytest.raises(error):
        fail()
    assert not (tmp_path / "s.tar").exists()
    assert not any(name.endswith(".tmp") for name in names(tmp_path))
    write(tmp_path / "s.tar")
    assert names(tmp_path) == ["s.idx", "s.tar"]


def test_a_second_writer_of_the_same_shard_is_refused(tmp_path):
    path = tmp_path / "s.tar"
    with ShardWriter(path) as writer:
        writer.add("a", SAMPLES["a"])
        message = rf"another process is writing {path}; wait for it or stop it"
        with pytest.raises(DataError, match=message), ShardWriter(path):
            pytest.fail("two writers")
        writer.add("c", SAMPLES["c"])
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a.jpg", "a.json", "a.mask.png", "c.json", "c.webp"]


def test_writers_of_different_shards_are_independent(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as one, ShardWriter(tmp_path / "b.tar") as other:
        one.add("a", SAMPLES["a"])
        other.add("a", SAMPLES["a"])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_temporary_file_of_a_killed_writer_is_reused(tmp_path):
    expected = write(tmp_path / "other.tar").sha256
    (tmp_path / ".s.tar.tmp").write_bytes(b"half a shard" * 5000)
    assert write(tmp_path / "s.tar").sha256 == expected
    assert names(tmp_path) == ["other.idx", "other.tar", "s.idx", "s.tar"]


KILLED = """
import sys
from pathlib import Path
from shards.writer import ShardWriter
with ShardWriter(Path(sys.argv[1])) as writer:
    for i in range(100):
        writer.add(f"a{i}", {"png": b"p" * 1000, "json": b"{}"})
    if sys.argv[2] == "sealed":
        writer.seal()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["open", "sealed"])
def test_a_writer_killed_by_sigkill_leaves_no_shard_and_no_lock(tmp_path, when):
    path = tmp_path / "s.tar"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(DataError, match="another process is writing"), ShardWriter(path):
            pytest.fail("two writers")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    write(path)
    assert names(tmp_path) == ["s.idx", "s.tar"]
    assert len(read_offsets(path)) == len(SAMPLES)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    st.lists(
        st.tuples(st.binary(max_size=1500), st.none() | st.binary(max_size=600)),
        min_size=1,
        max_size=6,
    ),
    st.text(st.sampled_from("ab.%é /"), min_size=1, max_size=4).filter(
        lambda s: not s.startswith("/")
    ),
)
def test_written_samples_are_read_back_unchanged(tmp_path, contents, name):
    keys = [encode_key(f"{name}{i}.png") for i in range(len(contents))]
    with ShardWriter(tmp_path / "s.tar") as writer:
        for key, (image, mask) in zip(keys, contents, strict=True):
            members = {"tif": image, "json": json.dumps({"source": key}).encode()}
            writer.add(key, members if mask is None else {**members, "mask.png": mask})
        file = writer.seal()
    reader = ShardReader(tmp_path, [ShardInfo(file.name, file.samples, file.bytes, "", ())])
    for row, (key, (image, mask)) in enumerate(zip(keys, contents, strict=True)):
        raw = reader.read(Address(7, 0, row))
        assert (raw.key, raw.position, raw.extension) == (key, 7, "tif")
        assert (raw.image, raw.mask) == (image, mask)
        assert raw.parse_info() == {"source": key}


def test_write_atomically_replaces_a_file_or_leaves_it_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert (names(tmp_path), path.read_bytes()) == (["f"], b"old")
    write_atomically(path, b"new", durable=False)
    assert (names(tmp_path), path.read_bytes()) == (["f"], b"new")


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failed_write_names_the_final_path(call, tmp_path, monkeypatch):
    """Not the temporary file, nor nothing: a full disk is reported without a name."""
    name = f".{'0' * 16}.tmp" if call == "open" else None

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.setattr(*((Path, "open") if call == "open" else (os, call)), fail)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(tmp_path / "a.json", b"x")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["add", "seal"])
def test_a_shard_on_a_full_disk_is_named(step, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashingStream, "write" if step == "add" else "flush_to_disk", fail)
    with (
        pytest.raises(OSError, match="No space") as caught,
        ShardWriter(tmp_path / "a.tar") as writer,
    ):
        writer.add("k", {"png": b"x"})
    assert caught.value.filename == str(tmp_path / "a.tar")


def test_equal_content_gives_equal_json_bytes(tmp_path):
    for name in ("a", "b"):
        write_json(tmp_path / name, {"x": [1, 2], "y": None})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes().endswith(b"}\n")


def test_a_lock_is_never_a_link_to_the_file_of_another_program(tmp_path):
    victim, lock = tmp_path / "victim", tmp_path / ".lock"
    victim.write_text("kept")
    lock.symlink_to(victim)
    with pytest.raises(DataError) as caught:
        open_lock_file(lock)
    assert str(caught.value) == f"{lock} is a link, not a lock; remove it"
    lock.unlink()
    lock.symlink_to(tmp_path / "new")
    with pytest.raises(DataError, match="is a link, not a lock; remove it"):
        open_lock_file(lock)
    lock.unlink()
    lock.hardlink_to(victim)
    with pytest.raises(
        DataError, match="has a second name, so it is not a lock of unet; remove it"
    ):
        open_lock_file(lock)
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(DataError, match="is not a file, so it is not a lock of unet; remove it"):
        open_lock_file(lock)
    assert (victim.read_text(), (tmp_path / "new").exists()) == ("kept", False)
