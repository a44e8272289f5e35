"""Picking and placing elements by indices: Gather*, Scatter*, TopK, Compress. What was picked is added back."""

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
from onnx_lrp.errors import ModelError


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


def _reduction(call: Call) -> str:
    """What happens where something is already: none overwrites, add adds; others are not linear."""
    reduction = str(call.attrs.get("reduction", "none"))
    if reduction not in ("none", "add"):
        raise ModelError(
            f"node '{call.site}' ({call.op}) has reduction={reduction}, which cannot be explained; none and add can"
        )
    return reduction


@linear("ScatterElements")
def _scatter_elements(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """Updates get d where they went; data gets d, zero where it was overwritten."""
    indices, updates, axis = call.given(1), call.given(2), int(call.attrs.get("axis", 0))
    picked = e.op("GatherElements", d, indices, axis=axis, shape=updates.shape)
    if _reduction(call) == "add":
        return [d, None, picked]
    return [e.op("ScatterElements", d, indices, zeros_like(e, updates), axis=axis), None, picked]


@linear("ScatterND")
def _scatter_nd(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """Updates get d where they went; data gets d, zero where it was overwritten."""
    indices, updates = call.given(1), call.given(2)
    picked = e.op("GatherND", d, indices, shape=updates.shape)
    if _reduction(call) == "add":
        return [d, None, picked]
    return [e.op("ScatterND", d, indices, zeros_like(e, updates)), None, picked]


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
