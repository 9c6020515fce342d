"""`evaluation.objects`, `inference.objects`, `inference.outlines`.

Objects of masks of two classes: scores of a split, counts and outlines of predictions.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.objects import score_objects
from pipelines.inference.objects import describe_objects
from shards.annotations.polygons import draw_polygon
from unet import DataSpec

SPEC = DataSpec(
    classes=("background", "cell"),
    palette=((0, 0, 0), (255, 0, 0)),
    channels="L",
    mean=(0.0,),
    std=(1.0,),
    crop_size=32,
)


def describe(mask: np.ndarray) -> bytes:
    return describe_objects("a.png", mask, SPEC).outlines


def draw_rings(rings: list, size: tuple[int, int]) -> np.ndarray:
    """Draw a polygon with holes by COCO's rule: bool [H, W]."""
    width, height = size
    drawn = np.zeros(width * height, dtype=bool)
    for ring in rings:
        runs = draw_polygon(np.array(ring, dtype=np.float64), size)
        for start, stop in zip(runs.starts, runs.stops, strict=True):
            # The outer ring, less the holes.
            drawn[start:stop] ^= True
    return drawn.reshape(width, height).T


def draw_feature(feature: dict, size: tuple[int, int]) -> np.ndarray:
    geometry = feature["geometry"]
    polygons = geometry["coordinates"]
    if geometry["type"] == "Polygon":
        polygons = [polygons]
    return np.any([draw_rings(rings, size) for rings in polygons], axis=0)


def draw_collection(document: bytes, shape: tuple[int, ...]) -> np.ndarray:
    features = json.loads(document)["features"]
    drawn = np.zeros(shape, dtype=np.uint8)
    for feature in features:
        pixels = draw_feature(feature, (shape[1], shape[0]))
        assert pixels.sum() == feature["properties"]["area"]
        drawn += pixels
    return drawn


def test_outlines_drawn_by_the_coco_rule_are_the_mask() -> None:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(1, 14, 2))
        mask = (rng.random(shape) < rng.uniform(0.2, 0.9)).astype(np.uint8)
        np.testing.assert_array_equal(draw_collection(describe(mask), shape), mask)


def test_the_outline_of_a_hand_drawn_object() -> None:
    mask = np.zeros((6, 7), np.uint8)
    mask[1:5, 1:5] = 1
    mask[2:4, 2:4] = 0
    mask[0, 5] = 1
    (feature,) = json.loads(describe(mask))["features"]
    assert feature["properties"] == {"class": "cell", "area": 13}
    # The pixel that touches a corner only, then a square with a hole: x, y from the top left.
    pixel, square = feature["geometry"]["coordinates"]
    assert feature["geometry"]["type"] == "MultiPolygon"
    assert pixel == [[[5, 0], [6, 0], [6, 1], [5, 1], [5, 0]]]
    outer, hole = ([tuple(point) for point in ring] for ring in square)
    assert {*outer} == {(1, 1), (5, 1), (5, 5), (1, 5)}
    assert {*hole} == {(2, 2), (4, 2), (4, 4), (2, 4)}
    assert (outer[0], hole[0]) == (outer[-1], hole[-1])
    # By numbers, the outer ring runs counterclockwise, the hole clockwise.
    assert [area_of(ring) for ring in (outer, hole)] == [16, -4]


def area_of(ring: list) -> float:
    x, y = np.array(ring).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


def test_shapely_finds_every_outline_valid() -> None:
    shapely = pytest.importorskip("shapely.geometry")
    for seed in range(100):
        rng = np.random.default_rng(seed)
        mask = (rng.random((11, 13)) < rng.uniform(0.2, 0.9)).astype(np.uint8)
        for feature in json.loads(describe(mask))["features"]:
            geometry = shapely.shape(feature["geometry"])
            assert geometry.is_valid
            assert geometry.area == feature["properties"]["area"]


