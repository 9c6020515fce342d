"""Masks: thresholds, confidence, kept probabilities and class counts."""

import pytest
import torch

from unet import MaskRule, TileConfig, UNetConfig, predict_mask, predict_masks
from unet.masks import FEW_CLASSES, count_classes

PADDED = UNetConfig()
"""Geometry of a network without a margin."""


def random_images(height, width, batch=1, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (batch, 2, height, width), dtype=torch.uint8)


def pointwise(image):
    """A 1 x 1 convolution: a pixel's logits depend on that pixel alone."""
    x = image.float() / 255
    return torch.stack([4 * x[:, 0], 2 + 0 * x[:, 0], 3.2 * x[:, 1]], dim=1)


def two_classes(image):
    """The first channel, 0-255, is the probability of the second class."""
    p = image[:, 0].float() / 255
    return torch.stack([torch.log(1 - p), torch.log(p)], dim=1)


@pytest.mark.parametrize("tile", [16, 64])
def test_with_a_threshold_the_second_class_is_predicted_where_it_reaches_it(tile):
    images = random_images(40, 50, batch=2)
    config = TileConfig(tile=tile, batch_size=3)
    p = images[:, 0].double() / 255
    for threshold in (0.1, 0.5, 0.9):
        found = predict_masks(two_classes, images, config, PADDED, MaskRule(threshold=threshold))
        clear = (p - threshold).abs() > 1e-5
        assert torch.equal(found.classes.bool()[clear], (p >= threshold)[clear])
        chosen = torch.where(found.classes.bool(), p, 1 - p)
        torch.testing.assert_close(found.confidence, chosen.mean((1, 2)))


def test_a_probability_equal_to_the_threshold_is_enough():
    half = torch.zeros((1, 1, 2, 2), dtype=torch.uint8)
    even = MaskRule(threshold=0.5)
    found = predict_masks(lambda x: torch.zeros(1, 2, 2, 2), half, TileConfig(), PADDED, even)
    assert found.classes.all()
    # argmax takes the first of equals.
    assert not predict_mask(lambda x: torch.zeros(1, 2, 2, 2), half, TileConfig(), PADDED)[0].any()


@pytest.mark.parametrize("tile", [16, 64])
def test_pixels_below_the_minimum_confidence_are_unsure(tile):
    images = random_images(40, 50, batch=2)
    config = TileConfig(tile=tile, batch_size=3)
    best = pointwise(images).softmax(1).amax(1)
    found = predict_masks(pointwise, images, config, PADDED, MaskRule(min_confidence=0.7))
    clear = (best - 0.7).abs() > 1e-5
    assert torch.equal(found.unsure[clear], (best < 0.7)[clear])
    assert 0.1 < found.unsure.float().mean() < 0.9
    plain = predict_masks(pointwise, images, config, PADDED, MaskRule())
    assert plain.unsure is None
    assert torch.equal(found.classes, plain.classes)


@pytest.mark.parametrize("tile", [16, 64])
def test_probabilities_are_kept_in_two_bytes_each(tile):
    images = random_images(40, 50, batch=2)
    config = TileConfig(tile=tile, batch_size=3)
    exact = pointwise(images).softmax(1)
    rules = (MaskRule(stored_dtype=torch.float16), MaskRule(stored_dtype=torch.uint16))
    half, fixed = (
        predict_masks(pointwise, images, config, PADDED, rule).probabilities for rule in rules
    )
    assert (half.dtype, half.shape) == (torch.float16, (2, 3, 40, 50))
    torch.testing.assert_close(half.float(), exact, rtol=1e-3, atol=1e-4)
    assert (fixed.dtype, fixed.shape) == (torch.uint16, (2, 2, 40, 50))
    torch.testing.assert_close(fixed.float() / 65535, exact[:, 1:], rtol=0, atol=1.01 / 65535)


def test_a_probability_rounded_above_one_is_clamped():
    def forward(tiles):
        return torch.stack([tiles[:, 0].float() - 1e9, tiles[:, 0].float()], dim=1)

    images, config = random_images(50, 70), TileConfig(tile=16, overlap=0.75)
    found = predict_masks(forward, images, config, PADDED, MaskRule(stored_dtype=torch.uint16))
    assert found.probabilities.int().min() >= 65534


# ---- counts


@pytest.mark.parametrize("num_classes", [2, FEW_CLASSES, FEW_CLASSES + 1, 255])
@pytest.mark.parametrize("some_unsure", [False, True])
def test_pixels_are_counted_per_class_and_unsure_ones_separately(num_classes, some_unsure):
    torch.manual_seed(0)
    classes = torch.randint(0, num_classes, (3, 40, 50)).to(torch.uint8)
    classes[1] = 1
    unsure = torch.rand(classes.shape) < 0.2 if some_unsure else None
    counts = count_classes(classes, unsure, num_classes)
    assert (counts.dtype, counts.shape) == (torch.int64, (3, num_classes + 1))
    for image, found in enumerate(counts.tolist()):
        sure = torch.ones(40, 50, dtype=torch.bool) if unsure is None else ~unsure[image]
        expected = [int((classes[image][sure] == k).sum()) for k in range(num_classes)]
        assert found == [*expected, int((~sure).sum())]


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("forward", [two_classes, pointwise])
def test_counts_match_the_masks(forward, tile):
    images = random_images(40, 50, batch=3)
    config = TileConfig(tile=tile, batch_size=2)
    assert predict_masks(forward, images, config, PADDED, MaskRule()).counts is None
    rule = MaskRule(count=True, min_confidence=0.6)
    found = predict_masks(forward, images, config, PADDED, rule)
    expected = torch.where(found.unsure, 200, found.classes)
    num_classes = 2 if forward is two_classes else 3
    for index, count in enumerate(found.counts.T):
        value = 200 if index == num_classes else index
        assert torch.equal(count, (expected == value).sum((1, 2)))
    assert found.counts.sum(1).tolist() == [2000] * 3


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("forward", [two_classes, pointwise])
@pytest.mark.parametrize("keep", [torch.float16, torch.uint16])
def test_a_gpu_predicts_the_same_masks(forward, tile, keep):
    images, config = random_images(40, 50, batch=3), TileConfig(tile=tile, batch_size=2)
    rule = MaskRule(count=True, min_confidence=0.6, stored_dtype=keep)
    expected = predict_masks(forward, images, config, PADDED, rule)
    found = predict_masks(forward, images.cuda(), config, PADDED, rule)
    assert found.classes.is_cuda
    # Images of one tile stay on the GPU until the batch is copied back.
    assert found.probabilities.is_cuda == (tile == 64)
    # Rounding may break ties differently.
    assert (found.classes.cpu() != expected.classes).float().mean() < 1e-3
    assert (found.counts.cpu() - expected.counts).abs().max() <= 4
    torch.testing.assert_close(found.confidence.cpu(), expected.confidence, rtol=1e-5, atol=1e-5)
    kept, exact = (one.probabilities.cpu().float() for one in (found, expected))
    torch.testing.assert_close(kept, exact, rtol=1e-3, atol=2.0 if keep == torch.uint16 else 1e-3)
