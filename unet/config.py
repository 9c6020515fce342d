"""The architecture of a U-Net, its presets, and the sizes that valid convolutions accept."""

from dataclasses import dataclass
from typing import get_args

from unet.blocks import Activation, Norm, Padding, Upsampling
from unet.encoder import EncoderConfig
from unet.spec import MIRRORS

MAX_CHANNELS = 16_384
"""Limit for the bottom level, so that an untrusted config.json cannot exhaust memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Architecture of a U-Net."""

    in_channels: int = 3
    """Channels of the image: 1 (greyscale) or 3 (RGB)."""
    num_classes: int = 2
    """Number of classes including background: channels of the logits."""
    base_channels: int = 64
    """Channels of the first level; doubled at each level below."""
    depth: int = 4
    """Number of times the image is downsampled by 2."""
    padding: Padding = "same"
    """same: logits as large as the image. valid: unpadded convolutions, as in the U-Net paper."""
    norm: Norm = "instance"
    """Normalisation after each 3x3 convolution. Instance and group norm do not depend on batch or
    rank; instance norm learns faster (tests/benchmarks)."""
    activation: Activation = "relu"
    """Nonlinearity after each norm."""
    up: Upsampling = "transpose"
    """Upsampling in the expanding path: a 2x2 transposed convolution, or bilinear interpolation
    with a 1x1 convolution."""
    dropout: float = 0.0
    """Dropout probability in the last two levels of the contracting path, in training."""
    deep_supervision: bool = False
    """In training, also predict from each coarser level of the expanding path, so that the loss
    reaches the deep levels directly (Lee et al. 2015, "Deeply-Supervised Nets")."""
    encoder: EncoderConfig | None = None
    """Backbone that replaces the contracting path from its first feature map on; `depth` is then
    its own. Above it, double convolutions on the image keep borders sharp."""

    def __post_init__(self) -> None:
        for name, known in (
            ("padding", Padding),
            ("norm", Norm),
            ("activation", Activation),
            ("up", Upsampling),
        ):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}")
        for name, minimum in (
            ("in_channels", 1),
            ("num_classes", 2),
            ("base_channels", 1),
            ("depth", 1),
        ):
            got = getattr(self, name)
            if type(got) is not int:
                raise ValueError(f"{name} must be an integer, got {got!r}")
            if got < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {got}")
            if got > MAX_CHANNELS:
                raise ValueError(f"{name} must be at most {MAX_CHANNELS:,}, got {got}")
        if self.num_classes > 255:
            raise ValueError(f"num_classes must be at most 255, got {self.num_classes}")
        if self.depth > 16 or self.base_channels * 2**self.depth > MAX_CHANNELS:
            raise ValueError(
                f"base_channels {self.base_channels} and depth {self.depth} exceed "
                f"{MAX_CHANNELS:,} channels"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.deep_supervision and self.padding == "valid":
            raise ValueError("deep_supervision must be off with padding valid")
        if self.encoder is not None:
            self.require_encoder(self.encoder)

    def require_encoder(self, encoder: EncoderConfig) -> None:
        """Raise ValueError if a field contradicts the encoder."""
        if self.padding != "same" or self.dropout:
            raise ValueError("with an encoder, padding must be same and dropout 0")
        for name, got, own in (
            ("depth", self.depth, encoder.depth),
            ("in_channels", self.in_channels, encoder.backbone.get("num_channels")),
        ):
            if got != own:
                raise ValueError(f"{name} must be {own}, as the encoder has it, got {got}")
        if max(encoder.channels) > MAX_CHANNELS:
            raise ValueError(f"encoder.channels must be at most {MAX_CHANNELS:,}")

    @property
    def margin(self) -> int:
        """Pixels that the logits lack on each side of the image: 92 in the paper."""
        return 6 * 2**self.depth - 4 if self.padding == "valid" else 0

    @property
    def multiple(self) -> int:
        """Factor by which the contracting path downsamples: 2^depth."""
        return 2**self.depth

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """All flips: those that a model was trained with are in its data spec."""
        return MIRRORS["any"]

    def require_side(self, side: int) -> None:
        """Raise ValueError with the nearest valid sizes if the network cannot take this side."""
        if self.padding == "same":
            return
        fitting = valid_input(side - 2 * self.margin, self.depth)
        if side != fitting:
            step = 2**self.depth
            below = max(fitting - step, valid_input(1, self.depth))
            raise ValueError(
                f"padding valid requires sides of {4 * (2 * step - 1)} + {step}b pixels, "
                f"got {side}; the nearest are {below} and {below + step}"
            )


PRESETS: dict[str, UNetConfig] = {
    "modern": UNetConfig(),
    "paper": UNetConfig(padding="valid", norm="none", dropout=0.5),
    "small": UNetConfig(base_channels=16),
}
"""`modern`: 31 M parameters, padded, normalised. `paper`: as of 2015. `small`: for laptops."""


def valid_input(output: int, depth: int) -> int:
    """Return the side of the smallest image for which valid convolutions yield `output` pixels.

    Valid sizes are 2^depth b + 4 (2^(depth+1) - 1) -> 2^depth b - 4 (2^depth - 1) pixels; for depth
    4, 16 b + 124 -> 16 b - 60: 188 -> 4, 204 -> 20, ..., 572 -> 388, 588 -> 404.
    """
    step = 2**depth
    minimum = 3 if depth == 1 else 4
    b = max(minimum, -(-(output + 4 * (step - 1)) // step))
    return step * b + 4 * (2 * step - 1)
