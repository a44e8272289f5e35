"""Relevance rules on the dense matrix of a layer: slower and less complicated than the library, and sharing nothing.

Every formula is written out for z = W x + b of one sample, as in the table of definitions. The stabilizer is
z + epsilon sign(z) with sign(0) = +1; for epsilon = 0 a sum that is exactly zero is divided by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Shares:
    """Where the relevance of a layer's output went.

    Attributes:
        inputs: relevance of the input.
        bias: what the bias took.
        stabilizer: what the stabilizer took, and what sat on outputs that a rule masks out.
    """

    inputs: Array
    bias: float
    stabilizer: float


Rule = Callable[..., Shares]


def matrix_of(layer: Callable[[list[Array]], Array], shapes: Sequence[tuple[int, ...]]) -> tuple[Array, Array]:
    """Push unit vectors through an affine layer, all inputs side by side, and return W and b.

    Args:
        layer: from inputs with a batch axis in front to an output with a batch axis in front.
        shapes: shapes of the inputs, without the batch axis.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    units = np.concatenate([np.zeros((1, sum(sizes))), np.eye(sum(sizes))])
    pieces = np.split(units, np.cumsum(sizes)[:-1], axis=1)
    out = layer([piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)])
    out = out.reshape(len(units), -1)
    return (out[1:] - out[0]).T, out[0]


def stabilizer(z: Array, epsilon: float) -> Array:
    """Return what is added to z."""
    if epsilon == 0:
        return np.where(z == 0, 1.0, 0.0)
    return np.where(z < 0, -epsilon, epsilon)


def pos(a: Array) -> Array:
    """Return the positive part."""
    return np.maximum(a, 0)


def neg(a: Array) -> Array:
    """Return the negative part."""
    return np.minimum(a, 0)


def _branch(
    terms: Sequence[tuple[Array, Array]], numerators: Sequence[Array], bias: Array, r: Array, epsilon: float
) -> Shares:
    """Share r in the proportions of sum_k W_k x_k + bias; the numerator may be another one than x_k."""
    z = sum(w @ x for w, x in terms) + bias
    added = stabilizer(z, epsilon)
    s = r / (z + added)
    inputs = sum(n * (w.T @ s) for (w, _), n in zip(terms, numerators, strict=True))
    return Shares(inputs, float(bias @ s), float(added @ s))


def _sum(*parts: tuple[float, Shares]) -> Shares:
    return Shares(
        sum(f * p.inputs for f, p in parts), sum(f * p.bias for f, p in parts), sum(f * p.stabilizer for f, p in parts)
    )


def epsilon(w: Array, b: Array, x: Array, r: Array, epsilon: float = 1e-6) -> Shares:
    """R x W^T / S(W x + b)."""
    return _branch([(w, x)], [x], b, r, epsilon)


def lrp_0(w: Array, b: Array, x: Array, r: Array) -> Shares:
    """Epsilon without epsilon."""
    return _branch([(w, x)], [x], b, r, 0.0)


def norm(w: Array, b: Array, x: Array, r: Array, epsilon: float = 1e-6) -> Shares:
    """Share a sum by its summands."""
    return _branch([(w, x)], [x], b, r, epsilon)


def zplus(w: Array, b: Array, x: Array, r: Array, epsilon: float = 1e-6, bias: bool = True) -> Shares:
    """Share by positive contributions."""
    return _branch([(pos(w), pos(x)), (neg(w), neg(x))], [pos(x), neg(x)], pos(b) if bias else 0 * b, r, epsilon)


def alpha_beta(
    w: Array, b: Array, x: Array, r: Array, alpha: float = 2.0, beta: float = 1.0, epsilon: float = 1e-6
) -> Shares:
    """Alpha times the positive contributions less beta times the negative ones."""
    up = _branch([(pos(w), pos(x)), (neg(w), neg(x))], [pos(x), neg(x)], pos(b), r, epsilon)
    down = _branch([(neg(w), pos(x)), (pos(w), neg(x))], [pos(x), neg(x)], neg(b), r, epsilon)
    return _sum((alpha, up), (-beta, down))


def gamma(w: Array, b: Array, x: Array, r: Array, gamma: float = 0.25, epsilon: float = 1e-6) -> Shares:
    """Favour what has the sign of the output."""
    z = w @ x + b
    p, n = w + gamma * pos(w), w + gamma * neg(w)
    up = _branch([(p, pos(x)), (n, neg(x))], [pos(x), neg(x)], b + gamma * pos(b), r * (z > 0), epsilon)
    down = _branch([(n, pos(x)), (p, neg(x))], [pos(x), neg(x)], b + gamma * neg(b), r * (z < 0), epsilon)
    masked = Shares(0 * x, 0.0, float(r[z == 0].sum()))
    return _sum((1, up), (1, down), (1, masked))


def wsquare(w: Array, b: Array, x: Array, r: Array, epsilon: float = 1e-6) -> Shares:
    """Share by squared weights."""
    one = np.ones_like(x)
    return _branch([(w**2, one)], [one], b**2, r, epsilon)


def wplus(w: Array, b: Array, x: Array, r: Array, epsilon: float = 1e-6) -> Shares:
    """Share by positive weights."""
    one = np.ones_like(x)
    return _branch([(pos(w), one)], [one], 0 * b, r, epsilon)


def flat(w: Array, b: Array, x: Array, r: Array, epsilon: float = 1e-6) -> Shares:
    """Share evenly over what a unit sees."""
    one = np.ones_like(x)
    return _branch([((w != 0).astype(float), one)], [one], 0 * b, r, epsilon)


def zbox(
    w: Array, b: Array, x: Array, r: Array, low: Array | float = -1.0, high: Array | float = 1.0, epsilon: float = 1e-6
) -> Shares:
    """Share by the distance to the corner of the box that a unit likes least."""
    low, high = np.broadcast_to(low, x.shape), np.broadcast_to(high, x.shape)
    return _branch([(w, x), (pos(w), -low), (neg(w), -high)], [x, -low, -high], 0 * b, r, epsilon)


ORACLES: dict[str, Rule] = {
    rule.__name__: rule for rule in (epsilon, lrp_0, norm, zplus, alpha_beta, gamma, wsquare, wplus, flat, zbox)
}
