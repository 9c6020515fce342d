"""`masks.borders`: the formula of the paper, pixel for pixel."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.masks.borders import BorderRule, compute_border_map, decode_border
from shards.sample import DataError


def components(cells):
    """Return the 4-connected components of a bool array [H, W], each as pixels [N, 2]."""
    left = {(int(row), int(column)) for row, column in np.argwhere(cells)}
    parts = []
    while left:
        todo, pixels = [left.pop()], []
        while todo:
            row, column = todo.pop()
            pixels.append((row, column))
            beside = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)}
            todo += beside & left
            left -= beside
        parts.append(np.array(pixels))
    return parts


def reference_border_map(mask, classes, sigma):
    """Compute the formula literally: distances from every pixel to every pixel of every cell."""
    cells = [pixels for number in classes for pixels in components(mask == number)]
    if len(cells) < 2:
        return np.zeros(mask.shape, np.uint8)
    here = np.stack(np.mgrid[: mask.shape[0], : mask.shape[1]], axis=-1).reshape(-1, 1, 2)
    distances = [np.sqrt(((here - cell) ** 2).sum(axis=2).min(axis=1)) for cell in cells]
    first, second = np.sort(distances, axis=0)[:2]
    values = np.round(255 * np.exp(-((first + second) ** 2) / (2 * sigma**2)))
    values[first == 0] = 0
    return values.reshape(mask.shape).astype(np.uint8)


def blocks(seed, shape, size, values):
    """Draw a mask of squares, some of which touch, with classes from `values`."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array(values, np.uint8), (shape[0] // size + 1, shape[1] // size + 1))
    return coarse.repeat(size, axis=0).repeat(size, axis=1)[: shape[0], : shape[1]]


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    size=st.integers(1, 4),
    values=st.lists(st.sampled_from([0, 0, 0, 1, 2, 255]), min_size=1, max_size=8),
    sigma=st.sampled_from([1e-200, 0.3, 1, 2.5, 5, 40]),
    classes=st.sampled_from([(1,), (1, 2), (0, 1, 2), ()]),
)
def test_border_maps_match_the_formula_pixel_for_pixel(seed, shape, size, values, sigma, classes):
    mask = blocks(seed, shape, size, values)
    border = compute_border_map(mask, classes, sigma)
    assert border.dtype == np.uint8
    # Such a narrow border has no pixels, and the square of such a sigma underflows.
    expected = reference_border_map(mask, classes, sigma) if sigma > 1e-100 else np.zeros(shape)
    assert np.array_equal(border, expected)


@pytest.mark.parametrize("sigma", [2, 5])
def test_distant_cells_do_not_change_a_large_map(sigma):
    mask = blocks(3, (90, 120), 3, [0] * 12 + [1])
    border = compute_border_map(mask, (1,), sigma)
    assert len(components(mask == 1)) > 40
    assert np.array_equal(border, reference_border_map(mask, (1,), sigma))
    # Both near and distant pixels occur.
    assert (border == 0)[mask == 0].any()
    assert (border > 200).any() == (sigma == 5)


def test_a_border_map_computed_by_hand():
    mask = np.array([[1, 0, 0, 0, 1, 0]], np.uint8)
    # Between the cells d1 + d2 is 4; beside the right one it is 1 + 5.
    between, beside = 255 * np.exp(-16 / 50), 255 * np.exp(-36 / 50)
    expected = [0, round(between), round(between), round(between), 0, round(beside)]
    assert compute_border_map(mask, (1,), 5).tolist() == [expected]
    assert (round(between), round(beside)) == (185, 124)


@pytest.mark.parametrize(("width", "value"), [(16, 1), (17, 0)])
def test_a_border_ends_where_its_value_rounds_to_zero(width, value):
    # For every pixel in between, d1 + d2 is the width plus 1.
    assert round(255 * np.exp(-((width + 1) ** 2) / 50)) == value
    mask = np.array([[1, *[0] * width, 1]], np.uint8)
    assert compute_border_map(mask, (1,), 5).tolist() == [[0, *[value] * width, 0]]


