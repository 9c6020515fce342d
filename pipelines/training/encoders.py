"""Training of an encoder: where it comes from, when it is frozen, which batch norm it can have."""

import sys
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from pipelines.model.backbone import Backbone, choose_backbone
from pipelines.model.load import load_config
from pipelines.runtime.errors import UsageError
from pipelines.runtime.terminal import print_lines
from pipelines.training.options import TrainConfig
from shards.manifest import Manifest
from unet import UNet
from unet.encoder import TIMM


def prepare_backbone(
    config: TrainConfig, manifest: Manifest, accelerator: Accelerator, resumed: Path | None
) -> Backbone | None:
    """Find the encoder of a run and print notes about its weights; None for a run without one.

    It is that of the checkpoint `resumed`, else of `--init-from`, if they have it: the files that
    `--model.encoder` names are then not read.
    """
    model, saved = config.model, None
    if model.encoder is None:
        return None
    if resumed is not None:
        saved = load_config(str(resumed), "--run-dir")
    elif config.init_from is not None:
        saved = load_config(config.init_from, "--init-from")
    channels = len(manifest.image_format.channels)
    backbone = choose_backbone(model, channels, saved, accelerator)
    if accelerator.is_main_process:
        print_lines(backbone.notes, sys.stderr)
    return backbone


def initialise_encoder(model: UNet, backbone: Backbone, *, frozen: bool) -> None:
    """Load the pretrained weights, if there are some; `frozen`: exclude them from training."""
    assert model.encoder is not None
    if backbone.tensors is not None:
        network = model.encoder.backbone
        network.load_state_dict({**network.state_dict(), **backbone.tensors})
    if frozen:
        model.encoder.requires_grad_(False)
        model.encoder.set_frozen(True)


def describe_network(model: UNet) -> dict[str, int | str | None]:
    """Return the parameters of a model and the origin of its encoder, for the tracker."""
    facts: dict[str, int | str | None] = {"network.parameters": count_parameters(model)}
    encoder = model.config.encoder
    if encoder is None or model.encoder is None:
        return facts
    names = ("architecture", "source", "weights", "revision", "sha256", "licence")
    facts |= {f"network.encoder.{name}": getattr(encoder, name) for name in names}
    return {**facts, "network.encoder.parameters": count_parameters(model.encoder)}


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def synchronise_batch_norm(model: UNet) -> None:
    """Replace batch norm by SyncBatchNorm, in place."""
    encoder = model.config.encoder
    if encoder is not None and encoder.backbone["model_type"] == TIMM:
        from timm.layers import (  # pyright: ignore[reportMissingImports]
            convert_sync_batchnorm,
        )

        # Batch norm of timm may contain the activation, which torch's conversion would drop.
        convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def refuse_encoder_batch_norm(
    model: UNet, config: TrainConfig, accelerator: Accelerator, batch_size: int
) -> None:
    """Raise UsageError if a trained encoder normalises over batches where that does not work.

    Args:
        model: the model before it is prepared.
        config: the run.
        accelerator: number of ranks and kind of device.
        batch_size: samples of a forward pass of one rank.
    """
    encoder = model.encoder
    if encoder is None or config.model.freeze_encoder or not encoder.has_batch_norm():
        return
    flag = f"--model.encoder {config.model.encoder} has batch norm"
    remedy = "freeze it (--model.freeze-encoder) or use an encoder without (ConvNeXt, Swin)"
    if accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        raise UsageError(f"{flag}, which is synchronised on GPUs only; {remedy}")
    if config.compute.gradient_checkpointing:
        raise UsageError(
            f"{flag}: --gradient-checkpointing would update its running averages twice per batch; "
            f"{remedy}"
        )
    crop_size = config.batch.crop_size
    assert crop_size is not None
    if batch_size * (-(-crop_size // model.config.multiple)) ** 2 < 2:
        raise UsageError(
            f"{flag}, and sees one value per channel in crops of {crop_size} pixels, one "
            "per pass; raise --crop-size or --global-batch-size"
        )


def freeze_encoder(model: UNet, until: float, progress: float) -> bool:
    """Freeze the encoder while `progress`, the share of the run that is done, is below `until`.

    Returns whether gradients of its weights are to be dropped. They are computed all the same:
    ranks agree on what they exchange before the first step.
    """
    if model.encoder is None or until == 0:
        return False
    frozen = progress < until
    if frozen != model.encoder.frozen:
        model.encoder.set_frozen(frozen, model.training)
    return frozen


def drop_gradients(model: UNet) -> None:
    """Drop the gradients of the encoder, so that neither the optimizer nor clipping sees them."""
    assert model.encoder is not None
    for parameter in model.encoder.parameters():
        parameter.grad = None
