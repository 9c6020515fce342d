"""Which network and which loss a run has, as its configuration and its data set decide."""

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
    """Which U-Net."""

    preset: Literal["modern", "paper", "small"] = "modern"
    """modern: 31 M parameters. small: 1.9 M, for laptops. paper: the network of 2015, which sees a
    margin of mirrored pixels around each picture."""
    base_channels: int | None = None
    """Channels of the first level; left out: the preset's (64, 16)."""
    depth: int | None = None
    """How many times the image is halved; left out: the preset's (4)."""
    norm: Norm | None = None
    """Normalisation; left out: the preset's (instance; none in paper). batch is over all GPUs."""
    activation: Activation | None = None
    """Nonlinearity; left out: relu."""
    up: Upsampling | None = None
    """How maps are doubled in size; left out: transpose."""
    dropout: float | None = None
    """Share of values dropped at the end of the contracting path; left out: 0 (0.5 in paper)."""

    def __post_init__(self) -> None:
        self.network()

    def network(self, **data: int) -> UNetConfig:
        """What decides the shape of the network; `data`: its in_channels and num_classes."""
        names = ("base_channels", "depth", "norm", "activation", "up", "dropout")
        given = {name: getattr(self, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[self.preset], **changes, **data)


def choose_crop_size(model: ModelConfig, asked: int | None, manifest: Manifest) -> int:
    """The side of the training crops. Raises UsageError for one that the network cannot take."""
    network = model.network()
    if asked is None:
        shown = common_side(manifest.splits["train"]) + 2 * network.margin
        asked = default_crop_size(network, min(shown, CROP_SIZE[model.preset]))
    try:
        network.require_side(asked)
    except ValueError as error:
        raise UsageError(f"--crop-size: {error}") from error
    return asked


def default_crop_size(network: UNetConfig, most: int) -> int:
    """The largest side of crops, at most `most` pixels; the least where there is none."""
    if network.padding == "same":
        return max(32, most // 32 * 32)
    step = 2**network.depth
    larger = valid_input(most - 2 * network.margin + 1, network.depth)
    return max(valid_input(1, network.depth), larger - step)


def build_model(model: ModelConfig, manifest: Manifest, crop_size: int) -> UNet:
    """A fresh model that knows its data."""
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
        max_pixels=form.max_pixels,
        exif=form.exif,
        frame=form.frame,
        resize=form.resize,
    )
    data = {"in_channels": len(form.channels), "num_classes": len(manifest.classes)}
    return UNet(model.network(**data), spec)


def begin_with(model: UNet, checkpoint: str) -> None:
    """Take the weights of a checkpoint; the head only where it knows the same classes.

    Raises UsageError where the networks differ, with the flag that makes them alike, and DataError
    where there is no such checkpoint.
    """
    found = load_model(checkpoint, "--init-from")
    theirs, ours = found.model.config, model.config
    for field in fields(ours):
        value, own = getattr(theirs, field.name), getattr(ours, field.name)
        if value != own and field.name not in ("num_classes", "dropout"):
            raise UsageError(
                f"--init-from {checkpoint} has {field.name} = {value}, this run {own}; "
                f"give --model.{field.name.replace('_', '-')} {value}"
                if field.name not in ("in_channels", "padding")
                else f"--init-from {checkpoint} has {field.name} = {value}, this run {own}; they "
                "must be the same"
            )
    tensors = found.model.state_dict()
    if found.spec.classes != require_spec(model).classes:
        own_head = {name: t for name, t in model.state_dict().items() if name.startswith("head.")}
        tensors |= own_head
    model.load_state_dict(tensors)


def refuse_missing(loss: LossConfig, manifest: Manifest, data: str) -> None:
    """Raise UsageError where the data set lacks what the loss needs."""
    if loss.border_weight and manifest.border_sigma is None:
        raise UsageError(
            f"--loss.border-weight needs border maps, {data} has none; pack it with "
            "--border-sigma 5"
        )
    if loss.class_weights != "none" and not class_pixels(manifest):
        raise UsageError(
            f"--loss.class-weights needs the pixels of each class, which {data} does not "
            "know; pack it with --verify full"
        )


def build_loss(loss: LossConfig, manifest: Manifest) -> SegmentationLoss:
    """The loss, with the weights of this data set's classes."""
    weights = None
    if loss.class_weights != "none":
        power = 0.5 if loss.class_weights == "inverse_sqrt" else 1.0
        weights = inverse_frequency(class_pixels(manifest), power)
    return SegmentationLoss(loss, counted_classes(manifest.classes), weights)


def class_pixels(manifest: Manifest) -> list[int]:
    """Pixels of each class in the training split; none where they were not counted."""
    counts = [shard.pixels for shard in manifest.splits["train"].shards]
    return [sum(pixels) for pixels in zip(*counts, strict=True)][: len(manifest.classes)]
