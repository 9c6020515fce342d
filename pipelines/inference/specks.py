"""Specks in masks: connected components with fewer pixels than `--min-area`."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from shards.sample import Uint8

AROUND = [step for step in product((-1, 0, 1), repeat=2) if step != (0, 0)]
"""Steps (down, right) to the 8 neighbours of a pixel."""
TOGETHER = 2**18
"""Pixels per block: bounds the memory of counting."""
Int64 = NDArray[np.int64]


def remove_specks(mask: Uint8, min_area: int) -> Uint8:
    """Remove connected components of fewer than `min_area` pixels.

    Components are 8-connected pixels of one class. A speck takes the most common class of the ring
    of pixels around it, not counting other specks; of equally common classes, the lowest. Specks
    that only specks surround are decided in the next round, until none is left. A mask of nothing
    but specks is returned unchanged.

    Args:
        mask: class indices uint8 [H, W]; it is not modified.
        min_area: minimum number of pixels of a component.

    Returns:
        uint8 [H, W]. Additional memory: 8 bytes per pixel, 32 more per pixel of a speck, and 80 MB.
    """
    place, owner = find_specks(mask, min_area)
    if len(place) == 0:
        return mask
    result = mask.copy()
    classes = result.reshape(-1)
    undecided = np.zeros(mask.size, dtype=bool)
    undecided[place] = True
    while len(place):
        decided = np.zeros(len(place), dtype=bool)
        # Each block starts at the first pixel of a speck, so that no speck is split.
        starts = np.unique(np.searchsorted(owner, owner[::TOGETHER]))
        for start, end in zip(starts, [*starts[1:], len(place)], strict=True):
            some = slice(start, end)
            specks, winners = vote(place[some], owner[some], classes, undecided, mask.shape[1])
            hit = np.isin(owner[some], specks)
            classes[place[some][hit]] = winners[np.searchsorted(specks, owner[some][hit])]
            decided[some] = hit
        if not decided.any():
            break
        # After the round, so that its blocks do not depend on each other.
        undecided[place[decided]] = False
        place, owner = place[~decided], owner[~decided]
    return result


def find_specks(mask: Uint8, min_area: int) -> tuple[Int64, Int64]:
    """Find the pixels of all specks, sorted by speck.

    Returns:
        Flat index of each pixel and number of its speck, both int64 [N].
    """
    # The import takes most of a second, and nothing else needs it.
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
    """Count each value from 0 to `largest`; returns int64 [1 + largest]."""
    # NumPy makes a copy of 8 bytes per value.
    part = max(TOGETHER, largest)
    flat = values.reshape(-1)
    counts = np.zeros(1 + largest, dtype=np.int64)
    for start in range(0, len(flat), part):
        counts += np.bincount(flat[start : start + part], minlength=1 + largest)
    return counts


def vote(
    place: Int64, owner: Int64, classes: Uint8, undecided: NDArray[np.bool_], width: int
) -> tuple[Int64, Uint8]:
    """Find the most common class on the ring of each speck.

    Args:
        place: flat indices of the pixels of the specks, int64 [N].
        owner: number of the speck of each pixel, ascending, int64 [N].
        classes: class indices of the mask, flat.
        undecided: pixels of specks, flat; they are not counted.
        width: width of the mask.

    Returns:
        Numbers of the specks with counted pixels on their ring, ascending, and the class of each.
    """
    row, column = np.divmod(place, width)
    height, rings = len(classes) // width, []
    for down, right in AROUND:
        inside = (row + down >= 0) & (row + down < height)
        inside &= (column + right >= 0) & (column + right < width)
        near = place[inside] + down * width + right
        votes = ~undecided[near]
        rings.append(owner[inside][votes] * len(classes) + near[votes])
    # Several pixels of a speck have a ring pixel in common. (`np.unique` hashes: slower.)
    ring = np.sort(np.concatenate(rings))
    speck, near = np.divmod(ring[np.diff(ring, prepend=-1) > 0], len(classes))
    ballots, count = np.unique(speck * 256 + classes[near], return_counts=True)
    speck, chosen = np.divmod(ballots, 256)
    # Most votes first; of equal numbers, the lowest class.
    order = np.lexsort((chosen, -count, speck))
    specks, first = np.unique(speck[order], return_index=True)
    return specks, chosen[order][first].astype(np.uint8)
