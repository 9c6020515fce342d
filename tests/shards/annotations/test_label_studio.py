# ruff: noqa: E501 (pinned messages are long)
"""`annotations.label_studio`.

Label Studio's JSON export becomes masks.
"""

import re

import numpy as np
import pytest

from shards.sample import DataError

WIDTH, HEIGHT = 20, 10


def result(kind="polygonlabels", labels=("cat",), key="r1", **value):
    if kind == "polygonlabels" and not value:
        value = {"points": [[10, 20], [50, 20], [50, 80], [10, 80]], "closed": True}
    return {"id": key, "type": kind, "original_width": WIDTH, "original_height": HEIGHT,
            "image_rotation": 0, "value": {**value, kind: list(labels)}}  # fmt: skip


def task(*annotations, image="/data/upload/1/0a1b2c3d-a%20b.png", number=7, **more):
    return {
        "id": number,
        "data": {"image": image},
        "annotations": list(annotations),
        "predictions": [],
        **more,
    }


def annotation(*results, by=1, **more):
    return {
        "id": 100 + by,
        "completed_by": by,
        "was_cancelled": False,
        "result": list(results),
        **more,
    }


@pytest.fixture
def draw(place):
    def run(*tasks, **settings):
        place.add_images("sub/a b.png", size=(WIDTH, HEIGHT))
        return place.draw(place.write("export.json", list(tasks)), "label-studio", **settings)[
            "sub/a b.png"
        ]

    return run


def rectangle(x, y, u, v, value=1):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y:v, x:u] = value
    return mask


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (result(), rectangle(2, 2, 10, 8)),
        (result("rectanglelabels", x=10, y=20, width=40, height=60, rotation=0), rectangle(2, 2, 10, 8)),
        (result("rectanglelabels", x=50, y=20, width=30, height=20, rotation=90), rectangle(8, 2, 10, 8)),
        (result("brushlabels", format="rle", rle=[0, 0, 3, 32, 59, 255, 191, 230, 32, 0, 0]), None),
    ],
)  # fmt: skip
def test_regions_in_percent_have_known_pixels(draw, shape, expected):
    if expected is None:
        # 800 values in packets of 16 bits: 400 zeros, then 400 of 255: the lower half of the image.
        bits = f"{800:032b}{7:05b}{2:04b}{4:04b}{7:04b}{15:04b}"
        bits += f"111{399:016b}{0:08b}111{399:016b}{255:08b}"
        bits += "0" * (-len(bits) % 8)
        shape["value"]["rle"] = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
        expected = rectangle(0, 5, 20, 10)
    np.testing.assert_array_equal(draw(task(annotation(shape))), expected)


def test_ellipses_are_the_pixels_with_their_centre_inside(draw):
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    mask = draw(
        task(annotation(result("ellipselabels", x=50, y=40, radiusX=30, radiusY=20, rotation=0)))
    )
    np.testing.assert_array_equal(mask, ((x - 10) / 6) ** 2 + ((y - 4) / 2) ** 2 <= 1)


def test_later_regions_are_on_top_and_classes_are_sorted(place, draw):
    mask = draw(
        task(
            annotation(
                result(labels=("dog",)),
                result("rectanglelabels", ("cat",), key="r2", x=10, y=20, width=10, height=60),
            )
        )
    )
    assert (mask[5, 3], mask[5, 8]) == (1, 2)
    assert place.find(place.root / "export.json", "label-studio").classes == (
        "background",
        "cat",
        "dog",
    )


def test_labels_may_be_results_of_their_own(draw):
    bare = {**result(), "type": "polygon"}
    bare["value"] = {"points": bare["value"]["points"]}
    labelled = {**result(), "type": "labels"}
    labelled["value"] = {"points": bare["value"]["points"], "labels": ["cat"]}
    np.testing.assert_array_equal(draw(task(annotation(bare, labelled))), rectangle(2, 2, 10, 8))


