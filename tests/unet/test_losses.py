"""Losses: hand-computed values, exact ignore, means over samples, float32."""

from math import exp, log

import pytest
import torch
from losses import sums_by_loop

from unet import LossConfig, SegmentationLoss, inverse_frequency
from unet.losses import (
    LOSSES,
    binary_cross_entropy,
    cross_entropy,
    dice_loss,
    focal_loss,
    sum_regions,
    tversky_loss,
)

ALL = LossConfig(
    bce=0.5, focal=2.0, tversky=0.25, label_smoothing=0.1, class_weights="inverse", border_weight=10
)
"""All losses at once, with every kind of pixel weight."""


def logits_of(probability):
    """Log-probabilities are logits of themselves."""
    return torch.tensor(probability, dtype=torch.float64).log()


def counted(*indices):
    return torch.tensor(indices)


def draw(batch=4, classes=3, side=5, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(batch, classes, side, side, dtype=torch.float64)
    mask = torch.randint(0, classes, (batch, side, side), dtype=torch.uint8)
    mask[torch.rand(mask.shape) < 0.2] = 255
    return logits, mask


def test_cross_entropy_is_the_mean_of_minus_log_p_over_the_valid_pixels():
    # two samples of 1 x 2 pixels and two classes; the second sample has one valid pixel
    logits = logits_of([[[[0.5, 0.1]], [[0.5, 0.9]]], [[[0.2, 0.3]], [[0.8, 0.7]]]])
    mask = torch.tensor([[[0, 1]], [[255, 0]]], dtype=torch.uint8)
    expected = torch.tensor([-(log(0.5) + log(0.9)) / 2, -log(0.3)], dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(logits, mask), expected)


def test_dice_loss_is_one_minus_the_smoothed_soft_dice():
    logits = logits_of([[[[0.5, 0.1, 0.4]], [[0.5, 0.9, 0.6]]]])
    mask = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    # class 1: overlap 0.9, sum(p) 0.5 + 0.9, sum(g) 1
    of_one = 1 - (2 * 0.9 + 1) / (1.4 + 1 + 1)
    of_zero = 1 - (2 * 0.5 + 1) / (0.6 + 1 + 1)
    assert dice_loss(logits, mask, counted(1)).tolist() == pytest.approx([of_one])
    assert dice_loss(logits, mask, counted(0, 1)).tolist() == pytest.approx(
        [(of_zero + of_one) / 2]
    )


def test_label_smoothing_spreads_a_share_of_the_label_over_all_classes():
    logits = logits_of([[[[0.5]], [[0.3]], [[0.2]]]])
    mask = torch.tensor([[[1]]], dtype=torch.uint8)
    target = (0.1, 0.8, 0.1)  # (1 - 0.3) of class 1, 0.3 / 3 of each
    expected = -sum(t * log(p) for t, p in zip(target, (0.5, 0.3, 0.2), strict=True))
    assert cross_entropy(logits, mask, smoothing=0.3).tolist() == pytest.approx([expected])
    binary = torch.tensor([[[[-1.0]], [[2.0]]]], dtype=torch.float64)
    p = 1 / (1 + exp(1)), 1 / (1 + exp(-2))  # of classes 0 and 1; targets 0.1 and 0.9
    parts = [-(0.1 * log(p[0]) + 0.9 * log(1 - p[0])),
             -(0.9 * log(p[1]) + 0.1 * log(1 - p[1]))]  # fmt: skip
    found = binary_cross_entropy(binary, mask, smoothing=0.2)
    assert found.tolist() == pytest.approx([sum(parts) / 2])


def test_binary_cross_entropy_is_each_class_against_all_others():
    logits = torch.tensor([[[[0.0, 3.0]], [[1.0, 9.0]]]], dtype=torch.float64)
    mask = torch.tensor([[[1, 255]]], dtype=torch.uint8)
    expected = (-log(0.5) - log(1 / (1 + exp(-1)))) / 2
    assert binary_cross_entropy(logits, mask).tolist() == pytest.approx([expected])


def test_focal_loss_down_weights_easy_pixels():
    logits = logits_of([[[[0.5, 0.1]], [[0.5, 0.9]]]])
    mask = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    expected = -(0.5**2 * log(0.5) + 0.1**2 * log(0.9)) / 2
    assert focal_loss(logits, mask, gamma=2).tolist() == pytest.approx([expected])
    plain = focal_loss(logits, mask, gamma=0)
    torch.testing.assert_close(plain, cross_entropy(logits, mask))


def test_focal_loss_has_a_finite_gradient_at_a_perfect_pixel():
    logits = torch.tensor([[[[90.0]], [[0.0]]]], requires_grad=True)
    for gamma in (0.0, 0.5, 1.0, 2.0):
        focal_loss(logits, torch.zeros(1, 1, 1, dtype=torch.uint8), gamma=gamma).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_tversky_loss_weighs_false_positives_and_false_negatives():
    logits = logits_of([[[[0.5, 0.1, 0.4]], [[0.5, 0.9, 0.6]]]])
    mask = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    # class 1: tp 0.9, fp 0.5, fn 0.1
    expected = 1 - (0.9 + 1) / (0.9 + 0.3 * 0.5 + 0.7 * 0.1 + 1)
    assert tversky_loss(logits, mask, counted(1), fp=0.3, fn=0.7).tolist() == pytest.approx(
        [expected]
    )


def test_class_weights_scale_pixels_and_are_1_on_average():
    weights = inverse_frequency((900, 100, 0))
    assert weights == pytest.approx((1000 / 1800, 1000 / 200, 1.0))
    assert (900 * weights[0] + 100 * weights[1]) / 1000 == pytest.approx(1)
    logits, mask = draw(batch=2)
    mask[0] = 1
    loss = SegmentationLoss(LossConfig(dice=0.0, class_weights="inverse"), (1, 2), weights)
    # also in a sample that has one class only
    first = cross_entropy(logits[:1].float(), mask[:1])
    assert loss(logits[:1], mask[:1])[0].item() == pytest.approx(5 * first.item(), rel=1e-5)


def test_square_root_weights_are_milder_and_1_on_average():
    weights = inverse_frequency((900, 100, 0), power=0.5)
    assert weights == pytest.approx((1000 / 1200, 1000 / 400, 1.0))
    assert (900 * weights[0] + 100 * weights[1]) / 1000 == pytest.approx(1)
    assert inverse_frequency((900, 100, 0), power=0.0) == (1.0, 1.0, 1.0)


def test_border_weight_adds_w0_times_the_border_map():
    logits = logits_of([[[[0.5, 0.1, 0.4]], [[0.5, 0.9, 0.6]]]])
    mask = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    border = torch.tensor([[[255, 51, 255]]], dtype=torch.uint8)
    loss = SegmentationLoss(LossConfig(dice=0.0, border_weight=10.0), (1,))
    expected = -((1 + 10) * log(0.5) + (1 + 2) * log(0.9)) / 2
    assert loss(logits, mask, border)[0].item() == pytest.approx(expected, rel=1e-5)
    assert loss(logits, mask)[0].item() == pytest.approx(-(log(0.5) + log(0.9)) / 2, rel=1e-5)


def test_valid_logits_are_compared_with_the_centre_of_the_mask():
    logits, mask = draw(side=5)
    border = torch.randint(0, 256, mask.shape, dtype=torch.uint8)
    loss = SegmentationLoss(ALL, (1, 2), (1.0, 2.0, 3.0))

    def pad(pixels):
        return torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1)

    padded = loss(logits, pad(mask), pad(border))
    assert torch.equal(padded[0], loss(logits, mask, border)[0])


