"""Picking and placing elements by indices: Gather*, Scatter*, TopK, Compress, Unique, OneHot.

What was picked is added back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lrp.adjoints.registry import linear, nonlinear
from onnx_lrp.adjoints.shapes import (
    arange_like,
    as_int64,
    cast_like,
    concat_ints,
    dim_of,
    ints,
    merge_axes,
    places_of,
    reshape_like,
    same_shape,
    scatter_axis,
    scatter_flat,
    shape_of,
    size_of,
    zeros_like,
)
from onnx_lrp.emit import Call, Emitter, Value


@linear("GatherElements", moves=True)
def _gather_elements(e: Emitter, call: Call, d: Value) -> Value:
    """Y[i] = x[index[i] along the axis]: ScatterElements adds d where y came from."""
    x, indices = call.given(0), call.given(1)
    axis = int(call.attrs.get("axis", 0)) % x.rank
    if e.portable:
        return _one_hot_elements(e, x, indices, d, axis)
    return e.op("ScatterElements", zeros_like(e, x), indices, d, axis=axis, reduction="add", shape=x.shape)


def _one_hot_elements(e: Emitter, x: Value, indices: Value, d: Value, axis: int) -> Value:
    """The same for runtimes that add nothing while scattering: each row of d times a one-hot matrix of its own."""
    last = [*(i for i in range(x.rank) if i != axis), axis]
    length = dim_of(e, x, axis)
    picked = as_int64(e, indices)
    picked = e.op("Where", e.op("Less", picked, e.const(0, np.int64)), picked + length, picked)
    rows, columns = (e.op("Transpose", v, perm=last) for v in (d, picked))
    hit = cast_like(e, e.op("Equal", e.op("Unsqueeze", columns, ints(e, [-1])), arange_like(e, x, axis)), d)
    summed = e.op("Squeeze", e.op("Unsqueeze", rows, ints(e, [-2])) @ hit, ints(e, [-2]))
    back = e.op("Transpose", summed, perm=[last.index(i) for i in range(x.rank)])
    if same_shape(indices, x):
        return back
    # Along the other axes there may be fewer indices than elements.
    return e.op("Pad", back, concat_ints(e, [[0] * x.rank, shape_of(e, x) - shape_of(e, back)]), shape=x.shape)


@linear("GatherND", moves=True)
def _gather_nd(e: Emitter, call: Call, d: Value) -> Value:
    """The axes that the indices run over become one: d is added to rows whose numbers GatherND itself tells."""
    x, indices = call.given(0), call.given(1)
    batch, depth = int(call.attrs.get("batch_dims", 0)), indices.shape[-1]
    if not isinstance(depth, int):
        return scatter_flat(e, d, e.op("GatherND", places_of(e, x), indices, batch_dims=batch), x)
    lead = concat_ints(e, [dim_of(e, x, i) for i in range(batch + depth)])
    count = e.op("ReduceProd", lead, keepdims=1)
    stop = e.op("Squeeze", count, ints(e, [0]))
    numbers = e.op("Reshape", e.op("Range", e.const(0, np.int64), stop, e.const(1, np.int64)), lead)
    rows = e.op("Reshape", e.op("GatherND", numbers, indices, batch_dims=batch), ints(e, [-1]))
    merged = merge_axes(e, merge_axes(e, d, indices.rank - 1), 0, indices.rank - 1)
    return reshape_like(e, scatter_axis(e, merged, rows, 0, count), x)


def _scattered(e: Emitter, call: Call, numbers: Sequence[Value], reduction: str) -> Value:
    """The same scattering of other data and updates."""
    data, updates = numbers
    attrs = call.attrs | {"reduction": reduction}
    return e.op(call.op, data, call.given(1), updates, shape=call.output.shape, **attrs)


@linear("ScatterElements", "ScatterND")
def _scatter(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """Updates get d where they went; data gets d, zero where it was overwritten (reduction none).

    With max and min the largest and smallest get d, and share where they tie, as in torch's scatter_reduce; with mul
    each factor gets d times the product of the others.
    """
    x, indices, updates = call.given(0), call.given(1), call.given(2)
    reduction = str(call.attrs.get("reduction", "none"))

    def picked(value: Value) -> Value:
        """What an output-shaped tensor holds where the updates went."""
        if call.op == "ScatterND":
            return e.op("GatherND", value, indices, shape=updates.shape)
        return e.op("GatherElements", value, indices, axis=int(call.attrs.get("axis", 0)), shape=updates.shape)

    if reduction == "none":
        return [_scattered(e, call, (d, zeros_like(e, updates)), "none"), None, picked(d)]
    if reduction == "add":
        return [d, None, picked(d)]
    if reduction == "mul":
        # With zeros replaced by ones: product / own, but 0 where there is a zero among the others.
        zero, one = e.const(0, x.dtype), e.const(1, x.dtype)
        zeros = [e.op("Equal", v, zero) for v in (x, updates)]
        rest = [e.op("Where", z, one, v) for z, v in zip(zeros, (x, updates), strict=True)]
        counts = [cast_like(e, z, x) for z in zeros]
        product, count = _scattered(e, call, rest, "mul"), _scattered(e, call, counts, "add")
        others = [count - counts[0], picked(count) - counts[1]]
        pulled = [d * product / rest[0], picked(d * product) / rest[1]]
        found = [e.op("Where", e.op("Equal", o, zero), p, zero) for o, p in zip(others, pulled, strict=True)]
    else:
        y = call.output
        hits = [cast_like(e, e.op("Equal", v, at), x) for v, at in ((x, y), (updates, picked(y)))]
        share = d / _scattered(e, call, hits, "add")
        found = [hits[0] * share, hits[1] * picked(share)]
    return [found[0], None, found[1]]


@nonlinear("TopK", moves=True)
def _top_k(e: Emitter, call: Call, d: Value) -> Value:
    """The winners get d; no element is picked twice, so nothing has to be summed."""
    x = call.given(0)
    indices = call.outputs[1] if len(call.outputs) > 1 else None
    if indices is None:
        indices = e.ops("TopK", x, call.given(1), outputs=2, **call.attrs)[1]
    return e.op("ScatterElements", zeros_like(e, x), indices, d, axis=int(call.attrs.get("axis", -1)), shape=x.shape)


@linear("Compress", moves=True)
def _compress(e: Emitter, call: Call, d: Value) -> Value:
    """D goes where the condition is true; without an axis the tensor is read flat."""
    x, axis = call.given(0), call.attrs.get("axis")
    places = e.op("Reshape", e.op("NonZero", call.given(1)), ints(e, [-1]))
    if axis is not None:
        return scatter_axis(e, d, places, int(axis), dim_of(e, x, int(axis)))
    length = e.op("Reshape", size_of(e, x), ints(e, [1]))
    return reshape_like(e, scatter_axis(e, d, places, 0, length), x)


@linear("OneHot", moves=True, settings=(0, 1))
def _one_hot(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """The values (off, on) get the sum of d over the places that hold them."""
    values = call.given(2)
    hot = e.op("OneHot", call.given(0), call.given(1), e.const([0, 1], d.dtype), axis=int(call.attrs.get("axis", -1)))
    sums = [e.op("ReduceSum", e.op("Reshape", v, ints(e, [-1])), keepdims=1) for v in (d * (1.0 - hot), d * hot)]
    return [None, None, cast_like(e, e.op("Concat", *sums, axis=0), values)]


@nonlinear("Unique", moves=True)
def _unique(e: Emitter, call: Call, d: Value) -> Value:
    """What is kept gets d; of equal ones the first, to which the second output points."""
    x, axis = call.given(0), call.attrs.get("axis")
    indices = call.outputs[1] if len(call.outputs) > 1 else None
    if indices is None:
        indices = e.ops("Unique", x, outputs=2, **call.attrs)[1]
    if axis is not None:
        return scatter_axis(e, d, indices, int(axis), dim_of(e, x, int(axis)))
    length = e.op("Reshape", size_of(e, x), ints(e, [1]))
    return reshape_like(e, scatter_axis(e, d, indices, 0, length), x)
