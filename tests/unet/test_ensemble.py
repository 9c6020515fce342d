"""`ensemble`: the average of probabilities, in float32, one member in memory or all."""

import pytest
import torch
from torch import Tensor

from unet import DataSpec, Ensemble, UNet, UNetConfig, average_logits
from unet.tiling import to_probability


def make(seed: int, num_classes: int = 3, mean: float = 0.4, **config: object) -> UNet:
    torch.manual_seed(seed)
    spec = DataSpec(
        classes=tuple("abcd"[:num_classes]),
        palette=((0, 0, 0), (1, 1, 1), (2, 2, 2))[:num_classes],
        channels="RGB",
        mean=(mean,) * 3,
        std=(0.3,) * 3,
        crop_size=16,
    )
    network = UNetConfig(num_classes=num_classes, base_channels=2, depth=1, **config)
    return UNet(network, spec).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 9, 12), dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("on_host", [False, True])
def test_the_softmax_of_its_logits_is_the_average_of_the_probabilities(
    num_classes: int, on_host: bool, pixels: Tensor
) -> None:
    # Each with its own normalisation, norm and depth.
    members = [
        make(1, num_classes),
        make(2, num_classes, mean=0.7, norm="batch"),
        make(3, num_classes, norm="group"),
    ]
    each = [member.logits(pixels).double().softmax(dim=1) for member in members]
    logits = Ensemble(members, on_host=on_host).logits(pixels)
    average = torch.stack(each).mean(dim=0).float()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.softmax(dim=1), average, rtol=1e-5, atol=1e-6)
    expected = average[:, 1:] if num_classes == 2 else average
    torch.testing.assert_close(to_probability(logits), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_members_on_the_host_give_equal_bits_and_are_not_moved(pixels: Tensor) -> None:
    members = [make(1), make(2)]
    on_device, on_host = Ensemble(members), Ensemble(members, on_host=True)
    assert torch.equal(on_device.logits(pixels), on_host.logits(pixels))
    assert [*on_host.parameters()] == []
    on_host.to("meta")
    assert torch.equal(on_device.logits(pixels), on_host.logits(pixels))


def test_probabilities_that_round_to_0_in_float32_keep_their_order() -> None:
    logits = torch.tensor([0.0, -200.0, -300.0]).view(1, 3, 1, 1)
    averaged = average_logits([logits, logits]).flatten()
    torch.testing.assert_close(averaged, torch.tensor([0.0, -200.0, -300.0]), rtol=0, atol=1e-4)


def test_half_precision_is_averaged_in_float32() -> None:
    a, b = (torch.randn(1, 3, 8, 8).bfloat16() for _ in range(2))
    expected = (a.double().softmax(1) + b.double().softmax(1)) / 2
    torch.testing.assert_close(
        average_logits([a, b]).softmax(1), expected.float(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: [make(1)], "at least 2 members, got 1"),
        (lambda: [make(1), UNet(UNetConfig())], "has no data spec"),
        (lambda: [make(1), make(1, padding="valid", norm="none")], "the same margin"),
    ],
)
def test_members_that_cannot_be_averaged_are_refused(members, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble(members())
