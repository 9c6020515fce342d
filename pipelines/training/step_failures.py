"""What ends a run at a step: too many unreadable samples, values that are not finite."""

from pipelines.runtime.errors import RunError
from pipelines.training.budget import NotFinite
from pipelines.training.setup import Training, TrainSetup
from shards.reader import ShardReader

MAX_NAMED = 8
"""Maximum number of sample keys in the error about a step that is not finite."""


def refuse_many_skips(training: Training, skipped: int) -> None:
    """Raise RunError, on all ranks, if more samples were replaced than `--max-bad-share` allows."""
    max_share = training.setup.config.batch.max_bad_share
    drawn = (training.budget.step - training.first_step) * training.setup.global_batch_size
    if skipped > max_share * max(training.setup.order.num_samples, drawn):
        raise RunError(
            f"{skipped:,} samples could not be decoded, more than --max-bad-share {max_share} "
            "allows; they are listed above: repair or remove them and pack again, or raise it"
        )


def describe_not_finite(found: NotFinite, setup: TrainSetup) -> str:
    """Return the error text: the step, the quantities that are not finite, the sample keys."""
    reader = ShardReader(setup.config.data, setup.manifest.splits["train"].shards)
    samples = setup.global_batch_size
    positions = range((found.step - 1) * samples, found.step * samples)[:MAX_NAMED]
    keys = [reader.read(setup.order.locate(position)).key for position in positions]
    more = f" and {samples - MAX_NAMED} more" if samples > MAX_NAMED else ""
    return (
        f"step {found.step}: {', '.join(found.names)} not finite; its samples are "
        f"{', '.join(keys)}{more}; "
        "lower --optim.lr, or inspect them; the last checkpoint is intact"
    )
