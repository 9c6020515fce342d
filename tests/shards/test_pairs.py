"""`folders.pairs`, `folders.splits`, `folders.split_names`, `folders.separation`, `folders.walk`,
`folders.pair_lists`.

Pairs of images and masks, splits, and the separation of mixed folders.
"""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.folders.pair_lists import read_pair_lists
from shards.folders.pairs import (
    Pair,
    PairRule,
    find_pairs,
    find_pairs_in_folders,
)
from shards.folders.separation import plan_separation
from shards.folders.split_names import find_declared_splits, find_named_split
from shards.folders.splits import SPLITS, SplitRule, hash_fraction
from shards.folders.walk import list_images
from shards.sample import DataError, format_problems, list_problems

PLAIN = PairRule()


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


def both(pairing):
    """Return [(image, mask)], asserting that nothing is refused or unpaired."""
    assert (pairing.refused, pairing.unpaired) == ([], [])
    return [(p.source, p.mask) for p in pairing.pairs]


def refusal(function, *arguments, **options):
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    return str(caught.value)


# -------------------------------------------------------------------------------------- pairing


def test_pairs_have_the_same_relative_path_except_for_the_extension(tree):
    images = tree("images", "b.jpg", "a.PNG")
    masks = tree("masks", "a.gif", "b.png")
    pairing = find_pairs(images, masks, PLAIN)
    assert pairing.pairs == [Pair("a.PNG", "a.gif"), Pair("b.jpg", "b.png")]
    assert [p.key for p in pairing.pairs] == ["a", "b"]
    assert (pairing.images, pairing.masks) == (images, masks)


def test_equal_names_in_different_folders_are_different_pairs(tree):
    images = tree("images", "x/a.jpg", "y/a.jpg", "a.jpg", "x/y/a.jpg")
    masks = tree("masks", "x/a.png", "y/a.png", "a.png", "x/y/a.png")
    pairing = find_pairs(images, masks, PLAIN)
    assert [p.key for p in pairing.pairs] == ["a", "x/a", "x/y/a", "y/a"]
    assert all(p.mask == f"{p.key}.png" for p in pairing.pairs)


def test_the_extension_starts_at_the_last_dot(tree):
    images, masks = tree("images", "a.b.jpg", "a.c.jpg"), tree("masks", "a.b.png", "a.c.png")
    pairs = find_pairs(images, masks, PLAIN).pairs
    assert [(p.key, p.source) for p in pairs] == [("a%2Eb", "a.b.jpg"), ("a%2Ec", "a.c.jpg")]


def test_suffixes_are_removed_before_pairing(tree):
    images = tree("images", "car_01.jpg", "car_02.jpg")
    masks = tree("masks", "car_01_mask.gif", "car_02_mask.gif")
    assert both(find_pairs(images, masks, PairRule(mask_suffix="_mask"))) == [
        ("car_01.jpg", "car_01_mask.gif"),
        ("car_02.jpg", "car_02_mask.gif"),
    ]


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("{}_sat.jpg", "{}_mask.png"), {"image_suffix": "_sat", "mask_suffix": "_mask"}),
        (("{}.png", "{}_mask.png"), {"mask_suffix": "_mask"}),
        (("{}_im.png", "{}.png"), {"image_suffix": "_im"}),
        (("{}.jpg", "{}.png"), {"image_ext": "jpg", "mask_ext": ".PNG"}),
        (("{}.JPG", "{}.png"), {"image_ext": ".jpg"}),
        (("{}.jpg", "{}.png"), {"mask_ext": "png"}),
        (("s/{}.jpg", "s/{}_m.png"), {"mask_suffix": "_m", "mask_ext": "png"}),
        (("im_{}.jpg", "gt_{}.png"), {"mask_ext": "png", "regex": r"_(\d+)"}),
    ],
)
def test_images_and_masks_may_share_a_folder_if_a_rule_distinguishes_them(tree, names, rule):
    one, other = (tuple(name.format(number) for name in names) for number in (1, 2))
    folder = tree("both", *one, *other)
    assert both(find_pairs(folder, folder, PairRule(**rule))) == [one, other]
    assert both(find_pairs(folder, folder / ".", PairRule(**rule))) == [one, other]


def test_one_folder_for_both_is_refused_with_the_remedy(tree):
    folder = tree("both", "a.jpg")
    for rule in (PLAIN, PairRule(regex=r"\d"), PairRule(image_ext="png", mask_ext=".PNG")):
        assert refusal(find_pairs, folder, folder, rule) == (
            f"images and masks share the folder {folder}; distinguish them with --mask-suffix "
            "or --image-ext and --mask-ext, or split the folder with unet separate"
        )


def test_files_in_a_shared_folder_that_match_no_rule_are_reported(tree):
    folder = tree("both", "a.jpg", "a.png", "b.tif")
    pairing = find_pairs(folder, folder, PairRule(image_ext="jpg", mask_ext="png"))
    assert pairing.pairs == [Pair("a.jpg", "a.png")]
    assert pairing.unpaired == [
        f"{folder / 'b.tif'} matches neither the rule for images nor that for masks"
    ]


def test_files_that_match_no_rule_are_reported(tree):
    images = tree("images", "a.jpg", "a.png")
    masks = tree("masks", "a_m.png", "a_n.png")
    pairing = find_pairs(images, masks, PairRule(image_ext="jpg", mask_suffix="_m"))
    assert pairing.pairs == [Pair("a.jpg", "a_m.png")]
    assert pairing.unpaired == [
        f"{images / 'a.png'} does not match the rule for images",
        f"{masks / 'a_n.png'} does not match the rule for masks",
    ]


@pytest.mark.parametrize(
    ("regex", "image_names", "mask_names"),
    [
        (r"\d+", ("im_01.jpg", "im_02.jpg"), ("gt01.png", "gt02.png")),
        (r"(\d+)\D*$", ("im_1_7.jpg", "im_2_8.jpg"), ("gt/7.png", "gt/8.png")),
        (r"p(\d)_s(\d)", ("p1_s2.jpg", "p2_s1.jpg"), ("mask-p1_s2.png", "mask-p2_s1.png")),
        (r"^(?:im|gt)-(\w)(-x)?", ("im-a.jpg", "im-a-x.jpg"), ("gt-a.png", "gt-a-x.png")),
    ],
)
def test_a_pattern_pairs_by_its_groups_or_its_match(tree, regex, image_names, mask_names):
    images, masks = tree("images", *image_names), tree("masks", *mask_names)
    expected = sorted(zip(image_names, mask_names, strict=True))
    assert both(find_pairs(images, masks, PairRule(regex=regex))) == expected


