"""Distances between boundaries in pixels: HD95 and surface Dice, exact for any number of ranks.

The boundary of a class is the set of its pixels that have one of their four neighbours outside it.
Pixels beyond the image border and pixels that are 255 in the mask count as outside, so a region cut
off by the border or by ignored pixels has a boundary there, in mask and prediction alike, as in
MONAI. The prediction is not evaluated where the mask is 255. DeepMind's surface-distance, which
also treats the image border as boundary, places its elements between pixels and weights them by
length.

d is the Euclidean distance from a boundary pixel of one side to the nearest one of the other side.
    HD95          the larger of the two directed 95th percentiles of d (mask to prediction and
                  back), with linear interpolation (Maier-Hein et al., "Metrics reloaded", Nature
                  Methods 2024; MONAI; medpy takes the percentile over both directions pooled)
    surface Dice  the share of all boundary pixels of both sides with d <= tolerance (Nikolov et
                  al., "Deep learning to achieve clinically applicable segmentation of head and
                  neck anatomy for radiotherapy", 2018)
A class that occurs on one side only is counted as a failure: HD95 is the image diagonal
sqrt(H^2 + W^2) and surface Dice is 0. A class on neither side has no boundary to compare and enters
no mean and no count, whatever the policy for Dice and IoU. Means are taken over images first, for
each class, and then over the counted classes.

Requires SciPy, which is imported for the first image.
"""

from dataclasses import dataclass
from math import hypot, isfinite
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from unet.losses import IGNORE
from unet.metrics import FIXED_POINT, divide, mean, sum_over_ranks

Uint8 = NDArray[np.uint8]
Points = NDArray[np.intp]

PIXEL = 2**24
"""Distances are summed in int64, in units of 2^-24 pixel: enough for 10^7 diagonals of 30,000."""


@dataclass(frozen=True, slots=True)
class ClassSurface:
    """Surface scores of one class; None if it occurs in no image."""

    name: str
    hd95: float | None
    """Mean over images, in pixels."""
    surface_dice: float | None
    """Mean over images."""
    surface_failures: int
    """Images with the class in either mask or prediction, but not in both."""


@dataclass(frozen=True, slots=True)
class Surface:
    """Surface scores over a set of images."""

    tolerance: float
    """Tolerance of surface Dice, in pixels."""
    hd95: float | None
    """Mean over the counted classes, in pixels."""
    surface_dice: float | None
    surface_failures: int
    """Sum over the counted classes."""
    classes: tuple[ClassSurface, ...]


class SurfaceCounts(NamedTuple):
    """int64 sums [K] from which the means are computed, for K classes."""

    hd95: Tensor
    """Sums over images, in 2^-24 pixel."""
    surface_dice: Tensor
    """Sums over images, in 2^-32."""
    images: Tensor
    """Images with the class in mask or prediction."""
    failures: Tensor
    """Images with the class in only one of the two."""


class SurfaceScores(Metric):
    """HD95 and surface Dice from int64 sums, reduced over all ranks by `compute()` and `scores()`.

    Every rank must call these; a rank without images contributes zeros. The work is done on the
    CPU. Memory grows with the length of the boundaries, plus a few bytes per pixel.
    """

    full_state_update = False
    hd95: Tensor
    surface_dice: Tensor
    images: Tensor
    failures: Tensor

    def __init__(
        self, classes: tuple[str, ...], counted: tuple[int, ...], tolerance: float = 2.0
    ) -> None:
        super().__init__()
        if not (isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance must be a number >= 0, got {tolerance}")
        self.names, self.counted, self.tolerance = classes, counted, tolerance
        for name in SurfaceCounts._fields:
            zeros = torch.zeros(len(classes), dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Add a batch of class indices: prediction and mask uint8 [B, H, W], on any device.

        Pixels with mask 255 are ignored. Raises ImportError if SciPy is not installed.
        """
        pairs = zip(prediction.cpu().numpy(), mask.cpu().numpy(), strict=True)
        rows = [count_surfaces(*pair, len(self.names), self.tolerance) for pair in pairs]
        sums = torch.tensor(np.sum(rows, axis=0), device=self.hd95.device)
        for name, values in zip(SurfaceCounts._fields, sums, strict=True):
            setattr(self, name, getattr(self, name) + values)

    def compute(self) -> SurfaceCounts:
        """Return the sums over all ranks."""
        return SurfaceCounts(self.hd95, self.surface_dice, self.images, self.failures)

    def scores(self) -> Surface:
        """Return the means over all ranks."""
        sums = (tensor.tolist() for tensor in sum_over_ranks(self))
        classes = tuple(
            ClassSurface(
                name=name,
                hd95=divide(hd95, images * PIXEL),
                surface_dice=divide(surface_dice, images * FIXED_POINT),
                surface_failures=failures,
            )
            for name, hd95, surface_dice, images, failures in zip(self.names, *sums, strict=True)
        )
        counted = [classes[c] for c in self.counted]
        return Surface(
            tolerance=self.tolerance,
            hd95=mean([s.hd95 for s in counted]),
            surface_dice=mean([s.surface_dice for s in counted]),
            surface_failures=sum(s.surface_failures for s in counted),
            classes=classes,
        )


def count_surfaces(
    prediction: Uint8, mask: Uint8, num_classes: int, tolerance: float
) -> NDArray[np.int64]:
    """Compute what one image [H, W] adds to `SurfaceCounts`: int64 [4, K]."""
    # Class index + 1, so that 255 wraps to 0: outside every region.
    true_regions = mask + np.uint8(1)
    predicted_regions = np.where(mask == IGNORE, np.uint8(0), prediction + np.uint8(1))
    counts = np.zeros((len(SurfaceCounts._fields), num_classes), dtype=np.int64)
    boundaries = zip(
        find_boundaries(true_regions, num_classes),
        find_boundaries(predicted_regions, num_classes),
        strict=True,
    )
    for c, (true, predicted) in enumerate(boundaries):
        if len(true) and len(predicted):
            hd95, dice = compare_boundaries(true, predicted, tolerance)
            failed = False
        elif len(true) or len(predicted):
            hd95, dice, failed = hypot(*mask.shape), 0.0, True
        else:
            continue
        counts[:, c] = round(hd95 * PIXEL), round(dice * FIXED_POINT), 1, failed
    return counts


def find_boundaries(regions: Uint8, num_classes: int) -> list[Points]:
    """Find the boundary pixels of regions 1 ... K of a map [H, W]: (row, column), [N, 2] each."""
    padded = np.pad(regions, 1)
    above, below = padded[:-2, 1:-1], padded[2:, 1:-1]
    left, right = padded[1:-1, :-2], padded[1:-1, 2:]
    edge = regions != above
    for neighbour in (below, left, right):
        edge |= regions != neighbour
    points = np.argwhere(edge)
    region = regions[edge]
    return [points[region == c + 1] for c in range(num_classes)]


def compare_boundaries(true: Points, predicted: Points, tolerance: float) -> tuple[float, float]:
    """Compute HD95 in pixels and surface Dice of two non-empty boundaries [N, 2]."""
    # A k-d tree of boundary pixels instead of a distance transform of the image: equal distances
    # for a fraction of the time and memory, since boundaries are thin.
    from scipy.spatial import KDTree

    there: NDArray[np.float64] = KDTree(predicted).query(true)[0]
    back: NDArray[np.float64] = KDTree(true).query(predicted)[0]
    hd95 = max(float(np.percentile(distances, 95)) for distances in (there, back))
    near = int((there <= tolerance).sum()) + int((back <= tolerance).sum())
    return hd95, near / (len(there) + len(back))
