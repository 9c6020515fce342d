"""Holds the pairing contract: which mask belongs to which picture, who is in which split."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.pairs import (
    Pair,
    assign_splits,
    find_pairs,
    hash_fraction,
    list_images,
    read_split_file,
    separate,
)
from shards.sample import DataError


@pytest.fixture
def tree(tmp_path):
    """tree("images", "a.png", "b/c.jpg") -> a folder with these (empty) files."""

    def make(folder, *names):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / folder

    return make


def refusal(*arguments, function=find_pairs, **options):
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# -------------------------------------------------------------------------------------- pairing


def test_pairs_have_one_relative_path_but_for_the_extension(tree):
    images = tree("images", "b.jpg", "a.PNG")
    masks = tree("masks", "a.gif", "b.png")
    assert find_pairs(images, masks) == [
        Pair("a", images / "a.PNG", masks / "a.gif", "a.PNG"),
        Pair("b", images / "b.jpg", masks / "b.png", "b.jpg"),
    ]


def test_equal_names_in_different_folders_are_different_pairs(tree):
    images = tree("images", "x/a.jpg", "y/a.jpg", "a.jpg", "x/y/a.jpg")
    masks = tree("masks", "x/a.png", "y/a.png", "a.png", "x/y/a.png")
    pairs = find_pairs(images, masks)
    assert [p.key for p in pairs] == ["a", "x/a", "x/y/a", "y/a"]
    assert all(p.mask == masks / f"{p.key}.png" for p in pairs)


def test_dots_in_names_pair_by_the_last_one(tree):
    pairs = find_pairs(tree("images", "a.b.jpg", "a.c.jpg"), tree("masks", "a.b.png", "a.c.png"))
    assert [(p.key, p.source) for p in pairs] == [("a%2Eb", "a.b.jpg"), ("a%2Ec", "a.c.jpg")]


def test_suffixes_are_taken_off_before_pairing(tree):
    images = tree("images", "car_01.jpg", "car_02.jpg")
    masks = tree("masks", "car_01_mask.gif", "car_02_mask.gif")
    pairs = find_pairs(images, masks, mask_suffix="_mask")
    assert [(p.key, p.mask.name) for p in pairs] == [
        ("car_01", "car_01_mask.gif"),
        ("car_02", "car_02_mask.gif"),
    ]


def test_both_sides_may_share_a_folder_if_both_have_a_suffix(tree):
    both = tree("both", "a_sat.jpg", "a_mask.png", "b_sat.jpg", "b_mask.png")
    pairs = find_pairs(both, both, image_suffix="_sat", mask_suffix="_mask")
    assert [(p.source, p.mask.name) for p in pairs] == [
        ("a_sat.jpg", "a_mask.png"),
        ("b_sat.jpg", "b_mask.png"),
    ]


def test_one_folder_for_both_is_refused_with_the_remedy(tree):
    both = tree("both", "a.jpg")
    assert refusal(both, both) == (
        f"pictures and masks share the folder {both}; part them: unet separate"
    )


def test_hidden_files_and_folders_and_other_files_are_ignored(tree):
    images = tree(
        "images", "a.jpg", ".b.jpg", ".cache/c.jpg", "x/.d.jpg", "Thumbs.db", "notes.txt", "jpg"
    )
    assert list_images(images) == ["a.jpg"]


def test_pictures_without_masks_folder_are_unlabelled(tree):
    images = tree("images", "b.jpg", "a.jpg")
    assert [(p.key, p.mask) for p in find_pairs(images, None)] == [("a", None), ("b", None)]


def test_two_candidates_for_one_name_are_refused_even_when_skipping(tree):
    images, masks = tree("images", "a.jpg"), tree("masks", "a.png", "a.tif")
    for skip in (False, True):
        assert refusal(images, masks, skip_unpaired=skip) == (
            f"{masks / 'a.png'} and a.tif have one name; keep one of each"
        )
    images = tree("more", "a.jpg", "a.png")
    assert "a.jpg and a.png have one name; keep one of each" in refusal(images, None)


def test_one_unpaired_file_is_named_on_one_line(tree):
    images, masks = tree("images", "a.jpg", "b.jpg"), tree("masks", "a.png")
    assert refusal(images, masks) == (
        f"b.jpg has no mask in {masks}; --skip-unpaired leaves them out"
    )
    images, masks = tree("images2", "a.jpg"), tree("masks2", "a.png", "c.png")
    assert refusal(images, masks) == (
        f"c.png has no picture in {images}; --skip-unpaired leaves them out"
    )


def test_all_unpaired_files_are_named_pictures_first(tree):
    images, masks = tree("images", "a.jpg", "b.jpg", "c.jpg"), tree("masks", "a.png", "z.png")
    assert refusal(images, masks).splitlines() == [
        "3 problems (--skip-unpaired leaves them out):",
        f"  b.jpg has no mask in {masks}",
        f"  c.jpg has no mask in {masks}",
        f"  z.png has no picture in {images}",
    ]


@pytest.mark.parametrize(("count", "rest"), [(20, None), (21, "and 1 more"), (65, "and 45 more")])
def test_twenty_problems_are_shown_and_the_rest_counted(tree, count, rest):
    images = tree("images", *(f"p{i:03}.jpg" for i in range(count)), "paired.jpg")
    lines = refusal(images, tree("masks", "paired.png")).splitlines()
    assert lines[0] == f"{count} problems (--skip-unpaired leaves them out):"
    assert [line.split()[0] for line in lines[1:21]] == [f"p{i:03}.jpg" for i in range(20)]
    assert [line.strip() for line in lines[21:]] == ([rest] if rest else [])


def test_unpaired_files_are_left_out_on_request(tree):
    images, masks = tree("images", "a.jpg", "b.jpg"), tree("masks", "a.png", "c.png")
    assert [p.key for p in find_pairs(images, masks, skip_unpaired=True)] == ["a"]


def test_no_pair_at_all_is_refused_even_when_skipping(tree):
    images, masks = tree("images", "a.jpg"), tree("masks", "b.png")
    text = refusal(images, masks, skip_unpaired=True)
    assert text == f"no picture in {images} has a mask of the same name in {masks}"


def test_a_missing_or_empty_folder_is_named(tree, tmp_path):
    assert refusal(tmp_path / "none", None) == f"{tmp_path / 'none'} is no folder"
    empty = tree("empty", "notes.txt")
    assert refusal(empty, None) == (
        f"{empty} holds no picture (.bmp .gif .jpeg .jpg .png .tif .tiff .webp)"
    )


def test_pairs_do_not_depend_on_the_order_of_the_directory(tree, monkeypatch):
    names = [f"{i}/p{j}.png" for i in range(3) for j in range(3)]
    images, masks = tree("images", *names), tree("masks", *names)
    expected = find_pairs(images, masks)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: ((p, d, n[::-1]) for p, d, n in walk(top)))
    assert find_pairs(images, masks) == expected


# --------------------------------------------------------------------------------------- splits


def pairs_named(*sources):
    return [Pair(s.rsplit(".", 1)[0], Path(s), None, s) for s in sources]


def splits_of(pairs, val=0.2, test=0.2, group_by=None):
    splits, _ = assign_splits(pairs, val_fraction=val, test_fraction=test, group_by=group_by)
    return {p.source: split for p, split in zip(pairs, splits, strict=True)}


MANY = pairs_named(*(f"patient{i // 10}/slice{i % 10}.png" for i in range(400)))


def test_the_split_is_the_first_8_bytes_of_the_sha256_of_the_key():
    for p, split in zip(MANY, splits_of(MANY).values(), strict=True):
        number = int(hashlib.sha256(p.key.encode()).hexdigest()[:16], 16)
        expected = "val" if number < 2**64 * 0.2 else "test" if number < 2**64 * 0.4 else "train"
        assert split == expected


def test_the_hash_fraction_is_pinned():
    assert hash_fraction("a") == pytest.approx(0xCA978112CA1BBDCA / 2**64)
    assert hash_fraction("") == pytest.approx(0xE3B0C44298FC1C14 / 2**64)


def test_adding_data_never_moves_a_sample():
    some, all_of_them = splits_of(MANY[::7]), splits_of(MANY)
    assert set(some.values()) == {"train", "val", "test"}
    assert some.items() <= all_of_them.items()


@given(st.floats(0, 0.5), st.floats(0, 0.5))
def test_raising_a_fraction_only_moves_samples_into_it(low, more):
    before, after = splits_of(MANY, low, 0), splits_of(MANY, low + more, 0)
    assert all(after[name] == "val" for name, split in before.items() if split == "val")


def test_fractions_are_roughly_met_and_may_be_zero_or_one():
    of = list(splits_of(MANY).values())
    assert 50 < of.count("val") < 110
    assert 50 < of.count("test") < 110
    assert set(splits_of(MANY, 0, 0).values()) == {"train"}
    assert set(splits_of(MANY, 0, 1).values()) == {"test"}


def test_a_group_never_spans_two_splits():
    splits = splits_of(MANY, group_by=r"patient\d+")
    by_group = {}
    for source, split in splits.items():
        by_group.setdefault(source.split("/")[0], set()).add(split)
    assert len(by_group) == 40
    assert all(len(of) == 1 for of in by_group.values())
    assert {s for of in by_group.values() for s in of} == {"train", "val", "test"}


def test_a_group_is_the_first_bracket_or_the_whole_match():
    pairs = pairs_named("patient7/x.png")
    for expression, group in ((r"patient(\d+)", "7"), (r"patient\d+", "patient7")):
        _, groups = assign_splits(pairs, val_fraction=0, test_fraction=0, group_by=expression)
        assert groups == [group]
    _, groups = assign_splits(pairs, val_fraction=0, test_fraction=0, group_by=None)
    assert groups == [None]


def test_a_picture_without_a_group_is_refused():
    with pytest.raises(DataError, match=r"b\.png does not match --group-by 'car_\(\.\*\)'"):
        splits_of(pairs_named("car_1.png", "b.png"), group_by="car_(.*)")


def split_file(tmp_path, text):
    path = tmp_path / "split.csv"
    path.write_text(text)
    return path


PAIRS = pairs_named("a.png", "x/b.png", "c.png")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_split_file_decides_in_any_order_with_any_other_column(tmp_path, mark):
    text = mark + 'note,path,split\n,c.png,test\n"a, b",x/b.png,val\n,a.png,train\n'
    assert read_split_file(split_file(tmp_path, text), PAIRS) == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,train\n", "{path} must begin with the line path,split"),
        ("", "{path} must begin with the line path,split"),
        (
            "path,split\na.png,train\nx/b.png,dev\nc.png,val\n",
            "{path}, line 3: 'dev' is none of train, val, test",
        ),
        (
            "path,split\na.png,train\nx/b.png\nc.png,val\n",
            "{path}, line 3: None is none of train, val, test",
        ),
        (
            "path,split\na.png,train\nx/b.png,val\na.png,train\nc.png,val\n",
            "{path}, line 4: a.png stands there twice",
        ),
        (
            "path,split\na.png,train\nc.png,val\n",
            "x/b.png is not in {path}; the file must name every picture once",
        ),
        (
            "path,split\na.png,train\nx/b.png,val\nc.png,val\nd.png,val\n",
            "{path} lists d.png, which is not there; the file must name every picture once",
        ),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(tmp_path, text, message):
    path = split_file(tmp_path, text)
    assert refusal(path, PAIRS, function=read_split_file) == message.format(path=path)


# ----------------------------------------------------------------------------------- separation


def targets(plan, folder, out):
    return {
        str(s.source.relative_to(folder)): (str(s.target.relative_to(out)), s.is_mask) for s in plan
    }


def test_a_mixed_folder_is_parted_by_suffix(tree, tmp_path):
    mixed = tree("mixed", "a.png", "a_mask.png", "x/a.jpg", "x/a_mask.png")
    assert targets(separate(mixed, tmp_path, mask_suffix="_mask"), mixed, tmp_path) == {
        "a.png": ("images/a.png", False),
        "a_mask.png": ("masks/a.png", True),
        "x/a.jpg": ("images/x/a.jpg", False),
        "x/a_mask.png": ("masks/x/a.png", True),
    }


def test_a_mixed_folder_is_parted_by_extension_of_any_case(tree, tmp_path):
    mixed = tree("mixed", "a.BMP", "a.png", "b.bmp", "b.PNG")
    plan = separate(mixed, tmp_path, image_ext=".bmp", mask_ext=".png")
    assert targets(plan, mixed, tmp_path) == {
        "a.BMP": ("images/a.BMP", False),
        "a.png": ("masks/a.png", True),
        "b.bmp": ("images/b.bmp", False),
        "b.PNG": ("masks/b.PNG", True),
    }


def test_separating_moves_nothing(tree, tmp_path):
    mixed = tree("mixed", "a.png", "a_mask.png")
    separate(mixed, tmp_path / "out", mask_suffix="_mask")
    assert sorted(os.listdir(mixed)) == ["a.png", "a_mask.png"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        (["a.png", "b.png", "b_mask.png"], {"mask_suffix": "_mask"}, "a.png has no mask"),
        (["a.png", "a_m.png", "b_m.png"], {"mask_suffix": "_m"}, "b_m.png has no picture"),
        (
            ["a.png", "a.jpg", "a_mask.png"],
            {"mask_suffix": "_mask"},
            "a.jpg and a.png have one name",
        ),
        (
            ["a.bmp", "a.png", "b.tif"],
            {"image_ext": ".bmp", "mask_ext": ".png"},
            "b.tif ends neither in .bmp nor in .png",
        ),
    ],
)
def test_a_mixed_folder_that_does_not_fit_the_rule_is_refused(tree, tmp_path, names, rule, message):
    mixed = tree("mixed", *names)
    assert refusal(mixed, tmp_path, function=separate, **rule) == (
        f"{message}; correct the rule or the folder {mixed}"
    )
