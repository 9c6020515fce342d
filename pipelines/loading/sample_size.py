"""How many images to score: a share of the work of training, estimated from pixels."""

from shards.manifest import SplitInfo

PASSES = 3
"""Work of a training step in forward passes: the backward pass takes about two."""


def choose_num_images(
    split: SplitInfo, *, trained_pixels: int, share: float, min_images: int
) -> int:
    """Choose how many images of a split to score, from sizes alone, so that it is deterministic.

    Args:
        split: the split.
        trained_pixels: pixels that training sees in the meantime, over all ranks.
        share: work of scoring in relation to that of training.
        min_images: images that are scored in any case; at least 1.

    Returns:
        The number of images, at most that of the split.
    """
    mean_pixels = sum(s.width * s.height * s.images for s in split.sizes) / split.samples
    affordable = share * PASSES * trained_pixels / mean_pixels
    return int(min(split.samples, max(min_images, affordable)))
