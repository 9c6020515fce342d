"""Builds model and loss from the configuration and the data set."""

import sys
from dataclasses import dataclass, fields, replace
from typing import Literal

from pipelines.model.channels import ChannelRule
from pipelines.model.load import load_model, require_spec
from pipelines.runtime.command import launched_rank
from pipelines.runtime.errors import UsageError
from pipelines.runtime.yaml_flags import refuse_unused
from shards.manifest import Manifest, common_side
from unet import (
    PRESETS,
    DataSpec,
    EncoderConfig,
    LossConfig,
    SegmentationLoss,
    UNet,
    UNetConfig,
    inverse_frequency,
    valid_input,
)
from unet.blocks import Activation, Norm, Upsampling
from unet.spec import Orientation, counted_classes

CROP_SIZE = {"modern": 512, "paper": 572, "small": 256}
"""Largest default crop of each preset, in pixels."""
ENCODER_BASE_CHANNELS = {"modern": 32, "small": 16}
"""Default of each preset with an encoder: decoders of 32 to 512 and 16 to 256 channels. The encoder
has most of the parameters; a decoder of 64 to 1,024 would have as many again."""
ENCODER_DEPTH = 5
"""Of backbones with strides 4 to 32."""


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
    deep_supervision: bool | None = None
    """In training, also predict from the coarser levels of the expanding path; default: yes, except
    with preset paper."""
    encoder: str | None = None
    """Pretrained backbone as the contracting path: hub id, or local folder with config.json,
    model.safetensors and preprocessor_config.json (ResNet, ConvNeXt, Swin and other hierarchical
    backbones of transformers, or of timm, which is then needed too). Requires the extra `encoders`.
    Its mean and deviation replace those of the data set. The decoder then has
    --model.base-channels 32 (small: 16) by default."""
    encoder_weights: str = "pretrained"
    """Weights of the encoder: `pretrained` (its own), `none` (random), or a .safetensors file."""
    encoder_input: ChannelRule | None = None
    """First convolution of the encoder for other channels than its weights have. mean: each channel
    gets their mean, times their number / N, which for grey images is their sum; repeat: channel i
    gets channel i modulo 3, times 3/N; random: not pretrained. Default: mean."""
    freeze_encoder: bool = False
    """Do not train the encoder; its batch norm keeps its statistics."""
    freeze_until: float = 0.0
    """Share of the run in which the encoder is frozen, while the decoder learns."""
    drop_path: float | None = None
    """Probability that the deepest block of the encoder is skipped in training (stochastic depth);
    default: drop_path_rate of its configuration."""

    def __post_init__(self) -> None:
        if self.encoder is None:
            refuse_unused(
                self,
                "requires --model.encoder",
                *(
                    "encoder_weights",
                    "encoder_input",
                    "freeze_encoder",
                    "freeze_until",
                    "drop_path",
                ),
                prefix="model.",
            )
        else:
            self.refuse_fixed_by_encoder()
        self.network()

    def refuse_fixed_by_encoder(self) -> None:
        """Raise ValueError for a setting that the encoder decides or that has no effect."""
        if self.preset == "paper":
            raise ValueError("--model.preset paper cannot have an encoder; use modern or small")
        refuse_unused(self, "is set by --model.encoder; remove it", "depth", prefix="model.")
        reason = "has no effect with --model.encoder; use --model.drop-path"
        refuse_unused(self, reason, "dropout", prefix="model.")
        for name in ("freeze_until", "drop_path"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--model.{flag} must be in [0, 1), got {getattr(self, name)}")
        if self.freeze_encoder and (self.freeze_until or self.drop_path is not None):
            raise ValueError(
                "--model.freeze-encoder: a frozen encoder has neither --model.freeze-until nor "
                "--model.drop-path; remove one"
            )

    def network(self, encoder: EncoderConfig | None = None, **data: int) -> UNetConfig:
        """Return the architecture; `data` sets in_channels and num_classes.

        `encoder`: the backbone of `self.encoder`; without it, the depth is that of most backbones.
        """
        names = ("base_channels", "depth", "norm", "activation", "up", "dropout")
        given = {name: getattr(self, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.encoder is not None:
            depth = ENCODER_DEPTH if encoder is None else encoder.depth
            width = ENCODER_BASE_CHANNELS[self.preset]
            changes = {"base_channels": width, **changes, "depth": depth, "encoder": encoder}
        deep = self.preset != "paper" if self.deep_supervision is None else self.deep_supervision
        return replace(PRESETS[self.preset], **changes, deep_supervision=deep, **data)


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


def build_model(
    model: ModelConfig,
    manifest: Manifest,
    crop_size: int,
    encoder: EncoderConfig | None = None,
    orientation: Orientation = "any",
) -> UNet:
    """Build an untrained model with the data spec of a data set.

    `orientation`: flips that it will be trained with.

    Mean and deviation are those that the weights of `encoder` were trained with, if it has some.
    """
    mean, std = (encoder.mean, encoder.std) if encoder is not None else (None, None)
    form = manifest.image_format
    spec = DataSpec(
        classes=manifest.classes,
        palette=manifest.palette,
        channels=form.channels,
        mean=mean or manifest.mean,
        std=std or manifest.std,
        crop_size=crop_size,
        image_range=form.range,
        alpha=form.alpha,
        max_pixels=form.max_pixels,
        exif=form.exif,
        frame=form.frame,
        resize=form.resize,
        orientation=orientation,
    )
    data = {"in_channels": len(form.channels), "num_classes": len(manifest.classes)}
    return UNet(model.network(encoder, **data), spec)


def load_initial_weights(model: UNet, checkpoint: str, fold: str | None = None) -> None:
    """Load the weights of a checkpoint; those of the heads only if the classes are the same.

    `fold`: the fold that the run trains, i/k; prints a warning on rank 0 unless the checkpoint was
    trained on the same one.

    Raises UsageError if the architectures differ, naming the flag that changes that, and DataError
    if the checkpoint cannot be loaded.
    """
    source = load_model(checkpoint, "--init-from")
    own_fold = fold is None or [part and part.fold for part in source.folds] == [fold]
    if not own_fold and launched_rank() == 0:
        print(
            f"warning: --init-from {checkpoint}: if it was trained on this data set, it has seen "
            f"images that fold {fold} holds out, and their scores will be too high",
            file=sys.stderr,
        )
    refuse_other_encoder(model.config.encoder, source.model.config.encoder, checkpoint)
    for field in fields(model.config):
        name = field.name
        if name == "encoder":
            continue
        value, own = getattr(source.model.config, name), getattr(model.config, name)
        if value != own and name not in ("num_classes", "dropout", "deep_supervision"):
            can_change = name not in ("in_channels", "padding")
            remedy = (
                f"set --model.{name.replace('_', '-')} {value}" if can_change else "use another"
            )
            raise UsageError(
                f"--init-from {checkpoint} has {name} = {value}, this run has {own}; {remedy}"
            )
    tensors, given = model.state_dict(), source.model.state_dict()
    same_classes = source.spec.classes == require_spec(model).classes
    for name in tensors:
        is_head = name.startswith(("head.", "level_heads."))
        if not is_head or (same_classes and name in given):
            tensors[name] = given[name]
    model.load_state_dict(tensors)


def refuse_other_encoder(
    own: EncoderConfig | None, theirs: EncoderConfig | None, checkpoint: str
) -> None:
    """Raise UsageError if the encoders of a run and of the checkpoint it starts from differ."""
    if theirs is None if own is None else own.same_network(theirs):
        return
    have, has = (encoder.source if encoder else "none" for encoder in (own, theirs))
    remedy = f"set --model.encoder {has}" if theirs else "remove --model.encoder"
    raise UsageError(f"--init-from {checkpoint} has encoder = {has}, this run has {have}; {remedy}")


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
