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
from pipelines.model.build import ModelConfig
from pipelines.model.channels import ChannelRule, describe_rule, map_channels, map_values
from pipelines.model.timm_files import match_timm, read_timm
from pipelines.runtime.errors import UsageError
from unet import EncoderConfig, UNetConfig, find_stages
from unet.encoder import DROP_PATH, TIMM, build_backbone

NEW_TENSORS = ("hidden_states_norms.", "num_batches_tracked")
"""Parts of names of tensors that a backbone has and the weights of a classifier lack: the norms of
its feature maps, and counters."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone to build a model with."""

    config: EncoderConfig
    tensors: dict[str, Tensor] | None = None
    """Pretrained weights by name, for the channels of the images, without tensors that stay random;
    None: all random, or those of a checkpoint."""
    notes: tuple[str, ...] = ()
    """What to print about the weights, one line each."""


def choose_backbone(
    model: ModelConfig, in_channels: int, saved: UNetConfig | None, accelerator: Accelerator
) -> Backbone:
    """Return the backbone of `saved`, a checkpoint to continue from, else that of the settings.

    Rank 0 finds or downloads the files first; the others wait and read the same commit.

    Args:
        model: settings, with `encoder`.
        in_channels: channels of the images.
        saved: model config of that checkpoint; its backbone is used if it has the same source.
        accelerator: ranks that agree.

    Raises:
        UsageError: on all ranks, if a file is missing or does not fit.
    """
    encoder, weights = model.encoder, model.encoder_weights
    assert encoder is not None
    own = None if saved is None else saved.encoder
    if own is not None and own.source == source_name(encoder):
        if model.encoder_input not in (None, own.input):
            raise UsageError(
                f"--model.encoder-input {model.encoder_input}: the first convolution is that of "
                "the checkpoint; remove it"
            )
        return Backbone(set_drop_path(own, encoder, model.drop_path))

    def find(revision: str | None = None) -> BackboneFiles:
        return find_backbone(encoder, weights, revision)

    return load_backbone(find_on_ranks(find, accelerator), model, in_channels)


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


def load_backbone(files: BackboneFiles, model: ModelConfig, in_channels: int) -> Backbone:
    """Read configuration, weights and normalisation. Raises UsageError if they do not fit."""
    flag, weights = f"--model.encoder {model.encoder}", model.encoder_weights
    plain, preprocessor = read_description(files, flag)
    own_channels = plain.get("num_channels", 3)
    if type(own_channels) is not int or own_channels < 1:
        raise UsageError(f"{flag}: num_channels in {files.config} is {own_channels!r}")
    rule = choose_rule(model, own_channels, in_channels)
    normalisation = read_normalisation(preprocessor, own_channels, flag) if files.weights else None
    if normalisation is None or rule == "random":
        mean = std = None
    else:
        mean, std = (map_values(values, in_channels, rule or "mean") for values in normalisation)
    try:
        config = find_stages(
            plain,
            in_channels,
            source=files.source,
            weights=weights if weights in ("pretrained", "none") else Path(weights).name,
            revision=files.revision,
            sha256=digest(files.weights),
            licence=read_licence(files.card),
            input=rule,
            mean=mean,
            std=std,
        )
        config = set_drop_path(config, str(model.encoder), model.drop_path)
        if not files.weights:
            return Backbone(config, None, (f"encoder {files.source}: random weights",))
        tensors, counts = read_weights(config, own_channels, files.weights)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{flag}: {error}") from error
    notes = [f"encoder {files.source}: {counts}"]
    if normalisation is None:
        notes.append(
            f"encoder {files.source} has no preprocessor_config.json: images are normalised with "
            "the mean and deviation of the data set"
        )
    elif mean is not None:
        notes.append("its mean and deviation replace those of the data set")
    if rule is not None:
        notes.append(describe_rule(rule, own_channels, in_channels))
        for name in first_convolutions(config):
            weight = tensors.pop(name)
            if rule != "random":
                tensors[name] = map_channels(weight, in_channels, rule)
    return Backbone(config, tensors, tuple(notes))


def choose_rule(model: ModelConfig, own_channels: int, in_channels: int) -> ChannelRule | None:
    """Return how the first convolution is mapped; None if it is not.

    Raises UsageError if `--model.encoder-input` would have no effect.
    """
    if model.encoder_weights != "none" and own_channels != in_channels:
        return model.encoder_input or "mean"
    if model.encoder_input is not None:
        reason = (
            "its weights are random"
            if model.encoder_weights == "none"
            else f"the encoder takes the {in_channels} channels of the images as they are"
        )
        raise UsageError(
            f"--model.encoder-input {model.encoder_input} has no effect: {reason}; remove it"
        )
    return None


