"""`inference.inputs`, `inference.input_readers`.

Holds the contract of `--input`: an image, a folder, a glob, a list or shards, in one order.
"""

import json
import os
import pickle
from pathlib import Path

import pytest

from pipelines.inference.input_readers import Names
from pipelines.inference.inputs import find_inputs
from pipelines.runtime.errors import UsageError
from shards.images.files import ImageFormat
from shards.images.pixels import decode_image
from shards.manifest import Manifest, ShardInfo, SizeCount, SplitInfo, write_manifest
from shards.sample import AggregateDataError, DataError, encode_key
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


def check_data(inputs, root):
    """Every image is what lies under its source."""
    for i in range(len(inputs)):
        image = inputs.read(i)
        assert image.data == (root / image.source).read_bytes()
        assert image.key == encode_key(image.source)


def sources(inputs):
    return [inputs.read(i).source for i in range(len(inputs))]


def check(inputs, root):
    """Every image is what lies under its name."""
    assert len(inputs) > 0
    for i in range(len(inputs)):
        image = inputs.read(i)
        assert inputs.name(i) == str(root / image.source)
        assert image.data == (root / image.source).read_bytes()
        assert image.key == os.path.splitext(image.source)[0]


def test_one_image(tree):
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
        ("pics/x/../*.png", "pics/x/..", ["b.png"]),
        ("pics/*.{png,jpg}", "pics", ["a.jpg", "b.png"]),
        ("pics/{a.jpg,x/y/c.tif}", "pics", ["a.jpg", "x/y/c.tif"]),
        ("pics/x/{a,y/{b,c}}.jpg", "pics/x", None),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_pattern_is_named_from_its_first_wildcard(tree, pattern, root, expected, absolute):
    if absolute:
        pattern, root = f"{tree.parent}/{pattern}", tree.parent / root
    inputs = find_inputs(pattern)
    if expected is None:
        # What braces count or list is asked for, there or not.
        expected = ["a.jpg", "y/b.jpg", "y/c.jpg"]
        assert [inputs.name(i) for i in range(3)] == [f"{root}/{name}" for name in expected]
        return
    check(inputs, Path(root))
    assert sources(inputs) == expected


def test_braces_count_with_leading_zeros(tree):
    for number in (8, 9, 11):
        (tree / f"n{number:03}.png").write_bytes(b"%d" % number)
    inputs = find_inputs(f"{tree}/n{{008..011}}.png")
    assert [Path(inputs.name(i)).name for i in range(4)] == [
        *("n008.png", "n009.png", "n010.png", "n011.png"),
    ]
    assert inputs.read(3).data == b"11"
    with pytest.raises(FileNotFoundError):
        inputs.read(2)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree):
    (tree / "a[1].png").write_bytes(b"x")
    assert sources(find_inputs("pics/a[1].png")) == ["a[1].png"]


@pytest.mark.parametrize("name", ["list.txt", "list.LST", "list.list"])
def test_a_list_names_one_image_per_line_relative_to_itself(tree, name):
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


def test_lines_of_a_list_are_paths_whatever_they_hold(tree):
    names = ["a#b.png", "q=1;c.png", "{1,2}.png", "*.png", "x y.png", "\u00e4.png", "[1].png"]
    for name in names:
        (tree / name).write_bytes(name.encode())
    (tree / "list.txt").write_text("\n".join(names), encoding="utf-8-sig")
    inputs = find_inputs(str(tree / "list.txt"))
    check_data(inputs, tree)
    assert sources(inputs) == sorted(names)


