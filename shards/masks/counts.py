"""How often each value or colour occurs in a mask."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[np.uint8] | NDArray[np.uint16]


def count_pixel_values(pixels: Values) -> NDArray[np.int64]:
    """Count the pixels of each value: [256], or [65536] for 16 bits."""
    counts = np.zeros(256 if pixels.dtype == np.uint8 else 65536, dtype=np.int64)
    flat = pixels.ravel()
    # Most masks have two values, and comparing is twice as fast as finding runs.
    is_first = flat == flat[0]
    counts[flat[0]] = np.count_nonzero(is_first)
    second = flat[is_first.argmin()]
    counts[second] = np.count_nonzero(flat == second)
    if counts.sum() == len(flat):
        return counts
    values, lengths = find_runs(flat)
    return np.bincount(values, weights=lengths, minlength=len(counts)).astype(np.int64)


def count_colours(image: Image.Image, mode: str) -> tuple[NDArray[np.int64], ...]:
    """Count the pixels of each colour of an image converted to `mode`.

    Returns:
        colours (R, G, B, A) [N, 4], their pixel counts [N], and for each run of equal pixels the
        row of its colour and its length.
    """
    # Four bytes per pixel are one integer, and equal neighbours need only one look-up.
    codes, lengths = find_runs(np.asarray(image.convert(mode).convert("RGBA")).view("<u4").ravel())
    unique, runs = np.unique(codes, return_inverse=True)
    counts = np.bincount(runs, weights=lengths).astype(np.int64)
    return unique.view(np.uint8).reshape(-1, 4).astype(np.int64), counts, runs, lengths


def find_solid(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which pixels [H, W] equal all of their up to four neighbours."""
    solid = np.ones(pixels.shape, dtype=bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        equal = pixels[one] == pixels[other]
        solid[one] &= equal
        solid[other] &= equal
    return solid


def find_runs(flat: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the value and the length of each run of equal neighbours; masks have few runs."""
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], starts)) if len(flat) else starts
    return flat[starts], np.diff(np.append(starts, len(flat)))


def format_counts(counts: NDArray[np.int64], values: NDArray[np.int64]) -> str:
    """Format as `0: 1,234 px, 255: 5 px`, the five most common values first."""
    order = values[np.argsort(-counts[values], kind="stable")]
    listed = ", ".join(f"{v}: {counts[v]:,} px" for v in order[:5])
    return listed + (f" and {len(order) - 5:,} more" if len(order) > 5 else "")
