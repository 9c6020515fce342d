"""Images and masks as WebDataset shards: bytes and arrays, no models, ranks or devices.

`shards/README.md` specifies the format. Packing needs only numpy and Pillow; `shards.reader`
imports webdataset, and with it torch, and is therefore imported only by code that reads shards.
"""

from shards.images import ImageFormat
from shards.index import Manifest, ShardInfo, read_manifest
from shards.masks import MaskFormat
from shards.pairs import Pair, find_pairs
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
