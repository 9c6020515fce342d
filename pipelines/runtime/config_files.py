"""YAML configuration files -> values of flags, strictly."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.runtime.errors import UsageError
from pipelines.runtime.flag_values import is_optional, is_switch
from pipelines.runtime.flags import Flag
from pipelines.runtime.strict_yaml import load_yaml, read_text
from shards.sample import DataError


def read_config_file(flags: Sequence[Flag], file: Path) -> dict[str, Any]:
    """Read a YAML file as {key: value}.

    Raises UsageError, with the file, for one that cannot be read, an unknown key or a wrong value.
    """
    try:
        plain = load_yaml(read_text(file))
        if plain is None:
            return {}
        if not isinstance(plain, dict):
            raise UsageError(f"expected `key: value` lines, found {type(plain).__name__}")
        by_key = {flag.key: flag for flag in flags}
        return {key: convert(by_key[key], v) for key, v in find_settings(by_key, plain, "")}
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except DataError as error:
        raise UsageError(f"--config {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {file}: {describe_yaml_error(error)}") from error
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """Describe invalid YAML in one line: where, what."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = ", ".join(filter(None, [error.context, error.problem]))
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return str(error).partition("\n")[0]


def find_settings(
    by_key: Mapping[str, Flag], plain: Mapping[Any, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of one level of a file. Raises UsageError for an unknown key."""
    seen: set[str] = set()
    for written, value in plain.items():
        name = str(written).replace("-", "_")
        key, shown = prefix + name, f"{prefix}{written}"
        if name in seen:
            raise UsageError(f"duplicate key {shown}; remove one")
        seen.add(name)
        if key in by_key and "." not in name:
            if isinstance(value, dict):
                raise UsageError(f"{shown} must be a value, found a mapping")
            yield key, value
        elif "." not in name and any(known.startswith(f"{key}.") for known in by_key):
            if not isinstance(value, dict):
                raise UsageError(f"{shown} must be a mapping, found {str(value)[:100]}")
            yield from find_settings(by_key, value, f"{key}.")
        else:
            raise UsageError(f"unknown key {shown}; {suggest_key(by_key, key)}")


def suggest_key(by_key: Mapping[str, Flag], key: str) -> str:
    """Return the remedy for an unknown key: the nearest known one, or where they are listed."""
    sections = {known.partition(".")[0] for known in by_key}
    near = [known for known in by_key if known.rpartition(".")[2] == key.rpartition(".")[2]]
    near += difflib.get_close_matches(key, [*by_key, *sections], n=1)
    return f"did you mean {near[0]}?" if near else "--help lists all flags, which are the keys"


def convert(flag: Flag, value: Any) -> Any:
    """Convert a value that YAML has read to the type of its flag. Raises UsageError."""
    if isinstance(value, bool) and is_switch(flag.kind):
        return value
    if value is None and not is_optional(flag.kind):
        raise UsageError(f"{flag.key}: needs a value")
    words = [to_word(item) for item in (value if isinstance(value, list) else [value])]
    if is_switch(flag.kind) and words != ["None"]:
        raise UsageError(f"{flag.name} {' '.join(words)}: not true or false")
    return flag.parse(words)


def to_word(value: Any) -> str:
    """Return the word that a user would give on the command line for a value in YAML."""
    return str(value).lower() if isinstance(value, bool) else expand_home(str(value))


def expand_home(argument: str) -> str:
    """Expand `~/` at the start of a value, which a shell expands neither after `=` nor in YAML."""
    start = argument.find("=") + 1 if argument.startswith("--") else 0
    value = argument[start:]
    return argument[:start] + os.path.expanduser(value) if value.startswith("~/") else argument
