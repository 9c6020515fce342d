"""Pretrained backbones: which network, which weights, which normalisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import metadata_load
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipelines.model.backbone_files import (
    BackboneFiles,
    digest,
    find_backbone,
    read_json,
    source_name,
)
from pipelines.runtime.errors import UsageError
from unet import EncoderConfig, UNetConfig, find_stages
from unet.encoder import DROP_PATH, build_backbone

NEW_TENSORS = ("hidden_states_norms.", "num_batches_tracked")
"""Parts of names of tensors that a backbone has and the weights of a classifier lack: the norms of
its feature maps, and counters."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone to build a model with."""

    config: EncoderConfig
    tensors: dict[str, Tensor] | None = None
    """Pretrained weights by name, for the channels of the images; None: random, or those of a
    checkpoint."""
    notes: tuple[str, ...] = ()
    """What to print about the weights, one line each."""


def choose_backbone(
    encoder: str,
    weights: str,
    drop_path: float | None,
    in_channels: int,
    saved: UNetConfig | None,
    accelerator: Accelerator,
) -> Backbone:
    """Return the backbone of `saved`, a checkpoint to continue from, else that of `encoder`.

    Rank 0 finds or downloads the files first; the others wait and read the same commit.

    Args:
        encoder: local folder or hub id.
        weights: `pretrained`, `none`, or a safetensors file.
        drop_path: replaces `drop_path_rate` of the backbone's configuration.
        in_channels: channels of the images.
        saved: model config of that checkpoint; its backbone is used if it has the same source.
        accelerator: ranks that agree.

    Raises:
        UsageError: on all ranks, if a file is missing or does not fit.
    """
    own = None if saved is None else saved.encoder
    if own is not None and own.source == source_name(encoder):
        return Backbone(set_drop_path(own, encoder, drop_path))

    def find(revision: str | None = None) -> BackboneFiles:
        return find_backbone(encoder, weights, revision)

    return load_backbone(find_on_ranks(find, accelerator), encoder, weights, drop_path, in_channels)


def find_on_ranks(
    find: Callable[[str | None], BackboneFiles], accelerator: Accelerator
) -> BackboneFiles:
    """Let rank 0 find the files, then the others those of the same commit.

    Raises UsageError on all ranks if rank 0 does not find them.
    """
    if accelerator.num_processes == 1:
        return find(None)
    files: BackboneFiles | None = None
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            files = find(None)
            outcome = [files.revision, None]
        except UsageError as error:
            outcome = [None, str(error)]
    revision, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise UsageError(problem)
    return find(revision) if files is None else files


def load_backbone(
    files: BackboneFiles, encoder: str, weights: str, drop_path: float | None, in_channels: int
) -> Backbone:
    """Read configuration, weights and normalisation. Raises UsageError if they do not fit."""
    flag = f"--model.encoder {encoder}"
    plain = read_json(files.config, flag)
    own_channels = plain.get("num_channels", 3)
    if type(own_channels) is not int or own_channels < 1:
        raise UsageError(f"{flag}: num_channels in {files.config} is {own_channels!r}")
    mean = std = None
    if files.weights:
        mean, std = read_normalisation(files.preprocessor, own_channels, in_channels, flag)
    try:
        config = find_stages(
            plain,
            in_channels,
            source=files.source,
            weights=weights if weights in ("pretrained", "none") else Path(weights).name,
            revision=files.revision,
            sha256=digest(files.weights),
            licence=read_licence(files.card),
            mean=mean,
            std=std,
        )
        config = set_drop_path(config, encoder, drop_path)
        if not files.weights:
            return Backbone(config, None, (f"encoder {files.source}: random weights",))
        tensors, counts = read_weights(config, own_channels, files.weights)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{flag}: {error}") from error
    notes = [f"encoder {files.source}: {counts}"]
    if mean is None:
        notes.append(
            f"encoder {files.source} has no preprocessor_config.json: images are normalised with "
            "the mean and deviation of the data set"
        )
    else:
        notes.append("its mean and deviation replace those of the data set")
    if in_channels != own_channels:
        notes.append(map_rule(own_channels, in_channels))
        for name in first_convolutions(config):
            tensors[name] = map_channels(tensors[name], in_channels)
    return Backbone(config, tensors, tuple(notes))


