"""The images that the models of folds held out: val of one fold, or those of all folds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.drawing.panels import Example
from pipelines.evaluation.per_image import open_counts
from pipelines.evaluation.results import ScoredSplit, record_tiles, write_results
from pipelines.evaluation.score import Metrics, count_split
from pipelines.loading.dataset import DataSet, LoadingOptions, open_data, split_bytes_in_use
from pipelines.loading.stages import Batch
from pipelines.model.forward import Forward, make_forward
from pipelines.model.load import LoadedModel, list_folds, load_models
from pipelines.model.trained_fold import TrainedFold
from pipelines.runtime.devices import choose_batch_size
from pipelines.runtime.errors import UsageError
from shards.folds import CUT, assign_folds
from shards.manifest import Manifest, read_manifest
from shards.sample import DataError
from unet import TileConfig, UNet, predict_mask
from unet.calibration import BlockCounts, observe_blocks

CROSS_VALIDATED = "cross-validated"
"""Split of all samples of train and val: those that fold 1 held out, then those of fold 2, ..."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A data set, in which val or cross-validated are what the models of folds held out."""

    manifest: Manifest
    message: str = ""
    """What the split is, if it is not that of the data set."""
    sizes: tuple[int, ...] = ()
    """Of cross-validated: number of images of each fold."""
    models: tuple[int, ...] = ()
    """Of cross-validated: number of the model of each fold, from 0."""


def hold_out(
    manifest: Manifest,
    data: str,
    split: str,
    names: Sequence[str],
    folds: Sequence[TrainedFold | None],
) -> HeldOut:
    """Return the data set in which no image of a split to score was trained on, if it was cut.

    Args:
        manifest: manifest of the data set.
        data: its folder or URL.
        split: split to score.
        names: the flag and each model, for messages.
        folds: what each model was trained on.

    Raises:
        UsageError: each of several models trained on a part of the split.
        DataError: the split is cross-validated, and the models are not those of all folds.
    """
    if split == CROSS_VALIDATED:
        return hold_out_each(manifest, data, names, folds)
    known = [(name, fold) for name, fold in zip(names, folds, strict=True) if fold is not None]
    if split not in CUT or not known:
        return HeldOut(manifest)
    for name, fold in known:
        if fold.manifest != manifest.digest:
            return HeldOut(
                manifest,
                f"warning: {name} is fold {fold.fold} of other data than {data}; whether {split} "
                "has images that it was trained on is unknown",
            )
    if len(folds) > 1:
        name, fold = known[0]
        raise UsageError(
            f"--split {split}: {name} is fold {fold.fold} and was trained on a part of it, as the "
            f"others were; use --checkpoint RUNS --split {CROSS_VALIDATED}, which scores "
            "each image by the model that held it out, or --split test"
        )
    ((name, fold),) = known
    manifest = assign_folds(data, manifest, fold.count).hold_out(fold.number)
    what = {"val": "held out", "train": "was trained on"}[split]
    num_images = manifest.split(split, data).samples
    return HeldOut(
        manifest, f"{name} is fold {fold.fold}: {split} is the {num_images} images that it {what}"
    )


def hold_out_each(
    manifest: Manifest, data: str, names: Sequence[str], folds: Sequence[TrainedFold | None]
) -> HeldOut:
    """Return the data set with the split cross-validated, as `hold_out`."""
    numbers: dict[int, int] = {}
    for model, (name, fold) in enumerate(zip(names, folds, strict=True)):
        if fold is None:
            raise DataError(
                f"--split {CROSS_VALIDATED}: {name} was not trained with --fold; it takes the runs "
                "of unet train --folds"
            )
        if fold.manifest != manifest.digest:
            raise DataError(
                f"--split {CROSS_VALIDATED}: {name} is fold {fold.fold} of other data than "
                f"{data}; use the data that it was trained on"
            )
        first = folds[0]
        if first is not None and fold.count != first.count:
            raise DataError(
                f"--split {CROSS_VALIDATED}: {name} is fold {fold.fold}, {names[0]} fold "
                f"{first.fold}; they must be folds of one cut"
            )
        if (other := numbers.setdefault(fold.number, model)) != model:
            raise DataError(
                f"--split {CROSS_VALIDATED}: {names[other]} and {name} are both fold "
                f"{fold.fold}; leave one out"
            )
    count = next(fold.count for fold in folds if fold is not None)
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise DataError(
            f"--split {CROSS_VALIDATED}: no model of fold {', '.join(missing)}; run "
            f"unet train --fold {missing[0]}"
        )
    cut = assign_folds(data, manifest, count)
    return HeldOut(
        cut.concatenate(CROSS_VALIDATED),
        f"{CROSS_VALIDATED}: each image by the model of the fold, of {count}, that held it out",
        cut.sizes(),
        tuple(numbers[number] for number in range(1, count + 1)),
    )


