"""What a plan depends on besides timings: the manifest, and where classes and masks lie."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from pipelines.loading.dataset import DataSet
from pipelines.model.build import class_pixels
from shards.manifest import Manifest, common_side
from shards.masks.shift import Shift, choose_images, compare_positions, find_shift
from shards.sample import Uint8
from shards.store import Store

MIN_MASKS = 8
"""Number of masks that must contain a class before its place means anything."""
MIN_OFFSET = 0.1
"""Share of the height by which a class must lie above or below the middle, on average."""
MIN_ERRORS = 5.0
"""Minimum of that mean offset, in standard errors over the masks."""


@dataclass(frozen=True, slots=True)
class Upright:
    """The class that shows that the images have an upper side."""

    name: str
    offset: float
    """Mean place of its centre, in heights of the image: -0.5 is the upper edge, 0.5 the lower."""
    masks: int
    """Masks that contain it, of those that were read."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a plan needs to know about a data set."""

    train: int
    """Samples of the training split."""
    val: int
    """Samples of the validation split; 0 if there is none."""
    side: int
    """Side in pixels of the largest square that fits into half of the training images."""
    classes: tuple[str, ...]
    shares: tuple[float, ...]
    """Share of each class in the pixels of the training masks; empty if they were not counted."""
    masks: int
    """Masks that were read for `upright`."""
    upright: Upright | None
    """None if no class lies clearly above or below the middle of the images."""
    shift: Shift | None
    """Of the masks against the images; None if it is unclear, or too few could be compared."""


def gather_facts(place: str, manifest: Manifest) -> DataFacts:
    """Read the facts from the manifest and from at most 64 training images and masks.

    Raises DataError if there are no training samples, or if one cannot be read or has no mask.
    """
    train = manifest.split("train", place)
    data = DataSet(Store(place), manifest, None, workers=0)
    positions = choose_images(train.samples)
    places, ratios = [], []
    for sample, mask in data.samples("train", positions):
        places.append(locate_classes(mask, len(manifest.classes)))
        of_image = compare_positions(sample.image, mask)
        ratios += [] if of_image is None else [of_image]
    pixels = class_pixels(manifest)
    val = manifest.splits.get("val")
    return DataFacts(
        train=train.samples,
        val=0 if val is None else val.samples,
        side=common_side(train),
        classes=manifest.classes,
        shares=tuple(count / max(1, sum(pixels)) for count in pixels),
        masks=len(positions),
        upright=find_upright(places, manifest.classes),
        shift=find_shift(ratios),
    )


def locate_classes(mask: Uint8, num_classes: int) -> dict[int, float]:
    """Compute how far from the middle the classes of a mask [H, W] lie on average, in heights."""
    centres = (np.arange(len(mask)) + 0.5) / len(mask) - 0.5
    rows = [np.count_nonzero(mask == index, axis=1) for index in range(num_classes)]
    return {i: float(np.average(centres, weights=n)) for i, n in enumerate(rows) if n.any()}


def find_upright(places: Iterable[dict[int, float]], classes: tuple[str, ...]) -> Upright | None:
    """Find the class that lies furthest above or below the middle, if one does so reliably.

    Flipping images with an upper side upside down would teach the network what it never sees.
    `places`: of each mask, as `locate_classes` computes them.
    """
    offsets: defaultdict[int, list[float]] = defaultdict(list)
    for of_mask in places:
        for index, offset in of_mask.items():
            offsets[index].append(offset)
    found = [
        Upright(classes[index], float(np.mean(of_class)), len(of_class))
        for index, of_class in offsets.items()
        if len(of_class) >= MIN_MASKS and is_off_centre(np.array(of_class))
    ]
    return max(found, key=lambda upright: abs(upright.offset), default=None)


def is_off_centre(offsets: np.ndarray) -> bool:
    """Whether the mean of offsets [masks] is far from 0, beyond what chance explains."""
    mean = abs(float(offsets.mean()))
    error = float(offsets.std(ddof=1)) / sqrt(len(offsets))
    return mean >= MIN_OFFSET and mean >= MIN_ERRORS * error
