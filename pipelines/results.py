"""What `unet predict` writes: members of shards, pictures for people, and what ends a job.

Everything goes to a folder or a URL in the same order: a shard's errors and report before the
shard, which is there whole or not at all; the manifest last.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.checkpoint import LoadedModel
from pipelines.decoding import Decoded
from pipelines.gallery import side_by_side
from pipelines.overlay import draw_overlay
from pipelines.specks import count_values, remove_specks
from shards.images import ImageFormat, encode_png
from shards.index import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SizeCount,
    SplitInfo,
    merge_size_counts,
    write_manifest,
)
from shards.masks import encode_mask
from shards.sample import IGNORE, INFO_EXTENSION, MASK_EXTENSION, DataError, Palette, Uint8
from shards.store import ByteRange, Store
from shards.writer import ShardWriter, write_atomically
from unet import DataSpec

WORK_DIR = ".predict"
JOB = "job.json"
"""What decides the bytes of the results."""
STATE = "state.json"
ERRORS = "errors.jsonl"
FIGURE_SIDE = 1000
"""Longest side of a picture in a figure, in pixels."""

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


@dataclass(frozen=True, slots=True)
class Found:
    """What the model says of one picture."""

    classes: Uint8
    """[H, W]."""
    confidence: float
    """Mean probability of the chosen class."""
    unsure: NDArray[np.bool_] | None
    """[H, W]: pixels that are to be ignored."""
    probabilities: NDArray[Any] | None
    """float16 [K, H, W], or uint16 [K - 1, H, W]: see `MaskRule.keep`."""
    counts: Sequence[int] | None = None
    """Pixels of each class, then of ignore; None where they are counted later."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        arrays = (self.classes, self.unsure, self.probabilities)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One encoded result."""

    key: str
    members: dict[str, bytes]
    probabilities: dict[str, bytes]
    """Further members, none for training."""
    width: int
    height: int
    pixels: tuple[int, ...]
    """Pixels of each class, then of ignore."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns masks into members of a shard and, if asked, into pictures beside it.

    Several threads share one, and threads are enough: of a mask of 512 x 512 with two classes, a
    PNG takes 0.07 ms, most of it in zlib, which releases the interpreter lock. What held the lock
    was counting pixels (0.55 ms), which comes with the mask now.
    """

    config: ResultConfig
    store: Store
    loaded: LoadedModel
    figure: bool
    """There is one picture, of which OUT/NAME.figure.png is drawn."""

    @property
    def draws(self) -> bool:
        """Whether pictures are needed beside their masks."""
        return self.config.overlay or self.figure

    def __call__(self, item: Decoded, found: Found | None) -> Prediction | Decoded:
        """An encoded result, or the input as it is where it could not be read."""
        if found is None:
            return item
        spec, config = self.loaded.spec, self.config
        mask = found.classes
        if config.min_area > 1:
            mask = remove_specks(mask, config.min_area)
        if found.unsure is not None:
            # After the specks: a mask differs from one without --min-confidence here only.
            mask = np.where(found.unsure, np.uint8(IGNORE), mask)
        num_classes = len(spec.classes)
        counts = found.counts
        if counts is None:
            each = count_values(mask, IGNORE)
            counts = [*each[:num_classes].tolist(), int(each[IGNORE])]
        png = encode_mask(mask, spec.palette)
        height, width = mask.shape
        info = {
            "source": item.source,
            "width": width,
            "height": height,
            "group": None,
            "checkpoint": self.loaded.digest,
            "shares": {
                name: round(n / mask.size, 6)
                for name, n in zip(spec.classes, counts[:num_classes], strict=True)
            },
            "confidence": round(found.confidence, 6),
        }
        members = {MASK_EXTENSION: png, INFO_EXTENSION: json.dumps(info).encode()}
        if item.file:
            members[item.extension] = item.file
        kept = {} if found.probabilities is None else encode_probabilities(found.probabilities)
        self.write_pictures(item, mask, png)
        return Prediction(item.key, members, kept, width, height, tuple(counts))

    def write_pictures(self, item: Decoded, mask: Uint8, png: bytes) -> None:
        """Those for people, beside the shards."""
        name = PurePosixPath(item.source).with_suffix(".png")
        if self.config.png:
            self.write(f"png/{name}", png)
        if item.image is None:
            return
        image, palette = np.moveaxis(item.image.numpy(), 0, -1), self.loaded.spec.palette
        if self.config.overlay:
            self.write(f"overlay/{name}", encode_png(draw_overlay(image, mask, palette)))
        if self.figure:
            self.write(f"{name.stem}.figure.png", encode_png(draw_figure(image, mask, palette)))

    def write(self, name: str, data: bytes) -> None:
        """A picture for people, whole."""
        local = self.store.local
        if local is None:
            self.store.write(name, data)
            return
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(local / name, data, durable=False, within=local / WORK_DIR)


