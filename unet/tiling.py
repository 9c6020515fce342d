"""Prediction of pictures of any size, tile by tile.

Networks with padding (`same`) see overlapping tiles. Each pixel's class probabilities are averaged
over the tiles that cover it, weighted by a Gaussian that trusts a tile's middle (sigma = tile / 8,
as in nnU-Net, Isensee et al. 2021). Sums are kept only where a later tile still reaches: for a band
of the rows that the next row of tiles covers again, as wide as the picture, and for the columns
that the next tile covers again. All other pixels are finished, and leave.

Networks of valid convolutions lose a margin on each side: theirs is the overlap-tile strategy of
the U-Net (Ronneberger et al. 2015, figure 2). Tiles of output lie side by side, each seen with its
margin, and the picture is mirrored beyond its borders. Pooling makes such a network the same at
every place modulo 2^depth only, so tiles begin at multiples of that; the result is then that of the
whole picture at once, provided that no layer looks at all of a tile (instance and group norm do)
and upsampling is by transposed convolution (the bilinear kind sees the border of a tile).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""Images uint8 [B, C, h, w] on any device, channels last in memory where those given are -> logits
[B, K, h', w'], h' and w' 2 * margin less."""

BATCH_SIZE = 4
"""Images or tiles that a forward pass sees at once unless said otherwise."""

