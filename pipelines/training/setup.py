"""Resolves the configuration of a run and opens everything that its loop works with."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import nn

from pipelines.loading.augment import Augment
from pipelines.loading.batches import train_batches
from pipelines.loading.dataset import DataSet, open_data, train_bytes_in_use
from pipelines.loading.stages import Batch
from pipelines.model.build import (
    build_loss,
    build_model,
    choose_crop_size,
    load_initial_weights,
    refuse_missing,
)
from pipelines.model.checkpoint_files import list_checkpoints
from pipelines.model.load import require_spec
from pipelines.runtime.devices import (
    choose_batch_size,
    choose_channels_last,
    start,
    use_deterministic,
)
from pipelines.runtime.environment import write_environment
from pipelines.runtime.errors import UsageError, parse_part
from pipelines.runtime.run_folder import RunFolder
from pipelines.runtime.yaml_flags import to_plain
from pipelines.training.budget import Budget, Limits
from pipelines.training.checkpoints import Checkpoints, TrainState
from pipelines.training.encoders import (
    describe_network,
    initialise_encoder,
    prepare_backbone,
    refuse_encoder_batch_norm,
    synchronise_batch_norm,
)
from pipelines.training.flops import count_flops
from pipelines.training.memory_probe import Probe, describe_passes
from pipelines.training.meter import Meter, Progress
from pipelines.training.optim import Learner, build_learner
from pipelines.training.options import GLOBAL_BATCH_SIZE, TrainConfig
from pipelines.training.passes import TrainingPass, refuse_uneven_batch
from pipelines.training.tracking import Tracker
from shards.folds import assign_folds
from shards.manifest import Manifest
from shards.order import ORDER_VERSION, Order, TrainPlan
from shards.sample import DataError
from unet import DataSpec, SegmentationLoss, UNet

FIXED_SETTINGS = (
    *("model", "seed", "lanes", "window", "global_batch_size", "crop_size", "init_from"),
    *("loss", "optim", "augment"),
)
"""Settings and groups of settings that must not change on resume. The first that has changed is
reported, and the preset of the model decides defaults of others."""

OF_ENCODERS = (
    *("model.encoder", "model.encoder_weights", "model.freeze_encoder", "model.freeze_until"),
    *("model.encoder_input", "model.drop_path", "optim.encoder_lr_scale"),
)
"""Settings that are fixed for a run with an encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSetup:
    """A configuration, resolved for its data set, its device and its ranks."""

    config: TrainConfig
    """With resolved defaults, as RUN/config.yaml records it."""
    manifest: Manifest
    order: Order
    crop_size: int
    """Side of the square crops, in pixels."""
    global_batch_size: int
    """Samples of an optimizer step, over all ranks."""
    passes: int
    """Forward passes of a step on each rank; 1 until `--accumulate auto` is resolved."""
    rank: int = 0
    world: int = 1

    @property
    def batch_size(self) -> int:
        """Samples of a forward pass of this rank."""
        return self.global_batch_size // (self.world * self.passes)

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.config.run_dir)

    @property
    def limits(self) -> Limits:
        """What ends the run."""
        return self.config.length.limits(self.order.num_samples, self.global_batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Everything that the training loop works with."""

    setup: TrainSetup
    accelerator: Accelerator
    data: DataSet
    learner: Learner
    spec: DataSpec
    model: nn.Module
    """The learner's model as Accelerate runs it on several ranks."""
    optimizer: AcceleratedOptimizer
    criterion: SegmentationLoss
    augment: Augment
    batches: Iterator[Batch]
    training_pass: TrainingPass
    budget: Budget
    tracker: Tracker
    progress: Progress
    meter: Meter
    first_step: int
    """Step of the checkpoint that training started from."""


def resolve(config: TrainConfig, manifest: Manifest) -> TrainSetup:
    """Resolve what the data set decides.

    Raises DataError or UsageError before any device is touched.
    """
    if config.fold is not None:
        number, count = parse_part("--fold", config.fold)
        manifest = assign_folds(config.data, manifest, count).hold_out(number)
    train_split = manifest.split("train", config.data)
    if config.schedule.val:
        refuse_empty_val(manifest, config.data)
    batch, order = config.batch, config.order
    global_batch_size = batch.global_batch_size or GLOBAL_BATCH_SIZE[config.model.preset]
    crop_size = choose_crop_size(config.model, batch.crop_size, manifest)
    refuse_missing(config.loss, manifest, config.data)
    config.augment.refuse_for_grey(manifest.image_format.channels)
    sizes = tuple(shard.samples for shard in train_split.shards)
    batch = replace(batch, global_batch_size=global_batch_size, crop_size=crop_size)
    model = replace(config.model, deep_supervision=config.model.network().deep_supervision)
    return TrainSetup(
        config=replace(config, batch=batch, model=model),
        manifest=manifest,
        order=Order(sizes, order.seed, order.lanes, order.window),
        crop_size=crop_size,
        global_batch_size=global_batch_size,
        passes=1 if batch.accumulate == "auto" else batch.accumulate,
    )


def refuse_empty_val(manifest: Manifest, data: str) -> None:
    """Raise DataError, naming the remedies, if there are no samples for validation."""
    try:
        manifest.split("val", data)
    except DataError as error:
        raise DataError(
            f"{error}; pack with --val-fraction, or train without validation: --no-val"
        ) from error


def start_accelerator(setup: TrainSetup) -> tuple[Accelerator, TrainSetup]:
    """Start on the devices and resolve what they and the number of ranks decide.

    Raises UsageError if the batch does not divide among the ranks.
    """
    config = setup.config
    use_deterministic(config.compute.deterministic)
    accelerator = start(
        setup.passes,
        trackers=config.tracking.trackers(),
        project_dir=config.run_dir,
        rank_timeout=config.rank_timeout,
    )
    device = accelerator.device
    batch_size = choose_batch_size(config.tiles.batch_size, device)
    channels_last = choose_channels_last(
        config.compute.channels_last, device, compiled=config.compute.compile
    )
    config = replace(
        config,
        tiles=replace(config.tiles, batch_size=batch_size),
        compute=replace(config.compute, channels_last=channels_last),
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    setup = replace(setup, config=config, rank=rank, world=world)
    refuse_uneven_batch(setup.global_batch_size, world, setup.passes)
    refuse_batch_norm(setup, device)
    return accelerator, setup


def refuse_batch_norm(setup: TrainSetup, device: torch.device) -> None:
    """Raise UsageError if batch norm would see a single value per channel, or cannot be synced."""
    network = setup.config.model.network()
    if network.norm != "batch":
        return
    if setup.world > 1 and device.type != "cuda":
        raise UsageError(
            "--model.norm batch is synchronised over ranks on GPUs only; on CPUs use instance or "
            "group"
        )
    if setup.batch_size * (setup.crop_size // 2**network.depth) < 2:
        raise UsageError(
            f"--model.norm batch sees one value of each channel in crops of {setup.crop_size} "
            "pixels, one a pass; raise --crop-size or --global-batch-size"
        )


def load_learner(
    setup: TrainSetup, accelerator: Accelerator, checkpoints: Checkpoints
) -> tuple[Learner, TrainState]:
    """Build the model, its optimizer and average, and load the last checkpoint if there is one.

    Raises UsageError naming a setting that must not change on resume, or if the encoder does not
    fit the run.
    """
    config = setup.config
    set_seed(config.order.seed)
    saved = [setup.folder.last, *list_checkpoints(setup.folder)]
    model = prepare_model(setup, accelerator, next(filter(Path.is_dir, saved), None))
    refuse_encoder_batch_norm(model, config, accelerator, setup.batch_size)
    learner = build_learner(model, config.optim)
    fixed = fixed_settings(setup)
    state = checkpoints.resume(fixed, learner, accelerator.scaler, config.data)
    if config.compute.compile:
        learner.model.compile()
    return learner, state


def prepare_model(setup: TrainSetup, accelerator: Accelerator, resumed: Path | None) -> UNet:
    """Build the model on its device, in the memory format of the run.

    `resumed`: checkpoint of the run, whose weights are loaded later.
    """
    config = setup.config
    backbone = prepare_backbone(config, setup.manifest, accelerator, resumed)
    encoder = None if backbone is None else backbone.config
    model = build_model(
        *(config.model, setup.manifest, setup.crop_size, encoder, config.augment.orientation)
    )
    if backbone is not None:
        initialise_encoder(model, backbone, frozen=config.model.freeze_encoder)
    if config.init_from is not None and resumed is None:
        load_initial_weights(model, config.init_from, config.fold)
    model = model.to(accelerator.device)
    if config.compute.channels_last:
        # torch's stubs lack this overload.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # SyncBatchNorm does not exist on CPUs.
        synchronise_batch_norm(model)
    model.gradient_checkpointing = config.compute.gradient_checkpointing
    return model


def fixed_settings(setup: TrainSetup) -> dict[str, Any]:
    """Return the settings that must not change on resume, by flag name."""
    plain = to_plain(setup.config)
    groups = {name: plain[name] for name in FIXED_SETTINGS}
    flat = {
        f"{name}.{key}" if key else name: value
        for name, group in groups.items()
        for key, value in (group.items() if isinstance(group, dict) else [("", group)])
    }
    if setup.config.model.encoder is None:
        # Runs of versions without encoders are resumed.
        flat = {name: value for name, value in flat.items() if name not in OF_ENCODERS}
    if not setup.config.model.deep_supervision:
        # Nor did they have this.
        del flat["model.deep_supervision"]
    if setup.config.fold is not None:
        flat["fold"] = setup.config.fold
    return {**flat, "order_version": ORDER_VERSION, "manifest": setup.manifest.digest}


def resolve_passes(setup: TrainSetup, accelerator: Accelerator, learner: Learner) -> TrainSetup:
    """Resolve `--accumulate auto` by trial. Accelerate accumulates that many passes from here on.

    Every rank must call this.
    """
    config = setup.config
    if config.batch.accumulate != "auto":
        return setup
    probe = Probe(
        accelerator,
        learner,
        build_loss(config.loss, setup.manifest).to(accelerator.device),
        Augment(config.augment, config.order.seed),
        setup.crop_size,
        border=config.loss.border_weight > 0,
        benchmark=not config.compute.deterministic,
    )
    samples = setup.batch_size
    passes = probe.choose_passes(samples)
    config = replace(config, batch=replace(config.batch, accumulate=passes))
    setup = replace(setup, config=config, passes=passes)
    accelerator.gradient_accumulation_steps = passes
    if accelerator.is_main_process:
        print(describe_passes(accelerator.device, passes, samples), file=sys.stderr)
    refuse_batch_norm(setup, accelerator.device)
    refuse_encoder_batch_norm(learner.model, config, accelerator, setup.batch_size)
    return setup


def open_splits(setup: TrainSetup, accelerator: Accelerator) -> DataSet:
    """Open the training and, unless --no-val, the validation split for this rank."""
    config = setup.config
    chunk = config.tiles.effective_batch_size
    splits = ["train", "val"] if config.schedule.val else ["train"]
    in_use = train_bytes_in_use(setup.order, setup.manifest, splits, accelerator, chunk)
    remedy = "raise it, or start a run with a smaller --window"
    return open_data(
        config.data, config.loading, setup.manifest, splits, accelerator, in_use, remedy
    )


def open_training(
    setup: TrainSetup,
    accelerator: Accelerator,
    data: DataSet,
    learner: Learner,
    state: TrainState,
) -> Training:
    """Open what the loop works with, and write RUN/config.yaml and RUN/environment.json."""
    config, manifest, device = setup.config, setup.manifest, accelerator.device
    # Only these two: a prepared loader would be split or dispatched a second time. The optimizer's
    # state stays where it is: moved to the GPU after a resume, AdamW's step counters would
    # synchronise with it at every step.
    model, optimizer = accelerator.prepare(
        learner.model, learner.optimizer, device_placement=[True, False]
    )
    model.train()
    criterion = build_loss(config.loss, manifest).to(device)
    names, due = ("loss", *criterion.names, "gradient"), config.schedule.checkpoint_due
    budget = Budget(
        accelerator, setup.limits, watched=names, saves=due, step=state.step, seconds=state.seconds
    )
    if accelerator.is_main_process:
        write_environment(setup.folder, accelerator)
    flops = count_flops(
        learner.model.config,
        setup.batch_size,
        setup.crop_size,
        frozen_encoder=config.model.freeze_encoder,
    )
    return Training(
        setup=setup,
        accelerator=accelerator,
        data=data,
        learner=learner,
        spec=require_spec(learner.model),
        model=model,
        optimizer=optimizer,
        criterion=criterion,
        augment=Augment(config.augment, config.order.seed),
        tracker=Tracker(
            *(accelerator, config.tracking, setup.folder, to_plain(config)),
            *(describe_network(learner.model), manifest, state),
        ),
        batches=open_batches(setup, data, device, state.position),
        training_pass=TrainingPass(
            *(device, setup.batch_size, setup.crop_size, config.compute.gradient_checkpointing),
            benchmark=not config.compute.deterministic,
        ),
        budget=budget,
        progress=Progress(accelerator, budget),
        meter=Meter(criterion.names, accelerator, flops),
        first_step=state.step,
    )


def open_batches(
    setup: TrainSetup, data: DataSet, device: torch.device, position: int
) -> Iterator[Batch]:
    """Open the endless batches of this rank, from a position of the stream."""
    config = setup.config
    return train_batches(
        data,
        TrainPlan(setup.order, setup.batch_size, setup.rank, setup.world, start=position),
        crop_size=setup.crop_size,
        augment=config.augment,
        seed=config.order.seed,
        margin=config.model.network().margin,
        border=config.loss.border_weight > 0,
        skip=config.batch.bad_samples == "skip",
        pin=device.type == "cuda",
    )
