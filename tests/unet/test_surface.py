"""Surface scores equal hand-computed and brute-force distances; 255 is ignored, misses count."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unet.surface import SurfaceScores


def metric(classes=("background", "cell"), counted=(1,), tolerance=2.0):
    return SurfaceScores(classes, counted, tolerance)


def mask_of(*rows):
    """Make a mask [1, H, W] from rows of digits; `x` is 255."""
    values = [[255 if pixel == "x" else int(pixel) for pixel in row] for row in rows]
    return torch.tensor([values], dtype=torch.uint8)


def square(side, half):
    """Make a mask [1, side, side] with a centred square of 2 half + 1 pixels."""
    pixels = torch.zeros(1, side, side, dtype=torch.uint8)
    middle = side // 2
    pixels[:, middle - half : middle + half + 1, middle - half : middle + half + 1] = 1
    return pixels


def score_cell(prediction, mask, **options):
    """Score the class `cell` over one image."""
    m = metric(**options)
    m.update(prediction, mask)
    return m.scores().classes[1]


def counts(m):
    return {name: value.tolist() for name, value in m.compute()._asdict().items()}


def draw(batch, seed=0, side=12):
    """Draw blobs of three classes; some images lack a class, some pixels are 255."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (2, batch, side // 3, side // 3)).astype(np.uint8)
    coarse[:, : batch // 2] %= 2
    prediction, mask = coarse.repeat(3, axis=2).repeat(3, axis=3)
    mask[rng.random(mask.shape) < 0.1] = 255
    return torch.from_numpy(prediction), torch.from_numpy(mask)


# ---- hand-computed


@pytest.mark.parametrize(("tolerance", "dice"), [(2, 1), (1.999, 0), (0, 0)])
def test_two_lines_two_rows_apart(tolerance, dice):
    mask = mask_of("0000", "1111", "0000", "0000", "0000")
    prediction = mask_of("0000", "0000", "0000", "1111", "0000")
    scores = score_cell(prediction, mask, tolerance=tolerance)
    assert (scores.hd95, scores.surface_dice, scores.surface_failures) == (2, dice, 0)


@pytest.mark.parametrize(
    ("tolerance", "dice"), [(0, 0), (1, (12 + 8) / 24), (1.4, (12 + 8) / 24), (1.42, 1)]
)
def test_a_square_in_a_square(tolerance, dice):
    # 16 boundary pixels around 8: the 4 corners are sqrt(2) away, all others 1.
    scores = score_cell(square(9, 1), square(9, 2), tolerance=tolerance)
    assert scores.hd95 == pytest.approx(2**0.5, abs=1e-7)
    assert scores.surface_dice == pytest.approx(dice, abs=1e-9)
    assert score_cell(square(9, 2), square(9, 1), tolerance=tolerance) == scores


@pytest.mark.parametrize(("length", "hd95"), [(21, 19), (11, 9.5)])
def test_hd95_is_the_larger_of_the_two_directed_percentiles(length, hd95):
    # Distances from line to dot: 0, 1, ..., length - 1 pixels; from dot to line: 0.
    line, dot = mask_of("1" * length), mask_of("1" + "0" * (length - 1))
    for prediction, mask in ((line, dot), (dot, line)):
        scores = score_cell(prediction, mask)
        assert scores.hd95 == hd95
        assert scores.surface_dice == pytest.approx((3 + 1) / (length + 1), abs=1e-9)


def test_the_image_border_is_a_boundary():
    # The full image: a ring of 12 pixels. Half of it: its 8 pixels, 6 of them on the ring.
    mask, prediction = mask_of(*["1111"] * 4), mask_of(*["1100"] * 4)
    scores = score_cell(prediction, mask, tolerance=0)
    assert (scores.hd95, scores.surface_dice) == (2, pytest.approx((6 + 6) / (12 + 8), abs=1e-9))
    assert score_cell(mask, mask).hd95 == 0


def test_equal_masks_have_distance_zero():
    _, mask = draw(5)
    m = metric(("a", "b", "c"), (0, 1, 2), tolerance=0)
    m.update(torch.where(mask == 255, 0, mask), mask)
    scores = m.scores()
    assert (scores.hd95, scores.surface_dice, scores.surface_failures) == (0, 1, 0)


# ---- absent classes


@pytest.mark.parametrize("empty_side", ["mask", "prediction"])
def test_a_class_on_one_side_only_costs_the_diagonal_and_is_counted(empty_side):
    some, none = mask_of("0100", "0000", "0000"), mask_of(*["0000"] * 3)
    scores = score_cell(*((some, none) if empty_side == "mask" else (none, some)))
    assert (scores.hd95, scores.surface_dice, scores.surface_failures) == (5, 0, 1)


def test_a_class_on_neither_side_is_in_no_mean_and_no_count():
    m = metric(("background", "cell", "ghost"), (1, 2))
    none = mask_of(*["0000"] * 3)
    m.update(none, none)
    m.update(mask_of("1111"), mask_of("1000"))
    scores = m.scores()
    ghost = scores.classes[2]
    assert (ghost.hd95, ghost.surface_dice, ghost.surface_failures) == (None, None, 0)
    assert counts(m)["images"] == [2, 1, 0]
    assert (scores.hd95, scores.surface_failures) == (scores.classes[1].hd95, 0)


def test_means_are_over_images_first_and_then_over_the_counted_classes():
    m = metric(("background", "cell", "wall"), (1, 2))
    m.update(mask_of("1000", "0000", "0000"), mask_of("1000", "0000", "0002"))
    m.update(mask_of("0010", "0000", "0000"), mask_of("1000", "0000", "0000"))
    m.update(mask_of("1000000", "0000000"), mask_of("0000100", "0000000"))
    scores = m.scores()
    cell, wall = scores.classes[1:]
    assert (cell.hd95, cell.surface_dice) == (2, pytest.approx(2 / 3, abs=1e-9))
    assert (wall.hd95, wall.surface_dice, wall.surface_failures) == (5, 0, 1)
    assert scores.hd95 == (2 + 5) / 2
    assert scores.surface_dice == pytest.approx((2 / 3 + 0) / 2, abs=1e-9)
    assert scores.surface_failures == 1


# ---- 255


def test_predictions_under_255_are_ignored():
    prediction, mask = draw(6)
    one, other = (metric(("a", "b", "c"), (1, 2)) for _ in range(2))
    one.update(prediction, mask)
    other.update(torch.where(mask == 255, (prediction + 1) % 3, prediction), mask)
    assert counts(one) == counts(other)


def test_a_region_ends_where_pixels_are_ignored():
    mask, prediction = mask_of(*["111x"] * 4), mask_of(*["1111"] * 4)
    assert score_cell(prediction, mask, tolerance=0).hd95 == 0
    # An ignored hole has a boundary around it, shared by a prediction without the hole.
    mask = mask_of("11111", "11111", "11x11", "11111", "11111")
    scores = score_cell(mask_of(*["11111"] * 5), mask, tolerance=0)
    assert (scores.hd95, scores.surface_dice) == (0, 1)


def test_a_class_predicted_only_under_255_is_on_neither_side():
    scores = score_cell(mask_of("0011"), mask_of("00xx"))
    assert (scores.hd95, scores.surface_failures) == (None, 0)
    # If the mask has it elsewhere, it is a miss.
    assert score_cell(mask_of("0011"), mask_of("10xx")).surface_failures == 1


def test_an_image_of_255_only_is_not_counted():
    m = metric()
    m.update(mask_of("0101"), mask_of("xxxx"))
    assert list(counts(m).values()) == [[0, 0]] * 4


# ---- brute force


def region_boundary(region):
    height, width = region.shape
    inside = {(y, x) for y, x in np.ndindex(height, width) if region[y, x]}
    around = ((0, 1), (0, -1), (1, 0), (-1, 0))
    return [(y, x) for y, x in inside if any((y + i, x + j) not in inside for i, j in around)]


def brute_force(prediction, mask, c, tolerance):
    """Compute HD95, surface Dice and failures from all pairs of boundary pixels."""
    true = region_boundary(mask == c)
    predicted = region_boundary((prediction == c) & (mask != 255))
    if not true and not predicted:
        return None, None, 0
    if not true or not predicted:
        return np.hypot(*mask.shape), 0, 1
    there, back = (
        [min(np.hypot(y - v, x - u) for v, u in to) for y, x in some]
        for some, to in ((true, predicted), (predicted, true))
    )
    near = sum(d <= tolerance for d in there + back)
    return (
        max(np.percentile(there, 95), np.percentile(back, 95)),
        near / (len(there) + len(back)),
        0,
    )


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    share=st.sampled_from([0.05, 0.3, 0.6]),
    tolerance=st.sampled_from([0.0, 1.0, 1.5, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_scores_equal_brute_force(height, width, share, tolerance, seed):
    rng = np.random.default_rng(seed)
    probabilities = [1 - share, share / 2, share / 2]
    prediction, mask = rng.choice(3, (2, height, width), p=probabilities).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.1] = 255
    m = metric(("a", "b", "c"), (0, 1, 2), tolerance)
    m.update(torch.from_numpy(prediction)[None], torch.from_numpy(mask)[None])
    for c, scores in enumerate(m.scores().classes):
        ours = (scores.hd95, scores.surface_dice, scores.surface_failures)
        assert ours == pytest.approx(brute_force(prediction, mask, c, tolerance), abs=1e-7)


# ---- exact integers


@pytest.mark.parametrize("sizes", [(8,), (1,) * 8, (3, 5), (1, 6, 1)])
def test_order_and_batching_change_no_integer(sizes):
    prediction, mask = draw(8)
    together, batched = (metric(("a", "b", "c"), (1, 2)) for _ in range(2))
    together.update(prediction, mask)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(len(sizes)))
    for some in shuffled.split(sizes):
        batched.update(prediction[some], mask[some])
    assert counts(batched) == counts(together)
    assert batched.scores() == together.scores()
    assert together.scores().surface_failures > 0


def test_the_states_of_two_ranks_add_up_to_those_of_one():
    prediction, mask = draw(7)
    together, first, second = (metric(("a", "b", "c"), (1, 2)) for _ in range(3))
    together.update(prediction, mask)
    first.update(prediction[:2], mask[:2])
    second.update(prediction[2:], mask[2:])
    for name, value in together.compute()._asdict().items():
        assert value.dtype == torch.int64
        assert torch.equal(value, getattr(first, name) + getattr(second, name)), name
    assert len(together._reductions) == 4
    assert all(reduce(torch.tensor([1, 2])) == 3 for reduce in together._reductions.values())


@pytest.mark.filterwarnings("error")
def test_a_rank_without_images_contributes_zeros_without_a_warning():
    scores = metric().scores()
    assert (scores.hd95, scores.surface_dice, scores.surface_failures) == (None, None, 0)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf")])
def test_an_invalid_tolerance_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a number >= 0"):
        metric(tolerance=tolerance)
