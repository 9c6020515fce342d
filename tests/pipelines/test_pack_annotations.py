"""`packing.annotation_options`.

Packing annotations: the masks of the reference, byte-identical for any workers and kills.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from shards.manifest import read_manifest

COUNT, WIDTH, HEIGHT = 40, 40, 30


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 images, and instances.json with polygons of two classes on 38 of them."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(COUNT):
        name = f"sub/ä {number}.png"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
    for number in range(3 * COUNT):
        annotations.append(
            {
                "id": number,
                "image_id": number % (COUNT - 2),
                "category_id": (90, 7)[number % 2],
                "segmentation": [rng.uniform(0, 45, 12).round(2).tolist()],
                "iscrowd": 0,
            }
        )
    plain = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(plain, ensure_ascii=False))
    return folder


def flags(folder: Path, out: Path, *more: object, kind: str = "coco") -> list[object]:
    return [
        *("--images", folder / "images", "--annotations", folder / "instances.json"),
        *("--annotation-format", kind, "--out", out, *more),
    ]


SMALL = ("--samples-per-shard", 3)


@pytest.fixture(scope="module")
def packed(instances: Path, tmp_path_factory: pytest.TempPathFactory, call) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    ended = call("pack", *flags(instances, out, *SMALL, "--workers", 1))
    assert ended.code == 0, ended.err
    assert "2 images without annotations are all background" in ended.out
    return out


def test_unpacked_masks_are_those_of_pycocotools(
    instances: Path, packed: Path, call, tmp_path: Path
) -> None:
    assert read_manifest(packed).classes == ("background", "cat", "dog")
    assert call("unpack", "--data", packed, "--out", tmp_path / "back").code == 0
    api = COCO(str(instances / "instances.json"))
    for image in api.loadImgs(api.getImgIds()):
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        own = [
            (api.annToMask(a), a["category_id"]) for a in api.loadAnns(api.getAnnIds(image["id"]))
        ]
        for mask, category in sorted(own, key=lambda entry: -int(entry[0].sum())):
            expected[mask > 0] = {90: 1, 7: 2}[category]
        path = tmp_path / "back" / "masks" / Path(image["file_name"]).with_suffix(".png")
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


def test_two_workers_write_the_same_bytes(instances: Path, packed, call, content, tmp_path) -> None:
    assert call("pack", *flags(instances, tmp_path / "out", *SMALL, "--workers", 2)).code == 0
    assert content(tmp_path / "out") == content(packed)


def test_parts_write_the_same_bytes(instances: Path, packed, call, content, tmp_path) -> None:
    for part in ("2/2", "1/2"):
        ended = call("pack", *flags(instances, tmp_path / "out", *SMALL, "--part", part))
        assert ended.code == 0, ended.err
    assert call("pack", *flags(instances, tmp_path / "out", *SMALL, "--finish")).code == 0
    assert content(tmp_path / "out") == content(packed)


def test_after_a_kill_the_bytes_are_identical(
    instances: Path, packed, spawn, wait_for, kill, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("pack", *flags(instances, out, *SMALL, "--workers", 1))
    process = spawn(*command)
    wait_for(lambda: len([*out.glob("*.tar")]) >= 2, "shard 2", 60)
    kill(process)
    process = spawn(*command)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "already" in stdout
    assert content(out) == content(packed)


def test_a_rerun_recognises_the_data_set_and_other_settings(instances: Path, packed, call) -> None:
    ended = call("pack", *flags(instances, packed, *SMALL))
    assert (ended.code, "nothing to do" in ended.out) == (0, True)
    ended = call("pack", *flags(instances, packed, *SMALL, "--classes", "dog", "cat"))
    assert ended.code == 1
    assert "made from other files or with other settings" in ended.err


def test_check_reports_classes_and_draws_the_sheet(instances: Path, call, tmp_path: Path) -> None:
    ended = call("check", *flags(instances, tmp_path / "report", "--workers", 1))
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "report" / "check.json").read_text())
    assert list(report["classes"]) == ["background", "cat", "dog", "ignored"]
    assert (tmp_path / "report" / "sheet.png").exists()
    assert "have annotations that leave the image, which are clipped" in ended.out


def test_bad_annotations_are_refused_or_left_out(instances: Path, call, tmp_path: Path) -> None:
    plain = json.loads((instances / "instances.json").read_text())
    plain["annotations"][5]["segmentation"] = [[1, 2, 3]]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(plain))
    command = [*flags(instances, tmp_path / "out", *SMALL), "--annotations", bad]
    ended = call("pack", *command)
    assert ended.code == 1
    assert ended.err == (
        f"unet pack: {bad} (sub/ä 5.png): annotation 5: its polygon has 3 numbers, an odd count; "
        "correct or remove it; their shards were not written; --keep-going skips these files\n"
    )
    assert call("pack", *command, "--keep-going").code == 3
    samples = sum(s.samples for s in read_manifest(tmp_path / "out").splits.values())
    assert samples == COUNT - 1


def test_annotations_for_another_size_name_the_exif_orientation(call, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "images" / "a.jpg", exif=image.getexif())
    entry = {"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}
    region = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    plain = {"images": [entry], "annotations": [region], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "instances.json").write_text(json.dumps(plain))
    ended = call("pack", *flags(tmp_path, tmp_path / "out"))
    assert ended.code == 1
    assert (
        f"is 40 x 30, but its image {tmp_path}/images/a.jpg is 30 x 40; the image was rotated by "
        "its EXIF orientation: add --exif ignore to keep it unrotated"
    ) in ended.err
    assert call("pack", *flags(tmp_path, tmp_path / "out", "--exif", "ignore")).code == 0


@pytest.mark.parametrize("kind", ["labelme", "yolo"])
def test_formats_with_a_file_for_each_image_are_packed(kind, call, samples, tmp_path: Path) -> None:
    (tmp_path / "images" / "x").mkdir(parents=True)
    (tmp_path / "labels" / "x").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (20, 10), (9, ord(name), 9)).save(
            tmp_path / "images" / "x" / f"{name}.png"
        )
    if kind == "yolo":
        (tmp_path / "data.yaml").write_text("names:\n  0: cat\n  1: dog\n")
        (tmp_path / "labels" / "x" / "a.txt").write_text("1 0 0 0.5 0 0.5 0.5 0 0.5\n")
    else:
        shape = {"label": "dog", "points": [[0, 0], [9, 4]], "shape_type": "rectangle"}
        other = {"label": "cat", "points": [[15, 8], [15, 8]], "shape_type": "rectangle"}
        plain = {"shapes": [shape, other], "imageWidth": 20, "imageHeight": 10}
        (tmp_path / "labels" / "x" / "a.json").write_text(json.dumps(plain))
    command = [*flags(tmp_path, tmp_path / "out", kind=kind), "--annotations", tmp_path / "labels"]
    ended = call("pack", *command, "--unannotated", "background")
    assert ended.code == 0, ended.err
    assert "1 images without annotations are all background" in ended.out
    assert read_manifest(tmp_path / "out").classes == ("background", "cat", "dog")
    mask = samples(tmp_path / "out")["x/a.png"].mask
    assert (mask[:5, :10] == 2).all()
    assert not samples(tmp_path / "out")["x/b.png"].mask.any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--masks", "M"), "--annotations needs --images FOLDER, without --masks and --pairs"),
        (
            ("--mask-suffix", "_m"),
            "--mask-suffix has no effect with --annotations, which name their",
        ),
        (("--mask-format", "binary"), "--mask-format has no effect with --annotations"),
        (("--ignore-value", "3"), "--ignore-value has no effect with --annotations"),
        (("--line-width", "3"), "--line-width applies to labelme and cvat only"),
        (("--annotator", "first"), "--annotator applies to label-studio only"),
    ],
)
def test_flags_without_effect_are_refused(instances: Path, call, tmp_path, more, message) -> None:
    ended = call("pack", *flags(instances, tmp_path / "out", *more))
    assert ended.code == 2
    assert message in ended.message


def test_annotation_flags_need_annotations_and_a_format(instances: Path, call, tmp_path) -> None:
    images = ("--images", instances / "images", "--out", tmp_path / "out")
    ended = call("pack", *images, "--overlap", "error")
    assert (ended.code, "--overlap needs --annotations" in ended.err) == (2, True)
    ended = call("pack", *images, "--annotations", instances / "instances.json")
    assert ended.code == 2
    assert "--annotations needs --annotation-format coco" in ended.err


def test_unknown_classes_and_border_classes_are_named(instances: Path, call, tmp_path) -> None:
    ended = call("pack", *flags(instances, tmp_path / "out", "--classes", "cat"))
    assert ended.code == 1
    assert "has 60 annotations of unknown class ('dog': 60); add it to --classes" in ended.err
    more = ("--border-sigma", 5, "--border-classes", "cow")
    ended = call("pack", *flags(instances, tmp_path / "out", *more))
    assert ended.code == 2
    assert "--border-classes cow is not a class; classes: background cat dog" in ended.err


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images, and panoptic annotations of them: a JSON, and PNGs in its folder."""
    folder = tmp_path_factory.mktemp("panoptic")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "instances").mkdir()
    images, annotations = [], []
    for number in range(12):
        pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        ids = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        ids[5:, :20], ids[5:, 20 + number :] = (1, 2, 3), (7, 0, 0)
        Image.fromarray(ids).save(folder / "instances" / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
        images.append(entry)
        parts = [{"id": 1 + 2 * 256 + 3 * 65536, "category_id": 7}, {"id": 7, "category_id": 90}]
        annotations.append(
            {"image_id": number, "file_name": f"{number}.png", "segments_info": parts}
        )
    plain = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "cat"}, {"id": 7, "name": "sky"}],
    }
    (folder / "instances.json").write_text(json.dumps(plain))
    return folder


