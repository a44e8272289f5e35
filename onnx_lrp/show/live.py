"""A frame of a running explanation: what the model sees, and beside it why it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from onnx_lrp.show import canvas, colormaps
from onnx_lrp.show.heatmap import blend, overlay

if TYPE_CHECKING:
    from PIL import Image

    from onnx_lrp.show.canvas import Panel

_NIGHT, _LIGHT, _DIM = "#0d1117", "#f0f3f6", "#9198a1"
_AT_LEAST = 320  # pixels of a panel's short side
_HEAT = 0.8  # of the map, where the picture shines through


def live_view(
    picture: Panel, relevance: ArrayLike, colormap: str, left: str, right: str, *, scale: float | None = None
) -> Image.Image:
    """Picture and relevance side by side, on dark, with a line below.

    Where the zero of the colour map is dark the picture shines through the map; else the map is laid over the picture
    as in `overlay`.

    Args:
        picture: what the model saw, (H, W, 3) uint8 or PIL image; small ones are enlarged.
        relevance: (C, h, w), (h, w, C) or (h, w).
        colormap: a name in colormaps.NAMES or colormaps.CHANNELS.
        left: below the picture, such as the class.
        right: below the relevance, such as the frames per second.
        scale: see `heatmap.normalize`.
    """
    from PIL import Image, ImageDraw

    dark = colormap in colormaps.CHANNELS or colormaps.is_dark(colormap)
    seen = canvas.to_image(picture)
    lit = (
        blend(seen, relevance, colormap, _HEAT, scale=scale)
        if dark
        else overlay(seen, relevance, colormap, scale=scale)
    )
    panels = [canvas.enlarge(panel, _AT_LEAST) for panel in (seen, lit)]
    width, height = panels[0].size
    size = max(16, width // 22)
    gap, foot = 2 * (size // 8), 2 * size + size % 2  # even, as videos want it
    sheet = Image.new("RGB", (2 * width + gap + gap % 2, height + height % 2 + foot), _NIGHT)
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (width + gap, 0))
    draw, line = ImageDraw.Draw(sheet), height + foot * 0.66
    canvas.write(draw, size // 2, line, canvas.fit(left, size, width - size), size, _LIGHT)
    canvas.write(draw, sheet.width - size // 2, line, right, size, _DIM, "rs")
    return sheet
