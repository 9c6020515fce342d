"""Command lines and YAML files -> frozen dataclasses; errors -> one line and an exit code.

defaults <- `--config file.yaml` (repeatable, later wins) <- flags. A YAML file is translated into
flags, so that both share one parser, one set of types and one set of messages.
"""

import difflib
import inspect
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from pipelines import failures
from shards.sample import DataError

REFUSED = 1
"""Exit code: refused data or a failed run."""
USAGE = 2
"""Exit code: wrong command or configuration."""
INCOMPLETE = 3
"""Exit code: the job finished but skipped some inputs."""
INTERRUPTED = 75
"""Exit code: interrupted; rerun to resume (EX_TEMPFAIL)."""

RANK_0_TIMEOUT = 20.0
"""Seconds that the other ranks give rank 0 to report an error that all share and end the job."""

T = TypeVar("T")

Flat = Annotated[tyro.conf.OmitArgPrefixes[T], tyro.conf.arg(prefix_name=False)]
"""A group of settings: a dataclass whose fields are flags and YAML keys under their own names.

`pairing: Flat[PairingOptions]` adds `--images`, not `--pairing.images`; the name of the field and
the first line of the class title its group in `--help`. A group may hold flat groups, no others.
"""


class UsageError(Exception):
    """A wrong command or configuration; the message is one line: what, where, remedy."""


class RunError(Exception):
    """A failed run; the message is one line: what, where, remedy."""


def launched_rank() -> int:
    """Rank that the launcher assigned to this process, else 0. Only decides who prints."""
    return int(os.environ.get("RANK", "0"))


def run_command(
    config_class: type[T], run: Callable[[T], int], argv: Sequence[str] | None, verb: str
) -> int:
    """Parse the flags, run the verb and return the exit code.

    Bad input and failed runs end in one line on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may not be valid text.
            stream.reconfigure(errors="backslashreplace")
    try:
        return run(parse(config_class, argv, verb))
    except UsageError as error:
        code = report_error(verb, error, USAGE)
    except (DataError, RunError) as error:
        code = report_error(verb, original_message(error), REFUSED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = report_error(verb, f"{where}{error.strerror or error}", REFUSED)
    except RuntimeError as error:
        line = failures.describe(error)
        if line is None:
            raise
        code = report_error(verb, line, REFUSED)
    except KeyboardInterrupt:
        code = report_error(verb, "stopped; rerun the same command to resume", 130)
    failures.leave_process_group(code)
    return code


def original_message(error: Exception) -> str:
    """The error's message, without the traceback that a DataLoader adds to a worker's error."""
    text = str(error)
    name = f"{type(error).__name__}: "
    return text.rpartition(name)[2].strip() if text.startswith("Caught ") and name in text else text


def report_error(verb: str, error: object, code: int) -> int:
    """Print the error and return `code`; an error that all ranks share is printed once."""
    accelerate = sys.modules.get("accelerate.state")
    alone = code != USAGE and accelerate is not None and accelerate.is_initialized()
    if not alone and code in (USAGE, REFUSED):
        wait_for_rank_0()
    rank = f" (rank {launched_rank()})" if launched_rank() else ""
    print(f"unet {verb}{rank}: {error}", file=sys.stderr, flush=True)
    return code


def wait_for_rank_0() -> None:
    """On other ranks, sleep: if rank 0 fails too, the launcher ends them before they print.

    If this returns, rank 0 did not fail, or reported its error on another host.
    """
    if launched_rank():
        time.sleep(RANK_0_TIMEOUT)


def parse(config_class: type[T], argv: Sequence[str], verb: str) -> T:
    """Parse the arguments; exits with 2 and a message if they are wrong."""
    files, flags = take_config_files(argv)
    from_files = [flag for file in files for flag in yaml_flags(config_class, file)]
    description = inspect.cleandoc(config_class.__doc__ or "")
    description += (
        "\n\n--config FILE.yaml (repeatable, later wins) sets any of these; flags override files."
    )
    held = io.StringIO() if launched_rank() else None
    try:
        with redirect_stderr(held or sys.stderr), redirect_stdout(held or sys.stdout):
            return tyro.cli(
                config_class,
                args=[*from_files, *flags],
                prog=f"unet {verb}",
                description=description,
            )
    except SystemExit as end:
        # With --help, all ranks exit 0.
        if held is not None and end.code:
            wait_for_rank_0()
            print(held.getvalue(), file=sys.stderr, end="", flush=True)
        raise


def take_config_files(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate `--config FILE` and `--config=FILE` from the other arguments."""
    files: list[Path] = []
    rest: list[str] = []
    remaining = iter(argv)
    for argument in remaining:
        if argument == "--config":
            file = next(remaining, None)
            if file is None:
                raise UsageError("--config needs a file")
            files.append(Path(file))
        elif argument.startswith("--config="):
            files.append(Path(argument.removeprefix("--config=")))
        else:
            rest.append(argument)
    return files, rest


def yaml_flags(config_class: type, file: Path) -> list[str]:
    """Translate a YAML file into flags.

    Raises UsageError for a missing file, invalid YAML or an unknown key.
    """
    try:
        plain = load_yaml(file.read_text())
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file}: {' '.join(str(error).split())}") from error
    if plain is None:
        return []
    if not isinstance(plain, dict):
        raise UsageError(
            f"--config {file}: expected `key: value` lines, found {type(plain).__name__}"
        )
    return list(mapping_flags(config_class, plain, file, ()))


class StrictLoader(yaml.SafeLoader):
    """YAML where a duplicate key is an error, and `no` and `on` are strings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Raises yaml.YAMLError for a duplicate key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: duplicate key {key.value}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    letter: [(tag, regex) for tag, regex in resolvers if letter in "tTfF" or "bool" not in tag]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """Parse a YAML text strictly. Raises yaml.YAMLError."""
    return yaml.load(text, StrictLoader)  # noqa: S506 (it is a SafeLoader)


def refuse_url(flag: str, path: Path | str) -> None:
    """Raise ValueError if `path` is a URL."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{flag} {path} is a URL; use a local folder")


def describe_read_error(error: OSError, path: object = None) -> str:
    """Describe a failed read in one line; `path` defaults to the file that the error names."""
    return f"{path or error.filename} cannot be read: {error.strerror or error}"


def mapping_flags(
    config_class: type, plain: dict[Any, Any], file: Path, path: tuple[str, ...]
) -> Iterator[str]:
    """Translate one level of a YAML file into flags."""
    kinds = setting_types(config_class)
    for key, value in plain.items():
        name = str(key).replace("-", "_")
        dotted = ".".join((*path, str(key)))
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
            raise UsageError(f"--config {file}: {dotted} must be {expected}, found {value!r}")
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


def refuse_unused(group: Any, reason: str, *names: str) -> None:
    """Raise ValueError if a setting that would have no effect differs from its default.

    Args:
        group: a dataclass of settings.
        reason: rest of the message, after the flag.
        names: fields to check; default: all.
    """
    for field, value in settings_of(group):
        if value != field.default and (not names or field.name in names):
            raise ValueError(f"--{field.name.replace('_', '-')} {reason}")


def to_plain(value: Any) -> Any:
    """Convert a configuration to dicts, lists, strings and numbers, with flat groups expanded."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(item) for field, item in settings_of(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
