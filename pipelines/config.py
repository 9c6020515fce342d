"""Command lines and YAML -> frozen dataclasses, strictly; errors -> one line and an exit code.

defaults <- `--config file.yaml` (repeatable, later wins) <- flags. A YAML file is turned into the
flags that say the same, so that both go through one parser, one set of types, one set of messages.
"""

import difflib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml

from pipelines import failures
from shards.sample import DataError

REFUSED = 1
"""Exit code: refused data or a failed run."""
USAGE = 2
"""Exit code: wrong command or configuration."""
INCOMPLETE = 3
"""Exit code: the job finished, some inputs were left out."""
INTERRUPTED = 75
"""Exit code: interrupted, can go on (EX_TEMPFAIL)."""

PATIENCE = 20.0
"""Seconds that other ranks leave rank 0 to say what all have to say, and to end the job by it."""

T = TypeVar("T")


class UsageError(Exception):
    """A wrong command or configuration. Its text is one line: what, where, what to do."""


class RunError(Exception):
    """A run that failed. Its text is one line: what, where, what to do."""


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 without one. For who speaks, and no more."""
    return int(os.environ.get("RANK", "0"))


def run_command(
    config_class: type[T], run: Callable[[T], int], argv: Sequence[str] | None, verb: str
) -> int:
    """Parse, run, and return the exit code; bad input ends in one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files may be no text.
            stream.reconfigure(errors="backslashreplace")
    try:
        return run(parse(config_class, argv, verb))
    except UsageError as error:
        code = complain(verb, error, USAGE)
    except (DataError, RunError) as error:
        code = complain(verb, own_words(error), REFUSED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = complain(verb, f"{where}{error.strerror or error}", REFUSED)
    except RuntimeError as error:
        line = failures.describe(error)
        if line is None:
            raise
        code = complain(verb, line, REFUSED)
    except KeyboardInterrupt:
        code = complain(verb, "stopped; the same command goes on", 130)
    failures.leave_process_group(code)
    return code


def own_words(error: Exception) -> str:
    """The error's own line, without the traceback that a DataLoader wraps its worker's into."""
    text = str(error)
    name = f"{type(error).__name__}: "
    return text.rpartition(name)[2].strip() if text.startswith("Caught ") and name in text else text


def complain(verb: str, error: object, code: int) -> int:
    """Say it, on one rank where all have the same to say."""
    accelerate = sys.modules.get("accelerate.state")
    alone = code != USAGE and accelerate is not None and accelerate.is_initialized()
    if not alone and code in (USAGE, REFUSED):
        let_rank_0_speak()
    rank = f" (rank {launched_rank()})" if launched_rank() else ""
    print(f"unet {verb}{rank}: {error}", file=sys.stderr, flush=True)
    return code


def let_rank_0_speak() -> None:
    """On other ranks, wait: a launcher ends them when rank 0 has failed, and rank 0 if they do.

    Where this returns, rank 0 has not failed, or has said it on another host.
    """
    if launched_rank():
        time.sleep(PATIENCE)


def parse(config_class: type[T], argv: Sequence[str], verb: str) -> T:
    """The configuration that the arguments describe; exits with 2 and a message if they do not."""
    files, flags = take_config_files(argv)
    from_files = [flag for file in files for flag in yaml_flags(config_class, file)]
    description = (config_class.__doc__ or "").strip()
    description += (
        "\n\n--config FILE.yaml (repeatable, later wins) holds any of these; flags win over files."
    )
    later = io.StringIO() if launched_rank() else None
    try:
        with redirect_stderr(later or sys.stderr), redirect_stdout(later or sys.stdout):
            return tyro.cli(
                config_class,
                args=[*from_files, *flags],
                prog=f"unet {verb}",
                description=description,
            )
    except SystemExit as end:
        # Asked for help, all ranks end well.
        if later is not None and end.code:
            let_rank_0_speak()
            print(later.getvalue(), file=sys.stderr, end="", flush=True)
        raise


def take_config_files(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Part `--config FILE` and `--config=FILE` from the other arguments."""
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
    """A YAML file as flags. Raises UsageError for a missing file, bad YAML or an unknown key."""
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
    """YAML without its surprises: a key twice is an error, and `no` and `on` are words."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises yaml.YAMLError for a key that stands there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: {key.value} stands there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    letter: [(tag, found) for tag, found in resolvers if letter in "tTfF" or "bool" not in tag]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError."""
    return yaml.load(text, StrictLoader)  # noqa: S506 (it is a SafeLoader)


def refuse_url(flag: str, path: Path | str) -> None:
    """Raise ValueError for a URL where a folder is wanted."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{flag} {path} is a URL; give a folder")


def mapping_flags(
    config_class: type, plain: dict[Any, Any], file: Path, path: tuple[str, ...]
) -> Iterator[str]:
    """The flags of one level of a YAML file."""
    types = get_type_hints(config_class)
    marked = get_type_hints(config_class, include_extras=True)
    names = [field.name for field in fields(config_class)]
    for key, value in plain.items():
        name = str(key).replace("-", "_")
        dotted = ".".join((*path, str(key)))
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = (
                f"did you mean {'.'.join((*path, close[0]))}?"
                if close
                else f"there are: {', '.join(names)}"
            )
            raise UsageError(f"--config {file}: unknown key {dotted}; {hint}")
        nested = types[name] if is_dataclass(types[name]) else None
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
        elif marked[name] == tyro.conf.Positional[types[name]]:
            yield str(value)
        else:
            yield f"{flag}={value}"


def to_plain(value: Any) -> Any:
    """A configuration as YAML and JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
