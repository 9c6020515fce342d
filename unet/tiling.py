"""Overlap-tile prediction of pictures of any size, with Gaussian blending.

Tiles overlap, each pixel's class probabilities are averaged over the tiles that cover it, weighted
by a Gaussian that trusts a tile's middle (sigma = tile / 8, as nnU-Net does). One row of tiles is
held at a time: rows of pixels that no later tile reaches are finished and leave as class indices,
so memory grows with the width of a picture but not with its height.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """How large pictures are cut."""

    tile: int = 1024
    """Side of a tile in pixels; smaller pictures are predicted whole."""
    overlap: float = 0.25
    """Share of a tile that the next one covers again."""
    batch_size: int = 4
    """Pictures of one size, or tiles of one picture, that a forward pass sees at once."""

    def __post_init__(self) -> None:
        if self.tile < 16:
            raise ValueError(f"tile must be at least 16 pixels, got {self.tile}")
        if not 0 <= self.overlap <= 0.75:
            raise ValueError(f"overlap must be in [0, 0.75], got {self.overlap}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def predict_mask(
    forward: Callable[[Tensor], Tensor], image: Tensor, config: TileConfig
) -> tuple[Tensor, Tensor]:
    """Class indices of pictures of one size.

    Args:
        forward: uint8 pictures [B, C, h, w] on any device -> logits [B, K, h, w].
        image: uint8 [B, C, H, W].
        config: tile, overlap and batch size.

    Returns:
        Classes uint8 [B, H, W] and the probability of each, float32 [B, H, W], both on the
        device of the logits.
    """
    if max(image.shape[-2:]) <= config.tile:
        whole = [
            classes_of(forward(part).float().softmax(dim=1))
            for part in image.split(config.batch_size)
        ]
        return torch.cat([c for c, _ in whole]), torch.cat([p for _, p in whole])
    tiled = [predict_tiled(forward, single, config) for single in image]
    return torch.stack([c for c, _ in tiled]), torch.stack([p for _, p in tiled])


def predict_tiled(
    forward: Callable[[Tensor], Tensor], image: Tensor, config: TileConfig
) -> tuple[Tensor, Tensor]:
    """One picture uint8 [C, H, W], larger than a tile -> classes and probabilities [H, W]."""
    height, width = image.shape[-2:]
    tile_height, tile_width = min(config.tile, height), min(config.tile, width)
    tops = tile_starts(height, tile_height, config.overlap)
    lefts = tile_starts(width, tile_width, config.overlap)
    finished: list[tuple[Tensor, Tensor]] = []
    stripe = total = window = None
    for row, top in enumerate(tops):
        for some in (
            lefts[i : i + config.batch_size] for i in range(0, len(lefts), config.batch_size)
        ):
            tiles = torch.stack(
                [image[:, top : top + tile_height, x : x + tile_width] for x in some]
            )
            probability = forward(tiles).float().softmax(dim=1)
            if stripe is None or total is None or window is None:
                window = gaussian_window(tile_height, tile_width).to(probability.device)
                stripe = probability.new_zeros(probability.shape[1], tile_height, width)
                total = probability.new_zeros(tile_height, width)
            for x, p in zip(some, probability, strict=True):
                stripe[:, :, x : x + tile_width] += p * window
                total[:, x : x + tile_width] += window
        assert stripe is not None
        assert total is not None
        rows = tops[row + 1] - top if row + 1 < len(tops) else tile_height
        finished.append(classes_of((stripe[:, :rows] / total[:rows])[None]))
        # The rows left over move up; those below them are fresh.
        stripe = F.pad(stripe[:, rows:], (0, 0, 0, rows))
        total = F.pad(total[rows:], (0, 0, 0, rows))
    classes, probability = (torch.cat(parts, dim=1)[0] for parts in zip(*finished, strict=True))
    return classes, probability


def classes_of(probability: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class and its probability: [B, K, H, W] -> uint8 and float32 [B, H, W]."""
    best, index = probability.max(dim=1)
    return index.to(torch.uint8), best


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixels of evenly spread tiles that cover `length` and overlap by at least `overlap`."""
    if length <= tile:
        return [0]
    stride = max(1, round(tile * (1 - overlap)))
    count = -(-(length - tile) // stride) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def gaussian_window(height: int, width: int) -> Tensor:
    """Blending weights [height, width], 1 in the middle, sigma an eighth of each side."""

    def bell(size: int) -> Tensor:
        x = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) / (size / 8)
        return torch.exp(-0.5 * x**2)

    # A floor keeps the corners of the picture, which one tile alone covers, above rounding.
    return torch.outer(bell(height), bell(width)).clamp(min=1e-4)
