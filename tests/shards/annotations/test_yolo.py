# ruff: noqa: E501 (pinned messages are long)
"""`annotations.yolo`, `annotations.signatures`.

YOLO segmentation labels become masks; boxes are refused.
"""

import re

import numpy as np
import pytest
from pycocotools import mask as reference

from shards.sample import DataError

WIDTH, HEIGHT = 50, 30


@pytest.fixture
def draw(place):
    def run(text, **settings):
        place.add_images("train/a.png", size=(WIDTH, HEIGHT))
        place.write("labels/train/a.txt", text)
        settings = {"classes": ("a", "b", "c"), **settings}
        return place.draw(place.root / "labels", "yolo", **settings)["train/a.png"]

    return run


def test_polygons_are_fractions_of_the_image_and_later_ones_are_on_top(draw):
    rng = np.random.default_rng(0)
    lines, expected = [], np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for number in range(12):
        points = rng.uniform(-0.1, 1.1, (3 + number % 5, 2)).round(6)
        lines.append(f"{number % 3} " + " ".join(map(str, points.ravel())))
        flat = (points * (WIDTH, HEIGHT)).ravel().tolist()
        expected[reference.decode(reference.frPyObjects([flat], HEIGHT, WIDTH))[..., 0] > 0] = (
            1 + number % 3
        )
    np.testing.assert_array_equal(draw("\n".join(lines) + "\n\n"), expected)


def test_names_come_from_classes_txt(place, draw):
    place.write("labels/classes.txt", "zebra\nlion\n")
    assert draw("1 0 0 1 0 1 1 0 1", classes=()).tolist() == np.full((HEIGHT, WIDTH), 2).tolist()
    assert place.find(place.root / "labels", "yolo").classes == ("background", "zebra", "lion")


def test_images_without_a_file_or_with_an_empty_one_are_background(place, draw):
    draw("")
    place.add_images("b.png")
    found = place.find(place.root / "labels", "yolo", classes=("a",))
    assert [(p.source, p.mask) for p in found.pairing.pairs] == [
        ("b.png", None),
        ("train/a.png", "train/a.txt"),
    ]
    assert found.notes == ["2 images without annotations are all background"]


def test_files_without_an_image_are_named(place, draw):
    draw("")
    place.write("labels/other.txt", "")
    (line,) = place.find(place.root / "labels", "yolo", classes=("a",)).pairing.unpaired
    assert re.search(r"labels/other.txt has no image in .*images$", line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 1: it is a bounding box (class, x, y, width, height), and boxes do not make masks; export segmentation labels"),
        ("\n0 0.5 0.5", "line 2: 2 coordinates are fewer than three points; correct it"),
        ("0 0 0 1 0 1 1 0", "line 1: its polygon has 7 numbers, an odd count; correct it"),
        ("0 0 0 10 0 10 10", "line 1: coordinates reach 10; YOLO's are fractions of the image, 0 to 1"),
        ("0 0 0 nan 0 1 1", "line 1: its polygon has NaN or infinite coordinates; correct it"),
        ("0 0 0 x 0 1 1", "line 1: it has words that are not numbers; correct it"),
        ("cat 0 0 1 0 1 1", "line 1: 'cat' is not a class number; export it again"),
        ("-1 0 0 1 0 1 1", "line 1: '-1' is not a class number; export it again"),
        ("1.5 0 0 1 0 1 1", "line 1: '1.5' is not a class number; export it again"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_drawn_are_named(place, text, message):
    place.add_images("a.png")
    place.write("labels/a.txt", text)
    (refused,) = place.find(place.root / "labels", "yolo", classes=("a",)).pairing.refused
    assert refused == f"{place.root}/labels/a.txt, {message}"


def test_class_numbers_beyond_the_names_and_missing_names_are_named(place, draw):
    with pytest.raises(
        DataError, match=r"labels has 1 annotations of unknown class \('7': 1\); add"
    ):
        draw("7 0 0 1 0 1 1")
    with pytest.raises(
        DataError, match=r"labels does not name its classes; add --classes, the names"
    ):
        draw("0 0 0 1 0 1 1", classes=())
