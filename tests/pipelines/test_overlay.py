"""Holds the overlay's contract: what people see of picture, classes and ignored pixels."""

import numpy as np
import pytest

from pipelines.overlay import TINT, draw_overlay, outline

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 100, 0))


def drawn(mask, image=None):
    image = np.full((*mask.shape, 3), 100, np.uint8) if image is None else image
    picture = draw_overlay(image, mask, PALETTE)
    assert (picture.mode, picture.size) == ("RGB", mask.shape[::-1])
    return np.asarray(picture)


def square(value=1, around=0):
    mask = np.full((9, 9), around, dtype=np.uint8)
    mask[2:7, 2:7] = value
    return mask


@pytest.mark.parametrize("channels", [1, 3])
def test_background_shows_the_picture_as_it_is(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 6, channels), dtype=np.uint8)
    result = drawn(np.zeros((5, 6), np.uint8), image)
    assert np.array_equal(result, np.broadcast_to(image, (5, 6, 3)))


def test_a_class_is_tinted_inside_and_outlined_in_its_colour():
    result = drawn(square())
    assert result[4, 4].tolist() == [round(100 * (1 - TINT) + c * TINT) for c in (200, 0, 0)]
    assert result[2, 2].tolist() == result[2, 4].tolist() == result[6, 6].tolist() == [200, 0, 0]
    assert result[0, 0].tolist() == result[1, 4].tolist() == [100, 100, 100]


def test_two_classes_that_touch_are_both_outlined():
    mask = np.repeat(np.array([[1, 1, 1, 2, 2, 2]], dtype=np.uint8), 3, axis=0)
    result = drawn(mask)
    assert result[1, 2].tolist() == [200, 0, 0]
    assert result[1, 3].tolist() == [0, 100, 0]


def test_ignored_pixels_turn_grey():
    result = drawn(square(255))
    assert result[4, 4].tolist() == [round(100 * (1 - TINT) + 128 * TINT)] * 3
    assert result[2, 2].tolist() == [128, 128, 128]


def test_the_inputs_are_left_alone():
    image, mask = np.full((9, 9, 3), 7, np.uint8), square()
    before = image.copy(), mask.copy()
    drawn(mask, image)
    assert np.array_equal(image, before[0])
    assert np.array_equal(mask, before[1])


def test_an_outline_is_both_sides_of_every_border():
    mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=np.uint8)
    assert outline(mask).astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_thin_pictures_can_be_drawn(shape):
    assert drawn(np.ones(shape, dtype=np.uint8)).shape == (*shape, 3)
