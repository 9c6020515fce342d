"""`unet pack`: folders of pictures and masks -> WebDataset shards and a manifest.

The plan (which pair goes into which shard) is fixed first and written down; every shard is then an
independent unit of work on any executor, so that any number of workers, parts and kills ends with
the same bytes. While it works, OUT/.pack holds the plan and a small file of counts for each
finished shard; when the manifest is written, it goes.
"""

import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pipelines.config import INCOMPLETE, RunError, refuse_url, run_command
from pipelines.manifest import describe, make_manifest
from pipelines.parallel import num_workers, run_all
from pipelines.plan import (
    WORK_DIR,
    Cut,
    PlannedSample,
    PlannedShard,
    fix_plan,
    make_plan,
    read_planned,
    sources_of,
)
from pipelines.progress import progress
from pipelines.propose import propose_format
from pipelines.source import PROBLEMS, SourceConfig, check_rule, parse_part, save_problems
from shards.border import NEEDS_SCIPY, BorderRule, has_scipy
from shards.index import MANIFEST, Manifest, ShardInfo, write_manifest
from shards.pairs import AggregateDataError, Pairing
from shards.sample import BORDER_EXTENSION, INFO_EXTENSION, MASK_EXTENSION, DataError
from shards.store import Store, is_url
from shards.tally import (
    SampleRule,
    SampleStatistics,
    StoredSample,
    find_duplicates,
    merge_statistics,
    read_sample,
)
from shards.writer import ShardFile, ShardWriter