def test_panoptic_annotations_are_packed(segments: Path, call, samples, content, tmp_path) -> None:
    for workers in (1, 2):
        out = tmp_path / f"{workers}"
        ended = call("pack", *flags(segments, out, *SMALL, "--workers", workers))
        assert ended.code == 0, ended.err
    assert content(tmp_path / "1") == content(tmp_path / "2")
    mask = samples(tmp_path / "1")["3.png"].mask
    assert (mask[:5] == 255).all()
    assert (mask[5:, :20] == 2).all()
    assert (mask[5:, 20:23] == 255).all()
    assert (mask[5:, 23:] == 1).all()


def test_a_panoptic_png_that_has_changed_or_is_missing_is_named(
    segments: Path, call, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(segments, folder)
    command = ("pack", *flags(folder, tmp_path / "out", *SMALL, "--workers", 1))
    assert call(*command, "--part", "1/2").code == 0
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "instances" / "3.png")
    ended = call(*command, "--part", "2/2")
    assert (ended.code, "1 images or masks have changed, the first: 3.png" in ended.err) == (
        1,
        True,
    )
    (folder / "instances" / "3.png").unlink()
    for verb in ("check", "pack"):
        ended = call(verb, *flags(folder, tmp_path / verb, "--workers", 1))
        assert ended.code == 1
        assert f"{folder}/instances/3.png cannot be read: No such file or directory" in ended.err


