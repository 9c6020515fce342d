"""Tiled prediction of images of any size.

Padded networks (`same`) use overlapping tiles. The class probabilities of a pixel are averaged over
the tiles that cover it, with a Gaussian weight centred on the tile (sigma = tile / 8, as in
nnU-Net, Isensee et al. 2021). Sums are kept only for pixels that a later tile overlaps: one band of
rows, as wide as the image, and the columns shared with the next tile. All other pixels are yielded
at once.

Networks of valid convolutions lose a margin on each side. They use the overlap-tile strategy of the
U-Net paper (Ronneberger et al. 2015, figure 2): output tiles lie side by side, each computed from
an input with its margin, and the image is mirrored at its borders. Because of pooling, such a
network is shift-equivariant only modulo 2^depth, so tiles start at multiples of that. The result
equals a single pass over the image, unless a layer depends on the entire tile (instance and group
norm) or on the tile's border (bilinear upsampling).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Protocol

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""Images uint8 [B, C, h, w] on any device, in the memory format of the input images -> logits
[B, K, h - 2 margin, w - 2 margin]."""

BATCH_SIZE = 4
"""Default number of images or tiles per forward pass."""


class NetworkGeometry(Protocol):
    """Geometry that tiling needs, of `UNet`, `Ensemble` or `UNetConfig`, which allows all flips."""

    @property
    def margin(self) -> int:
        """Pixels that the logits lack on each side of the input; 0 with padding."""
        ...

    @property
    def multiple(self) -> int:
        """Tiles with a margin start at multiples of this: 2^depth."""
        ...

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Dimensions to flip for each mirror image of test-time augmentation."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Tiled prediction."""

    tile: int = 1024
    """Side of a tile in pixels; smaller images are predicted in one pass. Networks of valid
    convolutions use the next smaller size that they accept."""
    overlap: float = 0.25
    """Minimum overlap of neighbouring tiles, as a share of a tile. Valid convolutions need none."""
    batch_size: int | None = None
    """Images of equal size, or tiles, per forward pass; default: 16 on CUDA GPUs, else 4. On a
    CPU, 1 is as fast as any other number and needs the least memory."""
    tta: bool = False
    """Test-time augmentation: average the probabilities over each tile and its flips: horizontal,
    vertical and both, at four times the cost, or those that the model was trained with
    (--augment.orientation)."""

    def __post_init__(self) -> None:
        if self.tile < 16:
            raise ValueError(f"tile must be at least 16 pixels, got {self.tile}")
        if not 0 <= self.overlap <= 0.75:
            raise ValueError(f"overlap must be in [0, 0.75], got {self.overlap}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def effective_batch_size(self) -> int:
        """The batch size, or `BATCH_SIZE` if none is set."""
        return BATCH_SIZE if self.batch_size is None else self.batch_size


@dataclass(frozen=True, slots=True)
class Block:
    """Class probabilities of a rectangle of one image, or of several complete images."""

    images: slice
    """Indices of the images: a batch if each fits into one tile, else one image."""
    rows: slice
    columns: slice
    probability: Tensor
    """float32 [N, K, rows, columns], on the device of the logits. With two classes, that of the
    second alone: [N, 1, rows, columns]."""


def halve_tile(
    config: TileConfig, height: int, width: int, network: NetworkGeometry
) -> TileConfig | None:
    """Halve the tile after one of [height, width] ran out of memory.

    Returns None if no smaller tile gives the same result: the blend of a padded network depends on
    the tile, and valid convolutions have a minimum size.
    """
    margin, multiple = network.margin, network.multiple
    smallest = -margin % multiple + multiple + 2 * margin
    if not margin or max(height, width) <= smallest:
        return None
    return replace(config, tile=max(16, max(height, width) // 2))


def predict_blocks(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    network: NetworkGeometry,
) -> Iterator[Block]:
    """Predict class probabilities block by block; takes the arguments of `predict_masks`.

    Blocks are ordered by image, then top to bottom, then left to right, and cover each pixel once.
    At most one batch of tiles is in memory, plus sums for a band of `overlap * tile` rows: with 12
    classes and tiles of 1024, 12 kB for each pixel of width and 50 MB for each tile.
    """
    height, width = images[0].shape[-2:]
    rows, columns = lay_out_tiles(height, width, config, network)
    blend = Blend(rows, columns) if not network.margin and len(rows) * len(columns) > 1 else None
    places = [*product(range(len(images)), range(len(rows)), range(len(columns)))]
    one_tile_each = len(places) == len(images)
    for first in range(0, len(places), config.effective_batch_size):
        some = places[first : first + config.effective_batch_size]
        tiles = stack_tiles([read_tile(images[n], rows, columns, i, j) for n, i, j in some])
        probability = predict_tiles(forward, tiles, network.mirrors if config.tta else ())
        count = len(some) if one_tile_each and prefers_batches(probability.device) else 1
        for place, (n, i, j) in enumerate(some[:1] if count > 1 else some):
            if blend is not None:
                blend.add(probability[place], i, j)
            down, right = rows.finished(i), columns.finished(j)
            finished = (slice(down.stop - down.start), slice(right.stop - right.start))
            done = (slice(place, place + count), ..., *finished)
            yield Block(slice(n, n + count), down, right, probability[done])
        # Frees this batch before the next one is predicted.
        del probability


def prefers_batches(device: torch.device) -> bool:
    """Return whether the probabilities of several images are best processed together.

    On a GPU, kernel launches dominate. On a CPU, the data of one image may fit into the cache.
    """
    return device.type != "cpu"


def stack_tiles(tiles: Sequence[Tensor]) -> Tensor:
    """Stack tiles [C, h, w] into a batch [B, C, h, w] of their memory format.

    Channels-last tiles stay channels-last: the device permutes them while converting to float32.
    Tiles that are adjacent in memory, such as the images of a batch, are not copied.
    """
    first, size = tiles[0], tiles[0].numel()
    memory, start = first.untyped_storage().data_ptr(), first.data_ptr()
    if (first.is_contiguous() or first.permute(1, 2, 0).is_contiguous()) and all(
        tile.untyped_storage().data_ptr() == memory
        and tile.data_ptr() == start + number * size * first.element_size()
        and (tile.shape, tile.stride()) == (first.shape, first.stride())
        for number, tile in enumerate(tiles)
    ):
        return first.as_strided((len(tiles), *first.shape), (size, *first.stride()))
    if first.stride(0) == 1 < first.shape[0]:
        return torch.stack([tile.permute(1, 2, 0) for tile in tiles]).permute(0, 3, 1, 2)
    return torch.stack([*tiles])


@torch.no_grad()
def predict_tiles(forward: Forward, tiles: Tensor, mirrors: Sequence[tuple[int, ...]]) -> Tensor:
    """Predict class probabilities of tiles uint8 [B, C, h, w]; returns `Block.probability`.

    `mirrors`: dimensions to flip for each mirror image that is averaged with the tile itself.
    """
    probability = to_probability(forward(tiles))
    for dims in mirrors:
        mirrored = to_probability(forward(tiles.flip(dims)))
        probability += mirrored.flip(dims)
        del mirrored
    if mirrors:
        probability /= 1 + len(mirrors)
    return probability


def to_probability(logits: Tensor) -> Tensor:
    """Convert logits [B, K, h, w] to probabilities in float32: softmax over the classes.

    With two classes, returns the probability of the second alone: [B, 1, h, w].
    """
    if logits.shape[1] != 2:
        return logits.softmax(dim=1, dtype=torch.float32)
    first, second = logits.float().split(1, dim=1)
    return (second - first).sigmoid_()


@dataclass(frozen=True, slots=True)
class TileAxis:
    """The tiles along one side of an image."""

    length: int
    """Side of the image."""
    side: int
    """Side of a tile as the network sees it, margins included."""
    starts: tuple[int, ...]
    """First pixel of each tile, without its margin."""
    margin: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def finished(self, i: int) -> slice:
        """Pixels that are complete after tile `i`: later tiles do not overlap them."""
        return slice(self.starts[i], self.starts[i + 1] if i + 1 < len(self) else self.length)

    def shared(self, i: int) -> int:
        """Number of pixels that tile `i` shares with the next one."""
        return self.starts[i] + self.side - self.finished(i).stop

    def first(self, i: int) -> int:
        """First pixel of tile `i`, margin included; negative outside the image."""
        return self.starts[i] - self.margin

    def reaches_beyond(self, i: int) -> bool:
        """Whether tile `i`, margins included, extends beyond the image."""
        return self.first(i) < 0 or self.first(i) + self.side > self.length

    def pixels(self, i: int, device: torch.device) -> Tensor:
        """Return int64 [side]: the pixels of tile `i` with its margins, reflected at the borders.

        As in `np.pad(mode="reflect")`, the border pixel is not repeated, unless it is the only one.
        """
        index = torch.arange(self.first(i), self.first(i) + self.side, device=device)
        index %= max(1, 2 * (self.length - 1))
        return torch.minimum(index, 2 * (self.length - 1) - index)


def lay_out_tiles(
    height: int, width: int, config: TileConfig, network: NetworkGeometry
) -> tuple[TileAxis, TileAxis]:
    """Lay out the rows and columns of tiles for an image of this size."""
    if network.margin:
        rows, columns = (
            cut_exactly(length, config.tile, network.margin, network.multiple)
            for length in (height, width)
        )
    else:
        rows, columns = (
            cut_evenly(length, config.tile, config.overlap, symmetric=config.tta)
            for length in (height, width)
        )
    return rows, columns


def cut_evenly(length: int, tile: int, overlap: float, *, symmetric: bool = False) -> TileAxis:
    """Spread tiles evenly so that they cover `length` and overlap by at least `overlap`.

    A symmetric layout is its own mirror image; it sometimes needs one tile more.
    """
    side = min(tile, length)
    spare, stride = length - side, max(1, round(tile * (1 - overlap)))
    steps = -(-spare // stride)
    if steps == 0:
        return TileAxis(length, side, (0,))
    if symmetric and spare % 2 and steps % 2 == 0:
        steps += 1
    # The longer steps go outside, half of them on either side; if one is left, in the middle.
    step, longer = divmod(spare, steps)
    outer, middle = [step + 1] * (longer // 2), [step] * (steps - longer // 2 * 2)
    middle[len(middle) // 2] += longer % 2
    return TileAxis(length, side, tuple(accumulate([*outer, *middle, *outer], initial=0)))


def cut_exactly(length: int, tile: int, margin: int, multiple: int) -> TileAxis:
    """Lay out tiles of valid convolutions: as few as `tile` allows, then as small as possible.

    A valid tile yields k * multiple + rest pixels, k >= 1 (or the rest alone): for depth 4, 16 k +
    4 of 16 k + 188, such as the paper's 388 of 572. The stride is k * multiple; only the last tile
    contributes its rest.
    """
    rest = -margin % multiple
    max_k = max(1, (tile - 2 * margin - rest) // multiple)
    count = max(1, -(-(length - rest) // (max_k * multiple)))
    k = max(0 if rest else 1, -(-(length - rest) // (count * multiple)))
    side = k * multiple + rest + 2 * margin
    return TileAxis(length, side, tuple(i * k * multiple for i in range(count)), margin)


def read_tile(image: Tensor, rows: TileAxis, columns: TileAxis, i: int, j: int) -> Tensor:
    """Read tile (i, j) of an image [C, H, W]: [C, rows.side, columns.side]."""
    if rows.reaches_beyond(i) or columns.reaches_beyond(j):
        row, column = rows.pixels(i, image.device), columns.pixels(j, image.device)
        return image[:, row[:, None], column]
    top, left = rows.first(i), columns.first(j)
    return image[:, top : top + rows.side, left : left + columns.side]


class Blend:
    """Weighted sums over overlapping tiles, kept only for pixels that a later tile overlaps.

    The Gaussian is separable, and so is the sum of the weights of all tiles at a pixel. Dividing by
    it in advance makes the weights add up to 1 everywhere.
    """

    def __init__(self, rows: TileAxis, columns: TileAxis) -> None:
        self.rows, self.columns = rows, columns
        self.row_weights, self.column_weights = blending_weights(rows), blending_weights(columns)
        self.right = self.below = torch.empty(0)

    def add(self, probability: Tensor, i: int, j: int) -> None:
        """Weight tile (i, j) [K, h, w] in place and add the sums of earlier tiles to it.

        Tiles must come row by row, left to right. Afterwards the finished rows and columns hold the
        averages; the rest is kept for the tiles that follow.
        """
        if len(self.below) == 0:
            self.row_weights = self.row_weights.to(probability.device)
            self.column_weights = self.column_weights.to(probability.device)
            # Steps may differ by a pixel, and so may the height of the bands.
            deepest = max(self.rows.shared(row) for row in range(len(self.rows)))
            self.below = probability.new_empty(len(probability), deepest, self.columns.length)
        probability *= torch.outer(self.row_weights[i], self.column_weights[j])
        if j > 0:
            probability[:, :, : self.right.shape[-1]] += self.right
        right = self.columns.finished(j)
        width = right.stop - right.start
        self.right = probability[:, :, width:].clone()
        done = probability[:, :, :width]
        if i > 0:
            above = self.rows.shared(i - 1)
            done[:, :above] += self.below[:, :above, right]
        below = self.rows.shared(i)
        self.below[:, :below, right] = done[:, self.rows.side - below :]


def blending_weights(tiles: TileAxis) -> Tensor:
    """Compute Gaussian weights float32 [tiles, side] that add up to 1 at every pixel."""
    x = (torch.arange(tiles.side, dtype=torch.float64) - (tiles.side - 1) / 2) / (tiles.side / 8)
    bell = torch.exp(-0.5 * x**2)
    total = torch.zeros(tiles.length, dtype=torch.float64)
    for start in tiles.starts:
        total[start : start + tiles.side] += bell
    shares = [bell / total[start : start + tiles.side] for start in tiles.starts]
    return torch.stack(shares).float()
