"""`masks.formats`, `masks.palettes`, `masks.png`, `masks.canonical`.

Mask formats: class indices from masks of every mode, and which masks are refused.
"""

import io
import re
import struct
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import shards.masks.png
from shards.images.files import ImageRule
from shards.masks.canonical import read_mask
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette, format_colour, palette_bytes, read_palette
from shards.masks.png import decode_mask, encode_mask, unpack_mask
from shards.masks.stored import StoredMask
from shards.sample import DataError

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
    """Return an image of another mode with these stored values."""
    opaque = np.full_like(pixels, 255)
    match mode:
        case "1":
            return Image.fromarray(pixels > 0)
        case "L":
            return Image.fromarray(pixels)
        case "P":
            image = Image.fromarray(pixels).copy()
            # The luminance of the colours is in another order than the indices.
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


def read(data, classes=TWO, *, image=None, pixels=True, **rule):
    mask_format = MaskFormat(num_classes=len(classes), **rule)
    options = {} if image is None else {"rule": image}
    return read_mask(
        data, mask_format, default_palette(classes), "masks/a.png", pixels=pixels, **options
    )


def check_canonical(mask, expected, classes=THREE):
    data = mask.encode(default_palette(classes))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "P")
    assert np.array_equal(np.asarray(image), expected)
    assert np.array_equal(decode_mask(data, 255, "x"), expected)
    assert np.array_equal(mask.class_map.index, expected)
    assert mask.class_map.index.dtype == np.uint8
    assert mask.size == np.shape(expected)[::-1]
    counts = np.bincount(np.ravel(expected), minlength=256)
    assert mask.class_map.pixels.tolist() == counts.tolist()


@pytest.mark.parametrize(("file_format", "mode"), SAVABLE)
def test_index_masks_of_every_mode_and_file_format(to_bytes, file_format, mode):
    mask = read(to_bytes(image_of(INDICES, mode), file_format), THREE, kind="index")
    check_canonical(mask, INDICES)
    assert mask.class_map.values == (0, 1, 2)


# A GIF always has a palette, so that its masks are indices.
@pytest.mark.parametrize(("file_format", "mode"), [s for s in SAVABLE if s[0] != "GIF"])
def test_values_masks_of_every_mode_and_file_format(to_bytes, file_format, mode):
    data = to_bytes(image_of(VALUES, mode), file_format)
    mask = read(data, THREE, kind="values", values=(0, 128, 255))
    check_canonical(mask, INDICES)
    assert mask.class_map.values == (0, 128, 255)


@pytest.mark.parametrize(
    ("file_format", "mode"), [*SAVABLE, ("PNG", "1"), ("TIFF", "1"), ("BMP", "1")]
)
@pytest.mark.parametrize("foreground", [1, 200, 255])
def test_binary_masks_of_every_mode_and_file_format(to_bytes, file_format, mode, foreground):
    data = to_bytes(image_of(BINARY * np.uint8(foreground), mode), file_format)
    check_canonical(read(data, kind="binary"), BINARY)


def test_mask_values_are_in_the_order_of_the_classes(to_bytes):
    data = to_bytes(Image.fromarray(VALUES))
    mask = read(data, THREE, kind="values", values=(255, 0, 128))
    check_canonical(mask, np.array([1, 2, 0], dtype=np.uint8)[INDICES])


def test_a_gif_like_those_of_carvana_is_read_by_palette_index(to_bytes):
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


def test_binary_masks_of_a_single_value_are_all_background_or_all_foreground(to_bytes):
    for value in (0, 255):
        mask = read(to_bytes(Image.new("L", (3, 2), value)), kind="binary")
        assert (mask.class_map.index == (value > 0)).all()


def test_antialiased_binary_masks_are_refused_with_the_remedy(to_bytes):
    pixels = np.array([[0, 0, 0, 7], [255, 255, 128, 0]], dtype=np.uint8)
    with pytest.raises(DataError) as caught:
        read(to_bytes(Image.fromarray(pixels)), kind="binary")
    assert str(caught.value) == (
        "masks/a.png is not binary: it has 0: 4 px, 255: 2 px, 7: 1 px, 128: 1 px; "
        "use --mask-threshold 128 if the edges are blurred, else --mask-format values"
    )


def test_a_threshold_classifies_blurred_edges(to_bytes):
    pixels = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    data = to_bytes(Image.fromarray(pixels))
    assert read(data, kind="binary", threshold=128).class_map.index.tolist() == [[0, 0, 1, 1]]
    inverted = read(data, kind="binary", threshold=128, invert=True)
    assert inverted.class_map.index.tolist() == [[1, 1, 0, 0]]


def test_jpeg_masks_need_a_threshold(to_bytes):
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[3:9, 5:12] = 255
    data = to_bytes(Image.fromarray(pixels), "JPEG", quality=50)
    with pytest.raises(DataError) as caught:
        read(data, kind="binary")
    assert str(caught.value) == (
        "masks/a.png is a JPEG, whose values are not exact; "
        "save masks as PNG, or add --mask-threshold 128"
    )
    assert np.array_equal(read(data, kind="binary", threshold=128).class_map.index, pixels > 0)


