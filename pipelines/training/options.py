"""The settings of a training run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from pipelines.loading.augment import AugmentConfig
from pipelines.loading.dataset import DataConfig
from pipelines.model.build import ModelConfig
from pipelines.training.budget import Limits
from pipelines.training.optim import OptimConfig
from pipelines.training.tracking import TrackingConfig
from shards.order import LANES, WINDOW
from unet import LossConfig, TileConfig, metrics

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
    best_by: metrics.MeanName = "dice"
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
