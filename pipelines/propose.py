"""`--mask-format auto`: look at every mask, propose the flags that read them, and stop."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from pipelines.config import REFUSED
from pipelines.parallel import chunks, num_workers, run_all
from pipelines.progress import progress
from pipelines.source import SourceConfig
from shards.images import ImageRule
from shards.sample import DataError
from shards.survey import MaskSurvey, propose_flags, survey_mask

PROPOSED = frozenset(
    {
        *("mask_format", "mask_values", "mask_threshold", "invert", "ignore_value", "colours"),
        *("unknown", "tolerance", "classes"),
    }
)
"""Fields that a proposal fills in."""


def propose_format(config: SourceConfig, verb: str) -> int:
    """Print what the masks hold and the command to go on with; nothing is packed: exit code 1."""
    pairing = config.find_pairs()
    masks = [f"{pairing.masks}/{pair.mask}" for pair in pairing.pairs]
    workers = num_workers(config.workers, len(masks))
    survey = MaskSurvey()
    problems: list[str] = []
    with progress(total=len(masks), desc="look", unit="mask") as bar:
        work = partial(look_at, rule=config.image_rule())
        for piece, (part, found) in run_all(work, chunks(masks, workers), workers):
            survey.merge(part)
            problems += found
            bar.update(len(piece))
    for problem in sorted(problems)[:20]:
        print(problem, file=sys.stderr)
    print(propose_flags(survey).text(command_of(config, verb)))
    return REFUSED


def look_at(paths: Sequence[str], rule: ImageRule) -> tuple[MaskSurvey, list[str]]:
    """What some masks hold, and those that cannot be read."""
    survey = MaskSurvey()
    problems = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                survey.merge(survey_mask(file.read(), path, rule))
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}")
    return survey, problems


def command_of(config: SourceConfig, verb: str) -> str:
    """The command that was given, without the flags that are proposed."""
    words = ["unet", verb]
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in PROPOSED or value == entry.default:
            continue
        flag = "--" + entry.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag)
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
