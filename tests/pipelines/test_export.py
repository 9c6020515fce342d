"""`export`, `model.export_file`.

Export: the file alone gives the model's logits at any size, and explains itself.
"""

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from pipelines import export
from pipelines.model import export_file
from pipelines.model.load import load_model
from pipelines.runtime.errors import RunError
from unet import DataSpec, UNet, UNetConfig

REPO = Path(__file__).resolve().parents[2]
PADDED = UNetConfig(num_classes=3, base_channels=2, depth=1)
VALID = UNetConfig(num_classes=3, base_channels=2, depth=2, padding="valid", norm="none")
# None of these is among the sizes that the verb tries itself.
ANY_SIZE = ((1, 1, 3), (1, 5, 64), (3, 65, 2), (2, 16, 24), (1, 512, 512))
VALID_SIZES = ((1, 44, 60), (3, 64, 48))


def save(folder: Path, config: UNetConfig) -> Path:
    """A checkpoint whose norms and weights are all different."""
    torch.manual_seed(0)
    spec = DataSpec(
        classes=("background", "cell", "membrane"),
        palette=((0, 0, 0), (255, 51, 51), (9, 99, 200)),
        channels="L" if config.in_channels == 1 else "RGB",
        mean=(0.4, 0.5, 0.6)[: config.in_channels],
        std=(0.2, 0.3, 0.4)[: config.in_channels],
        crop_size=32,
    )
    model = UNet(config, spec)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("padded") / "checkpoint", replace(PADDED, norm="none"))


def require_equal_logits(
    run_file: Callable[[Tensor], Tensor], checkpoint: Path, sizes: tuple[tuple[int, int, int], ...]
) -> None:
    loaded = load_model(str(checkpoint))
    for num_images, height, width in sizes:
        shape = (num_images, loaded.model.config.in_channels, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8)
        if height > 100:
            # One colour: what a norm divides by is nearly 0, and no digit may have been lost.
            image[:] = 200
        with torch.no_grad():
            expected = loaded.model(loaded.spec.normalise(image))
        got = run_file(image)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def open_onnx(file: Path) -> tuple[onnxruntime.InferenceSession, Callable[[Tensor], Tensor]]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session, lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@pytest.mark.parametrize(
    ("config", "sizes", "sides"),
    [
        (PADDED, ANY_SIZE, ("height", "width")),
        (
            UNetConfig(
                in_channels=1,
                num_classes=3,
                base_channels=2,
                depth=1,
                norm="group",
                up="bilinear",
                activation="leaky_relu",
            ),
            ANY_SIZE,
            ("height", "width"),
        ),
        (VALID, VALID_SIZES, ("height - 40", "width - 40")),
    ],
    ids=["instance", "group", "valid"],
)
def test_onnxruntime_gives_the_models_logits_at_any_size(
    config: UNetConfig, sizes, sides: tuple[str, str], call, tmp_path: Path, capfd
) -> None:
    checkpoint, out = save(tmp_path / "checkpoint", config), tmp_path / "new" / "model.onnx"
    ended = call("export", "--checkpoint", checkpoint, "--out", out)
    assert (ended.code, ended.err, capfd.readouterr()) == (0, "", ("", ""))
    assert len(ended.out.splitlines()) == 2
    session, run_file = open_onnx(out)
    require_equal_logits(run_file, checkpoint, sizes)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type) == ("image", "tensor(uint8)")
    assert image.shape == ["batch", config.in_channels, "height", "width"]
    assert (logits.name, logits.type) == ("logits", "tensor(float)")
    assert logits.shape == ["batch", 3, *sides]
    about = session.get_modelmeta().custom_metadata_map
    loaded = load_model(str(checkpoint))
    assert about["weights_sha256"] == loaded.digest
    assert json.loads(about["classes"]) == ["background", "cell", "membrane"]
    assert json.loads(about["palette"]) == [[0, 0, 0], [255, 51, 51], [9, 99, 200]]
    assert about["channels"] == loaded.spec.channels
    assert about["sides"] == (
        "any height and width" if sizes is ANY_SIZE else "height and width 44, 48, 52, ..."
    )
    assert json.loads(about["mean"]) == list(loaded.spec.mean)
    assert json.loads(about["model"])["depth"] == config.depth
    assert str(REPO).encode() not in out.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (
            UNetConfig(
                in_channels=1,
                num_classes=3,
                base_channels=2,
                depth=2,
                norm="batch",
                up="bilinear",
                activation="silu",
            ),
            ANY_SIZE,
        ),
        (replace(VALID, depth=1, norm="instance"), ((1, 18, 24), (3, 40, 20))),
    ],
    ids=["batch", "valid"],
)
def test_torch_gives_the_models_logits_at_any_size(
    config: UNetConfig, sizes, call, tmp_path: Path
) -> None:
    checkpoint, out = save(tmp_path / "checkpoint", config), tmp_path / "new" / "model.pt2"
    ended = call("export", "--checkpoint", checkpoint, "--format", "torch", "--out", out)
    assert (ended.code, ended.err) == (0, "")
    extra = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=extra)
    require_equal_logits(program.module(), checkpoint, sizes)
    about = json.loads(extra["metadata.json"])
    assert about["classes"] == ["background", "cell", "membrane"]
    assert about["weights_sha256"] == load_model(str(checkpoint)).digest
    with zipfile.ZipFile(out) as archive:
        for name in archive.namelist():
            assert str(REPO).encode() not in archive.read(name), name
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]


