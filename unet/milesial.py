"""Checkpoints of milesial/Pytorch-UNet, read under our names."""

import re
from pathlib import Path

import torch
from torch import Tensor

MILESIAL = (
    (r"inc\.double_conv", "downs.0.conv"),
    (r"down(\d+)\.maxpool_conv\.1\.double_conv", "downs.{}.conv"),
    (r"up(\d+)\.up", "ups.{}.up"),
    (r"up(\d+)\.conv\.double_conv", "ups.{}.conv"),
    (r"outc\.conv", "head"),
)
"""Patterns of block names in milesial/Pytorch-UNet, and the names of our blocks."""


def read_milesial(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint of milesial/Pytorch-UNet (`.pth`): its tensors, under our names.

    A one-class head (sigmoid) is converted to the equivalent two-class head (softmax). Loaded with
    `weights_only`. Raises FileNotFoundError if the file does not exist, ValueError if it is not
    such a checkpoint.
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
        raise ValueError(f"{path} cannot be loaded with weights_only: {what}") from error
    depth = sum(re.fullmatch(r"down\d+\..*\.0\.weight", name) is not None for name in tensors)
    renamed = {translate_name(name, depth, path): tensor for name, tensor in tensors.items()}
    if not renamed:
        raise ValueError(f"{path} is not a checkpoint of milesial/Pytorch-UNet: it has no weights")
    if "ups.0.up.weight" not in renamed:
        raise ValueError(
            f"{path} has no transposed convolutions (trained with --bilinear?): only the variant "
            "with transposed convolutions can be imported"
        )
    for name, dimensions in (("downs.0.conv.0.weight", 4), ("head.weight", 4), ("head.bias", 1)):
        if name not in renamed or renamed[name].ndim != dimensions:
            raise ValueError(f"{path} has no {name} of {dimensions} dimensions")
    if len(renamed["head.weight"]) == 1:
        # softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)].
        for name in ("head.weight", "head.bias"):
            renamed[name] = torch.cat([torch.zeros_like(renamed[name]), renamed[name]])
    return renamed


def translate_name(name: str, depth: int, path: Path) -> str:
    """Translate the name of a milesial tensor to ours. Raises ValueError for other names."""
    for theirs, ours in MILESIAL:
        if match := re.match(theirs + r"\.", name):
            number = int(match[1]) if match.groups() else 0
            block = ours.format(number - 1 if ours.startswith("ups") else number)
            block = "bottom" if block == f"downs.{depth}.conv" else block
            return f"{block}.{name[match.end() :]}"
    raise ValueError(
        f"{path} is not a checkpoint of milesial/Pytorch-UNet: unexpected tensor {name!r}"
    )
