"""Files of timm's models: their own configuration, and the names of their tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from unet.encoder import TIMM

WRAPPER = "timm_wrapper"
"""Model type of a classifier of timm that transformers saved."""
PREFIXES = re.compile(r"^(_backbone|timm_model)\.")
"""Of the names of tensors that transformers saved: TimmBackbone, and classifiers."""


def read_timm(plain: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Translate timm's `config.json` to the configuration and preprocessor of TimmBackbone.

    Returns one that is not timm's as it is, and no preprocessor. Raises ValueError if TimmBackbone
    cannot build the network.
    """
    if plain.get("model_type", WRAPPER) != WRAPPER or "architecture" not in plain:
        return plain, None
    if plain.get("model_args"):
        raise ValueError(
            f"TimmBackbone of transformers does not take model_args {plain['model_args']}"
        )
    trained = plain.get("pretrained_cfg")
    trained = trained if isinstance(trained, dict) else {}
    size = trained.get("input_size")
    config = {
        "model_type": TIMM,
        "backbone": plain["architecture"],
        "num_channels": size[0] if isinstance(size, list) and size else 3,
    }
    if "mean" not in trained:
        return config, None
    return config, {"image_mean": trained["mean"], "image_std": trained.get("std")}


def match_timm(own: Iterable[str], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file by the names that the backbone has for them.

    timm renames the modules of a network that yields feature maps: stages.0 becomes stages_0.

    Args:
        own: names of the tensors of a TimmBackbone.
        found: tensors by name, saved by timm or by transformers.
    """

    def canonical(name: str) -> str:
        return PREFIXES.sub("", name).replace("_", ".")

    tensors = {canonical(name): tensor for name, tensor in found.items()}
    return {name: tensors[canonical(name)] for name in own if canonical(name) in tensors}
