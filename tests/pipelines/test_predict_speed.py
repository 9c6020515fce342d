"""`inference.compiled`, `inference.options`.

Switches and defaults that make prediction fast, and what they must not change.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import predict
from pipelines.inference import engine, options
from pipelines.inference.compiled import CompiledForward, first_tile
from pipelines.inference.decoding import DecodedInput
from pipelines.runtime import devices
from pipelines.runtime.errors import RunError
from unet import TileConfig, UNet


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images, of which the first cannot be read; two have another size than the others."""
    root = tmp_path_factory.mktemp("images")
    (root / "a.png").write_bytes(b"")
    for number in range(8):
        size = (30, 20) if number in (4, 5) else (40, 60)
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"p{number}.png")
    return root


def flags(checkpoint: Path, given: object, out: object, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0, *more]


def job(out: Path) -> dict[str, object]:
    return json.loads((out / "job.json").read_text())


# ---- compiled


@pytest.fixture
def compiled_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that compiled code is called with; TorchDynamo traces, and nothing is generated."""
    seen: list[tuple[int, ...]] = []
    compile_it = functools.partial(torch.compile, backend="eager")

    def compile_and_watch(forward, **options):
        compiled = compile_it(forward, **options)

        def call(image):
            seen.append(tuple(image.shape))
            return compiled(image)

        return call

    monkeypatch.setattr(torch, "compile", compile_and_watch)
    return seen


def test_full_batches_of_the_first_images_shape_are_compiled_and_no_others(
    trained: Path, images: Path, call, content, compiled_shapes, tmp_path: Path
) -> None:
    more = ("--batch-size", 2, "--samples-per-shard", 4)
    assert call("predict", *flags(trained, images, tmp_path / "plain", *more)).code == 3
    assert not compiled_shapes
    ended = call("predict", *flags(trained, images, tmp_path / "out", *more, "--compile"))
    assert ended.code == 3, ended.err
    # a p0 | p1 p2, p3 p4 | p5 p6, p7: a batch that was cut short is not compiled.
    assert compiled_shapes == [(2, 3, 40, 60)]
    assert "--compile: 6 of 8 tiles ran uncompiled: only full batches of 2" in ended.err
    assert (job(tmp_path / "out")["compile"], job(tmp_path / "plain")["compile"]) == (True, False)
    # Traced, not optimised: the same bytes.
    shards = [content(tmp_path / out)["predicted-000001.tar"] for out in ("plain", "out")]
    assert shards[0] == shards[1]


def test_what_is_compiled_does_not_depend_on_the_shards_that_a_part_makes(
    trained: Path, images: Path, call, compiled_shapes, tmp_path: Path
) -> None:
    more = ("--batch-size", 2, "--samples-per-shard", 4, "--compile", "--part")
    ended = call("predict", *flags(trained, images, tmp_path, *more, "3/3"))
    assert ended.code == 0, ended.err
    # p7 alone: its shape is that of the first image, its batch is not full.
    assert compiled_shapes == []
    ended = call("predict", *flags(trained, images, tmp_path, *more, "2/3"))
    assert ended.code == 0, ended.err
    assert compiled_shapes == []
    assert "8 x" not in ended.err
    ended = call("predict", *flags(trained, images, tmp_path, *more, "1/3"))
    assert compiled_shapes == [(2, 3, 40, 60)]


def test_large_images_are_compiled_for_their_tiles(
    trained: Path, draw, call, compiled_shapes, tmp_path: Path
) -> None:
    given = draw(tmp_path / "in", 2, size=(100, 50)) / "images"
    more = ("--compile", "--tile", 64, "--batch-size", 2, "--overlap", 0.5)
    ended = call("predict", *flags(trained, given, tmp_path / "out", *more))
    assert ended.code == 0, ended.err
    assert compiled_shapes == [(2, 3, 64, 50)] * 3
    assert ended.err == ""


def test_the_first_tile_is_that_of_the_first_readable_input() -> None:
    model = UNet.from_preset("small", in_channels=3, num_classes=2, base_channels=1, depth=2)
    shapes = [None, (3, 90, 200), (3, 5, 5)]

    class Decode:
        inputs = shapes

        def __call__(self, number: int) -> DecodedInput:
            shape = shapes[number]
            return DecodedInput("", "", None if shape is None else torch.zeros(shape))

    assert first_tile(Decode(), TileConfig(tile=100), model) == (90, 100)
    del shapes[1:]
    assert first_tile(Decode(), TileConfig(tile=100), model) is None


def test_weights_that_are_moved_stay_ordinary_tensors_and_compile_in_channels_last(
    trained: Path, images: Path, call, samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile_it = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_it)
    weights, make = [], CompiledForward.__init__

    def watch(compiled: CompiledForward, forward: Any, *more: Any) -> None:
        weights.extend(forward.__self__.parameters())
        make(compiled, forward, *more)

    monkeypatch.setattr(CompiledForward, "__init__", watch)
    for name, more in (("plain", ()), ("fast", ("--compile", "--channels-last"))):
        given = flags(trained, images, tmp_path / name, "--include-image", *more)
        ended = call("predict", *given)
        assert ended.code == 3, ended.err
    assert weights
    assert not any(weight.is_inference() for weight in weights)
    plain, fast = samples(tmp_path / "plain"), samples(tmp_path / "fast")
    for source, sample in plain.items():
        assert (sample.mask != fast[source].mask).mean() < 0.01


def test_after_a_compiled_batch_did_not_fit_the_line_says_that_smaller_ones_are_not_compiled(
    trained: Path, draw, call, compiled_shapes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given, forward = draw(tmp_path / "in", 4, size=(40, 60)) / "images", UNet.forward

    def bounded(model: UNet, image: torch.Tensor) -> torch.Tensor:
        if len(image) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, image)

    monkeypatch.setattr(UNet, "forward", torch.compiler.disable(bounded))
    ended = call(
        "predict", *flags(trained, given, tmp_path / "out", "--batch-size", 4, "--compile")
    )
    assert ended.code == 0, ended.err
    assert compiled_shapes == [(4, 3, 40, 60)]
    assert "continuing with 2, uncompiled, so that from here on masks may differ" in ended.err
    assert "--batch-size 2, into another --out, compiles all" in ended.err
    assert "would have from the start" not in ended.err


def test_a_network_that_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_it(*a, backend=fail, **k))
    forward = CompiledForward(torch.nn.Conv2d(3, 2, 1).eval(), (2, 4, 4))
    assert forward(torch.zeros(1, 3, 4, 4)).shape == (1, 2, 4, 4)
    with pytest.raises(RunError, match=r"--compile: .*Failed to find C compiler") as caught:
        forward(torch.zeros(2, 3, 4, 4))
    assert "\n" not in str(caught.value)


def test_errors_of_a_compiled_network_itself_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    with pytest.raises(torch.OutOfMemoryError):
        CompiledForward(fail, (1, 4, 4))(torch.zeros(1, 3, 4, 4))


# ---- defaults that follow the device


def test_the_batch_size_follows_the_device_unless_it_is_given() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [devices.choose_batch_size(None, device) for device in (cpu, cuda)] == [4, 16]
    assert [devices.choose_batch_size(3, device) for device in (cpu, cuda)] == [3, 3]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_channels_last_comes_with_compile_on_a_gpu_unless_it_is_given(
    compiled: bool, device: str
) -> None:
    def choose(wanted: bool | None) -> bool:
        return devices.choose_channels_last(wanted, torch.device(device), compiled=compiled)

    assert choose(None) == (compiled and device == "cuda")
    assert choose(True) is True
    assert choose(False) is False


def test_a_rerun_takes_the_batch_size_that_the_job_was_started_with(
    trained: Path, images: Path, call, content, monkeypatch, tmp_path: Path
) -> None:
    given = flags(trained, images, tmp_path, "--samples-per-shard", 3)
    assert call("predict", *given).code == 3
    assert (job(tmp_path)["batch_size"], job(tmp_path)["channels_last"]) == (4, False)
    before = content(tmp_path)
    monkeypatch.setattr(devices, "BATCH_SIZE", 7)
    (tmp_path / "predicted-000001.tar").unlink()
    (tmp_path / "index.json").unlink()
    ended = call("predict", *given, "--batch-size", 7)
    assert (ended.code, "created with --batch-size 4; keep that" in ended.err) == (2, True)
    ended = call("predict", *given, "--channels-last")
    assert (ended.code, "created with --no-channels-last; keep" in ended.err) == (2, True)
    ended = call("predict", *given, "--compile")
    assert (ended.code, "created with --no-compile; keep that" in ended.err) == (2, True)
    assert job(tmp_path)["batch_size"] == 4
    config = options.PredictConfig(checkpoint=("run",), input="", out="o")
    settled = config.resolve_defaults(job(tmp_path), torch.device("cuda"))
    assert (settled.tiles.batch_size, settled.channels_last) == (4, False)
    assert config.resolve_defaults({}, torch.device("cpu")).tiles.batch_size == 7
    assert content(tmp_path).items() <= before.items()


@pytest.mark.parametrize("damaged", ["4", "null", '"4"', "[]"])
def test_a_damaged_job_is_refused_in_a_line(
    damaged: str, trained: Path, images: Path, call, tmp_path: Path
) -> None:
    assert call("predict", *flags(trained, images, tmp_path)).code == 3
    (tmp_path / "job.json").write_text(damaged)
    ended = call("predict", *flags(trained, images, tmp_path))
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert "job.json is damaged (" in line
    assert line.endswith("; predict into another --out")


def test_a_job_of_a_version_without_a_setting_is_refused_by_name(
    trained: Path, images: Path, call, tmp_path: Path
) -> None:
    assert call("predict", *flags(trained, images, tmp_path)).code == 3
    started = job(tmp_path)
    del started["channels_last"]
    (tmp_path / "job.json").write_text(json.dumps(started))
    ended = call("predict", *flags(trained, images, tmp_path))
    assert ended.code == 2
    assert "by a version of this program without the setting channels_last; predict" in ended.err


def test_channels_last_gives_the_same_masks(
    trained: Path, images: Path, call, samples, monkeypatch, tmp_path: Path
) -> None:
    layouts, forward = set(), UNet.forward

    def watch(model: UNet, image: torch.Tensor) -> torch.Tensor:
        weight = model.downs[0].conv[0].weight
        layouts.add(weight.is_contiguous(memory_format=torch.channels_last))
        return forward(model, image)

    monkeypatch.setattr(UNet, "forward", watch)
    for name, more in (("plain", ()), ("last", ("--channels-last",))):
        layouts.clear()
        assert (
            call("predict", *flags(trained, images, tmp_path / name, "--include-image", *more)).code
            == 3
        )
        assert layouts == {name == "last"}
        assert job(tmp_path / name)["channels_last"] == (name == "last")
    plain, last = samples(tmp_path / "plain"), samples(tmp_path / "last")
    for source, sample in plain.items():
        assert (sample.mask != last[source].mask).mean() < 0.01


# ---- threads


@pytest.mark.parametrize(("cpus", "expected"), [(1, 2), (2, 2), (8, 2), (16, 4), (64, 16)])
def test_encoders_follow_the_cores_of_the_rank(cpus: int, expected: int) -> None:
    assert predict.num_encoders(cpus) == expected


def test_on_a_cpu_the_network_has_all_threads_and_the_rest_has_one() -> None:
    seen, before = [], torch.get_num_threads()

    def forward(image: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise ValueError("in the network")
        return image

    torch.set_num_threads(3)
    try:
        with engine.limit_threads(forward, torch.device("cpu")) as wrapped:
            wrapped(torch.zeros(1))
            seen.append(torch.get_num_threads())
        assert torch.get_num_threads() == 3
        assert seen == [3, 1]
        seen.pop()
        with (
            pytest.raises(ValueError, match="in the network"),
            engine.limit_threads(forward, torch.device("cpu")) as wrapped,
        ):
            wrapped(torch.zeros(1))
        assert torch.get_num_threads() == 3
        with engine.limit_threads(forward, torch.device("cuda")) as wrapped:
            assert wrapped is forward
    finally:
        torch.set_num_threads(before)


def test_results_carry_the_counts_of_their_masks() -> None:
    masks = SimpleNamespace(
        classes=torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.uint8),
        confidence=torch.tensor([0.9, 0.8], dtype=torch.float64),
        unsure=None,
        probabilities=None,
        counts=torch.tensor([[1, 3, 0], [4, 0, 0]]),
    )
    items = [DecodedInput("a", "a.png", None), DecodedInput("b", "b.png", None)]
    found = [found for _, found in engine.InFlightBatch(0, items, masks, None).results()]
    assert [one.counts for one in found] == [[1, 3, 0], [4, 0, 0]]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_network_predicts_on_the_card_and_a_rerun_the_same_bytes(
    trained: Path, draw, call, samples, content, tmp_path: Path
) -> None:
    given = draw(tmp_path / "in", 34, size=(64, 64)) / "images"
    more = ("--probabilities", "png", "--min-confidence", 0.5)
    for out, switches in (("plain", ()), ("a", ("--compile",)), ("b", ("--compile",))):
        ended = call("predict", *flags(trained, given, tmp_path / out, *more, *switches))
        assert ended.code == 0, ended.err
    settings = job(tmp_path / "a")
    assert (settings["batch_size"], settings["channels_last"]) == (16, True)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    plain, compiled = samples(tmp_path / "plain"), samples(tmp_path / "a")
    assert len(compiled) == 34
    for source, sample in plain.items():
        assert (sample.mask != compiled[source].mask).mean() < 0.05
