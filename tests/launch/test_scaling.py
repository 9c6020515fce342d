"""The table in launch/README.md is computed by a script from its measurements."""

import re
import subprocess
import sys
from pathlib import Path

from unet import UNet

REPO = Path(__file__).resolve().parents[2]


def test_the_script_computes_a_ring_all_reduce_of_the_measured_gradients() -> None:
    command = ["tests/benchmarks/scaling.py", "--samples-per-second", "50", "--preset", "small"]
    bandwidth = ("--bandwidth", "0.01")
    ended = subprocess.run(
        [sys.executable, *command, *bandwidth], cwd=REPO, capture_output=True, text=True, check=True
    )
    model = UNet.from_preset("small", in_channels=3, num_classes=2)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d.]+) ms, exposed (\d+)%", ended.stdout, re.M)
    assert [int(row[0]) for row in rows] == [8, 64, 512]
    for world, batch, milliseconds, exposed in rows:
        ranks, step = int(world), 8 / 50
        assert batch == f"{8 * ranks:,}"
        seconds = 2 * (ranks - 1) / ranks * gradients / 1e7
        assert abs(float(milliseconds) / 1e3 - seconds) < 1e-3
        assert abs(int(exposed) / 100 - (seconds / step - 2 / 3)) < 0.02
