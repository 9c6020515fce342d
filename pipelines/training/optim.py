"""The optimizer, its learning rate schedule, and the moving average of the weights."""

from copy import deepcopy
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pipelines.runtime.yaml_flags import refuse_unused
from unet import UNet


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, learning rate schedule and weight averaging."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: with Nesterov momentum, as in nnU-Net; its usual learning rate is 1e-2."""
    lr: float = 2e-3
    """Peak learning rate."""
    momentum: float = 0.99
    """Momentum of sgd (0.99 in the paper of 2015)."""
    weight_decay: float = 1e-4
    """Weight decay of convolution weights, not of norms and biases; decoupled with adamw."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Decay of the learning rate after warm-up: half a cosine to 0, (1 - share of the run)^0.9, or
    none."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises linearly from 0."""
    clip_norm: float = 1.0
    """Maximum norm of the gradients, which are clipped to it; 0: no clipping."""
    encoder_lr_scale: float | None = None
    """Learning rate of the encoder, as a share of --optim.lr; default: 0.1 with pretrained weights,
    which larger steps destroy, else 1."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is scored and saved; 0: no average. Early
    steps use (1 + n) / (10 + n), so that short runs have a useful average too."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"--optim.lr must be > 0, got {self.lr}")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--optim.{flag} must be >= 0, got {getattr(self, name)}")
        if self.encoder_lr_scale is not None and self.encoder_lr_scale <= 0:
            raise ValueError(
                f"--optim.encoder-lr-scale must be > 0, got {self.encoder_lr_scale}; to keep the "
                "encoder as it is use --model.freeze-encoder"
            )
        for name in ("momentum", "warmup", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--optim.{flag} must be in [0, 1), got {getattr(self, name)}")
        if self.optimizer != "sgd":
            reason = f"has no effect with --optim.optimizer {self.optimizer}; remove it, or use sgd"
            refuse_unused(self, reason, "momentum", prefix="optim.")


PRETRAINED_LR_SCALE = 0.1
"""Default learning rate of a pretrained encoder, as a share of that of the decoder."""


def build_optimizer(model: UNet, config: OptimConfig) -> Optimizer:
    """Build the optimizer of the parameters that are trained.

    Parameters of one dimension (norms, biases) are not decayed; of an encoder, only the weights of
    convolutions and linear layers are. Its groups follow those of the decoder.
    """
    encoder = model.encoder
    of_encoder = set() if encoder is None else set(encoder.parameters())
    own = [p for p in model.parameters() if p not in of_encoder]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if encoder is not None and model.config.encoder is not None:
        scale = config.encoder_lr_scale
        if scale is None:
            scale = 1.0 if model.config.encoder.weights == "none" else PRETRAINED_LR_SCALE
        decayed = set(encoder.decayed_weights())
        trained = [p for p in encoder.parameters() if p.requires_grad]
        for weight_decay, some in (
            (config.weight_decay, [p for p in trained if p in decayed]),
            (0.0, [p for p in trained if p not in decayed]),
        ):
            if some:
                groups.append({"params": some, "weight_decay": weight_decay, "lr_scale": scale})
    # Not fused: GradScaler leaves it to a fused kernel to skip a step whose gradients overflow, and
    # Accelerate's `step_was_skipped`, which counts `train/overflows`, would always be False.
    if config.optimizer == "sgd":
        momentum = config.momentum
        return SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0)
    return AdamW(groups, lr=config.lr)


def learning_rate(config: OptimConfig, progress: float) -> float:
    """Compute the learning rate at a share of the run, 0 to 1: warm-up, then the schedule."""
    if progress < config.warmup:
        # Not 0, which would waste the first step.
        return config.lr * max(progress / config.warmup, 0.01)
    done = min((progress - config.warmup) / (1 - config.warmup), 1.0)
    match config.schedule:
        case "cosine":
            return config.lr * 0.5 * (1 + cos(pi * done))
        case "poly":
            return config.lr * (1 - done) ** 0.9
        case "constant":
            return config.lr


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Average:
    """Exponential moving average of a model's weights, in a copy of the model."""

    def __init__(self, model: UNet, decay: float) -> None:
        self.model = deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: UNet, step: int) -> None:
        """Move towards the weights after optimizer step `step`, counted from 1; copy buffers.

        torch's AveragedModel would synchronise with the device for its counter at every step.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage] - torch.optim's own
            [*self.model.parameters()], [*model.parameters()], 1 - decay
        )
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)


@dataclass(frozen=True, slots=True)
class Learner:
    """What a step changes: the weights, their average, the optimizer's moments."""

    model: UNet
    average: Average | None
    optimizer: Optimizer

    @property
    def scored(self) -> UNet:
        """The weights that are scored and saved: the average where there is one."""
        return self.model if self.average is None else self.average.model

    def update_average(self, step: int) -> None:
        """Move the average, if there is one, towards the weights after a step, counted from 1."""
        if self.average is not None:
            self.average.update(self.model, step)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        # Without metadata: that of older checkpoints makes torch replace the parameters, of which
        # the optimizer would then update the old ones.
        self.model.load_state_dict({**state["model"]})
        if self.average is not None:
            self.average.model.load_state_dict({**state["average"]})
        self.optimizer.load_state_dict(state["optimizer"])


def build_learner(model: UNet, config: OptimConfig) -> Learner:
    """Add a new optimizer and average to a model, which must be on its device."""
    average = Average(model, config.ema_decay) if config.ema_decay else None
    return Learner(model, average, build_optimizer(model, config))


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Clip the accumulated gradients to a norm of `max_norm`; 0: do not clip.

    Returns their norm before clipping, float32 []: 0 while accumulating, and with a loss scaler,
    which handles gradients that overflow.
    """
    zero = torch.zeros((), device=accelerator.device)
    if not accelerator.sync_gradients:
        return zero
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or inf)
    return zero if norm is None or accelerator.scaler is not None else norm
