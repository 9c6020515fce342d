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
"""Pictures uint8 [B, C, h, w] on any device -> logits [B, K, h', w'], h' and w' 2 * margin less."""

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
    batch_size: int = 4
    """Pictures of one size, or tiles of them, that a forward pass sees at once. On a CPU 1 is as
    fast as any other number, and takes the least memory."""
    tta: bool = False
    """Average the probabilities of each tile and its mirror images, left-right, up-down and both:
    four times the work."""

    def __post_init__(self) -> None:
        if self.tile < 16:
            raise ValueError(f"tile must be at least 16 pixels, got {self.tile}")
        if not 0 <= self.overlap <= 0.75:
            raise ValueError(f"overlap must be in [0, 0.75], got {self.overlap}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, slots=True)
class Block:
    """A finished part of one picture."""

    picture: int
    """Which of the pictures."""
    rows: slice
    columns: slice
    probability: Tensor
    """Of each class, float32 [K, rows, columns], on the device of the logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskRule:
    """What is made of class probabilities."""

    threshold: float | None = None
    """Of two classes: the second wherever its probability is at least this. None: the likelier."""
    min_confidence: float = 0.0
    """Pixels whose chosen class is less probable are unsure."""
    keep: torch.dtype | None = None
    """float16: the probabilities of all classes are kept. uint16: those of all but the first, as
    round(65535 p). None: they are not."""


@dataclass(frozen=True, slots=True)
class Masks:
    """What is predicted for pictures of one size, on the device of the logits."""

    classes: Tensor
    """uint8 [B, H, W]."""
    confidence: Tensor
    """Mean over each picture of the probability of the chosen class, float64 [B] (float32 on
    Apple's GPUs, which know no other)."""
    unsure: Tensor | None
    """bool [B, H, W]; None where no confidence is asked for."""
    probabilities: Tensor | None
    """[B, K, H, W] (all classes) or [B, K - 1, H, W] (all but the first) of the dtype that is kept,
    on the CPU; None where none is."""


def predict_mask(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    *,
    margin: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """The likeliest classes of pictures of one size; the arguments of `predict_masks`.

    Returns:
        `Masks.classes` and `Masks.confidence`.
    """
    found = predict_masks(forward, images, config, MaskRule(), margin=margin, multiple=multiple)
    return found.classes, found.confidence


def predict_masks(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    rule: MaskRule,
    *,
    margin: int = 0,
    multiple: int = 1,
) -> Masks:
    """Class indices of pictures of one size, and what `rule` asks for.

    Beside model and pictures, memory holds the result and what `predict_blocks` says.

    Args:
        forward: uint8 pictures [B, C, h, w] -> logits [B, K, h - 2 margin, w - 2 margin].
        images: uint8 [B, C, H, W], or a list of [C, H, W]; H and W from 1 up.
        config: tile, overlap, batch size, mirrors.
        rule: how classes are chosen, and what is kept beside them.
        margin: pixels that the network loses on each side: `UNetConfig.margin`.
        multiple: 2^depth; of no account without a margin.
    """
    height, width = images[0].shape[-2:]
    shape = (len(images), height, width)
    classes = total = unsure = kept = None
    for block in predict_blocks(forward, images, config, margin=margin, multiple=multiple):
        best, index = choose(block.probability, rule.threshold)
        if classes is None or total is None:
            classes = index.new_empty(shape, dtype=torch.uint8)
            # Apple's GPUs have no float64.
            wide = torch.float32 if best.device.type == "mps" else torch.float64
            total = best.new_zeros(len(images), dtype=wide)
            if rule.min_confidence > 0:
                unsure = index.new_empty(shape, dtype=torch.bool)
        classes[block.picture, block.rows, block.columns] = index
        # Rows first: a sum of float32 in float64 takes several times as long on a CPU.
        total[block.picture] += best.sum(dim=1).sum(dtype=total.dtype)
        if unsure is not None:
            unsure[block.picture, block.rows, block.columns] = best < rule.min_confidence
        if rule.keep is not None:
            part = compact(block.probability, rule.keep)
            if kept is None:
                kept = torch.empty((len(images), len(part), height, width), dtype=rule.keep)
            kept[block.picture, :, block.rows, block.columns] = part
        # Else its batch of probabilities would live on through the next forward pass.
        del block
    assert classes is not None
    assert total is not None
    return Masks(classes, total / (height * width), unsure, kept)


def choose(probability: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """The chosen class [h, w] of probabilities [K, h, w], and before it how probable it is."""
    if threshold is not None:
        first, second = probability
        chosen = second >= threshold
        return torch.where(chosen, second, first), chosen
    if probability.device.type != "cpu":
        return probability.max(dim=0)
    # On a CPU a maximum that keeps its index is not vectorised: it takes 3 to 8 times as long.
    best = probability[0].clone()
    index = torch.zeros_like(best, dtype=torch.uint8)
    for number, other in enumerate(probability[1:], start=1):
        higher = (other > best).view(torch.uint8).mul_(number)
        torch.maximum(index, higher, out=index)
        torch.maximum(best, other, out=best)
    return best, index


def compact(probability: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities float32 [K, h, w] as they are kept: see `MaskRule.keep`; on the CPU."""
    if dtype == torch.float16:
        return probability.half().cpu()
    # Sums of weighted tiles may exceed 1 by a rounding. Few devices know uint16.
    return (probability[1:] * 65535).round().clamp(max=65535).int().cpu()


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
    rows, columns = (
        cut_exactly(length, config.tile, margin, multiple)
        if margin
        else cut_evenly(length, config.tile, config.overlap, symmetric=config.tta)
        for length in images[0].shape[-2:]
    )
    blend = Blend(rows, columns) if not margin and len(rows) * len(columns) > 1 else None
    places = [*product(range(len(images)), range(len(rows)), range(len(columns)))]
    for first in range(0, len(places), config.batch_size):
        some = places[first : first + config.batch_size]
        tiles = torch.stack([read_tile(images[n], rows, columns, i, j) for n, i, j in some])
        probability = average(forward, tiles, config.tta)
        for place, (n, i, j) in enumerate(some):
            if blend is not None:
                blend.add(probability[place], i, j)
            down, right = rows.finished(i), columns.finished(j)
            height, width = down.stop - down.start, right.stop - right.start
            yield Block(n, down, right, probability[place, :, :height, :width])
        # Else two batches of them would be in memory while the next is predicted.
        del probability


@torch.no_grad()
def average(forward: Forward, tiles: Tensor, tta: bool) -> Tensor:
    """Class probabilities float32 [B, K, h', w'] of tiles uint8 [B, C, h, w]."""
    probability = forward(tiles).softmax(dim=1, dtype=torch.float32)
    if tta:
        for dims in MIRRORS:
            mirrored = forward(tiles.flip(dims)).softmax(dim=1, dtype=torch.float32)
            probability += mirrored.flip(dims)
            del mirrored
        probability /= 1 + len(MIRRORS)
    return probability


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
