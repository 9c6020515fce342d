"""`unet check`: decode every image and mask of a data set before it is packed."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pipelines.drawing.contact_sheet import Cell, draw_contact_sheet
from pipelines.drawing.overlay import choose_overlay_colours
from pipelines.packing.classes import IGNORED_REMEDY, find_class_problems
from pipelines.packing.duplicates import DuplicatePolicy, describe_moves, unite_duplicates
from pipelines.packing.first_look import propose_source
from pipelines.packing.inspection import PairReport, inspect_pairs, list_leaks, read_pair
from pipelines.packing.options import SourceOptions
from pipelines.packing.problems import save_problems
from pipelines.packing.propose import propose_format
from pipelines.packing.propose_layout import propose_layout
from pipelines.runtime.command import parse, run_command
from pipelines.runtime.errors import REFUSED
from pipelines.runtime.outputs import require_writable, write_result
from pipelines.runtime.processes import chunks, num_workers, refuse_negative_workers, run_all
from pipelines.runtime.progress import progress
from pipelines.runtime.terminal import print_lines
from pipelines.runtime.yaml_flags import Flat, Positional, refuse_unused
from shards.folders.pairs import Pair, Pairing
from shards.folders.splits import SplitRule
from shards.images.files import NOTES, ImageFormat, encode_png
from shards.images.pixels import to_array
from shards.masks.shift import Shift, choose_images, find_shift
from shards.sample import AggregateDataError, DataError, list_problems
from shards.statistics import SampleRule, SampleStatistics, compute_mean_std, find_duplicates
from shards.store import Store
from shards.writer import write_atomically

SHEET_CELLS = 30
"""Images on the contact sheet."""
REPORT_NAME = "check.json"
SHEET_NAME = "sheet.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Decode all images and masks, and report what packing would refuse.

    Takes the flags of `unet pack`. Prints a table; writes OUT/sheet.png with masks drawn over their
    images, OUT/check.json and OUT/problems.txt. Exits with 1 where packing would refuse.
    """

    USAGE: ClassVar[str] = "FOLDER | --images PATH --masks PATH --mask-format FORMAT"
    """Arguments of the usual call, which `--help` lists first."""
    folder: Positional[Path | None] = None
    """Folder to look at instead of --images and --masks: proposes all flags of `unet pack` as one
    command, and checks the data with them."""
    out: Path = Path("check")
    """Folder for the contact sheet, the JSON and the list of problems."""
    workers: int = 0
    """Processes; 0: one per CPU."""
    source: Flat[SourceOptions]

    def __post_init__(self) -> None:
        if self.folder is None:
            self.source.require_input()
        else:
            refuse_unused(self.source, "has no effect with FOLDER; use --images and --masks")
        refuse_negative_workers(self.workers)
        for folder in (
            *((self.folder,) if self.folder else ()),
            *self.source.pairing.images,
            *self.source.pairing.masks,
        ):
            if self.out.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"--out {self.out} is inside {folder}, so its files would be read as images; "
                    "choose another --out"
                )


def run(config: CheckConfig) -> int:
    """Inspect all pairs, print a table, write the report and the contact sheet."""
    require_writable("--out", config.out)
    if config.folder is not None:
        return check_folder(config.folder, config)
    source = config.source
    if (layout := source.layout.layout) is not None and layout[0] == "auto":
        return propose_layout(layout[1], "check")
    if source.mask.mask_format == "auto":
        return propose_format(config, "check")
    pairing = source.find_pairs()
    skip_unpaired = source.pairing.skip_unpaired
    pairs = PairReport(
        SampleStatistics(), [], list_pairing_problems(pairing, skip_unpaired), [], set()
    )
    rule, splits = None, {}
    notes = [*source.describe_splits(), *source.describe_input(), *pairing.notes]
    if pairing.pairs:
        rule = source.sample_rule(pairing)
        inspect_all(pairing, rule, config.workers, pairs)
        splits = assign_splits(
            source.make_split_rule(), pairing, pairs, source.duplicate.duplicates, notes
        )
        pairs.problems += list_leaks(pairs, splits)
    masks = None if rule is None else rule.masks
    absent = source.allow_absent_classes
    found, class_notes = find_class_problems(
        source.class_names(), masks, pairs.tally, allow_absent=absent, remedy=IGNORED_REMEDY
    )
    notes += class_notes
    problems = sorted([*pairs.problems, *found])
    store = Store(str(config.out))
    store.create_folder()
    form = source.make_image_format(pairs.tally)
    report = make_report(source.class_names(), form, pairing, pairs, splits, problems)
    # Of the previous run, which may have read other files.
    store.remove(SHEET_NAME)
    data = (json.dumps(report, indent=1) + "\n").encode()
    done = write_result(config.out / REPORT_NAME, data)
    path = save_problems(problems, store)
    table = format_table(report, "pairs" if source.has_masks else "images")
    print_lines([*table, *(f"  {note}" for note in notes)])
    print(f"report: {store.path(REPORT_NAME)}{done}")
    if rule is not None and draw_sheet(pairing, rule, form, pairs, report, config.out / SHEET_NAME):
        print(f"contact sheet: {store.path(SHEET_NAME)}")
    if not problems:
        print("no problems found; pack with: unet pack, the same flags and --out SHARDS")
        return 0
    print_problems(problems, path)
    return REFUSED


