"""Calibration: integer histograms of probabilities, and the temperature that fits them best.

A probability is calibrated if, of the pixels to which it is given, that share is of the class. All
counts are int64 sums that stay on the device: exact in any order, over any number of ranks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from unet.losses import IGNORE
from unet.temperature import TEMPERATURES
from unet.tiling import Block

LEVELS = 1000
"""Levels of a probability: level k holds those from k / 1000 up to, not including, the next."""
UNIT = 2**24
"""Probabilities and losses are summed in int64, in units of 2^-24: enough for 10^11 pixels."""
SMALLEST = 2**-24
"""Probabilities are at least this in the negative log-likelihood; it is the precision near 1."""


class BlockCounts(Protocol):
    """Counts of the probabilities of pixels whose class is known."""

    def update(self, probability: Tensor, mask: Tensor) -> None:
        """Add pixels: `Block.probability`, and their mask uint8 [N, h, w]; 255 is ignored."""
        ...


def observe_blocks(counts: Sequence[BlockCounts], mask: Tensor) -> Callable[[Block], None] | None:
    """Return what adds the blocks of images with a mask uint8 [B, H, W] to counts; None if none."""
    if not counts:
        return None

    def observe(block: Block) -> None:
        part = mask[block.images, block.rows, block.columns]
        for one in counts:
            one.update(block.probability, part)

    return observe


class Histograms(NamedTuple):
    """int64 histograms of K classes over 1,000 levels, on the CPU.

    Row c < K is the probability of class c, row K that of the predicted class.
    """

    pixels: Tensor
    """Pixels [K + 1, 1000, 2]: without, then with the class; in row K wrong, then right ones."""
    sums: Tensor
    """Sums of the probabilities [K + 1, 1000], in 2^-24."""


class CalibrationCounts(Metric):
    """Histograms of probabilities as int64 sums, reduced over all ranks by `compute()`.

    Every rank must call that; a rank without images contributes zeros.
    """

    full_state_update = False
    pixels: Tensor
    sums: Tensor
    bounds: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        shape = (num_classes + 1, LEVELS)
        zeros = torch.zeros(shape, dtype=torch.int64)
        self.add_state("pixels", torch.zeros((*shape, 2), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        # Rounded to float32 as `MaskRule.threshold` is, so that levels decide as thresholds do.
        bounds = torch.arange(1, LEVELS, dtype=torch.float64) / LEVELS
        self.register_buffer("bounds", bounds.float(), persistent=False)

    def update(self, probability: Tensor, mask: Tensor) -> None:
        """Add pixels as `BlockCounts.update`, without synchronising with the device."""
        if probability.shape[1] == 1:
            probability = torch.cat([1 - probability, probability], dim=1)
        valid = mask != IGNORE
        best, chosen = probability.max(dim=1)
        for row, values in enumerate(probability.unbind(dim=1)):
            self.count(row, values, mask == row, valid)
        self.count(len(self.pixels) - 1, best, mask == chosen, valid)

    def count(self, row: int, values: Tensor, hits: Tensor, valid: Tensor) -> None:
        """Add values float32 [N, h, w] to a row; `hits` and `valid` are bool [N, h, w]."""
        level = torch.bucketize(values.contiguous(), self.bounds, right=True)
        # Ignored pixels go into an extra level, which is dropped.
        level = torch.where(valid, level, LEVELS).flatten(1)
        # Images apart: on a GPU, fewer pixels then wait for the same cell.
        each = level.new_zeros((len(level), 2 * LEVELS + 2))
        cells = each.scatter_add(1, 2 * level + hits.flatten(1), torch.ones_like(level))
        self.pixels[row] += cells.sum(dim=0)[:-2].unflatten(0, (LEVELS, 2))
        amount = (values * UNIT).round().long().flatten(1)
        total = each[:, : LEVELS + 1].scatter_add(1, level, amount)
        self.sums[row] += total.sum(dim=0)[:-1]

    def compute(self) -> Histograms:
        """Return the sums; torchmetrics reduces them over ranks first."""
        return Histograms(self.pixels, self.sums)


class TemperatureCounts(Metric):
    """Negative log-likelihood at each of `TEMPERATURES`, as int64 sums over pixels and ranks."""

    full_state_update = False
    losses: Tensor
    num_pixels: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(TEMPERATURES), dtype=torch.int64)
        self.add_state("losses", zeros, dist_reduce_fx="sum")
        self.add_state("num_pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probability: Tensor, mask: Tensor) -> None:
        """Add pixels as `BlockCounts.update`, without synchronising with the device."""
        valid = mask != IGNORE
        if probability.shape[1] == 1:
            logit = torch.logit(probability[:, 0], eps=SMALLEST)
            margin = torch.where(mask == 1, -logit, logit)
            losses = [F.softplus(margin / t) for t in TEMPERATURES]
        else:
            log = probability.clamp(min=SMALLEST).log()
            own = log.gather(1, torch.where(valid, mask, 0).long()[:, None])[:, 0]
            losses = [torch.logsumexp(log / t, dim=1) - own / t for t in TEMPERATURES]
        sums = [torch.where(valid, (one * UNIT).round().long(), 0).sum() for one in losses]
        self.losses += torch.stack(sums)
        self.num_pixels += valid.sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the sums; torchmetrics reduces them over ranks first."""
        return self.losses, self.num_pixels
