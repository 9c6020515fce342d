"""`--accumulate auto`: the fewest passes that fit, equal on all ranks, without side effects."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pipelines.loading.augment import Augment, AugmentConfig
from pipelines.runtime.devices import start
from pipelines.runtime.errors import RunError
from pipelines.runtime.failures import is_out_of_memory
from pipelines.training import memory_probe
from pipelines.training.memory_probe import MARGIN, Probe, num_moments, reserve_memory
from pipelines.training.optim import Learner, OptimConfig, build_learner
from unet import DataSpec, LossConfig, SegmentationLoss, UNet, UNetConfig

REPO = Path(__file__).resolve().parents[2]
SPEC = DataSpec(
    classes=("background", "cell"),
    palette=((0, 0, 0), (255, 0, 0)),
    channels="RGB",
    mean=(0.5, 0.5, 0.5),
    std=(0.3, 0.3, 0.3),
    crop_size=16,
)
FULL = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


class Limit:
    """A device that has memory for so many samples in a forward pass while training."""

    def __init__(self, patch: pytest.MonkeyPatch, samples: int, error: Exception) -> None:
        self.samples, self.tried = samples, list[int]()
        forward = SegmentationLoss.forward

        def limited(loss: SegmentationLoss, logits: Any, mask: Tensor, *more: Any) -> Any:
            self.tried.append(len(mask))
            if len(mask) > self.samples:
                # Not twice the same, which would keep the frames of a run, and its lock, alive.
                raise type(error)(*error.args)
            return forward(loss, logits, mask, *more)

        patch.setattr(SegmentationLoss, "forward", limited)
        patch.setattr(memory_probe, "has_memory_limit", lambda device: True)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch):
    def make(samples: int, error: Exception | None = None) -> Limit:
        return Limit(monkeypatch, samples, error or torch.OutOfMemoryError("CUDA out of memory"))

    return make


def make_learner(**network: Any) -> Learner:
    torch.manual_seed(0)
    config = UNetConfig(base_channels=2, depth=2, **network)
    return build_learner(UNet(config, SPEC), OptimConfig())


def make_probe(learner: Learner, **config: Any) -> Probe:
    accelerator = start()
    criterion = SegmentationLoss(LossConfig(**config), SPEC.counted).to(accelerator.device)
    augment = Augment(AugmentConfig(), seed=0)
    border = bool(config.get("border_weight"))
    return Probe(accelerator, learner, criterion, augment, SPEC.crop_size, border, benchmark=True)


# ---- what is chosen


@pytest.mark.parametrize(
    ("fitting", "samples", "passes"), [(8, 8, 1), (7, 8, 2), (3, 12, 4), (1, 6, 6), (9, 7, 1)]
)
def test_the_fewest_passes_that_divide_and_fit_are_chosen(
    fitting: int, samples: int, passes: int, limit
) -> None:
    device = limit(fitting)
    assert make_probe(make_learner(), border_weight=10.0).choose_passes(samples) == passes
    assert device.tried[0] == samples
    # The second time beside the gradients of the first.
    assert device.tried[-1 - (passes > 1) :] == [samples // passes] * (1 + (passes > 1))


def test_where_not_even_one_sample_fits_the_remedies_are_named(limit) -> None:
    limit(0, RuntimeError(FULL))
    with pytest.raises(RunError, match="one sample of 16 x 16 pixels does not fit") as refused:
        make_probe(make_learner()).choose_passes(4)
    assert "CUBLAS_STATUS_ALLOC_FAILED" in str(refused.value)
    for remedy in ("--crop-size", "--gradient-checkpointing", "--model.base-channels"):
        assert remedy in str(refused.value)


def test_another_error_than_a_full_memory_is_not_swallowed(limit) -> None:
    limit(2, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_probe(make_learner()).choose_passes(4)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError(FULL), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), False),
        (ValueError(FULL), False),
    ],
)
def test_a_full_memory_is_known_by_what_torch_and_its_libraries_raise(
    error: Exception, full: bool
) -> None:
    assert is_out_of_memory(error) == full


# ---- no trace


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_trying_leaves_weights_statistics_gradients_and_random_numbers_alone(
    norm: str, limit
) -> None:
    limit(2)
    learner = make_learner(norm=norm, dropout=0.5)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    state = torch.get_rng_state()
    assert make_probe(learner).choose_passes(8) == 4
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert all(module.training for module in learner.model.modules())
    assert learner.optimizer.state_dict()["state"] == {}


def test_room_is_kept_for_the_moments_and_for_what_ranks_exchange() -> None:
    learner, accelerator = make_learner(), start()
    size = sum(parameter.numel() for parameter in learner.model.parameters())

    def reserved() -> int:
        return sum(tensor.numel() for tensor in reserve_memory(learner, accelerator))

    assert reserved() == 2 * size
    accelerator.state.num_processes = 2
    assert reserved() == 3 * size
    # What a resumed run has loaded is there already.
    learner.model(torch.rand(1, 3, 16, 16)).sum().backward()
    learner.optimizer.step()
    assert reserved() == size
    sgd = build_learner(learner.model, OptimConfig(optimizer="sgd")).optimizer
    plain = build_learner(learner.model, OptimConfig(optimizer="sgd", momentum=0.0)).optimizer
    assert (num_moments(sgd), num_moments(plain)) == (1, 0)


def test_what_was_compiled_while_trying_is_not_what_trains(
    limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[object]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes.append([i for i in inputs if not isinstance(i, Tensor)])
        return module.forward

    learner = make_learner()
    learner.model.compile(backend=backend)
    limit(2)
    assert make_probe(learner).choose_passes(8) == 4
    assert len(sizes) == 3
    learner.model(torch.rand(2, 3, 16, 16))
    # Compiled anew, for this size alone.
    assert len(sizes) == 4
    assert sizes[-1] == []


# ---- runs


def args(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    flags = ("--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, "--log-every", 1)
    return [*flags, "--steps", 3, "--tracking.pictures", 0, *more]


def learned(run_dir: Path) -> dict[str, Tensor]:
    path = run_dir / "checkpoints" / "last" / "training.pt"
    return torch.load(path, weights_only=True)["model"]


def accumulated(run_dir: Path) -> object:
    return yaml.safe_load((run_dir / "config.yaml").read_text())["accumulate"]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


NETWORK = ("--model.norm", "batch", "--model.dropout", 0.5)


def test_a_run_learns_what_it_would_with_the_passes_given(
    shards: Path, tiny, call, limit, metrics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given, found = tmp_path / "given", tmp_path / "found"
    ended = call("train", *args(shards, given, tiny, *NETWORK, "--accumulate", 2))
    assert ended.code == 0, ended.err
    limit(2)
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *a, **n: (steps.append(1), step(*a, **n))[1]
    )
    ended = call("train", *args(shards, found, tiny, *NETWORK, "--accumulate", "auto"))
    assert ended.code == 0, ended.err
    message = "--accumulate auto: 2 x 2 samples a step on each rank, the fewest passes that fit"
    assert ended.err.count(message) == 1
    assert accumulated(found) == 2
    # Two passes make one step.
    assert len(steps) == 3
    assert losses(metrics(found)) == losses(metrics(given))
    ours, theirs = learned(found), learned(given)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_resume_tries_again_on_the_machine_that_it_is_on(
    shards: Path, tiny, call, limit, metrics, tmp_path: Path
) -> None:
    config = tmp_path / "auto.yaml"
    config.write_text("accumulate: auto\n")
    run_dir = tmp_path / "run"
    device = limit(0)
    for fitting, steps, passes in ((1, 2, 4), (2, 4, 2)):
        device.samples = fitting
        more = ("--config", config, "--steps", steps)
        ended = call("train", *args(shards, run_dir, tiny, *more))
        assert ended.code == 0, ended.err
        assert accumulated(run_dir) == passes
    assert len(losses(metrics(run_dir))) == 4


def test_without_a_gpu_it_is_one_pass_and_that_is_printed(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *args(shards, tmp_path, tiny, "--accumulate", "auto"))
    assert ended.code == 0, ended.err
    if not torch.cuda.is_available():
        message = "--accumulate auto: 1 x 4 samples a step on each rank; other numbers of passes"
        assert message in ended.err
    assert accumulated(tmp_path) == 1


def test_a_sample_that_does_not_fit_ends_the_run_in_one_line(
    shards: Path, tiny, call, limit, tmp_path: Path
) -> None:
    limit(0)
    ended = call("train", *args(shards, tmp_path, tiny, "--accumulate", "auto"))
    assert ended.code == 1
    *tried, last = ended.err.splitlines()
    # What takes minutes with --compile is announced.
    assert tried == [f"--accumulate auto: trying {n} x {4 // n} samples" for n in (1, 2, 4)]
    assert "one sample of 32 x 32 pixels does not fit into the memory" in last


@pytest.mark.parametrize("value", ["0", "automatic"])
def test_other_words_and_numbers_are_refused(value: str, shards, tiny, call, tmp_path) -> None:
    ended = call("train", *args(shards, tmp_path / "run", tiny, "--accumulate", value))
    assert ended.code == 2
    assert "accumulate" in ended.message


LIMITED = """
import os, sys, torch
from pipelines import train
from pipelines.training import memory_probe
from unet import SegmentationLoss

