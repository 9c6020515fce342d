"""`unet train`: train a U-Net on shards, or resume from the last checkpoint of the run folder.

    unet train --data D --run-dir R
    accelerate launch --config_file accelerate_config.yaml -m pipelines.train --data D --run-dir R

The launcher decides devices, process count and precision; everything else is a TrainConfig.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.evaluation import table
from pipelines.evaluation.examples import draw_batch
from pipelines.evaluation.held_out import cross_validate
from pipelines.evaluation.validation import (
    Validation,
    predict_validation,
    score_all,
    score_validation,
    track_images,
)
from pipelines.loading.stages import Batch
from pipelines.reporting.compose import write_report_safely
from pipelines.runtime.command import launched_rank, run_command
from pipelines.runtime.errors import INTERRUPTED, RunError
from pipelines.runtime.run_folder import RunFolder, RunLock
from pipelines.training.budget import STOPPING, ignore_repeated_signal
from pipelines.training.checkpoints import Checkpoints, TrainState
from pipelines.training.encoders import drop_gradients, freeze_encoder
from pipelines.training.fold_runs import plan_folds
from pipelines.training.optim import clip_gradients, learning_rate, set_learning_rate
from pipelines.training.options import TrainConfig
from pipelines.training.setup import (
    Training,
    TrainSetup,
    load_learner,
    open_splits,
    open_training,
    resolve,
    resolve_passes,
    start_accelerator,
)
from pipelines.training.step_failures import describe_not_finite, refuse_many_skips
from pipelines.training.validation import (
    choose_validation,
    has_ended,
    is_finished,
    out_of_patience,
    update_best,
)
from shards.manifest import read_manifest
from shards.writer import write_json
from unet import metrics
from unet.metrics import Scores

End = Literal["finished", "interrupted", "already finished"]
"""How a run ends."""


@dataclass(frozen=True, slots=True)
class EndedRun:
    """A run that ended; its process group is still open."""

    accelerator: Accelerator
    state: TrainState
    code: int
    """Exit code."""
    interrupted: bool
    """Whether any rank was signalled to stop."""


def run(config: TrainConfig) -> int:
    """Train or resume a run, or those of `--folds`; returns 75 if a signal interrupted it."""
    if config.folds is not None:
        return run_folds(config, config.folds)
    return run_one(config, more=False).code


def run_one(config: TrainConfig, *, more: bool) -> EndedRun:
    """Train or resume until a limit is reached; `more`: this process continues afterwards."""
    folder, schedule = RunFolder(config.run_dir), config.schedule
    with Checkpoints(folder, schedule.keep_checkpoints, schedule.keep_every) as checkpoints:
        setup = resolve(config, read_manifest(config.data, "--data"))
        accelerator, setup = start_accelerator(setup)
        _lock = RunLock(folder) if accelerator.is_main_process else None
        learner, state = load_learner(setup, accelerator, checkpoints)
        state = choose_validation(setup, state)
        setup = resolve_passes(setup, accelerator, learner)
        data = open_splits(setup, accelerator)
        if is_finished(setup, state) and has_ended(folder, state.step):
            if not more:
                accelerator.end_training()
            code = finish_run(setup, accelerator, state, None, "already finished", more=more)
            return EndedRun(accelerator, state, code, interrupted=False)
        training = open_training(setup, accelerator, data, learner, state)
        state = replace(state, tracking_id=training.tracker.run_id)
        state, validation = train(training, state, checkpoints)
        finish_saving(checkpoints, accelerator)
        if schedule.val and (state.val_images or validation is None):
            validation = score_all(training)
        end = "interrupted" if training.budget.interrupted else "finished"
        if validation is not None and validation.images is not None and end == "finished":
            track_images(training, validation.images)
        training.progress.close()
        training.tracker.finish()
        if not more:
            accelerator.end_training()
        scores = None if validation is None else validation.scores
        code = finish_run(setup, accelerator, state, scores, end, more=more)
        if more:
            # A signal since the last step, for example during the validation at the end.
            training.budget.agree()
        return EndedRun(accelerator, state, code, training.budget.interrupted)


def run_folds(config: TrainConfig, count: int) -> int:
    """Train or resume the runs of all folds one after the other; then score all in one table.

    Returns 75 if a signal interrupted one. Raises UsageError if the folder holds other runs.
    """
    folds = plan_folds(config, count)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    ended = None
    for fold in folds:
        if launched_rank() == 0:
            print(f"fold {fold.fold}: {fold.run_dir}", flush=True)
        ended = run_one(fold, more=True)
        ended.accelerator.free_memory()
        torch.compiler.reset()
        if ended.interrupted:
            break
        # Those of the fold would swallow a signal that arrives before the next one handles them.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended is not None
    accelerator, interrupted = ended.accelerator, ended.interrupted
    if not interrupted:
        cross_validate(config.run_dir, config.data, config.loading, config.tiles, accelerator)
    ignore_repeated_signal()
    accelerator.end_training()
    if accelerator.is_main_process:
        plain = {"finished": not interrupted, "folds": count, "step": ended.state.step}
        plain |= {"seconds": ended.state.seconds}
        write_json(RunFolder(config.run_dir).state, plain)
        if interrupted:
            print("interrupted; rerun the same command: it skips the folds that are finished")
        else:
            print_next_commands(config)
    return INTERRUPTED if interrupted and accelerator.num_processes == 1 else 0


def train(
    training: Training, state: TrainState, checkpoints: Checkpoints
) -> tuple[TrainState, Validation | None]:
    """Train until a limit is reached, patience runs out or a signal interrupts the run.

    Returns the state at the end, and the last validation if there was one.
    """
    config, passes, accelerator, budget = (
        training.setup.config,
        training.setup.passes,
        training.accelerator,
        training.budget,
    )
    validation = None
    while not budget.interrupted:
        checkpoints.raise_failure()
        if validation_due(training, state):
            state, validation = validate(training, state, checkpoints)
        elif budget.step > training.first_step and checkpoint_due(training):
            save(training, state, checkpoints, is_best=False)
        if budget.spent or out_of_patience(config, state):
            return state, validation

        lr = learning_rate(config.optim, budget.progress)
        set_learning_rate(training.optimizer, lr)
        frozen = freeze_encoder(training.learner.model, config.model.freeze_until, budget.progress)
        for number in range(passes):
            batch = next_batch(training)
            with training.training_pass(budget.step + 1), accelerator.accumulate(training.model):
                image, mask, border = augment(training, batch)
                if state.step == number == 0:
                    show_first_batch(training, image, mask)
                loss, parts = training.criterion(training.model(image), mask, border)
                accelerator.backward(loss)
                if frozen:
                    drop_gradients(training.learner.model)
                norm = clip_gradients(accelerator, training.model, config.optim.clip_norm)
                training.optimizer.step()
                training.optimizer.zero_grad()
            losses = torch.cat([loss.detach()[None], parts])
            budget.watch(torch.cat([losses, norm[None]]))
            training.meter.add(losses, batch.skipped)
        state = finish_step(training, state)

        if budget.step % config.schedule.log_every == 0 or budget.spent or budget.interrupted:
            log_step(training, lr)
    # A signal interrupted the run: every other end returns above.
    save(training, state, checkpoints, is_best=False)
    return state, validation


def next_batch(training: Training) -> Batch:
    """Draw the next batch, in host memory."""
    with training.meter.waiting():
        return next(training.batches)


def augment(training: Training, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copy a batch to the device, normalise and augment it, and seed dropout for it.

    Returns image float32 [B, C, H, W], mask uint8 [B, h, w] and border map, if there is one.
    """
    batch = batch.to(training.accelerator.device)
    seed_dropout(training.setup.config.order.seed, batch.position)
    pixels = training.spec.normalise(batch.image)
    return training.augment(pixels, batch.mask, batch.position, batch.border)