MIRRORS = ([-1], [-2], [-2, -1])
"""Dimensions to flip for the mirror images of a tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """How large pictures are cut."""

    tile: int = 1024
    """Side of a tile in pixels; smaller pictures are predicted whole. Networks of valid
    convolutions take the nearest size below that fits them."""
    overlap: float = 0.25
    """Share of a tile that the next one covers again. Tiles of valid convolutions need none."""
    batch_size: int | None = None
    """Images of one size, or tiles of them, that a forward pass sees at once. Left out: 16 on CUDA
    GPUs, else 4. On a CPU 1 is as fast as any other number, and takes the least memory."""
    tta: bool = False
    """Average the probabilities of each tile and its mirror images, left-right, up-down and both:
    four times the work."""

    def __post_init__(self) -> None:
        if self.tile < 16:
            raise ValueError(f"tile must be at least 16 pixels, got {self.tile}")
        if not 0 <= self.overlap <= 0.75:
            raise ValueError(f"overlap must be in [0, 0.75], got {self.overlap}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def num_together(self) -> int:
        """The batch size; `BATCH_SIZE` where nobody chose one for the device."""
        return BATCH_SIZE if self.batch_size is None else self.batch_size


@dataclass(frozen=True, slots=True)
class Block:
    """A finished part of an image, or of several."""

    images: slice
    """Which of the images: all of a batch that are predicted whole, else one."""
    rows: slice
    columns: slice
    probability: Tensor
    """Of each class, float32 [N, K, rows, columns]; of two classes, which one number says as well,
    of the second alone [N, 1, rows, columns]. On the device of the logits."""


def halve_tile(
    config: TileConfig, height: int, width: int, *, margin: int, multiple: int
) -> TileConfig | None:
    """Tiles of half the sides of one that was too large [height, width].

    None where smaller tiles would not give the same result: networks with padding blend others, and
    those of valid convolutions have a smallest one.
    """
    smallest = -margin % multiple + multiple + 2 * margin
    if not margin or max(height, width) <= smallest:
        return None
    return replace(config, tile=max(16, max(height, width) // 2))


def predict_blocks(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    *,
    margin: int = 0,
    multiple: int = 1,
) -> Iterator[Block]:
    """Class probabilities of pictures of one size, part by part; arguments as of `predict_masks`.

    Blocks come picture by picture, from left to right and then downwards; together they cover each
    pixel once. At most a batch of tiles is in memory, and sums for a band of `overlap * tile` rows:
    with 12 classes and tiles of 1024, 12 kB for each pixel of width and 50 MB for each tile.
    """
    height, width = images[0].shape[-2:]
    rows, columns = cut(height, width, config, margin=margin, multiple=multiple)
    blend = Blend(rows, columns) if not margin and len(rows) * len(columns) > 1 else None
    places = [*product(range(len(images)), range(len(rows)), range(len(columns)))]
    whole = len(places) == len(images)
    for first in range(0, len(places), config.num_together):
        some = places[first : first + config.num_together]
        tiles = stack([read_tile(images[n], rows, columns, i, j) for n, i, j in some])
        probability = average(forward, tiles, config.tta)
        count = len(some) if whole and takes_batches(probability.device) else 1
        for begin, (n, i, j) in enumerate(some[:1] if count > 1 else some):
            if blend is not None:
                blend.add(probability[begin], i, j)
            down, right = rows.finished(i), columns.finished(j)
            finished = (slice(down.stop - down.start), slice(right.stop - right.start))
            done = (slice(begin, begin + count), ..., *finished)
            yield Block(slice(n, n + count), down, right, probability[done])
        # Else two batches of them would be in memory while the next is predicted.
        del probability


def takes_batches(device: torch.device) -> bool:
    """Whether probabilities of several images are best looked at together.

    A GPU waits for launches. What a CPU looks at should fit into its cache, as an image may.
    """
    return device.type != "cpu"


def stack(tiles: Sequence[Tensor]) -> Tensor:
    """One batch [B, C, h, w] of tiles [C, h, w], channels last in memory where theirs are.

    To move the channels is the device's work, which does it on the way to float32. Tiles that
    follow each other in memory, as whole images of a batch may, are not copied.
    """
    first, size = tiles[0], tiles[0].numel()
    memory, begin = first.untyped_storage().data_ptr(), first.data_ptr()
    if (first.is_contiguous() or first.permute(1, 2, 0).is_contiguous()) and all(
        tile.untyped_storage().data_ptr() == memory
        and tile.data_ptr() == begin + number * size * first.element_size()
        and (tile.shape, tile.stride()) == (first.shape, first.stride())
        for number, tile in enumerate(tiles)
    ):
        return first.as_strided((len(tiles), *first.shape), (size, *first.stride()))
    if first.stride(0) == 1 < first.shape[0]:
        return torch.stack([tile.permute(1, 2, 0) for tile in tiles]).permute(0, 3, 1, 2)
    return torch.stack([*tiles])


@torch.no_grad()
def average(forward: Forward, tiles: Tensor, tta: bool) -> Tensor:
    """Class probabilities of tiles uint8 [B, C, h, w], as in `Block.probability`."""
    probability = to_probability(forward(tiles))
    if tta:
        for dims in MIRRORS:
            mirrored = to_probability(forward(tiles.flip(dims)))
            probability += mirrored.flip(dims)
            del mirrored
        probability /= 1 + len(MIRRORS)
    return probability


def to_probability(logits: Tensor) -> Tensor:
    """Softmax in float32 of logits [B, K, h, w]; of two classes the second alone [B, 1, h, w]."""
    if logits.shape[1] != 2:
        return logits.softmax(dim=1, dtype=torch.float32)
    first, second = logits.float().split(1, dim=1)
    return (second - first).sigmoid_()


@dataclass(frozen=True, slots=True)
class Cut:
    """How one side of a picture is cut."""

    length: int
    """Of the picture."""
    side: int
    """Of a tile as the network sees it, its margins included."""
    starts: tuple[int, ...]
    """First pixel of each tile, within its margin."""
    margin: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def finished(self, i: int) -> slice:
        """The pixels that no tile after tile `i` reaches, but all before it left to it."""
        return slice(self.starts[i], self.starts[i + 1] if i + 1 < len(self) else self.length)

    def shared(self, i: int) -> int:
        """How many pixels of tile `i` the next one covers again."""
        return self.starts[i] + self.side - self.finished(i).stop

    def first(self, i: int) -> int:
        """The first pixel of tile `i`, its margin included: below 0 it lies beyond the border."""
        return self.starts[i] - self.margin

    def reaches_beyond(self, i: int) -> bool:
        """Whether tile `i` with its margins sees more than the picture."""
        return self.first(i) < 0 or self.first(i) + self.side > self.length

    def pixels(self, i: int, device: torch.device) -> Tensor:
        """int64 [side]: the pixels of tile `i` and its margins, mirrored beyond the borders.

        The border pixel itself is not repeated; a side of one pixel is.
        """
        index = torch.arange(self.first(i), self.first(i) + self.side, device=device)
        index %= max(1, 2 * (self.length - 1))
        return torch.minimum(index, 2 * (self.length - 1) - index)


def cut(
    height: int, width: int, config: TileConfig, *, margin: int = 0, multiple: int = 1
) -> tuple[Cut, Cut]:
    """How the rows and the columns of an image are cut; `margin` and `multiple` as everywhere."""
    if margin:
        rows, columns = (cut_exactly(n, config.tile, margin, multiple) for n in (height, width))
    else:
        rows, columns = (
            cut_evenly(n, config.tile, config.overlap, symmetric=config.tta)
            for n in (height, width)
        )
    return rows, columns


def cut_evenly(length: int, tile: int, overlap: float, *, symmetric: bool = False) -> Cut:
    """Evenly spread tiles that cover `length` and overlap by at least the share `overlap`.

    A symmetric cut is its own mirror image, for which it sometimes needs one tile more.
    """
    side = min(tile, length)
    spare, stride = length - side, max(1, round(tile * (1 - overlap)))
    steps = -(-spare // stride)
    if steps == 0:
        return Cut(length, side, (0,))
    if symmetric and spare % 2 and steps % 2 == 0:
        steps += 1
    # The longer steps are the outer ones, half of them on either side, and one in the middle.
    step, longer = divmod(spare, steps)
    outer, middle = [step + 1] * (longer // 2), [step] * (steps - longer // 2 * 2)
    middle[len(middle) // 2] += longer % 2
    return Cut(length, side, tuple(accumulate([*outer, *middle, *outer], initial=0)))


def cut_exactly(length: int, tile: int, margin: int, multiple: int) -> Cut:
    """Tiles of valid convolutions, as few as `tile` allows, then as small as that number allows.

    A valid tile gives k * multiple + rest pixels, k >= 1 (or a rest alone): for depth 4, 16 k + 4
    of 16 k + 188, of which the paper's are 388 of 572. It passes on k * multiple; the last, all.
    """
    rest = -margin % multiple
    most = max(1, (tile - 2 * margin - rest) // multiple)
    count = max(1, -(-(length - rest) // (most * multiple)))
    k = max(0 if rest else 1, -(-(length - rest) // (count * multiple)))
    side = k * multiple + rest + 2 * margin
    return Cut(length, side, tuple(i * k * multiple for i in range(count)), margin)


def read_tile(image: Tensor, rows: Cut, columns: Cut, i: int, j: int) -> Tensor:
    """Tile [C, rows.side, columns.side] in row `i` and column `j` of a picture [C, H, W]."""
    if rows.reaches_beyond(i) or columns.reaches_beyond(j):
        row, column = rows.pixels(i, image.device), columns.pixels(j, image.device)
        return image[:, row[:, None], column]
    top, left = rows.first(i), columns.first(j)
    return image[:, top : top + rows.side, left : left + columns.side]


class Blend:
    """Weighted sums over overlapping tiles, kept only where a later tile still reaches.

    The Gaussian is a product of one for rows and one for columns, and so is the sum of all tiles'
    weights in a pixel: divided by it beforehand, weights add up to 1 everywhere.
    """

    def __init__(self, rows: Cut, columns: Cut) -> None:
        self.rows, self.columns = rows, columns
        self.row_weights, self.column_weights = blending_weights(rows), blending_weights(columns)
        self.right = self.below = torch.empty(0)

    def add(self, probability: Tensor, i: int, j: int) -> None:
        """Weight tile (i, j) [K, h, w] in place and add to it what the tiles before it left.

        Tiles come from left to right, then downwards. Then those of its rows and columns that are
        finished hold the averages; the others are taken along for the tiles that follow.
        """
        if len(self.below) == 0:
            self.row_weights = self.row_weights.to(probability.device)
            self.column_weights = self.column_weights.to(probability.device)
            # Uneven steps differ by a pixel, and so do the bands that they leave.
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


def blending_weights(cut: Cut) -> Tensor:
    """Weights float32 [tiles, side]: Gaussians that add up to 1 in each pixel that tiles cover."""
    x = (torch.arange(cut.side, dtype=torch.float64) - (cut.side - 1) / 2) / (cut.side / 8)
    bell = torch.exp(-0.5 * x**2)
    total = torch.zeros(cut.length, dtype=torch.float64)
    for start in cut.starts:
        total[start : start + cut.side] += bell
    shares = [bell / total[start : start + cut.side] for start in cut.starts]
    return torch.stack(shares).float()
