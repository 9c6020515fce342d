"""Encoders: a backbone of transformers as the contracting path of a U-Net (extra `encoders`).

transformers is imported only where a backbone is built. Nothing is downloaded here, and no code of
a repository is run: the configuration names an architecture that transformers contains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

NEEDS_TRANSFORMERS = (
    "a model with an encoder requires transformers: pip install 'unet-shards[encoders]'"
)
PROBE_SIZE = (192, 128)
"""Height and width of the image that finds the strides: multiples of 64, and not a square."""
UNUSED = (
    *("architectures", "auto_map", "id2label", "label2id", "num_labels", "_name_or_path"),
    *("dtype", "torch_dtype", "out_features", "out_indices", "stage_names"),
    *("_out_features", "_out_indices", "transformers_version", "problem_type"),
)
"""Keys of a backbone's configuration that do not describe the network or are set here."""
DROP_PATH = "drop_path_rate"
"""Key of a backbone's configuration: probability that the deepest block is skipped in training."""
TIMM = "timm_backbone"
"""Model type of a model of timm, which TimmBackbone of transformers builds."""
NO_DECAY_MODULES = ("continuous_position_bias_mlp",)
"""Modules whose weights Swin V2 does not decay (Liu et al. 2022)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """A backbone, and where its first weights came from. `find_stages` finds the first three.

    Two are equal if their networks are.
    """

    backbone: dict[str, Any] = field(hash=False)
    """Configuration of transformers: `model_type`, `num_channels`, `out_features`, and more."""
    strides: tuple[int, ...]
    """Stride of each feature map: 4, 8, 16, 32 for most backbones."""
    channels: tuple[int, ...]
    """Channels of each feature map."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Parameters of the backbone that no feature map depends on: they are not trained."""
    source: str = field(default="", compare=False)
    """Hub id, or name of the local folder."""
    weights: str = field(default="none", compare=False)
    """`pretrained`, `none` (random), or the name of a safetensors file."""
    revision: str | None = field(default=None, compare=False)
    """Commit of the hub repository."""
    sha256: str | None = field(default=None, compare=False)
    """Digest of the weights file; of several, of their digests in the order of their names."""
    input: str | None = field(default=None, compare=False)
    """How the first convolution was made for other channels than the weights have: `mean`, `repeat`
    or `random`; None: it is that of the weights, or random like all others."""
    licence: str | None = field(default=None, compare=False)
    """Licence on the hub card."""
    mean: tuple[float, ...] | None = field(default=None, compare=False)
    """Mean of each channel that the weights were trained with, pixels in 0-1; None: the data
    set's."""
    std: tuple[float, ...] | None = field(default=None, compare=False)
    """Standard deviation of each channel, likewise."""

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, dict) or "model_type" not in self.backbone:
            raise ValueError("encoder.backbone has no model_type")
        first, count = self.strides[0] if self.strides else 0, len(self.strides)
        doubled = tuple(first * 2**level for level in range(count))
        if first < 2 or first & (first - 1) or self.strides != doubled:
            raise ValueError(f"encoder.strides must double from 2 or more, got {self.strides}")
        if len(self.channels) != count or min(self.channels) < 1:
            raise ValueError(f"encoder.channels must be {count} numbers, got {self.channels}")

    def same_network(self, other: "EncoderConfig | None") -> bool:
        """Whether the weights of one fit the other: drop path has none."""
        return other is not None and (
            {**self.backbone, DROP_PATH: None} == {**other.backbone, DROP_PATH: None}
        )

    @property
    def architecture(self) -> str:
        """Name of the network: `resnet`; of a model of timm, `timm resnet18`."""
        return name_architecture(self.backbone)

    @property
    def depth(self) -> int:
        """Number of times the image is downsampled by 2."""
        return int(log2(self.strides[-1]))

    @property
    def num_detail_levels(self) -> int:
        """Number of levels above the first feature map, which convolutions on the image fill."""
        return int(log2(self.strides[0]))


class Encoder(nn.Module):
    """A backbone. `frozen` keeps its norms, drop path and dropout in evaluation mode."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone)
        self.frozen = False
        for name in config.unused:
            # Several ranks wait for the gradient of every parameter that requires one.
            self.backbone.get_parameter(name).requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps [B, channels[i], H / strides[i], W / strides[i]], finest first."""
        return tuple(self.backbone(image).feature_maps)

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode, but for a frozen backbone."""
        super().train(mode and not self.frozen)
        return self

    def set_frozen(self, frozen: bool, training: bool = True) -> None:
        """Freeze or unfreeze the statistics of norms; gradients are the caller's."""
        self.frozen = frozen
        self.train(training)

    def decayed_weights(self) -> list[Tensor]:
        """Return the weights of convolutions and linear layers: what weight decay applies to.

        Norms, biases, layer scale, global response norm, and position biases have none, as in the
        papers of ConvNeXt and Swin.
        """
        return [
            module.weight
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            and not any(part in name for part in NO_DECAY_MODULES)
        ]

    def has_batch_norm(self) -> bool:
        """Whether the backbone normalises over the batch in training."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules())


def name_architecture(plain: Mapping[str, Any]) -> str:
    """Name the network of a configuration."""
    model_type = plain.get("model_type")
    return f"timm {plain.get('backbone')}" if model_type == TIMM else str(model_type)


def build_backbone(plain: Mapping[str, Any]) -> nn.Module:
    """Build a backbone with random weights.

    Raises ImportError without transformers, ValueError for a configuration that it cannot build.
    """
    try:
        from transformers import AutoBackbone
    except ImportError as error:
        raise ImportError(NEEDS_TRANSFORMERS) from error
    config = make_config(plain)
    more = {}
    if plain["model_type"] == TIMM and plain.get(DROP_PATH):
        # Other backbones read it from their configuration.
        more = {DROP_PATH: plain[DROP_PATH]}
    try:
        return AutoBackbone.from_config(config, **more)
    except ImportError as error:
        what = " ".join(str(error).split())
        raise ImportError(f"encoder {name_architecture(plain)}: {what}") from error
    except Exception as error:  # transformers raises whatever the values provoke
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"encoder {name_architecture(plain)} cannot be built: {what}") from error


def make_config(plain: Mapping[str, Any]) -> Any:
    """Make a configuration of transformers from its JSON object.

    Raises ImportError without transformers, ValueError for an unknown type or wrong value.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(NEEDS_TRANSFORMERS) from error
    if plain.get("model_type") == TIMM:
        require_timm(plain.get("backbone"))
    values = {name: value for name, value in plain.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(plain["model_type"], **values)
    except Exception as error:  # transformers raises whatever the values provoke
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"encoder {plain.get('model_type')}: {what}") from error