@pytest.mark.parametrize(
    "image",
    ["/data/upload/1/0a1b2c3d-a%20b.png", "/data/local-files/?d=sub/a%20b.png", "s3://bucket/x/a%20b.png", "sub/a b.png"],
)  # fmt: skip
def test_images_are_found_by_their_url(draw, image):
    assert draw(task(annotation(result()), image=image)).any()


@pytest.mark.parametrize(
    ("annotator", "value"), [("first", 1), ("1", 1), ("2", 2), ("b@x.org", 2)]
)  # fmt: skip
def test_of_several_annotations_the_chosen_one_is_drawn(draw, annotator, value):
    one = annotation(result(labels=("a",)), by=1)
    two = {**annotation(result(labels=("b",)), by=2), "completed_by": {"id": 2, "email": "b@x.org"}}
    gone = annotation(result(labels=("c",)), by=3, was_cancelled=True)
    mask = draw(task(gone, one, two), annotator=annotator, classes=("a", "b"))
    assert mask[5, 5] == value


def test_results_that_are_not_regions_are_counted(place, draw):
    draw(task(annotation(result(), {"id": "x", "type": "choices", "value": {"choices": ["good"]}})))
    notes = place.find(place.root / "export.json", "label-studio").notes
    assert notes == ["1 results that are not regions (choices, text) are not drawn"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task(annotation(result()), annotation(result(), by=2))], "task 7: it has 2 annotations, by 1, 2; choose with --annotator first or the id of one"),
        ([task(annotation(result(labels=())))], "task 7: region r1 has no label; add it"),
        ([task(annotation(result(labels=("a", "b"))))], "task 7: region r1 has several labels: a, b; keep one"),
        ([{"id": 7, "data": {"image": "a b.png"}}], "task 7: it has no annotations; export `JSON`, not `JSON-MIN` or predictions"),
        ([task(annotation(result()), data={"left": "a.png", "right": "b.png"})], "task 7: its data name 2 files (left, right), not one; correct it"),
        ([task(annotation(result()), image="/x/..")], "task 7 names the image 'x/..', which is not inside the folder of images; use relative paths"),
        ([task(annotation(result()), image="../../a b.png")], "task 7 names the image '../../a b.png', which is not inside the folder of images; use relative paths"),
        ([task()], "images/sub/a b.png has no annotations; annotate it, or add --unannotated background or skip"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_used_are_named(place, tasks, message):
    place.add_images("sub/a b.png", size=(WIDTH, HEIGHT))
    refused = place.find(place.write("export.json", tasks), "label-studio").pairing.refused
    assert refused[0].replace(f"{place.root}/", "").removeprefix("export.json: ") == message


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({**result(), "original_width": None}, "its original_width is None, not a number"),
        ({**result(), "original_width": 0}, "its original size is 0 x 10"),
        ({**result(), "image_rotation": 90}, "its image was rotated by 90 degrees"),
        (result("keypointlabels", x=1, y=1, width=float("nan")), "its width is nan, not finite"),
        (result("keypointlabels", x=1, y=1), "it is a key point or another shape without an area"),
        (result(points=[[1, 2], [3]]), "its polygon is not a list of numbers"),
        (result("ellipselabels", x=1, y=1, radiusX=0, radiusY=1), "its radii are 0 and 0.1"),
        (result("brushlabels", rle=[1, 2, 3]), "its RLE is cut off in its header"),
    ],
)  # fmt: skip
def test_regions_that_cannot_be_drawn_are_named(draw, shape, message):
    with pytest.raises(DataError, match=f": {re.escape(message)}; correct or remove it$"):
        draw(task(annotation(shape)))


def test_other_exports_are_named(place):
    place.add_images("a.png")
    path = place.write("x.json", {"images": [], "categories": [], "annotations": []})
    with pytest.raises(
        DataError, match=r"x\.json is not a JSON export of Label Studio; it is coco"
    ):
        place.find(path, "label-studio")
