"""Holds augmentation's contract: seeded by (seed, position), labels never change their value."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment import Augment, AugmentConfig, Purpose, crop, uniform

PLAIN = {"warp_share": 0.0, "contrast": 1.0, "brightness": 0.0}
FILL = np.array([9, 8, 7], dtype=np.uint8)


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
    assert uniform(3, 14, Purpose.CROP, 2).tolist() == [0.12114375622365242, 0.933729362702114]


# --------------------------------------------------------------------------------------- crops


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    size=st.integers(1, 12),
    draws=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
)
def test_a_crop_is_a_part_of_the_picture_padded_with_fill_and_255(height, width, size, draws):
    rng = np.random.default_rng(0)
    image = rng.integers(10, 255, (height, width, 3), dtype=np.uint8)
    mask = rng.integers(0, 5, (height, width), dtype=np.uint8)
    image_crop, mask_crop = crop(image, mask, size, FILL, np.array(draws))
    assert (image_crop.shape, mask_crop.shape) == ((size, size, 3), (size, size))
    assert image_crop.dtype == mask_crop.dtype == np.uint8
    outside = mask_crop == 255
    assert (image_crop[outside] == FILL).all()
    assert (~outside).sum() == min(size, height) * min(size, width)
    # what is inside is one rectangle of the picture, and of the mask the same
    rows, columns = np.flatnonzero(~outside.all(1)), np.flatnonzero(~outside.all(0))
    inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = (int(d * (max(0, s - size) + 1)) for d, s in zip(draws, mask.shape, strict=True))
    place = np.s_[top : top + len(rows), left : left + len(columns)]
    assert np.array_equal(image_crop[inner], image[place])
    assert np.array_equal(mask_crop[inner], mask[place])


def test_crops_reach_every_place():
    image = np.arange(25, dtype=np.uint8).reshape(5, 5, 1)
    corners = set()
    for position in range(200):
        draws = uniform(0, position, Purpose.CROP, 2)
        corners.add(int(crop(image, image[..., 0], 3, FILL[:1], draws)[1][0, 0]))
    assert corners == {0, 1, 2, 5, 6, 7, 10, 11, 12}


def test_a_smaller_picture_stands_in_the_middle():
    image, mask = np.full((2, 4, 3), 50, np.uint8), np.ones((2, 4), np.uint8)
    image_crop, mask_crop = crop(image, mask, 6, FILL, np.array([0.9, 0.9]))
    assert (mask_crop[2:4, 1:5] == 1).all()
    assert (mask_crop != 255).sum() == 8
    assert image_crop[0, 0].tolist() == [9, 8, 7]


# ------------------------------------------------------------------------------------- the warp


def test_the_same_seed_and_position_vary_a_sample_the_same_way():
    image, mask, position = batch()
    once, twice = (Augment(AugmentConfig(), 5)(image, mask, position) for _ in range(2))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])
    other = Augment(AugmentConfig(), 6)(image, mask, position)
    assert not torch.equal(once[1], other[1])
    moved = Augment(AugmentConfig(), 5)(image, mask, position + 1)
    assert not torch.equal(once[1], moved[1])


@pytest.mark.parametrize("parts", [(1,) * 12, (5, 7), (11, 1)])
def test_a_sample_does_not_depend_on_the_batch_that_it_is_in(parts):
    image, mask, position = batch()
    augment = Augment(AugmentConfig(), 1)
    whole_image, whole_mask = augment(image, mask, position)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for some in shuffled.split(parts):
        part_image, part_mask = augment(image[some], mask[some], position[some])
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
    config = AugmentConfig(warp_share=1.0, rotation=45, scale=2)
    _, warped = Augment(config, seed)(image, mask, position)
    assert warped.dtype == torch.uint8
    for before, after in zip(mask, warped, strict=True):
        assert set(after.unique().tolist()) <= {*before.unique().tolist(), 255}


@pytest.mark.parametrize("value", [0, 1, 127, 128, 253, 254])
def test_every_class_index_survives_the_warp_as_it_is(value):
    mask = torch.full((8, 16, 16), value, dtype=torch.uint8)
    image, _, position = batch(count=8)
    config = AugmentConfig(warp_share=1.0, rotation=30, scale=1.5)
    _, warped = Augment(config, 0)(image, mask, position)
    assert set(warped.unique().tolist()) == {value, 255}


@pytest.mark.parametrize("side", [7, 16, 512])
def test_without_warp_samples_are_turned_by_quarters_and_mirrored_exactly(side):
    image, mask, position = batch(count=64 if side < 100 else 3, side=side)
    turned, warped = Augment(AugmentConfig(**PLAIN), 2)(image, mask, position)
    kinds = set()
    for i in range(len(mask)):
        exact = [np.array_equal(s, warped[i].numpy()) for s in symmetries(mask[i].numpy())]
        assert exact.count(True) == 1
        kinds.add(exact.index(True))
        expected = list(symmetries(image[i].numpy()))[exact.index(True)]
        np.testing.assert_allclose(turned[i].numpy(), expected, atol=2e-3)
    if side < 100:
        assert kinds == set(range(8))


def test_upright_pictures_are_only_mirrored_left_to_right():
    image, mask, position = batch(count=24)
    config = AugmentConfig(orientation="upright", **PLAIN)
    _, warped = Augment(config, 0)(image, mask, position)
    same = [torch.equal(a, b) for a, b in zip(mask, warped, strict=True)]
    mirrored = [torch.equal(a.flip(1), b) for a, b in zip(mask, warped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 4 < sum(mirrored) < 20


def test_fixed_pictures_stay_as_they_are():
    image, mask, position = batch()
    config = AugmentConfig(orientation="fixed", **PLAIN)
    same, warped = Augment(config, 0)(image, mask, position)
    assert torch.equal(warped, mask)
    torch.testing.assert_close(same, image, atol=1e-5, rtol=1e-5)


def test_what_is_turned_into_the_picture_from_outside_is_ignored():
    image, _, position = batch(count=8, side=32)
    mask = torch.ones(8, 32, 32, dtype=torch.uint8)
    config = AugmentConfig(warp_share=1.0, rotation=45, contrast=1, brightness=0)
    turned, warped = Augment(config, 3)(torch.ones_like(image), mask, position)
    assert (warped == 255).any()

    def far_from(pixels):
        """Two pixels and more away, where the border does not blend into."""
        return F.max_pool2d(pixels.float()[:, None], 5, 1, 2)[:, 0] == 0

    outside, inside = far_from(warped == 1), far_from(warped == 255)
    assert outside.any()
    assert not turned[:, 0][outside].any()
    torch.testing.assert_close(turned[:, 0][inside], torch.ones(int(inside.sum())))


def test_picture_and_mask_are_warped_alike():
    # a mask that can be read off the picture, smooth enough for both kinds of resampling
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    height = torch.sin(x / 9) + torch.cos(y / 7)
    image = height.expand(16, 1, 64, 64).clone()
    mask = (height > 0).to(torch.uint8).expand(16, 64, 64).clone()
    config = AugmentConfig(warp_share=1.0, contrast=1, brightness=0)
    turned, warped = Augment(config, 0)(image, mask, torch.arange(16))
    clear = (turned[:, 0].abs() > 0.15) & (warped != 255)
    assert clear.float().mean() > 0.5
    assert torch.equal((turned[:, 0] > 0)[clear], (warped == 1)[clear])


def test_contrast_and_brightness_stay_within_their_bounds_and_spare_the_mask():
    image, mask, position = batch(count=64, side=4)
    config = AugmentConfig(orientation="fixed", warp_share=0, contrast=1.5, brightness=0.3)
    toned, same = Augment(config, 0)(image, mask, position)
    assert torch.equal(same, mask)
    for before, after in zip(image, toned, strict=True):
        x, y = before.flatten(), after.flatten()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        shift = y.mean() - slope * x.mean()
        assert 1 / 1.5 - 1e-3 <= slope <= 1.5 + 1e-3
        assert abs(shift) <= 0.3 + 1e-3
        torch.testing.assert_close(y, slope * x + shift, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.9}, "augment.scale and augment.contrast are factors, 1 or more"),
        ({"contrast": 0.5}, "augment.scale and augment.contrast are factors, 1 or more"),
        ({"rotation": -1.0}, "must be 0 or more, .warp_share a share"),
        ({"brightness": -0.1}, "must be 0 or more, .warp_share a share"),
        ({"warp_share": 1.5}, "must be 0 or more, .warp_share a share"),
    ],
)
def test_impossible_augmentation_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)
