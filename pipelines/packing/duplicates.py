"""Byte-identical images that splits would separate, kept together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from shards.folders.splits import SPLITS

DuplicatePolicy = Literal["error", "same-split"]


def unite_duplicates(
    splits: Mapping[str, str], groups: Mapping[str, str | None], duplicates: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Choose one split for identical images, and for the groups that they belong to.

    Images that are connected by a duplicate or a group move to the first of their splits in the
    order train, val, test.

    Args:
        splits: {source: split}.
        groups: {source: group of --group-by, None without}.
        duplicates: sources of identical images.

    Returns:
        {source: new split} of the images that move.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for source, group in groups.items():
        if group is not None:
            members[group].append(source)
    links: dict[str, list[str]] = defaultdict(list)
    for sources in duplicates:
        for source in sources:
            links[source] += sources
    moved: dict[str, str] = {}
    seen: set[str] = set()
    for start in sorted(links):
        connected: list[str] = []
        todo = [start]
        while todo:
            source = todo.pop()
            if source not in seen:
                seen.add(source)
                connected.append(source)
                group = groups.get(source)
                todo += links.get(source, [])
                todo += [] if group is None else members.pop(group, [])
        if connected:
            target = min((splits[source] for source in connected), key=SPLITS.index)
            moved |= {source: target for source in connected if splits[source] != target}
    return moved


def describe_moves(splits: Mapping[str, str], moved: Mapping[str, str]) -> str:
    """Describe how many images change their split, in one line."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for source, target in moved.items():
        counts[splits[source], target] += 1
    listed = ", ".join(f"{n} from {old} to {new}" for (old, new), n in sorted(counts.items()))
    return f"{len(moved)} images change their split to that of an identical image: {listed}"
