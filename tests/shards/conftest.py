"""Fixtures: small images, masks and shards."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from shards.images.files import ImageFormat
from shards.manifest import Manifest, ShardInfo, SizeCount, SplitInfo
from shards.masks.palettes import default_palette
from shards.masks.png import encode_mask
from shards.writer import ShardWriter

# Deterministic examples without a deadline, and no database of failed ones.
settings.register_profile(
    "deterministic", deadline=None, derandomize=True, database=None, max_examples=80
)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    """Skip flushing to disk, which takes seconds on a busy machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def to_bytes():
    """to_bytes(PIL image, file format, **options of Pillow) -> the file's bytes."""

    def encode(image, file_format="PNG", **options):
        out = io.BytesIO()
        image.save(out, file_format, **options)
        return out.getvalue()

    return encode


@pytest.fixture
def raw_png():
    """raw_png(rows, width, bits, colour type, chunks) -> a PNG that Pillow cannot write."""

    def chunk(kind, data):
        named = kind + data
        return struct.pack(">I", len(data)) + named + struct.pack(">I", zlib.crc32(named))

    def encode(rows, width, bits, colour_type, chunks=()):
        header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
        parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    return encode


@pytest.fixture
def raw_tiff():
    """raw_tiff(pixels, (width, height), bits, bands) -> a TIFF that Pillow cannot write."""

    def encode(data, size, bits, bands, *, order="<", photometric=1, tags=(), planar=1, sample=1):
        entries = {
            256: ("I", [size[0]]),
            257: ("I", [size[1]]),
            258: ("H", [bits] * bands),
            259: ("H", [1]),
            262: ("H", [photometric]),
            273: ("I", [0]),
            277: ("H", [bands]),
            278: ("I", [size[1]]),
            279: ("I", [len(data)]),
            284: ("H", [planar]),
            339: ("H", [sample] * bands),
            **{tag: (kind, values) for tag, kind, values in tags},
        }
        types = {"H": 3, "I": 4, "d": 12}
        packed = {t: struct.pack(f"{order}{len(v)}{k}", *v) for t, (k, v) in entries.items()}
        end_of_directory = 8 + 2 + 12 * len(entries) + 4
        where = end_of_directory + sum(len(value) for value in packed.values() if len(value) > 4)
        packed[273] = struct.pack(f"{order}I", where)
        directory, overflow = struct.pack(f"{order}H", len(entries)), b""
        for tag, (kind, values) in sorted(entries.items()):
            directory += struct.pack(f"{order}HHI", tag, types[kind], len(values))
            if len(packed[tag]) <= 4:
                directory += packed[tag].ljust(4, b"\0")
            else:
                directory += struct.pack(f"{order}I", end_of_directory + len(overflow))
                overflow += packed[tag]
        signature = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
        return signature + directory + struct.pack(f"{order}I", 0) + overflow + data

    return encode


@pytest.fixture
def noise():
    """noise(shape, seed) -> uint8 array of random pixels."""

    def draw(shape=(6, 8, 3), seed=0):
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return draw


@pytest.fixture
def make_shards(tmp_path, to_bytes, noise):
    """make_shards([3, 2]) -> folder, manifest, {key: (image bytes, mask bytes)} of train."""

    def make(sizes, *, name="data", masks=True, classes=("background", "cell")):
        folder = tmp_path / name
        folder.mkdir()
        palette = default_palette(classes)
        infos, content = [], {}
        for number, samples in enumerate(sizes):
            with ShardWriter(folder / f"train-{number:06}.tar") as writer:
                for row in range(samples):
                    key = f"folder/pic_{number}-{row}%2Ex"
                    seed = 1000 * number + row
                    image = to_bytes(Image.fromarray(noise(seed=seed)))
                    mask = encode_mask(noise((6, 8), seed=seed + 1) % len(classes), palette)
                    info = json.dumps({"source": f"folder/pic_{number}-{row}.x.png"}).encode()
                    members = {"png": image, "json": info}
                    writer.add(key, {**members, "mask.png": mask} if masks else members)
                    content[key] = (image, mask if masks else None)
                file = writer.seal()
            infos.append(
                ShardInfo(file.name, file.samples, file.bytes, file.sha256, (), file.idx_sha256)
            )
        split = SplitInfo(tuple(infos), (SizeCount(8, 6, "RGB", sum(sizes)),))
        manifest = Manifest(
            classes=classes,
            palette=palette,
            image_format=ImageFormat("RGB"),
            mask_format={"kind": "index"},
            mean=(0.5, 0.5, 0.5),
            std=(0.3, 0.3, 0.3),
            splits={"train": split},
        )
        return folder, manifest, content

    return make
