"""Run `unet VERB` and look at it: where its threads are, and where it waits for the GPU.

    python tests/benchmarks/gpu_observe.py FILE VERB [FLAGS OF THE VERB]

VERB `pointwise` is `predict` with a 1 x 1 convolution for a network (predicting.py).

SIGUSR2 begins looking, the next SIGUSR2 or the end of the process ends it, and FILE (JSON) holds

    seconds   for which it was looked at
    main      where the main thread was: 15 places, and their share of the time
    threads   the same of all other threads that were not idle, in shares of one thread
    syncs     calls that waited for the GPU, by the line of Python that made them

Threads are sampled every 5 ms: unlike a tracing profiler that costs the process next to nothing,
and time in which a thread waits counts like time in which it computes.
"""

import json
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch

PACKAGES = ("pipelines", "unet", "shards")
EVERY = 0.005
PLACES = 15
IDLE = {
    ("thread.py", "_worker"),
    ("threading.py", "wait"),
    ("threading.py", "_wait_for_tstate_lock"),
}
"""Innermost frames of threads that have nothing to do."""


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count calls that make the host wait for the GPU, by the line of Python that made them."""
    found: Counter[str] = Counter()
    plain = warnings.showwarning

    def note(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[f"{Path(filename).name}:{lineno}"] += 1
        else:
            plain(message, category, filename, lineno, *more)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def place_of(frame: FrameType) -> str | None:
    """`train.py:281 run > adam.py adam`: the innermost line of ours, and what runs; None: idle."""
    leaf = Path(frame.f_code.co_filename).name, frame.f_code.co_name
    if leaf in IDLE:
        return None
    current: FrameType | None = frame
    while current is not None:
        path = Path(current.f_code.co_filename)
        if path.parent.name in PACKAGES:
            here = f"{path.name}:{current.f_lineno} {current.f_code.co_name}"
            return here if current is frame else f"{here} > {leaf[0]} {leaf[1]}"
        current = current.f_back
    return f"{leaf[0]} {leaf[1]}"


class Observer:
    """Samples the threads of this process between two signals."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.watching: Any = None
        self.ended = threading.Event()

    def toggle(self, *_: object) -> None:
        """Begin, or end; the handler of the signal."""
        if self.watching is None:
            self.begin()
        else:
            self.end()

    def begin(self) -> None:
        """Look at this process from now on."""
        self.main: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.rounds, self.begun = 0, time.perf_counter()
        self.ended.clear()
        self.watching = counted_syncs()
        self.syncs = self.watching.__enter__()
        self.sampler = threading.Thread(target=self.sample, daemon=True)
        self.sampler.start()

    def sample(self) -> None:
        """Until it is ended."""
        own, main = threading.get_ident(), threading.main_thread().ident
        while not self.ended.wait(EVERY):
            self.rounds += 1
            for thread, frame in sys._current_frames().items():
                if thread != own and (place := place_of(frame)) is not None:
                    (self.main if thread == main else self.others)[place] += 1

    def end(self) -> None:
        """Write what was seen, once."""
        if self.watching is None:
            return
        seconds = time.perf_counter() - self.begun
        self.ended.set()
        self.sampler.join()
        self.watching.__exit__(None, None, None)
        self.watching = None
        shares = {
            name: [
                [place, count / max(1, self.rounds)] for place, count in seen.most_common(PLACES)
            ]
            for name, seen in (("main", self.main), ("threads", self.others))
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"seconds": seconds, **shares, "syncs": dict(self.syncs)}))
        part.replace(self.file)


def main() -> int:
    file, verb, *flags = sys.argv[1:]
    observer = Observer(Path(file))
    signal.signal(signal.SIGUSR2, observer.toggle)
    try:
        if verb == "pointwise":
            return import_module("predicting").run_pointwise(flags)
        return import_module(f"pipelines.{verb}").main(flags)
    finally:
        observer.end()


if __name__ == "__main__":
    sys.exit(main())
