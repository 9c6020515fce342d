"""`loading.augment`, `loading.crop`: seeded by (seed, position), and labels keep their values."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.loading.augment import Augment, AugmentConfig, Purpose, uniform
from pipelines.loading.crop import Cropper, clip_box
from pipelines.runtime.errors import UsageError
from shards.images.files import ImageFormat
from shards.images.pixels import DecodedImage

PLAIN: dict[str, Any] = {"contrast": 1.0, "brightness": 0.0, "saturation": 1.0}
"""The colours stay as they are."""
FILL = (9, 8, 7)


def batch(count=12, side=16, seed=0):
    torch.manual_seed(seed)
    image = torch.randn(count, 3, side, side)
    mask = torch.randint(0, 4, (count, side, side), dtype=torch.uint8)
    mask[torch.rand(mask.shape) < 0.1] = 255
    return image, mask, torch.arange(100, 100 + count)


def symmetries(pixels):
    """All eight turns and mirrorings of [..., H, W]."""
    for flipped in (pixels, pixels[..., ::-1]):
        for turns in range(4):
            yield np.rot90(flipped, turns, axes=(-2, -1))


# ------------------------------------------------------------------------------------- numbers


def test_numbers_belong_to_seed_position_and_purpose():
    one = uniform(1, 2, Purpose.CROP, 4)
    assert np.array_equal(one, uniform(1, 2, Purpose.CROP, 4))
    assert np.array_equal(one[:2], uniform(1, 2, Purpose.CROP, 2))
    others = [uniform(2, 2, Purpose.CROP, 4), uniform(1, 3, Purpose.CROP, 4)]
    others.append(uniform(1, 2, Purpose.WARP, 4))
    assert not any(np.isin(one, other).any() for other in others)


def test_numbers_fill_the_unit_interval():
    draws = np.concatenate([uniform(0, p, Purpose.WARP, 8) for p in range(500)])
    assert 0 <= draws.min() < 0.01
    assert 0.99 < draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.03)


def test_numbers_are_pinned():
    # Runs that are resumed depend on them.
    assert uniform(3, 14, Purpose.CROP, 2).tolist() == [0.15931281382053622, 0.7829139522760277]


# --------------------------------------------------------------------------------------- crops


def cropper(size, *, seed=0, rare=(), fill=FILL, **config):
    """A Cropper that takes squares of its own size anywhere by default."""
    settings = {"warp_share": 0, "foreground_share": 0, **config}
    return Cropper(AugmentConfig(**settings), size, fill, rare, seed)


def decoded(pixels):
    """An array [H, W, C] as an opened image."""
    return DecodedImage(pixels, ImageFormat("L" if pixels.shape[2] == 1 else "RGB"))


def boxes(crop, mask, positions=1000):
    """What some crops show: (left, top, right, bottom)."""
    return [clip_box(crop.choose_box(mask, position), *mask.shape) for position in range(positions)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    size=st.integers(1, 12),
    position=st.integers(0, 2**40),
)
def test_a_crop_is_a_part_of_the_image_padded_with_fill_and_255(height, width, size, position):
    rng = np.random.default_rng(0)
    image = rng.integers(10, 255, (height, width, 3), dtype=np.uint8)
    mask = rng.integers(0, 5, (height, width), dtype=np.uint8)
    image_crop, mask_crop = cropper(size)(decoded(image), mask, position)
    assert (image_crop.shape, mask_crop.shape) == ((size, size, 3), (size, size))
    assert image_crop.dtype == mask_crop.dtype == np.uint8
    outside = mask_crop == 255
    assert (image_crop[outside] == FILL).all()
    assert (~outside).sum() == min(size, height) * min(size, width)
    # what is inside is one rectangle of the image, and of the mask the same
    rows, columns = np.flatnonzero(~outside.all(1)), np.flatnonzero(~outside.all(0))
    inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    draws = uniform(0, position, Purpose.CROP, 2)
    top, left = (int(d * (max(0, s - size) + 1)) for d, s in zip(draws, mask.shape, strict=True))
    place = np.s_[top : top + len(rows), left : left + len(columns)]
    assert np.array_equal(image_crop[inner], image[place])
    assert np.array_equal(mask_crop[inner], mask[place])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    position=st.integers(0, 2**40),
    scaled=st.booleans(),
    foreground=st.booleans(),
)
def test_a_margin_shows_the_mirrored_image_around_the_crop(
    height, width, position, scaled, foreground
):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (height, width), dtype=np.uint8)
    size, margin = 30, 10
    crop = replace(
        cropper(size, rare=(1,), foreground_share=int(foreground), warp_share=int(scaled)),
        margin=margin,
    )
    box = crop.choose_box(mask, position)
    margin = crop.scale_margin(box.side)
    inner = box.side - 2 * margin
    for first, length in ((box.top + margin, height), (box.left + margin, width)):
        if inner <= length:
            assert 0 <= first <= length - inner
        else:
            assert first <= 0
            assert first + inner >= length
    # mask values stand in for the image's: what is cut is the image, mirrored at its edges
    around = 64
    mirrored = np.pad(mask, around, mode="reflect")
    top, left = box.top + around, box.left + around
    expected = crop.resize(
        mirrored[top : top + box.side, left : left + box.side, None], Image.Resampling.BILINEAR
    )
    image, cut = crop(decoded(mask[..., None]), mask, position)
    assert np.array_equal(image, expected)
    if box.side == size:
        assert np.array_equal(cut[cut != 255], image[cut != 255, 0])
        assert (cut != 255).sum() == np.prod(
            [min(n, b + size) - max(0, b) for b, n in ((box.top, height), (box.left, width))]
        )


def test_a_border_map_is_cut_as_its_mask_and_is_0_beyond_it():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (9, 20), dtype=np.uint8)
    crop = cropper(16)
    for position in range(20):
        box = crop.choose_box(mask, position)
        cut, border = crop.cut_mask(mask, box), crop.cut_border(255 * mask, box)
        assert np.array_equal(border, np.where(cut == 255, 0, 255 * cut))


def test_crops_reach_every_place():
    image = np.arange(25, dtype=np.uint8).reshape(5, 5, 1)
    corners = {
        int(cropper(3)(decoded(image), image[..., 0], position)[1][0, 0]) for position in range(200)
    }
    assert corners == {0, 1, 2, 5, 6, 7, 10, 11, 12}


@pytest.mark.parametrize("share", [0, 1])
def test_a_smaller_image_is_centred(share):
    image, mask = np.full((2, 4, 3), 50, np.uint8), np.ones((2, 4), np.uint8)
    crop = cropper(6, rare=(1,), foreground_share=share)
    image_crop, mask_crop = crop(decoded(image), mask, 0)
    assert (mask_crop[2:4, 1:5] == 1).all()
    assert (mask_crop != 255).sum() == 8
    assert image_crop[0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("share", [0, 1 / 3, 1])
def test_the_stated_share_of_the_crops_is_centred_on_a_rare_class(share):
    mask = np.zeros((64, 64), np.uint8)
    mask[20, 40] = 2
    seen = boxes(cropper(16, rare=(2,), foreground_share=share), mask)
    centred = sum(box == (32, 12, 48, 28) for box in seen) / len(seen)
    # one place in 49 x 49 comes up by chance, too
    assert centred == pytest.approx(share, abs=0.04 if 0 < share < 1 else 0.002)


def test_every_rare_class_that_a_mask_holds_comes_about_as_often():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:40], mask[16:48, 40:44], mask[30, 30] = 1, 2, 4
    crop, image = cropper(9, rare=(1, 2, 3, 4), foreground_share=1), decoded(mask[..., None])
    found = Counter(int(crop(image, mask, p)[1][4, 4]) for p in range(900))
    assert found.keys() == {1, 2, 4}
    assert all(times == pytest.approx(300, abs=45) for times in found.values())


def test_every_pixel_of_a_rare_class_can_be_the_centre():
    mask = np.zeros((32, 32), np.uint8)
    mask[8:11, 8:12] = 1
    seen = boxes(cropper(4, rare=(1,), foreground_share=1), mask, 300)
    assert {(top, left) for left, top, _, _ in seen} == {
        (row - 2, column - 2) for row in (8, 9, 10) for column in (8, 9, 10, 11)
    }


def test_a_rare_class_at_the_edge_is_in_the_crop_and_the_crop_in_the_image():
    mask = np.zeros((20, 33), np.uint8)
    mask[0, 0] = mask[19, 32] = 1
    crop = cropper(16, rare=(1,), foreground_share=1)
    assert set(boxes(crop, mask)) == {(0, 0, 16, 16), (17, 4, 33, 20)}
    image = decoded(mask[..., None])
    assert all((crop(image, mask, position)[1] == 1).any() for position in range(50))


@pytest.mark.parametrize("rare", [(), (3,), (0,)])
def test_without_a_rare_class_in_the_mask_crops_lie_anywhere(rare):
    mask = np.zeros((24, 24), np.uint8) if rare != (0,) else np.ones((24, 24), np.uint8)
    crop = cropper(16, rare=rare, foreground_share=1)
    assert boxes(crop, mask, 50) == boxes(cropper(16), mask, 50)


@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_a_crop_shows_more_or_less_within_the_factor(factor):
    seen = boxes(cropper(16, warp_share=0.5, scale=factor), np.zeros((60, 90), np.uint8))
    sides = np.array([right - left for left, _, right, _ in seen])
    assert all(bottom - top == right - left for left, top, right, bottom in seen)
    assert all(min(left, top) >= 0 and r <= 90 and b <= 60 for left, top, r, b in seen)
    assert (sides.min(), sides.max()) == (round(16 / factor), round(16 * factor))
    # half of them are scaled, as many up as down
    assert (sides != 16).mean() == pytest.approx(0.5, abs=0.1)
    assert (sides < 16).mean() == pytest.approx((sides > 16).mean(), abs=0.05)


@pytest.mark.parametrize(("height", "width", "most"), [(18, 40, 18), (16, 16, 16), (12, 40, 16)])
def test_a_crop_is_never_larger_than_the_image(height, width, most):
    crop = cropper(16, warp_share=1, scale=3)
    sides = {
        crop.choose_side(uniform(0, p, Purpose.CROP, 5)[2:4], min(height, width))
        for p in range(500)
    }
    assert (min(sides), max(sides)) == (5, most)
    seen = boxes(crop, np.zeros((height, width), np.uint8))
    assert {right - left for left, _, right, _ in seen} == sides
    assert max(bottom for _, _, _, bottom in seen) == height


def test_a_scaled_crop_shows_image_and_mask_of_one_place():
    y, x = np.mgrid[:64, :64]
    mask = (((x - 30) ** 2 + (y - 30) ** 2) < 400).astype(np.uint8)
    crop = cropper(24, warp_share=1, scale=2)
    for position in range(50):
        image_crop, mask_crop = crop(decoded(mask[..., None] * 100), mask, position)
        clear = np.isin(image_crop[..., 0], (0, 100))
        assert clear.mean() > 0.8
        assert np.array_equal(image_crop[..., 0][clear], 100 * mask_crop[clear])


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_never_change_their_value_from_the_file_to_the_model(channels):
    rng = np.random.default_rng(0)
    fill = FILL[:channels]
    crop = cropper(24, fill=fill, rare=(3, 200), warp_share=1, scale=2, foreground_share=0.5)
    varied = Augment(AugmentConfig(warp_share=1, rotation=45, elastic=3), 0)
    for position in range(40):
        height, width = rng.integers(10, 60, 2)
        held = rng.choice([0, 3, 127, 128, 200, 254], 3, replace=False)
        mask = rng.choice(held, (height, width)).astype(np.uint8)
        image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        image_crop, mask_crop = crop(decoded(image), mask, position)
        assert set(np.unique(mask_crop)) <= {*held, 255}
        pixels = torch.tensor(image_crop).permute(2, 0, 1)[None].float()
        _, warped, _ = varied(pixels, torch.tensor(mask_crop)[None], torch.tensor([position]))
        assert set(warped.unique().tolist()) <= {*map(int, held), 255}


# ------------------------------------------------------------------------------------- the warp


def test_the_same_seed_and_position_vary_a_sample_the_same_way():
    image, mask, position = batch()
    once, twice = (Augment(AugmentConfig(), 5)(image, mask, position) for _ in range(2))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])
    assert once[2] is None
    other = Augment(AugmentConfig(), 6)(image, mask, position)
    assert not torch.equal(once[1], other[1])
    moved = Augment(AugmentConfig(), 5)(image, mask, position + 1)
    assert not torch.equal(once[1], moved[1])


@pytest.mark.parametrize("parts", [(1,) * 12, (5, 7), (11, 1)])
def test_a_sample_does_not_depend_on_the_batch_that_it_is_in(parts):
    image, mask, position = batch()
    augment = Augment(AugmentConfig(warp_share=0.5, elastic=2), 1)
    whole_image, whole_mask, _ = augment(image, mask, position)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for some in shuffled.split(parts):
        part_image, part_mask, _ = augment(image[some], mask[some], position[some])
        torch.testing.assert_close(part_image, whole_image[some])
        assert torch.equal(part_mask, whole_mask[some])


def test_no_global_random_state_is_used_or_moved():
    image, mask, position = batch()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Augment(AugmentConfig(), 0)(image, mask, position)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(4))
def test_labels_never_change_their_value(seed):
    image, mask, position = batch(count=24, side=33, seed=seed)
    config = AugmentConfig(warp_share=1.0, rotation=45, elastic=4)
    _, warped, _ = Augment(config, seed)(image, mask, position)
    assert warped.dtype == torch.uint8
    for before, after in zip(mask, warped, strict=True):
        assert set(after.unique().tolist()) <= {*before.unique().tolist(), 255}


@pytest.mark.parametrize("value", [0, 1, 127, 128, 253, 254])
def test_every_class_index_survives_the_warp_as_it_is(value):
    mask = torch.full((8, 16, 16), value, dtype=torch.uint8)
    image, _, position = batch(count=8)
    config = AugmentConfig(warp_share=1.0, rotation=30, elastic=2)
    _, warped, _ = Augment(config, 0)(image, mask, position)
    assert set(warped.unique().tolist()) == {value, 255}


@pytest.mark.parametrize("side", [7, 16, 512])
def test_without_warp_samples_are_turned_by_quarters_and_mirrored_exactly(side):
    image, mask, position = batch(count=64 if side < 100 else 3, side=side)
    turned, warped, _ = Augment(AugmentConfig(warp_share=0, **PLAIN), 2)(image, mask, position)
    kinds = set()
    for i in range(len(mask)):
        exact = [np.array_equal(s, warped[i].numpy()) for s in symmetries(mask[i].numpy())]
        assert exact.count(True) == 1
        kinds.add(exact.index(True))
        expected = list(symmetries(image[i].numpy()))[exact.index(True)]
        np.testing.assert_allclose(turned[i].numpy(), expected, atol=2e-3)
    if side < 100:
        assert kinds == set(range(8))


def test_upright_images_are_only_mirrored_left_to_right():
    image, mask, position = batch(count=24)
    config = AugmentConfig(orientation="upright", warp_share=0, **PLAIN)
    _, warped, _ = Augment(config, 0)(image, mask, position)
    same = [torch.equal(a, b) for a, b in zip(mask, warped, strict=True)]
    mirrored = [torch.equal(a.flip(1), b) for a, b in zip(mask, warped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 4 < sum(mirrored) < 20


def test_fixed_images_are_unchanged():
    image, mask, position = batch()
    config = AugmentConfig(orientation="fixed", warp_share=0, **PLAIN)
    same, warped, _ = Augment(config, 0)(image, mask, position)
    assert torch.equal(warped, mask)
    torch.testing.assert_close(same, image, atol=1e-5, rtol=1e-5)


def test_pixels_rotated_in_from_outside_are_ignored():
    image, _, position = batch(count=8, side=32)
    mask = torch.ones(8, 32, 32, dtype=torch.uint8)
    config = AugmentConfig(warp_share=1.0, rotation=45, **PLAIN)
    turned, warped, _ = Augment(config, 3)(torch.ones_like(image), mask, position)
    assert (warped == 255).any()

    def far_from(pixels):
        """Two pixels and more away, also from the edge, where the border does not blend into."""
        return F.max_pool2d(F.pad(pixels.float()[:, None], [2] * 4, value=1), 5, 1)[:, 0] == 0

    outside, inside = far_from(warped == 1), far_from(warped == 255)
    assert outside.any()
    assert not turned[:, 0][outside].any()
    torch.testing.assert_close(turned[:, 0][inside], torch.ones(int(inside.sum())))


@pytest.mark.parametrize("elastic", [0, 4])
def test_image_and_mask_are_warped_alike(elastic):
    # a mask that can be read off the image, smooth enough for both kinds of resampling
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    height = torch.sin(x / 9) + torch.cos(y / 7)
    image = height.expand(16, 1, 64, 64).clone()
    mask = (height > 0).to(torch.uint8).expand(16, 64, 64).clone()
    config = AugmentConfig(warp_share=1.0, elastic=elastic, **PLAIN)
    turned, warped, _ = Augment(config, 0)(image, mask, torch.arange(16))
    clear = (turned[:, 0].abs() > 0.15) & (warped != 255)
    assert clear.float().mean() > 0.5
    assert torch.equal((turned[:, 0] > 0)[clear], (warped == 1)[clear])


def test_contrast_and_brightness_stay_within_their_bounds_and_spare_the_mask():
    image, mask, position = batch(count=64, side=4)
    config = AugmentConfig(
        orientation="fixed", warp_share=0, contrast=1.5, brightness=0.3, saturation=1
    )
    toned, same, _ = Augment(config, 0)(image, mask, position)
    assert torch.equal(same, mask)
    for before, after in zip(image, toned, strict=True):
        x, y = before.flatten(), after.flatten()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        shift = y.mean() - slope * x.mean()
        assert 1 / 1.5 - 1e-3 <= slope <= 1.5 + 1e-3
        assert abs(shift) <= 0.3 + 1e-3
        torch.testing.assert_close(y, slope * x + shift, atol=1e-3, rtol=1e-3)


def displacement(config, side=33, positions=400):
    """How far the elastic warp moves each pixel of a square, down and right [B, 2, H, W]."""
    ramps = torch.stack(torch.meshgrid(*[torch.arange(float(side))] * 2, indexing="ij"))
    mask, where = torch.zeros(positions, side, side, dtype=torch.uint8), torch.arange(positions)
    # Bilinear resampling of a ramp shows the position that was sampled.
    moved = [
        Augment(config, 0)(ramp.expand(positions, 1, side, side), mask, where)[0] for ramp in ramps
    ]
    return torch.cat(moved, 1) - ramps


def test_elastic_displacements_have_the_stated_deviation():
    config = AugmentConfig(orientation="fixed", warp_share=1, rotation=0, elastic=2.0, **PLAIN)
    moved = displacement(config)
    # The middle is a node of the grid.
    middle = moved[:, :, 16, 16]
    assert middle.std(0).tolist() == pytest.approx([2.0, 2.0], rel=0.08)
    assert middle.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=0.25)
    assert middle.abs().max() <= 2.0 * 3**0.5 + 1e-3
    assert abs(np.corrcoef(middle.T.numpy())[0, 1]) < 0.15
    # Between nodes it is smooth: neighbours move alike.
    inner = moved[:, :, 8:25, 8:25]
    assert inner.diff(dim=2).abs().max() < 1.2
    assert 1.0 < inner.std() < 2.2


def test_elastic_displacements_are_pixels_whatever_the_shape():
    config = AugmentConfig(orientation="fixed", warp_share=1, rotation=0, elastic=2.0, **PLAIN)
    wide = torch.arange(65.0).expand(300, 1, 33, 65)
    mask = torch.zeros(300, 33, 65, dtype=torch.uint8)
    moved, _, _ = Augment(config, 0)(wide, mask, torch.arange(300))
    assert (moved[:, 0, 16, 32] - 32).std() == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_not_warped_is_not_displaced(share):
    config = AugmentConfig(orientation="fixed", warp_share=share, elastic=5, **PLAIN)
    image, mask, position = batch(count=64)
    varied, warped, _ = Augment(config, 0)(image, mask, position)
    untouched = [
        torch.equal(a, b) and torch.allclose(x, y, atol=1e-5)
        for a, b, x, y in zip(mask, warped, image, varied, strict=True)
    ]
    assert np.mean(untouched) == pytest.approx(1 - share, abs=0.15 if share else 0)


def test_where_a_displaced_image_is_of_one_class_so_is_its_mask():
    _, mask, position = batch(count=16, side=64)
    blocks = mask[:, ::16, ::16].clamp(max=1)
    mask = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    config = AugmentConfig(warp_share=1, elastic=4, **PLAIN)
    turned, warped, _ = Augment(config, 0)(100.0 * mask[:, None], mask, position)
    pure = ((turned[:, 0] % 100).minimum(100 - turned[:, 0] % 100) < 1e-3) & (warped != 255)
    assert pure.float().mean() > 0.5
    torch.testing.assert_close(turned[:, 0][pure], 100.0 * warped[pure], atol=1e-2, rtol=0)


def test_saturation_of_grey_images_is_refused_unless_it_is_the_default_or_off():
    with pytest.raises(UsageError, match=r"--augment\.saturation 2: has no effect on grey images"):
        AugmentConfig(saturation=2).refuse_for_grey("L")
    AugmentConfig(saturation=2).refuse_for_grey("RGB")
    for saturation in (1, AugmentConfig().saturation):
        AugmentConfig(saturation=saturation).refuse_for_grey("L")


def test_saturation_does_not_change_grey_images():
    config = AugmentConfig(orientation="fixed", warp_share=0, **{**PLAIN, "saturation": 2})
    image, mask, position = batch(count=32)
    grey = image[:, :1]
    for channels in (grey, grey.expand(-1, 3, -1, -1)):
        same, _, _ = Augment(config, 0)(channels, mask, position)
        torch.testing.assert_close(same, channels, atol=1e-5, rtol=1e-5)
    varied, same, _ = Augment(config, 0)(image, mask, position)
    assert torch.equal(same, mask)
    # Colours grow or shrink around the same grey, each sample by one factor.
    middle = image.mean(1, keepdim=True)
    torch.testing.assert_close(varied.mean(1, keepdim=True), middle, atol=1e-5, rtol=1e-4)
    factors = ((varied - middle) / (image - middle)).flatten(1).median(1).values
    torch.testing.assert_close(
        varied, middle + factors.view(-1, 1, 1, 1) * (image - middle), atol=1e-3, rtol=1e-3
    )
    assert 0.5 <= factors.min() < 0.75
    assert 1.5 < factors.max() <= 2


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("scale", "contrast", "saturation"), 0.9, "must be >= 1, got"),
        (("rotation", "brightness", "elastic"), -0.1, "must be >= 0, got"),
        (("warp_share", "foreground_share"), -0.1, "must be in [0, 1], got"),
        (("warp_share", "foreground_share"), 1.5, "must be in [0, 1], got"),
    ],
)
def test_impossible_augmentation_is_refused(names, value, message):
    for name in names:
        fields: dict[str, Any] = {name: value}
        with pytest.raises(
            ValueError, match=re.escape(f"{name.replace('_', '-')} {message} {value}")
        ):
            AugmentConfig(**fields)


def test_a_border_map_is_warped_as_its_image():
    config = AugmentConfig(warp_share=1, elastic=2, **PLAIN)
    border = (255 * torch.rand(6, 33, 33)).to(torch.uint8)
    mask, position = torch.zeros_like(border), torch.arange(6)
    image, _, warped = Augment(config, 3)(border[:, None].float(), mask, position, border)
    assert torch.equal(warped, image[:, 0])
    assert not torch.equal(warped, border.float())


@pytest.mark.parametrize("elastic", [0.0, 2.0])
def test_the_numbers_of_a_batch_cross_to_the_device_in_one_copy(elastic, dispatched):
    image, mask, position = batch()
    image, mask = image.to("meta"), mask.to("meta")
    config = AugmentConfig(warp_share=1, elastic=elastic)
    with dispatched() as calls:
        varied = Augment(config, 0)(image, mask, position, mask)
    assert [part.shape for part in varied] == [image.shape, mask.shape, mask.shape]
    assert sum(call.crosses for call in calls) == 1
