"""Facts and timings -> the settings of a plan, each with its reason."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.planning.facts import DataFacts
from pipelines.planning.trial import WIDTHS, Timing, choose_depth
from pipelines.training.options import GLOBAL_BATCH_SIZE
from unet.spec import counted_classes

MIN_STEPS = 2000
"""Steps that a network should get; of those that do, the widest is planned. A rule
of thumb: widths have hardly been compared in equal time yet."""
RARE_SHARE = 0.02
"""Share of pixels below which a class is learned late or never without class weights."""
VALIDATIONS = 10
"""Validations of a run, at least; a round number of steps apart."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of the configuration of `unet train`, its value, and why."""

    key: str
    value: Any
    reason: str


def choose_settings(
    facts: DataFacts, timings: Sequence[Timing], minutes: float
) -> Iterator[Setting]:
    """Choose what depends on data, device and budget. Deterministic; `timings` is not empty."""
    chosen = choose_timing(timings, minutes)
    steps = count_steps(chosen, minutes)
    passes = steps * chosen.global_batch_size / facts.train
    yield Setting(
        "minutes",
        minutes,
        f"at most {steps:,} steps of {chosen.seconds:.3g} s, less what validation and loading take",
    )
    yield from choose_network(timings, chosen, minutes)
    yield Setting(
        "crop_size",
        chosen.crop_size,
        f"half of the training images are at least {facts.side} pixels wide and high",
    )
    yield Setting(
        "global_batch_size",
        chosen.global_batch_size,
        f"at most {passes:,.0f} passes over {facts.train:,} images",
    )
    yield Setting("accumulate", chosen.accumulate, explain_passes(chosen))
    yield choose_class_weights(facts)
    yield choose_orientation(facts)
    yield from choose_validation(facts, steps)


def choose_timing(timings: Sequence[Timing], minutes: float) -> Timing:
    """Return the widest network that makes enough steps; the narrowest if none does."""
    enough = [timing for timing in timings if count_steps(timing, minutes) >= MIN_STEPS]
    return max(enough or timings[:1], key=lambda timing: timing.base_channels)


def count_steps(timing: Timing, minutes: float) -> int:
    """Return how many steps fit into the budget if nothing else takes time."""
    return int(60 * minutes / timing.seconds)


def choose_network(timings: Sequence[Timing], chosen: Timing, minutes: float) -> Iterator[Setting]:
    """Explain the preset and the width."""
    preset = "small" if chosen.global_batch_size == GLOBAL_BATCH_SIZE["small"] else "modern"
    yield Setting("model.preset", preset, "decides the defaults of all that is not listed here")
    counts = [f"{t.base_channels}: {count_steps(t, minutes):,}" for t in timings]
    if count_steps(chosen, minutes) < MIN_STEPS:
        rule = f"the narrowest; it makes fewer than {MIN_STEPS:,} steps: allow more minutes"
    elif chosen == timings[-1] and chosen.base_channels != WIDTHS[-1]:
        rule = f"the widest that was timed; it makes more than {MIN_STEPS:,} steps"
    else:
        rule = f"the widest that makes {MIN_STEPS:,} steps"
    yield Setting("model.base_channels", chosen.base_channels, f"{rule} ({', '.join(counts)})")
    depth = choose_depth(chosen.crop_size)
    side = chosen.crop_size // 2**depth
    yield Setting("model.depth", depth, f"the coarsest map of a crop has {side} x {side} pixels")


def explain_passes(chosen: Timing) -> str:
    """Explain the number of passes of a step."""
    size = chosen.global_batch_size // chosen.accumulate
    what = "1 sample" if size == 1 else f"{size} samples"
    return f"weights and the maps of {what} take about {chosen.memory / 2**30:.1f} GiB"


def choose_class_weights(facts: DataFacts) -> Setting:
    """Weight classes that are rare, but not absent."""
    counted = [i for i in counted_classes(facts.classes) if facts.shares and facts.shares[i]]
    if not counted:
        return Setting("loss.class_weights", "none", "the pixels of the classes were not counted")
    rarest = min(counted, key=lambda index: facts.shares[index])
    share = facts.shares[rarest]
    value = "inverse_sqrt" if share < RARE_SHARE else "none"
    return Setting(
        "loss.class_weights",
        value,
        f"the rarest class, {facts.classes[rarest]}, has {share:.2%} of the pixels; weights are "
        f"for less than {RARE_SHARE:.0%}",
    )


def choose_orientation(facts: DataFacts) -> Setting:
    """Leave out flips that would average a shift of the masks out, or turn images upside down."""
    shift = facts.shift
    if shift is not None and (shift.vertical or shift.horizontal):
        return Setting(
            "augment.orientation",
            "fixed" if shift.horizontal else "upright",
            f"masks are shifted {shift} (mean of {shift.images} images); other flips and turns "
            "would average that out",
        )
    if facts.upright is None:
        reason = f"no class lies clearly above or below the middle, in {facts.masks} masks"
        return Setting("augment.orientation", "any", reason)
    where = "above" if facts.upright.offset < 0 else "below"
    return Setting(
        "augment.orientation",
        "upright",
        f"{facts.upright.name} lies {abs(facts.upright.offset):.0%} of the height {where} the "
        f"middle, in {facts.upright.masks} masks",
    )


def choose_validation(facts: DataFacts, steps: int) -> Iterator[Setting]:
    """Validate ten times or somewhat more; not at all without a validation split."""
    if not facts.val:
        yield Setting("val", False, "the data set has no split val")
        return
    every = max(1, steps // VALIDATIONS)
    step = 10 ** (len(str(every)) - 1)
    every = every // step * step
    yield Setting(
        "eval_every",
        every,
        f"about {steps // every:,} validations of {facts.val:,} images",
    )
