"""Describe how the data set of a resumed run differs from the one that it was trained on."""

from pathlib import Path

import yaml

from pipelines.runtime.strict_yaml import load_yaml, read_text
from shards.manifest import Manifest, read_manifest
from shards.sample import DataError


def describe_other_data(config: Path, digest: str, place: str) -> str:
    """Describe the differences, as far as the data set of the run can still be read.

    Args:
        config: config.yaml of the run, which names its data set.
        digest: sha256 of the manifest that the run was trained on.
        place: data set given now.
    """
    before = read_data_setting(config)
    if before is None:
        return f"--data {place} has another manifest"
    try:
        old, new = read_manifest(before), read_manifest(place)
    except DataError:
        return f"it was {before}, which cannot be read, and --data is {place}"
    if old.digest != digest:
        return f"{before} has changed since" if before == place else f"{before}, not {place}"
    return f"{before}, not {place}: {'; '.join(compare_manifests(old, new))}"


def read_data_setting(config: Path) -> str | None:
    """Read `data` from config.yaml; None if it is missing."""
    try:
        plain = load_yaml(read_text(config))
    except (OSError, DataError, yaml.YAMLError):
        return None
    data = plain.get("data") if isinstance(plain, dict) else None
    return data if isinstance(data, str) else None


def compare_manifests(old: Manifest, new: Manifest) -> list[str]:
    """Describe the differences between two manifests, one phrase each."""
    found = []
    for name in sorted(old.splits.keys() | new.splits.keys()):
        counts = [m.splits[name].samples if name in m.splits else 0 for m in (old, new)]
        hashes = [
            [shard.sha256 for shard in m.splits[name].shards] if name in m.splits else []
            for m in (old, new)
        ]
        if counts[0] != counts[1]:
            found.append(f"{counts[0]} samples in {name}, now {counts[1]}")
        elif hashes[0] != hashes[1]:
            found.append(f"other samples in {name}")
    for field in ("classes", "image_format", "mask_format"):
        if getattr(old, field) != getattr(new, field):
            found.append(f"other {field.replace('_', ' ')}")
    return found or ["their manifests differ, their samples do not"]
