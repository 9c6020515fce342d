"""`inference.specks`: no small area is left, what surrounds it decides, nothing else changes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.inference import specks
from pipelines.inference.specks import count_values, remove_specks

MASKS = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=9
    )
)


def areas(mask):
    """The 8-connected areas of one class, each a set of pixels, by hand."""
    height, width = mask.shape
    left, found = {(y, x) for y in range(height) for x in range(width)}, []
    while left:
        todo = [min(left)]
        area = set(todo)
        left -= area
        while todo:
            y, x = todo.pop()
            near = {p for p in around(y, x) & left if mask[p] == mask[y, x]}
            left -= near
            area |= near
            todo += near
        found.append(area)
    return found


def around(y, x):
    return {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} - {(y, x)}


def remove_one_by_one(mask, min_area):
    """Reference implementation of the docstring, round by round."""
    found = mask.copy()
    waiting = [area for area in areas(mask) if len(area) < min_area]
    pixels = {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1])}
    while waiting:
        open_pixels, chosen = set().union(*waiting), []
        for area in waiting:
            ring = set().union(*(around(*p) for p in area)) & pixels - area - open_pixels
            votes = [int(found[p]) for p in ring]
            if votes:
                chosen.append((area, min(votes, key=lambda c: (-votes.count(c), c))))
        if not chosen:
            break
        for area, winner in chosen:
            for p in area:
                found[p] = winner
        waiting = [area for area in waiting if area not in [a for a, _ in chosen]]
    return found


@settings(max_examples=150, deadline=None)
@given(rows=MASKS, min_area=st.integers(0, 12), together=st.sampled_from([1, 3, 2**18]))
def test_specks_take_the_class_that_their_ring_is_for(rows, min_area, together):
    mask = np.array(rows, dtype=np.uint8)
    before = mask.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specks, "TOGETHER", together)
        found = remove_specks(mask, min_area)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, remove_one_by_one(mask, min_area))
    np.testing.assert_array_equal(mask, before)


@settings(max_examples=150, deadline=None)
@given(rows=MASKS, min_area=st.integers(1, 12))
def test_no_speck_is_left_unless_there_is_nothing_else(rows, min_area):
    mask = np.array(rows, dtype=np.uint8)
    found = remove_specks(mask, min_area)
    sizes = [len(area) for area in areas(found)]
    if any(len(area) >= min_area for area in areas(mask)):
        assert min(sizes) >= min_area
    else:
        np.testing.assert_array_equal(found, mask)
    # Done once, it is done.
    np.testing.assert_array_equal(remove_specks(found, min_area), found)
    for area in areas(mask):
        if len(area) >= min_area:
            assert all(found[p] == mask[p] for p in area)


def test_of_classes_equally_common_the_lower_wins():
    mask = np.repeat(np.array([[2, 2, 2, 0, 1, 1, 1]], dtype=np.uint8), 3, axis=0)
    assert remove_specks(mask, 4)[:, 3].tolist() == [1, 1, 1]


def test_areas_that_touch_at_a_corner_are_one():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[[2, 3, 4], [2, 3, 4]] = 1
    assert remove_specks(mask, 3).sum() == 3
    assert remove_specks(mask, 4).sum() == 0


def test_values_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr(specks, "TOGETHER", 1000)
    mask = np.random.default_rng(0).integers(0, 12, (150, 151)).astype(np.uint8)
    assert count_values(mask, 12).tolist() == [int((mask == value).sum()) for value in range(13)]


def test_memory_is_within_the_documented_limit():
    rng = np.random.default_rng(0)
    mask = np.zeros((1500, 1500), dtype=np.uint8)
    mask[:, 700:] = 3
    spots = rng.choice(mask.size, mask.size // 50, replace=False)
    mask.reshape(-1)[spots] = 1
    num_specks = len(spots)
    remove_specks(mask, 40)  # what SciPy loads is not counted
    tracemalloc.start()
    found = remove_specks(mask, 40)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found == 1).sum() < num_specks / 50
    # and what is counted together
    assert most < 8 * mask.size + 32 * num_specks + 300 * min(num_specks, specks.TOGETHER)
