"""`unet check`: one look at every pixel of a data set before it is packed."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.config import REFUSED, refuse_url, run_command
from pipelines.overlay import Cell, contact_sheet
from pipelines.parallel import chunks, num_workers, run_all
from pipelines.progress import progress
from pipelines.propose import propose_format
from pipelines.source import SourceConfig, check_rule, save_problems
from shards.images import NOTES, ImageFormat, to_array
from shards.pairs import MAX_LISTED, AggregateDataError, Pair, Pairing
from shards.sample import DataError
from shards.store import Store
from shards.tally import (
    SampleRule,
    SampleStatistics,
    StoredSample,
    compute_mean_std,
    find_duplicates,
    read_sample,
)

SHEET_CELLS = 30
"""Pictures on the contact sheet, spread evenly over the data set."""

REPORT = "check.json"
SHEET = "sheet.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig(SourceConfig):
    """Look at every pixel of pictures and masks, and say what packing would refuse.

    Takes the flags of `unet pack`. Writes a table, OUT/sheet.png with masks drawn over pictures,
    OUT/check.json for machines and OUT/problems.txt; exit code 1 where packing would refuse.
    """

    out: Path = Path("check")
    """Folder for the contact sheet, the JSON and the list of problems."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        refuse_url("--out", self.out)
        for folder in (self.images, self.masks):
            if folder is not None and self.out.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"--out {self.out} lies in {folder} and would be taken for pictures; "
                    "choose another --out"
                )


@dataclass(slots=True)
class Found:
    """What was found in some pairs."""

    tally: SampleStatistics
    sources: list[str]
    """Sources of the pairs, in the order of the tally's digests."""
    problems: list[str]
    empty: list[str]
    """Sources of pictures whose mask holds class 0 or ignored pixels only."""
    bad: set[str]
    """Sources of pairs with a problem."""


def run(config: CheckConfig) -> int:
    """Look, tell, draw."""
    if config.mask_format == "auto":
        return propose_format(config, "check")
    pairing = config.find_pairs()
    found = Found(SampleStatistics(), [], pairing_problems(config, pairing), [], set())
    if pairing.pairs:
        rule = check_rule(config, pairing)
        look_at_all(config, pairing, rule, found)
        splits = assign(config, pairing, found)
        problems = found.problems + leaks(found, splits)
    else:
        rule, splits, problems = None, {}, found.problems
    problems.sort()
    store = Store(str(config.out))
    store.create_folder()
    report = make_report(config, pairing, found, splits, problems)
    store.write(REPORT, (json.dumps(report, indent=1) + "\n").encode())
    place = save_problems(problems, store)
    print("\n".join(table(config, report)))
    if rule is not None and draw_sheet(config, pairing, rule, found, report):
        print(f"look: {store.path(SHEET)}")
    if not problems:
        print("no problem found; `unet pack` with the same flags and --out SHARDS packs it")
        return 0
    print(f"{len(problems)} problems: {place}", file=sys.stderr)
    for problem in problems[:MAX_LISTED]:
        print(f"  {problem}", file=sys.stderr)
    if len(problems) > MAX_LISTED:
        print(f"  and {len(problems) - MAX_LISTED} more", file=sys.stderr)
    return REFUSED


def pairing_problems(config: CheckConfig, pairing: Pairing) -> list[str]:
    """What is no pair and was not asked to be passed over, each with what to do."""
    unpaired = [] if config.skip_unpaired else pairing.unpaired
    return [
        *(
            problem if "; " in problem else f"{problem}; keep one, or correct the list"
            for problem in pairing.refused
        ),
        *(f"{problem}; add the other, or leave it out: --skip-unpaired" for problem in unpaired),
    ]


def look_at_all(config: CheckConfig, pairing: Pairing, rule: SampleRule, found: Found) -> None:
    """Read every pair, in processes, and add up what they hold."""
    total = len(pairing.pairs)
    workers = num_workers(config.workers, total)
    with progress(total=total, desc="check", unit="pair") as bar:
        work = partial(look_at, images=str(pairing.images), masks=str(pairing.masks), rule=rule)
        for piece, part in run_all(work, chunks(pairing.pairs, workers), workers):
            # In no order; what is told of it is sorted.
            found.tally.merge(part.tally)
            found.sources += part.sources
            found.problems += part.problems
            found.empty += part.empty
            found.bad |= part.bad
            bar.update(len(piece))


def look_at(pairs: Sequence[Pair], images: str, masks: str, rule: SampleRule) -> Found:
    """What some pairs hold."""
    found = Found(SampleStatistics(), [pair.source for pair in pairs], [], [], set())
    for pair in pairs:
        try:
            sample = read_pair(pair, images, masks, rule)
        except (DataError, OSError) as error:
            text = str(error)
            if isinstance(error, OSError):
                text = f"{error.filename} cannot be read: {error.strerror or error}; repair it"
            found.problems.append(text)
            found.bad.add(pair.source)
            found.tally.add_omitted()
            continue
        found.tally.add(sample)
        classes = sample.mask.class_map if sample.mask is not None else None
        if classes is not None and not classes.pixels[1:255].any():
            found.empty.append(pair.source)
    return found


