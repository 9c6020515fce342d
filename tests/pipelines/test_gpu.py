"""`train`, `evaluate`, `predict`.

On a GPU: precision, resume, memory, layouts and waiting; beside a CPU where one can do the same.

Tests of both devices run their CPU variant everywhere, so that their own logic has run before a GPU
is at hand.
"""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipelines.loading.augment import Augment, AugmentConfig
from pipelines.loading.batches import prefetch, train_batches
from pipelines.loading.dataset import DataSet
from pipelines.runtime.devices import start
from pipelines.training.optim import OptimConfig, build_learner
from shards.manifest import read_manifest
from shards.order import Order, TrainPlan
from shards.store import Store
from unet import DataSpec, LossConfig, SegmentationLoss, UNet

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
CONSTANT = ("--optim.schedule", "constant", "--optim.warmup", 0, "--log-every", 1)
"""A learning rate that does not depend on where a run ends, and every loss."""
SPEC = DataSpec(
    classes=("background", "cell"),
    palette=((0, 0, 0), (255, 0, 0)),
    channels="RGB",
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    crop_size=32,
)

both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)], indirect=True)
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device that the commands of a test take."""
    if request.param == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return torch.device(request.param)


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """For a test that starts an Accelerator itself: there is one state in a process."""

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    forget()
    yield
    forget()


def losses(run_dir: Path, metrics: Any) -> list[float]:
    """Of each line of metrics.jsonl; all must be finite."""
    found = [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]
    assert found
    assert all(math.isfinite(loss) for loss in found)
    return found


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Those that the last checkpoint was scored with."""
    return load_file(run_dir / "checkpoints" / "last" / "model.safetensors")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of a difference, relative to that of `theirs`."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().cpu() for name in sorted(tensors)])


def masks(out: Path) -> dict[str, bytes]:
    """The PNGs that `unet predict --png` wrote."""
    return {path.name: path.read_bytes() for path in (out / "png").iterdir()}


# --------------------------------------------------------------------------------------- precision


@on_gpu
def test_a_bare_start_takes_the_precision_of_the_card(device, fresh_state) -> None:
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert start().mixed_precision == ("bf16" if native else "no")


