# ruff: noqa: E501 (pinned messages are long)
"""`packing.propose_layout`, `shards.annotations.layouts`, `shards.annotations.ade20k`,
`shards.annotations.class_tables`.

Layouts of public data sets are packed by name: pairs, splits, classes, colours and ignore.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.packing.colours import read_colour_table
from shards.annotations.ade20k import ADE20K
from shards.annotations.class_tables import CITYSCAPES_IDS, VOC
from shards.manifest import read_manifest

SIZE = (24, 16)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, *rows: int, palette: list[int] | None = None) -> np.ndarray:
    """Write a mask of equal bands of the given values; returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.repeat(np.array(rows, np.uint8), -(-SIZE[1] // len(rows)))[: SIZE[1], None]
    mask = np.ascontiguousarray(np.broadcast_to(mask, SIZE[::-1]))
    image = Image.fromarray(mask)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)
    return mask


def write_voc(root: Path) -> None:
    palette = [0] * 768
    for index, colour in enumerate(VOC.colours):
        palette[3 * index : 3 * index + 3] = colour
    palette[765:] = (224, 224, 192)
    for number, values in enumerate([(0, 15, 255), (0, 20), (0, 1, 255), (0, 2)]):
        write_image(root / "JPEGImages" / f"2007_{number}.jpg", number)
        write_mask(root / "SegmentationClass" / f"2007_{number}.png", *values, palette=palette)
    write_image(root / "JPEGImages" / "2007_9.jpg", 9)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_0\n2007_1\n")
    (lists / "val.txt").write_text("2007_2\n2007_3\n")
    (lists / "trainval.txt").write_text("2007_0\n2007_1\n2007_2\n2007_3\n")


def write_cityscapes(root: Path) -> None:
    for number, (split, city) in enumerate(
        [("train", "aachen"), ("train", "bonn"), ("val", "ulm")]
    ):
        stem = f"{split}/{city}/{city}_000000_00001{number}"
        write_image(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", number)
        write_mask(root / "gtFine" / f"{stem}_gtFine_labelIds.png", 0, 3, 7, 26, 33, 9)
        write_mask(root / "gtFine" / f"{stem}_gtFine_instanceIds.png", 1)
        (root / "gtFine" / f"{stem}_gtFine_polygons.json").write_text("{}")


def write_ade20k(root: Path) -> None:
    for number, split in enumerate(["training", "training", "validation"]):
        write_image(root / "images" / split / f"ADE_{number}.jpg", number)
        write_mask(root / "annotations" / split / f"ADE_{number}.png", 0, 1, 150)


def write_camvid(root: Path) -> None:
    for number, split in enumerate(["train", "train", "val", "test"]):
        write_image(root / split / f"{number}.png", number)
        write_mask(root / f"{split}annot" / f"{number}.png", 0, 3, 11)
        with (root / f"{split}.txt").open("a") as file:
            file.write(
                f"/SegNet/CamVid/{split}/{number}.png /SegNet/CamVid/{split}annot/{number}.png\n"
            )


def write_nnunet(root: Path, **more: object) -> None:
    for number in range(4):
        write_image(root / "imagesTr" / f"case_{number}_0000.png", number)
        write_mask(root / "labelsTr" / f"case_{number}.png", 0, 1, 2, 3)
    write_image(root / "imagesTs" / "case_9_0000.png", 9)
    labels = {"background": 0, "tumour": 1, "vessel": 2, "ignore": 3}
    plain = {"channel_names": {"0": "R"}, "labels": labels, "file_ending": ".png", **more}
    (root / "dataset.json").write_text(json.dumps(plain))


WRITERS = {
    "voc": write_voc,
    "cityscapes": write_cityscapes,
    "ade20k": write_ade20k,
    "camvid": write_camvid,
    "nnunet": write_nnunet,
}


@pytest.fixture
def pack(call, tmp_path: Path):
    """Write a layout, pack it with some flags, and return the command's result."""

    def run(name: str, *more: object, verb: str = "pack"):
        root = tmp_path / name
        if not root.exists():
            root.mkdir()
            WRITERS[name](root)
        return call(verb, "--layout", name, root, "--out", tmp_path / "out", *more)

    return run


def bands(*values: int) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8), -(-SIZE[1] // len(values)))[: SIZE[1]]


@pytest.mark.parametrize(
    ("name", "num_classes", "splits", "source", "column", "colour"),
    [
        ("voc", 21, {"train": 2, "val": 2}, "2007_0.jpg", bands(0, 15, 255), (192, 128, 128)),
        (
            *("cityscapes", 19, {"train": 2, "val": 1}),
            *("train/aachen/aachen_000000_000010_leftImg8bit.png", bands(255, 255, 0, 13, 18, 255)),
            (119, 11, 32),
        ),
        ("ade20k", 150, {"train": 2, "val": 1}, "training/ADE_0.jpg", bands(255, 0, 149), (92, 0, 255)),
        ("camvid", 11, {"train": 2, "val": 1, "test": 1}, "train/0.png", bands(0, 3, 255), (0, 128, 192)),
        ("nnunet", 3, None, "case_0_0000.png", bands(0, 1, 2, 255), None),
    ],
)  # fmt: skip
def test_a_layout_gives_classes_colours_splits_and_ignore(
    name, num_classes, splits, source, column, colour, pack, samples, tmp_path: Path
) -> None:
    ended = pack(name)
    assert ended.code == 0, ended.err
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest.classes) == num_classes
    if splits is not None:
        assert {key: split.samples for key, split in manifest.splits.items()} == splits
    if colour is not None:
        assert colour in manifest.palette[-1:] or colour in manifest.palette
    mask = samples(tmp_path / "out")[source].mask
    np.testing.assert_array_equal(mask, np.broadcast_to(column[:, None], mask.shape))


@pytest.mark.parametrize("name", WRITERS)
def test_check_takes_the_same_flags(name, pack) -> None:
    ended = pack(name, verb="check")
    assert ended.code == 0, ended.err
    assert "no problems found" in ended.out


def test_what_is_left_out_is_counted(pack, call, tmp_path: Path) -> None:
    assert "1 images without a segmentation are not packed" in pack("voc").out
    root = tmp_path / "nnunet"
    root.mkdir()
    write_nnunet(root)
    ended = call("pack", "--layout", "nnunet", root, "--out", tmp_path / "out2")
    assert "1 files of imagesTs are not packed" in ended.out


def test_cities_are_groups_and_all_labels_are_classes_on_request(pack, samples, tmp_path) -> None:
    assert pack("cityscapes", "--cityscapes-ids", "all").code == 0
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest.classes) == 34
    assert manifest.classes[26] == "car"
    sample = samples(tmp_path / "out")["val/ulm/ulm_000000_000012_leftImg8bit.png"]
    assert sample.raw.parse_info()["group"] == "ulm"
    assert sorted(np.unique(sample.mask)) == [0, 3, 7, 9, 26, 33]
    assert len(CITYSCAPES_IDS) == 19


