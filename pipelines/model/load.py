"""Find checkpoints and load their models."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.model.checkpoint_files import (
    find_best,
    hash_file,
    list_checkpoints,
    verify_model,
)
from pipelines.model.trained_fold import TrainedFold, read_trained_fold
from pipelines.runtime.errors import UsageError, describe_read_error
from pipelines.runtime.run_folder import RunFolder
from shards.images.files import ImageFormat
from shards.local_files import refuse_special_files
from shards.sample import DataError
from unet import DataSpec, Ensemble, TileConfig, UNet, UNetConfig, members_of, weights
from unet.model import read_config

EnsemblePlace = Literal["device", "host"]
"""Memory that holds the members of an ensemble."""
PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
"""Extensions of files that torch.save writes."""
MEMBER_SPEC = (
    *("classes", "channels", "image_range", "alpha", "exif", "frame", "resize", "max_pixels"),
)
"""Fields of the data spec that the models of an ensemble share."""
GEOMETRY = ("exif", "frame", "resize")
"""Rules that are applied when images are packed."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A trained model, in evaluation mode, with its data spec."""

    model: UNet | Ensemble
    spec: DataSpec
    digest: str | list[str]
    """sha256 of its weights file; of an ensemble, of each member's."""
    reading_changes: dict[str, Any] = field(default_factory=dict)
    """Fields of `spec` that flags have replaced."""
    folds: tuple[TrainedFold | None, ...] = (None,)
    """Fold that each member was trained on; None: the whole train split."""
    temperature: float = 1.0
    """At which its probabilities are taken, from temperature.json with --calibrated."""

    @property
    def members(self) -> Sequence[UNet]:
        """The members of an ensemble, or the model as the only one."""
        return members_of(self.model)

    @property
    def image_format(self) -> ImageFormat:
        """How image files are decoded for it."""
        spec = self.spec
        return ImageFormat(
            channels=spec.channels,
            alpha=spec.alpha,
            range=spec.image_range,
            max_pixels=spec.max_pixels,
            exif=spec.exif,
            frame=spec.frame,
            resize=spec.resize,
        )

    def refuse_unused(self, tiles: TileConfig) -> None:
        """Raise UsageError for an overlap or flips that have no effect on these networks."""
        if tiles.tta and not self.model.mirrors:
            raise UsageError(
                "--tta: the model was trained with --augment.orientation fixed, without flips; "
                "remove it"
            )
        if self.model.config.margin and tiles.overlap != TileConfig().overlap:
            raise UsageError(
                f"--overlap {tiles.overlap:g}: has no effect on this network of valid "
                "convolutions, whose tiles need none; remove it"
            )

    def stored_format(self, packed: ImageFormat) -> ImageFormat:
        """Return how images of a data set are decoded for it: accepted as when they were packed.

        Raises DataError if they have 16 bits and the model knows no range of values.
        """
        if packed.range is not None and self.spec.image_range is None:
            raise DataError(
                f"the data has 16-bit images (range {packed.range[0]} {packed.range[1]}), but the "
                "checkpoint was trained on 8-bit images; train on data of the same kind"
            )
        max_pixels = self.reading_changes.get("max_pixels", packed.max_pixels)
        return ImageFormat(self.spec.channels, packed.alpha, self.spec.image_range, max_pixels)

    def describe_differences(self, packed: ImageFormat) -> list[str]:
        """Describe how a data set was packed with other rules than the training data."""
        trained = self.image_format
        pairs = [(f"--{name}", getattr(packed, name), getattr(trained, name)) for name in GEOMETRY]
        if packed.range is not None:
            pairs.append(("--image-range", packed.range, trained.range))
        return [
            f"warning: the data was packed with {flag} {own}, the training data of the checkpoint "
            f"with {other}"
            for flag, own, other in pairs
            if own != other
        ]


def load_model(checkpoint: str, flag: str = "--checkpoint") -> LoadedModel:
    """Load the model of a run folder (its `best`, else `last`), a checkpoint folder or a hub id.

    Raises DataError naming `flag` and what is missing or damaged.
    """
    try:
        folder = weights.find_folder(str(find_checkpoint(checkpoint, flag)))
        refuse_special_files(folder)
        refuse_damage(checkpoint, folder, flag)
        model = UNet.from_pretrained(str(folder))
        digest = hash_file(folder / weights.WEIGHTS)
        fold = read_trained_fold(folder)
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise DataError(f"{flag} {checkpoint}: {error}") from error
    except PermissionError as error:
        raise DataError(f"{flag} {describe_read_error(error)}") from error
    except OSError as error:
        raise DataError(
            f"{flag} {checkpoint}: does not exist here and was not found on the hub: {error}"
        ) from error
    if model.spec is None:
        raise DataError(
            f"{flag} {checkpoint}: config.json has no data spec (classes, mean, std); save the "
            "model with UNet(config, spec)"
        )
    return LoadedModel(model, model.spec, digest, folds=(fold,))


