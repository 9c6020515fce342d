"""What `unet train` prepares before its first step."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from pipelines.loading.augment import Augment
from pipelines.loading.batches import train_batches
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch
from pipelines.model.build import (
    build_loss,
    build_model,
    choose_crop_size,
    load_initial_weights,
    refuse_missing,
)
from pipelines.runtime.errors import UsageError
from pipelines.runtime.yaml_flags import to_plain
from pipelines.training.memory_probe import Probe, describe_passes
from pipelines.training.optim import Learner
from pipelines.training.options import TrainConfig
from shards.manifest import Manifest
from shards.order import ORDER_VERSION, Order, TrainPlan
from unet import UNet


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
    config: TrainConfig, manifest: Manifest, accelerator: Accelerator, init_from: str | None
) -> UNet:
    """A fresh model on its device, as the run wants it there; `init_from`: with these weights."""
    assert config.crop_size is not None
    model = build_model(config.model, manifest, config.crop_size)
    if init_from is not None:
        load_initial_weights(model, init_from)
    model = model.to(accelerator.device)
    if config.channels_last:
        # Which torch's stubs leave out.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # In place; on CPUs there is no such norm.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


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