def test_groups_of_a_pattern_are_compared_separately(tree):
    images, masks = tree("images", "1-23.png", "12-3.png"), tree("masks", "12-3.png", "1-23.png")
    assert both(find_pairs(images, masks, PairRule(regex=r"(\d+)-(\d+)"))) == [
        ("1-23.png", "1-23.png"),
        ("12-3.png", "12-3.png"),
    ]


def test_two_images_with_the_same_match_are_both_named(tree):
    images, masks = tree("images", "a1.png", "b1.png", "c2.png"), tree("masks", "1.png", "2.png")
    pairing = find_pairs(images, masks, PairRule(regex=r"\d"))
    assert pairing.pairs == [Pair("c2.png", "2.png")]
    assert pairing.refused == [f"{images / 'a1.png'} and b1.png have the same name"]


def test_an_invalid_pattern_is_refused():
    with pytest.raises(
        ValueError, match=r"--pair-regex '\(' is not a regular expression: missing \)"
    ):
        PairRule(regex="(")
    with pytest.raises(
        ValueError, match=r"--group-by '\(' is not a regular expression: missing \)"
    ):
        SplitRule(group_by="(")


def test_hidden_files_and_folders_and_other_files_are_ignored(tree):
    images = tree(
        "images", "a.jpg", ".b.jpg", ".cache/c.jpg", "x/.d.jpg", "Thumbs.db", "notes.txt", "jpg"
    )
    refused = []
    assert list_images(images, refused) == ["a.jpg"]
    assert refused == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ct.nii.gz", "a volume; export each slice as a PNG of 8 or 16 bits"),
        ("ct.DCM", "a volume; export each slice as a PNG of 8 or 16 bits"),
        (
            "s.svs",
            "a microscope or slide scanner container; export its images as TIFF or PNG",
        ),
        ("photo.HEIC", "an image in an unsupported format; convert it to PNG or TIFF"),
        ("x.npy", "an image in an unsupported format; convert it to PNG or TIFF"),
    ],
)
def test_images_in_unsupported_formats_are_reported_not_skipped(tree, name, what):
    images, masks = tree("images", "a.jpg", f"b/{name}"), tree("masks", "a.png", name)
    line = f"{images / 'b' / name} is {what}"
    assert find_pairs(images, None, PLAIN).refused == [line]
    pairing = find_pairs(images, masks, PLAIN)
    assert pairing.pairs == [Pair("a.jpg", "a.png")]
    assert pairing.refused == [line, f"{masks / name} is {what}"]


def test_a_folder_of_only_unsupported_files_reports_each(tree):
    images = tree("images", "a.dcm")
    assert len(find_pairs(images, None, PLAIN).refused) == 1
    pairing = find_pairs(images, tree("masks", "a.png"), PLAIN)
    assert (pairing.pairs, len(pairing.refused)) == ([], 1)


def test_images_without_a_mask_folder_are_unlabelled(tree):
    images = tree("images", "b.jpg", "a.jpg")
    assert both(find_pairs(images, None, PLAIN)) == [("a.jpg", None), ("b.jpg", None)]


def test_files_with_the_same_name_are_reported_and_left_out(tree):
    images, masks = tree("images", "a.jpg", "b.jpg"), tree("masks", "a.png", "a.tif", "b.png")
    pairing = find_pairs(images, masks, PLAIN)
    assert pairing.pairs == [Pair("b.jpg", "b.png")]
    assert pairing.refused == [f"{masks / 'a.png'} and a.tif have the same name"]
    images = tree("more", "a.jpg", "a.png", "a.tif", "b.png")
    pairing = find_pairs(images, None, PLAIN)
    assert pairing.pairs == [Pair("b.png", None)]
    assert pairing.refused == [f"{images / 'a.jpg'} and a.png, a.tif have the same name"]


@pytest.mark.parametrize("labelled", [True, False])
def test_paired_images_with_the_same_key_are_reported_and_left_out(tree, labelled):
    images = tree("images", "a.jpg", "a.png", "b.png")
    masks = tree("masks", "jpg.png", "png.png", "b.png") if labelled else None
    pairing = find_pairs(images, masks, PairRule(regex=r"^b|jpg|png"))
    assert [p.source for p in pairing.pairs] == ["b.png"]
    assert pairing.refused == [f"{images / 'a.jpg'} and a.png have the same name"]


def test_unpaired_files_are_listed_images_first(tree):
    images, masks = tree("images", "a.jpg", "b.jpg", "c.jpg"), tree("masks", "a.png", "z.png")
    pairing = find_pairs(images, masks, PLAIN)
    assert pairing.pairs == [Pair("a.jpg", "a.png")]
    assert pairing.unpaired == [
        f"{images / 'b.jpg'} has no mask in {masks}",
        f"{images / 'c.jpg'} has no mask in {masks}",
        f"{masks / 'z.png'} has no image in {images}",
    ]


def test_one_problem_is_formatted_as_one_line():
    assert format_problems(["a.png has no mask"], "draw it") == "a.png has no mask; draw it"


@pytest.mark.parametrize(("count", "rest"), [(20, None), (21, "and 1 more"), (65, "and 45 more")])
def test_twenty_kinds_of_problems_are_listed_and_the_others_counted(count, rest):
    kinds = [f"{chr(97 + i // 26)}{chr(97 + i % 26)} is wrong" for i in range(count)]
    lines = format_problems(kinds, "fix them").splitlines()
    assert lines[0] == f"{count} problems (fix them):"
    assert [line.strip() for line in lines[1:21]] == kinds[:20]
    assert [line.strip() for line in lines[21:]] == ([rest] if rest else [])


