"""Words of a text on coloured ground as a picture, to stand beside pictures; for texts alone there are pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from onnx_lrp.errors import InputError
from onnx_lrp.show import canvas
from onnx_lrp.show.heatmap import normalize
from onnx_lrp.show.text import colours, number

if TYPE_CHECKING:
    from PIL import Image


def words_picture(
    words: Sequence[str],
    relevance: ArrayLike,
    heading: str = "",
    *,
    scale: float | None = None,
    numbers: bool = True,
    width: int = 720,
) -> Image.Image:
    """Words in their order, red for what is explained and blue against it, in as many lines as they need.

    Args:
        words: what they say.
        relevance: one number per word.
        heading: a line above.
        scale: what full colour stands for; default: the largest magnitude among these words.
        numbers: write each below its word.
        width: of the figure in pixels.

    Raises:
        InputError: lengths that differ, no words, NaN or infinity, a scale not above zero.
    """
    values = np.asarray(relevance, np.float64).reshape(-1)
    if len(values) != len(words) or not len(words):
        raise InputError(f"{len(words)} words and {len(values)} relevances do not belong together")
    back, white = colours(normalize(values, None, scale))
    margin, gap, size, small = 24, 6, 20, 13
    tall = 34 + (20 if numbers else 0)
    below = [number(float(f"{value:.3g}")) if numbers else "" for value in values]
    widths = [
        max(canvas.text_width(word, size) + 16, canvas.text_width(n, small))
        for word, n in zip(words, below, strict=True)
    ]
    above = margin + canvas.heading_height(heading, 20)
    places, x, y = [], margin, above
    for wide in widths:
        if x > margin and x + wide > width - margin:
            x, y = margin, y + tall + gap
        places.append((x, y))
        x += wide + gap
    sheet, draw = canvas.paper(width, y + tall + margin // 2)
    canvas.write(draw, margin, margin + 16, canvas.fit(heading, 20, width - 2 * margin), 20)
    for i, ((left, top), wide) in enumerate(zip(places, widths, strict=True)):
        colour = "#{:02x}{:02x}{:02x}".format(*back[i])
        draw.rounded_rectangle((left, top, left + wide, top + 30), 5, fill=colour)
        middle = left + wide / 2
        canvas.write(draw, middle, top + 15, words[i], size, "#ffffff" if white[i] else "#000000", "mm")
        canvas.write(draw, middle, top + 46, below[i], small, canvas.SOFT, "ms")
    return sheet