@pytest.mark.parametrize("num_cells", [0, 1])
def test_fewer_than_two_cells_give_an_empty_border_map(num_cells):
    mask = np.zeros((8, 9), np.uint8)
    mask[2:5, 2:5] = num_cells
    assert not compute_border_map(mask, (1,), 5).any()


def test_a_diagonal_ridge_of_one_pixel_separates_two_cells():
    mask = np.ones((9, 9), np.uint8)
    np.fill_diagonal(mask, 0)
    border = compute_border_map(mask, (1,), 5)
    assert (np.diag(border) > 200).all()
    assert not border[mask == 1].any()


def test_touching_cells_are_separate_only_if_their_classes_differ():
    mask = np.zeros((5, 8), np.uint8)
    mask[1:4, 2:4], mask[1:4, 4:6] = 1, 2
    assert compute_border_map(mask, (1, 2), 5).any()
    assert not compute_border_map(np.minimum(mask, 1), (1,), 5).any()
    assert not compute_border_map(mask, (1,), 5).any()


def test_ignored_pixels_and_other_classes_count_as_background():
    mask = np.array([[1, 0, 0, 0, 0, 1]], np.uint8)
    marked = np.array([[1, 0, 255, 255, 3, 1]], np.uint8)
    assert np.array_equal(compute_border_map(marked, (1,), 5), compute_border_map(mask, (1,), 5))
    assert compute_border_map(mask, (1,), 5)[0, 2] > 0


@pytest.mark.parametrize("sigma", [0, -5, float("inf"), float("nan")])
def test_a_sigma_that_is_not_positive_and_finite_is_refused(sigma):
    with pytest.raises(ValueError, match="--border-sigma must be a finite number of pixels > 0"):
        BorderRule(sigma, (1,))


# -------------------------------------------------------------------------------- stored maps

MASK = blocks(1, (20, 30), 3, [0, 0, 0, 1])
STORED = BorderRule(5, (1,)).encode(MASK)


def refusal(data, size=(30, 20)):
    with pytest.raises(DataError) as caught:
        decode_border(data, size, "s.tar: a.border.png")
    return str(caught.value)


def test_a_stored_border_map_is_decoded_unchanged():
    assert np.array_equal(decode_border(STORED, (30, 20), "x"), compute_border_map(MASK, (1,), 5))
    assert BorderRule(5, (1,)).encode(MASK) == STORED


def test_a_stored_border_map_is_a_grey_png(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(STORED)
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (30, 20))


def test_a_damaged_border_map_is_named():
    for data in (b"", b"GIF89a", STORED[:20], STORED[:-30], STORED[:60] + b"\0" + STORED[61:]):
        assert refusal(data).startswith("s.tar: a.border.png is ")


def test_a_border_map_of_another_size_than_its_image_is_refused():
    assert refusal(STORED, (20, 30)) == (
        "s.tar: a.border.png is 30 x 20, but its image is 20 x 30; pack the data set again"
    )


def test_an_exif_orientation_does_not_rotate_a_border_map(to_bytes):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = to_bytes(Image.fromarray(compute_border_map(MASK, (1,), 5)), exif=exif.tobytes())
    assert np.array_equal(decode_border(data, (30, 20), "x"), compute_border_map(MASK, (1,), 5))


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "I;16"])
def test_an_image_of_another_mode_is_not_a_border_map(mode, to_bytes):
    assert refusal(to_bytes(Image.new(mode, (30, 20)))) == (
        f"s.tar: a.border.png is not a border map (mode {mode}, expected L); pack it again"
    )


def test_scipy_is_imported_only_to_compute_border_maps():
    code = "import sys, pipelines.pack, shards.masks.borders; print('scipy' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False"]
