"""`inference.tiles`, `model.forward`: smaller batches and tiles, the same masks, reported once."""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from pipelines.model.forward import make_forward
from unet import UNet

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
WORDS = (
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "GET was unable to find an engine to execute this computation",
)
"""Messages of cuDNN and cuBLAS for it, as plain RuntimeErrors."""


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    """A model that finds what is above 127 in the red channel."""
    return make_checkpoint()


@pytest.fixture(scope="module")
def valid(bright: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bright model with valid convolutions: its smallest tile is 18, of which it predicts 2."""
    found = UNet.from_pretrained(bright)
    model = UNet(replace(found.config, padding="valid"), found.spec)
    model.load_state_dict(found.state_dict())
    folder = tmp_path_factory.mktemp("valid") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(48, 48)] * 5 + [(90, 130), (20, 30)]):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"p{number}.png")
    return root


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for a GPU's memory: passes of more images or larger ones than fit raise.

    Returns what was asked for: (images, longest side) of each pass.
    """

    def make(
        most: int = 1000, side: int = 10_000, error: RuntimeError = MEMORY
    ) -> list[tuple[int, int]]:
        asked, forward = [], UNet.forward

        def bounded(model: UNet, image: torch.Tensor) -> torch.Tensor:
            asked.append((len(image), max(image.shape[-2:])))
            if asked[-1][0] > most or asked[-1][1] > side:
                raise type(error)(*error.args)
            return forward(model, image)

        monkeypatch.setattr(UNet, "forward", bounded)
        return asked

    return make


def argv(checkpoint: Path, given: object, out: object, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0, *more]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_halved_once_and_reported_once(
    most: int, bright: Path, images: Path, call, memory, content, tmp_path: Path
) -> None:
    more = ("--batch-size", 4, "--tile", 48, "--tta", "--probabilities", "float16")
    assert call("predict", *argv(bright, images, tmp_path / "a", *more)).code == 0
    asked = memory(most)
    ended = call("predict", *argv(bright, images, tmp_path / "b", *more))
    assert ended.code == 0, ended.err
    fits = 2 if most > 1 else 1
    ((line,),) = (ended.err.splitlines(),)
    assert line == (
        "a batch of 4 tiles exceeds the memory of this GPU (cpu); continuing with "
        f"{fits}, as --batch-size {fits} would have from the start"
    )
    # 4, perhaps 2, and from then on what fits.
    refused = [size for size, _ in asked if size > most]
    assert refused == ([4] if most > 1 else [4, 2])
    assert max(size for size, _ in asked[len(refused) :]) == fits
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_evaluation_halves_batches_too(
    bright: Path, shards: Path, call, memory, tmp_path: Path
) -> None:
    given = ("--checkpoint", bright, "--data", shards, "--workers", 0, "--batch-size", 4)
    assert call("evaluate", *given, "--out", tmp_path / "a").code == 0
    asked = memory(1)
    ended = call("evaluate", *given, "--out", tmp_path / "b")
    assert ended.code == 0, ended.err
    assert ended.err.count("a batch of 4 tiles exceeds") == 1
    assert asked
    scores = [(tmp_path / out / "scores.json").read_bytes() for out in "ab"]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("side", "tile"), [(39, 20), (19, 16)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tiles_of_valid_convolutions_are_halved_and_the_masks_are_the_same(
    batch_size: int, side: int, tile: int, valid: Path, images: Path, call, memory, tmp_path: Path
) -> None:
    asked = memory(side=side)
    more = ("--tile", 48, "--batch-size", batch_size, "--png")
    ended = call("predict", *argv(valid, images, tmp_path, *more))
    assert ended.code == 0, ended.err
    ((line,),) = (ended.err.splitlines(),)
    assert line == (
        f"tiles of 48 do not fit into the memory of this GPU (cpu): continuing with {tile}, one at "
        f"a time, as with --tile {tile} --batch-size 1; the masks are identical"
    )
    # What does not fit is remembered: it is asked for once.
    refused = [(size, wanted) for size, wanted in asked if wanted > side]
    batches = [(size, 40) for size in ((4, 2, 1) if batch_size == 4 else (1,))]
    assert refused == [*batches, *([(1, 20)] if side < 20 else [])]
    for path in images.iterdir():
        mask = np.asarray(Image.open(tmp_path / "png" / path.name))
        np.testing.assert_array_equal(mask, np.asarray(Image.open(path))[..., 0] > 127)


def test_the_smallest_tile_that_does_not_fit_is_reported_in_a_line(
    valid: Path, images: Path, call, memory, tmp_path: Path
) -> None:
    memory(most=0)
    ended = call("predict", *argv(valid, images, tmp_path, "--tile", 48))
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert line.startswith(
        "unet predict: the smallest tile of this network, 18 x 18 pixels, does not fit into the "
        "memory of this GPU (CUDA out of memory. Tried to allocate 2.00 GiB.); end other"
    )


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_other_tiles_that_do_not_fit_are_reported_in_a_line_that_names_the_flag(
    verb: str, bright: Path, images: Path, shards: Path, call, memory, tmp_path: Path
) -> None:
    memory(side=40)
    given = argv(bright, images, tmp_path, "--tile", 48)
    if verb == "evaluate":
        given = ["--checkpoint", bright, "--data", shards, "--out", tmp_path, "--workers", 0]
    ended = call(verb, *given)
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert line.startswith(
        f"unet {verb}: a single tile of 48 x 48 pixels exceeds the memory of this GPU (CUDA out of "
        "memory. Tried to allocate 2.00 GiB.); lower --tile, for example to 24"
    )
    remedy = "predict into another --out, since other tiles give other masks"
    assert (remedy in line) == (verb == "predict")
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("message", WORDS)
@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_memory_that_runs_out_elsewhere_is_reported_in_a_line(
    verb: str,
    message: str,
    bright: Path,
    images: Path,
    shards: Path,
    call,
    monkeypatch,
    tmp_path: Path,
) -> None:
    def fail(*given: object, **more: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("pipelines.inference.tiles.predict_masks", fail)
    monkeypatch.setattr("pipelines.evaluation.score.predict_mask", fail)
    given = argv(bright, images, tmp_path)
    if verb == "evaluate":
        given = ["--checkpoint", bright, "--data", shards, "--out", tmp_path, "--workers", 0]
    ended = call(verb, *given)
    assert ended.code == 1
    ((line,),) = (ended.err.splitlines(),)
    assert line.startswith(
        f"unet {verb}: the GPU (cpu) is out of memory ({message}); lower --batch-size or --tile"
    )
    assert ("choose another --out" in line) == (verb == "predict")


@pytest.mark.parametrize("message", WORDS)
def test_a_batch_is_halved_in_whichever_words_memory_runs_out(
    message: str, bright: Path, images: Path, call, memory, content, tmp_path: Path
) -> None:
    assert call("predict", *argv(bright, images, tmp_path / "a")).code == 0
    memory(1, error=RuntimeError(message))
    ended = call("predict", *argv(bright, images, tmp_path / "b"))
    assert ended.code == 0, ended.err
    assert ended.err.count("exceeds the memory of this GPU") == 1
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_an_engine_that_is_missing_for_another_reason_is_quoted(
    bright: Path, images: Path, call, memory, tmp_path: Path
) -> None:
    memory(0, error=RuntimeError(WORDS[2]))
    ended = call("predict", *argv(bright, images, tmp_path))
    assert ended.code == 1
    assert f"({WORDS[2]})" in ended.err
    assert ended.err.count("\n") == 1


def test_other_errors_of_a_pass_halve_nothing(
    bright: Path, images: Path, call, memory, tmp_path: Path
) -> None:
    asked = memory(0, error=RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        call("predict", *argv(bright, images, tmp_path))
    assert len(asked) == 1


def test_what_a_refused_pass_had_allocated_is_free_for_the_next(
    bright: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = UNet.from_pretrained(bright)
    allocated: list[weakref.ref[torch.Tensor]] = []

    def bounded(model: UNet, image: torch.Tensor) -> torch.Tensor:
        assert [ref() for ref in allocated] == [None] * len(allocated)
        held = torch.zeros(1)
        allocated.append(weakref.ref(held))
        if len(image) > 1:
            raise RuntimeError(WORDS[0])
        return image

    monkeypatch.setattr(UNet, "forward", bounded)
    forward = make_forward(model, Accelerator(cpu=True))
    assert forward(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)).shape == (4, 3, 8, 8)
    assert len(allocated) == 6


@pytest.mark.parametrize(("device", "overlap"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_a_copy_overlaps_to_cuda_alone(
    device: str, overlap: bool, bright: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[object, ...]] = []
    move, where = torch.Tensor.to, torch.device(device)

    def noting(tensor: torch.Tensor, *given: object, **more: object) -> torch.Tensor:
        if tensor.dtype == torch.uint8 and "non_blocking" in more:
            copies.append((*given, more["non_blocking"]))
            # There is no such device here.
            return tensor
        return move(tensor, *given, **more)

    monkeypatch.setattr(torch.Tensor, "to", noting)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(UNet, "forward", lambda model, image: image)
    stub = SimpleNamespace(device=where, autocast=nullcontext)
    make_forward(UNet.from_pretrained(bright), stub)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert copies == [(where, overlap)]