def test_problems_that_differ_only_in_names_and_numbers_are_one_line():
    """Also in paths with spaces, keys, class names, line numbers and sizes; never in words."""
    empty = [f"/my data/{n}.png is empty; repair it" for n in range(9)]
    lines = [f"l.txt, line {n}: {n}.png is listed twice" for n in range(4)]
    values = [f"m/{n}.png has values without a class: {n}: 5 px" for n in range(3)]
    classes = [f"class {name!r} has no pixel in 12 masks" for name in ("cell", "nerve root")]
    keys = [f"000{n} is in train-0.tar and in train-1.tar" for n in range(3)]
    listed = [f"l.txt, line 1 lists {n}, which is not one of the images" for n in ("a b", "c")]
    alone = ["m/1.png is damaged", "m/1.png has no image"]
    assert list_problems(
        [*empty, *lines, *values, *classes, *keys, *listed, *alone, "same", "same"]
    ) == [
        "/my data/0.png is empty (and 8 more: data/1.png, data/2.png, ...); repair it",
        "l.txt, line 0: 0.png is listed twice (and 3 more: 1 1.png, 2 2.png, ...)",
        "m/0.png has values without a class: 0: 5 px (and 2 more: m/1.png 1, m/2.png 2)",
        "class 'cell' has no pixel in 12 masks (and 1 more: 'nerve root')",
        "0000 is in train-0.tar and in train-1.tar (and 2 more: 0001, 0002)",
        "l.txt, line 1 lists a b, which is not one of the images (and 1 more: c)",
        *alone,
        "same (2 times)",
    ]


def test_folders_without_any_pair_are_refused_with_examples(tree):
    images, masks = tree("images", "b.jpg", "a.jpg"), tree("masks", "a_m.png")
    assert refusal(find_pairs, images, masks, PLAIN) == (
        f"no image in {images} has a mask of the same name in {masks} (for example: a.jpg and "
        "a_m.png); see --image-suffix, --mask-suffix, --pair-regex and --pairs"
    )
    assert "(for example: a.jpg and nothing)" in refusal(
        find_pairs, images, masks, PairRule(mask_suffix="_x")
    )


def test_a_count_with_thousands_separators_is_one_number() -> None:
    counts = ("204,652", "652", "1,202,509")
    assert list_problems([f"d/{n}.png has 255: {count} px" for n, count in enumerate(counts)]) == [
        "d/0.png has 255: 204,652 px (and 2 more: d/1.png 652, d/2.png 1,202,509)"
    ]


def test_a_missing_or_empty_folder_is_named(tree, tmp_path):
    missing = tmp_path / "none"
    assert (
        refusal(find_pairs, missing, None, PLAIN)
        == f"--images {missing}: does not exist; check the path"
    )
    file = tree("files", "a.png") / "a.png"
    assert (
        refusal(find_pairs, file, None, PLAIN)
        == f"--images {file}: is a file, not a directory; use its directory {file.parent}"
    )
    empty = tree("empty", "notes.txt")
    line = f"{empty} contains no images (.bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp)"
    assert refusal(find_pairs, empty, None, PLAIN) == line
    assert refusal(find_pairs, tree("images", "a.png"), empty, PLAIN) == line


def test_pairs_do_not_depend_on_the_order_of_the_directory(tree, tmp_path, monkeypatch):
    names = [f"{i}/p{j}.png" for i in range(3) for j in range(3)]
    images, masks = tree("images", *names), tree("masks", *names)
    tree("elsewhere", "q.png", "deep/q.png")
    for folder in (images, masks):
        for link in ("1/more", "again", "0/other"):
            (folder / link).symlink_to(tmp_path / "elsewhere")
        (folder / "3").symlink_to(folder / "0")
    expected = find_pairs(images, masks, PLAIN)
    assert [p.source for p in expected.pairs if "q" in p.source] == [
        f"{link}/{name}"
        for link in ("0/other", "1/more", "3/other", "again")
        for name in ("deep/q.png", "q.png")
    ]
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert find_pairs(images, masks, PLAIN) == expected


def test_linked_folders_are_followed_but_not_in_cycles(tree, tmp_path):
    elsewhere = tree("elsewhere", "b.png")
    images = tree("images", "a.png", "x/c.png")
    (images / "linked").symlink_to(elsewhere)
    (images / "linked2").symlink_to(elsewhere)
    (images / "x/up").symlink_to(images)
    (elsewhere / "back").symlink_to(elsewhere)
    (images / "d.png").symlink_to(elsewhere / "b.png")
    names = ["a.png", "d.png", "linked/b.png", "linked2/b.png", "x/c.png"]
    assert list_images(images) == names


def test_the_folder_itself_may_be_a_link(tree, tmp_path):
    real = tree("real", "a.png")
    (tmp_path / "link").symlink_to(real)
    assert both(find_pairs(tmp_path / "link", None, PLAIN)) == [("a.png", None)]


# --------------------------------------------------------------------------------- lists of pairs


@pytest.fixture
def lists(tree, tmp_path):
    """lists("pairs.txt", text) -> path of a list beside images/ and masks/."""
    tree("images", "a.jpg", "b c.jpg", "x/a.jpg")
    tree("masks", "a.png", "b c.png", "z.png")

    def make(name, text, encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    return make


TWO = [("images/a.jpg", "masks/a.png"), ("images/x/a.jpg", "masks/z.png")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "images/a.jpg masks/a.png\nimages/x/a.jpg masks/z.png\n"),
        ("p.lst", "images/a.jpg\tmasks/a.png\n\n  \nimages/x/a.jpg   masks/z.png"),
        ("p.txt", "# drawn by hand\nimages/a.jpg masks/a.png\r\nimages/x/a.jpg masks/z.png\r\n"),
        ("p.csv", "images/a.jpg,masks/a.png\nimages/x/a.jpg, masks/z.png\n"),
        ("p.csv", 'Image,Mask\n"images/a.jpg","masks/a.png"\nimages/x/a.jpg,masks/z.png\n'),
        ("p.CSV", "image,mask\nimages/a.jpg,masks/a.png\nimages/x/a.jpg,masks/z.png\n"),
        ("p.tsv", "image\tmask\nimages/a.jpg\tmasks/a.png\nimages/x/a.jpg\tmasks/z.png\n"),
        ("p.txt", "image mask\nimages/x/a.jpg masks/z.png\nimages/./a.jpg masks/q/../a.png\n"),
        ("p.txt", "\ufeffimages/a.jpg masks/a.png\nimages/x/a.jpg masks/z.png\n"),
    ],
)
def test_a_list_has_an_image_and_its_mask_on_each_line(lists, tmp_path, name, text):
    pairing = read_pair_lists([lists(name, text)], None, None)
    assert both(pairing) == TWO
    assert (pairing.images, pairing.masks) == (tmp_path, tmp_path)


