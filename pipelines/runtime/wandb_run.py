"""Start a wandb run through Accelerate: online with a key, else offline in a folder."""

import netrc
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

INIT_TIMEOUT = 10
"""Seconds for the server of wandb to start a run; otherwise the run is kept offline."""


def start_wandb(
    accelerator: Accelerator, project: str, config: dict[str, Any], **about: Any
) -> None:
    """Start a wandb run, or continue that of its id, as the only tracker.

    A run that cannot be online is kept offline; the main process prints how to upload it.

    Args:
        accelerator: created with `log_with=["wandb"]`.
        project: name of the project.
        config: settings, flat.
        about: arguments of wandb.init: name, id, dir, ...
    """

    def init(mode: str) -> None:
        settings: dict[str, Any] = {"quiet": True, "init_timeout": INIT_TIMEOUT}
        arguments = {**about, "resume": "allow", "mode": mode, "settings": settings}
        accelerator.init_trackers(project, config=config, init_kwargs={"wandb": arguments})

    mode, reason = os.environ.get("WANDB_MODE"), ""
    if mode == "online" and not has_wandb_key():
        mode, reason = "offline", "wandb has no key (WANDB_API_KEY or wandb login)"
    mode = mode or ("online" if has_wandb_key() else "offline")
    try:
        init(mode)
    except Exception as error:  # whatever the server or its answers provoke
        if mode != "online":
            raise
        reason = f"wandb cannot start online ({' '.join(str(error).split())[:200]})"
        # Both hold the run that could not start. Accelerate has imported wandb.
        accelerator.trackers.clear()
        sys.modules["wandb"].teardown()
        init("offline")
    if reason and accelerator.is_main_process:
        folder = Path(find_wandb_run(accelerator).dir).parent
        print(
            f"tracking: {reason}; the run is kept offline, to upload it: "
            f"wandb sync {shlex.quote(str(folder))}",
            file=sys.stderr,
        )


def find_wandb_run(accelerator: Accelerator) -> Any:
    """Return the wandb run that `start_wandb` started, on the main process."""
    return accelerator.get_tracker("wandb", unwrap=True)


def has_wandb_key() -> bool:
    """Whether wandb can log in without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in known)
