"""How masks relate values to classes is compared across a data set."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from shards.images.files import ImageRule
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette
from shards.masks.readings import compare_readings
from shards.statistics import SampleRule, SampleStatistics, merge_statistics, read_sample

BLACK, RED, GREEN, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 255)
TWO = ("background", "cell")


@dataclass
class Compared:
    problems: list[str]
    notes: list[str]


@pytest.fixture
def compare(to_bytes):
    """compare([PIL masks], **format) -> problems and notes of the data set."""

    def run(images, classes=TWO, **rule):
        mask_format = MaskFormat(num_classes=len(classes), **rule)
        sample_rule = SampleRule(
            images=ImageRule(), masks=mask_format, palette=default_palette(classes)
        )
        parts = []
        for number, image in enumerate(images):
            data = to_bytes(image)
            sample = read_sample(to_bytes(image.convert("L")), data, sample_rule, "i", f"m{number}")
            part = SampleStatistics()
            part.add(sample)
            parts.append(SampleStatistics.from_plain(part.to_plain()))
        forward, backward = merge_statistics(parts), merge_statistics(parts[::-1])
        assert forward.readings == backward.readings
        return Compared(*compare_readings(forward.readings, classes, mask_format))

    return run


def palette_mask(values, *colours):
    image = Image.fromarray(np.array([values], dtype=np.uint8)).copy()
    image.putpalette([number for colour in colours for number in colour])
    return image


def grey(*values, dtype=np.uint8):
    return Image.fromarray(np.array([values], dtype=dtype))


def test_a_binary_palette_whose_background_was_a_foreground_is_a_problem(compare):
    masks = [palette_mask([0, 1, 0], BLACK, RED), palette_mask([0, 1, 1], RED, GREEN)]
    (problem,) = compare(masks, kind="binary").problems
    assert "(255, 0, 0) is background in 1 masks (first: m1)" in problem
    assert "cell in 1 masks (first: m0)" in problem


def test_palettes_that_swap_classes_are_a_problem(compare):
    masks = [palette_mask([0, 1, 0], BLACK, RED), palette_mask([0, 1, 1], RED, BLACK)]
    (problem,) = compare(masks, kind="index").problems
    assert problem == (
        "palettes differ: by its index, (0, 0, 0) is background in 1 masks (first: m0) and cell "
        "in 1 masks (first: m1); read the colours instead: --mask-format rgb with --colours"
    )


def test_an_empty_mask_with_another_palette_order_is_a_problem(compare):
    masks = [palette_mask([0, 1], BLACK, RED), palette_mask([0, 0], RED, BLACK)]
    assert len(compare(masks, kind="index").problems) == 1


def test_palettes_without_a_common_colour_are_noted_with_counts(compare):
    masks = [palette_mask([0, 1], BLACK, c) for c in (RED, RED, GREEN)]
    compared = compare(masks, kind="index")
    assert compared.problems == []
    assert compared.notes == [
        "palettes differ, and masks are read by index: cell is (0, 255, 0) in 1 masks (first: m2), "
        "cell is (255, 0, 0) in 2 masks (first: m0)"
    ]


def test_colours_that_repeat_within_one_palette_agree(compare):
    masks = [palette_mask([0, 1, 2], BLACK, RED, RED)] * 2
    assert compare(masks, (*TWO, "wall"), kind="index") == Compared([], [])


def test_unused_palette_colours_may_differ(compare):
    masks = [palette_mask([0, 1], BLACK, RED, WHITE), palette_mask([0, 1], BLACK, RED, GREEN)]
    assert compare(masks, kind="binary") == Compared([], [])


def test_foreground_values_that_are_1_or_the_largest_are_noted(compare):
    masks = [grey(0, 1), grey(0, 255), grey(0, 65535, dtype=np.uint16)]
    masks.append(Image.fromarray(np.array([[False, True]])))
    compared = compare(masks, kind="binary")
    assert compared.problems == []
    assert compared.notes == [
        "the value of the foreground differs and is read as one class: 1 in 2 masks (first: m0) "
        "and 255 in 1 masks (first: m1) and 65535 in 1 masks (first: m2)"
    ]


def test_other_foreground_values_that_differ_are_a_problem(compare):
    for values in ((128, 255), (1, 2)):
        (problem,) = compare([grey(0, v) for v in (values[0], *values)], kind="binary").problems
        assert problem == (
            f"the value of the foreground differs: {values[0]} in 2 masks (first: m0) and "
            f"{values[1]} in 1 masks (first: m2); if they are one class, add --mask-threshold 1, "
            "else use --mask-format values"
        )
    assert compare([grey(0, 1), grey(0, 2)], kind="binary", threshold=1) == Compared([], [])


def test_indices_that_differ_but_have_one_colour_are_noted(compare):
    masks = [palette_mask([0, 1], BLACK, RED), palette_mask([0, 2], BLACK, GREEN, RED)]
    compared = compare(masks, kind="binary")
    assert (compared.problems, len(compared.notes)) == ([], 1)


def test_indices_that_differ_in_one_palette_are_a_problem(compare):
    masks = [palette_mask([0, v], BLACK, RED, GREEN) for v in (1, 2)]
    assert "the value of the foreground differs: 1 in" in compare(masks, kind="binary").problems[0]


def test_one_foreground_value_agrees_whatever_it_is(compare):
    assert compare([grey(0, 9), grey(0, 9), grey(0, 0)], kind="binary") == Compared([], [])
    assert compare([grey(0, 9), grey(255, 9)], kind="binary", ignore_value=255).problems == []


def test_a_threshold_for_masks_of_two_depths_is_a_problem(compare):
    masks = [grey(0, 255), grey(0, 65535, 300, dtype=np.uint16)]
    (problem,) = compare(masks, kind="binary", threshold=128).problems
    assert problem.startswith("--mask-threshold 128 would apply to 1 masks (first: m0) of 8 bits")
    extremes = [grey(0, 255), grey(0, 65535, dtype=np.uint16)]
    assert compare(extremes, kind="binary", threshold=128).problems == []
    assert compare(masks[1:], kind="binary", threshold=128).problems == []