def set_drop_path(config: EncoderConfig, encoder: str, rate: float | None) -> EncoderConfig:
    """Replace the drop path rate. Raises UsageError for a backbone without drop path."""
    if rate is None:
        return config
    if DROP_PATH not in config.backbone:
        raise UsageError(
            f"--model.drop-path {rate}: {config.backbone['model_type']} ({encoder}) has no drop "
            "path; remove it"
        )
    return replace(config, backbone={**config.backbone, DROP_PATH: rate})


def read_normalisation(
    preprocessor: Path | None, own_channels: int, in_channels: int, flag: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Read the mean and deviation of each channel, pixels in 0-1; None, None without a file.

    Other numbers of channels get the average over the channels. Raises UsageError if the file is
    damaged.
    """
    if preprocessor is None:
        return None, None
    plain = read_json(preprocessor, flag)
    # Pixels 0-255 are multiplied by the factor first.
    factor = plain.get("rescale_factor", 1 / 255) if plain.get("do_rescale", True) else 1.0
    mean, std = [0.0] * own_channels, [1.0] * own_channels
    if plain.get("do_normalize", True):
        mean, std = (plain.get(name, []) for name in ("image_mean", "image_std"))
    values = [factor, *mean, *std] if isinstance(mean, list) and isinstance(std, list) else []
    if len(values) != 1 + 2 * own_channels or not all(
        isinstance(value, int | float) and abs(value) < 1e6 for value in values
    ):
        raise UsageError(f"{flag}: {preprocessor} has no image_mean and image_std of each channel")
    if factor <= 0 or min(std) <= 0:
        raise UsageError(f"{flag}: {preprocessor}: image_std and rescale_factor must be above 0")
    scale = 1 / (255 * factor)
    if scale == 1 or abs(scale - 1) < 1e-6:
        scale = 1.0
    if in_channels != own_channels:
        mean, std = ([sum(values) / own_channels] * in_channels for values in (mean, std))
    return tuple(value * scale for value in mean), tuple(value * scale for value in std)


def read_licence(card: Path | None) -> str | None:
    """Read the licence of a hub card; None if it names none."""
    if card is None:
        return None
    try:
        licence = (metadata_load(card) or {}).get("license")
    except (ValueError, OSError):
        return None
    return licence if isinstance(licence, str) else None


def read_weights(
    config: EncoderConfig, own_channels: int, files: Sequence[Path]
) -> tuple[dict[str, Tensor], str]:
    """Read safetensors into a backbone of their own number of channels.

    Returns its state dict, and how many tensors were read, are new and were not used. Raises
    ValueError if tensors are missing, of another shape, or not finite.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} contains NaN or infinity")
    silence_transformers()
    backbone: Any = build_backbone({**config.backbone, "num_channels": own_channels})
    floats = {n: t.float() if t.is_floating_point() else t for n, t in found.items()}
    try:
        # It also maps the names of a classifier's tensors to those of its backbone.
        loaded, info = type(backbone).from_pretrained(
            None,
            config=backbone.config,
            # Reported below, in one line.
            ignore_mismatched_sizes=True,
            state_dict=floats,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever the tensors provoke
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights cannot be loaded: {what}") from error
    missing, unused = set(info["missing_keys"]), len(set(info["unexpected_keys"]))
    lacking = sorted(n for n in missing if not any(part in n for part in NEW_TENSORS))
    if lacking or info["mismatched_keys"]:
        what = lacking or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise ValueError(
            f"the weights lack {len(what)} tensors of {config.backbone['model_type']}, or have "
            f"them in another shape: {what[0]}"
        )
    state = loaded.float().state_dict()
    counts = f"{len(state) - len(missing)} tensors read, {len(missing)} new, {unused} not used"
    return state, counts


def silence_transformers() -> None:
    """Turn off the progress bars and reports of transformers; what they say is in the notes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def map_rule(own_channels: int, in_channels: int) -> str:
    """Describe `map_channels`."""
    if in_channels == 1:
        return f"its first convolution is summed over its {own_channels} channels for grey images"
    return (
        f"each of {in_channels} channels gets the mean of its first convolution's {own_channels}, "
        f"times {own_channels}/{in_channels}"
    )


def map_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Sum a convolution [C, own, h, w] over its inputs, shared among the channels of the image.

    Bands that are all equal then give the response of a grey RGB image.
    """
    return (weight.sum(1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)


def first_convolutions(config: EncoderConfig) -> set[str]:
    """Return the names of the weights whose shape depends on the channels of the image."""
    with torch.device("meta"):
        one, two = (
            build_backbone({**config.backbone, "num_channels": channels}).state_dict()
            for channels in (1, 2)
        )
    return {name for name in one if one[name].shape != two[name].shape}