def test_jpeg_masks_of_values_and_colours_need_a_tolerance(to_bytes):
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[:, 16:] = 200
    data = to_bytes(Image.fromarray(pixels), "JPEG", quality=90)
    with pytest.raises(DataError, match=r"or add --mask-format values and --tolerance 10$"):
        read(data, kind="values", values=(0, 200))
    with pytest.raises(DataError, match=r"or add --mask-format values and --tolerance 10$"):
        read(data, kind="index")
    mask = read(data, kind="values", values=(0, 200), tolerance=20)
    assert np.array_equal(mask.class_map.index, pixels > 0)
    table = {"kind": "rgb", "colours": ((0, 0, 0), (200, 0, 0))}
    data = to_bytes(Image.fromarray(pixels[..., None] * np.array([1, 0, 0], np.uint8)), "JPEG")
    with pytest.raises(DataError, match=r"save masks as PNG, or add --tolerance 30$"):
        read(data, **table)
    assert np.array_equal(read(data, **table, tolerance=60).class_map.index, pixels > 0)


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
    assert mask.class_map.values == (0, 1, 9)


def stored(pixels):
    return StoredMask(Image.fromarray(np.asarray(pixels, dtype=np.uint8)))


def refusal(pixels, classes=TWO, **rule):
    mask_format = MaskFormat(num_classes=len(classes), **rule)
    with pytest.raises(DataError) as caught:
        mask_format.map_classes(stored(pixels), "masks/a.png")
    return str(caught.value)


def test_one_unknown_value_is_named_with_its_pixel_count_and_the_remedy():
    assert refusal([[0, 1, 7, 7]], kind="index") == (
        "masks/a.png has values without a class: 7: 2 px; 2 classes allow 0 to 1: "
        "name them all with --classes, or use --mask-format values"
    )


def test_two_values_are_proposed_as_binary_never_as_ignored():
    text = refusal([[0, 0, 255]], kind="index")
    assert text.endswith("with 0 and one other value, the format is --mask-format binary")


@pytest.mark.parametrize("rule", [{"kind": "index"}, {"kind": "values", "values": (0, 1)}])
def test_only_rare_values_are_proposed_to_be_ignored(rule):
    pixels = np.zeros((30, 20), dtype=np.uint8)
    pixels[0] = 1
    pixels[1, :5] = 9
    assert refusal(pixels, **rule).endswith(
        "if these few pixels belong to no class, add --unknown ignore"
    )
    pixels[1, :6] = 9
    assert "ignore" not in refusal(pixels, **rule)


def test_several_unknown_indices_are_named_the_most_common_first():
    assert refusal([[0, 1, 2, 3, 3]], kind="index") == (
        "masks/a.png has values without a class: 3: 2 px, 2: 1 px; 2 classes allow 0 to 1: "
        "name them all with --classes, or use --mask-format values"
    )


def test_unknown_values_of_a_values_mask_are_named():
    assert refusal([[0, 128, 3, 4]], kind="values", values=(0, 128)) == (
        "masks/a.png has values without a class: 3: 1 px, 4: 1 px; "
        "name them all with --mask-values and --classes"
    )


def test_at_most_five_values_are_listed_and_the_others_counted():
    text = refusal([list(range(12))], kind="index")
    assert "2: 1 px, 3: 1 px, 4: 1 px, 5: 1 px, 6: 1 px and 5 more" in text


def test_counts_have_thousands_separators():
    assert "7: 1,500 px" in refusal(np.full((30, 50), 7), kind="index")


@pytest.mark.parametrize("rule", [{"kind": "index"}, {"kind": "values", "values": (0, 1)}])
def test_255_is_an_error_unless_it_is_declared_as_ignored(rule):
    assert "255: 1 px; " in refusal([[0, 1, 255]], **rule)
    mask_format = MaskFormat(num_classes=2, ignore_value=255, **rule)
    classes = mask_format.map_classes(stored([[0, 1, 255]]), "x")
    assert classes.index.tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("values", "bits"), [([0, 1], 1), ([0, 2, 3], 2), ([0, 9], 4), ([0, 200], 8), ([0, 255], 8)]
)
@pytest.mark.parametrize("kind", ["index", "palette"])
@pytest.mark.parametrize("pixels", [True, False])
def test_a_canonical_mask_is_copied_byte_for_byte(values, bits, kind, pixels):
    classes = tuple(map(str, range(201)))
    palette = default_palette(classes)
    data = encode_mask(np.array([values * 9], dtype=np.uint8), palette)
    assert data[24] == bits
    colours = {"colours": palette} if kind == "palette" else {}
    mask = read(data, classes, kind=kind, ignore_value=255, pixels=pixels, **colours)
    assert mask.original is data
    assert mask.encode(palette) is data
    assert (mask.class_map is None) == (not pixels)


def test_any_other_mask_is_rewritten(to_bytes):
    expected = encode_mask(INDICES, default_palette(THREE))
    grey = to_bytes(Image.fromarray(INDICES))
    other_palette = encode_mask(INDICES, default_palette(("sky", "road", "car")))
    tiff = to_bytes(Image.open(io.BytesIO(expected)), "TIFF")
    for data in (grey, other_palette, tiff):
        assert data != expected
        mask = read(data, THREE, kind="index")
        assert mask.original is None
        assert mask.encode(default_palette(THREE)) == expected


def test_a_canonical_mask_that_the_format_changes_is_rewritten():
    data = encode_mask(BINARY, default_palette(TWO))
    mask = read(data, kind="binary", invert=True)
    assert mask.original is None
    check_canonical(mask, 1 - BINARY)


def test_an_index_without_a_palette_colour_gets_one(raw_png):
    palette = default_palette(THREE)
    short = raw_png([bytes([0, 1, 2])], 3, 8, 3, [(b"PLTE", bytes(sum(palette[:2], ())))])
    mask = read(short, THREE, kind="index")
    assert mask.original is None
    check_canonical(mask, np.array([[0, 1, 2]]))
    rewritten = Image.open(io.BytesIO(mask.encode(palette)))
    assert read_palette(rewritten)[:3] == palette


