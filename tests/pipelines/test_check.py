"""`check`, `packing.inspection`, `packing.duplicates`.

Checking: the problems that packing would refuse, class shares, a contact sheet.
"""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest
from tests.conftest import flags, levels, save_cells, solid_image

Folder = Path


def report(out: Path) -> dict:
    return json.loads((out / "check.json").read_text())


# ---- the report


def test_the_table_summarises_the_data(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 12, values=(0, 128, 255))
    draw(folder, 2, size=(24, 32), name="small{}", seed=1)
    Image.new("L", (32, 24)).save(folder / "masks" / "small1.png")
    more = ("--mask-values", 0, 128, 255, 9, "--classes", "background", "cell", "rim", "ghost")
    more = (*more, "--allow-absent-classes")
    ended = call("check", *flags(folder, tmp_path / "out", *more, mask_format="values"))
    assert ended.code == 0, ended.err
    masks = [np.asarray(Image.open(path)) for path in (folder / "masks").iterdir()]
    total = sum(mask.size for mask in masks)
    cell, rim = (sum(int((mask == value).sum()) for mask in masks) for value in (128, 255))
    assert "14 pairs: train " in ended.out
    assert "48 x 48 RGB         12 images" in ended.out
    assert "32 x 24 RGB          2 images" in ended.out
    assert "masks of mode L (14)" in ended.out
    assert f"{cell / total:.2%} of pixels, in 12 masks" in ended.out
    assert f"{rim / total:.2%} of pixels, in {12 + 1} masks" in ended.out
    assert "1 masks contain only class 0: small1.png" in ended.out
    assert "warning: class 'ghost' has no pixels" in ended.out
    assert "no problems found; pack with: unet pack" in ended.out
    assert f"contact sheet: {tmp_path / 'out' / 'sheet.png'}" in ended.out
    assert ended.err == ""


def test_the_report_agrees_with_the_packed_manifest(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 12, size=(32, 32), mode="L")
    ended = call("check", *flags(folder, tmp_path / "out", "--val-fraction", 0.3))
    assert ended.code == 0, ended.err
    arguments = flags(folder, tmp_path / "shards", "--val-fraction", 0.3)
    assert call("pack", *arguments).code == 0
    found, manifest = report(tmp_path / "out"), read_manifest(tmp_path / "shards")
    assert (found["pairs"], found["bad_pairs"], found["problems"]) == (12, 0, [])
    assert found["splits"] == {name: split.samples for name, split in manifest.splits.items()}
    assert found["image_format"] == asdict(manifest.image_format)
    assert found["sizes"] == [{"width": 32, "height": 32, "mode": "L", "images": 12}]
    pixels = np.sum(
        [shard.pixels for split in manifest.splits.values() for shard in split.shards], axis=0
    )
    assert [c["pixels"] for c in found["classes"].values()] == pixels.tolist()
    assert [*found["classes"]] == ["background", "foreground", "ignored"]
    assert sum(c["share"] for c in found["classes"].values()) == pytest.approx(1)
    assert found["mask_modes"] == {"L": 12}
    assert (found["duplicates"], found["empty"], found["notes"]) == ([], [], {})
    # Over all images; in the manifest, over the train split.
    images = [np.asarray(Image.open(p)) / 255 for p in (folder / "images").iterdir()]
    assert found["mean"] == [pytest.approx(np.mean(images), abs=1e-6)]
    assert found["std"] == [pytest.approx(np.std(images), abs=1e-6)]


@pytest.mark.parametrize(
    ("up", "left", "text"),
    [
        (1, 0, "masks are shifted up by 1.0 pixels against their images (mean of 9 images)"),
        (0, -2, "masks are shifted to the right by 2.0 pixels against their images (mean of 9"),
        (0, 0, None),
    ],
)
def test_masks_that_are_shifted_against_their_images_are_reported(
    up: int, left: int, text: str | None, call, tmp_path: Path
) -> None:
    folder = save_cells(tmp_path / "in", up=up, left=left)
    ended = call("check", *flags(folder, tmp_path / "out"))
    assert ended.code == 0, ended.err
    found = report(tmp_path / "out")["shift"]
    assert (found["down"], found["right"]) == pytest.approx((-up, -left), abs=0.1)
    assert found["images"] == 9
    if text is None:
        assert "masks are shifted" not in ended.out
    else:
        assert f"  warning: {text}" in ended.out