def test_paths_of_a_list_are_relative_to_the_declared_folders(lists, tmp_path):
    file = lists("p.txt", "a.jpg a.png\nx/a.jpg z.png\n")
    pairing = read_pair_lists([file], tmp_path / "images", tmp_path / "masks")
    assert both(pairing) == [("a.jpg", "a.png"), ("x/a.jpg", "z.png")]
    assert (pairing.images, pairing.masks) == (tmp_path / "images", tmp_path / "masks")


def test_names_with_spaces_need_a_csv(lists):
    pairing = read_pair_lists([lists("p.csv", "images/b c.jpg,masks/b c.png\n")], None, None)
    assert both(pairing) == [("images/b c.jpg", "masks/b c.png")]
    assert refusal(
        read_pair_lists, [lists("p.txt", "images/b c.jpg masks/b c.png\n")], None, None
    ).endswith(
        "p.txt, line 1: expected 2 names, an image and its mask, got 4; "
        "names with spaces need a .csv or .tsv"
    )


def test_lists_may_have_absolute_paths_and_paths_outside_their_folder(lists, tmp_path):
    file = lists("p.csv", f"{tmp_path}/images/a.jpg,{tmp_path}/masks/a.png\n")
    assert both(read_pair_lists([file], None, None)) == TWO[:1]
    (tmp_path / "lists").mkdir()
    inner = lists("lists/p.txt", "../images/a.jpg ../masks/a.png\n../images/x/a.jpg ../masks/z.png")
    pairing = read_pair_lists([inner], None, None)
    assert (pairing.images, pairing.masks) == (tmp_path / "images", tmp_path / "masks")
    assert both(pairing) == [("a.jpg", "a.png"), ("x/a.jpg", "z.png")]


def test_several_lists_are_concatenated(lists):
    files = [
        lists("p.txt", "images/a.jpg masks/a.png\n"),
        lists("q.csv", "images/x/a.jpg,masks/z.png"),
    ]
    assert both(read_pair_lists(files, None, None)) == TWO


def test_one_mask_for_two_images_is_reported(lists, tmp_path):
    text = "images/a.jpg masks/a.png\nimages/x/a.jpg masks/a.png\n"
    pairing = read_pair_lists([lists("p.txt", text)], None, None)
    assert pairing.pairs == [Pair("images/a.jpg", "masks/a.png")]
    images = f"{tmp_path}/images"
    line = f"{tmp_path}/masks/a.png is listed for {images}/a.jpg and for {images}/x/a.jpg"
    assert pairing.refused == [line]


def test_wrong_lines_of_a_list_are_reported_and_left_out(lists, tmp_path, tree):
    tree("images", "a.png")
    text = (
        "images/a.jpg masks/a.png\n"
        "images/a.jpg masks/z.png\n"
        "images/no.jpg masks/z.png\n"
        "images/x/a.jpg masks/no.png\n"
    )
    pairing = read_pair_lists([lists("p.txt", text)], None, None)
    assert pairing.pairs == [Pair("images/a.jpg", "masks/a.png")]
    base = f"(paths in {tmp_path}/p.txt are relative to {tmp_path})"
    assert pairing.refused == [
        f"{tmp_path}/images/a.jpg is listed twice",
        f"{tmp_path}/images/no.jpg is listed but does not exist {base}",
        f"{tmp_path}/masks/no.png is listed but does not exist {base}",
    ]
    text = "images/a.jpg masks/a.png\nimages/a.png masks/z.png\n"
    pairing = read_pair_lists([lists("p.txt", text)], None, None)
    assert pairing.pairs == []
    assert pairing.refused == [f"{tmp_path}/images/a.jpg and images/a.png have the same name"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "{file} lists no pairs; write an image and its mask on each line"),
        ("p.csv", "image,mask\n# none\n", "{file} lists no pairs; write an image and its mask on"),
        (
            "p.txt",
            "a.jpg\n",
            "{file}, line 1: expected 2 names, an image and its mask, got 1; names",
        ),
        (
            "p.csv",
            "a.jpg,\n",
            "{file}, line 1: expected 2 names, an image and its mask, got 2; separate",
        ),
        (
            "p.csv",
            "a,b\nimage,mask\na,b,c\n",
            "{file}, line 3: expected 2 names, an image and its mask, got 3; ",
        ),
        (
            "p.tsv",
            "a.jpg,a.png\n",
            "{file}, line 1: expected 2 names, an image and its mask, got 1; ",
        ),
        (
            "p.csv",
            "x" * 200_000 + ",b\n",
            "{file}, line 1: expected 2 names, an image and its mask, got 0; ",
        ),
    ],
)
def test_lines_that_are_not_a_pair_are_refused(lists, name, text, message):
    file = lists(name, text)
    error = refusal(read_pair_lists, [file], None, None)
    assert error.startswith(message.format(file=file))
    assert "\n" not in error


def test_a_list_that_is_not_utf8_is_refused(lists):
    file = lists("p.txt", "größe.jpg größe.png\n", "latin-1")
    assert refusal(read_pair_lists, [file], None, None) == (
        f"{file} is not UTF-8 text; save it as UTF-8"
    )


# --------------------------------------------------------------------------------------- splits


def pairs_named(*sources):
    return [Pair(source, None) for source in sources]


def splits_of(pairs, val=0.2, test=0.2, **rule):
    # The size of a fold is determined by their number.
    fractions = {"test_fraction": test} | ({} if "fold" in rule else {"val_fraction": val})
    splits, _ = SplitRule(**fractions, **rule).assign_splits(pairs)
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


def test_adding_data_never_changes_the_split_of_a_sample():
    for rule in ({}, {"fold": (2, 5)}, {"group_by": r"patient\d+"}):
        subset, everything = splits_of(MANY[::7], **rule), splits_of(MANY, **rule)
        assert set(subset.values()) == {"train", "val", "test"}
        assert subset.items() <= everything.items()


@given(st.floats(0, 0.5), st.floats(0, 0.49))
def test_raising_a_fraction_only_moves_samples_into_it(low, more):
    before, after = splits_of(MANY, low, 0), splits_of(MANY, low + more, 0)
    assert all(after[name] == "val" for name, split in before.items() if split == "val")


