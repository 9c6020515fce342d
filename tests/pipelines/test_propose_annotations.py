"""Annotations in a folder (`packing.propose_annotations`): the proposed command packs them."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest

SIZE = (20, 10)
TRIANGLE = [[0, 0], [10, 0], [0, 8]]
FLAT = [[0, 0, 10, 0, 0, 8]]


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((SIZE[1], SIZE[0], 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def make_coco(root: Path) -> str:
    write_images(root, *(f"pictures/train/{n}.jpg" for n in range(4)))
    size = {"width": SIZE[0], "height": SIZE[1]}
    plain = {
        "images": [{"id": n, "file_name": f"{n}.jpg", **size} for n in range(4)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 3, "segmentation": FLAT} for n in range(4)
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    write(root / "annotations" / "instances_train.json", plain)
    return "--images {}/pictures/train --annotations {}/annotations/instances_train.json"


def make_panoptic(root: Path) -> str:
    write_images(root, *(f"images/{n}.jpg" for n in range(4)))
    size = {"width": SIZE[0], "height": SIZE[1]}
    info = [{"id": 5, "category_id": 3}]
    plain = {
        "images": [{"id": n, "file_name": f"{n}.jpg", **size} for n in range(4)],
        "annotations": [
            {"image_id": n, "file_name": f"{n}.png", "segments_info": info} for n in range(4)
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    write(root / "annotations" / "panoptic.json", plain)
    (root / "annotations" / "panoptic").mkdir()
    for number in range(4):
        Image.new("RGB", SIZE, (5, 0, 0)).save(root / "annotations/panoptic" / f"{number}.png")
    return "--images {}/images --annotations {}/annotations/panoptic.json"


def make_labelme(root: Path) -> str:
    write_images(root, *(f"{n}.jpg" for n in range(4)))
    shape = {"label": "cat", "points": TRIANGLE, "shape_type": "polygon"}
    plain = {"version": "5", "shapes": [shape], "imageWidth": SIZE[0], "imageHeight": SIZE[1]}
    for number in range(4):
        write(root / f"{number}.json", plain)
    return "--images {} --annotations {}"


def make_cvat(root: Path) -> str:
    write_images(root, *(f"images/{n}.jpg" for n in range(4)))
    polygon = '<polygon label="cat" points="0,0;10,0;0,8"/>'
    entries = [
        f'<image id="{n}" name="images/{n}.jpg" width="20" height="10">{polygon}</image>'
        for n in range(4)
    ]
    write(root / "annotations.xml", f"<annotations>{''.join(entries)}</annotations>")
    return "--images {} --annotations {}/annotations.xml"


def make_label_studio(root: Path) -> str:
    write_images(root, *(f"media/0a1b2c3d-{n}.jpg" for n in range(4)))
    result = {
        "id": "r",
        "type": "polygonlabels",
        "original_width": SIZE[0],
        "original_height": SIZE[1],
        "value": {"points": TRIANGLE, "polygonlabels": ["cat"]},
    }
    tasks = [
        {
            "id": n,
            "data": {"image": f"/data/upload/1/0a1b2c3d-{n}.jpg"},
            "annotations": [{"id": n, "result": [result]}],
        }
        for n in range(4)
    ]
    write(root / "export.json", tasks)
    return "--images {}/media --annotations {}/export.json"


def make_yolo(root: Path) -> str:
    write_images(root, *(f"images/train/{n}.jpg" for n in range(4)))
    for number in range(4):
        write(root / "labels" / "train" / f"{number}.txt", "1 0 0 0.5 0 0 0.8\n")
    write(root / "train.txt", "./images/train/0.jpg\n")
    return "--images {}/images/train --annotations {}/labels/train"


MADE = {
    "coco": make_coco,
    "panoptic": make_panoptic,
    "labelme": make_labelme,
    "cvat": make_cvat,
    "label-studio": make_label_studio,
    "yolo": make_yolo,
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("way", ["check FOLDER", "--layout auto"])
def test_the_proposed_command_packs_the_annotations(kind, way, call, tmp_path: Path) -> None:
    root = tmp_path / "my data"
    expected = MADE[kind](root).format(*[shlex.quote(str(root))] * 2)
    if way == "check FOLDER":
        ended = call("check", root, "--out", tmp_path / "check", "--workers", 1)
    else:
        ended = call("pack", "--layout", "auto", root, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    ((line),) = [line for line in ended.out.splitlines() if line.startswith("unet pack ")]
    words = shlex.split(line)
    place = {"panoptic": "coco"}.get(kind, kind)
    assert words[2:8] == [*shlex.split(expected), "--annotation-format", place]
    assert "the class names are placeholders" in ended.out or kind != "yolo"
    words[words.index("SHARDS")] = str(tmp_path / "shards")
    ended = call(*words[1:])
    assert ended.code == 0, ended.err
    manifest = read_manifest(tmp_path / "shards")
    assert sum(split.samples for split in manifest.splits.values()) == 4
    assert len(manifest.classes) == 2 + (kind == "yolo")


def test_yolo_splits_side_by_side_are_proposed_one_by_one(call, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "valid"):
        write_images(root, f"{split}/images/a.jpg")
        write(root / split / "labels" / "a.txt", "0 0 0 0.5 0 0 0.8\n")
    write(root / "data.yaml", "names: [cat]\n")
    ended = call("pack", "--layout", "auto", root, "--out", tmp_path / "out")
    images, labels = f"{root}/train/images", f"{root}/train/labels"
    assert ended.out.splitlines() == [
        f"unet pack --images {images} --annotations {labels} --annotation-format yolo --out SHARDS",
        f"1 more yolo annotations, such as {root}/valid/labels: pack each into a folder of its own",
    ]


def test_annotations_beside_masks_are_an_alternative(call, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_cvat(root)
    (root / "masks").mkdir()
    for number in range(4):
        mask = np.zeros(SIZE[::-1], np.uint8)
        mask[2:5] = 1
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    ended = call("check", root, "--out", tmp_path / "check", "--workers", 1)
    assert ended.code == 0, ended.err
    assert f"unet pack --images {root}/images --masks {root}/masks --mask-format" in ended.out
    words = f"--images {root} --annotations {root}/annotations.xml --annotation-format cvat"
    assert f"unsure: annotations instead of masks: unet pack {words} --out SHARDS" in ended.out


def test_mask_format_auto_recognises_annotations(call, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_coco(root)
    folders = ("--images", root / "pictures", "--masks", root / "annotations")
    ended = call("pack", *folders, "--mask-format", "auto", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    images, file = f"{root}/pictures/train", f"{root}/annotations/instances_train.json"
    words = f"--images {images} --annotations {file} --annotation-format coco"
    assert ended.out == f"unet pack {words} --out SHARDS\n"


def test_texts_that_are_no_labels_are_not_annotations(call, tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a.jpg", "b.jpg")
    write(tmp_path / "data" / "a.txt", "a photo of a cat")
    ended = call("check", tmp_path / "data", "--out", tmp_path / "check")
    assert ended.code == 1
    assert "no two folders, suffixes or extensions pair images with masks" in ended.err
