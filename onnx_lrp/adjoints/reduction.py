"""Sums, means and extremes over axes."""

from __future__ import annotations

import numpy as np

from onnx_lrp.adjoints.registry import linear, nonlinear
from onnx_lrp.adjoints.shapes import cast_like, concat_ints, dim_of, ints, reshape_like, shape_of, size_of
from onnx_lrp.emit import Call, Emitter, Value


def reduced_axes(e: Emitter, call: Call) -> list[int] | None:
    """The axes that a Reduce* call sums over, counted from zero; None where they are computed at run time."""
    rank, axes = call.given(0).rank, e.ints(call.input(1))
    if call.input(1) is not None and axes is None:
        return None
    if not axes:
        return [] if call.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in axes)


def keep_axes(e: Emitter, call: Call, value: Value) -> Value:
    """Give a reduced tensor its summed axes back, with length 1 (or their full length where they are not known)."""
    x, axes = call.given(0), reduced_axes(e, call)
    if axes is None:
        # The operator itself says what is left of the shape.
        kept = e.op(call.op, x, call.input(1), shape=(None,) * x.rank, **{**call.attrs, "keepdims": 1})
        return e.op("Expand", e.op("Reshape", value, shape_of(e, kept), allowzero=1), shape_of(e, x), shape=x.shape)
    return value if call.attrs.get("keepdims", 1) or not axes else e.op("Unsqueeze", value, ints(e, axes))


def count_along(e: Emitter, x: Value, axes: list[int]) -> Value:
    """How many elements lie along some axes together, in the element type of x."""
    sizes = concat_ints(e, [dim_of(e, x, a) for a in axes] or [[1]])
    return cast_like(e, e.op("ReduceProd", sizes, keepdims=0), x)


@linear("ReduceSum")
def _reduce_sum(e: Emitter, call: Call, d: Value) -> Value:
    return keep_axes(e, call, d)


@linear("ReduceMean")
def _reduce_mean(e: Emitter, call: Call, d: Value) -> Value:
    x, axes = call.given(0), reduced_axes(e, call)
    if axes is None:
        return keep_axes(e, call, d * (cast_like(e, size_of(e, d), x) / cast_like(e, size_of(e, x), x)))
    return keep_axes(e, call, d / count_along(e, x, axes))


@linear("GlobalAveragePool")
def _global_average(e: Emitter, call: Call, d: Value) -> Value:
    x = call.given(0)
    return d / count_along(e, x, list(range(2, x.rank)))


@nonlinear("ReduceMax", "ReduceMin", moves=True)
def _reduce_extreme(e: Emitter, call: Call, d: Value) -> Value:
    """Where several elements tie, they share (as torch.amax does)."""
    x = call.given(0)
    hit = cast_like(e, e.op("Equal", x, keep_axes(e, call, call.output)), x)
    known = None if reduced_axes(e, call) is not None else (None,) * x.rank
    noop = int(call.attrs.get("noop_with_empty_axes", 0))
    count = e.op("ReduceSum", hit, call.input(1), keepdims=1, noop_with_empty_axes=noop, shape=known)
    return hit * (keep_axes(e, call, d) / count)


@nonlinear("GlobalMaxPool", moves=True)
def _global_max(e: Emitter, call: Call, d: Value) -> Value:
    """The first of the largest elements takes all, as in MaxPool."""
    x = call.given(0)
    flat = e.op("Reshape", x, ints(e, [0, 0, -1]))
    winner = e.op("ArgMax", flat, axis=2, keepdims=1)
    length = e.op("Squeeze", dim_of(e, flat, 2), ints(e, [0]))
    places = e.op("Range", e.const(0, np.int64), length, e.const(1, np.int64))
    hit = cast_like(e, e.op("Equal", places, winner), x)
    return reshape_like(e, hit * e.op("Reshape", d, ints(e, [0, 0, 1])), x)
