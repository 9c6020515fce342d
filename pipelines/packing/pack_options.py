"""Options of `pack` beyond those of `check`: shards, border maps, several jobs."""

from dataclasses import dataclass

from pipelines.packing.plan import ShardRule
from pipelines.runtime.errors import parse_part
from pipelines.runtime.yaml_flags import refuse_unused
from shards.masks.borders import BorderRule, has_scipy, needs_scipy


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """Size of the shards, and the order of the samples in them."""

    samples_per_shard: int = 10_000
    """Maximum number of samples in a shard."""
    shard_bytes: int | None = None
    """Close a shard when its input files reach this size; default: 256 MiB, or less where that
    would make fewer than 16 shards (but at least 8 MiB)."""
    seed: int = 0
    """Seed of the order of samples."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "shard_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")

    def make_rule(self) -> ShardRule:
        """Build the rule that orders samples and cuts them into shards."""
        return ShardRule(
            max_samples=self.samples_per_shard, max_bytes=self.shard_bytes, seed=self.seed
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BorderOptions:
    """Border maps, which weight the pixels between touching objects in the loss."""

    border_sigma: float | None = None
    """Store a border map with each mask, for training with --loss.border-weight: between two
    objects, exp(-(d1 + d2)^2 / (2 sigma^2)), d1 and d2 the distances to the two nearest; sigma in
    pixels, 5 in the U-Net paper. Needs the extra `scipy`."""
    border_classes: tuple[str, ...] = ()
    """Classes whose connected components are objects; default: all but `background`, or all but
    the first where no class has that name. If classes lie within each other, name one."""

    def __post_init__(self) -> None:
        if self.border_sigma is not None:
            if not has_scipy():
                raise ValueError(needs_scipy("--border-sigma"))
            BorderRule(self.border_sigma, ())

    def class_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Select the classes that are objects. Raises ValueError for an unknown class."""
        if unknown := [name for name in self.border_classes if name not in names]:
            raise ValueError(
                f"--border-classes {unknown[0]} is not a class; classes: {' '.join(names)}"
            )
        if self.border_classes:
            return tuple(name for name in names if name in self.border_classes)
        objects = tuple(name for name in names if name.lower() != "background")
        return objects if len(objects) < len(names) else names[1:]

    def make_rule(self, names: tuple[str, ...]) -> BorderRule | None:
        """Build the rule that makes border maps, None without --border-sigma.

        Args:
            names: all class names, by index.

        Raises:
            ValueError: --border-classes without --border-sigma, or with an unknown class.
        """
        if self.border_sigma is None:
            refuse_unused(self, "needs --border-sigma, which enables border maps", "border_classes")
            return None
        return BorderRule(self.border_sigma, tuple(map(names.index, self.class_names(names))))


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """Several jobs, or a Dask cluster, that pack one data set."""

    part: str | None = None
    """i/n: pack every n-th shard from the i-th, as one of n jobs; then run --finish once."""
    finish: bool = False
    """Check that the shards of all parts are complete, and write the manifest."""
    scheduler: str | None = None
    """Address of a running Dask scheduler (tcp://host:8786) whose workers pack."""

    def __post_init__(self) -> None:
        if self.part is not None:
            parse_part("--part", self.part)
        if self.part is not None and self.finish:
            raise ValueError("--part and --finish exclude each other: run --finish after all parts")
