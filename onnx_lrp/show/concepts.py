"""A sheet of concepts: for every channel the samples in which it is most relevant, and where in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.show import canvas
from onnx_lrp.show.heatmap import DEFAULT, overlay, reduce_channels

if TYPE_CHECKING:
    from PIL import Image

_KEPT = 0.9  # of the relevance squared, so that what is faint counts little, which a window holds along each axis
_LEAST = 0.25  # of the picture's shorter side that a window has at least


@dataclass(frozen=True, eq=False)
class ConceptCell:
    """One sample: what the model saw, uint8 (H, W, 3); the conditional relevance of its pixels; a line below."""

    picture: NDArray[np.uint8]
    relevance: NDArray[Any]
    caption: str


@dataclass(frozen=True, eq=False)
class ConceptRow:
    """One channel: a line above, and its samples."""

    title: str
    cells: Sequence[ConceptCell]


def concept_sheet(
    rows: Sequence[ConceptRow], heading: str = "", colormap: str = DEFAULT, *, crop: bool = True, cell: int = 150
) -> Image.Image:
    """A block per channel: the pictures above, the relevance of the channel laid over them below.

    Args:
        rows: one per channel.
        heading: a line above all.
        colormap: a name in colormaps.NAMES.
        crop: cut out of every picture where the channel's relevance lies.
        cell: width and height of a picture on the sheet.

    Raises:
        InputError: nothing to draw.
    """
    if not rows or not all(row.cells for row in rows):
        raise InputError("a sheet of concepts needs at least one sample per channel")
    margin, gap, size = 24, 8, 13
    title, caption = round(size * 2.2), round(size * 1.7)
    columns = max(len(row.cells) for row in rows)
    tall = title + 2 * cell + 3 + caption + gap
    above = margin + canvas.heading_height(heading, 20)
    width = max(2 * margin + columns * (cell + gap) - gap, 480)
    sheet, draw = canvas.paper(width, above + tall * len(rows) + 44)
    canvas.write(draw, margin, margin + 16, canvas.fit(heading, 20, width - 2 * margin), 20)
    y = above
    for row in rows:
        canvas.write(draw, margin, y + size + 3, canvas.fit(row.title, size + 1, width - 2 * margin), size + 1)
        for column, item in enumerate(row.cells):
            x = margin + column * (cell + gap)
            for place, image in enumerate(_panels(item, colormap, crop, cell)):
                left, top = x + (cell - image.width) // 2, y + title + place * (cell + 3) + (cell - image.height) // 2
                canvas.place(sheet, image, left, top)
            line = y + title + 2 * cell + 3 + size + 3
            canvas.write(draw, x, line, canvas.fit(item.caption, size - 1, cell), size - 1, canvas.SOFT)
        y += tall
    canvas.color_bar(sheet, (width - margin - 200, y + 4, width - margin, y + 12), colormap, 12)
    return sheet


def _panels(item: ConceptCell, colormap: str, crop: bool, cell: int) -> list[Image.Image]:
    """Picture and overlay, fitted into a cell."""
    from PIL import Image, ImageOps

    picture = canvas.to_image(item.picture)
    box = window(item.relevance, (picture.height, picture.width)) if crop else (0, 0, picture.width, picture.height)
    # The whole map sets the scale, so that a window of noise does not look like a finding.
    panels = [p.crop(box) for p in (picture, overlay(picture, item.relevance, colormap))]
    near = Image.Resampling.NEAREST if max(panels[0].size) < cell // 2 else Image.Resampling.BICUBIC
    return [ImageOps.contain(p, (cell, cell), near) for p in panels]


def window(relevance: ArrayLike, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square that holds nine tenths of the squared relevance along each axis, and a margin.

    Args:
        relevance: (C, h, w), (h, w, C) or (h, w).
        size: height and width of the picture in pixels, on which the square is counted.

    Returns:
        Left, top, right, bottom; the whole picture for a map of zeros.
    """
    mass = np.square(reduce_channels(relevance))
    spans = []
    for axis, length in ((1, size[0]), (0, size[1])):
        run = np.cumsum(mass.sum(axis))
        if not run[-1]:
            return (0, 0, size[1], size[0])
        low, high = np.searchsorted(run / run[-1], [(1 - _KEPT) / 2, (1 + _KEPT) / 2])
        spans.append((low * length / len(run), (high + 1) * length / len(run)))
    side = max(high - low for low, high in spans) * 1.35
    side = round(min(max(side, _LEAST * min(size)), *size))
    starts = []
    for (low, high), length in zip(spans, size, strict=True):
        starts.append(int(min(max(round((low + high - side) / 2), 0), length - side)))
    return (starts[1], starts[0], starts[1] + side, starts[0] + side)
