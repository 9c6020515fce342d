"""Holds the contract of optimizer, learning rate and average: values at the milestones."""

from math import cos, pi

import pytest
import torch
from torch.optim import AdamW

from pipelines.training.optim import (
    Average,
    OptimConfig,
    build_learner,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from unet import UNet, UNetConfig

CONFIG = OptimConfig(lr=0.1, warmup=0.2)


def model(**changes):
    torch.manual_seed(0)
    return UNet(UNetConfig(base_channels=2, depth=1, in_channels=1, **changes))


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, 0.001),  # a hundredth, so that the first step is not lost
        (0.1, 0.05),
        (0.2, 0.1),
        (0.6, 0.05),
        (0.4, 0.1 * 0.5 * (1 + cos(pi / 4))),
        (1.0, 0.0),
        (1.5, 0.0),
    ],
)
def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine(progress, expected):
    assert learning_rate(CONFIG, progress) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("poly", 0.1 * 0.5**0.9, 0.0), ("constant", 0.1, 0.1)]
)
def test_other_schedules_start_alike_and_fall_as_documented(schedule, halfway, end):
    config = OptimConfig(lr=0.1, warmup=0.2, schedule=schedule)
    rates = [learning_rate(config, progress) for progress in (0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.05, 0.1, halfway, end])


def test_sgd_has_nesterov_momentum_and_the_same_groups():
    optimizer = build_optimizer(model(), OptimConfig(optimizer="sgd", momentum=0.9))
    assert type(optimizer).__name__ == "SGD"
    for group, decay in zip(optimizer.param_groups, (1e-4, 0.0), strict=True):
        found = [group[name] for name in ("momentum", "nesterov", "weight_decay")]
        assert found == [0.9, True, decay]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_scaler_decides_about_a_step_not_a_fused_kernel(optimizer):
    # GradScaler reads this attribute; with it, skipped steps could not be counted.
    built = build_optimizer(model(), OptimConfig(optimizer=optimizer))
    assert not getattr(built, "_step_supports_amp_scaling", False)
    assert getattr(AdamW(model().parameters(), fused=True), "_step_supports_amp_scaling", False)


def test_without_warmup_the_learning_rate_starts_at_its_highest():
    assert learning_rate(OptimConfig(lr=0.1, warmup=0.0), 0.0) == pytest.approx(0.1)


def test_the_learning_rate_rises_then_falls_and_never_leaves_its_bounds():
    rates = [learning_rate(CONFIG, i / 1000) for i in range(1001)]
    top = rates.index(max(rates))
    assert top == 200
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 <= min(rates) < max(rates) == CONFIG.lr


def test_weights_are_decayed_but_norms_and_biases_are_not():
    net = model()
    decayed, plain = build_optimizer(net, OptimConfig(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert all(p.ndim == 4 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters()))


def test_a_learning_rate_is_set_for_all_parameters():
    optimizer = build_optimizer(model(), CONFIG)
    set_learning_rate(optimizer, 0.003)
    assert [group["lr"] for group in optimizer.param_groups] == [0.003, 0.003]


def test_the_average_follows_the_weights_by_hand():
    net = model()
    average = Average(net, 0.5)
    expected = weights(net)
    for step in (1, 2, 3, 100):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        average.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    close(dict(average.model.state_dict()), expected)


def test_the_average_is_no_part_of_training():
    net = model()
    average = Average(net.train(), 0.9)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert not torch.equal(next(net.parameters()), next(average.model.parameters()))
    assert average.model.config == net.config


def test_buffers_are_copied_not_averaged():
    net = model(norm="batch").train()
    average = Average(net, 0.9)
    net(torch.randn(4, 1, 8, 8))
    average.update(net, 1)
    buffers = dict(net.named_buffers())
    assert any(name.endswith("num_batches_tracked") for name in buffers)
    close(dict(average.model.named_buffers()), buffers)


def test_the_average_is_scored_where_there_is_one_else_the_weights():
    with_average = build_learner(model(), OptimConfig())
    assert with_average.scored is with_average.average.model
    without = build_learner(model(), OptimConfig(ema_decay=0.0))
    assert without.average is None
    assert without.scored is without.model


def train(learner, steps, first=1):
    for step in range(first, first + steps):
        image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        learner.optimizer.zero_grad()
        learner.model(image).square().mean().backward()
        learner.optimizer.step()
        if learner.average:
            learner.average.update(learner.model, step)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_learner_resumes_from_its_state_bit_by_bit(decay):
    config = OptimConfig(ema_decay=decay)
    straight, first = build_learner(model(), config), build_learner(model(), config)
    train(straight, 4)
    train(first, 2)
    torch.manual_seed(9)
    resumed = build_learner(UNet(first.model.config), config)
    resumed.load_state_dict(first.state_dict())
    train(resumed, 2, first=3)
    for one, other in ((straight.model, resumed.model), (straight.scored, resumed.scored)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0.0},
        {"momentum": 0.5},
        {"lr": -1.0},
        {"weight_decay": -1e-4},
        {"clip_norm": -1.0},
        {"warmup": 1.0},
        {"warmup": -0.1},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
    ],
)
def test_impossible_settings_are_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"--optim.{next(iter(fields))}".replace("_", "-")):
        OptimConfig(**fields)
