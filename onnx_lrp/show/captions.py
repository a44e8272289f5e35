"""Captions explained: a row of heat maps over the words of a caption, and the words before as a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.show import canvas, colormaps
from onnx_lrp.show.figure import stack
from onnx_lrp.show.heatmap import DEFAULT, normalize, overlay, reduce_channels

if TYPE_CHECKING:
    from PIL import Image

    from onnx_lrp.captions import CaptionExplanation

GAMMA = 0.7  # of the pictures in Sun et al. 2022: what is faint is seen, too
_REACH = 0.72  # the strongest cell of a matrix: its number stays readable
_MARGIN, _SIZE = 24, 14


def caption_figure(
    explanations: Sequence[CaptionExplanation],
    titles: Sequence[str] = (),
    *,
    picture: NDArray[np.uint8] | None = None,
    heading: str = "",
    attention: bool = True,
    gamma: float = GAMMA,
    colormap: str = DEFAULT,
    cell: int = 120,
) -> Image.Image:
    """The picture of a caption: heat maps of every word, and what each word owes to the words before it.

    Args:
        explanations: of one caption by one or more methods, a row of maps each; the first has the matrix, too.
        titles: of the rows; default: the methods.
        picture: what the model saw, uint8 (H, W, 3); default: the input, stretched to 0..255.
        heading: a line above; default: the caption and the probability of its least likely word.
        attention: draw the model's own attention below, where it tells.
        gamma: power that magnitudes on the maps are raised to, after the division by the largest.
        colormap: a name in colormaps.NAMES.
        cell: side of a map in pixels.

    Raises:
        InputError: no explanation, or several captions.
    """
    if not explanations or len({e.words for e in explanations}) != 1:
        raise InputError("a figure is of one caption; give one or more explanations of the same words")
    first = explanations[0]
    seen = _stretched(first.image) if picture is None else picture
    names = [canvas.at(titles, i) or e.method for i, e in enumerate(explanations)]
    rows: dict[str, NDArray[Any]] = {name: e.images for name, e in zip(names, explanations, strict=True)}
    if attention and first.attention is not None:
        rows["attention"] = first.attention
    said = [f"{word} {100 * p:.0f}%" for word, p in zip(first.words, first.probability, strict=True)]
    figure = caption_grid(seen, said, rows, heading or " ".join(first.words), gamma=gamma, colormap=colormap, cell=cell)
    if first.texts is None:
        return figure
    sums = {"picture": first.images.reshape(len(first), -1).sum(1)}
    sums |= {} if first.absorbed is None else {"biases": first.absorbed, "= logit": first.score}
    title = f"Relevance of the words before (columns) for each word (rows), by {names[0]}"
    return stack([figure, word_matrix(first.texts, first.before, first.words, sums, title, colormap=colormap)])


def caption_grid(
    picture: NDArray[np.uint8],
    words: Sequence[str],
    rows: Mapping[str, NDArray[Any]],
    heading: str = "",
    *,
    gamma: float = GAMMA,
    colormap: str = DEFAULT,
    cell: int = 120,
) -> Image.Image:
    """Heat maps laid over a picture: a column per word, a row per method, each map on its own scale.

    Args:
        picture: what the model saw, uint8 (H, W, 3).
        words: one per column.
        rows: maps (T, C, h, w) or (T, h, w) by the name of the method.
        heading: a line above all.
        gamma: see `caption_figure`.
        colormap: a name in colormaps.NAMES.
        cell: side of a map in pixels.

    Raises:
        InputError: no maps, or not one per word.
    """
    for name, maps in rows.items():
        if len(maps) != len(words) or not len(words):
            raise InputError(f"{name}: {len(maps)} maps for {len(words)} words; give one per word")
    if not rows:
        raise InputError("a grid needs one row of maps at least")
    gap, left = 8, _MARGIN + cell + 16
    above = _MARGIN + canvas.heading_height(heading, 20) + round(1.8 * _SIZE)
    tall, broad = (_fitted(canvas.to_image(picture), cell).size)[::-1]
    width, height = left + len(words) * (cell + gap) - gap + _MARGIN, above + len(rows) * (tall + gap) + 34
    sheet, draw = canvas.paper(width, height)
    canvas.write(draw, _MARGIN, _MARGIN + 16, canvas.fit(heading, 20, width - 2 * _MARGIN), 20)
    for column, word in enumerate(words):
        x = left + column * (cell + gap) + cell / 2
        canvas.write(draw, x, above - 0.6 * _SIZE, canvas.fit(word, _SIZE, cell), _SIZE, anchor="ms")
    y = above
    for index, (name, maps) in enumerate(rows.items()):
        label, at = canvas.fit(name.replace("_", " "), _SIZE, cell), y + tall / 2
        if index == 0:  # the picture stands there, its name above and the method's below it
            seen = _fitted(canvas.to_image(picture), cell - 24)
            canvas.place(sheet, seen, left - 16 - seen.width, y)
            canvas.write(draw, left - 16, above - 0.6 * _SIZE, "input", _SIZE, canvas.SOFT, "rs")
            at = y + tall - 7
        canvas.write(draw, left - 14, at, label, _SIZE, canvas.SOFT, "rm")
        for column, relevance in enumerate(maps):
            strong = normalize(reduce_channels(relevance), None)
            over = overlay(picture, np.sign(strong) * np.abs(strong) ** gamma, colormap, percentile=None)
            canvas.place(sheet, _fitted(over, cell), left + column * (cell + gap) + (cell - broad) // 2, y)
        y += tall + gap
    bar = left + (len(words) - 1) * (cell + gap)
    canvas.color_bar(sheet, (bar, y + 2, bar + cell, y + 10), colormap, 12)
    return sheet


def word_matrix(
    relevance: ArrayLike,
    columns: Sequence[str],
    rows: Sequence[str],
    sums: Mapping[str, ArrayLike] | None = None,
    heading: str = "",
    *,
    colormap: str = DEFAULT,
) -> Image.Image:
    """Words by words: what each word (row) owes to the words before it (columns), with numbers.

    Every row has its own scale, symmetric about zero: full colour is its largest magnitude. What stands right of the
    diagonal was not read yet, and stays empty.

    Args:
        relevance: (T, S); row t is of word t.
        columns: the words before, (S,).
        rows: the explained words, (T,).
        sums: further numbers of each row, (T,) by name: of the picture, of biases.
        heading: a line above.
        colormap: a name in colormaps.NAMES.

    Raises:
        InputError: lengths that differ, NaN or infinity.
    """
    array, sums = np.asarray(relevance, np.float64), {} if sums is None else sums
    if array.shape != (len(rows), len(columns)) or not len(rows):
        raise InputError(f"a matrix of {len(rows)} words by {len(columns)} is ({len(rows)}, {len(columns)}), not "
                         f"{array.shape}")  # fmt: skip
    strong = np.stack([normalize(row, None) for row in np.tril(array)])
    wide = max(46, *(canvas.text_width(word, _SIZE) + 10 for word in (*columns, *sums)))
    tall, left = 28, _MARGIN + max(canvas.text_width(word, _SIZE) for word in rows) + 12
    above = _MARGIN + canvas.heading_height(heading, 16) + round(1.8 * _SIZE)
    right = left + len(columns) * wide + 14
    width = max(right + len(sums) * wide, _MARGIN + canvas.text_width(heading, 16)) + _MARGIN
    sheet, draw = canvas.paper(width, above + len(rows) * tall + 20)
    canvas.write(draw, _MARGIN, _MARGIN + 14, heading, 16)
    places = [left + column * wide for column in range(len(columns))]
    ends = [right + column * wide for column in range(len(sums))]
    for x, word in zip((*places, *ends), (*columns, *sums), strict=True):
        canvas.write(draw, x + wide / 2, above - 0.6 * _SIZE, word, _SIZE, canvas.SOFT, "ms")
    colors = colormaps.apply(_REACH * strong, colormap)
    for t, word in enumerate(rows):
        y = above + t * tall
        canvas.write(draw, left - 10, y + tall / 2, word, _SIZE, anchor="rm")
        for column, x in enumerate(places[: t + 1]):
            color = tuple(int(part) for part in colors[t, column])
            draw.rectangle((x, y, x + wide - 3, y + tall - 3), fill=color, outline=canvas.FAINT)
            ink = canvas.PAPER if np.dot(color, (0.299, 0.587, 0.114)) < 140 else canvas.INK
            canvas.write(draw, x + wide / 2 - 1, y + tall / 2 - 1, _number(array[t, column]), 13, ink, "mm")
        for x, values in zip(ends, sums.values(), strict=True):
            canvas.write(draw, x + wide / 2, y + tall / 2 - 1, _number(float(np.asarray(values)[t])), 13, anchor="mm")
    return sheet


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """The image inside of a square, small ones with sharp pixels."""
    from PIL import Image, ImageOps

    near = Image.Resampling.NEAREST if max(image.size) < cell else Image.Resampling.BILINEAR
    return ImageOps.contain(image, (cell, cell), near)


def _stretched(image: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) from an input (C, H, W) of 1 or 3 channels, its range stretched to 0..255.

    Raises:
        InputError: it is no picture.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"the model was fed {image.shape}, which is no picture; give the one it was made from")
    pixels = np.moveaxis(image.astype(np.float64), 0, -1)
    low, high = pixels.min(), pixels.max()
    scaled = np.rint((pixels - low) / ((high - low) or 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(scaled, (*scaled.shape[:2], 3)))