def load_models(checkpoints: Sequence[str], *, on_host: bool = False) -> LoadedModel:
    """Load one model, as `load_model`, or several as an ensemble.

    Args:
        checkpoints: as `load_model` takes them; a folder of runs fold-1, fold-2, ... stands
            for all of them.
        on_host: whether the members of an ensemble stay in host memory.

    Raises DataError naming what is missing or damaged, or the member that differs from the first.
    """
    named = [path for checkpoint in checkpoints for path in expand_folds(checkpoint)]
    loaded = [load_model(path) for path in named]
    for path, other in zip(named[1:], loaded[1:], strict=True):
        refuse_other_member(named[0], loaded[0], path, other)
    if len(loaded) == 1:
        return loaded[0]
    models = Ensemble((one.members[0] for one in loaded), on_host=on_host)
    folds = tuple(fold for one in loaded for fold in one.folds)
    return LoadedModel(models, loaded[0].spec, [str(one.digest) for one in loaded], folds=folds)


def expand_folds(checkpoint: str) -> list[str]:
    """Return the runs fold-1, fold-2, ... of a folder, or the checkpoint itself if it has none."""
    folds = list_folds(Path(checkpoint))
    return [str(path) for path in folds] or [checkpoint]


def refuse_no_checkpoint(checkpoints: Sequence[str]) -> None:
    """Raise ValueError if `--checkpoint` names none."""
    if not checkpoints:
        raise ValueError("--checkpoint must name at least one")


def list_folds(folder: Path) -> list[Path]:
    """List the runs of folds in a folder, in the order of their numbers."""
    found = [path for path in folder.glob("fold-*") if re.fullmatch("fold-[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("fold-")))


def refuse_other_member(first: str, loaded: LoadedModel, path: str, other: LoadedModel) -> None:
    """Raise DataError naming what the model `other` of an ensemble has unlike the first."""
    pairs = [(name, getattr(loaded.spec, name), getattr(other.spec, name)) for name in MEMBER_SPEC]
    pairs.append(("margin", loaded.model.config.margin, other.model.config.margin))
    for name, own, value in pairs:
        if own != value:
            theirs, ours = (", ".join(v) if name == "classes" else v for v in (value, own))
            raise DataError(
                f"--checkpoint {path} has {name} {theirs}, {first} has {ours}; the models of an "
                "ensemble must agree"
            )


def load_config(checkpoint: str, flag: str) -> UNetConfig:
    """Read the model config of a checkpoint, as `load_model` finds it, without its weights.

    Raises DataError naming `flag` if the checkpoint is missing or damaged.
    """
    try:
        folder = weights.find_folder(str(find_checkpoint(checkpoint, flag)))
        refuse_special_files(folder)
        return read_config(weights.read_header(folder), folder)
    except (ValueError, OSError) as error:
        raise DataError(f"{flag} {checkpoint}: {error}") from error


def refuse_damage(checkpoint: str, folder: Path, flag: str) -> None:
    """Raise DataError if a checkpoint differs from its checksums; print if its run lost its links.

    Args:
        checkpoint: what `flag` names: a run folder, checkpoint folder or hub id.
        folder: the checkpoint folder.
        flag: for the message.
    """
    run = RunFolder(Path(checkpoint))
    if run.checkpoints.is_dir() and not (run.best.is_dir() or run.last.is_dir()):
        print(f"{flag} {checkpoint}: best and last are lost; using {folder.name}", file=sys.stderr)
    try:
        verify_model(folder)
    except DataError as error:
        raise DataError(f"{flag} {checkpoint}: {error}; use another checkpoint") from error


def require_spec(model: UNet | Ensemble) -> DataSpec:
    """Return the data spec of a model that was built for data or loaded by `load_model`."""
    assert model.spec is not None
    return model.spec


def find_checkpoint(checkpoint: str, flag: str = "--checkpoint") -> Path | str:
    """Return the folder with the weights; a hub id is returned unchanged.

    Raises DataError naming `flag` if it is neither.
    """
    folder = Path(checkpoint)
    run = RunFolder(folder)
    if run.checkpoints.is_dir():
        for link in (run.best, run.last):
            if link.is_dir():
                return link.resolve()
        if newest := list_checkpoints(run):
            return find_best(run) or newest[0]
        raise DataError(
            f"{flag} {checkpoint}: this run has not saved a checkpoint yet; rerun unet train"
        )
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{flag} {checkpoint}: {explain_file(folder)}")
    if folder.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1:
        raise DataError(f"{flag} {checkpoint}: does not exist; check the path")
    if "/" not in checkpoint:
        raise DataError(
            f"{flag} {checkpoint}: is neither a local folder nor a hub id (owner/name); check "
            "the spelling"
        )
    return checkpoint


def explain_file(file: Path) -> str:
    """Return the problem and the remedy for a file in place of a checkpoint folder."""
    if file.name in (weights.WEIGHTS, weights.HEADER):
        return f"is a file of a checkpoint; use its folder {file.parent}"
    if file.suffix.lower() in PICKLES:
        return (
            "is a PyTorch file (a pickle), not a checkpoint folder; convert one of "
            "milesial/Pytorch-UNet in Python: UNet.from_milesial(FILE, spec).save_pretrained(DIR)"
        )
    return "is a file, not a run folder, checkpoint folder or hub id"
