"""`unet predict`: masks for pictures, as shards; any number of ranks, any number of kills.

    unet predict --checkpoint RUN --input PICTURES --out MASKS
    accelerate launch --config_file accelerate_config.yaml -m pipelines.predict ...

The inputs are sorted and cut into output shards; rank r of W makes the shards r, r + W, ... A shard
that exists is finished, and that is the only state: no rank waits for another, and whichever
finds all shards there writes the manifest. OUT/job.json says first what the job is.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from pipelines.checkpoint import LoadedModel, load_model
from pipelines.config import INCOMPLETE, UsageError, run_command
from pipelines.dataset import default_workers
from pipelines.devices import start
from pipelines.inputs import Inputs, find_inputs
from pipelines.overlay import draw_overlay
from pipelines.scoring import make_forward
from shards.images import ImageFormat, decode_image, encode_png
from shards.index import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SizeCount,
    SplitInfo,
    merge_sizes,
    write_manifest,
)
from shards.masks import encode_mask
from shards.sample import INFO_EXTENSION, MASK_EXTENSION, DataError, Uint8, is_safe_path
from shards.store import Store
from shards.writer import ShardWriter, write_atomically, write_json
from unet import DataSpec, TileConfig, predict_mask

WORK_DIR = ".predict"
ENCODERS = 2
"""Threads that turn masks into PNG beside the device."""

Predict = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
"""Pictures uint8 [C, H, W] of one size -> masks uint8 [B, H, W] and mean confidence [B]."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(TileConfig):
    """Predict masks for pictures and write them as shards.

    Given again after a kill, also on another number of GPUs, it makes what is missing.
    """

    checkpoint: str
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
    input: str
    """A picture, a folder (searched recursively), a pattern, a list file (.txt) or shards."""
    out: Path
    """Folder for the results."""
    samples_per_shard: int = 256
    """Pictures whose masks share a shard."""
    png: bool = False
    """Also write OUT/png: a PNG of class indices, in the classes' colours, for each picture."""
    overlay: bool = False
    """Also write OUT/overlay: each picture with its mask drawn over it."""
    workers: int | None = None
    """Decoding processes of each rank; left out: its share of the CPUs, at most 8."""

    def __post_init__(self) -> None:
        TileConfig.__post_init__(self)
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if self.workers is not None and self.workers < 0:
            raise ValueError("workers must not be below 0")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Inputs first..last-1 of one output shard, decoded together."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One input on its way to the model: a picture, or why there is none."""

    number: int
    key: str
    source: str
    image: Tensor | None
    """uint8 [H, W, C]."""
    error: str | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One encoded result."""

    key: str
    members: dict[str, bytes]
    width: int
    height: int
    pixels: tuple[int, ...]
    """Pixels of each class."""


def run(config: PredictConfig) -> int:
    """Make the shards that are missing; 3 if some inputs could not be read."""
    inputs = find_inputs(config.input)
    loaded = load_model(config.checkpoint)
    begin_job(config, inputs, loaded)
    accelerator = start()
    num_shards = -(-len(inputs) // config.samples_per_shard)
    mine = [
        number
        for number in range(accelerator.process_index, num_shards, accelerator.num_processes)
        if not (config.out / shard_name(number)).exists()
    ]
    speaks = accelerator.is_main_process
    if not (config.out / MANIFEST).exists():
        model = loaded.model.to(accelerator.device)
        workers = default_workers(accelerator) if config.workers is None else config.workers
        predict = partial(
            predict_mask,
            make_forward(model, accelerator),
            config=config,
            margin=model.config.margin,
            multiple=2**model.config.depth,
        )
        predict_shards(config, inputs, loaded, predict, mine, workers, quiet=not speaks)
        # The rank that ends last has something to say.
        speaks = finish_job(config, loaded, num_shards)
    else:
        # Left by a kill between the manifest and the end.
        shutil.rmtree(config.out / WORK_DIR, ignore_errors=True)
    accelerator.end_training()
    return conclude(config, alone=accelerator.num_processes == 1, speaks=speaks)


def shard_name(number: int) -> str:
    """The name of output shard `number`."""
    return f"predicted-{number:06d}.tar"


def begin_job(config: PredictConfig, inputs: Inputs, loaded: LoadedModel) -> None:
    """Write down what decides the bytes of the results, or check that it is what was begun.

    Raises UsageError naming the difference.
    """
    job = {
        "checkpoint": loaded.digest,
        "inputs": {"count": len(inputs), "sha256": inputs.digest()},
        "samples_per_shard": config.samples_per_shard,
        "batch_size": config.batch_size,
        "tile": config.tile,
        "overlap": config.overlap,
        "tta": config.tta,
        "png": config.png,
        "overlay": config.overlay,
    }
    path = config.out / "job.json"
    if path.exists():
        begun = json.loads(path.read_text())
        for name in job:
            if begun.get(name) != job[name]:
                raise UsageError(
                    f"{config.out} was begun with {name} = {begun.get(name)}, now it is "
                    f"{job[name]}; keep it, or predict into another --out"
                )
        return
    if any(config.out.glob("*.tar")):
        raise UsageError(f"{config.out} holds shards of something else; predict into another --out")
    (config.out / WORK_DIR).mkdir(parents=True, exist_ok=True)
    write_json(path, job, within=config.out / WORK_DIR)


@torch.inference_mode()
def predict_shards(
    config: PredictConfig,
    inputs: Inputs,
    loaded: LoadedModel,
    predict: Predict,
    shards: Sequence[int],
    workers: int,
    *,
    quiet: bool,
) -> None:
    """Decode in processes, predict here, encode in threads, write in one more: all at once."""
    chunks = [chunk for shard in shards for chunk in cut(shard, len(inputs), config)]
    loader = DataLoader(
        DecodeSource(inputs, chunks, loaded.image_format),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    total = sum(chunk.last - chunk.first for chunk in chunks)
    encode = Encoder(config, loaded)
    with (
        ThreadPoolExecutor(ENCODERS) as encoders,
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=total, desc="predict", unit="image", disable=quiet or not sys.stderr.isatty()
        ) as bar,
    ):
        writing: Future[None] | None = None
        arriving = zip(chunks, loader, strict=True)
        for shard, group in groupby(arriving, key=lambda item: item[0].shard):
            results: list[Future[Prediction | Decoded]] = []
            for _, decoded in group:
                for item, mask, confidence in predict_chunk(decoded, predict):
                    results.append(encoders.submit(encode, item, mask, confidence))
                    if len(results) > 2 * ENCODERS * config.batch_size:
                        # Bounds the pictures that wait for an encoder.
                        results[-2 * ENCODERS * config.batch_size].result()
                bar.update(len(decoded))
            if writing is not None:
                writing.result()
            writing = writer.submit(write_shard, config, shard, results, loaded.spec)
        if writing is not None:
            writing.result()


def cut(shard: int, num_inputs: int, config: PredictConfig) -> Iterator[Chunk]:
    """The chunks of one shard; none crosses its borders."""
    begin = shard * config.samples_per_shard
    end = min(begin + config.samples_per_shard, num_inputs)
    for first in range(begin, end, config.batch_size):
        yield Chunk(shard, first, min(first + config.batch_size, end))


class DecodeSource(IterableDataset[list[Decoded]]):
    """Decodes chunks in a DataLoader's workers; what cannot be read becomes an error record."""

    def __init__(self, inputs: Inputs, chunks: Sequence[Chunk], form: ImageFormat) -> None:
        self.inputs, self.chunks = inputs, chunks
        self.form = form

    def __iter__(self) -> Iterator[list[Decoded]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for chunk in self.chunks[worker::num_workers]:
            yield [self.decode(number) for number in range(chunk.first, chunk.last)]

    def decode(self, number: int) -> Decoded:
        """One input."""
        name = self.inputs.name(number)
        try:
            picture = self.inputs.read(number)
            if not is_safe_path(picture.source):
                raise DataError(
                    f"{name} names {picture.source!r} as its source, a path that leaves the folder"
                )
            image = torch.from_numpy(np.array(decode_image(picture.data, self.form, name)))
            return Decoded(number, picture.key, picture.source, image, None)
        except DataError as error:
            return Decoded(number, "", name, None, str(error))
        except OSError as error:
            return Decoded(
                number, "", name, None, f"{name} cannot be read: {error.strerror or error}"
            )


def predict_chunk(
    decoded: Sequence[Decoded], predict: Predict
) -> Iterator[tuple[Decoded, Uint8 | None, float]]:
    """Each input with its mask [H, W] and mean confidence.

    Those of one size that follow each other share a forward pass.
    """
    for shape, group in groupby(decoded, key=lambda d: None if d.image is None else d.image.shape):
        same = list(group)
        if shape is None:
            yield from ((item, None, 0.0) for item in same)
            continue
        images = [item.image.permute(2, 0, 1) for item in same if item.image is not None]
        masks, confidence = predict(images)
        yield from zip(same, masks.cpu().numpy(), confidence.tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns masks into members of a shard and, if asked, into pictures beside it."""

    config: PredictConfig
    loaded: LoadedModel

    def __call__(
        self, item: Decoded, mask: Uint8 | None, confidence: float
    ) -> Prediction | Decoded:
        """An encoded result, or the input as it is where it could not be read."""
        if mask is None or item.image is None:
            return item
        spec = self.loaded.spec
        pixels = count_pixels(mask, len(spec.classes))
        png = encode_mask(mask, spec.palette)
        info = {
            "source": item.source,
            "width": mask.shape[1],
            "height": mask.shape[0],
            "group": None,
            "checkpoint": self.loaded.digest,
            "shares": {
                name: round(n / mask.size, 6)
                for name, n in zip(spec.classes, pixels.tolist(), strict=True)
            },
            "confidence": round(confidence, 6),
        }
        name = PurePosixPath(item.source).with_suffix(".png")
        if self.config.png:
            self.write_picture(Path("png", name), png)
        if self.config.overlay:
            drawn = draw_overlay(item.image.numpy(), mask, spec.palette)
            self.write_picture(Path("overlay", name), encode_png(drawn))
        members = {MASK_EXTENSION: png, INFO_EXTENSION: json.dumps(info).encode()}
        return Prediction(item.key, members, mask.shape[1], mask.shape[0], tuple(pixels.tolist()))

    def write_picture(self, name: Path, data: bytes) -> None:
        """A picture for people, whole."""
        path = self.config.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, durable=False, within=self.config.out / WORK_DIR)


def count_pixels(mask: Uint8, num_classes: int) -> NDArray[np.int64]:
    """Pixels of each class [num_classes] of a mask [H, W]."""
    # NumPy counts in a copy of 8 bytes a pixel.
    parts = np.array_split(mask.ravel(), 1 + mask.size // 2**20)
    return sum(
        (np.bincount(part, minlength=num_classes) for part in parts),
        start=np.zeros(num_classes, dtype=np.int64),
    )


def write_shard(
    config: PredictConfig,
    number: int,
    results: Sequence[Future[Prediction | Decoded]],
    spec: DataSpec,
) -> None:
    """Write one shard, and before it what goes with it: errors and the report."""
    name = shard_name(number)
    pixels = np.zeros(len(spec.classes) + 1, dtype=np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    errors: list[str] = []
    with ShardWriter(config.out / name) as writer:
        for result in (future.result() for future in results):
            if isinstance(result, Decoded):
                errors.append(json.dumps({"input": result.source, "error": result.error}) + "\n")
                continue
            writer.add(result.key, result.members)
            pixels[:-1] += result.pixels
            sizes[result.width, result.height] += 1
        file = writer.seal()
        if errors:
            path = config.out / f"{name.removesuffix('.tar')}.errors.jsonl"
            write_atomically(path, "".join(errors).encode(), within=config.out / WORK_DIR)
        info = ShardInfo(file.name, file.samples, file.bytes, file.sha256, tuple(pixels.tolist()))
        counts = [SizeCount(w, h, spec.channels, n) for (w, h), n in sorted(sizes.items())]
        report = {
            "shard": asdict(info),
            "sizes": [asdict(c) for c in counts],
            "errors": len(errors),
        }
        write_json(config.out / WORK_DIR / f"{name}.json", report)


def finish_job(config: PredictConfig, loaded: LoadedModel, num_shards: int) -> bool:
    """If all shards are there, write errors.jsonl, state.json and last the manifest.

    Every rank that finds them all does this, with the same bytes. Returns whether they were.
    """
    work_dir = config.out / WORK_DIR
    names = [shard_name(number) for number in range(num_shards)]
    if not all((config.out / name).exists() for name in names):
        return False
    try:
        reports = [json.loads((work_dir / f"{name}.json").read_text()) for name in names]
        parts = [config.out / f"{name.removesuffix('.tar')}.errors.jsonl" for name in names]
        errors = "".join(part.read_text() for part in parts if part.exists())
        num_errors = sum(report["errors"] for report in reports)
        if errors:
            write_atomically(config.out / "errors.jsonl", errors.encode(), within=work_dir)
        samples = sum(report["shard"]["samples"] for report in reports)
        state = {"finished": True, "images": samples, "errors": num_errors}
        write_json(config.out / "state.json", state, within=work_dir)
        manifest = predicted_manifest(loaded.spec, reports)
        write_manifest(Store(str(config.out)), manifest, within=WORK_DIR)
    except FileNotFoundError:
        if (config.out / MANIFEST).exists():
            return False  # another rank was quicker and has cleared up
        raise
    shutil.rmtree(work_dir, ignore_errors=True)
    return True


def predicted_manifest(spec: DataSpec, reports: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest of the results: a data set like any other."""
    num_classes = len(spec.classes)
    shards = tuple(
        ShardInfo(**{**r["shard"], "pixels": tuple(r["shard"]["pixels"])}) for r in reports
    )
    sizes = merge_sizes([SizeCount(**size) for report in reports for size in report["sizes"]])
    return Manifest(
        classes=spec.classes,
        palette=spec.palette,
        image_format=ImageFormat(spec.channels, spec.alpha, spec.image_range),
        mask_format={
            "kind": "index",
            "num_classes": num_classes,
            "source_values": [*range(num_classes)],
        },
        mean=spec.mean,
        std=spec.std,
        splits={"predicted": SplitInfo(shards, sizes)},
    )


def conclude(config: PredictConfig, *, alone: bool, speaks: bool) -> int:
    """Say where the results are; 3 where inputs were left out and no launcher would be misled."""
    state_file = config.out / "state.json"
    if not state_file.exists():
        return 0  # other ranks are still at work; the last of them finishes the job
    state = json.loads(state_file.read_text())
    if speaks:
        print(f"{state['images']} masks in {config.out}")
        for kind, wanted in (("png", config.png), ("overlay", config.overlay)):
            if wanted:
                print(f"  {kind}: {config.out / kind}")
        if state["errors"]:
            print(f"  {state['errors']} inputs could not be read: {config.out / 'errors.jsonl'}")
    return INCOMPLETE if state["errors"] and alone else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(PredictConfig, run, argv, "predict")


if __name__ == "__main__":
    sys.exit(main())
