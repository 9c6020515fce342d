"""Histograms of probabilities and the likelihood of temperatures, against plain NumPy."""

import numpy as np
import pytest
import torch

from unet import MaskRule, TileConfig, UNetConfig, predict_masks
from unet.calibration import LEVELS, UNIT, CalibrationCounts, TemperatureCounts, observe_blocks
from unet.temperature import TEMPERATURES

PADDED = UNetConfig(in_channels=1, num_classes=2)


def draw(num_classes: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of 3 images [3, K, 8, 9], and their masks with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, num_classes, 8, 9, generator=generator) * 3
    mask = torch.randint(0, num_classes, (3, 8, 9), generator=generator).byte()
    mask[:, 2] = 255
    return logits.softmax(dim=1), mask


@pytest.mark.parametrize("num_classes", [2, 4])
def test_histograms_equal_those_of_numpy(num_classes: int) -> None:
    probability, mask = draw(num_classes)
    given = probability[:, 1:] if num_classes == 2 else probability
    counts = CalibrationCounts(num_classes)
    for image in range(3):
        counts.update(given[image : image + 1], mask[image : image + 1])
    found = counts.compute()
    if num_classes == 2:
        probability = torch.cat([1 - given, given], dim=1)
    valid = mask.numpy() != 255
    values = [*probability.unbind(1), probability.max(dim=1).values]
    hits = [mask == c for c in range(num_classes)] + [probability.argmax(dim=1) == mask]
    edges = np.append(np.float32(np.arange(LEVELS) / LEVELS), np.inf)
    for row, (p, hit) in enumerate(zip(values, hits, strict=True)):
        for side in (0, 1):
            chosen = p.numpy()[valid & (hit.numpy() == side)]
            expected = np.histogram(chosen, edges)[0]
            np.testing.assert_array_equal(found.pixels[row, :, side].numpy(), expected)
        level = np.searchsorted(edges, p.numpy()[valid], side="right") - 1
        sums = np.bincount(level, np.rint(np.float64(p.numpy()[valid]) * UNIT), LEVELS)
        np.testing.assert_array_equal(found.sums[row].numpy(), sums)


def test_levels_decide_as_thresholds_do() -> None:
    # 0.3 in float32 is above 0.3; a value just below belongs to the level before.
    third = np.float32(0.3)
    values = torch.tensor([third, np.nextafter(third, np.float32(0)), 0.0, 1.0])
    counts = CalibrationCounts(2)
    counts.update(values.view(1, 1, 1, 4), torch.ones(1, 1, 4, dtype=torch.uint8))
    assert counts.compute().pixels[1, :, 1].nonzero().flatten().tolist() == [0, 299, 300, 999]
    assert counts.compute().pixels[1, 300:, 1].sum() == (values >= 0.3).sum()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_likelihoods_equal_those_of_the_logits(num_classes: int) -> None:
    probability, mask = draw(num_classes, seed=1)
    given = probability[:, 1:] if num_classes == 2 else probability
    counts = TemperatureCounts()
    counts.update(given, mask)
    losses, num_pixels = counts.compute()
    assert num_pixels == 3 * 7 * 9
    log = probability.double().log()
    for t, found in zip(TEMPERATURES, losses.tolist(), strict=True):
        expected = torch.nn.functional.cross_entropy(
            log / t, mask.long(), ignore_index=255, reduction="sum"
        )
        assert found / UNIT == pytest.approx(float(expected), rel=1e-4)


def test_tiles_count_each_pixel_once_whatever_the_tile() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 40, 50), dtype=torch.uint8)
    mask = torch.randint(0, 2, (2, 40, 50), dtype=torch.uint8)

    def forward(tiles: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(tiles), tiles / 50 - 2], dim=1).float()

    found = []
    for tile in (16, 64):
        counts = CalibrationCounts(2)
        observe = observe_blocks([counts], mask)
        predict_masks(forward, images, TileConfig(tile=tile), PADDED, MaskRule(), observe)
        found.append(counts.compute())
    # Blending moves a probability by rounding only.
    assert found[0].pixels.sum() == found[1].pixels.sum() == 3 * mask.numel()
    assert (found[0].pixels[1].sum(0) == found[1].pixels[1].sum(0)).all()
    assert (found[0].sums.sum(1) - found[1].sums.sum(1)).abs().max() < UNIT


def test_counting_copies_nothing_from_the_device(dispatched) -> None:
    probability, mask = draw(4)
    for counts in (CalibrationCounts(4), TemperatureCounts()):
        with dispatched() as calls:
            counts.update(probability, mask)
        names = {call.name for call in calls}
        assert len(calls) > 10
        assert not names & {"aten._local_scalar_dense.default", "aten.nonzero.default"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_counts_the_same_integers() -> None:
    probability, mask = draw(4)
    for make in (lambda: CalibrationCounts(4), TemperatureCounts):
        here, there = make(), make().cuda()
        here.update(probability, mask)
        there.update(probability.cuda(), mask.cuda())
        if isinstance(here, CalibrationCounts):
            for one, other in zip(here.compute(), there.compute(), strict=True):
                assert torch.equal(one, other.cpu())
        else:
            torch.testing.assert_close(
                here.compute()[0].double(), there.compute()[0].cpu().double(), rtol=1e-5, atol=0
            )