def test_fractions_are_met_approximately_and_may_be_zero():
    of = list(splits_of(MANY).values())
    assert 50 < of.count("val") < 110
    assert 50 < of.count("test") < 110
    assert set(splits_of(MANY, 0, 0).values()) == {"train"}


@given(st.integers(2, 12), st.sampled_from([0, 0.1, 1 / 3, 0.9]))
def test_each_sample_is_val_in_exactly_one_fold_and_test_in_all_or_none(count, test):
    some = MANY[::8]
    folds = [splits_of(some, 0, test, fold=(i, count)) for i in range(1, count + 1)]
    for p in some:
        found = [fold[p.source] for fold in folds]
        if "test" in found:
            assert found == ["test"] * count
        else:
            assert sorted(found) == ["train"] * (count - 1) + ["val"]


def test_folds_are_about_equal_and_the_test_split_keeps_its_fraction():
    for test in (0, 0.25):
        for number in range(1, 6):
            of = list(splits_of(MANY, 0.1, test, fold=(number, 5)).values())
            assert abs(of.count("val") - 400 * (1 - test) / 5) < 30
            assert abs(of.count("test") - 400 * test) < 35


@pytest.mark.parametrize("rule", [{}, {"fold": (1, 3)}])
def test_a_group_never_spans_two_splits(rule):
    splits = splits_of(MANY, group_by=r"patient\d+", **rule)
    by_group = {}
    for source, split in splits.items():
        by_group.setdefault(source.split("/")[0], set()).add(split)
    assert len(by_group) == 40
    assert all(len(of) == 1 for of in by_group.values())
    assert {s for of in by_group.values() for s in of} == {"train", "val", "test"}


def test_a_group_is_the_capture_group_or_the_match():
    pairs = pairs_named("patient7/x.png")
    for expression, group in ((r"patient(\d+)", "7"), (r"patient\d+", "patient7"), (None, None)):
        _, groups = SplitRule(group_by=expression).assign_splits(pairs)
        assert groups == [group]


def test_an_image_without_a_group_is_refused():
    rule = SplitRule(group_by="car_(.*)")
    assert refusal(rule.assign_splits, pairs_named("car_1.png", "b.png")) == (
        "b.png does not match --group-by 'car_(.*)'; widen the pattern"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val_fraction": -0.1}, "--val-fraction must be between 0 and 1, got -0.1"),
        ({"test_fraction": 1.5}, "--test-fraction must be between 0 and 1, got 1.5"),
        (
            {"val_fraction": float("nan")},
            "--val-fraction must be between 0 and 1, got nan",
        ),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "nothing is left to train on; lower one"),
        ({"fold": (0, 5)}, "--fold must be i/k with i from 1 to k and at least 2 folds"),
        ({"fold": (6, 5)}, "--fold must be i/k with i from 1 to k and at least 2 folds"),
        ({"fold": (1, 1)}, "--fold must be i/k with i from 1 to k and at least 2 folds"),
        (
            {"by_folder": True, "files": (Path("s.csv"),)},
            "--split-file and --split-folders both define the splits; use one of them",
        ),
    ],
)
def test_contradictory_split_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SplitRule(**fields)


def test_the_first_folder_of_a_path_may_be_its_split():
    names = ("train/a.png", "Val/a.png", "test/x/a.png", "training/b.png", "validation/val/b.png")
    splits, groups = SplitRule(by_folder=True).assign_splits(pairs_named(*names))
    assert splits == ["train", "val", "test", "train", "val"]
    assert groups == [None] * 5


def test_an_image_outside_the_split_folders_is_refused():
    rule = SplitRule(by_folder=True)
    assert refusal(rule.assign_splits, pairs_named("train/a.png", "dev/a.png")) == (
        "dev/a.png is not in a folder named train, val or test; "
        "--split-folders needs them at the top of --images"
    )
    assert "train.png is not in a folder" in refusal(rule.assign_splits, pairs_named("train.png"))


# ------------------------------------------------------------------------------------ split files


@pytest.fixture
def files(tmp_path):
    """files(("split.csv", text), ...) -> a rule that reads these files, in this order."""

    def make(*named):
        paths = []
        for name, text in named:
            paths.append(tmp_path / name)
            paths[-1].write_text(text, encoding="utf-8")
        return SplitRule(files=tuple(paths))

    return make


PAIRS = pairs_named("a.png", "x/b.png", "c d.png")
LISTED = ["train", "val", "test"]


@pytest.mark.parametrize(
    "text",
    [
        "path,split\na.png,train\nx/b.png,val\nc d.png,test\n",
        "\ufeffpath,split\nc d.png,test\nx/b.png,val\na.png,train\n",
        'note,path,split\n,c d.png,test\n"a, b",x/b.png,val\n,a.png,train\n',
        "split,path\ntest,c d.png\nval,x/b.png\ntrain,a.png\n",
        "path, split\na, train\n\nx/b, val\nc d, test\n,\n",
    ],
)
def test_a_split_file_may_have_any_order_and_other_columns(files, text):
    rule = files(("split.csv", text))
    assert rule.assign_splits(PAIRS)[0] == LISTED


@pytest.mark.parametrize(
    "named",
    [
        [("train.txt", "a.png\n"), ("val.txt", "x/b.png\n"), ("test.txt", "c d.png\n")],
        [("test.txt", "c d\n"), ("Training.txt", "a\n"), ("validation.lst", "# b\n\nx/b\n")],
        [("train.txt", "a.png masks/a.png\nc d.png\n"), ("val.csv", "x/b.png,masks/b.png\n")],
    ],
)
def test_lists_named_after_their_split_may_omit_extensions_or_list_masks(files, named):
    splits, _ = files(*named).assign_splits(PAIRS)
    expected = ["train", "val", "train"] if len(named) == 2 else LISTED
    assert splits == expected


def test_a_split_file_can_be_combined_with_groups(files, tmp_path):
    text = "path,split\na.png,train\nx/b.png,val\nc d.png,test\n"
    rule = SplitRule(files=files(("split.csv", text)).files, group_by="[abc]")
    assert rule.assign_splits(PAIRS) == (LISTED, ["a", "b", "c"])


def test_a_full_name_takes_precedence_over_a_name_without_extension(files):
    pairs = pairs_named("a.png", "a.png.jpg")
    rule = files(("train.txt", "a.png\n"), ("val.txt", "a.png.jpg\n"))
    assert rule.assign_splits(pairs)[0] == ["train", "val"]


