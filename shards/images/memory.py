"""Memory that decoding an image may take: `--max-memory`, shared by the processes that decode."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shards.sample import DataError

VARIABLE, SHARE_VARIABLE = "UNET_MAX_MEMORY", "UNET_DECODERS"
"""Environment variables, which worker processes inherit: bytes for all processes of this machine
that decode, and the number of these processes."""
FREE_SHARE = 0.4
"""Default of `--max-memory`, of the free memory."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str, flag: str = "--max-memory") -> int:
    """Parse a number of bytes such as `8GiB`, `500M` or `1000000`.

    Raises ValueError, which names the `flag`.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and len(text) < 32 else 0
    if size < 1:
        raise ValueError(f"{flag} must be a size such as 8GiB, got {text!r}")
    return size


def set_max_memory(text: str | None) -> None:
    """Set `--max-memory` for this process and those that it starts; None: 40 % of what is free.

    Raises ValueError if it is not a size.
    """
    size = int(FREE_SHARE * measure_free()) if text is None else parse_memory(text)
    os.environ[VARIABLE] = str(size)
    os.environ[SHARE_VARIABLE] = "1"


def share_memory(processes: int) -> None:
    """Divide the memory among the processes of this rank that decode."""
    os.environ[SHARE_VARIABLE] = str(max(1, processes))


def memory_limit() -> int:
    """Return the bytes that one image may take in this process."""
    if VARIABLE not in os.environ:
        set_max_memory(None)
    # The ranks of a machine measure the same free memory.
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int(os.environ[VARIABLE]) // (int(os.environ.get(SHARE_VARIABLE, "1")) * ranks)


def measure_free() -> int:
    """Return the bytes of memory that are free: for the machine, its cgroups and this process."""
    return max(1, min(iter_free()))


def iter_free() -> Iterator[int]:
    """Yield the bytes that each limit leaves."""
    yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        yield from (1024 * int(kib) for kib in re.findall(r"^MemAvailable: +([0-9]+)", text, re.M))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                yield from iter_cgroup(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes"
                yield from iter_cgroup(Path("/sys/fs/cgroup/memory"), path, *names)
    yield from iter_process_limits()


def iter_process_limits() -> Iterator[int]:
    """Yield what `ulimit -v` leaves to this process."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            yield limit - pages * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        return


def iter_cgroup(root: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    """Yield the bytes that a cgroup and those around it leave; cached files count as free."""
    folder = root / path.lstrip("/")
    # In a container, the path may be that of the host, which is not mounted.
    for group in [folder, *folder.parents] if folder.is_dir() else [root]:
        with suppress(OSError, ValueError):
            allowed = int((group / limit).read_text(encoding="ascii"))
            used = int((group / usage).read_text(encoding="ascii"))
            stat = (group / "memory.stat").read_text(encoding="ascii")
            cached = re.search(r"^(?:total_)?inactive_file ([0-9]+)", stat, re.M)
            yield allowed - used + (int(cached[1]) if cached else 0)
        if group == root:
            return


def refuse_memory(needed: int, size: tuple[int, int], where: str) -> None:
    """Raise DataError if decoding an image of a size (width, height) takes too much memory."""
    if needed > (limit := memory_limit()):
        raise DataError(
            f"{where} is {size[0]} x {size[1]} pixels, which take {needed / 2**20:,.0f} MiB to "
            f"decode, more than the {limit / 2**20:,.0f} MiB of a process; raise --max-memory, "
            "use fewer --workers, or split it into smaller images"
        )
