"""Validation in training: scores of the split, drawn examples, and a table of scores per image."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.drawing.panels import Example
from pipelines.evaluation import score
from pipelines.evaluation.examples import predict_examples
from pipelines.evaluation.groups import read_groups
from pipelines.evaluation.per_image import ImageCounts, image_scores, open_counts, split_keys
from pipelines.training.passes import uncompiled
from pipelines.training.setup import Training
from unet.metrics import Scores
from unet.spec import counted_classes


@dataclass(frozen=True, slots=True)
class Validation:
    """The scores of a validation."""

    scores: Scores
    images: ImageCounts | None
    """Counts per image of this rank; None: of a sample, or the tracker has no tables."""


def score_all(training: Training) -> Validation | None:
    """Score all of the validation split for the table at the end; None if a signal interrupts."""
    budget = training.budget
    try:
        if not budget.interrupted:
            return score_validation(training, None, stop=lambda: budget.stop_requested)
    except score.IncompleteScoresError:
        budget.agree()
        if not budget.interrupted:
            raise
    return None


def score_validation(
    training: Training, num_images: int | None, stop: Callable[[], bool] | None = None
) -> Validation:
    """Score `num_images` of the validation split, evenly spread; None: all. `stop`: see `score`."""
    config, accelerator, data = training.setup.config, training.accelerator, training.data
    images = None
    if num_images is None and training.tracker.takes_tables:
        images = open_counts(data, "val", config.tiles, accelerator)
    measured = score.Metrics(images=images)
    model = training.learner.scored
    with uncompiled(config.compute.compile):
        scores = score.score(
            model,
            accelerator,
            data,
            "val",
            config.tiles,
            measured,
            num_images=num_images,
            stop=stop,
        )
    return Validation(scores, images)


def predict_validation(training: Training) -> Iterator[Example]:
    """Predict a fixed selection of validation images, for drawing.

    Runs in this process alone. The model keeps its training mode.
    """
    config, data, model = training.setup.config, training.data, training.learner.scored
    num_images, max_images = data.manifest.splits["val"].samples, config.tracking.pictures
    positions = sorted({i * num_images // max_images for i in range(max_images)})
    was_training = model.training
    with uncompiled(config.compute.compile):
        yield from predict_examples(
            model, training.accelerator, data, "val", positions, config.tiles
        )
    model.train(was_training)


def track_images(training: Training, images: ImageCounts) -> None:
    """Track a table of the scores of every validation image, lowest Dice first.

    Every rank must call this.
    """
    rows = images.gather(training.accelerator)
    if rows is None:
        return
    data, names = training.data, training.setup.manifest.classes
    found = image_scores(rows, counted_classes(names))
    values = np.concatenate([found.macro, found.classes.reshape(len(rows), -1)], axis=1)
    columns = ["key", "width", "height", "group", "dice", "iou"]
    columns += [f"{kind}/{name}" for kind in ("dice", "iou") for name in names]
    groups, keys = read_groups(data, "val", range(len(rows))), [*split_keys(data, "val")]
    # NaN, of images without a score, is sorted to the end.
    order = np.argsort(found.macro[:, 0], kind="stable").tolist()
    cells = values.tolist()
    table = [
        [keys[n], *rows[n, :2].tolist(), groups[n], *(v if v == v else None for v in cells[n])]
        for n in order
    ]
    training.tracker.show_table(training.budget.step, "val/images", columns, table)