LIST_ONCE = "list every image exactly once"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            [("split.csv", "a.png,train\n")],
            "{0} must start with the line path,split or be named train.txt, val.txt or test.txt; "
            "rename it or add that line",
        ),
        (
            [("split.csv", "")],
            "{0} must start with the line path,split or be named train.txt, val.txt or test.txt; "
            "rename it or add that line",
        ),
        (
            [("s.csv", "path,split\na.png,train\nx/b.png,dev\nc d.png,val\n")],
            "{0}, line 3: 'dev' is not one of train, val, test; correct it",
        ),
        (
            [("s.csv", "path,split\na.png,train\nx/b.png,\nc d.png,val\n")],
            "{0}, line 3: '' is not one of train, val, test; correct it",
        ),
        (
            [("s.csv", "path,split\na.png,train\nx/b.png\nc d.png,val\n")],
            "{0}, line 3 is not of the form path,split: 'x/b.png'; correct it",
        ),
        (
            [("s.csv", "path,split\na.png,train,val\n")],
            "{0}, line 2 is not of the form path,split: 'a.png,train,val'; correct it",
        ),
        (
            [("s.csv", "path,split\na.png,train\nx/b.png,val\na.png,train\nc d.png,val\n")],
            "{0}, line 4: a.png is listed twice ({0}, line 2); " + LIST_ONCE,
        ),
        (
            [("s.csv", "path,split\na.png,train\nx/b.png,val\na,val\nc d.png,val\n")],
            "{0}, line 4: a is listed twice, in train ({0}, line 2) and in val; " + LIST_ONCE,
        ),
        (
            [("s.csv", "path,split\na.png,train\nc d.png,val\n")],
            "x/b.png is not in {0}; " + LIST_ONCE,
        ),
        (
            [("s.csv", "path,split\na.png,train\nx/b.png,val\nc d.png,val\ne.png,val\n")],
            "{0}, line 5 lists e.png, which is not one of the images; " + LIST_ONCE,
        ),
        (
            [("train.txt", "a.png\nx/b.png\nc d.png\n"), ("val.txt", "x/b\n")],
            "{1}, line 1: x/b is listed twice, in train ({0}, line 2) and in val; " + LIST_ONCE,
        ),
        (
            [("train.txt", "a.png\n"), ("val.txt", "c d.png\n")],
            "x/b.png is not in {0} or {1}; " + LIST_ONCE,
        ),
        (
            [("train.txt", "a.png\nx/b.png\nc d.png\n,\n")],
            "{0}, line 4 lists ,, which is not one of the images; " + LIST_ONCE,
        ),
    ],
)
def test_split_files_that_do_not_match_the_images_are_refused(files, named, message):
    rule = files(*named)
    assert refusal(rule.assign_splits, PAIRS) == message.format(*rule.files)


def test_all_problems_of_a_split_file_are_reported_together(files):
    rule = files(("train.txt", "a.png\nno.png\n"))
    assert refusal(rule.assign_splits, PAIRS).splitlines() == [
        f"3 problems ({LIST_ONCE}):",
        f"  {rule.files[0]}, line 2 lists no.png, which is not one of the images",
        f"  x/b.png is not in {rule.files[0]}",
        f"  c d.png is not in {rule.files[0]}",
    ]


def test_a_split_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\xff\xfea")
    rule = SplitRule(files=(tmp_path / "train.txt",))
    assert refusal(rule.assign_splits, PAIRS) == (
        f"{tmp_path / 'train.txt'} is not UTF-8 text; save it as UTF-8"
    )


def test_the_names_of_the_splits_are_pinned():
    assert SPLITS == ("train", "val", "test")


# ----------------------------------------------------------------------------------- separation


def targets(plan, folder, out):
    return {
        str(s.source.relative_to(folder)): (str(s.target.relative_to(out)), s.is_mask) for s in plan
    }


def move(plan):
    for file in plan:
        file.target.parent.mkdir(parents=True, exist_ok=True)
        file.source.rename(file.target)


def test_a_mixed_folder_is_separated_by_suffix(tree, tmp_path):
    mixed = tree("mixed", "a.png", "a_mask.png", "x/a.jpg", "x/a_mask.png")
    assert targets(plan_separation(mixed, tmp_path, mask_suffix="_mask"), mixed, tmp_path) == {
        "a.png": ("images/a.png", False),
        "a_mask.png": ("masks/a.png", True),
        "x/a.jpg": ("images/x/a.jpg", False),
        "x/a_mask.png": ("masks/x/a.png", True),
    }


def test_a_mixed_folder_is_separated_by_extension_in_any_case(tree, tmp_path):
    mixed = tree("mixed", "a.BMP", "a.png", "b.bmp", "b.PNG")
    plan = plan_separation(mixed, tmp_path, image_ext=".bmp", mask_ext=".png")
    assert targets(plan, mixed, tmp_path) == {
        "a.BMP": ("images/a.BMP", False),
        "a.png": ("masks/a.png", True),
        "b.bmp": ("images/b.bmp", False),
        "b.PNG": ("masks/b.PNG", True),
    }


@pytest.mark.parametrize(
    ("pattern", "mask", "image"),
    [
        (r"_mask", "a_mask_01.png", "a_01.png"),
        (r"^gt_", "gt_a_01.png", "a_01.png"),
        (r"^(.*)/masks(/.*)$", "s/masks/a.png", "s/a.png"),
        (r"^labels/(.*)_L$", "labels/x/a_L.tif", "x/a.png"),
    ],
)
def test_a_mixed_folder_is_separated_by_a_pattern(tree, tmp_path, pattern, mask, image):
    mixed = tree("mixed", mask, image)
    stem = os.path.splitext(image)[0]
    assert targets(plan_separation(mixed, tmp_path, mask_pattern=pattern), mixed, tmp_path) == {
        mask: (f"masks/{stem}{os.path.splitext(mask)[1]}", True),
        image: (f"images/{image}", False),
    }


def test_planning_a_separation_moves_nothing(tree, tmp_path):
    mixed = tree("mixed", "a.png", "a_mask.png")
    plan_separation(mixed, tmp_path / "out", mask_suffix="_mask")
    assert sorted(os.listdir(mixed)) == ["a.png", "a_mask.png"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["out", "mixed/out", "mixed"])
