"""Augmentation, seeded per sample by (seed, position): independent of ranks, workers and resumes.

Crop and scale are chosen where an image is decoded (see `crop`), before it is converted. All else
runs on the device for a whole batch: one warp (flips, quarter turns, rotation, elastic) that
resamples images (bilinear) and masks (nearest) once, then contrast, brightness and saturation.
"""

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from math import cos, exp, log, pi, sin, sqrt
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.runtime.errors import UsageError
from pipelines.runtime.yaml_flags import refuse_unused
from shards.sample import IGNORE
from unet.spec import Orientation

NODES = 3
"""Nodes per side of the grid of elastic displacements, as in the U-Net paper (section 3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of the training crops."""

    foreground_share: float = 1 / 3
    """Share of crops centred on a pixel of a class other than the most common one; the classes in
    the image are equally likely."""
    scale: float = 1.25
    """Maximum factor by which crops are scaled up or down; 1: off."""
    orientation: Orientation = "any"
    """any: flips and quarter turns, for images without an upright orientation (microscopy, aerial).
    upright: horizontal flips only (street scenes). fixed: neither."""
    rotation: float = 15.0
    """Maximum further rotation in degrees, in either direction; 0: off."""
    elastic: float = 0.0
    """Standard deviation in pixels of the displacements on a 3 x 3 grid, with bicubic interpolation
    (10 in the U-Net paper); 0: off."""
    warp_share: float = 0.25
    """Share of crops that are scaled, and share that are rotated and displaced; the others are not
    resampled."""
    contrast: float = 1.25
    """Maximum factor by which contrast is raised or lowered; 1: off."""
    brightness: float = 0.25
    """Maximum shift of brightness, in standard deviations of the data set; 0: off."""
    saturation: float = 1.25
    """Maximum factor by which the saturation of RGB images is raised or lowered; 1: off."""

    def __post_init__(self) -> None:
        for name in ("scale", "contrast", "saturation"):
            if getattr(self, name) < 1:
                raise ValueError(f"--augment.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("rotation", "brightness", "elastic"):
            if getattr(self, name) < 0:
                raise ValueError(f"--augment.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("warp_share", "foreground_share"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--augment.{flag} must be in [0, 1], got {getattr(self, name)}")
        if (self.scale, self.rotation, self.elastic) == (1, 0, 0):
            reason = (
                "has no effect: --augment.scale, --augment.rotation and --augment.elastic are off"
            )
            refuse_unused(self, reason, "warp_share", prefix="augment.")

    def refuse_for_grey(self, channels: str) -> None:
        """Raise UsageError for settings of colour if the images are grey."""
        if channels == "L" and self.saturation not in (1, AugmentConfig().saturation):
            raise UsageError(
                f"--augment.saturation {self.saturation:g}: has no effect on grey images; remove it"
            )


class Purpose(IntEnum):
    """Seed word that makes the random numbers of different uses independent."""

    CROP = 0
    WARP = 1
    FOREGROUND = 2


def uniform(seed: int, position: int, purpose: Purpose, count: int) -> NDArray[np.float64]:
    """Draw float64 numbers [count] in [0, 1) for one sample of the stream and one purpose."""
    # A hash is identical on every platform and version, and ten times as fast as SeedSequence.
    words = hashlib.shake_128(f"{seed} {position} {int(purpose)}".encode()).digest(8 * count)
    return np.frombuffer(words, dtype="<u8") / 2.0**64


def draw_factor(draw: float, limit: float) -> float:
    """Map a draw in [0, 1) to [1 / limit, limit), uniform in the logarithm."""
    return exp((2 * draw - 1) * log(limit))


class Augment:
    """Augments batches on their device."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(
        self, image: Tensor, mask: Tensor, position: Tensor, border: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augment each sample with random numbers that depend on its position in the stream.

        Args:
            image: normalised float32 [B, C, H, W].
            mask: uint8 [B, H, W].
            position: int64 [B], on the CPU.
            border: border maps uint8 [B, H, W]; None: there are none.

        Returns:
            Image float32 [B, C, H, W], mask uint8 [B, H, W] and border map float32 [B, H, W], all
            warped alike; outside the crop they are 0 (the mean), 255 and 0.
        """
        parameters = self.make_parameters(self.draw_numbers(position), image)
        grid = self.make_grid(parameters, image)
        image = F.grid_sample(image, grid, mode="bilinear", align_corners=False)
        # Shifted, since grid_sample fills with zeros and pixels outside the crop must become 255.
        shifted = mask[:, None].float() - IGNORE
        moved = F.grid_sample(shifted, grid, mode="nearest", align_corners=False) + IGNORE
        if border is not None:
            planes = border[:, None].float()
            border = F.grid_sample(planes, grid, mode="bilinear", align_corners=False)[:, 0]
        return self.adjust_tone(image, parameters.tone), moved[:, 0].round().to(torch.uint8), border

    def draw_numbers(self, position: Tensor) -> NDArray[np.float64]:
        """Draw the random numbers of each sample, [B, 26] in [0, 1)."""
        count = 8 + 2 * NODES * NODES
        return np.stack([uniform(self.seed, p, Purpose.WARP, count) for p in position.tolist()])

    def make_parameters(self, draws: NDArray[np.float64], image: Tensor) -> "Parameters":
        """Convert draws [B, 26] to parameters for images [B, C, H, W], on their device."""
        warped = draws[:, 2] < self.config.warp_share
        theta = np.stack([self.make_matrix(d) for d in draws])
        parts = [theta, np.array([self.make_tone(d) for d in draws])]
        if self.config.elastic and warped.any():
            parts.append(self.make_displacements(draws[:, 8:] * 2 - 1, warped, image))
        # One asynchronous copy for all parameters: the host does not wait for the device.
        flat = torch.from_numpy(np.concatenate([p.ravel() for p in parts]).astype(np.float32))
        if image.device.type == "cuda":
            flat = flat.pin_memory()
        flat = flat.to(image.device, non_blocking=image.device.type == "cuda")
        tensors = [
            part.view(like.shape)
            for part, like in zip(flat.split([p.size for p in parts]), parts, strict=True)
        ]
        return Parameters(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None)

    def make_grid(self, parameters: "Parameters", image: Tensor) -> Tensor:
        """Make the grid [B, H, W, 2] for `grid_sample` of images [B, C, H, W]."""
        grid = F.affine_grid(parameters.theta, [*image.shape], align_corners=False)
        if parameters.nodes is None:
            return grid
        field = F.interpolate(
            parameters.nodes, image.shape[-2:], mode="bicubic", align_corners=True
        )
        return grid + field.permute(0, 2, 3, 1)

    def make_matrix(self, draws: NDArray[np.float64]) -> NDArray[np.float64]:
        """Make the affine map [2, 3] from warped to original coordinates of one sample."""
        c = self.config
        turns = int(draws[0] * 4) if c.orientation == "any" else 0
        mirror = -1 if draws[1] < 0.5 and c.orientation != "fixed" else 1
        angle = turns * pi / 2
        if draws[2] < c.warp_share:
            angle += (2 * draws[3] - 1) * c.rotation * pi / 180
        return np.array(
            [[mirror * cos(angle), -sin(angle), 0], [mirror * sin(angle), cos(angle), 0]]
        )

    def make_tone(self, draws: NDArray[np.float64]) -> tuple[float, float, float]:
        """Return contrast, brightness and saturation of one sample."""
        c = self.config
        contrast = draw_factor(draws[5], c.contrast)
        brightness = (2 * draws[6] - 1) * c.brightness
        return contrast, brightness, draw_factor(draws[7], c.saturation)

    def make_displacements(
        self, draws: NDArray[np.float64], warped: NDArray[np.bool_], image: Tensor
    ) -> NDArray[np.float64]:
        """Make node displacements [B, 2, 3, 3] in half sides from draws [B, 18] in [-1, 1).

        Samples that are not `warped` [B] get 0.
        """
        height, width = image.shape[-2:]
        # Uniform rather than normal: no outlier folds a crop of 128 pixels or more over itself.
        pixels = draws.reshape(-1, 2, NODES, NODES) * (sqrt(3) * self.config.elastic)
        sides = np.array([width, height])[:, None, None]
        return 2 * pixels / sides * warped[:, None, None, None]

    def adjust_tone(self, image: Tensor, tone: Tensor) -> Tensor:
        """Adjust contrast, brightness and, for RGB, saturation of [B, C, H, W]; tone: [B, 3]."""
        contrast, brightness, saturation = tone.view(-1, 3, 1, 1, 1).unbind(1)
        if image.shape[1] == 3 and self.config.saturation > 1:
            grey = image.mean(dim=1, keepdim=True)
            image = torch.lerp(grey, image, saturation)
        return image * contrast + brightness


class Parameters(NamedTuple):
    """Parameters of the augmentation of a batch, on its device."""

    theta: Tensor
    """Affine maps [B, 2, 3] from warped to original coordinates."""
    tone: Tensor
    """Contrast, brightness and saturation [B, 3]."""
    nodes: Tensor | None
    """Elastic displacements [B, 2, 3, 3] of the nodes, in half sides; None: all are 0."""
