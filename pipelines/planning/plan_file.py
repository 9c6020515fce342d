"""The files of a plan: YAML for `unet train --config`, and JSON with its timings."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pipelines.planning.settings import Setting
from pipelines.planning.trial import TRIAL_VERSION, Trial
from shards.documents import decode
from shards.sample import DataError
from shards.text import escape_line

REASON_COLUMN = 27
"""Column of the reasons in the YAML file, unless a value is longer."""


def format_plan(header: Sequence[str], settings: Sequence[Setting], trial: Trial) -> bytes:
    """Format the YAML file: a header, a setting and its reason on every line, the timings."""
    lines = [f"# {line}" for line in header]
    group = ""
    for setting in settings:
        prefix, _, name = setting.key.rpartition(".")
        if prefix and prefix != group:
            lines.append(f"{prefix}:")
        group = prefix
        text = f"{'  ' if prefix else ''}{name}: {format_value(setting.value)}"
        lines.append(f"{text:<{REASON_COLUMN}} # {setting.reason}")
    lines.append(f"# Timings on {trial.device}, {trial.precision}:")
    lines += [
        f"# base_channels {timing.base_channels}: {timing.seconds:.3g} s a step, "
        f"{timing.memory / 2**30:.2f} GiB"
        for timing in trial.timings
    ]
    return "".join(f"{escape_line(line, None)}\n" for line in lines).encode()


def format_value(value: Any) -> str:
    """Format a scalar for YAML."""
    return yaml.safe_dump(value, width=10**6, allow_unicode=True).partition("\n")[0]


def format_trial(trial: Trial) -> bytes:
    """Format the JSON file."""
    return (json.dumps(asdict(trial), indent=1) + "\n").encode()


def read_trial(file: Path) -> Trial:
    """Read the JSON file of a plan. Raises DataError if it is missing, damaged or another."""
    remedy = "make a plan without --timings"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"--timings {file}: {error.strerror}; {remedy}") from error
    trial = decode(data, Trial, f"--timings {file}", remedy)
    if trial.version != TRIAL_VERSION or not trial.timings:
        raise DataError(f"--timings {file} is not of this version of unet plan; {remedy}")
    return trial
