"""Damaged and hostile files cause an error that names them, and nothing else."""

import gc
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import unet.weights
from shards.images.files import ImageFormat, ImageRule, load_pixels, open_image
from shards.images.pixels import decode_image
from shards.manifest import ShardInfo, read_manifest
from shards.masks.canonical import read_mask
from shards.masks.formats import MaskFormat
from shards.masks.png import encode_mask
from shards.order import Address
from shards.reader import ShardReader
from shards.sample import DataError
from shards.writer import ShardWriter
from unet import UNet, UNetConfig
from unet.metrics import SegmentationScores


def png():
    b = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(b, "PNG")
    return b.getvalue()


def shard(folder, n=1, ext="png", name="train-000000.tar"):
    with ShardWriter(folder / name) as w:
        for i in range(n):
            w.add(
                f"a{i}",
                {
                    ext: png(),
                    "json": b"{}",
                    "mask.png": encode_mask(np.zeros((4, 4), np.uint8), ((0, 0, 0),)),
                },
            )
        f = w.seal()
    return ShardInfo(f.name, f.samples, f.bytes, f.sha256, ())


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_abandoned_shard_prints_nothing_on_stderr(tmp_path, capfd):
    def fail():
        with ShardWriter(tmp_path / "s.tar") as w:
            w.add("a", {"png": b"x" * 100, "json": b"{}"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    gc.collect()


@pytest.mark.parametrize("ext", ["png", "jpg"])
def test_every_truncation_of_an_index_is_detected(tmp_path, ext):
    info = shard(tmp_path, ext=ext)
    path = tmp_path / "train-000000.idx"
    text = path.read_text()
    for length in range(len(text) - 1):  # all but the trailing newline
        path.write_text(text[:length])
        with pytest.raises(DataError):
            ShardReader(tmp_path, [info]).read(Address(0, 0, 0))


def test_an_index_with_fewer_samples_than_the_manifest_is_refused_by_name(tmp_path):
    info = shard(tmp_path)
    with pytest.raises(DataError, match="idx"):
        ShardReader(tmp_path, [ShardInfo(info.name, 2, info.bytes, "", ())]).read(Address(0, 0, 1))


def test_a_deleted_reader_leaves_no_file_descriptor(tmp_path):
    info = shard(tmp_path)
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        ShardReader(tmp_path, [info]).read(Address(0, 0, 0))
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


def test_a_reader_that_fails_to_open_leaves_no_file_descriptor(tmp_path):
    info = shard(tmp_path)
    (tmp_path / "train-000000.idx").unlink()
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(DataError):
        ShardReader(tmp_path, [info]).read(Address(0, 0, 0))
    assert len(os.listdir("/dev/fd")) == before


def test_a_tiff_without_dimensions_is_refused():
    b = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(b, "TIFF")
    data = bytearray(b.getvalue())
    data[8] = 6
    data = bytes(data)
    with pytest.raises(DataError):
        decode_image(data, ImageFormat("RGB"), "x")


def test_a_tiff_with_nothing_but_a_compression_tag_is_refused():
    # Little-endian, with one tag and no width or height.
    data = b"II*\0\x08\0\0\0" + b"\x01\0" + b"\x03\x01\x03\0\x01\0\0\0\x01\0\0\0" + b"\0\0\0\0"
    with pytest.raises(DataError):
        decode_image(data, ImageFormat("RGB"), "x")


def test_a_hostile_manifest_is_refused(tmp_path):
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(DataError):
        read_manifest(tmp_path)


@pytest.fixture
def saved(tmp_path):
    UNet(UNetConfig(base_channels=2, depth=1)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:20],
        lambda t: "[]",
        lambda t: "[" * 100_000,
        lambda t: '{"model": 3}',
        lambda t: '{"model": null}',
        lambda t: json.dumps({**json.loads(t), "data": 3}),
        lambda t: t.replace('"depth": 1', '"depth": 0'),
        lambda t: t.replace('"depth": 1', '"depth": 1.5'),
        lambda t: t.replace('"instance"', '"layer"'),
        lambda t: t.replace('"same"', '"reflect"'),
        lambda t: t.replace('"base_channels": 2', '"base_channels": 100000000'),
    ],
)
def test_a_damaged_config_is_refused_by_name(saved, change):
    path = saved / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"config\.json"):
        UNet.from_pretrained(saved)


def test_a_config_that_is_not_text_is_refused_by_name(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.json"):
        UNet.from_pretrained(saved)


def test_a_model_loads_from_a_hub_id(saved, monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    def download(
        repo_id,
        filename,
        *,
        revision=None,
        cache_dir=None,
        force_download=False,
        token=None,
        local_files_only=False,
        subfolder=None,
        repo_type=None,
    ):
        return str(saved / filename)

    monkeypatch.setattr(mixin, "hf_hub_download", download)
    monkeypatch.setattr(unet.weights, "hf_hub_download", download)
    assert UNet.from_pretrained("me/model").config.depth == 1


def test_a_binary_gif_whose_first_colour_is_white_is_not_inverted_silently():
    black_white = np.zeros((6, 8, 3), np.uint8)
    black_white[2:4, 2:5] = 255
    b = io.BytesIO()
    Image.fromarray(black_white).save(b, "GIF")
    try:
        classes = read_mask(
            b.getvalue(), MaskFormat(kind="binary", num_classes=2), ((0, 0, 0), (1, 1, 1)), "x"
        ).classes
    except DataError:
        return
    assert classes is not None
    assert np.array_equal(classes.index, black_white[..., 0] > 0)


@pytest.mark.filterwarnings("error")
def test_a_rank_without_images_does_not_warn():
    SegmentationScores(("a", "b"), (0, 1)).scores()


def test_a_mask_value_without_a_class_is_refused():
    m = SegmentationScores(("a", "b"), (0, 1))
    with pytest.raises(RuntimeError, match="a mask value is not a class"):
        m.update(
            torch.zeros(2, 2, 2, dtype=torch.uint8),
            torch.tensor([[[2, 0], [0, 0]], [[0, 0], [0, 0]]], dtype=torch.uint8),
        )


def test_a_rotated_tiff_is_reported_as_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    b = io.BytesIO()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(b, "TIFF", exif=exif)
    assert load_pixels(open_image(b.getvalue(), "x", ImageRule()), "x")[1]
