"""Run `unet VERB` and profile it: where threads spend time, and where they wait for the GPU.

    python tests/benchmarks/gpu_observe.py FILE VERB [FLAGS OF THE VERB]

VERB `pointwise` is `predict` with a 1 x 1 convolution as network (predicting.py).

SIGUSR2 starts profiling; the next SIGUSR2 or the end of the process stops it. FILE (JSON) has:

    seconds   duration
    main      the 15 most frequent places of the main thread, with their share of the time
    threads   those of all other threads that were not idle, in shares of one thread
    syncs     calls that waited for the GPU, by their line of Python

Threads are sampled every 5 ms. Unlike a tracing profiler, this costs the process almost nothing,
and waiting counts like computing.
"""

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os.path import basename
from pathlib import Path
from types import FrameType
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[2]
OURS = tuple(f"{REPO / package}{os.sep}" for package in ("pipelines", "unet", "shards"))
"""What the paths of our modules start with."""
EVERY = 0.005
PLACES = 15
IDLE = {
    ("thread.py", "_worker"),
    ("threading.py", "wait"),
    ("threading.py", "_wait_for_tstate_lock"),
}
"""Innermost frames of idle threads."""


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count calls that make the host wait for the GPU, by their line of Python."""
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
    """Describe a frame as `train.py:281 run > adam.py adam` (our line > leaf); None if idle."""
    # Of strings: this runs 200 times a second for every thread, and holds the interpreter lock.
    leaf = basename(frame.f_code.co_filename), frame.f_code.co_name
    if leaf in IDLE:
        return None
    current: FrameType | None = frame
    while current is not None:
        path = current.f_code.co_filename
        if path.startswith(OURS):
            here = f"{basename(path)}:{current.f_lineno} {current.f_code.co_name}"
            return here if current is frame else f"{here} > {leaf[0]} {leaf[1]}"
        current = current.f_back
    return f"{leaf[0]} {leaf[1]}"


class Observer:
    """Sampling profiler of the threads of this process, between two signals."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counting: Any = None
        self.stopped = threading.Event()

    def toggle(self, *_: object) -> None:
        """Start or stop; the signal handler."""
        if self.counting is None:
            self.start()
        else:
            self.stop()

    def start(self) -> None:
        """Start profiling."""
        self.main: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.rounds, self.started = 0, time.perf_counter()
        self.stopped.clear()
        self.counting = counted_syncs()
        self.syncs = self.counting.__enter__()
        self.sampler = threading.Thread(target=self.sample, daemon=True)
        self.sampler.start()

    def sample(self) -> None:
        """Sample all threads until stopped."""
        own, main = threading.get_ident(), threading.main_thread().ident
        while not self.stopped.wait(EVERY):
            self.rounds += 1
            for thread, frame in sys._current_frames().items():
                if thread != own and (place := place_of(frame)) is not None:
                    (self.main if thread == main else self.others)[place] += 1

    def stop(self) -> None:
        """Stop profiling and write the result; no effect if not started."""
        if self.counting is None:
            return
        seconds = time.perf_counter() - self.started
        self.stopped.set()
        self.sampler.join()
        self.counting.__exit__(None, None, None)
        self.counting = None
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
        observer.stop()
        # Python restores the default action as it ends: a late signal would kill the process.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
