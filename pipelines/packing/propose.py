"""`--mask-format auto`: survey all masks, propose the flags that read them, and stop."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pipelines.packing.options import SourceOptions
from pipelines.packing.propose_annotations import join_command, propose_between
from pipelines.packing.repair import repair_pairing
from pipelines.runtime.errors import REFUSED, describe_read_error
from pipelines.runtime.processes import chunks, num_workers, run_all
from pipelines.runtime.progress import progress
from pipelines.runtime.terminal import print_lines
from pipelines.runtime.yaml_flags import settings_of
from shards.folders.pairs import Pairing
from shards.images.files import ImageRule
from shards.local_files import open_file
from shards.masks.proposal import propose_flags
from shards.masks.survey import MaskSurvey, survey_mask
from shards.sample import AggregateDataError, DataError, list_problems

PROPOSED = frozenset(
    {
        *("mask_format", "mask_values", "mask_threshold", "invert", "ignore_value", "colours"),
        *("unknown", "tolerance", "classes", "allow_absent_classes"),
    }
)
"""Settings that a proposal replaces."""


def propose_format(config: Any, verb: str) -> int:
    """Survey all masks and print the command of `config` with the flags that read them.

    Where its flags pair nothing, the command has others that do, or those of annotations. Nothing
    is packed. Returns exit code 0 with a proposal, else 1. Raises DataError if no image has a mask.
    """
    try:
        config, pairing = find_proposed_pairs(config)
    except DataError as error:
        options = config.source.pairing
        annotations = propose_between(options.images, options.masks)
        if annotations is None:
            raise
        print(f"{error}\n", file=sys.stderr)
        print(join_command(verb, annotations.words))
        print_lines(annotations.notes)
        return 0
    survey, problems = survey_pairing(config.source, pairing, config.workers)
    for line in list_problems(problems):
        print(line, file=sys.stderr)
    if survey.num_files == 0:
        print(f"none of {len(problems)} masks can be read", file=sys.stderr)
        return REFUSED
    proposal = propose_flags(survey)
    print(proposal.text(format_command(config, verb)))
    return 0 if proposal.flags else REFUSED


def find_proposed_pairs(config: Any) -> tuple[Any, Pairing]:
    """Find the pairs of a configuration, if there are none with other pairing flags.

    Returns the configuration with the flags that were used. Raises DataError if there is no pair.
    """
    options = config.source.pairing
    try:
        pairing = options.find_pairs()
        if pairing.pairs:
            return config, pairing
        problems = [*pairing.refused, *pairing.unpaired] or ["no image has a mask"]
        raise AggregateDataError(problems, "no mask can be surveyed before the pairing is correct")
    except DataError as error:
        repaired = repair_pairing(options)
        if repaired is None:
            raise
        print(f"{error}\n", file=sys.stderr)
    pairing = repaired.find_pairs()
    print(f"the command below pairs {len(pairing.pairs)} images", file=sys.stderr)
    print_lines(pairing.notes, sys.stderr)
    return replace(config, source=replace(config.source, pairing=repaired)), pairing


def survey_pairing(
    source: SourceOptions, pairing: Pairing, workers: int
) -> tuple[MaskSurvey, list[str]]:
    """Survey the masks of all pairs in parallel; also lists those that cannot be read."""
    masks = [f"{pairing.masks}/{pair.mask}" for pair in pairing.pairs]
    workers = num_workers(workers, len(masks))
    survey = MaskSurvey()
    problems: list[str] = []
    with progress(total=len(masks), desc="survey", unit="mask") as bar:
        survey_chunk = partial(survey_masks, rule=source.image_rule())
        for chunk, (partial_survey, unreadable) in run_all(
            survey_chunk, chunks(masks, workers), workers
        ):
            survey.merge(partial_survey)
            problems += unreadable
            bar.update(len(chunk))
    return survey, problems


def survey_masks(paths: Sequence[str], rule: ImageRule) -> tuple[MaskSurvey, list[str]]:
    """Survey some masks; also lists those that cannot be read."""
    survey = MaskSurvey()
    problems = []
    for path in paths:
        try:
            with open_file(path) as file:
                survey.merge(survey_mask(file.read(), path, rule))
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(describe_read_error(error, path))
    return survey, problems


def format_command(config: Any, verb: str) -> str:
    """Format the command line that gives `config`, without the settings that are proposed."""
    words = ["unet", verb]
    for field, value in settings_of(config):
        if field.name in PROPOSED or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag)
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