def test_the_contact_sheet_shows_the_colours_of_the_mask(pair: Path, call) -> None:
    (pair / "colours.yaml").write_text("ground: [0, 0, 0]\ncell: [0, 250, 10]\n")
    mask = np.zeros((16, 20, 3), np.uint8)
    mask[4:8, 4:8] = (0, 250, 10)
    Image.fromarray(mask).save(pair / "masks" / "a.png")
    arguments = flags(pair, pair / "out", "--colours", pair / "colours.yaml", mask_format="rgb")
    ended = call("check", *arguments)
    assert ended.code == 0, ended.err
    sheet = np.asarray(Image.open(pair / "out" / "sheet.png").convert("RGB"))
    outlined = (sheet == (0, 250, 10)).all(axis=2)
    # The outline of the square, and the swatch in the legend.
    assert outlined[6:10, 6:10].sum() == 12
    assert outlined.sum() > 100
    assert (sheet[2 + 15, 2] == (9, 9, 9)).all()


def test_the_contact_sheet_samples_the_complete_data_set(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 70, size=(8, 8))
    ended = call("check", *flags(folder, tmp_path / "out"))
    assert ended.code == 0, ended.err
    width, height = Image.open(tmp_path / "out" / "sheet.png").size
    # Every third of 70: 24 images, six per row.
    assert width == 6 * 200
    assert 4 * 28 <= height <= 4 * 28 + 40


@pytest.mark.parametrize("verb", ["check", "pack"])
def test_a_stray_overview_is_named(verb: str, draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 12, size=(16, 16), mode="L")
    draw(folder, 1, size=(120, 160), name="overview")
    ended = call(verb, *flags(folder, tmp_path / "out"))
    assert ended.code == 0, ended.err
    name = folder / "images" / "overview.png"
    assert f"outlier: {name} is RGB, 12 images are grey: all become RGB" in ended.out
    assert f"outlier: {name} is 160 x 120, no other image is larger than 16 x 16" in ended.out
    assert f"outlier: {name} has 8" in ended.out
    if verb == "check":
        assert {o["name"] for o in report(tmp_path / "out")["outliers"]} == {str(name)}


def test_the_contact_sheet_shows_outliers_and_foreground_first(
    draw, call, monkeypatch, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 80, size=(16, 16), mode="L")
    draw(folder, 1, size=(120, 160), name="z_overview")
    for number in range(80):
        if number % 8:
            Image.new("L", (16, 16)).save(folder / "masks" / f"p{number:03d}.png")
    shown = []

    def draw_sheet(cells, palette, legend):
        shown.extend(cell.caption for cell in cells)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("pipelines.check.draw_contact_sheet", draw_sheet)
    assert call("check", *flags(folder, tmp_path / "out")).code == 0
    assert shown[:11] == ["z_overview.png", *(f"p{number:03d}.png" for number in range(0, 80, 8))]
    assert 20 < len(shown) <= 30


def test_images_without_masks_can_be_checked(draw, call, tmp_path: Path) -> None:
    images = draw(tmp_path / "in", 3, size=(16, 16)) / "images"
    arguments = ("--images", images, "--workers", 1, "--out", tmp_path / "out")
    ended = call("check", *arguments)
    assert ended.code == 0, ended.err
    assert "3 images: unlabelled 3" in ended.out
    assert report(tmp_path / "out")["classes"] == {}
    assert Image.open(tmp_path / "out" / "sheet.png").size[0] > 0


