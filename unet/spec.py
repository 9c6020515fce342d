"""The data spec of a model: classes, channels and normalisation of its training data."""

from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

Orientation = Literal["any", "upright", "fixed"]
"""any: images have no upper side (microscopy, aerial). upright: they have one (street scenes).
fixed: mirrored images do not occur either."""
MIRRORS: dict[Orientation, tuple[tuple[int, ...], ...]] = {
    "any": ((-1,), (-2,), (-2, -1)),
    "upright": ((-1,),),
    "fixed": (),
}
"""Dimensions of [..., H, W] to flip for each mirror image that test-time augmentation adds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Description of the training data, saved with the weights."""

    classes: tuple[str, ...]
    """Class names by index."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour of each class, 0-255."""
    channels: Literal["L", "RGB"]
    """Pillow mode to which images are converted before normalisation."""
    mean: tuple[float, ...]
    """Mean of each channel over the training images, pixels in 0-1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, pixels in 0-1."""
    crop_size: int
    """Side of the square training crops, in pixels."""
    image_range: tuple[int, int] | None = None
    """Values of 16-bit images that are mapped to 0 and 255; None: 8-bit images only."""
    alpha: Literal["refuse", "drop"] = "refuse"
    """Images with transparent pixels are refused, or used without their alpha channel."""
    max_pixels: int = 1_000_000_000
    """Images that declare more pixels are refused."""
    exif: Literal["upright", "ignore"] = "upright"
    """Files with an EXIF orientation are rotated upright, or not."""
    frame: int | None = None
    """Index of the frame of files with several; None: they are refused."""
    resize: int | None = None
    """Pixels that the longer side of a file is scaled down to; None: it keeps its size."""
    orientation: Orientation = "any"
    """Flips that the training images were augmented with: all and quarter turns, horizontal only,
    or none. Test-time augmentation uses the same."""

    def __post_init__(self) -> None:
        channels = {"L": 1, "RGB": 3}[self.channels]
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{len(self.palette)} palette colours, {len(self.classes)} classes")
        if any(not 0 <= level <= 255 for colour in self.palette for level in colour):
            raise ValueError("palette levels must be in 0-255")
        for name, values, lowest in (("mean", self.mean, 0.0), ("std", self.std, 1e-9)):
            fits = all(isfinite(value) and lowest <= value <= 1 for value in values)
            if len(values) != channels or not fits:
                expected = f"{channels} numbers from {lowest:g} to 1"
                raise ValueError(f"{name} {list(values)}; expected {expected}")
        if self.orientation not in MIRRORS:
            known = ", ".join(MIRRORS)
            raise ValueError(f"orientation must be one of {known}, got {self.orientation!r}")
        if self.crop_size < 1:
            raise ValueError(f"crop_size must be at least 1, got {self.crop_size}")
        if self.image_range is not None and not 0 <= self.image_range[0] < self.image_range[1]:
            raise ValueError(f"image_range {list(self.image_range)}; expected 0 <= low < high")

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Dimensions to flip for each mirror image of test-time augmentation."""
        return MIRRORS[self.orientation]

    @property
    def counted(self) -> tuple[int, ...]:
        """Indices of the classes that enter losses and mean scores: all except `background`."""
        return counted_classes(self.classes)

    def normalise(self, image: Tensor) -> Tensor:
        """Normalise uint8 [B, C, H, W] to float32, mean 0 and deviation 1 over the data set."""
        # A traced graph owns its constants, and fake tensors of tracing must not be cached.
        build = make_pixel_scale if torch.compiler.is_compiling() else pixel_scale
        mean, std = build(self.mean, self.std, image.device)
        # In place: on a CPU, allocating memory takes longer than arithmetic.
        pixels = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return pixels.sub_(mean).div_(std)


def make_pixel_scale(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Convert mean and deviation to pixels in 0-255: float32 [1, C, 1, 1] each, on a device."""
    # Tensors created in inference mode could not be used in training.
    with torch.inference_mode(False):
        shift, scale = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) * 255 for values in (mean, std)
        )
        return shift, scale.clamp(min=1e-3)


pixel_scale = lru_cache(maxsize=64)(make_pixel_scale)
"""Cached `make_pixel_scale`: a copy per batch would make the host wait for the GPU."""


def counted_classes(classes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the indices of the classes that enter losses and mean scores: not `background`."""
    return tuple(i for i, name in enumerate(classes) if name.lower() != "background")
