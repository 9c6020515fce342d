"""Find and load a trained model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pipelines.runtime.run_folder import RunFolder
from shards.images.files import ImageFormat
from shards.sample import DataError
from unet import DataSpec, UNet, weights


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model to evaluate or predict with."""

    model: UNet
    spec: DataSpec
    digest: str
    """sha256 of its weights file."""

    @property
    def image_format(self) -> ImageFormat:
        """How images are decoded for it."""
        return ImageFormat(self.spec.channels, self.spec.alpha, self.spec.image_range)


def load_model(checkpoint: str) -> LoadedModel:
    """The model of a run folder (its `best`, else `last`), a checkpoint folder or a hub id.

    Raises DataError saying what is missing or damaged.
    """
    try:
        folder = weights.find_folder(str(find_checkpoint(checkpoint)))
        model = UNet.from_pretrained(str(folder))
        with (folder / weights.WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"--checkpoint {checkpoint}: {error}") from error
    except OSError as error:
        raise DataError(
            f"--checkpoint {checkpoint} is no folder and was not found on the hub: {error}"
        ) from error
    if model.spec is None:
        raise DataError(
            f"--checkpoint {checkpoint}: config.json says nothing of classes and pixels"
        )
    return LoadedModel(model, model.spec, digest)


def require_spec(model: UNet) -> DataSpec:
    """What a model that was built for data, or loaded here, knows of its data."""
    assert model.spec is not None
    return model.spec


def find_checkpoint(checkpoint: str) -> Path | str:
    """The folder with the weights, or the hub id as it is."""
    folder = Path(checkpoint)
    run = RunFolder(folder)
    if run.checkpoints.is_dir():
        for link in (run.best, run.last):
            if link.is_dir():
                return link.resolve()
        raise DataError(f"--checkpoint {checkpoint}: this run has saved no checkpoint yet")
    if not folder.is_dir() and (
        folder.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1
    ):
        raise DataError(f"--checkpoint {checkpoint} does not exist")
    if not folder.is_dir() and "/" not in checkpoint:
        raise DataError(
            f"--checkpoint {checkpoint} is neither a folder here nor a hub id (owner/name)"
        )
    return folder if folder.is_dir() else checkpoint
