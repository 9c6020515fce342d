"""Tiled prediction, with smaller tiles if memory runs out."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.inference.compiled import CompiledForward, first_tile
from pipelines.inference.decoding import Decoder
from pipelines.inference.engine import Predict, limit_threads
from pipelines.inference.options import PredictConfig
from pipelines.model.forward import TileTooLargeError, make_forward, place_model
from pipelines.model.load import LoadedModel
from pipelines.runtime.errors import RunError
from unet import PredictedMasks, halve_tile, predict_masks


@contextmanager
def predictor(
    config: PredictConfig, loaded: LoadedModel, accelerator: Accelerator, decode: Decoder
) -> Iterator[Predict]:
    """Yield a function that predicts images of one size, valid within the context."""
    # Moved in inference mode, weights become inference tensors, which autograd refuses.
    with torch.inference_mode(False):
        model, compiled = loaded.model.eval(), list[CompiledForward]()
        place_model(model, accelerator.device)
        if config.channels_last:
            for member in loaded.members:
                # Missing from torch's stubs.
                member.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.compile and (sides := first_tile(decode, config.tiles, model)) is not None:
        for member in loaded.members:
            shape = (config.tiles.effective_batch_size, *sides)
            member.forward = CompiledForward(member.forward, shape)
            compiled.append(member.forward)
    halving = make_forward(model, accelerator, compiled=bool(compiled))
    with limit_threads(halving, accelerator.device) as forward:
        yield make_predict(config, forward, loaded, accelerator.device)
    if compiled:
        # All members ran the same tiles.
        compiled[0].report()


def make_predict(
    config: PredictConfig,
    forward: Callable[[Tensor], Tensor],
    loaded: LoadedModel,
    device: torch.device,
) -> Predict:
    """Return a function that predicts images of one size, in smaller tiles if the masks are equal.

    The function raises RunError if a tile does not fit into GPU memory.
    """
    network, tiles = loaded.model, config.tiles
    rule = replace(config.results.mask_rule(), temperature=loaded.temperature)
    reported = False

    def predict(images: Sequence[Tensor]) -> PredictedMasks:
        nonlocal tiles, reported
        before = tiles
        while True:
            try:
                masks = predict_masks(forward, images, tiles, network, rule)
                break
            except TileTooLargeError as error:
                smaller = halve_tile(tiles, error.height, error.width, network)
                if smaller is None:
                    raise RunError(too_large(error, network.margin)) from error
            tiles = smaller
        if tiles != before and not reported:
            reported = True
            tqdm.write(
                f"tiles of {before.tile} do not fit into the memory of this GPU "
                f"({device}): continuing with {tiles.tile}, one at a time, as with --tile "
                f"{tiles.tile} --batch-size 1; the masks are identical"
                + (", except for a few pixels: these tiles run uncompiled" * config.compile),
                file=sys.stderr,
            )
        return masks

    return predict


def too_large(error: TileTooLargeError, margin: int) -> str:
    """Describe a tile that does not fit into GPU memory and the remedy; `margin`: the network's."""
    if margin:
        return (
            f"the smallest tile of this network, {error.height} x {error.width} pixels, does not "
            f"fit into the memory of this GPU ({error.reason}); end other processes that use it, "
            "or use a larger one"
        )
    return f"{error}, and predict into another --out, since other tiles give other masks"