@pytest.mark.parametrize("moved", [(), (0,), (1,), (0, 1, 2), (1, 3, 5), (0, 2, 4), (2, 3, 4)])
def test_an_interrupted_separation_can_be_resumed(tree, tmp_path, out, moved):
    mixed = tree("mixed", "a.png", "a_mask.png", "x/b.png", "x/b_mask.png", "c.jpg", "c_mask.png")
    target = tmp_path / out
    plan = plan_separation(mixed, target, mask_suffix="_mask")
    move([plan[i] for i in moved])
    rest = plan_separation(mixed, target, mask_suffix="_mask")
    assert rest == [file for i, file in enumerate(plan) if i not in moved]
    move(rest)
    assert list_images(target / "images") == ["a.png", "c.jpg", "x/b.png"]
    assert list_images(target / "masks") == ["a.png", "c.png", "x/b.png"]


def test_a_target_inside_the_folder_is_not_separated_again(tree, tmp_path):
    mixed = tree("mixed", "a.png", "a_mask.png", "separated/images/b.png", "separated2/c.png")
    (mixed / "separated2/c.png").unlink()
    plan = plan_separation(mixed, mixed / "separated", mask_suffix="_mask")
    assert [file.source.name for file in plan] == ["a.png", "a_mask.png"]


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        (["a.png", "b.png", "b_mask.png"], {"mask_suffix": "_mask"}, "a.png has no mask"),
        (["a.png", "a_m.png", "b_m.png"], {"mask_suffix": "_m"}, "b_m.png has no image"),
        (["a.png", "m-b.png", "b.png"], {"mask_pattern": "^m-"}, "a.png has no mask"),
        (
            ["a.png", "a.jpg", "a_mask.png"],
            {"mask_suffix": "_mask"},
            "a.jpg and a.png have the same name",
        ),
        (
            ["a.png", "m1-a.png", "m2-a.png"],
            {"mask_pattern": r"^m\d-"},
            "m1-a.png and m2-a.png have the same name",
        ),
        (
            ["a.bmp", "a.png", "b.tif"],
            {"image_ext": ".bmp", "mask_ext": ".png"},
            "b.tif ends neither in .bmp nor in .png",
        ),
    ],
)
def test_a_mixed_folder_that_does_not_match_the_rule_is_refused(
    tree, tmp_path, names, rule, message
):
    mixed = tree("mixed", *names)
    assert refusal(plan_separation, mixed, tmp_path, **rule) == (
        f"{message}; check --mask-suffix and the files in {mixed}"
    )


def test_a_group_that_spans_two_declared_splits_is_refused(tmp_path):
    names = ("train/patient1_a.png", "val/patient1_b.png", "val/patient2_a.png")
    rule = SplitRule(by_folder=True, group_by=r"patient(\d)")
    with pytest.raises(DataError) as error:
        rule.assign_splits(pairs_named(*names))
    assert str(error.value) == (
        "the group '1' is in train and val; correct the splits, or remove --group-by"
    )
    splits, groups = rule.assign_splits(pairs_named(*names[1:]))
    assert (splits, groups) == (["val", "val"], ["1", "2"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"fold": (1, 2), "val_fraction": 0.0}, "--val-fraction has no effect with --fold"),
        ({"by_folder": True, "test_fraction": 0.2}, "--test-fraction has no effect with --split"),
    ],
)
def test_a_fraction_without_effect_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        SplitRule(**rule)


# ------------------------------------------------------------------------ declared splits, and val


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("camvid_val", "val"), ("Validation-2", "val"), ("valid", "val")),
        *(("ISIC_Training_Input", "train"), ("test1", "test"), ("trainval", None)),
        *(("pairs", None), ("train_test", None), ("constrained", None)),
    ],
)
def test_a_word_of_a_name_declares_a_split(name, split):
    assert find_named_split(name) == split


def test_names_of_several_lists_set_the_split_of_their_pairs(lists):
    files = [
        lists("my_test.txt", "images/a.jpg masks/a.png\n"),
        lists("train.csv", "images/x/a.jpg,masks/z.png"),
    ]
    splits = find_declared_splits("--pairs", files)
    pairing = read_pair_lists(files, None, None, splits)
    assert SplitRule().assign_splits(pairing.pairs) == (["test", "train"], [None, None])


def test_lists_of_which_only_some_declare_a_split_are_refused():
    with pytest.raises(ValueError, match=r"--pairs b.txt: its name declares no split, but that of"):
        find_declared_splits("--pairs", [Path("train.txt"), Path("b.txt")])
    assert find_declared_splits("--pairs", [Path("a.txt"), Path("b.txt")]) == [None, None]
    assert find_declared_splits("--pairs", [Path("train.txt")]) == [None]


def test_names_of_several_folders_set_the_split_of_their_pairs(tree, tmp_path):
    folders = [tmp_path / name for name in ("test/images", "training/images")]
    masks = [tmp_path / name for name in ("test/1st_manual", "training/1st_manual")]
    tree("test", "images/1_x.png", "1st_manual/1_y.png")
    tree("training", "images/2_z.png", "1st_manual/2_y.png")
    splits = find_declared_splits("--images", folders)
    pairing = find_pairs_in_folders(folders, masks, PairRule(regex=r"(\d+)[^/]*$"), splits)
    assert pairing.images == pairing.masks == tmp_path
    assert pairing.pairs == [
        Pair("test/images/1_x.png", "test/1st_manual/1_y.png", "test"),
        Pair("training/images/2_z.png", "training/1st_manual/2_y.png", "train"),
    ]


TRAIN_TEST = pairs_named(*(f"train/{i}.png" for i in range(40)), "test/a.png", "test/b.png")


@pytest.mark.parametrize("setting", [{"val_fraction": 0.25}, {"fold": (2, 4)}])
def test_val_is_cut_out_of_a_declared_train(setting):
    splits, _ = SplitRule(by_folder=True, **setting).assign_splits(TRAIN_TEST)
    hashed, _ = SplitRule(**setting).assign_splits(TRAIN_TEST)
    assert splits == [*hashed[:40], "test", "test"]
    assert {"train", "val"} == set(splits[:40])


def test_without_a_fraction_a_declared_train_keeps_all_samples():
    splits, _ = SplitRule(by_folder=True).assign_splits(TRAIN_TEST)
    assert splits == ["train"] * 40 + ["test"] * 2


