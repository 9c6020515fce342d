"""Tiling covers every pixel, exactly or blended, in little memory."""

import gc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unet import (
    DataSpec,
    Ensemble,
    MaskRule,
    TileConfig,
    UNet,
    UNetConfig,
    predict_blocks,
    predict_mask,
    predict_masks,
    tiling,
    valid_input,
)
from unet.tiling import TileAxis, blending_weights, cut_evenly, cut_exactly, halve_tile

PADDED = UNetConfig()
"""Geometry of a network without a margin."""


def valid_geometry(depth):
    return UNetConfig(padding="valid", depth=depth)


def pointwise(image):
    """A 1 x 1 convolution: a pixel's logits depend on that pixel alone."""
    x = image.float() / 255
    return torch.stack([4 * x[:, 0], 2 + 0 * x[:, 0], 3.2 * x[:, 1]], dim=1)


def network(preset, **config):
    """Return the forward function and the config of a small random U-Net with two channels."""
    torch.manual_seed(0)
    model = UNet.from_preset(preset, in_channels=2, num_classes=3, **config).eval()

    def forward(image):
        # As `DataSpec.normalise` does: in another memory format, sums are rounded differently.
        pixels = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return model(pixels / 64 - 2)

    return forward, model.config


@pytest.fixture(scope="module")
def padded():
    """Through instance norm, each logit depends on the entire image."""
    return network("small", base_channels=2, depth=2)[0]


@pytest.fixture(scope="module")
def valid():
    return network("paper", base_channels=2, depth=2)


def random_images(height, width, batch=1, seed=0):
    """uint8 [batch, 2, height, width]."""
    torch.manual_seed(seed)
    return torch.randint(0, 256, (batch, 2, height, width), dtype=torch.uint8)


def assemble(forward, images, config, geometry=PADDED):
    """Assemble probabilities [B, K, H, W] from blocks, which must cover each pixel once."""
    height, width = images[0].shape[-2:]
    assembled, seen = None, torch.zeros(len(images), height, width, dtype=torch.int64)
    for block in predict_blocks(forward, images, config, geometry):
        if assembled is None:
            assembled = torch.zeros(len(images), block.probability.shape[1], height, width)
        assembled[block.images, :, block.rows, block.columns] = block.probability
        seen[block.images, block.rows, block.columns] += 1
    assert (seen == 1).all()
    return assembled


def blend_all(forward, image, tile, overlap):
    """Reference: blend all tiles on a canvas of the size of the image."""
    height, width = image.shape[-2:]
    rows, columns = cut_evenly(height, tile, overlap), cut_evenly(width, tile, overlap)

    def bell(side):
        x = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / (side / 8)
        return torch.exp(-0.5 * x**2)

    window = torch.outer(bell(rows.side), bell(columns.side))
    total = weight = 0
    for top in rows.starts:
        for left in columns.starts:
            here = (slice(top, top + rows.side), slice(left, left + columns.side))
            p = forward(image[None, :, *here]).softmax(1)[0].double()
            canvas, covered = torch.zeros(3, height, width).double(), torch.zeros(height, width)
            canvas[:, *here], covered[here] = p * window, window.float()
            total, weight = total + canvas, weight + covered.double()
    return (total / weight).float()


# ---- one pass


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (32, 32)])
def test_an_image_no_larger_than_a_tile_is_predicted_in_one_pass(shape, padded):
    images = random_images(*shape, batch=3)
    classes, confidence = predict_mask(padded, images, TileConfig(tile=32, batch_size=2), PADDED)
    one_pass = padded(images).softmax(1).max(1)
    assert (classes.dtype, confidence.dtype) == (torch.uint8, torch.float64)
    assert torch.equal(classes, one_pass.indices.to(torch.uint8))
    torch.testing.assert_close(confidence, one_pass.values.double().mean((1, 2)))


def test_images_may_be_a_list_and_in_any_memory_layout(padded):
    images = random_images(40, 50, batch=2)
    config = TileConfig(tile=32)
    expected = predict_mask(padded, images, config, PADDED)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for same_images in (list(images), channels_last, list(channels_last)):
        classes, confidence = predict_mask(padded, same_images, config, PADDED)
        assert torch.equal(classes, expected[0])
        assert torch.equal(confidence, expected[1])


