"""`--help` of a verb: its main flags first, then titled groups."""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from pipelines.runtime.flag_values import is_switch, takes_many
from pipelines.runtime.flags import Flag

MAX_COLUMNS = 100
INDENT = 24
"""Column of the explanations."""


def format_help(config_class: type, flags: Sequence[Flag], verb: str) -> str:
    """Format the help of a verb for the width of the terminal."""
    columns = min(shutil.get_terminal_size().columns, MAX_COLUMNS)
    usage = format_usage(config_class, flags, verb)
    main = [flag for flag in flags if flag.required or flag.name in usage.split()]
    main.sort(key=lambda flag: usage.split().index(flag.name))
    first, *rest = inspect.cleandoc(config_class.__doc__ or "").split("\n\n")
    lines = [
        *wrap(f"usage: {usage}", columns, 8),
        *(line for part in (first, *rest) for line in ("", *wrap(part, columns))),
        "",
        *(line for flag in main for line in format_flag(flag, columns)),
        *format_entry("--config FILE.yaml", CONFIG_HELP, columns),
        *format_entry("-h, --help", "Print this help.", columns),
    ]
    others = [flag for flag in flags if flag not in main]
    for owner, group in groupby(others, key=lambda flag: flag.owner):
        title = "General." if owner is config_class else first_line(owner)
        lines += ["", *wrap(f"{title.rstrip('.')}:", columns)]
        lines += [line for flag in group for line in format_flag(flag, columns)]
    return "\n".join(lines)


CONFIG_HELP = (
    "Flags from a file, written without the leading dashes (repeatable; later files win, and flags "
    "on the command line win over files). Every switch --x has a --no-x."
)


def format_usage(config_class: type, flags: Sequence[Flag], verb: str) -> str:
    """Return the usage: the verb's own `USAGE`, else its required flags."""
    own = getattr(config_class, "USAGE", None)
    needed = [with_placeholder(flag) for flag in flags if flag.required]
    needed.sort(key=lambda text: text.startswith("--"))
    return " ".join([f"unet {verb}", *([own] if own else needed), "[FLAGS]"])


def with_placeholder(flag: Flag) -> str:
    """Return `--flag PLACEHOLDER`; of a switch that is not off by default, both names."""
    if flag.positional:
        return f"{flag.name} ..." if takes_many(flag.kind) else flag.name
    if not is_switch(flag.kind):
        return f"{flag.name} {flag.placeholder}"
    return flag.name if flag.default is False else f"{flag.name}, {flag.negative}"


def format_flag(flag: Flag, columns: int) -> Iterator[str]:
    """Yield the lines about a flag: its name, its explanation, its default."""
    text = field_texts(flag.owner).get(flag.key.rpartition(".")[2], "")
    note = "(required)" if flag.required else default_note(flag)
    return format_entry(with_placeholder(flag), f"{text} {note}".strip(), columns)


def default_note(flag: Flag) -> str:
    """Return `(default: 20)`; empty where the explanation gives the default, or nothing is set."""
    default = flag.default
    if default in (None, (), "") or default is False:
        return ""
    if default is True:
        return "(default: on)"
    return f"(default: {default:g})" if isinstance(default, float) else f"(default: {default})"


def format_entry(name: str, text: str, columns: int) -> Iterator[str]:
    """Yield the lines of a flag: the name, then the explanation in a column of its own."""
    lines = textwrap.wrap(text, columns - INDENT, break_on_hyphens=False) or [""]
    head = f"  {name}"
    if len(head) < INDENT - 1:
        yield f"{head:<{INDENT}}{lines.pop(0)}"
    else:
        yield from textwrap.wrap(
            name, columns, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
        )
    yield from (" " * INDENT + line for line in lines)


def wrap(text: str, columns: int, hanging: int = 0) -> list[str]:
    """Wrap a paragraph; `hanging`: indentation of the lines after the first."""
    return textwrap.wrap(
        " ".join(text.split()), columns, subsequent_indent=" " * hanging, break_on_hyphens=False
    )


def first_line(settings: type) -> str:
    """Return the first line of a class's docstring."""
    return inspect.cleandoc(settings.__doc__ or settings.__name__).partition("\n")[0]


@cache
def field_texts(settings: type) -> dict[str, str]:
    """Return {field: the string below it} of a class, in one line each."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(node, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            value: Any = getattr(below.value, "value", "")
            texts[ast.unparse(field.target)] = re.sub(r"\s+", " ", str(value))
    return texts
