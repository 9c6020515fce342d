"""`unet train`: train a U-Net on shards, or go on where the run folder stands.

    unet train --data D --run-dir R
    accelerate launch --config_file accelerate_config.yaml -m pipelines.train --data D --run-dir R

Devices, process count and precision are the launcher's; everything else is a TrainConfig.
"""

import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from math import inf

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from pipelines.evaluation import score, table
from pipelines.evaluation.examples import draw_batch, draw_validation
from pipelines.loading.augment import Augment
from pipelines.loading.dataset import open_data, train_bytes_in_use
from pipelines.model.build import build_loss
from pipelines.model.load import require_spec
from pipelines.reporting.compose import write_report_safely
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import (
    choose_batch_size,
    choose_channels_last,
    start,
    use_deterministic,
)
from pipelines.runtime.environment import write_environment
from pipelines.runtime.errors import INTERRUPTED, RunError
from pipelines.runtime.run_folder import RunLock
from pipelines.runtime.yaml_flags import to_plain
from pipelines.training.budget import Budget, NotFinite
from pipelines.training.checkpoints import Checkpoints, TrainState
from pipelines.training.encoders import (
    drop_gradients,
    freeze_encoder,
    refuse_encoder_batch_norm,
)
from pipelines.training.flops import count_flops
from pipelines.training.meter import Meter, Progress
from pipelines.training.optim import Learner, build_learner, learning_rate, set_learning_rate
from pipelines.training.options import TrainConfig
from pipelines.training.passes import TrainingPass
from pipelines.training.setup import (
    find_passes,
    fixed_settings,
    open_batches,
    prepare_model,
    rank_batch_size,
    refuse_batch_norm,
    resolve,
)
from pipelines.training.tracking import Tracker
from shards.manifest import Manifest, read_manifest
from shards.order import Order, TrainPlan
from shards.reader import ShardReader
from shards.writer import write_json
from unet import Scores, metrics


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
    resumed = checkpoints.folder / "last" if checkpoints.begun else None
    model = prepare_model(config, manifest, accelerator, init_from, resumed)
    refuse_encoder_batch_norm(model, config, accelerator, batch_size)
    learner, spec = build_learner(model, config.optim), require_spec(model)
    state = checkpoints.resume(fixed_settings(config, manifest), learner, accelerator.scaler)
    if config.compile:
        learner.model.compile()
    if config.accumulate == "auto":
        config = find_passes(config, manifest, accelerator, learner)
        batch_size = rank_batch_size(config, world)
        refuse_batch_norm(config, accelerator, batch_size)
        refuse_encoder_batch_norm(learner.model, config, accelerator, batch_size)
    # Only these two: a prepared loader is split or dispatched a second time. The optimizer's state
    # is where it belongs; placed again after a resume, AdamW's step counters would lie on the GPU,
    # and each step would wait for every one of them.
    placed = [True, False]
    model, optimizer = accelerator.prepare(
        learner.model, learner.optimizer, device_placement=placed
    )
    model.train()

    in_use = train_bytes_in_use(order, manifest, accelerator, config.tiles.num_together)
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
                scores = score.score(learner.scored, accelerator, data, "val", config.tiles)
            tracker.log(budget.step, table.named(scores, "val"))
            progress.say(f"step {budget.step}: {table.headline(scores, 'val')}")
            state = judge(state, metrics.mean_of(scores, config.best_by) or 0.0)
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
        frozen = freeze_encoder(learner.model, config.model.freeze_until, budget.progress)
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
                if frozen:
                    drop_gradients(learner.model)
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


def uncompiled(config: TrainConfig) -> AbstractContextManager[None]:
    """Run a compiled network eagerly: every size of validation image would be another graph."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def seed_dropout(seed: int, position: Tensor) -> None:
    """What is dropped belongs to the samples: after a resume it is the same."""
    torch.manual_seed((seed * 2**40 + int(position[0])) % 2**63)


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
            print(table.table(scores))
            print(write_report_safely(config.run_dir, accelerator))
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
