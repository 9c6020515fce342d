"""Images and masks as WebDataset shards: bytes and arrays, no models, ranks or devices.

`shards/README.md` specifies the format. Packing needs only numpy and Pillow; `shards.reader`
imports webdataset, and with it torch, and is therefore imported only by code that reads shards.
"""

from shards.folders.pairs import Pair, find_pairs
from shards.images.files import ImageFormat
from shards.manifest import Manifest, ShardInfo, read_manifest
from shards.masks.formats import MaskFormat
from shards.sample import IGNORE, DataError, Sample

__all__ = [
    "IGNORE",
    "DataError",
    "ImageFormat",
    "Manifest",
    "MaskFormat",
    "Pair",
    "Sample",
    "ShardInfo",
    "find_pairs",
    "read_manifest",
]