def test_the_total_is_the_weighted_sum_of_the_parts():
    logits, mask = draw()
    loss = SegmentationLoss(LossConfig(cross_entropy=0.25, dice=2.0), (1, 2))
    total, parts = loss(logits, mask)
    assert loss.names == ("cross_entropy", "dice")
    assert parts[0].item() == pytest.approx(cross_entropy(logits, mask).mean().item(), rel=1e-5)
    assert parts[1].item() == pytest.approx(
        dice_loss(logits, mask, counted(1, 2)).mean().item(), rel=1e-5
    )
    assert total.item() == pytest.approx((0.25 * parts[0] + 2 * parts[1]).item())
    assert not parts.requires_grad


def test_a_loss_of_weight_zero_is_skipped():
    logits, mask = draw()
    loss = SegmentationLoss(LossConfig(cross_entropy=0.0), (1,))
    total, parts = loss(logits, mask)
    assert (loss.names, parts.shape) == (("dice",), (1,))
    assert total == parts[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_entropy": -1.0}, "loss.cross_entropy must be a finite number >= 0"),
        ({"focal": float("nan")}, "loss.focal must be a finite number >= 0, got nan"),
        (
            {"cross_entropy": 0.0, "dice": 0.0},
            "every loss has weight 0; raise at least one of loss.cross_entropy",
        ),
        (
            {"cross_entropy": 0.0, "border_weight": 10.0},
            "loss.border_weight has no effect without loss.cross_entropy or loss.bce or loss.focal",
        ),
        (
            {"cross_entropy": 0.0, "class_weights": "inverse"},
            "loss.class_weights has no effect without loss.cross_entropy or loss.bce or loss.focal",
        ),
        (
            {"cross_entropy": 0.0, "label_smoothing": 0.1},
            "loss.label_smoothing has no effect without loss.cross_entropy or loss.bce above 0",
        ),
        ({"focal_gamma": 1.0}, "loss.focal_gamma has no effect without loss.focal above 0"),
        ({"tversky_fp": 0.5}, "loss.tversky_fp has no effect without loss.tversky above 0"),
        ({"tversky_fn": 0.5}, "loss.tversky_fn has no effect without loss.tversky above 0"),
        ({"label_smoothing": 1.0}, r"loss.label_smoothing must be in \[0, 1\), got 1.0"),
        ({"focal_gamma": -1.0}, "loss.focal_gamma must be a finite number >= 0"),
        ({"border_weight": float("inf")}, "loss.border_weight must be a finite number >= 0"),
    ],
)
def test_invalid_loss_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_with_deep_supervision_levels_are_averaged_with_halving_weights():
    finest, mask = draw(side=12)
    coarse, coarser = (draw(side=side, seed=side)[0] for side in (8, 4))
    border = torch.randint(0, 256, mask.shape, dtype=torch.uint8)
    loss = every_loss()
    total, terms = loss((finest, coarse, coarser), mask, border)
    # Logits beyond the image, of the padding, do not count.
    halves, quarters = (slice(1, None, 2), slice(2, None, 4))
    levels = [
        (finest, mask, border),
        (coarse[..., :6, :6], mask[:, halves, halves], border[:, halves, halves]),
        (coarser[..., :3, :3], mask[:, quarters, quarters], border[:, quarters, quarters]),
    ]
    alone = [loss(*level) for level in levels]
    for found, values in zip((total, terms), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, (values[0] + values[1] / 2 + values[2] / 4) / 1.75)


