"""Folders of small images, annotations beside them, and the masks that come out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.annotations.rule import AnnotationRule
from shards.annotations.scan import read_spans
from shards.annotations.source import Annotated, AnnotationSource, find_annotated

WIDTH, HEIGHT = 12, 8


class Workplace:
    """A folder of images and annotations."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, root / "images"

    def add_images(self, *names: str, size=(WIDTH, HEIGHT)) -> None:
        for number, name in enumerate(names):
            path = self.images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (number, 9, 9)).save(path)

    def write(self, name: str, content) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text)
        return path

    def find(self, path: Path, kind: str, **settings) -> Annotated:
        source = AnnotationSource(path=path, kind=kind, images=self.images, **settings)
        return find_annotated([source], [None])

    def draw(self, path: Path, kind: str, **settings) -> dict[str, np.ndarray]:
        """Return {source: mask [H, W]} of all pairs, as a packing worker draws them."""
        found = self.find(path, kind, **settings)
        assert not found.pairing.refused, found.pairing.refused
        return {
            pair.source: self.read(found.rule, found, pair).class_map.index
            for pair in found.pairing.pairs
        }

    def read(self, rule: AnnotationRule, found: Annotated, pair):
        data = None
        if pair.mask is not None:
            path = found.pairing.masks / pair.mask
            with path.open("rb") as file:
                data = read_spans(file, pair.spans)
            if pair.segments is not None:
                data += (found.pairing.masks / pair.segments).read_bytes()
        with Image.open(self.images / pair.source) as image:
            return rule.read_mask(data, image.size, f"{pair.mask} ({pair.source})")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def box(x, y, u, v, value=1, *, into=None):
    """Return a mask with a rectangle of pixels [x, u) x [y, v)."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8) if into is None else into.copy()
    mask[y:v, x:u] = value
    return mask