def check_folder(folder: Path, config: CheckConfig) -> int:
    """Propose flags for a folder, check the data with them, and print them as one command."""
    words, notes = propose_source(folder, config.out, config.workers)
    more = ["--out", str(config.out), "--workers", str(config.workers)]
    code = run(parse(CheckConfig, [*words, *more], "check"))
    print(
        "\nproposed command:\n\n" + shlex.join(["unet", "pack", *words, "--out", "SHARDS"]) + "\n"
    )
    print_lines(f"unsure: {note}" for note in notes)
    return code


def print_problems(problems: Sequence[str], path: str) -> None:
    """Print the first problems on stderr; `path`: the file that lists all of them."""
    print(f"{len(problems)} problems: {path}", file=sys.stderr)
    for line in list_problems(problems):
        print(f"  {line}", file=sys.stderr)


def list_pairing_problems(pairing: Pairing, skip_unpaired: bool) -> list[str]:
    """List the files without a pair, each with a remedy."""
    unpaired = [] if skip_unpaired else pairing.unpaired
    return [
        *(
            problem if "; " in problem else f"{problem}; keep one, or correct the list"
            for problem in pairing.refused
        ),
        *(f"{problem}; add it, or skip the file with --skip-unpaired" for problem in unpaired),
    ]


def inspect_all(pairing: Pairing, rule: SampleRule, workers: int, report: PairReport) -> None:
    """Read all pairs in parallel and add their contents to the report."""
    total = len(pairing.pairs)
    workers = num_workers(workers, total)
    with progress(total=total, desc="check", unit="pair") as bar:
        task = partial(
            inspect_pairs,
            images=str(pairing.images),
            masks=str(pairing.masks),
            rule=rule,
            compared=frozenset(pairing.pairs[i].source for i in choose_images(total)),
        )
        for chunk, part in run_all(task, chunks(pairing.pairs, workers), workers):
            # In no particular order; whatever is reported is sorted.
            report.tally.merge(part.tally)
            report.sources += part.sources
            report.problems += part.problems
            report.empty += part.empty
            report.bad |= part.bad
            report.ratios |= part.ratios
            bar.update(len(chunk))


def assign_splits(
    rule: SplitRule,
    pairing: Pairing,
    report: PairReport,
    duplicates: DuplicatePolicy,
    notes: list[str],
) -> dict[str, str]:
    """Return {source: split} of all pairs; problems with the splits are added to the report."""
    if pairing.masks is None:
        return {pair.source: "unlabelled" for pair in pairing.pairs}
    try:
        names, groups = rule.assign_splits(pairing.pairs, notes)
    except AggregateDataError as error:
        report.problems += [f"{line}; {error.remedy}" for line in error.problems]
        return {}
    except DataError as error:
        report.problems.append(str(error))
        return {}
    splits = {pair.source: name for pair, name in zip(pairing.pairs, names, strict=True)}
    if duplicates == "same-split":
        by_source = {pair.source: g for pair, g in zip(pairing.pairs, groups, strict=True)}
        identical = find_duplicates(report.tally.digests, report.sources).values()
        leaks = [group for group in identical if len({splits[name] for name in group}) > 1]
        if moved := unite_duplicates(splits, by_source, leaks):
            print(describe_moves(splits, moved))
            splits |= moved
    return splits


def make_report(
    names: tuple[str, ...],
    form: ImageFormat,
    pairing: Pairing,
    pairs: PairReport,
    splits: dict[str, str],
    problems: list[str],
) -> dict[str, Any]:
    """Build the content of check.json; `splits` is {source: split}."""
    tally = pairs.tally
    pixels = tally.class_pixels(len(names)) if names else ()
    total = max(1, sum(pixels))
    mean, std = compute_mean_std(tally.levels, form) if tally.channels else ((), ())
    duplicates = find_duplicates(tally.digests, pairs.sources)
    shift = find_shift([ratios for _, ratios in sorted(pairs.ratios.items())])
    return {
        "pairs": len(pairing.pairs),
        "bad_pairs": len(pairs.bad),
        "problems": [
            dict(zip(("found", "remedy"), p.rpartition("; ")[::2], strict=True))
            if "; " in p
            else {"found": p, "remedy": ""}
            for p in problems
        ],
        "splits": {
            split: sum(1 for value in splits.values() if value == split)
            for split in sorted(set(splits.values()))
        },
        "image_format": asdict(form),
        "mean": mean,
        "std": std,
        "sizes": [asdict(size) for size in tally.size_counts()],
        "mask_modes": dict(tally.mask_modes.most_common()),
        "classes": {
            name: {"pixels": count, "share": count / total, "images": int(images)}
            for name, count, images in zip(
                (*names, "ignored"),
                pixels,
                (*tally.images[: len(names)], tally.images[255]),
                strict=bool(names),
            )
        }
        if names
        else {},
        "empty": sorted(pairs.empty),
        "duplicates": sorted(sorted(names) for names in duplicates.values()),
        "notes": dict(sorted(tally.notes.items())),
        "outliers": [asdict(outlier) for outlier in tally.find_outliers(names)],
        "shift": None if shift is None else asdict(shift),
    }


