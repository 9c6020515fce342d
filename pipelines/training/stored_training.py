"""The contents of training.pt: read without running code, compared with the learner."""

from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.runtime.failures import is_device_error, is_out_of_memory
from pipelines.training.optim import Learner
from shards.local_files import refuse_special
from shards.sample import DataError


def read_training(path: Path, learner: Learner) -> dict[str, Any]:
    """Read training.pt for a learner. Raises DataError if it is damaged or does not fit."""
    try:
        refuse_special(path)
        training = torch.load(path, map_location="cpu", weights_only=True)
        refuse_unfit(training, learner)
    except (PermissionError, MemoryError, DataError):
        raise
    except Exception as error:  # torch's reader raises whatever the bytes provoke
        if is_out_of_memory(error) or is_device_error(error):
            raise
        what = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is damaged ({what})") from error
    return training


def refuse_unfit(training: Any, learner: Learner) -> None:
    """Raise ValueError if weights, average or optimizer state do not fit the learner."""
    expected = learner.state_dict()
    require_keys(training, [*expected, "scaler"], "it")
    for name in ("model", "average"):
        if expected[name] is not None:
            require_keys(training[name], [*expected[name]], name)
            for key, tensor in expected[name].items():
                require_tensor(training[name][key], tensor, f"{name}.{key}")
    optimizer, groups = training["optimizer"], expected["optimizer"]["param_groups"]
    require_keys(optimizer, ["state", "param_groups"], "optimizer")
    for stored, group in zip(optimizer["param_groups"], groups, strict=True):
        require_keys(stored, [*group], "optimizer.param_groups")
        for key, value in group.items():
            require_plain(stored[key], value, f"optimizer.{key}")
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for index, moments in optimizer["state"].items():
        for key, value in moments.items():
            like = parameters[index] if isinstance(value, Tensor) and value.ndim else value
            require_tensor(value, like, f"optimizer.{index}.{key}")
    if training["scaler"] is not None:
        for key, value in training["scaler"].items():
            require_plain(value, 1.0, f"scaler.{key}")


def require_keys(plain: Any, names: list[str], where: str) -> None:
    """Raise ValueError if `plain` is not a mapping with exactly these keys."""
    if not isinstance(plain, dict) or set(plain) != set(names):
        raise ValueError(f"{where} does not have the fields that were saved")


def require_plain(value: Any, like: Any, where: str) -> None:
    """Raise ValueError if a setting is of another kind than `like`, negative or not finite."""
    if isinstance(like, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(like):
            raise ValueError(f"{where} is {value!r}")
        for one, other in zip(value, like, strict=True):
            require_plain(one, other, where)
    elif isinstance(like, int | float) and not isinstance(like, bool):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not isfinite(value) or value < 0:
            raise ValueError(f"{where} is {value!r}")
    elif type(value) is not type(like):
        raise ValueError(f"{where} is {value!r}")


def require_tensor(value: Any, like: Any, where: str) -> None:
    """Raise ValueError if a value is not a finite tensor of the shape and dtype of `like`."""
    if not isinstance(value, Tensor) or not isinstance(like, Tensor):
        raise ValueError(f"{where} is not a tensor")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{where} is {value.dtype} {list(value.shape)}")
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"{where} contains NaN or infinity")
