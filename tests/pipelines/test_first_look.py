"""`unet check FOLDER`: one command to paste, what is unsure, and the contact sheet."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest


@pytest.fixture
def save(tmp_path: Path):
    """save("images/{}.png", "masks/{}.png", 6) -> images of noise and masks of a square."""

    def make(image: str, mask: str, count: int, start: int = 0) -> None:
        for i in range(start, start + count):
            pixels = np.random.default_rng(i).integers(0, 256, (24, 30)).astype(np.uint8)
            square = np.zeros((24, 30), np.uint8)
            square[4 : 8 + i % 9, 5:20] = 255
            for template, array in ((image, pixels), (mask, square)):
                path = tmp_path / "data" / template.format(i)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)

    return make


def look(call, tmp_path: Path) -> tuple[str, list[str]]:
    """Check tmp_path/data; returns the output, and the words of the proposed command."""
    ended = call("check", tmp_path / "data", "--out", tmp_path / "out", "--workers", 1)
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "sheet.png").exists()
    ((line),) = [line for line in ended.out.splitlines() if line.startswith("unet pack ")]
    words = shlex.split(line)
    return ended.out, [*words[1:-1], str(tmp_path / "shards")]


def splits(tmp_path: Path) -> dict[str, int]:
    return {name: s.samples for name, s in read_manifest(tmp_path / "shards").splits.items()}


def test_the_command_for_drive_packs_train_val_and_test(save, call, tmp_path: Path) -> None:
    for split, end, start in (("training", "training", 21), ("test", "test", 1)):
        names = f"{split}/images/{{:02d}}_{end}.tif", f"{split}/1st_manual/{{:02d}}_manual1.gif"
        save(*names, 20, start)
        save(names[0], f"{split}/mask/{{:02d}}_{end}_mask.gif", 20, start)
    out, command = look(call, tmp_path)
    assert "1st_manual; also possible: training/mask test/mask" in out
    assert "the data declare no val: 10 % of train become val" in out
    ended = call(*command)
    assert ended.code == 0, ended.err
    counts = splits(tmp_path)
    assert counts["test"] == 20
    assert counts["train"] + counts["val"] == 20
    assert counts["val"] > 0


def test_the_command_for_lists_uses_them(save, call, tmp_path: Path) -> None:
    save("images/{}.png", "labels/{}.png", 6)
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        lines = "".join(f"{i}\n" for i in numbers)
        (tmp_path / "data" / f"{split}.txt").write_text(lines)
    (tmp_path / "data" / "boxes.json").write_text("{}")
    out, command = look(call, tmp_path)
    assert "unsure: 1 .json files are not read: their format is not known as annotations" in out
    assert call(*command).code == 0
    assert splits(tmp_path) == {"train": 4, "val": 2}


def test_images_without_masks_are_left_out_by_the_command(save, call, tmp_path: Path) -> None:
    save("images/{}.png", "masks/{}_mask.png", 8)
    (tmp_path / "data" / "masks" / "3_mask.png").unlink()
    out, command = look(call, tmp_path)
    assert "--mask-suffix _mask" in shlex.join(command)
    assert "unsure: 1 image files in images are not packed" in out
    assert call(*command).code == 0
    assert sum(splits(tmp_path).values()) == 7


def test_a_folder_without_masks_is_refused_in_one_line(save, call, tmp_path: Path) -> None:
    save("images/{}.png", "images/{}.png", 3)
    ended = call("check", tmp_path / "data", "--out", tmp_path / "out")
    assert ended.code == 1
    assert "no two folders, suffixes or extensions pair images with masks" in ended.err


def test_other_flags_beside_the_folder_are_refused(save, call, tmp_path: Path) -> None:
    save("images/{}.png", "masks/{}.png", 2)
    ended = call("check", tmp_path / "data", "--alpha", "drop", "--out", tmp_path / "out")
    assert ended.code == 2
    assert "--alpha has no effect with FOLDER; use --images and --masks" in ended.message


@pytest.mark.parametrize("verb", ["check", "pack"])
def test_annotations_beside_the_images_are_mentioned(save, call, tmp_path: Path, verb: str) -> None:
    save("images/{}.png", "masks/{}.png", 6)
    for name in ("0.json", "1.json", "2.xml"):
        (tmp_path / "data" / "images" / name).write_text("{}")
    data = tmp_path / "data"
    flags = ("--images", data / "images", "--masks", data / "masks", "--mask-format", "binary")
    ended = call(verb, *flags, "--out", tmp_path / "out", "--workers", 1)
    assert ended.code == 0, ended.err
    what = "2 .json, 1 .xml files are not read: masks are image files; if they are annotations, run"
    assert f"{data / 'images'}: {what} unet check {data / 'images'}" in ended.out


def test_folders_that_were_not_compared_are_counted(save, call, tmp_path: Path) -> None:
    for number in range(45):
        save(f"a{number:02d}/x{{}}.png", f"b{number:02d}/x{{}}.png", 1, number)
    ended = call("check", tmp_path / "data", "--out", tmp_path / "out", "--workers", 1)
    text = ended.out + ended.err
    assert "only 40 of 90 folders were compared, the first within 3 levels" in text


def test_images_that_are_equal_in_two_splits_have_a_remedy_that_packs(
    save, call, tmp_path: Path
) -> None:
    save("train/images/{}.png", "train/masks/{}.png", 6)
    save("val/images/{}.png", "val/masks/{}.png", 2)
    data, out = tmp_path / "data", tmp_path / "out"
    ended = call("check", data, "--out", out, "--workers", 1)
    assert ended.code == 1
    assert "add --duplicates same-split" in ended.err
    ((line),) = [line for line in ended.out.splitlines() if line.startswith("unet pack ")]
    words = [*shlex.split(line)[1:-1], str(tmp_path / "shards"), "--duplicates", "same-split"]
    ended = call(*words)
    assert (ended.code, splits(tmp_path)) == (0, {"train": 8}), ended.err
