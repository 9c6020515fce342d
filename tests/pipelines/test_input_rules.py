"""Which file or member is the image: one rule for data sets, tars, folders and patterns."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from pipelines.inference.input_rules import InputRule
from pipelines.inference.inputs import find_inputs
from pipelines.runtime.errors import UsageError
from shards.sample import AggregateDataError, DataError


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            file.addfile(member, io.BytesIO(name.encode()))
    return path


def sources(given: object, **rule) -> list[str]:
    inputs = find_inputs(str(given), InputRule(**rule))
    return [inputs.read(i).source for i in range(len(inputs))]


# ---- tars


@pytest.mark.parametrize(
    "names",
    [
        ("0.jpg", "0.png"),
        ("0.jpg", "0.depth.png"),
        ("0.jpg", "0.seg.png", "0.json"),
        ("a/0.rgb.png", "a/0.label.png"),
        ("0.jpg", "0.mask.png", "0.depth.png"),
        ("./0.jpg", "0.PNG"),
    ],
)
def test_a_sample_of_a_tar_with_two_images_is_refused(tmp_path: Path, names) -> None:
    with pytest.raises(AggregateDataError, match=r"--image-ext") as caught:
        find_inputs(str(tar(tmp_path / "a.tar", *names, "other.jpg")))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("names", "declared", "expected"),
    [
        (("0.jpg", "0.png", "1.jpg"), "jpg", ["0.jpg", "1.jpg"]),
        (("0.jpg", "0.depth.png"), ".JPG", ["0.jpg"]),
        (("0.rgb.png", "0.label.png"), "rgb.png", ["0.rgb.png"]),
        (("img_0.5um.png", "img_0.7um.png"), "png", ["img_0.5um.png", "img_0.7um.png"]),
        (("0.jpg", "0.mask.png"), "png", []),
    ],
)
def test_image_ext_declares_the_image_of_a_tar(tmp_path: Path, names, declared, expected) -> None:
    path = tar(tmp_path / "a.tar", *names)
    if expected:
        assert sources(path, image_ext=(declared,)) == expected
    else:
        with pytest.raises(DataError, match="contains no images"):
            sources(path, image_ext=(declared,))


def test_dots_in_names_belong_to_keys_where_every_image_has_its_mask(tmp_path: Path) -> None:
    names = [f"img_0.{n}um.{end}" for n in (5, 7) for end in ("png", "mask.png")]
    assert sources(tar(tmp_path / "a.tar", *names)) == ["img_0.5um.png", "img_0.7um.png"]


def test_members_that_are_no_images_are_counted(tmp_path: Path) -> None:
    inputs = find_inputs(str(tar(tmp_path / "a.tar", "0.jpg", "0.cls", "1.jpg", "1.cls", "x.txt")))
    assert inputs.notes == ("3 other members are ignored: .cls (2), .txt (1)",)


# ---- folders and patterns


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (("images/a.png", "masks/a.png"), "masks/a.png"),
        (("img/a.jpg", "SegmentationMask/a.png"), "SegmentationMask/a.png"),
        (("img/a.jpg", "mask/b.png"), None),
        (("left/a.jpg", "right/a.jpg"), None),
        (("train/x/a.png", "train/xannot/a.png"), "train/xannot/a.png"),
        (("x/t/a.png", "gt/t/a_gt.png"), "gt/t/a_gt.png"),
        (("imgs/a.jpg", "Labels/a.png"), "Labels/a.png"),
        (("a.jpg", "a_mask.png"), "a_mask.png"),
        (("d/a.png", "d/a-GT.png"), "d/a-GT.png"),
        (("train/a.png", "train_labels/a.png"), "train_labels/a.png"),
    ],
)
def test_masks_among_the_files_are_refused(tmp_path: Path, names, mask) -> None:
    folder = put(tmp_path / "in", *names)
    if mask is None:
        assert len(sources(folder)) == len(names)
        return
    for given in (str(folder), f"{folder}/**/*.*"):
        with pytest.raises(DataError, match=rf"1 of 2 files are masks .* such as .*{mask}"):
            find_inputs(given)


def test_files_named_like_masks_without_an_image_are_images(tmp_path: Path) -> None:
    names = ["face_mask.png", "labels/a.png", "x/b.png"]
    assert sources(put(tmp_path, *names)) == names


def test_extracted_members_of_our_shards_have_the_roles_of_members(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "a.mask.png", "a.json", "a.border.png", "a.probability-1.png")
    assert sources(tmp_path) == ["a.jpg"]


def test_image_ext_selects_files(tmp_path: Path) -> None:
    put(tmp_path, "a.JPG", "a.png", "b.jpg", "c.rgb.png", "c.label.png")
    assert sources(tmp_path, image_ext=("jpg",)) == ["a.JPG", "b.jpg"]
    assert sources(f"{tmp_path}/*", image_ext=("rgb.png",)) == ["c.rgb.png"]


def test_tars_are_tars_in_any_case(tmp_path: Path) -> None:
    tar(tmp_path / "A.TAR", "0.jpg")
    assert sources(tmp_path) == sources(tmp_path / "A.TAR") == ["0.jpg"]


# ---- results


def test_results_of_this_job_are_skipped_with_a_count(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "x/b.png")
    out = tmp_path / "x/out"
    put(out, "job.json", "png/a.png", "predicted-000000.tar", "overlay/a.png")
    for given in (str(tmp_path), f"{tmp_path}/**/*"):
        inputs = find_inputs(given, InputRule(image_ext=("png",), out=str(out)))
        assert [inputs.name(i) for i in range(len(inputs))] == [
            str(tmp_path / "a.png"),
            str(tmp_path / "x/b.png"),
        ]
        assert "skipping " in inputs.notes[0]
        assert str(out) in inputs.notes[0]


@pytest.mark.parametrize(
    ("given", "out"),
    [
        (".", "."),
        ("a.png", "."),
        ("*.png", "."),
        ("list.txt", "."),
        ("x", "x/../x/"),
        ("x", "link"),
        (".", "x"),
        ("r/png", "r"),
        ("r/overlay/deep", "r"),
        ("t/0.tar", "t"),
    ],
)
def test_results_among_the_inputs_are_refused(tmp_path: Path, monkeypatch, given, out) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.png", "x/b.png", "r/png/c.png", "r/overlay/deep/d.png")
    tar(tmp_path / "t/0.tar", "0.jpg")
    if given == ".":
        shutil.rmtree("t")
    (tmp_path / "list.txt").write_text("a.png\nx/b.png\n")
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(UsageError, match="--out"):
        find_inputs(given, InputRule(out=out))


@pytest.mark.parametrize("given", ["in/png", "in/png/**/*.png", "in", "in/png/deep/b.png"])
def test_masks_that_another_job_wrote_are_no_images(tmp_path: Path, monkeypatch, given) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in", "job.json", "png/a.png", "png/deep/b.png", "overlay/a.png")
    with pytest.raises(DataError, match="are masks or other results"):
        find_inputs(given, InputRule(out="elsewhere"))


def test_a_data_set_declares_its_images(shards: Path) -> None:
    with pytest.raises(UsageError, match="--image-ext: has no effect"):
        sources(shards, image_ext=("png",))
    with pytest.raises(UsageError, match="--out"):
        sources(shards, out=str(shards))


def test_a_split_is_selected(shards: Path, tmp_path: Path) -> None:
    splits = json.loads((shards / "index.json").read_text())["splits"]
    val = sources(shards, split="val")
    assert len(val) == splits["val"]["samples"]
    assert sorted([*val, *sources(shards, split="train")]) == sorted(sources(shards))
    with pytest.raises(DataError, match="no samples in the split 'nope'"):
        sources(shards, split="nope")
    put(tmp_path, "a.png")
    with pytest.raises(UsageError, match=r"--split val: .* is not a data set"):
        sources(tmp_path, split="val")
