"""`unet predict`: masks for images as shards, resumable with any number of ranks.

    unet predict --checkpoint RUN --input IMAGES --out MASKS
    accelerate launch --config_file accelerate_config.yaml -m pipelines.predict ...
    unet predict --checkpoint RUN --input IMAGES --out MASKS --part 3/16

The inputs are sorted and cut into output shards; rank r of W makes the shards r, r + W, ... A shard
that exists is finished, and that is the only state; whichever rank finds all shards present writes
the manifest. Ranks that are done take over the shards of a stalled one (`inference.leases`).
Independent jobs each take a part, shared by the ranks of the job. OUT/job.json records the settings
of the job before any shard.

Decoding in worker processes, the model in this process, encoding and writing in threads all
overlap; a GPU computes one batch while the results of the previous one are copied back.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from accelerate import Accelerator

from pipelines.inference.decoding import DecodedInput, Decoder, ShardLayout
from pipelines.inference.encode import ModelOutput, ResultEncoder
from pipelines.inference.engine import (
    BoundedQueue,
    decode_chunks,
    delay_by_one,
    forward_result,
    predict_chunks,
    size_in_memory,
    thread_pool,
)
from pipelines.inference.input_readers import Inputs, ShardInputs
from pipelines.inference.inputs import find_inputs
from pipelines.inference.job import (
    ERRORS,
    STATE,
    ShardExistsError,
    describe_errors,
    errors_name,
    finish_job,
    read_job,
    read_state,
    start_job,
    write_shard,
)
from pipelines.inference.leases import Lease, wait_for_ranks
from pipelines.inference.objects import OBJECTS_CSV, OBJECTS_FOLDER
from pipelines.inference.options import WORK_DIR, PredictConfig
from pipelines.inference.reading import describe_changes
from pipelines.inference.tiles import predictor
from pipelines.inference.wandb_job import record_job
from pipelines.loading.dataset import MAX_WORKERS, rank_cpus
from pipelines.model.load import LoadedModel, load_models
from pipelines.model.temperature import apply_calibration
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import start
from pipelines.runtime.errors import INCOMPLETE, RunError, UsageError
from pipelines.runtime.failures import is_out_of_memory, summarise_error
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.progress import progress
from pipelines.runtime.terminal import print_lines
from pipelines.runtime.verification import verify_shards
from shards.images.files import ImageFormat
from shards.manifest import MANIFEST
from shards.masks.borders import has_scipy, needs_scipy
from shards.sample import DataError
from shards.store import Store

MAX_PENDING_BYTES = 512 * 2**20
"""Results to be encoded and written, in bytes, at which the model waits for them."""


def run(config: PredictConfig) -> int:
    """Make the missing shards; returns 3 if some of their inputs could not be read."""
    inputs = find_inputs(config.input, config.input_rule())
    loaded, image_format, notes = load_for(config, inputs)
    store = Store(config.out)
    store.create_folder()
    if store.local is not None and not store.exists(MANIFEST):
        require_writable("--out", store.local)
    accelerator = start(trackers=["wandb"] if config.wandb_project else ())
    if accelerator.is_main_process and notes:
        print_lines(notes, sys.stderr)
    if isinstance(inputs, ShardInputs) and config.verify_shards:
        rank, world = accelerator.process_index, accelerator.num_processes
        verify_shards(inputs.reader.store, inputs.reader.shards, rank=rank, world=world)
    started = read_job(store)
    config = config.resolve_defaults(started or {}, accelerator.device)
    start_job(config, store, started, inputs, loaded, accelerator.mixed_precision)
    layout = ShardLayout(
        len(inputs), config.results.samples_per_shard, config.tiles.effective_batch_size
    )
    prints = accelerator.is_main_process
    if not store.exists(MANIFEST):
        longest_key = config.results.longest_key(len(loaded.spec.classes))
        decode = Decoder(inputs, image_format, config.results.include_image, longest_key)
        # The last rank to finish prints the result.
        prints = make_all(config, store, decode, loaded, layout, accelerator)
    else:
        # Left over if the job was killed after writing the manifest.
        store.remove(WORK_DIR)
        if prints:
            print(f"{store} is already predicted with these settings; nothing to do")
    if config.wandb_project and accelerator.is_main_process and store.exists(MANIFEST):
        record_job(config.wandb_project, config, store, inputs, loaded, accelerator)
    accelerator.end_training()
    alone = accelerator.num_processes == 1
    return print_result(config, store, layout.num_shards, alone=alone, prints=prints)


def load_for(config: PredictConfig, inputs: Inputs) -> tuple[LoadedModel, ImageFormat, list[str]]:
    """Load the model for some inputs; returns also how they are decoded, and notes to print.

    Raises UsageError or DataError for flags that do not apply to the model or the inputs.
    """
    results, notes = config.results, [*inputs.notes]
    if results.min_area > 1 and not has_scipy():
        raise UsageError(needs_scipy("--min-area"))
    if results.objects and not has_scipy():
        raise UsageError(needs_scipy("--objects"))
    trained = load_models(config.checkpoint, on_host=config.ensemble_on == "host")
    trained.refuse_unused(config.tiles)
    loaded = config.reading.apply(trained)
    notes += describe_changes(loaded, trained)
    if results.calibrated:
        loaded, about = apply_calibration(loaded, config.checkpoint, config.tiles)
        notes += about
    image_format = loaded.image_format
    if isinstance(inputs, ShardInputs):
        config.reading.refuse_for_data_set(config.input)
        notes += loaded.describe_differences(inputs.image_format)
        image_format = loaded.stored_format(inputs.image_format)
    elif config.verify_shards:
        raise UsageError(
            f"--verify-shards: --input {config.input} is not a data set (it has no {MANIFEST})"
        )
    classes = loaded.spec.classes
    of_two = {"--threshold": results.threshold is not None, "--objects": results.objects}
    if (flags := [flag for flag, used in of_two.items() if used]) and len(classes) != 2:
        raise UsageError(
            f"{flags[0]} is for models of two classes; {config.checkpoint[0]} has {len(classes)}: "
            f"{', '.join(classes)}"
        )
    return loaded, image_format, notes


def make_all(
    config: PredictConfig,
    store: Store,
    decode: Decoder,
    loaded: LoadedModel,
    layout: ShardLayout,
    accelerator: Accelerator,
) -> bool:
    """Make the shards of this rank and of stalled ones; returns whether the job is complete.

    Raises:
        RunError: the GPU is out of memory, or a rank stalled.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = {
        config.results.shard_name(number): number
        for number in config.shards_of(layout.num_shards, rank, world)
    }
    make = partial(predict_shards, config, store, decode, loaded, layout, accelerator)
    try:
        make_missing(store, mine, make)
        stalled = take_over(config, store, layout.num_shards, accelerator, make)
    except BaseException as error:
        if store.exists(MANIFEST):
            # The others completed the job while this rank was stopped: its files are unused.
            store.remove(WORK_DIR)
        if not isinstance(error, RuntimeError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"the GPU ({accelerator.device}) is out of memory ({summarise_error(error)}); lower "
            "--batch-size or --tile and choose another --out, since both change the masks"
            + ", or use --ensemble-on host"
            * (len(loaded.members) > 1)
        ) from error
    complete = finish_job(config.results, store, loaded.spec, layout.num_shards)
    if stalled:
        # The launcher ends stalled ranks only if another one fails.
        raise RunError(
            f"{stalled} made no progress for --rank-timeout {config.rank_timeout:g} minutes; the "
            f"other ranks took over the shards, and {store} is complete"
            if complete
            else f"{stalled} made no progress; rerun the same command to resume"
        )
    return complete


