"""`unet check FOLDER`: propose the flags that pack what lies in a folder."""

import csv
import io
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from pipelines.packing.class_files import (
    apply_names,
    find_layout_classes,
    name_table,
    read_class_file,
)
from pipelines.packing.options import MaskOptions, PairingOptions, SourceOptions
from pipelines.packing.propose import survey_pairing
from pipelines.packing.propose_annotations import join_command, propose_annotations
from pipelines.packing.split_lists import propose_splits
from shards.annotations.layouts import recognise_layout
from shards.folders.layout import (
    MAX_DEPTH,
    MAX_FOLDERS,
    FolderContent,
    Layout,
    contains,
    find_layouts,
    list_pairs,
)
from shards.folders.pairs import Pairing
from shards.folders.walk import describe_annotations
from shards.masks.proposal import COLOURS_FILE, RENAME_NOTE, Proposal, propose_flags
from shards.sample import Colour, DataError
from shards.store import Store

MAX_OTHERS = 3
"""Other candidates that are named."""
PAIRS_FILE = "pairs.csv"


def propose_source(folder: Path, out: Path, workers: int) -> tuple[list[str], list[str]]:
    """Propose flags for the masks or annotations of a folder, and list what is unsure.

    A table of colours and a list of pairs that flags cannot describe are written into `out`.
    Raises DataError if nothing can be proposed.
    """
    content = find_layouts(folder)
    annotations = propose_annotations(folder, content.others, content.images)
    if annotations is not None and (annotations.panoptic or not content.layouts):
        return [*annotations.words], [*annotations.notes]
    if not content.layouts:
        raise DataError(
            f"{folder}: no two folders, suffixes or extensions pair images with masks"
            f"{describe_cap(content)}; use --images and --masks, or list the pairs and use --pairs"
        )
    store = Store(str(out))
    options, words = propose_pairing(folder, content, store)
    source = SourceOptions(pairing=options, mask=MaskOptions(mask_format="auto"))
    pairing = options.find_pairs()
    notes = [*describe_others(content.layouts), *describe_unused(folder, content, pairing)]
    if annotations is not None:
        notes.append(f"annotations instead of masks: {join_command('pack', annotations.words)}")
    else:
        notes += describe_annotations(content.others, "their format is not known as annotations")
    if (known := recognise_layout(folder)) is not None:
        words_of = ["--layout", known, str(folder)]
        notes.append(f"its names are those of a public data set: {join_command('pack', words_of)}")
    if pairing.unpaired:
        words.append("--skip-unpaired")
    survey, problems = survey_pairing(source, pairing, workers)
    notes += sorted(problems)[:MAX_OTHERS]
    proposal = propose_flags(survey)
    if not proposal.flags:
        raise DataError(f"{shlex.join(['unet', 'pack', *words])}: {proposal.why}")
    proposal = use_class_names(proposal, folder, content.others)
    flags = list(proposal.flags)
    if proposal.table:
        flags[flags.index(COLOURS_FILE)] = write_beside(store, COLOURS_FILE, proposal.table)
    split_flags, split_notes = propose_splits(pairing, folder, content.others)
    return [*words, *flags, *split_flags], [*notes, *proposal.notes, *split_notes]


def propose_pairing(
    folder: Path, content: FolderContent, store: Store
) -> tuple[PairingOptions, list[str]]:
    """Return the options that pair the files of the best layout, and their flags."""
    best = content.layouts[0]
    fit = best.fit
    if not fit.has_flags:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("image", "mask"), *list_pairs(best, content.images)]
        )
        path = Path(write_beside(store, PAIRS_FILE, text.getvalue()))
        words = ["--pairs", str(path), "--images", str(folder), "--masks", str(folder)]
        return PairingOptions(pairs=(path,), images=(folder,), masks=(folder,)), words
    options = PairingOptions(
        images=tuple(folder / name for name in best.images),
        masks=tuple(folder / name for name in best.masks),
        image_suffix=fit.image_suffix,
        mask_suffix=fit.mask_suffix,
        image_ext=fit.image_ext,
        mask_ext=fit.mask_ext,
        pair_regex=fit.regex,
    )
    words = ["--images", *map(str, options.images), "--masks", *map(str, options.masks)]
    return options, [*words, *fit.flags]