@pytest.mark.parametrize("workers", [2, 3])
def test_the_report_does_not_depend_on_the_number_of_workers(
    workers: int, draw, call, content, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 40, size=(16, 16))
    for number in (3, 17, 30):
        (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    shutil.copy(folder / "images" / "p005.png", folder / "images" / "p006.png")
    one = call("check", *flags(folder, tmp_path / "one", "--val-fraction", 0))
    more = ("--val-fraction", 0, "--workers", workers)
    several = call("check", *flags(folder, tmp_path / "more", *more))
    assert one.code == several.code == 1
    assert content(tmp_path / "one") == content(tmp_path / "more")
    assert report(tmp_path / "one")["duplicates"] == [["p005.png", "p006.png"]]
    assert report(tmp_path / "one")["bad_pairs"] == 3


def test_only_the_output_folder_is_written(draw, call, content, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    (folder / "masks" / "p001.png").write_bytes(b"")
    before = content(folder)
    assert call("check", *flags(folder, tmp_path / "out")).code == 1
    assert content(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert set(content(tmp_path / "out")) == {"check.json", "problems.txt", "sheet.png"}


def test_a_rerun_forgets_repaired_problems(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    path = folder / "images" / "p001.png"
    good = path.read_bytes()
    path.write_bytes(b"")
    arguments = flags(folder, tmp_path / "out")
    assert call("check", *arguments).code == 1
    assert (tmp_path / "out" / "problems.txt").read_text() != ""
    path.write_bytes(good)
    assert call("check", *arguments).code == 0
    assert (tmp_path / "out" / "problems.txt").read_text() == ""
    assert report(tmp_path / "out")["problems"] == []


def test_all_kinds_of_problems_are_reported_at_once(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 40, size=(16, 16))
    for number in range(25):
        (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    (folder / "masks" / "p030.png").unlink()
    shutil.copy(folder / "images" / "p031.png", folder / "images" / "p032.png")
    (tmp_path / "split.csv").write_text(
        "path,split\n"
        + "".join(f"p{i:03d},{('train', 'val')[i % 2]}\n" for i in range(40) if i != 30)
    )
    arguments = flags(folder, tmp_path / "out", "--split-file", tmp_path / "split.csv")
    ended = call("check", *arguments)
    assert ended.code == 1
    problems = report(tmp_path / "out")["problems"]
    assert len(problems) == 25 + 1 + 1
    assert all(problem["found"] and problem["remedy"] for problem in problems), problems
    lines = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    assert lines == sorted(lines)
    assert len(lines) == 27
    first, *shown = ended.err.splitlines()
    assert first == f"27 problems: {tmp_path / 'out' / 'problems.txt'}"
    images = folder / "images"
    more = f"(and 24 more: {images}/p001.png, {images}/p002.png, ...)"
    assert f"  {images}/p000.png is empty {more}; repair or remove it" in shown[0]
    assert len(shown) == 3
    assert [line for line in lines if "p031.png (val) = p032.png (train) are the same" in line]


def test_each_image_missing_from_a_split_file_is_a_problem(draw, call, tmp_path) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    (tmp_path / "split.csv").write_text("path,split\np001,train\n")
    arguments = flags(folder, tmp_path / "out", "--split-file", tmp_path / "split.csv")
    assert call("check", *arguments).code == 1
    assert report(tmp_path / "out")["problems"] == [
        {
            "found": f"p00{number}.png is not in {tmp_path / 'split.csv'}",
            "remedy": "list every image exactly once",
        }
        for number in (0, 2, 3)
    ]


def test_without_a_valid_pair_no_contact_sheet_is_drawn(pair: Path, call) -> None:
    (pair / "images" / "a.png").write_bytes(b"")
    ended = call("check", *flags(pair, pair / "out"))
    assert ended.code == 1
    assert not (pair / "out" / "sheet.png").exists()
    assert report(pair / "out")["bad_pairs"] == 1


# ---- bad input, refused by both with the same message


def png_with_declared_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        content = kind + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def truncate_image(folder: Path) -> None:
    path = folder / "images" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:-200])


def frames(folder: Path) -> None:
    (folder / "images" / "a.png").unlink()
    solid_image(mode="L").save(
        folder / "images" / "a.gif", save_all=True, append_images=[solid_image(99, mode="L")]
    )


def save_mask(
    image: Image.Image | np.ndarray, name: str = "a.png", **more: object
) -> Callable[[Folder], object]:
    drawn = image if isinstance(image, Image.Image) else Image.fromarray(image)

    def save(folder: Path) -> None:
        (folder / "masks" / "a.png").unlink()
        drawn.save(folder / "masks" / name, **more)

    return save


def save_image(image: Image.Image, name: str = "a.png") -> Callable[[Folder], object]:
    def save(folder: Path) -> None:
        (folder / "images" / "a.png").unlink()
        image.save(folder / "images" / name)

    return save


def write(name: str, data: bytes | str) -> Callable[[Folder], object]:
    encoded = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(encoded)


def rotated(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    solid_image().save(folder / "images" / "a.png", exif=exif)


def paletted(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(levels(1), "P")
    image.putpalette([part for colour in colours for part in colour])
    return image


def two_palettes(folder: Path) -> None:
    solid_image(8).save(folder / "images" / "b.png")
    paletted((0, 0, 0), (255, 0, 0)).save(folder / "masks" / "a.png")
    paletted((0, 0, 0), (0, 255, 0)).save(folder / "masks" / "b.png")


def leak(folder: Path) -> None:
    for part in ("images", "masks"):
        shutil.copy(folder / part / "a.png", folder / part / "b.png")
    write("split.csv", "path,split\na.png,train\nb.png,val\n")(folder)


def nothing(folder: Path) -> None:
    pass


AB = ("--classes", "a", "b")
INDEX = ("--mask-format", "index", *AB)
SPLIT = ("--split-file", "{}/split.csv")
PAIRS = ("--pairs", "{}/pairs.txt")
TABLE = ("--mask-format", "rgb", "--colours", "{}/colours.yaml")
RED = "ground: [0, 0, 0]\ncell: [255, 0, 0]\n"
BAD_DATA: dict[str, tuple[Callable[[Folder], object], tuple[object, ...], str]] = {
    # folders and names
    "no folder": (
        lambda f: shutil.rmtree(f / "images"),
        (),
        "images: does not exist; check the path",
    ),
    "no folder of masks": (
        lambda f: shutil.rmtree(f / "masks"),
        (),
        "masks: does not exist; check the path",
    ),
    "no images": (
        lambda f: (f / "images" / "a.png").unlink(),
        (),
        "images contains no images (.bmp",
    ),
    "no mask at all": (lambda f: (f / "masks" / "a.png").unlink(), (), "masks contains no images"),
    "nothing pairs": (
        save_image(solid_image(), "b.png"),
        (),
        "(for example: b.png and a.png); see --image-suffix",
    ),
    "no mask": (lambda f: solid_image().save(f / "images" / "b.png"), (), "b.png has no mask in"),
    "no partner": (
        lambda f: solid_image().save(f / "masks" / "c.png"),
        (),
        "c.png has no image in",
    ),
    "two of a name": (
        lambda f: solid_image().save(f / "images" / "a.bmp"),
        (),
        "have the same name",
    ),
    "a volume": (write("images/v.nii.gz", b"x"), (), "v.nii.gz is a volume; export each slice"),
    "a slide": (
        write("images/s.svs", b"x"),
        (),
        "s.svs is a microscope or slide scanner container",
    ),
    "one folder": (nothing, ("--masks", "{}/images"), "distinguish them with --mask-suffix"),
    "a suffix none has": (nothing, ("--mask-suffix", "_mask"), "(for example: a.png and nothing)"),
    "a pattern none has": (
        nothing,
        ("--pair-regex", r"(\d+)"),
        "(for example: nothing and nothing)",
    ),
    # images
    "empty": (write("images/a.png", b""), (), "images/a.png is empty; repair or remove it"),
    "text": (
        write("images/a.png", b"hello, I am text"),
        (),
        "a.png is not a readable image",
    ),
    "cut": (truncate_image, (), "images/a.png is damaged ("),
    "bomb": (
        write("images/a.png", png_with_declared_size(60_000, 60_000)),
        (),
        "declares 60000 x 60",
    ),
    "too many pixels": (
        nothing,
        ("--max-pixels", 300),
        "a.png declares 20 x 16 pixels, more than the limit of 300",
    ),
    "frames": (frames, (), "a.gif has 2 frames; add --frame 0"),
    "no such frame": (frames, ("--frame", 2), "a.gif has 2 frames, but --frame is 2"),
    "16 bit": (
        save_image(Image.fromarray(np.arange(7, 327, dtype=np.uint16).reshape(16, 20))),
        (),
        "than 8 bits per pixel (mode I;16, values from 7 to 326); choose which values become black",
    ),
    "float": (
        save_image(Image.fromarray(np.zeros((16, 20), np.float32)), "a.tif"),
        (),
        "a.tif has mode F, which is not supported; convert it to 8- or 16-bit grey",
    ),
    "transparent": (
        save_image(solid_image(mode="RGBA")),
        (),
        "transparent pixels; flatten it onto a",
    ),
    "turned": (rotated, (), "EXIF orientation: add --exif ignore to keep it unrotated"),
    "sizes": (
        save_mask(np.zeros((16, 21), np.uint8)),
        (),
        "masks/a.png is 21 x 16, but its image",
    ),
    "shapes": (
        save_mask(np.zeros((16, 16), np.uint8)),
        ("--resize-mask",),
        "a.png is 20 x 16; their aspect ratios differ: crop or pad one, or find the right mask",
    ),
    # masks
    "cut mask": (write("masks/a.png", b"\x89PNG"), (), "masks/a.png is not a readable image"),
    "not binary": (
        save_mask(levels(7, 7, 255)),
        (),
        "a.png is not binary: it has 0: 317 px, 7: 2 px, 255: 1 px; use --mask-threshold 128",
    ),
    "JPEG mask": (save_mask(levels(255), "a.jpg"), (), "is a JPEG, whose values are not exact"),
    "colour mask": (
        save_mask(Image.new("RGB", (20, 16), (1, 2, 3))),
        (),
        "masks/a.png is in colour (mode RGB); use --mask-format rgb with --colours",
    ),
    "white is 0": (
        save_mask(paletted((255, 255, 255), (0, 0, 0))),
        (),
        "a.png has white at palette index 0, so background and foreground may be swapped; add",
    ),
    "a value too many": (
        save_mask(levels(1, 2, 2)),
        INDEX,
        "a.png has values without a class: 2: 2 px; if these few pixels belong to no class",
    ),
    "values too many": (
        save_mask(levels(1, 5, 6)),
        INDEX,
        "5: 1 px, 6: 1 px; if these few pixels belong to no class, add --unknown ignore",
    ),
    "no palette": (nothing, ("--mask-format", "palette", *AB), "a.png has no palette (mode L)"),
    "two palettes": (
        two_palettes,
        ("--mask-format", "palette", *AB),
        "b.png has (0, 255, 0) at palette index 1, other files have (255, 0, 0), so an index",
    ),
    "a colour without a class": (
        lambda f: (
            save_mask(Image.new("RGB", (20, 16), (1, 2, 3)))(f),
            write("colours.yaml", RED)(f),
        ),
        TABLE,
        "a.png has colours without a class: (1, 2, 3): 320 px; list them in --colours",
    ),
    # splits
    "a leak": (leak, SPLIT, "a.png (train) = b.png (val) are the same image"),
    "no split file": (nothing, SPLIT, "split.csv: No such file or directory"),
    "a split file of two names": (
        write("split.csv", "name,split\na.png,val\n"),
        SPLIT,
        "split.csv must start with the line path,split or be named train.txt, val.txt or test",
    ),
    "a split of its own": (
        write("split.csv", "path,split\na.png,holdout\n"),
        SPLIT,
        "split.csv, line 2: 'holdout' is not one of train, val, test; correct it",
    ),
    "in two splits": (
        write("split.csv", "path,split\na.png,val\na.png,train\n"),
        SPLIT,
        "line 3: a.png is listed twice, in val (",
    ),
    "in no split": (write("split.csv", "path,split\n"), SPLIT, "a.png is not in"),
    "a name too many": (
        write("split.csv", "path,split\na.png,val\nz.png,val\n"),
        SPLIT,
        "line 3 lists z.png, which is not one of the images; list every image exactly once",
    ),
    "a column too many": (
        write("split.csv", "path,split\na.png,val,x\n"),
        SPLIT,
        "line 2 is not of the form path,split: 'a.png,val,x'; correct it",
    ),
    "a split file in another code": (
        write("split.csv", b"path,split\n\xff\xfe.png,val\n"),
        SPLIT,
        "split.csv is not UTF-8 text; save it as UTF-8",
    ),
    "no folder of a split": (nothing, ("--split-folders",), "a.png is not in a folder named train"),
    "no group": (nothing, ("--group-by", "patient"), "a.png does not match --group-by 'patient'"),
    # lists of pairs
    "no list": (nothing, PAIRS, "pairs.txt: No such file or directory"),
    "an empty list": (
        write("pairs.txt", "# nothing\n"),
        PAIRS,
        "pairs.txt lists no pairs; write a",
    ),
    "half a pair": (
        write("pairs.txt", "images/a.png\n"),
        PAIRS,
        "pairs.txt, line 1: expected 2 names, an image and its mask, got 1",
    ),
    "a name with a space": (
        write("pairs.txt", "my a.png masks/a.png\n"),
        PAIRS,
        "line 1: expected 2 names, an image and its mask, got 3; names with spaces need a .csv",
    ),
    "a list of what is not there": (
        write("pairs.txt", "a.png a.png\nb.png a.png\n"),
        PAIRS,
        "images/b.png is listed but does not exist",
    ),
    "an image listed twice": (
        write("pairs.txt", "a.png a.png\na.png a.png\n"),
        PAIRS,
        "images/a.png is listed twice",
    ),
    "a list in another code": (
        write("pairs.txt", b"\xff\xfe\x00 a\n"),
        PAIRS,
        "pairs.txt is not UTF-8 text; save it as UTF-8",
    ),
}


def make_flags(folder: Path, out: Path, more: tuple[object, ...]) -> list[object]:
    return flags(folder, out, *(str(word).replace("{}", str(folder)) for word in more))


@pytest.mark.parametrize("case", BAD_DATA)
def test_pack_and_check_refuse_bad_data_with_the_same_message(case: str, pair: Path, call) -> None:
    prepare, more, message = BAD_DATA[case]
    prepare(pair)
    packed = call("pack", *make_flags(pair, pair / "shards", more))
    assert packed.code == 1, packed.out
    assert message in packed.err
    assert "Traceback" not in packed.err
    assert not (pair / "shards" / "index.json").exists()
    checked = call("check", *make_flags(pair, pair / "check", more))
    assert checked.code == 1, checked.out
    assert message.partition("; ")[0] in checked.err
    assert "Traceback" not in checked.err
    for problem in report(pair / "check")["problems"] if (pair / "check").exists() else ():
        assert problem["found"]
        assert problem["remedy"], problem


GOOD_DATA: dict[str, tuple[Callable[[Folder], object], tuple[object, ...]]] = {
    "nothing wrong": (nothing, ()),
    "frames, one chosen": (frames, ("--frame", 1)),
    "transparent, dropped": (save_image(solid_image(mode="RGBA")), ("--alpha", "drop")),
    "turned, ignored": (rotated, ("--exif", "ignore")),
    "sizes, resized": (save_mask(np.eye(8, 10, dtype=np.uint8)), ("--resize-mask",)),
    "no mask, skipped": (
        lambda f: solid_image().save(f / "images" / "b.png"),
        ("--skip-unpaired",),
    ),
    "JPEG mask, cut": (save_mask(levels(255), "a.jpg"), ("--mask-threshold", 128)),
    "a value too many, ignored": (save_mask(levels(1, 2)), (*INDEX, "--unknown", "ignore")),
    "16 bit, scaled": (
        save_image(Image.fromarray(np.zeros((16, 20), np.uint16))),
        ("--image-range", 0, 65535),
    ),
}


@pytest.mark.parametrize("case", GOOD_DATA)
def test_check_accepts_what_pack_accepts(case: str, pair: Path, call) -> None:
    prepare, more = GOOD_DATA[case]
    prepare(pair)
    checked = call("check", *make_flags(pair, pair / "check", more))
    assert checked.code == 0, checked.err
    packed = call("pack", *make_flags(pair, pair / "shards", more))
    assert packed.code == 0, packed.err


# ---- invalid commands, refused by both before anything is read


BAD_FLAGS: dict[str, tuple[tuple[object, ...], str]] = {
    "nothing to read": ((), "--images FOLDER or --pairs FILE is required"),
    "no format": (("--images", "i", "--masks", "m"), "--masks needs --mask-format binary, index"),
    "a format alone": (("--images", "i", "--mask-format", "binary"), "--mask-format needs --masks"),
    "classes alone": (("--images", "i", "--classes", "a", "b"), "--classes needs --masks"),
    "folds alone": (("--images", "i", "--fold", "1/2"), "--fold needs --masks"),
    "folders alone": (("--images", "i", "--split-folders"), "--split-folders needs --masks"),
    "masks resized alone": (("--images", "i", "--resize-mask"), "--resize-mask needs --masks"),
    "groups alone": (("--images", "i", "--group-by", "p"), "--group-by needs --masks"),
    "two ranges": (
        ("--images", "i", "--image-range", 0, 9, "--image-percentiles", 0, 9),
        "--image-range and --image-percentiles exclude each other",
    ),
    "a reversed range": (
        ("--images", "i", "--image-range", 9, 9),
        "must be LOW HIGH within 0 65535",
    ),
    "a range too wide": (("--images", "i", "--image-range", 0, 70000), "within 0 65535"),
    "percentiles too wide": (("--images", "i", "--image-percentiles", 0, 101), "within 0 100"),
    "a frame before the first": (("--images", "i", "--frame", -1), "--frame must be >= 0, got -1"),
    "resized to nothing": (("--images", "i", "--resize", 0), "--resize must be >= 1 pixel, got"),
    "no pixels": (("--images", "i", "--max-pixels", 0), "--max-pixels must be >= 1, got 0"),
    "workers": (("--images", "i", "--workers", -1), "--workers must be >= 0, got -1"),
    "an unknown alpha": (("--images", "i", "--alpha", "blend"), "blend"),
    "an unknown format": (("--images", "i", "--masks", "m", "--mask-format", "guess"), "guess"),
}
MASKED = ("--images", "i", "--masks", "m")
BAD_RULES: dict[str, tuple[tuple[object, ...], str]] = {
    "no classes": (("index",), "--mask-format index needs --classes: the names, from class 0 on"),
    "no classes, palette": (("palette",), "--mask-format palette needs --classes"),
    "one class": (
        ("index", "--classes", "one"),
        "--classes: there must be 2 to 255",
    ),
    "one name twice": (("index", "--classes", "a", "a"), "--classes: duplicate name in a a"),
    "three for two": (
        ("binary", "--classes", "a", "b", "c"),
        "--classes: a binary mask has 2 classes",
    ),
    "values of another": (
        ("binary", "--mask-values", 0, 1),
        "--mask-values applies to `values`",
    ),
    "no values": (("values",), "--mask-format values needs --mask-values: that of class 0, 1, 2"),
    "values and names": (
        ("values", "--mask-values", 0, 1, "--classes", "a", "b", "c"),
        "--mask-values: 2 mask values for 3 classes; give one per class",
    ),
    "a value twice": (
        ("values", "--mask-values", 4, 4, *AB),
        "--mask-values: a class needs its own value",
    ),
    "a value too high": (
        ("values", "--mask-values", 0, 65536),
        "mask values must be 0 to 65535, got 65",
    ),
    "ignored and a class": (
        ("index", *AB, "--ignore-value", 1),
        "--ignore-value 1 is also the value of a class",
    ),
    "inverted index": (("index", *AB, "--invert"), "--invert applies to `binary` only"),
    "unknown of two": (
        ("binary", "--unknown", "ignore"),
        "--unknown does not apply to binary masks",
    ),
    "tolerance of indices": (
        ("index", *AB, "--tolerance", 2),
        "--tolerance applies to `values` and",
    ),
    "too near": (
        ("values", "--mask-values", 0, 10, "--tolerance", 5),
        "0 and 10 differ by 10, too little for --tolerance 5",
    ),
    "rgb without a table": (("rgb",), "--mask-format rgb needs --colours FILE"),
    "a table without rgb": (
        ("binary", "--colours", "x"),
        "--colours x needs --mask-format rgb, not binary",
    ),
    "no such table": (("rgb", "--colours", "{}/no.yaml"), "no.yaml: No such file or directory"),
    "an invalid pattern": (
        ("binary", "--pair-regex", "("),
        "--pair-regex '(' is not a regular expression: ",
    ),
    "an invalid group": (
        ("binary", "--group-by", "["),
        "--group-by '[' is not a regular expression: ",
    ),
    "two ways to split": (
        ("binary", "--split-file", "s.csv", "--split-folders"),
        "--split-file and --split-folders both define the splits; use one of them",
    ),
    "fold 0": (
        ("binary", "--fold", "0/5"),
        "--fold 0/5: the first number must be from 1 to the second",
    ),
    "one fold": (("binary", "--fold", "1/1"), "--fold must be i/k with i from 1 to k"),
    "half a fold": (("binary", "--fold", "2"), "--fold must be like 2/5, got '2'"),
    "shares": (("binary", "--val-fraction", 1.5), "must be between 0 and 1"),
    "no training": (
        ("binary", "--val-fraction", 0.6, "--test-fraction", 0.4),
        "nothing is left to train on; lower one",
    ),
    "a share beside folds": (
        ("binary", "--fold", "1/2", "--val-fraction", 0.3),
        "--val-fraction has no effect with --fold; remove one of them",
    ),
    "a test share beside folders": (
        ("binary", "--split-folders", "--test-fraction", 0.3),
        "--test-fraction has no effect with --split-folders; remove one of them",
    ),
    "names beside a list": (
        ("binary", "--pairs", "p.txt", "--mask-suffix", "_m"),
        "--mask-suffix has no effect with --pairs, which lists every pair",
    ),
}
BAD_FLAGS |= {
    name: ((*MASKED, "--mask-format", *more), message)
    for name, (more, message) in BAD_RULES.items()
}
BAD_TABLES = {
    "two numbers": ("yaml", "a: [0, 0]\nb: [1, 1, 1]\n", "a is [0, 0]; expected [r, g, b] or ["),
    "a word": ("yaml", "a: black\nb: [1, 1, 1]\n", "a is black; expected [r, g, b]"),
    "beyond 255": ("json", '{"a": [0, 0, 256], "b": [1, 1, 1]}', "a is [0, 0, 256]; expected"),
    "a boolean": (
        "yaml",
        "a: [true, 0, 0]\nb: [1, 1, 1]\n",
        "a is [True, 0, 0]; expected [r, g, b]",
    ),
    "a list": ("yaml", "- 1\n- 2\n", "expected `name: [r, g, b]` lines"),
    "nothing": ("yaml", "", "expected `name: [r, g, b]` lines"),
    "broken YAML": ("yaml", "a: [0, 0\n", "t.yaml: while parsing a flow sequence"),
    "broken JSON": ("json", "{", "t.json: Expecting property name"),
    "a short row": (
        "csv",
        "name,r,g,b\na,0,0,0\nb,1\n",
        "b is [1]; expected [r, g, b] or [r, g, b, a], each 0 to 255",
    ),
    "a word in a row": ("csv", "a,0,0,0\nb,1,x,1\n", "b is [1, 'x', 1]; expected [r, g, b]"),
    "an open quote": ("csv", 'a,0,0,0\n"b,1,1,1\n', "t.csv: unexpected end of data"),
    "one colour twice": (
        "yaml",
        "a: [1, 1, 1]\nb: [1, 1, 1]\n",
        "(1, 1, 1) is listed twice",
    ),
    "three and four": (
        "yaml",
        "a: [1, 1, 1]\nb: [2, 2, 2, 0]\n",
        "either all colours have three numbers",
    ),
    "one class": (
        "yaml",
        "a: [1, 1, 1]\nignore: [2, 2, 2]\n",
        "t.yaml lists 1 classes; expected at least two",
    ),
}


@pytest.mark.parametrize("verb", ["check", "pack"])
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_an_invalid_command_is_refused_before_anything_is_read(
    case: str, verb: str, call, tmp_path: Path
) -> None:
    arguments, message = BAD_FLAGS[case]
    filled = [str(word).replace("{}", str(tmp_path)) for word in arguments]
    ended = call(verb, *filled, "--out", tmp_path / "out")
    assert ended.code == 2
    assert message in ended.message
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_TABLES)
def test_an_invalid_colour_table_is_refused_by_name(case: str, call, tmp_path: Path) -> None:
    suffix, text, message = BAD_TABLES[case]
    path = tmp_path / f"t.{suffix}"
    path.write_text(text)
    arguments = (*MASKED, "--mask-format", "rgb", "--colours", path, "--out", tmp_path / "out")
    ended = call("check", *arguments)
    assert ended.code == 2
    assert message in ended.message
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()
