"""`annotations.polygons`.

Polygons: pixel-equal to pycocotools, bounded for hostile coordinates.
"""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as reference

from shards.annotations import polygons
from shards.annotations.polygons import draw_polygon, find_flaws, read_points
from shards.annotations.runs import merge_runs
from shards.sample import DataError

COORDINATES = st.one_of(
    st.floats(-30, 90, allow_nan=False),
    st.integers(-30, 90).map(float),
    st.integers(-60, 180).map(lambda n: n / 2),
    st.integers(-300, 900).map(lambda n: n / 10),
)
POLYGONS = st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=12)


def paint(runs, size):
    flat = np.zeros(size[0] * size[1], dtype=np.uint8)
    runs.paint(flat, 1)
    return flat.reshape(size).T


def paint_reference(parts, size):
    encoded = reference.frPyObjects([np.ravel(p).tolist() for p in parts], size[1], size[0])
    return reference.decode(reference.merge(encoded))


@given(POLYGONS, st.integers(1, 60), st.integers(1, 60))
def test_polygons_have_the_pixels_of_pycocotools(corners, width, height):
    points = np.array(corners)
    drawn = paint(draw_polygon(points, (width, height)), (width, height))
    np.testing.assert_array_equal(drawn, paint_reference([corners], (width, height)))


@given(st.lists(POLYGONS, min_size=2, max_size=4))
def test_parts_of_a_region_are_united_as_in_pycocotools(parts):
    size = (50, 40)
    runs = merge_runs([draw_polygon(np.array(part), size) for part in parts])
    np.testing.assert_array_equal(paint(runs, size), paint_reference(parts, size))
    assert runs.area == paint_reference(parts, size).sum()


def test_a_square_has_known_pixels():
    drawn = paint(draw_polygon(np.array([[1.0, 1], [4, 1], [4, 3], [1, 3]]), (6, 5)), (6, 5))
    expected = np.zeros((5, 6), dtype=np.uint8)
    expected[1:3, 1:4] = 1
    np.testing.assert_array_equal(drawn, expected)


def test_long_outlines_are_drawn_in_chunks_with_the_same_pixels(monkeypatch):
    angles = np.linspace(0, 2 * np.pi, 300)
    points = np.stack([100 + 80 * np.cos(angles), 90 + 70 * np.sin(3 * angles)], axis=1)
    expected = paint(draw_polygon(points, (200, 180)), (200, 180))
    split = polygons.split_edges
    monkeypatch.setattr(polygons, "split_edges", lambda lengths: split(lengths, chunk=50))
    np.testing.assert_array_equal(paint(draw_polygon(points, (200, 180)), (200, 180)), expected)


def test_coordinates_far_outside_are_drawn_where_pycocotools_crashes():
    points = np.array([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]])
    assert draw_polygon(points, (7, 5)).area == 35


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], "its polygon has 3 numbers, an odd count"),
        ([1, 2, float("nan"), 4, 5, 6], "its polygon has NaN or infinite coordinates"),
        ([1, 2, float("inf"), 4, 5, 6], "its polygon has NaN or infinite coordinates"),
        ([1, 2, -3e7, 4, 5, 6], "its polygon has the coordinate -3e+07, far outside of any image"),
        (["a", 2, 3, 4, 5, 6], "its polygon is not a list of numbers"),
        ([[1, 2], [3]], "its polygon is not a list of numbers"),
        ([[1, 2, 3], [4, 5, 6]], "its polygon is not a list of x and y"),
        ({"x": 1}, "its polygon is not a list of numbers"),
        (None, "its polygon is not a list of numbers"),
        ([1, 2, None, 4, 5, 6], "its polygon has NaN or infinite coordinates"),
    ],
)
def test_other_values_are_refused(values, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read_points(values)


def test_ten_million_points_are_refused():
    with pytest.raises(DataError, match=r"has 10,000,000 points; the limit is 1,000,000"):
        read_points(np.zeros(20_000_000))


def test_outlines_too_long_to_draw_are_refused():
    points = np.tile(np.array([[-1e6, 0.0], [1e6, 3.0]]), (20, 1))
    with pytest.raises(DataError, match="outline of 79,999,992 pixels; the limit is 20,000,000"):
        draw_polygon(points, (10, 10))


@pytest.mark.parametrize(
    ("points", "clipped", "degenerate"),
    [
        ([[0, 0], [10, 0], [10, 8], [0, 8]], False, ""),
        ([[0, 0], [10.5, 0], [10, 8]], True, ""),
        ([[-0.1, 0], [10, 0], [10, 8]], True, ""),
        ([[1, 1], [2, 2]], False, "2 points"),
        ([[1, 1], [2, 2], [3, 3], [5, 5]], False, "no area"),
        ([[1, 1], [1, 1], [1, 1]], False, "no area"),
        ([[0, 0], [4, 4], [4, 0], [0, 4]], False, ""),
    ],
)
def test_flaws_of_outlines_are_found(points, clipped, degenerate):
    flaws = find_flaws(np.array(points, dtype=float), (10, 8))
    assert (flaws.clipped, flaws.degenerate) == (clipped, degenerate)
