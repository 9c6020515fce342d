"""How far boundaries lie apart, in pixels: HD95 and surface Dice, exact for any number of ranks.

The boundary of a class are those of its pixels that have one of their four neighbours outside it.
Outside is also what lies beyond the picture's edge and what is 255 in the mask: there the mask has
no region, and of the prediction nothing is looked at. So a region cut off by the edge or by ignored
pixels has a boundary there, in mask and prediction alike, as in MONAI; DeepMind's surface-distance,
which counts the picture's edge too, puts its elements between pixels and weights them by length.

d is the Euclidean distance of a boundary pixel of one side to the nearest of the other.
    HD95          the larger of the two 95th percentiles of d, mask to prediction and back, linear
                  between neighbouring values (Maier-Hein et al., "Metrics reloaded", Nature Methods
                  2024; MONAI; medpy pools both directions before it takes the percentile)
    surface Dice  the share of all boundary pixels of both sides that have d <= tolerance (Nikolov
                  et al., "Deep learning to achieve clinically applicable segmentation of head and
                  neck anatomy for radiotherapy", 2018)
A class that a picture has on one side only is a failure: HD95 is the picture's diagonal
sqrt(H^2 + W^2), surface Dice 0, and it is counted. A class on neither side has no boundary to
compare: it is in no mean and no count, whatever the policy for Dice and IoU.
The means are taken over pictures first, for each class, and then over the classes that count.

Needs SciPy, which is loaded at the first picture.
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
from unet.metrics import FIXED_POINT, divide, mean, sums_of_all_ranks

Uint8 = NDArray[np.uint8]
Points = NDArray[np.intp]

PIXEL = 2**24
"""Distances are summed as integers of 1/2^24 pixel: 10^7 diagonals of 30,000 pixels fit."""


@dataclass(frozen=True, slots=True)
class ClassSurface:
    """One class. None where no picture has it."""

    name: str
    hd95: float | None
    """Mean over pictures, in pixels."""
    surface_dice: float | None
    """Mean over pictures."""
    surface_failures: int
    """Pictures that have the class in mask or prediction, but not in both."""


@dataclass(frozen=True, slots=True)
class Surface:
    """How well boundaries are met over a set of pictures."""

    tolerance: float
    """In pixels."""
    hd95: float | None
    """Mean over the classes that count, in pixels."""
    surface_dice: float | None
    surface_failures: int
    """Sum over the classes that count."""
    classes: tuple[ClassSurface, ...]


class SurfaceCounts(NamedTuple):
    """The int64 sums [K] that the means follow from. K classes."""

    hd95: Tensor
    """Sums over pictures, in 1/2^24 pixel."""
    surface_dice: Tensor
    """Sums over pictures, in 1/2^32."""
    images: Tensor
    """Pictures that have the class in mask or prediction."""
    failures: Tensor
    """Those of them that have it in one of both only."""


class SurfaceScores(Metric):
    """HD95 and surface Dice as int64 sums; `compute()` and `scores()` add those of all ranks first.

    A rank that saw nothing contributes zeros. Every rank must make the call. The work is done on
    the CPU, with memory that grows with the boundaries, apart from a few bytes for each pixel.
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
            raise ValueError(f"tolerance must be a number of pixels from 0 on, got {tolerance}")
        self.names, self.counted, self.tolerance = classes, counted, tolerance
        for name in SurfaceCounts._fields:
            zeros = torch.zeros(len(classes), dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Compare class indices: prediction and mask uint8 [B, H, W], on any device.

        255 in the mask is left out. Raises ImportError without SciPy.
        """
        pairs = zip(prediction.cpu().numpy(), mask.cpu().numpy(), strict=True)
        rows = [surfaces(*pair, len(self.names), self.tolerance) for pair in pairs]
        sums = torch.tensor(np.sum(rows, axis=0), device=self.hd95.device)
        for name, values in zip(SurfaceCounts._fields, sums, strict=True):
            setattr(self, name, getattr(self, name) + values)

    def compute(self) -> SurfaceCounts:
        """The sums over everything that all ranks compared."""
        return SurfaceCounts(self.hd95, self.surface_dice, self.images, self.failures)

    def scores(self) -> Surface:
        """The means over everything that all ranks compared."""
        sums = (tensor.tolist() for tensor in sums_of_all_ranks(self))
        classes = tuple(
            ClassSurface(
                name=name,
                hd95=divide(hd95, images * PIXEL),
                surface_dice=divide(surface_dice, images * FIXED_POINT),
                surface_failures=failures,
            )
            for name, hd95, surface_dice, images, failures in zip(self.names, *sums, strict=True)
        )
        of = [classes[c] for c in self.counted]
        return Surface(
            tolerance=self.tolerance,
            hd95=mean([s.hd95 for s in of]),
            surface_dice=mean([s.surface_dice for s in of]),
            surface_failures=sum(s.surface_failures for s in of),
            classes=classes,
        )


def surfaces(
    prediction: Uint8, mask: Uint8, num_classes: int, tolerance: float
) -> NDArray[np.int64]:
    """What one picture [H, W] adds to `SurfaceCounts`: int64 [4, K]."""
    # One more than the class, so that 255 becomes 0, which is no region.
    truth = mask + np.uint8(1)
    found = np.where(mask == IGNORE, np.uint8(0), prediction + np.uint8(1))
    counts = np.zeros((len(SurfaceCounts._fields), num_classes), dtype=np.int64)
    boundaries = zip(
        boundary_points(truth, num_classes), boundary_points(found, num_classes), strict=True
    )
    for c, (true, predicted) in enumerate(boundaries):
        if len(true) and len(predicted):
            hd95, dice = compare(true, predicted, tolerance)
            failed = False
        elif len(true) or len(predicted):
            hd95, dice, failed = hypot(*mask.shape), 0.0, True
        else:
            continue
        counts[:, c] = round(hd95 * PIXEL), round(dice * FIXED_POINT), 1, failed
    return counts


def boundary_points(labels: Uint8, num_classes: int) -> list[Points]:
    """Row and column of the boundary pixels of the regions 1 ... K, each [N, 2]."""
    padded = np.pad(labels, 1)
    above, below = padded[:-2, 1:-1], padded[2:, 1:-1]
    left, right = padded[1:-1, :-2], padded[1:-1, 2:]
    edge = labels != above
    for neighbour in (below, left, right):
        edge |= labels != neighbour
    points = np.argwhere(edge)
    region = labels[edge]
    return [points[region == c + 1] for c in range(num_classes)]


def compare(true: Points, predicted: Points, tolerance: float) -> tuple[float, float]:
    """HD95 in pixels and surface Dice of two boundaries [N, 2], neither of them empty."""
    # A tree of the boundary's pixels instead of a distance transform of the whole picture: the
    # same distances, in a fraction of time and memory where boundaries are thin.
    from scipy.spatial import KDTree

    there: NDArray[np.float64] = KDTree(predicted).query(true)[0]
    back: NDArray[np.float64] = KDTree(true).query(predicted)[0]
    hd95 = max(float(np.percentile(distances, 95)) for distances in (there, back))
    near = int((there <= tolerance).sum()) + int((back <= tolerance).sum())
    return hd95, near / (len(there) + len(back))
