"""Weights on disk: safetensors and a readable `config.json`. Loading never unpickles anything."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    fill(model, tensors, path)


def fill(model: "UNet", tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into the model. Raises ValueError naming what does not fit."""
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


MILESIAL = (
    (r"inc\.double_conv", "downs.0.conv"),
    (r"down(\d+)\.maxpool_conv\.1\.double_conv", "downs.{}.conv"),
    (r"up(\d+)\.up", "ups.{}.up"),
    (r"up(\d+)\.conv\.double_conv", "ups.{}.conv"),
    (r"outc\.conv", "head"),
)
"""Names of milesial/Pytorch-UNet's blocks, and ours."""


def read_milesial(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of milesial/Pytorch-UNet (a `.pth`), under our names.

    A head for one class (a sigmoid) becomes the same for two (a softmax). Nothing is unpickled but
    tensors and plain values. Raises ValueError where it is none, FileNotFoundError where there is
    no file.
    """
    try:
        plain = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {
            name.removeprefix("module."): tensor
            for name, tensor in plain.items()
            if name != "mask_values" and isinstance(tensor, Tensor)
        }
    except FileNotFoundError:
        raise
    except Exception as error:  # torch's reader raises whatever the bytes provoke
        what = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} is no file of weights alone: {what}") from error
    depth = sum(re.fullmatch(r"down\d+\..*\.0\.weight", name) is not None for name in tensors)
    found = {our_name(name, depth, path): tensor for name, tensor in tensors.items()}
    if not found:
        raise ValueError(f"{path} is no checkpoint of milesial/Pytorch-UNet: it has no weights")
    if "ups.0.up.weight" not in found:
        raise ValueError(
            f"{path} has no transposed convolutions (trained with --bilinear?); that variant "
            "cannot be imported"
        )
    for name, dimensions in (("downs.0.conv.0.weight", 4), ("head.weight", 4), ("head.bias", 1)):
        if name not in found or found[name].ndim != dimensions:
            raise ValueError(f"{path} has no {name} of {dimensions} dimensions")
    if len(found["head.weight"]) == 1:
        # softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)].
        for name in ("head.weight", "head.bias"):
            found[name] = torch.cat([torch.zeros_like(found[name]), found[name]])
    return found


def our_name(name: str, depth: int, path: Path) -> str:
    """Our name of one of milesial's tensors. Raises ValueError for a name that is none."""
    for theirs, ours in MILESIAL:
        if match := re.match(theirs + r"\.", name):
            number = int(match[1]) if match.groups() else 0
            block = ours.format(number - 1 if ours.startswith("ups") else number)
            block = "bottom" if block == f"downs.{depth}.conv" else block
            return f"{block}.{name[match.end() :]}"
    raise ValueError(f"{path} is no checkpoint of milesial/Pytorch-UNet: it has {name!r}")
