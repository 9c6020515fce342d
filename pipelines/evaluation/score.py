"""Scores of a split, exact for any number of ranks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.evaluation.objects import ImageObjects
from pipelines.evaluation.per_image import ImageCounts
from pipelines.loading.batches import eval_batches
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch
from pipelines.model.forward import make_forward
from pipelines.model.load import require_spec
from pipelines.runtime.progress import progress
from shards.sample import DataError
from unet import Ensemble, MaskRule, TileConfig, UNet, predict_mask
from unet.calibration import BlockCounts, observe_blocks
from unet.masks import ARGMAX
from unet.metrics import Empty, Scores, SegmentationScores, confusion_per_image
from unet.spec import counted_classes
from unet.surface import SurfaceScores

Predict = Callable[[Iterator[Batch]], Iterator[tuple[Batch, Tensor]]]
"""Batches -> each batch with its predicted class indices, uint8 [B, H, W]."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """What to compute for a split, besides its confusion matrix."""

    empty: Empty = "skip"
    """Score of a class that is absent from mask and prediction."""
    surface: SurfaceScores | None = None
    """Boundary scores, on the accelerator's device; the caller reduces them."""
    images: ImageCounts | None = None
    """Counts per image of this rank; the caller gathers them."""
    objects: ImageObjects | None = None
    """Counts of objects per image of this rank; the caller gathers them."""
    probabilities: tuple[BlockCounts, ...] = ()
    """Counts of the probabilities of a model, on the device; the caller reduces them."""

    def update(self, prediction: Tensor, batch: Batch, confusion: Tensor) -> None:
        """Add the images of a batch.

        Args:
            prediction: class indices uint8 [B, H, W].
            batch: the images with their masks.
            confusion: int64 [B, K, K], from `unet.metrics.confusion_per_image`.
        """
        if self.surface is not None:
            self.surface.update(prediction, batch.mask)
        if self.images is not None:
            height, width = batch.mask.shape[1:]
            self.images.update(confusion, batch.position, (height, width))
        if self.objects is not None:
            self.objects.update(prediction, batch.mask, batch.position)


MEANS_ONLY = Metrics()


class IncompleteScoresError(DataError):
    """Not every image was scored."""


@torch.inference_mode()
def score(
    model: UNet | Ensemble,
    accelerator: Accelerator,
    data: DataSet,
    split: str,
    tiles: TileConfig,
    metrics: Metrics = MEANS_ONLY,
    num_images: int | None = None,
    rule: MaskRule = ARGMAX,
    stop: Callable[[], bool] | None = None,
) -> Scores:
    """Predict every image of a split with the unwrapped model and score it; see `count_split`.

    `num_images`: predict only that many, evenly spread over the split; `rule`: how probabilities
    become a mask. `stop`: asked before each batch whether this rank leaves out the rest.
    """
    spec, was_training = require_spec(model), model.training
    assert spec.classes == data.manifest.classes
    forward = make_forward(model, accelerator)

    def predict(batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        for batch in batches:
            if stop is not None and stop():
                return
            observe = observe_blocks(metrics.probabilities, batch.mask)
            prediction, _ = predict_mask(forward, batch.image, tiles, model, rule, observe)
            yield batch, prediction

    model.eval()
    size = tiles.effective_batch_size
    scores = count_split(predict, accelerator, data, split, size, metrics, num_images)
    model.train(was_training)
    return scores


@torch.inference_mode()
def count_split(
    predict: Predict,
    accelerator: Accelerator,
    data: DataSet,
    split: str,
    batch_size: int,
    metrics: Metrics = MEANS_ONLY,
    num_images: int | None = None,
) -> Scores:
    """Compare predictions with the masks of every image of a split, at its own size.

    The only communication is the reduction of the counts at the end. Every rank must call this and
    gets the scores. Raises IncompleteScoresError, on every rank, if not every sample was counted.
    """
    num_samples = num_images or data.manifest.split(split, data.store).samples
    classes, device = data.manifest.classes, accelerator.device
    confusions = SegmentationScores(classes, counted_classes(classes), metrics.empty).to(device)
    batches = eval_batches(
        data,
        split,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        num_images=num_images,
        pin=device.type == "cuda",
    )
    with progress(
        total=num_samples,
        desc=f"evaluate {split}",
        unit="image",
        leave=False,
        disable=not accelerator.is_main_process,
    ) as bar:
        for batch, prediction in predict(batch.to(device) for batch in batches):
            confusion = confusion_per_image(prediction, batch.mask, len(classes))
            confusions.add(confusion)
            metrics.update(prediction, batch, confusion)
            # An estimate that assumes equal progress on all ranks.
            estimate = len(batch.position) * accelerator.num_processes
            bar.update(min(estimate, num_samples - bar.n))
    scores = confusions.scores()
    if scores.num_images != num_samples:
        raise IncompleteScoresError(
            f"{scores.num_images} samples of {split} were scored, but it has {num_samples}"
        )
    return scores
