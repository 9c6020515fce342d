"""Flags of `unet predict` that replace the rules by which the training images were read."""

from dataclasses import dataclass, fields, replace
from typing import Any

from pipelines.model.load import LoadedModel
from pipelines.runtime.errors import UsageError
from shards.images.files import MAX_PIXELS, AlphaPolicy, ExifPolicy, ImageRule, check_image_range

STORED = ("image_range", "max_pixels")
"""Flags that apply to data sets too: their images are stored upright, as one frame and scaled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingOptions:
    """How image files are read; by default as the training data was."""

    exif: ExifPolicy | None = None
    """Images with an EXIF orientation: rotate them upright, or ignore the orientation. Default: as
    for the training data."""
    frame: int | None = None
    """Frame of multi-frame files (TIFF stacks, GIF), from 0. Default: as for the training data."""
    alpha: AlphaPolicy | None = None
    """Images with transparent pixels: refuse them, or drop the alpha channel. Default: as for the
    training data."""
    image_range: tuple[int, int] | None = None
    """16-bit values that become 0 and 255, such as 0 65535. Default: as for the training data."""
    resize: int | None = None
    """Scale images down so that the longer side has this many pixels; masks are enlarged to the
    size of the file. Default: as for the training data."""
    max_pixels: int | None = None
    """Images whose header declares more pixels are refused before decoding. Default: as for the
    training data."""

    def __post_init__(self) -> None:
        check_image_range(self.image_range)
        max_pixels = MAX_PIXELS if self.max_pixels is None else self.max_pixels
        ImageRule(frame=self.frame, resize=self.resize, max_pixels=max_pixels)

    def apply(self, loaded: LoadedModel) -> LoadedModel:
        """Return the model with the rules of these flags, and which of them are others."""
        given = {field.name: getattr(self, field.name) for field in fields(ReadingOptions)}
        changes = {
            name: value
            for name, value in given.items()
            if value is not None and value != getattr(loaded.spec, name)
        }
        return replace(loaded, spec=replace(loaded.spec, **changes), reading_changes=changes)

    def refuse_for_data_set(self, given: str) -> None:
        """Raise UsageError for flags that have no effect on the images of a data set."""
        for field in fields(ReadingOptions):
            if getattr(self, field.name) is not None and field.name not in STORED:
                raise UsageError(
                    f"{to_flag(field.name)}: has no effect on --input {given}, a data set, whose "
                    "images are stored as they were packed; remove it"
                )


def describe_changes(loaded: LoadedModel, trained: LoadedModel) -> list[str]:
    """Describe the rules that differ from those of the training data, one line each."""
    return [
        f"{to_flag(name)} {format_value(value)}: the checkpoint was trained with "
        f"{format_value(getattr(trained.spec, name))}"
        for name, value in loaded.reading_changes.items()
    ]


def to_flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def format_value(value: Any) -> str:
    """Format the value of a flag."""
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
