"""The three parts of a U-Net: the double convolution, the step down, the step up.

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation"
(2015), figure 1. Shapes: B batch, C channels, H height, W width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Padding = Literal["same", "valid"]
Norm = Literal["group", "batch", "instance", "none"]

GROUP_CHANNELS = 8
"""Channels that group norm averages together, or the next number that divides the layer."""


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Normalisation of a map [B, channels, H, W].

    Instance and group norm depend on neither the batch nor the rank: the same sample gives the same
    gradient on one GPU and on sixty-four.
    """
    match norm:
        case "group":
            most = max(1, channels // GROUP_CHANNELS)
            num_groups = next(n for n in range(most, 0, -1) if channels % n == 0)
            return nn.GroupNorm(num_groups, channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "instance":
            return nn.InstanceNorm2d(channels, affine=True)
        case "none":
            return nn.Identity()


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each followed by its norm and a ReLU.

    [B, in_channels, H, W] -> [B, out_channels, H, W], or H-4, W-4 with `valid` padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, padding: Padding, norm: Norm
    ) -> None:
        pad = 1 if padding == "same" else 0
        # A convolution's bias is removed again by the mean that a norm subtracts.
        bias = norm == "none"
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=pad, bias=bias),
            make_norm(norm, out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=pad, bias=bias),
            make_norm(norm, out_channels),
            nn.ReLU(inplace=True),
        )


class Down(nn.Module):
    """One step of the contracting path: the double convolution, then its map at half the size."""

    def __init__(
        self, in_channels: int, out_channels: int, *, padding: Padding, norm: Norm
    ) -> None:
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels, padding=padding, norm=norm)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in, H, W] -> the skip [B, out, H, W] and the pooled map [B, out, H/2, W/2]."""
        skip = self.conv(x)
        return skip, self.pool(skip)


class Up(nn.Module):
    """One step of the expanding path: up-convolution, the skip beside it, double convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, *, padding: Padding, norm: Norm
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv = DoubleConv(2 * out_channels, out_channels, padding=padding, norm=norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, in, H, W], skip [B, out, 2H, 2W] or larger -> [B, out, 2H, 2W] (`valid`: 4 less)."""
        x = self.up(x)
        return self.conv(torch.cat([centre_crop(skip, x.shape[-2:]), x], dim=1))


def centre_crop(x: Tensor, size: torch.Size) -> Tensor:
    """The middle [..., *size] of x [..., H, W]; x itself where the size already fits."""
    if x.shape[-2:] == size:
        return x
    top, left = ((x.shape[i] - size[i]) // 2 for i in (-2, -1))
    return x[..., top : top + size[0], left : left + size[1]]
