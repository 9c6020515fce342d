"""`unet index`: WebDataset shards from other tools -> a data set; no shard is rewritten.

Each shard is inspected on its own: its tar must be complete, and every image and mask valid for
training. Only if all shards are valid are the `.idx` files written, and the manifest last.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelines.packing.classes import find_class_problems
from pipelines.packing.foreign import (
    REPACK,
    Duplicates,
    IndexRule,
    ShardContents,
    inspect_shard,
    offsets_name,
)
from pipelines.packing.manifest import make_manifest, summarise
from pipelines.packing.options import ImageOptions
from pipelines.runtime.command import run_command
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.processes import num_workers, refuse_negative_workers, run_all
from pipelines.runtime.progress import progress
from pipelines.runtime.terminal import print_lines
from pipelines.runtime.yaml_flags import Flat, Positional
from shards.folders.splits import SPLIT_NAMES, Split
from shards.folders.walk import walk_files
from shards.foreign import COMPRESSED, DECOMPRESS_REMEDY, Role
from shards.images.files import IMAGE_EXTENSIONS, NOTES
from shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest, write_manifest
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette
from shards.sample import (
    BORDER_EXTENSION,
    IGNORE,
    INFO_EXTENSION,
    MASK_EXTENSION,
    AggregateDataError,
    DataError,
)
from shards.statistics import SampleStatistics, find_duplicates, merge_statistics
from shards.store import Store

FOREIGN_NOTES = {
    **NOTES,
    "turned": "have an EXIF orientation; they are rotated when decoded",
    "narrowed": "repeat 8 bits in each 16-bit channel; they are decoded to 8 bits",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Turn WebDataset shards from other tools into a data set, without rewriting them.

    Every image and mask is decoded and checked. Masks must be PNGs (grayscale or palette) whose
    pixel value is the class index, 255 where ignored. Writes an .idx file next to each shard, and
    FOLDER/index.json.
    """

    folder: Positional[Path]
    """Folder of the shards (*.tar), searched recursively."""
    classes: tuple[str, ...] = ()
    """Class names, from class 0 on; default: the shards contain images without masks."""
    image_ext: tuple[str, ...] = ()
    """Extensions of images, after the key: jpg for KEY.jpg, image.jpg for KEY.image.jpg. Default:
    every image format that is read; a sample must then have one image."""
    mask_ext: str = MASK_EXTENSION
    """Extension of masks, after the key: seg.png for KEY.seg.png."""
    allow_absent_classes: bool = False
    """Accept classes that have no pixel in any mask; default: they are an error."""
    split: Split | None = None
    """Split of all shards; default: the word train, val, valid, validation or test in the path of
    each shard, else train."""
    workers: int = 0
    """Processes; 0: one per CPU."""
    image: Flat[ImageOptions] = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        refuse_negative_workers(self.workers)
        self.mask_format()
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"--classes: duplicate name in {' '.join(self.classes)}")
        if self.split is not None and not self.classes:
            raise ValueError("--split needs --classes: without masks, the split is `unlabelled`")
        self.member_roles()

    def mask_format(self) -> MaskFormat | None:
        """Build the format of the masks; None without masks."""
        if not self.classes:
            return None
        return MaskFormat(kind="index", num_classes=len(self.classes), ignore_value=IGNORE)

    def member_roles(self) -> dict[str, Role]:
        """Return {extension: role of such a member}, longest extension first."""
        images = {ext.lower().lstrip(".") for ext in self.image_ext or IMAGE_EXTENSIONS}
        mask = self.mask_ext.lower().lstrip(".")
        # In an .idx file these extensions are reserved for json, mask and border map.
        reserved = {INFO_EXTENSION, MASK_EXTENSION, BORDER_EXTENSION}
        if wrong := sorted(images & {"", *reserved}):
            raise ValueError(
                f"--image-ext {wrong[0] or repr('')}: not an extension of images in shards; "
                f"{INFO_EXTENSION}, {MASK_EXTENSION} and {BORDER_EXTENSION} are reserved"
            )
        if mask in ("", INFO_EXTENSION):
            raise ValueError(
                f"--mask-ext {mask or repr('')}: not an extension of masks in shards; "
                f"use for example {MASK_EXTENSION}"
            )
        if not images - {mask}:
            raise ValueError(
                f"--mask-ext {self.mask_ext} is also the only --image-ext; use another"
            )
        roles: dict[str, Role] = dict.fromkeys(images, "image")
        if self.classes:
            # Border maps are made of masks: without masks, only an image can have this name.
            roles[BORDER_EXTENSION] = "border"
        roles |= {mask: "mask", INFO_EXTENSION: "json"}
        return dict(sorted(roles.items(), key=lambda item: (-len(item[0]), item[0])))