def test_there_may_be_255_classes():
    image = torch.arange(255, dtype=torch.uint8).view(1, 1, 15, 17)

    def forward(tiles):
        return 50 * torch.nn.functional.one_hot(tiles[:, 0].long(), 255).permute(0, 3, 1, 2).float()

    classes, confidence = predict_mask(forward, image, TileConfig(tile=16), PADDED)
    assert torch.equal(classes, image[:, 0])
    assert confidence.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", [1] * 5), ("cuda", [3, 2]), ("mps", [3, 2])]
)
def test_images_of_one_tile_are_yielded_in_batches_on_a_gpu(device, expected, monkeypatch):
    prefers_batches = tiling.prefers_batches(torch.device(device))
    monkeypatch.setattr(tiling, "prefers_batches", lambda _: prefers_batches)
    config, images = TileConfig(tile=32, batch_size=3), random_images(20, 30, batch=5)
    blocks = [*predict_blocks(pointwise, images, config, PADDED)]
    assert [block.images.stop - block.images.start for block in blocks] == expected
    assert torch.equal(assemble(pointwise, images, config), pointwise(images).softmax(1))
    rule = MaskRule(min_confidence=0.6, stored_dtype=torch.float16, count=True)
    found = predict_masks(pointwise, images, config, PADDED, rule)
    monkeypatch.undo()
    alone = predict_masks(pointwise, images, config, PADDED, rule)
    for name in ("classes", "confidence", "unsure", "probabilities", "counts"):
        assert torch.equal(getattr(found, name), getattr(alone, name))


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("tta", [False, True])
def test_with_two_classes_a_block_holds_the_second(tile, tta):
    def both(image):
        return pointwise(image)[:, :2]

    images = random_images(40, 50, batch=3)
    found = assemble(both, images, TileConfig(tile=tile, tta=tta, batch_size=2))
    assert found.shape == (3, 1, 40, 50)
    torch.testing.assert_close(found, both(images).softmax(1)[:, 1:])


@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_keep_the_memory_format_of_the_images(tile):
    seen = []

    def forward(image):
        seen.append(image.permute(0, 2, 3, 1).is_contiguous())
        return pointwise(image)

    images = random_images(40, 50, batch=3)
    config = TileConfig(tile=tile)
    expected = predict_mask(forward, images, config, PADDED)
    assert not any(seen)
    seen.clear()
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    found = predict_mask(forward, list(channels_last), config, PADDED)
    assert all(seen)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_adjacent_in_memory_are_not_copied(channels_last):
    images = random_images(4, 5, batch=4)
    if channels_last:
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    batch = tiling.stack_tiles(list(images[1:]))
    assert batch.data_ptr() == images[1].data_ptr()
    assert batch.stride() == images.stride()
    assert torch.equal(batch, images[1:])


@pytest.mark.parametrize("channels_last", [False, True])
def test_other_tiles_are_copied(channels_last):
    images = random_images(6, 9, batch=4)
    if channels_last:
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    a, b, c, d = images
    turned = a.permute(0, 2, 1)
    for tiles in (
        (a, c),
        (b, a),
        (a, b, d),
        (a, b.clone()),
        (a[:, :2], a[:, 3:5]),
        (a[:, :, :3], a[:, :, 3:6]),
        (turned, b.permute(0, 2, 1)),
        (a, a),
    ):
        batch = tiling.stack_tiles(tiles)
        assert batch.data_ptr() != tiles[0].data_ptr()
        assert torch.equal(batch, torch.stack(tiles))


# ---- overlapping tiles


@given(length=st.integers(1, 5000), tile=st.integers(16, 600), overlap=st.floats(0, 0.75))
@example(length=17, tile=16, overlap=0.75)
@example(length=32, tile=16, overlap=0.0)
def test_tiles_cover_every_pixel_and_overlap_as_asked(length, tile, overlap):
    cut = cut_evenly(length, tile, overlap)
    assert cut.starts[0] == 0
    assert cut.side == min(tile, length)
    assert cut.starts[-1] + cut.side == length
    steps = [b - a for a, b in pairwise(cut.starts)]
    stride = max(1, round(tile * (1 - overlap)))
    assert all(0 < step <= stride for step in steps)
    # evenly spread, and no more tiles than needed
    assert not steps or max(steps) - min(steps) <= 1
    assert len(cut) == 1 or cut.side + (len(cut) - 2) * stride < length


@given(length=st.integers(1, 5000), tile=st.integers(16, 600), overlap=st.floats(0, 0.75))
def test_a_symmetric_layout_is_its_own_mirror_image(length, tile, overlap):
    cut = cut_evenly(length, tile, overlap, symmetric=True)
    assert [length - cut.side - start for start in reversed(cut.starts)] == [*cut.starts]
    steps = [b - a for a, b in pairwise(cut.starts)]
    assert not steps or max(steps) - min(steps) <= 1
    assert 0 <= len(cut) - len(cut_evenly(length, tile, overlap)) <= 1


