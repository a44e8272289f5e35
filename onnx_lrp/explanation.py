"""Explanation: what a run gives back, and how it is written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.model import write_atomically
from onnx_lrp.runtime import Array
from onnx_lrp.tokenizer import Tokenizer, TokenizerLike, as_tokenizer
from onnx_lrp.tokens import Texts, TokenRelevance, read_tokens


@dataclass
class Explanation:
    """What one call gives back, for N samples.

    Attributes:
        outputs: the model's own outputs by name.
        relevance: relevance by tensor name, in the tensor's shape (integer inputs: per token, (N, T)).
        target: classes explained, int64 (N,); (N, k) where the output has k class axes.
        score: the explained score, (N,).
        absorbed: relevance taken by biases and stabilizers, (N,); None unless the ledger was asked for.
        delta: relevance summed minus the rise of the score above the baseline, (N,), zero for complete contributions;
            None for methods without a baseline.
        inputs: what was fed.
        method: name of the method.
        tokenizer: of the texts that were explained, if any.
        against: classes whose score was subtracted, int64 (N,); None unless that was asked for.
        shared: inputs that all samples have in common, such as the images that a caption is compared with.
        values: inner tensors that were asked for, by name.
        per_sample: K where K classes of every sample are explained: then N stands for rows here, K for each sample,
            those of the first sample first; :meth:`by_sample` tells them apart.
    """

    outputs: dict[str, Array]
    relevance: dict[str, Array]
    target: Array
    score: Array
    absorbed: Array | None
    inputs: dict[str, Array] = field(repr=False)
    method: str = ""
    delta: Array | None = None
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    against: Array | None = None
    shared: tuple[str, ...] = ()
    values: dict[str, Array] = field(default_factory=dict)
    per_sample: int = 1

    def __len__(self) -> int:
        """Number of samples; of rows, where a sample has several."""
        return len(self.score)

    def __getitem__(self, index: int | slice) -> Explanation:
        """One sample, or several, as an explanation of its own."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            index = slice(index, index + 1 or None)

        def cut(arrays: Mapping[str, Array]) -> dict[str, Array]:
            apart = {k for k, v in arrays.items() if v.ndim and len(v) == len(self) and k not in self.shared}
            return {k: v[index] if k in apart else v for k, v in arrays.items()}

        sums = (self.absorbed, self.delta, self.against)
        absorbed, delta, against = (None if a is None else a[index] for a in sums)
        outputs, relevance, inputs = cut(self.outputs), cut(self.relevance), cut(self.inputs)
        found = Explanation(
            outputs, relevance, self.target[index], self.score[index], absorbed, inputs, self.method, delta
        )
        found.tokenizer, found.against, found.shared = self.tokenizer, against, self.shared
        found.values = cut(self.values)
        return found

    def by_sample(self, array: Array) -> Array:
        """Rows of every class of every sample, such as a relevance (N·K, …), as (N, K, …)."""
        return array.reshape(-1, self.per_sample, *array.shape[1:])

    def total(self) -> Array:
        """Sum of the relevance of all reported model inputs per sample, float64 (N,)."""
        inputs = [r for name, r in self.relevance.items() if name in self.inputs]
        total = np.zeros(len(self))
        for relevance in inputs:
            total = total + relevance.reshape(len(self), -1).sum(1, dtype=np.float64)
        return total

    def channels(self, tensor: str, *, axis: int = 1, by: Literal["sum", "max"] = "sum", share: bool = False) -> Array:
        """Relevance of every channel of a reported tensor, over all its places: (N, C), float64.

        Args:
            tensor: its name; one of ``layers``.
            axis: where its channels lie.
            by: the sum over places, or the largest value.
            share: divided by the sum of all channels' magnitudes, so that samples can be compared.

        Raises:
            InputError: the tensor is not reported, or has no such axis.
        """
        if tensor not in self.relevance:
            raise InputError(f"'{tensor}' is not reported; there is {', '.join(self.relevance)}, more with layers=")
        relevance = self.relevance[tensor].astype(np.float64)
        if not 0 < axis < relevance.ndim:
            raise InputError(f"relevance of '{tensor}' has shape {relevance.shape}, and no channels on axis {axis}")
        rows = np.moveaxis(relevance, axis, 1).reshape(*np.array(relevance.shape)[[0, axis]], -1)
        found = rows.sum(2) if by == "sum" else rows.max(2)
        # The small number is zennit-crp's; it keeps a sample without relevance at zero.
        return np.asarray(found / (np.abs(found).sum(1, keepdims=True) + 1e-10) if share else found)

    def tokens(
        self, tokenizer: TokenizerLike = None, *, tokens: Texts | None = None, tensor: str | None = None
    ) -> list[TokenRelevance]:
        """The tokens of every sample with their relevance; special ones and padding told apart.

        Args:
            tokenizer: path of a tokenizer.json, or a tokenizer; default: the one that the texts were read with.
                Without one tokens are shown by their ids, and none counts as special.
            tokens: what the tokens are, per sample, where there is no tokenizer.
            tensor: a reported tensor (N, T, ...), such as embeddings that were fed; default: the input of token ids.

        Returns:
            One :class:`onnx_lrp.TokenRelevance` per sample.

        Raises:
            InputError: no tokens, or several inputs of them and none named.
        """
        return read_tokens(self, as_tokenizer(tokenizer) or self.tokenizer, tokens=tokens, tensor=tensor)

    def save(
        self, path: str | os.PathLike[str], *, pictures: Sequence[Array | None] | None = None, **options: Any
    ) -> Path:
        """Write a heat map (.png), a page of coloured text (.html) or all arrays (.npz).

        Args:
            path: where to; written under a temporary name and renamed.
            pictures: uint8 (H, W, 3) per sample to draw beside the map; default: the input itself.
            options: for pictures: ``colormap``, ``heading``, ``labels``, ``percentile``, ``mask``; see
                :func:`onnx_lrp.show.explanation_figure`. For pages: ``tokenizer`` or ``tokens`` as for :meth:`tokens`,
                ``heading``, ``labels``, ``names``, ``words``; see :func:`onnx_lrp.show.text_page`.

        Returns:
            The path.

        Raises:
            InputError: unknown suffix, folder missing, disk full.
        """
        target = Path(path)
        if target.suffix == ".npz":
            return save_arrays(target, self.arrays())
        if target.suffix == ".png":
            from onnx_lrp.show import explanation_figure, save

            return save(explanation_figure(self, pictures, **options), target)
        if target.suffix in (".html", ".htm"):
            from onnx_lrp.show import text_page

            return save_text(target, text_page([self], **options))
        raise InputError(f"{target}: an explanation is saved as .png, .html or .npz; choose one of these suffixes")

    def arrays(self) -> dict[str, Array]:
        """Everything but the inputs, under the names that a .npz file of it has."""
        found = {f"relevance/{k}": v for k, v in self.relevance.items()}
        found |= {f"output/{k}": v for k, v in self.outputs.items()}
        found |= {f"value/{k}": v for k, v in self.values.items()}
        found |= {"target": self.target, "score": self.score}
        sums = {"absorbed": self.absorbed, "delta": self.delta, "against": self.against}
        return found | {name: array for name, array in sums.items() if array is not None}


def probabilities(row: Array, head: str) -> Array:
    """Probabilities of classes from an output, by softmax unless they are that already.

    Args:
        row: the output for one sample.
        head: what the model ends with: Softmax, LogSoftmax, Sigmoid or "".
    """
    if head == "LogSoftmax":
        return np.exp(row)
    if head in ("Softmax", "Sigmoid") or (row.min() >= 0 and abs(row.sum() - 1) < 1e-2):
        return row
    powers = np.exp(row - row.max())
    return np.asarray(powers / powers.sum())


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> Path:
    """Write named arrays as .npz under a temporary name and rename it.

    Raises:
        InputError: folder missing or not writable, disk full.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return _write(path, buffer.getvalue())


def save_text(path: Path, text: str) -> Path:
    """Write text in UTF-8 under a temporary name and rename it.

    Raises:
        InputError: folder missing or not writable, disk full.
    """
    return _write(path, text.encode("utf-8", "replace"))


def _write(path: Path, data: bytes) -> Path:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder and the free space"
        ) from None
    return path