def write_beside(store: Store, name: str, text: str) -> str:
    """Write a file that the proposed command reads; returns its path."""
    store.create_folder()
    store.write(name, text.encode("utf-8", "surrogateescape"))
    return store.path(name)


def use_class_names(proposal: Proposal, folder: Path, names: Sequence[str]) -> Proposal:
    """Replace placeholders of classes by the names of a file or of a known layout, if it fits."""
    found = read_class_file(folder, names) or find_known_classes(proposal, folder)
    if found is None or not {"--classes", "--colours"} & {*proposal.flags}:
        return proposal
    path, classes = found
    notes = tuple(note for note in proposal.notes if note != RENAME_NOTE and "is void" not in note)
    if proposal.table:
        table = {n: tuple(colour) for n, colour in yaml.safe_load(proposal.table).items()}
        named = name_table(table, classes)
        if named is None:
            return replace(proposal, notes=(*proposal.notes, f"{path}: lists other colours"))
        text = yaml.safe_dump({n: list(c) for n, c in named.items()}, sort_keys=False)
        return replace(proposal, table=text, notes=(*notes, f"the names are those of {path}"))
    try:
        flags, void = apply_names(proposal.flags, classes)
    except DataError as error:
        return replace(proposal, notes=(*proposal.notes, f"{path}: not used, it has {error}"))
    note = f"the class names are those of {path}" + (f"; {void!r} is ignored" if void else "")
    return replace(proposal, flags=tuple(flags), notes=(*notes, note))


def find_known_classes(
    proposal: Proposal, folder: Path
) -> tuple[str, dict[str, Colour | None]] | None:
    """Return the flag of the layout that a folder has and its classes, if the masks have these."""
    known = recognise_layout(folder)
    classes = known and find_layout_classes(known, folder, proposal.flags)
    return (f"--layout {known}", classes) if classes else None


def describe_others(layouts: Sequence[Layout]) -> list[str]:
    """Name the candidates that were not chosen."""
    best = layouts[0]
    rivals = [
        x.mask_place
        for x in layouts[1:]
        if {*x.images} & {*best.images} and x.mask_place != best.mask_place
    ]
    notes = [
        f"masks are those in {best.mask_place}; also possible: {place}"
        for place in list(dict.fromkeys(rivals))[:MAX_OTHERS]
    ]
    images = [
        " ".join(x.images)
        for x in layouts[1:]
        if {*x.masks} & {*best.masks}
        and x.shows_images
        and not any(i == b or contains(i, b) for i in x.images for b in best.images)
    ]
    return notes + [
        f"images are those in {' '.join(best.images)}; also possible: {names}"
        for names in list(dict.fromkeys(images))[:MAX_OTHERS]
    ]


def describe_unused(folder: Path, content: FolderContent, pairing: Pairing) -> list[str]:
    """Count the files that the command does not pack, and the folders that were not compared."""
    base = os.path.abspath(folder)
    used = {
        os.path.relpath(os.path.abspath(f"{root}/{name}"), base)
        for pair in pairing.pairs
        for root, name in ((pairing.images, pair.source), (pairing.masks, pair.mask))
    }
    unused = [name for name in content.images if name not in used]
    counts = Counter(os.path.dirname(name) or "." for name in unused)
    notes = [f"{counts[place]} image files in {place} are not packed" for place in sorted(counts)]
    if len(notes) > 2 * MAX_OTHERS:
        notes = [
            *notes[: 2 * MAX_OTHERS],
            f"{len(unused)} image files in {len(counts)} folders are not packed",
        ]
    if cap := describe_cap(content):
        notes.append(cap.lstrip(": "))
    return notes


def describe_cap(content: FolderContent) -> str:
    """Describe which folders were not compared; empty if all were."""
    if content.num_folders <= MAX_FOLDERS:
        return ""
    return (
        f": only {MAX_FOLDERS} of {content.num_folders} folders were compared, the first within "
        f"{MAX_DEPTH} levels"
    )
