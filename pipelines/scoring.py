"""Scores of a model over a split: exact, for any number of ranks."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.batches import Batch
from pipelines.checkpoint import require_spec
from pipelines.config import RunError
from pipelines.counting import count_split
from pipelines.dataset import DataSet
from pipelines.failures import out_of_memory, summary
from pipelines.per_image import ImageCounts
from unet import (
    Empty,
    Scores,
    Surface,
    SurfaceScores,
    TileConfig,
    UNet,
    predict_mask,
)

SCORES = "scores.json"


MeanName = Literal["dice", "iou", "image_dice", "image_iou"]
"""Means over the classes that count: over all pixels, or over those of single pictures."""


class TileTooLargeError(RunError):
    """One tile alone does not fit into the memory of a GPU."""

    def __init__(self, height: int, width: int, reason: str) -> None:
        """`reason`: the message of torch, which may mean something else."""
        super().__init__(
            f"a tile of {height} x {width} pixels alone does not fit into the memory of this GPU "
            f"({reason}); lower --tile, to {max(height, width) // 2} perhaps"
        )
        self.height, self.width, self.reason = height, width, reason


def make_forward(model: UNet, accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """uint8 pictures [B, C, H, W] -> logits, in the precision of the accelerator.

    A batch that does not fit into a GPU's memory is halved until it does, and so are those after
    it; that is said once. Raises TileTooLargeError where half of it would be no picture.
    """
    spec, device = require_spec(model), accelerator.device
    most, said, reason = sys.maxsize, False, ""

    def attempt(image: Tensor) -> Tensor | None:
        nonlocal reason
        try:
            parts = [compute(part) for part in image.split(min(most, len(image)))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # Only the text is kept: the traceback, which holds what was allocated, ends here.
            reason = summary(error)
            return None

    def compute(image: Tensor) -> Tensor:
        if device.type == "cuda" and image.device.type == "cpu":
            # Else the copy would wait for all that the GPU has to do.
            image = image.pin_memory()
        with accelerator.autocast():
            # Elsewhere, on MPS for one, memory may be used again before an overlapped copy is done.
            overlap = device.type == "cuda"
            return model(spec.normalise(image.to(device, non_blocking=overlap)))

    def forward(image: Tensor) -> Tensor:
        nonlocal most, said
        before = most
        while (logits := attempt(image)) is None:
            size = min(most, len(image))
            if size == 1:
                height, width = image.shape[-2:]
                raise TileTooLargeError(height, width, reason)
            most = size // 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if most < before and not said:
            said = True
            tqdm.write(
                f"{len(image)} tiles at a time do not fit into the memory of this GPU ({device}): "
                f"going on with {most}, as --batch-size {most} would have from the start",
                file=sys.stderr,
            )
        return logits

    return forward


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
    """Score the unwrapped model on every picture of a split, at its own size.

    Ranks meet once, when the counts are added. Every rank must call this; all get the scores.
    `surface`, on the accelerator's device, and `images` are shown the same pictures; what they
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
        batch_size=tiles.num_together,
        empty=empty,
        surface=surface,
        images=images,
    )
    model.train(was_training)
    return scores


def mean_of(scores: Scores, name: MeanName) -> float | None:
    """One of the mean scores."""
    means = scores.per_image if name.startswith("image_") else scores.macro
    return means.iou if name.endswith("iou") else means.dice


def show(value: float | None) -> str:
    """A score in eight characters."""
    return "     n/a" if value is None else f"{value:8.4f}"


def headline(scores: Scores, split: str) -> str:
    """The mean scores in a line."""
    dice, iou = show(scores.macro.dice).strip(), show(scores.macro.iou).strip()
    return f"{split}/dice {dice}, {split}/iou {iou}"


def show_surface(hd95: float | None, surface_dice: float | None, failures: int) -> str:
    """Three columns of the table."""
    distance = f"{'n/a':>9}" if hd95 is None else f"{hd95:9.2f}"
    return f"{distance}{show(surface_dice)}{failures:8d}"


def table(scores: Scores, surface: Surface | None = None) -> str:
    """The scores for people: a line for each class, then the means.

    HD95 is in pixels; it and surface Dice are means per image in every line.
    """
    width = max(12, *(len(c.name) for c in scores.classes)) + 2
    more = "" if surface is None else "     HD95   sDice  failed"
    lines = [f"{'class':<{width}}    Dice     IoU    prec.  recall{more}"]
    for i, c in enumerate(scores.classes):
        line = f"{c.name:<{width}}{show(c.dice)}{show(c.iou)}{show(c.precision)}{show(c.recall)}"
        if surface is not None:
            s = surface.classes[i]
            line += show_surface(s.hd95, s.surface_dice, s.surface_failures)
        lines.append(line if i in scores.counted else f"{line}  (in no mean)")
    for name, mean in (
        ("macro", scores.macro),
        ("micro", scores.micro),
        ("per image", scores.per_image),
    ):
        lines.append(f"{name:<{width}}{show(mean.dice)}{show(mean.iou)}")
    if surface is not None:
        means = show_surface(surface.hd95, surface.surface_dice, surface.surface_failures)
        lines[-1] += f"{'':16}{means}"
    return "\n".join(lines)


def to_plain(scores: Scores, surface: Surface | None = None) -> dict[str, Any]:
    """What `scores.json` holds."""
    plain = scores.to_plain()
    if surface is not None:
        plain["surface_tolerance"] = surface.tolerance
        plain["per_image"] |= {"hd95": surface.hd95, "surface_dice": surface.surface_dice}
        plain["surface_failures"] = surface.surface_failures
        for c in surface.classes:
            plain["classes"][c.name] |= {
                "hd95": c.hd95,
                "surface_dice": c.surface_dice,
                "surface_failures": c.surface_failures,
            }
    return plain


def named(scores: Scores, split: str) -> dict[str, float | None]:
    """The scores by the names that metrics.jsonl and the tracker use."""
    values = {f"{split}/dice": scores.macro.dice, f"{split}/iou": scores.macro.iou}
    for c in scores.classes:
        values[f"{split}/dice/{c.name}"] = c.dice
        values[f"{split}/iou/{c.name}"] = c.iou
    return values