def show_first_batch(training: Training, image: Tensor, mask: Tensor) -> None:
    """Track images of the first batch as the network sees them."""
    drawn = partial(draw_batch, training.spec, image, mask, training.setup.config.tracking.pictures)
    training.tracker.show(0, "train/first_batch", drawn)


def seed_dropout(seed: int, position: Tensor) -> None:
    """Seed dropout by the position of the batch, so that a resumed run drops the same values."""
    torch.manual_seed((seed * 2**40 + int(position[0])) % 2**63)


def finish_step(training: Training, state: TrainState) -> TrainState:
    """Average the weights and count the step.

    Raises RunError on all ranks if a loss or gradient is not finite, or if the loss scaler skipped
    too many steps in a row.
    """
    training.meter.count_overflow(training.optimizer.step_was_skipped)
    with training.training_pass(training.budget.step + 1):
        training.learner.update_average(training.budget.step + 1)
    if found := training.budget.advance():
        raise RunError(describe_not_finite(found, training.setup))
    step, seconds = training.budget.step, training.budget.seconds
    position = step * training.setup.global_batch_size
    return replace(state, step=step, position=position, seconds=seconds)


def log_step(training: Training, lr: float) -> None:
    """Log the means since the last log. Raises RunError if too many samples were replaced."""
    values = training.meter.read(training.setup.global_batch_size)
    refuse_many_skips(training, round(values["train/skipped"]))
    training.tracker.log(training.budget.step, {**values, "train/lr": lr})
    training.progress.show(values)


