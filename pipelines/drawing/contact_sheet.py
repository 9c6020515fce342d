"""Many images with their masks on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw

from pipelines.drawing.overlay import draw_overlay
from shards.sample import Palette, Uint8

CELL = 200
"""Side of a cell of a contact sheet in pixels."""
COLUMNS = 6
CAPTION = 16
"""Height of a line of text in pixels."""
INK, PAPER = (230, 230, 230), (24, 24, 24)


@dataclass(frozen=True, slots=True)
class Cell:
    """One image on a contact sheet."""

    caption: str
    image: Image.Image
    """Mode RGB."""
    mask: Uint8 | None
    """Class indices [H, W]."""


def draw_contact_sheet(
    cells: Sequence[Cell], palette: Palette, legend: Sequence[str]
) -> Image.Image:
    """Draw images with their masks in a grid, and a legend below.

    Args:
        cells: at least one.
        palette: RGB colour of each class.
        legend: a line for each class, optionally one more for ignored pixels.
    """
    columns = max(2, min(COLUMNS, len(cells)))
    drawn = [draw_thumbnail(cell, palette) for cell in cells]
    rows = [
        range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)
    ]
    heights = [max(drawn[number].height for number in row) + CAPTION + 4 for row in rows]
    legend_top = sum(heights) + CAPTION // 2
    height = legend_top + -(-len(legend) // columns) * CAPTION
    sheet = Image.new("RGB", (columns * CELL, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, accumulate(heights, initial=0), strict=False):
        for column, number in enumerate(row):
            sheet.paste(drawn[number], (column * CELL + 2, top + 2))
            caption = draw_text(cells[number].caption, CELL - 3)
            sheet.paste(caption, (column * CELL + 3, top + 3 + drawn[number].height))
    for number, line in enumerate(legend):
        left, top = number % columns * CELL + 3, legend_top + number // columns * CAPTION
        swatch = palette[number] if number < len(palette) else (128, 128, 128)
        draw.rectangle((left, top, left + 12, top + 12), fill=swatch, outline=INK)
        sheet.paste(draw_text(line, CELL - 21), (left + 18, top))
    return sheet


def draw_thumbnail(cell: Cell, palette: Palette) -> Image.Image:
    """Draw the image of a cell with its mask, scaled down to fit."""
    factor = min(1.0, (CELL - 4) / max(cell.image.size))
    size = (max(1, round(cell.image.width * factor)), max(1, round(cell.image.height * factor)))
    small = cell.image.resize(size, Image.Resampling.BOX)
    if cell.mask is None:
        return small
    mask = np.asarray(Image.fromarray(cell.mask).resize(size, Image.Resampling.NEAREST))
    return draw_overlay(np.asarray(small), mask, palette)


def draw_text(text: str, width: int) -> Image.Image:
    """Draw a line of text, clipped to `width` pixels."""
    line = Image.new("RGB", (width, CAPTION), PAPER)
    ImageDraw.Draw(line).text((0, 0), shorten(text), fill=INK)
    return line


def shorten(caption: str, max_length: int = CELL // 7) -> str:
    """Keep the end of a long caption, in characters that the built-in font has."""
    text = caption if len(caption) <= max_length else "..." + caption[-max_length + 3 :]
    return text.encode("latin-1", "replace").decode("latin-1")
