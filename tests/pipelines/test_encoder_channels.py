"""`model.channels`: pretrained first convolutions for images with other channels than RGB."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.model.channels import ChannelRule, map_channels, map_values

transformers = pytest.importorskip("transformers", reason="the extra `encoders` is not installed")

RGB = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
NAME = "embeddings.patch_embeddings.weight"
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.1, 0.3]


@pytest.mark.parametrize(
    ("rule", "in_channels", "expected"),
    [
        ("mean", 1, [9]),
        ("mean", 2, [4.5, 4.5]),
        ("mean", 4, [2.25] * 4),
        ("mean", 6, [1.5] * 6),
        ("repeat", 1, [3]),
        ("repeat", 2, [1.5, 3]),
        ("repeat", 4, [0.75, 1.5, 4.5, 0.75]),
        ("repeat", 6, [0.5, 1, 3, 0.5, 1, 3]),
    ],
)
def test_the_filter_of_each_channel_is_this(
    rule: ChannelRule, in_channels: int, expected: list[float]
) -> None:
    mapped = map_channels(RGB, in_channels, rule)
    assert mapped.shape == (1, in_channels, 1, 1)
    assert mapped.flatten().tolist() == expected


def test_equal_bands_give_the_response_of_a_grey_rgb_image() -> None:
    weight = torch.randn(8, 3, 3, 3)
    grey = torch.randn(1, 1, 9, 9)
    expected = torch.conv2d(grey.repeat(1, 3, 1, 1), weight)
    for channels in (1, 2, 5):
        got = torch.conv2d(grey.repeat(1, channels, 1, 1), map_channels(weight, channels, "mean"))
        torch.testing.assert_close(got, expected)


def test_a_single_channel_backbone_is_shared_among_the_channels_of_the_image() -> None:
    for rule in ("mean", "repeat"):
        mapped = map_channels(torch.full((1, 1, 1, 1), 6.0), 3, rule)
        assert mapped.flatten().tolist() == [2, 2, 2]


def test_means_and_deviations_follow_their_channels() -> None:
    assert map_values(MEAN, 3, "mean") == (0.5, 0.4, 0.3)
    assert map_values(MEAN, 2, "mean") == pytest.approx((0.4, 0.4))
    assert map_values(MEAN, 1, "repeat") == (0.5,)
    assert map_values(MEAN, 4, "repeat") == (0.5, 0.4, 0.3, 0.5)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    torch.manual_seed(0)
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    transformers.ConvNextV2ForImageClassification(config).save_pretrained(folder)
    preprocessor = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory, draw, call) -> Path:
    root = draw(tmp_path_factory.mktemp("grey"), 6, mode="L")
    ended = call(
        "pack",
        *("--images", root / "images", "--masks", root / "masks", "--out", root / "shards"),
        *("--mask-format", "binary", "--workers", 1),
    )
    assert ended.code == 0, ended.err
    return root / "shards"


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (None, "summed over its 3 channels"),
        ("mean", "summed over its 3 channels"),
        ("repeat", "channel i of 1 gets channel i modulo 3"),
        ("random", "random for 1 channels"),
    ],
)
def test_a_run_on_grey_images_records_the_rule_and_resumes(
    rule: str | None, note: str, backbone: Path, grey: Path, call, tmp_path: Path
) -> None:
    given = [
        *("--data", grey, "--run-dir", tmp_path, "--model.encoder", backbone),
        *("--model.preset", "small", "--model.base-channels", 2, "--crop-size", 64),
        *("--global-batch-size", 2, "--tracking.backend", "none", "--workers", 0, "--no-val"),
        "--model.freeze-encoder",
        *(() if rule is None else ("--model.encoder-input", rule)),
    ]
    ended = call("train", *given, "--steps", 1)
    assert ended.code == 0, ended.err
    assert note in ended.err
    last = tmp_path / "checkpoints" / "last"
    config = json.loads((last / "config.json").read_text())
    assert config["model"]["encoder"]["input"] == (rule or "mean")
    tensors = load_file(last / "model.safetensors")
    ours = tensors[f"encoder.backbone.{NAME}"]
    rgb = load_file(backbone / "model.safetensors")[f"convnextv2.{NAME}"]
    if rule == "random":
        assert ours.shape == (8, 1, 4, 4)
        assert not torch.allclose(ours, rgb.sum(1, keepdim=True), atol=1e-3)
        # Its responses have no relation to the normalisation of the weights.
        assert config["data"]["mean"] != pytest.approx([0.4], abs=1e-3)
        assert config["model"]["encoder"]["mean"] is None
    elif rule == "repeat":
        torch.testing.assert_close(ours, rgb[:, :1] * 3)
        assert (config["data"]["mean"], config["data"]["std"]) == ([0.5], [0.2])
    else:
        torch.testing.assert_close(ours, rgb.sum(1, keepdim=True))
        assert config["data"]["mean"] == pytest.approx([0.4])
        assert config["data"]["std"] == pytest.approx([0.2])
    # The other tensors are pretrained.
    key = "encoder.stages.0.layers.0.dwconv.weight"
    theirs = load_file(backbone / "model.safetensors")[f"convnextv2.{key}"]
    assert torch.equal(tensors[f"encoder.backbone.{key}"], theirs)
    ended = call("train", *given, "--steps", 2)
    assert ended.code == 0, ended.err


def test_the_rule_has_no_effect_on_random_weights_and_is_refused(
    backbone: Path, grey: Path, call, tmp_path: Path
) -> None:
    ended = call(
        *("train", "--data", grey, "--run-dir", tmp_path, "--model.encoder", backbone),
        *("--model.encoder-weights", "none", "--model.encoder-input", "repeat"),
    )
    assert ended.code == 2
    assert "--model.encoder-input repeat has no effect: its weights are random" in ended.message
