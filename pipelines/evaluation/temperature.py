"""Fit the temperature of a checkpoint on the val split."""

from collections.abc import Sequence
from math import exp, log

from torch import Tensor

from pipelines.model.temperature import Temperature
from shards.sample import DataError
from unet import TileConfig
from unet.calibration import UNIT
from unet.temperature import TEMPERATURES


def fit_temperature(
    sums: Sequence[Tensor], checkpoint: str, manifest: str, tiles: TileConfig
) -> Temperature:
    """Fit a temperature by the negative log-likelihood of a split.

    The minimum is that of a parabola, in log T, through the best of `TEMPERATURES` and its two
    neighbours, within 0.5 %.

    Args:
        sums: those of `TemperatureCounts` over all ranks.
        checkpoint: sha256 of the weights.
        manifest: sha256 of the manifest.
        tiles: how the images were predicted.

    Raises DataError if no pixel counts, or if the minimum is not between 1/4 and 16.
    """
    losses, num_pixels = sums
    number = int(num_pixels)
    if not number:
        raise DataError("--fit-temperature: val has no pixel with a class")
    nll = [loss / UNIT / number for loss in losses.tolist()]
    best = min(range(len(nll)), key=lambda place: nll[place])
    low, high = TEMPERATURES[0], TEMPERATURES[-1]
    if best in (0, len(nll) - 1):
        raise DataError(
            f"--fit-temperature: the likelihood of val has no maximum between the temperatures "
            f"{low:g} and {high:g}; train longer, or on more images, and check the masks"
        )
    before, lowest, after = nll[best - 1 : best + 2]
    # Vertex of the parabola, in steps from the best one; between -1/2 and 1/2.
    step = (before - after) / 2 / max(before - 2 * lowest + after, 1e-300)
    size = log(TEMPERATURES[best + 1] / TEMPERATURES[best])
    return Temperature(
        temperature=round(TEMPERATURES[best] * exp(step * size), 4),
        checkpoint=checkpoint,
        manifest=manifest,
        split="val",
        num_pixels=number,
        nll_before=nll[TEMPERATURES.index(1)],
        nll=max(0.0, lowest - (before - after) * step / 4),
        tile=tiles.tile,
        overlap=tiles.overlap,
        tta=tiles.tta,
    )


def format_temperature(temperature: Temperature) -> str:
    """Describe a fitted temperature in a line."""
    return (
        f"temperature {temperature.temperature:g}: negative log-likelihood of val "
        f"{temperature.nll_before:.4f} -> {temperature.nll:.4f}"
    )
