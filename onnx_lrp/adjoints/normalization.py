"""Softmax, LogSoftmax, LRN."""

from __future__ import annotations

from onnx_lrp.adjoints.registry import nonlinear
from onnx_lrp.adjoints.shapes import ints, number, reshape_like
from onnx_lrp.emit import Call, Emitter, Value


def _axis(call: Call) -> int:
    return int(call.attrs.get("axis", -1)) % call.output.rank


@nonlinear("Softmax")
def _softmax(e: Emitter, call: Call, d: Value) -> Value:
    y = call.output
    return y * (d - e.op("ReduceSum", d * y, ints(e, [_axis(call)]), keepdims=1))


@nonlinear("LogSoftmax")
def _log_softmax(e: Emitter, call: Call, d: Value) -> Value:
    return d - e.op("Exp", call.output) * e.op("ReduceSum", d, ints(e, [_axis(call)]), keepdims=1)


def _channel_sum(e: Emitter, value: Value, before: int, after: int) -> Value:
    """Sum over a window of channels around each one, zeros beyond the ends."""
    size = before + after + 1
    rows = e.op("Reshape", value, ints(e, [0, 1, value.shape[1], -1])) if isinstance(value.shape[1], int) else None
    if rows is None:
        rows = e.op("Unsqueeze", e.op("Reshape", value, ints(e, [0, 0, -1])), ints(e, [1]))
    mean = e.op("AveragePool", rows, kernel_shape=[size, 1], pads=[before, 0, after, 0], count_include_pad=1)
    return reshape_like(e, mean * float(size), value)


def lrn_scale(e: Emitter, call: Call) -> Value:
    """The divisor of LRN before the power: bias + alpha/size * sum of squares over the window of channels."""
    x, size = call.given(0), int(call.attrs["size"])
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = _channel_sum(e, x * x, before, after)
    return squares * (number(call, "alpha", 1e-4) / size) + number(call, "bias", 1.0)


@nonlinear("LRN")
def _lrn(e: Emitter, call: Call, d: Value) -> Value:
    """Y = x s^-b with s = k + a/n Σ x²: dx = d s^-b − 2ab/n x Σᵀ(d x s^(-b-1)), Σᵀ summing over the mirrored window."""
    x, size = call.given(0), int(call.attrs["size"])
    alpha, beta = number(call, "alpha", 1e-4), number(call, "beta", 0.75)
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    scale = lrn_scale(e, call)
    power = e.op("Pow", scale, -beta)
    inner = _channel_sum(e, d * x * power / scale, after, before)
    return d * power - x * inner * (2 * alpha * beta / size)
