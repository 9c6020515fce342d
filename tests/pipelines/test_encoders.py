"""`model.backbone`.

Training with pretrained encoders: tiny random backbones in local folders, without network.
"""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.training.budget import Budget
from pipelines.training.encoders import describe_network
from unet import UNet, UNetConfig, find_stages

transformers = pytest.importorskip("transformers", reason="the extra `encoders` is not installed")

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {**PYRAMID, "embedding_size": 8, "layer_type": "basic"},
    "convnextv2": {**PYRAMID, "drop_path_rate": 0.3},
    "swin": {
        "embed_dim": 8,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 2, 2, 2],
        "window_size": 4,
        "image_size": 64,
    },
}
TINY = (
    *("--model.preset", "small", "--model.base-channels", "2", "--crop-size", "64"),
    *("--global-batch-size", "4", "--tracking.backend", "none", "--workers", "0"),
    *("--steps", "4", "--log-every", "1", "--eval-every", "4"),
)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of classifiers, as transformers saves them."""
    folder = tmp_path_factory.mktemp("backbones")
    for name, changes in CONFIGS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **changes)
        model = transformers.AutoModelForImageClassification.from_config(config)
        model.save_pretrained(folder / name)
        preprocessor = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def convnext(backbones: Path, tmp_path: Path) -> Path:
    """A copy of one of them, to change."""
    return shutil.copytree(backbones / "convnextv2", tmp_path / "convnextv2")


def flags(data: Path, run_dir: Path, encoder: object, *more: object) -> list[object]:
    return ["--data", data, "--run-dir", run_dir, *TINY, "--model.encoder", encoder, *more]


def model_of(run_dir: Path) -> UNet:
    return UNet.from_pretrained(run_dir / "checkpoints" / "last")


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    path = run_dir / "checkpoints" / "last" / "training.pt"
    return torch.load(path, weights_only=True)["model"]


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def assert_same_weights(one: Path, other: Path) -> None:
    expected = weights_of(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(one).items())


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    advance = Budget.advance

    def interrupted(self: Budget) -> Any:
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            self.next_agreement = step
        return advance(self)

    monkeypatch.setattr(Budget, "advance", interrupted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_starts_from_the_weights_of_the_folder(
    name: str, backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    ended = call("train", *flags(shards, tmp_path, backbones / name, "--model.freeze-encoder"))
    assert ended.code == 0, ended.err
    model = model_of(tmp_path)
    # Read by transformers, which renames some tensors of its own files.
    source = transformers.AutoModelForImageClassification.from_pretrained(backbones / name)
    source, ours = source.state_dict(), weights_of(tmp_path)
    shared = {key: tensor for key, tensor in source.items() if "classifier" not in key}
    found = 0
    for key, tensor in shared.items():
        for own in (key, key.partition(".")[2]):
            if (value := ours.get(f"encoder.backbone.{own}")) is not None:
                # Frozen: neither weights nor statistics have moved.
                assert torch.equal(value, tensor), key
                found += 1
    assert found > 0.9 * len(shared)
    config = model.config.encoder
    assert config is not None
    digest = hashlib.sha256((backbones / name / "model.safetensors").read_bytes()).hexdigest()
    assert (config.source, config.weights, config.sha256) == (name, "pretrained", digest)
    assert model.spec is not None
    assert (list(model.spec.mean), list(model.spec.std)) == (MEAN, STD)
    assert "tensors read" in ended.err
    assert "replace those of the data set" in ended.err


def test_weights_none_starts_at_random_with_the_statistics_of_the_data(
    backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    given = flags(shards, tmp_path, backbones / "resnet", "--model.encoder-weights", "none")
    ended = call("train", *given)
    assert ended.code == 0, ended.err
    model = model_of(tmp_path)
    assert model.config.encoder is not None
    assert (model.config.encoder.weights, model.config.encoder.sha256) == ("none", None)
    assert model.spec is not None
    assert list(model.spec.mean) != MEAN
    assert "random weights" in ended.err


def test_weights_come_from_a_file(convnext: Path, shards: Path, call, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    tensors = load_file(convnext / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    (convnext / "model.safetensors").unlink()
    given = flags(shards, tmp_path / "run", convnext, "--model.encoder-weights", file)
    ended = call("train", *given, "--model.freeze-encoder")
    assert ended.code == 0, ended.err
    name = "embeddings.patch_embeddings.weight"
    ours = weights_of(tmp_path / "run")[f"encoder.backbone.{name}"]
    assert torch.equal(ours, tensors[f"convnextv2.{name}"] + 1)
    config = model_of(tmp_path / "run").config.encoder
    assert config is not None
    assert config.weights == "other.safetensors"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet", ("--model.freeze-until", "0.5", "--accumulate", "2")),
        ("convnextv2", ("--model.freeze-until", "0.5", "--optim.encoder-lr-scale", "0.5")),
        ("swin", ("--model.drop-path", "0.4", "--gradient-checkpointing")),
        ("convnextv2", ("--accumulate", "2", "--channels-last")),
    ],
)
def test_a_run_resumes_bit_for_bit_without_the_folder(
    name: str,
    more: tuple[str, ...],
    backbones: Path,
    shards: Path,
    call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    folder = shutil.copytree(backbones / name, tmp_path / name)
    assert call("train", *flags(shards, whole, folder, *more)).code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert call("train", *flags(shards, parts, folder, *more)).code == 75
    # The checkpoint has everything; only the name of the folder is still compared.
    for file in folder.iterdir():
        file.unlink()
    ended = call("train", *flags(shards, parts, folder, *more))
    assert ended.code == 0, ended.err
    assert losses(parts) == losses(whole)
    assert_same_weights(parts, whole)


def test_a_frozen_share_of_the_run_moves_the_decoder_alone(
    backbones: Path, shards: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = flags(shards, tmp_path, backbones / "resnet", "--model.freeze-until", "0.5")
    source = load_file(backbones / "resnet" / "model.safetensors")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert call("train", *given).code == 75

    def changed() -> set[bool]:
        ours = weights_of(tmp_path)
        return {
            torch.equal(ours[f"encoder.backbone.{name}"], tensor)
            for key, tensor in source.items()
            if f"encoder.backbone.{(name := key.removeprefix('resnet.'))}" in ours
        }

    assert changed() == {True}
    assert call("train", *given).code == 0
    assert False in changed()


def test_learning_rate_of_the_encoder_is_a_share_of_that_of_the_decoder(
    backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    def groups(name: str, *more: object) -> list[float]:
        assert call("train", *flags(shards, tmp_path / name, *more)).code == 0
        path = tmp_path / name / "checkpoints" / "last" / "training.pt"
        optimizer = torch.load(path, weights_only=True)["optimizer"]
        return [group["lr"] / optimizer["param_groups"][0]["lr"] for group in
                optimizer["param_groups"]]  # fmt: skip

    swin = backbones / "swin"
    assert groups("a", swin) == pytest.approx([1, 1, 0.1, 0.1])
    assert groups("b", swin, "--model.encoder-weights", "none") == pytest.approx([1, 1, 1, 1])
    assert groups("c", swin, "--optim.encoder-lr-scale", 0.25) == pytest.approx([1, 1, 0.25, 0.25])
    assert groups("d", swin, "--model.freeze-encoder") == pytest.approx([1, 1])


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory, draw, call) -> Path:
    root = draw(tmp_path_factory.mktemp("three"), 8, values=(0, 128, 255), mode="L")
    ended = call(
        "pack",
        *("--images", root / "images", "--masks", root / "masks", "--out", root / "shards"),
        *("--mask-format", "values", "--mask-values", 0, 128, 255, "--workers", 1),
        *("--classes", "background", "rim", "core"),
    )
    assert ended.code == 0, ended.err
    return root / "shards"


def test_grey_images_get_the_summed_first_convolution(
    backbones: Path, three_classes: Path, call, tmp_path: Path
) -> None:
    given = flags(three_classes, tmp_path, backbones / "convnextv2", "--model.freeze-encoder")
    ended = call("train", *given)
    assert ended.code == 0, ended.err
    name = "embeddings.patch_embeddings.weight"
    source = load_file(backbones / "convnextv2" / "model.safetensors")[f"convnextv2.{name}"]
    ours = weights_of(tmp_path)[f"encoder.backbone.{name}"]
    torch.testing.assert_close(ours, source.sum(1, keepdim=True))
    spec = model_of(tmp_path).spec
    assert spec is not None
    assert spec.mean == pytest.approx((np.mean(MEAN),))
    assert spec.std == pytest.approx((np.mean(STD),))
    assert "summed over its 3 channels" in ended.err


def test_a_run_starts_from_another_with_other_classes(
    backbones: Path, shards: Path, draw, call, tmp_path: Path
) -> None:
    root = draw(tmp_path / "three", 6, values=(0, 128, 255))
    packed = call(
        "pack",
        *("--images", root / "images", "--masks", root / "masks", "--out", root / "shards"),
        *("--mask-format", "values", "--mask-values", 0, 128, 255, "--workers", 1),
        *("--classes", "background", "rim", "core"),
    )
    assert packed.code == 0, packed.err
    first, folder = tmp_path / "first", shutil.copytree(backbones / "swin", tmp_path / "swin")
    assert call("train", *flags(shards, first, folder)).code == 0
    # Its weights are those of the run, and the folder is not read.
    (folder / "model.safetensors").unlink()
    given = flags(root / "shards", tmp_path / "second", folder, "--init-from", first)
    ended = call("train", *given, "--model.freeze-encoder", "--model.base-channels", 2)
    assert ended.code == 0, ended.err
    before, after = model_of(first).state_dict(), weights_of(tmp_path / "second")
    kept = [name for name in after if name.startswith("encoder.")]
    best = UNet.from_pretrained(first / "checkpoints" / "best").state_dict()
    assert kept
    assert all(torch.equal(after[name], best[name]) for name in kept)
    assert after["head.weight"].shape[0] == 3 != before["head.weight"].shape[0]

    without = [*given[:-2], "--init-from", first]
    at = without.index("--model.encoder")
    del without[at : at + 2]
    without[3] = tmp_path / "third"
    ended = call("train", *without)
    assert ended.code == 2
    assert "has encoder = swin, this run has none; set --model.encoder swin" in ended.message


def test_a_missing_checkpoint_is_named_by_the_flag_that_gave_it(
    backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    given = flags(shards, tmp_path / "run", backbones / "resnet", "--init-from", missing)
    ended = call("train", *given)
    assert ended.code == 1
    assert f"--init-from {missing}: does not exist" in ended.message


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trained_model_is_evaluated_predicts_and_is_reported(
    name: str, backbones: Path, shards: Path, cells: Path, call, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert call("train", *flags(shards, run_dir, backbones / name)).code == 0
    ended = call("evaluate", "--checkpoint", run_dir, "--data", shards, "--workers", 0)
    assert ended.code == 0, ended.err
    ended = call(
        "predict",
        *("--checkpoint", run_dir, "--input", cells / "images", "--out", tmp_path / "masks"),
        *("--png", "--tile", 32, "--tta", "--workers", 0),
    )
    assert ended.code == 0, ended.err
    masks = sorted((tmp_path / "masks" / "png").rglob("*.png"))
    assert len(masks) == 12
    assert Image.open(masks[0]).size == (48, 48)
    page = (run_dir / "report.html").read_text()
    assert name in page
    assert "encoder" in page


@pytest.mark.parametrize("name", ["resnet", "convnextv2"])
@pytest.mark.parametrize(("form", "suffix"), [("onnx", "onnx"), ("torch", "pt2")])
def test_a_trained_model_is_exported_and_computes_the_same(
    name: str, form: str, suffix: str, backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    run_dir = tmp_path / "run"
    assert call("train", *flags(shards, run_dir, backbones / name, "--steps", 1)).code == 0
    out = tmp_path / f"model.{suffix}"
    ended = call("export", "--checkpoint", run_dir, "--format", form, "--out", out)
    assert ended.code == 0, ended.err
    assert "verified on 1 x 1, 37 x 53, 2 of 64 x 64" in ended.out


def test_a_windowed_transformer_is_not_exported_and_the_line_names_it(
    backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert call("train", *flags(shards, run_dir, backbones / "swin", "--steps", 1)).code == 0
    out = tmp_path / "model.pt2"
    ended = call("export", "--checkpoint", run_dir, "--format", "torch", "--out", out)
    assert ended.code == 1
    assert "swin" in ended.message
    assert "windows" in ended.message
    assert not out.exists()


def damage(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **changes}))


def lose(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["convnextv2.embeddings.patch_embeddings.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["convnextv2.embeddings.patch_embeddings.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: lose(f, "config.json"), "it has no config.json"),
        (lambda f: lose(f, "model.safetensors"), "it has no model.safetensors (none)"),
        (make_pickle, "only pytorch_model.bin, a pickle, which can run code"),
        (lambda f: (f / "config.json").write_text("{"), "is not a JSON object"),
        (lambda f: damage(f, model_type="wings"), "encoder wings"),
        (lambda f: damage(f, num_channels="many"), "num_channels"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "damaged"),
        (spoil, "contains NaN or infinity"),
        (drop_tensor, "the weights lack 1 tensors of convnextv2"),
        (lambda f: damage(f, hidden_sizes=[8, 16, 24, 40]), "the weights lack"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [1]}'),
            "image_mean and image_std in its preprocessor_config.json",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    change, problem: str, convnext: Path, shards: Path, call, tmp_path: Path
) -> None:
    change(convnext)
    ended = call("train", *flags(shards, tmp_path / "run", convnext))
    assert ended.code == 2
    assert f"--model.encoder {convnext}" in ended.err
    assert problem in ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--model.depth", 4), "--model.depth is set by --model.encoder"),
        (("--model.dropout", 0.5), "--model.dropout has no effect with --model.encoder"),
        (("--model.preset", "paper"), "--model.preset paper cannot have an encoder"),
        (("--model.freeze-encoder", "--optim.encoder-lr-scale", 1), "--optim.encoder-lr-scale"),
        (("--model.freeze-encoder", "--model.freeze-until", 0.1), "--model.freeze-encoder"),
        (("--model.freeze-until", 1), "--model.freeze-until must be in [0, 1)"),
        (("--model.encoder-weights", "weights.bin"), "use pretrained, none, or a .safetensors"),
        (("--model.encoder-weights", "w.safetensors"), "the file does not exist"),
        (("--gradient-checkpointing",), "has batch norm: --gradient-checkpointing"),
        (("--crop-size", 32, "--accumulate", 4), "sees one value per channel"),
        (("--model.drop-path", 0.1), "resnet"),
        (("--model.encoder-input", "repeat"), "--model.encoder-input repeat has no effect: the en"),
    ],
)
def test_settings_that_contradict_the_encoder_are_refused(
    more: tuple[object, ...], problem: str, backbones: Path, shards: Path, call, tmp_path: Path
) -> None:
    ended = call("train", *flags(shards, tmp_path, backbones / "resnet", *more))
    assert ended.code == 2
    assert problem in ended.message


def test_trackers_get_the_origin_licence_and_size_of_the_encoder() -> None:
    origin = {"source": "owner/name", "weights": "pretrained", "licence": "apache-2.0"}
    plain = {"model_type": "resnet", **CONFIGS["resnet"]}
    encoder = find_stages(plain, 3, **origin, sha256="0" * 64, revision="main")
    model = UNet(UNetConfig(base_channels=2, depth=encoder.depth, encoder=encoder))
    assert model.encoder is not None
    assert describe_network(model) == {
        "network.parameters": sum(p.numel() for p in model.parameters()),
        "network.encoder.architecture": "resnet",
        "network.encoder.source": "owner/name",
        "network.encoder.weights": "pretrained",
        "network.encoder.revision": "main",
        "network.encoder.sha256": "0" * 64,
        "network.encoder.licence": "apache-2.0",
        "network.encoder.parameters": sum(p.numel() for p in model.encoder.parameters()),
    }


@pytest.mark.parametrize(
    "more",
    [
        ("--model.encoder-weights", "none"),
        ("--model.encoder-input", "mean"),
        ("--model.freeze-encoder",),
        ("--model.freeze-until", 0.1),
        ("--model.drop-path", 0.1),
        ("--optim.encoder-lr-scale", 0.1),
    ],
)
def test_settings_of_an_encoder_require_one(
    more: tuple[object, ...], shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", "--data", shards, "--run-dir", tmp_path, *tiny, *more)
    assert ended.code == 2
    assert f"{more[0]} requires --model.encoder" in ended.message


@pytest.mark.ranks
def test_two_ranks_learn_what_one_does(
    convnext: Path, shards: Path, call, launch, tmp_path: Path
) -> None:
    # Swin has a norm that no feature map depends on: ranks must not wait for its gradient.
    damage(convnext, drop_path_rate=0.0)
    more = ("--optim.optimizer", "sgd", "--model.freeze-until", "0.3")
    assert call("train", *flags(shards, tmp_path / "one", convnext, *more)).code == 0
    ended = launch(2, "train", *flags(shards, tmp_path / "two", convnext, *more))
    assert ended.code == 0, ended.err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert ended.err.count("tensors read") == 1


@pytest.mark.ranks
def test_two_ranks_train_a_backbone_with_unused_weights(
    backbones: Path, shards: Path, launch, tmp_path: Path
) -> None:
    ended = launch(2, "train", *flags(shards, tmp_path, backbones / "swin"))
    assert ended.code == 0, ended.err


@pytest.mark.ranks
def test_trained_batch_norm_is_refused_on_several_cpu_ranks(
    backbones: Path, shards: Path, launch, tmp_path: Path
) -> None:
    ended = launch(2, "train", *flags(shards, tmp_path / "a", backbones / "resnet"))
    assert ended.code != 0
    assert ended.err.count("has batch norm, which is synchronised on GPUs only") == 1
    frozen = flags(shards, tmp_path / "b", backbones / "resnet", "--model.freeze-encoder")
    ended = launch(2, "train", *frozen)
    assert ended.code == 0, ended.err
