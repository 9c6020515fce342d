"""Regions as runs of pixels, and the run-length encodings of COCO, CVAT and Label Studio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.sample import DataError, Uint8

Ints = NDArray[np.int64]
Size = tuple[int, int]
"""(width, height)."""
BRUSH_HEADER_BITS = 32 + 5 + 4 * 4


@dataclass(frozen=True, slots=True)
class Runs:
    """Pixels of a region, in runs that go down the columns: pixel (x, y) is x * height + y."""

    starts: Ints
    """First pixel of each run, increasing."""
    stops: Ints
    """Pixel after the last one of each run."""

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.stops - self.starts).sum())

    def paint(self, flat: NDArray[Any], value: int) -> None:
        """Set the pixels of a canvas of shape [W * H] to a value."""
        for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True):
            flat[start:stop] = value

    def crop(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return the values of a canvas of shape [W * H] in the region."""
        bounds = zip(self.starts.tolist(), self.stops.tolist(), strict=True)
        return np.concatenate([flat[:0], *(flat[start:stop] for start, stop in bounds)])


def merge_runs(parts: Sequence[Runs]) -> Runs:
    """Unite the runs of the parts of one region."""
    if len(parts) == 1:
        return parts[0]
    empty = np.zeros(0, dtype=np.int64)
    edges = np.concatenate([empty, *(edge for runs in parts for edge in (runs.starts, runs.stops))])
    signs = np.concatenate([empty, *(np.repeat([1, -1], len(runs.starts)) for runs in parts)])
    # At equal pixels, starts come first, so that adjacent runs become one.
    order = np.lexsort((-signs, edges))
    edges, signs = edges[order], signs[order]
    depth = np.cumsum(signs)
    return Runs(edges[(depth == 1) & (signs == 1)], edges[depth == 0])


def counts_to_runs(counts: Ints, size: Size) -> Runs:
    """Convert COCO's counts, which alternate between 0 and 1 from 0 on, to runs.

    Raises DataError if a count is negative or they do not add up to the image's (width, height).
    """
    if (counts < 0).any():
        raise DataError(f"its RLE has the negative count {int(counts.min())}")
    # Counts that would overflow are larger than any image.
    total = float(counts.sum(dtype=np.float64))
    if total != size[0] * size[1]:
        raise DataError(
            f"its RLE covers {total:.0f} pixels, but the image has {size[0]} x {size[1]} = "
            f"{size[0] * size[1]}"
        )
    edges = np.cumsum(counts)
    starts, stops = edges[0::2][: len(counts) // 2], edges[1::2]
    filled = stops > starts
    return Runs(starts[filled], stops[filled])


def decode_counts(text: bytes) -> Ints:
    """Decode COCO's compressed counts: 5 bits a character, every third count as a difference.

    The format of `rleToString` in cocoapi/common/maskApi.c. Raises DataError for other characters
    and for a text that ends inside a number.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) and (codes.min() < 0 or codes.max() > 63):
        raise DataError("its compressed RLE has characters that the encoding does not use")
    ends = np.flatnonzero(codes < 32)
    if len(codes) and (not len(ends) or ends[-1] != len(codes) - 1):
        raise DataError("its compressed RLE ends inside a number; the file may be cut off")
    first = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    places = np.arange(len(codes)) - np.repeat(first, ends - first + 1)
    if len(places) and places.max() > 7:
        raise DataError("its compressed RLE has a number of more than 40 bits")
    parts = (codes & 31) << (5 * places)
    numbers = np.add.reduceat(parts, first) if len(ends) else parts
    negative = (codes[ends] & 16) > 0
    numbers[negative] -= 1 << (5 * (places[ends][negative] + 1))
    # From the third on, a number is the difference to the one two before it.
    odd, even = numbers[1::2], numbers[2::2]
    counts = numbers.copy()
    counts[1::2], counts[2::2] = np.cumsum(odd), np.cumsum(even)
    return counts


def find_mask_runs(mask: NDArray[np.bool_], left: int, top: int, size: Size) -> Runs:
    """Convert a mask [h, w], whose corner is at (left, top) of an image of `size`, to runs.

    What lies outside of the image is cut off.
    """
    width, height = size
    mask = mask[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    left, top = max(0, left), max(0, top)
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=np.int8)
    columns[:, 1:-1] = mask.T
    steps = np.diff(columns, axis=1)
    x, start = np.nonzero(steps == 1)
    _, stop = np.nonzero(steps == -1)
    first = (x + left) * height + top
    return Runs(first + start, first + stop)


def decode_rows(counts: Ints, width: int, height: int) -> NDArray[np.bool_]:
    """Decode CVAT's RLE, counts along the rows of a box that start with 0, to a mask [h, w].

    Raises DataError if the counts do not add up to the box.
    """
    runs = counts_to_runs(counts, (width, height))
    flat = np.zeros(width * height, dtype=np.bool_)
    runs.paint(flat, 1)
    return flat.reshape(height, width)


def decode_brush(data: Sequence[int], size: Size) -> Uint8:
    """Decode Label Studio's RLE of a brush to its alpha channel [H, W].

    The encoding (`@thi.ng/rle-pack`): 32 bits with the number of values, 5 with the bits per value
    - 1, four times 4 with the bits of a length - 1; then packets of a bit (repeated or not), two
    bits that choose the length's bits, the length - 1, and one value, or as many as the length.

    Raises DataError for a damaged encoding, and for one of another image size.
    """
    try:
        packed = np.array(data, dtype=np.uint8)
    except (OverflowError, TypeError, ValueError) as error:
        raise DataError("its RLE is not a list of bytes (0 to 255)") from error
    bits = np.unpackbits(packed)
    if packed.ndim != 1 or len(bits) < BRUSH_HEADER_BITS:
        raise DataError("its RLE is cut off in its header")
    text = (bits + 48).tobytes()
    num, word = int(text[:32], 2), int(text[32:37], 2) + 1
    lengths = [int(text[37 + 4 * i : 41 + 4 * i], 2) + 1 for i in range(4)]
    if num != size[0] * size[1] * 4 or word != 8:
        raise DataError(
            f"its RLE has {num} values of {word} bits, but RGBA of {size[0]} x {size[1]} pixels "
            f"are {size[0] * size[1] * 4} of 8"
        )
    values = np.zeros(num, dtype=np.uint8)
    at, position = BRUSH_HEADER_BITS, 0
    try:
        while position < num:
            repeated = text[at] == 49
            length_bits = lengths[int(text[at + 1 : at + 3], 2)]
            at += 3
            stop = position + 1 + int(text[at : at + length_bits], 2)
            at += length_bits
            taken = 8 if repeated else 8 * (stop - position)
            if stop > num or at + taken > len(bits):
                raise ValueError
            values[position:stop] = np.packbits(bits[at : at + taken])
            at, position = at + taken, stop
    except (IndexError, ValueError) as error:
        raise DataError("its RLE is damaged or cut off") from error
    return values.reshape(size[1], size[0], 4)[..., 3]
