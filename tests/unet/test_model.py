"""`model`, `config`, `spec`, `blocks`, `weights`.

The U-Net: presets, input sizes, independence of the batch, and weights on disk.
"""

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unet import PRESETS, DataSpec, UNet, UNetConfig, valid_input
from unet.blocks import make_norm
from unet.spec import pixel_scale

SPEC = DataSpec(
    classes=("background", "cell"),
    palette=((0, 0, 0), (10, 200, 30)),
    channels="RGB",
    mean=(0.5, 0.25, 0.125),
    std=(0.1, 0.2, 0.3),
    crop_size=64,
)


@pytest.fixture
def paper():
    return UNet.from_preset("paper", in_channels=1, num_classes=2)


def tiny(**changes):
    fields = {"base_channels": 2, "depth": 2, "in_channels": 3, "num_classes": 2, **changes}
    return UNet(UNetConfig(**fields), SPEC).eval()


def tiny_valid(depth):
    return tiny(depth=depth, padding="valid", norm="none", in_channels=1)


def test_the_paper_preset_has_the_31030658_parameters_of_2015(paper):
    assert sum(p.numel() for p in paper.parameters()) == 31_030_658


def test_the_paper_preset_has_23_convolution_layers(paper):
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert sum(isinstance(m, kinds) for m in paper.modules()) == 23
    assert not any(isinstance(m, nn.GroupNorm | nn.BatchNorm2d) for m in paper.modules())


def test_the_paper_preset_has_dropout_at_the_end_of_the_contracting_path(paper):
    dropping = [name for name, m in paper.named_modules() if isinstance(m, nn.Dropout)]
    assert dropping == ["downs.3.conv.6", "bottom.6"]
    assert paper.bottom[6].p == 0.5


def test_the_paper_preset_maps_572_to_388_through_the_sizes_of_figure_1():
    # One base channel instead of 64: sizes do not depend on it.
    model = UNet.from_preset("paper", in_channels=1, num_classes=2, base_channels=1).eval()
    sizes = []

    def record(module, inputs, output):
        sizes.append(output.shape[-1])

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.MaxPool2d):
            module.register_forward_hook(record)
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    down = [570, 568, 284, 282, 280, 140, 138, 136, 68, 66, 64, 32, 30, 28]
    up = [56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388, 388]
    assert sizes == down + up


@pytest.mark.parametrize(("depth", "smallest", "out"), [(1, 18, 2), (2, 44, 4), (3, 92, 4)])
def test_the_smallest_valid_size_works_and_one_step_less_is_refused(depth, smallest, out):
    model = tiny_valid(depth)
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, smallest, smallest)).shape[-2:] == (out, out)
        step = 2**depth
        with pytest.raises(ValueError, match=f"nearest are {smallest} and {smallest + step}"):
            model(torch.zeros(1, 1, smallest, smallest - step))


def test_188_to_4_is_the_smallest_size_at_depth_4():
    model = tiny_valid(4)
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 188, 204)).shape == (1, 2, 4, 20)
        with pytest.raises(ValueError, match="got 172; the nearest are 188 and 204"):
            model(torch.zeros(1, 1, 172, 188))


@pytest.mark.parametrize(("side", "near"), [(573, "572 and 588"), (571, "556 and 572")])
def test_an_invalid_size_names_the_two_nearest(side, near):
    with pytest.raises(ValueError, match=rf"124 \+ 16b pixels, got {side}; the nearest are {near}"):
        tiny_valid(4)(torch.zeros(1, 1, 572, side))


def test_valid_sizes_are_16b_plus_124_to_16b_minus_60():
    table = {valid_input(output, 4): output for output in (4, 20, 36, 372, 388, 404, 820)}
    assert table == {16 * b + 124: 16 * b - 60 for b in (4, 5, 6, 27, 28, 29, 55)}
    assert (valid_input(1, 4), valid_input(5, 4), valid_input(388, 4)) == (188, 204, 572)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_margin_is_what_valid_convolutions_remove(depth):
    model = tiny_valid(depth)
    side = valid_input(17, depth)
    with torch.inference_mode():
        logits = model(torch.zeros(1, 1, side, side))
    assert side - logits.shape[-1] == 2 * model.config.margin
    assert 17 <= logits.shape[-1] < 17 + 2**depth
    assert tiny().config.margin == 0


CONFIGS = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 3),
        "base_channels": st.sampled_from([1, 3, 4]),
        "in_channels": st.sampled_from([1, 3]),
        "num_classes": st.sampled_from([2, 5]),
        "norm": st.sampled_from(["group", "batch", "instance", "none"]),
        "up": st.sampled_from(["transpose", "bilinear"]),
        "activation": st.sampled_from(["relu", "leaky_relu", "silu"]),
        "dropout": st.sampled_from([0.0, 0.5]),
    }
)


