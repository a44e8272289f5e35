"""Heat maps of images: relevance arrays to colours, and figures of picture, heat map and overlay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.preprocess import require_pillow
from onnx_lrp.show import canvas, colormaps

if TYPE_CHECKING:
    from PIL import Image

    from onnx_lrp.show.canvas import Panel

    Cell = Image.Image | NDArray[Any]

DEFAULT = "diverging"
PERCENTILE = 99.5


def reduce_channels(relevance: ArrayLike, layout: str | None = None) -> NDArray[np.float64]:
    """Sum the relevance of an image over its channels.

    Args:
        relevance: (C, H, W), (H, W, C) or (H, W); also with a batch axis of 1 in front.
        layout: "CHW" or "HWC"; None: the last axis is the channels' if it alone has at most 4 entries, or if the
            first two axes are equal and the first is longer than 4; else the first is.

    Returns:
        (H, W), with the same sum.

    Raises:
        InputError: another number of axes, or an unknown layout.
    """
    return np.asarray(_channels_first(relevance, layout).sum(axis=0))


def _channels_first(relevance: ArrayLike, layout: str | None = None) -> NDArray[np.float64]:
    """The relevance of an image as (C, H, W); see `reduce_channels`."""
    array = np.asarray(relevance, np.float64)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim not in (2, 3) or not array.size:
        raise InputError(f"a heat map needs relevance of shape (C,H,W), (H,W,C) or (H,W), this is {array.shape}")
    if layout not in (None, "CHW", "HWC"):
        raise InputError(f"layout {layout!r} is unknown; give CHW or HWC")
    if array.ndim == 2:
        return array[None]
    if layout is None:
        first, second, last = array.shape
        layout = "HWC" if first > 4 and (last <= 4 or first == second != last) else "CHW"
    return array if layout == "CHW" else np.moveaxis(array, -1, 0)


def normalize(
    relevance: ArrayLike, percentile: float | None = PERCENTILE, scale: float | None = None
) -> NDArray[np.float64]:
    """Divide by one positive number, so that zero stays zero and the signs stay: values in -1..1.

    Args:
        relevance: any shape.
        percentile: the number is this percentile of |relevance|, and what is above is clipped, lest single hot
            pixels leave the rest pale; None: the maximum.
        scale: the number itself, for several maps on one scale.

    Returns:
        The same shape; a map of zeros stays zero.

    Raises:
        InputError: NaN or infinity in the relevance, a percentile outside 0..100, a scale not above zero.
    """
    array = np.asarray(relevance, np.float64)
    if not np.isfinite(array).all():
        raise InputError("the relevance holds NaN or infinity; look for overflow or division by zero in the model")
    if percentile is not None and not 0 < percentile <= 100:
        raise InputError(f"percentile {percentile} is outside 0..100; give 99.5, or None for the maximum")
    if scale is not None and not scale > 0:
        raise InputError(f"scale {scale} is not above zero")
    size = np.abs(array)
    if scale is None:
        scale = float(np.percentile(size, percentile)) if percentile is not None and size.size else 0.0
        scale = scale or float(size.max(initial=0.0))  # a map with few pixels that speak: its percentile is zero
    return np.clip(array / scale, -1, 1) if scale else array


def render(
    relevance: ArrayLike,
    colormap: str = DEFAULT,
    size: tuple[int, int] | None = None,
    *,
    percentile: float | None = PERCENTILE,
    scale: float | None = None,
) -> Image.Image:
    """The heat map of an image's relevance, one pixel per entry unless `size` asks for more.

    Args:
        relevance: (C, H, W), (H, W, C) or (H, W).
        colormap: a name in colormaps.NAMES; or in colormaps.CHANNELS: what each of three channels says for the class,
            every channel on its own scale, in that channel's colour.
        size: (height, width) in pixels: whole multiples repeat pixels, others interpolate.
        percentile: see `normalize`.
        scale: see `normalize`.

    Raises:
        InputError: a colour map of channels, for relevance that has not three.
    """
    if colormap in colormaps.CHANNELS:
        return canvas.to_image(np.rint(255 * _colours(relevance, colormap, size, percentile, scale)).astype(np.uint8))
    return canvas.to_image(colormaps.apply(_values(relevance, size, percentile, scale), colormap))


def overlay(
    picture: Panel,
    relevance: ArrayLike,
    colormap: str = DEFAULT,
    strength: float = 0.9,
    *,
    percentile: float | None = PERCENTILE,
    scale: float | None = None,
) -> Image.Image:
    """Relevance laid over the picture, more opaque where |relevance| is larger.

    The picture becomes a pale gray, so that every colour seen is relevance.

    Args:
        picture: PIL image or uint8 (H, W, 3); the relevance is brought to its size.
        relevance: (C, h, w), (h, w, C) or (h, w).
        colormap: a name in colormaps.NAMES or colormaps.CHANNELS.
        strength: opacity of the strongest relevance, 0..1.
        percentile: see `normalize`.
        scale: see `normalize`.
    """
    image = canvas.to_image(picture)
    size = (image.height, image.width)
    gray = 128 + 0.5 * np.asarray(image.convert("L"), np.float64)[..., None]
    if colormap in colormaps.CHANNELS:
        colours = _colours(relevance, colormap, size, percentile, scale)
        values, tint = colours.max(axis=-1), np.rint(255 * colours).astype(np.uint8)
    else:
        values = _values(relevance, size, percentile, scale)
        if colormaps.is_sequential(colormap):
            values = np.maximum(values, 0)
        tint = colormaps.apply(np.sign(values) * (0.35 + 0.5 * np.abs(values)), colormap)
    opacity = strength * np.sqrt(np.abs(values))[..., None]
    return canvas.to_image(np.rint(np.minimum(gray + opacity * (tint - gray), 255)).astype(np.uint8))


def masked(picture: Panel, relevance: ArrayLike, percentile: float | None = 99.0) -> Image.Image:
    """The picture as far as it speaks for the score: every pixel times its positive relevance, the rest black.

    Args:
        picture: PIL image or uint8 (H, W, 3); the relevance is brought to its size.
        relevance: (C, h, w), (h, w, C) or (h, w), summed over channels.
        percentile: of |relevance|, from which on pixels are seen as they are; see `normalize`.
    """
    image = canvas.to_image(picture)
    share = np.maximum(_values(relevance, (image.height, image.width), percentile, None), 0)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    return canvas.to_image(np.rint(pixels * share[..., None]).astype(np.uint8))


def blend(
    picture: Panel,
    relevance: ArrayLike,
    colormap: str = "hot",
    heat: float = 0.9,
    *,
    percentile: float | None = PERCENTILE,
    scale: float | None = None,
) -> Image.Image:
    """The heat map with the picture shining through: heat · map + (1 - heat) · picture. For maps whose zero is dark.

    Args:
        picture: PIL image or uint8 (H, W, 3); the relevance is brought to its size.
        relevance: (C, h, w), (h, w, C) or (h, w).
        colormap: a name in colormaps.NAMES or colormaps.CHANNELS.
        heat: the part of the map, 0..1.
        percentile: see `normalize`.
        scale: see `normalize`.
    """
    require_pillow()
    from PIL import Image

    image = canvas.to_image(picture)
    drawn = render(relevance, colormap, (image.height, image.width), percentile=percentile, scale=scale)
    return Image.blend(image, drawn, heat)


def _colours(
    relevance: ArrayLike, order: str, size: tuple[int, int] | None, percentile: float | None, scale: float | None
) -> NDArray[np.float64]:
    """What each of three channels says for the class, (H, W, 3) in RGB, each on its own scale: values in 0..1."""
    channels = _channels_first(relevance)
    if len(channels) != 3:
        raise InputError(f"colour map {order!r} wants relevance of three channels, this has {len(channels)}")
    values = np.stack([_values(channel, size, percentile, scale) for channel in channels], axis=-1)
    return np.maximum(values if order == "rgb" else values[..., ::-1], 0)


def _values(
    relevance: ArrayLike, size: tuple[int, int] | None, percentile: float | None, scale: float | None
) -> NDArray[np.float64]:
    """The (H, W) map in -1..1 at `size`: interpolated as numbers, since mixed colours may be on no colour map."""
    values = normalize(reduce_channels(relevance), percentile, scale)
    if size is None or values.shape == tuple(size):
        return values
    (height, width), (tall, wide) = values.shape, size
    if tall % height == 0 and wide % width == 0:
        return np.repeat(np.repeat(values, tall // height, axis=0), wide // width, axis=1)
    require_pillow()
    from PIL import Image

    bilinear = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((wide, tall), bilinear), np.float64)


def side_by_side(
    panels: Sequence[Panel],
    titles: Sequence[str] = (),
    heading: str = "",
    colormap: str | None = None,
    bar_under: int = -1,
    at_least: int = 256,
) -> Image.Image:
    """Panels in a row on white, each with its title, and a colour bar below one of them.

    Args:
        panels: PIL images or uint8 arrays; small ones are enlarged by a whole number.
        titles: one per panel; may be fewer.
        heading: a line above all.
        colormap: draws its bar; None, or one of channels: no bar.
        bar_under: index of the panel above the bar.
        at_least: the short side of a panel in pixels.

    Raises:
        InputError: no panels.
    """
    if not panels:
        raise InputError("a figure needs at least one panel")
    images = [canvas.enlarge(panel, at_least) for panel in panels]
    unit = _unit(images)
    margin, gap, size = round(24 * unit), round(14 * unit), 15 * unit
    above = margin + canvas.heading_height(heading, 20 * unit) + (round(size * 1.7) if any(titles) else 0)
    tallest = max(image.height for image in images)
    colormap = None if colormap in colormaps.CHANNELS else colormap  # a bar has one axis, and these have three
    foot = round(46 * unit) if colormap else margin
    width = 2 * margin + sum(image.width for image in images) + gap * (len(images) - 1)
    sheet, draw = canvas.paper(width, above + tallest + foot)
    canvas.write(draw, margin, margin + 16 * unit, canvas.fit(heading, 20 * unit, width - 2 * margin), 20 * unit)
    x, lefts = margin, []
    for index, image in enumerate(images):
        title = canvas.fit(canvas.at(titles, index), size, image.width)
        canvas.write(draw, x, above - 0.55 * size, title, size, canvas.SOFT)
        canvas.place(sheet, image, x, above)
        lefts.append(x)
        x += image.width + gap
    if colormap:
        left, top = lefts[bar_under], above + tallest + round(10 * unit)
        box = (left, top, left + images[bar_under].width, top + round(8 * unit))
        canvas.color_bar(sheet, box, colormap, 13 * unit)
    return sheet


def triptych(
    picture: Panel | None,
    relevance: ArrayLike,
    heading: str = "",
    colormap: str = DEFAULT,
    *,
    percentile: float | None = PERCENTILE,
    scale: float | None = None,
    mask: bool = False,
) -> Image.Image:
    """The usual figure: picture, heat map and overlay; the heat map alone where `picture` is None.

    Args:
        picture: what the model saw, (H, W, 3) uint8 or PIL image.
        relevance: (C, h, w), (h, w, C) or (h, w).
        heading: a line above, such as the class, its score and the method.
        colormap: a name in colormaps.NAMES.
        percentile: see `normalize`.
        scale: see `normalize`.
        mask: the relevance as a mask over the picture instead of the overlay; see `masked`.
    """
    if picture is None:
        heat = render(relevance, colormap, percentile=percentile, scale=scale)
        return side_by_side([heat], heading=heading, colormap=colormap)
    image = canvas.to_image(picture)
    heat = render(relevance, colormap, (image.height, image.width), percentile=percentile, scale=scale)
    if mask:
        over, title = masked(image, relevance), "what speaks for it"
    else:
        over, title = overlay(image, relevance, colormap, percentile=percentile, scale=scale), "overlay"
    return side_by_side([image, heat, over], ("input", "relevance", title), heading, colormap, bar_under=1)


def grid(
    rows: Sequence[Sequence[Cell]],
    labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    heading: str = "",
    colormap: str = DEFAULT,
    *,
    percentile: float | None = PERCENTILE,
    cell: int = 224,
) -> Image.Image:
    """Many inputs and methods: a row per input; columns are the picture, then one heat map per method.

    Args:
        rows: cells; pictures (PIL or uint8) are shown as they are, arrays of floats as heat maps, each on its own
            scale and at the size of the picture before it in the row.
        labels: one per column.
        row_labels: one per row, below its first cell.
        heading: a line above all.
        colormap: a name in colormaps.NAMES.
        percentile: see `normalize`.
        cell: width of a column and greatest height of a row in pixels; pictures are fitted inside.

    Raises:
        InputError: no cells.
    """
    if not rows or not all(rows):
        raise InputError("a grid needs at least one cell in every row")
    lines = [_row(row, colormap, percentile, cell) for row in rows]
    columns = max(len(line) for line in lines)
    margin, gap, size = 24, 10, 14
    caption = round(size * 2.1) if any(row_labels) else 0
    above = margin + canvas.heading_height(heading, 20) + (round(size * 1.8) if any(labels) else 0)
    heights = [max(image.height for image in line) for line in lines]
    width = 2 * margin + columns * cell + gap * (columns - 1)
    sheet, draw = canvas.paper(width, above + sum(heights) + (gap + caption) * len(rows) + 40)
    canvas.write(draw, margin, margin + 16, canvas.fit(heading, 20, width - 2 * margin), 20)
    for column in range(columns):
        label = canvas.fit(canvas.at(labels, column), size, cell)
        canvas.write(draw, margin + column * (cell + gap), above - 0.6 * size, label, size, canvas.SOFT)
    y = above
    for index, line in enumerate(lines):
        for column, image in enumerate(line):
            canvas.place(sheet, image, margin + column * (cell + gap) + (cell - image.width) // 2, y)
        y += heights[index] + caption + gap
        label = canvas.fit(canvas.at(row_labels, index), size, width - 2 * margin)
        canvas.write(draw, margin, y - gap - 0.8 * size, label, size)
    left = margin + (columns - 1) * (cell + gap)
    if colormap not in colormaps.CHANNELS:
        canvas.color_bar(sheet, (left, y, left + cell, y + 8), colormap, 12)
    return sheet


def _row(row: Sequence[Cell], colormap: str, percentile: float | None, cell: int) -> list[Image.Image]:
    """The cells of one row as images that fit the column."""
    require_pillow()
    from PIL import Image, ImageOps

    size: tuple[int, int] | None = None
    images = []
    for item in row:
        if isinstance(item, Image.Image) or item.dtype == np.uint8:
            image = canvas.to_image(item)
            size = (image.height, image.width)
        else:
            image = render(item, colormap, size, percentile=percentile)
        near = Image.Resampling.NEAREST if max(image.size) < cell else Image.Resampling.BILINEAR
        images.append(ImageOps.contain(image, (cell, cell), near))
    return images


def _unit(images: Sequence[Image.Image]) -> float:
    """How much larger than on a page of 448-pixel panels text and margins are drawn."""
    return max(1.0, min(max(image.size) for image in images) / 448)
