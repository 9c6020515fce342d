"""`annotations.runs`.

Run-length encodings: COCO's, CVAT's and Label Studio's, with known pixels.
"""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as reference

from shards.annotations.runs import (
    counts_to_runs,
    decode_brush,
    decode_counts,
    decode_rows,
    find_mask_runs,
)
from shards.sample import DataError

MASKS = arrays(
    np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1)
)


def paint(runs, size):
    flat = np.zeros(size[0] * size[1], dtype=np.uint8)
    runs.paint(flat, 1)
    return flat.reshape(size).T


def encode_brush(alpha, *, length_bits=(3, 5, 8, 16)):
    """Encode an alpha channel as Label Studio's web page does (`@thi.ng/rle-pack`)."""
    values = np.repeat(alpha.ravel(), 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in length_bits)
    start = 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and values[stop] == values[start] and stop - start < 65536:
            stop += 1
        which = next(i for i, n in enumerate(length_bits) if stop - start - 1 < 2**n)
        bits += f"1{which:02b}{stop - start - 1:0{length_bits[which]}b}{values[start]:08b}"
        start = stop
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@given(MASKS)
def test_compressed_counts_are_those_of_pycocotools(mask):
    encoded = reference.encode(np.asfortranarray(mask))
    size = mask.shape[::-1]
    runs = counts_to_runs(decode_counts(encoded["counts"]), size)
    np.testing.assert_array_equal(paint(runs, size), mask)


@given(MASKS)
def test_masks_become_runs_and_back(mask):
    size = mask.shape[::-1]
    np.testing.assert_array_equal(paint(find_mask_runs(mask > 0, 0, 0, size), size), mask)


def test_masks_that_leave_the_image_are_cut():
    runs = find_mask_runs(np.ones((4, 5), dtype=bool), -2, 3, (4, 5))
    expected = np.zeros((5, 4), dtype=np.uint8)
    expected[3:, :3] = 1
    np.testing.assert_array_equal(paint(runs, (4, 5)), expected)
    assert find_mask_runs(np.ones((2, 2), dtype=bool), 9, 9, (4, 5)).area == 0


def test_uncompressed_counts_go_down_the_columns():
    runs = counts_to_runs(np.array([1, 3, 4, 1]), (3, 3))
    np.testing.assert_array_equal(paint(runs, (3, 3)), [[0, 1, 0], [1, 0, 0], [1, 0, 1]])


def test_cvat_counts_go_along_the_rows_of_the_box():
    mask = decode_rows(np.array([1, 3, 1, 1]), 3, 2)
    np.testing.assert_array_equal(mask, [[0, 1, 1], [1, 0, 1]])


@pytest.mark.parametrize("length_bits", [(3, 5, 8, 16), (1, 2, 4, 16)])
def test_brushes_have_the_alpha_channel_that_was_encoded(length_bits):
    alpha = np.zeros((5, 7), dtype=np.uint8)
    alpha[1:4, 2:6] = 255
    alpha[2, 3] = 128
    data = encode_brush(alpha, length_bits=length_bits)
    np.testing.assert_array_equal(decode_brush(data, (7, 5)), alpha)


def test_a_brush_of_literal_values_has_known_pixels():
    # 4 values, 8 bits each; lengths of 3, 4, 8 and 16 bits; one packet of 4 different values.
    bits = f"{4:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + "0" + "00" + f"{3:03b}"
    bits += "".join(f"{value:08b}" for value in (1, 2, 3, 200))
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    np.testing.assert_array_equal(decode_brush(data, (1, 1)), [[200]])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4, 4], "its RLE covers 8 pixels, but the image has 3 x 3 = 9"),
        ([2**61, 2**61, 2**61, 2**61], "its RLE covers 9223372036854775808 pixels, but"),
        ([5, -1, 5], "its RLE has the negative count -1"),
        ([], "its RLE covers 0 pixels"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        counts_to_runs(np.array(counts, dtype=np.int64), (3, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"05\x20", "has characters that the encoding does not use"),
        (b"05P", "ends inside a number"),
        (b"oooooooooo0", "has a number of more than 40 bits"),
    ],
)
def test_damaged_compressed_counts_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        decode_counts(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([0, 0], "cut off in its header"),
        ([300] * 20, r"not a list of bytes \(0 to 255\)"),
        (["a"] * 20, "not a list of bytes"),
        (
            encode_brush(np.zeros((4, 4), dtype=np.uint8)),
            "has 64 values of 8 bits, but RGBA of 3 x",
        ),
        (encode_brush(np.eye(3, dtype=np.uint8))[:-4], "is damaged or cut off"),
    ],
)
def test_damaged_brushes_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        decode_brush(data, (3, 3))
