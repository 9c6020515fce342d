"""`train`: a step on the device, without synchronisation or repeated work."""

import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.optimizer
import pytest
import torch
from torch import nn

from pipelines import train
from pipelines.loading.augment import Augment, AugmentConfig
from pipelines.loading.stages import Batch
from pipelines.runtime.devices import choose_channels_last
from pipelines.train import clip_gradients
from pipelines.training import budget
from pipelines.training.budget import Budget, Limits
from pipelines.training.meter import Meter
from pipelines.training.optim import Learner, OptimConfig, build_learner
from unet import DataSpec, LossConfig, SegmentationLoss, UNet, UNetConfig
from unet.losses import LOSSES
from unet.spec import pixel_scale

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")
"""Operators whose result decides what the host does next: on a GPU it waits for all before."""
SPEC = DataSpec(
    classes=("background", "cell", "wall"),
    palette=((0, 0, 0),) * 3,
    channels="RGB",
    mean=(0.5, 0.25, 0.125),
    std=(0.1, 0.2, 0.3),
    crop_size=32,
)


def made_of_numbers(calls: list[Any]) -> int:
    """How often torch.tensor or from_numpy was called, each on a GPU the beginning of a copy."""
    return sum(call.name == "aten.lift_fresh.default" for call in calls)


def argv(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    return ["--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, *more]


@pytest.fixture
def handlers():
    """Signal handlers that a Budget sets are put back."""
    before = {number: signal.getsignal(number) for number in budget.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Step:
    """The mathematics of the loop, as `train.run` does it, on a device without memory.

    Tensors of the meta device have shapes and no values: what asks for a value raises, and every
    copy from the host is seen, as it would be with a GPU.
    """

    def __init__(self) -> None:
        with torch.device("meta"):
            model = UNet(UNetConfig(base_channels=2, depth=2, num_classes=3), SPEC)
        self.learner = build_learner(model, OptimConfig())
        for group in self.learner.optimizer.param_groups:
            # As on GPUs, where it is the default.
            group["foreach"] = True
        losses = LossConfig(**dict.fromkeys(LOSSES, 0.5), label_smoothing=0.1, border_weight=10,
                            class_weights="inverse")  # fmt: skip
        self.criterion = SegmentationLoss(losses, (1, 2), (1.0, 2.0, 3.0)).to("meta")
        self.augment = Augment(AugmentConfig(warp_share=1, elastic=2), 0)
        self.accelerator: Any = SimpleNamespace(
            device=torch.device("meta"),
            sync_gradients=True,
            scaler=None,
            clip_grad_norm_=nn.utils.clip_grad_norm_,
        )
        watched = ("loss", *self.criterion.names, "gradient")
        self.budget = Budget(self.accelerator, Limits(100, None), watched=watched)
        self.meter = Meter(self.criterion.names, self.accelerator, 1)

    def make(self, batch: Batch) -> None:
        model, optimizer = self.learner.model, self.learner.optimizer
        model.train()
        batch = batch.to(self.accelerator.device)
        pixels = SPEC.normalise(batch.image)
        image, mask, border = self.augment(pixels, batch.mask, batch.position, batch.border)
        loss, parts = self.criterion(model(image), mask, border)
        loss.backward()
        norm = clip_gradients(self.accelerator, model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses = torch.cat([loss.detach()[None], parts])
        self.budget.watch(torch.cat([losses, norm[None]]))
        self.meter.add(losses, batch.skipped)
        assert self.learner.average is not None
        self.learner.average.update(model, 1)
        self.budget.step += 1


@pytest.mark.usefixtures("handlers")
def test_a_step_waits_for_nothing_and_copies_only_its_batch_and_its_numbers(
    dispatched, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which it has no idea of on the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **named: nullcontext())
    pixel_scale.cache_clear()
    batch = Batch(
        image=torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        mask=torch.zeros(2, 32, 32, dtype=torch.uint8),
        position=torch.arange(2),
        border=torch.zeros(2, 32, 32, dtype=torch.uint8),
    )
    step = Step()
    with dispatched() as first:
        step.make(batch)
    with dispatched() as second:
        step.make(batch)
    for calls in (first, second):
        assert len(calls) > 500
        waits = [c for c in calls if any(w in c.name for w in WAITS) and "meta" in c.devices]
        assert not waits
        # Image, mask and border map; the numbers that augmentation drew.
        assert sum(call.crosses for call in calls) == 3 + 1
    # AdamW counts its steps on the host, one number for each group of parameters.
    assert made_of_numbers(second) == 1 + len(step.learner.optimizer.param_groups)


def test_the_loop_itself_asks_for_no_number_and_sends_those_of_augmentation_at_once(
    shards: Path, tiny, call, dispatched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seed, advance, step = train.seed_dropout, Budget.advance, torch.optim.AdamW.step
    recorded: list[list[Any]] = []
    open_log = ExitStack()

    def start_step(*arguments: Any) -> None:
        seed(*arguments)
        recorded.append(open_log.enter_context(dispatched()))

    def end(self: Budget) -> Any:
        open_log.close()
        return advance(self)

    def apart(self: Any, *arguments: Any) -> Any:
        # On a CPU it asks for its step counters, which lie on the CPU for a GPU too.
        open_log.close()
        found = step(self, *arguments)
        recorded.append(open_log.enter_context(dispatched()))
        return found

    monkeypatch.setattr(train, "seed_dropout", start_step)
    monkeypatch.setattr(Budget, "advance", end)
    monkeypatch.setattr(torch.optim.AdamW, "step", apart)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 3))
    assert ended.code == 0, ended.err
    assert len(recorded) == 2 * 3
    # The first batch is drawn.
    for log in recorded[2:]:
        assert len(log) > 5
        names = [operator.name for operator in log]
        assert not [name for name in names if any(wait in name for wait in WAITS)]
    # Before the optimizer's part of a step lies augmentation.
    assert [made_of_numbers(log) for log in recorded[2:]] == [1, 0, 1, 0]


def test_the_first_batch_is_drawn_once_however_many_passes_a_step_has(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = []
    draw = train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda *args: drawn.append(1) or draw(*args))
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 2, "--accumulate", 2))
    assert ended.code == 0, ended.err
    assert len(drawn) == 1


@pytest.fixture
def refuse_waits():
    """Let PyTorch raise wherever the host waits for the GPU."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("run", ["fresh", "again"])
def test_on_a_gpu_no_step_waits(
    run: str, refuse_waits, shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    if run == "again":
        assert call("train", *argv(shards, tmp_path, tiny, "--steps", 2)).code == 0
    seed, advance = train.seed_dropout, Budget.advance
    steps = []

    def start_step(*arguments: Any) -> None:
        seed(*arguments)
        steps.append(1)
        # The first one makes constants and draws its batch.
        if len(steps) > 1:
            refuse_waits()

    def end(self: Budget) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return advance(self)

    monkeypatch.setattr(train, "seed_dropout", start_step)
    monkeypatch.setattr(Budget, "advance", end)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 6))
    assert ended.code == 0, ended.err
    assert len(steps) == (6 if run == "fresh" else 4)


# ---- after a resume


def test_a_resumed_optimizer_is_left_where_it_was_loaded(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved = []
    move = accelerate.optimizer.move_to_device
    monkeypatch.setattr(
        accelerate.optimizer, "move_to_device", lambda *args: moved.append(1) or move(*args)
    )
    for steps in (2, 4):
        assert call("train", *argv(shards, tmp_path, tiny, "--steps", steps)).code == 0
    assert not moved


def test_loaded_moments_lie_with_the_weights_and_step_counters_on_the_host() -> None:
    model = UNet(UNetConfig(base_channels=2, depth=1))
    trained = build_learner(model, OptimConfig(ema_decay=0))
    model(torch.zeros(1, 3, 8, 8)).sum().backward()
    trained.optimizer.step()
    with torch.device("meta"):
        elsewhere = UNet(model.config)
    learner: Learner = build_learner(elsewhere, OptimConfig(ema_decay=0))
    learner.optimizer.load_state_dict(trained.optimizer.state_dict())
    states = list(learner.optimizer.state.values())
    assert len(states) == len(list(model.parameters()))
    for state in states:
        assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "meta"
        assert state["step"].device.type == "cpu"


# ---- compiled, and in which layout


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch):
    """One entry for each graph that is compiled; nothing is generated from it."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled.append(str([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)][-1]))
        return graph.forward

    monkeypatch.setattr(UNet, "compile", lambda self: nn.Module.compile(self, backend=backend))
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


def test_validation_of_any_size_compiles_nothing(
    graphs, draw, tiny, call, metrics, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for side in (33, 48, 57):
        draw(folder, 2, size=(side, side + 7), name=f"p{side}-{{}}")
    draw(folder, 4, size=(40, 40), name="t{}")
    names = [path.name for path in sorted((folder / "images").iterdir())]
    split = [f"{name},{'train' if name.startswith('t') else 'val'}" for name in names]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *split]))
    folders = ("--images", folder / "images", "--masks", folder / "masks")
    more = ("--mask-format", "binary", "--split-file", tmp_path / "split.csv", "--workers", 1)
    assert call("pack", *folders, *more, "--out", tmp_path / "data").code == 0
    # Without an average of the weights it is the compiled network that is scored.
    flags = ("--steps", 3, "--eval-every", 1, "--compile", "--optim.ema-decay", 0)
    ended = call("train", *argv(tmp_path / "data", tmp_path / "run", tiny, *flags))
    assert ended.code == 0, ended.err
    assert [line["step"] for line in metrics(tmp_path / "run") if "val/dice" in line] == [1, 2, 3]
    assert len(graphs) == 1, graphs


