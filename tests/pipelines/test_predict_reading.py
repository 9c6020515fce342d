"""`inference.reading`.

How files are read travels from packing to prediction; flags that replace a rule are reported.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.model.load import load_model
from shards.images.files import ImageFormat
from shards.images.pixels import decode_file
from shards.manifest import read_manifest
from shards.order import Address
from shards.reader import ShardReader
from unet import UNet

RULES = {
    "exif": (("--exif", "ignore"), "ignore"),
    "frame": (("--frame", 1), 1),
    "alpha": (("--alpha", "drop"), "drop"),
    "image_range": (("--image-range", 0, 1000), (0, 1000)),
    "resize": (("--resize", 20), 20),
    "max_pixels": (("--max-pixels", 2000), 2000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Grey images of 48 x 32 that each need one rule, and their masks."""
    root = tmp_path_factory.mktemp("raw")
    grey = np.zeros((32, 48), np.uint8)
    grey[:10, :20] = 250
    mask = Image.fromarray((grey > 0).astype(np.uint8) * 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = np.dstack([grey, np.full_like(grey, 9)])
    for rule in RULES:
        images, masks = root / rule / "images", root / rule / "masks"
        images.mkdir(parents=True)
        masks.mkdir()
        for name in ("a", "b", "c"):
            image = Image.fromarray(np.roll(grey, ord(name), 1))
            if rule == "exif":
                image.save(images / f"{name}.jpg", exif=exif, quality=95)
            elif rule == "frame":
                frames = {"save_all": True, "append_images": [image]}
                Image.new("L", (48, 32)).save(images / f"{name}.tif", **frames)
            elif rule == "alpha":
                alpha[..., 0] = np.asarray(image)
                Image.fromarray(alpha).save(images / f"{name}.png")
            elif rule == "image_range":
                Image.fromarray(np.asarray(image).astype(np.uint16) * 4).save(
                    images / f"{name}.png"
                )
            else:
                image.save(images / f"{name}.png")
            mask.save(masks / f"{name}.png")
    return root


def pack(call, folder: Path, out: Path, *flags: object) -> Path:
    given = ("--images", folder / "images", "--masks", folder / "masks", "--out", out)
    ended = call(
        *("pack", *given, "--mask-format", "binary", "--val-fraction", 0, "--workers", 1, *flags)
    )
    assert ended.code == 0, ended.err
    return out


def with_spec(checkpoint: Path, out: Path, **rules) -> Path:
    """Copy a checkpoint, with other rules in its data spec."""
    UNet.from_pretrained(checkpoint).save_pretrained(out)
    header = json.loads((out / "config.json").read_text())
    header["data"] |= rules
    (out / "config.json").write_text(json.dumps(header))
    return out


@pytest.mark.parametrize("rule", RULES)
def test_rules_travel_from_the_manifest_to_the_checkpoint(
    rule: str, folder: Path, call, tiny, tmp_path: Path
) -> None:
    flags, value = RULES[rule]
    data = pack(call, folder / rule, tmp_path / "data", *flags, "--val-fraction", 0.4)
    run = ("--data", data, "--run-dir", tmp_path / "run", *tiny, "--workers", 0, "--steps", 1)
    assert (ended := call("train", *run)).code == 0, ended.err
    loaded = load_model(str(tmp_path / "run"))
    assert getattr(loaded.spec, rule) == value
    assert loaded.image_format == read_manifest(data).image_format
    given = ("--checkpoint", tmp_path / "run", "--input", folder / rule / "images", "--workers", 0)
    ended = call("predict", *given, "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("rule", RULES)
def test_files_are_decoded_to_the_arrays_that_packing_stores(
    rule: str, folder: Path, call, tmp_path: Path
) -> None:
    data = pack(call, folder / rule, tmp_path, *RULES[rule][0])
    manifest = read_manifest(data)
    form = manifest.image_format
    (split,) = manifest.splits.values()
    reader = ShardReader(data, split.shards)
    for row in range(split.samples):
        raw = reader.read(Address(row, 0, row))
        source = folder / rule / "images" / raw.parse_info()["source"]
        pixels, size = decode_file(source.read_bytes(), form, "x")
        np.testing.assert_array_equal(pixels, raw.decode(form, 2).image)
        assert size == (48, 32)


@pytest.mark.parametrize("rule", RULES)
def test_predict_offers_every_rule_and_reports_what_it_replaces(
    rule: str, folder: Path, make_checkpoint, call, tmp_path: Path
) -> None:
    flags, value = RULES[rule]
    given = ("--input", folder / rule / "images", "--workers", 0)
    plain = make_checkpoint("L")
    ended = call("predict", "--checkpoint", plain, *given, "--out", tmp_path / "a", *flags)
    assert ended.code == 0, ended.err
    shown = " ".join(map(str, flags))
    assert ended.err.startswith(f"{shown}: the checkpoint was trained with ")
    assert ended.err.count("\n") == 1
    trained = with_spec(plain, tmp_path / "trained", **{rule: value})
    for more in ((), flags):
        out = tmp_path / f"b{len(more)}"
        ended = call("predict", "--checkpoint", trained, *given, "--out", out, *more)
        assert (ended.code, ended.err) == (0, "")
    assert json.loads((tmp_path / "a/job.json").read_text())["reading"]
    assert "reading" not in json.loads((tmp_path / "b0/job.json").read_text())
    ended = call("predict", "--checkpoint", plain, *given, "--out", tmp_path / "a")
    assert ended.code == 2
    assert "reading" in ended.err


def test_masks_of_scaled_images_have_the_size_of_the_file(
    folder: Path, make_checkpoint, call, tmp_path: Path
) -> None:
    checkpoint = with_spec(make_checkpoint("L"), tmp_path / "trained", resize=24)
    given = ("--input", folder / "resize/images", "--workers", 0, "--out", tmp_path / "out")
    more = ("--png", "--overlay", "--include-image", "--probabilities", "float16")
    ended = call("predict", "--checkpoint", checkpoint, *given, *more)
    assert ended.code == 0, ended.err
    image = np.asarray(Image.open(folder / "resize/images/a.png"))
    mask = np.asarray(Image.open(tmp_path / "out/png/a.png"))
    # Every 2 x 2 pixels are averaged, and the edges of the square are at even pixels or at odd.
    assert mask.shape == image.shape
    assert (mask == mask[::2, ::2].repeat(2, 0).repeat(2, 1)).all()
    assert (mask != (image > 127)).sum() <= 20
    assert Image.open(tmp_path / "out/overlay/a.png").size == (48, 32)
    manifest = read_manifest(tmp_path / "out")
    (size,) = manifest.splits["predicted"].sizes
    assert (size.width, size.height) == (48, 32)
    assert manifest.image_format == ImageFormat("L")


def test_data_sets_are_read_as_they_were_packed(
    folder: Path, make_checkpoint, call, tmp_path: Path
) -> None:
    data = pack(call, folder / "alpha", tmp_path / "data", "--alpha", "drop")
    checkpoint = with_spec(make_checkpoint("L"), tmp_path / "trained", exif="ignore")
    given = ("--checkpoint", checkpoint, "--input", data, "--workers", 0, "--out", tmp_path / "out")
    ended = call("predict", *given)
    assert ended.code == 0
    assert ended.err == (
        "warning: the data was packed with --exif upright, the training data of the checkpoint "
        "with ignore\n"
    )
    ended = call("predict", *given[:-1], tmp_path / "more", "--exif", "upright")
    assert ended.code == 2
    assert "--exif: has no effect on --input" in ended.err
    deep = pack(call, folder / "image_range", tmp_path / "deep", "--image-range", 0, 1000)
    for verb, more in (
        ("evaluate", ("--data", deep, "--split", "train")),
        ("predict", ("--input", deep)),
    ):
        options = ("--checkpoint", checkpoint, *more, "--out", tmp_path / verb, "--workers", 0)
        ended = call(verb, *options)
        assert ended.code == 1
        assert "the data has 16-bit images (range 0 1000)" in ended.err


@pytest.mark.parametrize(
    "flags",
    [("--frame", -1), ("--resize", 0), ("--max-pixels", 0), ("--image-range", 9, 9)],
)
def test_rules_that_make_no_sense_are_refused(
    flags, make_checkpoint, folder, call, tmp_path
) -> None:
    given = ("--checkpoint", make_checkpoint(), "--input", folder / "exif", "--out", tmp_path)
    ended = call("predict", *given, *flags)
    assert ended.code == 2
    assert flags[0] in ended.message


def test_manifests_and_checkpoints_without_these_rules_are_read(
    folder: Path, make_checkpoint, call, tmp_path: Path
) -> None:
    data = pack(call, folder / "max_pixels", tmp_path / "data")
    stored = json.loads((data / "index.json").read_text())["image_format"]
    assert not {"exif", "frame", "resize"} & stored.keys()
    assert read_manifest(data).image_format == ImageFormat("L")
    checkpoint = with_spec(make_checkpoint("L"), tmp_path / "trained")
    header = json.loads((checkpoint / "config.json").read_text())
    for name in ("exif", "frame", "resize", "max_pixels"):
        del header["data"][name]
    (checkpoint / "config.json").write_text(json.dumps(header))
    assert load_model(str(checkpoint)).image_format == ImageFormat("L")
