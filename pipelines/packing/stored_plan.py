"""The plan on disk: saved before work starts, compared by every rerun and part."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

from pipelines.packing.plan import WORK_DIR, PlannedShard
from pipelines.runtime.errors import changed_settings
from shards.documents import Sha256, decode
from shards.sample import DataError
from shards.store import Store
from shards.writer import open_lock_file

HEADER = f"{WORK_DIR}/plan.json"
LINES = f"{WORK_DIR}/plan.jsonl"
LOCK = f"{WORK_DIR}/lock"
"""Locked by every process that packs into the folder; released when the process ends."""
REMEDY = "remove the folder and rerun"


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """Contents of plan.json."""

    rule: dict[str, Any]
    lines: Sha256


def encode_plan(plan: Sequence[PlannedShard]) -> Iterator[bytes]:
    """Serialise the plan as JSON lines, one per sample."""
    for shard in plan:
        for s in shard.samples:
            line = [shard.name, s.source, s.image, s.mask, s.mask_stat, s.group, *s.spans]
            yield json.dumps([*line, *(s.segments or ())]).encode() + b"\n"


def encode_header(rule: dict[str, Any], plan: Sequence[PlannedShard]) -> bytes:
    """Serialise the settings and the digest of a plan; equal for equal input files."""
    digest = hashlib.sha256()
    for line in encode_plan(plan):
        digest.update(line)
    return json.dumps({"rule": rule, "lines": digest.hexdigest()}, indent=1).encode()


def clear_work(store: Store, keep: Sequence[str] = (HEADER,)) -> None:
    """Remove the files of WORK_DIR, except those to keep."""
    for name in store.names(WORK_DIR):
        if (path := f"{WORK_DIR}/{name}") not in keep:
            store.remove(path)


def fix_plan(
    store: Store, rule: dict[str, Any], plan: Sequence[PlannedShard], held: ExitStack
) -> str:
    """Save the plan, or check that it equals the saved one.

    A saved plan of which no shard exists yet is replaced, except in a local folder where another
    process is using it: every process keeps a shared lock until it ends or closes `held`.

    Args:
        store: the output folder.
        rule: settings that decide the bytes of the shards.
        plan: the plan.
        held: keeps the lock open.

    Returns:
        The sha256 of the plan and its settings.

    Raises:
        DataError: the folder holds another data set, or input or settings have changed.
    """
    header = encode_header(rule, plan)
    if not store.exists(HEADER) and (packed := list_shards(store)):
        raise DataError(
            f"{store} holds shards of another data set ({packed[0]}); choose another --out"
        )
    lock, is_alone = lock_plan(store, held)
    saved = store.read(HEADER) if store.exists(HEADER) else header
    if is_alone and saved != header and not list_shards(store):
        clear_work(store, keep=(LOCK, HEADER))
        # Last, so that a kill in between leaves the plan to be replaced.
        store.remove(HEADER)
    if not store.exists(HEADER):
        store.write_if_absent(LINES, encode_plan(plan))
        # If several parts start at once, the first plan is kept.
        store.write_if_absent(HEADER, [header])
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_SH)
    saved = store.read(HEADER)
    if saved != header:
        remedy = "undo that change, or remove the folder and rerun"
        if not list_shards(store):
            remedy = "another process is using that plan: use the same flags, or stop it first"
        change = describe_change(store, saved, rule, plan)
        raise DataError(f"{store} was created from another plan: {change}; {remedy}")
    return hashlib.sha256(header).hexdigest()


def lock_plan(store: Store, held: ExitStack) -> tuple[TextIO | None, bool]:
    """Lock the plan of a local folder until `held` is closed.

    Returns:
        The lock, exclusive if no other process has it and else shared, None for a remote store;
        and whether this process may replace the plan.
    """
    if store.local is None:
        return None, True
    (store.local / WORK_DIR).mkdir(exist_ok=True)
    lock = held.enter_context(os.fdopen(open_lock_file(store.local / LOCK), "w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Wait until the first process has saved its plan.
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock, False
    return lock, True


def list_shards(store: Store) -> list[str]:
    """List the names of existing shards."""
    return [name for name in store.names() if name.endswith(".tar")]


def describe_change(
    store: Store, saved: bytes, rule: dict[str, Any], plan: Sequence[PlannedShard]
) -> str:
    """Describe the first difference between the saved plan and this one."""
    stored = decode(saved, PlanHeader, store.path(HEADER), REMEDY)
    lines = store.read(LINES)
    if hashlib.sha256(lines).hexdigest() != stored.lines:
        raise DataError(f"{store.path(LINES)} is damaged (it does not match {HEADER}); {REMEDY}")
    was, now = stored.rule, json.loads(json.dumps(rule))
    if was != now:
        return f"other settings ({', '.join(changed_settings(was, now))})"
    old, new = (
        {line[1]: line[2:] for line in map(json.loads, part)}
        for part in (lines.splitlines(), encode_plan(plan))
    )
    if gone := sorted(old.keys() - new.keys()):
        return f"{len(gone)} images were removed, the first: {gone[0]}"
    if added := sorted(new.keys() - old.keys()):
        return f"{len(added)} images were added, the first: {added[0]}"
    if changed := sorted(source for source in old if old[source] != new[source]):
        return f"{len(changed)} images or masks have changed, the first: {changed[0]}"
    return "other splits, shard sizes or seed"
