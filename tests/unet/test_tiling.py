"""Holds overlap-tile's contract: every pixel covered, stripes equal to blending all at once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from unet import TileConfig, UNet, predict_mask
from unet.tiling import gaussian_window, predict_tiled, tile_starts


def pointwise(image):
    """A 1 x 1 convolution: a pixel's logits depend on that pixel alone."""
    x = image.float() / 255
    return torch.stack([4 * x[:, 0], 2 + 0 * x[:, 0], 3.2 * x[:, 1]], dim=1)


def neighbourly():
    torch.manual_seed(0)
    model = UNet.from_preset("small", in_channels=2, num_classes=3, base_channels=2, depth=2).eval()
    return lambda image: model(image.float() / 128 - 1)


def picture(height, width, batch=1, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (batch, 2, height, width), dtype=torch.uint8)


def blend_all(forward, image, tile, overlap):
    """Every tile into one canvas of the whole picture."""
    height, width = image.shape[-2:]
    th, tw = min(tile, height), min(tile, width)
    total = window = 0
    for top in tile_starts(height, th, overlap):
        for left in tile_starts(width, tw, overlap):
            p = forward(image[None, :, top : top + th, left : left + tw]).float().softmax(1)[0]
            canvas, weight = torch.zeros(len(p), height, width), torch.zeros(height, width)
            canvas[:, top : top + th, left : left + tw] = p * gaussian_window(th, tw)
            weight[top : top + th, left : left + tw] = gaussian_window(th, tw)
            total, window = total + canvas, window + weight
    best, index = (total / window).max(dim=0)
    return index.to(torch.uint8), best


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (32, 32)])
def test_a_picture_no_larger_than_a_tile_is_predicted_whole(shape):
    forward, image = neighbourly(), picture(*shape, batch=3)
    classes, probability = predict_mask(forward, image, TileConfig(tile=32, batch_size=2))
    whole = forward(image).softmax(1).max(1)
    assert (classes.dtype, probability.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(classes, whole.indices.to(torch.uint8))
    torch.testing.assert_close(probability, whole.values)


@given(
    length=st.integers(1, 5000),
    tile=st.integers(16, 600),
    overlap=st.floats(0, 0.75),
)
@example(length=17, tile=16, overlap=0.75)
@example(length=32, tile=16, overlap=0.0)
def test_tiles_cover_every_pixel_and_overlap_as_asked(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    size = min(tile, length)
    assert starts[0] == 0
    assert starts[-1] + size == length
    steps = [b - a for a, b in pairwise(starts)]
    assert all(0 < step <= max(1, round(tile * (1 - overlap))) for step in steps)
    # evenly spread, and no more tiles than needed
    assert not steps or max(steps) - min(steps) <= 1
    if len(starts) > 1:
        assert size + (len(starts) - 2) * round(tile * (1 - overlap)) < length


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(16, 50), (50, 16), (17, 17), (61, 45), (9, 100)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
def test_a_pointwise_model_scores_the_same_tiled_and_whole(shape, overlap):
    image = picture(*shape, batch=2)
    classes, probability = predict_mask(pointwise, image, TileConfig(tile=16, overlap=overlap))
    whole = pointwise(image).softmax(1)
    two = whole.topk(2, dim=1).values
    clear = two[:, 0] - two[:, 1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(classes[clear], whole.argmax(1).to(torch.uint8)[clear])
    torch.testing.assert_close(probability, whole.amax(1))


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(90, 20), (90, 41), (20, 90), (33, 10)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_finished_stripes_equal_blending_all_tiles_at_once(shape, overlap):
    forward, image = neighbourly(), picture(*shape)[0]
    config = TileConfig(tile=16, overlap=overlap, batch_size=1)
    classes, probability = predict_tiled(forward, image, config)
    expected_classes, expected = blend_all(forward, image, 16, overlap)
    assert classes.shape == shape
    torch.testing.assert_close(probability, expected)
    assert (classes != expected_classes).float().mean() < 1e-3


@torch.inference_mode()
def test_no_call_sees_more_tiles_than_the_batch_size():
    seen = []

    def forward(image):
        seen.append(tuple(image.shape))
        return pointwise(image)

    predict_mask(forward, picture(40, 40), TileConfig(tile=16, overlap=0.0, batch_size=2))
    assert all(n <= 2 and (h, w) == (16, 16) for n, _, h, w in seen)
    assert sum(n for n, *_ in seen) == 9


@torch.inference_mode()
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_result_does_not_depend_on_the_batch_size(batch_size):
    image = picture(40, 70, batch=3)
    expected = predict_mask(pointwise, image, TileConfig(tile=16, batch_size=3))
    result = predict_mask(pointwise, image, TileConfig(tile=16, batch_size=batch_size))
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1])


def test_the_blending_window_trusts_the_middle_and_never_vanishes():
    window = gaussian_window(32, 16)
    assert window.shape == (32, 16)
    assert window.argmax() in (15 * 16 + 7, 15 * 16 + 8, 16 * 16 + 7, 16 * 16 + 8)
    assert window.min() > 0
    torch.testing.assert_close(window, window.flip(0, 1))
    # sigma is an eighth of a side
    assert window[24, 8] / window[16, 8] == pytest.approx(
        torch.exp(torch.tensor(-0.5 * ((8.5 / 4) ** 2 - (0.5 / 4) ** 2))).item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": 15}, "tile must be at least 16 pixels, got 15"),
        ({"overlap": 0.8}, r"overlap must be in \[0, 0.75\], got 0.8"),
        ({"overlap": -0.1}, r"overlap must be in \[0, 0.75\], got -0.1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_impossible_tiles_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TileConfig(**fields)
