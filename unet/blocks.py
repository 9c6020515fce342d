"""Building blocks of the U-Net: double convolution, downsampling and upsampling steps.

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation"
(2015), figure 1. Shapes: B batch, C channels, H height, W width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["same", "valid"]
Norm = Literal["group", "batch", "instance", "none"]
Activation = Literal["relu", "leaky_relu", "silu"]
Upsampling = Literal["transpose", "bilinear"]

GROUP_CHANNELS = 8
"""Target number of channels per group; the number of groups must divide the channels."""


class InstanceNorm(nn.InstanceNorm2d):
    """Instance norm, computed on CPUs as group norm with one channel per group: 4 times as fast.

    Not on GPUs, where autocast runs group norm in float32 at twice the memory, and not in
    channels_last, where torch's kernel computes the variance as a difference of squares and loses
    digits.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        if input.device.type != "cpu" or not input.is_contiguous():
            return super().forward(input)
        return F.group_norm(input, self.num_features, self.weight, self.bias, self.eps)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Make the normalisation layer for a map [B, channels, H, W].

    Instance and group norm are independent of batch and rank: a sample has the same gradient on one
    GPU as on sixty-four.
    """
    match norm:
        case "group":
            max_groups = max(1, channels // GROUP_CHANNELS)
            num_groups = next(n for n in range(max_groups, 0, -1) if channels % n == 0)
            return nn.GroupNorm(num_groups, channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "instance":
            return InstanceNorm(channels, affine=True)
        case "none":
            return nn.Identity()


def make_activation(activation: Activation) -> nn.Module:
    """Make the activation layer, computed in place."""
    match activation:
        case "relu":
            return nn.ReLU(inplace=True)
        case "leaky_relu":
            return nn.LeakyReLU(0.01, inplace=True)
        case "silu":
            return nn.SiLU(inplace=True)


def make_upsampling(up: Upsampling, in_channels: int, out_channels: int) -> nn.Module:
    """Make the layer [B, in_channels, H, W] -> [B, out_channels, 2H, 2W]."""
    match up:
        case "transpose":
            return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        case "bilinear":
            # 1x1 convolution and interpolation commute; in this order they cost a quarter.
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1),
                nn.Upsample(scale_factor=2, mode="bilinear"),
            )


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """Settings shared by all convolutions of a network."""

    padding: Padding
    """`same` keeps the size of the map, `valid` removes a pixel on each side."""
    norm: Norm
    """Normalisation after each convolution."""
    activation: Activation
    """Activation after each norm."""


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each followed by its norm and activation; dropout at the end.

    [B, in_channels, H, W] -> [B, out_channels, H, W], or H-4, W-4 with `valid` padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: ConvConfig, *, dropout: float = 0.0
    ) -> None:
        pad = 1 if config.padding == "same" else 0
        # The mean subtracted by the norm would cancel the bias.
        bias = config.norm == "none"
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=pad, bias=bias),
            make_norm(config.norm, out_channels),
            make_activation(config.activation),
            nn.Conv2d(out_channels, out_channels, 3, padding=pad, bias=bias),
            make_norm(config.norm, out_channels),
            make_activation(config.activation),
            *([nn.Dropout(dropout)] if dropout else []),
        )


class Down(nn.Module):
    """One step of the contracting path: double convolution, then 2x2 max pooling."""

    def __init__(
        self, in_channels: int, out_channels: int, config: ConvConfig, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels, config, dropout=dropout)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in, H, W] -> skip [B, out, H, W] and pooled map [B, out, H/2, W/2]."""
        skip = self.conv(x)
        return skip, self.pool(skip)


class Up(nn.Module):
    """One step of the expanding path: upsample, concatenate the skip, double convolution."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        config: ConvConfig,
        *,
        up: Upsampling,
    ) -> None:
        super().__init__()
        self.up = make_upsampling(up, in_channels, out_channels)
        self.conv = DoubleConv(skip_channels + out_channels, out_channels, config)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, in, H, W] and skip [B, skip, >= 2H, >= 2W] -> [B, out, 2H, 2W] (`valid`: 4 less)."""
        x = self.up(x)
        return self.conv(torch.cat([centre_crop(skip, x.shape[-2:]), x], dim=1))


def centre_crop(x: Tensor, size: torch.Size) -> Tensor:
    """Crop the centre [..., *size] of x [..., H, W]; returns x if it already has that size."""
    if x.shape[-2:] == size:
        return x
    top, left = ((x.shape[i] - size[i]) // 2 for i in (-2, -1))
    return x[..., top : top + size[0], left : left + size[1]]
