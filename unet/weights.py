"""Weights on disk: safetensors and `config.json`. Loading never unpickles code."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HEADER = "config.json"
WEIGHTS = "model.safetensors"
T = TypeVar("T")


def save_model(model: nn.Module, header: dict[str, Any], folder: Path) -> None:
    """Write `model.safetensors` and `config.json` (the header) into an existing folder."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def find_folder(model_id: str, **download: Any) -> Path:
    """Return a local folder with weights and header, downloaded if `model_id` is a hub id.

    Raises FileNotFoundError if a local folder lacks one of the two files.
    """
    folder = Path(model_id)
    if folder.is_dir():
        for name in (HEADER, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {name}")
        return folder
    hf_hub_download(model_id, WEIGHTS, **download)
    return Path(hf_hub_download(model_id, HEADER, **download)).parent


def read_header(folder: Path) -> dict[str, Any]:
    """Parse `config.json`. Raises ValueError if it does not describe a U-Net."""
    path = folder / HEADER
    try:
        header = msgspec.json.decode(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict) or "model" not in header:
        raise ValueError(
            f"{path} does not describe a U-Net: it has no 'model'; use a run folder, or a "
            "folder written by save_pretrained"
        )
    return header


def from_plain(cls: type[T], plain: dict[str, Any], folder: Path) -> T:
    """Build a dataclass from its JSON object. Raises ValueError for unknown or missing fields."""
    if not isinstance(plain, dict):
        raise ValueError(f"{folder / HEADER}: {cls.__name__} is not a JSON object")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(plain) - known):
        raise ValueError(
            f"{folder / HEADER}: {cls.__name__} has no field {unknown[0]!r} "
            "(written by a newer version?)"
        )
    try:
        return msgspec.convert(plain, cls, strict=True)
    except ValueError as error:
        raise ValueError(f"{folder / HEADER}: {error}") from error


def check_weights(expected: dict[str, Tensor], folder: Path) -> None:
    """Compare the header of `model.safetensors` with a state dict, which may be on `meta`.

    Raises ValueError if the file is damaged or a tensor does not fit. Reads no tensor.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    refuse_unfit(expected, found, path)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` into the model. Raises ValueError if file or tensors do not fit."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    load_tensors(model, tensors, path)


FLOATS = ("F16", "BF16", "F32", "F64")
"""Types of weights that are read, as safetensors names them; they are converted to float32."""


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors read from `path` into the model.

    Raises ValueError for the first tensor that is missing, unexpected, of another shape or type, or
    that holds NaN or infinity.
    """
    types = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    types |= {torch.float64: "F64", torch.int64: "I64"}
    found = {
        name: (tuple(tensor.shape), types.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in tensors.items()
    }
    refuse_unfit(model.state_dict(), found, path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} contains NaN or infinity; use another checkpoint")
    model.load_state_dict(tensors)


def refuse_unfit(
    expected: dict[str, Tensor], found: dict[str, tuple[tuple[int, ...], str]], path: Path
) -> None:
    """Raise ValueError for the first tensor that is missing, unexpected or of another kind.

    Args:
        expected: state dict of the model.
        found: shape and type of each tensor in the file, the type as safetensors names it.
        path: the file.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            where = "the file" if name not in found else "the model"
            raise ValueError(f"{path}: {name} is missing from {where}")
        shape, kind = found[name]
        if shape != tuple(expected[name].shape):
            raise ValueError(
                f"{path}: {name} is {shape}, the model needs {tuple(expected[name].shape)}"
            )
        if kind not in (FLOATS if expected[name].is_floating_point() else ("I64",)):
            needed = "a floating-point type" if expected[name].is_floating_point() else "I64"
            raise ValueError(f"{path}: {name} has the type {kind}, the model needs {needed}")