@settings(max_examples=60)
@given(config=CONFIGS, height=st.integers(1, 21), width=st.integers(1, 21))
def test_padded_networks_accept_any_size_from_one_pixel(config, height, width):
    model = UNet(UNetConfig(**config)).eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, config["in_channels"], height, width))
    assert logits.shape == (2, config["num_classes"], height, width)
    assert logits.isfinite().all()


@settings(max_examples=40)
@given(config=CONFIGS, height=st.integers(1, 40), width=st.integers(1, 40))
def test_valid_networks_accept_every_valid_size(config, height, width):
    model = UNet(UNetConfig(**config, padding="valid")).eval()
    sides = [valid_input(side, config["depth"]) for side in (height, width)]
    with torch.inference_mode():
        logits = model(torch.randn(1, config["in_channels"], *sides))
    assert [*logits.shape[-2:]] == [side - 2 * model.config.margin for side in sides]


@pytest.mark.parametrize("channels_last", [False, True])
def test_instance_norm_equals_torchs(channels_last):
    ours, theirs = make_norm("instance", 6).double(), nn.InstanceNorm2d(6, affine=True).double()
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.uniform_(-1, 1)
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(3, 6, 17, 20, dtype=torch.float64) * torch.rand(3, 6, 1, 1)
    gradient, found = torch.rand_like(image), []
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for norm in (ours, theirs):
        x = image.clone(memory_format=layout).requires_grad_()
        y = norm(x)
        y.backward(gradient)
        found.append((y, x.grad, norm.weight.grad, norm.bias.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["modern", "small"])
def test_the_padded_presets_use_padding_and_instance_norm(name):
    assert (PRESETS[name].padding, PRESETS[name].norm) == ("same", "instance")
    model = UNet.from_preset(name, in_channels=3, num_classes=4, base_channels=2).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 33, 17)).shape == (1, 4, 33, 17)


