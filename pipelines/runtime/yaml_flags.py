"""Classes of settings and their groups; YAML, strictly."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

Flat = Annotated[T, "flat"]
"""A group of settings: a dataclass whose fields are flags and YAML keys under their own names.

`pairing: Flat[PairingOptions]` adds `--images`, not `--pairing.images`; the first line of the class
titles its group in `--help`. A group may hold flat groups, no others.
"""
Positional = Annotated[T, "positional"]
"""A setting that is an argument without a flag on the command line, and a key in YAML."""


def setting_types(config_class: type) -> dict[str, Any]:
    """Return {name: annotation} of every setting, with flat groups expanded in place."""
    hints = get_type_hints(config_class, include_extras=True)
    types: dict[str, Any] = {}
    for field in fields(config_class):
        kind = hints[field.name]
        types |= setting_types(plain_type(kind)) if is_flat(kind) else {field.name: kind}
    return types


def settings_of(config: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Yield (field, value) of every setting, with flat groups expanded in place."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_flat(hints[field.name]):
            yield from settings_of(value)
        else:
            yield field, value


def plain_type(annotation: Any) -> Any:
    """Strip `Annotated[...]` from a type."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def is_flat(annotation: Any) -> bool:
    """Whether an annotation is `Flat[...]`."""
    return annotation == Flat[plain_type(annotation)]


def is_positional(annotation: Any) -> bool:
    """Whether an annotation is `Positional[...]`."""
    return annotation == Positional[plain_type(annotation)]


def refuse_unused(group: Any, reason: str, *names: str, prefix: str = "") -> None:
    """Raise ValueError if a setting that would have no effect differs from its default.

    Args:
        group: a dataclass of settings.
        reason: rest of the message, after the flag.
        names: fields to check; default: all.
        prefix: name of the group in its flags, such as `model.`.
    """
    for field, value in settings_of(group):
        if value != field.default and (not names or field.name in names):
            raise ValueError(f"--{prefix}{field.name.replace('_', '-')} {reason}")


def to_plain(value: Any) -> Any:
    """Convert a configuration to dicts, lists, strings and numbers, with flat groups expanded."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(item) for field, item in settings_of(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
