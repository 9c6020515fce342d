"""Configuration classes as flags: their names, reading a command line, building the configuration.

A verb is a frozen dataclass. Each field is a flag (`run_dir`: `--run-dir`), a nested dataclass a
prefix (`optim.lr`: `--optim.lr`), a `Flat` one a group of flags without a prefix.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from pipelines.runtime.errors import UsageError
from pipelines.runtime.flag_values import (
    is_switch,
    item_types,
    parse_words,
    placeholder,
    shown_words,
    takes_many,
)
from pipelines.runtime.yaml_flags import is_flat, is_positional, plain_type

T = TypeVar("T")

PLACEHOLDERS = {
    "annotator": "NAME",
    "encoder": "ID|FOLDER",
    "fold": "i/k",
    "group_by": "REGEX",
    "init_from": "CHECKPOINT",
    "max_memory": "SIZE",
    "out": "FOLDER|URL",
    "data": "FOLDER|URL",
    "input": "PATH|URL",
    "part": "i/n",
    "per": "COLUMN",
    "predictions": "FOLDER|URL",
    "scheduler": "ADDRESS",
}
"""What stands for a text in help; of other settings, the last word of their name."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag or positional argument of a verb."""

    key: str
    """Dotted name: `optim.lr`, `run_dir`."""
    kind: Any
    """Type of the value."""
    default: Any
    """Value without the flag; MISSING: the flag is required."""
    owner: type
    """Class of settings whose field it is."""
    positional: bool

    @property
    def name(self) -> str:
        """The name on the command line: `--optim.lr`, `FOLDER`."""
        if self.positional:
            return self.key.upper()
        return "--" + self.key.replace("_", "-")

    @property
    def negative(self) -> str:
        """The name that turns a switch off: `--optim.no-wide`."""
        prefix, dot, last = self.name[2:].rpartition(".")
        return f"--{prefix}{dot}no-{last}"

    @property
    def placeholder(self) -> str:
        """What stands for the value in help, empty for a switch."""
        name = self.key.rpartition(".")[2]
        return placeholder(self.kind, PLACEHOLDERS.get(name, name.rpartition("_")[2].upper()))

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    def parse(self, words: Sequence[str]) -> Any:
        """Convert the words after the flag. Raises UsageError."""
        try:
            return parse_words(self.kind, words)
        except ValueError as error:
            raise UsageError(f"{self.name} {shown_words(words)}: {error}") from None


def list_flags(config_class: type, base: Any = None, prefix: str = "") -> Iterator[Flag]:
    """Yield the flags of a class of settings, of its groups too, in the order of the fields.

    `base`: an object of the class that has the defaults; None: the defaults of the fields.
    """
    hints = get_type_hints(config_class, include_extras=True)
    for field in fields(config_class):
        kind, default = plain_type(hints[field.name]), default_of(field, base)
        if isinstance(kind, type) and is_dataclass(kind):
            inner = prefix if is_flat(hints[field.name]) else f"{prefix}{field.name}."
            yield from list_flags(kind, None if default is MISSING else default, inner)
        else:
            key = prefix + field.name
            yield Flag(key, kind, default, config_class, is_positional(hints[field.name]))


def default_of(field: Field[Any], base: Any) -> Any:
    """Return the default of a field, which `base` overrides; MISSING for a required one."""
    if base is not None:
        return getattr(base, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def build(
    config_class: type[T], values: Mapping[str, Any], base: Any = None, prefix: str = ""
) -> T:
    """Build a configuration from {key: value}. Raises ValueError as its classes do."""
    hints = get_type_hints(config_class, include_extras=True)
    arguments: dict[str, Any] = {}
    for field in fields(config_class):  # pyright: ignore[reportArgumentType] - it is a dataclass
        kind, default = plain_type(hints[field.name]), default_of(field, base)
        if isinstance(kind, type) and is_dataclass(kind):
            inner = prefix if is_flat(hints[field.name]) else f"{prefix}{field.name}."
            inner_base = None if default is MISSING else default
            arguments[field.name] = build(kind, values, inner_base, inner)
        else:
            arguments[field.name] = values.get(prefix + field.name, default)
    return config_class(**arguments)


def read_arguments(flags: Sequence[Flag], argv: Sequence[str]) -> dict[str, Any]:
    """Convert a command line to {key: value}. Raises UsageError for a wrong flag or value."""
    by_name = {name: flag for flag in flags for name in names_of(flag)}
    positional = [flag for flag in flags if flag.positional]
    values: dict[str, Any] = {}
    words, last = [*argv], "the verb"
    while words:
        word = words.pop(0)
        if not is_flag(word):
            if not positional:
                raise UsageError(f"{shown_words([word])}: unexpected after {last}; remove it")
            flag = positional.pop(0)
            values[flag.key] = flag.parse([word, *take_values(flag, words, 1)])
            continue
        last, equals, attached = word.partition("=")
        last = last.replace("_", "-")
        if last not in by_name:
            raise UsageError(f"{last}: unknown flag; {suggest(last, by_name)}")
        flag = by_name[last]
        following = [attached] if equals else take_values(flag, words)
        if is_switch(flag.kind):
            if equals:
                raise UsageError(f"{word}: takes no value; use {flag.name} or {flag.negative}")
            values[flag.key] = last == flag.name
        elif following:
            values[flag.key] = flag.parse(following)
        else:
            raise UsageError(f"{last}: needs a value; see --help")
    return values


def names_of(flag: Flag) -> tuple[str, ...]:
    """Return the names of a flag on the command line; none if it is positional."""
    if flag.positional:
        return ()
    return (flag.name, flag.negative) if is_switch(flag.kind) else (flag.name,)


def is_flag(word: str) -> bool:
    """Whether a word is a flag: `--x` or `-x`; numbers and a lone dash are values."""
    return word.startswith("--") or (len(word) == 2 and word[0] == "-" and word[1].isalpha())


def take_values(flag: Flag, words: list[str], taken: int = 0) -> list[str]:
    """Remove from the rest of a command line the values of a flag, and return them.

    `taken`: number of its values that were removed before.
    """
    items = item_types(flag.kind)
    limit = 0 if is_switch(flag.kind) else 1
    if items is not None:
        limit = taken + len(words) if takes_many(flag.kind) else len(items)
    values: list[str] = []
    while words and taken + len(values) < limit and not is_flag(words[0]):
        values.append(words.pop(0))
    return values


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown flag: the nearest known one, or where they are listed."""
    known = [*known]
    bare = name.lstrip("-")
    ends = [flag for flag in known if flag.rpartition(".")[2] == bare.rpartition(".")[2]]
    ends += [flag for flag in known if flag == f"--{bare.rpartition('.')[2]}"]
    near = ends or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "--help lists all flags"
