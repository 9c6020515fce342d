"""Snapshots of a run in host memory, to be written while training continues."""

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
    """The tensors of a checkpoint, in host memory that training does not modify."""

    model: UNet
    """The weights that are scored and used; shares its tensors with `training`."""
    training: dict[str, Any]
    """Raw weights, their average, optimizer and loss scaler, as `Learner.state_dict` names them."""

    def write(self, folder: Path) -> None:
        """Write model.safetensors, config.json and training.pt into an existing folder."""
        self.model.save_pretrained(folder)
        torch.save(self.training, folder / TRAINING)


class HostBuffers:
    """Host memory for snapshots, allocated by the first and reused by the following ones.

    It is as large as weights, average and moments together: with AdamW and an average four times
    the weights (`modern`: 500 MB); page-locked if they are copied from a GPU.
    """

    def __init__(self) -> None:
        self.training: dict[str, Any] = {}
        self.model: UNet | None = None

    def take(self, learner: Learner, scaler: GradScaler | None) -> Snapshot:
        """Copy weights, average and optimizer state; on return training may modify them.

        Overwrites the previous snapshot, which must have been written.
        """
        training = {**learner.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        self.training = copy_to_host(training, self.training)
        device = next(learner.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if self.model is None:
            # In this thread, not the writer: a device context affects all threads.
            with torch.device("meta"):
                self.model = UNet(learner.scored.config, learner.scored.spec)
        scored = self.training["model" if learner.average is None else "average"]
        # Without its metadata: torch notes `assign` there, and would assign when it is loaded.
        self.model.load_state_dict({**scored}, assign=True)
        return Snapshot(self.model, self.training)


def copy_to_host(value: Any, into: Any) -> Any:
    """Copy a nested value to the CPU, reusing the tensors of `into` that match in layout.

    Copies from a GPU may be incomplete on return: synchronise its stream.
    """
    match value:
        case Tensor():
            if not (isinstance(into, Tensor) and match_layout(into, value)):
                into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return into.copy_(value, non_blocking=value.is_cuda)
        case dict():
            held = into if isinstance(into, dict) else {}
            # Keeps class and attributes: the state dict of a module has a version attribute.
            copied = copy(value)
            for key, part in value.items():
                copied[key] = copy_to_host(part, held.get(key))
            return copied
        case list() | tuple():
            return type(value)(copy_to_host(part, None) for part in value)
        case _:
            return deepcopy(value)


def match_layout(one: Tensor, other: Tensor) -> bool:
    """Whether tensors match in shape, dtype and strides."""
    same = one.shape == other.shape and one.stride() == other.stride()
    return same and one.dtype == other.dtype
