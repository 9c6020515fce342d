"""Runs a verb on several CPU ranks: `python fork_ranks.py RANKS PORT VERB FLAGS`.

Ranks are forked after one import of torch and the verb, where `accelerate launch` imports them once
per rank and once more for itself. As there, the first failure ends the other ranks.
"""

import os
import signal
import sys
from importlib import import_module

KILL_SECONDS = 30
"""Seconds between SIGTERM and SIGKILL, as in torch.distributed.elastic."""


def main() -> int:
    """Fork the ranks and wait for them; returns 0 if all of them did, else 1."""
    ranks, port, verb, *flags = sys.argv[1:]
    os.environ.update(
        WORLD_SIZE=ranks,
        LOCAL_WORLD_SIZE=ranks,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        ACCELERATE_MIXED_PRECISION="no",
        ACCELERATE_DYNAMO_BACKEND="no",
        ACCELERATE_USE_CPU="true",
    )
    verb_main = import_module(f"pipelines.{verb}").main
    running: set[int] = set()
    for rank in range(int(ranks)):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.exit(verb_main(flags))
        running.add(pid)

    def end_all(number: int) -> None:
        for pid in running:
            os.kill(pid, number)

    signal.signal(signal.SIGALRM, lambda *_: end_all(signal.SIGKILL))
    failed = False
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not failed:
            failed = True
            end_all(signal.SIGTERM)
            signal.alarm(KILL_SECONDS)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