REPORT, NONE = ".json", ".none.json"
"""Ends of the names of reports: of a shard, and of one of which nothing was left."""
MEASURED = 32
"""Pictures that `--verify headers` decodes all the same, for mean and deviation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig(SourceConfig):
    """Pack pictures and masks into WebDataset shards with a manifest.

    Every picture and mask is decoded and checked first; nothing that cannot be trained on goes in.
    Given again after a kill, it goes on; finished shards are not done again.
    """

    out: str
    """Folder for the shards, or a URL such as s3://bucket/folder; made if it does not exist."""
    samples_per_shard: int = 10_000
    """Most samples in a shard."""
    shard_bytes: int | None = None
    """A shard is closed when its input files reach this size; by default at 256 MiB, or earlier
    where that would make fewer than 16 shards (but not below 8 MiB)."""
    verify: Literal["full", "headers"] = "full"
    """full: look at every pixel. headers: believe the headers of ordinary pictures and of masks
    that are canonical already; class shares are then unknown."""
    keep_going: bool = False
    """Pack what is good, list what is not in OUT/problems.txt, and exit with 3."""
    part: str | None = None
    """i/n: pack only every n-th shard, from the i-th, as one of n jobs; --finish ends it."""
    finish: bool = False
    """Check that the shards of all parts are there, and write the manifest."""
    scheduler: str | None = None
    """Address of a running Dask scheduler (tcp://host:8786) whose workers pack."""
    seed: int = 0
    """Seed of the order in the shards."""
    border_sigma: float | None = None
    """Store a border map with each mask, for training with loss.border_weight: where two cells
    nearly touch, exp(-(d1 + d2)^2 / (2 sigma^2)), d1 and d2 the distances to the two nearest; sigma
    in pixels, 5 in the U-Net paper. Needs the extra `scipy`."""
    border_classes: tuple[str, ...] = ()
    """Classes whose connected pixels are cells; left out: all but `background`, or, where none is
    called so, all but the first. Of classes that lie within each other, name one."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        if not is_url(self.out):
            refuse_url("--out", self.out)
        elif re.search(r"://$|[?*\[\]]", self.out):
            raise ValueError(f"--out {self.out}: a URL names a bucket, without ? * [ ]")
        if self.samples_per_shard < 1 or (self.shard_bytes is not None and self.shard_bytes < 1):
            raise ValueError("--samples-per-shard and --shard-bytes must be above 0")
        if self.part is not None:
            parse_part("--part", self.part)
        if self.part is not None and self.finish:
            raise ValueError("--part packs, --finish ends what all parts have packed; give one")
        if self.scheduler is not None and self.workers:
            raise ValueError("--workers are processes here; those of --scheduler are its own")
        self.border_rule()

    def border_names(self) -> tuple[str, ...]:
        """Names of the classes that are cells in border maps."""
        names = self.class_names()
        if unknown := [name for name in self.border_classes if name not in names]:
            raise ValueError(
                f"--border-classes {unknown[0]}: there is no such class, only {' '.join(names)}"
            )
        if self.border_classes:
            return tuple(name for name in names if name in self.border_classes)
        cells = tuple(name for name in names if name.lower() != "background")
        return cells if len(cells) < len(names) else names[1:]

    def border_rule(self) -> BorderRule | None:
        """How border maps are made; None: there are none. Raises ValueError for what cannot be."""
        if not self.has_masks:
            about = ("border_sigma", "border_classes")
            self.refuse_idle(about, "needs --masks: unlabelled pictures have none")
        if self.border_sigma is None:
            self.refuse_idle(("border_classes",), "needs --border-sigma, which switches maps on")
            return None
        if not has_scipy():
            raise ValueError(NEEDS_SCIPY)
        # Before a format is proposed, no class has a name.
        names = () if self.mask_format == "auto" else self.border_names()
        return BorderRule(self.border_sigma, tuple(map(self.class_names().index, names)))


@dataclass(frozen=True, slots=True)
class PackRule:
    """What a worker needs besides its shard."""

    store: Store
    images: Path
    masks: Path | None
    sample: SampleRule
    stride: int
    """Of this many samples in a shard, one is decoded whatever its header says."""
    keep_going: bool
    plan: str
    """sha256 of the plan that the shard belongs to."""


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What was found while a shard was written."""

    split: str
    plan: str
    """sha256 of the plan."""
    file: ShardFile | None
    """None where nothing was left to write."""
    tally: SampleStatistics
    problems: list[str]
    """What was left out, with --keep-going."""

    def info(self, config: PackConfig) -> ShardInfo:
        """The shard as the manifest holds it."""
        assert self.file is not None
        counted = config.has_masks and config.verify == "full"
        pixels = self.tally.class_pixels(len(config.class_names())) if counted else ()
        return ShardInfo(**asdict(self.file), pixels=pixels)

    def to_json(self) -> bytes:
        """The content of its file."""
        plain = {
            "split": self.split,
            "plan": self.plan,
            "file": None if self.file is None else asdict(self.file),
            "tally": self.tally.to_plain(),
            "problems": self.problems,
        }
        return json.dumps(plain).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The report in a file."""
        plain = json.loads(data)
        file = None if plain["file"] is None else ShardFile(**plain["file"])
        return cls(
            **{**plain, "file": file, "tally": SampleStatistics.from_plain(plain["tally"])},
        )


def run(config: PackConfig) -> int:
    """Plan, write the shards that are missing, and last the manifest."""
    if config.mask_format == "auto":
        return propose_format(config, "pack")
    store = Store(config.out)
    store.create_folder()
    if store.exists(MANIFEST):
        # Left by a kill between the manifest and the end.
        store.remove(WORK_DIR)
        raise DataError(f"{store} is a finished data set; choose another --out or remove it")
    try:
        return pack(config, store)
    except AggregateDataError as error:
        if len(error.problems) > 1:
            # Those of a part go when the data set is finished, which has its own.
            part = "" if config.part is None else f"{WORK_DIR}/{config.part.replace('/', '-of-')}-"
            place = save_problems(error.problems, store, f"{part}{PROBLEMS}")
            raise DataError(f"{error}\n  all of them: {place}") from error
        raise


def pack(config: PackConfig, store: Store) -> int:
    """The same, for a folder that is there."""
    pairing, problems = pair_up(config)
    rule = pack_rule(config, store, pairing)
    plan, leaks = make_plan(
        pairing,
        config.split_rule(),
        Cut(samples=config.samples_per_shard, bytes=config.shard_bytes, seed=config.seed),
        keep_going=config.keep_going,
    )
    with ExitStack() as held:
        rule = replace(rule, plan=fix_plan(store, settings(config, rule), plan, held))
        names = {*store.names(), *store.names(WORK_DIR)}
        done = {s.name for s in plan if s.name in names or f"{s.name}{NONE}" in names}
        if done:
            print(f"{len(done)} of {len(plan)} shards are there already")
        todo = [shard for shard in plan if shard.name not in done]
        if config.finish and todo:
            raise RunError(
                f"{store} lacks {len(todo)} of {len(plan)} shards, {todo[0].name} first; "
                "give the parts that packed them again, then --finish"
            )
        if config.part is not None:
            number, count = parse_part("--part", config.part)
            mine = {shard.name for shard in plan[number - 1 :: count]}
            bad = write_shards([shard for shard in todo if shard.name in mine], rule, config)
            print(f"part {config.part}: {len(mine)} shards are there; when all parts are: --finish")
            return INCOMPLETE if bad else 0
        write_shards(todo, rule, config)
    return finish(config, plan, rule, [*problems, *leaks])


def pair_up(config: PackConfig) -> tuple[Pairing, list[str]]:
    """The pairs that are to be packed, and what is none, a line each.

    Raises DataError where there are no pairs, or where there is something else and it is not to be
    left out.
    """
    pairing = config.find_pairs()
    problems = left_out(config, pairing)
    if not pairing.pairs:
        raise AggregateDataError(problems or ["there is no pair"], "nothing is left to pack")
    if problems and not config.keep_going:
        more = "" if pairing.refused else ", --skip-unpaired leaves them out"
        raise AggregateDataError(problems, f"correct them{more}, or pack the rest: --keep-going")
    return pairing, problems


def left_out(config: PackConfig, pairing: Pairing) -> list[str]:
    """What is no pair and was not asked to be passed over, a line each."""
    return [*pairing.refused, *([] if config.skip_unpaired else pairing.unpaired)]


def pack_rule(config: PackConfig, store: Store, pairing: Pairing) -> PackRule:
    """What every worker is to do."""
    stride = 1 if config.verify == "full" else -(-len(pairing.pairs) // MEASURED)
    sample = replace(check_rule(config, pairing), border=config.border_rule())
    images, masks = pairing.images, pairing.masks
    if config.scheduler is not None:
        # The workers of a cluster have working folders of their own.
        images, masks = images.resolve(), masks.resolve() if masks else None
        store = store.absolute()
    return PackRule(store, images, masks, sample, stride, config.keep_going, plan="")


def settings(config: PackConfig, rule: PackRule) -> dict[str, Any]:
    """The settings that decide the bytes of a shard, by the names of their flags."""
    return {
        "classes": config.class_names(),
        "mask format": asdict(rule.sample.masks) if rule.sample.masks else None,
        "resize mask": rule.sample.resize_mask,
        "pictures": asdict(rule.sample.images),
        "verify": config.verify,
        "border sigma": config.border_sigma,
        "border classes": config.border_names() if rule.sample.border else None,
    }


def write_shards(shards: Sequence[PlannedShard], rule: PackRule, config: PackConfig) -> int:
    """Write the shards, side by side where that helps; returns how many samples are left out.

    Raises DataError listing all bad files.
    """
    total = sum(len(shard.samples) for shard in shards)
    workers = num_workers(config.workers, len(shards))
    alone = workers == 1 and config.scheduler is None
    problems: list[str] = []
    with progress(total=total, desc="pack", unit="sample") as bar:
        work = partial(write_shard, rule=rule, advance=bar.update if alone else None)
        remote = rule.store.local is None
        for shard, found in run_all(
            work, shards, workers, scheduler=config.scheduler, remote=remote
        ):
            problems += found
            bar.update(0 if alone else len(shard.samples))
    if problems and not rule.keep_going:
        raise AggregateDataError(
            sorted(problems), "their shards were not written; --keep-going leaves these files out"
        )
    return len(problems)


class RefusedError(Exception):
    """A shard is not to be written."""


def write_shard(
    planned: PlannedShard, rule: PackRule, advance: Callable[[int], object] | None = None
) -> list[str]:
    """Write one shard and its report; returns the problems that kept samples out of it.

    Raises RunError where the shard itself cannot be written, DataError where another process is
    at it or the store does not take it.
    """
    if rule.sample.border is not None and not has_scipy():
        raise RunError(f"a worker of the cluster cannot make border maps: {NEEDS_SCIPY}")
    problems: list[str] = []
    tally = SampleStatistics()
    try:
        with rule.store.staging() as folder:
            with ShardWriter(folder / planned.name) as writer:
                for row, sample in enumerate(planned.samples):
                    try:
                        read = read_pair(sample, rule, pixels=row % rule.stride == 0)
                        stored = members(sample, read, rule)
                    except (DataError, OSError) as error:
                        problems.append(in_words(error))
                        tally.add_omitted()
                    else:
                        writer.add(sample.key, stored)
                        tally.add(read)
                    if advance is not None:
                        advance(1)
                if len(problems) == len(planned.samples) or (problems and not rule.keep_going):
                    raise RefusedError
                # Before the rename that ends this block: a shard that is there has its report.
                report = ShardReport(planned.split, rule.plan, writer.seal(), tally, problems)
                rule.store.write(f"{WORK_DIR}/{planned.name}{REPORT}", report.to_json())
            for name in (Path(planned.name).with_suffix(".idx").name, planned.name):
                rule.store.upload(folder / name, name)
    except RefusedError:
        if rule.keep_going:
            report = ShardReport(planned.split, rule.plan, None, tally, problems)
            rule.store.write(f"{WORK_DIR}/{planned.name}{NONE}", report.to_json())
    except OSError as error:
        raise RunError(
            f"{rule.store.path(planned.name)} cannot be written: {error.strerror or error}; "
            "the same command goes on"
        ) from error
    return problems


def in_words(error: DataError | OSError) -> str:
    """A problem with a file as one line."""
    if isinstance(error, DataError):
        return str(error)
    return f"{error.filename} cannot be read: {error.strerror or error}"


def read_pair(sample: PlannedSample, rule: PackRule, *, pixels: bool) -> StoredSample:
    """A planned pair, checked. Raises DataError if anything about it is wrong, or OSError."""
    image_path = f"{rule.images}/{sample.source}"
    image = read_planned(image_path, sample.image)
    mask_path, mask = "", None
    if sample.mask is not None and sample.mask_stat is not None:
        mask_path = f"{rule.masks}/{sample.mask}"
        mask = read_planned(mask_path, sample.mask_stat)
    return read_sample(
        image, mask, rule.sample, image_path, mask_path, pixels=pixels, unique=sample.unique
    )


def members(sample: PlannedSample, read: StoredSample, rule: PackRule) -> dict[str, bytes]:
    """{extension: bytes} of a sample. Raises DataError where its key is too long for them."""
    width, height = read.image.size
    info: dict[str, Any] = {
        "source": sample.source,
        "width": width,
        "height": height,
        "group": sample.group,
    }
    extension = read.image.extension or sample.source.rpartition(".")[2].lower()
    found = {extension: read.image.data, INFO_EXTENSION: json.dumps(info).encode()}
    if read.mask is not None:
        found[MASK_EXTENSION] = read.mask.encode(rule.sample.palette)
        if rule.sample.border is not None:
            refuse_long_key(sample, rule)
            assert read.mask.class_map is not None
            found[BORDER_EXTENSION] = rule.sample.border.encode(read.mask.class_map.index)
    return found


def refuse_long_key(sample: PlannedSample, rule: PackRule) -> None:
    """Raise DataError where a border map's name would not fit a tar, as that of a mask does."""
    longest = tarfile.LENGTH_NAME - len(f".{BORDER_EXTENSION}")
    if len(sample.key) > longest:
        raise DataError(
            f"{rule.images}/{sample.source} has a key of {len(sample.key)} bytes; with border maps "
            f"a tar has room for {longest}: shorten its name"
        )


