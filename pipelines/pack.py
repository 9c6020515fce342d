"""`unet pack`: folders of images and masks -> WebDataset shards and a manifest.

The plan (which pair goes into which shard) is fixed and saved first; every shard is then an
independent task on any executor, so that the bytes do not depend on the number of workers, parts
and kills. Until the manifest is written, OUT/.pack holds the plan and a report on each finished
shard; its plan.json stays, so that a rerun of the same command is recognised.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

from pipelines.packing.classes import IGNORED_REMEDY, find_class_problems
from pipelines.packing.manifest import make_manifest, summarise
from pipelines.packing.options import SourceOptions
from pipelines.packing.pack_options import BorderOptions, JobOptions, ShardOptions
from pipelines.packing.plan import WORK_DIR, PlannedShard, list_sources, make_plan
from pipelines.packing.problems import PROBLEMS, save_problems
from pipelines.packing.propose import propose_format
from pipelines.packing.propose_layout import propose_layout
from pipelines.packing.shard_job import EMPTY_SUFFIX, PackRule, pack_shard, read_shard_report
from pipelines.packing.stored_plan import HEADER, clear_work, encode_header, fix_plan
from pipelines.runtime.command import run_command
from pipelines.runtime.errors import INCOMPLETE, RunError, UsageError, parse_part
from pipelines.runtime.outputs import refuse_bad_output, require_writable
from pipelines.runtime.processes import num_workers, refuse_negative_workers, run_all
from pipelines.runtime.progress import progress
from pipelines.runtime.terminal import print_lines
from pipelines.runtime.yaml_flags import Flat, refuse_unused
from shards.folders.pairs import Pairing
from shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest, write_manifest
from shards.requests import REMOTE_TIMEOUT
from shards.sample import AggregateDataError, DataError
from shards.statistics import SampleStatistics, find_duplicates, merge_statistics
from shards.store import Store, is_url

NOTHING_TO_PACK = (
    "nothing to pack; check --images, --masks and the suffixes, or run unet check FOLDER"
)
NUM_MEASURED = 32
"""Images that `--verify headers` decodes nevertheless, to measure mean and standard deviation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Pack images and masks into WebDataset shards with a manifest.

    Every image and mask is decoded and checked first; nothing that cannot be trained on is packed.
    If `pack` is killed, rerun the same command: it resumes, and keeps the finished shards.
    """

    USAGE: ClassVar[str] = "--images PATH --masks PATH --mask-format FORMAT --out SHARDS"
    """Arguments of the usual call, which `--help` lists first."""
    out: str | None = None
    """Folder for the shards, or a URL such as s3://bucket/folder; created if missing. Required,
    except with `auto`, which writes nothing."""
    verify: Literal["full", "headers"] = "full"
    """full: decode every pixel. headers: trust the headers of ordinary images and of canonical
    masks; class shares are then unknown."""
    keep_going: bool = False
    """Pack the valid files, list the others in OUT/problems.txt, and exit with 3."""
    workers: int = 0
    """Processes; 0: one per CPU."""
    remote_timeout: float = REMOTE_TIMEOUT
    """Seconds for a request to a bucket, retries included."""
    source: Flat[SourceOptions]
    shard: Flat[ShardOptions] = field(default_factory=ShardOptions)
    border: Flat[BorderOptions] = field(default_factory=BorderOptions)
    job: Flat[JobOptions] = field(default_factory=JobOptions)

    def __post_init__(self) -> None:
        self.source.require_input()
        refuse_negative_workers(self.workers)
        if self.out is None:
            if not self.source.proposes:
                raise ValueError("--out is missing: the folder or URL for the shards")
        else:
            refuse_bad_output("--out", self.out)
        if self.job.scheduler is not None and self.workers:
            raise ValueError("--workers has no effect with --scheduler, which has its own workers")
        if not self.source.has_masks:
            refuse_unused(self.border, "needs --masks")
        if self.source.mask.mask_format != "auto" and not self.source.names_classes:
            # With `auto`, annotations and layouts, the class names are not known yet.
            self.border.make_rule(self.source.mask.class_names())

    @property
    def place(self) -> str:
        """Folder or URL of the shards."""
        assert self.out is not None
        return self.out


def run(config: PackConfig) -> int:
    """Plan, write the missing shards, then the manifest."""
    if (layout := config.source.layout.layout) is not None and layout[0] == "auto":
        return propose_layout(layout[1], "pack")
    if config.source.mask.mask_format == "auto":
        return propose_format(config, "pack")
    store = Store(config.place)
    store.create_folder()
    if store.exists(MANIFEST):
        return report_finished(config, store)
    if store.local is not None:
        require_writable("--out", store.local)
    try:
        return pack_into(config, store)
    except AggregateDataError as error:
        if len(error.problems) > 1:
            # The list of a part is removed with WORK_DIR; the finished data set has its own.
            part = config.job.part
            part = "" if part is None else f"{WORK_DIR}/{part.replace('/', '-of-')}-"
            path = save_problems(error.problems, store, f"{part}{PROBLEMS}")
            raise DataError(f"{error}\n  all problems: {path}") from error
        raise


def report_finished(config: PackConfig, store: Store) -> int:
    """Report that this command has packed the data set; returns the exit code it had.

    Raises DataError if other files or settings made the data set.
    """
    try:
        pairing, _ = find_valid_pairs(config)
        plan, _ = plan_shards(config, pairing)
        settings = list_settings(config, make_pack_rule(config, store, pairing))
        same = store.exists(HEADER) and store.read(HEADER) == encode_header(settings, plan)
    except DataError:
        same = False
    if not same:
        raise DataError(
            f"{store} is already a data set, made from other files or with other settings; "
            "choose another --out or remove it"
        )
    # Reports are left over by a kill right after the manifest was written.
    clear_work(store)
    manifest = read_manifest(config.place)
    samples = sum(split.samples for split in manifest.splits.values())
    print(f"{store} is already packed with these settings: {samples} samples; nothing to do")
    return INCOMPLETE if store.exists(PROBLEMS) else 0


def plan_shards(config: PackConfig, pairing: Pairing) -> tuple[list[PlannedShard], list[str]]:
    """Plan the shards; also describes the images that are left out, one line each."""
    return make_plan(
        pairing,
        config.source.make_split_rule(),
        config.shard.make_rule(),
        keep_going=config.keep_going,
        duplicates=config.source.duplicate.duplicates,
    )


def pack_into(config: PackConfig, store: Store) -> int:
    """Pack into an existing folder or bucket; returns the exit code.

    Raises DataError for bad input, RunError if shards of other parts are missing.
    """
    pairing, problems = find_valid_pairs(config)
    source = config.source
    print_lines([*source.describe_splits(), *source.describe_input(), *pairing.notes])
    rule = make_pack_rule(config, store, pairing)
    plan, left_out = plan_shards(config, pairing)
    with ExitStack() as held:
        rule = replace(rule, plan=fix_plan(store, list_settings(config, rule), plan, held))
        names = {*store.names(), *store.names(WORK_DIR)}
        done = {s.name for s in plan if s.name in names or f"{s.name}{EMPTY_SUFFIX}" in names}
        if done:
            print(f"{len(done)} of {len(plan)} shards exist already")
        todo = [shard for shard in plan if shard.name not in done]
        if config.job.finish and todo:
            raise RunError(
                f"{store}: {len(todo)} of {len(plan)} shards are missing, first {todo[0].name}; "
                "rerun the parts that pack them, then --finish"
            )
        if (part := config.job.part) is not None:
            number, count = parse_part("--part", part)
            mine = {shard.name for shard in plan[number - 1 :: count]}
            num_skipped = pack_shards([shard for shard in todo if shard.name in mine], rule, config)
            print(f"part {part}: {len(mine)} shards are complete; after all parts, run --finish")
            return INCOMPLETE if num_skipped else 0
        pack_shards(todo, rule, config)
    return finish_data_set(config, plan, rule, [*problems, *left_out])


def find_valid_pairs(config: PackConfig) -> tuple[Pairing, list[str]]:
    """Pair all files; also returns the problems of files without a pair, one line each.

    Raises DataError if there is no pair, or for problems without --keep-going.
    """
    pairing = config.source.find_pairs()
    problems = list_refused_files(config, pairing)
    if not pairing.pairs:
        raise AggregateDataError(problems or ["no image has a mask"], NOTHING_TO_PACK)
    if problems and not config.keep_going:
        skip = "" if pairing.refused else ", skip them with --skip-unpaired"
        raise AggregateDataError(problems, f"fix them{skip}, or pack the rest with --keep-going")
    return pairing, problems


def list_refused_files(config: PackConfig, pairing: Pairing) -> list[str]:
    """List the files without a pair, except those that --skip-unpaired skips."""
    return [*pairing.refused, *([] if config.source.pairing.skip_unpaired else pairing.unpaired)]


def make_pack_rule(config: PackConfig, store: Store, pairing: Pairing) -> PackRule:
    """Build what every worker needs to know; the plan is added later."""
    decode_every = 1 if config.verify == "full" else -(-len(pairing.pairs) // NUM_MEASURED)
    try:
        border = config.border.make_rule(config.source.class_names())
    except ValueError as error:
        raise UsageError(str(error)) from error
    sample = replace(config.source.sample_rule(pairing), border=border)
    images, masks = pairing.images, pairing.masks
    if config.job.scheduler is not None:
        # Workers of a cluster run in other working directories.
        images, masks = images.resolve(), masks.resolve() if masks else None
        store = store.absolute()
    return PackRule(store, images, masks, sample, decode_every, config.keep_going, plan="")


def list_settings(config: PackConfig, rule: PackRule) -> dict[str, Any]:
    """Settings that decide the bytes of a shard, named as in messages to users."""
    classes = config.source.class_names()
    return {
        "classes": classes,
        "mask format": asdict(rule.sample.masks) if rule.sample.masks else None,
        **({"annotations": asdict(rule.sample.annotations)} if rule.sample.annotations else {}),
        "resize mask": rule.sample.resize_mask,
        "images": asdict(rule.sample.images),
        "verify": config.verify,
        "border sigma": config.border.border_sigma,
        "border classes": config.border.class_names(classes) if rule.sample.border else None,
    }


def pack_shards(shards: Sequence[PlannedShard], rule: PackRule, config: PackConfig) -> int:
    """Write shards in parallel; returns the number of skipped samples.

    Raises DataError listing all bad files, unless they are skipped.
    """
    total = sum(len(shard.samples) for shard in shards)
    workers = num_workers(config.workers, len(shards))
    in_process = workers == 1 and config.job.scheduler is None
    problems: list[str] = []
    with progress(total=total, desc="pack", unit="sample") as bar:
        task = partial(pack_shard, rule=rule, advance=bar.update if in_process else None)
        remote = rule.store.local is None
        for shard, skipped in run_all(
            task, shards, workers, scheduler=config.job.scheduler, remote=remote
        ):
            problems += skipped
            bar.update(0 if in_process else len(shard.samples))
    if problems and not rule.keep_going:
        raise AggregateDataError(
            sorted(problems), "their shards were not written; --keep-going skips these files"
        )
    return len(problems)


def finish_data_set(
    config: PackConfig, plan: Sequence[PlannedShard], rule: PackRule, problems: list[str]
) -> int:
    """Write the manifest, print a summary and return the exit code.

    `problems` are those of files that are not in the plan.
    """
    store = rule.store
    shards: dict[str, list[ShardInfo]] = {}
    tallies: dict[str, SampleStatistics] = {}
    digests: list[str] = []
    classes = config.source.class_names()
    counted = len(classes) if config.verify == "full" else 0
    for planned in progress(plan, desc="count", unit="shard", delay=2):
        report = read_shard_report(store, planned, rule.plan)
        digests += report.tally.digests
        report.tally.digests = []
        problems += report.problems
        if report.file is not None:
            tallies.setdefault(report.split, SampleStatistics()).merge(report.tally)
            shards.setdefault(report.split, []).append(report.info(counted))
    if not shards:
        raise AggregateDataError(problems, NOTHING_TO_PACK)
    total = merge_statistics(tallies.values())
    notes = check_classes(config, rule, total)
    manifest = make_manifest(
        classes=classes,
        palette=rule.sample.palette,
        image_format=config.source.make_image_format(total),
        mask_format=describe_mask_format(rule, total),
        shards=shards,
        tallies=tallies,
        duplicates=list(find_duplicates(digests, list_sources(plan)).values()),
        verified=config.verify,
        border_sigma=config.border.border_sigma,
        border_classes=config.border.class_names(classes) if rule.sample.border else (),
    )
    if problems:
        save_problems(problems, store)
    else:
        store.remove(PROBLEMS)
    write_manifest(store, manifest, within=WORK_DIR)
    clear_work(store)
    lines = [*summarise(store, manifest, total), *(f"  {note}" for note in notes)]
    print_lines([*lines, *suggest_next(config, manifest)])
    if not problems:
        return 0
    print(f"{len(problems)} files were left out: {store.path(PROBLEMS)}")
    return INCOMPLETE


def check_classes(config: PackConfig, rule: PackRule, total: SampleStatistics) -> list[str]:
    """Return notes on how masks were read.

    Raises DataError if masks disagree, or if a class has no pixel and absent classes are not
    allowed. Without counts of all pixels (--verify headers), classes cannot be absent.
    """
    problems, notes = find_class_problems(
        config.source.class_names(),
        rule.sample.masks,
        total,
        allow_absent=config.source.allow_absent_classes or config.verify == "headers",
        remedy=IGNORED_REMEDY,
    )
    if problems:
        raise AggregateDataError(
            problems, f"no manifest was written; to change other flags, remove {rule.store} first"
        )
    return notes


def describe_mask_format(rule: PackRule, total: SampleStatistics) -> dict[str, Any]:
    """Describe the mask format for the manifest; {} for unlabelled images."""
    if rule.sample.masks is None:
        return {}
    values = total.values - {0, rule.sample.masks.ignore_value}
    foreground = values.pop() if len(values) == 1 else None
    source_values = rule.sample.masks.source_values(foreground)
    return {**asdict(rule.sample.masks), "source_values": source_values}


def suggest_next(config: PackConfig, manifest: Manifest) -> Iterator[str]:
    """Suggest what to do next."""
    if config.source.has_masks and "train" in manifest.splits:
        if "val" not in manifest.splits:
            yield "  warning: split val is empty; --val-fraction 0.1 cuts it out of train"
        if not is_url(config.place):
            yield f"next: unet train --data {config.place} --run-dir RUN"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(PackConfig, run, argv, "pack")


if __name__ == "__main__":
    sys.exit(main())
