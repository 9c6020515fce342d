"""A copy in host memory of what a run has learned, for writing it while training goes on."""

from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipelines.training.optim import Learner
from unet import UNet

TRAINING = "training.pt"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint holds of its tensors, in host memory that training does not touch."""

    model: UNet
    """The weights that are scored and used; its tensors are those in `training`."""
    training: dict[str, Any]
    """Raw weights, their average, optimizer and loss scaler, as `Learner.state_dict` names them."""

    def write(self, folder: Path) -> None:
        """Write model.safetensors, config.json and training.pt into an existing folder."""
        self.model.save_pretrained(folder)
        torch.save(self.training, folder / TRAINING)


class HostBuffers:
    """Host memory that takes one snapshot after another, each into the memory of the one before.

    It is as large as weights, average and moments together: with AdamW and the average four times
    the weights (`modern`: 500 MB), in page-locked memory where they are copied from a GPU. It is
    allocated at the first snapshot and kept.
    """

    def __init__(self) -> None:
        self.training: dict[str, Any] = {}
        self.model: UNet | None = None

    def take(self, learner: Learner, scaler: GradScaler | None) -> Snapshot:
        """Copy what has been learned; on return training may change it.

        The snapshot before is overwritten: it must have been written.
        """
        training = {**learner.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        self.training = copy_to_host(training, self.training)
        device = next(learner.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if self.model is None:
            # Here and not where it is written: the device of a context is seen by all threads.
            with torch.device("meta"):
                self.model = UNet(learner.scored.config, learner.scored.spec)
        scored = self.training["model" if learner.average is None else "average"]
        self.model.load_state_dict(scored, assign=True)
        return Snapshot(self.model, self.training)


def copy_to_host(value: Any, into: Any) -> Any:
    """A deep copy with all tensors on the CPU, into the tensors of `into` where they are alike.

    Copies from a GPU may not be complete on return: its stream must be synchronized.
    """
    match value:
        case Tensor():
            if not (isinstance(into, Tensor) and alike(into, value)):
                into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return into.copy_(value, non_blocking=value.is_cuda)
        case dict():
            held = into if isinstance(into, dict) else {}
            # Of the same class and with its attributes: modules keep a version of their state.
            copied = copy(value)
            for key, part in value.items():
                copied[key] = copy_to_host(part, held.get(key))
            return copied
        case list() | tuple():
            return type(value)(copy_to_host(part, None) for part in value)
        case _:
            return deepcopy(value)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same shape, dtype and strides."""
    same = one.shape == other.shape and one.stride() == other.stride()
    return same and one.dtype == other.dtype
