"""y_i = f(x_i): a table of derivatives, each a function of (e, call, x, y)."""

from __future__ import annotations

import math

import numpy as np

from onnx_lrp.adjoints.registry import linear, pointwise
from onnx_lrp.adjoints.shapes import cast_like, number
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError

_STEEP = 2.0**127  # times the smallest normal float32, 2^-126, is more than 1


def _where(e: Emitter, condition: Value, yes: Value | float, no: Value | float, like: Value) -> Value:
    a = yes if isinstance(yes, Value) else e.const(yes, like.dtype)
    b = no if isinstance(no, Value) else e.const(no, like.dtype)
    return e.op("Where", condition, a, b)


def _above(e: Emitter, x: Value, bound: float | Value = 0.0) -> Value:
    return e.op("Greater", x, bound)


def _step(e: Emitter, x: Value, bound: float | Value = 0.0) -> Value:
    """1 where x > bound, else 0."""
    return cast_like(e, _above(e, x, bound), x)


def _rectified(e: Emitter, y: Value) -> Value:
    """1 where a ReLU lets through, else 0.

    A HardSigmoid steep enough to reach 1 at the smallest normal number does it in one operator, and one that stays in
    ONNX Runtime's blocked layout; WebGPU does not promise what comes of its overflow.
    """
    if e.portable or y.dtype != np.float32:
        return _step(e, y)
    return e.op("HardSigmoid", y, alpha=_STEEP, beta=0.0, label="step")


def _inside(e: Emitter, call: Call, x: Value, y: Value) -> Value | float:
    """1 inside the bounds of a Clip, else 0; on a bound itself 1, as torch.clamp has it."""
    low, high = call.input(1), call.input(2)
    inside: Value | float = 1.0
    if low is not None:
        inside = 1.0 - cast_like(e, e.op("Less", x, low), x)
    if high is not None:
        inside = (1.0 - _step(e, x, high)) * inside
    return inside


