"""Weights on disk: safetensors and `config.json`. Loading never unpickles code."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
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
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict) or "model" not in header:
        raise ValueError(f"{path} does not describe a U-Net: it has no 'model'")
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
        return cls(**{name: to_tuple(value) for name, value in plain.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / HEADER}: {error}") from error


def to_tuple(value: Any) -> Any:
    """Convert JSON lists to tuples, at any depth."""
    return tuple(to_tuple(item) for item in value) if isinstance(value, list) else value


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` into the model. Raises ValueError if file or tensors do not fit."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    load_tensors(model, tensors, path)


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors read from `path` into the model.

    Raises ValueError for the first tensor that is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            where = "the file" if name not in tensors else "the model"
            raise ValueError(f"{path}: {name} is missing from {where}")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} is {tuple(tensors[name].shape)}, "
                f"the model needs {tuple(expected[name].shape)}"
            )
    model.load_state_dict(tensors)
