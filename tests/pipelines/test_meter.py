"""`training.meter`, `training.flops`.

FLOPs and memory in metrics.jsonl: counted exactly, without cost.
"""

from types import SimpleNamespace

import pytest
import torch

from pipelines.training import meter
from pipelines.training.flops import PEAKS, count_flops, peak_tflops
from pipelines.training.meter import Meter, PeakMemory
from unet import PRESETS, Encoder, UNet, UNetConfig, find_stages

TINY = UNetConfig(base_channels=2, depth=1, norm="none")


def count_by_hand(config: UNetConfig, batch: int, side: int) -> int:
    """Multiply-adds of a padded U-Net of depth 1, twice: once forward, twice backward."""
    c, classes, half = config.base_channels, config.num_classes, side // 2
    first = side**2 * 9 * config.in_channels * c
    rest = side**2 * 9 * c * c
    bottom = half**2 * 9 * (c * 2 * c + 2 * c * 2 * c)
    up = half**2 * 4 * (2 * c * c)
    last = side**2 * (9 * (2 * c * c + c * c) + c * classes)
    # The first convolution needs no gradient of the image.
    return 2 * batch * (2 * first + 3 * (rest + bottom + up + last))


@pytest.mark.parametrize(("batch", "side"), [(1, 16), (3, 32)])
def test_flops_are_those_counted_by_hand(batch: int, side: int) -> None:
    assert count_flops(TINY, batch, side) == count_by_hand(TINY, batch, side)


def test_flops_of_the_modern_preset_are_those_of_the_pass_itself() -> None:
    # 36.97 TFLOP for 32 crops of 512 x 512.
    assert count_flops(PRESETS["modern"], 32, 512) / 1e12 == pytest.approx(36.967, abs=1e-3)
    assert count_flops(PRESETS["paper"], 1, 572) > 0


def test_flops_of_a_frozen_encoder_are_those_of_its_forward_pass() -> None:
    pytest.importorskip("transformers", reason="the extra `encoders` is not installed")
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8}
    encoder = find_stages({"model_type": "resnet", "layer_type": "basic", **sizes}, 3)
    config = UNetConfig(base_channels=2, depth=5, encoder=encoder)
    with torch.device("meta"):
        backbone = Encoder(encoder)
        image = torch.empty(2, 3, 64, 64)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as forward:
        maps = backbone(image)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as backward:
        torch.stack([of_stage.sum() for of_stage in maps]).sum().backward()
    assert backward.get_total_flops() > forward.get_total_flops()
    # Nor does the transposed convolution at the bottom need the gradient of its input: 32 channels
    # of 2 x 2 pixels, to 32 channels of 4 x 4.
    bottom = 2 * 2 * (2 * 2) * 4 * 32 * 32
    all_of_it = count_flops(config, 2, 64)
    frozen = count_flops(config, 2, 64, frozen_encoder=True)
    assert all_of_it - frozen == backward.get_total_flops() + bottom


def test_counting_changes_no_random_state_and_counts_no_recomputation() -> None:
    config = UNetConfig(base_channels=2, depth=2, dropout=0.5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    counted = count_flops(config, 2, 32)
    assert torch.equal(torch.get_rng_state(), before)
    # A real pass with recomputation does more; the count is of the pass without it.
    model = UNet(config)
    flops = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 3, 32, 32)).sum().backward()
        flops.append(counter.get_total_flops())
    assert counted == flops[0] < flops[1]


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        # Neither of these has bf16 in its matrix units.
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        # Float32 and TF32 have other peaks.
        ("NVIDIA H100 80GB HBM3", "no", None),
        # Other cards, and parts of cards, with names that start alike.
        ("NVIDIA A10M", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_card_and_the_precision(
    name: str, precision: str, expected: float | None
) -> None:
    assert peak_tflops(name, precision) == expected


def test_no_name_fits_two_peaks() -> None:
    names = [pattern.replace(".*", "-X") for pattern, _, _ in PEAKS]
    assert [peak_tflops(name, "fp16") for name in names] == [tflops for _, tflops, _ in PEAKS]


def test_the_memory_of_a_gpu_is_its_peak_since_the_last_line(monkeypatch) -> None:
    peaks, resets = iter([3 * 2**30, 5 * 2**30, 2 * 2**30]), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    memory = PeakMemory(torch.device("cuda", 0))
    read = [memory.read() for _ in range(3)]
    assert [values["train/gpu_memory_gib"] for values in read] == [3, 5, 2]
    assert [values["train/memory_gib"] for values in read] == [3, 5, 5]
    assert len(resets) == 4


def test_rates_are_of_all_passes_since_the_last_line(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gradient_accumulation_steps=2,
        scaler=None,
        mixed_precision="bf16",
        reduce=lambda tensor, reduction: tensor,
    )
    rates = Meter(["dice"], accelerator, flops=4 * 10**12)
    assert rates.peak is None
    # As if it were an H100.
    rates.peak = 989.0
    for _ in range(6):
        rates.add(torch.tensor([1.0, 0.5]), ())
    now[0] = 3.0
    values = rates.read(global_batch_size=16)
    assert values["train/tflops"] == pytest.approx(6 * 4 / 3)
    assert values["train/mfu"] == pytest.approx(8 / 989)
    assert values["train/samples_per_second"] == pytest.approx(3 * 16 / 3)
