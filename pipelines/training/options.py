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
    """Train a U-Net on shards. If a run was interrupted, rerun the same command: it resumes.

    --steps, --epochs and --minutes limit the run, whichever comes first; the learning rate reaches
    0 at that point (--optim.schedule). Default: 10,000 steps.
    """

    run_dir: Path
    """Run folder: config.yaml, metrics.jsonl, checkpoints, report.html."""
    steps: int | None = None
    """Total number of optimizer steps."""
    epochs: float | None = None
    """Passes over the training split."""
    minutes: float | None = None
    """Wall-clock minutes of training, including validation, summed over resumes."""
    global_batch_size: int | None = None
    """Samples per optimizer step, over all ranks. It belongs to the run, not to the machine.
    Default: 8 (2 with preset small, 1 with paper)."""
    accumulate: int | Literal["auto"] = 1
    """Forward passes per step on each rank (gradient accumulation). auto: the fewest that fit into
    the memory of every GPU, tried at the start of the run and of each resume; 1 without a GPU."""
    compile: bool = False
    """Compile the network with torch.compile: about a minute at the start, faster steps. Validation
    stays eager, because every image size would be compiled separately."""
    channels_last: tyro.conf.DisallowNone[bool | None] = None
    """Use the channels_last memory format, which tensor cores prefer. Default: on a GPU with
    --compile; in eager mode instance norm would copy every map back."""
    gradient_checkpointing: bool = False
    """Recompute feature maps in the backward pass: a third slower, for larger crops or batches."""
    deterministic: bool = False
    """Use deterministic algorithms only: on the same kind of GPU, a resumed run is then
    bit-identical to an uninterrupted one, but slower. On CPUs it always is."""
    crop_size: int | None = None
    """Side of the square training crops in pixels. Default: what most images can fill, at most 512
    (256 with preset small). With preset paper it includes the margin: 572 show 388."""
    bad_samples: Literal["raise", "skip"] = "raise"
    """Training samples that cannot be decoded: stop the run, or replace them by other samples."""
    max_bad_share: float = 0.01
    """With `skip`: the share of samples (of those drawn, at least of one epoch) that may be
    replaced before the run stops."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between validations, each followed by a checkpoint. The run always ends with one."""
    save_every: int | None = None
    """Steps between additional checkpoints without validation."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep besides the best."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept forever."""
    best_by: metrics.MeanName = "dice"
    """Score that selects the best checkpoint: the mean over classes of Dice or IoU, over all pixels
    or averaged over images."""
    patience: int | None = None
    """Stop after this many validations without improvement."""
    init_from: str | None = None
    """Run folder, checkpoint folder or hub id to start a new run from. The last layer is
    reinitialised if the classes differ."""
    seed: int = 0
    """Seed of weights, order, crops and augmentation."""
    lanes: int = LANES
    """Lanes of the sample order; if the number of ranks divides it, ranks read disjoint shards."""
    window: int = WINDOW
    """Shuffle buffer: samples permuted together within a lane."""
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
                "--gradient-checkpointing would update the running averages of --model.norm batch "
                "twice per batch; use instance or group"
            )
        if self.optim.encoder_lr_scale is not None and (
            self.model.encoder is None or self.model.freeze_encoder
        ):
            needs = "requires" if self.model.encoder is None else "has no effect without a trained"
            raise ValueError(f"--optim.encoder-lr-scale {needs} --model.encoder")
        DataConfig.__post_init__(self)

    def limits(self, num_samples: int) -> Limits:
        """Return the limits of the run, in steps and minutes."""
        steps = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            steps.append(max(1, round(self.epochs * num_samples / self.step_samples())))
        if not steps and self.minutes is None:
            steps = [DEFAULT_STEPS]
        return Limits(min(steps) if steps else None, self.minutes)

    @property
    def passes(self) -> int:
        """Forward passes per step on each rank; 1 until `auto` is resolved."""
        return 1 if self.accumulate == "auto" else self.accumulate

    def saves(self, step: int) -> bool:
        """Whether weights are scored or saved after a step, not counting the last."""
        often = (self.eval_every, *([self.save_every] if self.save_every else []))
        return any(step % every == 0 for every in often)

    def step_samples(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self.global_batch_size or GLOBAL_BATCH_SIZE[self.model.preset]
