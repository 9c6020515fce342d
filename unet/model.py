"""The U-Net: blocks put together, its presets, and what it must know about its data."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from unet import weights
from unet.blocks import DoubleConv, Down, Norm, Padding, Up

MAX_CHANNELS = 65_536
"""A config.json from elsewhere may not ask for more at the bottom than any machine holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Everything that decides the shape of a U-Net."""

    in_channels: int = 3
    """Channels of the picture: 1 (grey) or 3 (RGB)."""
    num_classes: int = 2
    """Classes, background included: channels of the logits."""
    base_channels: int = 64
    """Channels of the first level; each level down has twice as many."""
    depth: int = 4
    """How many times the picture is halved."""
    padding: Padding = "same"
    """`same`: logits as large as the picture. `valid`: convolutions without padding, as in 2015."""
    norm: Norm = "instance"
    """Normalisation after each 3x3 convolution. Instance and group norm depend on neither the batch
    nor the rank; instance norm learns faster (tests/benchmarks)."""
    dropout: float = 0.0
    """Share of channels dropped at the end of the contracting path while training."""

    def __post_init__(self) -> None:
        for name, known in (("padding", Padding), ("norm", Norm)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}")
        for name, least in (
            ("in_channels", 1),
            ("num_classes", 2),
            ("base_channels", 1),
            ("depth", 1),
        ):
            got = getattr(self, name)
            if not isinstance(got, int):
                raise ValueError(f"{name} must be a whole number, got {got!r}")
            if got < least:
                raise ValueError(f"{name} must be at least {least}, got {got}")
        if self.num_classes > 255:
            raise ValueError(f"num_classes must be at most 255, got {self.num_classes}")
        if self.base_channels * 2**self.depth > MAX_CHANNELS:
            raise ValueError(
                f"base_channels {self.base_channels} and depth {self.depth} make more than "
                f"{MAX_CHANNELS:,} channels"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


PRESETS: dict[str, UNetConfig] = {
    "modern": UNetConfig(),
    "paper": UNetConfig(padding="valid", norm="none", dropout=0.5),
    "small": UNetConfig(base_channels=16),
}
"""`modern`: 31 M parameters, padded, normed. `paper`: that of 2015. `small`: for laptops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What the weights know of the data they were trained on; it travels with them."""

    classes: tuple[str, ...]
    """Class names by index."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB colour of each class, 0-255."""
    channels: Literal["L", "RGB"]
    """What a picture is converted to before it is normalised."""
    mean: tuple[float, ...]
    """Mean of each channel over the training pictures, pixels in 0-1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, pixels in 0-1."""
    crop_size: int
    """Side of the square training crops, in pixels."""
    image_range: tuple[int, int] | None = None
    """Values of 16-bit pictures that become 0 and 255; None: it knows 8-bit pictures only."""
    alpha: Literal["refuse", "drop"] = "refuse"
    """Whether pictures with transparent pixels are taken, in their colours."""

    @property
    def counted(self) -> tuple[int, ...]:
        """Classes that enter loss and mean scores: all but one that is called `background`."""
        return counted_classes(self.classes)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, C, H, W], mean 0 and deviation 1 over the data set."""
        mean = torch.tensor(self.mean, device=image.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=image.device).view(1, -1, 1, 1) * 255
        return (image.float() - mean) / std.clamp(min=1e-3)


def counted_classes(classes: tuple[str, ...]) -> tuple[int, ...]:
    """Indices of the classes that enter loss and mean scores: all but one called `background`."""
    return tuple(i for i, name in enumerate(classes) if name.lower() != "background")


class UNet(nn.Module, ModelHubMixin):
    """A U-Net for pictures [B, in_channels, H, W] of any H and W from 1 pixel up (padding `same`).

    With padding `valid` H and W must be 2^depth * b + 4 * (2^(depth+1) - 1), for depth 4:
    16 b + 124 -> 16 b - 60, of which 572 -> 388 is the paper's.
    """

    def __init__(self, config: UNetConfig, spec: DataSpec | None = None) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        channels = [config.base_channels * 2**level for level in range(config.depth + 1)]
        kind: dict[str, Any] = {"padding": config.padding, "norm": config.norm}
        self.downs = nn.ModuleList(
            Down(c_in, c_out, **kind)
            for c_in, c_out in zip([config.in_channels, *channels], channels[:-1], strict=False)
        )
        self.bottom = DoubleConv(channels[-2], channels[-1], **kind)
        self.dropout = nn.Dropout2d(config.dropout)
        self.ups = nn.ModuleList(
            Up(channels[level + 1], channels[level], **kind)
            for level in reversed(range(config.depth))
        )
        self.head = nn.Conv2d(channels[0], config.num_classes, 1)
        self.apply(he_init)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        in_channels: int,
        num_classes: int,
        spec: DataSpec | None = None,
        **changes: Any,
    ) -> "UNet":
        """The preset `name` for this data; `changes` are fields of `UNetConfig`."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        config = replace(PRESETS[name], in_channels=in_channels, num_classes=num_classes, **changes)
        return cls(config, spec)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised pictures [B, in_channels, H, W] -> logits [B, num_classes, H', W'].

        H', W' are H, W with padding `same`; 12 * 2^depth - 8 less with `valid` (572 -> 388).
        """
        height, width = image.shape[-2:]
        x = self.pad(image) if self.config.padding == "same" else self.require_valid_size(image)
        skips: list[Tensor] = []
        for down in self.downs:
            skip, x = down(x)
            skips.append(skip)
        x = self.dropout(self.bottom(x))
        for up in self.ups:
            x = up(x, skips.pop())
        logits = self.head(x)
        return logits[..., :height, :width] if self.config.padding == "same" else logits

    def pad(self, image: Tensor) -> Tensor:
        """Repeat the last row and column up to the next multiple of 2^depth."""
        multiple = 2**self.config.depth
        # One pixel at the bottom has no deviation to divide by.
        least = 2 * multiple if self.config.norm == "instance" else multiple
        bottom, right = (
            max(least - side, -side % multiple) for side in (image.shape[-2], image.shape[-1])
        )
        return F.pad(image, (0, right, 0, bottom), mode="replicate") if bottom or right else image

    def require_valid_size(self, image: Tensor) -> Tensor:
        """The picture itself if every level halves it evenly; ValueError with the nearest sizes."""
        depth = self.config.depth
        step, offset = 2**depth, 4 * (2 ** (depth + 1) - 1)
        # Fewer pixels at the bottom leave nothing at the top: out = step * b - 4 * (step - 1) >= 1.
        least = offset + step * (3 if depth == 1 else 4)
        for side in image.shape[-2:]:
            if side < least or (side - offset) % step:
                below = max(least, offset + (side - offset) // step * step)
                raise ValueError(
                    f"the valid U-Net takes sides of {offset} + {step}b pixels, got {side}; "
                    f"the nearest are {below} and {below + step}"
                )
        return image

    def _save_pretrained(self, save_directory: Path) -> None:
        weights.save(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "UNet":
        """The model of a folder (`save_pretrained`) or hub repository, in evaluation mode.

        Raises FileNotFoundError for a folder without the two files, ValueError for damaged ones.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            # First, since the mixin's own reading of config.json does not name the file.
            weights.read_header(weights.find(str(pretrained_model_name_or_path)))
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **download: Any) -> "UNet":
        # `config` is the hub mixin's own, lenient reading of config.json; ours names what is wrong.
        del config
        folder = weights.find(model_id, **download)
        header = weights.read_header(folder)
        config = weights.from_plain(UNetConfig, header["model"], folder)
        spec = weights.from_plain(DataSpec, header["data"], folder) if header.get("data") else None
        model = cls(config, spec)
        weights.load(model, folder)
        return model.eval()

    def header(self) -> dict[str, Any]:
        """`config.json`: what `from_pretrained` needs besides the weights."""
        return {"model": asdict(self.config), "data": asdict(self.spec) if self.spec else None}


def he_init(module: nn.Module) -> None:
    """He et al. 2015: N(0, 2/N), N the incoming nodes of one neuron; biases start at 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    elif isinstance(module, nn.ConvTranspose2d):
        # stride 2, kernel 2: every output pixel sees each input channel once
        nn.init.normal_(module.weight, std=(2 / module.in_channels) ** 0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
