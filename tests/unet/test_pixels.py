"""Serves unet/pixels.py and `UNet.predict`: an image in any form gives the mask of `unet
predict`."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shards.images.files import ImageFormat
from shards.images.pixels import decode_image
from unet import DataSpec, TileConfig, UNet, predict_mask
from unet.pixels import to_pixels

RGB = DataSpec(
    classes=("background", "cell"),
    palette=((0, 0, 0), (255, 0, 0)),
    channels="RGB",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.2),
    crop_size=32,
)
GREY = replace(RGB, channels="L", mean=(0.5,), std=(0.2,))
DEEP = replace(GREY, image_range=(100, 4100))


def noise(*shape: int, dtype: type = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("spec", [RGB, GREY], ids=["RGB", "L"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_pil_image_becomes_what_predict_decodes(mode: str, spec: DataSpec) -> None:
    image = Image.fromarray(noise(9, 7, 3)).convert(mode)
    form = ImageFormat(spec.channels)
    decoded = decode_image(png(image), form, "image")
    assert np.array_equal(np.moveaxis(to_pixels(image, spec).numpy(), 0, -1), decoded)


@pytest.mark.parametrize("channels", ["L", "RGB"])
def test_16_bit_images_are_scaled_as_predict_scales_them(channels: str) -> None:
    spec = DEEP if channels == "L" else replace(RGB, image_range=(100, 4100))
    values = noise(9, 7, dtype=np.uint16, high=5000)
    form = ImageFormat(spec.channels, range=spec.image_range)
    decoded = decode_image(png(Image.fromarray(values)), form, "image")
    for image in (values, Image.fromarray(values), values[:, :, None]):
        assert np.array_equal(np.moveaxis(to_pixels(image, spec).numpy(), 0, -1), decoded)


@pytest.mark.parametrize("spec", [RGB, GREY], ids=["RGB", "L"])
def test_arrays_tensors_and_pil_images_agree(spec: DataSpec) -> None:
    colour, grey = noise(9, 7, 3), noise(9, 7)
    expected = to_pixels(Image.fromarray(colour), spec)
    assert expected.dtype == torch.uint8
    assert expected.shape == (len(spec.mean), 9, 7)
    assert torch.equal(to_pixels(colour, spec), expected)
    assert torch.equal(to_pixels(torch.from_numpy(colour).permute(2, 0, 1), spec), expected)
    expected = to_pixels(Image.fromarray(grey), spec)
    forms = (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None])
    for image in forms:
        assert torch.equal(to_pixels(image, spec), expected)


@pytest.mark.parametrize(
    ("image", "spec", "message"),
    [
        (np.zeros((4, 4)), RGB, "dtype float64; expected uint8 or uint16"),
        (torch.zeros(3, 4, 4), RGB, "dtype float32; expected uint8 or uint16"),
        (noise(4, 4, 4), RGB, r"shape \(4, 4, 4\)"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), RGB, r"shape \(2, 4, 4\)"),
        (noise(1, 3, 4, 4), RGB, r"shape \(1, 3, 4, 4\)"),
        (noise(0, 4), GREY, r"shape \(0, 4, 1\)"),
        (noise(4, 4, dtype=np.uint16), GREY, "16-bit values"),
        (noise(4, 4, 3, dtype=np.uint16), DEEP, "16-bit colours"),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 9)), RGB, "transparent pixels"),
        (Image.new("F", (4, 4)), RGB, "mode F"),
    ],
)
def test_what_the_data_set_did_not_have_is_refused(
    image: np.ndarray, spec: DataSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_pixels(image, spec)


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize("size", [(1, 1), (40, 24), (70, 150)])
def test_predict_gives_the_mask_of_tiled_prediction(preset: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = UNet.from_preset(
        preset, in_channels=3, num_classes=2, base_channels=2, depth=2, spec=RGB
    ).train()
    image, tiles = noise(*size, 3), TileConfig(tile=64)
    mask = model.predict(image, tiles)
    assert mask.dtype == np.uint8
    assert mask.shape == size
    assert model.training
    model.eval()
    expected, _ = predict_mask(
        lambda pixels: model(RGB.normalise(pixels)),
        [torch.from_numpy(image).permute(2, 0, 1)],
        tiles,
        model.config,
    )
    assert np.array_equal(mask, expected[0].numpy())


def test_a_model_without_its_data_cannot_predict() -> None:
    model = UNet.from_preset("small", in_channels=3, num_classes=2, base_channels=2, depth=1)
    with pytest.raises(ValueError, match="no data spec"):
        model.predict(noise(8, 8, 3))
