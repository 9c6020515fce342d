"""`masks.shift`: an offset between masks and images is measured, and only a clear one."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from shards.masks.shift import (
    MAX_IMAGES,
    MIN_IMAGES,
    REACH,
    SIDE,
    SPAN,
    Shift,
    choose_images,
    compare_positions,
    find_shift,
)
from shards.sample import IGNORE, Uint8

FINE = 8
"""Positions per pixel of the scenes that are drawn."""
HEIGHT, WIDTH = 64, 72

Scene = NDArray[np.bool_]
Pair = tuple[Uint8, Uint8]


@cache
def draw_cells(seed: int) -> Scene:
    """Round cells, [HEIGHT * FINE, WIDTH * FINE]."""
    noise = np.random.default_rng(seed).normal(size=(HEIGHT * FINE, WIDTH * FINE))
    field = gaussian_filter(noise, 3 * FINE, mode="wrap")
    return field > np.quantile(field, 0.6)


def draw_membranes(seed: int) -> Scene:
    """The borders of the cells, two pixels wide."""
    cells = draw_cells(seed)
    return cells ^ (cells & np.roll(cells, 2 * FINE, 0) & np.roll(cells, 2 * FINE, 1))


def draw_stripes(seed: int) -> Scene:
    """Slanted stripes, with a slightly different direction in each scene."""
    rows, columns = np.mgrid[: HEIGHT * FINE, : WIDTH * FINE] / FINE
    slope = 1.5 + np.random.default_rng(seed).normal(0, 0.15)
    return np.sin((rows + slope * columns) / 2.5 + seed) > 0.2


def pixels(scene: NDArray) -> NDArray[np.float64]:
    """The mean of a fine scene in each pixel."""
    return scene.reshape(HEIGHT, FINE, WIDTH, FINE).mean(axis=(1, 3))


def photograph(scene: Scene, seed: int, down: float = 0, right: float = 0) -> Pair:
    """A grey image [HEIGHT, WIDTH, 1] of a scene with noise, and its mask, shifted."""
    noise = np.random.default_rng(seed).normal(0, 12, (HEIGHT, WIDTH))
    image = (90 + 60 * pixels(scene) + noise).clip(0, 255).round().astype(np.uint8)
    moved = np.roll(scene, (round(down * FINE), round(right * FINE)), (0, 1))
    return image[:, :, None], (pixels(moved) >= 0.5).astype(np.uint8)


def cells(count: int = 12, down: float = 0, right: float = 0) -> list[Pair]:
    return [photograph(draw_cells(seed), seed, down, right) for seed in range(count)]


def measure(pairs: list[Pair]) -> Shift | None:
    found = [compare_positions(image, mask) for image, mask in pairs]
    return find_shift([ratios for ratios in found if ratios is not None])


@pytest.mark.parametrize(
    ("down", "right"),
    [(-0.625, 0), (0, 0.75), (1.5, -0.625), (0, -2), (0.625, 0.625), (0, 0), (0.25, -0.25)],
)
def test_a_shift_is_found_to_a_tenth_of_a_pixel(down: float, right: float) -> None:
    found = measure(cells(down=down, right=right))
    assert found is not None
    assert (found.down, found.right) == pytest.approx((down, right), abs=0.1)
    assert (found.vertical, found.horizontal) == (abs(down) > 0.5, abs(right) > 0.5)
    assert found.images == 12


@pytest.mark.parametrize(("down", "right"), [(-0.625, 0), (0, 1)])
def test_the_shift_of_thin_structures_is_found(down: float, right: float) -> None:
    found = measure([photograph(draw_membranes(i), i, down, right) for i in range(12)])
    assert found is not None
    assert (found.down, found.right) == pytest.approx((down, right), abs=0.15)


def test_a_shift_across_slanted_stripes_is_no_vertical_one() -> None:
    # Held at one row, stripes that moved right by 0.4 look as if they had moved down by 0.6.
    found = measure([photograph(draw_stripes(i), i, 0, 0.375) for i in range(12)])
    assert found is None or not (found.vertical or found.horizontal)


def test_few_images_decide_nothing() -> None:
    pairs = cells(MIN_IMAGES, down=1)
    assert measure(pairs) is not None
    assert measure(pairs[1:]) is None


def parabola(down: float) -> NDArray[np.float64]:
    """Ratios with their peak at a shift down."""
    rows, columns = np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]
    return -((rows - down) ** 2) - 1.0 * columns**2


@pytest.mark.parametrize(("spread", "certain"), [(0.52, True), (0.54, False)])
def test_a_shift_must_exceed_five_standard_errors(spread: float, certain: bool) -> None:
    # Eight vertices at 1 - spread and 1 + spread: a standard error of spread / sqrt(7).
    found = find_shift([parabola(1 - spread), parabola(1 + spread)] * 4)
    assert found is not None
    assert (found.down, found.right) == (1, 0)
    assert found.error == pytest.approx(spread / 7**0.5, abs=1e-3)
    assert found.vertical == certain


def test_masks_that_show_something_else_have_no_shift() -> None:
    images = [image for image, _ in cells()]
    masks = [photograph(draw_cells(seed + 100), seed)[1] for seed in range(12)]
    found = measure(list(zip(images, masks, strict=True)))
    assert found is None or not (found.vertical or found.horizontal)


def relief(image: Uint8) -> Uint8:
    """The image as oblique light shows it: borders bright on the left, dark on the right."""
    smooth = gaussian_filter(image.astype(np.float64), (1, 1, 0))
    return (128 + 4 * np.gradient(smooth, axis=1)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_relief_shows_borders_on_both_sides_and_decides_nothing(right: float) -> None:
    assert measure([(relief(image), mask) for image, mask in cells(right=right)]) is None


def test_a_shift_beyond_reach_is_not_reported_as_a_smaller_one() -> None:
    assert measure(cells(down=6)) is None


def test_ignored_pixels_do_not_count() -> None:
    pairs = cells(down=-0.625)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for image, mask in pairs:
        mask[(rows - 20) ** 2 + (columns - 30) ** 2 < 200] = IGNORE
        mask[:, 64:] = IGNORE
        image[mask == IGNORE] = 255
    found = measure(pairs)
    assert found is not None
    assert (found.down, found.right) == pytest.approx((-0.625, 0), abs=0.1)


def test_images_that_show_no_border_are_left_out() -> None:
    image, mask = cells(1)[0]
    empty = np.zeros_like(mask)
    assert compare_positions(image, mask) is not None
    assert compare_positions(image[:17], mask[:17]) is None
    assert compare_positions(np.full_like(image, 9), mask) is None
    assert compare_positions(image, empty) is None
    assert compare_positions(image, np.full_like(mask, IGNORE)) is None
    assert measure([(image, empty)] * 12) is None


def test_colours_grey_and_16_bits_are_compared_alike() -> None:
    image, mask = cells(1)[0]
    expected = compare_positions(image, mask)
    assert expected is not None
    assert expected.shape == (SPAN, SPAN)
    for other in (image[..., 0], image.repeat(3, axis=2), image[..., 0].astype(np.uint16) * 257):
        found = compare_positions(other, mask)
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_middle_of_a_large_image_is_compared() -> None:
    image, mask = cells(1, down=-1)[0]
    tiles = (SIDE // HEIGHT + 1, SIDE // WIDTH + 1)
    block = np.tile(image[..., 0], tiles)[:SIDE, :SIDE]
    marks = np.tile(mask, tiles)[:SIDE, :SIDE]
    large = np.pad(block, ((300, 300), (200, 201)))
    wide = np.pad(marks, ((300, 300), (200, 201)), constant_values=1)
    whole, middle = compare_positions(large, wide), compare_positions(block, marks)
    assert whole is not None
    assert middle is not None
    np.testing.assert_array_equal(whole, middle)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 10**7])
def test_images_are_chosen_evenly(count: int) -> None:
    chosen = choose_images(count)
    assert len(chosen) == min(count, MAX_IMAGES)
    assert all(0 <= i < count for i in chosen)
    if len(chosen) > 1:
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    ("down", "right", "text"),
    [
        (-0.6, 0.2, "up by 0.6 pixels"),
        (0.1, -1.25, "to the left by 1.2 pixels"),
        (2, 0.75, "down by 2.0 and to the right by 0.8 pixels"),
    ],
)
def test_a_shift_is_described_by_its_large_parts(down: float, right: float, text: str) -> None:
    assert str(Shift(down, right, 0.02, 24)) == text
