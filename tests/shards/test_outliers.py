"""Files that stand out are named: in colour, in size, in their share of a class."""

import numpy as np
import pytest

from shards.documents import convert
from shards.outliers import Extremes, StoredExtremes

CLASSES = ("background", "cell")


def collect(files, order=1):
    """Merge (name, channels, size, cell pixels) of some files; returns extremes and class sums."""
    total, pixels, masks = Extremes(), [0, 0], [0, 0]
    for name, channels, size, cell in files[::order]:
        part = Extremes()
        part.add(name, channels, size)
        counts = np.zeros(256, dtype=np.int64)
        counts[:2] = size[0] * size[1] - cell, cell
        part.add_mask(name, counts)
        total.merge(Extremes.restore(convert(part.to_plain(), StoredExtremes)))
        for index in range(2):
            pixels[index] += int(counts[index])
            masks[index] += int(counts[index] > 0)
    return total, pixels, masks


def found(files):
    total, pixels, masks = collect(files)
    assert collect(files, -1)[0].to_plain() == total.to_plain()
    return [(o.name, o.reason) for o in total.find_outliers(CLASSES, pixels, masks)]


TILES = [(f"t{i:02d}.png", "L", (64, 64), 40) for i in range(30)]


def test_ordinary_files_do_not_stand_out():
    assert found(TILES) == []
    assert found([*TILES, ("u.png", "L", (80, 80), 60)]) == []
    assert found([(n, "RGB", s, c) for n, _, s, c in TILES]) == []


def test_an_overview_among_tiles_stands_out_in_every_way():
    assert found([*TILES, ("overview.png", "RGB", (640, 480), 700)]) == [
        ("overview.png", "is RGB, 30 images are grey: all become RGB"),
        ("overview.png", "is 640 x 480, no other image is larger than 64 x 64"),
        ("overview.png", "has 71.6 % of all pixels of class 'background', which 31 masks contain"),
        ("overview.png", "has 36.8 % of all pixels of class 'cell', which 31 masks contain"),
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_up_to_three_images_beyond_all_others_are_named(count):
    large = [(f"x{i}.png", "L", (300, 300), 0) for i in range(count)]
    names = [name for name, reason in found([*TILES, *large]) if "no other image" in reason]
    assert names == [name for name, *_ in large]


def test_a_rare_class_has_no_outliers():
    files = [(n, c, s, 0) for n, c, s, _ in TILES]
    assert found([*files, ("a.png", "L", (64, 64), 9), ("b.png", "L", (64, 64), 9)]) == []
