"""`packing.propose`, `packing.class_files`, `packing.split_lists`, `packing.repair`.

`unet check FOLDER`, then the printed command: look-alikes of public data sets.
"""

import shlex
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.packing.class_files import apply_names, is_void
from shards.manifest import read_manifest

HEIGHT, WIDTH = 36, 48
VOC_COLOURS = np.zeros((256, 3), np.uint8)
for _index in range(256):
    for _bit in range(8):
        for _channel in range(3):
            VOC_COLOURS[_index, _channel] |= ((_index >> 3 * _bit + _channel) & 1) << (7 - _bit)


@dataclass
class LookAlike:
    """Folder of images and masks, and what a correct data set has."""

    root: Path
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    """{path of the image from `root`: class index [H, W], 255 = ignore}."""
    splits: dict[str, int] = field(default_factory=dict)
    """Samples of declared splits; {}: by hash."""

    def image(self, name: str, seed: int, mode: str = "RGB") -> None:
        """Write a smooth image with noise."""
        rng = np.random.default_rng(seed)
        ramp = np.linspace(30, 200, WIDTH)[None, :, None] + rng.normal(0, 12, (HEIGHT, WIDTH, 3))
        self.save(name, Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).convert(mode))

    def save(self, name: str, image: Image.Image, **options: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)

    def save_wide(self, name: str, pixels: np.ndarray) -> None:
        """Write pixels [H, W, 3], uint16, as PNG, which Pillow cannot."""
        height, width = pixels.shape[:2]
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(body))
                + kind
                + body
                + struct.pack(">I", zlib.crc32(kind + body))
                for kind, body in chunks
            )
        )

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def discs(seed: int, classes: int) -> np.ndarray:
    """Draw one disc of every class above 0 on class 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    index = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value in range(1, classes):
        row, column = rng.integers(8, HEIGHT - 8), rng.integers(8, WIDTH - 8)
        index[(y - row) ** 2 + (x - column) ** 2 < rng.integers(16, 50)] = value
    return index


def consecutive(index: np.ndarray) -> np.ndarray:
    """Number the values that occur from 0 on."""
    return np.unique(index, return_inverse=True)[1].reshape(index.shape).astype(np.uint8)


def stripes(seed: int, classes: int) -> np.ndarray:
    """Draw all classes as vertical stripes, shifted by the seed."""
    return np.repeat(((np.arange(WIDTH) // 4 + seed) % classes)[None], HEIGHT, 0).astype(np.uint8)


def paletted(index: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    return image


def make_drive(root: Path) -> LookAlike:
    data = LookAlike(root)
    for number in range(1, 41):
        split, end = ("training", "training") if number > 20 else ("test", "test")
        image = f"{split}/images/{number:02d}_{end}.tif"
        data.image(image, number)
        round_field = np.hypot(*(np.mgrid[:HEIGHT, :WIDTH] - 18)) < 17
        field_of_view = Image.fromarray(round_field.astype(np.uint8) * 255)
        data.save(f"{split}/mask/{number:02d}_{end}_mask.gif", field_of_view)
        if split == "training":
            data.masks[image] = discs(number, 2)
            vessels = Image.fromarray(data.masks[image] * 255)
            data.save(f"{split}/1st_manual/{number:02d}_manual1.gif", vessels)
    return data


def make_camvid(root: Path) -> LookAlike:
    data = LookAlike(root, splits={"train": 12, "val": 4, "test": 6})
    for split, count in data.splits.items():
        lines = []
        for number in range(count):
            name = f"{split}/0001TP_{number:06d}.png"
            data.image(name, 100 * list(data.splits).index(split) + number)
            data.masks[name] = index = stripes(number, 12)
            mask = f"{split}annot/0001TP_{number:06d}.png"
            data.save(mask, Image.fromarray(index))
            lines.append(f"/SegNet/CamVid/{name} /SegNet/CamVid/{mask}\n")
        data.write(f"{split}.txt", "".join(lines))
    return data


def make_cvppp(root: Path) -> LookAlike:
    data = LookAlike(root)
    for number in range(1, 13):
        image = f"A1/plant{number:03d}_rgb.png"
        data.image(image, number)
        leaves = consecutive(discs(number, 2 + number))
        data.masks[image] = np.minimum(leaves, 1)
        colours = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
        colours[0] = 0
        data.save(f"A1/plant{number:03d}_label.png", paletted(leaves, colours))
        data.write("A1/Leaf_counts.csv", "plant001,3\nplant002,4\n")
    return data


def make_cwfid(root: Path) -> LookAlike:
    data = LookAlike(root)
    colours = np.array([(0, 0, 0), (0, 255, 0), (255, 0, 0)], np.uint8)
    for number in range(1, 13):
        image = f"images/{number:03d}_image.png"
        data.image(image, number)
        data.masks[image] = discs(number, 3)
        data.save(
            f"annotations/{number:03d}_annotation.png", Image.fromarray(colours[data.masks[image]])
        )
        vegetation = (data.masks[image] == 0).astype(np.uint8) * 255
        data.save(f"masks/{number:03d}_mask.png", Image.fromarray(vegetation))
        data.write(f"annotations/{number:03d}_annotation.yaml", "filename: x\n")
    data.write("train_test_split.yaml", "train: [1, 2, 3]\ntest: [4]\n")
    data.write("README.md", "# CWFID\n")
    return data


def make_voc(root: Path) -> LookAlike:
    data = LookAlike(root, splits={"train": 8, "val": 4})
    names = []
    for number in range(20):
        name = f"20{7 + number % 4:02d}_{number:06d}"
        data.image(f"JPEGImages/{name}.jpg", number)
        data.write(f"Annotations/{name}.xml", "<annotation/>")
        if number >= 12:
            continue
        names.append(name)
        index = discs(number, 21)
        index[:, :2] = 255
        data.masks[f"JPEGImages/{name}.jpg"] = index
        data.save(f"SegmentationClass/{name}.png", paletted(index, VOC_COLOURS))
        data.save(f"SegmentationObject/{name}.png", paletted(index % 5, VOC_COLOURS))
    for split, some in (("train", names[:8]), ("val", names[8:]), ("trainval", names)):
        data.write(f"ImageSets/Segmentation/{split}.txt", "".join(f"{n}\n" for n in some))
        data.write(f"ImageSets/Main/aeroplane_{split}.txt", "".join(f"{n} -1\n" for n in some))
        data.write(f"ImageSets/Main/car_{split}.txt", "".join(f"{n}  1\n" for n in some))
    return data


def make_kvasir(root: Path) -> LookAlike:
    data = LookAlike(root)
    for number in range(12):
        image = f"images/cju{number:04d}.jpg"
        data.image(image, number)
        mask = Image.fromarray(discs(number, 2) * 255).convert("RGB")
        data.save(f"masks/cju{number:04d}.jpg", mask, quality=90)
        with Image.open(root / f"masks/cju{number:04d}.jpg") as stored:
            data.masks[image] = (np.asarray(stored.convert("L")) >= 128).astype(np.uint8)
    data.write("kavsir_bboxes.json", "{}")
    return data


def make_label_me_facade(root: Path) -> LookAlike:
    colours = np.array([(0, 0, 0), (128, 0, 0), (128, 0, 128), (0, 128, 0)], np.uint16) * 257
    data = LookAlike(root, splits={"train": 8, "test": 4})
    names = []
    for number in range(12):
        name = f"05june05_static_{number:04d}"
        names.append(name)
        image = f"images/{name}.jpg"
        data.image(image, number)
        data.masks[image] = discs(number, 4)
        data.save_wide(f"labels/{name}.png", colours[data.masks[image]])
    data.write("train.txt", "\n".join(names[:8]) + "\n")
    data.write("test.txt", "\n".join(names[8:]))
    return data


def make_flat(root: Path) -> LookAlike:
    data = LookAlike(root)
    for number in range(1, 13):
        data.image(f"image_{number}.png", number)
        data.masks[f"image_{number}.png"] = discs(number, 2)
        data.save(f"mask_{number}.png", Image.fromarray(discs(number, 2) * 255))
    return data


SETS: dict[str, Callable[[Path], LookAlike]] = {
    "DRIVE": make_drive,
    "CamVid": make_camvid,
    "CVPPP": make_cvppp,
    "CWFID": make_cwfid,
    "VOC": make_voc,
    "Kvasir": make_kvasir,
    "LabelMeFacade": make_label_me_facade,
    "flat prefixes": make_flat,
}

UNSURE: dict[str, list[str]] = {
    "DRIVE": [
        "masks are those in training/1st_manual (*_manual1); also possible: training/mask",
        "20 image files in test/images are not packed",
    ],
    "CamVid": ["the class names are those of --layout camvid; 'void' is ignored"],
    "CVPPP": ["these look like instance labels: all objects become one class"],
    "CWFID": [
        "masks are those in annotations (*_annotation); also possible: masks (*_mask)",
        "13 .yaml files are not read",
    ],
    "VOC": [
        "masks are those in SegmentationClass; also possible: SegmentationObject",
        "8 image files in JPEGImages are not packed",
        "20 .xml files are not read",
        "4 other lists that are named after splits are not used",
    ],
    "Kvasir": ["values >= 128 become foreground", "1 .json files are not read"],
    "LabelMeFacade": ["the data declare no val: 10 % of train become val"],
    "flat prefixes": ["no splits found: 10 % become val, by hash"],
}


def check(call, data: LookAlike, out: Path) -> tuple[str, list[str]]:
    """Check the folder without a flag; returns the output and the words of the command."""
    ended = call("check", data.root, "--out", out / "check", "--workers", 1)
    assert ended.code == 0, ended.err
    ((line),) = [line for line in ended.out.splitlines() if line.startswith("unet pack ")]
    words = shlex.split(line)
    assert words[-2:] == ["--out", "SHARDS"]
    return ended.out, [*words[1:-1], str(out / "shards")]


def assert_packed(call, data: LookAlike, out: Path) -> None:
    """Assert that the data set has exactly these images and, up to their numbers, these classes."""
    assert call("unpack", "--data", out / "shards", "--out", out / "unpacked").code == 0
    unpacked = sorted(path for path in (out / "unpacked/images").rglob("*") if path.is_file())
    assert len(unpacked) == len(data.masks)
    classes: dict[int, set[object]] = {}
    for path in unpacked:
        name = path.relative_to(out / "unpacked/images")
        (source,) = [image for image in data.masks if image.endswith(str(name))]
        assert path.read_bytes() == (data.root / source).read_bytes()
        with Image.open((out / "unpacked/masks" / name).with_suffix(".png")) as mask:
            pixels = np.asarray(mask).reshape(HEIGHT * WIDTH, -1)
        for index, value in zip(data.masks[source].ravel(), pixels.tolist(), strict=True):
            classes.setdefault(int(index), set()).add(tuple(value))
    assert all(len(values) == 1 for values in classes.values())
    assert len(set.union(*classes.values())) == len(classes)
    splits = {name: s.samples for name, s in read_manifest(out / "shards").splits.items()}
    declared = data.splits or {"train": len(data.masks)}
    if "val" not in declared:
        splits["train"] += splits.pop("val")
    assert splits == declared


@pytest.mark.parametrize("name", SETS)
def test_the_first_command_packs_a_look_alike(name: str, call, tmp_path: Path) -> None:
    data = SETS[name](tmp_path / "my data")
    if name == "CamVid":
        for index in data.masks.values():
            index[index == 11] = 255
    out, command = check(call, data, tmp_path)
    unsure = [line for line in out.splitlines() if line.startswith("unsure: ")]
    assert [text for text in UNSURE[name] if not any(text in line for line in unsure)] == []
    ended = call(*command)
    assert ended.code == 0, ended.err
    assert_packed(call, data, tmp_path)


CAMVID = (
    *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "Sign", "Fence", "Car"),
    *("Pedestrian", "Bicyclist", "Void"),
)


@pytest.mark.parametrize("file", ["codes.txt", "class_dict.csv", "label_colors.txt"])
def test_a_file_that_names_the_classes_names_them_and_void(file: str, call, tmp_path: Path) -> None:
    data = make_camvid(tmp_path / "data")
    numbered = list(enumerate(CAMVID))
    texts = {
        "codes.txt": "\n".join(CAMVID),
        "class_dict.csv": "name,r,g,b\n" + "".join(f"{n},{i},128,0\n" for i, n in numbered),
        "label_colors.txt": "".join(f"{i} 128 0\t{n}\n" for i, n in numbered),
    }
    data.write(file, texts[file])
    for index in data.masks.values():
        index[index == 11] = 255
    out, command = check(call, data, tmp_path)
    assert f"{file}; 'Void' is ignored" in out
    assert shlex.join(command).count("--ignore-value 11") == 1
    assert call(*command).code == 0
    assert read_manifest(tmp_path / "shards").classes == CAMVID[:-1]
    assert_packed(call, data, tmp_path)


def test_a_void_class_that_comes_first_is_ignored_too(call, tmp_path: Path) -> None:
    data = make_camvid(tmp_path / "data")
    data.write("classes.txt", "unlabelled\n" + "\n".join(CAMVID[:11]))
    for index in data.masks.values():
        index[index == 0] = 255
    _, command = check(call, data, tmp_path)
    assert "--mask-format values --mask-values 1 2 3" in shlex.join(command)
    assert call(*command).code == 0
    assert read_manifest(tmp_path / "shards").classes == CAMVID[:11]
    assert_packed(call, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("void", True), ("Ignore_label", True), ("don't care", True), ("Unlabeled pixels", True)),
        *(("background", False), ("avoidance", False), ("class", False), ("unknown bird", False)),
    ],
)
def test_names_of_no_class(name: str, expected: bool) -> None:
    assert is_void(name) == expected


def test_void_beside_another_ignored_value_is_ignored_as_unknown() -> None:
    classes = dict.fromkeys(("road", "car", "void"))
    flags = ["--mask-format", "index", "--classes", "class_0", "class_1", "class_2"]
    assert apply_names([*flags, "--ignore-value", "255"], classes) == (
        shlex.split(
            "--mask-format values --mask-values 0 1 --classes road car --ignore-value 255 "
            "--unknown ignore"
        ),
        "void",
    )


def test_names_of_a_known_layout_need_its_values(call, tmp_path: Path) -> None:
    """Folders named as those of CamVid with other classes keep placeholders."""
    data = make_camvid(tmp_path / "data")
    for path in (tmp_path / "data").glob("*annot/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) % 5).save(path)
    _, command = check(call, data, tmp_path)
    assert "class_4" in command
    assert "--ignore-value" not in command


def test_a_file_that_names_colours_names_the_classes_in_its_order(call, tmp_path: Path) -> None:
    data = make_cwfid(tmp_path / "data")
    lines = ("name,r,g,b", "soil,0,0,0", "weed,255,0,0", "crop,0,255,0", "tree,9,9,9", "")
    data.write("class_dict.csv", "\n".join(lines))
    _, command = check(call, data, tmp_path)
    assert call(*command).code == 0
    assert read_manifest(tmp_path / "shards").classes == ("soil", "weed", "crop")
    assert_packed(call, data, tmp_path)


def test_a_file_of_other_classes_is_not_used(call, tmp_path: Path) -> None:
    data = make_camvid(tmp_path / "data")
    data.write("classes.txt", "Road\nCar\n")
    out, command = check(call, data, tmp_path)
    assert "classes.txt: not used, it has 2 names, but the masks have 12 classes" in out
    assert "class_11" in command
