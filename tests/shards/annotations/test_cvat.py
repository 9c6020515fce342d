# ruff: noqa: E501 (pinned messages are long)
"""`annotations.cvat`, `annotations.drawing`.

CVAT's XML for images 1.1 becomes masks.
"""

import re

import numpy as np
import pytest
from pycocotools import mask as reference

from shards.sample import DataError

WIDTH, HEIGHT = 30, 20
LABELS = "<meta><task><labels><label><name>a &amp; b</name><color>#fff</color></label><label><name>cat</name></label></labels></task></meta>"


def cvat(*shapes, head='<?xml version="1.0" encoding="utf-8"?>', meta=LABELS, size=(WIDTH, HEIGHT)):
    return (
        f'{head}\n<annotations><version>1.1</version>{meta}\n'
        f'<image id="0" name="ä.png" width="{size[0]}" height="{size[1]}">{"".join(shapes)}</image>\n'
        f'<image id="1" name="sub/b.png" width="{size[0]}" height="{size[1]}" note="a>b"/>'
        f"</annotations>"
    )  # fmt: skip


def polygon(points, label="cat", z=0):
    return f'<polygon label="{label}" occluded="0" points="{points}" z_order="{z}"><attribute name="x">1</attribute></polygon>'


SQUARE = "2,3;8,3;8,9;2,9"


@pytest.fixture
def draw(place):
    def run(text, **settings):
        place.add_images("ä.png", "sub/b.png", size=(WIDTH, HEIGHT))
        path = place.write("annotations.xml", text)
        masks = place.draw(path, "cvat", **{"unannotated": "background", **settings})
        assert not masks["sub/b.png"].any()
        return masks["ä.png"]

    return run


def rectangle(x, y, u, v, value):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y:v, x:u] = value
    return mask


def test_polygons_have_the_pixels_of_pycocotools(draw):
    points = np.random.default_rng(0).uniform(-2, 28, (9, 2)).round(2)
    mask = draw(cvat(polygon(";".join(f"{x},{y}" for x, y in points))))
    expected = reference.decode(reference.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH))[
        ..., 0
    ]
    np.testing.assert_array_equal(mask, 2 * expected)


@pytest.mark.parametrize(("left", "right"), [(6.5, 10.4), (0.1, 0.7), (3.3, 7.5)])
def test_a_box_has_the_pixels_of_its_corners_as_they_are_written(draw, left, right):
    box = f'<box label="cat" xtl="{left}" ytl="0.5" xbr="{right}" ybr="6.5"/>'
    corners = [left, 0.5, right, 0.5, right, 6.5, left, 6.5]
    expected = reference.decode(reference.frPyObjects([corners], HEIGHT, WIDTH))[..., 0]
    np.testing.assert_array_equal(draw(cvat(box)), 2 * expected)


def test_classes_keep_the_order_of_the_labels(place, draw):
    np.testing.assert_array_equal(draw(cvat(polygon(SQUARE))), rectangle(2, 3, 8, 9, 2))
    found = place.find(place.root / "annotations.xml", "cvat", unannotated="skip")
    assert found.classes == ("background", "a &amp; b".replace("&amp;", "&"), "cat")


def test_a_higher_z_order_is_on_top_then_the_later_one(draw):
    low, high = polygon(SQUARE), polygon(SQUARE, "a &amp; b", z=1)
    assert draw(cvat(high, low))[4, 4] == 1
    assert draw(cvat(low.replace("cat", "a &amp; b"), polygon(SQUARE)))[4, 4] == 2


def test_a_mask_follows_the_rows_of_its_box(draw):
    mask = draw(
        cvat(
            '<mask label="cat" rle="1, 3, 1, 1" left="5" top="7" width="3" height="2" z_order="0"/>'
        )
    )
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[7:9, 5:8] = [[0, 2, 2], [2, 0, 2]]
    np.testing.assert_array_equal(mask, expected)


def test_boxes_are_rectangles_rotated_around_their_centre(draw):
    box = '<box label="cat" xtl="4.0" ytl="6.0" xbr="14.0" ybr="10.0" {} z_order="0"></box>'
    np.testing.assert_array_equal(draw(cvat(box.format(""))), rectangle(4, 6, 14, 10, 2))
    np.testing.assert_array_equal(
        draw(cvat(box.format('rotation="90.0"'))), rectangle(7, 3, 11, 13, 2)
    )


