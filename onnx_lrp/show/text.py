"""Texts with their relevance, ready to be drawn: what is said of each, and its tokens on one scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.pieces import shown
from onnx_lrp.show import colormaps
from onnx_lrp.show.figure import class_name
from onnx_lrp.tokens import Texts, TokenRelevance, token_tensors

if TYPE_CHECKING:
    from onnx_lrp.explanation import Explanation
    from onnx_lrp.tokenizer import Tokenizer, TokenizerLike

# What biases took; for methods with a baseline the sum of all parts, and how far that is from the rise.
ABSORBED, TOTAL, DELTA = "absorbed by biases", "total", "delta"
REACH = 0.8  # the strongest token is not the darkest colour of the map, which would be loud on a page of text


@dataclass(frozen=True, eq=False)
class TextCell:
    """One text explained in one way.

    Attributes:
        passages: its tokens; two for models of two texts.
        explained: the class (or token) for people.
        score: its score.
        totals: what the relevance adds up to, part by part.
        marked: the explained position, for outputs with one per token.
    """

    passages: tuple[TokenRelevance, ...]
    explained: str
    score: float
    totals: tuple[tuple[str, float], ...]
    marked: int | None = None

    @property
    def scale(self) -> float:
        """What full colour stands for: the largest |relevance| of the text itself."""
        return max((passage.scale for passage in self.passages), default=0.0)


@dataclass(frozen=True, eq=False)
class TextRow:
    """One text: what it is called, what the model says of it, its explanations side by side, and what is true of it."""

    name: str
    predicted: str
    cells: tuple[TextCell, ...]
    truth: str = ""


@dataclass(frozen=True)
class Segment:
    """What is drawn as one: a token, or a run of padding.

    Attributes:
        text: what it says, without characters that cannot be seen.
        value: its relevance.
        share: the same on the scale of its text, -1..1.
        kind: whether it is of the text itself.
        glued: no space stands before it.
        marked: it stands at the explained position.
        place: where it stands, and how many tokens it is.
        id: of the token.
    """

    text: str
    value: float
    share: float
    kind: Literal["content", "special", "padding"]
    glued: bool
    marked: bool
    place: int
    count: int
    id: int


def text_rows(
    columns: Sequence[Explanation],
    *,
    tokenizer: TokenizerLike = None,
    tokens: Texts | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] = (),
    predictions: Sequence[str] = (),
    truths: Sequence[str] = (),
    words: bool = False,
) -> list[TextRow]:
    """Rows of texts from explanations of them.

    Args:
        columns: one or more explanations of the same texts, by different methods or for different classes.
        tokenizer: see :meth:`onnx_lrp.Explanation.tokens`.
        tokens: likewise.
        labels: names of the classes; default: the tokens, where the classes are as many.
        names: of the texts.
        predictions: what the model says of each; default: the highest class of its output.
        truths: what it should have said, where that is known.
        words: pieces of words are summed to words.

    Raises:
        InputError: nothing to draw, or no tokens in it.
    """
    if not columns or not len(columns[0]):
        raise InputError("there is no text to draw")
    if len({len(column) for column in columns}) > 1:
        raise InputError("explanations side by side are of the same texts; these differ in number")
    from onnx_lrp.tokenizer import as_tokenizer

    given = as_tokenizer(tokenizer) or columns[0].tokenizer
    cells = [_cells(column, given, tokens, labels, words) for column in columns]
    count = len(columns[0])
    rows = []
    for i in range(count):
        name = names[i] if i < len(names) else (f"{i + 1}" if count > 1 else "")
        said = predictions[i] if i < len(predictions) else _predicted(columns[0], i, labels, given)
        rows.append(TextRow(name, said, tuple(column[i] for column in cells), truths[i] if i < len(truths) else ""))
    return rows


def segments(passage: TokenRelevance, scale: float, marked: int | None = None) -> Iterator[Segment]:
    """What to draw of a passage, in its order; padding is one segment per run."""
    # A text without relevance has no scale, and stays white.
    shares = np.where(passage.content, passage.relevance / (scale or 1.0), 0.0)
    here = -1 if marked is None else int(np.searchsorted(passage.places, marked, side="right")) - 1
    for is_padding, run in groupby(range(len(passage)), key=lambda i: bool(passage.padding[i])):
        places = list(run)
        if is_padding:
            total, inside = float(passage.relevance[places].sum()), here in places
            text = f"{len(places)} \u00d7 padding"
            first = places[0]
            yield Segment(text, total, 0.0, "padding", False, inside, int(passage.places[first]), len(places), -1)
            continue
        for i in places:
            piece = passage.pieces[i]
            kind: Literal["content", "special"] = "special" if passage.special[i] else "content"
            value, share, place = float(passage.relevance[i]), float(shares[i]), int(passage.places[i])
            yield Segment(shown(piece.text), value, share, kind, piece.glued, i == here, place, 1, int(passage.ids[i]))


def colours(shares: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The background of tokens by their share of the scale, and whether white letters are read better on it."""
    back = colormaps.apply(shares * REACH)
    light = back / 255.0
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    # WCAG's contrast, (L1 + 0.05) / (L2 + 0.05): the better of black and white is at least 4.58 on any colour.
    return back, np.asarray(1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05)