def test_a_coarse_level_without_a_pixel_of_the_mask_adds_nothing():
    logits, mask = draw(side=1)
    deep = draw(side=2)[0].requires_grad_()
    loss = every_loss()
    total, _ = loss((logits, deep), mask)
    torch.testing.assert_close(total, loss(logits, mask)[0] / 1.5)
    total.backward()
    assert not deep.grad.any()


def every_loss():
    return SegmentationLoss(ALL, (1, 2), (0.5, 2.0, 3.0))


def test_logits_under_255_are_ignored_and_get_no_gradient():
    logits, mask = draw()
    ignored = (mask == 255)[:, None].expand(logits.shape)
    assert ignored.any()
    loss = every_loss()
    other = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    assert torch.equal(loss(logits, mask)[0], loss(other, mask)[0])
    logits.requires_grad_()
    loss(logits, mask)[0].backward()
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].any()


def test_a_sample_without_valid_pixels_has_loss_zero_and_a_finite_gradient():
    logits, mask = draw()
    mask[1] = 255
    for name in LOSSES:
        only = dict.fromkeys(LOSSES, 0.0) | {name: 1.0}
        loss = SegmentationLoss(LossConfig(**only), (1, 2))
        assert loss(logits[1:2], mask[1:2])[0] == 0
    logits.requires_grad_()
    every_loss()(logits, mask)[0].backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1].any()


