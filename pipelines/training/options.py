"""The settings of a training run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.loading.augment import AugmentConfig
from pipelines.loading.dataset import LoadingOptions
from pipelines.model.build import ModelConfig
from pipelines.runtime.devices import refuse_rank_timeout
from pipelines.runtime.errors import parse_part
from pipelines.runtime.yaml_flags import Flat, refuse_unused
from pipelines.training.budget import Limits
from pipelines.training.optim import OptimConfig
from pipelines.training.tracking import TrackingConfig
from shards.order import LANES, WINDOW
from unet import LossConfig, TileConfig, metrics

DEFAULT_STEPS = 10_000
GLOBAL_BATCH_SIZE = {"modern": 8, "paper": 1, "small": 2}
"""Default of each preset. Where a step takes long, more and smaller steps learn faster."""


def refuse_below_1(group: object, *names: str) -> None:
    """Raise ValueError if a setting is a number below 1."""
    for name in names:
        value = getattr(group, name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthOptions:
    """Training length."""

    steps: int | None = None
    """Total number of optimizer steps."""
    epochs: float | None = None
    """Passes over the training split."""
    minutes: float | None = None
    """Wall-clock minutes of training, including validation, summed over resumes."""
    patience: int | None = None
    """Stop after this many validations without improvement."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "minutes"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"--{name} must be > 0, got {value}")
        refuse_below_1(self, "patience")

    def limits(self, num_samples: int, global_batch_size: int) -> Limits:
        """Return the limits in steps and minutes; `num_samples`: those of an epoch."""
        steps = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            steps.append(max(1, round(self.epochs * num_samples / global_batch_size)))
        if not steps and self.minutes is None:
            steps = [DEFAULT_STEPS]
        return Limits(min(steps) if steps else None, self.minutes)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """Batches and crops."""

    global_batch_size: int | None = None
    """Samples per optimizer step, over all ranks. It belongs to the run, not to the machine.
    Default: 8 (2 with preset small, 1 with paper)."""
    accumulate: int | Literal["auto"] = 1
    """Forward passes per step on each rank (gradient accumulation). auto: the fewest that fit into
    the memory of every GPU, tried at the start of the run and of each resume; 1 without a GPU."""
    crop_size: int | None = None
    """Side of the square training crops in pixels. Default: what most images can fill, at most 512
    (256 with preset small). With preset paper it includes the margin: 572 show 388."""
    bad_samples: Literal["raise", "skip"] = "raise"
    """Training samples that cannot be decoded: stop the run, or replace them by other samples."""
    max_bad_share: float = 0.01
    """With `skip`: the share of samples (of those drawn, at least of one epoch) that may be
    replaced before the run stops."""

    def __post_init__(self) -> None:
        for name in ("crop_size", "global_batch_size"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be > 0, got {value}")
        refuse_below_1(self, "accumulate")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max-bad-share must be in [0, 1], got {self.max_bad_share}")
        if self.bad_samples != "skip":
            refuse_unused(self, "has no effect without --bad-samples skip", "max_bad_share")


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderOptions:
    """Order of the samples."""

    seed: int = 0
    """Seed of weights, order, crops and augmentation."""
    lanes: int = LANES
    """Lanes of the sample order; if the number of ranks divides it, ranks read disjoint shards."""
    window: int = WINDOW
    """Shuffle buffer: samples permuted together within a lane."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must be >= 0, got {self.seed}")
        refuse_below_1(self, "lanes", "window")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeOptions:
    """Speed, memory and determinism."""

    compile: bool = False
    """Compile the network with torch.compile: about a minute at the start, faster steps. Validation
    stays eager, because every image size would be compiled separately."""
    channels_last: bool | None = None
    """Use the channels_last memory format, which tensor cores prefer. Default: on a GPU with
    --compile; in eager mode instance norm would copy every map back."""
    gradient_checkpointing: bool = False
    """Recompute feature maps in the backward pass: a third slower, for larger crops or batches."""
    deterministic: bool = False
    """Use deterministic algorithms only: on the same kind of GPU, a resumed run is then
    bit-identical to an uninterrupted one, but slower. On CPUs it always is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleOptions:
    """Logging, validation and checkpoints."""

    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between validations, each followed by a checkpoint. The run always ends with both."""
    val_share: float = 0.1
    """Work of a validation in relation to that of the training since the last one, estimated from
    pixels: of a larger split, the same images are scored each time, evenly spread, at least 32.
    inf: all images. The table at the end is of all images."""
    val: bool = True
    """Validate during training. With --no-val, no checkpoint is the best, and the last is used."""
    save_every: int | None = None
    """Steps between additional checkpoints without validation."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep besides the best."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept forever."""
    best_by: metrics.MeanName = "dice"
    """Score that selects the best checkpoint: the mean over classes of Dice or IoU, over all pixels
    or averaged over images."""

    def __post_init__(self) -> None:
        refuse_below_1(
            self, "log_every", "eval_every", "save_every", "keep_checkpoints", "keep_every"
        )
        if not self.val:
            refuse_unused(self, "has no effect with --no-val: no checkpoint is the best", "best_by")
        if not self.val_share >= 0:
            raise ValueError(f"--val-share must be >= 0, got {self.val_share}")

    def validation_due(self, step: int) -> bool:
        """Whether the weights are validated after a step, not counting the last."""
        return self.val and step % self.eval_every == 0

    def checkpoint_due(self, step: int) -> bool:
        """Whether the weights are saved after a step, not counting the last."""
        extra = self.save_every is not None and step % self.save_every == 0
        return extra or step % self.eval_every == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a U-Net on shards. If a run was interrupted, rerun the same command: it resumes.

    --steps, --epochs and --minutes limit the run, whichever comes first; the learning rate reaches
    0 at that point (--optim.schedule). Default: 10,000 steps.
    """

    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    run_dir: Path
    """Run folder: config.yaml, metrics.jsonl, checkpoints, report.html."""
    init_from: str | None = None
    """Run folder, checkpoint folder or hub id to start a new run from. The last layer is
    reinitialised if the classes differ."""
    fold: str | None = None
    """i/k: train on k - 1 of k folds of train and val, and validate on the i-th. Folds are about
    equal and keep groups together; test is not touched."""
    folds: int | None = None
    """k: train all k folds one after the other, in RUN_DIR/fold-1, fold-2, ..., each as --fold i/k
    would, then score all of train and val, each image by the model that held it out."""
    rank_timeout: float = 10
    """Minutes that a rank waits for the others before it exits: longer than the
    start, a checkpoint, or the uneven part of a validation takes."""
    length: Flat[LengthOptions] = field(default_factory=LengthOptions)
    batch: Flat[BatchOptions] = field(default_factory=BatchOptions)
    order: Flat[OrderOptions] = field(default_factory=OrderOptions)
    compute: Flat[ComputeOptions] = field(default_factory=ComputeOptions)
    schedule: Flat[ScheduleOptions] = field(default_factory=ScheduleOptions)
    loading: Flat[LoadingOptions] = field(default_factory=LoadingOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tiles: TileConfig = field(default_factory=TileConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        refuse_rank_timeout(self.rank_timeout)
        if self.model.preset == "paper":
            reason = "has no effect with --model.preset paper: valid convolutions need no overlap"
            refuse_unused(self.tiles, reason, "overlap", prefix="tiles.")
        if self.tiles.tta and self.augment.orientation == "fixed":
            raise ValueError(
                "--tiles.tta has no effect with --augment.orientation fixed, which flips nothing"
            )
        if self.fold is not None and parse_part("--fold", self.fold)[1] < 2:
            raise ValueError(f"--fold must be i/k with at least 2 folds, got {self.fold!r}")
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"--folds must be >= 2, got {self.folds}")
        if self.folds is not None and self.fold is not None:
            raise ValueError(
                f"--folds {self.folds} trains all folds, --fold {self.fold} one; drop one"
            )
        self.loading.refuse_local_cache(self.data)
        if self.length.patience is not None and not self.schedule.val:
            raise ValueError(
                f"--patience {self.length.patience}: counts validations, of which --no-val makes "
                "none; drop one of the two"
            )
        if self.compute.gradient_checkpointing and self.model.network().norm == "batch":
            raise ValueError(
                "--gradient-checkpointing would update the running averages of --model.norm batch "
                "twice per batch; use instance or group"
            )
        if self.optim.encoder_lr_scale is not None and (
            self.model.encoder is None or self.model.freeze_encoder
        ):
            needs = "requires" if self.model.encoder is None else "has no effect without a trained"
            raise ValueError(f"--optim.encoder-lr-scale {needs} --model.encoder")
