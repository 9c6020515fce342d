"""The U-Net: its layers, forward pass, prediction of an image, and files."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet import milesial, weights
from unet.blocks import ConvConfig, DoubleConv, Down, Up
from unet.config import PRESETS, UNetConfig
from unet.encoder import Encoder, EncoderConfig
from unet.masks import predict_mask
from unet.pixels import AnyImage, to_pixels
from unet.spec import DataSpec
from unet.tiling import TileConfig


class UNet(nn.Module, ModelHubMixin):
    """U-Net for images [B, in_channels, H, W] with any H, W >= 1 (padding `same`).

    With padding `valid`, H and W must be sizes that `valid_input` returns. If
    `gradient_checkpointing` is set to True, training keeps only the activations between blocks and
    recomputes those within (Chen et al. 2016): a third slower, for a fraction of the memory.
    """

    gradient_checkpointing: bool

    def __init__(self, config: UNetConfig, spec: DataSpec | None = None) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.gradient_checkpointing = False
        channels = [config.base_channels * 2**level for level in range(config.depth + 1)]
        conv = ConvConfig(config.padding, config.norm, config.activation)
        encoder = config.encoder
        num_downs = config.depth if encoder is None else encoder.num_detail_levels
        dropout = [0.0] * (config.depth - 1) + [config.dropout]
        self.downs = nn.ModuleList(
            Down(c_in, c_out, conv, dropout=p)
            for c_in, c_out, p in zip(
                [config.in_channels, *channels][:num_downs],
                channels[:num_downs],
                dropout[:num_downs],
                strict=True,
            )
        )
        if encoder is None:
            self.bottom = DoubleConv(channels[-2], channels[-1], conv, dropout=config.dropout)
            contracted = channels
        else:
            contracted = [*channels[:num_downs], *encoder.channels]
        self.ups = nn.ModuleList(
            Up(c_in, contracted[level], channels[level], conv, up=config.up)
            for level, c_in in zip(
                reversed(range(config.depth)),
                [contracted[-1], *reversed(channels[1:-1])],
                strict=True,
            )
        )
        self.head = nn.Conv2d(channels[0], config.num_classes, 1)
        self.apply(he_init)
        # Initialised last: deep supervision does not change the other weights. Level 1 first.
        self.level_heads = nn.ModuleList(
            nn.Conv2d(width, config.num_classes, 1)
            for width in (channels[1:-1] if config.deep_supervision else [])
        ).apply(he_init)
        # After `he_init`: a backbone initialises itself.
        self.encoder = None if encoder is None else Encoder(encoder)

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
        """Build the preset `name`; `changes` are fields of `UNetConfig`.

        Raises ValueError for an unknown preset or a value out of its range.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        config = replace(PRESETS[name], in_channels=in_channels, num_classes=num_classes, **changes)
        return cls(config, spec)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute logits [B, num_classes, H', W'] of normalised images [B, in_channels, H, W].

        H', W' are H, W with padding `same`, and 12 * 2^depth - 8 less with `valid` (572 -> 388).
        In training mode with deep supervision, returns them first in a tuple, followed by those of
        level 1, 2, ... for the padded image: [B, num_classes, >= H / 2, >= W / 2], ...
        """
        height, width = image.shape[-2:]
        for side in (height, width):
            self.config.require_side(side)
        x = self.pad(image) if self.config.padding == "same" else image
        *skips, x = self.contract(x)
        maps: list[Tensor] = []
        for up in self.ups:
            x = self.run_block(up, x, skips.pop())
            maps.append(x)
        logits = self.head(x)
        if self.config.padding == "same":
            logits = logits[..., :height, :width]
        if not (self.training and self.level_heads):
            return logits
        coarser = reversed(maps[:-1])
        return logits, *(head(x) for head, x in zip(self.level_heads, coarser, strict=True))

    @property
    def margin(self) -> int:
        """Pixels that the logits lack on each side of the image."""
        return self.config.margin

    @property
    def multiple(self) -> int:
        """Factor by which the contracting path downsamples: 2^depth."""
        return self.config.multiple

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Dimensions to flip for each mirror image of test-time augmentation."""
        return self.config.mirrors if self.spec is None else self.spec.mirrors

    def logits(self, pixels: Tensor) -> Tensor:
        """Compute the logits of images uint8 [B, in_channels, H, W], normalised as `spec` states.

        Raises ValueError if the model has no data spec.
        """
        return self(self.require_spec().normalise(pixels))

    def require_spec(self) -> DataSpec:
        """Return the data spec. Raises ValueError if the model has none."""
        if self.spec is None:
            raise ValueError(
                "the model has no data spec; pass spec=DataSpec(...) to its constructor"
            )
        return self.spec

    def contract(self, image: Tensor) -> list[Tensor]:
        """Compute the maps of the contracting path, finest first: [B, C, H / 2^l, W / 2^l]."""
        maps: list[Tensor] = []
        x = image
        for down in self.downs:
            skip, x = self.run_block(down, x)
            maps.append(skip)
        deeper = (
            [self.run_block(self.bottom, x)]
            if self.encoder is None
            else self.run_block(self.encoder, image)
        )
        return [*maps, *deeper]

    def run_block(self, block: nn.Module, *maps: Tensor) -> Any:
        """Run a block, with gradient checkpointing if enabled."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *maps, use_reentrant=False)
        return block(*maps)

    def pad(self, image: Tensor) -> Tensor:
        """Repeat the last row and column up to `padded_side`."""
        bottom, right = (self.padded_side(side) - side for side in image.shape[-2:])
        return F.pad(image, (0, right, 0, bottom), mode="replicate") if bottom or right else image

    def padded_side(self, side: int) -> int:
        """Round a side up to a multiple of 2^depth; with instance norm, at least two of them."""
        multiple = 2**self.config.depth
        # At the bottom, instance norm needs more than one pixel.
        minimum = 2 if self.config.norm == "instance" else 1
        # torch.export traces `sym_max` but not `max`. ONNX rounds quotients towards 0, so none may
        # be negative.
        return multiple * torch.sym_max(minimum, (side + multiple - 1) // multiple)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights.save_model(self, self.header(), save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "UNet":
        """Load a model from a folder (`save_pretrained`) or hub repository, in evaluation mode.

        Raises FileNotFoundError if the folder lacks one of the two files, ValueError if one is
        damaged.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            # First, since errors of the mixin do not name the file.
            weights.read_header(weights.find_folder(str(pretrained_model_name_or_path)))
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **download: Any) -> "UNet":
        # The hub mixin parses config.json leniently; our reader reports what is wrong.
        del config
        folder = weights.find_folder(model_id, **download)
        header = weights.read_header(folder)
        config = read_config(header, folder)
        spec = weights.from_plain(DataSpec, header["data"], folder) if header.get("data") else None
        # config.json may ask for any size: no memory before the file is known to hold it.
        with torch.device("meta"):
            model = cls(config, spec)
        weights.check_weights(model.state_dict(), folder)
        # A backbone computes some of its buffers, which no file stores.
        model = model.to_empty(device="cpu") if config.encoder is None else cls(config, spec)
        weights.load_weights(model, folder)
        return model.eval()

    @classmethod
    def from_milesial(cls, path: Path | str, spec: DataSpec | None = None) -> "UNet":
        """Load a `.pth` checkpoint of milesial/Pytorch-UNet, in evaluation mode.

        Equal to the original if the sides are multiples of 16; other sizes are padded before the
        first block rather than within. It was trained on pixels in 0-1, so its `spec` needs mean 0
        and std 1. Raises FileNotFoundError if the file does not exist, ValueError if it is not such
        a checkpoint.
        """
        tensors = milesial.read_milesial(Path(path))
        base_channels, in_channels = tensors["downs.0.conv.0.weight"].shape[:2]
        config = UNetConfig(
            in_channels=in_channels,
            num_classes=len(tensors["head.weight"]),
            base_channels=base_channels,
            depth=sum(name.endswith(".up.weight") for name in tensors),
            norm="batch",
        )
        model = cls(config, spec)
        weights.load_tensors(model, tensors, Path(path))
        return model.eval()

    @torch.inference_mode()
    def predict(
        self,
        image: AnyImage,
        tiles: TileConfig = TileConfig(),  # noqa: B008 (it is frozen)
    ) -> NDArray[np.uint8]:
        """Predict the mask of one image, in tiles if it is larger than `tiles.tile`.

        The model may be on any device and in training mode. `unet predict` gives the same classes
        for the same file, device and precision; `torch.autocast` around the call applies.

        Args:
            image: a PIL image, an array or a tensor, as `unet.pixels.to_pixels` takes it.
            tiles: tile size, overlap, batch size and test-time augmentation.

        Returns:
            Class indices, uint8 [H, W].

        Raises:
            ValueError: the model has no data spec, or the image does not fit it (see `to_pixels`).
        """
        spec = self.require_spec()
        device, was_training = next(self.parameters()).device, self.training
        pixels = to_pixels(image, spec).to(device)
        self.eval()
        try:
            mask, _ = predict_mask(self.logits, [pixels], tiles, self)
        finally:
            self.train(was_training)
        return mask[0].cpu().numpy()

    def header(self) -> dict[str, Any]:
        """Return the content of `config.json`: model config and data spec."""
        model, data = asdict(self.config), asdict(self.spec) if self.spec else None
        # Without these defaults, versions that lack the settings can read the file.
        if self.config.encoder is None:
            del model["encoder"]
        if not self.config.deep_supervision:
            del model["deep_supervision"]
        if data is not None and data["orientation"] == "any":
            del data["orientation"]
        return {"model": model, "data": data}


def read_config(header: dict[str, Any], folder: Path) -> UNetConfig:
    """Build the model config of a parsed `config.json`. Raises ValueError if it is not one."""
    plain = header["model"]
    if isinstance(plain, dict) and plain.get("encoder") is not None:
        weights.from_plain(EncoderConfig, plain["encoder"], folder)
    return weights.from_plain(UNetConfig, plain, folder)


def he_init(module: nn.Module) -> None:
    """Initialise as He et al. 2015: N(0, 2/N), where N is the fan-in; biases are 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    elif isinstance(module, nn.ConvTranspose2d):
        # Stride 2, kernel 2: every output pixel depends on each input channel once.
        nn.init.normal_(module.weight, std=(2 / module.in_channels) ** 0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