@torch.inference_mode()
def predict_shards(
    config: PredictConfig,
    store: Store,
    decode: Decoder,
    loaded: LoadedModel,
    layout: ShardLayout,
    accelerator: Accelerator,
    shards: Sequence[int],
    within: str,
) -> None:
    """Decode in processes, predict in this one, encode and write in threads, concurrently.

    Raises DataError with `fail_fast` for an input that cannot be read.
    """
    results, inputs = config.results, decode.inputs
    encode = ResultEncoder(results, store, loaded, len(inputs) == 1, config.fail_fast)
    workers = min(MAX_WORKERS, rank_cpus()) if config.workers is None else config.workers
    remote = store.local is None or inputs.remote
    decoded = decode_chunks(decode, layout, shards, workers, remote=remote)
    total = sum(layout.size(shard) for shard in shards)
    pending = BoundedQueue(MAX_PENDING_BYTES)
    lease = Lease(store, accelerator.process_index, config.rank_timeout * 60)
    with (
        ExitStack() as stack,
        predictor(config, loaded, accelerator, decode) as predict,
        thread_pool(num_encoders(rank_cpus())) as encoders,
        thread_pool(1) as writer,
        ProgressLine(total, accelerator) as line,
    ):
        in_flight = delay_by_one(predict_chunks(layout.chunks(shards), decoded, predict))
        for shard, group in groupby(in_flight, key=lambda item: item.shard):
            writing = write_shard(results, store, shard, loaded.spec, within)
            # Closed after the threads have ended; an unfinished shard leaves nothing behind.
            stack.callback(writing.close)
            pending.add(writer.submit(next, writing))
            for item, output in (pair for part in group for pair in part.results()):
                if item.error is not None and config.fail_fast:
                    raise DataError(item.error)
                line.count(item, output)
                if accelerator.num_processes > 1:
                    lease.renew()
                if not encode.draws:
                    item = replace(item, image=None)
                encoded = encoders.submit(encode, item, output)
                pending.add(
                    writer.submit(forward_result, encoded, writing.send),
                    size_in_memory(item, output),
                )
            pending.add(writer.submit(next, writing, None))
        pending.finish()