def number(value: float) -> str:
    """A relevance for people: three digits, its sign always said."""
    return f"{value:+.3g}".replace("-", "\u2212") if value else "0"


def _cells(
    explanation: Explanation,
    tokenizer: Tokenizer | None,
    tokens: Texts | None,
    labels: Sequence[str] | None,
    words: bool,
) -> list[TextCell]:
    tensors = token_tensors(explanation)
    if not tensors and tokens is not None:
        # Embeddings that were fed in the place of ids.
        tensors = [name for name, r in explanation.relevance.items() if r.ndim == 3][:1]
    if not tensors:
        known = ", ".join(explanation.relevance)
        raise InputError(f"a page of text needs relevance of tokens; this is that of {known}: save it as .png or .npz")
    if tokens is not None and len(tensors) > 1:
        raise InputError(f"tokens= is for models of one text, this one has {', '.join(tensors)}; give a tokenizer")
    passages = [explanation.tokens(tokenizer, tokens=tokens, tensor=tensor) for tensor in tensors]
    names = labels if labels is not None else _vocabulary(explanation, tokenizer)
    target = explanation.target
    cells = []
    for i, parts in enumerate(zip(*passages, strict=True)):
        marked = int(target[i, 0]) if target.ndim == 2 and target.shape[1] == 2 else None
        marked = marked if marked is not None and marked < len(parts[0]) else None
        explained = class_name(explanation, i, names)
        totals = tuple(_totals(explanation, i, parts))
        shown_parts = tuple(p.words() for p in parts) if words else parts
        cells.append(TextCell(shown_parts, explained, float(explanation.score[i]), totals, marked))
    return cells


def _totals(explanation: Explanation, index: int, passages: Sequence[TokenRelevance]) -> Iterator[tuple[str, float]]:
    """What the relevance of a text adds up to: parts of its tokens, other inputs, what biases took."""
    for passage in passages:
        prefix = f"{passage.tensor} " if len(passages) > 1 else ""
        for part, total in passage.totals.items():
            if part == "content" or bool(getattr(passage, part).any()):
                yield f"{prefix}{part}", total
    drawn = {passage.tensor for passage in passages}
    for name, relevance in explanation.relevance.items():
        if name in explanation.inputs and name not in drawn and relevance.size:
            yield name, float(relevance[index].sum(dtype=np.float64))
    if explanation.absorbed is not None:
        yield ABSORBED, float(explanation.absorbed[index])
    if explanation.delta is not None:
        yield TOTAL, float(explanation.total()[index])
        yield DELTA, float(explanation.delta[index])


def _vocabulary(explanation: Explanation, tokenizer: Tokenizer | None) -> Sequence[str] | None:
    """The tokens as names of classes, where a model has as many: its output is one of next or hidden words."""
    first = next(iter(explanation.outputs.values()), None)
    if tokenizer is None or first is None or not first.ndim:
        return None
    return tokenizer.labels if tokenizer.names(first.shape[-1]) else None


def _predicted(explanation: Explanation, index: int, labels: Sequence[str] | None, tokenizer: Tokenizer | None) -> str:
    """The highest class of the first output; "" where there are none."""
    first = next(iter(explanation.outputs.values()), None)
    if first is None or first.dtype.kind != "f" or len(first) != len(explanation) or first.shape[-1] < 2:
        return ""
    names = labels if labels is not None else _vocabulary(explanation, tokenizer)
    if first.ndim == 2:
        best = int(first[index].argmax())
    elif first.ndim == 3 and explanation.target.ndim == 2:
        best = int(first[index, int(explanation.target[index, 0])].argmax())
    else:
        return ""
    return names[best] if names and best < len(names) else f"class {best}"
