"""Specks in masks: connected areas that are too small to be meant."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from shards.sample import Uint8

NEEDS_SCIPY = "--min-area needs SciPy: pip install 'unet-shards[scipy]'"
AROUND = [step for step in product((-1, 0, 1), repeat=2) if step != (0, 0)]
"""Steps (down, right) to the 8 neighbours of a pixel."""
TOGETHER = 2**18
"""Pixels of specks whose surroundings are counted together."""
Int64 = NDArray[np.int64]


def remove_specks(mask: Uint8, min_area: int) -> Uint8:
    """A mask without connected areas of fewer than `min_area` pixels.

    Areas are 8-connected pixels of one class. A speck becomes the class most common on the ring of
    pixels around it, those of other specks left out; of classes equally common, the lower. Specks
    that only specks surround follow in a next round, when those have become part of an area, so
    that none is left; where a mask consists of nothing else, it stays as it is.

    Args:
        mask: class indices uint8 [H, W]; it is not changed.
        min_area: pixels.

    Returns:
        uint8 [H, W]. Memory beside it: 8 bytes a pixel, 32 more for each of a speck, 80 MB.
    """
    place, owner = find_specks(mask, min_area)
    if len(place) == 0:
        return mask
    found = mask.copy()
    classes = found.reshape(-1)
    undecided = np.zeros(mask.size, dtype=bool)
    undecided[place] = True
    while len(place):
        decided = np.zeros(len(place), dtype=bool)
        # Specks stay whole: each part begins with the first pixel of one.
        starts = np.unique(np.searchsorted(owner, owner[::TOGETHER]))
        for begin, end in zip(starts, [*starts[1:], len(place)], strict=True):
            some = slice(begin, end)
            specks, winners = vote(place[some], owner[some], classes, undecided, mask.shape[1])
            hit = np.isin(owner[some], specks)
            classes[place[some][hit]] = winners[np.searchsorted(specks, owner[some][hit])]
            decided[some] = hit
        if not decided.any():
            break
        # Only now, so that the parts of a round do not depend on each other.
        undecided[place[decided]] = False
        place, owner = place[~decided], owner[~decided]
    return found


def find_specks(mask: Uint8, min_area: int) -> tuple[Int64, Int64]:
    """The pixels of all specks: flat index and number of the speck, int64 [N], by that number."""
    # Takes most of a second, and nothing else needs it.
    from scipy import ndimage

    labels = np.empty(mask.shape, dtype=np.int32)
    places, owners = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    before = 0
    for value in np.flatnonzero(count_values(mask, 255)):
        ndimage.label(mask == value, structure=np.ones((3, 3)), output=labels)
        num_areas = int(labels.max(initial=0))
        small = count_values(labels, num_areas) < min_area
        small[0] = False
        if small.any():
            place = np.flatnonzero(small[labels])
            owner = labels.reshape(-1)[place].astype(np.int64) + before
            order = np.argsort(owner, kind="stable")
            places.append(place[order])
            owners.append(owner[order])
        before += num_areas
    return np.concatenate(places), np.concatenate(owners)


def count_values(values: NDArray[np.integer], largest: int) -> Int64:
    """How often each value from 0 to `largest` occurs [1 + largest]."""
    # NumPy counts in a copy of 8 bytes a value.
    part = max(TOGETHER, largest)
    flat = values.reshape(-1)
    counts = np.zeros(1 + largest, dtype=np.int64)
    for begin in range(0, len(flat), part):
        counts += np.bincount(flat[begin : begin + part], minlength=1 + largest)
    return counts


def vote(
    place: Int64, owner: Int64, classes: Uint8, undecided: NDArray[np.bool_], width: int
) -> tuple[Int64, Uint8]:
    """What the rings of some specks are for.

    Args:
        place: flat index of their pixels, int64 [N].
        owner: number of the speck of each, ascending.
        classes: of the mask, flat.
        undecided: pixels of specks, flat; they have no vote.
        width: of the mask.

    Returns:
        Numbers of the specks whose ring has votes, ascending, and the class of each.
    """
    row, column = np.divmod(place, width)
    height, rings = len(classes) // width, []
    for down, right in AROUND:
        inside = (row + down >= 0) & (row + down < height)
        inside &= (column + right >= 0) & (column + right < width)
        near = place[inside] + down * width + right
        votes = ~undecided[near]
        rings.append(owner[inside][votes] * len(classes) + near[votes])
    # Several pixels of a speck see the same pixel of its ring. (`np.unique` hashes: slower.)
    ring = np.sort(np.concatenate(rings))
    speck, near = np.divmod(ring[np.diff(ring, prepend=-1) > 0], len(classes))
    ballots, count = np.unique(speck * 256 + classes[near], return_counts=True)
    speck, chosen = np.divmod(ballots, 256)
    # The most votes first, and of equally many the lower class.
    order = np.lexsort((chosen, -count, speck))
    specks, first = np.unique(speck[order], return_index=True)
    return specks, chosen[order][first].astype(np.uint8)