@pytest.fixture
def halves(instances: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The annotations of `instances` as one file per split; each file lacks the other's images."""
    plain = json.loads((instances / "instances.json").read_text())
    files = (tmp_path / "instances_train2017.json", tmp_path / "instances_val2017.json")
    for number, file in enumerate(files):
        images = [image for image in plain["images"] if image["id"] % 2 == number]
        ids = {image["id"] for image in images}
        own = [one for one in plain["annotations"] if one["image_id"] in ids]
        file.write_text(json.dumps({**plain, "images": images, "annotations": own}))
    return files


def test_a_file_per_split_of_one_folder_gives_the_masks_of_one_file(
    instances: Path, packed: Path, halves, call, content, tmp_path: Path
) -> None:
    images, out = ("--images", instances / "images"), tmp_path / "out"
    kind = ("--annotation-format", "coco", "--workers", 1)
    ended = call("pack", *images, "--annotations", *halves, *kind, "--out", out)
    assert ended.code == 0, ended.err
    splits = read_manifest(out).splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 20, "val": 20}
    for data, place in ((out, "halves"), (packed, "whole")):
        assert call("unpack", "--data", data, "--out", tmp_path / place).code == 0
    assert content(tmp_path / "halves/masks") == content(tmp_path / "whole/masks")
    (tmp_path / "data/images").mkdir(parents=True)
    shutil.copytree(instances / "images", tmp_path / "data/images", dirs_exist_ok=True)
    for half in halves:
        shutil.copy(half, tmp_path / "data")
    ended = call("pack", "--layout", "auto", tmp_path / "data")
    assert f"--annotations {tmp_path}/data/instances_train2017.json {tmp_path}/data/" in ended.out


