"""Small pictures, masks and shards for the tests of this room."""

import io
import json
import os

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from shards.index import Manifest, ShardInfo, SizeCount, SplitInfo
from shards.sample import default_palette, encode_mask
from shards.writer import ShardWriter

# The same examples each time, however busy the machine is, and no folder for failed ones.
settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=80)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch):
    """Flushing to a busy disk takes seconds, and the power stays on here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def to_bytes():
    """to_bytes(PIL image, format, **options of Pillow) -> the file's bytes."""

    def encode(image, form="PNG", **options):
        out = io.BytesIO()
        image.save(out, form, **options)
        return out.getvalue()

    return encode


@pytest.fixture
def noise():
    """noise(shape, seed) -> uint8 pixels."""

    def draw(shape=(6, 8, 3), seed=0):
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return draw


@pytest.fixture
def make_shards(tmp_path, to_bytes, noise):
    """make_shards([3, 2]) -> folder, manifest, {key: (picture bytes, mask bytes)} of train."""

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
                    picture = to_bytes(Image.fromarray(noise(seed=seed)))
                    mask = encode_mask(noise((6, 8), seed=seed + 1) % len(classes), palette)
                    info = json.dumps({"source": f"folder/pic_{number}-{row}.x.png"}).encode()
                    members = {"png": picture, "json": info}
                    writer.add(key, {**members, "mask.png": mask} if masks else members)
                    content[key] = (picture, mask if masks else None)
                file = writer.seal()
            infos.append(ShardInfo(file.name, file.samples, file.bytes, file.sha256, ()))
        split = SplitInfo(tuple(infos), (SizeCount(8, 6, "RGB", sum(sizes)),))
        manifest = Manifest(
            classes=classes,
            palette=palette,
            channels="RGB",
            mask_format={"kind": "index"},
            mean=(0.5, 0.5, 0.5),
            std=(0.3, 0.3, 0.3),
            splits={"train": split},
        )
        return folder, manifest, content

    return make
