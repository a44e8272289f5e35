"""The picture of an explanation: image, series, table of features or tokens, chosen by the shape of each input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.pieces import shown
from onnx_lrp.show import canvas
from onnx_lrp.show.charts import bars, series
from onnx_lrp.show.colormaps import CHANNELS
from onnx_lrp.show.heatmap import DEFAULT, PERCENTILE, grid, triptych

if TYPE_CHECKING:
    from PIL import Image

Arrays = Mapping[str, NDArray[Any]]


class Explanation(Protocol):
    """What a picture needs of an explanation; :class:`onnx_lrp.Explanation` has it."""

    @property
    def inputs(self) -> Arrays:
        """What was fed."""

    @property
    def outputs(self) -> Arrays:
        """The model's own outputs."""

    @property
    def relevance(self) -> Arrays:
        """Relevance by tensor."""

    @property
    def target(self) -> NDArray[Any]:
        """Classes explained."""

    @property
    def score(self) -> NDArray[Any]:
        """Scores explained."""

    @property
    def method(self) -> str:
        """Name of the method."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int | slice) -> Explanation: ...


Picture = NDArray[np.uint8] | None
Labels = Sequence[str] | None
Kind = Literal["image", "map", "series", "features", "tokens"]

MOST_ROWS = 64  # samples in one figure: more make a picture that no viewer opens
_MOST_BARS = 64  # features; more are drawn as a series
_MOST_LINES = 16  # channels; more are drawn as a map
_STACKED = 12  # series or tables in one figure


def explanation_figure(
    explanation: Explanation,
    pictures: Sequence[Picture] | None = None,
    *,
    colormap: str = DEFAULT,
    heading: str = "",
    labels: Labels = None,
    percentile: float | None = PERCENTILE,
    mask: bool = False,
) -> Image.Image:
    """Draw an explanation: every reported tensor in the way that fits its shape, one above the other.

    Images (N,C,H,W) or (N,H,W,C) of 1 or 3 channels: picture, heat map and overlay, or a grid for several samples.
    Series (N,T,C), (N,C,T) or (N,T): lines on a coloured background. Tables (N,F) of up to 64 features and tokens:
    bars.

    Args:
        explanation: what to draw; of many samples the first ones.
        pictures: uint8 (H, W, 3) per sample, shown beside the heat map; where there is none, the input itself is
            stretched to 0..255.
        colormap: a name in colormaps.NAMES, or for pictures in colormaps.CHANNELS.
        heading: a line above; default: class, score and method.
        labels: names of the classes.
        percentile: see `heatmap.normalize`.
        mask: of one picture, show relevance as a mask over it instead of the overlay; see `heatmap.masked`.

    Raises:
        InputError: nothing to draw, or a colour map or relevance that cannot be drawn.
    """
    if not len(explanation) or not explanation.relevance:
        raise InputError("the explanation holds no sample to draw")
    # The past of a language model may hold no token.
    drawn = [name for name, relevance in explanation.relevance.items() if relevance.size]
    several = len(drawn) > 1
    parts = []
    for name in drawn:
        title = heading or _heading(explanation, labels)
        part = name if several else ""
        parts.append(_part(explanation, name, pictures, colormap, title, labels, percentile, part, mask))
        heading = " "  # said once
    return stack(parts)


def comparison_figure(
    rows: Sequence[Sequence[Explanation]],
    titles: Sequence[str],
    pictures: Sequence[Picture] | None = None,
    *,
    names: Sequence[str] = (),
    colormap: str = DEFAULT,
    heading: str = "",
    labels: Labels = None,
    percentile: float | None = PERCENTILE,
) -> Image.Image:
    """Many inputs, several explanations of each: a row per input, a column per method or class.

    What is no image is drawn one explanation below the other.

    Args:
        rows: per input, its explanations, of one sample each.
        titles: one per column.
        pictures: uint8 (H, W, 3) per row.
        names: of the inputs, one per row.
        colormap: a name in colormaps.NAMES.
        heading: a line above.
        labels: names of the classes.
        percentile: see `heatmap.normalize`.

    Raises:
        InputError: nothing to draw, or more than fits in a picture.
    """
    if not rows or not all(rows):
        raise InputError("a grid needs at least one explanation in every row")
    if len(rows) > MOST_ROWS:
        raise InputError(
            f"{len(rows)} rows are too many for one picture (at most {MOST_ROWS}); give a folder to write to"
        )
    tensor = next(name for name, relevance in rows[0][0].relevance.items() if relevance.size)
    kinds = {_kind(tensor, e.relevance[tensor], e.inputs) for row in rows for e in row}
    if kinds <= {"image"}:
        cells = [_grid_row(row, tensor, picture_at(pictures, i), colormap) for i, row in enumerate(rows)]
        captions = [_caption(row, canvas.at(names, i), labels, len(titles)) for i, row in enumerate(rows)]
        return grid(cells, ["input", *titles], captions, heading, colormap, percentile=percentile)
    parts = [
        _part(
            e,
            tensor,
            None,
            colormap,
            " - ".join(filter(None, [_heading(e, labels), canvas.at(names, i)])),
            labels,
            percentile,
        )
        for i, row in enumerate(rows[:_STACKED])
        for e in row
    ]
    return stack(parts)


def stack(figures: Sequence[Image.Image]) -> Image.Image:
    """Figures one above the other on one sheet."""
    if len(figures) == 1:
        return figures[0]
    sheet, _ = canvas.paper(max(f.width for f in figures), sum(f.height for f in figures))
    y = 0
    for figure in figures:
        sheet.paste(figure, (0, y))
        y += figure.height
    return sheet


def picture_at(pictures: Sequence[Picture] | None, index: int) -> Picture:
    """The picture of a sample; None where there is none."""
    return pictures[index] if pictures is not None and index < len(pictures) else None


def picture_of(explanation: Explanation, name: str) -> Picture:
    """The first sample of an input as a picture (H, W, 3), its range stretched to 0..255; None where it is none."""
    values = explanation.inputs.get(name)
    is_image = values is not None and _kind(name, values, explanation.inputs) == "image"
    return _derived(values[0]) if values is not None and is_image else None


def class_name(explanation: Explanation, index: int, labels: Labels = None) -> str:
    """What is explained of a sample, for people: the class by name or number, and its place in outputs with places."""
    row = np.atleast_1d(explanation.target[index])
    first = next(iter(explanation.outputs.values()), None)
    if first is not None and len(row) == 1 and first[:1].size == 1:
        return labels[0] if labels else "output"
    number = int(row[-1])
    if number < 0:
        return "no class"
    name = _label(number, labels)
    against = getattr(explanation, "against", None)
    if against is not None:
        name += f" rather than {_label(int(against[index]), labels)}"
    return name if len(row) == 1 else f"{name} at {', '.join(str(int(i)) for i in row[:-1])}"


def _label(number: int, labels: Labels) -> str:
    return labels[number] if labels and 0 <= number < len(labels) else f"class {number}"


def _heading(explanation: Explanation, labels: Labels) -> str:
    if len(explanation) > 1:
        return explanation.method
    score = f"{class_name(explanation, 0, labels)}, score {explanation.score[0]:.4g}"
    return " - ".join(filter(None, [score, explanation.method]))


def _caption(row: Sequence[Explanation], name: str, labels: Labels, columns: int) -> str:
    """Below a row: the input, and what is explained, once if all columns explain the same."""
    words = [f"{class_name(e, 0, labels)}, score {e.score[0]:.4g}" for e in row]
    same = len({class_name(e, 0, labels) for e in row}) == 1
    return ": ".join(filter(None, [name, words[0] if same or columns == 1 else "; ".join(words)]))


def _kind(name: str, relevance: NDArray[Any], inputs: Mapping[str, NDArray[Any]]) -> Kind:
    """How a tensor is drawn."""
    shape = relevance.shape
    values = inputs.get(name)
    if len(shape) == 4 and values is not None and _channel_axis(shape) is not None:
        return "image"
    if len(shape) == 3 and min(shape[1:]) <= _MOST_LINES:
        return "series"
    if len(shape) >= 3:
        return "map"
    if values is not None and values.dtype.kind in "iu":
        return "tokens"
    return "features" if int(np.prod(shape[1:])) <= _MOST_BARS else "series"


def _channel_axis(shape: Sequence[int]) -> int | None:
    """Axis of the 1 or 3 channels of a batch of images."""
    return next((axis for axis in (1, 3) if shape[axis] in (1, 3)), None)


def _flat(relevance: NDArray[Any], colormap: str) -> NDArray[np.float64]:
    """(N, H, W): summed over the channels; without channels over all but the last two axes.

    For a colour map of channels a picture keeps them: (N, 3, H, W).
    """
    array = np.asarray(relevance, np.float64)
    axis = _channel_axis(array.shape) if array.ndim == 4 else None
    if axis is not None and colormap in CHANNELS:
        return np.moveaxis(array, axis, 1)
    axes = (axis,) if axis is not None else tuple(range(1, array.ndim - 2))
    return np.asarray(array.sum(axis=axes))


def _derived(values: NDArray[Any]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) from a model's input (C, H, W) or (H, W, C): its range stretched to 0..255."""
    array = np.asarray(values, np.float64)
    axis = _channel_axis((1, *array.shape))
    array = np.moveaxis(array, 0, -1) if axis == 1 else array
    low, high = float(array.min()), float(array.max())
    pixels = np.rint((array - low) / ((high - low) or 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _grid_row(row: Sequence[Explanation], name: str, given: Picture, colormap: str) -> list[Any]:
    picture = _derived(row[0].inputs[name][0]) if given is None else given
    return [picture, *(_flat(e.relevance[name], colormap)[0] for e in row)]


def _part(
    explanation: Explanation,
    name: str,
    pictures: Sequence[Picture] | None,
    colormap: str,
    heading: str,
    labels: Labels,
    percentile: float | None,
    title: str = "",
    mask: bool = False,
) -> Image.Image:
    """One reported tensor."""
    count = len(explanation)
    heading = ": ".join(filter(None, [title, heading.strip()]))
    kind = _kind(name, explanation.relevance[name], explanation.inputs)
    shown = explanation[: MOST_ROWS if kind in ("image", "map") else _STACKED]
    if count > len(shown):
        heading += f" - the first {len(shown)} of {count}"
    named = [f"{class_name(shown, i, labels)}, score {shown.score[i]:.4g}" for i in range(len(shown))]
    if kind not in ("image", "map"):
        texts = [heading] if count == 1 else [f"{words} - {heading}" for words in named]
        return stack([_chart(shown, name, i, kind, text, colormap, percentile) for i, text in enumerate(texts)])
    maps = _flat(shown.relevance[name], colormap)
    # An inner tensor of an image model is laid over the picture as well; a map of words is not.
    under = [picture_at(pictures, i) if shown.relevance[name].ndim == 4 else None for i in range(len(shown))]
    if kind == "image":
        under = [_derived(shown.inputs[name][i]) if p is None else p for i, p in enumerate(under)]
    if count == 1:
        return triptych(under[0], maps[0], heading, colormap, percentile=percentile, mask=mask)
    rows: list[list[Any]] = [[m] if p is None else [p, m] for p, m in zip(under, maps, strict=True)]
    return grid(rows, (), named, heading, colormap, percentile=percentile)


def _chart(
    explanation: Explanation, name: str, index: int, kind: Kind, heading: str, colormap: str, percentile: float | None
) -> Image.Image:
    """One sample that is no image."""
    relevance = explanation.relevance[name][index]
    values = explanation.inputs[name][index] if name in explanation.inputs else None
    if kind == "series":
        lines = relevance if values is None else values
        channels = 1 if lines.ndim == 1 else min(lines.shape)
        names = [f"channel {i}" for i in range(channels)] if channels > 1 else ()
        return series(lines, relevance, heading, names, "step", colormap, percentile=percentile)
    flat = relevance.reshape(-1)
    numbers = () if values is None else values.reshape(-1).tolist()
    if kind == "tokens":
        return bars(_token_names(explanation, numbers), flat, (), heading, colormap)
    return bars([f"feature {i}" for i in range(flat.size)], flat, numbers, heading, colormap)


def _token_names(explanation: Explanation, ids: Sequence[int]) -> list[str]:
    """Places of tokens, with what they say where there is a tokenizer."""
    tokenizer = getattr(explanation, "tokenizer", None)
    if tokenizer is None:
        return [f"{i}: token {token}" for i, token in enumerate(ids)]
    return [f"{i}: {shown(piece.text)}" for i, piece in enumerate(tokenizer.pieces(np.asarray(ids)))]
