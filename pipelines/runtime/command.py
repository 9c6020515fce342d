"""Command lines -> frozen dataclasses; errors -> one line and an exit code."""

import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines.runtime import failures
from pipelines.runtime.config_files import expand_home, read_config_file
from pipelines.runtime.errors import REFUSED, STOPPED, USAGE, RunError, UsageError
from pipelines.runtime.flag_values import join_choices
from pipelines.runtime.flags import Flag, build, list_flags, read_arguments
from pipelines.runtime.help_text import format_help, format_usage
from pipelines.runtime.processes import follow_launcher
from pipelines.runtime.terminal import safe_streams
from shards.images.memory import set_max_memory
from shards.requests import set_remote_timeout
from shards.sample import AggregateDataError, DataError
from shards.text import escape_line

RANK_0_TIMEOUT = 20.0
"""Seconds that the other ranks give rank 0 to report an error that all share and end the job."""
T = TypeVar("T")


def launched_rank() -> int:
    """Rank that the launcher assigned to this process, else 0. Only decides who prints."""
    return int(os.environ.get("RANK", "0"))


def rank_name() -> str:
    """Return ` (rank 1)` for messages of other ranks than 0, else an empty string."""
    return f" (rank {launched_rank()})" if launched_rank() else ""


def run_command(
    config_class: type[T], run: Callable[[T], int], argv: Sequence[str] | None, verb: str
) -> int:
    """Parse the flags, run the verb and return the exit code.

    Bad input and failed runs end in one line on stderr.
    """
    require_utf8()
    follow_launcher(f"unet {verb}{rank_name()}")
    argv = sys.argv[1:] if argv is None else argv
    with safe_streams():
        return run_escaped(config_class, run, argv, verb)


def run_escaped(
    config_class: type[T], run: Callable[[T], int], argv: Sequence[str], verb: str
) -> int:
    """Run a verb as `run_command`, whose streams escape what they print."""
    try:
        config = parse(config_class, argv, verb)
        set_max_memory(None)
        apply_limits(config)
        code = run(config)
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        if is_stdout_closed():
            return end_silently()
        code = report_error(verb, error.strerror, REFUSED)
    except UsageError as error:
        code = report_error(verb, error, USAGE)
    except (DataError, RunError) as error:
        code = report_error(verb, error, REFUSED)
    except MemoryError as error:
        code = report_error(verb, failures.describe_host_memory(error, verb), REFUSED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}{error.strerror or original_message(error)}"
        if failures.is_out_of_host_memory(error):
            line = failures.describe_host_memory(error, verb)
        code = report_error(verb, line, REFUSED)
    except RuntimeError as error:
        line = failures.describe(error)
        if failures.is_out_of_host_memory(error):
            line = failures.describe_host_memory(error, verb)
        if line is None:
            raise
        code = report_error(verb, line, REFUSED)
    except KeyboardInterrupt:
        code = report_error(verb, "stopped; rerun the same command to resume", STOPPED)
    failures.leave_process_group(code)
    return code


LIMITS: dict[str, Callable[[Any], None]] = {
    "remote_timeout": set_remote_timeout,
    "max_memory": set_max_memory,
}
"""Setters of flags that hold for a process and its workers, whatever the verb."""


def apply_limits(config: object) -> None:
    """Set the LIMITS that a verb has. Raises UsageError if one is out of range."""
    for entry in fields(config) if is_dataclass(config) else ():
        value = getattr(config, entry.name)
        if entry.name in LIMITS:
            try:
                LIMITS[entry.name](value)
            except ValueError as error:
                raise UsageError(str(error)) from error
        else:
            apply_limits(value)


def require_utf8() -> None:
    """Restart Python in UTF-8 mode if the locale's encoding is another.

    File names, lists, manifests and messages are UTF-8 whatever the locale.
    """
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8" and not sys.flags.utf8_mode:
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONUTF8": "1"})  # noqa: S606


def is_stdout_closed() -> bool:
    """Return whether the reader of stdout has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def end_silently() -> int:
    """Return the exit code of a command whose reader has closed the pipe, as `| head` does."""
    # Python flushes stdout at exit, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


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
    several = isinstance(error, AggregateDataError) or (
        isinstance(error, DataError) and isinstance(error.__cause__, AggregateDataError)
    )
    text = original_message(error) if isinstance(error, Exception) else str(error)
    text = text if several else escape_line(text)
    print(f"unet {verb}{rank_name()}: {text}", file=sys.stderr, flush=True)
    return code


def wait_for_rank_0() -> None:
    """On other ranks, sleep: if rank 0 fails too, the launcher ends them before they print.

    If this returns, rank 0 did not fail, or reported its error on another host.
    """
    if launched_rank():
        time.sleep(RANK_0_TIMEOUT)


def parse(config_class: type[T], argv: Sequence[str], verb: str) -> T:
    """Parse the arguments and configuration files of a verb; `--help` prints help and exits with 0.

    Raises UsageError for everything that is wrong with them.
    """
    files, arguments = take_config_files([*map(expand_home, argv)])
    flags = [*list_flags(config_class)]
    if {"-h", "--help"} & {*arguments}:
        if not launched_rank():
            print(format_help(config_class, flags, verb))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    sources: dict[str, Path] = {}
    for file in files:
        found = read_config_file(flags, file)
        values |= found
        sources |= dict.fromkeys(found, file)
    found = read_arguments(flags, arguments)
    values |= found
    if missing := [flag.name for flag in flags if flag.required and flag.key not in values]:
        raise UsageError(
            f"{join_choices(missing, 'and')} {'is' if len(missing) == 1 else 'are'} missing; "
            f"usage: {format_usage(config_class, flags, verb)}"
        )
    try:
        return build(config_class, values)
    except ValueError as error:
        by_file = {
            flag.name: sources[flag.key] for flag in flags if flag.key in {*sources} - {*found}
        }
        raise UsageError(name_file(name_flags(str(error), flags), by_file)) from error


def name_flags(message: str, flags: Sequence[Flag]) -> str:
    """Replace the names of settings in a message, such as `optim.lr`, by their flags.

    Classes that are also used from Python name fields. One without a dot only begins a message.
    """
    by_key = {flag.key: flag.name for flag in flags}
    by_field = {flag.key.rpartition(".")[2]: flag.name for flag in flags} | by_key
    message = re.sub(r"^[a-z_]+(?= must )", lambda m: by_field.get(m[0], m[0]), message)
    return re.sub(r"(?<![\w.-])[a-z_]+\.[a-z_]+", lambda m: by_key.get(m[0], m[0]), message)


def name_file(message: str, sources: Mapping[str, Path]) -> str:
    """Prefix a message with the configuration file that set the flag that it begins with."""
    flag = re.match(r"--[\w.-]+", message)
    file = sources.get(flag[0]) if flag else None
    return message if file is None else f"--config {file}: {message}"


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