def test_scores_of_hand_computed_counts() -> None:
    rows = np.array([[3, 2, 2, 30, 24], [0, 1, 0, 0, 6], [1, 1, 1, 10, 10]], np.uint32)
    scores = score_objects(rows, "cell")
    assert (scores.precision, scores.recall, scores.f1) == (3 / 4, 3 / 4, 6 / 8)
    assert (scores.count_error, scores.count_bias) == (2 / 3, 0)
    assert (scores.true_area, scores.predicted_area) == (10, 10)
    none = score_objects(np.zeros((2, 5), np.uint32), "cell")
    assert (none.precision, none.recall, none.f1, none.true_area) == (None,) * 4
    assert none.count_error == 0


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory, call) -> Path:
    """Seven images in three shards of val: bright squares that a threshold finds, one misplaced."""
    root = tmp_path_factory.mktemp("dots")
    for part in ("images", "masks"):
        (root / part).mkdir()
    lines = ["path,split"]
    for number in range(7):
        image = np.zeros((24, 30, 3), np.uint8)
        mask = np.zeros((24, 30), np.uint8)
        for place in range(number):
            image[2:6, 4 * place + 1 : 4 * place + 4] = 200
            left = 4 * place + 1 + 2 * (place == 3)
            mask[2:6, left : left + 3] = 255
        Image.fromarray(image).save(root / "images" / f"d{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"d{number}.png")
        lines.append(f"d{number}.png,val")
    (root / "split.csv").write_text("\n".join(lines))
    ended = call(
        "pack",
        *("--images", root / "images", "--masks", root / "masks", "--mask-format", "binary"),
        *("--split-file", root / "split.csv", "--samples-per-shard", 3, "--workers", 1),
        *("--out", root / "shards"),
    )
    assert ended.code == 0, ended.err
    return root


def evaluate(call, dots: Path, *argv: object):
    return call("evaluate", "--data", dots / "shards", "--workers", 0, "--objects", *argv)


@pytest.fixture(scope="module")
def model(make_checkpoint) -> Path:
    return make_checkpoint()


def test_evaluate_scores_objects_of_every_image(dots, model, call, tmp_path) -> None:
    ended = evaluate(call, dots, "--checkpoint", model, "--out", tmp_path)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "scores.json").read_text())["objects"]
    lines = list(csv.DictReader((tmp_path / "objects.csv").open()))
    scores = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [line["key"] for line in lines] == [line["key"] for line in scores]
    lines.sort(key=lambda line: line["key"])
    assert [int(line["predicted"]) for line in lines] == [*range(7)]
    # The fourth square of the mask is moved to the fifth, with which it is one object of 20 pixels;
    # 12 of them are in the fifth of the prediction.
    assert [int(line["true"]) for line in lines] == [0, 1, 2, 3, 4, 4, 5]
    assert [int(line["matched"]) for line in lines] == [0, 1, 2, 3, 3, 4, 5]
    assert (found["true"], found["predicted"], found["matched"]) == (19, 21, 18)
    assert found["precision"] == 18 / 21
    assert found["recall"] == 18 / 19
    assert found["count_error"] == 2 / 7
    assert "objects of foreground (IoU > 0.5): precision 0.8571" in ended.out


@pytest.mark.ranks
def test_objects_are_equal_on_1_2_and_3_ranks(dots, model, call, launch, tmp_path) -> None:
    argv = ("--checkpoint", model, "--data", dots / "shards", "--workers", 0, "--objects")
    argv += ("--batch-size", 1)
    assert call("evaluate", *argv, "--out", tmp_path / "1").code == 0
    for world in (2, 3):
        ended = launch(world, "evaluate", *argv, "--out", tmp_path / str(world))
        assert ended.code == 0, ended.err
        for name in ("scores.json", "objects.csv"):
            found = (tmp_path / str(world) / name).read_bytes()
            assert found == (tmp_path / "1" / name).read_bytes()


def predict(call, dots: Path, model: Path, out: Path, *argv: object):
    given = ("--checkpoint", model, "--input", dots / "images", "--out", out, "--workers", 0)
    return call("predict", *given, "--objects", "--samples-per-shard", 3, *argv)


def test_predict_writes_counts_areas_and_outlines(dots, model, call, tmp_path) -> None:
    (dots / "images" / "d9.png").write_bytes(b"damaged")
    ended = predict(call, dots, model, tmp_path, "--png")
    (dots / "images" / "d9.png").unlink()
    assert ended.code == 3, ended.err
    lines = list(csv.DictReader((tmp_path / "objects.csv").open()))
    assert [line["source"] for line in lines] == [f"d{number}.png" for number in range(7)]
    assert [int(line["objects"]) for line in lines] == [*range(7)]
    assert [int(line["area"]) for line in lines] == [12 * number for number in range(7)]
    assert [line["mean_area"] for line in lines] == ["", *["12.0"] * 6]
    for number in range(7):
        mask = np.array(Image.open(tmp_path / "png" / f"d{number}.png"))
        document = (tmp_path / "objects" / f"d{number}.geojson").read_bytes()
        np.testing.assert_array_equal(draw_collection(document, mask.shape), mask)
    assert json.loads((tmp_path / "job.json").read_text())["objects"] is True
    assert f"objects.csv: {tmp_path / 'objects.csv'}" in ended.out


@pytest.mark.ranks
def test_outlines_and_counts_are_byte_identical_on_any_ranks(
    dots, model, call, launch, content, tmp_path
) -> None:
    assert predict(call, dots, model, tmp_path / "1").code == 0
    argv = ("--checkpoint", model, "--input", dots / "images", "--workers", 0)
    more = ("--objects", "--samples-per-shard", 3)
    for world in (2, 3):
        ended = launch(world, "predict", *argv, *more, "--out", tmp_path / str(world))
        assert ended.code == 0, ended.err
        assert content(tmp_path / str(world)) == content(tmp_path / "1")


def test_a_job_of_an_earlier_version_resumes_without_objects(dots, model, call, tmp_path) -> None:
    argv = ("--checkpoint", model, "--input", dots / "images", "--out", tmp_path, "--workers", 0)
    assert call("predict", *argv).code == 0
    job = json.loads((tmp_path / "job.json").read_text())
    for name in ("objects", "calibrated"):
        assert job.pop(name) is False
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert call("predict", *argv).code == 0
    ended = call("predict", *argv, "--objects")
    assert (ended.code, "was created with --no-objects" in ended.err) == (2, True)


def test_objects_are_of_two_classes(dots, make_checkpoint, call, tmp_path) -> None:
    three = make_checkpoint(classes=("background", "cell", "ghost"))
    ended = predict(call, dots, three, tmp_path / "out")
    assert (ended.code, "--objects is for models of two classes" in ended.err) == (2, True)
    assert not (tmp_path / "out").exists()
