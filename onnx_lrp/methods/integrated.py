"""Integrated gradients: the gradient along a straight path from a baseline to the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from onnx_lrp.adjoints.shapes import ints, zeros_like
from onnx_lrp.emit import Array, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.methods.baselines import Baseline, Baselines, completeness_delta
from onnx_lrp.methods.contract import Found, Plan, Walk
from onnx_lrp.methods.gradients import Gradient
from onnx_lrp.methods.sweep import Sweep, independent
from onnx_lrp.replay import leading, replay
from onnx_lrp.target import Seed, Start
from onnx_lrp.view import View

Quadrature = Literal["gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]


def nodes(quadrature: Quadrature, steps: int) -> tuple[Array, Array]:
    """Places in [0, 1] and weights that sum to 1, of a quadrature with so many nodes."""
    k = np.arange(steps)
    even = np.full(steps, 1 / steps)
    match quadrature:
        case "gauss_legendre":
            places, weights = np.polynomial.legendre.leggauss(steps)
            return (places + 1) / 2, weights / 2
        case "riemann_left":
            return k / steps, even
        case "riemann_right":
            return (k + 1) / steps, even
        case "riemann_middle":
            return (k + 0.5) / steps, even
        case "riemann_trapezoid":
            ends = np.where((k == 0) | (k == steps - 1), 0.5, 1.0)
            return k / (steps - 1), ends / (steps - 1)


@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1): (x - x0) * integral of dF(x0 + a (x - x0)) / dx da.

    The whole path lies in the graph. Several inputs move together, with one a for all. The output ``delta`` (N,) says
    how far the sum of the attributions is from F(x) - F(x0) (completeness, proposition 1 there): zero in the limit of
    many steps.

    Attributes:
        steps: nodes of the quadrature.
        baseline: x0: a number, "input" for a graph input ``baseline`` (zeros where nothing is fed; of several inputs
            ``baseline/<tensor>``), "tokens" for one of token ids, whose embeddings the path begins at, or a mapping of
            tensor names to these.
        quadrature: "gauss_legendre", "riemann_left", "riemann_right", "riemann_middle" or "riemann_trapezoid".
        chunk: how many steps are computed at once where the model's batch is free: more memory, fewer turns.
    """

    steps: int = 50
    baseline: Baseline = 0.0
    quadrature: Quadrature = "gauss_legendre"
    chunk: int = 4
    name: ClassVar[str] = "integrated_gradients"
    start: ClassVar[Start] = "one"
    tensors: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """See that the numbers make sense."""
        if self.quadrature not in get_args(Quadrature):
            raise InputError(f"quadrature is one of {', '.join(get_args(Quadrature))}, not {self.quadrature!r}")
        least = 2 if self.quadrature == "riemann_trapezoid" else 1
        for key, value, low in (("steps", self.steps, least), ("chunk", self.chunk, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{self.name}: {key} is a whole number of at least {low}, not {value!r}")

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """A walk at every step of the path."""
        independent(v, list(reported), self.name)
        baselines = Baselines.of(v, self.baseline, reported, self.name)
        places, weights = (a.astype(explained.dtype) for a in nodes(self.quadrature, self.steps))

        def path(e: Emitter, x: Value, numbers: Value) -> Value:
            far = e.op("Reshape", e.op("Gather", e.const(places, x.dtype), numbers), ints(e, [-1] + [1] * x.rank))
            start = baselines(e, x)
            return start + far * (x - start)

        def report(e: Emitter, x: Value, found: Found) -> Value:
            return found[0][x].whole(e) * (x - baselines(e, x)) if x in found[0] else zeros_like(e, x)

        def delta(e: Emitter, found: Found, seed: Seed) -> dict[str, Value]:
            parts = [report(e, x, found) for x in reported]
            start = {x: baselines(e, x) for x in reported}
            before = replay(e, leading(v.calls, list(start), [explained]), start)[explained]
            return {"delta": completeness_delta(e, parts, explained, before, seed)}

        run = Sweep(v, explained, list(reported), path, weights, self.chunk)
        return Plan([Walk(Gradient().step_for, list(reported), run)], report, extras=delta)