# ------------------------------------------------------------------------------------ 16 bits


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_values_of_16_bits_are_distinguished_never_clipped(to_bytes, file_format):
    pixels = np.array([[0, 300, 65535, 44]], dtype=np.uint16)
    data = to_bytes(Image.fromarray(pixels), file_format)
    mask = read(data, THREE, kind="values", values=(0, 65535, 300), ignore_value=44)
    check_canonical(mask, np.array([[0, 2, 1, 255]]))
    assert mask.class_map.values == (0, 44, 300, 65535)


def test_16_bit_masks_in_either_byte_order(raw_tiff):
    pixels = np.array([[0, 1000], [1000, 0]])
    for order in "<>":
        data = raw_tiff(pixels.astype(f"{order}u2").tobytes(), (2, 2), 16, 1, order=order)
        check_canonical(read(data, kind="values", values=(0, 1000)), pixels > 0)
        check_canonical(read(data, kind="binary"), pixels > 0)


def test_a_tolerance_does_not_wrap_around(to_bytes):
    data = to_bytes(Image.fromarray(np.array([[0, 9, 246, 255]], dtype=np.uint8)))
    mask = read(data, kind="values", values=(0, 255), tolerance=9)
    assert mask.class_map.index.tolist() == [[0, 0, 1, 1]]
    data = to_bytes(Image.fromarray(np.array([[0, 65530, 255]], dtype=np.uint16)))
    with pytest.raises(DataError, match="255: 1 px"):
        read(data, kind="values", values=(0, 65535), tolerance=9)


def test_unknown_values_are_ignored_on_request(to_bytes):
    data = to_bytes(Image.fromarray(np.array([[0, 1, 7, 200]], dtype=np.uint8)))
    for rule in ({"kind": "index"}, {"kind": "values", "values": (0, 1)}):
        mask = read(data, **rule, unknown="ignore")
        check_canonical(mask, np.array([[0, 1, 255, 255]]))
        assert mask.class_map.values == (0, 1, 7, 200)


# ------------------------------------------------------------------------------------- palette


def in_colours(index, colours, mode="P"):
    """Return a mask with these colours at its indices."""
    image = Image.fromarray(np.array(index, dtype=np.uint8)).copy()
    image.putpalette([part for colour in colours for part in colour])
    return image if mode == "P" else image.convert(mode)


COLOURS = ((0, 0, 0), (128, 0, 0), (0, 128, 64))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP", "GIF"])
def test_palette_masks_are_read_by_index_if_the_colours_agree(to_bytes, file_format):
    data = to_bytes(in_colours(INDICES, COLOURS), file_format)
    mask = read(data, THREE, kind="palette", colours=COLOURS)
    check_canonical(mask, INDICES)
    assert mask.mode == "P"


def test_a_palette_with_another_colour_at_an_index_is_refused(to_bytes):
    swapped = (COLOURS[0], COLOURS[2], COLOURS[1])
    with pytest.raises(DataError) as caught:
        read(to_bytes(in_colours(INDICES, swapped)), THREE, kind="palette", colours=COLOURS)
    assert str(caught.value) == (
        "masks/a.png has (0, 128, 64) at palette index 1, other files have (128, 0, 0), so an "
        "index may stand for two classes; read the colours instead: --mask-format rgb with "
        "--colours"
    )


def test_colours_of_indices_that_do_not_occur_may_differ(to_bytes):
    data = to_bytes(in_colours(BINARY, (*COLOURS[:2], (9, 9, 9))))
    assert np.array_equal(
        read(data, THREE, kind="palette", colours=COLOURS).class_map.index, BINARY
    )


def test_an_index_without_a_palette_colour_is_refused(raw_png):
    data = raw_png([bytes([0, 1, 2])], 3, 8, 3, [(b"PLTE", bytes(sum(COLOURS[:2], ())))])
    with pytest.raises(DataError, match=r"has no colour at palette index 2, other files have \(0"):
        read(data, THREE, kind="palette", colours=COLOURS)


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [("L", "index"), ("1", "index"), ("RGB", "rgb with --colours"), ("RGBA", "rgb with --colours")],
)
def test_masks_without_a_palette_are_refused_by_the_format_palette(to_bytes, mode, remedy):
    data = to_bytes(in_colours(INDICES, COLOURS, "RGB").convert(mode))
    with pytest.raises(DataError) as caught:
        read(data, THREE, kind="palette", colours=COLOURS)
    assert str(caught.value) == (
        f"masks/a.png has no palette (mode {mode}); use --mask-format {remedy}"
    )


def test_palette_indices_beyond_the_classes_are_refused(to_bytes):
    data = to_bytes(in_colours([[0, 1, 2, 3, 3]], (*COLOURS, (7, 7, 7))))
    with pytest.raises(DataError) as caught:
        read(data, kind="palette", colours=COLOURS[:2])
    assert str(caught.value) == (
        "masks/a.png has values without a class: 3: 2 px, 2: 1 px; "
        "they are palette indices: name them all with --classes, or read the colours: "
        "--mask-format rgb"
    )