def test_a_missing_file_in_a_list_is_reported_when_it_is_read(tree):
    (tree / "list.txt").write_text("b.png\ngone.png\n")
    inputs = find_inputs(str(tree / "list.txt"))
    assert inputs.name(1) == str(tree / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        inputs.read(1)


def test_what_cannot_be_read_is_an_error_of_its_own(tree):
    # Each of them a line in errors.jsonl: the other images do not suffer.
    (tree / "empty.png").touch()
    (tree / "folder.png").mkdir()
    os.mkfifo(tree / "pipe.png")
    (tree / "loop.png").symlink_to("loop.png")
    with (tree / "huge.png").open("wb") as file:
        file.truncate(2**40)
    names = ["b.png", "empty.png", "folder.png", "gone.png", "huge.png", "loop.png", "pipe.png"]
    (tree / "list.txt").write_text("\n".join(names))
    inputs = find_inputs(str(tree / "list.txt"))
    expected = {
        "folder.png": (IsADirectoryError, "Is a directory"),
        "gone.png": (FileNotFoundError, "No such file"),
        "huge.png": (
            DataError,
            f"{tree}/huge.png has 1,099,511,627,776 bytes, more than any image",
        ),
        "loop.png": (OSError, "Too many levels"),
        "pipe.png": (DataError, f"{tree}/pipe.png is a pipe, not a file; remove it"),
    }
    assert [inputs.name(i) for i in range(7)] == [str(tree / name) for name in names]
    for number, name in enumerate(names):
        if name in expected:
            kind, message = expected[name]
            with pytest.raises(kind, match=message):
                inputs.read(number)
    assert inputs.read(0).data == b"b.png"
    with pytest.raises(DataError, match="is empty"):
        decode_image(inputs.read(1).data, ImageFormat("RGB"), inputs.name(1))


def test_an_image_that_vanishes_after_it_was_listed_is_an_error(tree):
    inputs = find_inputs(str(tree))
    (tree / "b.png").unlink()
    with pytest.raises(FileNotFoundError):
        inputs.read(1)
    assert inputs.read(0).data == b"a.jpg"


def test_folders_named_like_images_are_searched_and_not_read(tree):
    (tree / "y.png").mkdir()
    (tree / "y.png" / "d.png").write_bytes(b"d")
    assert "y.png/d.png" in sources(find_inputs(str(tree)))
    assert sources(find_inputs("pics/*.png")) == ["b.png"]


def test_a_list_that_is_no_text_is_refused(tree):
    (tree / "list.txt").write_bytes(b"\xff\xfe\x00b")
    with pytest.raises(
        DataError, match=r"list\.txt is not a list of paths: it is not UTF-8 text; save it"
    ):
        find_inputs(str(tree / "list.txt"))


def test_a_list_of_several_kinds_of_place_is_refused(tree):
    (tree / "list.txt").write_text("b.png\ns3://bucket/b.png\n")
    with pytest.raises(DataError) as caught:
        find_inputs(str(tree / "list.txt"))
    assert str(caught.value) == (
        f"--input {tree}/list.txt mixes locations, such as {tree}/b.png and "
        "s3://bucket/b.png; write one list for each"
    )


def test_an_empty_list_is_refused(tree):
    path = tree / "list.txt"
    path.write_text("# nothing\n\n")
    with pytest.raises(DataError, match=f"{path} lists no images; write one path"):
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
        sizes = (SizeCount(1, 1, "RGB", samples),) if samples else ()
        splits[split] = SplitInfo(tuple(infos), sizes)
    form = ImageFormat("RGB")
    manifest = Manifest(
        ("a", "b"), ((0, 0, 0), (1, 1, 1)), form, {}, (0.5,) * 3, (0.5,) * 3, splits
    )
    write_manifest(Store(str(folder)), manifest)
    return folder


def test_a_folder_of_shards_gives_the_images_of_all_splits(packed):
    inputs = find_inputs(str(packed))
    assert len(inputs) == 5
    read = [inputs.read(i) for i in range(5)]
    assert [p.data for p in read] == [b"train0", b"train1", b"train2", b"val0", b"val1"]
    # A sample without a source is named after its key.
    assert [p.source for p in read][-2:] == ["val/p 0.jpg", "val/p%201.jpg"]
    assert [p.key for p in read] == [encode_key(p.source) for p in read]
    assert inputs.name(3) == f"{packed / 'val-000000.tar'}, sample 0"
    # in any order
    assert inputs.read(0).data == b"train0"


def test_two_images_with_the_same_output_are_refused(tree):
    (tree / "b.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        find_inputs(str(tree))
    assert str(caught.value) == (
        f"{tree / 'b.jpg'} and b.png would write the same output; "
        "rename one of each, or predict them into two folders"
    )


def test_all_images_with_the_same_output_are_named(tree):
    for name in ("b.jpg", "b.tif", "x/y/c.png", "b.jpg.png"):
        (tree / name).write_bytes(b"")
    with pytest.raises(AggregateDataError) as caught:
        find_inputs(str(tree))
    assert caught.value.problems == [
        f"{tree / 'b.jpg'} and b.png would write the same output",
        f"{tree / 'b.jpg'} and b.tif would write the same output",
        f"{tree / 'x/y/c.png'} and x/y/c.tif would write the same output",
    ]


def test_an_image_listed_twice_is_refused(tree):
    (tree / "list.txt").write_text("b.png\n./b.png\n")
    with pytest.raises(DataError, match=r"b\.png and b\.png would write the same output"):
        find_inputs(str(tree / "list.txt"))


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=f"{tmp_path} contains no images"):
        find_inputs(str(tmp_path))


@pytest.mark.parametrize("given", ["nothing", "nothing.png", "nothing.txt"])
def test_what_does_not_exist_is_refused_naming_what_it_could_be(tree, given):
    with pytest.raises(UsageError) as caught:
        find_inputs(given)
    assert str(caught.value) == (
        f"--input {given}: does not exist; use an image, a folder, a list (.txt), a pattern or a "
        "data set"
    )


@pytest.mark.parametrize("given", ["pics/*.webp", "pics/{x,y}.webp"])
def test_a_pattern_without_a_match_is_refused(tree, given):
    with pytest.raises(UsageError) as caught:
        find_inputs(given)
    assert str(caught.value) == f"--input {given}: matches no file; check the pattern"


def test_a_damaged_manifest_is_named_and_not_taken_for_a_folder_of_images(tree):
    (tree / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        find_inputs(str(tree))


def test_inputs_are_picklable_and_have_a_digest_of_what_they_list(tree, packed):
    for given in (tree, packed):
        inputs = find_inputs(str(given))
        copy = pickle.loads(pickle.dumps(inputs))
        assert sources(copy) == sources(inputs)
        assert copy.digest() == inputs.digest() == find_inputs(str(given)).digest()


def test_a_million_names_are_as_small_as_their_text():
    names = [f"a folder/\u00e4-{number:06}.png" for number in range(20_000)] + [
        "x\ny",
        "\udcff",
        "",
    ]
    kept = Names(iter(names))
    assert list(kept) == names
    assert kept[5:7] == names[5:7]
    assert [*pickle.loads(pickle.dumps(kept))] == names
    text = sum(len(name.encode("utf-8", "surrogateescape")) for name in names)
    assert len(pickle.dumps(kept)) < text + 10 * len(names)
    with pytest.raises(IndexError):
        kept[len(names)]


def test_a_name_that_is_no_text_is_read(tree):
    path = os.fsencode(tree) + b"/\xff\xfe.png"
    Path(os.fsdecode(path)).write_bytes(b"odd")
    (image,) = [
        image for image in map(find_inputs(str(tree)).read, range(5)) if image.data == b"odd"
    ]
    assert os.fsencode(image.source) == b"\xff\xfe.png"
    assert image.key == "%FF%FE"


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
