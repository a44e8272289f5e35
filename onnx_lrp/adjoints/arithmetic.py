"""Sums, products and quotients of tensors; broadcast axes are summed away by :func:`registry.adjoint`."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lrp.adjoints.registry import bilinear, linear, nonlinear
from onnx_lrp.adjoints.shapes import cast_like
from onnx_lrp.emit import Call, Emitter, Value


@linear("Add", "Sum", elementwise=True, broadcasts=True)
def _add(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    return [d] * len(call.inputs)


@linear("Sub", elementwise=True, broadcasts=True)
def _sub(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    return [d, -d]


@linear("Neg", elementwise=True)
def _neg(e: Emitter, call: Call, d: Value) -> Value:
    return -d


@linear("Mean", elementwise=True, broadcasts=True)
def _mean(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    return [d / len(call.inputs)] * len(call.inputs)


bilinear(
    "Mul", lambda e, call, d: d * call.given(1), lambda e, call, d: d * call.given(0), broadcasts=True, elementwise=True
)


def _affine(e: Emitter, call: Call) -> Value:
    product, offset = call.given(0) * call.given(1), call.input(2)
    return product if offset is None else product + offset


# Inference-time BatchNormalization as the diagonal layer x * slope + offset (canonical.py works both out).
bilinear(
    "BatchNormalization",
    lambda e, call, d: d * call.given(1),
    lambda e, call, d: d * call.given(0),
    bias=2,
    broadcasts=True,
    elementwise=True,
    forward=_affine,
)


@nonlinear("Div", broadcasts=True)
def _div(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    b = call.given(1)
    return [d / b, -(d * call.output / b)]


@nonlinear("Pow", broadcasts=True)
def _pow(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """d/dx x^p = p x^(p-1), zero for p = 0; d/dp x^p = x^p log x, zero where x = 0."""
    x, p = call.given(0), call.given(1)
    exponent = e.array(p)
    if exponent is not None and exponent.size == 1:
        power = float(exponent.reshape(()))
        if power == 0:
            slope = x * 0.0
        elif power == 1:
            slope = x * 0.0 + 1.0
        else:
            slope = (x if power == 2 else e.op("Pow", x, power - 1)) * power
        return [d * slope, None]
    p = cast_like(e, p, x)
    is_zero = e.op("Equal", p, e.const(0, x.dtype))
    slope = e.op("Where", is_zero, e.const(0, x.dtype), p * e.op("Pow", x, p - 1.0))
    positive = e.op("Greater", x, e.const(0, x.dtype))
    log = e.op("Log", e.op("Where", positive, x, e.const(1, x.dtype)))
    return [d * slope, d * call.output * log]


@nonlinear("Max", "Min", moves=True, broadcasts=True)
def _extreme(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    """Where several inputs tie, they share (as torch.maximum does)."""
    y = call.output
    hits = [cast_like(e, e.op("Equal", v, y), y) for v in call.inputs if v is not None]
    share = d / e.op("Sum", *hits) if len(hits) > 1 else d
    return [share * hit for hit in hits]


@nonlinear("Mod", broadcasts=True)
def _mod(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """Y = a - b n, n the quotient rounded (towards zero with fmod, else down): da = d, db = -d n."""
    a, b = call.given(0), call.given(1)
    return [d, -(d * e.op("Round", (a - call.output) / b))]