# ------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *(("PNG", mode) for mode in ("P", "RGB", "RGBA")),
        *(("TIFF", mode) for mode in ("P", "RGB", "RGBA")),
        *(("BMP", mode) for mode in ("P", "RGB")),
        ("GIF", "P"),
    ],
)
def test_colour_masks_of_every_mode_and_file_format(to_bytes, file_format, mode):
    data = to_bytes(in_colours(INDICES, COLOURS, mode), file_format)
    mask = read(data, THREE, kind="rgb", colours=COLOURS)
    check_canonical(mask, INDICES)
    assert (mask.class_map.values, mask.original) == ((), None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_colours_are_in_the_order_of_the_classes(to_bytes, order):
    data = to_bytes(in_colours(INDICES, COLOURS, "RGB"))
    mask = read(data, THREE, kind="rgb", colours=tuple(COLOURS[i] for i in order))
    expected = np.array([order.index(i) for i in range(3)])[INDICES]
    check_canonical(mask, expected)


def test_the_format_rgb_reads_colours_whatever_their_palette_index(to_bytes):
    for places in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        shuffled = [None] * 3
        for index, place in enumerate(places):
            shuffled[place] = COLOURS[index]
        data = to_bytes(in_colours(np.array(places)[INDICES], shuffled))
        check_canonical(read(data, THREE, kind="rgb", colours=COLOURS), INDICES)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_the_format_rgb_reads_grey_masks_too(to_bytes, mode):
    data = to_bytes(image_of(BINARY * np.uint8(255), mode))
    table = ((0, 0, 0), (255, 255, 255))
    check_canonical(read(data, kind="rgb", colours=table), BINARY)


def test_colours_of_four_numbers_distinguish_transparency(to_bytes):
    pixels = np.array([[[9, 9, 9, 0], [9, 9, 9, 255], [0, 0, 0, 0]]], dtype=np.uint8)
    data = to_bytes(Image.fromarray(pixels))
    table = ((9, 9, 9, 255), (9, 9, 9, 0))
    mask = read(data, kind="rgb", colours=table, ignore_colours=((0, 0, 0, 0),))
    check_canonical(mask, np.array([[1, 0, 255]]))


def test_ignored_colours_become_255(to_bytes):
    data = to_bytes(in_colours(INDICES, COLOURS, "RGB"))
    mask = read(data, kind="rgb", colours=COLOURS[:2], ignore_colours=(COLOURS[2],))
    check_canonical(mask, np.where(INDICES == 2, 255, INDICES))


def test_colours_within_the_tolerance_in_every_channel_match(to_bytes):
    pixels = np.array([[[0, 0, 0], [9, 9, 9], [191, 209, 200], [200, 200, 200]]], dtype=np.uint8)
    data = to_bytes(Image.fromarray(pixels))
    table = ((0, 0, 0), (200, 200, 200))
    mask = read(data, kind="rgb", colours=table, tolerance=9)
    assert mask.class_map.index.tolist() == [[0, 0, 1, 1]]
    with pytest.raises(DataError, match=r"\(9, 9, 9\): 1 px, \(191, 209, 200\): 1 px"):
        read(data, kind="rgb", colours=table, tolerance=8)


def test_unknown_colours_are_named_the_most_common_first(to_bytes):
    data = to_bytes(in_colours([[0, 1, 2, 2, 2, 3]], (*COLOURS, (1, 2, 3)), "RGB"))
    with pytest.raises(DataError) as caught:
        read(data, kind="rgb", colours=COLOURS[:2])
    assert str(caught.value) == (
        "masks/a.png has colours without a class: (0, 128, 64): 3 px, (1, 2, 3): 1 px; list them "
        "in --colours (as `ignore: [r, g, b]` to ignore one), or add --unknown ignore"
    )


def test_unknown_colours_are_ignored_on_request(to_bytes):
    data = to_bytes(in_colours(INDICES, COLOURS, "RGB"))
    mask = read(data, kind="rgb", colours=COLOURS[:2], unknown="ignore")
    check_canonical(mask, np.where(INDICES == 2, 255, INDICES))


def test_many_unknown_colours_are_treated_as_noise(to_bytes, noise):
    with pytest.raises(DataError) as caught:
        read(to_bytes(Image.fromarray(noise((20, 20, 3)))), kind="rgb", colours=COLOURS[:2])
    text = str(caught.value)
    assert " px and 395 more; so many come from lossy compression or smoothed edges" in text
    assert text.endswith(": add --tolerance 30, or --unknown ignore")


def test_a_palette_shorter_than_its_indices_is_refused_not_read_as_black(raw_png):
    data = raw_png([bytes([0, 1, 2])], 3, 8, 3, [(b"PLTE", bytes(sum(COLOURS[:2], ())))])
    with pytest.raises(DataError) as caught:
        read(data, kind="rgb", colours=COLOURS[:2])
    assert str(caught.value) == (
        "masks/a.png has index 2, but its palette has only 2 colours; "
        "save it again, or use --mask-format index"
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(2, 20))
def test_any_mask_of_declared_colours_is_read_exactly(seed, height, width, count):
    rng = np.random.default_rng(seed)
    codes = rng.choice(2**24, count, replace=False)
    table = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1)
    index = rng.integers(0, count, (height, width))
    mask_format = MaskFormat(
        kind="rgb", num_classes=count, colours=tuple(map(tuple, table.tolist()))
    )
    classes = mask_format.map_classes(stored(table[index]), "x")
    assert np.array_equal(classes.index, index)
    assert classes.pixels.tolist() == np.bincount(index.ravel(), minlength=256).tolist()


# -------------------------------------------------------------------------------- what is refused

