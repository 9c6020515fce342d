"""The manifest of a data set, `index.json`."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from shards.documents import MAX_INTEGER, Byte, Count, Name, Positive, Sha256, convert, parse_json
from shards.images.files import ImageFormat
from shards.local_files import describe_no_directory
from shards.sample import DataError, is_safe_path
from shards.store import Store

MANIFEST = "index.json"
FORMAT = "unet-shards"
VERSION = 2
MIN_SAMPLE_BYTES = 1024
"""Minimum size of a sample in a shard: header and content of its image, in blocks of 512 bytes."""
MAX_SIDE = 2**31 - 1
Level = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Mode = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9;-]{1,16}$")]
"""Pillow's mode of an image."""
READING_RULES = ("exif", "frame", "resize")
"""Fields of `image_format` that the first manifests lack."""
MAX_SIZES = 4096
"""Distinct image sizes that a manifest lists; if there are more, they are rounded down."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard of a split."""

    name: Name
    """Path within the folder."""
    samples: Count
    bytes: Count
    sha256: Sha256
    pixels: tuple[Count, ...]
    """Mask pixels of each class, then of ignore; empty if unlabelled."""
    idx_sha256: Sha256 | None = field(default=None, compare=False)
    """sha256 of its `.idx`; None in data sets that were packed before it was recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPart(ShardInfo):
    """Some samples of a shard, numbered as if there were no others. Never written."""

    rows: tuple[int, ...]
    """Rows of the samples in the shard; `samples` is their number."""
    stored: int
    """Number of samples in the shard."""


@dataclass(frozen=True, slots=True)
class SizeCount:
    """Number of images with one size and mode."""

    width: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
    height: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
    mode: Mode
    images: Positive


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: `train`, `val`, `test`, `unlabelled` or `predicted`."""

    shards: tuple[ShardInfo, ...]
    sizes: tuple[SizeCount, ...]
    """Sizes of the images, the most common first."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Description of a folder of shards. Written last: without it, a folder is not a data set."""

    classes: tuple[Name, ...]
    """Class names by index."""
    palette: tuple[tuple[Byte, Byte, Byte], ...]
    """RGB colour of each class."""
    image_format: ImageFormat
    """How every image is decoded."""
    mask_format: dict[str, Any]
    """The declared format of the mask files, and `source_values`: the pixel value of each class."""
    mean: tuple[float, ...]
    """Mean of each channel over the train split (over all splits if train is empty), pixels 0-1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, pixels 0-1."""
    splits: dict[str, SplitInfo]
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Sources of images that are equal byte for byte: at most 1,000 groups of 20."""
    verified: Literal["full", "headers"] = "full"
    """Whether all pixels were checked; with `headers`, mean and std come from a sample."""
    border_sigma: float | None = None
    """Sigma of the border maps, in pixels; None: there are no border maps."""
    border_classes: tuple[str, ...] = ()
    """Classes whose connected components are cells in the border maps."""
    digest: str = field(default="", compare=False)
    """sha256 of the manifest file that was read."""

    def split(self, name: str, place: object) -> SplitInfo:
        """Return a split that has samples. Raises DataError naming `place` and all such splits."""
        if name not in self.splits or not self.splits[name].samples:
            available = ", ".join(k for k, v in self.splits.items() if v.samples)
            raise DataError(
                f"{place} has no samples in the split {name!r}; splits with samples: {available}"
            )
        return self.splits[name]


def write_manifest(store: Store, manifest: Manifest, within: str | None = None) -> None:
    """Write `index.json` into a folder, atomically; `within`: see `Store.write`."""
    plain = asdict(manifest)
    del plain["digest"]
    if manifest.border_sigma is None:
        # So that programs without support for border maps can read it.
        del plain["border_sigma"], plain["border_classes"]
    for name in READING_RULES:
        # As border maps: absent where it is the default.
        if plain["image_format"][name] == getattr(
            ImageFormat(manifest.image_format.channels), name
        ):
            del plain["image_format"][name]
    for info in plain["splits"].values():
        info["samples"] = sum(shard["samples"] for shard in info["shards"])
        info["shards"] = [drop_unknown_digest(shard) for shard in info["shards"]]
    text = json.dumps({"format": FORMAT, "version": VERSION, **plain}, indent=1) + "\n"
    store.write(MANIFEST, text.encode(), within)


def drop_unknown_digest(shard: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a shard, without the sha256 of its `.idx` if that is unknown."""
    return {k: v for k, v in shard.items() if k != "idx_sha256" or v is not None}


