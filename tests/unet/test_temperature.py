"""Probabilities at a temperature, against the softmax of divided logits."""

import numpy as np
import pytest
import torch

from unet import MaskRule, TileConfig, UNetConfig, predict_masks
from unet.temperature import apply_temperature


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_temperature_divides_the_logits(num_classes: int, temperature: float) -> None:
    logits = torch.randn(2, num_classes, 5, 6, generator=torch.Generator().manual_seed(3))
    expected = (logits / temperature).softmax(dim=1)
    found = predict_masks(
        lambda _: logits,
        torch.zeros(2, 1, 5, 6, dtype=torch.uint8),
        TileConfig(),
        UNetConfig(in_channels=1, num_classes=2),
        MaskRule(stored_dtype=torch.float16, temperature=temperature),
    )
    torch.testing.assert_close(found.probabilities, expected.half(), atol=1e-3, rtol=0)
    assert torch.equal(found.classes.long(), logits.argmax(dim=1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 1, 2)])
def test_certain_pixels_stay_certain_at_any_temperature(shape: tuple[int, ...]) -> None:
    probability = torch.zeros(shape)
    probability[:, 0] = 1
    torch.testing.assert_close(apply_temperature(probability, 2.5), probability)


def test_blended_probabilities_above_1_are_certain_at_any_temperature() -> None:
    above = torch.tensor([1.0, np.nextafter(np.float32(1), np.float32(2)), 1 + 1e-6])
    found = apply_temperature(above.view(1, 1, 1, 3), 2.5)
    assert found.flatten().tolist() == [1, 1, 1]
