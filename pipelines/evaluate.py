"""`unet evaluate`: exact scores of a checkpoint on a split, for any number of ranks."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines import scoring
from pipelines.checkpoint import find_checkpoint, load_model
from pipelines.config import UsageError, run_command
from pipelines.dataset import DataConfig, open_data, split_in_use
from pipelines.devices import start
from shards.index import read_manifest
from shards.sample import DataError
from shards.writer import write_json
from unet import TileConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, TileConfig):
    """Score a checkpoint on every picture of a split, at its own size."""

    checkpoint: str
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
    split: str = "val"
    """Split to score on."""
    out: Path | None = None
    """Folder for scores.json; left out: the run folder or checkpoint folder."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        TileConfig.__post_init__(self)


def run(config: EvaluateConfig) -> int:
    """Score, print the table, write the JSON."""
    manifest = read_manifest(config.data)
    manifest.split(config.split, config.data)
    if config.out is None and not isinstance(find_checkpoint(config.checkpoint), Path):
        raise UsageError(
            f"--checkpoint {config.checkpoint} is no folder here: say where scores go with --out"
        )
    loaded = load_model(config.checkpoint)
    out = config.out or Path(config.checkpoint)
    if loaded.spec.classes != manifest.classes:
        raise DataError(
            f"{config.checkpoint} knows the classes {', '.join(loaded.spec.classes)}, "
            f"{config.data} has {', '.join(manifest.classes) or 'none'}; they must be the same"
        )
    if loaded.spec.channels != manifest.image_format.channels:
        raise DataError(
            f"{config.checkpoint} was trained on {loaded.spec.channels} pictures, "
            f"{config.data} holds {manifest.image_format.channels}; they must be the same"
        )
    # The range of 16-bit pictures is part of what the model has learned.
    manifest = replace(manifest, image_format=loaded.image_format)
    accelerator = start()
    model = loaded.model.to(accelerator.device)
    in_use = split_in_use(manifest, config.split)
    data = open_data(config, manifest, [config.split], accelerator, in_use, "raise it")
    scores = scoring.score(model, accelerator, data, config.split, config)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        about = {"split": config.split, "checkpoint": loaded.digest, "manifest": manifest.digest}
        write_json(out / "scores.json", {**about, **scores.to_plain()})
        print(scoring.table(scores))
        print(f"{scores.num_images} pictures of {config.split}: {out / 'scores.json'}")
    accelerator.end_training()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(EvaluateConfig, run, argv, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