def format_table(report: dict[str, Any], unit: str) -> list[str]:
    """Format the report for people; `unit`: pairs or images."""
    splits = ", ".join(f"{name} {count}" for name, count in report["splits"].items())
    lines = [f"{report['pairs']} {unit}: {splits}"]
    sizes = report["sizes"]
    lines += [
        f"  {s['width']} x {s['height']} {s['mode']:<6}{s['images']:>8} images" for s in sizes[:5]
    ]
    if len(sizes) > 5:
        lines.append(f"  and {len(sizes) - 5} more sizes or modes")
    if report["mask_modes"]:
        modes = ", ".join(f"{mode} ({count})" for mode, count in report["mask_modes"].items())
        lines.append(f"  masks of mode {modes}")
    # If no mask could be read, nothing is known about the classes.
    classes = report["classes"] if report["mask_modes"] else {}
    for name, counts in classes.items():
        if counts["pixels"] or name != "ignored":
            lines.append(
                f"  {name:<20}{counts['share']:>8.2%} of pixels, in {counts['images']} masks"
            )
    lines += [f"  {count} images {NOTES[note]}" for note, count in report["notes"].items()]
    lines += [f"  outlier: {o['name']} {o['reason']}" for o in report["outliers"]]
    if form := report["image_format"]["range"]:
        lines.append(f"  16-bit values {form[0]} to {form[1]} become 0 to 255")
    if empty := report["empty"]:
        more = " ..." if len(empty) > 3 else ""
        lines.append(f"  {len(empty)} masks contain only class 0: {', '.join(empty[:3])}{more}")
    for name, counts in classes.items():
        if not counts["pixels"] and name != "ignored":
            lines.append(f"  warning: class {name!r} has no pixels")
    if duplicates := report["duplicates"]:
        lines.append(
            f"  warning: {len(duplicates)} groups of identical images, the first: "
            f"{' = '.join(duplicates[0][:5])}"
        )
    shift = None if report["shift"] is None else Shift(**report["shift"])
    if shift is not None and (shift.vertical or shift.horizontal):
        lines.append(
            f"  warning: masks are shifted {shift} against their images (mean of {shift.images} "
            "images), or shadows look like that; correct them, or let unet plan leave out the "
            "flips that would average it out"
        )
    return lines


def draw_sheet(
    pairing: Pairing,
    rule: SampleRule,
    form: ImageFormat,
    pairs: PairReport,
    report: dict[str, Any],
    path: Path,
) -> bool:
    """Draw valid pairs, spread over the data set, on a contact sheet.

    Args:
        pairing: all pairs.
        rule: how pairs are read.
        form: how images are decoded.
        pairs: contents of the pairs.
        report: content of check.json, for the legend.
        path: file to write.

    Returns:
        Whether there was a valid pair.
    """
    chosen = choose_cells(pairing, pairs, [outlier["name"] for outlier in report["outliers"]])
    form = replace(form, channels="RGB")
    cells = []
    for pair in chosen:
        sample = read_pair(pair, str(pairing.images), str(pairing.masks), rule)
        mask = None
        if sample.mask is not None and sample.mask.class_map is not None:
            mask = sample.mask.class_map.index
        assert sample.image.image is not None
        cells.append(Cell(pair.source, Image.fromarray(to_array(sample.image.image, form)), mask))
    if not cells:
        return False
    shares = {
        name: f"{name} {counts['share']:.1%}"
        for name, counts in report["classes"].items()
        if counts["pixels"] or name != "ignored"
    }
    palette = choose_overlay_colours([np.asarray(cell.image) for cell in cells], rule.palette)
    sheet = draw_contact_sheet(cells, palette, list(shares.values()))
    write_atomically(path, encode_png(sheet), durable=False)
    return True


def choose_cells(pairing: Pairing, pairs: PairReport, outliers: Sequence[str]) -> list[Pair]:
    """Choose the pairs on the contact sheet: outliers, then masks with foreground, then others.

    Each kind is spread evenly over the data set. `outliers`: paths of images.
    """
    good = [pair for pair in pairing.pairs if pair.source not in pairs.bad]
    empty = set(pairs.empty)
    kinds: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    for pair in good:
        kind = 0 if f"{pairing.images}/{pair.source}" in outliers else 1 + (pair.source in empty)
        kinds[kind].append(pair)
    chosen: list[Pair] = []
    for kind in kinds:
        room = SHEET_CELLS - len(chosen)
        if room:
            chosen += kind[:: max(1, -(-len(kind) // room))]
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(CheckConfig, run, argv, "check")


if __name__ == "__main__":
    sys.exit(main())
