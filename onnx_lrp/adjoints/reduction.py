"""Sums, means and extremes over axes."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx

from onnx_lrp.adjoints.registry import linear, nonlinear
from onnx_lrp.adjoints.shapes import concat_ints, dim_of, ints
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError


def reduced_axes(e: Emitter, call: Call) -> list[int]:
    """The axes that a Reduce* call sums over, counted from zero."""
    x = call.given(0)
    axes = e.ints(call.input(1)) if call.input(1) is not None else call.attrs.get("axes")
    if call.input(1) is not None and axes is None:
        raise ModelError(f"node '{call.site}' ({call.op}): its axes are computed at run time; export with constant axes")
    if not axes:
        return [] if call.attrs.get("noop_with_empty_axes", 0) else list(range(x.rank))
    return sorted(a % x.rank for a in axes)


def keep_axes(e: Emitter, call: Call, value: Value) -> Value:
    """Give a reduced tensor its summed axes back, with length 1."""
    axes = reduced_axes(e, call)
    if call.attrs.get("keepdims", 1) or not axes:
        return value
    return e.op("Unsqueeze", value, ints(e, axes))


def count_along(e: Emitter, x: Value, axes: list[int]) -> Value | float:
    """How many elements lie along some axes together."""
    lengths = [x.shape[a] for a in axes]
    if all(isinstance(n, int) for n in lengths):
        return float(prod(n for n in lengths if isinstance(n, int)))
    sizes = concat_ints(e, [dim_of(e, x, a) for a in axes])
    total = e.op("ReduceProd", sizes, keepdims=0)
    return e.op("Cast", total, to=int(onnx.helper.np_dtype_to_tensor_dtype(x.dtype)))


@linear("ReduceSum")
def _reduce_sum(e: Emitter, call: Call, d: Value) -> Value:
    return keep_axes(e, call, d)


@linear("ReduceMean")
def _reduce_mean(e: Emitter, call: Call, d: Value) -> Value:
    count = count_along(e, call.given(0), reduced_axes(e, call))
    return keep_axes(e, call, d * (1 / count))


@linear("GlobalAveragePool")
def _global_average(e: Emitter, call: Call, d: Value) -> Value:
    x = call.given(0)
    return d * (1 / count_along(e, x, list(range(2, x.rank))))


@nonlinear("ReduceMax", "ReduceMin", moves=True)
def _reduce_extreme(e: Emitter, call: Call, d: Value) -> Value:
    """Where several elements tie, they share (as torch.amax does)."""
    x = call.given(0)
    axes = reduced_axes(e, call)
    hit = e.op("Cast", e.op("Equal", x, keep_axes(e, call, call.output)), to=int(onnx.helper.np_dtype_to_tensor_dtype(x.dtype)))
    count = e.op("ReduceSum", hit, ints(e, axes), keepdims=1) if axes else hit
    return hit * (keep_axes(e, call, d) / count)


@nonlinear("GlobalMaxPool", moves=True)
def _global_max(e: Emitter, call: Call, d: Value) -> Value:
    """The first of the largest elements takes all, as in MaxPool."""
    from onnx_lrp.adjoints.shapes import reshape_like

    x = call.given(0)
    flat = e.op("Reshape", x, ints(e, [0, 0, -1]))
    winner = e.op("ArgMax", flat, axis=2, keepdims=1)
    length = e.op("Squeeze", dim_of(e, flat, 2), ints(e, [0]))
    places = e.op("Range", e.const(0, np.int64), length, e.const(1, np.int64))
    hit = e.op("Cast", e.op("Equal", places, winner), to=int(onnx.helper.np_dtype_to_tensor_dtype(x.dtype)))
    return reshape_like(e, hit * e.op("Reshape", d, ints(e, [0, 0, 1])), x)
