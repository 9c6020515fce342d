"""Command lines -> frozen dataclasses; errors -> one line and an exit code."""

import inspect
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from pipelines.runtime import failures
from pipelines.runtime.errors import REFUSED, STOPPED, USAGE, RunError, UsageError
from pipelines.runtime.processes import follow_launcher
from pipelines.runtime.yaml_flags import refuse_not_finite, yaml_flags
from shards.requests import set_remote_timeout
from shards.sample import DataError

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may not be valid text.
            stream.reconfigure(errors="backslashreplace")
    try:
        config = parse(config_class, argv, verb)
        apply_remote_timeout(config)
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
        code = report_error(verb, original_message(error), REFUSED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = report_error(verb, f"{where}{error.strerror or original_message(error)}", REFUSED)
    except RuntimeError as error:
        line = failures.describe(error)
        if line is None:
            raise
        code = report_error(verb, line, REFUSED)
    except KeyboardInterrupt:
        code = report_error(verb, "stopped; rerun the same command to resume", STOPPED)
    failures.leave_process_group(code)
    return code


def apply_remote_timeout(config: object) -> None:
    """Set the `--remote-timeout` of a verb that has it. Raises UsageError if it is out of range."""
    for entry in fields(config) if is_dataclass(config) else ():
        value = getattr(config, entry.name)
        if entry.name == "remote_timeout":
            try:
                set_remote_timeout(value)
            except ValueError as error:
                raise UsageError(str(error)) from error
        else:
            apply_remote_timeout(value)


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
    print(f"unet {verb}{rank_name()}: {error}", file=sys.stderr, flush=True)
    return code


def wait_for_rank_0() -> None:
    """On other ranks, sleep: if rank 0 fails too, the launcher ends them before they print.

    If this returns, rank 0 did not fail, or reported its error on another host.
    """
    if launched_rank():
        time.sleep(RANK_0_TIMEOUT)


def parse(config_class: type[T], argv: Sequence[str], verb: str) -> T:
    """Parse the arguments; exits with 2 and a message if they are wrong."""
    files, flags = take_config_files([*map(expand_home, argv)])
    from_files = [expand_home(f) for file in files for f in yaml_flags(config_class, file)]
    description = inspect.cleandoc(config_class.__doc__ or "")
    description += (
        "\n\n--config FILE.yaml (repeatable, later wins) sets any of these; flags override files."
    )
    held = io.StringIO() if launched_rank() else None
    try:
        with redirect_stderr(held or sys.stderr), redirect_stdout(held or sys.stdout):
            config = tyro.cli(
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
    try:
        refuse_not_finite(config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config


def expand_home(argument: str) -> str:
    """Expand `~/` at the start of a value, which a shell expands neither after `=` nor in YAML."""
    start = argument.find("=") + 1 if argument.startswith("--") else 0
    value = argument[start:]
    return argument[:start] + os.path.expanduser(value) if value.startswith("~/") else argument


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
