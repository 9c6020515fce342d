"""The settings of a prediction job."""

import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from pipelines.inference.input_rules import WORK_DIR as WORK_DIR
from pipelines.inference.input_rules import InputRule
from pipelines.inference.reading import ReadingOptions
from pipelines.model.load import EnsemblePlace, refuse_no_checkpoint
from pipelines.runtime.devices import choose_batch_size, choose_channels_last, refuse_rank_timeout
from pipelines.runtime.errors import parse_part
from pipelines.runtime.outputs import refuse_bad_output
from pipelines.runtime.processes import refuse_negative_workers
from pipelines.runtime.yaml_flags import Flat, plain_type, setting_types, settings_of
from shards.documents import convert
from shards.requests import REMOTE_TIMEOUT
from shards.sample import MASK_EXTENSION
from unet import MaskRule, TileConfig

PROBABILITIES_EXTENSION = "probabilities.npy"
FLAGS = ("compile", "channels_last")
"""Settings outside the groups that determine the bytes of the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultOptions:
    """Results for each image."""

    samples_per_shard: int = 256
    """Images per output shard."""
    out_split: str = "predicted"
    """Name of the output split and its shards: predicted-000000.tar."""
    threshold: float | None = None
    """Two classes only: probability from which a pixel is the second class. Default: the more
    probable class."""
    calibrated: bool = False
    """Apply the temperature that unet evaluate --fit-temperature has stored beside the checkpoint
    to its probabilities, before --threshold, --min-confidence and --probabilities."""
    min_area: int = 0
    """Remove connected components (8 neighbours) with fewer pixels, assigning them to the most
    common surrounding class. Requires the extra `scipy`, and up to 40 bytes of memory per pixel of
    a mask plus 80 MB, in each encoder thread."""
    min_confidence: float = 0.0
    """Pixels whose class is less probable than this become 255 (ignore)."""
    probabilities: Literal["none", "png", "float16"] = "none"
    """Also store probabilities. png: KEY.probability-K.png, 16-bit grey, 65535 = 1, for every class
    but the first, which is the remainder. float16: KEY.probabilities.npy [K, H, W], all classes.
    Each takes 2 bytes of memory per pixel, for the images of a batch and those queued for an
    encoder (at most 512 MiB, or one image)."""
    include_image: bool = False
    """Also store the images beside their masks: pseudo-labels, to train on after `unet index` has
    joined them with validation shards."""
    png: bool = False
    """Also write OUT/png: one PNG of class indices per image, with the palette of the classes."""
    objects: bool = False
    """Two classes only: also write OUT/objects.csv, the number and areas of the connected
    components (8 neighbours) of the second class in each image, and OUT/objects: their outlines,
    one GeoJSON file per image. Requires the extra `scipy`."""
    overlay: bool = False
    """Also write OUT/overlay: each image with its mask drawn over it."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard must be >= 1, got {self.samples_per_shard}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", self.out_split):
            raise ValueError(
                f"--out-split must be made of letters, digits, _ and -, got {self.out_split!r}"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold must be in (0, 1], got {self.threshold}")
        if self.min_area < 0:
            raise ValueError(f"--min-area must be >= 0, got {self.min_area}")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"--min-confidence must be in [0, 1), got {self.min_confidence}")

    def shard_name(self, number: int) -> str:
        """Return the name of output shard `number`."""
        return f"{self.out_split}-{number:06d}.tar"

    def longest_key(self, num_classes: int) -> int:
        """Return the maximum number of bytes of a key whose members fit into a tar header."""
        names = {
            "none": MASK_EXTENSION,
            "png": probability_extension(num_classes - 1),
            "float16": PROBABILITIES_EXTENSION,
        }
        return tarfile.LENGTH_NAME - len(f".{names[self.probabilities]}")

    def mask_rule(self) -> MaskRule:
        """Return how probabilities become a mask."""
        kept = {"none": None, "png": torch.uint16, "float16": torch.float16}
        return MaskRule(
            threshold=self.threshold,
            min_confidence=self.min_confidence,
            stored_dtype=kept[self.probabilities],
            # With --min-area they are counted after the components are removed.
            count=self.min_area <= 1,
        )


