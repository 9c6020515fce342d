"""`unet predict`: masks for images, as shards; any number of ranks, any number of kills.

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
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

import torch
from accelerate import Accelerator

from pipelines.inference.decoding import Cutting, Decoded, Decoder
from pipelines.inference.encode import Encoder, Found
from pipelines.inference.engine import Waiting, held_by, launch, load, one_behind, pass_on, threads
from pipelines.inference.input_readers import Inputs
from pipelines.inference.inputs import find_inputs
from pipelines.inference.job import (
    ERRORS,
    STATE,
    begin_job,
    errors_name,
    finish_job,
    read_job,
    write_shard,
)
from pipelines.inference.options import WORK_DIR, PredictConfig
from pipelines.inference.specks import NEEDS_SCIPY
from pipelines.inference.tiles import predictor
from pipelines.loading.dataset import MAX_WORKERS, rank_cpus
from pipelines.model.load import LoadedModel, load_model
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import start
from pipelines.runtime.errors import INCOMPLETE, RunError, UsageError
from pipelines.runtime.failures import out_of_memory, summary
from pipelines.runtime.progress import progress
from shards.manifest import MANIFEST
from shards.masks.borders import has_scipy
from shards.sample import DataError
from shards.store import Store

MOST_WAITING = 512 * 2**20
"""Bytes of results that wait to be encoded and written before the model waits for them."""


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
    workers = min(MAX_WORKERS, rank_cpus()) if config.workers is None else config.workers
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