RED = np.array([[[255, 0, 0], [0, 0, 0]]], dtype=np.uint8)
HALF = np.array([[[1, 1, 1, 0], [1, 1, 1, 255]]], dtype=np.uint8)
TABLE = {"kind": "rgb", "colours": ((0, 0, 0), (255, 0, 0))}
CLEAR = (
    "has transparent pixels, which may stand for a class; declare it with --mask-format rgb and "
    "colours of four numbers, or flatten the mask"
)
IN_COLOUR = (
    "is in colour (mode {}); use --mask-format rgb with --colours, a table with the colour of each "
    "class"
)
BAD = {
    "an empty file": (None, "", {"kind": "index"}, "is empty; repair or remove it"),
    "colours for index": (RED, "PNG", {"kind": "index"}, IN_COLOUR.format("RGB")),
    "colours for binary": (RED, "TIFF", {"kind": "binary"}, IN_COLOUR.format("RGB")),
    "clear pixels for index": (HALF, "PNG", {"kind": "index"}, CLEAR),
    "clear pixels for colours": (HALF, "PNG", TABLE, CLEAR),
    "16 bits for colours": (
        np.array([[0, 999]], dtype=np.uint16),
        "PNG",
        TABLE,
        "is 16-bit grey, not in colour; use --mask-format values",
    ),
    "floats for index": (
        np.zeros((2, 2), dtype=np.float32),
        "TIFF",
        {"kind": "index"},
        "has mode F; masks must be of mode 1, L, P, I;16, RGB or RGBA",
    ),
    "floats for colours": (
        np.zeros((2, 2), dtype=np.float32),
        "TIFF",
        TABLE,
        "has mode F; colour masks must be RGB, RGBA or P",
    ),
    "negative values": (
        np.array([[-1, 0]], dtype=np.int32),
        "TIFF",
        {"kind": "index"},
        "has values from -1 to 0; mask values must be 0 to 65535",
    ),
    "values above 16 bits": (
        np.array([[0, 65536]], dtype=np.int32),
        "TIFF",
        {"kind": "index"},
        "has values from 0 to 65536; mask values must be 0 to 65535",
    ),
    "16-bit values for index": (
        np.array([[0, 300, 301]], dtype=np.uint16),
        "PNG",
        {"kind": "index"},
        "has values without a class: 300: 1 px, 301: 1 px; 2 classes allow 0 to 1: "
        "name them all with --classes, or use --mask-format values",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_masks_that_the_declared_format_does_not_cover_are_refused(to_bytes, name):
    pixels, file_format, rule, message = BAD[name]
    data = b"" if pixels is None else to_bytes(Image.fromarray(pixels), file_format)
    with pytest.raises(DataError) as caught:
        read(data, **rule)
    assert str(caught.value) == f"masks/a.png {message}"


def test_a_constant_alpha_channel_is_ignored(to_bytes):
    pixels = np.array([[[1, 1, 1, 77], [0, 0, 0, 77]]], dtype=np.uint8)
    data = to_bytes(Image.fromarray(pixels))
    check_canonical(read(data, kind="index"), np.array([[1, 0]]))
    table = ((0, 0, 0), (1, 1, 1))
    check_canonical(read(data, kind="rgb", colours=table), np.array([[1, 0]]))


def test_unsupported_modes_are_refused(to_bytes):
    with pytest.raises(DataError, match=r"a\.png has mode CMYK; masks must be of mode 1, L, P"):
        read(to_bytes(Image.new("CMYK", (2, 2)), "TIFF"), kind="index")
    with pytest.raises(DataError, match=r"a\.png has mode CMYK; colour masks must be RGB, RGBA"):
        read(to_bytes(Image.new("CMYK", (2, 2)), "TIFF"), **TABLE)


def test_a_palette_with_white_before_black_is_refused_unless_inverted(to_bytes):
    data = to_bytes(in_colours(BINARY, ((255, 255, 255), (0, 0, 0))), "GIF")
    with pytest.raises(DataError) as caught:
        read(data, kind="binary")
    assert str(caught.value) == (
        "masks/a.png has white at palette index 0, so background and foreground may be swapped; "
        "add --invert if white is the foreground, else save it without a palette"
    )
    check_canonical(read(data, kind="binary", invert=True), 1 - BINARY)


def test_a_truncated_mask_is_refused(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise((30, 30)) % 2))
    with pytest.raises(DataError, match=r"masks/a\.png is damaged .*; repair or remove it"):
        read(data[: len(data) // 2], kind="index")


@pytest.mark.parametrize("length", [60, 200, 900])
def test_a_truncated_canonical_mask_is_refused_if_pixels_are_checked(noise, length):
    classes = tuple(map(str, range(200)))
    data = encode_mask(noise((40, 40)) % 200, default_palette(classes))[:length]
    with pytest.raises(DataError, match="repair or remove it"):
        read(data, classes, kind="index")


def test_headers_of_canonical_masks_are_trusted_on_request(to_bytes, noise):
    classes = tuple(map(str, range(200)))
    data = encode_mask(noise((40, 40)) % 200, default_palette(classes))
    # Its pixels are damaged, but they are not decoded.
    at = data.index(b"IDAT") + 60
    damaged = data[:at] + bytes(20) + data[at + 20 :]
    mask = read(damaged, classes, kind="index", pixels=False)
    assert (mask.original, mask.class_map, mask.size) == (damaged, None, (40, 40))
    with pytest.raises(DataError, match="is damaged"):
        read(data[:at], classes, kind="index", pixels=False)
    for data in (to_bytes(image_of(BINARY, "P")), to_bytes(image_of(BINARY, "L"))):
        assert read(data, kind="index", pixels=False).class_map is not None
    canonical = encode_mask(BINARY, default_palette(TWO))
    assert read(canonical, kind="binary", pixels=False).class_map is not None
    assert read(canonical, kind="index", ignore_value=9, pixels=False).class_map is not None


def test_frames_and_orientations_of_masks_follow_the_rule_for_images(to_bytes):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = to_bytes(Image.fromarray(INDICES), "TIFF", exif=exif)
    check_canonical(read(data, THREE, kind="index"), np.rot90(INDICES, -1))
    unrotated = read(data, THREE, kind="index", image=ImageRule(exif="ignore"))
    check_canonical(unrotated, INDICES)
    frames = [Image.fromarray(BINARY), Image.fromarray(INDICES)]
    data = to_bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="has 2 frames; add --frame 0"):
        read(data, THREE, kind="index")
    check_canonical(read(data, THREE, kind="index", image=ImageRule(frame=1)), INDICES)


def test_a_mask_is_resized_by_nearest_neighbour():
    index = np.array([[0, 1], [2, 255]], dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    data = encode_mask(index, default_palette(THREE))
    mask = read(data, THREE, kind="index", ignore_value=255).resize((4, 2))
    check_canonical(mask, np.array([[0, 0, 1, 1], [2, 2, 255, 255]]))
    assert (mask.original, mask.class_map.values) == (None, (0, 1, 2, 255))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "index", "num_classes": 1}, "--classes: there must be 2 to 255 classes, got 1"),
        (
            {"kind": "index", "num_classes": 256},
            "there must be 2 to 255 classes, got 256",
        ),
        ({"kind": "binary", "num_classes": 3}, "--classes: a binary mask has 2 classes, got 3"),
        (
            {"kind": "values", "num_classes": 3, "values": (0, 255)},
            "--mask-values: 2 mask values for 3 classes; give one per class",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (7, 7)},
            "--mask-values: a class needs its own value, got (7, 7)",
        ),
        (
            {"kind": "index", "num_classes": 2, "values": (0, 1)},
            "--mask-values applies to `values` only; the format is `index`",
        ),
        (
            {"kind": "index", "num_classes": 2, "invert": True},
            "--invert applies to `binary` only; the format is `index`",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (0, 1), "threshold": 0},
            "--mask-threshold applies to `binary` only; the format is `values`",
        ),
        (
            {"kind": "index", "num_classes": 2, "ignore_value": 65536},
            "--ignore-value: mask values must be 0 to 65535, got 65536",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (0, -1)},
            "--mask-values: mask values must be 0 to 65535, got -1",
        ),
        (
            {"kind": "index", "num_classes": 3, "ignore_value": 2},
            "--ignore-value 2 is also the value of a class",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (0, 9), "ignore_value": 9},
            "--ignore-value 9 is also the value of a class",
        ),
        ({"kind": "rgb", "num_classes": 2}, "--colours: 0 colours for 2 classes; give one"),
        (
            {"kind": "palette", "num_classes": 3, "colours": COLOURS[:2]},
            "2 colours for 3 classes; give one per class",
        ),
        (
            {"kind": "index", "num_classes": 3, "colours": COLOURS},
            "--colours applies to `rgb` only; the format is `index`",
        ),
        (
            {"kind": "rgb", "num_classes": 3, "colours": COLOURS, "ignore_value": 255},
            "--ignore-value applies to values, not colours; use `ignore` in --colours; "
            "the format is `rgb`",
        ),
        (
            {"kind": "binary", "num_classes": 2, "unknown": "ignore"},
            "--unknown does not apply to binary masks; the format is `binary`",
        ),
        (
            {"kind": "index", "num_classes": 2, "tolerance": 1},
            "--tolerance applies to `values` and `rgb` only; the format is `index`",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (0, 9), "tolerance": 256},
            "--tolerance must be 0 to 255, got 256",
        ),
        (
            {"kind": "values", "num_classes": 2, "values": (0, 20), "tolerance": 10},
            "0 and 20 differ by 20, too little for --tolerance 10",
        ),
        (
            {
                "kind": "values",
                "num_classes": 2,
                "values": (0, 99),
                "ignore_value": 95,
                "tolerance": 2,
            },
            "99 and 95 differ by 4, too little for --tolerance 2",
        ),
        (
            {"kind": "rgb", "num_classes": 2, "colours": ((0, 0, 0), (0, 9, 9)), "tolerance": 5},
            "(0, 0, 0) and (0, 9, 9) differ by 9, too little for --tolerance 5; lower it",
        ),
        (
            {"kind": "rgb", "num_classes": 2, "colours": ((1, 2, 3), (1, 2, 3))},
            "--colours: (1, 2, 3) is listed twice; remove one",
        ),
        (
            {
                "kind": "rgb",
                "num_classes": 2,
                "colours": ((0, 0, 0), (1, 2, 3)),
                "ignore_colours": ((1, 2, 3),),
            },
            "--colours: (1, 2, 3) is listed twice; remove one",
        ),
        (
            {"kind": "rgb", "num_classes": 2, "colours": ((0, 0, 0), (1, 2, 3, 4))},
            "--colours: either all colours have three numbers, or all have four",
        ),
    ],
)
def test_contradictory_formats_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskFormat(**fields)


