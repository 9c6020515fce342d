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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.checkpoint import LoadedModel, load_model
from pipelines.compiled import CompiledForward, first_tile
from pipelines.config import INCOMPLETE, RunError, UsageError, refuse_url, run_command
from pipelines.dataset import MOST_WORKERS, rank_cpus
from pipelines.decoding import Cutting, Decoded, Decoder
from pipelines.devices import choose_batch_size, choose_channels_last, start
from pipelines.engine import (
    Predict,
    Waiting,
    held_by,
    launch,
    load,
    one_behind,
    pass_on,
    threads,
    threads_for,
)
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
from unet import MaskRule, PredictedMasks, TileConfig, halve_tile, predict_masks

MOST_WAITING = 512 * 2**20
"""Bytes of results that wait to be encoded and written before the model waits for them."""


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
    store.create_folder()
    accelerator = start()
    begun = read_job(store)
    config = config.settle(begun or {}, accelerator.device)
    begin_job(config, store, begun, inputs, loaded, accelerator.mixed_precision)
    cutting = Cutting(len(inputs), config.samples_per_shard, config.tiles.num_together)
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
                f"the GPU ({accelerator.device}) is out of memory ({summary(error)}); lower "
                "--batch-size or --tile, into another --out, since they change the masks"
            ) from error
        # The rank that ends last has something to say.
        speaks = finish_job(config, store, loaded.spec, cutting.num_shards)
    else:
        # Left by a kill between the manifest and the end.
        store.remove(WORK_DIR)
    accelerator.end_training()
    part = [config.shard_name(number) for number in config.shards_of(cutting.num_shards, 0, 1)]
    return conclude(config, store, part, alone=accelerator.num_processes == 1, speaks=speaks)


def read_job(store: Store) -> dict[str, Any] | None:
    """What the job in a folder was begun with; None where none was.

    Raises DataError where that is damaged.
    """
    if not store.exists(JOB):
        return None
    try:
        begun = json.loads(store.read(JOB))
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        raise DataError(f"{store.path(JOB)} is damaged; predict into another --out")
    return begun


def begin_job(
    config: PredictConfig,
    store: Store,
    begun: Mapping[str, Any] | None,
    inputs: Inputs,
    loaded: LoadedModel,
    precision: str,
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
    if begun is not None:
        refuse_other_job(store, begun, job)
        return
    if any(name.endswith(".tar") for name in store.names()):
        raise UsageError(f"{store} holds shards of something else; predict into another --out")
    if store.local is not None:
        (store.local / WORK_DIR).mkdir(exist_ok=True)
    store.write(JOB, to_json(job), WORK_DIR)


def refuse_other_job(store: Store, begun: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raise UsageError, naming a setting, where a job is not the one that was begun."""
    for name, value in job.items():
        if name not in begun:
            raise UsageError(
                f"{store} was begun by a version of this program that did not know {name}; predict "
                "into another --out"
            )
        if begun[name] != value:
            raise UsageError(
                f"{store} was begun with {name} = {begun[name]}, now it is {value}; keep it, or "
                "predict into another --out"
            )


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
    workers = min(MOST_WORKERS, rank_cpus()) if config.workers is None else config.workers
    remote = store.local is None or inputs.remote
    decoded = load(decode, cutting, shards, workers, remote=remote)
    total = sum(cutting.size(shard) for shard in shards)
    waiting = Waiting(MOST_WAITING)
    with (
        ExitStack() as begun,
        predictor(config, loaded, accelerator, decode) as predict,
        threads(num_encoders(rank_cpus())) as encoders,
        threads(1) as writer,
        Speaker(total, accelerator) as speaker,
    ):
        launched = one_behind(launch(cutting.chunks(shards), decoded, predict))
        for shard, group in groupby(launched, key=lambda item: item.shard):
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


def num_encoders(cpus: int) -> int:
    """Threads that encode beside the device, of a rank with so many CPUs.

    PNGs of masks take little; overlays, figures and probabilities take zlib, in several threads.
    """
    return max(2, cpus // 4)


@contextmanager
def predictor(
    config: PredictConfig, loaded: LoadedModel, accelerator: Accelerator, decode: Decoder
) -> Iterator[Predict]:
    """What predicts images of one size, while the block lasts."""
    model, compiled = loaded.model.to(accelerator.device).eval(), None
    if config.channels_last:
        # Which torch's stubs leave out.
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile and (sides := first_tile(decode, config.tiles, model)) is not None:
        compiled = CompiledForward(model.forward, (config.tiles.num_together, *sides))
        model.forward = compiled
    with threads_for(make_forward(model, accelerator), accelerator.device) as forward:
        yield make_predict(config, forward, loaded, accelerator.device)
    if compiled is not None:
        compiled.report()


def make_predict(
    config: PredictConfig,
    forward: Callable[[Tensor], Tensor],
    loaded: LoadedModel,
    device: torch.device,
) -> Predict:
    """What predicts images of one size, in smaller tiles where these give the same result.

    Raises RunError where a tile does not fit into the memory of a GPU.
    """
    network, rule, tiles = loaded.model.config, config.mask_rule(), config.tiles
    said = False

    def predict(images: Sequence[Tensor]) -> PredictedMasks:
        nonlocal tiles, said
        before = tiles
        while True:
            try:
                masks = predict_masks(forward, images, tiles, network, rule)
                break
            except TileTooLargeError as error:
                smaller = halve_tile(tiles, error.height, error.width, network)
                if smaller is None:
                    raise RunError(too_large(error, network.margin)) from error
            tiles = smaller
        if tiles != before and not said:
            said = True
            tqdm.write(
                f"tiles of {before.tile} do not fit into the memory of this GPU "
                f"({device}): going on with {tiles.tile}, one at a time, as --tile "
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
