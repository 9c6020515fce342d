"""Encode predicted masks as the members of a sample."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.drawing.overlay import draw_overlay
from pipelines.drawing.panels import side_by_side
from pipelines.inference.decoding import DecodedInput
from pipelines.inference.objects import OBJECTS_FOLDER, MaskObjects, describe_objects
from pipelines.inference.options import (
    PROBABILITIES_EXTENSION,
    WORK_DIR,
    ResultOptions,
    probability_extension,
)
from pipelines.inference.specks import count_values, remove_specks
from pipelines.model.load import LoadedModel
from pipelines.runtime.outputs import refuse_unusable_name
from shards.images.files import encode_png
from shards.masks.png import encode_mask
from shards.sample import IGNORE, INFO_EXTENSION, MASK_EXTENSION, DataError, Palette, Uint8
from shards.store import Store
from shards.writer import write_atomically

FIGURE = ".figure.png"
MAX_NAME_BYTES = 255
"""Bytes of a file name on Linux and macOS."""
FIGURE_SIDE = 1000
"""Longest side of an image in a figure, in pixels."""


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What the model predicts for one image."""

    classes: Uint8
    """[H, W]."""
    confidence: float
    """Mean probability of the chosen class."""
    unsure: NDArray[np.bool_] | None
    """[H, W]: pixels to ignore."""
    probabilities: NDArray[Any] | None
    """float16 [K, H, W], or uint16 [K - 1, H, W]: see `MaskRule.stored_dtype`."""
    counts: Sequence[int] | None = None
    """Pixels of each class, then of ignore; None if they are counted later."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        arrays = (self.classes, self.unsure, self.probabilities)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True, slots=True)
class EncodedPrediction:
    """One encoded result."""

    key: str
    members: dict[str, bytes]
    probabilities: dict[str, bytes]
    """Further members, not for training."""
    width: int
    height: int
    pixels: tuple[int, ...]
    """Pixels of each class, then of ignore."""
    objects: MaskObjects | None = None
    """With --objects."""


@dataclass(frozen=True, slots=True)
class ResultEncoder:
    """Encodes masks as members of a shard and, on request, as files beside it.

    Shared by threads, not processes: of a mask of 512 x 512 with two classes, a PNG takes 0.07 ms,
    most of it in zlib, which releases the interpreter lock. Counting pixels (0.55 ms) would hold
    it; the device counts them.
    """

    options: ResultOptions
    store: Store
    loaded: LoadedModel
    figure: bool
    """Whether to draw OUT/NAME.figure.png: there is only one image."""
    fail_fast: bool
    """Whether an input whose files cannot be written ends the job."""

    @property
    def draws(self) -> bool:
        """Whether images are needed beside their masks."""
        return self.options.overlay or self.figure

    def __call__(
        self, item: DecodedInput, output: ModelOutput | None
    ) -> EncodedPrediction | DecodedInput:
        """Encode a result; an input that could not be read is returned unchanged.

        One whose files cannot be written because of their names is returned with the error; with
        `fail_fast` it raises DataError.
        """
        if output is None:
            return item
        spec, options = self.loaded.spec, self.options
        if item.full_size is not None:
            output = enlarge_result(output, item.full_size)
        mask = output.classes
        if options.min_area > 1:
            mask = remove_specks(mask, options.min_area)
        if output.unsure is not None:
            # After the specks, so that only these pixels differ from a mask without it.
            mask = np.where(output.unsure, np.uint8(IGNORE), mask)
        num_classes = len(spec.classes)
        counts = output.counts
        if counts is None:
            each = count_values(mask, IGNORE)
            counts = [*each[:num_classes].tolist(), int(each[IGNORE])]
        png = encode_mask(mask, spec.palette)
        height, width = mask.shape
        info = {
            "source": item.source,
            "width": width,
            "height": height,
            "group": None,
            "checkpoint": self.loaded.digest,
            "shares": {
                name: round(n / mask.size, 6)
                for name, n in zip(spec.classes, counts[:num_classes], strict=True)
            },
            "confidence": round(output.confidence, 6),
        }
        members = {MASK_EXTENSION: png, INFO_EXTENSION: json.dumps(info).encode()}
        if item.file:
            members[item.extension] = item.file
        kept = {} if output.probabilities is None else encode_probabilities(output.probabilities)
        objects = describe_objects(item.source, mask, spec) if options.objects else None
        try:
            self.write_files(item, mask, png, objects)
        except DataError as error:
            # At a URL, all names are allowed: the request failed.
            if self.fail_fast or self.store.local is None:
                raise
            return replace(item, image=None, error=str(error))
        return EncodedPrediction(item.key, members, kept, width, height, tuple(counts), objects)

    def write_files(
        self, item: DecodedInput, mask: Uint8, png: bytes, objects: MaskObjects | None
    ) -> None:
        """Write the files beside the shards: PNG, outlines, overlay and figure, as requested."""
        name = PurePosixPath(item.source).with_suffix(".png")
        if objects is not None:
            self.write(f"{OBJECTS_FOLDER}/{name.with_suffix('.geojson')}", objects.outlines)
        if self.options.png:
            self.write(f"png/{name}", png)
        if item.image is None:
            return
        image, palette = np.moveaxis(item.image.numpy(), 0, -1), self.loaded.spec.palette
        if item.full_size is not None:
            image = enlarge(image.transpose(2, 0, 1), item.full_size).transpose(1, 2, 0)
        if self.options.overlay:
            self.write(f"overlay/{name}", encode_png(draw_overlay(image, mask, palette)))
        if self.figure:
            stem = os.fsdecode(os.fsencode(name.stem)[: MAX_NAME_BYTES - len(FIGURE)])
            self.write(f"{stem}{FIGURE}", encode_png(draw_figure(image, mask, palette)))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically. Raises DataError if the file system refuses its name."""
        local = self.store.local
        if local is None:
            self.store.write(name, data)
            return
        with refuse_unusable_name(local / name):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(local / name, data, durable=False, within=local / WORK_DIR)