def test_flags_override_what_a_layout_declares(pack, tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(11)]
    lists = tmp_path / "test.txt"
    (tmp_path / "train.txt").write_text("train/0.png\ntrain/1.png\nval/2.png\n")
    lists.write_text("test/3.png\n")
    more = ("--classes", *names, "--split-file", tmp_path / "train.txt", lists)
    ended = pack("camvid", *more)
    assert ended.code == 0, ended.err
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == tuple(names)
    assert {key: split.samples for key, split in manifest.splits.items()} == {"train": 3, "test": 1}


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("voc", "rm ImageSets/Segmentation/train.txt", "ImageSets/Segmentation has no train.txt; restore the list of the split"),
        ("voc", "rm JPEGImages/2007_1.jpg", "lists 2007_1, which has no .*JPEGImages/2007_1.jpg"),
        ("cityscapes", "rm gtFine/val/ulm/ulm_000000_000012_gtFine_labelIds.png", "has no mask .*gtFine_labelIds.png"),
        ("camvid", "rm valannot/2.png", "line 1 names valannot/2.png, missing in"),
        ("ade20k", "mv images/training/ADE_1.jpg images/training/ADE_7.jpg", "2 problems"),
        ("nnunet", "mv imagesTr/case_0_0000.png imagesTr/case_0_0000.nii.gz", "is a volume, and volumes are out of scope"),
        ("nnunet", "mv imagesTr/case_0_0000.png imagesTr/case_0_0001.png", "is a second channel; merge the channels"),
        ("nnunet", "rm dataset.json", "has no dataset.json; it looks like --layout nnunet"),
        ("nnunet", "write dataset.json {", "dataset.json is not valid JSON; copy it again"),
        ("nnunet", 'write dataset.json {"labels": {"a": [1, 2], "b": 1}}', "labels are regions"),
        ("nnunet", 'write dataset.json {"labels": {"a": 1, "b": 1}}', "a value of its own, 0 to 255"),
        ("nnunet", 'write dataset.json {"labels": {"a": 0, "b": 1}}', "has values without a class: 2"),
    ],
)  # fmt: skip
def test_damaged_layouts_are_named(name, break_it, message, pack, tmp_path: Path) -> None:
    root = tmp_path / name
    root.mkdir()
    WRITERS[name](root)
    action, path, *rest = break_it.split(" ", 2)
    match action:
        case "rm":
            (root / path).unlink()
        case "mv":
            (root / path).rename(root / rest[0])
        case _:
            (root / path).write_text(rest[0])
    ended = pack(name)
    assert ended.code == 1
    assert re.search(message, ended.err), ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--images", "x"), "--images has no effect with --layout, which names the folders"),
        (("--mask-suffix", "x"), "--mask-suffix has no effect with --layout"),
        (("--ignore-value", "3"), "--ignore-value has no effect with --layout, which declares the"),
        (("--overlap", "error"), "--overlap needs --annotations"),
        (("--cityscapes-ids", "all"), "--cityscapes-ids applies to --layout cityscapes only"),
        (("--classes", "a", "b"), "--classes: 2 names for the 21 classes of --layout voc"),
    ],
)
def test_flags_without_effect_are_refused(more, message, pack) -> None:
    ended = pack("voc", *more)
    assert ended.code == 2
    assert message in ended.message