class FoldModels:
    """The models of all folds. Each image is predicted by the one that held it out.

    One model is on the device at a time.
    """

    def __init__(
        self,
        members: Sequence[UNet],
        held_out: HeldOut,
        accelerator: Accelerator,
        tiles: TileConfig,
        probabilities: tuple[BlockCounts, ...] = (),
    ) -> None:
        """`probabilities`: counts of the probabilities of the split."""
        self.probabilities = probabilities
        self.models = [members[number] for number in held_out.models]
        self.ends = [*accumulate(held_out.sizes)]
        self.tiles, self.device = tiles, accelerator.device
        self.forwards = [make_forward(model, accelerator) for model in self.models]
        self.placed: int | None = None

    def place(self, fold: int) -> Forward:
        """Move the model of a fold to the device, and the previous one back to the host."""
        if self.placed != fold:
            if self.placed is not None:
                self.models[self.placed].cpu()
            self.models[fold].to(self.device).eval()
            self.placed = fold
        return self.forwards[fold]

    def attach(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its predictions, uint8 [B, H, W]."""
        for batch in batches:
            yield batch, self.predict(batch.image, batch.position.tolist(), batch.mask)

    def predict(
        self, image: Tensor, positions: Sequence[int], mask: Tensor | None = None
    ) -> Tensor:
        """Predict images uint8 [B, C, H, W] at positions of the split: uint8 [B, H, W].

        `mask`: of the images, uint8 [B, H, W], to count their probabilities.
        """
        folds = np.searchsorted(self.ends, positions, side="right")
        prediction = torch.empty(
            (len(image), *image.shape[2:]), dtype=torch.uint8, device=self.device
        )
        for fold in np.unique(folds).tolist():
            rows = np.flatnonzero(folds == fold).tolist()
            network = self.models[fold]
            observe = None if mask is None else observe_blocks(self.probabilities, mask[rows])
            prediction[rows], _ = predict_mask(
                self.place(fold), image[rows], self.tiles, network, observe=observe
            )
        return prediction

    @torch.inference_mode()
    def load_examples(self, data: DataSet, positions: Sequence[int]) -> Iterator[Example]:
        """Predict the images at some positions of the split one by one, in this process alone.

        Raises DataError if a sample cannot be read or has no mask.
        """
        samples = data.samples(CROSS_VALIDATED, positions)
        for position, (sample, mask) in zip(positions, samples, strict=True):
            image = torch.tensor(sample.image).permute(2, 0, 1)[None].to(self.device)
            prediction = self.predict(image, [position])
            yield Example(sample.key, sample.image, mask, prediction[0].cpu().numpy())


def score_folds(
    loaded: LoadedModel,
    held_out: HeldOut,
    accelerator: Accelerator,
    data: DataSet,
    tiles: TileConfig,
    measured: Metrics,
) -> ScoredSplit:
    """Score the split cross-validated; every rank must call this.

    Args:
        loaded: the models of all folds, in host memory.
        held_out: of these models.
        accelerator: device and ranks.
        data: the data set of `held_out`.
        tiles: how images are predicted.
        measured: what to compute.
    """
    models = FoldModels(loaded.members, held_out, accelerator, tiles, measured.probabilities)
    size = tiles.effective_batch_size
    scores = count_split(models.attach, accelerator, data, CROSS_VALIDATED, size, measured)
    about = {"checkpoint": loaded.digest, "folds": len(held_out.sizes), **record_tiles(tiles)}
    return ScoredSplit(scores, about, partial(models.load_examples, data))


def cross_validate(
    runs: Path, data: str, loading: LoadingOptions, tiles: TileConfig, accelerator: Accelerator
) -> None:
    """Score the runs fold-1, fold-2, ... of a folder; print the table and write it there.

    Every rank must call this. Raises DataError as `hold_out`.
    """
    loaded = load_models([str(runs)], on_host=True)
    manifest = read_manifest(data, "--data")
    manifest = replace(manifest, image_format=loaded.stored_format(manifest.image_format))
    names = [f"--run-dir {run}" for run in list_folds(runs)]
    held_out = hold_out(manifest, data, CROSS_VALIDATED, names, loaded.folds)
    if accelerator.is_main_process:
        print(held_out.message, flush=True)
    tiles = replace(tiles, batch_size=choose_batch_size(tiles.batch_size, accelerator.device))
    in_use = split_bytes_in_use(held_out.manifest, CROSS_VALIDATED)
    opened = open_data(
        data, loading, held_out.manifest, [CROSS_VALIDATED], accelerator, in_use, "raise it"
    )
    images = open_counts(opened, CROSS_VALIDATED, tiles, accelerator)
    scored = score_folds(loaded, held_out, accelerator, opened, tiles, Metrics(images=images))
    rows = images.gather(accelerator)
    if rows is not None:
        write_results(runs, opened, CROSS_VALIDATED, scored, rows)
