"""Import of milesial/Pytorch-UNet checkpoints: equal outputs, nothing unpickled."""

import pytest
import torch
from milesial import Milesial
from torch import nn

from unet import DataSpec, UNet

SPEC = DataSpec(
    classes=("background", "car"),
    palette=((0, 0, 0), (255, 255, 255)),
    channels="RGB",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    crop_size=512,
)


def trained(in_channels=3, num_classes=2, width=4):
    """Make a network with non-trivial batch norm statistics."""
    torch.manual_seed(0)
    model = Milesial(in_channels, num_classes, width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for _ in range(2):
        model(torch.randn(2, in_channels, 32, 48))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    def save(model, **extra):
        path = tmp_path / "checkpoint_epoch5.pth"
        torch.save({**model.state_dict(), **extra}, path)
        return path

    return save


@torch.inference_mode()
def test_an_imported_checkpoint_gives_the_same_logits(saved):
    theirs = trained()
    ours = UNet.from_milesial(saved(theirs, mask_values=[0, 255]))
    image = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
    assert not ours.training


def test_every_parameter_is_imported(saved):
    theirs = trained(in_channels=1, num_classes=5)
    ours = UNet.from_milesial(saved(theirs))
    assert (ours.config.in_channels, ours.config.num_classes, ours.config.norm) == (1, 5, "batch")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@torch.inference_mode()
def test_a_one_class_head_becomes_an_equivalent_two_class_head(saved):
    theirs = trained(num_classes=1)
    image = torch.randn(1, 3, 32, 32)
    probability = UNet.from_milesial(saved(theirs))(image).softmax(dim=1)
    torch.testing.assert_close(probability[:, 1:], theirs(image).sigmoid())


def test_weights_saved_from_data_parallel_are_imported(tmp_path):
    theirs = trained()
    path = tmp_path / "parallel.pth"
    torch.save({f"module.{name}": t for name, t in theirs.state_dict().items()}, path)
    ours = UNet.from_milesial(path)
    assert torch.equal(ours.head.weight, theirs.outc.conv.weight)


@torch.inference_mode()
def test_an_imported_model_can_be_saved_and_loaded(saved, tmp_path):
    ours = UNet.from_milesial(saved(trained()), SPEC)
    ours.save_pretrained(tmp_path / "model")
    loaded = UNet.from_pretrained(tmp_path / "model")
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(loaded.spec.normalise(image)), ours(SPEC.normalise(image)))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was executed",))


def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"inc.double_conv.0.weight": Bomb()}, path)
    with pytest.raises(ValueError, match=r"bomb.pth cannot be loaded with weights_only"):
        UNet.from_milesial(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv1.weight": torch.zeros(1)}, "is not a checkpoint of milesial/Pytorch-UNet: unexp"),
        ({}, "is not a checkpoint of milesial/Pytorch-UNet: it has no weights"),
        ({"state_dict": {}, "epoch": 3}, "is not a checkpoint of milesial/Pytorch-UNet"),
        ({"outc.conv.weight": torch.zeros(())}, "has no transposed convolutions"),
        (torch.zeros(3), "cannot be loaded with weights_only"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"other.pth {message}"):
        UNet.from_milesial(path)


def test_the_bilinear_variant_is_refused(saved):
    model = trained()
    for up in (model.up1, model.up2, model.up3, model.up4):
        up.up = nn.Identity()
    with pytest.raises(ValueError, match="--bilinear"):
        UNet.from_milesial(saved(model))


def test_a_missing_file_or_tensor_is_refused_by_name(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        UNet.from_milesial(tmp_path / "absent.pth")
    model = trained()
    path = saved(model)
    for name, message in {
        "down2.maxpool_conv.1.double_conv.3.weight": r"downs\.2\.conv\.3\.weight is missing from",
        "outc.conv.bias": r"has no head\.bias of 1 dimensions",
        "inc.double_conv.0.weight": r"has no downs\.0\.conv\.0\.weight of 4 dimensions",
    }.items():
        state = model.state_dict()
        del state[name]
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            UNet.from_milesial(path)