def run(config: IndexConfig) -> int:
    """Inspect all shards; if all are valid, write the .idx files and the manifest."""
    store = Store(str(config.folder))
    names = find_shards(config.folder)
    if not store.exists(MANIFEST):
        require_writable("FOLDER", config.folder, "copy the shards to a folder that can be")
    shards = inspect_shards(config, names)
    problems = [problem for shard in shards for problem in shard.problems]
    splits: dict[str, str] = {}
    for shard in shards:
        try:
            splits[shard.name] = choose_split(shard.name, config)
        except DataError as error:
            problems.append(str(error))
    duplicates = [] if problems else find_duplicate_images(shards)
    problems += describe_leaks(duplicates, splits, config.folder)
    if problems:
        raise AggregateDataError(problems, "nothing was written")
    filled = [shard for shard in shards if shard.lines]
    if not filled:
        raise DataError(f"{config.folder}: {len(shards)} shards without an image; see --image-ext")
    total = merge_statistics(shard.tally for shard in filled)
    problems, notes = find_class_problems(
        config.classes,
        config.mask_format(),
        total,
        allow_absent=config.allow_absent_classes,
        remedy=REPACK,
    )
    if problems:
        raise AggregateDataError(problems, "nothing was written")
    manifest = build_manifest(config, filled, splits, duplicates, total)
    if is_indexed(store, manifest):
        print(f"{config.folder} is already indexed with these settings; nothing was written")
        return 0
    for shard in filled:
        name = offsets_name(shard.name)
        if not store.exists(name):
            store.write(name, shard.encode_offsets())
    write_manifest(store, manifest)
    lines = [
        *summarise(config.folder, manifest, total, FOREIGN_NOTES),
        *(f"  {note}" for note in notes),
        *list_warnings(shards, manifest),
        *suggest_training(config.folder, manifest),
    ]
    print_lines(lines)
    return 0


def is_indexed(store: Store, manifest: Manifest) -> bool:
    """Whether a folder already has this manifest. Raises DataError if it has another."""
    if not store.exists(MANIFEST):
        return False
    if read_manifest(store) != manifest:
        raise DataError(
            f"{store} is already a data set, with other contents or settings; remove its "
            f"{MANIFEST} to index it again"
        )
    return True


def find_shards(folder: Path) -> list[str]:
    """List all shards below a folder as sorted relative paths.

    Raises DataError if there are none, or if one is compressed.
    """
    if not folder.exists():
        raise DataError(f"FOLDER {folder}: does not exist; check the path")
    if not folder.is_dir():
        raise DataError(f"FOLDER {folder}: is not a directory; check the path")
    names = sorted(walk_files(str(folder)))
    compressed = [name for name in names if name.lower().endswith(COMPRESSED)]
    if compressed:
        raise AggregateDataError(
            [f"{folder / n} is compressed" for n in compressed], DECOMPRESS_REMEDY
        )
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards:
        raise DataError(f"{folder} contains no shards (*.tar); pack images with unet pack")
    return shards


def choose_split(shard: str, config: IndexConfig) -> str:
    """Choose the split of a shard. Raises DataError if its path names several."""
    if not config.classes:
        return "unlabelled"
    if config.split is not None:
        return config.split
    words = re.findall("[a-z]+", shard.lower())
    named = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if len(named) > 1:
        raise DataError(
            f"{config.folder / shard} names the splits {' and '.join(named)}; "
            "rename it, or use --split"
        )
    return named[0] if named else "train"


