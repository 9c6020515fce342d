"""`manifest`, `offsets`: index.json and .idx files round-trip; errors name what is damaged."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards.manifest
from shards.images.files import ImageFormat
from shards.manifest import (
    MAX_SIZES,
    Manifest,
    ShardInfo,
    SizeCount,
    SplitInfo,
    merge_size_counts,
    read_manifest,
    write_manifest,
)
from shards.offsets import MemberRange, read_offsets
from shards.sample import DataError
from shards.store import Store

MANIFEST = Manifest(
    classes=("background", "cell", "wall"),
    palette=((0, 0, 0), (1, 2, 3), (4, 5, 6)),
    image_format=ImageFormat("L", "drop", (100, 4095)),
    mask_format={"kind": "values", "source_values": [0, 128, 255]},
    mean=(0.123456789012345,),
    std=(0.25,),
    splits={
        "train": SplitInfo(
            (
                ShardInfo("train-000000.tar", 3, 10_240, "ab" * 32, (1, 2, 3, 4)),
                ShardInfo("train-000001.tar", 2, 20_480, "cd" * 32, (0, 0, 0, 9)),
            ),
            (SizeCount(64, 48, "RGB", 4), SizeCount(10, 10, "L", 1)),
        ),
        "val": SplitInfo((), ()),
    },
    duplicates=(("train:a.png", "train:b.png"),),
    verified="headers",
    border_sigma=2.5,
    border_classes=("cell",),
)


def refusal(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    return str(caught.value)


def write(folder, manifest=MANIFEST):
    write_manifest(Store(str(folder)), manifest)


@pytest.mark.parametrize("bounds", [None, (0, 65535), (100, 4095)])
@pytest.mark.parametrize("alpha", ["refuse", "drop"])
@pytest.mark.parametrize("verified", ["full", "headers"])
def test_a_manifest_is_read_back_as_written(tmp_path, bounds, alpha, verified):
    image_format = ImageFormat("L", alpha, bounds)
    manifest = replace(MANIFEST, image_format=image_format, verified=verified)
    write(tmp_path, manifest)
    read = read_manifest(tmp_path)
    assert read == manifest
    assert read.image_format.range == bounds
    assert read.digest == hashlib.sha256((tmp_path / "index.json").read_bytes()).hexdigest()


def test_a_manifest_without_border_fields_is_read(tmp_path):
    write(tmp_path)
    path = tmp_path / "index.json"
    plain = json.loads(path.read_text())
    del plain["border_sigma"], plain["border_classes"]
    path.write_text(json.dumps(plain))
    assert read_manifest(tmp_path) == replace(MANIFEST, border_sigma=None, border_classes=())


def test_rewriting_a_manifest_gives_the_same_bytes(tmp_path):
    write(tmp_path)
    before = (tmp_path / "index.json").read_bytes()
    write(tmp_path, read_manifest(tmp_path))
    assert (tmp_path / "index.json").read_bytes() == before


def test_the_file_contains_format_version_and_number_of_samples(tmp_path):
    write(tmp_path)
    plain = json.loads((tmp_path / "index.json").read_text())
    assert (plain["format"], plain["version"]) == ("unet-shards", 2)
    assert plain["image_format"] == {
        "channels": "L",
        "alpha": "drop",
        "range": [100, 4095],
        "max_pixels": 1_000_000_000,
    }
    assert plain["verified"] == "headers"
    assert (plain["splits"]["train"]["samples"], plain["splits"]["val"]["samples"]) == (5, 0)
    assert "digest" not in plain


def test_a_split_without_samples_is_refused_naming_the_others(tmp_path):
    assert MANIFEST.split("train", tmp_path).samples == 5
    for name in ("val", "test"):
        assert refusal(MANIFEST.split, name, tmp_path) == (
            f"{tmp_path} has no samples in the split '{name}'; splits with samples: train"
        )


def test_a_missing_folder_or_manifest_is_named(tmp_path):
    assert refusal(read_manifest, tmp_path / "x") == (
        f"{tmp_path / 'x'} does not exist; check the path"
    )
    assert refusal(read_manifest, tmp_path) == (
        f"{tmp_path} is not a data set (it has no index.json); pack the images with unet pack, or "
        "rerun a pack that was interrupted"
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"classes"', '"class_names"'),
        lambda text: text.replace('"sha256"', '"md5"', 1),
        lambda text: text.replace('"mean"', '"extra": 1, "mean"'),
        lambda text: text.replace('"range"', '"bounds"'),
        lambda text: text.replace('"version": 2', '"version": "two"'),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, damage):
    write(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(damage(path.read_text()))
    text = refusal(read_manifest, tmp_path)
    assert text.startswith(f"{path} is damaged (")
    assert text.endswith("; pack the data set again")
    assert "\n" not in text


def test_a_manifest_that_is_not_text_is_named(tmp_path):
    (tmp_path / "index.json").write_bytes(b"\xff\xfe\x00")
    assert "index.json is damaged (" in refusal(read_manifest, tmp_path)


def test_a_foreign_manifest_is_named(tmp_path):
    path = tmp_path / "index.json"
    path.write_text('{"format": "litdata", "version": 1}')
    assert refusal(read_manifest, tmp_path) == (f"{path} is not a manifest written by unet pack")


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(3, "update unet-shards"), (99, "update unet-shards"), (1, "pack the data set again")],
)
def test_a_manifest_of_another_version_is_refused_with_the_remedy(tmp_path, version, remedy):
    write(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"version": 2', f'"version": {version}'))
    assert refusal(read_manifest, tmp_path) == (
        f"{path} has version {version}, but this program reads version 2; {remedy}"
    )


def test_size_counts_are_added_and_sorted_by_frequency():
    counts = [SizeCount(4, 4, "L", 1), SizeCount(8, 6, "RGB", 2), SizeCount(8, 6, "RGB", 3)]
    more = [SizeCount(8, 6, "L", 1), SizeCount(2, 9, "RGB", 1)]
    assert merge_size_counts([*counts, *more]) == (
        SizeCount(8, 6, "RGB", 5),
        SizeCount(2, 9, "RGB", 1),
        SizeCount(4, 4, "L", 1),
        SizeCount(8, 6, "L", 1),
    )


sizes = st.builds(
    SizeCount,
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["L", "RGB"]),
    st.integers(1, 9),
)


@given(st.lists(sizes, max_size=60), st.integers(4, 20))
def test_rounding_sizes_down_keeps_every_image(counts, max_sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.manifest, "MAX_SIZES", max_sizes)
        merged = merge_size_counts(counts)
    assert len(merged) <= max_sizes
    for mode in ("L", "RGB"):
        before = [size for size in counts if size.mode == mode]
        after = [size for size in merged if size.mode == mode]
        assert sum(s.images for s in after) == sum(s.images for s in before)
        assert all(s.width > 0 and s.height > 0 for s in after)
        # Rounded down, never up: no image appears larger than it is.
        assert max((s.width for s in after), default=0) <= max((s.width for s in before), default=0)
    assert list(merged) == sorted(merged, key=lambda s: (-s.images, s.width, s.height, s.mode))
    if len({(s.width, s.height, s.mode) for s in counts}) <= max_sizes:
        assert sum(s.images * s.width for s in merged) == sum(s.images * s.width for s in counts)


def test_a_manifest_stays_small_for_images_of_many_sizes():
    distinct = [SizeCount(100 + i % 311, 100 + i // 311, "RGB", 2) for i in range(50_000)]
    merged = merge_size_counts(distinct)
    assert len(merged) <= MAX_SIZES
    assert sum(size.images for size in merged) == 100_000
    assert merge_size_counts(merged) == merged
    assert len(merge_size_counts(distinct[:MAX_SIZES])) == MAX_SIZES


# ------------------------------------------------------------------------------- byte offsets

LINES = (
    "v1.2 3\n"
    "jpg 512 100 a/b%2Ec.jpg json 1536 2 a/b%2Ec.json mask.png 2560 70 a/b%2Ec.mask.png\n"
    "json 3584 2 u.json png 4608 9 u.png\n"
    "json 5632 2 p.json mask.png 6656 70 p.mask.png\n"
)


def offsets_of(tmp_path, text):
    (tmp_path / "s.idx").write_text(text)
    return read_offsets(tmp_path / "s.tar")


def test_offsets_give_the_members_of_each_sample(tmp_path):
    offsets = offsets_of(tmp_path, LINES)
    assert len(offsets) == 3
    labelled, unlabelled, predicted = offsets[0], offsets[1], offsets[2]
    assert labelled.key == "a/b%2Ec"
    assert labelled.image == MemberRange("jpg", 512, 100, "a/b%2Ec.jpg")
    assert labelled.mask == MemberRange("mask.png", 2560, 70, "a/b%2Ec.mask.png")
    assert labelled.info == MemberRange("json", 1536, 2, "a/b%2Ec.json")
    assert (unlabelled.key, unlabelled.mask) == ("u", None)
    assert unlabelled.image.extension == "png"
    assert labelled.border is None
    # A prediction without its image: the mask takes its place.
    assert predicted.image == predicted.mask == MemberRange("mask.png", 6656, 70, "p.mask.png")


def test_a_border_map_is_not_an_image(tmp_path):
    offsets = offsets_of(
        tmp_path,
        "v1.2 2\n"
        "border.png 512 40 a.border.png jpg 1536 100 a.jpg json 2560 2 a.json "
        "mask.png 3584 70 a.mask.png\n"
        "border.png 4608 40 b.border.png json 5632 2 b.json\n",
    )
    assert offsets[0].border == MemberRange("border.png", 512, 40, "a.border.png")
    assert (offsets[0].key, offsets[0].image.extension) == ("a", "jpg")
    assert refusal(offsets.__getitem__, 1).endswith(
        "line 3: a sample has 0 images, expected 1; pack it again"
    )


@pytest.mark.parametrize(
    "text",
    [
        "".join(LINES.splitlines(keepends=True)[:-1]),
        LINES + "json 9216 2 q.json png 10240 9 q.png\n",
        LINES.replace("v1.2", "v1.1"),
        LINES.replace("v1.2 3", "v1.2"),
        "PK\x03\x04",
    ],
)
def test_a_truncated_or_foreign_idx_is_named(tmp_path, text):
    assert refusal(offsets_of, tmp_path, text) == (
        f"{tmp_path / 's.idx'} is truncated or not a v1.2 .idx; pack the data set again"
    )


def test_a_missing_empty_or_binary_idx_is_named(tmp_path):
    path = tmp_path / "s.idx"
    assert refusal(read_offsets, tmp_path / "s.tar").startswith(f"{path} cannot be read (")
    for data in (b"", b"\xff\xfe"):
        path.write_bytes(data)
        assert refusal(read_offsets, tmp_path / "s.tar") == (
            f"{path} is truncated or not a v1.2 .idx; pack the data set again"
        )


def test_samples_of_foreign_shards_may_have_no_json(tmp_path):
    offsets = offsets_of(tmp_path, "v1.2 1\njpg 512 1 a.jpg mask.png 1536 1 a.mask.png\n")
    assert offsets[0].info is None
    assert (offsets[0].key, offsets[0].image.extension) == ("a", "jpg")


@pytest.mark.parametrize(
    ("line", "num_images"),
    [
        ("json 512 1 a.json", 0),
        ("jpg 512 1 a.jpg json 1536 1 a.json png 2560 1 a.png", 2),
        ("cls 512 1 a.cls jpg 1536 1 a.jpg", 2),
    ],
)
def test_a_sample_without_exactly_one_image_is_named(tmp_path, line, num_images):
    offsets = offsets_of(tmp_path, f"v1.2 2\njson 9000 1 b.json png 9001 1 b.png\n{line}\n")
    assert refusal(offsets.__getitem__, 1) == (
        f"{tmp_path / 's.idx'}, line 3: a sample has {num_images} images, expected 1; pack it again"
    )


@pytest.mark.parametrize("line", ["", "png 512 1", "png x 1 a.png", "png 512 1 a.png json"])
def test_a_damaged_line_is_named(tmp_path, line):
    offsets = offsets_of(tmp_path, f"v1.2 2\n{line}\njson 9000 1 b.json png 9001 1 b.png\n")
    assert offsets[1].key == "b"
    assert refusal(offsets.__getitem__, 0) == (
        f"{tmp_path / 's.idx'}, line 2 is damaged; pack it again"
    )
