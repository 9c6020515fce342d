"""Colour tables and palettes of classes, from files."""

import csv
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.runtime.errors import describe_os_error
from pipelines.runtime.strict_yaml import load_yaml, read_text
from shards.annotations.ade20k import ADE20K
from shards.annotations.class_tables import CAMVID_COLOURS, CITYSCAPES, VOC, ClassTable
from shards.images.files import ImageRule, open_image
from shards.local_files import read_file
from shards.masks.palettes import read_palette
from shards.sample import DataError

TABLES = {
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "ade20k": ADE20K,
    "camvid": CAMVID_COLOURS,
}
"""Colour tables that --colours knows by name."""
DECIMAL = re.compile("[0-9]{1,9}")
IGNORED_NAME = "ignore"
"""Name of a colour whose pixels are ignored."""


@dataclass(frozen=True, slots=True)
class ColourTable:
    """Colour of each class, as listed in the file of `--colours`."""

    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, ...], ...] = ()
    ignore_colours: tuple[tuple[int, ...], ...] = ()


def read_first_palette(
    path: Path, num_classes: int, rule: ImageRule
) -> tuple[tuple[int, int, int], ...]:
    """Read the colours of the classes from a mask's palette; missing ones are grey.

    Raises DataError if the mask has no palette.
    """
    image = open_image(read_file(path), str(path), rule)
    if image.mode != "P":
        raise DataError(
            f"{path} has no palette (mode {image.mode}); use --mask-format index, or rgb with "
            "--colours"
        )
    colours = read_palette(image)[:num_classes]
    return colours + ((128, 128, 128),) * (num_classes - len(colours))


@cache
def read_colour_table(path: Path) -> ColourTable:
    """Read classes and colours from a YAML, JSON or CSV file. Raises ValueError if invalid."""
    if str(path) in TABLES and not path.exists():
        return unite_equal_colours(TABLES[str(path)])
    try:
        text = read_text(path)
        rows = (
            read_csv_rows(text) if path.suffix.lower() == ".csv" else read_mapped_rows(path, text)
        )
    except OSError as error:
        raise ValueError(f"--colours {describe_os_error(error, path)}") from error
    except (yaml.YAMLError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"--colours {path}: {' '.join(str(error).split())}") from error
    classes, colours, ignored = [], [], []
    for name, numbers in rows:
        integers = isinstance(numbers, list) and all(type(part) is int for part in numbers)
        if not integers or len(numbers) not in (3, 4) or not all(0 <= n <= 255 for n in numbers):
            raise ValueError(
                f"--colours {path}: {name} is {numbers}; expected [r, g, b] or [r, g, b, a], each "
                "0 to 255"
            )
        if name.lower() == IGNORED_NAME:
            ignored.append(tuple(numbers))
        else:
            classes.append(name)
            colours.append(tuple(numbers))
    if len(classes) < 2:
        raise ValueError(
            f"--colours {path} lists {len(classes)} classes; expected at least two, as "
            "`name: [r, g, b]` or, in a CSV file, `name,r,g,b` on each line"
        )
    return ColourTable(tuple(classes), tuple(colours), tuple(ignored))


def unite_equal_colours(table: ClassTable) -> ColourTable:
    """Make one class of those that share a colour, called `A or B`: masks cannot tell which."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, colour in zip(table.names, table.colours, strict=True):
        names.setdefault(colour, []).append(name)
    return ColourTable(tuple(map(" or ".join, names.values())), tuple(names), table.ignored)


def read_csv_rows(text: str) -> list[tuple[str, Any]]:
    """Parse lines `name,r,g,b` into (name, numbers); a header line is skipped."""
    rows: list[tuple[str, Any]] = []
    for number, words in enumerate(csv.reader(text.splitlines(), strict=True)):
        words = [word.strip() for word in words]
        numeric = [DECIMAL.fullmatch(word) is not None for word in words[1:]]
        if not any(words) or (number == 0 and not any(numeric)):
            continue
        rows.append((words[0], to_integers(words[1:])))
    return rows


def load_json(text: str) -> Any:
    """Parse a JSON text. Raises yaml.YAMLError for a duplicate key, json.JSONDecodeError."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name, value in pairs:
            if name in plain:
                raise yaml.YAMLError(f"duplicate key {name}")
            plain[name] = value
        return plain

    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def read_mapped_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    """Parse a YAML or JSON mapping into (name, numbers)."""
    plain = load_json(text) if path.suffix.lower() == ".json" else load_yaml(text)
    if not isinstance(plain, dict) or not plain:
        raise ValueError(f"--colours {path}: expected `name: [r, g, b]` lines")
    return [(str(name), to_integers(numbers)) for name, numbers in plain.items()]


def to_integers(numbers: Any) -> Any:
    """Convert the texts of a YAML list that are decimal integers."""
    if not isinstance(numbers, list):
        return numbers
    return [int(n) if isinstance(n, str) and DECIMAL.fullmatch(n) else n for n in numbers]