@pytest.mark.parametrize(
    ("asked", "compiled", "device", "expected"),
    [
        (None, True, "cuda", True),
        (None, False, "cuda", False),
        (None, True, "cpu", False),
        (None, True, "mps", False),
        (True, False, "cpu", True),
        (False, True, "cuda", False),
    ],
)
def test_maps_lie_channels_last_where_asked_or_where_it_is_faster(
    asked: bool | None, compiled: bool, device: str, expected: bool
) -> None:
    assert choose_channels_last(asked, torch.device(device), compiled=compiled) is expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [((), "false"), (("--channels-last",), "true"), (("--no-channels-last",), "false")],
)
def test_the_layout_that_was_taken_is_written_down_and_can_be_rerun(
    flags: tuple[str, ...], message: str, shards: Path, tiny, call, tmp_path: Path
) -> None:
    assert call("train", *argv(shards, tmp_path / "run", tiny, "--steps", 1, *flags)).code == 0
    written = tmp_path / "run" / "config.yaml"
    assert f"channels_last: {message}\n" in written.read_text()
    ended = call("train", "--config", written, "--run-dir", tmp_path / "again")
    assert ended.code == 0, ended.err
    assert f"channels_last: {message}\n" in (tmp_path / "again" / "config.yaml").read_text()