def test_a_batch_without_valid_pixels_has_loss_zero_and_a_finite_gradient():
    logits, mask = draw()
    logits.requires_grad_()
    total, parts = every_loss()(logits, torch.full_like(mask, 255))
    total.backward()
    assert total == 0
    assert parts.tolist() == [0] * len(LOSSES)
    assert not logits.grad.any()


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_halves():
    logits, mask = draw(batch=6)
    mask[0] = 255  # the halves have unequal numbers of valid pixels
    border = torch.randint(0, 256, mask.shape, dtype=torch.uint8)
    loss = every_loss()

    def gradient(*parts):
        leaf = logits.clone().requires_grad_()
        values = [loss(leaf[p], mask[p], border[p])[0] for p in parts]
        torch.stack(values).mean().backward()
        return torch.stack(values).mean(), leaf.grad

    batch, batch_gradient = gradient(slice(0, 6))
    halves, halves_gradient = gradient(slice(0, 3), slice(3, 6))
    torch.testing.assert_close(batch, halves, rtol=1e-6, atol=0)
    torch.testing.assert_close(batch_gradient, halves_gradient, rtol=1e-5, atol=1e-9)


def test_losses_are_float32_under_bf16_autocast():
    logits, mask = draw(batch=1, side=64)
    half = logits.bfloat16()
    loss = SegmentationLoss(LossConfig(), (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = loss(half, mask)
    assert (total.dtype, parts.dtype) == (torch.float32, torch.float32)
    assert torch.equal(total, loss(half.float(), mask)[0])


def test_a_large_sum_does_not_overflow():
    mask = torch.zeros(1, 400, 400, dtype=torch.uint8)  # more pixels than float16 can represent
    logits = torch.zeros(1, 2, 400, 400, dtype=torch.float16)
    total, _ = SegmentationLoss(LossConfig(cross_entropy=0.0), (0,))(logits, mask)
    assert total.item() == pytest.approx(1 - 2 * 0.5 / 1.5, rel=1e-4)


def test_gradients_agree_with_finite_differences():
    logits, mask = draw(batch=2, side=3)
    mask[0, 0, 0] = 255
    logits.requires_grad_()
    weight = 3 * torch.rand(mask.shape, dtype=torch.float64)
    for loss in (
        lambda x: cross_entropy(x, mask, weight, smoothing=0.1),
        lambda x: binary_cross_entropy(x, mask, weight, smoothing=0.1),
        lambda x: focal_loss(x, mask, weight, gamma=2.0),
        lambda x: focal_loss(x, mask, weight, gamma=0.5),
        lambda x: dice_loss(x, mask, counted(0, 2)),
        lambda x: tversky_loss(x, mask, counted(0, 2), fp=0.3, fn=0.7),
    ):
        assert torch.autograd.gradcheck(loss, logits)


def test_a_perfect_prediction_has_loss_zero():
    _, mask = draw(side=16)
    logits = 40 * torch.nn.functional.one_hot(mask.long() % 255, 3).movedim(-1, 1).double()
    total, _ = SegmentationLoss(LossConfig(), (1, 2))(logits, mask)
    assert total.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("classes", "indices"), [(2, (1,)), (3, (0, 2)), (20, range(1, 20)), (150, range(1, 150))]
)
def test_sums_over_regions_equal_a_loop_over_the_classes(classes, indices):
    logits, mask = draw(batch=3, classes=classes, side=24)
    mask[2] = 255
    logits = logits.float()
    found = []
    for sums, of in ((sum_regions, counted(*indices)), (sums_by_loop, tuple(indices))):
        leaf = logits.clone().requires_grad_()
        overlap, predicted, true = sums(leaf, mask, of)
        weights = torch.linspace(1, 2, overlap.numel()).view(overlap.shape)
        (weights * overlap + weights.flip(1) * predicted).sum().backward()
        found.append((overlap, predicted, true, leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dice", "tversky"])
def test_region_losses_take_linear_not_quadratic_memory_traffic_in_the_classes(name, dispatched):
    logits, mask = draw(batch=1, classes=150, side=16)
    only = dict.fromkeys(LOSSES, 0.0) | {name: 1.0}
    loss = SegmentationLoss(LossConfig(**only), tuple(range(1, 150)))
    with dispatched() as calls:
        loss(logits.requires_grad_(), mask)[0].backward()
    assert len(calls) < 100
    assert not [call for call in calls if "select_backward" in call.name]
