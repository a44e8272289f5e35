"""Sums, means, norms, products and extremes over axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_lrp.adjoints.registry import linear, nonlinear
from onnx_lrp.adjoints.shapes import cast_like, concat_ints, dim_of, ints, merge_axes, reshape_like, shape_of, size_of
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
    flat = merge_axes(e, x, 2)
    winner = e.op("ArgMax", flat, axis=2, keepdims=1)
    length = e.op("Squeeze", dim_of(e, flat, 2), ints(e, [0]))
    places = e.op("Range", e.const(0, np.int64), length, e.const(1, np.int64))
    hit = cast_like(e, e.op("Equal", places, winner), x)
    return reshape_like(e, hit * e.op("Reshape", d, ints(e, [0, 0, 1])), x)


@linear("CumSum")
def _cum_sum(e: Emitter, call: Call, d: Value) -> Value:
    """The sum from the other end: y_i = Σ_{j<=i} x_j, so dx_j = Σ_{i>=j} d_i; exclusive stays exclusive."""
    exclusive, backwards = (int(call.attrs.get(name, 0)) for name in ("exclusive", "reverse"))
    return e.op("CumSum", d, call.given(1), exclusive=exclusive, reverse=1 - backwards)


@nonlinear("CumProd")
def _cum_prod(e: Emitter, call: Call, d: Value) -> Value:
    """Dx_j = Σ_{i>=j} d_i times the product of all others up to i: 0 where one of these others is zero.

    With r for x with its zeros replaced by ones, p its running product and n the running number of zeros:
    Σ_i d_i p_i [n_i = 1 if x_j is zero, else 0] / r_j.
    """
    x, axis = call.given(0), call.given(1)
    kept: dict[str, Any] = {name: int(call.attrs.get(name, 0)) for name in ("exclusive", "reverse")}
    back = kept | {"reverse": 1 - kept["reverse"]}
    zero = e.op("Equal", x, e.const(0, x.dtype))
    rest = e.op("Where", zero, e.const(1, x.dtype), x)
    shares = d * e.op("CumProd", rest, axis, **kept)
    zeros = e.op("CumSum", cast_like(e, zero, x), axis, **kept)

    def where(count: int) -> Value:
        some = e.op("Where", e.op("Equal", zeros, e.const(count, x.dtype)), shares, e.const(0, x.dtype))
        return e.op("CumSum", some, axis, **back)

    return e.op("Where", zero, where(1), where(0)) / rest


def lp_slopes(e: Emitter, x: Value, y: Value, p: int) -> tuple[Value, Value]:
    """The slope dy/dx of y = (Σ |x|^p)^(1/p) as a factor of the size of y, y^(1-p), and one of x, sign(x) |x|^(p-1).

    Where all x are zero there is a kink: the first factor is 0.
    """
    zero, one = e.const(0, y.dtype), e.const(1, y.dtype)
    empty = e.op("Equal", y, zero)
    length = e.op("Where", empty, one, y)
    if p == 1:
        return cast_like(e, e.op("Not", empty), y), e.op("Sign", x)
    if p == 2:
        return e.op("Where", empty, zero, 1.0 / length), x
    inner = e.op("Where", empty, zero, e.op("Pow", length, float(1 - p)))
    return inner, e.op("Sign", x) * e.op("Pow", e.op("Abs", x), float(p - 1))


@nonlinear("ReduceL1")
def _reduce_l1(e: Emitter, call: Call, d: Value) -> Value:
    """Dx = d sign(x)."""
    return keep_axes(e, call, d) * e.op("Sign", call.given(0))


@nonlinear("ReduceL2")
def _reduce_l2(e: Emitter, call: Call, d: Value) -> Value:
    """Dx = d x / y, 0 where all x are zero."""
    inner, outer = lp_slopes(e, call.given(0), call.output, 2)
    return keep_axes(e, call, d * inner) * outer


@nonlinear("ReduceSumSquare")
def _reduce_sum_square(e: Emitter, call: Call, d: Value) -> Value:
    """Dx = 2 d x."""
    return keep_axes(e, call, d) * call.given(0) * 2.0


@nonlinear("ReduceLogSum")
def _reduce_log_sum(e: Emitter, call: Call, d: Value) -> Value:
    """Dx = d / Σ x."""
    return keep_axes(e, call, d * e.op("Exp", -call.output))


@nonlinear("ReduceLogSumExp")
def _reduce_log_sum_exp(e: Emitter, call: Call, d: Value) -> Value:
    """Dx = d exp(x - y): d times the softmax of x."""
    return keep_axes(e, call, d) * e.op("Exp", call.given(0) - keep_axes(e, call, call.output))


@nonlinear("ReduceProd")
def _reduce_prod(e: Emitter, call: Call, d: Value) -> Value:
    """Dx_j = d times the product of all others: where others are zero it is 0, at the only zero that of the rest."""
    x = call.given(0)
    known = None if reduced_axes(e, call) is not None else (None,) * x.rank
    kept: dict[str, Any] = {"keepdims": 1, "noop_with_empty_axes": int(call.attrs.get("noop_with_empty_axes", 0))}
    zero = e.op("Equal", x, e.const(0, x.dtype))
    rest = e.op("Where", zero, e.const(1, x.dtype), x)
    zeros = cast_like(e, zero, x)
    product = e.op("ReduceProd", rest, call.input(1), shape=known, **kept)
    others = e.op("ReduceSum", zeros, call.input(1), shape=known, **kept) - zeros
    return keep_axes(e, call, d) * e.op("Where", e.op("Greater", others, 0.0), e.const(0, x.dtype), product / rest)
