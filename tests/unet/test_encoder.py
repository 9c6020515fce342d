"""U-Nets with a backbone of transformers: tiny random ones of each family, without network."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unet import DataSpec, EncoderConfig, TileConfig, UNet, UNetConfig, find_stages

pytest.importorskip("transformers", reason="the extra `encoders` is not installed")

PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {
    "embed_dim": 8,
    "depths": [2, 2, 2, 2],
    "num_heads": [1, 2, 2, 2],
    "window_size": 4,
    "image_size": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": {**PYRAMID, "embedding_size": 8, "layer_type": "basic"},
    "convnext": {**PYRAMID, "drop_path_rate": 0.5},
    "convnextv2": PYRAMID,
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "dinov3_convnext": PYRAMID,
    "pvt_v2": {**PYRAMID, "num_attention_heads": [1, 1, 1, 1]},
}
SPEC = DataSpec(
    classes=("background", "a", "b"),
    palette=((0, 0, 0), (9, 9, 9), (5, 5, 5)),
    channels="RGB",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.2),
    crop_size=64,
)


def encoder(family: str = "convnext", in_channels: int = 3, **changes: Any) -> EncoderConfig:
    return find_stages({"model_type": family, **FAMILIES[family], **changes}, in_channels)


def build(family: str = "convnext", in_channels: int = 3, **changes: Any) -> UNet:
    torch.manual_seed(0)
    found = encoder(family, in_channels, **changes)
    config = UNetConfig(
        in_channels=in_channels,
        num_classes=3,
        base_channels=2,
        depth=found.depth,
        encoder=found,
    )
    return UNet(config, SPEC).eval()


def gradients(model: UNet, image: torch.Tensor) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(1)
    model.zero_grad()
    model(image).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_of_any_size_has_logits_of_that_size(family: str) -> None:
    model = build(family)
    assert model.config.encoder is not None
    assert model.config.encoder.strides == (4, 8, 16, 32)
    large = torch.randn(1, 3, 150, 90)
    with torch.no_grad():
        first = model(large)
        for height, width in ((1, 1), (33, 70), (64, 64)):
            assert model(torch.randn(2, 3, height, width)).shape == (2, 3, height, width)
        # A small image must not change how later ones are partitioned into windows.
        assert torch.equal(model(large), first)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_encoder_takes_the_channels_of_the_images(channels: int) -> None:
    with torch.no_grad():
        assert build("resnet", channels)(torch.randn(1, channels, 40, 40)).shape == (1, 3, 40, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_without_network_and_computes_the_same(
    family: str, tmp_path: Path
) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert (loaded.config, loaded.spec) == (model.config, SPEC)
    image = torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    kept = json.loads((tmp_path / "config.json").read_text())["model"]["encoder"]["backbone"]
    assert kept["model_type"] == family
    assert "id2label" not in kept


def test_a_model_without_encoder_keeps_its_config_file(tmp_path: Path) -> None:
    UNet(UNetConfig(base_channels=2, depth=1)).save_pretrained(tmp_path)
    assert "encoder" not in json.loads((tmp_path / "config.json").read_text())["model"]


@pytest.mark.parametrize("family", ["convnext", "swin"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    model, image = build(family).train(), torch.randn(2, 3, 64, 64)
    plain = gradients(model, image)
    model.gradient_checkpointing = True
    checkpointed = gradients(model, image)
    # Drop path is random: the second forward pass must drop the same blocks.
    assert model.config.encoder is not None
    unused = {f"encoder.backbone.{name}" for name in model.config.encoder.unused}
    assert {name for name, gradient in plain.items() if gradient is None} == unused
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize("family", ["resnet", "convnext", "swin"])
def test_channels_last_and_compilation_change_no_logit(family: str) -> None:
    # Sizes that differ from those compiled before in this process become symbolic: slow to trace.
    torch.compiler.reset()
    model, image = build(family), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, backend="eager")(image)
        torch.testing.assert_close(compiled, expected)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(image), expected, rtol=1e-3, atol=1e-4)


def test_a_frozen_encoder_keeps_its_statistics_in_training() -> None:
    model, image = build("resnet"), torch.randn(4, 3, 64, 64)
    assert model.encoder is not None
    before = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    model.encoder.set_frozen(True)
    model.train()
    assert model.ups[0].training
    model(image)
    assert all(torch.equal(b, before[name]) for name, b in model.encoder.named_buffers())
    model.encoder.set_frozen(False)
    model(image)
    assert not all(torch.equal(b, before[name]) for name, b in model.encoder.named_buffers())


def test_a_large_image_is_predicted_in_tiles_that_cover_it() -> None:
    model = build("convnext")
    image = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    tiles = TileConfig(tile=64, overlap=0.5)
    assert model.predict(image, tiles).shape == (90, 150)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        one_pass = model(SPEC.normalise(pixels)).argmax(1)[0].numpy()
    assert np.array_equal(model.predict(image), one_pass)


def test_norms_and_position_biases_are_not_decayed() -> None:
    for family in FAMILIES:
        network = build(family).encoder
        assert network is not None
        decayed = {id(p) for p in network.decayed_weights()}
        names = {name for name, p in network.named_parameters() if id(p) not in decayed}
        for name, parameter in network.named_parameters():
            special = "position" in name or "logit_scale" in name or "grn" in name
            if parameter.ndim < 2 or special or "bias" in name:
                assert name in names, name
            else:
                assert name not in names, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_has_a_gradient(family: str) -> None:
    model = build(family).train()
    found = gradients(model, torch.randn(2, 3, 64, 64))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, gradient in found.items() if gradient is not None} == trained


def test_a_plain_transformer_is_refused_in_one_line() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"^dinov2 is a plain transformer: .* stride 16") as caught:
        find_stages({"model_type": "dinov2", "patch_size": 16, "image_size": 64, **small}, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "problem"),
    [
        ({"model_type": "wings"}, "encoder wings: "),
        ({"model_type": "bert"}, "bert is not a backbone"),
        ({}, "encoder None: "),
        ({"model_type": "resnet", "hidden_sizes": "wide"}, "encoder resnet"),
        ({"model_type": "resnet", **FAMILIES["resnet"], "layer_type": "x"}, "encoder resnet"),
    ],
)
def test_a_wrong_backbone_is_refused_in_one_line(plain: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        find_stages(plain, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"padding": "valid", "norm": "none"}, "padding must be same"),
        ({"dropout": 0.5}, "dropout 0"),
        ({"depth": 4}, "depth must be 5"),
        ({"in_channels": 1}, "in_channels must be 3"),
    ],
)
def test_a_config_that_contradicts_its_encoder_is_refused(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        UNetConfig(**{"base_channels": 2, "depth": 5, "encoder": encoder(), **changes})


def test_a_damaged_encoder_in_a_config_file_names_the_file(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    header = json.loads(path.read_text())
    for change, problem in (
        ({"strides": [4, 8, 16, 64]}, "strides must double"),
        ({"wings": 2}, "EncoderConfig has no field 'wings'"),
        ({"channels": [8]}, "channels must be 4 numbers"),
        ({"backbone": {}}, "no model_type"),
    ):
        damaged = {**header, "model": {**header["model"]}}
        damaged["model"]["encoder"] = {**header["model"]["encoder"], **change}
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=rf"config\.json.*{problem}"):
            UNet.from_pretrained(tmp_path)


def test_a_model_with_encoder_names_the_extra_if_transformers_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^.*pip install 'unet-shards\[encoders\]'$"):
        UNet.from_pretrained(tmp_path)


def test_a_model_of_timm_names_the_package_if_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"^encoder timm resnet18 requires timm, .*pip install"):
        find_stages({"model_type": "timm_backbone", "backbone": "resnet18"}, 3)


def test_transformers_is_imported_only_where_a_backbone_is_built() -> None:
    for path in (Path(__file__).parents[2] / "unet").glob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body
                   if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
        assert not [node for node in imports if "transformers" in ast.unparse(node)]