def inspect_shards(config: IndexConfig, names: Sequence[str]) -> list[ShardContents]:
    """Inspect all shards in parallel; returns them sorted by name."""
    # The first frame of multi-frame files is read, so that they are refused by name.
    images = config.image.make_rule(frame=0)
    roles, declared = config.member_roles(), bool(config.image_ext)
    rule = IndexRule(config.folder, len(config.classes), images, roles, declared)
    workers = num_workers(config.workers, len(names))
    shards = []
    with progress(total=len(names), desc="index", unit="shard") as bar:
        for _, shard in run_all(partial(inspect_shard, rule=rule), names, workers):
            shards.append(shard)
            bar.update()
    return sorted(shards, key=lambda shard: shard.name)


def find_duplicate_images(shards: Sequence[ShardContents]) -> list[Duplicates]:
    """Find groups of byte-identical images."""
    places = [(shard.name, source) for shard in shards for source in shard.sources]
    digests = (digest for shard in shards for digest in shard.tally.digests)
    groups = find_duplicates(digests, map(str, range(len(places)))).values()
    return [[places[int(number)] for number in group] for group in groups]


def describe_leaks(
    duplicates: Sequence[Duplicates], splits: dict[str, str], folder: Path
) -> list[str]:
    """Describe byte-identical images in different splits, one line each."""
    return [
        " = ".join(f"{folder / shard}: {source} ({splits[shard]})" for shard, source in group[:5])
        + " are the same image in two splits; remove it from one"
        for group in duplicates
        if len({splits[shard] for shard, _ in group}) > 1
    ]


def build_manifest(
    config: IndexConfig,
    shards: Sequence[ShardContents],
    splits: dict[str, str],
    duplicates: Sequence[Duplicates],
    total: SampleStatistics,
) -> Manifest:
    """Build the manifest of valid shards.

    Args:
        config: the configuration.
        shards: shards with at least one sample.
        splits: {shard: split}.
        duplicates: groups of byte-identical images.
        total: tally of all shards.
    """
    num_classes = len(config.classes)
    infos: dict[str, list[ShardInfo]] = {}
    tallies: dict[str, SampleStatistics] = {}
    for shard in shards:
        pixels = shard.tally.class_pixels(num_classes) if num_classes else ()
        info = ShardInfo(
            shard.name,
            len(shard.lines),
            shard.size,
            shard.sha256,
            pixels,
            hashlib.sha256(shard.encode_offsets()).hexdigest(),
        )
        infos.setdefault(splits[shard.name], []).append(info)
        tallies.setdefault(splits[shard.name], SampleStatistics()).merge(shard.tally)
    mask_format = {
        "kind": "index",
        "num_classes": num_classes,
        "ignore_value": IGNORE,
        "source_values": list(range(num_classes)),
    }
    return make_manifest(
        classes=config.classes,
        palette=default_palette(config.classes),
        image_format=config.image.make_format(total),
        mask_format=mask_format if num_classes else {},
        shards=infos,
        tallies=tallies,
        duplicates=[[f"{splits[shard]}:{source}" for shard, source in g] for g in duplicates],
        verified="full",
    )


def list_warnings(shards: Sequence[ShardContents], manifest: Manifest) -> Iterator[str]:
    """Warn of contents that are probably not intended."""
    ignored = sum((shard.ignored for shard in shards), Counter[str]())
    if ignored:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common())
        yield f"  {ignored.total()} other members are ignored: {kinds}"
    empty = [shard.name for shard in shards if not shard.lines]
    if empty:
        yield f"  warning: {len(empty)} shards without samples are ignored, the first: {empty[0]}"
    sources = Counter(source for shard in shards for source in shard.sources)
    repeated = [source for source, count in sources.items() if count > 1]
    if repeated:
        yield (
            f"  warning: {len(repeated)} names occur in several shards, the first: {repeated[0]}; "
            "training uses all samples, but unpack and predict write one result per name"
        )
    if "train" in manifest.splits and "val" not in manifest.splits:
        yield "  warning: split val is empty; put `val` into the path of some shards"


def suggest_training(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Suggest the command to train on the data set, if it can be trained on."""
    if "train" in manifest.splits:
        yield f"next: unet train --data {folder} --run-dir RUN"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(IndexConfig, run, argv, "index")


if __name__ == "__main__":
    sys.exit(main())
