"""Objects in masks of two classes: connected components, and how many of them a prediction finds.

An object is a connected component of the second class, of 8 neighbours. A true and a predicted
object match if their intersection over union is above 0.5; then neither can match another (Kirillov
et al., "Panoptic segmentation", CVPR 2019). Pixels that are 255 in the mask belong to no object,
true or predicted.

Requires SciPy, which is imported for the first mask.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unet.losses import IGNORE

Uint8 = NDArray[np.uint8]
Labels = NDArray[np.int32]


class ObjectCounts(NamedTuple):
    """Numbers of objects, and of their pixels, in one image."""

    true: int
    predicted: int
    matched: int
    """Pairs with an intersection over union above 0.5."""
    true_area: int
    """Pixels of all true objects."""
    predicted_area: int


def label_objects(mask: Uint8) -> tuple[Labels, int]:
    """Number the objects of a mask uint8 [H, W] from 1, in the order of their first pixel.

    Returns int32 [H, W], 0 outside of objects, and the number of objects.
    """
    from scipy import ndimage

    labels = np.empty(mask.shape, dtype=np.int32)
    number = ndimage.label(mask == 1, structure=np.ones((3, 3)), output=labels)
    return labels, int(number)  # pyright: ignore[reportArgumentType]


def measure_areas(labels: Labels, number: int) -> NDArray[np.int64]:
    """Count the pixels of each of `number` objects: int64 [number]."""
    return np.bincount(labels[labels > 0], minlength=number + 1)[1:].astype(np.int64)


def count_objects(prediction: Uint8, mask: Uint8) -> ObjectCounts:
    """Match the objects of one image: prediction and mask are class indices uint8 [H, W]."""
    ignored = mask == IGNORE
    predicted, num_predicted = label_objects(np.where(ignored, np.uint8(0), prediction))
    true, num_true = label_objects(mask)
    areas, found_areas = measure_areas(true, num_true), measure_areas(predicted, num_predicted)
    both = (true > 0) & (predicted > 0)
    pairs, shared = np.unique(
        true[both].astype(np.int64) * (num_predicted + 1) + predicted[both], return_counts=True
    )
    first, second = np.divmod(pairs, num_predicted + 1)
    union = areas[first - 1] + found_areas[second - 1] - shared
    return ObjectCounts(
        num_true,
        num_predicted,
        int((2 * shared > union).sum()),
        int(areas.sum()),
        int(found_areas.sum()),
    )
