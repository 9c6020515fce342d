"""`unet predict`: masks for pictures, as shards; any number of ranks, any number of kills.

    unet predict --checkpoint RUN --input PICTURES --out MASKS
    accelerate launch --config_file accelerate_config.yaml -m pipelines.predict ...
    unet predict --checkpoint RUN --input PICTURES --out MASKS --part 3/16

The inputs are sorted and cut into output shards; rank r of W makes the shards r, r + W, ... A shard
that exists is finished, and that is the only state: no rank waits for another, and whichever
finds all shards there writes the manifest. Jobs that know nothing of each other each take a part,
which the ranks of that job share. OUT/job.json says first what the job is.

Decoding runs in processes, the model here, encoding and writing in threads, all at once; a GPU
works at one batch while the results of the one before are on their way back.
"""

import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pipelines.batches import start_forkserver, start_worker
from pipelines.buffers import Buffers
from pipelines.checkpoint import LoadedModel, load_model
from pipelines.config import INCOMPLETE, RunError, UsageError, refuse_url, run_command
from pipelines.dataset import default_workers
from pipelines.decoding import Chunk, Cutting, Decoded, Decoder, DecodeSource, receive
from pipelines.devices import start
from pipelines.failures import out_of_memory, summary
from pipelines.inputs import find_inputs
from pipelines.progress import progress
from pipelines.readers import Inputs
from pipelines.results import (
    ERRORS,
    JOB,
    STATE,
    WORK_DIR,
    Encoder,
    Found,
    ResultConfig,
    errors_name,
    finish_job,
    to_json,
    write_shard,
)
from pipelines.scoring import TileTooLargeError, make_forward
from pipelines.source import parse_part
from pipelines.specks import NEEDS_SCIPY
from shards.border import has_scipy
from shards.index import MANIFEST
from shards.sample import DataError
from shards.store import Store, is_url
from unet import MaskRule, Masks, TileConfig, halve_tile, predict_masks

ENCODERS = 2
"""Threads that turn masks into PNG beside the device."""
MOST_WAITING = 512 * 2**20
"""Bytes of results that wait to be encoded and written before the model waits for them."""
CHUNK_BYTES = 2**25
"""Bytes of the pictures of a batch that workers hand over in memory which is used again."""
OVERHEAD = 2**16
"""Bytes that a result counts for besides its pixels."""

Predict = Callable[[Sequence[Tensor]], Masks]
"""Pictures uint8 [C, H, W] of one size -> what is predicted for them."""

T = TypeVar("T")


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
        named = (*fields(TileConfig), *fields(ResultConfig))
        return {field.name: getattr(self, field.name) for field in named}

    def mask_rule(self) -> MaskRule:
        """What is made of class probabilities."""
        kept = {"none": None, "png": torch.uint16, "float16": torch.float16}
        return MaskRule(
            threshold=self.threshold,
            min_confidence=self.min_confidence,
            keep=kept[self.probabilities],
        )


def run(config: PredictConfig) -> int:
    """Make the shards that are missing; 3 if some of their inputs could not be read."""
    if config.min_area > 1 and not has_scipy():
        raise UsageError(NEEDS_SCIPY)
    inputs = find_inputs(config.input)
    loaded = load_model(config.checkpoint)
    classes = loaded.spec.classes
    if config.threshold is not None and len(classes) != 2:
        raise UsageError(
            f"--threshold is for models of two classes; {config.checkpoint} has {len(classes)}: "
            f"{', '.join(classes)}"
        )
    store = Store(config.out)
    store.make()
    accelerator = start()
    begin_job(config, store, inputs, loaded, accelerator.mixed_precision)
    cutting = Cutting(len(inputs), config.samples_per_shard, config.batch_size)
    speaks = accelerator.is_main_process
    present = {*store.names()}
    if MANIFEST not in present:
        rank, world = accelerator.process_index, accelerator.num_processes
        mine = [
            number
            for number in config.shards_of(cutting.num_shards, rank, world)
            if config.shard_name(number) not in present
        ]
        try:
            if mine:
                predict_shards(config, store, inputs, loaded, cutting, mine, accelerator)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"the memory of this GPU ({accelerator.device}) does not suffice "
                f"({summary(error)}); lower --batch-size or --tile, into another --out, for they "
                "make other masks"
            ) from error
        # The rank that ends last has something to say.
        speaks = finish_job(config, store, loaded.spec, cutting.num_shards)
    else:
        # Left by a kill between the manifest and the end.
        store.remove(WORK_DIR)
    accelerator.end_training()
    part = [config.shard_name(number) for number in config.shards_of(cutting.num_shards, 0, 1)]
    return conclude(config, store, part, alone=accelerator.num_processes == 1, speaks=speaks)