def read_pair(pair: Pair, images: str, masks: str, rule: SampleRule) -> StoredSample:
    """A picture and its mask, read. Raises DataError or OSError."""
    image_path, mask_path = f"{images}/{pair.source}", f"{masks}/{pair.mask}"
    with open(image_path, "rb") as file:
        image = file.read()
    mask = None
    if pair.mask is not None:
        with open(mask_path, "rb") as file:
            mask = file.read()
    return read_sample(image, mask, rule, image_path, mask_path)


def assign(config: CheckConfig, pairing: Pairing, found: Found) -> dict[str, str]:
    """{source: split} of every pair; what is wrong with the splits is a problem like any other."""
    if pairing.masks is None:
        return {pair.source: "unlabelled" for pair in pairing.pairs}
    try:
        splits, _ = config.split_rule().assign_splits(pairing.pairs)
    except AggregateDataError as error:
        found.problems += [f"{line}; {error.remedy}" for line in error.problems]
        return {}
    except DataError as error:
        found.problems.append(str(error))
        return {}
    return {pair.source: split for pair, split in zip(pairing.pairs, splits, strict=True)}


def leaks(found: Found, splits: dict[str, str]) -> list[str]:
    """Equal pictures in different splits, a line each."""
    problems = []
    for names in find_duplicates(found.tally.digests, found.sources).values():
        if len({splits.get(name) for name in names}) > 1:
            named = " = ".join(f"{name} ({splits[name]})" for name in sorted(names)[:5])
            problems.append(
                f"{named} are the same picture in two splits; remove one, or put both into one "
                "split with --split-file"
            )
    return problems


def make_report(
    config: CheckConfig,
    pairing: Pairing,
    found: Found,
    splits: dict[str, str],
    problems: list[str],
) -> dict[str, Any]:
    """Everything that was found, for machines."""
    tally = found.tally
    names = config.class_names()
    pixels = tally.class_pixels(len(names)) if names else ()
    total = max(1, sum(pixels))
    form = config.image_format(tally)
    mean, std = compute_mean_std(tally.levels, form) if tally.channels else ((), ())
    duplicates = find_duplicates(tally.digests, found.sources)
    return {
        "pairs": len(pairing.pairs),
        "bad_pairs": len(found.bad),
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
        "empty": sorted(found.empty),
        "duplicates": sorted(sorted(names) for names in duplicates.values()),
        "notes": dict(sorted(tally.notes.items())),
    }


def table(config: CheckConfig, report: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    splits = ", ".join(f"{name} {count}" for name, count in report["splits"].items())
    lines = [f"{report['pairs']} {'pairs' if config.has_masks else 'pictures'}: {splits}"]
    sizes = report["sizes"]
    lines += [
        f"  {s['width']} x {s['height']} {s['mode']:<6}{s['images']:>8} pictures" for s in sizes[:5]
    ]
    if len(sizes) > 5:
        lines.append(f"  and {len(sizes) - 5} more sizes or modes")
    if report["mask_modes"]:
        modes = ", ".join(f"{mode} ({count})" for mode, count in report["mask_modes"].items())
        lines.append(f"  masks of mode {modes}")
    # Where no mask could be read, nothing is known of the classes.
    classes = report["classes"] if report["mask_modes"] else {}
    for name, found in classes.items():
        if found["pixels"] or name != "ignored":
            lines.append(
                f"  {name:<20}{found['share']:>8.2%} of pixels, in {found['images']} masks"
            )
    lines += [f"  {count} pictures {NOTES[note]}" for note, count in report["notes"].items()]
    if form := report["image_format"]["range"]:
        lines.append(f"  16-bit values {form[0]} to {form[1]} become 0 to 255")
    if empty := report["empty"]:
        more = " ..." if len(empty) > 3 else ""
        lines.append(f"  {len(empty)} masks hold nothing but class 0: {', '.join(empty[:3])}{more}")
    for name, found in classes.items():
        if not found["pixels"] and name != "ignored":
            lines.append(f"  warning: no pixel of the class {name!r} anywhere")
    if doubles := report["duplicates"]:
        lines.append(
            f"  warning: {len(doubles)} groups of equal pictures, the first: "
            f"{' = '.join(doubles[0][:5])}"
        )
    return lines


def draw_sheet(
    config: CheckConfig,
    pairing: Pairing,
    rule: SampleRule,
    found: Found,
    report: dict[str, Any],
) -> bool:
    """Draw good pairs, spread over the data set, into the contact sheet; whether there is any."""
    good = [pair for pair in pairing.pairs if pair.source not in found.bad]
    chosen = good[:: max(1, -(-len(good) // SHEET_CELLS))]
    bounds = report["image_format"]["range"]
    form = ImageFormat("RGB", config.alpha, None if bounds is None else (bounds[0], bounds[1]))
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
        name: f"{name} {found['share']:.1%}"
        for name, found in report["classes"].items()
        if found["pixels"] or name != "ignored"
    }
    sheet = contact_sheet(cells, rule.palette, list(shares.values()))
    sheet.save(config.out / SHEET)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(CheckConfig, run, argv, "check")


if __name__ == "__main__":
    sys.exit(main())
