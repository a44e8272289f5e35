"""Several methods on the same inputs, measured alike.

verdicts = evaluate.compare("model.onnx", ["epsilon_plus", "gradient"], {"image": x}, evaluate.squares("image", x))
for verdict in verdicts:
print(verdict.method, verdict.deletion.area().mean(), verdict.faithfulness.mean())
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from onnx_lrp.errors import InputError
from onnx_lrp.evaluate.completeness import completeness
from onnx_lrp.evaluate.perturbation import Curve, Delete, Feeds, Order, Scorer, curve, elements, patches, pooled
from onnx_lrp.evaluate.randomisation import randomised, rank_similarity
from onnx_lrp.explainer import Explainer
from onnx_lrp.methods import Method, find_method
from onnx_lrp.model import ModelLike
from onnx_lrp.positions import Position
from onnx_lrp.runtime import Array, Device

_ORDERS: tuple[tuple[Order, bool], ...] = (("most", False), ("most", True), ("least", False))
CHANCE = "random order"  # what the curve is called that every method has to beat


@dataclass(frozen=True)
class Features:
    """What of an input is deleted at a time.

    Attributes:
        tensor: the input whose relevance ranks the features.
        pool: relevance of the tensor to that of F features, (N, F).
        delete: how features go.
        allowed: which may go at all, bool (N, F); None: all.
    """

    tensor: str
    pool: Callable[[Array], Array]
    delete: Delete
    allowed: Array | None = None


@dataclass(frozen=True)
class Verdict:
    """What one method did on N samples.

    Attributes:
        method: its name, or `CHANCE`.
        deletion: scores while the most relevant features go first; a small area is good.
        insertion: scores while they come back first; a large area is good.
        faithfulness: area between deleting the least and the most relevant first, (N,); large is good, 0 is chance.
        completeness: share of the score that is not accounted for, (N,); None for methods that do not sum to it.
        similarity: rank correlation of the maps with those of the same model with random weights, (N,): near 0 where
            the method shows what the model has learnt; None where that was not asked for.
    """

    method: str
    deletion: Curve
    insertion: Curve
    faithfulness: Array
    completeness: Array | None = None
    similarity: Array | None = None


def squares(name: str, x: Array, size: int | None = None, fill: float | None = None, *, channels: int = 1) -> Features:
    """Squares of pixels of a picture, painted with its own mean colour.

    Args:
        name: the input.
        x: what it is fed, (N, C, H, W).
        size: side of a square in pixels, a divisor of height and width; default: the one nearest to a fourteenth.
        fill: another paint: the value that pixels get.
        channels: their axis: 1, or 3 for (N, H, W, C).
    """
    height, width = np.delete(x.shape, [0, channels])
    divisors = [d for d in range(1, min(height, width) + 1) if height % d == 0 == width % d]
    side = size or min(divisors, key=lambda d: abs(d - min(height, width) / 14))
    plane = tuple(a for a in (1, 2, 3) if a != channels)
    paint = x.mean(plane, keepdims=True) if fill is None else fill
    return Features(name, partial(pooled, size=side, channels=channels), patches(name, side, paint, channels=channels))


def singles(name: str, fill: Array | float = 0.0) -> Features:
    """Every element of an input (N, ...) on its own, replaced by what is given."""
    return Features(name, _flat, elements(name, fill))


def _flat(relevance: Array) -> Array:
    return relevance.reshape(len(relevance), -1)


def compare(
    model: ModelLike,
    methods: Sequence[str | os.PathLike[str] | Method],
    feeds: Feeds,
    features: Features,
    *,
    target: Array | int | None = None,
    position: Position | None = None,
    parameters: Feeds | None = None,
    steps: int = 10,
    randomise: bool = True,
    seed: int = 0,
    device: Device = "auto",
    threads: int | None = None,
    **options: Any,
) -> list[Verdict]:
    """Perturbation curves, completeness and dependence on the weights of several methods.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        methods: registered names, paths of rule books, or method objects.
        feeds: inputs of N samples.
        features: what is deleted at a time.
        target: class per sample, (N,), or one for all; None for what the model predicts.
        position: for outputs (N, T, classes), as for :class:`onnx_lrp.Explainer`; one per sample.
        parameters: inputs that only some methods have, such as the range of pixels `low` and `high`.
        steps: of the curves.
        randomise: compare with the explanation of the model with random weights, too (twice the time).
        seed: of the random weights, and of the random order.
        device: where it runs.
        threads: threads per operator.
        options: as for :func:`onnx_lrp.rewrite`.

    Returns:
        A verdict per method, and at the end one for the random order.

    Raises:
        InputError: no method, or what is explained is no number per sample.
    """
    if not methods:
        raise InputError("compare wants one method at least")
    running: dict[str, Any] = {"device": device, "threads": threads, **options}
    random_model = randomised(model, seed=seed) if randomise else None
    verdicts, score = [], None
    for method in methods:
        explainer = _explainer(model, method, running)
        given = {name: array for name, array in (parameters or {}).items() if name in explainer.session.optional}
        explanation = explainer({**given, **feeds}, target, position=position)
        if features.tensor not in explanation.relevance:
            known = ", ".join(explanation.relevance)
            raise InputError(f"{explanation.method} reports no relevance of '{features.tensor}'; there is {known}")
        target, position = explanation.target, None  # of every sample, and of the other methods
        score = score or _scorer(model, explainer, target, device, threads)
        relevance = features.pool(explanation.relevance[features.tensor])
        similarity = None
        if random_model is not None:
            other = _explainer(random_model, method, running)({**given, **feeds}, target)
            similarity = rank_similarity(relevance, features.pool(other.relevance[features.tensor]))
        sums = explanation.delta is not None or explanation.absorbed is not None
        whole = completeness(explanation) if sums else None
        verdicts.append(_verdict(explanation.method, score, feeds, features, relevance, steps, whole, similarity))
    assert score is not None
    chance = np.asarray(np.random.default_rng(seed).random(relevance.shape))
    return [*verdicts, _verdict(CHANCE, score, feeds, features, chance, steps)]


def _explainer(model: ModelLike, method: str | os.PathLike[str] | Method, options: dict[str, Any]) -> Explainer:
    """An explainer that accounts for what is absorbed, where relevance should sum to the score."""
    known = method if not isinstance(method, str | os.PathLike) else find_method(method)
    return Explainer(model, known, ledger=(options.get("start") or known.start) != "one", **options)


def _scorer(model: ModelLike, explainer: Explainer, target: Array, device: Device, threads: int | None) -> Scorer:
    """The score of the explained classes: of outputs (N,), (N, classes) or (N, T, classes)."""
    name, classes = explainer.explained.explained, len(explainer.explained.classes)
    if classes > 2:
        raise InputError(f"'{name}' has {classes} axes of classes; compare takes two at most, the positions of a text")
    chosen = None if not classes else target[:, -1] if target.ndim == 2 else target
    position = target[:, 0] if classes == 2 else None
    return Scorer(model, chosen, output=name, position=position, device=device, threads=threads)


def _verdict(
    method: str,
    score: Scorer,
    feeds: Feeds,
    features: Features,
    relevance: Array,
    steps: int,
    whole: Array | None = None,
    similarity: Array | None = None,
) -> Verdict:
    options: dict[str, Any] = {"steps": steps, "allowed": features.allowed}
    most, back, least = (
        curve(score, feeds, relevance, features.delete, order=order, insert=insert, **options)
        for order, insert in _ORDERS
    )
    return Verdict(method, most, back, least.area() - most.area(), whole, similarity)
