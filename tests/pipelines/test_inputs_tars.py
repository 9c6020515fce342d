"""`inference.input_tars`: images in tars that others wrote, by the headers, here and at a URL."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import shards.store
from pipelines.inference.inputs import find_inputs
from shards.sample import AggregateDataError, DataError, encode_key


def tar(members, *, end: bool = True) -> bytes:
    """A tar of {name: bytes}; a str is where a link leads."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                content = b""
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return data.getvalue() if end else data.getvalue()[:-9000]


FIRST = {
    "000.jpg": b"first",
    "000.cls": b"7",
    "000.json": b'{"caption": "a dog"}',
    "a/b.c.PNG": b"second" * 300_000,
    "a/b.c.mask.png": b"no image",
    "lone.txt": b"text",
}
SECOND = {"./001.tiff": b"zero", "deep/one.two/x.png": b"third"}


@pytest.fixture(params=["here", "memory"])
def place(request, tmp_path):
    """A folder of two tars, on disk or at a URL."""
    MemoryFileSystem.store.clear()
    url = f"{tmp_path}/tars" if request.param == "here" else "memory://bucket/tars"
    put(url, "data-000000.tar", tar(FIRST))
    put(url, "below/data-000001.tar", tar(SECOND))
    yield url
    MemoryFileSystem.store.clear()


def put(url: str, name: str, data: bytes) -> None:
    system, root = fsspec.url_to_fs(url)
    system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{root}/{name}", data)


def sources(inputs) -> list[str]:
    return [inputs.read(i).source for i in range(len(inputs))]


def test_a_folder_of_tars_gives_the_images_in_them(place):
    inputs = find_inputs(place)
    # Sorted by the names of the tars, each in its own order.
    assert sources(inputs) == ["001.tiff", "deep/one.two/x.png", "000.jpg", "a/b.c.png"]
    read = [inputs.read(i) for i in range(4)]
    assert [p.data for p in read] == [b"zero", b"third", b"first", b"second" * 300_000]
    assert [p.key for p in read] == [encode_key(p.source) for p in read]
    assert inputs.name(3) == f"{place}/data-000000.tar: a/b.c.PNG"
    assert inputs.remote == place.startswith("memory")


@pytest.mark.parametrize(
    "pattern", ["data-000000.tar", "*.tar", "data-*.tar", "data-{0..0}00000.tar", "{x,data}-0*.tar"]
)
def test_one_tar_and_patterns_of_tars(place, pattern):
    assert sources(find_inputs(f"{place}/{pattern}")) == ["000.jpg", "a/b.c.png"]


def test_braces_name_tars_that_must_be_there(place):
    put(place, "data-000001.tar", tar({"z.png": b"z"}))
    inputs = find_inputs(f"{place}/data-{{000000..000001}}.tar")
    assert sources(inputs) == ["000.jpg", "a/b.c.png", "z.png"]
    with pytest.raises(FileNotFoundError) as caught:
        find_inputs(f"{place}/data-{{000000..000002}}.tar")
    assert caught.value.filename == f"{place}/data-000002.tar"


def test_a_list_may_name_tars(place):
    put(place, "list.txt", b"data-000000.tar\nbelow/data-000001.tar\n")
    assert len(find_inputs(f"{place}/list.txt")) == 4


def test_only_headers_are_read_to_find_images(tmp_path, monkeypatch):
    large = {f"{n}.png": bytes(3_000_000) for n in range(4)}
    MemoryFileSystem.store.clear()
    put("memory://bucket/tars", "x.tar", tar(large))
    asked = []
    cat = shards.store.Store.read_ranges

    def note(self, ranges):
        asked.extend(end - begin for _, begin, end in ranges)
        return cat(self, ranges)

    monkeypatch.setattr(shards.store.Store, "read_ranges", note)
    inputs = find_inputs("memory://bucket/tars/x.tar")
    assert len(inputs) == 4
    assert sum(asked) < 2_000_000
    asked.clear()
    assert len(inputs.read(2).data) == 3_000_000
    assert asked == [3_000_000]
    MemoryFileSystem.store.clear()


def test_the_json_of_a_sample_that_we_packed_names_its_image(tmp_path):
    info = json.dumps({"source": "a.v2.png", "width": 1}).encode()
    other = json.dumps({"source": "elsewhere.png"}).encode()
    evil = json.dumps({"source": "../../b.png"}).encode()
    members = {
        **{"a%2Ev2.png": b"1", "a%2Ev2.json": info},
        **{"b.png": b"2", "b.json": other, "c.png": b"3", "c.json": evil, "d.png": b"4"},
        **{"d.json": b"[" * 10_000, "e.png": b"5", "e.json": b"[]"},
    }
    (tmp_path / "val-000000.tar").write_bytes(tar(members))
    inputs = find_inputs(str(tmp_path / "val-000000.tar"))
    assert sources(inputs) == ["a.v2.png", "b.png", "c.png", "d.png", "e.png"]
    assert inputs.read(0).key == "a%2Ev2"