def validation_due(training: Training, state: TrainState) -> bool:
    """Whether to validate now: every `--eval-every` steps and at the end, once per step."""
    schedule = training.setup.config.schedule
    if state.validated == training.budget.step or not schedule.val:
        return False
    return training.budget.spent or schedule.validation_due(training.budget.step)


def checkpoint_due(training: Training) -> bool:
    """Whether to save now without validation; a run without validation ends with a checkpoint."""
    schedule = training.setup.config.schedule
    return schedule.checkpoint_due(training.budget.step) or (
        training.budget.spent and not schedule.val
    )


def validate(
    training: Training, state: TrainState, checkpoints: Checkpoints
) -> tuple[TrainState, Validation]:
    """Score the validation split, save a checkpoint, and report both."""
    step = training.budget.step
    validation = score_validation(training, state.val_images or None)
    scores = validation.scores
    training.tracker.log(step, table.named(scores, "val"))
    training.progress.print_line(f"step {step}: {table.headline(scores, 'val')}")
    best_by = training.setup.config.schedule.best_by
    state = update_best(state, metrics.mean_of(scores, best_by) or 0.0)
    save(training, state, checkpoints, is_best=state.stale == 0)
    training.tracker.show_examples(step, "val/pictures", partial(predict_validation, training))
    training.progress.dice = scores.macro.dice
    training.meter.reset()
    return state, validation


def save(training: Training, state: TrainState, checkpoints: Checkpoints, *, is_best: bool) -> None:
    """Copy a checkpoint on the main process, which writes it in the background; others wait."""
    if training.accelerator.is_main_process:
        checkpoints.save(state, training.learner, training.accelerator.scaler, is_best=is_best)
    training.accelerator.wait_for_everyone()


def finish_saving(checkpoints: Checkpoints, accelerator: Accelerator) -> None:
    """Wait on all ranks for the last write. Raises RunError on the main process if it failed."""
    checkpoints.wait()
    accelerator.wait_for_everyone()


def finish_run(
    setup: TrainSetup,
    accelerator: Accelerator,
    state: TrainState,
    scores: Scores | None,
    end: End,
    *,
    more: bool,
) -> int:
    """Write RUN/state.json, print the result and the next commands, return the exit code.

    `scores`: of the last validation; None if there was none. `more`: other folds follow.
    """
    if not more:
        ignore_repeated_signal()
    config, interrupted = setup.config, end == "interrupted"
    if accelerator.is_main_process:
        command = f"unet train --data {config.data} --run-dir {config.run_dir}"
        resume = f"rerun the same command ({command} ...)" if interrupted else None
        plain = {"finished": not interrupted, "step": state.step, "best": state.best}
        plain |= {"seconds": state.seconds, "go_on": resume}
        write_json(setup.folder.state, plain)
        if interrupted:
            print(
                f"interrupted at step {state.step}, checkpoint saved; rerun the same command to "
                "resume"
            )
        elif end == "already finished":
            print(f"{config.run_dir} had already finished at step {state.step}")
            if not more:
                print("to train longer, raise its --steps, --epochs or --minutes")
        else:
            stale = f", no improvement for {state.stale} validations"
            why = stale if out_of_patience(config, state) else ""
            print(f"finished at step {state.step}, {state.seconds:.0f} s{why}")
            if scores is not None:
                print(table.table(scores))
            print(write_report_safely(config.run_dir, accelerator))
        if not interrupted and not more:
            print_next_commands(config)
    return INTERRUPTED if interrupted and accelerator.num_processes == 1 else 0


def print_next_commands(config: TrainConfig) -> None:
    """Print how to evaluate, use and export the best checkpoint, or the last without validation."""
    checkpoint = f"--checkpoint {config.run_dir}"
    commands = [
        f"unet predict {checkpoint} --input IMAGES --out MASKS --png --overlay",
        f"unet export {checkpoint} --format onnx --out model.onnx",
    ]
    if config.schedule.val and config.folds is None:
        commands.insert(0, f"unet evaluate {checkpoint} --data {config.data} --split val")
    print("next: " + "\n      ".join(commands))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(TrainConfig, run, argv, "train")


if __name__ == "__main__":
    sys.exit(main())
