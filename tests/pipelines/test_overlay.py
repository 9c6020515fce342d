"""`drawing.overlay`, `drawing.contact_sheet`: how images, classes and ignored pixels are drawn."""

import numpy as np
import pytest
from PIL import Image

from pipelines.drawing.contact_sheet import CAPTION, CELL, COLUMNS, Cell, draw_contact_sheet
from pipelines.drawing.overlay import (
    MIN_CONTRAST,
    TINT,
    choose_overlay_colours,
    draw_overlay,
    find_outline,
)

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 100, 0))


def drawn(mask, image=None):
    image = np.full((*mask.shape, 3), 100, np.uint8) if image is None else image
    overlay = draw_overlay(image, mask, PALETTE)
    assert (overlay.mode, overlay.size) == ("RGB", mask.shape[::-1])
    return np.asarray(overlay)


def square(value=1, around=0):
    mask = np.full((9, 9), around, dtype=np.uint8)
    mask[2:7, 2:7] = value
    return mask


@pytest.mark.parametrize("channels", [1, 3])
def test_background_pixels_are_not_changed(channels):
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


def test_the_inputs_are_not_modified():
    image, mask = np.full((9, 9, 3), 7, np.uint8), square()
    before = image.copy(), mask.copy()
    drawn(mask, image)
    assert np.array_equal(image, before[0])
    assert np.array_equal(mask, before[1])


def test_an_outline_is_both_sides_of_every_border():
    mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=np.uint8)
    assert find_outline(mask).astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_thin_images_can_be_drawn(shape):
    assert drawn(np.ones(shape, dtype=np.uint8)).shape == (*shape, 3)


# ---- contact sheets


def cell(size=(40, 30), grey=100, mask=None, caption="a.png"):
    return Cell(caption, Image.new("RGB", size, (grey,) * 3), mask)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 30])
def test_every_image_has_its_cell_on_the_sheet(count):
    sheet = np.asarray(draw_contact_sheet([cell(grey=200 + i) for i in range(count)], PALETTE, ()))
    columns = max(2, min(COLUMNS, count))
    assert sheet.shape[1] == columns * CELL
    for number in range(count):
        top, left = number // columns * (30 + CAPTION + 4), number % columns * CELL
        assert (sheet[top + 2 : top + 32, left + 2 : left + 42] == 200 + number).all()


def test_a_sheet_shows_masks_and_a_legend():
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 1
    sheet = np.asarray(
        draw_contact_sheet([cell(mask=mask)], PALETTE, ("background", "cell", "rim", "ignored"))
    )
    assert sheet[2 + 10, 2 + 10].tolist() == [200, 0, 0]
    assert sheet[2, 2].tolist() == [100, 100, 100]
    legend = 30 + CAPTION + 4 + CAPTION // 2
    for number, colour in enumerate((*PALETTE, (128, 128, 128))):
        left, top = number % 2 * CELL + 3, legend + number // 2 * CAPTION
        assert sheet[top + 6, left + 6].tolist() == list(colour)
        # Next to the swatch there is text.
        assert (sheet[top : top + 12, left + 18 : left + 60].max(axis=2) > 200).any()


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (5000, 3), (1, 1)])
def test_images_of_any_size_fit_their_cell(size):
    mask = np.ones(size[::-1], np.uint8)
    sheet = np.asarray(draw_contact_sheet([cell(size, mask=mask)], PALETTE, ()))
    factor = min(1, (CELL - 4) / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    assert sheet.shape == (height + CAPTION + 4 + CAPTION // 2, 2 * CELL, 3)
    inside = sheet[2 : 2 + height, 2 : 2 + width]
    assert (inside[..., 0] > inside[..., 1]).all()


@pytest.mark.parametrize("caption", ["x" * 300, "W" * 300, "\u4e2d\u6587.png", "\udcff.png", ""])
def test_any_name_can_be_a_caption(caption):
    sheet = np.asarray(draw_contact_sheet([cell(caption=caption), cell()], PALETTE, (caption,)))
    assert sheet.shape[1] == 2 * CELL
    # The caption is clipped: the cell next to it is unchanged.
    alone = np.asarray(draw_contact_sheet([cell(caption=""), cell()], PALETTE, ("",)))
    np.testing.assert_array_equal(sheet[:48, CELL:], alone[:48, CELL:])


@pytest.mark.parametrize("tone", [(220, 30, 40), (30, 30, 30), (200, 150, 200), (128, 128, 128)])
def test_mask_colours_stand_out_from_the_image_and_from_each_other(tone):
    palette = ((0, 0, 0), (255, 51, 51), (51, 51, 190), (128, 128, 128))
    images = [np.full((20, 30, 3), tone, dtype=np.uint8)]
    chosen = np.array(choose_overlay_colours(images, palette), dtype=float)
    assert chosen[0].tolist() == [0, 0, 0]
    for index in range(1, 4):
        assert np.linalg.norm(chosen[index] - tone) >= MIN_CONTRAST
        others = np.delete(chosen[1:], index - 1, axis=0)
        assert np.linalg.norm(others - chosen[index], axis=1).min() > 50


def test_mask_colours_that_stand_out_are_kept():
    palette = ((0, 0, 0), (255, 51, 51))
    images = [np.full((5, 5, 3), 60, dtype=np.uint8)]
    assert choose_overlay_colours(images, palette) == palette
