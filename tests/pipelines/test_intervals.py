"""`evaluation.intervals`: bootstrap intervals of scores, checked against SciPy and by hand."""

import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from pipelines.evaluation import intervals
from pipelines.evaluation.intervals import (
    RESAMPLES,
    ClassIntervals,
    Integers,
    describe_intervals,
    estimate_intervals,
    read_intervals,
    resample_sums,
)

NAMES = ("background", "cell", "ghost")


def draw_rows(count: int, classes: int = 3, seed: int = 0) -> np.ndarray:
    """Counts of images that differ in size and in quality: uint32 [N, 2 + 3 K]."""
    rng = np.random.default_rng(seed)
    size = rng.integers(20, 500, (count, 1))
    quality = rng.beta(4, 2, (count, classes))
    tp = size * quality
    fp, fn = (size * (1 - quality) * rng.random((count, classes)) for _ in range(2))
    return np.concatenate([np.full((count, 2), 9), tp, fp, fn], axis=1).astype(np.uint32)


def scipy_interval(rows: np.ndarray, units: Integers, column: int) -> tuple[float, float]:
    """The interval of a class's Dice by scipy.stats.bootstrap over units."""
    tp, fp, fn = (
        np.array([part[units == unit, column].sum() for unit in np.unique(units)])
        for part in np.split(rows[:, 2:].astype(float), 3, axis=1)
    )

    def dice(tp: np.ndarray, wrong: np.ndarray, axis: int) -> np.ndarray:
        return 2 * tp.sum(axis) / (2 * tp.sum(axis) + wrong.sum(axis))

    found = stats.bootstrap(
        (tp, fp + fn), dice, paired=True, n_resamples=RESAMPLES, method="percentile",
        random_state=np.random.default_rng(7),
    )  # fmt: skip
    return tuple(found.confidence_interval)


@pytest.mark.parametrize("count", [12, 402])
@pytest.mark.parametrize("per", [1, 3])
def test_intervals_equal_those_of_scipy(count: int, per: int) -> None:
    rows = draw_rows(count)
    units = np.arange(count) // per
    found = estimate_intervals(rows, NAMES, (1, 2), units=units if per > 1 else None)
    assert (found.unit, found.num_units) == ("image" if per == 1 else "group", count // per)
    for column, name in enumerate(NAMES):
        expected = scipy_interval(rows, units, column)
        width = expected[1] - expected[0]
        assert found.classes[name].dice == pytest.approx(expected, abs=0.06 * width)


def test_the_interval_of_two_images_is_computed_by_hand() -> None:
    # Resamples of a (Dice 1, 10 pixels) and b (Dice 0.5, 30 pixels): aa 1/4, ab 1/2, bb 1/4.
    rows = np.array([[9, 9, 5, 0, 0], [9, 9, 10, 10, 10]], np.uint32)
    found = estimate_intervals(rows, ("cell",), (0,))
    assert found.classes["cell"] == found.macro == ClassIntervals((0.5, 1.0), (1 / 3, 1.0), 0)


def test_neither_order_nor_memory_changes_a_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw_rows(60)
    expected = estimate_intervals(rows, NAMES, (1, 2))
    shuffled = rows[np.random.default_rng(1).permutation(len(rows))]
    assert estimate_intervals(shuffled, NAMES, (1, 2)) == expected
    monkeypatch.setattr(intervals, "MAX_DRAWN", 130)
    assert estimate_intervals(rows, NAMES, (1, 2)) == expected


def test_resamples_draw_as_many_units_as_there_are() -> None:
    counts = np.stack([np.ones(50, np.int64), np.arange(50)], axis=1)
    sums = resample_sums(counts)
    assert sums.shape == (RESAMPLES, 2)
    assert (sums[:, 0] == 50).all()
    assert sums[:, 1].mean() == pytest.approx(np.arange(50).sum(), rel=0.01)
    assert sums[:, 1].var() == pytest.approx(50 * np.arange(50).var(), rel=0.05)


def test_a_class_that_a_resample_lacks_is_counted_and_left_out() -> None:
    # The ghost is in one image of three: (2/3)^3 of the resamples lack it.
    rows = np.zeros((3, 2 + 9), np.uint32)
    rows[:, 3:5] = [[4, 0], [4, 0], [3, 2]]
    found = estimate_intervals(rows, NAMES, (1, 2))
    assert found.classes["ghost"].undefined == pytest.approx(RESAMPLES * 8 / 27, rel=0.05)
    assert found.classes["ghost"].dice == (1, 1)
    assert found.classes["background"] == ClassIntervals(None, None, RESAMPLES)
    declared = estimate_intervals(rows, NAMES, (1, 2), "zero")
    assert declared.classes["ghost"] == ClassIntervals((0, 1), (0, 1), 0)


@pytest.mark.parametrize("units", [None, np.array([0, 0, 1])])
def test_one_unit_with_counted_pixels_has_no_interval(units: Integers | None) -> None:
    rows = draw_rows(3)
    rows[1 if units is None else 2 :, 2:] = 0
    found = estimate_intervals(rows, NAMES, (1, 2), units=units)
    assert found.num_units == 1
    assert {found.macro, *found.classes.values()} == {ClassIntervals(None, None, 0)}
    unit = "image" if units is None else "group"
    expected = f"no intervals: they require 2 {unit}s with counted pixels, not 1 {unit}"
    assert describe_intervals(found) == expected


def test_a_million_images_take_seconds_and_blocks_keep_the_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = time.perf_counter()
    found = estimate_intervals(draw_rows(10**6, 2), NAMES[:2], (1,))
    assert found.num_units == 10**6
    assert time.perf_counter() - start < 30
    rows = draw_rows(4000)
    exact = estimate_intervals(rows, NAMES, (1, 2))
    monkeypatch.setattr(intervals, "MAX_UNITS", 1000)
    pooled = estimate_intervals(rows, NAMES, (1, 2))
    assert exact.num_units == pooled.num_units
    for one, other in (
        (exact.macro, pooled.macro),
        (exact.classes["cell"], pooled.classes["cell"]),
    ):
        assert one.dice is not None
        assert other.dice is not None
        width = one.dice[1] - one.dice[0]
        assert other.dice == pytest.approx(one.dice, abs=0.1 * width)


def test_intervals_of_other_classes_are_refused() -> None:
    plain = {"classes": {"cell": {}}, "intervals": None}
    assert read_intervals(plain) is None
    rows = draw_rows(4, 1)
    made = estimate_intervals(rows, ("dog",), (0,))
    with pytest.raises(ValueError, match="intervals of other classes"):
        read_intervals({**plain, "intervals": asdict(made)})
    assert read_intervals({"classes": {"dog": {}}, "intervals": asdict(made)}) == made
