"""`pipelines.runtime.terminal`: what a command prints is escaped, progress bars still move."""

import io
import logging
import sys
from dataclasses import dataclass

import pytest
from tqdm import tqdm

from pipelines.runtime.command import run_command
from pipelines.runtime.terminal import SafeStream, print_lines, safe_streams
from shards.sample import AggregateDataError, DataError

EVIL = "\x1b[31mred\r\u202e.png"
SHOWN = "\\x1b[31mred\\r\\u202e.png"


@dataclass(frozen=True)
class NoFlags:
    """Do nothing."""


def run(function, capsys):
    code = run_command(NoFlags, lambda _: function(), [], "verb")
    out, err = capsys.readouterr()
    return code, out, err


def test_prints_warnings_and_progress_are_escaped(capsys):
    def verb():
        print(f"class {EVIL}")
        logging.getLogger("ours").warning("%s failed", EVIL)
        tqdm.write(f"skipped: {EVIL}", file=sys.stderr)
        return 0

    code, out, err = run(verb, capsys)
    assert (code, out) == (0, f"class {SHOWN}\n")
    assert err.endswith(f"skipped: {SHOWN}\n")
    assert "\x1b" not in err


def test_a_line_feed_in_a_note_makes_no_other_line(capsys):
    def verb():
        print_lines(["a", f"{EVIL}\nunet verb: all is well"])
        return 0

    code, out, _ = run(verb, capsys)
    assert (code, out) == (0, f"a\n{SHOWN}\\nunet verb: all is well\n")


@pytest.mark.parametrize("error", [DataError, OSError])
def test_an_error_is_one_line(capsys, error):
    def verb():
        raise error(f"{EVIL}\nunet verb: all is well")

    code, _, err = run(verb, capsys)
    assert (code, err) == (1, f"unet verb: {SHOWN}\\nunet verb: all is well\n")


def test_each_of_several_problems_is_one_line(capsys):
    def verb():
        raise AggregateDataError([f"{EVIL}\nfake", "b.png is damaged"], "repair them")

    _, _, err = run(verb, capsys)
    assert err == f"unet verb: 2 problems (repair them):\n  {SHOWN}\\nfake\n  b.png is damaged\n"


def test_the_streams_are_restored(capsys):
    before = sys.stdout
    with safe_streams(), safe_streams():
        assert isinstance(sys.stdout, SafeStream)
    assert sys.stdout is before


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bars_move_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", SafeStream(screen, 2000))
    for _ in tqdm(range(2), desc=EVIL, mininterval=0, position=1):
        pass
    assert screen.getvalue().startswith("\n\r\\x1b[31mred\\r")
    assert "\x1b[A\r" in screen.getvalue()