def begin_job(
    config: PredictConfig, store: Store, inputs: Inputs, loaded: LoadedModel, precision: str
) -> None:
    """Write down what decides the bytes of the results, or check that it is what was begun.

    Raises UsageError naming the difference.
    """
    job = {
        "checkpoint": loaded.digest,
        "precision": precision,
        "inputs": {"count": len(inputs), "sha256": inputs.digest()},
        **config.settings(),
    }
    present = store.names()
    if JOB in present:
        try:
            begun = json.loads(store.read(JOB))
        except ValueError as error:
            raise DataError(f"{store.path(JOB)} is damaged; predict into another --out") from error
        for name in job:
            if begun.get(name) != job[name]:
                raise UsageError(
                    f"{store} was begun with {name} = {begun.get(name)}, now it is "
                    f"{job[name]}; keep it, or predict into another --out"
                )
        return
    if any(name.endswith(".tar") for name in present):
        raise UsageError(f"{store} holds shards of something else; predict into another --out")
    if store.local is not None:
        (store.local / WORK_DIR).mkdir(exist_ok=True)
    store.write(JOB, to_json(job), WORK_DIR)


@torch.inference_mode()
def predict_shards(
    config: PredictConfig,
    store: Store,
    inputs: Inputs,
    loaded: LoadedModel,
    cutting: Cutting,
    shards: Sequence[int],
    accelerator: Accelerator,
) -> None:
    """Decode in processes, predict here, encode in threads, write in one more: all at once.

    Raises DataError with `fail_fast` for an input that cannot be read.
    """
    decode = Decoder(
        inputs,
        loaded.image_format,
        config.include_image,
        config.longest_key(len(loaded.spec.classes)),
    )
    encode = Encoder(config, store, loaded, figure=len(inputs) == 1)
    decoded = load(decode, cutting, shards, config, accelerator, store)
    predict = make_predict(config, loaded, accelerator)
    launched = launch(cutting.chunks(shards), decoded, predict)
    total = sum(cutting.size(shard) for shard in shards)
    waiting = Waiting(MOST_WAITING)
    with (
        ExitStack() as begun,
        threads(ENCODERS) as encoders,
        threads(1) as writer,
        Speaker(total, accelerator) as speaker,
    ):
        for shard, group in groupby(one_behind(launched), key=lambda item: item.shard):
            writing = write_shard(store, config.shard_name(shard), loaded.spec)
            # Closed when no thread is at it any more; if it was not finished, it leaves nothing.
            begun.callback(writing.close)
            waiting.add(writer.submit(next, writing))
            for item, found in (pair for part in group for pair in part.results()):
                if item.error is not None and config.fail_fast:
                    raise DataError(item.error)
                speaker.count(item, found)
                if not encode.draws:
                    item = replace(item, image=None)
                encoded = encoders.submit(encode, item, found)
                waiting.add(writer.submit(pass_on, encoded, writing.send), held_by(item, found))
            waiting.add(writer.submit(next, writing, None))
        waiting.finish()


