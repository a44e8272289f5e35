"""Relevance of the tokens of texts: what each says, which are special or padding, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lrp.errors import InputError
from onnx_lrp.pieces import Piece, pieces, shown
from onnx_lrp.roles import outside, text_inputs

if TYPE_CHECKING:
    from onnx_lrp.tokenizer import Tokenizer

Texts = Sequence[Sequence[str]]  # per sample, its tokens as a vocabulary writes them
Flags = NDArray[np.bool_]


class Explained(Protocol):
    """What is read of an explanation; :class:`onnx_lrp.Explanation` has it."""

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """What was fed."""

    @property
    def relevance(self) -> Mapping[str, NDArray[Any]]:
        """Relevance by tensor."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class TokenRelevance:
    """The tokens of one text and their relevance.

    Attributes:
        tensor: the input (or inner tensor) whose relevance it is.
        ids: (T,) int64.
        pieces: T tokens as a reader sees them; the ids where there is no tokenizer.
        relevance: (T,) float64.
        special: (T,) bool: tokens that the tokenizer added, such as [CLS].
        padding: (T,) bool; none of them is special, too.
        places: (T,) where each stands in the tensor; of a word its first piece.
    """

    tensor: str
    ids: NDArray[np.int64]
    pieces: tuple[Piece, ...]
    relevance: NDArray[np.float64]
    special: Flags
    padding: Flags
    places: NDArray[np.intp]

    def __len__(self) -> int:
        """Number of tokens, with special ones and padding."""
        return len(self.ids)

    @property
    def texts(self) -> list[str]:
        """What each token says."""
        return [shown(piece.text) for piece in self.pieces]

    @property
    def content(self) -> Flags:
        """(T,) bool: the tokens of the text itself."""
        return ~(self.special | self.padding)

    @property
    def totals(self) -> dict[str, float]:
        """Sums of the relevance of "content", "special" and "padding" tokens."""
        parts = {"content": self.content, "special": self.special, "padding": self.padding}
        return {name: float(self.relevance[part].sum()) for name, part in parts.items()}

    @property
    def scale(self) -> float:
        """The largest |relevance| of the text itself, 0 where there is none: what full colour stands for."""
        return float(np.abs(self.relevance[self.content]).max(initial=0.0))

    @property
    def normalized(self) -> NDArray[np.float64]:
        """(T,): the relevance divided by its length √(Σ R²), as captum shows texts; zeros stay zeros."""
        return self.relevance / (float(np.linalg.norm(self.relevance)) or 1.0)

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """The tokens of the text itself with the largest relevance, and their relevance."""
        order = np.argsort(-self.relevance, kind="stable")
        return [(self.texts[i], float(self.relevance[i])) for i in order if self.content[i]][:count]

    def words(self) -> TokenRelevance:
        """The same with the pieces of each word as one token: their relevance is summed, the id is the first one's."""
        starts = [
            i
            for i in range(len(self))
            if i == 0 or not (self.pieces[i].glued and self.content[i] and self.content[i - 1])
        ]
        ends = [*starts[1:], len(self)]
        joined = [
            replace(self.pieces[i], text="".join(p.text for p in self.pieces[i:j]))
            for i, j in zip(starts, ends, strict=True)
        ]
        sums = np.add.reduceat(self.relevance, starts)
        at = np.array(starts)
        flags = self.special[at], self.padding[at]
        return TokenRelevance(self.tensor, self.ids[at], tuple(joined), sums, *flags, self.places[at])


def token_tensors(explanation: Explained) -> list[str]:
    """The inputs of token ids whose relevance an explanation reports."""
    specs = {name: (array.dtype.kind, array.ndim) for name, array in explanation.inputs.items()}
    reported = explanation.relevance
    return [t.ids for t in text_inputs(specs) if t.ids in reported and reported[t.ids].ndim == 2]


