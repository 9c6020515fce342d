"""The list of files that a pack left out."""

from collections.abc import Sequence

from shards.store import Store
from shards.text import escape_line

PROBLEMS = "problems.txt"
"""File that lists all problems; a message shows only the first 20."""


def save_problems(problems: Sequence[str], store: Store, name: str = PROBLEMS) -> str:
    """Write all problems to a file, one per line; returns its path."""
    lines = (escape_line(problem, None) for problem in problems)
    text = "".join(f"{line}\n" for line in lines)
    store.write(name, text.encode("utf-8", "backslashreplace"))
    return store.path(name)
