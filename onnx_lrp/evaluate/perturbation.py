"""Perturbation curves: delete what is said to be relevant, and watch the score fall.

One function for tokens, patches and pixels alike. What a feature is, and how it is deleted, is said by a `Delete`:
`replaced_tokens`, `hidden_tokens`, `patches`, or a function of one's own. What is watched is said by a `Score`: a
`Scorer` of a model, or a function of one's own.

    score = Scorer("model.onnx", target=explanation.target)
    curve = deletion(score, {"image": x}, pooled(explanation.relevance["image"], 16), patches("image", 16))
    curve.area()                                    # (N,): small where the relevant patches carried the score
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.errors import InputError
from onnx_lrp.model import ModelLike
from onnx_lrp.runtime import Array, Device, Session

Feeds = Mapping[str, Array]
Score = Callable[[Feeds], Array]  # inputs of N samples -> (N,)
Delete = Callable[[Feeds, Array], Feeds]  # inputs, and which of F features go, bool (N, F) -> other inputs
Order = Literal["most", "least", "random"]


@dataclass(frozen=True)
class Curve:
    """Scores along a perturbation.

    Attributes:
        share: share of the features that were deleted (or inserted) so far, from 0 to 1, (S,).
        scores: the score at each of them, (N, S).
    """

    share: Array
    scores: Array

    def area(self) -> Array:
        """Area under the curve of every sample by the trapezoidal rule, (N,): its mean score along the way."""
        middles = (self.scores[:, 1:] + self.scores[:, :-1]) / 2
        return np.asarray(middles @ np.diff(self.share))


def curve(
    score: Score,
    feeds: Feeds,
    relevance: Array,
    delete: Delete,
    *,
    order: Order = "most",
    insert: bool = False,
    steps: int = 10,
    allowed: Array | None = None,
    seed: int = 0,
) -> Curve:
    """Delete features one share after the other.

    Args:
        score: what is watched.
        feeds: inputs of N samples.
        relevance: of F features, (N, F); features of equal relevance go in their own order.
        delete: how features are deleted.
        order: the most relevant first (Samek et al. 2017, sec. III), the least relevant first, or at random.
        insert: begin with everything deleted and bring features back in that order (Petsiuk et al. 2018, sec. 3.2).
        steps: number of steps; at step s of S, the share s / S of a sample's features, rounded, has gone.
        allowed: which features may be deleted at all, bool (N, F), such as no special tokens; default: all.
        seed: of the random order.

    Returns:
        The curve, at steps + 1 points.

    Raises:
        InputError: relevance is not (N, F) or not finite, or allowed is of another shape.
    """
    relevance = np.asarray(relevance)
    if relevance.ndim != 2 or not np.isfinite(relevance).all():
        raise InputError(f"relevance wants one finite number per feature, (N, F), got {relevance.shape}; see pooled()")
    allowed = np.ones(relevance.shape, bool) if allowed is None else np.asarray(allowed, bool)
    if allowed.shape != relevance.shape:
        raise InputError(f"allowed is of shape {allowed.shape}, relevance of {relevance.shape}; give one per feature")
    if steps < 1:
        raise InputError(f"steps is 1 or more, not {steps}")
    if order == "random":
        relevance = np.random.default_rng(seed).random(relevance.shape)
    ranked = relevance if order == "least" else -relevance
    place = np.argsort(np.argsort(np.where(allowed, ranked, np.inf), axis=1, kind="stable"), axis=1)
    counts = allowed.sum(1, keepdims=True)
    share = np.linspace(0, 1, steps + 1)
    scores = []
    for part in share:
        touched = allowed & (place < np.rint(part * counts))
        scores.append(np.asarray(score(delete(feeds, allowed & ~touched if insert else touched)), np.float64))
    return Curve(share, np.stack(scores, 1))


def deletion(score: Score, feeds: Feeds, relevance: Array, delete: Delete, **options: Any) -> Curve:
    """The curve of deleting the most relevant features first: the lower, the better. Options as in `curve`."""
    return curve(score, feeds, relevance, delete, **options)


def insertion(score: Score, feeds: Feeds, relevance: Array, delete: Delete, **options: Any) -> Curve:
    """The curve of bringing the most relevant features back first: the higher, the better. Options as in `curve`."""
    return curve(score, feeds, relevance, delete, insert=True, **options)


def faithfulness(score: Score, feeds: Feeds, relevance: Array, delete: Delete, **options: Any) -> Array:
    """Area between the curves of deleting the least and the most relevant features first, (N,): the higher, the better.

    The measure of Blücher et al. 2024 by which Achtibat et al. 2024 (table 1) compare explanations of transformers. It
    is 0 on average for relevance that says nothing. Options as in `curve`, save order and insert.
    """
    least = curve(score, feeds, relevance, delete, order="least", **options)
    most = curve(score, feeds, relevance, delete, order="most", **options)
    return np.asarray(least.area() - most.area())


class Scorer:
    """The score of a model: the output that was explained, of the class that was explained.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        target: class per sample, (N,), or one for all; None for outputs (N,), which have none.
        output: name of the output, or of an inner tensor such as the logits before a softmax; default: the first.
        position: index on the middle axis of outputs (N, T, C), such as -1 for the last token; one for all, or (N,).
        device: where it runs.
        threads: threads per operator; default: ONNX Runtime's choice.
        batch_size: samples per run; a model with a fixed batch is run with that.
    """

    def __init__(
        self,
        model: ModelLike,
        target: Array | int | None = None,
        *,
        output: str | None = None,
        position: Array | int | None = None,
        device: Device = "auto",
        threads: int | None = None,
        batch_size: int = 16,
    ) -> None:
        source = models.load(model)
        proto = source.original
        outputs = [o.name for o in proto.graph.output]
        self.output = output or outputs[0]
        if self.output not in outputs:
            if not any(self.output in node.output for node in proto.graph.node):
                raise InputError(f"the model has no tensor '{self.output}'; outputs are {', '.join(outputs)}")
            proto.graph.output.append(onnx.ValueInfoProto(name=self.output))
        self.session = Session(proto, device=device, threads=threads, folder=source.folder)
        self.target = None if target is None else np.asarray(target)
        self.position = position
        lengths = [s.shape[0] for s in self.session.inputs.values() if s.shape and isinstance(s.shape[0], int)]
        self.batch_size = min(lengths, default=batch_size)
        # Of a similarity (N, B) of captions and images, all captions are compared with all images.
        batch, *classes = self.session.shapes[self.output] or [None]
        self._shared = {
            name
            for name, info in self.session.inputs.items()
            if info.shape and isinstance(info.shape[0], str) and info.shape[0] in classes and batch not in info.shape
        }

    def __call__(self, feeds: Feeds) -> Array:
        """Score every sample.

        Raises:
            InputError: the output's rank does not go with target and position.
        """
        count = next(len(v) for k, v in feeds.items() if k not in self._shared)
        apart = {k for k, v in feeds.items() if len(v) == count and k not in self._shared}
        parts = []
        for at in range(0, count, self.batch_size):
            part = {k: v[at : at + self.batch_size] if k in apart else v for k, v in feeds.items()}
            parts.append(self.session.run(part, [self.output])[self.output])
        found = np.concatenate(parts)
        if self.position is not None and found.ndim == 3:
            found = found[np.arange(len(found)), self.position]
        if found.ndim != (1 if self.target is None else 2):
            raise InputError(
                f"output '{self.output}' has shape {found.shape}: give target= for (N, C), and position= for (N, T, C)"
            )
        return found if self.target is None else found[np.arange(len(found)), self.target]


def replaced_tokens(name: str, token: int) -> Delete:
    """Delete tokens of input `name` (N, T) by putting another id there: of a mask, padding, or blank."""

    def delete(feeds: Feeds, gone: Array) -> Feeds:
        ids = feeds[name]
        return {**feeds, name: np.where(gone, np.asarray(token, ids.dtype), ids)}

    return delete


def hidden_tokens(mask: str) -> Delete:
    """Delete tokens by a 0 in the attention mask, input `mask` (N, T): nothing attends to them."""

    def delete(feeds: Feeds, gone: Array) -> Feeds:
        kept = feeds[mask]
        return {**feeds, mask: np.where(gone, np.zeros((), kept.dtype), kept)}

    return delete


def patches(name: str, size: int = 1, fill: Array | float = 0.0, *, channels: int = 1) -> Delete:
    """Delete squares of pixels of input `name` (N, C, H, W), row by row, by painting them over.

    Args:
        name: the input.
        size: side of a square; 1 deletes pixel by pixel. Height and width are multiples of it.
        fill: the paint: one number, or an array that broadcasts with the picture, such as its blurred copy.
        channels: their axis: 1, or 3 for pictures (N, H, W, C).
    """

    def delete(feeds: Feeds, gone: Array) -> Feeds:
        x = feeds[name]
        rows, columns = _grid(np.moveaxis(x, channels, 1), size)
        grown = gone.reshape(-1, 1, rows, columns).repeat(size, 2).repeat(size, 3)
        return {**feeds, name: np.where(np.moveaxis(grown, 1, channels), np.asarray(fill, x.dtype), x)}

    return delete


def pooled(relevance: Array, size: int = 1, *, channels: int = 1) -> Array:
    """Relevance of the squares that `patches` deletes: (N, C, H, W) to (N, H/size * W/size), summed."""
    relevance = np.moveaxis(relevance, channels, 1)
    rows, columns = _grid(relevance, size)
    split = relevance.reshape(len(relevance), -1, rows, size, columns, size)
    return np.asarray(split.sum((1, 3, 5), dtype=np.float64).reshape(len(relevance), -1))


def elements(name: str, fill: Array | float = 0.0) -> Delete:
    """Delete single elements of input `name` (N, ...), in the order of memory: features of a table, steps of a series.

    Args:
        name: the input.
        fill: what takes their place: one number, or an array that broadcasts with the input, such as means.
    """

    def delete(feeds: Feeds, gone: Array) -> Feeds:
        x = feeds[name]
        return {**feeds, name: np.where(gone.reshape(x.shape), np.asarray(fill, x.dtype), x)}

    return delete


def _grid(x: Array, size: int) -> tuple[int, int]:
    if x.ndim != 4 or x.shape[2] % size or x.shape[3] % size:
        raise InputError(f"patches of {size} want pictures (N, C, H, W) of multiples of it, got {x.shape}")
    return x.shape[2] // size, x.shape[3] // size
