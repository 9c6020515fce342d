"""What `unet evaluate` measures on request, besides the scores: calibration, objects."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from pipelines.evaluation.calibration import find_calibration
from pipelines.evaluation.findings import Finding
from pipelines.evaluation.objects import (
    ImageObjects,
    find_objects,
    refuse_other_classes,
)
from pipelines.evaluation.per_image import ImageCounts
from pipelines.evaluation.temperature import fit_temperature, format_temperature
from pipelines.loading.dataset import DataSet
from pipelines.model.load import LoadedModel
from pipelines.model.temperature import find_temperature_folder, write_temperature
from pipelines.runtime.errors import UsageError
from pipelines.runtime.outputs import require_writable
from shards.masks.borders import has_scipy, needs_scipy
from unet import TileConfig
from unet.calibration import BlockCounts, CalibrationCounts, TemperatureCounts
from unet.metrics import sum_over_ranks

OF_MODEL = ("calibration", "fit_temperature", "calibrated")
"""Options that need the probabilities of a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceOptions:
    """Calibration, objects and doubtful masks."""

    calibration: bool = False
    """Also measure how far probabilities can be trusted: ECE, reliability and average precision per
    class; with two classes, also the threshold with the best Dice. Writes OUT/calibration.csv."""
    fit_temperature: bool = False
    """Fit a temperature to the probabilities of val, by likelihood, and store it beside the
    checkpoint (temperature.json), for --calibrated."""
    calibrated: bool = False
    """Apply the temperature that is stored beside the checkpoint to its probabilities."""
    objects: bool = False
    """Two classes only: also score the connected components of the second one, on the CPU:
    precision, recall and F1 at an IoU above 0.5, count error, areas. Writes OUT/objects.csv.
    Requires unet-shards[scipy]."""
    suspects: int = 0
    """Number of doubtful masks to list: the images whose mask and prediction disagree most, in
    OUT/suspects.csv, and with both outlines in OUT/suspects.png."""

    def refuse_conflicts(self, split: str) -> None:
        """Raise ValueError for options that do not fit together or are out of range."""
        if self.suspects < 0:
            raise ValueError(f"--suspects must be >= 0, got {self.suspects}")
        if self.fit_temperature and split != "val":
            raise ValueError(f"--fit-temperature requires --split val, not {split}")
        if self.fit_temperature and self.calibrated:
            raise ValueError("--fit-temperature has no effect with --calibrated; leave one out")
        if self.calibrated and not self.calibration:
            raise ValueError(
                "--calibrated requires --calibration; it changes no mask, and so no other score"
            )


class Evidence:
    """Counts of what the options ask for, on the device, while a split is scored."""

    def __init__(
        self,
        options: EvidenceOptions,
        loaded: LoadedModel | None,
        data: DataSet,
        images: ImageCounts,
        accelerator: Accelerator,
    ) -> None:
        """`loaded`: the model, if any; `images`: counts per image of the same split."""
        self.loaded, self.data, self.accelerator = loaded, data, accelerator
        self.objects = ImageObjects(images) if options.objects else None
        self.names, device = data.manifest.classes, accelerator.device
        self.histograms = self.likelihood = None
        self.losses: list[Tensor] | None = None
        if options.calibration:
            self.histograms = CalibrationCounts(len(self.names)).to(device)
        if options.fit_temperature:
            self.likelihood = TemperatureCounts().to(device)

    @property
    def probabilities(self) -> tuple[BlockCounts, ...]:
        """The counts to which probabilities are added."""
        return tuple(one for one in (self.histograms, self.likelihood) if one is not None)

    def find(self, split: str) -> list[Finding]:
        """Reduce the counts over all ranks and describe them; every rank must call this."""
        findings = []
        if self.likelihood is not None:
            self.losses = sum_over_ranks(self.likelihood)
        if self.histograms is not None:
            assert self.loaded is not None
            temperature = self.loaded.temperature
            findings.append(find_calibration(self.histograms, self.names, temperature))
        if self.objects is not None:
            found = find_objects(self.objects, self.data, split, self.accelerator)
            findings += [] if found is None else [found]
        return findings

    def store_temperature(self, checkpoints: tuple[str, ...], tiles: TileConfig) -> None:
        """Fit the temperature, if asked for, after `find`, and store it beside the checkpoint."""
        if self.losses is None:
            return
        assert self.loaded is not None
        assert isinstance(self.loaded.digest, str)
        manifest = self.data.manifest.digest
        fitted = fit_temperature(self.losses, self.loaded.digest, manifest, tiles)
        folder = find_temperature_folder(checkpoints, "--fit-temperature")
        print(f"{format_temperature(fitted)}; stored in {write_temperature(folder, fitted)}")


def refuse_impossible(
    options: EvidenceOptions, checkpoints: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    """Raise UsageError, RunError or DataError if what the options ask for cannot be done.

    Objects require SciPy and two classes; a temperature one checkpoint in a writable folder.
    """
    if options.objects:
        if not has_scipy():
            raise UsageError(needs_scipy("--objects"))
        refuse_other_classes(classes)
    if options.fit_temperature:
        folder = find_temperature_folder(checkpoints, "--fit-temperature")
        require_writable("--fit-temperature", folder, "copy the checkpoint to a writable folder")
