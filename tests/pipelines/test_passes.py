"""A training pass: cuDNN benchmarks only in it; out of memory is reported with remedies."""

import re
from pathlib import Path

import pytest
import torch

from pipelines.loading.stages import Batch
from pipelines.runtime.errors import RunError
from pipelines.training.optim import Average
from pipelines.training.passes import TrainingPass
from unet import UNet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.fixture(autouse=True)
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)


@pytest.mark.parametrize(
    ("device", "benchmark", "expected"),
    [(CUDA, True, True), (CUDA, False, False), (CPU, True, False)],
)
def test_convolutions_are_timed_within_passes_on_gpus_alone(
    device: torch.device, benchmark: bool, expected: bool
) -> None:
    training_pass = TrainingPass(device, 8, 512, False, benchmark)
    with training_pass(1):
        assert torch.backends.cudnn.benchmark == expected
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), training_pass(1):
        raise KeyError
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("device", "batch_size", "checkpointing", "line"),
    [
        (
            CUDA,
            8,
            False,
            "step 3: a pass over 8 crops of 512 x 512 pixels does not fit into the memory of the "
            "GPU, at a peak of 1.5 GiB (GET was unable to find an engine to execute this "
            "computation); raise --accumulate (--accumulate auto finds what fits), add "
            "--gradient-checkpointing or lower --crop-size",
        ),
        (CUDA, 1, True, "this computation); lower --crop-size"),
        (CUDA, 1, False, "this computation); add --gradient-checkpointing or lower --crop-size"),
        (CPU, 1, True, "the memory of the GPU (GET was unable to find an engine to execute this"),
    ],
)
def test_a_pass_that_does_not_fit_names_the_flags_that_are_left(
    device: torch.device, batch_size: int, checkpointing: bool, line: str
) -> None:
    training_pass = TrainingPass(device, batch_size, 512, checkpointing, True)
    with pytest.raises(RunError, match=re.escape(line)), training_pass(3):
        raise NO_ENGINE


def test_other_errors_of_a_pass_are_as_they_were() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), TrainingPass(CPU, 1, 32, False, True)(1):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("when", ["copy", "forward", "backward", "average"])
def test_training_that_does_not_fit_ends_with_1_and_one_line(
    when: str, shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward, passes = UNet.forward, 0

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def bounded(model: UNet, image: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        # Counting FLOPs makes a pass on the meta device.
        passes += model.training and not image.is_meta
        logits = forward(model, image)
        if passes == 3:
            if when == "forward":
                fail()
            if when == "backward":
                logits[0].register_hook(fail)
        return logits

    def copied(batch: Batch, device: torch.device) -> Batch:
        if when == "copy" and passes == 2:
            fail()
        return to_device(batch, device)

    def averaged(average: Average, model: UNet, step: int) -> None:
        if when == "average" and step == 2:
            fail()
        update(average, model, step)

    to_device, update = Batch.to, Average.update
    monkeypatch.setattr(Batch, "to", copied)
    monkeypatch.setattr(Average, "update", averaged)
    monkeypatch.setattr(UNet, "forward", bounded)
    given = ("--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0)
    ended = call("train", *given, "--accumulate", 2, "--steps", 4)
    assert ended.code == 1
    assert ended.err == (
        "unet train: step 2: a pass over 2 crops of 32 x 32 pixels does not fit into the memory "
        "of the GPU (CUDA out of memory. Tried to allocate 2.00 GiB.); raise --accumulate "
        "(--accumulate auto finds what fits), add --gradient-checkpointing or lower --crop-size\n"
    )
