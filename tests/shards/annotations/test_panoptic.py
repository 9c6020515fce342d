# ruff: noqa: E501 (pinned messages are long)
"""Panoptic COCO (`shards.annotations.panoptic`): ids of a PNG become classes, void 255."""

import numpy as np
import pytest
from PIL import Image

from shards.sample import DataError

WIDTH, HEIGHT = 12, 8
SEGMENTS = [{"id": 3, "category_id": 90}, {"id": 70000, "category_id": 7, "iscrowd": 0}]


def panoptic(segments=SEGMENTS, *, image=None, **annotation):
    entry = {"id": 5, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT, **(image or {})}
    return {
        "images": [entry],
        "categories": [{"id": 90, "name": "sky"}, {"id": 7, "name": "cat", "isthing": 1}],
        "annotations": [
            {"image_id": 5, "file_name": "a.png", "segments_info": segments, **annotation}
        ],
    }


def ids(*boxes):
    """Return segment ids [H, W]: (id, left, top, right, bottom) in their order, else 0."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    for number, left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = number
    return pixels


IDS = ids((3, 0, 0, 12, 4), (70000, 2, 2, 6, 6))


@pytest.fixture
def draw(place):
    def run(plain, pixels=IDS, **settings):
        place.add_images("a.jpg")
        (place.root / "x").mkdir()
        parts = np.stack([pixels % 256, pixels // 256 % 256, pixels // 65536], axis=-1)
        Image.fromarray(parts.astype(np.uint8)).save(place.root / "x" / "a.png")
        return place.draw(place.write("x.json", plain), "coco", **settings)["a.jpg"]

    return run


def test_ids_become_the_classes_of_their_segments(draw):
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[:4] = 1
    expected[2:6, 2:6] = 2
    np.testing.assert_array_equal(draw(panoptic()), expected)


def test_crowds_are_ignored(draw):
    crowd = [SEGMENTS[0], {**SEGMENTS[1], "iscrowd": 1}]
    assert np.unique(draw(panoptic(crowd))).tolist() == [1, 255]


def test_a_class_that_is_not_chosen_becomes_background(draw):
    mask = draw(panoptic(), classes=("cat",), unknown="background")
    assert (mask[:2] == 0).all()
    assert (mask[2:6, 2:6] == 1).all()
    assert (mask[6:] == 255).all()


def test_segments_without_pixels_are_named(place, draw):
    plain = panoptic([*SEGMENTS, {"id": 9, "category_id": 7}])
    draw(plain)
    found = place.find(place.root / "x.json", "coco")
    drawn = place.read(found.rule, found, found.pairing.pairs[0])
    assert drawn.remarks == ("x.json (a.jpg), segment 9: no pixels",)


def test_an_image_without_a_panoptic_annotation_is_refused_unless_a_policy_is_given(place, draw):
    draw(panoptic())
    place.add_images("b.jpg")
    plain = panoptic()
    plain["images"].append({"id": 6, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT})
    found = place.find(place.write("x.json", plain), "coco")
    assert "b.jpg has no annotations; annotate it" in found.pairing.refused[0]
    found = place.find(place.root / "x.json", "coco", unannotated="skip")
    assert [pair.source for pair in found.pairing.pairs] == ["a.jpg"]


INSTANCE = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [[0, 0, 4, 0, 4, 4]]}
MIXED = panoptic()
MIXED["annotations"].append(INSTANCE)
BAD = [
    (panoptic({}), IDS, "x.json: annotation of image 5: its segments_info is not a list of objects; correct it"),
    (panoptic([{"category_id": 7}]), IDS, "x.json: annotation of image 5: a segment has the id None, not 1 to 16777215; correct it"),
    (panoptic([{"id": 0, "category_id": 7}]), IDS, "x.json: annotation of image 5: a segment has the id 0, not 1 to 16777215; correct it"),
    (panoptic([{"id": 2}]), IDS, "x.json: annotation of image 5: segment 2 has no category_id; correct it"),
    (panoptic([SEGMENTS[0]] * 2), IDS, "x.json: annotation of image 5: two segments have the id 3; correct it"),
    (panoptic([{"id": 3, "category_id": 8}]), IDS, "x.json: 1 annotations have an unlisted category_id (8: 1); add it to categories, or remove them"),
    (panoptic(file_name="../a.png"), IDS, "x.json: annotation of image 5 has the file_name '../a.png', not a relative path; correct it"),
    (panoptic(file_name=None), IDS, "x.json: annotation of image 5 has the file_name None, not a relative path; correct it"),
    (panoptic(image_id=None), IDS, "x.json: annotation without id has no image_id; add it"),
    (MIXED, IDS, "x.json: image 5 has 2 annotations, one panoptic; keep that one"),
    (panoptic(SEGMENTS[:1]), IDS, "x.json (a.jpg): a.png has 16 pixels of ids that segments_info does not list, the first: 70000; find the JSON that belongs to it"),
    (panoptic(), IDS[:4], "x.json (a.jpg): a.png is 12 x 4, but the JSON declares 12 x 8; correct its width and height, or find the right PNG"),
]  # fmt: skip


@pytest.mark.parametrize(("plain", "pixels", "message"), BAD, ids=[m[:60] for _, _, m in BAD])
def test_bad_files_are_refused_in_one_line(place, draw, plain, pixels, message):
    with pytest.raises(DataError) as caught:
        draw(plain, pixels)
    assert str(caught.value).replace(f"{place.root}/", "") == message


def test_a_grey_png_and_a_missing_folder_are_named(place, draw):
    draw(panoptic())
    Image.new("L", (WIDTH, HEIGHT)).save(place.root / "x" / "a.png")
    found = place.find(place.root / "x.json", "coco")
    with pytest.raises(DataError, match=r"a.png has mode L, but panoptic ids are RGB"):
        place.read(found.rule, found, found.pairing.pairs[0])
    path = place.write("y.json", panoptic())
    with pytest.raises(DataError, match=r"but its PNG files are not in .*/y; move them there"):
        place.find(path, "coco")