def set_drop_path(config: EncoderConfig, encoder: str, rate: float | None) -> EncoderConfig:
    """Replace the drop path rate. Raises UsageError for a backbone without drop path."""
    if rate is None:
        return config
    changed = {**config.backbone, DROP_PATH: rate}
    if DROP_PATH not in config.backbone and not takes_drop_path(changed):
        raise UsageError(
            f"--model.drop-path {rate}: {config.architecture} ({encoder}) has no drop path; remove "
            "it"
        )
    return replace(config, backbone=changed)


def takes_drop_path(plain: dict[str, Any]) -> bool:
    """Whether a model of timm, whose configuration does not list it, has drop path."""
    if plain["model_type"] != TIMM:
        return False
    try:
        with torch.device("meta"):
            build_backbone(plain)
    except ValueError:
        return False
    return True


def read_description(
    files: BackboneFiles, flag: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read configuration and preprocessor. Raises UsageError if one is damaged."""
    plain = read_json(files.config, flag)
    try:
        plain, preprocessor = read_timm(plain)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
    if files.preprocessor is not None:
        preprocessor = read_json(files.preprocessor, flag)
    return plain, preprocessor


def read_normalisation(
    plain: dict[str, Any] | None, own_channels: int, flag: str
) -> tuple[list[float], list[float]] | None:
    """Read the mean and deviation of each channel, pixels in 0-1, from a preprocessor.

    Returns None without one. Raises UsageError if it is damaged.
    """
    if plain is None:
        return None
    # Pixels 0-255 are multiplied by the factor first.
    factor = plain.get("rescale_factor", 1 / 255) if plain.get("do_rescale", True) else 1.0
    mean, std = [0.0] * own_channels, [1.0] * own_channels
    if plain.get("do_normalize", True):
        mean, std = (plain.get(name, []) for name in ("image_mean", "image_std"))
    values = [factor, *mean, *std] if isinstance(mean, list) and isinstance(std, list) else []
    if len(values) != 1 + 2 * own_channels or not all(
        isinstance(value, int | float) and abs(value) < 1e6 for value in values
    ):
        raise UsageError(
            f"{flag}: image_mean and image_std in its preprocessor_config.json (timm: mean and std "
            f"in config.json) are not {own_channels} numbers each"
        )
    if factor <= 0 or min(std) <= 0:
        raise UsageError(f"{flag}: image_std and rescale_factor must be above 0")
    scale = 1 / (255 * factor)
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    return [value * scale for value in mean], [value * scale for value in std]


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
    load = load_timm if config.backbone["model_type"] == TIMM else load_transformers
    state, missing, unused = load(backbone, floats)
    lacking = sorted(n for n in missing if not any(part in n for part in NEW_TENSORS))
    if lacking:
        raise ValueError(
            f"the weights lack {len(lacking)} tensors of {config.architecture}, or have them in "
            f"another shape: {lacking[0]}"
        )
    counts = f"{len(state) - len(missing)} tensors read, {len(missing)} new, {unused} not used"
    return state, counts


def load_transformers(
    backbone: Any, found: dict[str, Tensor]
) -> tuple[dict[str, Tensor], set[str], int]:
    """Load tensors into a backbone of transformers, which renames those of classifiers.

    Returns its state dict, the names that were not found in their shape, and the number of tensors
    that were not used.
    """
    try:
        loaded, info = type(backbone).from_pretrained(
            None,
            config=backbone.config,
            # Reported in one line.
            ignore_mismatched_sizes=True,
            state_dict=found,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever the tensors provoke
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights cannot be loaded: {what}") from error
    missing = {*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}
    return loaded.float().state_dict(), missing, len(set(info["unexpected_keys"]))


def load_timm(backbone: Any, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str], int]:
    """Load tensors into a TimmBackbone; returns as `load_transformers`."""
    state = backbone.state_dict()
    matched = match_timm(state, found)
    fitting = {name: t for name, t in matched.items() if t.shape == state[name].shape}
    return {**state, **fitting}, set(state) - set(fitting), len(found) - len(matched)


def silence_transformers() -> None:
    """Turn off the progress bars and reports of transformers; the notes hold what matters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def first_convolutions(config: EncoderConfig) -> set[str]:
    """Return the names of the weights whose shape depends on the channels of the image."""
    with torch.device("meta"):
        one, two = (
            build_backbone({**config.backbone, "num_channels": channels}).state_dict()
            for channels in (1, 2)
        )
    return {name for name in one if one[name].shape != two[name].shape}