def _at_low(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    """1 where a Clip gives its lower bound, else 0; bounds that cross give the upper one."""
    low, high = call.given(1), call.input(2)
    below = cast_like(e, e.op("Less", x, low), x)
    return below if high is None else below * (1.0 - _step(e, low, high))


def _at_high(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    """1 where a Clip gives its upper bound, else 0."""
    low = call.input(1)
    return _step(e, x if low is None else e.op("Max", x, low), call.given(2))


def _normal_density(x: Value, e: Emitter) -> Value:
    return e.op("Exp", x * x * -0.5) * (1 / math.sqrt(2 * math.pi))


def _normal_cdf(x: Value, e: Emitter) -> Value:
    return (e.op("Erf", x * math.sqrt(0.5)) + 1.0) * 0.5


def _gelu(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    if call.attrs.get("approximate", "none") == "none":
        return _normal_cdf(x, e) + x * _normal_density(x, e)
    # y = x/2 (1 + t), t = tanh(c (x + a x^3))
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = e.op("Tanh", (x + x * x * x * a) * c)
    return (t + 1.0) * 0.5 + x * (1.0 - t * t) * (x * x * (3 * a) + 1.0) * (0.5 * c)


def _elu(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    alpha = number(call, "alpha", 1.0)
    return _where(e, _above(e, x), 1.0, e.op("Exp", e.op("Min", x, 0.0)) * alpha, x)


def _selu(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    alpha, gamma = number(call, "alpha", 1.67326319217681884765625), number(call, "gamma", 1.05070102214813232421875)
    return _where(e, _above(e, x), gamma, e.op("Exp", e.op("Min", x, 0.0)) * (alpha * gamma), x)


def _celu(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    alpha = number(call, "alpha", 1.0)
    return _where(e, _above(e, x), 1.0, e.op("Exp", e.op("Min", x, 0.0) * (1 / alpha)), x)


def _hard_sigmoid(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    alpha = number(call, "alpha", 0.2)
    return _step(e, y) * _step(e, 1.0 - y) * alpha


def _hard_swish(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    """X * clip(x/6 + 1/2, 0, 1): x/3 + 1/2 inside (-3, 3), 0 below, 1 above."""
    return _where(e, e.op("Less", x, 3.0), _step(e, x, -3.0) * (x * (1 / 3) + 0.5), 1.0, x)


def _mish(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    t = e.op("Tanh", e.op("Softplus", x))
    return t + x * (1.0 - t * t) * e.op("Sigmoid", x)


def _swish(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    s = e.op("Sigmoid", x * number(call, "alpha", 1.0))
    return s + y * (1.0 - s) * number(call, "alpha", 1.0)


def _softsign(e: Emitter, call: Call, x: Value, y: Value) -> Value:
    scale = e.op("Abs", x) + 1.0
    return 1.0 / (scale * scale)


pointwise("Relu", lambda e, call, x, y: _rectified(e, y))
pointwise("LeakyRelu", lambda e, call, x, y: _where(e, _above(e, x), 1.0, number(call, "alpha", 0.01), x))
# The slope of PRelu, its second input, counts where x is negative.
pointwise(
    "PRelu",
    lambda e, call, x, y: _where(e, _above(e, x), 1.0, call.given(1), x),
    lambda e, call, x, y: e.op("Min", x, 0.0),
)
# Between its thresholds Shrink gives 0, beyond them x moved by a constant.
pointwise("Shrink", lambda e, call, x, y: _step(e, e.op("Abs", x), number(call, "lambd", 0.5)))
pointwise("ThresholdedRelu", lambda e, call, x, y: _step(e, x, number(call, "alpha", 1.0)))
pointwise("Clip", _inside, _at_low, _at_high)
pointwise("Sigmoid", lambda e, call, x, y: y * (1.0 - y))
pointwise("Tanh", lambda e, call, x, y: 1.0 - y * y)
pointwise("Erf", lambda e, call, x, y: e.op("Exp", -(x * x)) * (2 / math.sqrt(math.pi)))
pointwise("Gelu", _gelu)
pointwise("Exp", lambda e, call, x, y: y)
pointwise("Log", lambda e, call, x, y: 1.0 / x)
pointwise("Sqrt", lambda e, call, x, y: 0.5 / y)
pointwise("Reciprocal", lambda e, call, x, y: -(y * y))
pointwise("Abs", lambda e, call, x, y: e.op("Sign", x))
pointwise("HardSwish", _hard_swish)
pointwise("HardSigmoid", _hard_sigmoid)
pointwise("Elu", _elu)
pointwise("Selu", _selu)
pointwise("Celu", _celu)
pointwise("Softplus", lambda e, call, x, y: e.op("Sigmoid", x))
pointwise("Softsign", _softsign)
pointwise("Mish", _mish)
pointwise("Swish", _swish)
pointwise("Sin", lambda e, call, x, y: e.op("Cos", x))
pointwise("Cos", lambda e, call, x, y: -e.op("Sin", x))
pointwise("Tan", lambda e, call, x, y: y * y + 1.0)
pointwise("Asin", lambda e, call, x, y: 1.0 / e.op("Sqrt", 1.0 - x * x))
pointwise("Acos", lambda e, call, x, y: -1.0 / e.op("Sqrt", 1.0 - x * x))
pointwise("Atan", lambda e, call, x, y: 1.0 / (x * x + 1.0))
pointwise("Sinh", lambda e, call, x, y: e.op("Cosh", x))
pointwise("Cosh", lambda e, call, x, y: e.op("Sinh", x))
pointwise("Asinh", lambda e, call, x, y: 1.0 / e.op("Sqrt", x * x + 1.0))
pointwise("Acosh", lambda e, call, x, y: 1.0 / e.op("Sqrt", x * x - 1.0))
pointwise("Atanh", lambda e, call, x, y: 1.0 / (1.0 - x * x))


@linear("Identity", moves=True, elementwise=True)
def _identity(e: Emitter, call: Call, d: Value) -> Value:
    return d


@linear("Dropout", moves=True)
def _dropout(e: Emitter, call: Call, d: Value) -> Value:
    """Canonical passes see through a Dropout that is off; any other multiplies by numbers drawn anew in each run."""
    raise ModelError(f"node '{call.site}' (Dropout) is in training mode; export the model in evaluation mode")
