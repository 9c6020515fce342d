"""Configuration files (YAML) as flags, strictly."""

import difflib
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from pipelines.runtime.errors import UsageError
from pipelines.runtime.strict_yaml import load_yaml, read_text

T = TypeVar("T")

Flat = Annotated[tyro.conf.OmitArgPrefixes[T], tyro.conf.arg(prefix_name=False)]
"""A group of settings: a dataclass whose fields are flags and YAML keys under their own names.

`pairing: Flat[PairingOptions]` adds `--images`, not `--pairing.images`; the name of the field and
the first line of the class title its group in `--help`. A group may hold flat groups, no others.
"""


def yaml_flags(config_class: type, file: Path) -> list[str]:
    """Translate a YAML file into flags.

    Raises UsageError for a missing file, invalid YAML or an unknown key.
    """
    try:
        plain = load_yaml(read_text(file))
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {file}: {' '.join(str(error).split())}") from error
    if plain is None:
        return []
    if not isinstance(plain, dict):
        raise UsageError(
            f"--config {file}: expected `key: value` lines, found {type(plain).__name__}"
        )
    return list(mapping_flags(config_class, plain, file, ()))


def mapping_flags(
    config_class: type, plain: dict[Any, Any], file: Path, path: tuple[str, ...]
) -> Iterator[str]:
    """Translate one level of a YAML file into flags."""
    kinds = setting_types(config_class)
    seen: set[str] = set()
    for key, value in plain.items():
        name = str(key).replace("-", "_")
        dotted = ".".join((*path, str(key)))
        if name in seen:
            raise UsageError(f"--config {file}: duplicate key {dotted}; remove one")
        seen.add(name)
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = (
                f"did you mean {'.'.join((*path, close[0]))}?"
                if close
                else f"known keys: {', '.join(kinds)}"
            )
            raise UsageError(f"--config {file}: unknown key {dotted}; {hint}")
        kind = plain_type(kinds[name])
        nested = kind if isinstance(kind, type) and is_dataclass(kind) else None
        if (nested is not None) != isinstance(value, dict):
            expected = "a mapping" if nested is not None else "a value"
            found = "a mapping" if isinstance(value, dict) else str(value)[:100]
            raise UsageError(f"--config {file}: {dotted} must be {expected}, found {found}")
        flag = "--" + ".".join((*path, name)).replace("_", "-")
        if nested is not None:
            yield from mapping_flags(nested, value, file, (*path, name))
        elif isinstance(value, bool):
            yield flag if value else "--" + ".".join((*path, f"no-{name}")).replace("_", "-")
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        elif kinds[name] == tyro.conf.Positional[kind]:
            yield str(value)
        else:
            yield f"{flag}={value}"


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


def refuse_not_finite(config: Any, path: tuple[str, ...] = ()) -> None:
    """Raise ValueError naming the first setting that is NaN or infinite."""
    for field, value in settings_of(config):
        name = (*path, field.name)
        if is_dataclass(value):
            refuse_not_finite(value, name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, float) and not isfinite(one):
                flag = ".".join(name).replace("_", "-")
                raise ValueError(f"--{flag} {one}: must be a finite number")
