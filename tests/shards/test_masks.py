"""Holds the mask contract: what a declared format makes of every mode, and what it refuses."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from shards.masks import MaskFormat, read_mask
from shards.sample import DataError, default_palette, encode_mask

TWO = ("background", "cell")
THREE = (*TWO, "wall")
INDICES = np.array([[0, 1, 2, 0], [2, 1, 0, 0]], dtype=np.uint8)
BINARY = (INDICES > 0).astype(np.uint8)
VALUES = np.array([0, 128, 255], dtype=np.uint8)[INDICES]

MODES = ["L", "P", "I;16", "RGB", "RGBA", "LA"]
SAVABLE = [
    *(("PNG", mode) for mode in MODES),
    *(("TIFF", mode) for mode in MODES),
    *(("BMP", mode) for mode in ("L", "RGB")),
    *(("GIF", mode) for mode in ("L", "P")),
]


def image_of(pixels, mode):
    """The same stored values in another mode."""
    opaque = np.full_like(pixels, 255)
    match mode:
        case "1":
            return Image.fromarray(pixels > 0)
        case "L":
            return Image.fromarray(pixels)
        case "P":
            image = Image.fromarray(pixels).copy()
            # Luminance in another order than the indices.
            image.putpalette([c for i in range(256) for c in (255 - i, 90, 90)])
            return image
        case "I;16":
            return Image.fromarray(pixels.astype(np.uint16))
        case "RGB":
            return Image.fromarray(np.stack([pixels] * 3, -1))
        case "RGBA":
            return Image.fromarray(np.stack([pixels] * 3 + [opaque], -1))
        case "LA":
            return Image.fromarray(np.stack([pixels, opaque], -1), "LA")
    raise AssertionError(mode)


def read(data, classes=TWO, **rule):
    rule = MaskFormat(num_classes=len(classes), **rule)
    return read_mask(data, rule, default_palette(classes), "masks/a.png")


def check_canonical(mask, expected):
    image = Image.open(io.BytesIO(mask.data))
    assert (image.format, image.mode) == ("PNG", "P")
    assert np.array_equal(np.asarray(image), expected)
    assert np.array_equal(mask.index, expected)
    assert mask.index.dtype == np.uint8


@pytest.mark.parametrize(("form", "mode"), SAVABLE)
def test_index_masks_of_every_mode_and_file_format(to_bytes, form, mode):
    mask = read(to_bytes(image_of(INDICES, mode), form), THREE, kind="index")
    check_canonical(mask, INDICES)
    assert mask.values == (0, 1, 2)


# A GIF always has a palette, so that its masks are indices.
@pytest.mark.parametrize(("form", "mode"), [s for s in SAVABLE if s[0] != "GIF"])
def test_values_masks_of_every_mode_and_file_format(to_bytes, form, mode):
    data = to_bytes(image_of(VALUES, mode), form)
    mask = read(data, THREE, kind="values", values=(0, 128, 255))
    check_canonical(mask, INDICES)
    assert mask.values == (0, 128, 255)


@pytest.mark.parametrize(("form", "mode"), [*SAVABLE, ("PNG", "1"), ("TIFF", "1"), ("BMP", "1")])
@pytest.mark.parametrize("foreground", [1, 200, 255])
def test_binary_masks_of_every_mode_and_file_format(to_bytes, form, mode, foreground):
    data = to_bytes(image_of(BINARY * np.uint8(foreground), mode), form)
    check_canonical(read(data, kind="binary"), BINARY)


def test_values_are_given_in_the_order_of_the_classes(to_bytes):
    data = to_bytes(Image.fromarray(VALUES))
    mask = read(data, THREE, kind="values", values=(255, 0, 128))
    check_canonical(mask, np.array([1, 2, 0], dtype=np.uint8)[INDICES])


def test_a_carvana_like_gif_is_read_by_its_palette_indices(to_bytes):
    image = Image.fromarray(BINARY).copy()
    image.putpalette([0, 0, 0, 255, 255, 255])
    data = to_bytes(image, "GIF")
    assert Image.open(io.BytesIO(data)).mode == "P"
    check_canonical(read(data, kind="binary"), BINARY)
    check_canonical(read(data, kind="index"), BINARY)


def test_invert_makes_zero_the_foreground(to_bytes):
    data = to_bytes(Image.fromarray(BINARY * np.uint8(255)))
    check_canonical(read(data, kind="binary", invert=True), 1 - BINARY)
    data = to_bytes(image_of(BINARY, "1"))
    check_canonical(read(data, kind="binary", invert=True), 1 - BINARY)


def test_binary_masks_without_foreground_or_without_background_keep_their_meaning(to_bytes):
    for value in (0, 255):
        mask = read(to_bytes(Image.new("L", (3, 2), value)), kind="binary")
        assert (mask.index == (value > 0)).all()


def test_antialiased_binary_masks_are_refused_with_the_remedy(to_bytes):
    pixels = np.array([[0, 0, 0, 7], [255, 255, 128, 0]], dtype=np.uint8)
    with pytest.raises(DataError) as caught:
        read(to_bytes(Image.fromarray(pixels)), kind="binary")
    assert str(caught.value) == (
        "masks/a.png is not binary, it holds 0: 4 px, 255: 2 px, 7: 1 px, 128: 1 px; "
        "use --mask-threshold 128 if the edges are blurred, else --mask-format values"
    )


def test_a_threshold_decides_blurred_edges(to_bytes):
    pixels = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    data = to_bytes(Image.fromarray(pixels))
    assert read(data, kind="binary", threshold=128).index.tolist() == [[0, 0, 1, 1]]
    inverted = read(data, kind="binary", threshold=128, invert=True)
    assert inverted.index.tolist() == [[1, 1, 0, 0]]


def test_jpeg_masks_need_a_threshold(to_bytes):
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[3:9, 5:12] = 255
    data = to_bytes(Image.fromarray(pixels), "JPEG", quality=50)
    with pytest.raises(DataError, match="use --mask-threshold 128 if the edges are blurred"):
        read(data, kind="binary")
    assert np.array_equal(read(data, kind="binary", threshold=128).index, pixels > 0)


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "binary", "ignore_value": 9},
        {"kind": "binary", "ignore_value": 9, "threshold": 1},
        {"kind": "binary", "ignore_value": 9, "invert": True},
        {"kind": "index", "ignore_value": 9},
        {"kind": "values", "values": (0, 1), "ignore_value": 9},
    ],
)
def test_the_ignore_value_becomes_255(to_bytes, rule):
    pixels = np.array([[0, 1, 9]], dtype=np.uint8)
    mask = read(to_bytes(Image.fromarray(pixels)), **rule)
    expected = [1, 0, 255] if rule.get("invert") else [0, 1, 255]
    check_canonical(mask, [expected])
    assert mask.values == (0, 1, 9)


def refusal(pixels, classes=TWO, **rule):
    form = MaskFormat(num_classes=len(classes), **rule)
    with pytest.raises(DataError) as caught:
        form.to_index(np.asarray(pixels, dtype=np.uint8), "masks/a.png")
    return str(caught.value)


def test_one_unknown_value_is_named_with_its_pixels_and_the_remedy():
    assert refusal([[0, 1, 7, 7]], kind="index") == (
        "masks/a.png holds values without a class: 7: 2 px; "
        "if these pixels do not count, add --ignore-value 7"
    )


def test_several_unknown_indices_are_named_the_commonest_first():
    assert refusal([[0, 1, 2, 3, 3]], kind="index") == (
        "masks/a.png holds values without a class: 3: 2 px, 2: 1 px; 2 classes allow 0 to 1: "
        "name them all with --classes, or use --mask-format values"
    )


def test_unknown_values_of_a_values_mask_are_named():
    assert refusal([[0, 128, 3, 4]], kind="values", values=(0, 128)) == (
        "masks/a.png holds values without a class: 3: 1 px, 4: 1 px; "
        "name them all with --mask-values and --classes"
    )


def test_at_most_five_values_are_listed_and_the_rest_counted():
    text = refusal([list(range(12))], kind="index")
    assert "2: 1 px, 3: 1 px, 4: 1 px, 5: 1 px, 6: 1 px and 5 more" in text


def test_large_counts_are_grouped_by_thousands():
    assert "7: 1,500 px" in refusal(np.full((30, 50), 7), kind="index")


@pytest.mark.parametrize("rule", [{"kind": "index"}, {"kind": "values", "values": (0, 1)}])
def test_255_is_an_error_unless_it_is_declared_as_ignored(rule):
    assert "255: 1 px; if these pixels do not count, add --ignore-value 255" in refusal(
        [[0, 1, 255]], **rule
    )
    index = MaskFormat(num_classes=2, ignore_value=255, **rule).to_index(
        np.array([[0, 1, 255]], dtype=np.uint8), "x"
    )
    assert index.tolist() == [[0, 1, 255]]


def test_a_mask_that_is_canonical_is_copied_byte_for_byte():
    pixels = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    data = encode_mask(pixels, default_palette(THREE))
    assert read(data, THREE, kind="index", ignore_value=255).data is data


def test_any_other_mask_is_rewritten(to_bytes):
    expected = encode_mask(INDICES, default_palette(THREE))
    grey = to_bytes(Image.fromarray(INDICES))
    other_palette = encode_mask(INDICES, default_palette(("sky", "road", "car")))
    tiff = to_bytes(Image.open(io.BytesIO(expected)), "TIFF")
    for data in (grey, other_palette, tiff):
        assert data != expected
        assert read(data, THREE, kind="index").data == expected


def test_a_canonical_mask_under_a_rule_that_changes_it_is_rewritten():
    data = encode_mask(BINARY, default_palette(TWO))
    mask = read(data, kind="binary", invert=True)
    assert mask.data != data
    check_canonical(mask, 1 - BINARY)


def test_sixteen_bit_values_above_255_are_refused_never_clipped(to_bytes):
    data = to_bytes(Image.fromarray(np.array([[0, 300]], dtype=np.uint16)))
    with pytest.raises(DataError, match=r"a\.png holds values up to 300; at most 255 classes"):
        read(data, kind="index")


def test_colour_masks_are_refused(to_bytes, noise):
    with pytest.raises(DataError, match=r"a\.png is a colour picture \(mode RGB\)"):
        read(to_bytes(Image.fromarray(noise())), kind="index")


def test_modes_without_a_meaning_are_refused(to_bytes):
    with pytest.raises(DataError, match=r"a\.png has mode CMYK; masks are modes 1, L, P, I;16"):
        read(to_bytes(Image.new("CMYK", (2, 2)), "TIFF"), kind="index")


def test_a_cut_mask_is_refused(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise((30, 30)) % 2))
    with pytest.raises(DataError, match=r"masks/a\.png is damaged .*; repair or remove it"):
        read(data[: len(data) // 2], kind="index")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "index", "num_classes": 1}, "there must be 2 to 255 classes, got 1"),
        ({"kind": "index", "num_classes": 256}, "there must be 2 to 255 classes, got 256"),
        ({"kind": "binary", "num_classes": 3}, "binary masks have 2 classes, got 3 names"),
        (
            {"kind": "values", "num_classes": 3, "values": (0, 255)},
            "2 mask values for 3 classes; give one for each",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (7, 7)},
            "a mask value stands for two classes: (7, 7)",
        ),
        (
            {"kind": "index", "num_classes": 2, "values": (0, 1)},
            "mask values belong to the format `values`, not to `index`",
        ),
        (
            {"kind": "index", "num_classes": 2, "invert": True},
            "--invert and --mask-threshold belong to `binary`, not to `index`",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (0, 1), "threshold": 0},
            "--invert and --mask-threshold belong to `binary`, not to `values`",
        ),
    ],
)
def test_contradictory_formats_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskFormat(**fields)


def test_the_source_values_say_what_each_class_was_in_the_files():
    binary = MaskFormat(kind="binary", num_classes=2)
    inverted = MaskFormat(kind="binary", num_classes=2, invert=True)
    assert binary.source_values(1) == (0, 1)
    assert binary.source_values(None) == (0, 255)
    assert inverted.source_values(255) == (255, 0)
    assert MaskFormat(kind="index", num_classes=3).source_values(None) == (0, 1, 2)
    values = MaskFormat(kind="values", num_classes=2, values=(9, 4))
    assert values.source_values(None) == (9, 4)
