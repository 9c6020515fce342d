"""`pack`, `packing.plan`, `packing.stored_plan`, `packing.shard_job`, `packing.manifest`,
`packing.classes`, `packing.problems`, `packing.duplicates`.

Packing: byte-identical for any workers and kills, a correct manifest, one-line errors.
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.folders.splits import hash_fraction
from shards.images.files import ImageFormat
from shards.manifest import read_manifest
from shards.masks.palettes import default_palette
from shards.masks.png import encode_mask
from shards.offsets import read_offsets
from shards.sample import DataError
from tests.conftest import flags, levels, solid_image

Folder = Path


# ---- contents of a data set


def test_the_manifest_describes_the_shards(shards: Path, cells: Path, call) -> None:
    manifest = read_manifest(shards)
    assert manifest.classes == ("background", "foreground")
    assert manifest.image_format == ImageFormat("RGB")
    assert manifest.verified == "full"
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 8,
        "val": 4,
    }
    assert [s.name for s in manifest.splits["train"].shards] == [
        f"train-{i:06d}.tar" for i in range(3)
    ]
    train, foreground, ignored = [], 0, 0
    for name, split in manifest.splits.items():
        ((size),) = split.sizes
        assert (size.width, size.height, size.mode, size.images) == (48, 48, "RGB", split.samples)
        for shard in split.shards:
            data = (shards / shard.name).read_bytes()
            assert len(data) == shard.bytes
            assert hashlib.sha256(data).hexdigest() == shard.sha256
            pixels = np.zeros(256, np.int64)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    if member.name.endswith(".mask.png"):
                        mask = np.asarray(Image.open(io.BytesIO(file.read())))
                        pixels += np.bincount(mask.ravel(), minlength=256)
                    elif member.name.endswith(".png") and name == "train":
                        train.append(np.asarray(Image.open(io.BytesIO(file.read()))) / 255)
            assert shard.pixels == (pixels[0], pixels[1], pixels[255])
            foreground, ignored = foreground + pixels[1], ignored + pixels[255]
    in_files = [np.asarray(Image.open(path)) for path in (cells / "masks").iterdir()]
    assert foreground == sum((mask == 255).sum() for mask in in_files)
    assert ignored == 0
    pixels = np.concatenate([image.reshape(-1, 3) for image in train])
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), atol=1e-6)


def test_a_sample_is_the_original_image_with_a_canonical_mask(shards: Path, cells: Path) -> None:
    seen = set()
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            content = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
            assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}
        for triple in zip(*[iter(content)] * 3, strict=True):
            key = triple[0].split(".")[0]
            assert triple == (f"{key}.json", f"{key}.mask.png", f"{key}.png")
            assert content[f"{key}.png"] == (cells / "images" / f"{key}.png").read_bytes()
            assert json.loads(content[f"{key}.json"]) == {
                "source": f"{key}.png",
                "width": 48,
                "height": 48,
                "group": None,
            }
            mask = Image.open(io.BytesIO(content[f"{key}.mask.png"]))
            drawn = np.asarray(Image.open(cells / "masks" / f"{key}.png"))
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.asarray(mask), drawn // 255)
            seen.add(key)
    assert len(seen) == 12


def test_idx_files_locate_the_members(shards: Path) -> None:
    for shard in sorted(shards.glob("*.tar")):
        data, index = shard.read_bytes(), read_offsets(shard)
        with tarfile.open(shard) as tar:
            expected = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        found = {
            member.name: data[member.offset : member.offset + member.size]
            for row in range(len(index))
            for member in (index[row].image, index[row].mask, index[row].info)
            if member is not None
        }
        assert found == expected


def test_stock_webdataset_reads_the_shards(shards: Path) -> None:
    files = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == 12
    assert all({"png", "mask.png", "json"} <= set(sample) for sample in samples)


def test_images_without_masks_become_unlabelled_shards(cells: Path, call, tmp_path: Path) -> None:
    ended = call("pack", "--images", cells / "images", "--out", tmp_path / "out", "--workers", 1)
    assert ended.code == 0
    manifest = read_manifest(tmp_path / "out")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"unlabelled": 12}
    assert manifest.classes == ()
    with tarfile.open(tmp_path / "out" / "unlabelled-000000.tar") as tar:
        assert not [name for name in tar.getnames() if "mask" in name]


def test_the_hash_of_the_key_decides_the_split(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 40, size=(16, 16))
    ended = call("pack", *flags(folder, tmp_path / "out"), "--val-fraction", 0.3)
    assert ended.code == 0
    manifest = read_manifest(tmp_path / "out")
    keys = [f"p{i:03d}" for i in range(40)]
    assert manifest.splits["val"].samples == sum(hash_fraction(key) < 0.3 for key in keys)


def test_a_group_never_spans_two_splits(draw, call, tmp_path: Path) -> None:
    for patient in range(8):
        draw(tmp_path / "in", 3, size=(16, 16), name=f"patient{patient}/{{}}", seed=patient)
    more = ("--group-by", r"patient(\d+)", "--val-fraction", 0.5)
    assert call("pack", *flags(tmp_path / "in", tmp_path / "out", *more)).code == 0
    splits: dict[str, set[str]] = {}
    for shard in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    info = json.loads(tar.extractfile(name).read())  # type: ignore[union-attr]
                    assert info["group"] == info["source"][7]
                    splits.setdefault(info["group"], set()).add(shard.name.split("-")[0])
    assert len(splits) == 8
    assert all(len(names) == 1 for names in splits.values())
    assert {"train", "val"} == {name for names in splits.values() for name in names}


def test_an_empty_val_split_is_warned_about(pair: Path, call) -> None:
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert ended.code == 0
    assert "split val is empty" in ended.out


@pytest.mark.parametrize("verb", ["check", "pack"])
def test_a_class_without_pixels_is_refused_unless_allowed(verb: str, pair: Path, call) -> None:
    more = ("--mask-values", 0, 255, 7, "--classes", "ground", "cell", "ghost")
    arguments = flags(pair, pair / "out", *more, mask_format="values")
    ended = call(verb, *arguments)
    assert ended.code == 1
    assert "class 'ghost' has no pixel in 1 masks; correct the flags of the mask" in ended.err
    assert not (pair / "out" / "index.json").exists()
    allowed = call(verb, *arguments, "--allow-absent-classes")
    assert allowed.code == 0, allowed.err
    assert "warning: class 'ghost' has no pixels" in allowed.out


@pytest.mark.parametrize("verb", ["check", "pack"])
def test_a_class_of_which_all_pixels_are_ignored_is_refused(verb: str, pair: Path, call) -> None:
    arguments = flags(pair, pair / "out", "--ignore-value", 255)
    ended = call(verb, *arguments)
    assert ended.code == 1
    assert "class 'foreground' has no pixel in 1 masks; 5 % of the pixels are" in ended.err
    assert "if 255 is a class, drop --ignore-value" in ended.err


def test_headers_alone_do_not_make_a_class_absent(pair: Path, call) -> None:
    more = ("--classes", "ground", "cell", "ghost", "--verify", "headers")
    Image.fromarray(levels(0, 1)).save(pair / "masks" / "a.png")
    assert call("pack", *flags(pair, pair / "out", *more, mask_format="index")).code == 0


def test_identical_images_are_listed(pair: Path, call) -> None:
    for part in ("images", "masks"):
        shutil.copy(pair / part / "a.png", pair / part / "b.png")
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert read_manifest(pair / "out").duplicates == (("train:a.png", "train:b.png"),)
    assert "train:a.png = train:b.png" in ended.out


def test_an_image_with_an_orientation_is_stored_upright(pair: Path, call) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 3)).astype(np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(pair / "images" / "a.png", exif=exif)
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert ended.code == 0
    assert "1 images with an EXIF orientation are stored upright" in ended.out
    with tarfile.open(pair / "out" / "train-000000.tar") as tar:
        stored = Image.open(io.BytesIO(tar.extractfile("a.png").read()))  # type: ignore[union-attr]
        info = json.loads(tar.extractfile("a.json").read())  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(stored), np.rot90(pixels, -1))
    assert 0x0112 not in stored.getexif()
    assert (info["width"], info["height"]) == (20, 16)


def test_the_data_set_is_grey_unless_an_image_is_in_colour(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 4, mode="L")
    assert call("pack", *flags(folder, tmp_path / "grey")).code == 0
    assert read_manifest(tmp_path / "grey").image_format.channels == "L"
    assert len(read_manifest(tmp_path / "grey").mean) == 1
    draw(folder, 1, name="c{}")
    assert call("pack", *flags(folder, tmp_path / "both")).code == 0
    assert read_manifest(tmp_path / "both").image_format.channels == "RGB"


def test_a_shard_is_closed_at_its_size(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 6)
    more = ("--val-fraction", 0, "--shard-bytes", 15_000)
    assert call("pack", *flags(folder, tmp_path / "out", *more)).code == 0
    shards = read_manifest(tmp_path / "out").splits["train"].shards
    assert len(shards) > 1
    assert sum(shard.samples for shard in shards) == 6


def test_skip_unpaired_skips_files_without_a_pair(pair: Path, call) -> None:
    solid_image().save(pair / "images" / "b.png")
    ended = call("pack", *flags(pair, pair / "out", "--skip-unpaired"))
    assert ended.code == 0
    assert sum(split.samples for split in read_manifest(pair / "out").splits.values()) == 1


def test_suffixes_distinguish_images_and_masks_in_one_folder(pair: Path, call) -> None:
    (pair / "masks" / "a.png").rename(pair / "images" / "a_mask.png")
    (pair / "images" / "a.png").rename(pair / "images" / "a_photo.png")
    folders = ("--images", pair / "images", "--masks", pair / "images", "--mask-format", "binary")
    suffixes = ("--image-suffix", "_photo", "--mask-suffix", "_mask", "--workers", 1)
    assert call("pack", *folders, *suffixes, "--out", pair / "out").code == 0
    assert [s.samples for s in read_manifest(pair / "out").splits.values()] == [1]


# ---- every mask format


INDEX = np.repeat(np.arange(12)[:, None] // 4, 14, axis=1).astype(np.uint8)
"""Three stripes: class 0, 1, 2."""
COLOURS = np.array([(10, 20, 30), (200, 0, 0), (0, 100, 250)], np.uint8)
NAMES = ("--classes", "ground", "cell", "rim")
TABLES = {
    "yaml": "ground: [10, 20, 30]\ncell: [200, 0, 0]\nrim: [0, 100, 250]\n",
    "json": '{"ground": [10, 20, 30], "cell": [200, 0, 0], "rim": [0, 100, 250]}',
    "csv": "name,r,g,b\nground,10,20,30\ncell,200,0,0\nrim,0,100,250\n",
}


def paletted(palette: np.ndarray = COLOURS) -> Image.Image:
    image = Image.fromarray(INDEX, "P")
    image.putpalette(palette.tobytes())
    return image


def noisy(values: np.ndarray) -> Image.Image:
    """Add noise as in a lossy file."""
    noise = np.random.default_rng(0).integers(-6, 7, values.shape)
    return Image.fromarray((values.astype(int) + noise).clip(0, 255).astype(np.uint8))


def by_table(kind: str, text: str | None = None) -> tuple[str, ...]:
    return ("rgb", kind, TABLES[kind] if text is None else text)


IGNORED = np.where(INDEX == 2, 255, INDEX)
BY_NAME = ("ground", "cell", "rim")
FORMATS: dict[str, tuple[Image.Image, tuple[object, ...], np.ndarray, tuple[str, ...]]] = {
    "binary": (
        Image.fromarray((INDEX > 0).astype(np.uint8) * 9),
        ("binary",),
        INDEX > 0,
        ("background", "foreground"),
    ),
    "binary, one bit": (
        Image.fromarray(INDEX > 0),
        ("binary",),
        INDEX > 0,
        ("background", "foreground"),
    ),
    "binary, inverted": (
        Image.fromarray((INDEX > 0).astype(np.uint8) * 255),
        ("binary", "--invert", "--classes", "soil", "plant"),
        INDEX == 0,
        ("soil", "plant"),
    ),
    "binary, soft": (
        noisy((INDEX > 0) * 255),
        ("binary", "--mask-threshold", 128),
        INDEX > 0,
        ("background", "foreground"),
    ),
    "binary, ignored": (
        Image.fromarray(np.array([0, 255, 7], np.uint8)[INDEX]),
        ("binary", "--ignore-value", 7),
        IGNORED,
        ("background", "foreground"),
    ),
    "index": (Image.fromarray(INDEX), ("index", *NAMES), INDEX, BY_NAME),
    "index, 16 bits": (
        Image.fromarray(INDEX.astype(np.uint16)),
        ("index", *NAMES),
        INDEX,
        BY_NAME,
    ),
    "index, of a palette": (paletted(), ("index", *NAMES), INDEX, BY_NAME),
    "index, unknown": (
        Image.fromarray(INDEX),
        ("index", "--classes", "ground", "cell", "--unknown", "ignore"),
        IGNORED,
        ("ground", "cell"),
    ),
    "values": (
        Image.fromarray(np.array([0, 128, 255], np.uint8)[INDEX]),
        ("values", "--mask-values", 0, 128, 255),
        INDEX,
        ("class 0", "class 128", "class 255"),
    ),
    "values, 16 bits": (
        Image.fromarray(np.array([7, 300, 60000], np.uint16)[INDEX]),
        ("values", "--mask-values", 7, 300, "--ignore-value", 60000, *NAMES[:3]),
        IGNORED,
        ("ground", "cell"),
    ),
    "values, near": (
        noisy(np.array([20, 128, 235], np.uint8)[INDEX]),
        ("values", "--mask-values", 20, 128, 235, "--tolerance", 10, *NAMES),
        INDEX,
        BY_NAME,
    ),
    "palette": (paletted(), ("palette", *NAMES), INDEX, BY_NAME),
    "rgb, of YAML": (Image.fromarray(COLOURS[INDEX]), by_table("yaml"), INDEX, BY_NAME),
    "rgb, of JSON": (Image.fromarray(COLOURS[INDEX]), by_table("json"), INDEX, BY_NAME),
    "rgb, of CSV": (Image.fromarray(COLOURS[INDEX]), by_table("csv"), INDEX, BY_NAME),
    "rgb, of a palette": (paletted(), by_table("yaml"), INDEX, BY_NAME),
    "rgb, ignored": (
        Image.fromarray(COLOURS[INDEX]),
        by_table("yaml", TABLES["yaml"].replace("rim", "ignore")),
        IGNORED,
        ("ground", "cell"),
    ),
    "rgb, unknown": (
        Image.fromarray(COLOURS[INDEX]),
        (*by_table("yaml", TABLES["yaml"].partition("rim")[0]), "--unknown", "ignore"),
        IGNORED,
        ("ground", "cell"),
    ),
    "rgb, near": (
        noisy(COLOURS[INDEX]),
        (*by_table("yaml"), "--tolerance", 10),
        INDEX,
        BY_NAME,
    ),
    "rgb, with alpha": (
        Image.fromarray(np.array([(9, 9, 9, 0), (9, 9, 9, 255), (0, 9, 0, 255)], np.uint8)[INDEX]),
        by_table("csv", "ground,9,9,9,0\ncell,9,9,9,255\nrim,0,9,0,255\n"),
        INDEX,
        BY_NAME,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_mask_format_becomes_class_indices(name: str, call, samples, tmp_path: Path) -> None:
    mask, rule, expected, classes = FORMATS[name]
    kind, *more = rule
    if kind == "rgb":
        suffix, text, *more = more
        table = tmp_path / f"colours.{suffix}"
        table.write_text(str(text))
        more = ["--colours", table, *more]
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    solid_image(size=(14, 12)).save(tmp_path / "images" / "a.png")
    mask.save(tmp_path / "masks" / "a.png")
    ended = call("pack", *flags(tmp_path, tmp_path / "out", *more, mask_format=str(kind)))
    assert ended.code == 0, ended.err
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == classes
    np.testing.assert_array_equal(samples(tmp_path / "out")["a.png"].mask, expected)
    if kind == "palette" or (kind == "rgb" and "alpha" not in name):
        assert manifest.palette == tuple(tuple(c) for c in COLOURS[: len(classes)].tolist())
    (split,) = manifest.splits.values()
    counts = np.bincount(np.asarray(expected, np.uint8).ravel(), minlength=256)
    assert split.shards[0].pixels == (*counts[: len(classes)], counts[255])


@pytest.mark.parametrize(("num_classes", "bits"), [(2, 1), (3, 2), (16, 4), (17, 8)])
def test_masks_of_few_classes_take_few_bits(
    num_classes: int, bits: int, call, samples, tmp_path
) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    index = np.arange(20 * 16, dtype=np.int64).reshape(16, 20) % num_classes
    solid_image().save(tmp_path / "images" / "a.png")
    Image.fromarray(index.astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    more = ("--classes", *(f"c{i}" for i in range(num_classes)))
    ended = call("pack", *flags(tmp_path, tmp_path / "out", *more, mask_format="index"))
    assert ended.code == 0, ended.err
    sample = samples(tmp_path / "out")["a.png"]
    np.testing.assert_array_equal(sample.mask, index)
    assert sample.raw.mask[24] == bits  # the bit depth in PNG's header


# ---- pairing


def listed_pairs(name: str, lines: str) -> Callable[[Path], tuple[object, ...]]:
    def write_list(folder: Path) -> tuple[object, ...]:
        (folder / name).write_text(lines)
        return ("--pairs", folder / name)

    return write_list


PAIRINGS: dict[str, tuple[dict[str, str], Callable[[Path], tuple[object, ...]]]] = {
    "same names": (
        {"x/a.jpg": "photos/x/a.jpg", "x/a.png": "drawn/x/a.png"},
        lambda f: ("--images", f / "photos", "--masks", f / "drawn"),
    ),
    "suffixes": (
        {"a_rgb.png": "photos/a_rgb.png", "a_gt.png": "drawn/a_gt.png"},
        lambda f: (
            *("--images", f / "photos", "--masks", f / "drawn"),
            *("--image-suffix", "_rgb", "--mask-suffix", "_gt"),
        ),
    ),
    "endings in one folder": (
        {"a.bmp": "both/a.bmp", "a.png": "both/a.png"},
        lambda f: (
            *("--images", f / "both", "--masks", f / "both"),
            *("--image-ext", "bmp", "--mask-ext", ".png"),
        ),
    ),
    "a pattern": (
        {"scan_17_colour.png": "photos/scan_17_colour.png", "17.png": "drawn/label/17.png"},
        lambda f: (
            *("--images", f / "photos", "--masks", f / "drawn"),
            *("--pair-regex", r"(\d+)"),
        ),
    ),
    "a CSV": (
        {"a one.png": "here/a one.png", "other.png": "there/other.png"},
        listed_pairs("pairs.csv", "image,mask\nhere/a one.png,there/other.png\n"),
    ),
    "a TSV": (
        {"a, one.png": "here/a, one.png", "other.png": "there/other.png"},
        listed_pairs("pairs.tsv", "here/a, one.png\tthere/other.png\n"),
    ),
    "a text": (
        {"a.png": "here/a.png", "b.png": "there/b.png"},
        listed_pairs("pairs.txt", "# image and mask\n\nhere/a.png there/b.png\n"),
    ),
    "a list below folders": (
        {"a.png": "here/a.png", "b.png": "there/b.png"},
        lambda f: (
            *listed_pairs("pairs.txt", "a.png b.png\n")(f),
            *("--images", f / "here", "--masks", f / "there"),
        ),
    ),
}


@pytest.mark.parametrize("way", PAIRINGS)
def test_every_pairing_finds_the_mask(way: str, call, samples, tmp_path: Path) -> None:
    files, make_arguments = PAIRINGS[way]
    image, mask = files.values()
    mask_pixels = levels(255, 255, 0, 255)
    for path in (image, mask):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    solid_image().save(tmp_path / image)
    Image.fromarray(mask_pixels).save(tmp_path / mask)
    arguments = (*make_arguments(tmp_path), "--mask-format", "binary", "--workers", 1)
    ended = call("pack", *arguments, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    ((source, sample),) = samples(tmp_path / "out").items()
    assert image.endswith(source)
    np.testing.assert_array_equal(sample.mask, mask_pixels // 255)


# ---- rules for images


def pack_image(folder: Path, image: Image.Image, call, samples, *more: object, **saved: object):
    """Pack one image as `b.tif` or `b.png`; returns manifest, sample and stdout."""
    name = "b.tif" if image.mode in ("I;16", "CMYK") or "append_images" in saved else "b.png"
    image.save(folder / "images" / name, **saved)
    (folder / "images" / "a.png").unlink()
    (folder / "masks" / "a.png").rename(folder / "masks" / "b.png")
    ended = call("pack", *flags(folder, folder / "out", *more))
    assert ended.code == 0, ended.err
    sample = samples(folder / "out")[name]
    return read_manifest(folder / "out"), sample, ended.out


def deep() -> np.ndarray:
    return (np.arange(320, dtype=np.uint16) * 200).reshape(16, 20)


def test_16_bit_values_are_scaled_from_the_declared_range(pair: Path, call, samples) -> None:
    image = Image.fromarray(deep())
    more = ("--image-range", 1000, 50000)
    manifest, sample, message = pack_image(pair, image, call, samples, *more)
    assert manifest.image_format == ImageFormat("L", "refuse", (1000, 50000))
    scaled = ((deep().astype(float) - 1000) * (255 / 49000)).clip(0, 255).round()
    np.testing.assert_array_equal(sample.image[..., 0], scaled)
    assert sample.raw.image == (pair / "images" / "b.tif").read_bytes()
    np.testing.assert_allclose(manifest.mean, scaled.mean() / 255, atol=1e-6)
    np.testing.assert_allclose(manifest.std, scaled.std() / 255, atol=1e-6)
    assert "16-bit values 1000 to 50000 become 0 to 255" in message


def test_16_bit_values_are_scaled_from_percentiles_of_all_pixels(pair: Path, call, samples) -> None:
    image = Image.fromarray(deep())
    more = ("--image-percentiles", 10, 90)
    manifest, sample, message = pack_image(pair, image, call, samples, *more)
    low, high = np.sort(deep().ravel())[[320 // 10 - 1, 320 * 9 // 10 - 1]]
    assert manifest.image_format.range == (low, high)
    scaled = ((deep().astype(float) - low) * (255 / (high - low))).clip(0, 255).round()
    np.testing.assert_array_equal(sample.image[..., 0], scaled)
    assert f"16-bit values {low} to {high} become 0 to 255" in message


def test_a_range_does_not_affect_8_bit_images(pair: Path, call, samples) -> None:
    more = ("--image-range", 0, 1000)
    manifest, sample, message = pack_image(pair, solid_image(), call, samples, *more)
    assert manifest.image_format.range is None
    assert (sample.image == 9).all()
    assert "16-bit" not in message


def test_alpha_drop_keeps_the_colour_of_transparent_pixels(pair, call, samples) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 20, 4)).astype(np.uint8)
    image = Image.fromarray(pixels)
    manifest, sample, message = pack_image(pair, image, call, samples, "--alpha", "drop")
    assert manifest.image_format.alpha == "drop"
    np.testing.assert_array_equal(sample.image, pixels[..., :3])
    assert sample.raw.image == (pair / "images" / "b.png").read_bytes()
    assert "1 images have transparent pixels; alpha is kept" in message


@pytest.mark.parametrize("frame", [0, 1])
def test_the_chosen_frame_is_packed(frame: int, pair: Path, call, samples) -> None:
    stack = {"save_all": True, "append_images": [solid_image(99, mode="L")]}
    image = solid_image(5, mode="L")
    _, sample, message = pack_image(pair, image, call, samples, "--frame", frame, **stack)
    assert (sample.image == (5, 99)[frame]).all()
    assert sample.raw.extension == "png"
    assert "1 images with several frames are stored as a single frame" in message


def test_exif_ignore_keeps_the_pixels_as_stored(pair: Path, call, samples) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(pixels)
    _, sample, message = pack_image(pair, image, call, samples, "--exif", "ignore", exif=exif)
    np.testing.assert_array_equal(sample.image, pixels)
    assert "are stored unrotated" in message


def test_resize_scales_images_and_masks_down(pair: Path, call, samples) -> None:
    image = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 16, 20, axis=1))
    mask = np.asarray(Image.open(pair / "masks" / "a.png")) // 255
    manifest, sample, message = pack_image(pair, image, call, samples, "--resize", 10)
    assert sample.image.shape == (8, 10, 1)
    np.testing.assert_array_equal(sample.image[:, 0, 0], np.arange(8) * 32 + 8)
    np.testing.assert_array_equal(sample.mask, mask[1::2, 1::2])
    ((size),) = manifest.splits[sample.split].sizes
    assert (size.width, size.height) == (10, 8)
    assert sample.raw.parse_info()["width"] == 10
    assert "1 images are scaled down" in message


def test_resize_mask_scales_masks_to_their_images(pair: Path, call, samples) -> None:
    mask = np.zeros((8, 10), np.uint8)
    mask[2:4, 2:4] = 255
    Image.fromarray(mask).save(pair / "masks" / "a.png")
    ended = call("pack", *flags(pair, pair / "out", "--resize-mask"))
    assert ended.code == 0, ended.err
    assert "  1 images have a mask of another size, resized to theirs" in ended.out
    expected = np.repeat(np.repeat(mask // 255, 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(samples(pair / "out")["a.png"].mask, expected)


def test_CMYK_is_kept_and_decoded_as_RGB(pair: Path, call, samples) -> None:  # noqa: N802
    image = Image.new("CMYK", (20, 16), (10, 200, 30, 40))
    manifest, sample, message = pack_image(pair, image, call, samples)
    assert manifest.image_format.channels == "RGB"
    np.testing.assert_array_equal(sample.image, np.asarray(image.convert("RGB")))
    assert sample.raw.image == (pair / "images" / "b.tif").read_bytes()
    assert "are CMYK or YCbCr" in message


# ---- splits


def test_every_sample_is_in_val_in_exactly_one_fold(draw, call, samples, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 30, size=(8, 8))
    in_val: list[str] = []
    for fold in (1, 2, 3):
        out = tmp_path / str(fold)
        ended = call("pack", *flags(folder, out, "--fold", f"{fold}/3"))
        assert ended.code == 0, ended.err
        found = samples(out)
        assert len(found) == 30
        in_val += [source for source, sample in found.items() if sample.split == "val"]
    assert sorted(in_val) == [f"p{i:03d}.png" for i in range(30)]


def test_split_folders_takes_the_first_folder_as_the_split(
    draw, call, samples, tmp_path: Path
) -> None:
    for number, split in enumerate(("train", "Validation", "test")):
        draw(tmp_path / "in", 2, size=(8, 8), name=f"{split}/{{}}", seed=number)
    ended = call("pack", *flags(tmp_path / "in", tmp_path / "out", "--split-folders"))
    assert ended.code == 0, ended.err
    found = {source: sample.split for source, sample in samples(tmp_path / "out").items()}
    assert found == {
        **{"train/0.png": "train", "train/1.png": "train"},
        **{"Validation/0.png": "val", "Validation/1.png": "val"},
        **{"test/0.png": "test", "test/1.png": "test"},
    }


def test_lists_named_after_splits_assign_them(draw, call, samples, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 4, size=(8, 8))
    (tmp_path / "train.txt").write_text("# the rest\np000\np003.png\n")
    (tmp_path / "val.txt").write_text("p001.png masks/p001.png\n\np002.png\n")
    lists = ("--split-file", tmp_path / "train.txt", tmp_path / "val.txt")
    ended = call("pack", *flags(folder, tmp_path / "out", *lists))
    assert ended.code == 0, ended.err
    found = {source: sample.split for source, sample in samples(tmp_path / "out").items()}
    assert found == {"p000.png": "train", "p001.png": "val", "p002.png": "val", "p003.png": "train"}


@pytest.fixture
def doubled(draw, tmp_path: Path) -> tuple[Path, Path]:
    """Four images, two of them identical, and a split file with these in different splits."""
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    shutil.copy(folder / "images" / "p001.png", folder / "images" / "p003.png")
    path = tmp_path / "split.csv"
    path.write_text("path,split\np000,train\np001,train\np002,val\np003,val\n")
    return folder, path


def test_one_image_in_two_splits_is_refused_with_both_names(doubled, call, tmp_path) -> None:
    folder, path = doubled
    ended = call("pack", *flags(folder, tmp_path / "out", "--split-file", path))
    assert ended.code == 1
    assert "p001.png (train) = p003.png (val) are the same image; one image in two" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not [*(tmp_path / "out").glob("*.tar")]


def test_one_image_twice_in_a_split_is_only_warned_about(doubled, call, tmp_path: Path) -> None:
    folder, path = doubled
    path.write_text(path.read_text().replace("p003,val", "p003,train"))
    ended = call("pack", *flags(folder, tmp_path / "out", "--split-file", path))
    assert ended.code == 0, ended.err
    assert "warning: 1 groups of identical images, the first: train:p001.png = train" in ended.out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.duplicates == (("train:p001.png", "train:p003.png"),)


def test_images_equal_in_size_and_middle_are_not_a_leak(doubled, call, tmp_path) -> None:
    folder, path = doubled
    for number in (1, 3):
        pixels = np.zeros((80, 80, 3), np.uint8)
        pixels[0, 0] = number
        Image.fromarray(pixels).save(folder / "images" / f"p00{number}.bmp")
        (folder / "images" / f"p00{number}.png").unlink()
        Image.new("L", (80, 80)).save(folder / "masks" / f"p00{number}.png")
    ended = call("pack", *flags(folder, tmp_path / "out", "--split-file", path))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("verb", ["check", "pack"])
def test_identical_images_can_be_kept_in_one_split(verb, draw, call, samples, tmp_path) -> None:
    folder = draw(tmp_path / "in", 6, size=(16, 16))
    # The groups {0, 1}, {2, 3} and {4, 5}, in train, val and test.
    for number, name in enumerate("aabbcc"):
        for part in ("images", "masks"):
            path = folder / part / f"p{number:03d}.png"
            path.rename(path.with_name(f"{name}{number}.png"))
    shutil.copy(folder / "images" / "a1.png", folder / "images" / "b2.png")
    names = ("a0", "a1", "b2", "b3", "c4", "c5")
    splits = ("train", "train", "val", "val", "test", "test")
    listed = tmp_path / "splits.csv"
    rows = [f"{name}.png,{split}\n" for name, split in zip(names, splits, strict=True)]
    listed.write_text("path,split\n" + "".join(rows))
    more = ("--split-file", listed, "--group-by", "[abc]")
    refused = call(verb, *flags(folder, tmp_path / "refused", *more))
    assert refused.code == 1
    ended = call(verb, *flags(folder, tmp_path / "out", *more, "--duplicates", "same-split"))
    assert ended.code == 0, ended.err
    moves = "2 images change their split to that of an identical image: 2 from val to train"
    assert moves in ended.out
    if verb == "pack":
        manifest = read_manifest(tmp_path / "out")
        assert {n: s.samples for n, s in manifest.splits.items()} == {"train": 4, "test": 2}
    else:
        found = json.loads((tmp_path / "out" / "check.json").read_text())
        assert found["splits"] == {"test": 2, "train": 4}


# ---- skipping bad samples


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    """Thirty images, six of them bad, and a mask without an image."""
    folder = draw(tmp_path_factory.mktemp("flawed"), 30, size=(96, 96))
    for number in (3, 8, 20):
        (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    Image.fromarray(levels(1, 2, 3)).save(folder / "masks" / "p011.png")
    Image.new("L", (5, 5)).save(folder / "masks" / "p012.png")
    (folder / "masks" / "p013.png").rename(folder / "masks" / "q013.png")
    return folder


FLAWED = ("--samples-per-shard", 2, "--keep-going", "--val-fraction", 0.3)


@pytest.fixture(scope="module")
def kept(flawed: Path, tmp_path_factory: pytest.TempPathFactory, call) -> tuple[Path, object]:
    """The flawed folder packed with --keep-going, and the result of the command."""
    out = tmp_path_factory.mktemp("kept") / "out"
    return out, call("pack", *flags(flawed, out, *FLAWED))


def test_keep_going_packs_valid_samples_and_lists_the_others(flawed: Path, kept, samples) -> None:
    out, ended = kept
    assert ended.code == 3
    bad = {3, 8, 11, 12, 13, 20}
    assert sorted(samples(out)) == [f"p{i:03d}.png" for i in range(30) if i not in bad]
    manifest = read_manifest(out)
    assert sum(split.samples for split in manifest.splits.values()) == 24
    lines = (out / "problems.txt").read_text().splitlines()
    assert len(lines) == 7
    message = (
        *("p003.png is empty", "p008.png is empty", "p020.png is empty"),
        *("p011.png is not binary", "p012.png is 5 x 5, but its image"),
        *("p013.png has no mask in", "q013.png has no image in"),
    )
    for text in message:
        assert len([line for line in lines if text in line]) == 1
    assert f"7 files were left out: {out / 'problems.txt'}" in ended.out
    assert [path.name for path in (out / ".pack").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("seed", range(4))
def test_keep_going_lists_exactly_the_images_left_out_with_duplicates_anywhere(
    seed: int, draw, call, samples, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    folder = draw(tmp_path / "in", 40, size=(16, 16))
    paths = [folder / "images" / f"p{i:03d}.png" for i in range(40)]
    for number in rng.choice(40, 18, replace=False):
        paths[number].write_bytes(paths[rng.integers(4)].read_bytes())
    for number in rng.choice(40, 6, replace=False):
        Image.new("L", (5, 5)).save(folder / "masks" / paths[number].name)
    names = rng.choice(["train", "val", "test"], 40)
    split_file = tmp_path / "splits.csv"
    rows = [f"{path.name},{name}\n" for path, name in zip(paths, names, strict=True)]
    split_file.write_text("path,split\n" + "".join(rows))
    more = ("--split-file", split_file, "--keep-going", "--samples-per-shard", 4)
    ended = call("pack", *flags(folder, tmp_path / "out", *more))
    assert ended.code == 3
    lines = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    left_out = [Path(line.split()[0]).name for line in lines]
    packed = [*samples(tmp_path / "out")]
    assert sorted([*left_out, *packed]) == [path.name for path in paths]
    assert f"{len(left_out)} files were left out" in ended.out


@pytest.mark.parametrize("workers", [2, 3])
def test_what_keep_going_skips_does_not_depend_on_the_workers(
    workers: int, flawed: Path, kept, call, content, tmp_path: Path
) -> None:
    ended = call("pack", *flags(flawed, tmp_path / "out", *FLAWED, "--workers", workers))
    assert ended.code == 3
    assert content(tmp_path / "out") == content(kept[0])


def test_what_keep_going_skips_does_not_depend_on_kills(
    flawed: Path, kept, spawn, wait_for, kill, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = spawn("pack", *flags(flawed, out, *FLAWED))
    wait_for(lambda: len([*out.glob("*.tar")]) >= 3, "shard 3", 30)
    kill(process)
    process = spawn("pack", *flags(flawed, out, *FLAWED))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 3, stderr
    assert content(out) == content(kept[0])


def test_a_shard_of_only_bad_samples_is_absent(
    draw, call, content, samples, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 3, size=(16, 16))
    (folder / "images" / "p001.png").write_bytes(b"")
    more = ("--samples-per-shard", 1, "--val-fraction", 0)
    assert call("pack", *flags(folder, tmp_path / "out", *more, "--keep-going")).code == 3
    names = {shard.name for shard in read_manifest(tmp_path / "out").splits["train"].shards}
    assert len(names) == 2
    assert {name for name in content(tmp_path / "out") if name.endswith(".tar")} == names
    assert {name for name in content(tmp_path / "out") if name.endswith(".idx")} == {
        name.replace(".tar", ".idx") for name in names
    }
    assert sorted(samples(tmp_path / "out")) == ["p000.png", "p002.png"]


def test_only_bad_samples_are_refused(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 2, size=(16, 16))
    for number in range(2):
        (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    ended = call("pack", *flags(folder, tmp_path / "out", "--keep-going"))
    assert ended.code == 1
    assert "2 problems (nothing to pack; check --images," in ended.err
    assert not (tmp_path / "out" / "index.json").exists()


def test_files_that_skip_unpaired_skips_are_not_problems(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 3, size=(16, 16))
    (folder / "masks" / "p001.png").unlink()
    ended = call("pack", *flags(folder, tmp_path / "out", "--keep-going", "--skip-unpaired"))
    assert ended.code == 0, ended.err
    assert not (tmp_path / "out" / "problems.txt").exists()


@pytest.mark.parametrize("unpaired", [False, True])
def test_stderr_shows_similar_problems_as_one_and_the_file_all(
    unpaired: bool, draw, call, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 27, size=(8, 8))
    for number in range(25):
        if unpaired:
            (folder / "masks" / f"p{number:03d}.png").unlink()
        else:
            (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    ended = call("pack", *flags(folder, tmp_path / "out"))
    assert ended.code == 1
    first, shown, last = ended.err.splitlines()
    assert "25 problems (" in first
    assert shown.startswith(f"  {folder}/images/p000.png ")
    images = folder / "images"
    assert f"(and 24 more: {images}/p001.png, {images}/p002.png, ...)" in shown
    assert last.strip() == f"all problems: {tmp_path / 'out' / 'problems.txt'}"
    lines = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    assert len(lines) == 25
    for number in range(25):
        assert len([line for line in lines if f"p{number:03d}.png" in line]) == 1


def test_solved_problems_are_no_longer_listed(draw, call, content, tmp_path) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    more = ("--val-fraction", 0)
    assert call("pack", *flags(folder, tmp_path / "reference", *more)).code == 0
    good = {n: (folder / "images" / n).read_bytes() for n in ("p001.png", "p002.png")}
    for name in good:
        (folder / "images" / name).write_bytes(b"")
    assert call("pack", *flags(folder, tmp_path / "out", *more)).code == 1
    assert (tmp_path / "out" / "problems.txt").exists()
    for name, data in good.items():
        (folder / "images" / name).write_bytes(data)
    ended = call("pack", *flags(folder, tmp_path / "out", *more))
    assert ended.code == 0, ended.err
    packed, reference = content(tmp_path / "out"), content(tmp_path / "reference")
    # The plan holds the times of the files, which repairing changes.
    assert packed.pop(".pack/plan.json") != reference.pop(".pack/plan.json")
    assert packed == reference


def test_a_broken_link_is_a_bad_file(draw, call, samples, tmp_path) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    for name in ("images/p001.png", "images/p002.png", "masks/p003.png"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "nowhere")
    ended = call("pack", *flags(folder, tmp_path / "out"))
    assert ended.code == 1
    problems = (tmp_path / "out" / "problems.txt").read_text()
    for name in ("images/p001.png", "images/p002.png", "masks/p003.png"):
        assert f"{folder / name} cannot be read: No such file or directory" in problems
        assert f"{folder / name}" in ended.err
    ended = call("pack", *flags(folder, tmp_path / "kept", "--keep-going"))
    assert ended.code == 3, ended.err
    assert [*samples(tmp_path / "kept")] == ["p000.png"]


# ---- verify headers


@pytest.fixture
def canonical(draw, call, tmp_path: Path) -> Path:
    """Images with canonical masks: unpacked shards."""
    folder = draw(tmp_path / "drawn", 6, values=(0, 1, 2))
    ended = call("pack", *flags(folder, tmp_path / "first", *NAMES, mask_format="index"))
    assert ended.code == 0, ended.err
    unpacked = ("--data", tmp_path / "first", "--out", tmp_path / "in")
    assert call("unpack", *unpacked).code == 0
    return tmp_path / "in"


def test_verify_headers_writes_the_same_shards_for_valid_data(
    canonical: Path, call, content, samples, tmp_path: Path
) -> None:
    more = (*NAMES, "--samples-per-shard", 2)
    for verify in ("full", "headers"):
        arguments = flags(canonical, tmp_path / verify, *more, mask_format="index")
        ended = call("pack", *arguments, "--verify", verify)
        assert ended.code == 0, ended.err
        assert ("of pixels" in ended.out) == (verify == "full")
    full, headers = content(tmp_path / "full"), content(tmp_path / "headers")
    for files in (full, headers):
        del files["index.json"], files[".pack/plan.json"]
    assert full == headers
    manifest = read_manifest(tmp_path / "headers")
    assert manifest.verified == "headers"
    assert {shard.pixels for s in manifest.splits.values() for shard in s.shards} == {()}
    reference = read_manifest(tmp_path / "full")
    assert (manifest.classes, manifest.image_format) == (reference.classes, reference.image_format)
    # A small number of images is decoded completely, to measure their mean.
    assert (manifest.mean, manifest.std) == (reference.mean, reference.std)
    for source, sample in samples(tmp_path / "headers").items():
        mask = canonical / "masks" / Path(source).with_suffix(".png")
        assert sample.raw.mask == mask.read_bytes()


def add_pairs(folder: Path, count: int = 65) -> None:
    """Add so many pairs that only every other image is decoded with `--verify headers`."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (16, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"b{number:02d}.png")
        shutil.copy(folder / "masks" / "a.png", folder / "masks" / f"b{number:02d}.png")


