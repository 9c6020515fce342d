"""Holds the losses' contract: hand-computed values, exact ignore, means over samples, float32."""

from math import log

import pytest
import torch

from unet import LossConfig, SegmentationLoss
from unet.losses import cross_entropy, dice_loss


def logits_of(probability):
    """Log-probabilities are logits of themselves."""
    return torch.tensor(probability, dtype=torch.float64).log()


def draw(batch=4, classes=3, side=5, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(batch, classes, side, side, dtype=torch.float64)
    mask = torch.randint(0, classes, (batch, side, side), dtype=torch.uint8)
    mask[torch.rand(mask.shape) < 0.2] = 255
    return logits, mask


def test_cross_entropy_is_the_mean_of_minus_log_p_over_a_samples_valid_pixels():
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
    assert dice_loss(logits, mask, (1,)).tolist() == pytest.approx([of_one])
    assert dice_loss(logits, mask, (0, 1)).tolist() == pytest.approx([(of_zero + of_one) / 2])


def test_the_total_is_the_weighted_sum_of_the_parts():
    logits, mask = draw()
    loss = SegmentationLoss(LossConfig(cross_entropy=0.25, dice=2.0), (1, 2))
    total, parts = loss(logits, mask)
    assert loss.names == ("cross_entropy", "dice")
    assert parts[0].item() == pytest.approx(cross_entropy(logits, mask).mean().item(), rel=1e-5)
    assert parts[1].item() == pytest.approx(dice_loss(logits, mask, (1, 2)).mean().item(), rel=1e-5)
    assert total.item() == pytest.approx((0.25 * parts[0] + 2 * parts[1]).item())
    assert not parts.requires_grad


def test_a_loss_of_weight_zero_is_no_part():
    logits, mask = draw()
    loss = SegmentationLoss(LossConfig(cross_entropy=0.0), (1,))
    total, parts = loss(logits, mask)
    assert (loss.names, parts.shape) == (("dice",), (1,))
    assert total == parts[0]


@pytest.mark.parametrize(("ce", "dice"), [(-1.0, 1.0), (1.0, -0.5), (0.0, 0.0)])
def test_impossible_weights_are_refused(ce, dice):
    with pytest.raises(ValueError, match="loss weights must be 0 or more"):
        LossConfig(cross_entropy=ce, dice=dice)


def test_logits_under_255_change_nothing_and_get_no_gradient():
    logits, mask = draw()
    ignored = (mask == 255)[:, None].expand(logits.shape)
    assert ignored.any()
    loss = SegmentationLoss(LossConfig(), (1, 2))
    other = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    assert torch.equal(loss(logits, mask)[0], loss(other, mask)[0])
    logits.requires_grad_()
    loss(logits, mask)[0].backward()
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].any()


def test_a_sample_without_valid_pixels_scores_zero_with_a_finite_gradient():
    logits, mask = draw()
    mask[1] = 255
    assert cross_entropy(logits, mask)[1] == 0
    assert dice_loss(logits, mask, (1, 2))[1] == 0
    logits.requires_grad_()
    SegmentationLoss(LossConfig(), (1, 2))(logits, mask)[0].backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1].any()


def test_a_batch_without_valid_pixels_scores_zero_with_a_finite_gradient():
    logits, mask = draw()
    logits.requires_grad_()
    total, parts = SegmentationLoss(LossConfig(), (1,))(logits, torch.full_like(mask, 255))
    total.backward()
    assert total == 0
    assert parts.tolist() == [0, 0]
    assert not logits.grad.any()


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_halves():
    logits, mask = draw(batch=6)
    mask[0] = 255  # the halves have unequal numbers of valid pixels
    loss = SegmentationLoss(LossConfig(), (1, 2))

    def gradient(*parts):
        leaf = logits.clone().requires_grad_()
        values = [loss(leaf[p], mask[p])[0] for p in parts]
        torch.stack(values).mean().backward()
        return torch.stack(values).mean(), leaf.grad

    whole, whole_gradient = gradient(slice(0, 6))
    halves, halves_gradient = gradient(slice(0, 3), slice(3, 6))
    torch.testing.assert_close(whole, halves, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole_gradient, halves_gradient, rtol=1e-5, atol=1e-9)


def test_losses_are_float32_under_bf16_autocast():
    logits, mask = draw(batch=1, side=64)
    half = logits.bfloat16()
    loss = SegmentationLoss(LossConfig(), (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = loss(half, mask)
    assert (total.dtype, parts.dtype) == (torch.float32, torch.float32)
    assert torch.equal(total, loss(half.float(), mask)[0])


def test_a_large_sum_does_not_overflow():
    mask = torch.zeros(1, 400, 400, dtype=torch.uint8)  # more pixels than float16 can count
    logits = torch.zeros(1, 2, 400, 400, dtype=torch.float16)
    total, _ = SegmentationLoss(LossConfig(cross_entropy=0.0), (0,))(logits, mask)
    assert total.item() == pytest.approx(1 - 2 * 0.5 / 1.5, rel=1e-4)


def test_gradients_agree_with_differences():
    logits, mask = draw(batch=2, side=3)
    mask[0, 0, 0] = 255
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, mask), logits)
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, mask, (0, 2)), logits)


def test_a_perfect_prediction_costs_nothing():
    _, mask = draw(side=16)
    logits = 40 * torch.nn.functional.one_hot(mask.long() % 255, 3).movedim(-1, 1).double()
    total, _ = SegmentationLoss(LossConfig(), (1, 2))(logits, mask)
    assert total.item() == pytest.approx(0, abs=1e-4)
