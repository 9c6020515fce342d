"""The border map of a mask: where cells nearly touch (Ronneberger et al. 2015, U-Net, eq. 2).

The paper weighs each pixel's loss by w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)), d1
and d2 the distances to the nearest and the second nearest cell. What is stored is the exponential
alone, times 255: sigma is fixed here, while w0 stays a setting of training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from PIL import Image

from shards.images import ImageRule, encode_png, load, open_image
from shards.sample import DataError, Uint8

NEEDS_SCIPY = "--border-sigma needs SciPy: pip install 'unet-shards[scipy]'"


@dataclass(frozen=True, slots=True)
class BorderRule:
    """How border maps are made. Raises ValueError for a sigma that is no width."""

    sigma: float
    """Pixels; the paper's is 5."""
    classes: tuple[int, ...]
    """Indices of the classes whose connected components are cells."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"--border-sigma is a width in pixels above 0, got {self.sigma}")

    def encode(self, mask: Uint8) -> bytes:
        """Class indices uint8 [H, W] -> its border map as PNG of mode L, W x H."""
        return encode_png(Image.fromarray(border_map(mask, self.classes, self.sigma)))


def has_scipy() -> bool:
    """Whether the extra `scipy` is installed, without loading it."""
    return find_spec("scipy") is not None


def border_map(mask: Uint8, classes: Sequence[int], sigma: float) -> Uint8:
    """round(255 exp(-(d1 + d2)^2 / (2 sigma^2))) outside of cells, 0 inside them.

    Cells are the 4-connected components of each class by itself: the ridge that a mask leaves
    between touching cells may be one pixel wide and run diagonally, where 8-connectivity would
    step across it. Distances are Euclidean, in pixels, from centre to centre of the nearest pixel
    of a cell. Ignored pixels and those of other classes belong to no cell. With fewer than two
    cells, everything is 0.

    Args:
        mask: class indices uint8 [H, W].
        classes: indices of the classes that are cells.
        sigma: pixels.

    Returns:
        uint8 [H, W].
    """
    # Takes most of a second, and nothing else needs it.
    from scipy import ndimage

    nearest = np.full(mask.shape, np.inf)
    second = nearest.copy()
    # Beyond, 255 times the exponential rounds to 0: a cell matters in its box, so much larger.
    reach = sigma * math.sqrt(2 * math.log(2 * 255))
    margin = int(min(reach, max(mask.shape)))
    for number in classes:
        labels = np.zeros(mask.shape, dtype=np.int32)
        ndimage.label(mask == number, output=labels)
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            box = grown(rows, margin), grown(columns, margin)
            distance = np.asarray(ndimage.distance_transform_edt(labels[box] != label))
            np.minimum(second[box], np.maximum(nearest[box], distance), out=second[box])
            np.minimum(nearest[box], distance, out=nearest[box])
    total = nearest + second
    near = (nearest > 0) & (total <= reach)
    found = np.zeros(mask.shape, dtype=np.uint8)
    found[near] = np.rint(255 * np.exp(-((total[near] / sigma) ** 2) / 2))
    return found


def grown(span: slice, margin: int) -> slice:
    """A span of rows or columns, larger by a margin at both ends."""
    return slice(max(0, span.start - margin), span.stop + margin)


def decode_border(data: bytes, size: tuple[int, int], where: str) -> Uint8:
    """Bytes of a stored border map -> uint8 [H, W], 255 where cells touch.

    Args:
        data: PNG of mode L.
        size: (width, height) of the picture that it belongs to.
        where: names it in messages.

    Raises DataError for what is damaged, none, or of another size.
    """
    image = open_image(data, where, ImageRule())
    if image.mode != "L":
        raise DataError(f"{where} is no border map: mode {image.mode}, not L; pack it again")
    if image.size != size:
        raise DataError(
            f"{where} is {image.width} x {image.height}, its picture {size[0]} x {size[1]}; "
            "pack the data set again"
        )
    return np.asarray(load(image, where, "ignore")[0])