def probability_extension(class_index: int) -> str:
    """Return the extension of the member with the probabilities of a class."""
    return f"probability-{class_index}.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Predict masks for images and write them as shards.

    If it was interrupted, rerun the same command, on any number of GPUs: it resumes.
    """

    checkpoint: tuple[str, ...]
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id. Several, or the
    folder of runs fold-1, fold-2, ...: an ensemble, which averages their probabilities."""
    ensemble_on: EnsemblePlace = "device"
    """Memory that holds the models of an ensemble: all on the device, or all on the host, from
    where each is copied for every batch of tiles."""
    input: str
    """An image, a folder (searched recursively), a pattern, a list file (.txt) or shards, local or
    at a URL such as s3://bucket/folder."""
    out: str
    """Output folder or URL."""
    image_ext: tuple[str, ...] = ()
    """Extensions of images in folders, patterns and tars: jpg for KEY.jpg, image.jpg for
    KEY.image.jpg. Default: every image format that is read; a sample must then have one image."""
    split: str | None = None
    """Split of a data set to predict. Default: all."""
    fail_fast: bool = False
    """Stop with exit code 1 at the first input that cannot be read. Default: list it in
    OUT/errors.jsonl, continue, and exit with 3."""
    max_memory: str | None = None
    """Memory for decoding images, such as 8GiB, shared by the processes of this machine; an image
    that takes more is refused before decoding. Default: 40 % of what is free."""
    verify_shards: bool = False
    """First read every shard of a data set and compare its sha256 with the manifest."""
    part: str | None = None
    """i/n: make only every n-th shard, starting at the i-th, as one of n independent jobs; the last
    one writes the manifest. The same command without --part makes what is missing."""
    workers: int | None = None
    """Decoding processes per rank. Default: its share of the CPUs, at most 8."""
    remote_timeout: float = REMOTE_TIMEOUT
    """Seconds for a request to a bucket, retries included."""
    wandb_project: str | None = None
    """Record the finished job in this project of wandb: model, data set and masks by URL and
    sha256, without uploading them. Default: do not."""
    rank_timeout: float = 10.0
    """Minutes without progress after which the other ranks take over the shards of a rank."""
    compile: bool = False
    """Compile the network with torch.compile: about a minute at the start, faster on GPUs. Only
    full batches of tiles of the size of the first image are compiled, so that masks depend on
    neither ranks nor interruptions."""
    channels_last: bool | None = None
    """Use the channels_last memory format, which tensor cores prefer. Default: on a GPU with
    --compile."""
    reading: Flat[ReadingOptions] = field(default_factory=ReadingOptions)
    results: Flat[ResultOptions] = field(default_factory=ResultOptions)
    tiles: Flat[TileConfig] = field(default_factory=TileConfig)

    def __post_init__(self) -> None:
        refuse_no_checkpoint(self.checkpoint)
        if self.compile and self.ensemble_on == "host":
            raise ValueError("--compile requires --ensemble-on device")
        refuse_bad_output("--out", self.out)
        refuse_negative_workers(self.workers or 0)
        refuse_rank_timeout(self.rank_timeout)
        if self.part is not None:
            parse_part("--part", self.part)

    def input_rule(self) -> InputRule:
        """Return what was declared about the inputs."""
        return InputRule(self.image_ext, self.split, self.out)

    def shards_of(self, num_shards: int, rank: int, world: int) -> range:
        """Return the shards that a rank makes: its share of this part."""
        number, count = (1, 1) if self.part is None else parse_part("--part", self.part)
        return range(number - 1, num_shards, count)[rank::world]

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the bytes of the output, by name."""
        groups = (self.tiles, self.results)
        values = {entry.name: value for group in groups for entry, value in settings_of(group)}
        # Named so in job.json since before --split selected inputs.
        values["split"] = values.pop("out_split")
        return {**values, **{name: getattr(self, name) for name in FLAGS}}

    def resolve_defaults(self, started: Mapping[str, Any], device: torch.device) -> "PredictConfig":
        """Resolve unset settings: as the job in the output folder was started, else by device."""
        size, last = self.tiles.batch_size, self.channels_last
        size = started.get("batch_size") if size is None else size
        last = started.get("channels_last") if last is None else last
        return replace(
            self,
            tiles=replace(self.tiles, batch_size=choose_batch_size(size, device)),
            channels_last=choose_channels_last(last, device, compiled=self.compile),
        )


def name_fields(job: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings in job.json as the fields of their groups."""
    return {"out_split" if name == "split" else name: value for name, value in job.items()}


def check_settings(job: Mapping[str, Any]) -> None:
    """Raise ValueError if a setting in job.json is of a wrong type or out of its range."""
    named = name_fields(job)
    kinds = setting_types(PredictConfig)
    for group in (TileConfig, ResultOptions):
        convert({name: named[name] for name in setting_types(group) if name in named}, group)
    for name in FLAGS:
        if name in named:
            convert_setting(name, named[name], plain_type(kinds[name]))


def convert_setting(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError naming a setting whose value is of another type."""
    try:
        convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{error} - at `$.{name}`") from error
