"""The text of a flag or a YAML file -> a value of the declared type."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pipelines.runtime.errors import looks_like_url

NAMES: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
"""Types of a single value and their placeholders in help."""
WANTED: dict[Any, str] = {int: "a whole number", float: "a number"}
"""What a word was expected to be."""


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, without None and nested unions; of another type, itself."""
    if get_origin(kind) not in (Union, UnionType):
        return (kind,)
    nested = (alternatives(part) for part in get_args(kind) if part is not NoneType)
    return tuple(part for parts in nested for part in parts)


def is_optional(kind: Any) -> bool:
    """Whether None is a value of the type."""
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def is_switch(kind: Any) -> bool:
    """Whether the type is bool or bool | None: a flag without a value."""
    return alternatives(kind) == (bool,)


def item_types(kind: Any) -> tuple[Any, ...] | None:
    """Return the types of a tuple's items, the last `...` if it repeats; None for other types."""
    (first, *_) = alternatives(kind)
    return get_args(first) if get_origin(first) is tuple else None


def takes_many(kind: Any) -> bool:
    """Whether a flag takes any number of values."""
    items = item_types(kind)
    return items is not None and items[-1] is Ellipsis


def choices(kind: Any) -> tuple[str, ...]:
    """Return the words that a type of literals allows."""
    return tuple(
        word
        for part in alternatives(kind)
        if get_origin(part) is Literal
        for word in map(str, get_args(part))
    )


def placeholder(kind: Any, text: str = "TEXT") -> str:
    """Return what stands for the value in help: `INT`, `{a,b}`, `PATH ...`, empty for a switch.

    `text` stands for a string.
    """
    if (items := item_types(kind)) is not None:
        return " ".join("..." if item is Ellipsis else placeholder(item, text) for item in items)
    names = {**NAMES, str: text}
    plain = [names[part] for part in alternatives(kind) if part in names]
    words = choices(kind)
    return "|".join([*plain, *(["{" + ",".join(words) + "}"] if words else [])])


def parse_words(kind: Any, words: Sequence[str]) -> Any:
    """Convert the words after a flag. Raises ValueError with problem and remedy, without the flag.

    The word `None` stands for None where that is a value.
    """
    if is_optional(kind) and [*words] == ["None"]:
        return None
    items = item_types(kind)
    if items is None:
        if len(words) != 1:
            raise ValueError(f"takes one value, got {len(words)}")
        return parse_word(kind, words[0])
    if takes_many(kind):
        return tuple(parse_word(items[0], word) for word in words)
    if len(words) != len(items):
        raise ValueError(f"takes {len(items)} values ({placeholder(kind)}), got {len(words)}")
    return tuple(parse_word(item, word) for item, word in zip(items, words, strict=True))


def parse_word(kind: Any, word: str) -> Any:
    """Convert one word. Raises ValueError for a word that is not a value of the type."""
    words = choices(kind)
    if word in words:
        return word
    plain = next((part for part in alternatives(kind) if part in NAMES), None)
    if plain is None:
        raise ValueError(f"unknown; use {join_choices(words)}")
    if plain is Path and not word:
        raise ValueError("is empty; give a path")
    if plain is Path and looks_like_url(word):
        # A Path would make it a local folder of the name of the protocol.
        raise ValueError("is a URL; give a local path")
    try:
        value = plain(word)
    except ValueError:
        raise ValueError(" or ".join([f"not {WANTED[plain]}", *words])) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def join_choices(words: Sequence[str], last: str = "or") -> str:
    """List words: `a, b or c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def shown_words(words: Sequence[str]) -> str:
    """Join words for a message, quoted where they are empty or contain white space."""
    return " ".join(repr(w) if not w or re.search(r"\s", w) else w for w in words)