limit, forward = (4, 2)[int(os.environ["RANK"])], SegmentationLoss.forward

def limited(loss, logits, mask, *more):
    if len(mask) > limit:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(loss, logits, mask, *more)

SegmentationLoss.forward = limited
memory_probe.has_memory_limit = lambda device: True
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.ranks
def test_two_ranks_with_different_memory_take_the_larger_number_of_passes(
    shards: Path, tiny, launch, metrics, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = ("--global-batch-size", 8)
    arguments = args(shards, tmp_path / "found", tiny, *more, "--accumulate", "auto")

    def rank(number: int) -> subprocess.Popen[str]:
        about = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in about.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(
            [sys.executable, "-c", LIMITED, *map(str, arguments)],
            cwd=REPO,
            env={**os.environ, **environment, "ACCELERATE_MIXED_PRECISION": "no"},
            stderr=subprocess.PIPE,
            text=True,
        )

    ranks = [rank(0), rank(1)]
    message = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], message
    # Rank 0 alone would have taken one pass of four samples.
    assert [line.count("--accumulate auto: 2 x 2 samples") for line in message] == [1, 0]
    assert accumulated(tmp_path / "found") == 2
    given = args(shards, tmp_path / "given", tiny, *more, "--accumulate", 2)
    ended = launch(2, "train", *given)
    assert ended.code == 0, ended.err
    assert losses(metrics(tmp_path / "found")) == losses(metrics(tmp_path / "given"))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_what_does_not_fit_is_halved_and_the_memory_is_free_again() -> None:
    accelerator = start()
    learner = make_learner()
    learner.model.to(accelerator.device)
    probe = make_probe(learner)
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    # The workspace of cuBLAS and cached constants stay: they are allocated once.
    assert probe.find_failure(2, accumulated=True) is None
    before = torch.cuda.memory_allocated()
    assert probe.find_failure(round(total / (16 * 16 * 4 * 2)), accumulated=False)
    assert probe.find_failure(2, accumulated=True) is None
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_reserved() < MARGIN * total