def test_source_values_are_the_pixel_values_of_each_class_in_the_files():
    binary = MaskFormat(kind="binary", num_classes=2)
    inverted = MaskFormat(kind="binary", num_classes=2, invert=True)
    assert binary.source_values(1) == (0, 1)
    assert binary.source_values(None) == (0, 255)
    assert inverted.source_values(255) == (255, 0)
    assert MaskFormat(kind="index", num_classes=3).source_values(None) == (0, 1, 2)
    values = MaskFormat(kind="values", num_classes=2, values=(9, 4))
    assert values.source_values(None) == (9, 4)
    palette = MaskFormat(kind="palette", num_classes=3, colours=COLOURS)
    assert palette.source_values(None) == (0, 1, 2)
    colours = MaskFormat(kind="rgb", num_classes=3, colours=COLOURS)
    assert colours.source_values(None) == ()


# ---------------------------------------------------------------------------- canonical masks


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 19),
    st.integers(1, 19),
    st.lists(st.integers(0, 255), min_size=1, max_size=6),
)
def test_any_mask_survives_encoding(seed, height, width, values):
    mask = np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width))
    data = encode_mask(mask, default_palette(tuple(map(str, range(255)))))
    assert np.array_equal(decode_mask(data, 255, "x"), mask)


def test_a_mask_survives_encoding_with_every_value_and_255():
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encode_mask(mask, default_palette(tuple(map(str, range(255)))))
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert np.array_equal(decode_mask(data, 255, "x"), mask)


