"""Augmentation, seeded per sample by (seed, position): the same on any rank, worker or resume.

The crop is chosen where the sample is decoded, in bytes. The rest happens to the whole batch on
the device: one affine warp that resamples the picture (bilinear) and the mask (nearest) once, and
brightness and contrast of the picture.
"""

from dataclasses import dataclass
from enum import IntEnum
from math import cos, exp, log, pi, sin
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shards.sample import IGNORE, Uint8


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How much the training crops are varied."""

    orientation: Literal["any", "upright", "fixed"] = "any"
    """any: mirrored and turned by quarters, for pictures without an up (microscopy, from above).
    upright: mirrored left to right only (street scenes). fixed: neither."""
    rotation: float = 15.0
    """Most degrees that a crop is turned beyond that, either way; 0 is off."""
    scale: float = 1.25
    """Most that a crop is enlarged or reduced, as a factor; 1 is off."""
    warp_share: float = 0.25
    """Share of the crops that are turned and scaled; the others keep their pixels as they are."""
    contrast: float = 1.25
    """Most that contrast is raised or lowered, as a factor; 1 is off."""
    brightness: float = 0.25
    """Most that brightness is shifted, in standard deviations of the data set; 0 is off."""

    def __post_init__(self) -> None:
        if self.scale < 1 or self.contrast < 1:
            raise ValueError("augment.scale and augment.contrast are factors, 1 or more")
        if self.rotation < 0 or self.brightness < 0 or not 0 <= self.warp_share <= 1:
            raise ValueError(
                "augment.rotation and .brightness must be 0 or more, .warp_share a share"
            )


class Purpose(IntEnum):
    """Keeps the random numbers of different uses apart."""

    CROP = 0
    WARP = 1


def uniform(seed: int, position: int, purpose: Purpose, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that belong to one sample of the stream and one purpose."""
    words = np.random.SeedSequence((seed, position, purpose)).generate_state(count, np.uint64)
    return words / 2.0**64


def crop(
    image: Uint8, mask: Uint8, size: int, fill: Uint8, draws: NDArray[np.float64]
) -> tuple[Uint8, Uint8]:
    """A square crop at a place chosen by two draws; what is missing is `fill` and 255.

    Args:
        image: [H, W, C].
        mask: [H, W].
        size: side of the crop in pixels.
        fill: colour [C] around pictures that are smaller.
        draws: two numbers in [0, 1).

    Returns:
        [size, size, C] and [size, size].
    """
    height, width = mask.shape
    top, left = (
        int(d * (max(0, side - size) + 1)) for d, side in zip(draws, (height, width), strict=True)
    )
    image, mask = (
        image[top : top + size, left : left + size],
        mask[top : top + size, left : left + size],
    )
    if mask.shape == (size, size):
        return image, mask
    y, x = ((size - side) // 2 for side in mask.shape)
    whole = np.broadcast_to(fill, (size, size, len(fill))).copy()
    ignored = np.full((size, size), IGNORE, dtype=np.uint8)
    whole[y : y + mask.shape[0], x : x + mask.shape[1]] = image
    ignored[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    return whole, ignored


class Augment:
    """Varies batches on their device."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, image: Tensor, mask: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Vary each sample by its position in the stream.

        Args:
            image: normalised float32 [B, C, H, W].
            mask: uint8 [B, H, W].
            position: int64 [B], on the CPU.

        Returns:
            Picture and mask of the same shapes; outside the crop 0 (the mean) and 255.
        """
        draws = np.stack([uniform(self.seed, p, Purpose.WARP, 8) for p in position.tolist()])
        theta = torch.tensor(np.stack([self.matrix(d) for d in draws]), dtype=torch.float32)
        tone = torch.tensor(np.stack([self.tone(d) for d in draws]), dtype=torch.float32)
        theta, tone = (t.to(image.device, non_blocking=True) for t in (theta, tone))
        grid = F.affine_grid(theta, [*image.shape], align_corners=False)
        image = F.grid_sample(image, grid, mode="bilinear", align_corners=False)
        # Shifted so that the zeros outside become 255.
        shifted = mask[:, None].float() - IGNORE
        warped = F.grid_sample(shifted, grid, mode="nearest", align_corners=False) + IGNORE
        contrast, brightness = tone[:, 0].view(-1, 1, 1, 1), tone[:, 1].view(-1, 1, 1, 1)
        return image * contrast + brightness, warped[:, 0].round().to(torch.uint8)

    def matrix(self, draws: NDArray[np.float64]) -> NDArray[np.float64]:
        """The affine map [2, 3] from warped to original coordinates of one sample."""
        c = self.config
        turns = int(draws[0] * 4) if c.orientation == "any" else 0
        mirror = -1 if draws[1] < 0.5 and c.orientation != "fixed" else 1
        angle, zoom = turns * pi / 2, 1.0
        if draws[2] < c.warp_share:
            angle += (2 * draws[3] - 1) * c.rotation * pi / 180
            zoom = exp((2 * draws[4] - 1) * log(c.scale))
        return np.array(
            [
                [mirror * cos(angle) * zoom, -sin(angle) * zoom, 0],
                [mirror * sin(angle) * zoom, cos(angle) * zoom, 0],
            ]
        )

    def tone(self, draws: NDArray[np.float64]) -> NDArray[np.float64]:
        """Contrast factor and brightness shift of one sample."""
        c = self.config
        return np.array(
            [exp((2 * draws[5] - 1) * log(c.contrast)), (2 * draws[6] - 1) * c.brightness]
        )