def require_timm(name: Any) -> None:
    """Raise ImportError without timm, ValueError if it has no model `name`."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        what = " ".join(str(error).split())[:200]
        raise ImportError(
            f"encoder timm {name} requires timm, and torchvision built for the same torch: "
            f"pip install timm torchvision ({what})"
        ) from error
    # timm would download the configuration of a name such as hf-hub:owner/name.
    if not isinstance(name, str) or ":" in name or not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}")


def name_stages(plain: Mapping[str, Any]) -> tuple[str, Sequence[str | int]]:
    """Return the key of a configuration that chooses feature maps, and all its possible values."""
    if plain.get("model_type") != TIMM:
        return "out_features", list(getattr(make_config(plain), "stage_names", None) or [])
    # Only the network knows its stages.
    with torch.device("meta"):
        backbone: Any = build_backbone({**plain, "out_indices": [0]})
    return "out_indices", range(len(backbone.stage_names))


def find_stages(plain: Mapping[str, Any], in_channels: int, **origin: Any) -> EncoderConfig:
    """Describe the backbone that yields one feature map for each stride from 2 or 4 on.

    The network goes over an image on the meta device: nothing is computed.

    Args:
        plain: content of the backbone's `config.json`.
        in_channels: channels of the image.
        origin: `source`, `weights` and the other fields of `EncoderConfig` about them.

    Raises:
        ImportError: without transformers.
        ValueError: if the feature maps are not [B, C, H / s, W / s] with strides s that double.
    """
    kept = {name: value for name, value in plain.items() if name not in UNUSED}
    kept["num_channels"] = in_channels
    if kept.get("model_type") == TIMM:
        # Without `use_pretrained_backbone`, some versions of transformers would download weights.
        kept |= {"features_only": True, "use_pretrained_backbone": False}
    key, stages = name_stages(kept)
    if not stages:
        raise ValueError(f"{kept.get('model_type')} is not a backbone of transformers")
    found: dict[int, tuple[str | int, int]] = {}
    for stage, (channels, stride) in zip(
        stages, probe_maps({**kept, key: list(stages)}, in_channels), strict=True
    ):
        if stride > 1:
            # The last stage of a stride sees most.
            found[stride] = (stage, channels)
    strides = tuple(sorted(found))
    if len(strides) < 2:
        raise ValueError(
            f"{name_architecture(kept)} is a plain transformer: all its feature maps have stride "
            f"{strides[0] if strides else 1}; use a hierarchical backbone (ConvNeXt, Swin, ResNet)"
        )
    chosen = {**kept, key: [found[stride][0] for stride in strides]}
    return EncoderConfig(
        backbone=chosen,
        unused=find_unused(chosen, in_channels),
        strides=strides,
        channels=tuple(found[stride][1] for stride in strides),
        **origin,
    )


def probe_maps(plain: Mapping[str, Any], in_channels: int) -> list[tuple[int, int]]:
    """Return (channels, stride) of each feature map. Raises ValueError if it is not such a map."""
    height, width = PROBE_SIZE
    name = name_architecture(plain)
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone(plain).eval()
        try:
            maps = backbone(torch.empty(1, in_channels, height, width)).feature_maps
        except Exception as error:  # transformers raises whatever the size provokes
            what = " ".join(str(error).split())[:200]
            raise ValueError(f"{name} does not take images of any size: {what}") from error
    found = []
    for of_stage in maps:
        shape = tuple(of_stage.shape)
        stride = height // shape[2] if len(shape) == 4 and shape[2] else 0
        if len(shape) != 4 or not stride or shape[2:] != (height // stride, width // stride):
            raise ValueError(f"{name}: a feature map of {height} x {width} pixels is {shape}")
        found.append((shape[1], stride))
    return found


def find_unused(plain: Mapping[str, Any], in_channels: int) -> tuple[str, ...]:
    """Return the names of the parameters that no feature map depends on."""
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        backbone = build_backbone(plain).eval()
        maps = backbone(torch.empty(1, in_channels, *PROBE_SIZE)).feature_maps
        torch.stack([of_stage.sum() for of_stage in maps]).sum().backward()
    return tuple(name for name, p in backbone.named_parameters() if p.grad is None)