@settings(max_examples=30)
@given(config=CONFIGS, valid=st.booleans())
def test_gradients_reach_every_parameter(config, valid):
    torch.manual_seed(0)
    config = {**config, "base_channels": 4, "dropout": 0.0}
    model = UNet(UNetConfig(**config, padding="valid" if valid else "same")).train()
    side = valid_input(17, config["depth"]) if valid else 16
    model(torch.randn(2, config["in_channels"], side, side)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def gradients(model, image):
    """Compute parameter gradients of a loss on the logits, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(5)
    model(image).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradient_checkpointing_keeps_fewer_activations_and_equal_gradients():
    torch.manual_seed(0)
    model = tiny(dropout=0.5, base_channels=4).train()
    image = torch.randn(2, 3, 32, 32)
    plain, kept = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: plain.append(t) or t, lambda t: t):
        expected = gradients(model, image)
    model.gradient_checkpointing = True
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(image)
    assert sum(t.numel() for t in kept) < sum(t.numel() for t in plain) / 2
    for gradient, other in zip(gradients(model, image), expected, strict=True):
        assert torch.equal(gradient, other)


@torch.inference_mode()
def test_bilinear_upsampling_equals_interpolation_and_a_1x1_convolution():
    up = tiny(up="bilinear", base_channels=4).ups[0].up
    x = torch.randn(1, 16, 5, 7)
    larger = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(up(x), up[0](larger), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_channels_last_gives_equal_logits():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    for norm in ("group", "batch", "instance", "none"):
        model = tiny(norm=norm, base_channels=4)
        expected = model(image)
        other = model.to(memory_format=torch.channels_last)(image)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_logits_under_autocast_are_close_to_float32():
    torch.manual_seed(0)
    model, image = tiny(base_channels=4), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(image), rtol=0.1, atol=0.1)


def test_under_group_norm_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = tiny(base_channels=16).train()
    image, other = torch.randn(1, 3, 16, 16), 100 * torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        alone, beside = model(image), model(torch.cat([image, other]))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


def test_weights_are_initialised_as_in_he_et_al():
    torch.manual_seed(0)
    model = UNet(UNetConfig(base_channels=32, depth=1, norm="none"))
    weight = model.bottom[3].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert weight.mean().abs().item() < 1e-3
    up = model.ups[0].up.weight
    assert up.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'papre'; .* modern, paper, small"):
        UNet.from_preset("papre", in_channels=1, num_classes=2)


def test_a_preset_takes_fields_of_the_config_only():
    model = UNet.from_preset("small", in_channels=1, num_classes=3, depth=1, base_channels=2)
    assert model.config == UNetConfig(in_channels=1, num_classes=3, depth=1, base_channels=2)
    with pytest.raises(TypeError, match="basechannels"):
        UNet.from_preset("small", in_channels=1, num_classes=2, basechannels=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 256}, "num_classes must be at most 255, got 256"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"base_channels": 0}, "base_channels must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"depth": 10**100}, "depth must be at most"),
        ({"depth": 17}, "exceed 16,384 channels"),
        ({"in_channels": 10**12}, "in_channels must be at most"),
        ({"in_channels": True}, "in_channels must be an integer, got True"),
        ({"up": "nearest"}, "up must be one of transpose, bilinear"),
        (
            {"deep_supervision": True, "padding": "valid"},
            "deep_supervision must be off with padding",
        ),
        ({"activation": "gelu"}, "activation must be one of relu, leaky_relu, silu"),
    ],
)
def test_invalid_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**changes)


def test_all_classes_but_background_are_counted():
    assert SPEC.counted == (1,)
    spec = DataSpec(
        classes=("sky", "Background", "road"),
        palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
        channels="L",
        mean=(0.0,),
        std=(1.0,),
        crop_size=32,
    )
    assert spec.counted == (0, 2)


def test_images_are_normalised_by_mean_and_deviation_of_the_data_set():
    image = torch.tensor([255 // 2, 64, 32], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(127 / 255 - 0.5) / 0.1, (64 / 255 - 0.25) / 0.2, (32 / 255 - 0.125) / 0.3]
    result = SPEC.normalise(image)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [1, 5])
def test_normalised_images_are_contiguous_for_any_memory_format(side):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    result = SPEC.normalise(image)
    assert result.stride() == torch.empty(image.shape).stride()
    assert torch.equal(result, SPEC.normalise(image.contiguous()))


def test_normalising_does_not_modify_its_input():
    image = torch.full((1, 3, 2, 2), 100.0)
    torch.testing.assert_close(SPEC.normalise(image), SPEC.normalise(image.to(torch.uint8)))
    assert (image == 100).all()


@pytest.fixture
def empty_cache():
    """Clears cached constants before and after a test."""
    pixel_scale.cache_clear()
    yield
    pixel_scale.cache_clear()


@pytest.mark.usefixtures("empty_cache")
def test_normalising_copies_its_constants_to_a_device_once(dispatched):
    with FakeTensorMode():
        image = torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="cuda:0")
        with dispatched() as first:
            SPEC.normalise(image)
        with dispatched() as second:
            SPEC.normalise(image)
    assert sum(call.crosses for call in first) == 2
    assert not any(call.crosses for call in second)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("cached", [False, True])
def test_normalising_is_bit_identical_to_the_formula_and_can_be_traced(cached):
    image = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (SPEC.mean, SPEC.std))
    expected = (image.float() - mean) / std.clamp(min=1e-3)
    if cached:
        with torch.inference_mode():
            SPEC.normalise(image)

    class Normalise(torch.nn.Module):
        def forward(self, image):
            return SPEC.normalise(image)

    for strict in (False, True):
        program = torch.export.export(Normalise(), (image,), strict=strict)
        assert torch.equal(program.module()(image), expected)
    # Tracing leaves nothing in the cache; constants cached in inference mode work in training.
    assert torch.equal(SPEC.normalise(image), expected)
    assert not SPEC.normalise(image).is_inference()


@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 40)])
def test_deep_supervision_adds_logits_of_coarser_levels_in_training_only(height, width):
    torch.manual_seed(0)
    model = tiny(depth=3, num_classes=4, deep_supervision=True)
    plain = tiny(depth=3, num_classes=4)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("level_heads.")}
    )
    image = torch.randn(2, 3, height, width)
    assert torch.equal(model(image), plain(image))
    model.train()
    finest, *coarser = model(image)
    assert torch.equal(finest, plain(image))
    padded = [model.padded_side(side) for side in (height, width)]
    assert [part.shape for part in coarser] == [
        (2, 4, padded[0] // 2, padded[1] // 2),
        (2, 4, padded[0] // 4, padded[1] // 4),
    ]
    sum(part.sum() for part in (finest, *coarser)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.level_heads.parameters())
    assert not tiny(depth=1, deep_supervision=True).level_heads


def test_a_model_with_deep_supervision_is_saved_and_loaded(tmp_path):
    model = tiny(depth=3, deep_supervision=True)
    model.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    # Versions without it read the others.
    assert "deep_supervision" not in tiny().header()["model"]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_saved_model_loads_with_equal_logits_config_and_spec(tmp_path, norm):
    torch.manual_seed(1)
    model = tiny(norm=norm).train()
    model(torch.randn(4, 3, 16, 16))  # updates the running statistics of batch norm
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = UNet.from_pretrained(tmp_path / "saved")
    assert (loaded.config, loaded.spec) == (model.config, SPEC)
    assert not loaded.training
    image = torch.randn(2, 3, 9, 11)
    with torch.inference_mode():
        assert torch.equal(loaded(image), model(image))


def test_a_model_without_spec_loads_without_one(tmp_path):
    UNet(UNetConfig(base_channels=2, depth=1)).save_pretrained(tmp_path)
    assert UNet.from_pretrained(str(tmp_path)).spec is None


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_loading_never_unpickles(saved):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        FileNotFoundError, match=r"is not a checkpoint: it has no model\.safetensors"
    ):
        UNet.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged or not a safetensors file"
    ):
        UNet.from_pretrained(saved)


def test_a_folder_without_config_is_not_a_checkpoint(saved):
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it has no config\.json"):
        UNet.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.full_like(t, torch.nan), "contains NaN or infinity"),
        (lambda t: torch.full_like(t, torch.inf), "contains NaN or infinity"),
        (lambda t: t.long(), "has the type I64, the model needs a floating-point type"),
        (lambda t: t.to(torch.complex64), "has the type C64, the model needs a floating-point"),
        (lambda t: t.bool(), "has the type BOOL, the model needs a floating-point type"),
        (lambda t: t[None], "the model needs"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(saved, change, message):
    path = saved / "model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: \S+ (is \(1, .*)?{message}"):
        UNet.from_pretrained(saved)


def test_half_precision_weights_are_loaded_as_float32(saved):
    path = saved / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model = UNet.from_pretrained(saved)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [{"base_channels": 8192, "depth": 1}, {"depth": 14}])
def test_a_config_larger_than_its_weights_takes_no_memory(saved, size):
    path = saved / "config.json"
    header = json.loads(path.read_text())
    header["model"] |= {"base_channels": 1, **size}
    path.write_text(json.dumps(header))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"model\.safetensors: .*(the model needs|is missing)"):
        UNet.from_pretrained(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5, 0.5]}, "expected 3 numbers from 0 to 1"),
        ({"std": [0.5, 0.0, 0.5]}, "expected 3 numbers from 1e-09 to 1"),
        ({"std": [0.5, 0.5, -0.1]}, "expected 3 numbers from 1e-09 to 1"),
        ({"classes": ["a"]}, "palette colours, 1 classes"),
        ({"classes": "ab"}, "Expected `array`, got `str`"),
        ({"channels": "CMYK"}, "Invalid enum value 'CMYK'"),
        ({"crop_size": 0}, "crop_size must be at least 1"),
        ({"crop_size": 1.5}, "Expected `int`"),
        ({"image_range": [5, 5]}, "expected 0 <= low < high"),
    ],
)
def test_a_wrong_data_spec_is_refused_by_field(tmp_path, change, message):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    header = json.loads(path.read_text())
    header["data"] |= change
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        UNet.from_pretrained(tmp_path)


def test_truncated_weights_are_refused_by_name(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged or not a safetensors file"
    ):
        UNet.from_pretrained(saved)


def test_weights_of_another_model_are_refused_by_tensor(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if n != "head.bias"}, path)
    with pytest.raises(ValueError, match=r"head\.bias is missing from the file"):
        UNet.from_pretrained(saved)
    save_file({**tensors, "tail": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="tail is missing from the model"):
        UNet.from_pretrained(saved)
    save_file({**tensors, "head.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"head\.bias is \(3,\), the model needs \(2,\)"):
        UNet.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: {"architectures": ["Bert"]},
            "does not describe a U-Net: it has no 'model'; use a run folder",
        ),
        (
            lambda h: {**h, "model": {**h["model"], "heads": 8}},
            r"UNetConfig has no field 'heads' \(written by a newer version\?\)",
        ),
        (
            lambda h: {**h, "data": {**h["data"], "bands": 5}},
            "DataSpec has no field 'bands'",
        ),
        (
            lambda h: {**h, "data": {"classes": ["a", "b"]}},
            "missing required field `palette`",
        ),
        (
            lambda h: {**h, "model": {**h["model"], "depth": "2"}},
            r"Expected `int`, got `str` - at `\$\.depth`",
        ),
    ],
)
def test_a_foreign_config_is_refused_by_name(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        UNet.from_pretrained(saved)


def test_a_config_that_does_not_fit_the_weights_is_refused(saved):
    path = saved / "config.json"
    header = json.loads(path.read_text())
    header["model"]["base_channels"] = 4
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"is \(8, 4, 3, 3\), the model needs \(16, 8, 3, 3\)"):
        UNet.from_pretrained(saved)
