"""What names the classes of a folder: `classes.txt`, `class_dict.csv`, or a known layout."""

import re
from collections.abc import Sequence
from pathlib import Path

from shards.annotations.layouts import LayoutName, read_layout
from shards.folders.walk import read_lines
from shards.sample import IGNORE, Colour, DataError

CLASS_FILES = frozenset(
    {
        *("classes.txt", "class_names.txt", "classnames.txt", "labels.txt", "label_names.txt"),
        *("names.txt", "codes.txt", "classes.csv", "class_dict.csv", "labels.csv"),
        *("label_colors.txt", "label_colours.txt", "labelmap.txt", "colors.txt", "colours.txt"),
    }
)
VOID_WORDS = frozenset(
    {
        *("void", "ignore", "ignored", "unlabelled", "unlabeled", "unknown", "undefined"),
        *("unclassified", "unannotated", "dontcare", "nolabel", "notlabelled", "notlabeled"),
    }
)
"""Names of what marks unlabelled pixels, which are ignored."""
FILLERS = re.compile(r"(?<![a-z])(class|labels?|pixels?|regions?|areas?|value|index)(?![a-z])")
NAMED_COLOURS = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})")
HEADER = re.compile(r"(name|class|label|id|index|r|g|b|red|green|blue|colou?r|[\s,_#:;-])*", re.I)


def read_class_file(
    root: Path, names: Sequence[str]
) -> tuple[Path, dict[str, Colour | None]] | None:
    """Read the first file of class names among files below `root`, in the order of its lines.

    Returns its path and {name: colour, None if the file has none}; None if no file names classes.
    """
    for name in names:
        if name.rpartition("/")[2].lower() in CLASS_FILES:
            try:
                lines = read_lines(root / name)
            except DataError:
                continue
            classes = dict(filter(None, map(parse_class, lines)))
            if len(classes) > 1:
                return root / name, classes
    return None


def parse_class(line: str) -> tuple[str, Colour | None] | None:
    """Parse `name`, `3 name`, `name,r,g,b`, `r g b name` or `name:r,g,b::`; None for a header."""
    if line.lstrip().startswith("#") or HEADER.fullmatch(line):
        return None
    match = NAMED_COLOURS.search(line)
    colour = None if match is None else (int(match[1]), int(match[2]), int(match[3]))
    rest = line if match is None else f"{line[: match.start()]} {line[match.end() :]}"
    name = re.sub(r"^\s*\d+[\s,:;.]+|[\s,:;]+$", "", rest.strip(" \t,:;")).strip(" \t,:;\"'")
    return (name, colour) if name else None


def is_void(name: str) -> bool:
    """Return whether a name is that of no class: `void`, `Ignore label`, `don't care`."""
    lower = name.lower().replace("_", " ")
    words = (re.sub("[^a-z]", "", text) for text in (lower, FILLERS.sub("", lower)))
    return not VOID_WORDS.isdisjoint(words)


def find_placeholders(flags: Sequence[str]) -> tuple[int, int]:
    """Return start and end of the names after `--classes` in proposed flags."""
    start = flags.index("--classes") + 1
    end = next((i for i in range(start, len(flags)) if flags[i].startswith("--")), len(flags))
    return start, end


def list_values(flags: Sequence[str]) -> list[str]:
    """List the mask values that the placeholders of `--classes` stand for: `3` of `class_3`."""
    start, end = find_placeholders(flags)
    return [word.rpartition("_")[2] for word in flags[start:end]]


def find_layout_classes(
    name: LayoutName, root: Path, flags: Sequence[str]
) -> dict[str, Colour | None] | None:
    """Return the classes of a layout, `void` for its ignored value, in the order of its values.

    Returns None unless they are those of the proposed flags, and if the layout cannot be read.
    """
    try:
        layout = read_layout(name, root, "train")
    except DataError:
        return None
    form = layout.masks
    values = form.values or range(form.num_classes)
    names = dict(zip(map(str, values), layout.classes, strict=True))
    if form.ignore_value not in (None, IGNORE):
        names[str(form.ignore_value)] = "void"
    if "--classes" not in flags or {*list_values(flags)} != names.keys():
        return None
    return {names[value]: None for value in list_values(flags)}


def apply_names(
    flags: Sequence[str], classes: dict[str, Colour | None]
) -> tuple[list[str], str | None]:
    """Replace the placeholders of `--classes` in proposed flags by names of classes.

    A class called void (unlabelled, ignore) becomes --ignore-value, or where another value is
    ignored already, --unknown ignore. Returns the flags, and the name of that class. Raises
    DataError if the numbers of classes differ.
    """
    start, end = find_placeholders(flags)
    values = list_values(flags)
    if len(values) != len(classes):
        raise DataError(f"{len(classes)} names, but the masks have {len(values)} classes")
    names = dict(zip(values, classes, strict=True))
    void = next((v for v, name in names.items() if is_void(name)), None)
    if void is None or len(names) == 2:
        return [*flags[:start], *classes, *flags[end:]], None
    ignored = names.pop(void)
    rest = ["--classes", *names.values(), *flags[end:]]
    if "--ignore-value" not in flags:
        rest += ["--ignore-value", void]
        if void == values[-1] and "values" not in flags:
            return [*flags[: start - 1], *rest], ignored
    elif "--unknown" not in flags:
        rest += ["--unknown", "ignore"]
    return ["--mask-format", "values", "--mask-values", *names, *rest], ignored


def name_table(
    table: dict[str, Colour], classes: dict[str, Colour | None]
) -> dict[str, Colour] | None:
    """Name the colours of a proposed table, in the order of the file of classes.

    The first class called void becomes `ignore`. Returns None if the file does not name all
    colours.
    """
    named = {colour: name for name, colour in classes.items() if colour is not None}
    if not set(table.values()) <= named.keys():
        return None
    void = next((name for name in named.values() if is_void(name)), None)
    return {
        "ignore" if name == void else name: colour
        for colour, name in named.items()
        if colour in table.values()
    }
