"""Operators whose every output element is a copy of one input element, or a constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnx_lrp.adjoints.registry import Cotangents, barrier, linear
from onnx_lrp.adjoints.shapes import arange_like, concat_ints, dim_of, ints, reshape_like, scatter_axis, zeros_like
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError


@linear("Reshape", "Flatten", "Squeeze", "Unsqueeze", moves=True)
def _reshape(e: Emitter, call: Call, d: Value) -> Value:
    return reshape_like(e, d, call.given(0))


@linear("Cast", moves=True)
def _cast(e: Emitter, call: Call, d: Value) -> Value:
    return e.op("Cast", d, to=int(onnx.helper.np_dtype_to_tensor_dtype(call.given(0).dtype)))


@linear("Transpose", moves=True)
def _transpose(e: Emitter, call: Call, d: Value) -> Value:
    perm = call.attrs.get("perm") or list(range(call.given(0).rank))[::-1]
    return e.op("Transpose", d, perm=[perm.index(i) for i in range(len(perm))])


@linear("Concat", moves=True)
def _concat(e: Emitter, call: Call, d: Value) -> Sequence[Value]:
    axis = int(call.attrs["axis"])
    parts = [v for v in call.inputs if v is not None]
    if len(parts) == 1:
        return [d]
    sizes = concat_ints(e, [dim_of(e, v, axis) for v in parts])
    return e.ops("Split", d, sizes, outputs=len(parts), axis=axis)


@linear("Split", moves=True)
def _split(e: Emitter, call: Call, d: Value | Cotangents) -> Value:
    cotangents = [d] if isinstance(d, Value) else d
    parts = [zeros_like(e, o) if c is None and o is not None else c for c, o in zip(cotangents, call.outputs, strict=True)]
    given = [p for p in parts if p is not None]
    if len(given) != len(parts):
        raise ModelError(f"node '{call.site}' (Split) leaves an output without a name; name all outputs of a Split")
    return given[0] if len(given) == 1 else e.op("Concat", *given, axis=int(call.attrs.get("axis", 0)))


@linear("Slice", moves=True)
def _slice(e: Emitter, call: Call, d: Value) -> Value:
    x, y = call.given(0), call.output
    starts = e.ints(call.input(1))
    count = starts if starts is not None else e.ints(call.input(2))
    axes = e.ints(call.input(3)) if call.input(3) is not None else list(range(len(count or [])))
    steps = e.ints(call.input(4)) if call.input(4) is not None else [1] * len(axes or [])
    if axes is None or steps is None:
        raise ModelError(f"node '{call.site}' (Slice): its axes or steps are computed at run time; export with constant ones")
    axes = [a % x.rank for a in axes]
    if starts is not None and all(s == 1 for s in steps) and (padded := _slice_by_pad(e, d, x, y, starts, axes)) is not None:
        return padded
    # Any other form: take the same slice of the positions, and add at these.
    for k, axis in enumerate(axes):
        pick = [e.op("Slice", call.given(i), ints(e, [k]), ints(e, [k + 1])) for i in (1, 2)]
        pick = [p if p.dtype == np.int64 else e.op("Cast", p, to=onnx.TensorProto.INT64) for p in pick]
        places = e.op("Slice", arange_like(e, x, axis), pick[0], pick[1], ints(e, [0]), ints(e, [steps[k]]))
        d = scatter_axis(e, d, places, axis, dim_of(e, x, axis))
    return d


def _slice_by_pad(e: Emitter, d: Value, x: Value, y: Value, starts: Sequence[int], axes: Sequence[int]) -> Value | None:
    before: list[Value | Sequence[int]] = []
    after: list[Value | Sequence[int]] = []
    for start, axis in zip(starts, axes, strict=True):
        length, kept = x.shape[axis], y.shape[axis]
        if isinstance(length, int):
            begin = min(max(start + length if start < 0 else start, 0), length)
        elif start >= 0 and kept != 0:
            begin = start
        else:
            return None
        before.append([begin])
        if isinstance(length, int) and isinstance(kept, int):
            after.append([length - begin - kept])
        else:
            after.append(dim_of(e, x, axis) - dim_of(e, y, axis) - ints(e, [begin]))
    return e.op("Pad", d, concat_ints(e, [*before, *after]), None, ints(e, axes), shape=x.shape)


@linear("Pad", moves=True)
def _pad(e: Emitter, call: Call, d: Value) -> Value:
    x, pads = call.given(0), call.given(1)
    if call.attrs.get("mode", "constant") == "constant":
        # A negative pad crops: what was added is cut away, what was cut away gets zeros.
        return e.op("Pad", d, -pads if e.ints(pads) is None else ints(e, [-p for p in e.ints(pads) or []]), None, call.input(3), shape=x.shape)
    axes = e.ints(call.input(3)) if call.input(3) is not None else list(range(x.rank))
    if axes is None:
        raise ModelError(f"node '{call.site}' (Pad): its axes are computed at run time; export with constant ones")
    known = e.ints(pads)
    for k, axis in enumerate(axes):
        if known is not None and known[k] == 0 == known[k + len(axes)]:
            continue
        ends = [e.op("Slice", pads, ints(e, [i]), ints(e, [i + 1])) for i in (k, k + len(axes))]
        places = e.op("Pad", arange_like(e, x, axis), concat_ints(e, ends), mode=call.attrs["mode"])
        d = scatter_axis(e, d, places, axis % x.rank, dim_of(e, x, axis))
    return d


@linear("Gather", moves=True)
def _gather(e: Emitter, call: Call, d: Value) -> Value:
    x, indices = call.given(0), call.given(1)
    axis = int(call.attrs.get("axis", 0)) % x.rank
    wide = indices if indices.dtype == np.int64 else e.op("Cast", indices, to=onnx.TensorProto.INT64)
    flat = e.op("Reshape", wide, ints(e, [-1]))
    length = dim_of(e, x, axis)
    positive = e.op("Where", e.op("Less", flat, e.const(0, np.int64)), flat + length, flat)
    if indices.rank == 0:
        merged = e.op("Unsqueeze", d, ints(e, [axis]))
    elif indices.rank == 1:
        merged = d
    else:
        sizes = [dim_of(e, x, i) for i in range(x.rank)]
        merged = e.op("Reshape", d, concat_ints(e, [*sizes[:axis], [-1], *sizes[axis + 1 :]]))
    return scatter_axis(e, merged, positive, axis, length)


@linear("Expand", moves=True, broadcasts=True)
def _expand(e: Emitter, call: Call, d: Value) -> Value:
    return d


@linear("Tile", moves=True)
def _tile(e: Emitter, call: Call, d: Value) -> Value:
    """Every axis becomes (repeats, length); the repeats are summed."""
    x, repeats = call.given(0), call.given(1)
    known = e.ints(repeats)
    parts: list[Value | Sequence[int]] = []
    for axis in range(x.rank):
        parts.append([known[axis]] if known is not None else e.op("Slice", repeats, ints(e, [axis]), ints(e, [axis + 1])))
        parts.append(dim_of(e, x, axis))
    split = e.op("Reshape", d, concat_ints(e, parts))
    return e.op("ReduceSum", split, ints(e, range(0, 2 * x.rank, 2)), keepdims=0, shape=x.shape)


@linear("Where", moves=True, broadcasts=True)
def _where(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    condition, nothing = call.given(0), e.const(0, d.dtype)
    return [None, e.op("Where", condition, d, nothing), e.op("Where", condition, nothing, d)]


barrier(
    "Shape",
    "Size",
    "Range",
    "Constant",
    "ConstantOfShape",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Not",
    "And",
    "Or",
    "Xor",
    "ArgMax",
    "ArgMin",
    "NonZero",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "IsNaN",
    "IsInf",
    "OneHot",
    "EyeLike",
    "NonMaxSuppression",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
)
