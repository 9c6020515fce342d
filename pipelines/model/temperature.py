"""The temperature of a checkpoint, stored beside it by `unet evaluate --fit-temperature`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pipelines.model.load import LoadedModel, expand_folds, find_checkpoint
from pipelines.runtime.errors import UsageError
from shards.documents import Positive, Sha256, decode
from shards.local_files import read_file
from shards.sample import DataError
from shards.writer import write_json
from unet import TileConfig, weights
from unet.temperature import TEMPERATURES

FILE = "temperature.json"
REMEDY = "fit it again (unet evaluate --fit-temperature)"
Loss = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Temperature:
    """Contents of temperature.json."""

    temperature: Annotated[float, msgspec.Meta(ge=TEMPERATURES[0], le=TEMPERATURES[-1])]
    checkpoint: Sha256
    """sha256 of the weights that it belongs to."""
    manifest: Sha256
    """sha256 of the manifest of the data set that it was fitted on."""
    split: Literal["val"]
    num_pixels: Positive
    nll_before: Loss
    """Mean negative log-likelihood of a pixel at the temperature 1."""
    nll: Loss
    """Mean negative log-likelihood of a pixel at `temperature`."""
    tile: Positive
    overlap: Annotated[float, msgspec.Meta(ge=0, le=1)]
    tta: bool


def find_temperature_folder(checkpoints: Sequence[str], flag: str) -> Path:
    """Return the folder of a checkpoint, local, in which its temperature is stored.

    Raises UsageError naming `flag` for several checkpoints (an ensemble) or one on the hub.
    """
    named = [path for checkpoint in checkpoints for path in expand_folds(checkpoint)]
    if len(named) != 1:
        raise UsageError(
            f"{flag}: a temperature belongs to one checkpoint, got {len(named)}; the average of an "
            "ensemble has none"
        )
    found = find_checkpoint(named[0])
    if not isinstance(found, Path):
        raise UsageError(f"{flag}: {named[0]} is not a local checkpoint; download it first")
    return weights.find_folder(str(found))


def write_temperature(folder: Path, temperature: Temperature) -> Path:
    """Write temperature.json atomically; returns its path."""
    path = folder / FILE
    write_json(path, asdict(temperature))
    return path


def apply_calibration(
    loaded: LoadedModel, checkpoints: Sequence[str], tiles: TileConfig
) -> tuple[LoadedModel, list[str]]:
    """Return the model with its stored temperature, and messages about it.

    Raises UsageError if it has none, DataError if it is damaged or that of other weights.
    """
    path = find_temperature_folder(checkpoints, "--calibrated") / FILE
    if not path.exists():
        raise UsageError(
            f"--calibrated: {path} does not exist; fit it with unet evaluate --fit-temperature"
        )
    stored = decode(read_file(path), Temperature, path, REMEDY)
    if stored.checkpoint != loaded.digest:
        raise DataError(f"--calibrated: {path} is that of other weights; {REMEDY}")
    messages = [
        f"warning: the temperature was fitted with --{name} {getattr(stored, name)}, not "
        f"{getattr(tiles, name)}"
        for name in ("tile", "overlap", "tta")
        if getattr(stored, name) != getattr(tiles, name)
    ]
    messages.insert(0, f"--calibrated: temperature {stored.temperature:g}, {path}")
    return replace(loaded, temperature=stored.temperature), messages