@pytest.mark.parametrize(
    ("max_index", "bits"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (15, 4), (16, 8), (255, 8)]
)
def test_few_classes_take_few_bits_per_pixel_and_keep_their_colours(max_index, bits):
    palette = default_palette(tuple(map(str, range(20))))
    data = encode_mask(np.array([[0, max_index]], dtype=np.uint8), palette)
    # Bit depth and colour type in the header (PNG, section 11.2.2).
    assert (data[24], data[25]) == (bits, 3)
    found = read_palette(Image.open(io.BytesIO(data)))
    seen = min(2**bits, 20)
    assert found[:seen] == palette[:seen]


@pytest.mark.parametrize("num_classes", [2, 3, 16, 40])
def test_masks_are_read_back_as_indices_never_as_luminance(num_classes):
    mask = (np.arange(35, dtype=np.uint8) % num_classes).reshape(5, 7)
    data = encode_mask(mask, default_palette(tuple(map(str, range(num_classes)))))
    assert np.array_equal(decode_mask(data, num_classes, "x"), mask)
    assert not np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("L")), mask)


def test_encoding_a_mask_is_deterministic_and_leaves_the_array_unchanged():
    mask = np.array([[0, 1], [255, 1]], dtype=np.uint8)
    before = mask.copy()
    assert encode_mask(mask, ((0, 0, 0),)) == encode_mask(mask, ((0, 0, 0),))
    assert np.array_equal(mask, before)


# ---------------------------------------------------------------- canonical masks, the fast path


def random_mask(seed, height, width, bits):
    return np.random.default_rng(seed).integers(0, 2**bits, (height, width), dtype=np.uint8)


def encoded(mask):
    return encode_mask(mask, default_palette(tuple(map(str, range(255)))))


def decoded(data, *, by_pillow=False):
    """Return the pixels of a mask, or the error message; `by_pillow`: without the fast path."""
    with pytest.MonkeyPatch.context() as patch:
        if by_pillow:
            patch.setattr(shards.masks.png, "unpack_mask", lambda _: None)
        try:
            return decode_mask(data, 255, "x").tolist()
        except DataError as error:
            return str(error)


def chunks_of(data):
    """Return [(kind, content)] of a PNG."""
    at, found = 8, []
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def from_chunks(chunks):
    out = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        out.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum))
    return b"".join(out)


def with_header(data, **fields):
    """Replace fields in the header of a PNG."""
    (kind, header), *rest = chunks_of(data)
    names = ("width", "height", "bits", "colour_type", "compression", "filter", "interlace")
    numbers = dict(zip(names, struct.unpack(">IIBBBBB", header), strict=True))
    return from_chunks([(kind, struct.pack(">IIBBBBB", *{**numbers, **fields}.values())), *rest])


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 19),
    st.integers(1, 19),
    st.sampled_from([1, 2, 4, 8]),
)
def test_unpacking_gives_what_pillow_decodes(seed, height, width, bits):
    mask = random_mask(seed, height, width, bits)
    data = encoded(mask)
    unpacked = unpack_mask(data)
    assert unpacked is not None
    assert unpacked.dtype == np.uint8
    assert unpacked.tolist() == mask.tolist() == decoded(data, by_pillow=True)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 10**6),
    st.integers(1, 255),
    st.booleans(),
)
def test_a_flipped_byte_gives_the_same_result_as_pillow(
    seed, width, bits, place, change, fix_checksums
):
    data = bytearray(encoded(random_mask(seed, 5, width, bits)))
    data[place % len(data)] ^= change
    flipped = bytes(data)
    if fix_checksums:
        with suppress(struct.error):
            flipped = from_chunks(chunks_of(flipped))
    assert decoded(flipped) == decoded(flipped, by_pillow=True)


def test_other_pngs_are_left_to_pillow(to_bytes, raw_png, noise):
    mask = noise((9, 12)) % 4
    palette_image = Image.fromarray(mask)
    palette_image.putpalette([c for i in range(4) for c in (i, 90, 90)])
    palette = (b"PLTE", bytes(12))
    filtered = raw_png([], 4, 8, 3, [palette])
    rows = zlib.compress(b"".join(b"\1" + bytes([1, 0, 0, 0]) for _ in range(3)))
    filtered = from_chunks([*chunks_of(with_header(filtered, height=3))[:-2], (b"IDAT", rows)])
    others = {
        "grey": to_bytes(Image.fromarray(mask)),
        "colour": to_bytes(Image.new("RGB", (4, 4))),
        "no palette": raw_png([bytes(4)] * 3, 4, 8, 0),
        "transparent": to_bytes(palette_image, transparency=0),
        "filtered": filtered + from_chunks([(b"IEND", b"")])[8:],
        "jpeg": to_bytes(Image.fromarray(mask), "JPEG"),
        "gif": to_bytes(palette_image, "GIF"),
        "nothing": b"",
        "signature": b"\x89PNG\r\n\x1a\n",
    }
    for name, data in others.items():
        assert unpack_mask(data) is None, name
    assert np.array_equal(decode_mask(others["filtered"], 9, "x"), np.ones((3, 4), np.uint8))
    assert np.array_equal(decode_mask(others["grey"], 9, "x"), mask)


