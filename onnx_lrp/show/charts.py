"""Relevance of inputs that are no pictures: series in time, and tables of named features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.show import canvas, colormaps
from onnx_lrp.show.heatmap import DEFAULT, PERCENTILE, normalize

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_FINE = 3  # lines are drawn this many times larger and shrunk, since Pillow draws them jagged
_REACH = 0.62  # behind a line, colours stay light enough (or dark enough) for the line to be seen
_STRONG = 0.72  # bars: the colour of a plain red or blue


def series(
    values: ArrayLike,
    relevance: ArrayLike,
    heading: str = "",
    names: Sequence[str] = (),
    axis_label: str = "",
    colormap: str = DEFAULT,
    *,
    percentile: float | None = PERCENTILE,
    width: int = 900,
) -> Image.Image:
    """A line per channel, on a background coloured by relevance.

    Where there are more steps than pixels, a pixel column shows the sum of its steps' relevance and the range of
    their values.

    Args:
        values: (T,), (C, T) or (T, C): the longer axis is time; also with a batch axis of 1 in front.
        relevance: the same shape.
        heading: a line above.
        names: one per channel.
        axis_label: what the steps are, such as "day" or "ms".
        colormap: a name in colormaps.NAMES.
        percentile: see `heatmap.normalize`; all channels share one scale.
        width: of the figure in pixels.

    Raises:
        InputError: shapes that differ or are no series, NaN or infinity.
    """
    lines, heat = _channels(values), _channels(relevance)
    if lines.shape != heat.shape:
        raise InputError(f"values {np.shape(values)} and relevance {np.shape(relevance)} must have one shape")
    if not np.isfinite(lines).all():
        raise InputError("the series holds NaN or infinity")
    margin, size, gap = 24, 13, 18
    tall = 170 if len(lines) == 1 else max(48, min(110, 660 // len(lines)))
    limits = [_limits(line) for line in lines]
    ticks = [round_ticks(*pair, 4 if tall > 60 else 2) for pair in limits]
    left = margin + 8 + max(canvas.text_width(f"{t:.10g}", size) for row in ticks for t in row)
    right = width - margin
    above = margin + canvas.heading_height(heading, 20)
    title = round(size * 1.6) if any(names) else 0
    bottom = above + len(lines) * (tall + title + gap) - gap
    sheet, draw = canvas.paper(width, bottom + 74)
    canvas.write(draw, margin, margin + 16, canvas.fit(heading, 20, width - 2 * margin), 20)
    heat = normalize(_columns(heat, right - left), percentile)
    y = above
    for index, line in enumerate(lines):
        canvas.write(draw, left, y + size, canvas.fit(canvas.at(names, index), size, right - left), size, canvas.SOFT)
        y += title
        low, high = limits[index]
        canvas.place(sheet, _strip(line, (low, high), heat[index], (right - left, tall), colormap), left, y)
        for tick in ticks[index]:
            at = y + tall * (high - tick) / (high - low)
            draw.line((left - 5, at, left - 2, at), fill=canvas.SOFT)
            canvas.write(draw, left - 8, at, f"{tick:.10g}", size, canvas.SOFT, "rm")
        y += tall + gap
    _time_axis(draw, lines.shape[1], left, right, bottom, size, axis_label)
    canvas.color_bar(sheet, (right - 240, bottom + 38, right, bottom + 46), colormap, size, _REACH)
    return sheet


def bars(
    names: Sequence[str],
    relevance: ArrayLike,
    values: Sequence[object] = (),
    heading: str = "",
    colormap: str = DEFAULT,
    *,
    top: int = 20,
    width: int = 720,
) -> Image.Image:
    """Horizontal bars, the largest |relevance| first; what does not fit is one bar with the sum of the others.

    Args:
        names: one per feature.
        relevance: (F,), also with a batch axis of 1 in front.
        values: of the features, shown beside their names; may be left out.
        heading: a line above.
        colormap: a name in colormaps.NAMES with two sides.
        top: at most so many features.
        width: of the figure in pixels.

    Raises:
        InputError: lengths that differ, NaN or infinity, a colour map for non-negative values.
    """
    array = np.asarray(relevance, np.float64).reshape(-1)
    if len(array) != len(names) or (len(values) and len(values) != len(names)) or not len(array):
        raise InputError(f"{len(names)} names, {len(values)} values and {len(array)} relevances do not belong together")
    if colormaps.is_sequential(colormap):
        raise InputError(f"colour map {colormap!r} has no colour for what speaks against; give {DEFAULT}")
    normalize(array)  # for its check: NaN has no length
    order = np.argsort(-np.abs(array), kind="stable")
    rows = [(f"{names[i]} = {_short(values[i])}" if len(values) else str(names[i]), array[i]) for i in order[:top]]
    if len(order) > top:
        rows.append((f"{len(order) - top} others", array[order[top:]].sum()))
    margin, size, step = 24, 14, 26
    numbers = [f"{value:+.3g}" for _, value in rows]
    label = min(max(canvas.text_width(name, size) for name, _ in rows), round(width * 0.4))
    room = max(canvas.text_width(number, size) for number in numbers) + 8
    lengths = np.array([value for _, value in rows])
    low, high = min(0.0, float(lengths.min())), max(0.0, float(lengths.max()))
    start = margin + label + 14 + (room if low < 0 else 0)
    span = width - margin - (room if high > 0 else 0) - start
    zero = round(start + span * -low / ((high - low) or 1))
    above = margin + canvas.heading_height(heading, 20)
    sheet, draw = canvas.paper(width, above + step * len(rows) + 44)
    canvas.write(draw, margin, margin + 16, canvas.fit(heading, 20, width - 2 * margin), 20)
    against, favour = ("#{:02x}{:02x}{:02x}".format(*colormaps.apply(side * _STRONG, colormap)) for side in (-1, 1))
    for index, (name, value) in enumerate(rows):
        middle = above + step * (index + 0.5)
        end = zero + span * value / ((high - low) or 1)
        canvas.write(draw, margin + label, middle, canvas.fit(name, size, label), size, anchor="rm")
        if end >= zero + 1:
            draw.rectangle((zero + 1, middle - 8, round(end), middle + 8), fill=favour)
        elif end <= zero - 1:
            draw.rectangle((round(end), middle - 8, zero - 1, middle + 8), fill=against)
        side, anchor = (8, "lm") if value >= 0 else (-8, "rm")
        canvas.write(draw, end + side, middle, numbers[index], size, canvas.SOFT, anchor)
    foot = above + step * len(rows)
    draw.line((zero, above, zero, foot), fill=canvas.SOFT)
    for text, side, anchor in (("against", -10, "rs"), ("0", 0, "ms"), ("for", 10, "ls")):
        canvas.write(draw, zero + side, foot + 18, text, 13, canvas.SOFT, anchor)
    return sheet


def _channels(data: ArrayLike) -> NDArray[np.float64]:
    """(C, T)."""
    array = np.asarray(data, np.float64)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or not array.size:
        raise InputError(f"a series must have shape (T,), (C,T) or (T,C), this is {np.shape(data)}")
    return array if array.shape[1] >= array.shape[0] else array.T


def _columns(heat: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """(C, T) as it is, or summed to (C, width) where there are more steps than pixels."""
    if heat.shape[1] <= width:
        return heat
    return np.asarray(np.add.reduceat(heat, np.arange(width) * heat.shape[1] // width, axis=1))


def _limits(line: NDArray[np.float64]) -> tuple[float, float]:
    """The values at a strip's lower and upper edge, with some air; a constant line runs in the middle."""
    low, high = float(line.min()), float(line.max())
    pad = 0.08 * (high - low) or max(abs(low), 1.0) * 0.5
    return low - pad, high + pad


