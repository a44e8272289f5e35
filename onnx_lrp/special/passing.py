"""Passing: the one live input takes all of the relevance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from onnx_lrp.adjoints import OPERATORS, adjoint
from onnx_lrp.adjoints.normalization import lrn_scale
from onnx_lrp.adjoints.shapes import expand_like, number, reduce_like
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.special.common import Out, nothing


@dataclass(frozen=True)
class Pass:
    """The one live input takes all of the relevance: activations, normalizations held constant, offsets.

    With ``exact``, relevance that arrives as a multiple of the output, R = y·c, leaves as the equal multiple of the
    input, R = x·(c·y/x), wherever y/x is bounded: so the layer before has nothing to divide.
    """

    exact: bool = False

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs."""
        relevance, active = out[0], call.active
        if relevance is None:
            return nothing(call)
        if len(active) != 1:
            # Of a quotient (or its remainder) the numerator carries the signal.
            if call.op not in ("Div", "Mod"):
                raise RuleError(
                    f"node '{call.site}': pass needs one live input, this {call.op} has {len(active)}; "
                    "use norm, share or gate"
                )
            active = (0,)
        x, y = call.given(active[0]), call.output
        factor = _times_ratio(e, call, relevance.factor, active[0]) if self.exact and relevance.of is y else None
        if factor is not None:
            relevance = Relevance(factor, x)
        elif OPERATORS[call.op].broadcasts:
            if _stretched(call, x):
                relevance = Relevance(reduce_like(e, expand_like(e, relevance.whole(e), y), x))
        elif x.rank != y.rank or any(
            isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(x.shape, y.shape, strict=True)
        ):
            raise RuleError(
                f"node '{call.site}': pass needs an input in the shape of the output, this {call.op} has "
                f"{x.shape} -> {y.shape}; use norm"
            )
        return [relevance if i == active[0] else None for i in range(len(call.inputs))]


def _stretched(call: Call, x: Value) -> bool:
    """Whether an input may have been broadcast to the size of the output."""
    y = call.output
    if x.rank != y.rank:
        return True
    others = [v for v in call.inputs if v is not None and v is not x]

    def alone(axis: int) -> bool:
        """True if no other input can be longer than 1 there."""
        return all(v.rank < y.rank - axis or v.shape[axis - y.rank] == 1 for v in others)

    return any(
        a != b and (a == 1 or not isinstance(a, int)) and not alone(i)
        for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True))
    )


# ---- y / x -----------------------------------------------------------------------------------------------------------

Ratio = Callable[[Emitter, Call, Value, Value], Value]

# Where y is x times something that the adjoint multiplies with: products, and activations of slopes that are constant.
_PROPORTIONAL = ("Mul", "Div", "Neg", "Cast", "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Abs")
# Activations that are x times a gate, which says more precisely what y / x is, and has a value at x = 0.
_GATED: dict[str, Ratio] = {
    "Gelu": lambda e, call, x, y: _gelu_gate(e, call, x),
    "Swish": lambda e, call, x, y: e.op("Sigmoid", x * number(call, "alpha", 1.0)),
    "HardSwish": lambda e, call, x, y: e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5),
    "Mish": lambda e, call, x, y: e.op("Tanh", e.op("Softplus", x)),
    "LRN": lambda e, call, x, y: e.op("Pow", lrn_scale(e, call), -number(call, "beta", 0.75)),
}
# Others that are 0 at 0, with a bounded slope.
_THROUGH_ZERO: tuple[str, ...] = (
    "Tanh",
    "Erf",
    "Elu",
    "Selu",
    "Celu",
    "Softsign",
    "Sin",
    "Tan",
    "Asin",
    "Atan",
    "Sinh",
    "Asinh",
)
_THROUGH_ZERO += ("Atanh", "Shrink")


def _gelu_gate(e: Emitter, call: Call, x: Value) -> Value:
    if call.attrs.get("approximate", "none") == "none":
        return (e.op("Erf", x * 0.5**0.5) + 1.0) * 0.5
    return (e.op("Tanh", (x + x * x * x * 0.044715) * (2 / math.pi) ** 0.5) + 1.0) * 0.5


def _times_ratio(e: Emitter, call: Call, c: Value, index: int) -> Value | None:
    """The cotangent c times y / x, for an input x; None where that quotient has no bound."""
    x, y = call.given(index), call.output
    if call.op in _PROPORTIONAL:
        return None if call.op == "Div" and index == 1 else adjoint(e, call, [c], [index])[index]
    if call.op in _GATED:
        return c * _GATED[call.op](e, call, x, y)
    if call.op in _THROUGH_ZERO or _through_zero(e, call):
        return c * (y / e.op("Where", e.op("Equal", x, e.const(0, x.dtype)), e.const(1, x.dtype), x))
    return None


def _through_zero(e: Emitter, call: Call) -> bool:
    """Whether a Clip or a power is 0 at 0 with a bounded slope."""
    if call.op == "Pow":
        exponent = e.array(call.given(1))
        return exponent is not None and bool((exponent >= 1).all())
    low, high = call.input(1), call.input(2)
    return call.op == "Clip" and (low is None or low.nonpositive) and (high is None or high.nonnegative)
