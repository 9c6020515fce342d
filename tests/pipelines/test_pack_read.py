"""`pack`: packing and reading is lossless for any names, images and masks (property-based)."""

import string
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.manifest import read_manifest
from shards.order import EvalPlan
from shards.reader import SampleSource, ShardReader

VALUES = (0, 7, 128, 255)
LETTERS = string.ascii_letters + string.digits + "._-~%+ ()[]{}'äß中🙂"

names = (
    st.text(st.sampled_from(LETTERS), min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda name: name and not name.startswith("."))
)
stems = st.lists(names, min_size=1, max_size=3).map("/".join)
kinds = st.sampled_from(
    [
        *(("L", ext) for ext in (".png", ".tif", ".bmp", ".gif")),
        *(("RGB", ext) for ext in (".png", ".TIFF", ".bmp", ".webp")),
        *(("1", ".png"), ("I;16", ".png"), ("I;16", ".tif")),
    ]
)
samples = st.dictionaries(
    stems,
    st.tuples(kinds, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 2**32)),
    min_size=1,
    max_size=6,
)


def is_valid_tree(drawn: dict[str, object]) -> bool:
    """Whether the names can exist in one folder: no duplicates, and no file that is a folder."""
    lower = [stem.lower() for stem in drawn]
    return len(set(lower)) == len(lower) and not any(
        one != other and other.startswith(f"{one}/") for one in lower for other in lower
    )


def draw(mode: str, height: int, width: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """Make an image, and the RGB pixels expected on decoding with the range 0 to 65535."""
    rng = np.random.default_rng(seed)
    if mode == "RGB":
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels), pixels
    if mode == "I;16":
        deep = rng.integers(0, 65536, (height, width), dtype=np.uint16)
        grey = np.round(deep / 65535 * 255).astype(np.uint8)
        return Image.fromarray(deep), np.repeat(grey[:, :, None], 3, axis=2)
    grey = rng.integers(0, 256, (height, width), dtype=np.uint8)
    if mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
        return Image.fromarray(grey).convert("1", dither=Image.Dither.NONE), np.stack([grey] * 3, 2)
    return Image.fromarray(grey), np.stack([grey] * 3, 2)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(samples.filter(is_valid_tree), st.integers(1, 3))
def test_packed_samples_are_read_unchanged(call, drawn, max_samples) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = {}
        for stem, ((mode, extension), (height, width), seed) in drawn.items():
            image, pixels = draw(mode, height, width, seed)
            mask = np.random.default_rng(seed + 1).integers(0, len(VALUES), (height, width))
            for part, ending in (("images", extension), ("masks", ".png")):
                (folder / part / (stem + ending)).parent.mkdir(parents=True, exist_ok=True)
            # Lossy files would not decode to the same pixels.
            options = {"lossless": True, "exact": True} if extension == ".webp" else {}
            image.save(folder / "images" / (stem + extension), **options)
            values = np.array(VALUES, dtype=np.uint8)[mask]
            Image.fromarray(values).save(folder / "masks" / (stem + ".png"))
            expected[stem + extension] = pixels, np.where(mask == 3, 255, mask)
        ended = call(
            "pack",
            *("--images", folder / "images", "--masks", folder / "masks", "--out", folder / "out"),
            *("--mask-format", "values", "--mask-values", *VALUES[:3], "--ignore-value", 255),
            *("--image-range", 0, 65535, "--samples-per-shard", max_samples, "--workers", 1),
            "--allow-absent-classes",
        )
        assert ended.code == 0, ended.err
        manifest = read_manifest(folder / "out")
        form = manifest.image_format
        found = {}
        for split in manifest.splits.values():
            plan = EvalPlan(tuple(s.samples for s in split.shards), chunk=1, rank=0, world=1)
            for (raw,) in SampleSource(ShardReader(folder / "out", split.shards), plan):
                sample = raw.decode(form, len(manifest.classes))
                source = str(raw.parse_info()["source"])
                assert raw.image == (folder / "images" / source).read_bytes()
                found[source] = sample.image, sample.mask
        assert found.keys() == expected.keys()
        for source, (pixels, mask) in expected.items():
            grey = form.channels == "L"
            np.testing.assert_array_equal(found[source][0], pixels[:, :, :1] if grey else pixels)
            np.testing.assert_array_equal(found[source][1], mask)