def read_tokens(
    explanation: Explained,
    tokenizer: Tokenizer | None = None,
    *,
    tokens: Texts | None = None,
    tensor: str | None = None,
) -> list[TokenRelevance]:
    """The tokens of every sample with their relevance.

    Padding is where the attention mask that was fed is 0; without one, where the tokenizer's padding token stands at
    the beginning or the end.

    Args:
        explanation: of N samples.
        tokenizer: says what the ids mean.
        tokens: says it instead, per sample.
        tensor: a reported tensor (N, T) or (N, T, ...), summed over what follows; default: the input of token ids.

    Raises:
        InputError: no tokens, several inputs of them, or other numbers of tokens than of relevances.
    """
    if tensor is None:
        names = token_tensors(explanation)
        if len(names) != 1:
            what = (
                f"has several inputs of token ids ({', '.join(names)})" if names else "reports no relevance of tokens"
            )
            known = ", ".join(explanation.relevance)
            raise InputError(f"the explanation {what}; name a tensor of {known} with tensor=")
        (tensor,) = names
    if tensor not in explanation.relevance:
        raise InputError(f"'{tensor}' is not reported; there is {', '.join(explanation.relevance)}")
    relevance = np.asarray(explanation.relevance[tensor], np.float64)
    if relevance.ndim < 2:
        raise InputError(f"relevance of '{tensor}' has shape {relevance.shape}, which has no axis of tokens")
    relevance = relevance.reshape(*relevance.shape[:2], -1).sum(-1)
    if not np.isfinite(relevance).all():
        raise InputError(f"the relevance of '{tensor}' holds NaN or infinity; look for overflow in the model")
    count, length = relevance.shape
    if tokens is not None and [len(row) for row in tokens] != [length] * count:
        given = f"{len(tokens)} texts of {', '.join(map(str, sorted({len(row) for row in tokens})))} tokens"
        raise InputError(f"tokens= has {given}, the relevance of '{tensor}' {count} of {length}")
    # An inner tensor, or embeddings that were fed, has the tokens of the ids with which it shares its length.
    rows = token_rows(explanation.inputs, tokenizer, tensor if tensor in explanation.inputs else None, relevance.shape)
    result = []
    for i in range(count):
        row = np.full(length, -1) if rows is None else rows.ids[i]
        padding = np.zeros(length, bool) if rows is None else rows.padding[i]
        special = np.zeros(length, bool) if tokenizer is None else np.isin(row, sorted(tokenizer.special)) & ~padding
        if tokens is not None:
            seen = pieces(list(tokens[i]))
        elif tokenizer is not None and rows is not None:
            seen = tokenizer.pieces(row)
        else:
            seen = [Piece(str(number) if number >= 0 else f"#{k}") for k, number in enumerate(row.tolist())]
        places = np.arange(length)
        result.append(TokenRelevance(tensor, row, tuple(seen), relevance[i], special, padding, places))
    return result


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The texts that were fed, as ids.

    Attributes:
        ids: (N, T) int64.
        padding: (N, T) bool.
        mask: id of the token that hides a word; None where it is not known.
    """

    ids: NDArray[np.int64]
    padding: Flags
    mask: int | None = None

    def real(self, sample: int) -> NDArray[np.intp]:
        """The places of a text that are no padding; all where everything is."""
        found = np.flatnonzero(~self.padding[sample])
        return found if len(found) else np.arange(self.ids.shape[1])

    def at(self, sample: int, position: int) -> NDArray[np.intp]:
        """One place as an array: from the beginning of the axis, or below 0 from the end of the text."""
        real, length = self.real(sample), self.ids.shape[1]
        if not -len(real) <= position < length:
            raise InputError(f"position {position} is out of range: the text has {len(real)} tokens of {length}")
        return real[[position]] if position < 0 else np.array([position])

    def hidden(self, sample: int) -> NDArray[np.intp]:
        """Where the mask token stands."""
        return np.flatnonzero(self.ids[sample] == self.mask) if self.mask is not None else np.empty(0, np.intp)


def token_rows(
    inputs: Mapping[str, NDArray[Any]],
    tokenizer: Tokenizer | None,
    tensor: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> TokenRows | None:
    """The token ids among what was fed, and what of them is padding; None where there are none.

    Args:
        inputs: what was fed.
        tokenizer: knows the padding token, for models without an attention mask.
        tensor: which input of ids; default: the first.
        shape: that they should have.
    """
    groups = text_inputs({name: (array.dtype.kind, array.ndim) for name, array in inputs.items()})
    groups = [g for g in groups if inputs[g.ids].ndim == 2 and (shape is None or inputs[g.ids].shape == shape)]
    named = [g for g in groups if g.ids == tensor]
    if not groups:
        return None
    group = (named or groups)[0]
    ids = np.asarray(inputs[group.ids]).astype(np.int64)
    mask = None if group.mask is None else inputs[group.mask]
    if mask is not None and mask.ndim == 2 and len(mask) == len(ids) and mask.shape[1] >= ids.shape[1]:
        # A model with a past has a longer mask: the last entries are those of these tokens.
        padding = np.asarray(mask[:, -ids.shape[1] :] == 0)
    else:
        padding = outside(ids, None if tokenizer is None else tokenizer.pad)
    return TokenRows(ids, padding, None if tokenizer is None else tokenizer.mask)