@pytest.mark.parametrize("setting", [{"val_fraction": 0.25}, {"fold": (2, 4)}])
def test_cutting_val_beside_a_declared_val_is_refused(setting):
    rule = SplitRule(by_folder=True, **setting)
    flag = "--fold" if "fold" in setting else "--val-fraction"
    message = refusal(rule.assign_splits, pairs_named("train/a.png", "val/b.png"))
    assert message.startswith(f"{flag} cuts val out of train, but the data declare val; remove")


@pytest.mark.parametrize("count", [2, 3, 9])
def test_an_empty_val_takes_the_next_sample_by_hash(count):
    sizes = []
    for seed in range(30):
        pairs = pairs_named(*(f"{seed}_{i}.png" for i in range(count)))
        notes = []
        splits, _ = SplitRule().assign_splits(pairs, notes)
        hashed = [SplitRule().hash_split(p.key) for p in pairs]
        if "val" in hashed:
            assert (splits, notes) == (hashed, [])
            continue
        first = min((p.key for p in pairs), key=hash_fraction)
        assert [p.key for p, s in zip(pairs, splits, strict=True) if s == "val"] == [first]
        assert [note.partition(";")[0] for note in notes] == [
            f"no sample hashes into val: {first}, of the lowest hash, is val"
        ]
        sizes.append(count)
    assert sizes


def test_val_stays_empty_for_those_who_mean_it():
    pairs = pairs_named("a.png", "b.png", "c.png")
    assert SplitRule(val_fraction=0).assign_splits(pairs)[0] == ["train"] * 3
    assert SplitRule().assign_splits(pairs[:1])[0] == ["train"]


def test_absolute_paths_of_a_split_file_that_exist_are_found(tree, tmp_path):
    images = tree("images", "a.png", "x/b.png")
    (tmp_path / "train.txt").write_text(f"{images}/a.png\n")
    (tmp_path / "val.txt").write_text("images/x/b.png\n")
    rule = SplitRule(files=(tmp_path / "train.txt", tmp_path / "val.txt"))
    pairing = find_pairs(images, None, PLAIN)
    notes: list[str] = []
    assert rule.assign_splits(pairing.pairs, notes)[0] == ["train", "val"]
    assert notes == []


@pytest.mark.parametrize("dead", ["/SegNet/CamVid/", "CamVid/", "C:\\Users\\me\\", "x/y/"])
def test_paths_of_another_machine_in_a_split_file_are_read_without_its_folders(tmp_path, dead):
    names = ["train/a.png", "train/b.png", "val/a.png"]
    listed = [dead + (name.replace("/", "\\") if "\\" in dead else name) for name in names]
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("".join(f"{name}\n" for name in listed[:2]))
    val.write_text(f"{listed[2]}\n")
    table = tmp_path / "splits.csv"
    rows = zip(listed, ("train", "train", "val"), strict=True)
    table.write_text("path,split\n" + "".join(f"{name},{split}\n" for name, split in rows))
    for files in ((train, val), (table,)):
        notes: list[str] = []
        splits, _ = SplitRule(files=files).assign_splits(pairs_named(*names), notes)
        assert splits == ["train", "train", "val"]
        assert len(notes) == len(files)
        assert notes[0].startswith(f"{files[0]}: no listed path exists here; ")
        assert notes[0].endswith(f"without their first folders: {listed[0]} is train/a.png")


def test_a_wrong_path_among_right_ones_is_not_read_without_its_folders(tmp_path):
    (tmp_path / "train.txt").write_text("a.png\nold/b.png\n")
    with pytest.raises(DataError, match=r"line 2 lists old/b.png, which is not one of the images"):
        SplitRule(files=(tmp_path / "train.txt",)).assign_splits(pairs_named("a.png", "b.png"))


def test_lists_of_which_no_path_exists_are_one_line_with_the_folder(lists, tmp_path):
    text = "".join(f"/gone/{i}.png /gone/m{i}.png\n" for i in range(30))
    error = refusal(read_pair_lists, [lists("p.txt", text)], None, None)
    assert error.startswith(f"{tmp_path}/p.txt: none of the 30 listed images exists, the first is")
    assert f"listed paths are relative to {tmp_path}: set --images and --masks" in error
    assert "\n" not in error


@pytest.mark.parametrize("dead", ["/SegNet/CamVid", "CamVid", "x/y"])
def test_folders_of_another_machine_are_replaced_by_the_given_root(lists, tmp_path, dead):
    for name in ("images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    text = "".join(f"{dead}/images/{n}.jpg {dead}/masks/{n}.png\n" for n in "abc")
    file = lists("p.txt", text)
    error = refusal(read_pair_lists, [file], None, None)
    remedy = f"without {dead} they exist in {tmp_path}; add --images {tmp_path} --masks {tmp_path}"
    assert error.endswith(remedy)
    pairing = read_pair_lists([file], tmp_path, tmp_path)
    assert [(p.source, p.mask) for p in pairing.pairs] == [
        ("images/a.jpg", "masks/a.png"),
        ("images/b.jpg", "masks/b.png"),
    ]
    assert len(pairing.refused) == 2
    note = f"{file}: {dead} does not exist here and is read as {tmp_path}, in 3 paths"
    assert pairing.notes == [note]


@pytest.mark.parametrize(
    ("images", "masks", "flags"),
    [
        ("{:03d}_image.png", "{:03d}_annotation.png", "--image-suffix _image --mask-suffix _ann"),
        ("{}.jpg", "{}_mask.gif", "--mask-suffix _mask pairs 9"),
        ("{}_training.tif", "{}_manual1.gif", "--image-suffix _training --mask-suffix _manual1"),
        ("raw_{:03d}.tif", "label-{:03d}.png", "--pair-regex '(\\d+)[^/]*$' pairs 9"),
        ("a{}.png", "b.png", "see --image-suffix, --mask-suffix, --pair-regex and --pairs"),
    ],
)
def test_folders_without_any_pair_are_refused_with_the_flags_that_pair_them(
    tree, images, masks, flags
):
    one = tree("images", *(images.format(i) for i in range(9)))
    other = tree("masks", *(masks.format(i) for i in range(9)))
    assert f"); {flags}" in refusal(find_pairs, one, other, PLAIN)
