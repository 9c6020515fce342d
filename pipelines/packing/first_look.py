"""`unet check FOLDER`: propose the flags that pack what lies in a folder."""

from collections import Counter
from pathlib import Path

from pipelines.packing.options import MaskOptions, PairingOptions, SourceOptions
from pipelines.packing.propose import survey_pairing
from shards.folders.layout import Layout, find_layouts
from shards.folders.pairs import Pairing
from shards.folders.split_names import SPLIT_NAMES, find_named_split
from shards.folders.splits import SplitRule
from shards.masks.proposal import COLOURS_FILE, propose_flags
from shards.sample import DataError
from shards.store import Store

MAX_OTHERS = 3
"""Other candidates that are named."""
ANNOTATIONS = (".json", ".xml", ".npy", ".npz", ".mat", ".svg")


def propose_source(folder: Path, out: Path, workers: int) -> tuple[list[str], list[str]]:
    """Propose flags for the images and masks of a folder, and list what is unsure.

    A table of colours is written into `out`. Raises DataError if nothing can be proposed.
    """
    layouts, extensions = find_layouts(folder)
    if not layouts:
        raise DataError(
            f"{folder}: no two folders, suffixes or extensions pair images with masks; use "
            "--images and --masks, or list the pairs and use --pairs"
        )
    best = layouts[0]
    words = ["--images", *(str(folder / name) for name in best.images)]
    words += ["--masks", *(str(folder / name) for name in best.masks), *best.fit.flags]
    pairing_options = PairingOptions(
        images=tuple(folder / name for name in best.images),
        masks=tuple(folder / name for name in best.masks),
        image_suffix=best.fit.image_suffix,
        mask_suffix=best.fit.mask_suffix,
        image_ext=best.fit.image_ext,
        mask_ext=best.fit.mask_ext,
        pair_regex=best.fit.regex,
    )
    source = SourceOptions(pairing=pairing_options, mask=MaskOptions(mask_format="auto"))
    pairing = pairing_options.find_pairs()
    notes = describe_others(layouts, extensions)
    if pairing.unpaired:
        words.append("--skip-unpaired")
        notes.append(f"{len(pairing.unpaired)} files have no pair: {pairing.unpaired[0]}")
    survey, problems = survey_pairing(source, pairing, workers)
    notes += sorted(problems)[:MAX_OTHERS]
    proposal = propose_flags(survey)
    if not proposal.flags:
        raise DataError(f"unet pack {' '.join(words)}: {proposal.why}")
    flags = list(proposal.flags)
    if proposal.table:
        store = Store(str(out))
        store.create_folder()
        store.write(COLOURS_FILE, proposal.table.encode())
        flags[flags.index(COLOURS_FILE)] = str(out / COLOURS_FILE)
    split_flags, split_notes = propose_splits(folder, pairing)
    return [*words, *flags, *split_flags], [*notes, *proposal.notes, *split_notes]


def describe_others(layouts: list[Layout], extensions: Counter[str]) -> list[str]:
    """Name the candidates that were not chosen, and annotations that are not image files."""
    best = layouts[0]
    rivals = [x for x in layouts[1:] if x.images == best.images and x.mask_place != best.mask_place]
    places = list(dict.fromkeys(layout.mask_place for layout in rivals))[:MAX_OTHERS]
    notes = [f"masks are those in {best.mask_place}; also possible: {place}" for place in places]
    images = [x for x in layouts[1:] if x.masks == best.masks and x.images != best.images]
    names = list(dict.fromkeys(" ".join(layout.images) for layout in images))[:MAX_OTHERS]
    notes += [f"images are those in {' '.join(best.images)}; also possible: {n}" for n in names]
    other = [f"{extensions[ext]} {ext}" for ext in ANNOTATIONS if extensions[ext]]
    if other:
        notes.append(f"{', '.join(other)} files are not read: masks are image files")
    return notes


def propose_splits(folder: Path, pairing: Pairing) -> tuple[list[str], list[str]]:
    """Propose the split flags that lists or folders suggest, and list what is unsure."""
    declared = {pair.split for pair in pairing.pairs if pair.split is not None}
    flags: list[str] = []
    notes = []
    firsts = {pair.source.partition("/")[0].lower() for pair in pairing.pairs if "/" in pair.source}
    if not declared and firsts and firsts <= SPLIT_NAMES.keys() and not pairing.refused:
        flags, declared = ["--split-folders"], {SPLIT_NAMES[name] for name in firsts}
    lists = find_split_lists(folder)
    if not declared and lists:
        try:
            splits, _ = SplitRule(files=tuple(lists)).assign_splits(pairing.pairs)
        except DataError:
            notes.append(f"{' '.join(map(str, lists))}: not used, they list other files")
        else:
            flags, declared = ["--split-file", *map(str, lists)], set(splits)
    if "train" in declared and "val" not in declared:
        flags += ["--val-fraction", "0.1"]
        notes.append("the data declare no val: 10 % of train become val")
    if not declared:
        notes.append("no splits found: 10 % become val, by hash; see --group-by and --split-file")
    return flags, notes


def find_split_lists(folder: Path) -> list[Path]:
    """Find a CSV `path,split`, or else the lists of one folder that are named after splits."""
    texts = sorted(p for ext in ("csv", "txt") for p in folder.rglob(f"*.{ext}"))
    for path in texts:
        with path.open(errors="replace") as file:
            if {"path", "split"} <= {word.strip() for word in file.readline().split(",")}:
                return [path]
    by_folder: dict[Path, list[Path]] = {}
    for path in texts:
        if path.suffix == ".txt" and find_named_split(path.stem):
            by_folder.setdefault(path.parent, []).append(path)
    return max(by_folder.values(), key=len, default=[])