def second_key(folder: Path, call, *more: object, mask_format: str = "binary") -> str:
    """Key of the second sample in the first shard, of which only the header is read."""
    out = folder / "probe"
    arguments = flags(folder, out, "--val-fraction", 0, *more, mask_format=mask_format)
    assert call("pack", *arguments).code == 0
    with tarfile.open(out / "train-000000.tar") as tar:
        return [name for name in tar.getnames() if name.endswith(".json")][1][:-5]


def test_verify_headers_misses_damaged_pixels_but_not_truncated_files(pair: Path, call) -> None:
    add_pairs(pair)
    path = pair / "images" / f"{second_key(pair, call)}.png"
    intact = path.read_bytes()
    by_header = ("--val-fraction", 0, "--verify", "headers")
    for form in ("PNG", "JPEG"):
        solid_image().save(path, form)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 3 // 4 if form == "PNG" else -9])
        for verify in ("full", "headers"):
            more = (*by_header[:2], "--verify", verify)
            ended = call("pack", *flags(pair, pair / "cut", *more))
            assert ended.code == 1
            assert f"{path.name} is damaged" in ended.err
    at = intact.index(b"IDAT") + 8
    damaged = intact[:at] + b"\xff" * 4 + intact[at + 4 :]
    path.write_bytes(damaged)
    ended = call("pack", *flags(pair, pair / "full", "--val-fraction", 0))
    assert ended.code == 1
    assert f"{path.name} is damaged" in ended.err
    ended = call("pack", *flags(pair, pair / "headers", *by_header))
    assert ended.code == 0, ended.err
    with tarfile.open(pair / "headers" / "train-000000.tar") as tar:
        stored = tar.extractfile(path.name).read()  # type: ignore[union-attr]
    assert stored == damaged


