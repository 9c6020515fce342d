"""The border map of a mask: where cells nearly touch (Ronneberger et al. 2015, U-Net, eq. 2).

The paper weights the loss of each pixel by w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2))
with d1 and d2 the distances to the nearest and the second nearest cell. Only the exponential is
stored, times 255: sigma is fixed when packing, w0 remains a training setting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from PIL import Image

from shards.images.files import ImageRule, encode_png, load_pixels, open_image
from shards.sample import DataError, Uint8


@dataclass(frozen=True, slots=True)
class BorderRule:
    """How border maps are computed. Raises ValueError if sigma is not a positive finite number."""

    sigma: float
    """Pixels; 5 in the paper."""
    classes: tuple[int, ...]
    """Indices of the classes whose connected components are cells."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"--border-sigma must be a finite number of pixels > 0, got {self.sigma}"
            )

    def encode(self, mask: Uint8) -> bytes:
        """Compute the border map of class indices uint8 [H, W] and encode it as PNG of mode L."""
        return encode_png(Image.fromarray(compute_border_map(mask, self.classes, self.sigma)))


def needs_scipy(flag: str) -> str:
    """Return the error for a flag that requires SciPy where it is not installed."""
    return f"{flag} requires SciPy: pip install 'unet-shards[scipy]'"


def has_scipy() -> bool:
    """Return whether the extra `scipy` is installed, without importing it."""
    return find_spec("scipy") is not None


def compute_border_map(mask: Uint8, classes: Sequence[int], sigma: float) -> Uint8:
    """Compute round(255 exp(-(d1 + d2)^2 / (2 sigma^2))) outside of cells, 0 inside them.

    Cells are the 4-connected components of each class by itself: the ridge that a mask leaves
    between touching cells may be one pixel wide and run diagonally, which 8-connectivity would
    bridge. Distances are Euclidean, in pixels, between the centres of a pixel and of the nearest
    pixel of a cell. Ignored pixels and those of other classes belong to no cell. With fewer than
    two cells, the map is 0 everywhere.

    Args:
        mask: class indices uint8 [H, W].
        classes: indices of the classes that are cells.
        sigma: pixels.

    Returns:
        uint8 [H, W].
    """
    # Importing it takes most of a second, and nothing else needs it.
    from scipy import ndimage

    nearest = np.full(mask.shape, np.inf)
    second = nearest.copy()
    # Beyond this distance, 255 times the exponential rounds to 0, so a cell only affects its
    # bounding box enlarged by it.
    reach = sigma * math.sqrt(2 * math.log(2 * 255))
    margin = int(min(reach, max(mask.shape)))
    for index in classes:
        labels = np.zeros(mask.shape, dtype=np.int32)
        ndimage.label(mask == index, output=labels)
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            box = expand_span(rows, margin), expand_span(columns, margin)
            distance = np.asarray(ndimage.distance_transform_edt(labels[box] != label))
            np.minimum(second[box], np.maximum(nearest[box], distance), out=second[box])
            np.minimum(nearest[box], distance, out=nearest[box])
    total = nearest + second
    near = (nearest > 0) & (total <= reach)
    border = np.zeros(mask.shape, dtype=np.uint8)
    border[near] = np.rint(255 * np.exp(-((total[near] / sigma) ** 2) / 2))
    return border


def expand_span(span: slice, margin: int) -> slice:
    """Extend a span of rows or columns by a margin at both ends, clipped at 0."""
    return slice(max(0, span.start - margin), span.stop + margin)


def decode_border(data: bytes, size: tuple[int, int], where: str) -> Uint8:
    """Decode a stored border map to uint8 [H, W], 255 where cells touch.

    Args:
        data: PNG of mode L.
        size: (width, height) of its image.
        where: name of the border map in error messages.

    Raises DataError if it is damaged, not a border map, or of another size.
    """
    image = open_image(data, where, ImageRule())
    if image.mode != "L":
        raise DataError(
            f"{where} is not a border map (mode {image.mode}, expected L); pack it again"
        )
    if image.size != size:
        raise DataError(
            f"{where} is {image.width} x {image.height}, but its image is {size[0]} x {size[1]}; "
            "pack the data set again"
        )
    return np.asarray(load_pixels(image, where, "ignore")[0])
