"""Find a checkpoint and load its model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pipelines.runtime.run_folder import CHECKPOINTS
from shards.images.files import ImageFormat
from shards.sample import DataError
from unet import DataSpec, UNet, UNetConfig, weights
from unet.model import read_config


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A trained model, in evaluation mode, with its data spec."""

    model: UNet
    spec: DataSpec
    digest: str
    """sha256 of its weights file."""

    @property
    def image_format(self) -> ImageFormat:
        """How images must be decoded for the model."""
        return ImageFormat(self.spec.channels, self.spec.alpha, self.spec.image_range)


def load_model(checkpoint: str) -> LoadedModel:
    """Load the model of a run folder (`best`, else `last`), a checkpoint folder or a hub id.

    Raises DataError if the checkpoint is missing, damaged or has no data spec.
    """
    try:
        folder = weights.find_folder(str(find_checkpoint(checkpoint)))
        model = UNet.from_pretrained(str(folder))
        with (folder / weights.WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise DataError(f"--checkpoint {checkpoint}: {error}") from error
    except OSError as error:
        raise DataError(
            f"--checkpoint {checkpoint} is neither a local folder nor a model on the hub: {error}"
        ) from error
    if model.spec is None:
        raise DataError(
            f"--checkpoint {checkpoint}: config.json has no data spec (classes, normalisation)"
        )
    return LoadedModel(model, model.spec, digest)


def load_config(checkpoint: str) -> UNetConfig:
    """Read the model config of a checkpoint, as `load_model` finds it, without its weights.

    Raises DataError if the checkpoint is missing or damaged.
    """
    try:
        folder = weights.find_folder(str(find_checkpoint(checkpoint)))
        return read_config(weights.read_header(folder), folder)
    except (ValueError, OSError) as error:
        raise DataError(f"--checkpoint {checkpoint}: {error}") from error


def require_spec(model: UNet) -> DataSpec:
    """Return the data spec of a model that was built or loaded with one."""
    assert model.spec is not None
    return model.spec


def find_checkpoint(checkpoint: str) -> Path | str:
    """Return the folder with the weights, or a hub id unchanged.

    Raises DataError for a path that does not exist and a run folder without a checkpoint.
    """
    folder = Path(checkpoint)
    if (folder / CHECKPOINTS).is_dir():
        for name in ("best", "last"):
            if (folder / CHECKPOINTS / name).is_dir():
                return (folder / CHECKPOINTS / name).resolve()
        raise DataError(f"--checkpoint {checkpoint}: the run has no checkpoint yet")
    if not folder.is_dir() and (
        folder.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1
    ):
        raise DataError(f"--checkpoint {checkpoint} does not exist")
    if not folder.is_dir() and "/" not in checkpoint:
        raise DataError(
            f"--checkpoint {checkpoint} is neither a local folder nor a hub id (owner/name)"
        )
    return folder if folder.is_dir() else checkpoint
