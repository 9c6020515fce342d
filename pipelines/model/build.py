"""Builds model and loss from the configuration and the data set."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from pipelines.model.load import load_model, require_spec
from pipelines.runtime.errors import UsageError
from shards.manifest import Manifest, common_side
from unet import (
    PRESETS,
    DataSpec,
    LossConfig,
    SegmentationLoss,
    UNet,
    UNetConfig,
    inverse_frequency,
    valid_input,
)
from unet.blocks import Activation, Norm, Upsampling
from unet.spec import counted_classes

CROP_SIZE = {"modern": 512, "paper": 572, "small": 256}
"""Largest default crop of each preset, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of the U-Net."""

    preset: Literal["modern", "paper", "small"] = "modern"
    """modern: 31 M parameters. small: 1.9 M, for laptops. paper: the U-Net of 2015, with unpadded
    convolutions; images are mirrored at their borders."""
    base_channels: int | None = None
    """Channels of the first level; default: that of the preset (64; small: 16)."""
    depth: int | None = None
    """Number of times the image is downsampled by 2; default: that of the preset (4)."""
    norm: Norm | None = None
    """Normalisation; default: that of the preset (instance; paper: none). batch: synchronised over
    all GPUs."""
    activation: Activation | None = None
    """Activation after each normalisation; default: relu."""
    up: Upsampling | None = None
    """Upsampling in the expanding path; default: transpose."""
    dropout: float | None = None
    """Dropout probability at the end of the contracting path; default: 0 (paper: 0.5)."""

    def __post_init__(self) -> None:
        self.network()

    def network(self, **data: int) -> UNetConfig:
        """Return the architecture; `data` sets in_channels and num_classes."""
        names = ("base_channels", "depth", "norm", "activation", "up", "dropout")
        given = {name: getattr(self, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[self.preset], **changes, **data)


def choose_crop_size(model: ModelConfig, wanted: int | None, manifest: Manifest) -> int:
    """Return the side of the training crops, `wanted` or chosen for the images.

    Raises UsageError for a side that the network cannot take.
    """
    network = model.network()
    if wanted is None:
        covered = common_side(manifest.splits["train"]) + 2 * network.margin
        wanted = default_crop_size(network, min(covered, CROP_SIZE[model.preset]))
    try:
        network.require_side(wanted)
    except ValueError as error:
        raise UsageError(f"--crop-size: {error}") from error
    return wanted


def default_crop_size(network: UNetConfig, max_side: int) -> int:
    """Return the largest valid side of at most `max_side` pixels, else the smallest valid one."""
    if network.padding == "same":
        return max(32, max_side // 32 * 32)
    step = 2**network.depth
    larger = valid_input(max_side - 2 * network.margin + 1, network.depth)
    return max(valid_input(1, network.depth), larger - step)


def build_model(model: ModelConfig, manifest: Manifest, crop_size: int) -> UNet:
    """Build an untrained model with the data spec of a data set."""
    form = manifest.image_format
    spec = DataSpec(
        classes=manifest.classes,
        palette=manifest.palette,
        channels=form.channels,
        mean=manifest.mean,
        std=manifest.std,
        crop_size=crop_size,
        image_range=form.range,
        alpha=form.alpha,
    )
    data = {"in_channels": len(form.channels), "num_classes": len(manifest.classes)}
    return UNet(model.network(**data), spec)


def load_initial_weights(model: UNet, checkpoint: str) -> None:
    """Load the weights of a checkpoint; those of the head only if the classes are the same.

    Raises UsageError if the architectures differ, naming the flag that changes that, and DataError
    if the checkpoint cannot be loaded.
    """
    source = load_model(checkpoint)
    for field in fields(model.config):
        name = field.name
        value, own = getattr(source.model.config, name), getattr(model.config, name)
        if value != own and name not in ("num_classes", "dropout"):
            can_change = name not in ("in_channels", "padding")
            remedy = (
                f"set --model.{name.replace('_', '-')} {value}" if can_change else "use another"
            )
            raise UsageError(
                f"--init-from {checkpoint} has {name} = {value}, this run has {own}; {remedy}"
            )
    tensors = source.model.state_dict()
    if source.spec.classes != require_spec(model).classes:
        own_head = {name: t for name, t in model.state_dict().items() if name.startswith("head.")}
        tensors |= own_head
    model.load_state_dict(tensors)


def refuse_missing(loss: LossConfig, manifest: Manifest, data: str) -> None:
    """Raise UsageError if the data set lacks border maps or pixel counts that the loss needs."""
    if loss.border_weight and manifest.border_sigma is None:
        raise UsageError(
            f"--loss.border-weight needs border maps, but {data} has none; pack it with "
            "--border-sigma 5"
        )
    if loss.class_weights != "none" and not class_pixels(manifest):
        raise UsageError(
            f"--loss.class-weights needs the number of pixels of each class, which {data} does not "
            "list; pack it with --verify full"
        )


def build_loss(loss: LossConfig, manifest: Manifest) -> SegmentationLoss:
    """Build the loss, with class weights computed from the data set."""
    weights = None
    if loss.class_weights != "none":
        power = 0.5 if loss.class_weights == "inverse_sqrt" else 1.0
        weights = inverse_frequency(class_pixels(manifest), power)
    return SegmentationLoss(loss, counted_classes(manifest.classes), weights)


def class_pixels(manifest: Manifest) -> list[int]:
    """Return the pixels of each class in the training split; empty if they were not counted."""
    counts = [shard.pixels for shard in manifest.splits["train"].shards]
    return [sum(pixels) for pixels in zip(*counts, strict=True)][: len(manifest.classes)]