def test_tars_of_a_data_set_give_the_keys_of_the_data_set(shards: Path):
    of_all = find_inputs(str(shards))
    val = find_inputs(f"{shards}/val-*.tar")
    expected = {p.key: p for p in map(of_all.read, range(len(of_all)))}
    assert len(val) == 4 < len(of_all)
    for image in map(val.read, range(4)):
        assert image == expected[image.key]


def test_images_of_two_tars_with_the_same_output_are_named(place):
    put(place, "z.tar", tar({"000.png": b"", "./deep/one.two/x.webp": b""}))
    with pytest.raises(AggregateDataError) as caught:
        find_inputs(place)
    assert sorted(caught.value.problems) == [
        f"{place}/below/data-000001.tar: deep/one.two/x.png and {place}/z.tar: "
        "./deep/one.two/x.webp would write the same output",
        f"{place}/data-000000.tar: 000.jpg and {place}/z.tar: 000.png would write the same output",
    ]


def test_members_that_cannot_be_read_are_errors_of_their_own(place):
    bad = {
        "ok.png": b"ok",
        "no.png": b"",
        "link.png": "/etc/passwd",
        "../up.png": b"x",
        "my pic.png": b"y",
    }
    put(place, "bad.tar", tar(bad))
    inputs = find_inputs(f"{place}/bad.tar")
    assert len(inputs) == 5
    assert inputs.read(0).data == b"ok"
    with pytest.raises(DataError, match=r"bad.tar: no.png is empty; write the tar without it"):
        inputs.read(1)
    messages = []
    for number in range(2, 5):
        assert inputs.name(number) == f"{place}/bad.tar"
        with pytest.raises(DataError) as caught:
            inputs.read(number)
        messages.append(str(caught.value))
    assert messages == [
        f"{place}/bad.tar: 'link.png' is a link, device or sparse file; write the tar without it",
        f"{place}/bad.tar: '../up.png' would be extracted outside the target folder; write the "
        "tar without it",
        f"{place}/bad.tar: 'my pic.png' has whitespace in its name or is not UTF-8, but the "
        "fields of an .idx are separated by spaces; rename it",
    ]


@pytest.mark.parametrize("damage", ["cut", "text", "compressed"])
def test_a_damaged_tar_is_refused_before_anything_is_done(place, damage):
    data = {
        "cut": tar(FIRST, end=False),
        "text": b"hello" * 1000,
        "compressed": b"\x1f\x8b" + bytes(2000),
    }[damage]
    put(place, "bad.tar", data)
    with pytest.raises(DataError, match=f"{place}/bad.tar is (truncated|compressed)"):
        find_inputs(place)


def test_a_truncated_or_removed_tar_is_an_error_for_each_image(place):
    inputs = find_inputs(f"{place}/data-000000.tar")
    put(place, "data-000000.tar", tar(FIRST)[:900_000])
    assert inputs.read(0).data == b"first"
    with pytest.raises(DataError, match=r"data-000000.tar: a/b.c.PNG ends too early"):
        inputs.read(1)
    system, root = fsspec.url_to_fs(place)
    system.rm(f"{root}/data-000000.tar")
    with pytest.raises((DataError, FileNotFoundError), match=r"data-000000\.tar"):
        inputs.read(0)


def test_tars_without_images_are_refused(place):
    put(place, "none.tar", tar({"a.txt": b"", "b.mask.png": b""}))
    with pytest.raises(DataError, match=f"{place}/none.tar: contains no images; name"):
        find_inputs(f"{place}/none.tar")


def test_compressed_tars_are_named(place):
    put(place, "more.tar.gz", b"")
    with pytest.raises(DataError, match=f"{place}/more.tar.gz is compressed; decompress it"):
        find_inputs(place)


def test_images_beside_tars_are_refused_and_either_can_be_chosen(place):
    put(place, "a.png", b"a")
    with pytest.raises(DataError) as caught:
        find_inputs(place)
    assert str(caught.value) == (
        f"{place} contains images (1) and shards (2, such as below/data-000001.tar); select one: "
        f"--input '{place}/**/*.{{jpg,png}}' or '{place}/**/*.tar'"
    )
    assert sources(find_inputs(f"{place}/**/*.{{jpg,png}}")) == ["a.png"]
    assert len(find_inputs(f"{place}/**/*.tar")) == 4


def test_they_are_picklable_and_have_a_digest_of_their_members(place):
    inputs = find_inputs(place)
    copy = pickle.loads(pickle.dumps(inputs))
    assert sources(copy) == sources(inputs)
    assert copy.digest() == inputs.digest() == find_inputs(place).digest()
    put(place, "below/data-000001.tar", tar({**SECOND, "new.png": b""}))
    assert find_inputs(place).digest() != inputs.digest()
