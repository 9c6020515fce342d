"""Scores of a model over a split: exact, for any number of ranks."""

import sys
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.evaluation.per_image import ImageCounts
from pipelines.loading.batches import eval_batches
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch
from pipelines.model.forward import make_forward
from pipelines.model.load import require_spec
from shards.sample import DataError
from unet import (
    Empty,
    Scores,
    SegmentationScores,
    SurfaceScores,
    TileConfig,
    UNet,
    confusion_per_image,
    predict_mask,
)
from unet.spec import counted_classes

Predict = Callable[[Iterator[Batch]], Iterator[tuple[Batch, Tensor]]]
"""Batches -> each of them with its predicted class indices, uint8 [B, H, W]."""


@torch.inference_mode()
def count_split(
    predict: Predict,
    accelerator: Accelerator,
    data: DataSet,
    split_name: str,
    *,
    batch_size: int,
    empty: Empty = "skip",
    surface: SurfaceScores | None = None,
    images: ImageCounts | None = None,
) -> Scores:
    """Compare predictions with the masks of every image of a split, at its own size.

    Ranks meet once, when the counts are added. Every rank must call this; all get the scores.
    `surface`, on the accelerator's device, and `images` are shown the same images; what they
    counted is left to the caller. Raises DataError if not every sample was seen.
    """
    split, classes = data.manifest.split(split_name, data.store), data.manifest.classes
    metric = SegmentationScores(classes, counted_classes(classes), empty).to(accelerator.device)
    batches = eval_batches(
        data,
        split_name,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        pin=accelerator.device.type == "cuda",
    )
    with tqdm(
        total=split.samples,
        desc=f"evaluate {split_name}",
        unit="image",
        leave=False,
        disable=not (sys.stderr.isatty() and accelerator.is_main_process),
    ) as bar:
        for batch, prediction in predict(batch.to(accelerator.device) for batch in batches):
            confusion = confusion_per_image(prediction, batch.mask, len(classes))
            metric.add(confusion)
            if surface is not None:
                surface.update(prediction, batch.mask)
            if images is not None:
                height, width = batch.mask.shape[1:]
                images.update(confusion, batch.position, (height, width))
            bar.update(len(batch.position) * accelerator.num_processes)
    scores = metric.scores()
    if scores.num_images != split.samples:
        raise DataError(
            f"{scores.num_images} samples of {split_name} were scored, it has {split.samples}"
        )
    return scores


@torch.inference_mode()
def score(
    model: UNet,
    accelerator: Accelerator,
    data: DataSet,
    split_name: str,
    tiles: TileConfig,
    *,
    empty: Empty = "skip",
    surface: SurfaceScores | None = None,
    images: ImageCounts | None = None,
) -> Scores:
    """Score the unwrapped model on every image of a split, at its own size.

    Ranks meet once, when the counts are added. Every rank must call this; all get the scores.
    `surface`, on the accelerator's device, and `images` are shown the same images; what they
    counted is left to the caller. Raises DataError if not every sample was seen.
    """
    spec, was_training = require_spec(model), model.training
    assert spec.classes == data.manifest.classes
    forward = make_forward(model, accelerator)

    def predict(batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        for batch in batches:
            prediction, _ = predict_mask(forward, batch.image, tiles, model.config)
            yield batch, prediction

    model.eval()
    scores = count_split(
        predict,
        accelerator,
        data,
        split_name,
        batch_size=tiles.effective_batch_size,
        empty=empty,
        surface=surface,
        images=images,
    )
    model.train(was_training)
    return scores
