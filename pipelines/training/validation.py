"""How many images a validation during training scores, and what its score decides."""

import sys
from dataclasses import replace

from pipelines.loading.sample_size import choose_num_images
from pipelines.runtime.run_folder import RunFolder
from pipelines.training.checkpoints import TrainState
from pipelines.training.options import TrainConfig
from pipelines.training.setup import TrainSetup
from shards.documents import parse_json

MIN_IMAGES = 32
"""Images that are scored in any case, so that scores of checkpoints can be compared."""


def choose_validation(setup: TrainSetup, state: TrainState) -> TrainState:
    """Choose how many images a validation scores, if the run starts, and print a sample's size."""
    schedule = setup.config.schedule
    if not schedule.val:
        return state
    split = setup.manifest.splits["val"]
    if state.step == 0:
        steps = min(schedule.eval_every, setup.limits.steps or schedule.eval_every)
        pixels = steps * setup.global_batch_size * setup.crop_size**2
        chosen = choose_num_images(
            split, trained_pixels=pixels, share=schedule.val_share, min_images=MIN_IMAGES
        )
        state = replace(state, val_images=0 if chosen == split.samples else chosen)
    if state.val_images and setup.rank == 0:
        print(
            f"validation during training: {state.val_images:,} of {split.samples:,} images, evenly "
            "spread (--val-share); the table at the end is of all",
            file=sys.stderr,
        )
    return state


def update_best(state: TrainState, score: float) -> TrainState:
    """Record a validation; `stale` is 0 if it is the best so far."""
    is_best = state.best is None or score > state.best
    return replace(
        state,
        validated=state.step,
        best=score if is_best else state.best,
        stale=0 if is_best else state.stale + 1,
    )


def out_of_patience(config: TrainConfig, state: TrainState) -> bool:
    """Whether `--patience` validations have passed without improvement."""
    patience = config.length.patience
    return patience is not None and state.stale >= patience


def has_ended(folder: RunFolder, step: int) -> bool:
    """Whether the run wrote its table and report at a step, and then its state.json."""
    try:
        plain = parse_json(folder.state.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return plain.get("finished") is True and plain.get("step") == step


def is_finished(setup: TrainSetup, state: TrainState) -> bool:
    """Whether the last checkpoint is that of the end of the run."""
    spent = setup.limits.progress(state.step, state.seconds) >= 1
    validated = state.validated == state.step or not setup.config.schedule.val
    return (spent and validated) or out_of_patience(setup.config, state)