def test_a_file_per_folder_keeps_the_paths_of_both(
    instances: Path, halves, call, tmp_path: Path
) -> None:
    folders = []
    for half, name in zip(halves, ("train2017", "val2017"), strict=True):
        folders.append(tmp_path / name)
        for image in json.loads(half.read_text())["images"]:
            path = folders[-1] / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(instances / "images" / image["file_name"], path)
    argv = ("--images", *folders, "--annotations", *halves, "--annotation-format", "coco")
    ended = call("pack", *argv, "--out", tmp_path / "out", "--workers", 1)
    assert ended.code == 0, ended.err
    assert read_manifest(tmp_path / "out").splits["val"].samples == 20
    assert call("unpack", "--data", tmp_path / "out", "--out", tmp_path / "back").code == 0
    assert (tmp_path / "back/masks/val2017/sub/ä 1.png").exists()


def test_an_image_that_no_file_lists_or_two_files_list_is_named(
    instances: Path, halves, call, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(instances / "images", images)
    shutil.copy(images / "sub/ä 1.png", images / "other.png")
    argv = ("--images", images, "--annotation-format", "coco", "--out", tmp_path / "out")
    ended = call("pack", *argv, "--annotations", *halves)
    assert ended.code == 1
    assert f"{images}/other.png is not listed in {halves[0]} or {halves[1]}" in ended.err
    (images / "other.png").unlink()
    twice = tmp_path / "val.json"
    shutil.copy(halves[0], twice)
    ended = call("pack", *argv, "--annotations", halves[0], twice, "--skip-unpaired")
    assert ended.code == 1
    assert "is listed in two of the annotations (and " in ended.err


def test_a_category_that_means_two_classes_is_refused(
    instances: Path, halves, call, tmp_path: Path
) -> None:
    plain = json.loads(halves[1].read_text())
    plain["categories"] = [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}]
    halves[1].write_text(json.dumps(plain))
    argv = ("--images", instances / "images", "--annotation-format", "coco")
    ended = call("pack", *argv, "--annotations", *halves, "--out", tmp_path / "out")
    assert ended.code == 1
    assert f"{halves[1]}: category 90 is 'dog', in {halves[0]} it is 'cat'" in ended.err


def test_annotations_of_another_format_are_named(instances: Path, call, tmp_path: Path) -> None:
    images = ("--images", instances / "images", "--out", tmp_path / "out")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.json").write_text('{"shapes": [], "imageData": null}')
    (tmp_path / "a.xml").write_text("<annotations><version>1.1</version></annotations>")
    for path, given, found in (
        (tmp_path / "labels", "coco", "labelme"),
        (tmp_path / "a.xml", "coco", "cvat"),
        (tmp_path / "a.xml", "label-studio", "cvat"),
        (instances / "instances.json", "labelme", "coco"),
    ):
        ended = call("pack", *images, "--annotations", path, "--annotation-format", given)
        assert ended.code == 1
        assert ended.err.endswith(f"use --annotation-format {found}\n"), ended.err


def test_auto_needs_no_folder_for_shards(instances: Path, call) -> None:
    assert call("pack", "--layout", "auto", instances).code == 0
    ended = call("pack", "--images", instances / "images")
    assert (ended.code, "--out is missing" in ended.err) == (2, True)
