# ruff: noqa: E501 (pinned messages are long)
"""`annotations.coco`, `annotations.regions`, `annotations.source`.

COCO instances become the masks of pycocotools, smaller objects on top.
"""

import json
import re

import numpy as np
import pytest
from pycocotools import mask as reference
from pycocotools.coco import COCO

from shards.sample import DataError

WIDTH, HEIGHT = 12, 8
SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]


def coco(*annotations, categories=None, images=None, **more):
    return {
        "images": images or [{"id": 5, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": categories or [{"id": 90, "name": "cat"}, {"id": 3, "name": "big dög"}],
        "annotations": [
            {"id": n, "image_id": 5, "category_id": 90, **a} for n, a in enumerate(annotations, 1)
        ],
        **more,
    }


@pytest.fixture
def draw(place):
    def run(plain, **settings):
        place.add_images("a.png")
        return place.draw(place.write("x.json", plain), "coco", **settings)["a.png"]

    return run


@pytest.fixture
def refusal(place, draw):
    """Return the one line with which a file is refused, when it is read or when it is drawn."""

    def run(plain, **settings):
        with pytest.raises(DataError) as caught:
            draw(plain, **settings)
        text = str(caught.value).replace(f"{place.root}/", "")
        assert "\n" not in text
        return text

    return run


def test_every_kind_of_segmentation_has_the_pixels_of_pycocotools(place):
    rng = np.random.default_rng(3)
    images = [
        {"id": n, "file_name": f"sub {n}/{n}.png", "width": 40 + n, "height": 30} for n in range(6)
    ]
    annotations = []
    for number in range(60):
        image = images[number % 6]
        size = image["height"], image["width"]
        polygons = rng.uniform(-4, 40, (1 + number % 3, 10)).round(2).tolist()
        rle = reference.encode(np.asfortranarray(rng.random(size) < 0.2, dtype=np.uint8))
        counts = np.diff(np.flatnonzero(np.diff(np.r_[2, reference.decode(rle).ravel("F"), 2])))
        first = reference.decode(rle)[0, 0]
        segmentation = [
            polygons,
            {"size": list(size), "counts": rle["counts"].decode()},
            {"size": list(size), "counts": [0] * int(first) + counts.tolist()},
        ][number % 3 if number % 5 else 0]
        annotations.append(
            {
                "id": number,
                "image_id": image["id"],
                "category_id": [7, 90, 2][number % 3],
                "segmentation": segmentation,
                "iscrowd": int(number % 11 == 0),
            }
        )
    categories = [{"id": 7, "name": "a"}, {"id": 90, "name": "b"}, {"id": 2, "name": "c"}]
    plain = {"images": images, "annotations": annotations, "categories": categories}
    for image in images:
        place.add_images(image["file_name"], size=(image["width"], image["height"]))
    path = place.write("instances.json", plain)
    masks = place.draw(path, "coco")
    api = COCO(str(path))
    assert len(masks) == 6
    for image in images:
        own = [(api.annToMask(a), a) for a in api.loadAnns(api.getAnnIds([image["id"]]))]
        expected = np.zeros((image["height"], image["width"]), dtype=np.uint8)
        for mask, annotation in sorted(own, key=lambda entry: -int(entry[0].sum())):
            index = 255 if annotation["iscrowd"] else {7: 1, 90: 2, 2: 3}[annotation["category_id"]]
            expected[mask > 0] = index
        np.testing.assert_array_equal(masks[image["file_name"]], expected)
        assert len(np.unique(expected)) > 2


def test_the_smaller_object_is_on_top_whatever_the_order(draw):
    small = {"segmentation": [[2, 2, 4, 2, 4, 3, 2, 3]], "category_id": 3}
    for annotations in ([small, {"segmentation": SQUARE}], [{"segmentation": SQUARE}, small]):
        mask = draw(coco(*annotations))
        assert mask[2, 2] == 2
        assert mask[1, 1] == 1
        assert np.bincount(mask.ravel(), minlength=3).tolist() == [84, 10, 2]


def test_classes_keep_the_order_of_the_categories_after_background(place, draw):
    assert draw(coco({"segmentation": SQUARE, "category_id": 3}))[1, 1] == 2
    found = place.find(place.root / "x.json", "coco")
    assert found.classes == ("background", "cat", "big dög")


def test_classes_of_the_user_set_the_order(place, draw):
    plain = coco({"segmentation": SQUARE, "category_id": 3})
    assert draw(plain, classes=("big dög", "cat"))[1, 1] == 1
    assert draw(plain, classes=("background", "big dög", "cat"))[1, 1] == 1


def test_category_0_is_a_class_like_any_other(draw):
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    mask = draw(coco({"segmentation": SQUARE, "category_id": 0}, categories=categories))
    assert mask[1, 1] == 1


@pytest.mark.parametrize(("name", "index"), [("background", 0), ("Ignore", 255)])
def test_categories_called_background_or_ignore_are_no_classes(place, draw, name, index):
    categories = [{"id": 0, "name": name}, {"id": 90, "name": "dog"}]
    mask = draw(coco({"segmentation": SQUARE, "category_id": 0}, categories=categories))
    assert mask[1, 1] == index
    assert place.find(place.root / "x.json", "coco").classes == ("background", "dog")


@pytest.mark.parametrize(("unknown", "index"), [("ignore", 255), ("background", 0)])
def test_classes_that_are_not_listed_are_ignored_or_background_on_request(
    place, draw, unknown, index
):
    plain = coco({"segmentation": SQUARE}, {"segmentation": SQUARE, "category_id": 3})
    mask = draw(plain, classes=("big dög", "cow"), unknown=unknown)
    assert mask[1, 1] in ({index} | {1})
    notes = place.find(place.root / "x.json", "coco", classes=("big dög",), unknown=unknown).notes
    assert notes == [f"1 annotations of 'cat' become {unknown}"]


def test_unknown_classes_are_named_with_counts(refusal):
    plain = coco(*[{"segmentation": SQUARE}] * 2, {"segmentation": SQUARE, "category_id": 3})
    assert refusal(plain, classes=("cow",)) == (
        "x.json has 3 annotations of unknown class ('cat': 2, 'big dög': 1); add it to --classes, "
        "or use --unknown ignore or background"
    )


def test_overlapping_classes_are_named_on_request(draw, refusal):
    other = {"segmentation": [[2, 2, 8, 2, 8, 6, 2, 6]], "category_id": 3}
    plain = coco({"segmentation": SQUARE}, other)
    assert refusal(plain, overlap="error") == (
        "x.json (a.png): annotation 1 overlaps annotation 2 in 6 pixels; correct one of them, or "
        "drop --overlap error"
    )
    same = coco({"segmentation": SQUARE}, {**other, "category_id": 90})
    assert draw(same, overlap="error").sum() == 12 + 24 - 6


def test_regions_without_an_area_are_named_and_draw_nothing(place):
    place.add_images("a.png")
    plain = coco(
        {"segmentation": [[1, 1, 3, 3]]},
        {"segmentation": [[1, 1, 3, 3, 5, 5]]},
        {"segmentation": [[1, 1, 30, 1, 30, 4, 1, 4]]},
    )
    found = place.find(place.write("x.json", plain), "coco")
    mask = place.read(found.rule, found, found.pairing.pairs[0])
    assert mask.remarks == (
        "x.json (a.png), annotation 1: 2 points",
        "x.json (a.png), annotation 2: no area",
    )
    assert mask.notes == ("clipped", "degenerate")
    assert mask.class_map.index.sum() == 33


def test_images_and_annotations_may_come_in_any_order(draw):
    plain = coco({"segmentation": SQUARE})
    assert draw(dict(reversed(plain.items())))[1, 1] == 1


def test_images_without_annotations_are_background_by_default(place):
    images = [
        {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (5, 6, 7)
    ]
    place.add_images("5.png", "6.png", "7.png")
    path = place.write("x.json", coco({"segmentation": SQUARE}, images=images))
    found = place.find(path, "coco")
    assert [pair.source for pair in found.pairing.pairs] == ["5.png", "6.png", "7.png"]
    assert found.notes == ["2 images without annotations are all background"]
    skipped = place.find(path, "coco", unannotated="skip")
    assert [pair.source for pair in skipped.pairing.pairs] == ["5.png"]
    assert skipped.notes == ["2 images without annotations are skipped"]
    refused = place.find(path, "coco", unannotated="error").pairing.refused
    assert [line.replace(f"{place.root}/", "") for line in refused] == [
        f"images/{n}.png has no annotations; annotate it, or add --unannotated background or skip"
        for n in (6, 7)
    ]


def test_missing_images_and_unlisted_files_are_named(place):
    images = [
        {"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for n, name in ((5, "a.png"), (6, "gone/b.png"))
    ]
    place.add_images("a.png", "more.png")
    found = place.find(place.write("x.json", coco({"segmentation": SQUARE}, images=images)), "coco")
    lines = [line.replace(f"{place.root}/", "") for line in found.pairing.unpaired]
    assert lines == [
        "x.json lists gone/b.png, missing in images",
        "images/more.png is not listed in x.json",
    ]


def rle(counts, size=(HEIGHT, WIDTH)):
    return coco({"segmentation": {"size": list(size), "counts": counts}})


def one(**annotation):
    return coco({"segmentation": SQUARE, **annotation})


def image(**entry):
    plain = coco({"segmentation": SQUARE})
    plain["images"][0] |= entry
    return plain


BAD = [
    ({"images": []}, "x.json is not COCO: it has no 'annotations'; export it again"),
    (
        {"version": "5", "shapes": [], "imageData": None},
        "x.json is not COCO: it has no 'images'; it is labelme: use --annotation-format labelme",
    ),
    (
        [{"id": 1, "data": {"image": "a.png"}, "annotations": []}],
        "x.json is not COCO: it has no 'images'; it is label-studio: use --annotation-format "
        "label-studio",
    ),
    ({"images": {}, "annotations": []}, "x.json is not COCO: 'images' is not a list; export it again"),
    ({"images": [3], "annotations": []}, "x.json, byte 12: an entry of images is not an object"),
    ("{", "x.json ends in the middle of its JSON, after 1 bytes; it was cut off: export or copy it again"),
    (json.dumps(one())[:-30], "x.json ends in the middle of its JSON, after 225 bytes; it was cut off: "
     "export or copy it again"),
    (image(id=None), "x.json: images[12] has no id; add it"),
    (image(width=None), "x.json (a.png): image 5 has the size None x 8; correct its width and height"),
    (image(width=-3), "x.json (a.png): image 5 has the size -3 x 8; correct its width and height"),
    (image(width=10**6, height=10**6), "x.json (a.png) is for an image of 1000000 x 1000000, but the "
     "image is 12 x 8; find the right image"),
    (one(image_id=6), "x.json: 1 annotations have an unlisted image_id (6: 1); add it to images, or "
     "remove them"),
    (one(category_id=6), "x.json: 1 annotations have an unlisted category_id (6: 1); add it to "
     "categories, or remove them"),
    (one(category_id=None), "x.json: annotation 1 has no category_id; add it"),
    (coco(one()["annotations"][0], {"id": 1, "segmentation": SQUARE}), "x.json: 1 annotation ids occur "
     "twice, the first: 1; renumber the annotations"),
    (coco(images=[{"id": 5, "file_name": "a.png"}] * 2), "x.json: two images have the id 5; renumber "
     "them"),
    (coco(categories=[{"id": 5, "name": "a"}] * 2), "x.json: two categories have the id 5; renumber "
     "them"),
    (coco(categories=[{"id": 5, "name": "a"}, {"id": 6, "name": "a"}]), "x.json: two categories are "
     "called 'a'; merge or rename one"),
    (coco(categories=[{"id": 5, "name": " "}]), "x.json: category 5 has no name; add it"),
    (one(segmentation=[]), "x.json (a.png): annotation 1: it has no segmentation; correct or remove it"),
    (one(segmentation=[], bbox=[0, 0, 2, 2]), "x.json (a.png): annotation 1: it has a bounding box only, "
     "no segmentation; boxes do not make masks; correct or remove it"),
    (one(segmentation=[1, 1, 5, 1, 5, 4]), "x.json (a.png): annotation 1: its polygon must be a list in a "
     "list: [[x, y, x, y, ...]]; correct or remove it"),
    (one(segmentation="abc"), "x.json (a.png): annotation 1: its segmentation is str, not a list or an "
     "RLE; correct or remove it"),
    (one(segmentation=[[1, 1, 5, 1, 5]]), "x.json (a.png): annotation 1: its polygon has 5 numbers, an "
     "odd count; correct or remove it"),
    (one(segmentation=[[1, 1, 5, float("nan"), 5, 4]]), "x.json (a.png): annotation 1: its polygon has "
     "NaN or infinite coordinates; correct or remove it"),
    (one(segmentation=[[1, 1, 5, 1e9, 5, 4]]), "x.json (a.png): annotation 1: its polygon has the "
     "coordinate 1e+09, far outside of any image; correct or remove it"),
    (rle([96], (WIDTH, HEIGHT)), "x.json (a.png): annotation 1: its RLE has the size [12, 8], but "
     "[height, width] of its image is [8, 12]; correct or remove it"),
    (rle([90]), "x.json (a.png): annotation 1: its RLE covers 90 pixels, but the image has 12 x 8 = 96; "
     "correct or remove it"),
    (rle([1.5, 94.5]), "x.json (a.png): annotation 1: its RLE has no counts: a list of integers or a "
     "compressed string; correct or remove it"),
    (rle([10**30]), "x.json (a.png): annotation 1: its RLE has a count beyond any image; correct or "
     "remove it"),
    (rle("é"), "x.json (a.png): annotation 1: its compressed RLE has characters that the encoding does "
     "not use; correct or remove it"),
    (rle(None), "x.json (a.png): annotation 1: its RLE has no counts: a list of integers or a compressed "
     "string; correct or remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("plain", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_bad_files_are_refused_in_one_line(refusal, plain, message):
    assert refusal(plain) == message


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "a\0.png", None, ""])
def test_paths_that_leave_the_folder_of_images_are_refused(place, name):
    place.add_images("a.png")
    found = place.find(place.write("x.json", image(file_name=name)), "coco")
    assert not found.pairing.pairs
    assert re.search(
        r"x\.json: image 5 names (the image .* not inside the folder of images; use relative paths"
        r"|no image file; correct it)$",
        found.pairing.refused[0],
    )


def test_a_folder_and_a_missing_file_are_named(place):
    place.add_images("a.png")
    with pytest.raises(DataError, match=r"is a directory; --annotation-format coco reads one file"):
        place.find(place.images, "coco")
    with pytest.raises(DataError, match=r"gone.json does not exist; correct --annotations"):
        place.find(place.root / "gone.json", "coco")


def test_no_image_that_fits_is_an_error_with_examples(place):
    place.add_images("train/a.png")
    with pytest.raises(
        DataError, match=r"\(for example: a.png and train/a.png\); choose --images so"
    ):
        place.find(place.write("x.json", one()), "coco")
