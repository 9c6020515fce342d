"""Holds the contract of `--input`: a picture, a folder, a glob, a list or shards, in one order."""

import json
import os
import pickle
from pathlib import Path

import pytest

from pipelines.config import UsageError
from pipelines.inputs import find_inputs
from shards.images import ImageFormat
from shards.index import Manifest, ShardInfo, SplitInfo, write_manifest
from shards.sample import DataError, encode_key
from shards.store import Store
from shards.writer import ShardWriter


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Some files in a folder that commands are started in; each holds its own name."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "x/a.jpg", "x/y/c.tif", ".hidden.png", "notes.txt"):
        path = tmp_path / "pics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "pics"


def sources(inputs):
    return [inputs.read(i).source for i in range(len(inputs))]


def check(inputs, root):
    """Every picture is what lies under its name."""
    assert len(inputs) > 0
    for i in range(len(inputs)):
        picture = inputs.read(i)
        assert inputs.name(i) == str(root / picture.source)
        assert picture.data == (root / picture.source).read_bytes()
        assert picture.key == os.path.splitext(picture.source)[0]


def test_one_picture(tree):
    inputs = find_inputs(str(tree / "b.png"))
    check(inputs, tree)
    assert sources(inputs) == ["b.png"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_is_taken_with_all_below_it_but_what_is_hidden(tree, slash):
    inputs = find_inputs(str(tree) + slash)
    check(inputs, tree)
    assert sources(inputs) == ["a.jpg", "b.png", "x/a.jpg", "x/y/c.tif"]


@pytest.mark.parametrize(
    ("pattern", "root", "expected"),
    [
        ("pics/*.png", "pics", ["b.png"]),
        ("pics/?.*", "pics", ["a.jpg", "b.png"]),
        ("pics/**/*.jpg", "pics", ["a.jpg", "x/a.jpg"]),
        ("pics/*/a.jpg", "pics", ["x/a.jpg"]),
        ("pics/x/[a-z]/*.tif", "pics/x", ["y/c.tif"]),
        ("*/b.png", ".", ["pics/b.png"]),
        ("./pics/*.png", "pics", ["b.png"]),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_pattern_is_named_from_its_first_wildcard(tree, pattern, root, expected, absolute):
    if absolute:
        pattern, root = f"{tree.parent}/{pattern}", tree.parent / root
    inputs = find_inputs(pattern)
    check(inputs, Path(root))
    assert sources(inputs) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree):
    (tree / "a[1].png").write_bytes(b"x")
    assert sources(find_inputs("pics/a[1].png")) == ["a[1].png"]


@pytest.mark.parametrize("name", ["list.txt", "list.LST", "list.list"])
def test_a_list_names_one_picture_a_line_relative_to_itself(tree, name):
    path = tree / name
    path.write_text(f"# these\n\nx/a.jpg\n  b.png  \n{tree}/x/y/c.tif\n")
    inputs = find_inputs(str(path))
    check(inputs, tree)
    assert sources(inputs) == ["b.png", "x/a.jpg", "x/y/c.tif"]


def test_results_of_a_list_are_named_below_the_folder_that_all_share(tree):
    path = tree.parent / "list.txt"
    path.write_text("pics/x/y/c.tif\npics/x/../x/a.jpg\n")
    inputs = find_inputs("list.txt")
    check(inputs, tree / "x")
    assert sources(inputs) == ["a.jpg", "y/c.tif"]


def test_a_list_may_name_what_is_missing_which_reading_says(tree):
    (tree / "list.txt").write_text("b.png\ngone.png\n")
    inputs = find_inputs(str(tree / "list.txt"))
    assert inputs.name(1) == str(tree / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        inputs.read(1)


def test_an_empty_list_is_refused(tree):
    path = tree / "list.txt"
    path.write_text("# nothing\n\n")
    with pytest.raises(DataError, match=f"{path} lists no picture"):
        find_inputs(str(path))


@pytest.fixture
def packed(tmp_path):
    """Shards of two splits; the second has an unlabelled sample whose json has no source."""
    folder = tmp_path / "data"
    folder.mkdir()
    splits = {}
    for split, samples in (("train", 3), ("val", 2), ("test", 0)):
        infos = []
        for number in range(bool(samples)):
            with ShardWriter(folder / f"{split}-{number:06}.tar") as writer:
                for row in range(samples):
                    info = {} if (split, row) == ("val", 1) else {"source": f"{split}/p {row}.jpg"}
                    members = {"jpg": f"{split}{row}".encode(), "json": json.dumps(info).encode()}
                    writer.add(f"{split}/p%20{row}", members)
                file = writer.seal()
            infos.append(ShardInfo(file.name, file.samples, file.bytes, file.sha256, ()))
        splits[split] = SplitInfo(tuple(infos), ())
    form = ImageFormat("RGB")
    manifest = Manifest(("a", "b"), ((0, 0, 0), (1, 1, 1)), form, {}, (0.5,), (0.5,), splits)
    write_manifest(Store(str(folder)), manifest)
    return folder


def test_a_folder_of_shards_gives_the_pictures_of_all_splits(packed):
    inputs = find_inputs(str(packed))
    assert len(inputs) == 5
    read = [inputs.read(i) for i in range(5)]
    assert [p.data for p in read] == [b"train0", b"train1", b"train2", b"val0", b"val1"]
    # A sample that does not say where it came from is called by its key.
    assert [p.source for p in read][-2:] == ["val/p 0.jpg", "val/p%201.jpg"]
    assert [p.key for p in read] == [encode_key(p.source) for p in read]
    assert inputs.name(3) == f"{packed / 'val-000000.tar'}, sample 0"
    # in any order
    assert inputs.read(0).data == b"train0"


def test_two_pictures_that_would_have_one_result_are_refused(tree):
    (tree / "b.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        find_inputs(str(tree))
    assert str(caught.value) == (
        f"{tree / 'b.jpg'} and b.png would have one result; "
        "rename one of each, or predict them into two folders"
    )


def test_a_picture_listed_twice_is_refused(tree):
    (tree / "list.txt").write_text("b.png\n./b.png\n")
    with pytest.raises(DataError, match=r"b\.png and b\.png would have one result"):
        find_inputs(str(tree / "list.txt"))


@pytest.mark.parametrize("given", ["s3://bucket/pics", "https://x.org/a.png", "gs://b/*.png"])
def test_remote_inputs_are_refused_in_one_line(given):
    with pytest.raises(UsageError) as caught:
        find_inputs(given)
    assert str(caught.value) == (
        f"--input {given}: remote inputs are not supported yet; copy them here first"
    )


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=f"{tmp_path} holds no picture"):
        find_inputs(str(tmp_path))


@pytest.mark.parametrize("given", ["nothing", "nothing.png", "nothing.txt", "pics/*.webp"])
def test_what_means_nothing_is_refused_naming_what_it_could_be(tree, given):
    with pytest.raises(UsageError) as caught:
        find_inputs(given)
    assert str(caught.value) == (
        f"--input {given}: no picture, folder, list (.txt), pattern or folder of shards is there"
    )


def test_a_damaged_manifest_is_named_and_not_taken_for_a_folder_of_pictures(tree):
    (tree / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        find_inputs(str(tree))


def test_inputs_are_picklable_and_have_a_digest_of_what_they_list(tree, packed):
    for given in (tree, packed):
        inputs = find_inputs(str(given))
        copy = pickle.loads(pickle.dumps(inputs))
        assert sources(copy) == sources(inputs)
        assert copy.digest() == inputs.digest() == find_inputs(str(given)).digest()


def test_the_digest_of_files_is_of_their_names(tree):
    before = find_inputs(str(tree)).digest()
    (tree / "b.png").write_bytes(b"other content")
    assert find_inputs(str(tree)).digest() == before
    (tree / "c.png").write_bytes(b"")
    assert find_inputs(str(tree)).digest() != before


def test_the_digest_of_shards_is_that_of_their_manifest(packed):
    before = find_inputs(str(packed)).digest()
    path = packed / "index.json"
    path.write_text(path.read_text().replace('"a"', '"c"'))
    assert find_inputs(str(packed)).digest() != before
