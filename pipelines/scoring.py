"""Scores of a model over a split: exact, for any number of ranks."""

import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.batches import eval_batches
from pipelines.checkpoint import require_spec
from pipelines.dataset import DataSet
from shards.sample import DataError
from unet import Scores, SegmentationScores, TileConfig, UNet, predict_mask


def make_forward(model: UNet, accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """uint8 pictures [B, C, H, W] -> logits, in the precision of the accelerator."""
    spec = require_spec(model)

    def forward(image: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(spec.normalise(image.to(accelerator.device, non_blocking=True)))

    return forward


@torch.inference_mode()
def score(
    model: UNet,
    accelerator: Accelerator,
    data: DataSet,
    split_name: str,
    tiles: TileConfig,
) -> Scores:
    """Score the unwrapped model on every picture of a split, at its own size.

    Ranks meet once, when the counts are added. Every rank must call this; all get the scores.
    Raises DataError if not every sample was seen.
    """
    spec = require_spec(model)
    split = data.manifest.split(split_name, data.store)
    was_training = model.training
    model.eval()
    metric = SegmentationScores(spec.classes, spec.counted).to(accelerator.device)
    batches = eval_batches(
        data,
        split_name,
        batch_size=tiles.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        pin=accelerator.device.type == "cuda",
    )
    forward = make_forward(model, accelerator)
    with tqdm(
        total=split.samples,
        desc=f"evaluate {split_name}",
        unit="image",
        leave=False,
        disable=not (sys.stderr.isatty() and accelerator.is_main_process),
    ) as bar:
        for batch in batches:
            batch = batch.to(accelerator.device)
            prediction, _ = predict_mask(forward, batch.image, tiles)
            metric.update(prediction, batch.mask)
            bar.update(len(batch.position) * accelerator.num_processes)
    scores = metric.scores()
    model.train(was_training)
    if scores.num_images != split.samples:
        raise DataError(
            f"{scores.num_images} samples of {split_name} were scored, it has {split.samples}"
        )
    return scores


def show(value: float | None) -> str:
    """A score in eight characters."""
    return "     n/a" if value is None else f"{value:8.4f}"


def headline(scores: Scores, split: str) -> str:
    """The mean scores in a line."""
    dice, iou = show(scores.macro.dice).strip(), show(scores.macro.iou).strip()
    return f"{split}/dice {dice}, {split}/iou {iou}"


def table(scores: Scores) -> str:
    """The scores for people: a line for each class, then the means."""
    width = max(12, *(len(c.name) for c in scores.classes)) + 2
    lines = [f"{'class':<{width}}    Dice     IoU    prec.  recall"]
    for c in scores.classes:
        mark = "" if scores.classes.index(c) in scores.counted else "  (in no mean)"
        lines.append(
            f"{c.name:<{width}}{show(c.dice)}{show(c.iou)}{show(c.precision)}{show(c.recall)}{mark}"
        )
    for name, mean in (
        ("macro", scores.macro),
        ("micro", scores.micro),
        ("per image", scores.per_image),
    ):
        lines.append(f"{name:<{width}}{show(mean.dice)}{show(mean.iou)}")
    return "\n".join(lines)


def named(scores: Scores, split: str) -> dict[str, float | None]:
    """The scores by the names that metrics.jsonl and the tracker use."""
    values = {f"{split}/dice": scores.macro.dice, f"{split}/iou": scores.macro.iou}
    for c in scores.classes:
        values[f"{split}/dice/{c.name}"] = c.dice
        values[f"{split}/iou/{c.name}"] = c.iou
    return values
