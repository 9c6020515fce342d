"""Pictures and masks as WebDataset shards: the bytes, and nothing of models, ranks or devices.

`shards/README.md` is the specification of the format. Packing needs numpy and Pillow alone;
`shards.reader`, which brings webdataset and with it torch, is imported by those who read.
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