def test_weights_of_gigabytes_lie_in_a_second_file(
    checkpoint: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(limit, 0)
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an older one")
    ended = call("export", "--checkpoint", checkpoint, "--out", out)
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    _, run_file = open_onnx(out)
    require_equal_logits(run_file, checkpoint, ANY_SIZE[:1])


@pytest.fixture
def changed(checkpoint: Path) -> Callable[..., float]:
    """What `check` finds where the file's logits are `change(size, logits)`."""
    loaded = load_model(str(checkpoint))

    def check(change: Callable[[tuple[int, ...], Tensor], Tensor]) -> float:
        def run_file(image: Tensor) -> Tensor:
            logits = loaded.model(loaded.spec.normalise(image))
            return change(tuple(image.shape[-2:]), logits)

        return export_file.compare_logits(loaded, run_file)

    return check


def one_value(of_largest: float) -> Callable[[tuple[int, ...], Tensor], Tensor]:
    """At 37 x 53 one logit is off by so much."""

    def change(size: tuple[int, ...], logits: Tensor) -> Tensor:
        if size == (37, 53):
            logits = logits.clone()
            logits[0, 1, 20, 50] += of_largest * logits.abs().max()
        return logits

    return change


def test_the_check_gives_the_largest_difference(changed) -> None:
    assert changed(lambda size, logits: logits) == 0
    assert changed(one_value(5e-5)) == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_value(2e-4), r"differ from the model's by 2\.0e-04 of the largest at 37 x 53"),
        (one_value(float("nan")), "differ from the model's by nan of the largest at 37 x 53"),
        (lambda size, logits: logits[:1, :1], r"\[1, 1, 1, 1\] at 1 x 1, the model \[1, 3, 1, 1\]"),
        (lambda size, logits: logits[:1], r"at 2 of 32 x 32, the model \[2, 3, 32, 32\]"),
        (lambda size, logits: logits.view(7), "exported file fails at 1 x 1: shape '"),
    ],
    ids=["one value", "nan", "channels", "batch", "fails"],
)
def test_the_check_finds_any_difference(changed, change, message: str) -> None:
    with pytest.raises(RunError, match=message):
        changed(change)


def test_a_file_with_other_logits_is_not_left_behind(
    checkpoint: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_torch = export.read_torch

    def read_changed(file: Path) -> Callable[[Tensor], Tensor]:
        run_file = read_torch(file)
        return lambda image: run_file(image) * 1.001

    monkeypatch.setattr(export, "read_torch", read_changed)
    out = tmp_path / "model.pt2"
    out.write_bytes(b"an older one")
    ended = call("export", "--checkpoint", checkpoint, "--format", "torch", "--out", out)
    assert (ended.code, ended.out) == (1, "")
    assert (
        "differ from the model's by 1.0e-03 of the largest at 1 x 1, more than 1e-04" in ended.err
    )
    assert len(ended.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert out.read_bytes() == b"an older one"


def test_a_graph_that_torch_cannot_export_is_refused_in_one_line(
    checkpoint: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def branch(self: export_file.Exported, image: Tensor) -> Tensor:
        return self.model(image) if image.sum() > 0 else image

    monkeypatch.setattr(export_file.Exported, "forward", branch)
    out = tmp_path / "model.pt2"
    ended = call("export", "--checkpoint", checkpoint, "--format", "torch", "--out", out)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(f"unet export: torch {torch.__version__} cannot export this model")
    assert len(ended.err.splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_before_anything_is_read(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ("onnxscript", "onnxruntime")
    find_spec = export.find_spec
    monkeypatch.setattr(
        export, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    args = ("--checkpoint", tmp_path / "nowhere")
    ended = call("export", *args, "--out", tmp_path / "model.onnx")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        "unet export: --format onnx requires onnxscript and onnxruntime: "
        "pip install 'unet-shards[export]'\n"
    )
    # torch needs none of them.
    ended = call("export", *args, "--format", "torch", "--out", tmp_path / "model.pt2")
    assert ended.code == 1
    assert "nowhere: does not exist" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_none_of_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pipelines.export", raising=False)
    with pytest.raises(SystemExit) as ended:
        import_module("pipelines.export").main(["--help"])
    assert ended.value.code == 0
    assert "--format {onnx,torch}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--out", "m.onnx", "--format", "tflite"), "--format tflite: unknown; use onnx or torch"),
        (("--out", "m.pt2"), "--out m.pt2 must end in .onnx with --format onnx"),
        (("--out", "m.pt", "--format", "torch"), "--out m.pt must end in .pt2 with --format torch"),
        (("--out", "s3://bucket/m.onnx"), "is a URL"),
        (
            ("--out", "folder.onnx"),
            "--out folder.onnx is a directory; --out takes the file to write",
        ),
    ],
)
def test_a_wrong_command_is_refused(
    args: tuple[str, ...],
    message: str,
    checkpoint: Path,
    call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    ended = call("export", "--checkpoint", checkpoint, *args)
    assert ended.code == 2
    assert message in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]