def _strip(
    line: NDArray[np.float64],
    limits: tuple[float, float],
    heat: NDArray[np.float64],
    size: tuple[int, int],
    colormap: str,
) -> Image.Image:
    """One channel's picture of `size` (width, height)."""
    from PIL import Image, ImageDraw

    (width, tall), (low, high) = size, limits
    steps = np.arange(width * _FINE) * len(heat) // (width * _FINE)
    back = colormaps.apply(heat[steps] * _REACH, colormap)
    strip = Image.fromarray(np.repeat(back[None], tall * _FINE, axis=0))
    pen = ImageDraw.Draw(strip)
    ink = "#ffffff" if colormaps.is_dark(colormap) else canvas.INK
    heights = (high - line) / (high - low) * tall * _FINE
    if len(line) > width:  # more steps than pixels: a stroke from the least to the greatest value of each column
        edges = np.arange(width) * len(line) // width
        tops, ends = np.minimum.reduceat(heights, edges), np.maximum.reduceat(heights, edges)
        for x, (y0, y1) in enumerate(zip(tops, ends, strict=True)):
            pen.rectangle((x * _FINE, y0 - 1, (x + 1) * _FINE - 1, y1 + 1), fill=ink)
    else:
        places = (np.arange(len(line)) + 0.5) * width * _FINE / len(line)
        points = list(zip(places.tolist(), heights.tolist(), strict=True))
        pen.line(points, fill=ink, width=2 * _FINE, joint="curve")
        radius = 3.2 * _FINE if len(line) * 12 <= width else 0.0
        for x, y in points if radius else ():
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    return strip.reduce(_FINE)


def _time_axis(
    draw: ImageDraw.ImageDraw, steps: int, left: int, right: int, bottom: int, size: float, axis_label: str
) -> None:
    """Step numbers, counted from 0, below the middle of their columns."""
    for tick in round_ticks(0, steps - 1, 8):
        if tick == int(tick):
            x = left + (tick + 0.5) * (right - left) / steps
            draw.line((x, bottom + 2, x, bottom + 5), fill=canvas.SOFT)
            canvas.write(draw, x, bottom + 8 + size, f"{int(tick)}", size, canvas.SOFT, "ms")
    canvas.write(draw, left, bottom + 46, canvas.fit(axis_label, size, right - left - 260), size, canvas.SOFT)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in low..high, at most `count` + 1 of them, and at least one."""
    if not 1e-300 < high - low < 1e300:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [k * step for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)] or [low]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