def enlarge_result(output: ModelOutput, size: tuple[int, int]) -> ModelOutput:
    """Enlarge the output for a scaled image to (width, height) of its file, by nearest pixel."""
    return ModelOutput(
        classes=enlarge(output.classes, size),
        confidence=output.confidence,
        unsure=None if output.unsure is None else enlarge(output.unsure, size),
        probabilities=None if output.probabilities is None else enlarge(output.probabilities, size),
    )


def enlarge(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Enlarge an array [..., H, W] to (width, height), by nearest pixel."""
    (width, height), (rows, columns) = size, pixels.shape[-2:]
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    column = (2 * np.arange(width) + 1) * columns // (2 * width)
    return pixels[..., row[:, None], column]


def encode_probabilities(probabilities: NDArray[Any]) -> dict[str, bytes]:
    """Encode uint16 as a PNG for each class but the first, float16 as one array.

    Returns {extension: bytes}.
    """
    if probabilities.dtype == np.float16:
        out = io.BytesIO()
        np.save(out, probabilities, allow_pickle=False)
        return {PROBABILITIES_EXTENSION: out.getvalue()}
    members = {}
    for class_index, values in enumerate(probabilities, start=1):
        out = io.BytesIO()
        # At higher levels noise takes as much space, and three times as long.
        Image.fromarray(values).save(out, "PNG", compress_level=1)
        members[probability_extension(class_index)] = out.getvalue()
    return members


def draw_figure(image: Uint8, mask: Uint8, palette: Palette) -> Image.Image:
    """Draw an image [H, W, 1 or 3] and, beside it, the image with its mask [H, W] drawn over it."""
    height, width = mask.shape
    factor = min(1.0, FIGURE_SIDE / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    small = small.resize(size, Image.Resampling.BOX).convert("RGB")
    small_mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return side_by_side([small, draw_overlay(np.asarray(small), small_mask, palette)])
