"""Objects: counted and matched in masks small enough to check by hand."""

import numpy as np
import pytest

from unet.objects import ObjectCounts, count_objects, label_objects, measure_areas

IGNORED = 255


def read(*rows: str) -> np.ndarray:
    """A mask: `#` is the second class, `x` ignored."""
    return np.array([[{"#": 1, "x": IGNORED}.get(c, 0) for c in row] for row in rows], np.uint8)


def test_objects_are_connected_by_corners_too() -> None:
    labels, number = label_objects(read("#..#", ".#..", "...#"))
    assert number == 3
    assert measure_areas(labels, number).tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("mask", "prediction", "expected"),
    [
        # 3 of 5 pixels in common: above one half.
        (("####.",), (".####",), (1, 1, 1, 4, 4)),
        # 2 of 4: one half is no match, since two predictions could reach it.
        (("####",), ("##..",), (1, 1, 0, 4, 2)),
        (("####",), ("##.#",), (1, 2, 0, 4, 3)),
        # One prediction over two objects matches the one of which it is most.
        (("#.#####",), ("#######",), (2, 1, 1, 6, 7)),
        (("....",), ("#..#",), (0, 2, 0, 0, 2)),
        (("#...",), ("....",), (1, 0, 0, 1, 0)),
        (("....",), ("....",), (0, 0, 0, 0, 0)),
        # Ignored pixels are of no object: what is left of the prediction equals the mask.
        (("#xx#",), ("####",), (2, 2, 2, 2, 2)),
        (("xxxx",), ("####",), (0, 0, 0, 0, 0)),
    ],
)
def test_matches_of_hand_computed_masks(mask: tuple, prediction: tuple, expected: tuple) -> None:
    assert count_objects(read(*prediction), read(*mask)) == ObjectCounts(*expected)


def test_matches_equal_those_of_every_pair_compared() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = (rng.random((12, 14)) < 0.35).astype(np.uint8)
        prediction = np.where(rng.random(mask.shape) < 0.1, 1 - mask, mask)
        true, num_true = label_objects(mask)
        found, num_found = label_objects(prediction)
        matched = sum(
            2 * ((true == a) & (found == b)).sum() > ((true == a) | (found == b)).sum()
            for a in range(1, num_true + 1)
            for b in range(1, num_found + 1)
        )
        counts = count_objects(prediction, mask)
        assert (counts.true, counts.predicted, counts.matched) == (num_true, num_found, matched)
        assert (counts.true_area, counts.predicted_area) == (mask.sum(), prediction.sum())
