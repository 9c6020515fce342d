"""Augmentation, seeded per sample by (seed, position): the same on any rank, worker or resume.

Which part of an image is seen, and how large, is decided where it is decoded, before anything is
converted. The rest happens to the whole batch on the device: one warp (mirror, quarter turns,
rotation, elastic) that resamples the image (bilinear) and the mask (nearest) once, and contrast,
brightness and saturation of the picture.
"""

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from math import cos, exp, log, pi, sin, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shards.sample import IGNORE

NODES = 3
"""Nodes on each side of the grid of elastic displacements, as in the U-Net paper (section 3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How much the training crops are varied."""

    foreground_share: float = 1 / 3
    """Share of the crops that are centred on a pixel of a class other than the commonest one, each
    class that the image holds as often as the others."""
    scale: float = 1.25
    """Most that what a crop shows is larger or smaller than the crop, as a factor; 1 is off."""
    orientation: Literal["any", "upright", "fixed"] = "any"
    """any: mirrored and turned by quarters, for images without an up (microscopy, from above).
    upright: mirrored left to right only (street scenes). fixed: neither."""
    rotation: float = 15.0
    """Most degrees that a crop is turned beyond that, either way; 0 is off."""
    elastic: float = 0.0
    """Standard deviation in pixels of the displacements of a 3 x 3 grid, bicubic between its nodes
    (10 in the paper of 2015); 0 is off."""
    warp_share: float = 0.25
    """Share of the crops that are scaled, and share that are turned and displaced; the others keep
    their pixels as they are."""
    contrast: float = 1.25
    """Most that contrast is raised or lowered, as a factor; 1 is off."""
    brightness: float = 0.25
    """Most that brightness is shifted, in standard deviations of the data set; 0 is off."""
    saturation: float = 1.25
    """Most that the colours of RGB images are raised or lowered, as a factor; 1 is off."""

    def __post_init__(self) -> None:
        for name in ("scale", "contrast", "saturation"):
            if getattr(self, name) < 1:
                raise ValueError(f"augment.{name} is a factor, 1 or more")
        for name in ("rotation", "brightness", "elastic"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must be 0 or more")
        for name in ("warp_share", "foreground_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a share, 0 to 1")


class Purpose(IntEnum):
    """Keeps the random numbers of different uses apart."""

    CROP = 0
    WARP = 1
    FOREGROUND = 2


def uniform(seed: int, position: int, purpose: Purpose, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that belong to one sample of the stream and one purpose."""
    # A hash is the same everywhere and for ever, and takes a tenth of numpy's SeedSequence.
    words = hashlib.shake_128(f"{seed} {position} {int(purpose)}".encode()).digest(8 * count)
    return np.frombuffer(words, dtype="<u8") / 2.0**64


def factor(draw: float, most: float) -> float:
    """A number from 1 / most to most, as often above 1 as below."""
    return exp((2 * draw - 1) * log(most))


class Augment:
    """Varies batches on their device."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(
        self, image: Tensor, mask: Tensor, position: Tensor, border: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vary each sample by its position in the stream.

        Args:
            image: normalised float32 [B, C, H, W].
            mask: uint8 [B, H, W].
            position: int64 [B], on the CPU.
            border: uint8 [B, H, W], where there are border maps.

        Returns:
            Image and mask of the same shapes, the border map as float32, all warped alike; outside
            the crop 0 (the mean), 255 and 0.
        """
        numbers = self.numbers(self.draws(position), image)
        grid = self.grid(numbers, image)
        image = F.grid_sample(image, grid, mode="bilinear", align_corners=False)
        # Shifted so that the zeros outside become 255.
        shifted = mask[:, None].float() - IGNORE
        moved = F.grid_sample(shifted, grid, mode="nearest", align_corners=False) + IGNORE
        if border is not None:
            planes = border[:, None].float()
            border = F.grid_sample(planes, grid, mode="bilinear", align_corners=False)[:, 0]
        return self.coloured(image, numbers.tone), moved[:, 0].round().to(torch.uint8), border

    def draws(self, position: Tensor) -> NDArray[np.float64]:
        """The random numbers of each sample [B, 26]."""
        count = 8 + 2 * NODES * NODES
        return np.stack([uniform(self.seed, p, Purpose.WARP, count) for p in position.tolist()])

    def numbers(self, draws: NDArray[np.float64], image: Tensor) -> "Numbers":
        """What draws [B, 26] mean for images [B, C, H, W], on their device."""
        warped = draws[:, 2] < self.config.warp_share
        theta = np.stack([self.matrix(d) for d in draws])
        parts = [theta, np.array([self.tone(d) for d in draws])]
        if self.config.elastic and warped.any():
            parts.append(self.displacements(draws[:, 8:] * 2 - 1, warped, image))
        # One copy for all of them, queued behind what the device is doing: the host goes on.
        flat = torch.from_numpy(np.concatenate([p.ravel() for p in parts]).astype(np.float32))
        if image.device.type == "cuda":
            flat = flat.pin_memory()
        flat = flat.to(image.device, non_blocking=image.device.type == "cuda")
        found = [
            part.view(like.shape)
            for part, like in zip(flat.split([p.size for p in parts]), parts, strict=True)
        ]
        return Numbers(found[0], found[1], found[2] if len(found) > 2 else None)

    def grid(self, numbers: "Numbers", image: Tensor) -> Tensor:
        """Where each pixel of the warped images [B, C, H, W] comes from: [B, H, W, 2]."""
        grid = F.affine_grid(numbers.theta, [*image.shape], align_corners=False)
        if numbers.nodes is None:
            return grid
        field = F.interpolate(numbers.nodes, image.shape[-2:], mode="bicubic", align_corners=True)
        return grid + field.permute(0, 2, 3, 1)

    def matrix(self, draws: NDArray[np.float64]) -> NDArray[np.float64]:
        """The affine map [2, 3] from warped to original coordinates of one sample."""
        c = self.config
        turns = int(draws[0] * 4) if c.orientation == "any" else 0
        mirror = -1 if draws[1] < 0.5 and c.orientation != "fixed" else 1
        angle = turns * pi / 2
        if draws[2] < c.warp_share:
            angle += (2 * draws[3] - 1) * c.rotation * pi / 180
        return np.array(
            [[mirror * cos(angle), -sin(angle), 0], [mirror * sin(angle), cos(angle), 0]]
        )

    def tone(self, draws: NDArray[np.float64]) -> tuple[float, float, float]:
        """Contrast, brightness and saturation of one sample."""
        c = self.config
        contrast, brightness = factor(draws[5], c.contrast), (2 * draws[6] - 1) * c.brightness
        return contrast, brightness, factor(draws[7], c.saturation)

    def displacements(
        self, draws: NDArray[np.float64], warped: NDArray[np.bool_], image: Tensor
    ) -> NDArray[np.float64]:
        """Displacements of the nodes [B, 2, 3, 3] in half sides; `draws`: [B, 18] in -1 to 1."""
        height, width = image.shape[-2:]
        # Uniform, not normal: no rare draw folds a crop of 128 pixels or more over itself.
        pixels = draws.reshape(-1, 2, NODES, NODES) * (sqrt(3) * self.config.elastic)
        sides = np.array([width, height])[:, None, None]
        return 2 * pixels / sides * warped[:, None, None, None]

    def coloured(self, image: Tensor, tone: Tensor) -> Tensor:
        """Images with another contrast, brightness and, in RGB, saturation; tone: [B, 3]."""
        contrast, brightness, saturation = tone.view(-1, 3, 1, 1, 1).unbind(1)
        if image.shape[1] == 3 and self.config.saturation > 1:
            grey = image.mean(dim=1, keepdim=True)
            image = torch.lerp(grey, image, saturation)
        return image * contrast + brightness


class Numbers(NamedTuple):
    """How the samples of a batch are varied, on their device."""

    theta: Tensor
    """Affine maps [B, 2, 3] from warped to original coordinates."""
    tone: Tensor
    """Contrast, brightness and saturation [B, 3]."""
    nodes: Tensor | None
    """Elastic displacements [B, 2, 3, 3] of the nodes, in half sides; None: no sample has any."""
