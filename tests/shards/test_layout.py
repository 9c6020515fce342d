"""`folders.layout`, `folders.suffixes`.

Common public layouts: the folders of images and masks, what pairs them, and the decoys.
"""

from pathlib import Path

import pytest

from shards.folders.layout import find_layouts
from shards.folders.suffixes import FIRST_NUMBER
from shards.sample import DataError

LAYOUTS: dict[str, tuple[list[str], tuple[str, ...], tuple[str, ...], str]] = {
    "DRIVE": (
        [
            *("training/images/{2}_training.tif", "training/1st_manual/{2}_manual1.gif"),
            *("training/mask/{2}_training_mask.gif", "test/images/{1}_test.tif"),
            *("test/1st_manual/{1}_manual1.gif", "test/mask/{1}_test_mask.gif"),
        ],
        ("training/images", "test/images"),
        ("training/1st_manual", "test/1st_manual"),
        f"--pair-regex {FIRST_NUMBER}",
    ),
    "CamVid": (
        [f"{split}{end}/x{{{i}}}.png" for i, split in enumerate(("train", "val", "test"))
         for end in ("", "annot")],
        ("train", "val", "test"),
        ("trainannot", "valannot", "testannot"),
        "",
    ),
    "CVPPP": (
        ["A1/ara2013_plant{0}_rgb.png", "A1/ara2013_plant{0}_label.png"],
        ("A1",),
        ("A1",),
        "--image-suffix _rgb --mask-suffix _label",
    ),
    "CWFID": (
        ["images/{0}_image.png", "annotations/{0}_annotation.png", "masks/{0}_mask.png"],
        ("images",),
        ("annotations",),
        "--image-suffix _image --mask-suffix _annotation",
    ),
    "VOC": (
        ["JPEGImages/2007_{0}.jpg", "JPEGImages/2008_{1}.jpg", "SegmentationClass/2007_{0}.png",
         "SegmentationObject/2007_{0}.png"],
        ("JPEGImages",),
        ("SegmentationClass",),
        "",
    ),
    "Kvasir": (["images/c{0}.jpg", "masks/c{0}.jpg"], ("images",), ("masks",), ""),
    "images/train": (
        [f"{a}/{b}.png" for a in ("images", "labels") for b in ("train/{0}", "val/{1}")],
        ("images",),
        ("labels",),
        "",
    ),
    "isbi2012": (
        ["images/{0}.png", "masks/{0}.png", "unlabelled/{0}.png"],
        ("images",),
        ("masks",),
        "",
    ),
    "flat": (["cell{0}.png", "cell{0}_mask.png"], (".",), (".",), "--mask-suffix _mask"),
    "masks inside": (["d/{0}.jpg", "d/masks/{0}.png"], ("d",), ("d/masks",), ""),
    "mixed": (
        ["mixed/{0}.bmp", "mixed/{0}.png"],
        ("mixed",),
        ("mixed",),
        "--image-ext .bmp --mask-ext .png",
    ),
}  # fmt: skip


def make(root: Path, templates: list[str], count: int = 6) -> None:
    for template in templates:
        for i in range(count):
            numbers = [f"{start + i:03d}" for start in (100, 200, 300)]
            path = root / template.format(*numbers)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_common_layout_is_found(name: str, tmp_path: Path) -> None:
    templates, images, masks, flags = LAYOUTS[name]
    make(tmp_path, templates)
    best = find_layouts(tmp_path).layouts[0]
    assert (best.images, best.masks) == (images, masks)
    assert " ".join(best.fit.flags) == flags


@pytest.mark.parametrize(
    ("name", "decoy"),
    [("DRIVE", "training/mask test/mask"), ("CWFID", "masks (*_mask)"), ("VOC", "SegmentationObj")],
)
def test_decoys_are_candidates_too(name: str, decoy: str, tmp_path: Path) -> None:
    make(tmp_path, LAYOUTS[name][0])
    best, *others = find_layouts(tmp_path).layouts
    assert [x for x in others if x.images == best.images and x.mask_place.startswith(decoy)]


def test_a_folder_without_images_is_refused_with_what_it_has(tmp_path: Path) -> None:
    make(tmp_path, ["a/{0}.npy"])
    with pytest.raises(DataError, match=r"contains no images; it has 6 \.npy"):
        find_layouts(tmp_path)


def test_images_without_masks_have_no_layout(tmp_path: Path) -> None:
    make(tmp_path, ["images/a{0}.png"])
    assert find_layouts(tmp_path).layouts == []
