"""`predict`, `evaluate`, `export`, `model.load`, `model.forward`.

Ensembles: several checkpoints as one model, the same on any number of ranks.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from pipelines.model.load import load_models
from unet import UNet


@pytest.fixture(scope="session")
def images(draw: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn"), 5, size=(40, 24)) / "images"


@pytest.fixture(scope="session")
def pair_of(make_checkpoint) -> list[Path]:
    """Two checkpoints whose logits are hand-set: (0, 2) and (0, -1) at every pixel."""
    return [with_bias(make_checkpoint(), bias) for bias in (2.0, -1.0)]


def with_bias(checkpoint: Path, bias: float) -> Path:
    model = UNet.from_pretrained(str(checkpoint))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
        model.head.bias[1] = bias
    model.save_pretrained(checkpoint)
    return checkpoint


def predict(call, images: Path, out: Path, *checkpoints: object, more: tuple = ()) -> None:
    argv = ("--checkpoint", *checkpoints, "--input", images, "--out", out, "--workers", 0)
    ended = call("predict", *argv, *more)
    assert ended.code == 0, ended.err


def read_probabilities(out: Path) -> list[np.ndarray]:
    found = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".probabilities.npy"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(np.load(io.BytesIO(file.read())))
    return found


def test_one_member_is_the_checkpoint_itself(pair_of, images, call, content, tmp_path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(pair_of[0], runs / "fold-1")
    for name, checkpoint in (("alone", pair_of[0]), ("folder", runs)):
        predict(call, images, tmp_path / name, checkpoint)
    assert content(tmp_path / "alone") == content(tmp_path / "folder")
    digest = json.loads((tmp_path / "alone" / "job.json").read_text())["checkpoint"]
    assert isinstance(digest, str)


@pytest.mark.parametrize("more", [(), ("--tta",), ("--tile", 16, "--overlap", 0.5)])
def test_the_probabilities_of_two_members_are_averaged(
    more: tuple, pair_of, images, call, tmp_path
) -> None:
    more = (*more, "--probabilities", "float16")
    predict(call, images, tmp_path / "both", *pair_of, more=more)
    expected = (1 / (1 + np.exp(-2.0)) + 1 / (1 + np.exp(1.0))) / 2
    found = read_probabilities(tmp_path / "both")
    assert len(found) == 5
    for probabilities in found:
        np.testing.assert_allclose(probabilities[1], expected, atol=1e-3)
        np.testing.assert_allclose(probabilities[0], 1 - expected, atol=1e-3)


def test_members_on_the_host_give_the_same_bytes(pair_of, images, call, content, tmp_path) -> None:
    predict(call, images, tmp_path / "device", *pair_of)
    predict(call, images, tmp_path / "host", *pair_of, more=("--ensemble-on", "host"))
    assert content(tmp_path / "device") == content(tmp_path / "host")


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(
    ranks: int, trained, make_checkpoint, images, call, launch, content, tmp_path
) -> None:
    checkpoints = (trained, make_checkpoint())
    more = ("--samples-per-shard", 2, "--probabilities", "png")
    predict(call, images, tmp_path / "one", *checkpoints, more=more)
    argv = ("--checkpoint", *checkpoints, "--input", images, "--out", tmp_path / "several")
    ended = launch(ranks, "predict", *argv, *more, "--workers", 0)
    assert ended.code == 0, ended.err
    assert content(tmp_path / "one") == content(tmp_path / "several")


def test_a_job_with_other_members_is_refused(pair_of, images, call, tmp_path) -> None:
    predict(call, images, tmp_path, *pair_of)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["checkpoint"] == load_models([*map(str, pair_of)]).digest
    argv = ("--input", images, "--out", tmp_path, "--workers", 0)
    for others in ((pair_of[0],), (*pair_of, pair_of[0]), pair_of[::-1]):
        ended = call("predict", "--checkpoint", *others, *argv)
        assert (ended.code, "was created with --checkpoint " in ended.err) == (2, True)
    predict(call, images, tmp_path, *pair_of)


def test_scores_of_an_ensemble_record_its_members(pair_of, shards, call, tmp_path) -> None:
    runs = tmp_path / "runs"
    for number, checkpoint in enumerate(pair_of, 1):
        shutil.copytree(checkpoint, runs / f"fold-{number}")
    argv = ("--data", shards, "--workers", 0)
    ended = call("evaluate", "--checkpoint", runs, *argv)
    assert ended.code == 0, ended.err
    scores = json.loads((runs / "scores.json").read_text())
    assert scores["checkpoint"] == load_models([*map(str, pair_of)]).digest
    # The average, 0.575, makes every pixel the second class, as the first member does.
    out = tmp_path / "first"
    assert call("evaluate", "--checkpoint", pair_of[0], *argv, "--out", out).code == 0
    assert scores["confusion"] == json.loads((out / "scores.json").read_text())["confusion"]
    ended = call("evaluate", "--checkpoint", *pair_of, *argv)
    assert (ended.code, "use --out to choose where scores" in ended.err) == (2, True)


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_the_exported_ensemble_computes_the_same_averages(
    form: str, trained, call, tmp_path
) -> None:
    other = UNet.from_pretrained(str((trained / "checkpoints" / "best").resolve()))
    torch.nn.init.normal_(other.head.weight)
    other.save_pretrained(tmp_path / "other")
    checkpoints = [str(trained), str(tmp_path / "other")]
    file = tmp_path / {"onnx": "model.onnx", "torch": "model.pt2"}[form]
    ended = call("export", "--checkpoint", *checkpoints, "--format", form, "--out", file)
    assert ended.code == 0, ended.err
    loaded = load_models(checkpoints)
    pixels = torch.randint(0, 256, (2, 3, 21, 34), dtype=torch.uint8)
    if form == "torch":
        logits = torch.export.load(file).module()(pixels)
    else:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["weights_sha256"]) == loaded.digest
        assert "average of 2 models" in metadata["logits"]
        logits = torch.from_numpy(session.run(["logits"], {"image": pixels.numpy()})[0])
    with torch.no_grad():
        each = [member.logits(pixels).softmax(dim=1) for member in loaded.members]
    torch.testing.assert_close(
        logits.softmax(dim=1), torch.stack(each).mean(dim=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"classes": ("background", "cell")},
            "has classes background, cell, {first} has background, foreground",
        ),
        ({"channels": "L"}, "has channels L, {first} has RGB"),
        ({"resize": 64}, "has resize 64, {first} has None"),
    ],
)
@pytest.mark.parametrize("verb", ["predict", "evaluate", "export"])
def test_members_of_other_data_are_refused_by_name(
    verb: str, other: dict, message: str, make_checkpoint, images, shards, call, tmp_path
) -> None:
    first = make_checkpoint()
    if "resize" in other:
        second = make_checkpoint()
        header = json.loads((second / "config.json").read_text())
        header["data"] |= other
        (second / "config.json").write_text(json.dumps(header))
    else:
        second = make_checkpoint(**other)
    argv = {
        "predict": ("--input", images, "--out", tmp_path / "out"),
        "evaluate": ("--data", shards, "--out", tmp_path / "out"),
        "export": ("--out", tmp_path / "model.onnx"),
    }
    ended = call(verb, "--checkpoint", first, second, *argv[verb])
    assert ended.code == 1
    assert f"--checkpoint {second} {message.format(first=first)}; the models of an" in ended.err
    assert not [*tmp_path.iterdir()]


def test_flags_of_ensembles_without_effect_are_refused(pair_of, images, call, tmp_path) -> None:
    argv = ("--input", images, "--out", tmp_path / "out")
    ended = call("predict", "--checkpoint", *pair_of, *argv, "--compile", "--ensemble-on", "host")
    assert (ended.code, "--compile requires --ensemble-on device" in ended.message) == (2, True)
    ended = call("predict", "--checkpoint", *argv)
    assert (ended.code, "--checkpoint: needs a value" in ended.message) == (2, True)
