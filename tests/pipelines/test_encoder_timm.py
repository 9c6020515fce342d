"""`model.timm_files`: models of timm as encoders, in each form that their files have.

Skipped without timm, which needs a torchvision built for the same torch.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.model.backbone import Backbone, load_backbone
from pipelines.model.backbone_files import find_backbone
from pipelines.model.build import ModelConfig
from pipelines.runtime.errors import UsageError
from pipelines.training.encoders import synchronise_batch_norm
from unet import Encoder, UNet, UNetConfig, find_stages
from unet.encoder import TIMM

transformers = pytest.importorskip("transformers", reason="the extra `encoders` is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.1, 0.3]
# Stride 2 first, with activations in the batch norm; stride 4 first, with renamed stages.
NAMES = ("tf_efficientnet_lite0", "convnext_atto", "resnet10t")


def save(folder: Path, name: str, form: str = "timm", **more: Any) -> Path:
    """Save a random classifier as timm does on the hub, or one of two ways of transformers."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tensors = timm.create_model(name, num_classes=10).state_dict()
    config: dict[str, Any] = {"architecture": name, "num_classes": 10, **more}
    config["pretrained_cfg"] = {"input_size": [3, 224, 224], "mean": MEAN, "std": STD}
    prefix = ""
    if form == "wrapper":
        config["model_type"], prefix = "timm_wrapper", "timm_model."
    elif form == "backbone":
        config = {"model_type": TIMM, "backbone": name, "out_indices": [-1]}
        preprocessor = {"image_mean": MEAN, "image_std": STD}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        prefix = "_backbone."
        tensors = renamed(name, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {f"{prefix}{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    return folder


def renamed(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by the names of a network of timm that yields feature maps."""
    own = timm.create_model(name, features_only=True).state_dict()
    by_canonical = {key.replace("_", "."): tensor for key, tensor in tensors.items()}
    return {key: by_canonical[key.replace("_", ".")] for key in own}


def load(folder: Path, **settings: Any) -> Backbone:
    model = ModelConfig(encoder=str(folder), **settings)
    return load_backbone(find_backbone(str(folder), model.encoder_weights), model, 3)


def flags(data: Path, run_dir: Path, encoder: Path, *more: object) -> list[object]:
    return [
        *("--data", data, "--run-dir", run_dir, "--model.encoder", encoder),
        *("--model.preset", "small", "--model.base-channels", 2, "--crop-size", 64),
        *("--global-batch-size", 2, "--tracking.backend", "none", "--workers", 0, *more),
    ]


@pytest.mark.parametrize("form", ["timm", "wrapper", "backbone"])
@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_are_those_that_timm_computes_itself(
    name: str, form: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / name, name, form)
    found = load(folder)
    assert found.tensors is not None
    encoder = Encoder(found.config).eval()
    encoder.backbone.load_state_dict(found.tensors)
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=10).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = encoder(image)
        expected = [m for m in whole.forward_intermediates(image, intermediates_only=True)
                    if m.shape[2] < 64]  # fmt: skip
    assert [64 // m.shape[2] for m in maps] == list(found.config.strides)
    assert found.config.strides[-1] == 32
    assert torch.equal(maps[-1], expected[-1])
    assert (found.config.mean, found.config.std) == (tuple(MEAN), tuple(STD))
    assert found.config.architecture == f"timm {name}"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tf_efficientnet_lite0", ("--model.freeze-until", 0.5, "--model.drop-path", 0.3)),
        ("convnext_atto", ("--gradient-checkpointing", "--channels-last")),
    ],
)
def test_a_run_resumes_without_its_folder_and_is_used_like_any_other(
    name: str, more: tuple[object, ...], shards: Path, cells: Path, call, tmp_path: Path
) -> None:
    folder, run_dir = save(tmp_path / name, name), tmp_path / "run"
    given = flags(shards, run_dir, folder, *more, "--steps")
    ended = call("train", *given, 1)
    assert ended.code == 0, ended.err
    assert "its mean and deviation replace those of the data set" in ended.err
    for file in folder.iterdir():
        file.unlink()
    ended = call("train", *given, 2)
    assert ended.code == 0, ended.err
    model = UNet.from_pretrained(run_dir / "checkpoints" / "last")
    assert model.spec is not None
    assert list(model.spec.mean) == MEAN
    images = ("--input", cells / "images", "--out", tmp_path / "masks")
    ended = call("predict", "--checkpoint", run_dir, *images, "--png", "--workers", 0)
    assert ended.code == 0, ended.err
    assert f"timm {name}" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(("form", "suffix"), [("onnx", "onnx"), ("torch", "pt2")])
def test_a_model_with_padding_of_tensorflow_is_exported_and_computes_the_same(
    form: str, suffix: str, shards: Path, call, tmp_path: Path
) -> None:
    name = "tf_efficientnet_lite0"
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    folder = save(tmp_path / name, name)
    assert call("train", *flags(shards, tmp_path / "run", folder, "--steps", 1)).code == 0
    out = tmp_path / f"model.{suffix}"
    ended = call("export", "--checkpoint", tmp_path / "run", "--format", form, "--out", out)
    assert ended.code == 0, ended.err
    assert "verified on 1 x 1, 37 x 53, 2 of 64 x 64" in ended.out


@pytest.mark.parametrize("name", NAMES)
def test_synchronised_batch_norm_computes_the_same(name: str) -> None:
    found = find_stages({"model_type": TIMM, "backbone": name}, 3)
    model = UNet(UNetConfig(base_channels=2, depth=5, norm="batch", encoder=found)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        synchronise_batch_norm(model)
        assert torch.equal(model(image), expected)
    kinds = {type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__}
    assert kinds <= {"SyncBatchNorm", "SyncBatchNormAct"}
    assert "SyncBatchNorm" in kinds


def test_drop_path_is_that_of_the_flag(tmp_path: Path) -> None:
    folder = save(tmp_path / "atto", "convnext_atto")
    backbone = Encoder(load(folder, drop_path=0.4).config).backbone
    rates = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.4)
    vgg = save(tmp_path / "vgg", "vgg11")
    with pytest.raises(UsageError, match=r"--model\.drop-path 0\.4: timm vgg11 .* has no drop pa"):
        load(vgg, drop_path=0.4, encoder_weights="none")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["stages.0.blocks.0.conv_dw.weight"]
    save_file(tensors, folder / "model.safetensors")


def change(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **changes}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (drop_tensor, "the weights lack 1 tensors of timm convnext_atto"),
        (lambda f: change(f, architecture="convnext_femto"), "the weights lack"),
        (lambda f: change(f, architecture="wings"), "has no model 'wings'"),
        (lambda f: change(f, architecture=7), "has no model 7"),
        (lambda f: change(f, architecture="hf-hub:timm/resnet10t"), "has no model 'hf-hub:"),
        (lambda f: change(f, architecture="local-dir:elsewhere"), "has no model 'local-dir:"),
        (lambda f: change(f, model_args={"img_size": 256}), "does not take model_args"),
        (lambda f: change(f, architecture="vit_tiny_patch16_224"), "timm vit_tiny"),
        (lambda f: change(f, architecture="swin_tiny_patch4_window7_224"), "timm swin_tiny"),
        (lambda f: change(f, pretrained_cfg={"mean": [1]}), "(timm: mean and std in config.json)"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    damage, problem: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "atto", "convnext_atto")
    damage(folder)
    with pytest.raises(UsageError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"--model.encoder {folder}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