def read_manifest(place: Store | Path | str, flag: str = "") -> Manifest:
    """Read the manifest of a folder of shards, on disk or at a URL.

    Raises DataError, with the `flag` that names the folder, if it is missing, damaged, not a
    manifest, or of another version.
    """
    store = Store(place)
    where = f"{flag} {store}:" if flag else str(store)
    if store.local is not None and not store.local.is_dir():
        raise DataError(f"{where} {describe_no_directory(store.local)}")
    path = store.path(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except FileNotFoundError as error:
        raise DataError(
            f"{where} is not a data set (it has no {MANIFEST}); pack the images with unet pack, or "
            "rerun a pack that was interrupted"
        ) from error
    try:
        plain = parse_json(data)
        if plain.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not a manifest written by unet pack")
        version = plain.pop("version", None)
        if type(version) is not int:
            raise ValueError(f"version {version!r} is not an integer")
        if version != VERSION:
            remedy = "update unet-shards" if version > VERSION else "pack the data set again"
            raise DataError(
                f"{path} has version {version}, but this program reads version {VERSION}; {remedy}"
            )
        counts = pop_sample_counts(plain)
        manifest = convert(plain, Manifest)
        for problem in find_contradictions(manifest, counts):
            raise ValueError(problem)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); pack the data set again") from error
    return replace(manifest, digest=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class StoredMaskFormat:
    """Fields of a manifest about the mask files; see `shards.masks.formats.MaskFormat`."""

    kind: Literal["binary", "index", "values", "palette", "rgb"] | None = None
    num_classes: Annotated[int, msgspec.Meta(ge=2, le=255)] | None = None
    values: tuple[Level, ...] = ()
    colours: tuple[tuple[Byte, ...], ...] = ()
    ignore_colours: tuple[tuple[Byte, ...], ...] = ()
    invert: bool = False
    threshold: Level | None = None
    ignore_value: Level | None = None
    unknown: Literal["error", "ignore"] = "error"
    tolerance: Level = 0
    source_values: tuple[Level, ...] = ()


def pop_sample_counts(plain: dict[str, Any]) -> dict[str, Any]:
    """Remove the number of samples that each split lists beside its shards, and return them."""
    splits = plain.get("splits")
    if not isinstance(splits, dict):
        return {}
    return {
        name: info.pop("samples")
        for name, info in splits.items()
        if isinstance(info, dict) and "samples" in info
    }


def find_contradictions(manifest: Manifest, counts: dict[str, Any]) -> Iterator[str]:
    """Describe fields that are valid alone, but not beside each other or the size of the shards."""
    form, num_classes = manifest.image_format, len(manifest.classes)
    channels = 3 if form.channels == "RGB" else 1
    if form.range is not None and not 0 <= form.range[0] < form.range[1] <= 65535:
        yield f"image_format: range {list(form.range)}; expected 0 <= low < high <= 65535"
    if not 1 <= form.max_pixels <= MAX_INTEGER:
        yield f"image_format: max_pixels {form.max_pixels}; expected at least 1"
    if num_classes > 255 or len(set(manifest.classes)) != num_classes:
        yield f"{num_classes} classes; expected at most 255, each once"
    if len(manifest.palette) != num_classes:
        yield f"{len(manifest.palette)} palette colours for {num_classes} classes"
    for name, values, lowest in (("mean", manifest.mean, 0.0), ("std", manifest.std, 1e-9)):
        if len(values) != channels or not all(isfinite(v) and lowest <= v <= 1 for v in values):
            yield f"{name} {list(values)}; expected {channels} numbers from {lowest:g} to 1"
    sigma = manifest.border_sigma
    if sigma is not None and not (isfinite(sigma) and sigma > 0):
        yield f"border_sigma {sigma}; expected a number above 0"
    stored = convert(manifest.mask_format, StoredMaskFormat)
    bands = {len(colour) for colour in (*stored.colours, *stored.ignore_colours)}
    if stored.kind == "rgb" and (len(stored.colours) != num_classes or bands not in ({3}, {4})):
        yield f"mask_format: expected one colour (RGB or RGBA) for each of {num_classes} classes"
    if len(stored.source_values) > num_classes:
        yield f"mask_format: {len(stored.source_values)} source_values for {num_classes} classes"
    names = set()
    for split, info in manifest.splits.items():
        yield from find_shard_contradictions(split, info, num_classes)
        if split in counts and counts[split] != info.samples:
            yield f"split {split} lists {counts[split]} samples, its shards {info.samples}"
        for shard in info.shards:
            if shard.name in names:
                yield f"shard {shard.name} is listed twice"
            names.add(shard.name)


def find_shard_contradictions(split: str, info: SplitInfo, num_classes: int) -> Iterator[str]:
    """Describe entries of a split that no shard can have, and sizes that do not add up."""
    for shard in info.shards:
        if not is_safe_path(shard.name) or "::" in shard.name or not shard.name.endswith(".tar"):
            yield f"shard {shard.name!r} is not the path of a tar within the folder"
        if shard.samples * MIN_SAMPLE_BYTES > shard.bytes:
            yield f"{shard.name}: {shard.samples} samples do not fit into {shard.bytes} bytes"
        if shard.pixels and len(shard.pixels) != num_classes + 1:
            yield f"{shard.name}: {len(shard.pixels)} pixel counts for {num_classes} classes"
    images = sum(size.images for size in info.sizes)
    if images > MAX_INTEGER or images != info.samples:
        yield f"split {split}: sizes of {images} images, but {info.samples} samples"


def merge_size_counts(counts: Sequence[SizeCount]) -> tuple[SizeCount, ...]:
    """Add up the size counts of several shards, the most common size first.

    If there are more than `MAX_SIZES` sizes, they are rounded down to multiples of 2, 4, 8, ...
    until few enough remain: a manifest stays small even if every image has a size of its own.
    """
    total: Counter[tuple[int, int, str]] = Counter()
    for size in counts:
        total[size.width, size.height, size.mode] += size.images
    step = 1
    while len(total) > MAX_SIZES:
        step *= 2
        coarse: Counter[tuple[int, int, str]] = Counter()
        for (width, height, mode), images in total.items():
            # A side shorter than the step stays 1, so that no size becomes 0.
            rounded = (max(1, width // step * step), max(1, height // step * step), mode)
            coarse[rounded] += images
        total = coarse
    ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    return tuple(SizeCount(*kind, images) for kind, images in ordered)


def rare_classes(manifest: Manifest) -> tuple[int, ...]:
    """Return the classes of the train split but the most common (all but 0 if not counted)."""
    counted = [shard.pixels for shard in manifest.splits["train"].shards if shard.pixels]
    if not counted:
        return tuple(range(1, len(manifest.classes)))
    pixels = np.sum(counted, axis=0)[: len(manifest.classes)]
    return tuple(int(c) for c in np.flatnonzero(pixels) if c != pixels.argmax())


def common_side(split: SplitInfo) -> int:
    """Return the side in pixels of the largest square that fits into half of the images."""
    total = sum(size.images for size in split.sizes)
    fitting = 0
    for size in sorted(split.sizes, key=lambda s: -min(s.width, s.height)):
        fitting += size.images
        if 2 * fitting >= total:
            return min(size.width, size.height)
    raise AssertionError("a split with samples has sizes")