def test_a_class_that_verify_headers_missed_is_an_error_on_reading(
    pair: Path, call, samples
) -> None:
    add_pairs(pair)
    palette = default_palette(BY_NAME)
    for path in (pair / "masks").iterdir():
        path.write_bytes(encode_mask(levels(1, 2), palette))
    name = second_key(pair, call, *NAMES, mask_format="index")
    # Two bits per pixel can store one index more than there are classes.
    (pair / "masks" / f"{name}.png").write_bytes(encode_mask(levels(1, 2, 3), palette))
    arguments = flags(pair, pair / "full", "--val-fraction", 0, *NAMES, mask_format="index")
    ended = call("pack", *arguments)
    assert (ended.code, "has values without a class: 3: 1 px" in ended.err) == (1, True)
    arguments = (*arguments, "--out", pair / "headers", "--verify", "headers")
    ended = call("pack", *arguments)
    assert ended.code == 0, ended.err
    with pytest.raises(DataError, match=rf"{name} has values without a class: 3: 1 px"):
        samples(pair / "headers")


# ---- byte-identical


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    return draw(tmp_path_factory.mktemp("many"), 60, size=(160, 160))


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory, call, content):
    """Files of 60 samples in shards of 2, packed by one process without interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert call("pack", *flags(many, out, "--samples-per-shard", 2)).code == 0
    files = content(out)
    assert len([name for name in files if name.endswith(".tar")]) > 25
    assert {Path(name).suffix for name in files} == {".tar", ".idx", ".json"}
    return files


@pytest.mark.parametrize("workers", [2, 7])
def test_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, many: Path, undisturbed: dict[str, bytes], tmp_path: Path, call, content
) -> None:
    more = ("--samples-per-shard", 2, "--workers", workers)
    assert call("pack", *flags(many, tmp_path / "out", *more)).code == 0
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_after_kills_the_bytes_are_identical_and_no_shard_is_written_twice(
    workers: int, many: Path, undisturbed, tmp_path: Path, spawn, wait_for, kill, content
) -> None:
    out = tmp_path / "out"
    command = ("pack", *flags(many, out, "--samples-per-shard", 2, "--workers", workers))
    finished: dict[Path, tuple[int, int]] = {}
    num_kills = 0
    for target in (1, 5, 12, 20):
        process = spawn(*command)
        wait_for(lambda t=target: len([*out.glob("*.tar")]) >= t, f"shard {target}")
        kill(process)
        if (out / "index.json").exists():
            break
        num_kills += 1
        for path in out.glob("*.tar"):
            stat = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert finished.setdefault(path, stat) == stat
    assert num_kills >= 2
    process = spawn(*command)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "shards exist already" in stdout
    for path, stat in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == stat
    assert content(out) == undisturbed


def run_killed_at(number: int, before: bool, arguments: list[str]) -> None:
    """Pack, and get SIGKILL just before or after the n-th link or rename."""
    from pipelines import pack

    count = 0

    def killing(move: Callable[[object, object], None]) -> Callable[[object, object], None]:
        def counting(source: object, target: object) -> None:
            nonlocal count
            count += 1
            if count == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return counting

    os.link, os.replace = killing(os.link), killing(os.replace)  # type: ignore[assignment]
    os._exit(pack.main(arguments))


# The plan and its header; report, idx and tar of each of two shards; the manifest.
LAST = 9


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, LAST + 1))
def test_a_kill_at_any_link_or_rename_leaves_no_trace(
    number: int, before: bool, draw, call, content, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    more = ("--samples-per-shard", 2, "--val-fraction", 0)
    assert call("pack", *flags(folder, tmp_path / "reference", *more)).code == 0
    out = tmp_path / "out"
    arguments = [str(flag) for flag in flags(folder, out, *more)]
    process = multiprocessing.get_context("fork").Process(
        target=run_killed_at, args=(number, before, arguments)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    was_finished = (out / "index.json").exists()
    assert was_finished == (number == LAST and not before)
    ended = call("pack", *arguments)
    assert ended.code == 0, ended.err
    assert content(out) == content(tmp_path / "reference")


# ---- resuming with other input or settings


@pytest.fixture
def interrupted(draw, call, tmp_path: Path) -> tuple[Path, Path]:
    """Four images, and an output folder without a manifest, since one mask is bad."""
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    (folder / "masks" / "p002.png").write_bytes(b"")
    ended = call("pack", *flags(folder, tmp_path / "out", "--samples-per-shard", 1))
    assert ended.code == 1
    assert len([*(tmp_path / "out").glob("*.tar")]) == 3
    return folder, tmp_path / "out"


def test_an_image_that_changed_since_the_plan_is_named(interrupted, call) -> None:
    folder, out = interrupted
    solid_image(size=(16, 16)).save(folder / "images" / "p001.png")
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1))
    assert ended.code == 1
    assert (
        "created from another plan: 1 images or masks have changed, the first: p001.png"
        in ended.err
    )


def test_an_added_or_removed_image_is_named(interrupted, draw, call) -> None:
    folder, out = interrupted
    draw(folder, 1, size=(16, 16), name="new{}", seed=9)
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1))
    assert (ended.code, "1 images were added, the first: new0.png" in ended.err) == (1, True)
    for part in ("images", "masks"):
        (folder / part / "new0.png").unlink()
        (folder / part / "p000.png").unlink()
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1))
    assert (ended.code, "1 images were removed, the first: p000.png" in ended.err) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--invert",), "other settings (mask format)"),
        (("--classes", "soil", "plant"), "other settings (classes)"),
        (("--resize", 8), "other settings (images)"),
        (("--resize-mask",), "other settings (resize mask)"),
        (("--verify", "headers"), "other settings (verify)"),
        (("--val-fraction", 0.9), "other splits, shard sizes or seed"),
        (("--seed", 5), "other splits, shard sizes or seed"),
        (("--samples-per-shard", 2), "other splits, shard sizes or seed"),
    ],
)
def test_settings_that_differ_from_the_plan_are_refused(interrupted, change, message, call) -> None:
    folder, out = interrupted
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1, *change))
    assert ended.code == 1
    assert message in ended.err


def test_a_finished_data_set_is_not_changed(shards: Path, cells: Path, call, content) -> None:
    before = content(shards)
    ended = call("pack", *flags(cells, shards, "--seed", 3))
    assert ended.code == 1
    assert "is already a data set, made from other files or with other settings" in ended.err
    assert content(shards) == before


def test_shards_of_another_data_set_are_not_changed(pair: Path, call) -> None:
    (pair / "out").mkdir()
    (pair / "out" / "other.tar").write_bytes(b"")
    ended = call("pack", *flags(pair, pair / "out"))
    assert ended.code == 1
    assert "holds shards of another data set (other.tar)" in ended.err


# ---- bad input and its messages


def save_mask(pixels: np.ndarray) -> Callable[[Folder], None]:
    return lambda folder: Image.fromarray(pixels).save(folder / "masks" / "a.png")


def test_an_error_is_one_line(pair: Path, spawn) -> None:
    for part in ("images", "masks"):
        shutil.copy(pair / part / "a.png", pair / part / "b.png")
    (pair / "images" / "b.png").write_bytes(b"")
    process = spawn("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    ((line),) = stderr.splitlines()
    assert line.startswith("unet pack: ")
    assert "b.png is empty" in line


def test_all_bad_files_are_named_at_once(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 5, size=(16, 16))
    for number in (1, 3):
        (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    ended = call("pack", *flags(folder, tmp_path / "out"))
    assert ended.code == 1
    assert "2 problems" in ended.err
    first, second = (f"{folder}/images/p{number:03d}.png" for number in (1, 3))
    assert f"\n  {first} is empty (and 1 more: {second}); " in ended.err


@pytest.mark.parametrize(
    ("pixels", "more", "message"),
    [
        (levels(1, 2, 2), ("--classes", "a", "b"), "without a class: 2: 2 px; if these few"),
        (levels(1, 5, 6), ("--classes", "a", "b"), "5: 1 px, 6: 1 px; if these few pixels"),
        (levels(1, *[2] * 9), ("--classes", "a", "b"), "2: 9 px; 2 classes allow 0 to 1"),
    ],
)
def test_a_value_without_a_class_is_named_with_its_pixel_count(
    pixels: np.ndarray, more: tuple[str, ...], message: str, pair: Path, call
) -> None:
    save_mask(pixels)(pair)
    ended = call("pack", *flags(pair, pair / "out", *more, mask_format="index"))
    assert ended.code == 1
    assert message in ended.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--val-fraction", 1.5), "must be between 0 and 1"),
        (
            ("--val-fraction", 0.6, "--test-fraction", 0.4),
            "--test-fraction 0.4: with --val-fraction 0.6, nothing is left to train on; lower one",
        ),
        (("--samples-per-shard", 0), "--samples-per-shard must be >= 1, got 0"),
        (("--workers", -1), "--workers must be >= 0, got -1"),
        (("--mask-format", "index"), "--mask-format index needs --classes"),
        (("--classes", "a", "b", "c"), "--classes: a binary mask has 2 classes, got 3"),
        (("--classes", "a", "a"), "--classes: duplicate name in a a"),
        (("--mask-values", 0, 1), "--mask-values applies to `values` only"),
        (("--ignore-value", 65536), "mask values must be 0 to 65535, got 65536"),
        (
            ("--mask-format", "values", "--mask-values", 0, 1, "--classes", "a", "b", "c"),
            "--mask-values: 2 mask values for 3 classes",
        ),
        (
            ("--mask-format", "values", "--mask-values", 4, 4, "--classes", "a", "b"),
            "--mask-values: a class needs its own value",
        ),
        (
            ("--mask-format", "index", "--classes", "a", "b", "--invert"),
            "--invert applies to `binary`",
        ),
        (
            ("--mask-format", "index", "--classes", "one"),
            "--classes: there must be 2 to 255 classes, got 1",
        ),
        (("--mask-format", "palette"), "--mask-format palette needs --classes"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_read(
    change: tuple[object, ...], message: str, call, tmp_path: Path
) -> None:
    ended = call("pack", *flags(tmp_path / "in", tmp_path / "out"), *change)
    assert ended.code == 2
    assert message in ended.message
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--masks", "m"), "--masks needs --mask-format"),
        (("--mask-format", "binary"), "--mask-format needs --masks"),
        (("--split-file", "s.csv"), "--split-file needs --masks"),
    ],
)
def test_masks_and_mask_format_require_each_other(
    arguments, message: str, call, tmp_path: Path
) -> None:
    ended = call("pack", "--images", tmp_path, "--out", tmp_path / "out", *arguments)
    assert ended.code == 2
    assert message in ended.message


def test_classes_of_unlabelled_images_cause_no_traceback(pair: Path, call) -> None:
    arguments = ("--images", pair / "images", "--out", pair / "out", "--classes", "ground", "cell")
    ended = call("pack", *arguments, "--workers", 1)
    assert ended.code in (0, 2)
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"name,split\na.png,val\n", "must start with the line path,split"),
        (b"path,split\na.png,holdout\n", "line 2: 'holdout' is not one of train, val, test"),
        (b"path,split\na.png,val\na.png,train\n", "line 3: a.png is listed twice, in val ("),
        (b"path,split\n", "a.png is not in"),
        (b"path,split\na.png,val\nb.png,val\n", "lists b.png, which is not one of the images"),
        (None, "No such file or directory"),
        (b"path,split\n\xff\xfe.png,val\n", "split.csv"),
    ],
)
def test_a_split_file_must_list_every_image_once(
    lines: bytes | None, message: str, pair: Path, call
) -> None:
    path = pair / "split.csv"
    if lines is not None:
        path.write_bytes(lines)
    ended = call("pack", *flags(pair, pair / "out", "--split-file", path))
    assert ended.code == 1
    assert message in ended.err


@pytest.mark.parametrize(
    ("expression", "code", "message"),
    [("nobody", 1, "a.png does not match --group-by 'nobody'"), ("(", 2, "--group-by")],
)
def test_group_by_must_be_valid_and_match(
    expression: str, code: int, message: str, pair: Path, call
) -> None:
    ended = call("pack", *flags(pair, pair / "out", "--group-by", expression))
    assert ended.code == code
    assert message in ended.message


def test_images_and_masks_in_one_folder_must_be_separated(pair: Path, call) -> None:
    folders = ("--images", pair / "images", "--masks", pair / "images", "--out", pair / "out")
    ended = call("pack", *folders, "--mask-format", "binary")
    assert ended.code == 1
    assert "split the folder with unet separate" in ended.err


def test_out_must_not_be_a_file(pair: Path, call) -> None:
    (pair / "out").write_text("")
    ended = call("pack", *flags(pair, pair / "out"))
    assert ended.code == 1
    assert "out is a file, not a directory; choose another --out" in ended.err


def test_a_name_that_is_not_valid_text_is_packed(pair: Path, call) -> None:
    name = os.fsdecode(b"\xff\xfe.png")
    for part in ("images", "masks"):
        shutil.copy(pair / part / "a.png", pair / part / name)
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert ended.code == 0
    with tarfile.open(pair / "out" / "train-000000.tar") as tar:
        assert "%FF%FE.png" in tar.getnames()
