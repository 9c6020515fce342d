"""`masks.displacement`: an offset between masks and images is measured, and only a real one."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from shards.masks.displacement import (
    MIN_IMAGES,
    SIDE,
    Displacement,
    compare_positions,
    find_displacement,
)
from shards.sample import IGNORE, Uint8

FINE = 8
"""Positions per pixel of the scenes that are drawn."""


@cache
def draw_cells(seed: int) -> NDArray[np.bool_]:
    """Round cells, [64 * FINE, 72 * FINE]."""
    noise = np.random.default_rng(seed).normal(size=(64 * FINE, 72 * FINE))
    scene = gaussian_filter(noise, 3 * FINE, mode="wrap")
    return scene > np.quantile(scene, 0.6)


def draw_pair(seed: int, down: float = 0.0, right: float = 0.0) -> tuple[Uint8, Uint8]:
    """An image [64, 72, 3] of bright cells with noise, and its mask, displaced by some pixels."""
    rng, cells = np.random.default_rng(seed), draw_cells(seed)
    means = cells.reshape(64, FINE, 72, FINE).mean(axis=(1, 3))
    grey = 90 + 60 * means + rng.normal(0, 12, means.shape)
    moved = np.roll(cells, (round(down * FINE), round(right * FINE)), (0, 1))
    mask = moved.reshape(64, FINE, 72, FINE).mean(axis=(1, 3)) >= 0.5
    image = np.repeat(grey.clip(0, 255).round().astype(np.uint8)[:, :, None], 3, axis=2)
    return image, mask.astype(np.uint8)


def measure(pairs: list[tuple[Uint8, Uint8]]) -> Displacement | None:
    found = [compare_positions(image, mask) for image, mask in pairs]
    return find_displacement([ratios for ratios in found if ratios is not None])


@pytest.mark.parametrize(
    ("down", "right"), [(-0.625, 0), (0, 0.75), (1.5, -0.625), (0, -2), (0.625, 0.625)]
)
def test_a_displacement_is_found_to_a_tenth_of_a_pixel(down: float, right: float) -> None:
    found = measure([draw_pair(seed, down, right) for seed in range(12)])
    assert found is not None
    assert (found.down, found.right) == pytest.approx((down, right), abs=0.1)
    assert found.images == 12


def test_masks_in_their_place_are_not_displaced() -> None:
    for down in (0.0, 0.25):
        assert measure([draw_pair(seed, down) for seed in range(12)]) is None


def test_images_that_disagree_or_are_few_decide_nothing() -> None:
    both_ways = [draw_pair(seed, 1.0 if seed % 2 else -1.0) for seed in range(12)]
    assert measure(both_ways) is None
    few = [draw_pair(seed, 1.0) for seed in range(MIN_IMAGES)]
    assert measure(few) is not None
    assert measure(few[1:]) is None


def test_masks_that_show_something_else_are_not_displaced() -> None:
    images = [draw_pair(seed)[0] for seed in range(12)]
    masks = [draw_pair(seed + 100)[1] for seed in range(12)]
    assert measure(list(zip(images, masks, strict=True))) is None


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_relief_shows_borders_on_both_sides_and_decides_nothing(right: float) -> None:
    pairs = [draw_pair(seed, 0, right) for seed in range(12)]
    assert measure([(relief(image), mask) for image, mask in pairs]) is None


def relief(image: Uint8) -> Uint8:
    """The image as oblique light shows it: borders bright on the left, dark on the right."""
    smooth = gaussian_filter(image.astype(np.float64), (1, 1, 0))
    return (128 + 4 * np.gradient(smooth, axis=1)).clip(0, 255).astype(np.uint8)


def test_a_displacement_beyond_reach_is_not_reported_as_a_smaller_one() -> None:
    assert measure([draw_pair(seed, 6.0) for seed in range(12)]) is None


def test_ignored_pixels_do_not_count() -> None:
    pairs = [draw_pair(seed, -0.625) for seed in range(12)]
    for image, mask in pairs:
        mask[:, :30] = IGNORE
        image[:, :27] = 255
    found = measure(pairs)
    assert found is not None
    assert found.down == pytest.approx(-0.625, abs=0.12)


def empty(height: int, width: int, value: int = 0) -> NDArray[np.uint8]:
    return np.full((height, width), value, np.uint8)


def test_images_that_show_no_border_are_left_out() -> None:
    image, mask = draw_pair(0)
    assert compare_positions(image[:17], mask[:17]) is None
    assert compare_positions(np.full_like(image, 9), mask) is None
    assert compare_positions(image, empty(64, 72)) is None
    assert compare_positions(image, empty(64, 72, IGNORE)) is None
    assert measure([(image, empty(64, 72))] * 12) is None


def test_the_middle_of_a_large_image_is_compared() -> None:
    image, mask = draw_pair(3, -1.0)
    large = np.zeros((SIDE + 600, SIDE + 400, 1), np.uint8)
    wide = empty(SIDE + 600, SIDE + 400)
    tiles = (SIDE // 64 + 1, SIDE // 72 + 1)
    block, marks = np.tile(image[..., 0], tiles)[:SIDE, :SIDE], np.tile(mask, tiles)[:SIDE, :SIDE]
    large[300:-300, 200:-200, 0], wide[300:-300, 200:-200] = block, marks
    whole, middle = compare_positions(large, wide), compare_positions(block[:, :, None], marks)
    assert whole is not None
    assert middle is not None
    np.testing.assert_array_equal(whole, middle)
