"""`predict`: predictions with their images are a training data set (pseudo-labels)."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    """A model that finds what is above 127 in the red channel."""
    return make_checkpoint()


def argv(checkpoint: Path, given: object, out: object, *more: object) -> list[object]:
    return [
        *("--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0),
        *("--include-image", *more),
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several formats, modes and orientations."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 255, (30, 20, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "plain.png")
    image.save(root / "photo.JPG", "JPEG")
    image.save(root / "camera.jpeg", "JPEG", exif=exif)
    image.save(root / "turned.png", exif=exif)
    image.save(root / "scan.tif")
    image.save(root / "drawn.bmp")
    image.convert("P").save(root / "indexed.gif")
    image.convert("L").save(root / "grey.v2.png")
    image.save(root / "misnamed.png", "JPEG")
    return root


def upright(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return np.rot90(pixels, -1) if path.stem in ("camera", "turned") else pixels


def test_images_lie_beside_their_masks_as_packing_stores_them(
    bright: Path, images: Path, call, samples, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call("predict", *argv(bright, images, out)).code == 0
    packed = ("--images", images, "--out", tmp_path / "packed", "--workers", 1)
    assert call("pack", *packed).code == 0
    found, expected = samples(out), samples(tmp_path / "packed")
    assert set(found) == set(expected) == {path.name for path in images.iterdir()}
    for source, sample in found.items():
        assert sample.split == "predicted"
        assert not sample.raw.is_mask
        stored = expected[source].raw
        assert (sample.raw.key, sample.raw.image) == (stored.key, stored.image)
        if source != "misnamed.png":
            assert sample.raw.extension == stored.extension
        np.testing.assert_array_equal(sample.image, expected[source].image)
        image = upright(images / source)
        assert sample.image.shape == image.shape
        np.testing.assert_array_equal(sample.mask, sample.image[..., 0] > 127)
    for source in ("plain.png", "photo.JPG", "scan.tif", "drawn.bmp", "misnamed.png"):
        assert found[source].raw.image == (images / source).read_bytes()
    # The extension matches the format of the bytes.
    assert found["misnamed.png"].raw.extension == "jpg"
    assert found["camera.jpeg"].raw.extension == "png"


def test_images_out_of_shards_go_into_shards_again(
    bright: Path, images: Path, call, samples, tmp_path: Path
) -> None:
    packed = ("--images", images, "--out", tmp_path / "packed", "--workers", 1)
    assert call("pack", *packed).code == 0
    assert call("predict", *argv(bright, tmp_path / "packed", tmp_path / "out")).code == 0
    found, given = samples(tmp_path / "out"), samples(tmp_path / "packed")
    assert set(found) == set(given)
    for source, sample in found.items():
        assert sample.raw.image == given[source].raw.image
        # camera.jpeg was packed upright, as PNG.
        image = Image.open(io.BytesIO(sample.raw.image))
        assert Image.registered_extensions()[f".{sample.raw.extension}"] == image.format


def test_a_split_has_the_name_that_it_is_given(
    bright: Path, images: Path, call, samples, tmp_path: Path
) -> None:
    given = argv(bright, images, tmp_path, "--out-split", "train", "--samples-per-shard", 5)
    assert call("predict", *given).code == 0
    manifest = read_manifest(tmp_path)
    assert [*manifest.splits] == ["train"]
    names = [shard.name for shard in manifest.splits["train"].shards]
    assert names == ["train-000000.tar", "train-000001.tar"]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == names
    assert {sample.split for sample in samples(tmp_path).values()} == {"train"}


@pytest.mark.parametrize("probabilities", ["none", "png", "float16"])
def test_training_resumes_with_pseudo_labels_beside_real_validation(
    probabilities: str, bright: Path, shards: Path, cells: Path, call, metrics, tiny, tmp_path: Path
) -> None:
    # Images without masks: those that the data set does not validate on.
    unseen = tmp_path / "unseen"
    unseen.mkdir()
    for path in sorted((cells / "images").iterdir())[4:]:
        (unseen / path.name).symlink_to(path)
    more = ("--min-confidence", 0.9, "--probabilities", probabilities, "--samples-per-shard", 3)
    assert call("predict", *argv(bright, unseen, tmp_path / "pseudo", *more)).code == 0

    both = tmp_path / "both"
    (both / "val").mkdir(parents=True)
    (both / "pseudo").symlink_to(tmp_path / "pseudo")
    for path in (*shards.glob("val-*.tar"), *shards.glob("val-*.idx")):
        (both / "val" / path.name).symlink_to(path)
    ended = call("index", both, "--classes", "background", "foreground", "--workers", 1)
    assert ended.code == 0, ended.err
    splits = read_manifest(both).splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 8, "val": 4}
    ignored = read_manifest(tmp_path / "pseudo").splits["predicted"].shards
    assert sum(s.pixels[-1] for s in splits["train"].shards) == sum(s.pixels[-1] for s in ignored)

    run_dir = tmp_path / "run"
    training = ("--data", both, "--run-dir", run_dir, *tiny, "--workers", 0)
    ended = call("train", *training, "--steps", 4, "--log-every", 2, "--eval-every", 4)
    assert ended.code == 0, ended.err
    lines = metrics(run_dir)
    assert lines[-1]["step"] == 4
    assert any("val/dice" in line for line in lines)


def test_what_cannot_be_trained_on_is_left_out(
    bright: Path, images: Path, call, samples, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes((images / "plain.png").read_bytes())
    (tmp_path / "in" / "cut.jpg").write_bytes((images / "photo.JPG").read_bytes()[:300])
    (tmp_path / "in" / "cut.png").write_bytes(b"")
    Image.new("RGBA", (8, 8)).save(tmp_path / "in" / "clear.webp")
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(tmp_path / "in" / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "in" / "cut.png").rename(tmp_path / "in" / "empty.png")
    ended = call("predict", *argv(bright, tmp_path / "in", tmp_path / "out"))
    assert ended.code == 3, ended.err
    assert (tmp_path / "out" / "errors.jsonl").read_text().count("\n") == 4
    assert set(samples(tmp_path / "out")) == {"good.png"}
