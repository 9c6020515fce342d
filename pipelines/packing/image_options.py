"""Options of `check` and `pack`: which images are accepted, and how they are read."""

from dataclasses import dataclass

from shards.images.files import (
    MAX_PIXELS,
    AlphaPolicy,
    ExifPolicy,
    ImageFormat,
    ImageRule,
    check_image_range,
)
from shards.statistics import GREY16, SampleStatistics, percentile_range


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """Accepted images, and the range of 16-bit values."""

    alpha: AlphaPolicy = "refuse"
    """Images with transparent pixels: refuse them, or drop the alpha channel."""
    image_range: tuple[int, int] | None = None
    """16-bit values that become 0 and 255, such as 0 65535."""
    image_percentiles: tuple[float, float] | None = None
    """The range of 16-bit values, as percentiles over all pixels of the data set."""
    max_pixels: int = MAX_PIXELS
    """Images whose header declares more pixels are refused before decoding."""
    max_memory: str | None = None
    """Memory for decoding images, such as 8GiB, shared by the processes of this machine; an image
    that takes more is refused before decoding. Default: 40 % of what is free."""

    def __post_init__(self) -> None:
        if self.image_range is not None and self.image_percentiles is not None:
            raise ValueError("--image-range and --image-percentiles exclude each other")
        check_image_range(self.image_range)
        low, high = self.image_percentiles or (0, 100)
        if not 0 <= low < high <= 100:
            raise ValueError(f"--image-percentiles {low:g} {high:g}: must be LOW HIGH within 0 100")
        self.make_rule()

    def make_rule(
        self, *, exif: ExifPolicy = "upright", frame: int | None = None, resize: int | None = None
    ) -> ImageRule:
        """Build the rule that decides which images are accepted and how they are stored."""
        return ImageRule(
            alpha=self.alpha,
            allow_16_bit=self.image_range is not None or self.image_percentiles is not None,
            exif=exif,
            frame=frame,
            resize=resize,
            max_pixels=self.max_pixels,
        )

    def make_format(self, total: SampleStatistics) -> ImageFormat:
        """Build the format that all images are decoded to; `total`: tally of all images."""
        bounds = self.image_range
        if GREY16 not in total.levels:
            bounds = None
        elif self.image_percentiles is not None:
            bounds = percentile_range(total.levels[GREY16], self.image_percentiles)
        channels = "RGB" if "RGB" in total.channels else "L"
        return ImageFormat(channels, self.alpha, bounds, self.max_pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeometryOptions:
    """Orientation, frame and size of the images."""

    exif: ExifPolicy = "upright"
    """Images with an EXIF orientation: rotate them upright, or ignore the orientation."""
    frame: int | None = None
    """Frame of multi-frame files (TIFF stacks, GIF), from 0; default: such files are refused."""
    resize: int | None = None
    """Scale images and masks down so that the longer side has this many pixels."""
