"""DeepLIFT: what every operator did between a reference and the input, carried back as multipliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_lrp.adjoints import OPERATORS, adjoint
from onnx_lrp.adjoints.shapes import expand_like, reduce_like, zeros_like
from onnx_lrp.backward import Relevance, Step, gradient
from onnx_lrp.bodies import expand, has_body
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError
from onnx_lrp.methods.baselines import Baseline, Baselines, completeness_delta
from onnx_lrp.methods.contract import Found, Plan, Walk
from onnx_lrp.methods.integrated import nodes
from onnx_lrp.methods.sweep import independent
from onnx_lrp.places import Place
from onnx_lrp.replay import leading, replay
from onnx_lrp.subgraphs import is_control
from onnx_lrp.target import Seed, Start
from onnx_lrp.unroll import is_short, unrolled
from onnx_lrp.view import View

_STILL = 1e-10  # inputs that moved less than this have no slope of their own: their derivative stands in
_NODES = 8  # of the mean derivative of operators that are neither linear, nor bilinear, nor of one variable
_MAXIMA = ("MaxPool", "GlobalMaxPool", "ReduceMax", "Max")
_MINIMA = ("ReduceMin", "Min")


@dataclass(frozen=True)
class DeepLift:
    """DeepLIFT by the rescale rule (Shrikumar et al. 2017, sec. 3.5.1): (x - x0) times a multiplier.

    A multiplier is the mean derivative of an operator on the way from the reference to the input: for one variable
    that is (y - y0) / (x - x0), the rescale rule (where x did not move: f'(x)); for a linear operator its adjoint; for
    a product of two live tensors each one's mean. Softmax and normalization are seen through the function body that
    ONNX gives them; of what has none the mean is taken over eight nodes of Gauss and Legendre. A maximum is shared
    between both winners by the larger of y and y0, as in captum. So contributions sum to F(x) - F(x0) (eq. 1 there);
    the output ``delta`` (N,) is what is missing.

    Attributes:
        baseline: x0: a number, "input" for a graph input ``baseline`` (zeros where nothing is fed; of several inputs
            ``baseline/<tensor>``), "tokens" for one of token ids, whose embeddings the path begins at, or a mapping of
            tensor names to these.
    """

    baseline: Baseline = 0.0
    name: ClassVar[str] = "deeplift"
    start: ClassVar[Start] = "one"
    tensors: ClassVar[Sequence[str]] = ()

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """The model once more at the reference, and one walk that compares."""
        independent(v, list(reported), self.name)
        baselines = Baselines.of(v, self.baseline, reported, self.name)
        v.calls = [part for call in v.calls for part in _parts(v.e, call)]
        start = {x: baselines(v.e, x) for x in reported}
        before = replay(v.e, leading(v.calls, list(reported), [explained]), start)
        twins = {call: twin for twin, call in before.calls}

        def step_for(place: Place) -> tuple[Step, str, str] | None:
            operator = OPERATORS.get(place.call.op)
            if operator is None or operator.adjoint is None or place.call.domain:
                return None
            if place.call not in twins:
                raise ModelError(
                    f"node '{place.call.site}' ({place.call.op}) stands inside an If, Loop or Scan, which {self.name} "
                    "does not go through; choose integrated_gradients"
                )
            return _step(place.call, twins[place.call])

        def report(e: Emitter, x: Value, found: Found) -> Value:
            return found[0][x].whole(e) * (x - start[x]) if x in found[0] else zeros_like(e, x)

        def delta(e: Emitter, found: Found, seed: Seed) -> dict[str, Value]:
            parts = [report(e, x, found) for x in reported]
            return {"delta": completeness_delta(e, parts, explained, before[explained], seed)}

        return Plan([Walk(step_for, list(reported))], report, extras=delta)


def _parts(e: Emitter, call: Call) -> list[Call]:
    """A call of several variables as the calls of its body, whose multipliers are exact; itself where it has none.

    A Scan of a known length is seen as its steps.
    """
    if is_control(call) and call.op == "Scan" and is_short(call):
        return [part for step in unrolled(e, call) for part in _parts(e, step)]
    operator = OPERATORS.get(call.op)
    if call.domain or operator is None or operator.verb != "nonlinear" or not has_body(call.op, e.opset):
        return [call]
    return expand(e, call) or [call]


def _step(call: Call, twin: Call) -> tuple[Step, str, str]:
    """The step of a call, given its counterpart at the reference."""
    operator, live = OPERATORS[call.op], len(call.active)
    if operator.verb == "linear" or (operator.verb == "bilinear" and live == 1):
        return gradient, "gradient", "linear"
    if call.op in _MAXIMA or call.op in _MINIMA:
        return _Winners(twin, "Max" if call.op in _MAXIMA else "Min"), "rescale", "both winners"
    if call.op == "Div":
        return _Quotient(twin), "rescale", "both means"
    if operator.verb == "pointwise" and live == 1:
        return _Rescale(twin), "rescale", "one variable"
    return _MeanGradient(twin, 1 if operator.verb == "bilinear" else _NODES), "rescale", "mean derivative"


def _slope(e: Emitter, call: Call, twin: Call, share: Value, resting: Value | None) -> Value:
    """A contribution as a multiplier of the first live input; the derivative where that did not move."""
    (i,) = call.active
    x = call.given(i)
    moved = x - twin.given(i)
    still = e.op("Less", e.op("Abs", moved), e.const(_STILL, x.dtype))
    ratio = share / e.op("Where", still, e.const(1.0, x.dtype), moved)
    return e.op("Where", still, zeros_like(e, x) if resting is None else expand_like(e, resting, x), ratio)


@dataclass(frozen=True, eq=False)
class _Rescale:
    """m * (y - y0) / (x - x0)."""

    twin: Call

    def __call__(self, e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
        assert out[0] is not None
        m = expand_like(e, out[0].whole(e), call.output)
        (i,) = call.active
        resting = adjoint(e, call, [m])[i]
        shares: list[Relevance | None] = [None] * len(call.inputs)
        shares[i] = Relevance(_slope(e, call, self.twin, m * (call.output - self.twin.output), resting))
        return shares


@dataclass(frozen=True, eq=False)
class _Winners:
    """What the larger of y and y0 is above y0 goes to the winner, what y is below it to the winner of the reference."""

    twin: Call
    larger: str

    def __call__(self, e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
        assert out[0] is not None
        m, y, y0 = expand_like(e, out[0].whole(e), call.output), call.output, self.twin.output
        none = [None] * (len(call.outputs) - 1)
        top = e.op(self.larger, y, y0)
        won = adjoint(e, call, [m * (top - y0), *none])
        lost = adjoint(e, self.twin, [m * (y - top), *none], call.active)
        resting = adjoint(e, call, [m, *none])
        shares: list[Relevance | None] = [None] * len(call.inputs)
        for i in call.active:
            parts = [p for p in (won[i], lost[i]) if p is not None]
            if parts:
                one = replace(call, inputs=(call.inputs[i],)), replace(self.twin, inputs=(self.twin.inputs[i],))
                shares[i] = Relevance(_slope(e, *one, sum(parts[1:], parts[0]), resting[i]))
        return shares


@dataclass(frozen=True, eq=False)
class _Quotient:
    """a / b as a times 1/b: each factor with the mean of the other, and 1/b rescaled: -1 / (b b0)."""

    twin: Call

    def __call__(self, e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
        assert out[0] is not None
        m = expand_like(e, out[0].whole(e), call.output)
        (a, b), (a0, b0) = ((c.given(0), c.given(1)) for c in (call, self.twin))
        shares = [m * (1.0 / b + 1.0 / b0) * 0.5, m * (a + a0) * -0.5 / (b * b0)]
        return [
            Relevance(reduce_like(e, share, x)) if x.facts.active else None
            for share, x in zip(shares, (a, b), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _MeanGradient:
    """The derivative's mean along the line from the reference to the input, by Gauss and Legendre's nodes."""

    twin: Call
    count: int

    def __call__(self, e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
        cotangents = [None if r is None else r.whole(e) for r in out]
        total: list[Value | None] = [None] * len(call.inputs)
        for place, weight in zip(*nodes("gauss_legendre", self.count), strict=True):
            points = {}
            for i in call.active:
                start = self.twin.given(i)
                points[i] = start + (call.given(i) - start) * float(place)
            for i, part in enumerate(adjoint(e, e.again(call, points), cotangents, call.active)):
                if part is not None:
                    weighted, so_far = part * float(weight), total[i]
                    total[i] = weighted if so_far is None else so_far + weighted
        return [None if part is None else Relevance(part) for part in total]
