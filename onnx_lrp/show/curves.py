"""Lines over a common axis, such as perturbation curves of several methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from onnx_lrp.errors import InputError
from onnx_lrp.show import canvas
from onnx_lrp.show.charts import round_ticks

if TYPE_CHECKING:
    from PIL import Image

# Told apart by those who see few colours (Okabe and Ito 2008); after eight they come again.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
_FINE = 3  # lines are drawn this many times larger and shrunk, since Pillow draws them jagged


def curves(
    lines: Mapping[str, ArrayLike],
    places: ArrayLike,
    heading: str = "",
    axis_label: str = "",
    *,
    dashed: str = "",
    notes: Mapping[str, str] | None = None,
    width: int = 720,
    height: int = 420,
) -> Image.Image:
    """A line per name, with a legend below.

    Args:
        lines: values of each, (S,).
        places: where on the axis they stand, (S,), increasing.
        heading: a line above.
        axis_label: what the axis is.
        dashed: name of the line that is merely to compare with.
        notes: what the legend says behind a name, such as an area.
        width: of the figure in pixels.
        height: of the plot in pixels.

    Raises:
        InputError: no line, lengths that differ, NaN or infinity.
    """
    from PIL import Image, ImageDraw

    x, ys = np.asarray(places, np.float64), {name: np.asarray(y, np.float64) for name, y in lines.items()}
    if not ys or x.ndim != 1 or any(y.shape != x.shape for y in ys.values()):
        raise InputError(
            f"curves wants lines of the length of their places {x.shape}, got {[*map(np.shape, ys.values())]}"
        )
    whole = np.concatenate([x, *ys.values()])
    if not np.isfinite(whole).all():
        raise InputError("a curve holds NaN or infinity; look at the scores")
    size, margin, row = 13, 24, 22
    low, high = min(y.min() for y in ys.values()), max(y.max() for y in ys.values())
    pad = 0.05 * (high - low) or max(abs(high), 1.0) * 0.5
    low, high = low - pad, high + pad
    levels, steps = round_ticks(low, high, 5), round_ticks(x[0], x[-1], 5)
    left = margin + 8 + max(canvas.text_width(f"{t:.10g}", size) for t in levels)
    top, right = margin + canvas.heading_height(heading, 20), width - margin
    bottom = top + height
    sheet, draw = canvas.paper(width, bottom + 52 + row * len(ys) + margin // 2)
    canvas.write(draw, margin, margin + 16, canvas.fit(heading, 20, width - 2 * margin), 20)
    plot = Image.new("RGB", ((right - left) * _FINE, height * _FINE), canvas.PAPER)
    pen = ImageDraw.Draw(plot)
    across, along = (x - x[0]) / (x[-1] - x[0] or 1) * plot.width, plot.height / (high - low)
    for level in levels:
        y = (high - level) * along
        pen.line((0, y, plot.width, y), fill=canvas.FAINT, width=_FINE)
    inks = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(ys)} | {dashed: canvas.SOFT}
    for name, values in ys.items():
        points = list(zip(across.tolist(), ((high - values) * along).tolist(), strict=True))
        _line(pen, points, inks[name], dashed=name == dashed)
    canvas.place(sheet, plot.reduce(_FINE), left, top)
    for level in levels:
        canvas.write(draw, left - 8, top + (high - level) * along / _FINE, f"{level:.10g}", size, canvas.SOFT, "rm")
    for step in steps:
        at = left + (step - x[0]) / (x[-1] - x[0] or 1) * (right - left)
        canvas.write(draw, at, bottom + 6 + size, f"{step:.10g}", size, canvas.SOFT, "ms")
    canvas.write(draw, (left + right) / 2, bottom + 38, axis_label, size, canvas.SOFT, "ms")
    for index, name in enumerate(ys):
        y = bottom + 52 + row * (index + 0.5)
        _line(draw, [(left, y), (left + 28, y)], inks[name], dashed=name == dashed, fine=1)
        text = canvas.fit(name, size, right - left - 200)
        canvas.write(draw, left + 38, y, text, size, anchor="lm")
        canvas.write(draw, right, y, (notes or {}).get(name, ""), size, canvas.SOFT, "rm")
    return sheet


def _line(pen: object, points: list[tuple[float, float]], colour: str, *, dashed: bool, fine: int = _FINE) -> None:
    """A line through points, whole or in dashes of equal length."""
    from PIL import ImageDraw

    assert isinstance(pen, ImageDraw.ImageDraw)
    if not dashed:
        pen.line(points, fill=colour, width=2 * fine, joint="curve")
        return
    ends = np.array(points)
    lengths = np.concatenate([[0], np.hypot(*np.diff(ends, axis=0).T).cumsum()])
    starts = np.arange(0, lengths[-1], 10 * fine)
    for start in starts:
        inner = lengths[(lengths > start) & (lengths < start + 6 * fine)]
        at = np.array([start, *inner, min(start + 6 * fine, lengths[-1])])
        dash = [(float(np.interp(a, lengths, ends[:, 0])), float(np.interp(a, lengths, ends[:, 1]))) for a in at]
        pen.line(dash, fill=colour, width=2 * fine, joint="curve")