OURS = encoded(random_mask(0, 6, 5, 2))
HEADER, PALETTE, PIXELS, END = chunks_of(OURS)


def flipped(place):
    """Flip a bit of our mask at a byte offset."""
    return OURS[:place] + bytes([OURS[place] ^ 1]) + OURS[place + 1 :]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(flipped(len(OURS) - 13), id="checksum of the pixels"),
        pytest.param(flipped(32), id="checksum of the header"),
        pytest.param(flipped(44 + len(PALETTE[1])), id="checksum of the palette"),
        pytest.param(flipped(OURS.index(b"IDAT") + 8), id="pixels"),
        pytest.param(with_header(OURS, interlace=1), id="interlaced"),
        pytest.param(with_header(OURS, filter=1), id="other filters"),
        pytest.param(with_header(OURS, bits=16), id="16 bits"),
        pytest.param(with_header(OURS, height=5), id="too many rows"),
        pytest.param(with_header(OURS, height=7), id="too few rows"),
        pytest.param(with_header(OURS, height=0), id="no rows"),
        pytest.param(with_header(OURS, width=0), id="no columns"),
        pytest.param(from_chunks([HEADER, PALETTE, (b"IDAT", b"\0" * 9), END]), id="no stream"),
        pytest.param(
            from_chunks([HEADER, PALETTE, (b"IDAT", PIXELS[1][:-4]), END]), id="truncated stream"
        ),
        pytest.param(from_chunks([HEADER, PALETTE, PIXELS, PIXELS, END]), id="two streams"),
        pytest.param(from_chunks([HEADER, (b"tEXt", b"a\0b"), PALETTE, PIXELS, END]), id="text"),
        pytest.param(
            from_chunks([HEADER, PALETTE, PIXELS, (b"eXIf", b"MM\0*"), END]), id="orientation"
        ),
        pytest.param(
            from_chunks([HEADER, (b"PLTE", bytes(771)), PIXELS, END]), id="too many colours"
        ),
        pytest.param(from_chunks([HEADER, PALETTE, PIXELS]), id="no end"),
        pytest.param(OURS + b"\0", id="trailing data"),
    ],
)
def test_damaged_and_unusual_masks_are_left_to_pillow(data):
    assert unpack_mask(data) is None


def test_a_truncated_mask_is_left_to_pillow():
    assert all(unpack_mask(OURS[:length]) is None for length in range(len(OURS)))


def test_decompression_bombs_take_no_memory():
    header, palette, _, end = chunks_of(encoded(random_mask(0, 4, 4, 8)))
    bomb = zlib.compress(bytes(50_000_000), 9)
    data = from_chunks([header, palette, (b"IDAT", bomb), end])
    tracemalloc.start()
    assert unpack_mask(data) is None
    assert unpack_mask(with_header(data, width=2**31 - 1, height=2**31 - 1)) is None
    assert unpack_mask(with_header(data, width=32_000, height=32_000)) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    with pytest.raises(DataError, match="x declares 32000 x 32000 pixels, more than the limit"):
        decode_mask(with_header(data, width=32_000, height=32_000), 2, "x")


# --------------------------------------------------------------------- what is not canonical


def test_a_mask_of_another_mode_is_not_canonical(to_bytes):
    with pytest.raises(
        DataError, match=r"x is not a canonical mask \(mode RGB, expected P\); pack"
    ):
        decode_mask(to_bytes(Image.new("RGB", (2, 2))), 2, "x")


def test_an_index_beyond_the_classes_is_refused_when_decoded():
    data = encode_mask(np.array([[0, 1, 2, 2, 9, 255]], dtype=np.uint8), default_palette(THREE))
    assert decode_mask(data, 10, "x").tolist() == [[0, 1, 2, 2, 9, 255]]
    with pytest.raises(DataError) as caught:
        decode_mask(data, 2, "s.tar: k")
    assert str(caught.value) == (
        "s.tar: k has values without a class: 2: 2 px, 9: 1 px; "
        "pack the data set again (pack --verify full checks every pixel)"
    )


def test_ignored_pixels_are_white_in_the_palette():
    table = np.frombuffer(palette_bytes(((1, 2, 3), (4, 5, 6))), np.uint8).reshape(256, 3)
    assert table[[0, 1, 2, 255]].tolist() == [[1, 2, 3], [4, 5, 6], [128] * 3, [255] * 3]


@pytest.mark.parametrize("num_classes", [2, 3, 10, 64, 255])
@pytest.mark.parametrize("first", ["background", "sky"])
def test_default_colours_are_distinct_from_each_other_and_from_ignore(num_classes, first):
    palette = default_palette((first, *map(str, range(num_classes - 1))))
    assert len(palette) == len(set(palette)) == num_classes
    assert (255, 255, 255) not in palette
    assert all(0 <= part <= 255 for colour in palette for part in colour)


def test_default_colours_are_pinned():
    assert default_palette(("background", "a", "b", "c")) == (
        (0, 0, 0),
        (255, 51, 51),
        (38, 82, 190),
        (150, 225, 45),
    )


def test_background_and_the_first_of_two_classes_are_black():
    assert default_palette(("Background", "a", "b"))[0] == (0, 0, 0)
    assert default_palette(("sky", "road"))[0] == (0, 0, 0)
    assert default_palette(("sky", "road", "car"))[0] != (0, 0, 0)


def test_colours_are_formatted_as_they_are_declared():
    assert (format_colour((1, 2, 3)), format_colour((7,)), format_colour(np.array([1, 2]))) == (
        "(1, 2, 3)",
        "7",
        "(1, 2)",
    )