def load(
    decode: Decoder,
    cutting: Cutting,
    shards: Sequence[int],
    config: PredictConfig,
    accelerator: Accelerator,
    store: Store,
) -> Iterator[list[Decoded]]:
    """The decoded chunks, in order."""
    workers = default_workers(accelerator) if config.workers is None else config.workers
    method = buffers = None
    if workers and (store.local is None or decode.inputs.remote):
        # The threads and connections of remote clients do not survive a fork.
        method = "forkserver"
        start_forkserver()
    elif workers and sys.platform == "linux":
        method, buffers = "fork", Buffers(workers, CHUNK_BYTES)
    loader = DataLoader(
        DecodeSource(decode, cutting, shards, buffers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=method,
        worker_init_fn=start_worker,
    )
    sent = iter(loader)
    return sent if buffers is None else receive(sent, buffers)


def make_predict(config: PredictConfig, loaded: LoadedModel, accelerator: Accelerator) -> Predict:
    """What predicts pictures of one size, in smaller tiles where these give the same result.

    Raises RunError where a tile does not fit into the memory of a GPU.
    """
    model = loaded.model.to(accelerator.device).eval()
    forward, rule = make_forward(model, accelerator), config.mask_rule()
    margin, multiple = model.config.margin, 2**model.config.depth
    tiles = TileConfig(**{field.name: getattr(config, field.name) for field in fields(TileConfig)})
    said = False

    def predict(images: Sequence[Tensor]) -> Masks:
        nonlocal tiles, said
        before = tiles
        while True:
            try:
                masks = predict_masks(
                    forward, images, tiles, rule, margin=margin, multiple=multiple
                )
                break
            except TileTooLargeError as error:
                smaller = halve_tile(
                    tiles, error.height, error.width, margin=margin, multiple=multiple
                )
                if smaller is None:
                    raise RunError(too_large(error, margin)) from error
            tiles = smaller
        if tiles != before and not said:
            said = True
            tqdm.write(
                f"tiles of {before.tile} do not fit into the memory of this GPU "
                f"({accelerator.device}): going on with {tiles.tile}, one at a time, as --tile "
                f"{tiles.tile} --batch-size 1 would have from the start; the masks are the same",
                file=sys.stderr,
            )
        return masks

    return predict


def too_large(error: TileTooLargeError, margin: int) -> str:
    """What to do about a tile that does not fit, in a network with such a margin."""
    if margin:
        return (
            f"the smallest tile of this network, {error.height} x {error.width} pixels, does not "
            f"fit into the memory of this GPU ({error.reason}); end what else it is used for, or "
            "use a larger one"
        )
    return f"{error}, and give another --out, since other tiles make other masks"


@dataclass(frozen=True, slots=True)
class Launched:
    """Inputs of one size that the device is at, or some that could not be read."""

    shard: int
    items: Sequence[Decoded]
    masks: Masks | None
    """On the CPU, or on their way there."""
    arrived: torch.cuda.Event | None

    def results(self) -> Iterator[tuple[Decoded, Found | None]]:
        """Each input with what was found in it, when it is there."""
        if self.masks is None:
            yield from ((item, None) for item in self.items)
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        masks = self.masks
        confidence = masks.confidence.tolist()
        for i, item in enumerate(self.items):
            unsure = None if masks.unsure is None else masks.unsure[i].numpy()
            kept = None if masks.probabilities is None else masks.probabilities[i].numpy()
            yield item, Found(masks.classes[i].numpy(), confidence[i], unsure, kept)


def launch(
    chunks: Iterable[Chunk], decoded: Iterable[list[Decoded]], predict: Predict
) -> Iterator[Launched]:
    """Predict chunk by chunk; the pictures of one size that follow each other go together."""
    for chunk, items in zip(chunks, decoded, strict=True):
        for shape, group in groupby(
            items, key=lambda d: None if d.image is None else d.image.shape
        ):
            same = list(group)
            if shape is None:
                yield Launched(chunk.shard, same, None, None)
                continue
            images = [item.image for item in same if item.image is not None]
            yield Launched(chunk.shard, same, *send_back(predict(images)))


def send_back(masks: Masks) -> tuple[Masks, torch.cuda.Event | None]:
    """Masks on the CPU; from a GPU they are there only when the event has happened."""
    on_gpu = masks.classes.is_cuda
    # Into page-locked memory, beside what the GPU does next.
    here = Masks(
        masks.classes.to("cpu", non_blocking=on_gpu),
        masks.confidence.to("cpu", non_blocking=on_gpu),
        None if masks.unsure is None else masks.unsure.to("cpu", non_blocking=on_gpu),
        masks.probabilities,
    )
    if not on_gpu:
        return here, None
    arrived = torch.cuda.Event()
    arrived.record()
    return here, arrived


def one_behind(items: Iterator[T]) -> Iterator[T]:
    """The same, each when the next one has been made: the device need not wait for us."""
    held = [item for _, item in zip(range(1), items, strict=False)]
    for item in items:
        yield held.pop()
        held.append(item)
    yield from held


def held_by(item: Decoded, found: Found | None) -> int:
    """Bytes that wait with a result."""
    pixels = 0 if item.image is None else item.image.numel()
    return len(item.file) + pixels + (0 if found is None else found.num_bytes)


def pass_on(encoded: Future[T], receive: Callable[[T], object]) -> None:
    """Give a result on when it is there."""
    receive(encoded.result())


@contextmanager
def threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are not given what waits for them when something has failed."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Waiting:
    """Work under way, in order and of bounded size; what fails in it is raised here."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.work: deque[tuple[Future[Any], int]] = deque()

    def add(self, work: Future[Any], size: int = 0) -> None:
        """Take up some, and wait for the oldest where it is too much; one is never too much."""
        self.work.append((work, size + OVERHEAD))
        self.held += size + OVERHEAD
        while self.work and (
            self.work[0][0].done() or (self.held > self.most and len(self.work) > 1)
        ):
            self.end_oldest()

    def end_oldest(self) -> None:
        """Wait for it."""
        work, size = self.work.popleft()
        work.result()
        self.held -= size

    def finish(self) -> None:
        """Wait for all."""
        while self.work:
            self.end_oldest()


class Speaker:
    """Says on one rank of each machine how far that rank is: no rank asks another."""

    def __init__(self, total: int, accelerator: Accelerator) -> None:
        world = accelerator.num_processes
        self.name = (
            f"predict (rank {accelerator.process_index} of {world})" if world > 1 else "predict"
        )
        self.bar = progress(
            total=total,
            desc=self.name,
            unit="image",
            disable=not accelerator.is_local_main_process,
        )
        self.begin, self.pixels, self.errors = time.monotonic(), 0, 0

    def count(self, item: Decoded, found: Found | None) -> None:
        """One more."""
        self.errors += item.error is not None
        self.pixels += 0 if found is None else found.classes.size
        rate = self.pixels / 1e6 / max(1e-9, time.monotonic() - self.begin)
        self.bar.set_description_str(
            f"{self.name}, {rate:,.1f} megapixels/s, {self.errors} errors", refresh=False
        )
        self.bar.update()

    def __enter__(self) -> "Speaker":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def conclude(
    config: PredictConfig, store: Store, part: Sequence[str], *, alone: bool, speaks: bool
) -> int:
    """Say where the results are; 3 where inputs were left out and no launcher would be misled.

    What a part returns is about its own shards: other parts may still be at work.
    """
    present = {*store.names()}
    if STATE in present and speaks:
        state = json.loads(store.read(STATE))
        print(f"{state['images']} masks in {store}")
        for kind, wanted in (("png", config.png), ("overlay", config.overlay)):
            if wanted:
                print(f"  {kind}: {store.path(kind)}")
        if state["errors"]:
            print(f"  {state['errors']} inputs could not be read: {store.path(ERRORS)}")
    elif alone and config.part is not None:
        print(f"part {config.part}: {len(part)} shards are there; the last part ends the job")
    left_out = not present.isdisjoint(map(errors_name, part))
    return INCOMPLETE if left_out and alone else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(PredictConfig, run, argv, "predict")


if __name__ == "__main__":
    sys.exit(main())
