"""What one sample is: its key, its members in a tar, and the error that names it."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

Channels = Literal["L", "RGB"]
Colour = tuple[int, int, int]
Palette = tuple[Colour, ...]
Uint8 = NDArray[np.uint8]

IGNORE = 255
"""Mask value of pixels that count nowhere."""

MAX_KEY_BYTES = 90
"""A key and the longest extension must fit the 100 bytes of a USTAR name."""

PLAIN_SOURCE = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+\.[A-Za-z0-9]+")
"""Most paths; their keys are themselves, less the extension."""

MASK_EXTENSION = "mask.png"
BORDER_EXTENSION = "border.png"
INFO_EXTENSION = "json"

PROBABILITY_NAME = re.compile(r".+\.probability-\d+\.png", re.DOTALL)
"""Names of members that `unet predict` adds on request: no picture of a sample."""


class DataError(Exception):
    """Data that is refused. Its text is one line, `what and where; what to do`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A decoded sample."""

    key: str
    image: Uint8
    """[H, W, C], C = 1 or 3."""
    mask: Uint8 | None
    """Class indices [H, W], 255 = ignore; None where unlabelled."""


def encode_key(source: str) -> str:
    """The key of a picture: its relative path without extension, made safe for a tar member.

    Reversible: every character but `A-Z a-z 0-9 _ - /` is percent-encoded, so no two paths share
    a key. A key of more than 90 bytes becomes `%sha256-` and the hash of the path (no encoded
    path can look like that); the full path stands in the sample's json.
    """
    if PLAIN_SOURCE.fullmatch(source) and len(source) <= MAX_KEY_BYTES:
        return source.rpartition(".")[0]
    stem = str(PurePosixPath(source).with_suffix(""))
    # quote() leaves . and ~ alone whatever it is told; webdataset splits at the first dot.
    key = quote(stem, safe="/", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    if len(key) <= MAX_KEY_BYTES:
        return key
    return "%sha256-" + hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()


def is_safe_path(path: str) -> bool:
    """Whether a path from a shard names a file inside the folder that it is joined to."""
    try:
        path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    pure = PurePosixPath(path)
    return (
        bool(pure.parts)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and not re.search(r"[\x00\\]", path)
    )