def encode_probabilities(probabilities: NDArray[Any]) -> dict[str, bytes]:
    """{extension: bytes}: a PNG for each class but the first of uint16, one array of float16."""
    if probabilities.dtype == np.float16:
        out = io.BytesIO()
        np.save(out, probabilities, allow_pickle=False)
        return {PROBABILITIES_EXTENSION: out.getvalue()}
    members = {}
    for class_index, values in enumerate(probabilities, start=1):
        out = io.BytesIO()
        # Noise takes no less room at higher levels, and three times as long.
        Image.fromarray(values).save(out, "PNG", compress_level=1)
        members[probability_extension(class_index)] = out.getvalue()
    return members


def draw_figure(image: Uint8, mask: Uint8, palette: Palette) -> Image.Image:
    """A picture [H, W, 1 or 3] and beside it the same with its mask [H, W] drawn over it."""
    height, width = mask.shape
    factor = min(1.0, FIGURE_SIDE / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    small = small.resize(size, Image.Resampling.BOX).convert("RGB")
    small_mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return side_by_side([small, draw_overlay(np.asarray(small), small_mask, palette)])


def write_shard(
    store: Store, name: str, spec: DataSpec
) -> Generator[None, Prediction | Decoded | None, None]:
    """Write one shard of the results that are sent, in their order; None ends it.

    Before the shard is there, what goes with it is: its errors and its report. Closed before its
    end, it leaves nothing behind.
    """
    pixels = np.zeros(len(spec.classes) + 1, dtype=np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    errors: list[str] = []
    with store.staging() as folder:
        with ShardWriter(folder / name) as writer:
            while (result := (yield)) is not None:
                if isinstance(result, Decoded):
                    line = {"input": result.source, "error": result.error}
                    errors.append(json.dumps(line) + "\n")
                    continue
                writer.add(result.key, result.members, result.probabilities)
                pixels += result.pixels
                sizes[result.width, result.height] += 1
            file = writer.seal()
            if errors:
                store.write(errors_name(name), "".join(errors).encode(), WORK_DIR)
            info = ShardInfo(**asdict(file), pixels=tuple(pixels.tolist()))
            counts = [SizeCount(w, h, spec.channels, n) for (w, h), n in sorted(sizes.items())]
            report = {
                "shard": asdict(info),
                "sizes": [asdict(c) for c in counts],
                "errors": len(errors),
            }
            store.write(report_name(name), to_json(report))
        for part in (str(Path(name).with_suffix(".idx")), name):
            store.upload(folder / part, part)


def errors_name(shard: str) -> str:
    """Where the errors of a shard lie."""
    return f"{shard.removesuffix('.tar')}.{ERRORS}"


def report_name(shard: str) -> str:
    """Where the report of a shard lies."""
    return f"{WORK_DIR}/{shard}.json"


def to_json(plain: Any) -> bytes:
    """JSON for people and machines, the same bytes for the same content."""
    return (json.dumps(plain, indent=1) + "\n").encode()


def finish_job(config: ResultConfig, store: Store, spec: DataSpec, num_shards: int) -> bool:
    """If all shards are there, write errors.jsonl, state.json and last the manifest.

    Every rank that finds them all does this, with the same bytes. Returns whether they were.
    """
    names = [config.shard_name(number) for number in range(num_shards)]
    present = {*store.names()}
    if not present.issuperset(names):
        return False
    try:
        reports = [json.loads(data) for data in read_files(store, [*map(report_name, names)])]
        parts = [part for part in map(errors_name, names) if part in present]
        errors = b"".join(read_files(store, parts))
        if errors:
            store.write(ERRORS, errors, WORK_DIR)
        samples = sum(report["shard"]["samples"] for report in reports)
        num_errors = sum(report["errors"] for report in reports)
        state = {"finished": True, "images": samples, "errors": num_errors}
        store.write(STATE, to_json(state), WORK_DIR)
        write_manifest(store, predicted_manifest(config.split, spec, reports), within=WORK_DIR)
    except (FileNotFoundError, DataError) as error:
        if store.exists(MANIFEST):
            return False  # another rank was quicker and has cleared up
        if isinstance(error, FileNotFoundError):
            raise DataError(
                f"{store} has shards without reports: was its {MANIFEST} removed? Predict into "
                "another --out"
            ) from error
        raise
    store.remove(WORK_DIR)
    return True


def read_files(store: Store, names: Sequence[str]) -> list[bytes]:
    """Small files; remote ones are asked for together."""
    if store.local is not None:
        return [store.read(name) for name in names]
    return store.read_ranges([ByteRange(name) for name in names]) if names else []


def predicted_manifest(split: str, spec: DataSpec, reports: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest of the results: a data set like any other."""
    num_classes = len(spec.classes)
    shards = tuple(
        ShardInfo(**{**r["shard"], "pixels": tuple(r["shard"]["pixels"])}) for r in reports
    )
    sizes = merge_size_counts([SizeCount(**size) for report in reports for size in report["sizes"]])
    return Manifest(
        classes=spec.classes,
        palette=spec.palette,
        image_format=ImageFormat(spec.channels, spec.alpha, spec.image_range),
        mask_format={
            "kind": "index",
            "num_classes": num_classes,
            "ignore_value": IGNORE,
            "source_values": [*range(num_classes)],
        },
        mean=spec.mean,
        std=spec.std,
        splits={split: SplitInfo(shards, sizes)},
    )