def read_report(store: Store, planned: PlannedShard, plan: str) -> ShardReport:
    """What was found in a finished shard. Raises DataError if it was packed by another plan."""
    there = store.exists(planned.name)
    try:
        data = store.read(f"{WORK_DIR}/{planned.name}{REPORT if there else NONE}")
    except FileNotFoundError as error:
        raise DataError(
            f"{store.path(planned.name)} has no report in {WORK_DIR}: was another pack at work "
            "here? Remove it; the same command packs it again"
        ) from error
    report = ShardReport.from_json(data)
    if report.plan != plan:
        raise DataError(
            f"{store.path(planned.name)} was packed by another plan, begun at the same time; "
            "remove it and give its part again"
        )
    return report


def finish(
    config: PackConfig, plan: Sequence[PlannedShard], rule: PackRule, problems: list[str]
) -> int:
    """Write the manifest, and say what was packed; `problems`: what the plan leaves out."""
    store = rule.store
    shards: dict[str, list[ShardInfo]] = {}
    tallies: dict[str, SampleStatistics] = {}
    digests: list[str] = []
    for planned in progress(plan, desc="count", unit="shard", delay=2):
        report = read_report(store, planned, rule.plan)
        digests += report.tally.digests
        report.tally.digests = []
        problems += report.problems
        if report.file is not None:
            tallies.setdefault(report.split, SampleStatistics()).merge(report.tally)
            shards.setdefault(report.split, []).append(report.info(config))
    if not shards:
        raise AggregateDataError(problems, "nothing is left to pack")
    total = merge_statistics(tallies.values())
    manifest = make_manifest(
        classes=config.class_names(),
        palette=rule.sample.palette,
        image_format=config.image_format(total),
        mask_format=describe_masks(config, rule, total),
        shards=shards,
        tallies=tallies,
        duplicates=list(find_duplicates(digests, sources_of(plan)).values()),
        verified=config.verify,
        border_sigma=config.border_sigma,
        border_classes=config.border_names() if rule.sample.border else (),
    )
    if problems:
        save_problems(problems, store)
    else:
        store.remove(PROBLEMS)
    write_manifest(store, manifest, within=WORK_DIR)
    store.remove(WORK_DIR)
    print("\n".join([*describe(store, manifest, total), *advice(config, manifest)]))
    if problems:
        print(f"{len(problems)} files were left out: {store.path(PROBLEMS)}")
        return INCOMPLETE
    return 0


def describe_masks(config: PackConfig, rule: PackRule, total: SampleStatistics) -> dict[str, Any]:
    """The mask format as the manifest holds it."""
    if rule.sample.masks is None:
        return {}
    found = total.values - {0, config.ignore_value}
    foreground = found.pop() if len(found) == 1 else None
    source_values = rule.sample.masks.source_values(foreground)
    return {**asdict(rule.sample.masks), "source_values": source_values}


def advice(config: PackConfig, manifest: Manifest) -> Iterator[str]:
    """What to do next."""
    if config.has_masks and "train" in manifest.splits:
        if "val" not in manifest.splits:
            yield "  warning: no sample fell into val; raise --val-fraction or use --split-file"
        if not is_url(config.out):
            yield f"next: unet train --data {config.out} --run-dir RUN"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(PackConfig, run, argv, "pack")


if __name__ == "__main__":
    sys.exit(main())
