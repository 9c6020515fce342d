"""One stored sample: bytes and where they came from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shards.images.files import ImageFormat
from shards.images.pixels import DecodedImage, decode_unconverted
from shards.masks.borders import decode_border
from shards.masks.png import decode_mask
from shards.sample import BORDER_EXTENSION, DataError, Sample, Uint8


@contextmanager
def replace_remedy() -> Iterator[None]:
    """Give errors about damaged members the remedy for shards.

    A member of a shard can be neither repaired nor removed, as a file can.
    """
    try:
        yield
    except DataError as error:
        problem = str(error).removesuffix("; repair or remove it")
        if problem == str(error):
            raise
        raise DataError(f"{problem}; copy or pack the data set again") from error


@dataclass(frozen=True, slots=True)
class RawSample:
    """The encoded members of a sample."""

    key: str
    position: int
    """Its position in the stream or split that it was read for."""
    image: bytes
    extension: str
    """Extension of the image, in lower case: `jpg`, `png`, ..."""
    is_mask: bool
    """The sample has no image, as in predictions without images: `image` is the mask."""
    mask: bytes | None
    info: bytes | None
    """The member `json`; None in shards written by other programs."""
    where: str
    """Shard and key, for error messages."""
    border: bytes | None = None
    """The member `border.png`; None if no border maps were packed."""

    def require_image(self) -> bytes:
        """Return the bytes of the image. Raises DataError if the sample has none, only a mask."""
        if self.is_mask:
            raise DataError(
                f"{self.where} has a mask but no image; unet predict --include-image stores both"
            )
        return self.image

    def decode(self, image_format: ImageFormat, num_classes: int) -> Sample:
        """Decode image and mask. Raises DataError naming shard and key."""
        image, mask = self.decode_unconverted(image_format, num_classes)
        return Sample(self.key, image.crop(0, 0, *image.size), mask)

    def decode_unconverted(
        self, image_format: ImageFormat, num_classes: int
    ) -> tuple[DecodedImage, Uint8 | None]:
        """Decode image and mask without converting the image: only a crop may be needed.

        Returns the image and class indices [H, W], None if unlabelled. Raises DataError naming
        shard and key.
        """
        data = self.require_image()
        with replace_remedy():
            image = decode_unconverted(data, image_format, self.where)
            if self.mask is None:
                return image, None
            mask = decode_mask(self.mask, num_classes, self.where)
        (width, height), (rows, columns) = image.size, mask.shape
        if (rows, columns) != (height, width):
            raise DataError(
                f"{self.where}: the mask is {columns} x {rows}, but the image is {width} x "
                f"{height}; pack the data set again"
            )
        return image, mask

    def decode_border(self, size: tuple[int, int]) -> Uint8 | None:
        """Decode the border map to uint8 [H, W]; None if the sample has none.

        Raises DataError if it is damaged or not of the image's `size` (width, height).
        """
        if self.border is None:
            return None
        with replace_remedy():
            return decode_border(self.border, size, f"{self.where}.{BORDER_EXTENSION}")

    def parse_info(self) -> dict[str, Any]:
        """Parse `KEY.json`; without one, return the name of the image member as `source`.

        Raises DataError if the member is not a JSON object.
        """
        if self.info is None:
            return {"source": f"{self.key}.{self.extension}"}
        try:
            info = json.loads(self.info)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where}.json is not valid JSON; pack it again") from error
        if not isinstance(info, dict):
            raise DataError(f"{self.where}.json is not a JSON object; pack it again")
        return info