def make_missing(
    store: Store, shards: Mapping[str, int], make: Callable[[Sequence[int], str], None]
) -> None:
    """Make those of some shards, name -> number, that do not exist.

    After a shard that another rank has made meanwhile, it starts again with those still missing.
    """
    while missing := [shards[name] for name in shards.keys() - {*store.names()}]:
        with suppress(ShardExistsError):
            make(sorted(missing), "")


def take_over(
    config: PredictConfig,
    store: Store,
    num_shards: int,
    accelerator: Accelerator,
    make: Callable[[Sequence[int], str], None],
) -> str:
    """Wait for the other ranks; `make` the shards of stalled ones.

    Returns the names of these ranks, such as `rank 1, rank 3`; empty if there are none.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    numbers = {
        config.results.shard_name(number): number for number in config.shards_of(num_shards, 0, 1)
    }
    names = [*numbers]
    others = {other: names[other::world] for other in range(world) if other != rank}
    stalled = wait_for_ranks(store, others, config.rank_timeout * 60)
    names_of_stalled = ", ".join(f"rank {other}" for other in stalled)
    for other, missing in stalled.items():
        print(
            f"warning: rank {other} has made no progress for {config.rank_timeout:g} minutes; rank "
            f"{rank} takes over its {len(missing)} shards",
            file=sys.stderr,
            flush=True,
        )
        # Each rank starts with another shard.
        for name in missing[rank % len(missing) :] + missing[: rank % len(missing)]:
            if not store.exists(name):
                with suppress(ShardExistsError):
                    make([numbers[name]], f"{WORK_DIR}/rank-{rank}")
                # Of a rank that may be stopped or killed.
                for part in (name, f"{name.removesuffix('.tar')}.idx"):
                    store.remove(f".{part}.tmp")
    return names_of_stalled


def num_encoders(cpus: int) -> int:
    """Choose the number of encoder threads of a rank from its number of CPUs.

    PNGs of masks are cheap; overlays, figures and probabilities spend their time in zlib.
    """
    return max(2, cpus // 4)


class ProgressLine:
    """Progress display of one rank per machine, about its own images."""

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
        self.start, self.pixels, self.errors = time.monotonic(), 0, 0

    def count(self, item: DecodedInput, output: ModelOutput | None) -> None:
        """Count one image."""
        self.errors += item.error is not None
        self.pixels += 0 if output is None else output.classes.size
        rate = self.pixels / 1e6 / max(1e-9, time.monotonic() - self.start)
        self.bar.set_description_str(
            f"{self.name}, {rate:,.1f} megapixels/s, {self.errors} errors", refresh=False
        )
        self.bar.update()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def print_result(
    config: PredictConfig, store: Store, num_shards: int, *, alone: bool, prints: bool
) -> int:
    """Print where the results are and return the exit code: 3 if inputs were left out.

    With several ranks it is 0, since a launcher would take 3 for a failure. The code of a part is
    about its own shards: other parts may still be running.
    """
    part = [config.results.shard_name(number) for number in config.shards_of(num_shards, 0, 1)]
    present = {*store.names()}
    if STATE in present and prints:
        state = read_state(store)
        print(f"{state.images} masks in {store}")
        results = config.results
        for kind, wanted in (
            *(("png", results.png), ("overlay", results.overlay)),
            *((OBJECTS_FOLDER, results.objects), (OBJECTS_CSV, results.objects)),
        ):
            if wanted:
                print(f"  {kind}: {store.path(kind)}")
        if state.errors:
            print(f"  {state.errors} inputs could not be read: {store.path(ERRORS)}")
    elif alone and config.part is not None:
        print(f"part {config.part}: {len(part)} shards finished; the last part writes the manifest")
    left_out = [name for name in map(errors_name, part) if name in present]
    if left_out and (prints or alone):
        print(f"warning: {describe_errors(store, left_out)}", file=sys.stderr)
    return INCOMPLETE if left_out and alone else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(PredictConfig, run, argv, "predict")


if __name__ == "__main__":
    sys.exit(main())
