"""`unet train`: train a U-Net on shards, or go on where the run folder stands.

    unet train --data D --run-dir R
    accelerate launch --config_file accelerate_config.yaml -m pipelines.train --data D --run-dir R

Devices, process count and precision are the launcher's; everything else is a TrainConfig.
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from pipelines import scoring
from pipelines.augment import Augment, AugmentConfig
from pipelines.batches import Batch, train_batches
from pipelines.budget import Budget, Limits, NotFinite
from pipelines.checkpoint import Checkpoints, RunLock, TrainState, require_spec
from pipelines.config import INTERRUPTED, RunError, UsageError, run_command, to_plain
from pipelines.dataset import DataConfig, DataSet, open_data, train_in_use
from pipelines.devices import choose_batch_size, choose_channels_last, start, use_deterministic
from pipelines.flops import count_flops
from pipelines.memory_probe import Probe, describe_passes
from pipelines.meter import Meter
from pipelines.network import (
    ModelConfig,
    begin_with,
    build_loss,
    build_model,
    choose_crop_size,
    refuse_missing,
)
from pipelines.optim import Learner, OptimConfig, build_learner, learning_rate, set_learning_rate
from pipelines.passes import TrainingPass
from pipelines.pictures import draw_batch, draw_validation
from pipelines.record import write_environment
from pipelines.summary import close_run
from pipelines.tracking import Tracker, TrackingConfig
from shards.index import Manifest, read_manifest
from shards.order import LANES, ORDER_VERSION, WINDOW, Order, TrainPlan
from shards.reader import ShardReader
from shards.writer import write_json
from unet import LossConfig, Scores, TileConfig, UNet

DEFAULT_STEPS = 10_000
GLOBAL_BATCH_SIZE = {"modern": 8, "paper": 1, "small": 2}
"""Default of each preset. Where a step takes long, more and smaller steps learn faster."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Train a U-Net on shards. The same command, given again, goes on where it was interrupted.

    --steps, --epochs and --minutes bound the run, whichever is reached first; the learning rate
    falls to 0 just then (--optim.schedule). Without any of them it makes 10,000 steps.
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
    accumulate: int | Literal["auto"] = 1
    """Forward passes that a rank splits its part of a step into. auto: the fewest that fit into the
    memory of every GPU, found by trying at the start, also of a resume; 1 without a GPU."""
    compile: bool = False
    """Compile the network for training (torch.compile): a minute at the start, faster steps.
    Validation runs it uncompiled, since every size of image would be compiled anew."""
    channels_last: tyro.conf.DisallowNone[bool | None] = None
    """Keep maps as [B, H, W, C] in memory, as the matrix units of GPUs want them in bf16. Left out:
    on a GPU with --compile; without that, instance norm would copy every map back."""
    gradient_checkpointing: bool = False
    """Keep fewer maps and compute the others twice: a third slower, for larger crops or batches."""
    deterministic: bool = False
    """Take only algorithms that give the same bits every time on the same kind of GPU, so that a
    resumed run equals one that was never interrupted; slower. CPUs do so anyway."""
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
    save_every: int | None = None
    """Steps between further checkpoints, without a validation."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep besides the best."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept for good."""
    best_by: scoring.MeanName = "dice"
    """The score that decides which checkpoint is the best: the mean over classes of Dice or IoU
    over all pixels, or of those of single pictures."""
    patience: int | None = None
    """Validations in a row without a better score after which the run ends."""
    init_from: str | None = None
    """A run folder, checkpoint folder or hub id whose weights a new run begins with; the last layer
    begins afresh where the classes are others."""
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
            "save_every",
            "keep_checkpoints",
            "keep_every",
            "patience",
            "lanes",
            "window",
        ):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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

    @property
    def passes(self) -> int:
        """Forward passes of a step on each rank; 1 as long as that is left to be found."""
        return 1 if self.accumulate == "auto" else self.accumulate

    def saves(self, step: int) -> bool:
        """Whether weights are scored or saved after a step, not counting the last."""
        often = (self.eval_every, *([self.save_every] if self.save_every else []))
        return any(step % every == 0 for every in often)

    def step_samples(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.global_batch_size or GLOBAL_BATCH_SIZE[self.model.preset]


def run(config: TrainConfig) -> int:
    """Run or resume to the end; 75 if a signal interrupted it."""
    with Checkpoints(config.run_dir, config.keep_checkpoints, config.keep_every) as checkpoints:
        return train(config, checkpoints)


def train(config: TrainConfig, checkpoints: Checkpoints) -> int:
    """Run or resume to the end, with what is saved in the hands of a thread; the exit code."""
    manifest = read_manifest(config.data)
    config, order = resolve(config, manifest)
    trackers = config.tracking.trackers()
    use_deterministic(config.deterministic)
    accelerator = start(
        config.passes,
        trackers=trackers,
        project_dir=config.run_dir,
        rank_timeout=config.rank_timeout,
    )
    tile_batch = choose_batch_size(config.tiles.batch_size, accelerator.device)
    config = replace(
        config,
        tiles=replace(config.tiles, batch_size=tile_batch),
        channels_last=choose_channels_last(
            config.channels_last, accelerator.device, compiled=config.compile
        ),
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_size = rank_batch_size(config, world)
    refuse_batch_norm(config, accelerator, batch_size)
    _lock = RunLock(config.run_dir) if accelerator.is_main_process else None

    set_seed(config.seed)
    init_from = None if checkpoints.begun else config.init_from
    model = prepare_model(config, manifest, accelerator, init_from)
    learner, spec = build_learner(model, config.optim), require_spec(model)
    state = checkpoints.resume(fixed_settings(config, manifest), learner, accelerator.scaler)
    if config.compile:
        learner.model.compile()
    if config.accumulate == "auto":
        config = find_passes(config, manifest, accelerator, learner)
        batch_size = rank_batch_size(config, world)
        refuse_batch_norm(config, accelerator, batch_size)
    # Only these two: a prepared loader is split or dispatched a second time. The optimizer's state
    # is where it belongs; placed again after a resume, AdamW's step counters would lie on the GPU,
    # and each step would wait for every one of them.
    placed = [True, False]
    model, optimizer = accelerator.prepare(
        learner.model, learner.optimizer, device_placement=placed
    )
    model.train()

    in_use = train_in_use(order, manifest, accelerator, config.tiles.num_together)
    remedy = "raise it, or begin a run with a smaller --window"
    data = open_data(config, manifest, ["train", "val"], accelerator, in_use, remedy)
    criterion = build_loss(config.loss, manifest).to(accelerator.device)
    budget = Budget(
        accelerator,
        config.limits(order.num_samples),
        watched=("loss", *criterion.names, "gradient"),
        saves=config.saves,
        step=state.step,
        seconds=state.seconds,
    )
    if (budget.spent and state.validated == state.step) or given_up(config, state):
        accelerator.end_training()
        return conclude(config, budget, state, None, accelerator)

    if accelerator.is_main_process:
        write_environment(config.run_dir, accelerator)
    tracker = Tracker(accelerator, config.tracking, config.run_dir, to_plain(config), state)
    state = replace(state, tracking_id=tracker.run_id)
    augment = Augment(config.augment, config.seed)
    plan = TrainPlan(order, batch_size, rank, world, start=state.position)
    batches = open_batches(config, data, plan, accelerator)
    flops = count_flops(learner.model.config, batch_size, spec.crop_size)
    progress, meter = Progress(accelerator, budget), Meter(criterion.names, accelerator, flops)
    training_pass = TrainingPass(
        *(accelerator.device, batch_size, config.crop_size, config.gradient_checkpointing),
        benchmark=not config.deterministic,
    )
    scores = None

    while not budget.interrupted:
        checkpoints.raise_failure()
        if validation_due(config, budget, state):
            with uncompiled(config):
                scores = scoring.score(learner.scored, accelerator, data, "val", config.tiles)
            tracker.log(budget.step, scoring.named(scores, "val"))
            progress.say(f"step {budget.step}: {scoring.headline(scores, 'val')}")
            state = judge(state, scoring.mean_of(scores, config.best_by) or 0.0)
            save(checkpoints, state, learner, accelerator, is_best=state.stale == 0)
            drawn = partial(draw_validation, learner.scored, accelerator, data, config.tiles)
            with uncompiled(config):
                tracker.show(budget.step, "val/pictures", partial(drawn, config.tracking.pictures))
            progress.dice = scores.macro.dice
            meter.reset()
        elif budget.step > plan.start // config.step_samples() and config.saves(budget.step):
            save(checkpoints, state, learner, accelerator, is_best=False)
        if budget.spent or given_up(config, state):
            break

        lr = learning_rate(config.optim, budget.progress)
        set_learning_rate(optimizer, lr)
        for number in range(config.passes):
            with meter.waiting():
                batch = next(batches)
            batch = batch.to(accelerator.device)
            seed_dropout(config.seed, batch.position)
            with training_pass(budget.step + 1), accelerator.accumulate(model):
                pixels = spec.normalise(batch.image)
                image, mask, border = augment(pixels, batch.mask, batch.position, batch.border)
                if state.step == number == 0:
                    drawn = partial(draw_batch, spec, image, mask, config.tracking.pictures)
                    tracker.show(0, "train/first_batch", drawn)
                loss, parts = criterion(model(image), mask, border)
                accelerator.backward(loss)
                norm = clip_gradients(accelerator, model, config.optim.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses = torch.cat([loss.detach()[None], parts])
            budget.watch(torch.cat([losses, norm[None]]))
            meter.add(losses, batch.skipped)
        meter.count_overflow(optimizer.step_was_skipped)
        if learner.average is not None:
            learner.average.update(learner.model, budget.step + 1)
        if found := budget.advance():
            raise RunError(not_finite(found, config, manifest, order))

        position = budget.step * config.step_samples()
        state = replace(state, step=budget.step, position=position, seconds=budget.seconds)
        if budget.step % config.log_every == 0 or budget.spent or budget.interrupted:
            values = meter.read(config.step_samples())
            refuse_many_skips(config, values, order.num_samples, position - plan.start)
            tracker.log(budget.step, {**values, "train/lr": lr})
            progress.show(values)
    else:
        save(checkpoints, state, learner, accelerator, is_best=False)

    finish_saving(checkpoints, accelerator)
    progress.close()
    tracker.finish(checkpoints.folder / "best")
    return conclude(config, budget, state, scores, accelerator)


def judge(state: TrainState, score: float) -> TrainState:
    """The state after a validation; `stale` is 0 where it is the best so far."""
    is_best = state.best is None or score > state.best
    return replace(
        state,
        validated=state.step,
        best=score if is_best else state.best,
        stale=0 if is_best else state.stale + 1,
    )


def given_up(config: TrainConfig, state: TrainState) -> bool:
    """Whether validation has not become better for too long."""
    return config.patience is not None and state.stale >= config.patience


def clip_gradients(accelerator: Accelerator, model: nn.Module, most: float) -> Tensor:
    """Shorten the gradients, if they are whole, to a norm of `most`; their norm before [].

    0 where they are not whole yet, or where a loss scaler looks after those that overflow.
    """
    nothing = torch.zeros((), device=accelerator.device)
    if not accelerator.sync_gradients:
        return nothing
    norm = accelerator.clip_grad_norm_(model.parameters(), most or inf)
    return nothing if norm is None or accelerator.scaler is not None else norm


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
    config = replace(config, crop_size=choose_crop_size(config.model, config.crop_size, manifest))
    refuse_missing(config.loss, manifest, config.data)
    sizes = tuple(shard.samples for shard in train_split.shards)
    return config, Order(sizes, config.seed, config.lanes, config.window)


def uncompiled(config: TrainConfig) -> AbstractContextManager[None]:
    """Run a compiled network eagerly: every size of validation image would be another graph."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


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
        begin_with(model, init_from)
    model = model.to(accelerator.device)
    if config.channels_last:
        # Which torch's stubs leave out.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # In place; on CPUs there is no such norm.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


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


class Progress:
    """What a person sees while a run goes on: a bar on a terminal, else a line now and then."""

    def __init__(self, accelerator: Accelerator, budget: Budget) -> None:
        self.speaks, self.budget = accelerator.is_main_process, budget
        self.terminal = sys.stderr.isatty()
        self.dice: float | None = None
        """Of the last validation."""
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
        if self.dice is not None:
            text += f", dice {self.dice:.4f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(round(1000 * self.budget.progress) - self.bar.n)
        if not self.terminal:
            left = self.budget.seconds * (1 / max(self.budget.progress, 1e-9) - 1)
            self.say(f"{self.budget.progress:4.0%}  {text}, {timedelta(seconds=round(left))} left")

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
    """Copy a checkpoint on the main process, to be written beside training; the others wait."""
    if accelerator.is_main_process:
        checkpoints.save(state, learner, accelerator.scaler, is_best=is_best)
    accelerator.wait_for_everyone()


def finish_saving(checkpoints: Checkpoints, accelerator: Accelerator) -> None:
    """Wait on all ranks until what was saved is complete. Raises its RunError on the main one."""
    checkpoints.wait()
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


def not_finite(found: NotFinite, config: TrainConfig, manifest: Manifest, order: Order) -> str:
    """Which step, what of it, and which samples were in it."""
    reader = ShardReader(config.data, manifest.splits["train"].shards)
    samples = config.step_samples()
    addresses = [order.locate((found.step - 1) * samples + i) for i in range(samples)]
    keys = [reader.read(address).key for address in addresses[:8]]
    more = f" and {len(addresses) - 8} more" if len(addresses) > 8 else ""
    return (
        f"step {found.step}: {', '.join(found.names)} not finite; its samples are "
        f"{', '.join(keys)}{more}; "
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
    # Schedulers may say it again; Python, as it ends, would leave it to the system, which kills.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
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
        elif scores is None:
            print(f"{config.run_dir} had finished at step {state.step}")
            print("to train on, raise its --steps, --epochs or --minutes")
        else:
            why = f", no better for {state.stale} validations" if given_up(config, state) else ""
            print(f"finished at step {state.step}, {state.seconds:.0f} s{why}")
            print(scoring.table(scores))
            print(close_run(config.run_dir, accelerator))
        if finished:
            checkpoint = f"--checkpoint {config.run_dir}"
            print(f"next: unet evaluate {checkpoint} --data {config.data} --split val")
            print(f"      unet predict {checkpoint} --input PICTURES --out MASKS --png --overlay")
            print(f"      unet export {checkpoint} --format onnx --out model.onnx")
    if budget.interrupted and accelerator.num_processes == 1:
        return INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(TrainConfig, run, argv, "train")


if __name__ == "__main__":
    sys.exit(main())
