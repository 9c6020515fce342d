# ruff: noqa: E501 (pinned messages are long)
"""`annotations.labelme`, `annotations.rule`, `annotations.scan`.

LabelMe files become the masks of labelme's own `shapes_to_label`.
"""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shards.sample import DataError

WIDTH, HEIGHT = 60, 40


def shape(label="cat", points=((1, 1), (9, 1), (9, 6), (1, 6)), kind="polygon", **more):
    return {"label": label, "points": [list(p) for p in points], "shape_type": kind, **more}


def labelme(*shapes, **more):
    return {"version": "5.4.1", "flags": {}, "shapes": list(shapes), "imagePath": "..\\x\\a.png",
            "imageData": "notbase64!", "imageHeight": HEIGHT, "imageWidth": WIDTH, **more}  # fmt: skip


def shape_to_mask(points, kind, line_width=10):
    """Draw a shape with the calls of Pillow that labelme makes, on a mask of its own."""
    mask = Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    draw = ImageDraw.Draw(mask)
    xy = [tuple(point) for point in points]
    if kind == "circle":
        (cx, cy), (px, py) = xy
        d = math.sqrt((cx - px) ** 2 + (cy - py) ** 2)
        draw.ellipse([cx - d, cy - d, cx + d, cy + d], outline=1, fill=1)
    elif kind == "rectangle":
        draw.rectangle(xy, outline=1, fill=1)
    elif kind in ("polygon", "oriented_rectangle"):
        draw.polygon(xy=xy, outline=1, fill=1)
    else:
        draw.line(xy=xy, fill=1, width=line_width)
    return np.array(mask, dtype=bool)


@pytest.fixture
def draw(place):
    def run(plain, **settings):
        place.add_images("sub/a.png", size=(WIDTH, HEIGHT))
        place.write("labels/sub/a.json", plain)
        return place.draw(place.root / "labels", "labelme", **settings)["sub/a.png"]

    return run


def test_shapes_have_the_pixels_of_labelme_and_later_ones_are_on_top(draw):
    rng = np.random.default_rng(0)
    shapes, expected = [], np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    kinds = ["polygon", "circle", "rectangle", "line", "linestrip", "oriented_rectangle"]
    for number in range(48):
        kind = kinds[number % 6]
        count = {"polygon": 3 + number % 7, "linestrip": 4, "oriented_rectangle": 4}.get(kind, 2)
        points = rng.uniform((-5, -5), (WIDTH + 5, HEIGHT + 5), (count, 2))
        if number % 2:
            points = points.round()
        if kind == "circle":
            points[1] = points[0] + rng.uniform(0, 9, 2)
        if kind == "rectangle":
            points = np.sort(points, axis=0)
        shapes.append(shape("abc"[number % 3], points.tolist(), kind))
        expected[shape_to_mask(points, kind, line_width=3)] = 1 + number % 3
    np.testing.assert_array_equal(draw(labelme(*shapes), line_width=3), expected)


def test_a_rectangle_has_known_pixels_whichever_corners_are_given(draw):
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[2:6, 3:8] = 1
    for points in (((3, 2), (7, 5)), ((7, 5), (3, 2)), ((3, 5), (7, 2))):
        np.testing.assert_array_equal(draw(labelme(shape("x", points, "rectangle"))), expected)


def test_a_mask_lies_between_its_points(draw):
    pixels = np.array([[1, 0, 1], [0, 1, 0]], dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels * 255).convert("1").save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    mask = draw(labelme(shape("x", ((5, 7), (7, 8)), "mask", mask=text)))
    np.testing.assert_array_equal(mask[7:9, 5:8], pixels)
    assert mask.sum() == 3


def test_labels_are_sorted_and_special_ones_are_background_and_ignored(place, draw):
    plain = labelme(
        shape("b"), shape("a", ((20, 1), (25, 1), (25, 5))), shape("__ignore__", ((40, 20), (50, 20), (50, 30))),
        shape("_background_", ((2, 2), (3, 2), (3, 3), (2, 3))),
    )  # fmt: skip
    mask = draw(plain)
    assert place.find(place.root / "labels", "labelme").classes == ("background", "a", "b")
    assert (mask[5, 5], mask[2, 24], mask[22, 48], mask[2, 2]) == (2, 1, 255, 0)


def test_shapes_without_a_type_are_polygons_and_sizes_may_be_missing(draw):
    mask = draw(labelme(shape(kind=None), imageHeight=None, imageWidth=None))
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask.sum() == 54


def test_images_without_a_file_follow_the_rule_for_unannotated_images(place, draw):
    draw(labelme(shape()))
    place.add_images("b.png")
    folder = place.root / "labels"
    (refused,) = place.find(folder, "labelme").pairing.refused
    assert refused.endswith(
        "images/b.png has no annotations; annotate it, or add --unannotated background or skip"
    )
    found = place.find(folder, "labelme", unannotated="background")
    assert [(pair.source, pair.mask) for pair in found.pairing.pairs] == [
        ("b.png", None),
        ("sub/a.png", "sub/a.json"),
    ]
    assert not place.read(found.rule, found, found.pairing.pairs[0]).class_map.index.any()


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (labelme(shape(kind="line", points=((1, 1), (2, 2)))), "sub/a.json (sub/a.png): shape 0 (cat): it is a line, which has no area: draw it with --line-width PIXELS; correct or remove it"),
        (labelme(shape(kind="point", points=((1, 1),))), "sub/a.json (sub/a.png): shape 0 (cat): it is a point, which cannot be drawn as a region; correct or remove it"),
        (labelme(shape(kind="circle")), "sub/a.json (sub/a.png): shape 0 (cat): a circle has 2 points, this one 4; correct or remove it"),
        (labelme(shape(kind="mask", points=((1, 1), (2, 2)))), "sub/a.json (sub/a.png): shape 0 (cat): its mask is not a PNG in base64; correct or remove it"),
        (labelme(shape(points=((1, float("nan")), (2, 2), (3, 4)))), "sub/a.json (sub/a.png): shape 0 (cat): its polygon has NaN or infinite coordinates; correct or remove it"),
        (labelme(shape(), imageHeight="x"), "sub/a.json (sub/a.png): imageWidth and imageHeight are 60 and x; correct them"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_drawn_are_named(draw, plain, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        draw(plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"shapes": [', "a.json: it is not valid JSON in UTF-8; it may be cut off: export it again"),
        ({"images": [], "categories": [], "annotations": []}, "a.json: it is not a LabelMe file: it has no list 'shapes'; it is coco: use --annotation-format coco; correct it"),
        (labelme(shape(label="")), "a.json: shape 0 has no label; add it"),
        (labelme("x"), "a.json: shape 0 has no label; add it"),
        ("[" * 100_000, "a.json: it is not valid JSON in UTF-8; it may be cut off: export it again"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_one_by_one(place, content, message):
    place.add_images("a.png")
    text = content if isinstance(content, str) else json.dumps(content)
    place.write("labels/a.json", text)
    refused = place.find(place.root / "labels", "labelme").pairing.refused
    assert refused[0].replace(f"{place.root}/labels/", "") == message.removesuffix("; correct it")


def test_a_file_where_a_folder_is_expected_is_named(place):
    place.add_images("a.png")
    with pytest.raises(
        DataError, match="is a file; --annotation-format labelme reads a folder with a"
    ):
        place.find(place.write("a.json", labelme()), "labelme")
    (place.root / "empty").mkdir()
    with pytest.raises(DataError, match="empty contains no JSON files; correct --annotations"):
        place.find(place.root / "empty", "labelme")