def test_ellipses_are_the_pixels_with_their_centre_inside(draw):
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    turn = np.deg2rad(30)
    along = (x - 14) * np.cos(turn) + (y - 9) * np.sin(turn)
    across = -(x - 14) * np.sin(turn) + (y - 9) * np.cos(turn)
    expected = 2 * ((along / 10) ** 2 + (across / 4) ** 2 <= 1)
    mask = draw(
        cvat('<ellipse label="cat" cx="14" cy="9" rx="10" ry="4" rotation="30" z_order="0"/>')
    )
    np.testing.assert_array_equal(mask, expected)


def test_polylines_are_drawn_with_a_width_only(draw):
    line = '<polyline label="cat" points="2,10;20,10" z_order="0"/>'
    assert draw(cvat(line), line_width=3)[9:12, 3:20].all()
    with pytest.raises(DataError, match="has no area: draw it with --line-width PIXELS"):
        draw(cvat(line))


def test_tags_are_counted(place, draw):
    draw(cvat(polygon(SQUARE), '<tag label="cat" source="manual"></tag>'))
    found = place.find(place.root / "annotations.xml", "cvat", unannotated="skip")
    assert found.notes == [
        "1 images without annotations are skipped",
        "1 tags of images are not drawn",
    ]


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (cvat(head=BOMB), "annotations.xml: it declares a DTD, which could expand without limit; remove <!DOCTYPE>"),
        (cvat(head='<!DOCTYPE a SYSTEM "file:///etc/passwd">'), "annotations.xml: it declares a DTD, which could expand without limit; remove <!DOCTYPE>"),
        (cvat()[:-30], "annotations.xml: it is not valid XML: unclosed token: line 4, column 0; export it again"),
        ("<html/>", "annotations.xml is not a CVAT file: its first element is <html>, not <annotations>"),
        ('<annotations><track id="0" label="cat"/></annotations>', "annotations.xml is `CVAT for video`; export it as `CVAT for images 1.1`, with images"),
        (cvat(head='<?xml version="1.0" encoding="iso-8859-1"?>'), "annotations.xml: it is encoded in iso-8859-1; save it as UTF-8"),
        (cvat('<points label="cat" points="1,1" z_order="0"/>'), "annotations.xml (ä.png): points 0 (cat): it is a points, which cannot be drawn as a region; correct or remove it"),
        (cvat(polygon("1,1;2")), "annotations.xml (ä.png): polygon 0 (cat): its points are not pairs `x,y;x,y`; correct or remove it"),
        (cvat(polygon("1,1;2,a")), "annotations.xml (ä.png): polygon 0 (cat): its points are not numbers `x,y;x,y`; correct or remove it"),
        (cvat(polygon("1,1;2,nan;3,3")), "annotations.xml (ä.png): polygon 0 (cat): its polygon has NaN or infinite coordinates; correct or remove it"),
        (cvat('<box label="cat" xtl="1" ytl="2" xbr="inf" ybr="3"/>'), "annotations.xml (ä.png): box 0 (cat): its xbr is inf, not finite; correct or remove it"),
        (cvat('<ellipse label="cat" cx="1" cy="2" rx="0" ry="3"/>'), "annotations.xml (ä.png): ellipse 0 (cat): its radii are 0 and 3; correct or remove it"),
        (cvat('<mask label="cat" rle="1,2" left="0" top="0" width="2" height="2"/>'), "annotations.xml (ä.png): mask 0 (cat): its RLE covers 3 pixels, but the image has 2 x 2 = 4; correct or remove it"),
        (cvat('<mask label="cat" rle="x" left="0" top="0" width="2" height="2"/>'), "annotations.xml (ä.png): mask 0 (cat): its rle is not a list of integers; correct or remove it"),
        (cvat('<mask label="cat" rle="1" left="0" top="0" width="99999" height="99999"/>'), "annotations.xml (ä.png): mask 0 (cat): its box is 99999 x 99999; correct or remove it"),
        (cvat(polygon(SQUARE), size=(0, 9)), "annotations.xml (sub/b.png): its size is 0 x 9; correct its width and height"),
        (cvat(polygon(SQUARE, "dog")), "annotations.xml has 1 annotations of unknown class ('dog': 1); add it to --classes, or use --unknown ignore or background"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(place, draw, text, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        draw(text)
    assert str(caught.value).replace(f"{place.root}/", "") == message


def test_json_given_as_xml_is_named(place):
    place.add_images("a.png")
    path = place.write("x.json", {"images": [], "categories": [], "annotations": []})
    with pytest.raises(
        DataError, match=r"x\.json is not XML; it is coco: use --annotation-format coco"
    ):
        place.find(path, "cvat")
