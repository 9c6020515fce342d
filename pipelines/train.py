"""`unet train`: train a U-Net on shards, or go on where the run folder stands.

    unet train --data D --run-dir R
    accelerate launch --config_file accelerate_config.yaml -m pipelines.train --data D --run-dir R

Devices, process count and precision are the launcher's; everything else is a TrainConfig.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from pipelines import scoring
from pipelines.augment import Augment, AugmentConfig
from pipelines.batches import Batch, common_side, train_batches
from pipelines.budget import Budget, Limits
from pipelines.checkpoint import Checkpoints, RunLock, TrainState, require_spec
from pipelines.config import INTERRUPTED, RunError, UsageError, run_command, to_plain
from pipelines.dataset import DataConfig, DataSet, open_data, train_in_use
from pipelines.devices import start
from pipelines.optim import Learner, OptimConfig, build_learner, learning_rate, set_learning_rate
from pipelines.tracking import Tracker, TrackingConfig
from shards.index import Manifest, read_manifest
from shards.order import LANES, ORDER_VERSION, WINDOW, Order, TrainPlan
from shards.reader import ShardReader
from shards.writer import write_json
from unet import (
    PRESETS,
    DataSpec,
    LossConfig,
    Scores,
    SegmentationLoss,
    TileConfig,
    UNet,
    UNetConfig,
    inverse_frequency,
    valid_input,
)
from unet.blocks import Activation, Norm, Upsampling

DEFAULT_STEPS = 10_000
CROP_SIZE = {"modern": 512, "paper": 572, "small": 256}
"""Largest default crop of each preset, in pixels."""
GLOBAL_BATCH_SIZE = {"modern": 8, "paper": 1, "small": 2}
"""Default of each preset. Where a step takes long, more and smaller steps learn faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which U-Net."""

    preset: Literal["modern", "paper", "small"] = "modern"
    """modern: 31 M parameters. small: 1.9 M, for laptops. paper: the network of 2015, which sees a
    margin of mirrored pixels around each picture."""
    base_channels: int | None = None
    """Channels of the first level; left out: the preset's (64, 16)."""
    depth: int | None = None
    """How many times the picture is halved; left out: the preset's (4)."""
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


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Train a U-Net on shards. The same command, given again, goes on where it was interrupted.

    --steps, --epochs and --minutes bound the run, whichever is reached first; the learning rate
    falls to 0 just then. Without any of them it makes 10,000 steps.
    """

    run_dir: Path
    """Folder of this run: config.yaml, metrics.jsonl, checkpoints."""
    steps: int | None = None
    """Optimizer steps of the whole run."""
    epochs: float | None = None
    """Passes over the training split."""
    minutes: float | None = None
    """Wall-clock minutes of training, validation included, added up over resumes."""
    global_batch_size: int | None = None
    """Samples of one optimizer step, over all ranks. It belongs to the run, not to the machine.
    Left out: 8 (2 with the preset small, 1 with paper)."""
    accumulate: int = 1
    """Forward passes that a rank splits its part of a step into."""
    compile: bool = False
    """Compile the network for training (torch.compile): a minute at the start, faster steps."""
    channels_last: bool = False
    """Keep maps as [B, H, W, C] in memory, as the matrix units of GPUs want them in bf16."""
    gradient_checkpointing: bool = False
    """Keep fewer maps and compute the others twice: a third slower, for larger crops or batches."""
    crop_size: int | None = None
    """Side of the square training crops; left out: what most pictures hold, at most 512 pixels
    (256 with the preset small). With the preset paper it includes the margin: 572 show 388."""
    bad_samples: Literal["raise", "skip"] = "raise"
    """A training sample that cannot be decoded ends the run, or another one takes its place."""
    max_bad_share: float = 0.01
    """With `skip`: the share of the samples drawn (of one epoch, before that is over) that may be
    replaced before the run ends all the same."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between validations, each followed by a checkpoint; one always ends the run."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep besides the best."""
    seed: int = 0
    """Seed of weights, order, crops and augmentation."""
    lanes: int = LANES
    """Lanes of the sample order; ranks read apart from each other where they divide it."""
    window: int = WINDOW
    """Samples that are shuffled together within a lane."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tiles: TileConfig = field(default_factory=TileConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "minutes", "crop_size", "global_batch_size"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in (
            "accumulate",
            "log_every",
            "eval_every",
            "keep_checkpoints",
            "lanes",
            "window",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError("seed must not be below 0")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is a share, 0 to 1, got {self.max_bad_share}")
        if self.gradient_checkpointing and self.model.network().norm == "batch":
            raise ValueError(
                "--gradient-checkpointing would count every batch twice in the averages of "
                "--model.norm batch; take instance or group"
            )
        DataConfig.__post_init__(self)

    def limits(self, num_samples: int) -> Limits:
        """What ends the run, in steps and minutes."""
        steps = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            steps.append(max(1, round(self.epochs * num_samples / self.step_samples())))
        if not steps and self.minutes is None:
            steps = [DEFAULT_STEPS]
        return Limits(min(steps) if steps else None, self.minutes)

    def step_samples(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.global_batch_size or GLOBAL_BATCH_SIZE[self.model.preset]


def run(config: TrainConfig) -> int:
    """Run or resume to the end; 75 if a signal interrupted it."""
    manifest = read_manifest(config.data)
    config, order = resolve(config, manifest)
    accelerator = start(accumulate=config.accumulate, trackers=config.tracking.trackers())
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_size = rank_batch_size(config, world)
    _lock = RunLock(config.run_dir) if accelerator.is_main_process else None

    set_seed(config.seed)
    learner = build_learner(build_model(config, manifest, accelerator), config.optim)
    spec = require_spec(learner.model)
    checkpoints = Checkpoints(config.run_dir, config.keep_checkpoints)
    state = checkpoints.resume(fixed_settings(config, manifest), learner, accelerator.scaler)
    if config.compile:
        learner.model.compile()
    # Only these two: a prepared loader is split or dispatched a second time.
    model, optimizer = accelerator.prepare(learner.model, learner.optimizer)
    model.train()

    in_use = train_in_use(order, manifest, accelerator, config.tiles.batch_size)
    remedy = "raise it, or begin a run with a smaller --window"
    data = open_data(config, manifest, ["train", "val"], accelerator, in_use, remedy)
    budget = Budget(
        accelerator, config.limits(order.num_samples), step=state.step, seconds=state.seconds
    )
    if budget.spent and state.validated == state.step:
        accelerator.end_training()
        return conclude(config, budget, state, None, accelerator)

    tracker = Tracker(accelerator, config.tracking, config.run_dir, to_plain(config), state)
    state = replace(state, tracking_id=tracker.run_id)
    criterion = build_loss(config, manifest, spec).to(accelerator.device)
    augment = Augment(config.augment, config.seed)
    plan = TrainPlan(order, batch_size, rank, world, start=state.position)
    batches = open_batches(config, data, plan, accelerator)
    progress, meter = Progress(accelerator, budget), Meter(criterion.names, accelerator)
    scores = None

    while not budget.interrupted:
        if validation_due(config, budget, state):
            scores = scoring.score(learner.scored, accelerator, data, "val", config.tiles)
            tracker.log(budget.step, scoring.named(scores, "val"))
            progress.say(f"step {budget.step}: {scoring.headline(scores, 'val')}")
            dice = scores.macro.dice or 0.0
            is_best = state.best is None or dice > state.best
            state = replace(state, validated=budget.step, best=dice if is_best else state.best)
            save(checkpoints, state, learner, accelerator, is_best=is_best)
            meter.reset()
        if budget.spent:
            break

        lr = learning_rate(config.optim, budget.progress)
        set_learning_rate(optimizer, lr)
        for _ in range(config.accumulate):
            with meter.waiting():
                batch = next(batches)
            batch = batch.to(accelerator.device)
            seed_dropout(config.seed, batch.position)
            with accelerator.accumulate(model):
                image, mask = augment(spec.normalise(batch.image), batch.mask, batch.position)
                border = augment.border(batch.border, batch.position)
                loss, parts = criterion(model(image), mask, border)
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.optim.clip_norm:
                    accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            budget.watch(loss)
            meter.add(loss, parts, batch.skipped)
        if learner.average is not None:
            learner.average.update(learner.model, budget.step + 1)
        if bad_step := budget.advance():
            raise RunError(not_finite(bad_step, config, manifest, order))

        position = budget.step * config.step_samples()
        state = replace(state, step=budget.step, position=position, seconds=budget.seconds)
        if budget.step % config.log_every == 0 or budget.spent or budget.interrupted:
            values = meter.read(config.step_samples())
            refuse_many_skips(config, values, order.num_samples, position - plan.start)
            tracker.log(budget.step, {**values, "train/lr": lr})
            progress.show(values)
    else:
        save(checkpoints, state, learner, accelerator, is_best=False)

    progress.close()
    tracker.finish()
    return conclude(config, budget, state, scores, accelerator)


def validation_due(config: TrainConfig, budget: Budget, state: TrainState) -> bool:
    """Whether these weights are to be scored now: every so often and at the end, but once."""
    if state.validated == budget.step:
        return False
    return budget.spent or budget.step % config.eval_every == 0


def resolve(config: TrainConfig, manifest: Manifest) -> tuple[TrainConfig, Order]:
    """What the data set decides. Raises DataError or UsageError before any device is touched."""
    train_split = manifest.split("train", config.data)
    manifest.split("val", config.data)
    config = replace(config, global_batch_size=config.step_samples())
    network = config.model.network()
    if config.crop_size is None:
        shown = common_side(train_split) + 2 * network.margin
        size = default_crop_size(network, min(shown, CROP_SIZE[config.model.preset]))
        config = replace(config, crop_size=size)
    try:
        assert config.crop_size is not None
        network.require_side(config.crop_size)
    except ValueError as error:
        raise UsageError(f"--crop-size: {error}") from error
    if config.loss.border_weight and manifest.border_sigma is None:
        raise UsageError(
            f"--loss.border-weight needs border maps, {config.data} has none; pack it with "
            "--border-sigma 5"
        )
    if config.loss.class_weights != "none" and not class_pixels(manifest):
        raise UsageError(
            f"--loss.class-weights needs the pixels of each class, which {config.data} does not "
            "know; pack it with --verify full"
        )
    sizes = tuple(shard.samples for shard in train_split.shards)
    return config, Order(sizes, config.seed, config.lanes, config.window)


def default_crop_size(network: UNetConfig, most: int) -> int:
    """The largest side of crops, at most `most` pixels; the least where there is none."""
    if network.padding == "same":
        return max(32, most // 32 * 32)
    step = 2**network.depth
    larger = valid_input(most - 2 * network.margin + 1, network.depth)
    return max(valid_input(1, network.depth), larger - step)


def rank_batch_size(config: TrainConfig, world: int) -> int:
    """Samples of one forward pass of one rank. Raises UsageError where the step does not divide."""
    samples = config.step_samples()
    size, rest = divmod(samples, world * config.accumulate)
    if rest or not size:
        passes = world * config.accumulate
        below = samples // passes * passes
        fitting = [str(number) for number in (below, below + passes) if number]
        raise UsageError(
            f"--global-batch-size {samples} does not divide among {world} ranks x "
            f"{config.accumulate} accumulated passes; {' or '.join(fitting)} would"
        )
    return size


def build_model(config: TrainConfig, manifest: Manifest, accelerator: Accelerator) -> UNet:
    """A fresh model that knows its data, on its device."""
    assert config.crop_size is not None
    spec = DataSpec(
        classes=manifest.classes,
        palette=manifest.palette,
        channels=manifest.image_format.channels,
        mean=manifest.mean,
        std=manifest.std,
        crop_size=config.crop_size,
        image_range=manifest.image_format.range,
        alpha=manifest.image_format.alpha,
    )
    network = config.model.network(
        in_channels=len(manifest.image_format.channels), num_classes=len(manifest.classes)
    )
    model = UNet(network, spec).to(accelerator.device)
    if config.channels_last:
        # Which torch's stubs leave out.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # In place; on CPUs there is no such norm.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def build_loss(config: TrainConfig, manifest: Manifest, spec: DataSpec) -> SegmentationLoss:
    """The loss, with the weights of this data set's classes."""
    weights = None
    if config.loss.class_weights == "inverse":
        weights = inverse_frequency(class_pixels(manifest))
    return SegmentationLoss(config.loss, spec.counted, weights)


def class_pixels(manifest: Manifest) -> list[int]:
    """Pixels of each class in the training split; none where they were not counted."""
    counts = [shard.pixels for shard in manifest.splits["train"].shards]
    return [sum(pixels) for pixels in zip(*counts, strict=True)][: len(manifest.classes)]


def seed_dropout(seed: int, position: Tensor) -> None:
    """What is dropped belongs to the samples: after a resume it is the same."""
    torch.manual_seed((seed * 2**40 + int(position[0])) % 2**63)


def fixed_settings(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What must not change on resume, by the name of its flag."""
    plain = to_plain(config)
    names = (
        "seed",
        "lanes",
        "window",
        "global_batch_size",
        "crop_size",
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


class Meter:
    """Means of the losses and rates since they were last read; nothing leaves the device before."""

    def __init__(self, names: Sequence[str], accelerator: Accelerator) -> None:
        self.names = ["train/loss", *(f"train/loss_{name}" for name in names)]
        self.accelerator = accelerator
        self.skipped = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.sums = torch.zeros(len(self.names), device=self.accelerator.device)
        self.passes, self.steps, self.waited, self.began = 0, 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as spent waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, loss: Tensor, parts: Tensor, skipped: Sequence[str]) -> None:
        """Count the losses of one forward pass, and tell what was skipped for it."""
        self.sums += torch.cat([loss.detach()[None], parts])
        self.passes += 1
        self.skipped += len(skipped)
        for line in skipped:
            # Of every rank: nobody else knows.
            tqdm.write(f"skipped: {line}", file=sys.stderr)

    def read(self, global_batch_size: int) -> dict[str, float]:
        """The means over passes and ranks, samples per second, and the share of time waited.

        `train/skipped`: samples of all ranks that were replaced since the run was started.
        """
        skipped = torch.tensor([self.skipped], device=self.sums.device)
        mine = torch.cat([self.sums / max(1, self.passes), skipped])
        mean = self.accelerator.reduce(mine, "mean")
        assert isinstance(mean, Tensor)
        *means, mean_skipped = mean.tolist()
        seconds = max(1e-9, time.perf_counter() - self.began)
        steps = self.passes / self.accelerator.gradient_accumulation_steps
        values = {
            **dict(zip(self.names, means, strict=True)),
            "train/samples_per_second": steps * global_batch_size / seconds,
            "train/data_wait": self.waited / seconds,
            "train/skipped": round(mean_skipped * self.accelerator.num_processes),
        }
        self.reset()
        return values


class Progress:
    """What a person sees while a run goes on: a bar on a terminal, else a line now and then."""

    def __init__(self, accelerator: Accelerator, budget: Budget) -> None:
        self.speaks, self.budget = accelerator.is_main_process, budget
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=1000,
            initial=round(1000 * budget.progress),
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=not (self.speaks and self.terminal),
        )

    def show(self, values: dict[str, float]) -> None:
        """The latest numbers."""
        text = (
            f"step {self.budget.step}, loss {values['train/loss']:.4f}, "
            f"{values['train/samples_per_second']:.1f} samples/s, "
            f"waited {values['train/data_wait']:.0%}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(round(1000 * self.budget.progress) - self.bar.n)
        if not self.terminal:
            self.say(f"{self.budget.progress:4.0%}  {text}")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.speaks:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    learner: Learner,
    accelerator: Accelerator,
    *,
    is_best: bool,
) -> None:
    """Write a checkpoint on the main process; the others wait, so that none runs ahead of it."""
    if accelerator.is_main_process:
        checkpoints.save(state, learner, accelerator.scaler, is_best=is_best)
    accelerator.wait_for_everyone()


def refuse_many_skips(
    config: TrainConfig, values: dict[str, float], num_samples: int, drawn: int
) -> None:
    """Raise RunError, on all ranks, where more samples were replaced than the user allows."""
    allowed = config.max_bad_share * max(num_samples, drawn)
    if values["train/skipped"] > allowed:
        raise RunError(
            f"{values['train/skipped']:,} samples could not be decoded, more than "
            f"--max-bad-share {config.max_bad_share} allows; they are named above: repair or "
            "remove them and pack again, or raise it"
        )


def not_finite(step: int, config: TrainConfig, manifest: Manifest, order: Order) -> str:
    """Which step, and which samples were in it."""
    reader = ShardReader(config.data, manifest.splits["train"].shards)
    samples = config.step_samples()
    addresses = [order.locate((step - 1) * samples + i) for i in range(samples)]
    keys = [reader.read(address).key for address in addresses[:8]]
    more = f" and {len(addresses) - 8} more" if len(addresses) > 8 else ""
    return (
        f"the loss of step {step} is not finite; its samples are {', '.join(keys)}{more}; "
        "lower --optim.lr, or look at them; the last checkpoint is whole"
    )


def conclude(
    config: TrainConfig,
    budget: Budget,
    state: TrainState,
    scores: Scores | None,
    accelerator: Accelerator,
) -> int:
    """Write RUN/state.json, say how it ended and how to go on; the exit code."""
    finished = not budget.interrupted
    if accelerator.is_main_process:
        go_on = f"unet train --data {config.data} --run-dir {config.run_dir}"
        plain = {
            "finished": finished,
            "step": state.step,
            "best": state.best,
            "seconds": state.seconds,
        }
        write_json(
            config.run_dir / "state.json",
            {**plain, "go_on": None if finished else f"the same command again ({go_on} ...)"},
        )
        if not finished:
            print(f"interrupted at step {state.step}, checkpoint saved; the same command goes on")
        else:
            if scores is None:
                print(f"{config.run_dir} had finished at step {state.step}")
                print("to train on, raise its --steps, --epochs or --minutes")
            else:
                print(
                    f"finished at step {state.step}, {state.seconds:.0f} s\n{scoring.table(scores)}"
                )
            checkpoint = f"--checkpoint {config.run_dir}"
            print(f"next: unet evaluate {checkpoint} --data {config.data} --split val")
            print(f"      unet predict {checkpoint} --input PICTURES --out MASKS --png --overlay")
    if budget.interrupted and accelerator.num_processes == 1:
        return INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(TrainConfig, run, argv, "train")


if __name__ == "__main__":
    sys.exit(main())
