"""`inference.encode`, `inference.engine`, `inference.job`.

From probabilities to results: thresholds, small components, ignored pixels, stored values.
"""

import io
import json
import re
import tarfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from pipelines import predict
from pipelines.inference import encode, engine, job, specks
from pipelines.inference.decoding import Chunk, DecodedInput
from pipelines.inference.options import ResultOptions
from pipelines.model.load import load_model
from pipelines.runtime import progress
from shards.manifest import read_manifest
from shards.order import Address
from shards.reader import ShardReader
from shards.store import Store


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    """A model whose second class has the probability 1 / (1 + exp(-1000 (red - 127.5) / 255))."""
    return make_checkpoint()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, two of one size, whose red values are all near the border of the classes."""
    root = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(40, 50), (40, 50), (17, 90)]):
        pixels = np.random.default_rng(number).integers(124, 132, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"p{number}.png")
    return root


def argv(checkpoint: Path, given: object, out: object, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0, *more]


def read(out: Path) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """{source: (mask, json)} of a finished prediction, read as a data set."""
    manifest = read_manifest(out)
    ((_, split),) = manifest.splits.items()
    reader, found = ShardReader(out, split.shards), {}
    for number, shard in enumerate(split.shards):
        for row in range(shard.samples):
            raw = reader.read(Address(0, number, row))
            info = raw.parse_info()
            found[info["source"]] = (np.asarray(Image.open(io.BytesIO(raw.mask))), info)
    return found


def red(images: Path, source: str) -> np.ndarray:
    return np.asarray(Image.open(images / source))[..., 0]


def probability(images: Path, source: str) -> np.ndarray:
    """Of the second class."""
    return 1 / (1 + np.exp(-1000 * (red(images, source) - 127.5) / 255))


# ---- thresholds


@pytest.mark.parametrize(("threshold", "least"), [(0.1, 127), (0.5, 128), (0.9, 129)])
@pytest.mark.parametrize("tile", [1024, 32])
def test_the_second_class_is_wherever_it_is_as_probable_as_the_threshold(
    threshold: float, least: int, tile: int, bright: Path, images: Path, call, tmp_path: Path
) -> None:
    more = ("--threshold", threshold, "--tile", tile)
    assert call("predict", *argv(bright, images, tmp_path, *more)).code == 0
    for source, (mask, info) in read(tmp_path).items():
        expected = red(images, source) >= least
        np.testing.assert_array_equal(mask, expected)
        p = probability(images, source)
        chosen = np.where(expected, p, 1 - p)
        assert info["confidence"] == pytest.approx(chosen.mean(), abs=1e-4)
        assert info["shares"]["foreground"] == round(float(expected.mean()), 6)


def test_a_threshold_for_three_classes_is_refused(
    make_checkpoint, images: Path, call, tmp_path
) -> None:
    three = make_checkpoint("RGB", ("background", "cell", "wall"))
    ended = call("predict", *argv(three, images, tmp_path / "out", "--threshold", 0.3))
    assert ended.code == 2
    ((line,),) = (ended.err.splitlines(),)
    assert "--threshold is for models of two classes" in line
    assert "has 3: background, cell, wall" in line
    assert not (tmp_path / "out").exists()


# ---- specks and ignored pixels


def test_specks_are_removed_from_the_mask_and_all_that_counts_it(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    plain, clean = tmp_path / "plain", tmp_path / "clean"
    for out, more in ((plain, ()), (clean, ("--min-area", 20, "--png"))):
        assert call("predict", *argv(bright, images, out, *more)).code == 0
    before, after = read(plain), read(clean)
    for source, (mask, info) in after.items():
        expected = specks.remove_specks(before[source][0], 20)
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(np.asarray(Image.open(clean / "png" / source)), expected)
        assert info["shares"]["foreground"] == round(float((expected == 1).mean()), 6)
        assert info["confidence"] == before[source][1]["confidence"]
    assert any((after[source][0] != before[source][0]).any() for source in after)
    (shard,) = read_manifest(clean).splits["predicted"].shards
    counted = sum(np.bincount(mask.ravel(), minlength=2) for mask, _ in after.values())
    assert shard.pixels == (*counted.tolist(), 0)


def test_without_scipy_min_area_is_refused_in_one_line(
    bright: Path, images: Path, call, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(predict, "has_scipy", lambda: False)
    ended = call("predict", *argv(bright, images, tmp_path / "out", "--min-area", 5))
    assert ended.code == 2
    assert ended.err == (
        "unet predict: --min-area requires SciPy: pip install 'unet-shards[scipy]'\n"
    )
    # No area is below one pixel.
    assert call("predict", *argv(bright, images, tmp_path, "--min-area", 1)).code == 0


@pytest.mark.parametrize("more", [(), ("--min-area", 20), ("--threshold", 0.9)])
@pytest.mark.parametrize("tile", [1024, 32])
def test_a_mask_with_min_confidence_differs_in_ignored_pixels_only(
    tile: int, more: tuple[object, ...], bright: Path, images: Path, call, tmp_path: Path
) -> None:
    plain, careful = tmp_path / "plain", tmp_path / "careful"
    more = (*more, "--tile", tile)
    assert call("predict", *argv(bright, images, plain, *more)).code == 0
    assert call("predict", *argv(bright, images, careful, *more, "--min-confidence", 0.9)).code == 0
    before, ignored = read(plain), 0
    chosen_at = 129 if "--threshold" in more else 128
    for source, (mask, info) in read(careful).items():
        p, second = probability(images, source), red(images, source) >= chosen_at
        unsure = np.where(second, p, 1 - p) < 0.9
        np.testing.assert_array_equal(mask, np.where(unsure, 255, before[source][0]))
        assert info["confidence"] == before[source][1]["confidence"]
        assert sum(info["shares"].values()) == pytest.approx((mask != 255).mean(), abs=1e-5)
        ignored += int(unsure.sum())
    (shard,) = read_manifest(careful).splits["predicted"].shards
    assert shard.pixels[-1] == ignored > 0
    # The count of each class, and of what is ignored.
    assert len(shard.pixels) == 3
    assert sum(shard.pixels) == sum(mask.size for mask, _ in before.values())


# ---- probabilities


@pytest.mark.parametrize("tile", [1024, 32])
@pytest.mark.parametrize("kind", ["png", "float16"])
def test_probabilities_are_read_by_stock_webdataset(
    kind: str, tile: int, make_checkpoint, images: Path, call, tmp_path: Path
) -> None:
    three = make_checkpoint("RGB", ("background", "cell", "wall"))
    more = ("--probabilities", kind, "--tile", tile)
    assert call("predict", *argv(three, images, tmp_path, *more)).code == 0
    shards = str(tmp_path / "predicted-000000.tar")
    samples = {s["__key__"]: s for s in wds.WebDataset(shards, shardshuffle=False).decode("pil")}
    assert set(samples) == {"p0", "p1", "p2"}
    for key, sample in samples.items():
        p = probability(images, f"{key}.png")
        if kind == "png":
            assert "probability-0.png" not in sample
            with tarfile.open(shards) as tar:
                data = [tar.extractfile(f"{key}.probability-{k}.png").read() for k in (1, 2)]
            maps = [Image.open(io.BytesIO(one)) for one in data]
            assert {image.mode for image in maps} == {"I;16"}
            assert sample["probability-1.png"].size == p.shape[::-1]
            found = np.stack([np.asarray(image) for image in maps]) / 65535
        else:
            array = sample["probabilities.npy"]
            assert (array.dtype, array.shape) == (np.float16, (3, *p.shape))
            np.testing.assert_allclose(array[0], 1 - p, atol=1e-3)
            found = array[1:]
        np.testing.assert_allclose(found[0], p, atol=1e-3)
        assert not found[1].any()
        assert set(np.unique(np.asarray(sample["mask.png"].convert("L")))) != {0}


@pytest.mark.parametrize("kind", ["png", "float16"])
def test_a_data_set_with_probabilities_is_one_like_any_other(
    kind: str, bright: Path, images: Path, call, tmp_path: Path
) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    assert call("predict", *argv(bright, images, plain)).code == 0
    assert call("predict", *argv(bright, images, kept, "--probabilities", kind)).code == 0
    for source, (mask, info) in read(plain).items():
        np.testing.assert_array_equal(read(kept)[source][0], mask)
        assert read(kept)[source][1] == info
    ended = call("unpack", "--data", kept, "--out", tmp_path / "folders")
    assert ended.code == 0, ended.err
    assert len([*(tmp_path / "folders" / "masks").iterdir()]) == 3


def test_a_key_that_leaves_no_room_for_probabilities_is_an_error_of_its_own(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    data = (images / "p0.png").read_bytes()
    # Beyond 90 bytes a key is a hash of 72.
    for length in (82, 83, 90, 91):
        (tmp_path / "in" / f"{'x' * length}.png").write_bytes(data)
    given = argv(bright, tmp_path / "in", tmp_path / "out", "--probabilities", "png")
    assert call("predict", *given).code == 3
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    errors = [json.loads(line)["error"] for line in lines]
    assert len(errors) == 2
    assert "has a key of 83 bytes; with --probabilities a tar has room for 82" in errors[0]
    assert "has a key of 90 bytes" in errors[1]
    assert len(read(tmp_path / "out")) == 2
    assert call("predict", *argv(bright, tmp_path / "in", tmp_path / "plain")).code == 0


# ---- the same bytes


EVERYTHING = (
    *("--probabilities", "float16", "--min-area", 9, "--min-confidence", 0.8, "--threshold", 0.4),
    *("--include-image", "--out-split", "train", "--png", "--overlay", "--samples-per-shard", 2),
)


@pytest.mark.parametrize("workers", [1, 2])
def test_with_everything_the_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, bright: Path, images: Path, call, content, tmp_path: Path
) -> None:
    assert call("predict", *argv(bright, images, tmp_path / "0", *EVERYTHING)).code == 0
    given = argv(bright, images, tmp_path / "n", *EVERYTHING)
    assert call("predict", *given, "--workers", workers).code == 0
    assert content(tmp_path / "n") == content(tmp_path / "0")


@pytest.mark.ranks
def test_with_everything_the_bytes_do_not_depend_on_the_number_of_ranks(
    bright: Path, images: Path, call, launch, content, tmp_path: Path
) -> None:
    assert call("predict", *argv(bright, images, tmp_path / "1", *EVERYTHING)).code == 0
    ended = launch(2, "predict", *argv(bright, images, tmp_path / "2", *EVERYTHING))
    assert ended.code == 0, ended.err
    assert content(tmp_path / "2") == content(tmp_path / "1")


def test_with_everything_a_kill_leaves_nothing_behind(
    bright: Path, draw, call, spawn, wait_for, kill, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 24, size=(160, 160)) / "images"
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call("predict", *argv(bright, images, whole, *EVERYTHING)).code == 0
    process = spawn("predict", *argv(bright, images, out, *EVERYTHING))
    wait_for(lambda: len([*out.glob("*.tar")]) >= 2, "shard 2")
    kill(process)
    assert not (out / "index.json").exists()
    assert call("predict", *argv(bright, images, out, *EVERYTHING)).code == 0
    assert content(out) == content(whole)


# ---- while it works


def test_with_fail_fast_the_first_input_that_cannot_be_read_ends_the_job(
    bright: Path, draw, call, content, tmp_path: Path
) -> None:
    images, out = draw(tmp_path / "in", 9, size=(20, 20)) / "images", tmp_path / "out"
    for name in ("p004.png", "p007.png"):
        (images / name).write_bytes(b"")
    given = argv(bright, images, out, "--samples-per-shard", 2, "--batch-size", 1)
    ended = call("predict", *given, "--fail-fast")
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert line == f"unet predict: {images / 'p004.png'} is empty; repair or remove it"
    assert not (out / "index.json").exists()
    assert not [*out.glob(".*.tmp")]
    # What was finished stays, and the image may be mended.
    assert (out / "predicted-000000.tar").exists()
    assert not (out / "predicted-000002.tar").exists()
    for name in ("p004.png", "p007.png"):
        (images / name).write_bytes((images / "p000.png").read_bytes())
    assert call("predict", *given, "--fail-fast").code == 0
    assert call("predict", *argv(bright, images, tmp_path / "whole", *given[8:])).code == 0
    assert content(out) == content(tmp_path / "whole")


def test_one_image_is_drawn_beside_its_mask(bright: Path, draw, call, tmp_path: Path) -> None:
    path = draw(tmp_path / "in", 1, size=(40, 60), name="one") / "images" / "one.png"
    assert call("predict", *argv(bright, path, tmp_path / "out")).code == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "one.figure.png"))
    image = np.asarray(Image.open(path))
    mask = read(tmp_path / "out")["one.png"][0]
    np.testing.assert_array_equal(drawn[:, :60], image)
    overlay = drawn[:, -60:]
    np.testing.assert_array_equal(overlay[mask == 0], image[mask == 0])
    assert (overlay[mask == 1] != image[mask == 1]).any(axis=-1).mean() > 0.9
    # Two are not.
    draw(tmp_path / "two", 2, size=(40, 60))
    assert call("predict", *argv(bright, tmp_path / "two" / "images", tmp_path / "2")).code == 0
    assert not [*(tmp_path / "2").glob("*.figure.png")]


def test_a_large_image_is_drawn_small(bright: Path, call, tmp_path: Path) -> None:
    Image.new("L", (2000, 10), 200).save(tmp_path / "wide.png")
    assert call("predict", *argv(bright, tmp_path / "wide.png", tmp_path / "out")).code == 0
    drawn = Image.open(tmp_path / "out" / "wide.figure.png")
    assert drawn.height == 5
    assert 2000 < drawn.width < 2100


def test_progress_reports_images_pixels_errors_and_the_time_left(
    bright: Path, draw, call, monkeypatch, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 6, size=(20, 20)) / "images"
    (images / "p001.png").write_bytes(b"")
    monkeypatch.setattr(progress, "LINE_INTERVAL", 1e-9)
    ended = call("predict", *argv(bright, images, tmp_path / "out"))
    assert ended.code == 3
    *lines, warning = [line for line in ended.err.splitlines() if line]
    assert lines
    assert warning.startswith("warning: 1 inputs could not be read, the first: ")
    line = r"predict, [\d.,]+ megapixels/s, [01] errors: \d of 6 images, [\d.,]+/s, \d\d:\d\d left"
    for message in lines:
        assert re.fullmatch(line, message), message
    assert "1 errors: 6 of 6 images" in lines[-1]


def test_what_waits_is_bounded_and_raises_what_fails() -> None:
    waiting = engine.BoundedQueue(10 * engine.OVERHEAD)
    done: list[Future[int]] = []
    with ThreadPoolExecutor(1) as pool:
        for number in range(200):
            done.append(pool.submit(int, number))
            waiting.add(done[-1], size=engine.OVERHEAD)
            assert len(waiting.work) <= 5
            assert waiting.num_bytes <= 10 * engine.OVERHEAD
        waiting.finish()
        assert waiting.num_bytes == 0
        assert all(work.done() for work in done)
        # However large, one may be under way.
        waiting.add(pool.submit(int, 1), size=2**40)
        waiting.finish()
        failed: Future[int] = Future()
        waiting.add(failed)
        failed.set_exception(ValueError("no number"))
        with pytest.raises(ValueError, match="no number"):
            waiting.finish()


def test_results_are_delayed_by_one_and_all_of_them() -> None:
    made: list[int] = []

    def make():
        for number in range(4):
            made.append(number)
            yield number

    seen = [(item, made[-1]) for item in engine.delay_by_one(make())]
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert [*engine.delay_by_one(iter(()))] == []


@torch.inference_mode()
def test_images_of_one_size_that_follow_each_other_go_together(bright: Path) -> None:
    sizes, seen = [(8, 8), (8, 8), None, (8, 8), (8, 9)], []

    def forward(images):
        seen.append((len(images), images[0].shape[-1]))
        size = (len(images), *images[0].shape[-2:])
        classes = torch.zeros(size, dtype=torch.uint8)
        return engine.PredictedMasks(classes, torch.ones(size[0]), None, None)

    items = [
        DecodedInput(
            str(i), str(i), None if size is None else torch.zeros((3, *size)), size and None
        )
        for i, size in enumerate(sizes)
    ]
    launched = [*engine.predict_chunks([Chunk(7, 0, 5)], [items], forward)]
    assert seen == [(2, 8), (1, 8), (1, 9)]
    pairs = [pair for part in launched for pair in part.results()]
    assert [item.key for item, _ in pairs] == ["0", "1", "2", "3", "4"]
    assert [found is None for _, found in pairs] == [False, False, True, False, False]
    assert {part.shard for part in launched} == {7}


def test_a_shard_that_is_given_up_leaves_nothing(bright: Path, tmp_path: Path) -> None:
    writing = job.write_shard(ResultOptions(), Store(tmp_path), 0, load_model(str(bright)).spec)
    next(writing)
    member = {"mask.png": b"m", "json": b"{}"}
    writing.send(encode.EncodedPrediction("k", member, {}, 1, 1, (1, 0, 0)))
    assert [*tmp_path.iterdir()]
    writing.close()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("job.json", {"inputs": {"count": -1, "sha256": "0" * 64}}, "`$.inputs.count`"),
        ("job.json", {"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ("job.json", {"tta": 1}, "`$.tta`"),
        ("job.json", {"channels_last": "x"}, "`$.channels_last`"),
        ("job.json", {"checkpoint": [1]}, "`$.checkpoint[0]`"),
        ("state.json", {"images": 1.5}, "`$.images`"),
        ("state.json", {"other": 1}, "`$.other`"),
    ],
)
def test_a_damaged_document_of_a_job_is_named_with_its_field(
    file: str, change: dict, problem: str, bright: Path, images: Path, call, tmp_path: Path
) -> None:
    command = argv(bright, images, tmp_path / "out")
    assert call("predict", *command).code == 0
    path = tmp_path / "out" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    ended = call("predict", *command)
    assert ended.code == 1
    assert ended.err.startswith(f"unet predict: {path} is damaged (")
    assert problem in ended.err
    assert ended.err.endswith("; predict into another --out\n")
    assert ended.err.count("\n") == 1
