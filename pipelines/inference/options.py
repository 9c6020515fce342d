"""The settings of a prediction job."""

import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import tyro

from pipelines.runtime.devices import choose_batch_size, choose_channels_last
from pipelines.runtime.errors import parse_part, refuse_url
from shards.sample import MASK_EXTENSION
from shards.store import is_url
from unet import MaskRule, TileConfig

WORK_DIR = ".predict"
PROBABILITIES_EXTENSION = "probabilities.npy"


@dataclass(frozen=True, kw_only=True)
class ResultConfig:
    """What is written for each picture; it decides the bytes of the results."""

    samples_per_shard: int = 256
    """Pictures whose masks share a shard."""
    split: str = "predicted"
    """Name of the split and of its shards: predicted-000000.tar."""
    threshold: float | None = None
    """For two classes: the second wherever its probability is at least this. Left out: the
    likelier one."""
    min_area: int = 0
    """Connected areas of a class (8 neighbours) with fewer pixels become the class that is the most
    common around them; 0: none do. Needs the extra `scipy`; takes up to 40 bytes of memory for each
    pixel of a mask, and 80 MB, in two threads."""
    min_confidence: float = 0.0
    """Pixels whose chosen class is less probable than this become 255, ignored."""
    probabilities: Literal["none", "png", "float16"] = "none"
    """Also store probabilities. png: KEY.probability-K.png, 16-bit grey, 65535 = 1, for each class
    but the first, whose share is what the others leave. float16: KEY.probabilities.npy [K, H, W],
    all classes. Each takes 2 bytes a pixel in memory, for the pictures of a batch and as many as
    wait for an encoder: 512 MiB, or one picture."""
    include_image: bool = False
    """Also store the pictures beside their masks: pseudo-labels, to train on when `unet index` has
    made one data set of them and shards for validation."""
    png: bool = False
    """Also write OUT/png: a PNG of class indices, in the classes' colours, for each picture."""
    overlay: bool = False
    """Also write OUT/overlay: each picture with its mask drawn over it."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", self.split):
            raise ValueError(f"split is made of letters, digits, _ and -, got {self.split!r}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.min_area < 0:
            raise ValueError(f"min_area must not be below 0, got {self.min_area}")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence must be in [0, 1), got {self.min_confidence}")

    def shard_name(self, number: int) -> str:
        """The name of output shard `number`."""
        return f"{self.split}-{number:06d}.tar"

    def longest_key(self, num_classes: int) -> int:
        """Bytes of a key for whose members a tar has room."""
        names = {
            "none": MASK_EXTENSION,
            "png": probability_extension(num_classes - 1),
            "float16": PROBABILITIES_EXTENSION,
        }
        return tarfile.LENGTH_NAME - len(f".{names[self.probabilities]}")


def probability_extension(class_index: int) -> str:
    """The extension of the member that holds the probabilities of a class."""
    return f"probability-{class_index}.png"


@dataclass(frozen=True, kw_only=True)
class PredictConfig(TileConfig, ResultConfig):
    """Predict masks for pictures and write them as shards.

    Given again after a kill, also on another number of GPUs, it makes what is missing.
    """

    checkpoint: str
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
    input: str
    """A picture, a folder (searched recursively), a pattern, a list file (.txt) or shards, here or
    at a URL such as s3://bucket/folder."""
    out: str
    """Folder for the results, or a URL."""
    fail_fast: bool = False
    """The first input that cannot be read ends the job with exit code 1. Else it is listed in
    OUT/errors.jsonl, the job goes on, and ends with 3."""
    part: str | None = None
    """i/n: make only every n-th shard, from the i-th, as one of n jobs; the last one to end writes
    the manifest. The same command without it makes what is missing."""
    workers: int | None = None
    """Decoding processes of each rank; left out: its share of the CPUs, at most 8."""
    compile: bool = False
    """Compile the network (torch.compile): a minute at the start, faster on GPUs. Only full batches
    of tiles as large as those of the first image are compiled, so that the masks do not depend on
    ranks and interruptions."""
    channels_last: tyro.conf.DisallowNone[bool | None] = None
    """Keep maps as [B, H, W, C] in memory, as the matrix units of GPUs want them in bf16. Left out:
    with --compile on a CUDA GPU."""

    def __post_init__(self) -> None:
        TileConfig.__post_init__(self)
        ResultConfig.__post_init__(self)
        if not is_url(self.out):
            refuse_url("--out", self.out)
        elif re.search(r"://$|[?*\[\]]", self.out):
            raise ValueError(f"--out {self.out}: a URL names a bucket, without ? * [ ]")
        if self.workers is not None and self.workers < 0:
            raise ValueError("workers must not be below 0")
        if self.part is not None:
            parse_part("--part", self.part)

    def shards_of(self, num_shards: int, rank: int, world: int) -> range:
        """The shards that a rank makes: its share of those of this part."""
        number, count = (1, 1) if self.part is None else parse_part("--part", self.part)
        return range(number - 1, num_shards, count)[rank::world]

    def settings(self) -> dict[str, Any]:
        """What decides the bytes of the results, by name."""
        names = [field.name for group in (TileConfig, ResultConfig) for field in fields(group)]
        return {name: getattr(self, name) for name in (*names, "compile", "channels_last")}

    def settle(self, begun: Mapping[str, Any], device: torch.device) -> "PredictConfig":
        """The same with what was left out: as the job was begun, else as the device wants it."""
        size, last = self.batch_size, self.channels_last
        if size is None and isinstance(before := begun.get("batch_size"), int) and before > 0:
            size = before
        if last is None and isinstance(before := begun.get("channels_last"), bool):
            last = before
        return replace(
            self,
            batch_size=choose_batch_size(size, device),
            channels_last=choose_channels_last(last, device, compiled=self.compile),
        )

    @property
    def tiles(self) -> TileConfig:
        """How images are cut."""
        return TileConfig(**{field.name: getattr(self, field.name) for field in fields(TileConfig)})

    def mask_rule(self) -> MaskRule:
        """What is made of class probabilities."""
        kept = {"none": None, "png": torch.uint16, "float16": torch.float16}
        return MaskRule(
            threshold=self.threshold,
            min_confidence=self.min_confidence,
            keep=kept[self.probabilities],
            # Else they are counted when the specks are gone.
            count=self.min_area <= 1,
        )
