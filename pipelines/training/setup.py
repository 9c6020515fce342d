"""What `unet train` prepares before its first step."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from pipelines.loading.augment import Augment
from pipelines.loading.batches import train_batches
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch
from pipelines.model.backbone import Backbone, choose_backbone
from pipelines.model.build import (
    build_loss,
    build_model,
    choose_crop_size,
    load_initial_weights,
    refuse_missing,
)
from pipelines.model.load import load_config
from pipelines.runtime.errors import UsageError
from pipelines.runtime.yaml_flags import to_plain
from pipelines.training.memory_probe import Probe, describe_passes
from pipelines.training.optim import Learner
from pipelines.training.options import TrainConfig
from shards.manifest import Manifest
from shards.order import ORDER_VERSION, Order, TrainPlan
from unet import UNet

OF_ENCODERS = (
    *("model.encoder", "model.encoder_weights", "model.freeze_encoder", "model.freeze_until"),
    *("model.drop_path", "optim.encoder_lr_scale"),
)
"""Settings that are fixed for a run with an encoder."""


def resolve(config: TrainConfig, manifest: Manifest) -> tuple[TrainConfig, Order]:
    """What the data set decides. Raises DataError or UsageError before any device is touched."""
    train_split = manifest.split("train", config.data)
    manifest.split("val", config.data)
    config = replace(config, global_batch_size=config.step_samples())
    config = replace(config, crop_size=choose_crop_size(config.model, config.crop_size, manifest))
    refuse_missing(config.loss, manifest, config.data)
    sizes = tuple(shard.samples for shard in train_split.shards)
    return config, Order(sizes, config.seed, config.lanes, config.window)


def rank_batch_size(config: TrainConfig, world: int) -> int:
    """Samples of one forward pass of one rank. Raises UsageError where the step does not divide."""
    samples = config.step_samples()
    size, rest = divmod(samples, world * config.passes)
    if rest or not size:
        passes = world * config.passes
        below = samples // passes * passes
        fitting = [str(number) for number in (below, below + passes) if number]
        raise UsageError(
            f"--global-batch-size {samples} does not divide among {world} ranks x "
            f"{config.passes} accumulated passes; {' or '.join(fitting)} would"
        )
    return size


def find_passes(
    config: TrainConfig, manifest: Manifest, accelerator: Accelerator, learner: Learner
) -> TrainConfig:
    """The configuration with `accumulate` found by trying; Accelerate counts by it from here on."""
    assert config.crop_size is not None
    criterion = build_loss(config.loss, manifest).to(accelerator.device)
    augment, border = Augment(config.augment, config.seed), config.loss.border_weight > 0
    probe = Probe(
        *(accelerator, learner, criterion, augment, config.crop_size, border),
        benchmark=not config.deterministic,
    )
    samples = rank_batch_size(config, accelerator.num_processes)
    config = replace(config, accumulate=probe.choose_passes(samples))
    accelerator.gradient_accumulation_steps = config.passes
    if accelerator.is_main_process:
        print(describe_passes(accelerator.device, config.passes, samples), file=sys.stderr)
    return config


def refuse_batch_norm(config: TrainConfig, accelerator: Accelerator, batch_size: int) -> None:
    """Raise UsageError where batch norm would have nothing to norm, or not all of it."""
    network = config.model.network()
    if network.norm != "batch":
        return
    if accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        raise UsageError(
            "--model.norm batch is over all ranks on GPUs only; on CPUs take instance or group"
        )
    assert config.crop_size is not None
    if batch_size * (config.crop_size // 2**network.depth) < 2:
        raise UsageError(
            f"--model.norm batch sees one value of each channel in crops of {config.crop_size} "
            "pixels, one a pass; raise --crop-size or --global-batch-size"
        )


def prepare_model(
    config: TrainConfig,
    manifest: Manifest,
    accelerator: Accelerator,
    init_from: str | None,
    resumed: Path | None,
) -> UNet:
    """Build the model on its device, in the memory format of the run.

    Args:
        config: the run.
        manifest: its data set.
        accelerator: its device and ranks.
        init_from: checkpoint whose weights the model gets.
        resumed: checkpoint that is loaded later: the encoder's weights are in it.
    """
    assert config.crop_size is not None
    saved = str(resumed) if resumed is not None else init_from
    backbone = prepare_backbone(config, manifest, accelerator, saved)
    model = build_model(
        config.model, manifest, config.crop_size, None if backbone is None else backbone.config
    )
    if model.encoder is not None and backbone is not None:
        if backbone.tensors is not None:
            model.encoder.backbone.load_state_dict(backbone.tensors)
        if config.model.freeze_encoder:
            model.encoder.requires_grad_(False)
            model.encoder.set_frozen(True)
    if init_from is not None:
        load_initial_weights(model, init_from)
    model = model.to(accelerator.device)
    if config.channels_last:
        # torch's stubs lack this overload.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # It works in place, and there is none on CPUs.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def prepare_backbone(
    config: TrainConfig, manifest: Manifest, accelerator: Accelerator, saved: str | None
) -> Backbone | None:
    """Find the encoder, in `saved` if that checkpoint has it; None for a run without one."""
    model = config.model
    if model.encoder is None:
        return None
    backbone = choose_backbone(
        model.encoder,
        model.encoder_weights,
        model.drop_path,
        len(manifest.image_format.channels),
        None if saved is None else load_config(saved),
        accelerator,
    )
    if accelerator.is_main_process:
        for note in backbone.notes:
            print(note, file=sys.stderr)
    return backbone


def fixed_settings(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What must not change on resume, by the name of its flag."""
    plain = to_plain(config)
    names = (
        "seed",
        "lanes",
        "window",
        "global_batch_size",
        "crop_size",
        "init_from",
        "model",
        "loss",
        "optim",
        "augment",
    )
    groups = {name: plain[name] for name in names}
    flat = {
        f"{name}.{key}" if key else name: value
        for name, group in groups.items()
        for key, value in (group.items() if isinstance(group, dict) else [("", group)])
    }
    if config.model.encoder is None:
        # Runs of versions without encoders are resumed.
        flat = {name: value for name, value in flat.items() if name not in OF_ENCODERS}
    return {**flat, "order_version": ORDER_VERSION, "manifest": manifest.digest}


def open_batches(
    config: TrainConfig, data: DataSet, plan: TrainPlan, accelerator: Accelerator
) -> Iterator[Batch]:
    """This rank's endless batches."""
    assert config.crop_size is not None
    return train_batches(
        data,
        plan,
        crop_size=config.crop_size,
        augment=config.augment,
        seed=config.seed,
        margin=config.model.network().margin,
        border=config.loss.border_weight > 0,
        skip=config.bad_samples == "skip",
        pin=accelerator.device.type == "cuda",
    )
