"""Weights on disk: safetensors and a readable `config.json`. Loading never unpickles anything."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from unet.model import UNet

HEADER = "config.json"
WEIGHTS = "model.safetensors"

T = TypeVar("T")


def save(model: "UNet", folder: Path) -> None:
    """Write `model.safetensors` and `config.json` into an existing folder."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / HEADER).write_text(json.dumps(model.header(), indent=2) + "\n")


def find(model_id: str, **download: Any) -> Path:
    """The local folder with the two files of a folder or hub repository.

    Raises FileNotFoundError if a local folder lacks one of them.
    """
    folder = Path(model_id)
    if folder.is_dir():
        for name in (HEADER, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no checkpoint: it has no {name}")
        return folder
    hf_hub_download(model_id, WEIGHTS, **download)
    return Path(hf_hub_download(model_id, HEADER, **download)).parent


def read_header(folder: Path) -> dict[str, Any]:
    """The parsed `config.json`. Raises ValueError if it is none of ours."""
    path = folder / HEADER
    try:
        header = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict) or "model" not in header:
        raise ValueError(f"{path} does not describe a U-Net: it has no 'model'")
    return header


def from_plain(cls: type[T], plain: dict[str, Any], folder: Path) -> T:
    """A frozen dataclass from its JSON. Raises ValueError on an unknown or missing field."""
    if not isinstance(plain, dict):
        raise ValueError(f"{folder / HEADER}: {cls.__name__} is no JSON object")
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
    """JSON lists become tuples, at any depth."""
    return tuple(to_tuple(item) for item in value) if isinstance(value, list) else value


def load(model: "UNet", folder: Path) -> None:
    """Fill the model from `model.safetensors`. Raises ValueError naming what does not fit."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
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
