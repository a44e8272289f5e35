"""Softmax, LRN, and layers that bring their input to mean zero and length one.

In the gradient all of these are live; rule books hold the divisor constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lrp.adjoints.masked import filled
from onnx_lrp.adjoints.reduction import count_along, lp_slopes
from onnx_lrp.adjoints.registry import Cotangents, nonlinear
from onnx_lrp.adjoints.shapes import (
    along_axis,
    concat_ints,
    dim_of,
    ints,
    merge_axes,
    number,
    reshape_like,
    span_of,
    spatial_axes,
)
from onnx_lrp.emit import Call, Emitter, Value


def _axis(call: Call) -> int:
    return int(call.attrs.get("axis", -1)) % call.output.rank


@nonlinear("Softmax")
def _softmax(e: Emitter, call: Call, d: Value) -> Value:
    y = filled(e, call.output)  # in a row that is masked whole nothing has influence
    return y * (d - e.op("ReduceSum", d * y, ints(e, [_axis(call)]), keepdims=1))


@nonlinear("LogSoftmax")
def _log_softmax(e: Emitter, call: Call, d: Value) -> Value:
    return d - e.op("Exp", call.output) * e.op("ReduceSum", d, ints(e, [_axis(call)]), keepdims=1)


def _channel_sum(e: Emitter, value: Value, before: int, after: int) -> Value:
    """Sum over a window of channels around each one, zeros beyond the ends."""
    size = before + after + 1
    rows = e.op("Unsqueeze", merge_axes(e, value, 2), ints(e, [1]))
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


# ---- z = (x - mean) * s --------------------------------------------------------------------------------------------


def _mean(e: Emitter, value: Value, axes: Sequence[int]) -> Value:
    return e.op("ReduceMean", value, ints(e, axes), keepdims=1)


def _centred(e: Emitter, x: Value, axes: Sequence[int]) -> Value:
    return x - _mean(e, x, axes)


def _inverse_root(e: Emitter, x: Value, axes: Sequence[int], epsilon: float) -> Value:
    """1 / √(mean of x² + epsilon)."""
    return 1.0 / e.op("Sqrt", _mean(e, x * x, axes) + epsilon)


def _back(e: Emitter, g: Value, z: Value, s: Value, axes: Sequence[int]) -> Value:
    """Of z = x s, s = 1 / √(mean x² + ε), the adjoint is s (g - z mean(g z))."""
    return s * (g - z * _mean(e, g * z, axes))


@nonlinear("LayerNormalization", broadcasts=True, every=True)
def _layer_normalization(e: Emitter, call: Call, cotangents: Cotangents) -> Sequence[Value | None]:
    """Y = z scale + b, z = (x - m) s: dx = s (g - mean g - z mean(g z)) with g = d scale.

    The outputs m and s add dm / n and - ds s² z / n.
    """
    x, scale = call.given(0), call.given(1)
    axes = list(range(int(call.attrs.get("axis", -1)) % x.rank, x.rank))
    off = _centred(e, x, axes)
    s = _inverse_root(e, off, axes, number(call, "epsilon", 1e-5))
    z = off * s
    d, of_mean, of_inverse = [*cotangents, None, None][:3]
    parts = []
    if d is not None:
        parts.append(_centred(e, _back(e, d * scale, z, s, axes), axes))
    if of_mean is not None:
        parts.append(of_mean / count_along(e, x, axes))
    if of_inverse is not None:
        parts.append(-(of_inverse * s * s * z) / count_along(e, x, axes))
    total = parts[0] if len(parts) == 1 else e.op("Sum", *parts)
    return [total, None if d is None else d * z, d]


@nonlinear("RMSNormalization", broadcasts=True)
def _rms_normalization(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    """Y = z scale, z = x s with s = 1 / √(mean x² + ε): dx = s (g - z mean(g z)) with g = d scale."""
    x, scale = call.given(0), call.given(1)
    axes = list(range(int(call.attrs.get("axis", -1)) % x.rank, x.rank))
    s = _inverse_root(e, x, axes, number(call, "epsilon", 1e-5))
    z = x * s
    return [_back(e, d * scale, z, s, axes), d * z]


def _of_channels(e: Emitter, call: Call, value: Value) -> Value:
    """Sum over all but the channels."""
    return e.op("ReduceSum", value, ints(e, [0, *spatial_axes(call)]), keepdims=0)


@nonlinear("InstanceNormalization")
def _instance_normalization(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    """As LayerNormalization, over the positions of each channel; scale and bias have one number per channel."""
    x, axes = call.given(0), spatial_axes(call)
    off = _centred(e, x, axes)
    s = _inverse_root(e, off, axes, number(call, "epsilon", 1e-5))
    z = off * s
    g = d * along_axis(e, call.given(1), 1, x.rank)
    return [_centred(e, _back(e, g, z, s, axes), axes), _of_channels(e, call, d * z), _of_channels(e, call, d)]


def _groups(e: Emitter, call: Call) -> Value:
    """The shape (batch, groups, what is in a group)."""
    x, groups = call.given(0), int(call.attrs["num_groups"])
    return concat_ints(e, [dim_of(e, x, 0), [groups], e.op("Div", span_of(e, x, 1), ints(e, [groups]))])


@nonlinear("GroupNormalization")
def _group_normalization(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    """As LayerNormalization, over each group of channels; scale and bias have one number per channel."""
    x = call.given(0)
    split = _groups(e, call)
    off = _centred(e, e.op("Reshape", x, split, allowzero=1), [2])
    s = _inverse_root(e, off, [2], number(call, "epsilon", 1e-5))
    z = off * s
    g = e.op("Reshape", d * along_axis(e, call.given(1), 1, x.rank), split, allowzero=1)
    back = reshape_like(e, _centred(e, _back(e, g, z, s, [2]), [2]), x)
    return [back, _of_channels(e, call, d * reshape_like(e, z, x)), _of_channels(e, call, d)]


@nonlinear("MeanVarianceNormalization")
def _mean_variance_normalization(e: Emitter, call: Call, d: Value) -> Value:
    """Y = (x - m) / (σ + ε), ε = 1e-9: dx = (d - mean d - y mean(d y) (σ + ε) / σ) / (σ + ε)."""
    x, axes = call.given(0), list(call.attrs.get("axes") or [0, 2, 3])
    off = _centred(e, x, axes)
    deviation = e.op("Sqrt", _mean(e, off * off, axes))
    flat = e.op("Equal", deviation, e.const(0, x.dtype))
    sigma = e.op("Where", flat, e.const(1, x.dtype), deviation)
    whole = deviation + 1e-9
    y = off / whole
    return (_centred(e, d, axes) - y * (_mean(e, d * y, axes) * (whole / sigma))) / whole


@nonlinear("LpNormalization")
def _lp_normalization(e: Emitter, call: Call, d: Value) -> Value:
    """Y = x / n, n = (Σ |x|^p)^(1/p): dx = (d - Σ(d y) dn/dx) / n, 0 where all x are zero."""
    x, axis, p = call.given(0), ints(e, [int(call.attrs.get("axis", -1))]), int(call.attrs.get("p", 2))
    norm = e.op("ReduceL1" if p == 1 else "ReduceL2", x, axis, keepdims=1)
    inner, outer = lp_slopes(e, x, norm, p)
    present = lp_slopes(e, x, norm, 1)[0]
    length = norm + (1.0 - present)
    return (d - e.op("ReduceSum", d * x, axis, keepdims=1) / length * inner * outer) * present / length


# ---- the divisor held constant ---------------------------------------------------------------------------------------


def _inverse_deviation(e: Emitter, call: Call, axes: Sequence[int]) -> Value:
    """What a LayerNormalization multiplies with: one over the deviation along its axes."""
    x, epsilon = call.given(0), number(call, "epsilon", 1e-5)
    if e.portable or x.dtype != np.float32:  # the further outputs of the fused operator are float32
        return _inverse_root(e, _centred(e, x, axes), axes, epsilon)
    shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
    *_, inverse = e.ops("LayerNormalization", x, call.given(1), outputs=3, axis=axes[0], epsilon=epsilon)
    inverse.facts = replace(inverse.facts, shape=shape)
    return inverse


def linear_part(e: Emitter, call: Call, d: Value) -> Value:
    """The adjoint of a normalization as the linear layer that it is with its divisor held constant.

    Args:
        e: the emitter.
        call: one of ``NORMALIZATIONS``.
        d: cotangent of the output, in its shape.

    Returns:
        Cotangent of the first input.
    """
    x = call.given(0)
    epsilon = number(call, "epsilon", 1e-5)
    match call.op:
        case "LayerNormalization":
            axes = list(range(int(call.attrs.get("axis", -1)) % x.rank, x.rank))
            return _centred(e, d * call.given(1), axes) * _inverse_deviation(e, call, axes)
        case "RMSNormalization":
            axes = list(range(int(call.attrs.get("axis", -1)) % x.rank, x.rank))
            return d * call.given(1) * _inverse_root(e, x, axes, epsilon)
        case "InstanceNormalization":
            axes = spatial_axes(call)
            s = _inverse_root(e, _centred(e, x, axes), axes, epsilon) * along_axis(e, call.given(1), 1, x.rank)
            return _centred(e, d, axes) * s
        case "GroupNormalization":
            split = _groups(e, call)
            g = e.op("Reshape", d * along_axis(e, call.given(1), 1, x.rank), split, allowzero=1)
            off = _centred(e, e.op("Reshape", x, split, allowzero=1), [2])
            return reshape_like(e, _centred(e, g, [2]) * _inverse_root(e, off, [2], epsilon), x)
        case "MeanVarianceNormalization":
            axes = list(call.attrs.get("axes") or [0, 2, 3])
            off = _centred(e, x, axes)
            return _centred(e, d, axes) / (e.op("Sqrt", _mean(e, off * off, axes)) + 1e-9)
    axis, p = ints(e, [int(call.attrs.get("axis", -1))]), int(call.attrs.get("p", 2))
    norm = e.op("ReduceL1" if p == 1 else "ReduceL2", x, axis, keepdims=1)
    return e.op("Where", e.op("Equal", norm, e.const(0, x.dtype)), e.const(0, x.dtype), d / norm)


NORMALIZATIONS = (
    "LayerNormalization",
    "RMSNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "MeanVarianceNormalization",
    "LpNormalization",
)