def test_another_layout_is_named(call, tmp_path: Path) -> None:
    write_camvid(tmp_path)
    ended = call("pack", "--layout", "voc", tmp_path, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "has no JPEGImages; it looks like --layout camvid" in ended.err


@pytest.mark.parametrize("name", WRITERS)
def test_auto_prints_the_command_of_a_layout(name, call, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    ended = call("pack", "--layout", "auto", tmp_path, "--out", tmp_path / "out")
    assert ended.code == 0
    assert ended.out == f"unet pack --layout {name} {tmp_path} --out SHARDS\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.json", '{"images": [], "annotations": [], "categories": []}', "x.json --annotation-format coco"),
        ("l/a.json", '{"version": "5", "shapes": []}', "l --annotation-format labelme"),
        ("a.xml", '<?xml version="1.0"?><annotations/>', "a.xml --annotation-format cvat"),
        ("p.json", '[{"id": 1, "annotations": [], "data": {}}]', "p.json --annotation-format label-studio"),
        ("labels/a.txt", "0 0 0 1 0 1 1", "labels --annotation-format yolo"),
    ],
)  # fmt: skip
def test_auto_prints_the_command_of_annotations(name, content, expected, call, tmp_path) -> None:
    write_image(tmp_path / "images" / "a.png", 0)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    ended = call("check", "--layout", "auto", tmp_path, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    images = f"--images {tmp_path}/images --annotations {tmp_path}/{expected}"
    assert ended.out.splitlines()[0].removesuffix(" --classes class_0") == f"unet check {images}"
    ended = call("pack", "--layout", "auto", tmp_path, "--out", tmp_path / "out")
    assert ended.out.splitlines()[0].endswith(" --out SHARDS")


def test_auto_without_anything_known_is_an_error(call, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", 0)
    ended = call("pack", "--layout", "auto", tmp_path, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "has no layout and no annotations that are known" in ended.err


@pytest.mark.parametrize(
    ("table", "colours", "expected"),
    [
        ("voc", [(0, 0, 0), (128, 0, 0), (224, 224, 192)], [0, 1, 255]),
        ("cityscapes", [(128, 64, 128), (119, 11, 32), (0, 0, 0)], [0, 18, 255]),
        ("camvid", [(64, 128, 64), (64, 192, 0), (0, 0, 0)], [0, 30, 255]),
        ("ade20k", [(140, 140, 140), (92, 0, 255), (0, 0, 0)], [6, 148, 255]),
    ],
)
def test_known_colour_tables_are_named(table, colours, expected, call, samples, tmp_path) -> None:
    for number in range(2):
        write_image(tmp_path / "images" / f"{number}.png", number)
        (tmp_path / "masks").mkdir(exist_ok=True)
        rows = np.repeat(np.array(colours, np.uint8)[:, None], SIZE[0], axis=1)
        rows = np.resize(rows, (3, SIZE[0], 3))[np.arange(SIZE[1]) % 3]
        Image.fromarray(rows).save(tmp_path / "masks" / f"{number}.png")
    ended = call(
        "pack",
        *("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--mask-format", "rgb"),
        *("--colours", table, "--allow-absent-classes", "--out", tmp_path / "out"),
    )
    assert ended.code == 0, ended.err
    assert samples(tmp_path / "out")["0.png"].mask[:3, 0].tolist() == expected


def test_classes_of_ade20k_that_share_a_colour_are_one() -> None:
    table = read_colour_table(Path("ade20k"))
    assert (len(table.classes), table.ignore_colours) == (149, ((0, 0, 0),))
    colours = dict(zip(table.classes, table.colours, strict=True))
    assert colours["road or skyscraper"] == (140, 140, 140)
    # The checksum of the colours in color150.mat, which the authors of the benchmark publish.
    assert zlib.crc32(np.array(ADE20K.colours, np.uint8).tobytes()) == 3620555175