@given(length=st.integers(1, 3000), tile=st.integers(16, 600), overlap=st.floats(0, 0.75))
def test_weights_add_up_to_one_in_every_pixel(length, tile, overlap):
    cut = cut_evenly(length, tile, overlap)
    total = torch.zeros(length)
    for start, weights in zip(cut.starts, blending_weights(cut), strict=True):
        assert weights.min() >= 0
        total[start : start + cut.side] += weights
    torch.testing.assert_close(total, torch.ones(length))


def test_weights_are_gaussians_of_an_eighth_of_a_tile():
    first, second = blending_weights(TileAxis(48, 32, (0, 16)))
    x = torch.arange(16, 32)
    ratio = torch.exp(-0.5 * ((x - 15.5) / 4) ** 2) / torch.exp(-0.5 * ((x - 31.5) / 4) ** 2)
    torch.testing.assert_close(first[16:] / second[:16], ratio)
    assert torch.equal(first[:16], torch.ones(16))


@pytest.mark.parametrize("shape", [(16, 50), (50, 16), (17, 17), (61, 45), (9, 100)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
def test_a_pointwise_model_gives_equal_results_tiled_and_in_one_pass(shape, overlap):
    images = random_images(*shape, batch=2)
    expected = pointwise(images).softmax(1)
    config = TileConfig(tile=16, overlap=overlap)
    torch.testing.assert_close(assemble(pointwise, images, config), expected)
    classes, confidence = predict_mask(pointwise, images, config, PADDED)
    two = expected.topk(2, dim=1).values
    clear = two[:, 0] - two[:, 1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(classes[clear], expected.argmax(1).to(torch.uint8)[clear])
    torch.testing.assert_close(confidence, expected.amax(1).double().mean((1, 2)))


@pytest.mark.parametrize("shape", [(90, 20), (90, 41), (20, 90), (33, 10)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
@torch.inference_mode()
def test_finished_blocks_equal_blending_all_tiles_at_once(shape, overlap, padded):
    images = random_images(*shape, batch=2)
    result = assemble(padded, images, TileConfig(tile=16, overlap=overlap, batch_size=1))
    expected = torch.stack([blend_all(padded, image, 16, overlap) for image in images])
    torch.testing.assert_close(result, expected)


@torch.inference_mode()
def test_no_forward_pass_gets_more_tiles_than_the_batch_size():
    seen = []

    def forward(image):
        seen.append(tuple(image.shape))
        return pointwise(image)

    config = TileConfig(tile=16, overlap=0.0, batch_size=2)
    predict_mask(forward, random_images(40, 40), config, PADDED)
    assert all(n <= 2 and (h, w) == (16, 16) for n, _, h, w in seen)
    assert sum(n for n, *_ in seen) == 9


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@torch.inference_mode()
def test_the_result_does_not_depend_on_the_batch_size(batch_size, padded, valid):
    images = random_images(40, 70, batch=3)
    for forward, geometry in ((padded, PADDED), valid):
        config = TileConfig(tile=48, overlap=0.5, batch_size=3)
        expected = assemble(forward, images, config, geometry)
        result = assemble(forward, images, replace(config, batch_size=batch_size), geometry)
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("configured", "sides", "geometry", "tile"),
    [
        (1024, (1024, 1024), valid_geometry(4), 512),
        (1024, (300, 700), valid_geometry(4), 350),
        (1024, (206, 700), valid_geometry(4), 350),
        (1024, (204, 204), valid_geometry(4), None),
        (40, (20, 20), valid_geometry(1), 16),
        (1024, (1024, 1024), PADDED, None),
    ],
)
def test_tiles_are_halved_only_if_the_result_does_not_change(configured, sides, geometry, tile):
    config = TileConfig(tile=configured, overlap=0.5, batch_size=3, tta=True)
    expected = None if tile is None else replace(config, tile=tile)
    assert halve_tile(config, *sides, geometry) == expected


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_halving_ends_at_the_smallest_tile_of_the_network(preset):
    geometry = network(preset, base_channels=1, depth=2)[1]

    def side_of(tile):
        return cut_exactly(1000, tile, geometry.margin, geometry.multiple).side

    config = TileConfig(tile=400)
    while config is not None:
        side = side_of(config.tile) if geometry.margin else 400
        following = halve_tile(config, side, side, geometry)
        if following is not None:
            assert side_of(following.tile) < side
        elif geometry.margin:
            assert side_of(16) == side
        config = following


# ---- memory


def floats_in_use():
    """Bytes of the float tensors created since `gc.freeze`."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def peak_floats():
    """Measures the peak of `floats_in_use`, sampled at the start of each forward pass."""

    def measure(height, width, config, num_classes=5, rule=None):
        peak = 0

        def forward(image):
            nonlocal peak
            peak = max(peak, floats_in_use())
            return image[:, :1].float().expand(-1, num_classes, -1, -1)

        image = torch.zeros((1, 1, height, width), dtype=torch.uint8)
        found = predict_masks(forward, image, config, PADDED, rule or MaskRule())
        assert found.classes.shape == (1, height, width)
        return peak

    gc.collect()
    gc.freeze()
    yield measure
    gc.unfreeze()


@pytest.mark.parametrize(
    "rule", [MaskRule(), MaskRule(min_confidence=0.9, stored_dtype=torch.uint16)]
)
def test_memory_does_not_grow_with_height(rule, peak_floats):
    config, low, high = TileConfig(tile=64, overlap=0.25), 64 + 4 * 48, 64 + 40 * 48
    grown = peak_floats(high, 640, config, rule=rule) - peak_floats(low, 640, config, rule=rule)
    # a weight per row of a tile and a sum per tile, where a row of sums would take 12 kB
    assert 0 <= grown <= 8 * (high - low)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
def test_memory_grows_with_width_by_the_overlapping_rows_only(overlap, peak_floats):
    config, step = TileConfig(tile=64, overlap=overlap), round(64 * (1 - overlap))
    height, narrow, wide = (64 + n * step for n in (6, 5, 50))
    used = [peak_floats(height, width, config) for width in (narrow, wide)]
    # 64 weights, and the sums of 7 tiles and of the batch, for each column of tiles
    others = 4 * (64 + 8) * 45
    assert used[1] - used[0] <= 5 * 4 * (64 - step) * (wide - narrow) + others
    # constant: sums of the columns shared with the next tile, and a map of one tile
    assert used[0] <= 5 * 4 * (64 - step) * (narrow + 64) + 4 * 64 * 64 + others


# ---- exact tiles


def predict_at_once(forward, image, depth):
    """Predict probabilities [K, H, W] in one pass over the mirrored image [C, H, W]."""
    margin = 6 * 2**depth - 4
    sides = [valid_input(side, depth) - 2 * margin - side for side in image.shape[-2:]]
    borders = [(0, 0), *((margin, margin + more) for more in sides)]
    mirrored = torch.from_numpy(np.pad(image.numpy(), borders, mode="reflect"))
    height, width = image.shape[-2:]
    return forward(mirrored[None])[0, :, :height, :width].softmax(0)


@settings(max_examples=150)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.integers(16, 120),
    batch_size=st.integers(1, 5),
)
@example(height=1, width=1, tile=16, batch_size=1)
@example(height=2, width=90, tile=16, batch_size=4)
@torch.inference_mode()
def test_valid_tiles_equal_one_pass_in_every_pixel(height, width, tile, batch_size, valid):
    forward, geometry = valid
    image = random_images(height, width, seed=height * 100 + width)
    config = TileConfig(tile=tile, batch_size=batch_size)
    result = assemble(forward, image, config, geometry)[0]
    torch.testing.assert_close(result, predict_at_once(forward, image[0], depth=2))


@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 150), (45, 47), (100, 21)])
@torch.inference_mode()
def test_valid_tiles_are_exact_at_any_depth(depth, shape):
    forward, geometry = network("paper", base_channels=1, depth=depth)
    image = random_images(*shape)
    result = assemble(forward, image, TileConfig(tile=16), geometry)[0]
    torch.testing.assert_close(result, predict_at_once(forward, image[0], depth))


@given(
    length=st.integers(1, 5000),
    tile=st.integers(16, 1500),
    depth=st.integers(1, 5),
)
def test_valid_tiles_have_sizes_that_the_network_accepts(length, tile, depth):
    multiple, margin = 2**depth, 6 * 2**depth - 4
    cut = cut_exactly(length, tile, margin, multiple)
    output = cut.side - 2 * margin
    assert valid_input(output, depth) == cut.side
    smallest = valid_input(multiple, depth)
    assert cut.side <= max(tile, smallest)
    assert all(start % multiple == 0 for start in cut.starts)
    # side by side, without gaps, none superfluous
    assert all(b - a <= output for a, b in pairwise(cut.starts))
    assert cut.starts[-1] < length <= cut.starts[-1] + output
    if valid_input(length, depth) <= max(tile, smallest):
        assert (cut.side, len(cut)) == (valid_input(length, depth), 1)


def test_the_tiles_of_the_paper():
    assert cut_exactly(388, 572, 92, 16) == TileAxis(388, 572, (0,), 92)
    assert cut_exactly(768, 572, 92, 16) == TileAxis(768, 572, (0, 384), 92)
    assert cut_exactly(512, 572, 92, 16) == TileAxis(512, 444, (0, 256), 92)


@given(length=st.integers(1, 40), margin=st.integers(0, 100))
def test_images_are_mirrored_without_repeating_the_border(length, margin):
    cut = TileAxis(length, length + 2 * margin, (0,), margin)
    expected = np.pad(np.arange(length), margin, mode="reflect")
    assert cut.pixels(0, torch.device("cpu")).tolist() == expected.tolist()


# ---- test-time augmentation


def mirrored_average(predict, image):
    """Reference: the mean over the four mirror images, each flipped back."""
    total = 0
    for dims in ([], [-1], [-2], [-2, -1]):
        total = total + predict(image.flip(dims)).flip(dims)
    return total / 4


@pytest.mark.parametrize("shape", [(31, 32), (1, 5)])
@torch.inference_mode()
def test_tta_is_the_average_over_four_mirror_images(shape, padded, valid):
    images = random_images(*shape, batch=2)
    config = TileConfig(tile=32, tta=True)
    expected = mirrored_average(lambda x: padded(x).softmax(1), images)
    torch.testing.assert_close(assemble(padded, images, config), expected)
    expected_classes = expected.argmax(1).to(torch.uint8)
    assert torch.equal(predict_mask(padded, images, config, PADDED)[0], expected_classes)
    assert not torch.allclose(assemble(padded, images, replace(config, tta=False)), expected)


@pytest.mark.parametrize(
    ("orientation", "flips"), [("any", ([-1], [-2], [-2, -1])), ("upright", ([-1],)), ("fixed", ())]
)
@torch.inference_mode()
def test_tta_flips_as_the_training_did(orientation, flips, padded):
    spec = DataSpec(
        classes=("a", "b", "c"),
        palette=((0, 0, 0),) * 3,
        channels="L",
        mean=(0.5,),
        std=(0.2,),
        crop_size=32,
        orientation=orientation,
    )
    model = UNet(UNetConfig(in_channels=1, num_classes=3, base_channels=2, depth=1), spec).eval()
    other = UNet(model.config, replace(spec, orientation="any")).eval()
    images = random_images(24, 20, batch=2)
    config = TileConfig(tile=32, tta=True)
    for geometry in (model, Ensemble([other, model])):
        total = padded(images).softmax(1)
        for dims in flips:
            total += padded(images.flip(dims)).softmax(1).flip(dims)
        found = assemble(padded, images, config, geometry)
        torch.testing.assert_close(found, total / (1 + len(flips)))


@settings(max_examples=40)
@given(height=st.integers(1, 60), width=st.integers(1, 60), overlap=st.sampled_from([0, 0.3, 0.7]))
@example(height=33, width=47, overlap=0)
@torch.inference_mode()
def test_with_tta_a_mirrored_image_has_the_mirrored_prediction(height, width, overlap, padded):
    image = random_images(height, width, seed=height * 100 + width)
    config = TileConfig(tile=16, overlap=overlap, tta=True)
    expected = assemble(padded, image, config)
    for dims in ([-1], [-2], [-2, -1]):
        result = assemble(padded, image.flip(dims), config).flip(dims)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(height=st.integers(1, 60), width=st.integers(1, 60), tile=st.integers(16, 100))
@torch.inference_mode()
def test_valid_tiles_with_tta_are_exact_too(height, width, tile, valid):
    forward, geometry = valid
    image = random_images(height, width, seed=height * 100 + width)
    expected = assemble(forward, image, TileConfig(tile=1000, tta=True), geometry)
    tiled = assemble(forward, image, TileConfig(tile=tile, tta=True), geometry)
    torch.testing.assert_close(tiled, expected)
    # With other widths, the mirrored image is pooled on another grid.
    if width % 4 == 0:
        mirrored = assemble(forward, image.flip([-1]), TileConfig(tile=tile, tta=True), geometry)
        torch.testing.assert_close(mirrored.flip([-1]), expected)


# ---- settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": 15}, "tile must be at least 16 pixels, got 15"),
        ({"overlap": 0.8}, r"overlap must be in \[0, 0.75\], got 0.8"),
        ({"overlap": -0.1}, r"overlap must be in \[0, 0.75\], got -0.1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_invalid_tile_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TileConfig(**fields)