@both
def test_bf16_is_for_the_network_and_the_loss_stays_float32(
    device, fresh_state, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = start()
    assert accelerator.device.type == device.type
    model = UNet.from_preset("small", in_channels=3, num_classes=2, base_channels=2, depth=1)
    model.to(accelerator.device)
    image = torch.randn(2, 3, 16, 16, device=accelerator.device)
    with accelerator.autocast():
        logits = model(image)
    assert logits.dtype == torch.bfloat16
    mask = torch.ones(2, 16, 16, dtype=torch.uint8, device=accelerator.device)
    loss, _ = SegmentationLoss(LossConfig(), (1,)).to(accelerator.device)(logits, mask)
    assert loss.dtype == torch.float32
    accelerator.backward(loss)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@on_gpu
def test_steps_that_overflow_in_fp16_are_left_out_until_the_scale_fits_also_over_a_resume(
    device, shards: Path, tiny, call, metrics, monkeypatch, record_property, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    # A loss of a thousand, times the scale of 65,536, overflows in the gradients.
    options = (
        "--data",
        shards,
        "--run-dir",
        tmp_path,
        *tiny,
        *CONSTANT,
        "--loss.cross-entropy",
        1000,
    )
    ended = call("train", *options, "--steps", 24)
    assert ended.code == 0, ended.err
    losses(tmp_path, metrics)
    counted = [line["train/overflows"] for line in metrics(tmp_path) if "train/loss" in line]
    record_property("overflows of 24 steps", counted[-1])
    assert 0 < counted[-1] < 20
    assert counted[-1] == counted[-4]
    before = torch.load(tmp_path / "checkpoints" / "last" / "training.pt", weights_only=True)
    assert before["scaler"]["scale"] == 65536 / 2 ** counted[-1]
    ended = call("train", *options, "--steps", 30)
    assert ended.code == 0, ended.err
    after = [line for line in metrics(tmp_path) if "train/loss" in line and line["step"] > 24]
    assert len(after) == 6
    assert all(math.isfinite(line["train/loss"]) for line in after)
    # The scale was taken over.
    assert after[-1]["train/overflows"] == 0


# -------------------------------------------------------------------------- whole runs, and resumes


@both
def test_training_and_scoring_run(device, shards: Path, tiny, call, metrics, tmp_path) -> None:
    ended = call("train", "--data", shards, "--run-dir", tmp_path, *tiny, "--steps", 20)
    assert ended.code == 0, ended.err
    losses(tmp_path, metrics)
    ended = call("evaluate", "--checkpoint", tmp_path, "--data", shards)
    assert ended.code == 0, ended.err


@on_gpu
def test_switches_of_speed_run_on_the_card(
    device, shards: Path, tiny, call, metrics, tmp_path
) -> None:
    for name, flags in {
        "channels last": ("--channels-last",),
        "recomputed": ("--gradient-checkpointing",),
        "batch norm": ("--model.norm", "batch", "--channels-last"),
    }.items():
        run_dir = tmp_path / name
        more = (*flags, "--steps", 10, "--log-every", 1)
        ended = call("train", "--data", shards, "--run-dir", run_dir, *tiny, *more)
        assert ended.code == 0, ended.err
        losses(run_dir, metrics)


@both
def test_a_compiled_run_with_an_average_resumes_and_leaves_no_trace_of_it(
    device, shards: Path, tiny, call, metrics, monkeypatch, record_property, request, tmp_path: Path
) -> None:
    if device.type == "cpu":
        # That code is generated is tested elsewhere; here it would take half a minute.
        eager = torch.compiler.set_stance("force_eager")
        request.addfinalizer(lambda: eager.__exit__(None, None, None))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    options = ("--data", shards, *tiny, *CONSTANT)
    ended = call("train", *options, "--run-dir", plain, "--steps", 12)
    assert ended.code == 0, ended.err
    for steps in (6, 12):
        fast = ("--compile", "--channels-last", "--steps", steps)
        ended = call("train", *options, "--run-dir", compiled, *fast)
        assert ended.code == 0, ended.err
    ours, theirs = losses(compiled, metrics), losses(plain, metrics)
    record_property("losses, compiled", " ".join(f"{loss:.5f}" for loss in ours))
    record_property("losses, eager", " ".join(f"{loss:.5f}" for loss in theirs))
    assert len(ours) == len(theirs) == 12
    # TF32, and other sums, drift apart later.
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-2)
    assert ours == pytest.approx(theirs, rel=0.2)
    assert weights(compiled).keys() == weights(plain).keys()
    training = torch.load(compiled / "checkpoints" / "last" / "training.pt", weights_only=True)
    assert training["model"].keys() == training["average"].keys()
    assert not [name for name in training["model"] if name.startswith(("_orig_mod", "module"))]


def train_in_parts(call: Any, shards: Path, run_dir: Path, flags: Any, *until: int) -> Tensor:
    """A run that ends after so many steps, each a resume of the one before; its weights."""
    for steps in until:
        options = ("--data", shards, "--run-dir", run_dir, *flags, *CONSTANT, "--steps", steps)
        ended = call("train", *options)
        assert ended.code == 0, ended.err
    return flat(weights(run_dir))


@both
def test_ten_steps_and_ten_after_a_resume_are_twenty(
    device, shards: Path, tiny, call, record_property, tmp_path: Path
) -> None:
    whole = train_in_parts(call, shards, tmp_path / "whole", tiny, 20)
    parts = train_in_parts(call, shards, tmp_path / "parts", tiny, 10, 20)
    found = difference(parts, whole)
    record_property("relative difference of the weights", f"{found:.2e}")
    # On a GPU some sums are in the order in which threads arrive.
    assert found == 0 if device.type == "cpu" else found < 0.2


@on_gpu
def test_deterministic_runs_are_the_same_to_the_last_bit_also_over_a_resume(
    device, shards: Path, tiny, call, tmp_path: Path
) -> None:
    flags = (*tiny, "--deterministic")
    try:
        first = train_in_parts(call, shards, tmp_path / "first", flags, 20)
        second = train_in_parts(call, shards, tmp_path / "second", flags, 20)
        parts = train_in_parts(call, shards, tmp_path / "parts", flags, 10, 20)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert torch.equal(first, second)
    assert torch.equal(parts, first)


@on_gpu
def test_the_same_seed_twice_differs_by_rounding_only(
    device, shards: Path, tiny, call, record_property, tmp_path: Path
) -> None:
    first, second = (
        train_in_parts(call, shards, tmp_path / name, tiny, 20) for name in ("first", "second")
    )
    found = difference(second, first)
    record_property("relative difference of the weights", f"{found:.2e}")
    assert found < 0.2


@both
def test_the_optimizers_counters_stay_on_the_cpu_after_a_resume(
    device, shards: Path, tiny, call, monkeypatch, tmp_path: Path
) -> None:
    seen: dict[str, set[str]] = {}
    step = torch.optim.AdamW.step

    def spy(self: Any, *given: Any, **more: Any) -> Any:
        found = step(self, *given, **more)
        for state in self.state.values():
            for name, value in state.items():
                seen.setdefault(name, set()).add(value.device.type)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train_in_parts(call, shards, tmp_path, tiny, 2)
    seen.clear()
    train_in_parts(call, shards, tmp_path, tiny, 4)
    # On a GPU the optimizer would ask for each of them at every step, and wait.
    assert seen == {"step": {"cpu"}, "exp_avg": {device.type}, "exp_avg_sq": {device.type}}


# -------------------------------------------------------------------------------- memory and layout


@both
def test_batches_that_are_prefetched_keep_their_order_and_their_pixels(
    device, shards: Path
) -> None:
    manifest = read_manifest(str(shards))
    sizes = tuple(shard.samples for shard in manifest.splits["train"].shards)
    plan = TrainPlan(Order(sizes, 0, 8, 16), 4, 0, 1, start=0)
    given: dict[str, Any] = {"crop_size": 32, "augment": AugmentConfig(), "seed": 0}
    cuda = device.type == "cuda"
    reference = train_batches(DataSet(Store(str(shards)), manifest, None, 0), plan, **given)
    fetched = train_batches(DataSet(Store(str(shards)), manifest, None, 2), plan, **given, pin=cuda)
    # Without a GPU nothing is pinned, and nothing fetched beside the caller.
    fetched = fetched if cuda else prefetch(fetched)
    copies = []
    for batch in islice(fetched, 12):
        assert batch.image.is_pinned() == cuda
        # Nobody waits for the copy before the memory of the batch is free for others.
        copies.append(batch.to(device))
        del batch
    for ours, theirs in zip(copies, reference, strict=False):
        assert torch.equal(ours.position, theirs.position)
        assert torch.equal(ours.image.cpu(), theirs.image)
        assert torch.equal(ours.mask.cpu(), theirs.mask)


@pytest.mark.parametrize(("precision", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@both
def test_channels_last_gives_the_same_logits_and_gradients(
    device, precision: torch.dtype, bound: float, monkeypatch, record_property
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = UNet.from_preset("small", in_channels=3, num_classes=2, base_channels=4, depth=2)
    model.to(device)
    image = torch.randn(2, 3, 32, 32, device=device)

    def run(form: torch.memory_format) -> tuple[Tensor, Tensor]:
        model.to(memory_format=form)  # pyright: ignore[reportCallIssue]
        model.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(image.contiguous(memory_format=form))
        logits.float().square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return logits.detach().cpu(), flat(gradients)

    plain, last = run(torch.contiguous_format), run(torch.channels_last)
    for name, ours, theirs in zip(("logits", "gradients"), last, plain, strict=True):
        found = difference(ours, theirs)
        record_property(f"relative difference of {name}", f"{found:.2e}")
        assert found < bound


@on_gpu
def test_a_batch_that_does_not_fit_is_halved_and_the_masks_are_the_same(
    device, make_checkpoint, call, record_property, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(16):
        blocks = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((1024, 1024), Image.Resampling.NEAREST)
        image.save(images / f"{number}.png", compress_level=1)
    options = ("--checkpoint", make_checkpoint(), "--input", images, "--png", "--workers", 2)

    def predict(name: str, batch_size: int) -> tuple[Any, int]:
        """How it ended, and the bytes that it took from the card."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ended = call("predict", *options, "--out", tmp_path / name, "--batch-size", batch_size)
        assert ended.code == 0, ended.err
        return ended, torch.cuda.max_memory_reserved()

    _, small = predict("small", 4)
    _, large = predict("large", 16)
    record_property("MiB of 4 and of 16", f"{small / 2**20:.0f}, {large / 2**20:.0f}")
    assert large > 1.5 * small
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
    try:
        ended, _ = predict("bounded", 16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "a batch of 16 tiles exceeds the memory of this GPU" in ended.err
    found = masks(tmp_path / "bounded")
    assert len(found) == 16
    assert found == masks(tmp_path / "large") == masks(tmp_path / "small")


@both
def test_two_predictions_are_the_same_to_the_last_byte(
    device, trained: Path, cells: Path, call, content, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        options = ("--checkpoint", trained, "--input", cells / "images", "--out", tmp_path / name)
        ended = call("predict", *options, "--batch-size", 4, "--samples-per-shard", 8)
        assert ended.code == 0, ended.err
    assert content(tmp_path / "first") == content(tmp_path / "second")


# ------------------------------------------------------------------------------------------ waiting


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On a GPU, calls that wait for it raise in this block."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
def test_a_step_never_waits_for_the_device(device) -> None:
    torch.manual_seed(0)
    model = UNet.from_preset("small", in_channels=3, num_classes=2, base_channels=4, depth=2)
    learner = build_learner(model.to(device), OptimConfig())
    assert learner.average is not None
    criterion = SegmentationLoss(LossConfig(), (1,)).to(device)
    augment, position = Augment(AugmentConfig(warp_share=1), 0), torch.arange(4)
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=device)
    mask = torch.randint(0, 2, (4, 32, 32), dtype=torch.uint8, device=device)
    found = []

    def step() -> None:
        varied, target, *_ = augment(SPEC.normalise(image), mask, position)
        loss, parts = criterion(learner.model(varied), target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.average.update(learner.model, 1)
        found.append(torch.cat([loss.detach()[None], parts.detach(), norm[None]]))

    # Constants go to the device once, and cuDNN chooses.
    step()
    with no_waiting(device):
        step()
    assert torch.stack(found).isfinite().all()
    # It learns from what it was shown.
    assert not torch.equal(found[0], found[1])
