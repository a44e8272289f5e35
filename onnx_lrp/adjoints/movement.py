"""Operators whose every output element is a copy of one input element, or a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lrp.adjoints.registry import Cotangents, barrier, linear
from onnx_lrp.adjoints.shapes import (
    arange_like,
    as_int64,
    cast_like,
    concat_ints,
    crop_like,
    dim_of,
    ints,
    merge_axes,
    places_of,
    reshape_like,
    scatter_axis,
    scatter_flat,
    zeros_like,
)
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError


@linear("Reshape", "Flatten", "Squeeze", "Unsqueeze", moves=True)
def _reshape(e: Emitter, call: Call, d: Value) -> Value:
    return reshape_like(e, d, call.given(0))


@linear("Cast", "CastLike", moves=True, settings=(1,))
def _cast(e: Emitter, call: Call, d: Value) -> Value:
    return cast_like(e, d, call.given(0))


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
    pieces = e.ops("Split", d, sizes, outputs=len(parts), axis=axis)
    for piece, part in zip(pieces, parts, strict=True):  # inference knows the shapes only while sizes are folded
        piece.facts = replace(piece.facts, shape=part.shape)
    return pieces


@linear("Split", moves=True)
def _split(e: Emitter, call: Call, d: Value | Cotangents) -> Value:
    cotangents = [d] if isinstance(d, Value) else d
    parts = [
        zeros_like(e, o) if c is None and o is not None else c for c, o in zip(cotangents, call.outputs, strict=True)
    ]
    given = [p for p in parts if p is not None]
    if len(given) != len(parts):
        raise ModelError(f"node '{call.site}' (Split) leaves an output without a name; name all outputs of a Split")
    return given[0] if len(given) == 1 else e.op("Concat", *given, axis=int(call.attrs.get("axis", 0)))


@linear("Slice", moves=True)
def _slice(e: Emitter, call: Call, d: Value) -> Value:
    x, count = call.given(0), call.given(1).shape[0]
    axes = list(range(count)) if call.input(3) is None and isinstance(count, int) else e.ints(call.input(3))
    steps = [1] * len(axes or ()) if call.input(4) is None else e.ints(call.input(4))
    if axes is None or steps is None:
        # Axes or steps are computed at run time: take the same slice of the places, and add at these.
        return scatter_flat(e, d, e.op("Slice", places_of(e, x), *call.inputs[1:]), x)
    axes = [a % x.rank for a in axes]
    if all(s == 1 for s in steps):
        return _slice_by_pad(e, call, d, axes)
    for k, axis in enumerate(axes):
        pick = [_item(e, call.given(i), k) for i in (1, 2)]
        places = e.op("Slice", arange_like(e, x, axis), *pick, ints(e, [0]), ints(e, [steps[k]]))
        d = scatter_axis(e, d, places, axis, dim_of(e, x, axis))
    return d


def _item(e: Emitter, vector: Value, k: int) -> Value:
    """One element of a vector of integers, as a vector."""
    known = e.ints(vector)
    return as_int64(e, e.op("Slice", vector, ints(e, [k]), ints(e, [k + 1]))) if known is None else ints(e, [known[k]])


def _slice_by_pad(e: Emitter, call: Call, d: Value, axes: Sequence[int]) -> Value:
    """The adjoint of a slice with step 1: zeros before and after."""
    x, y = call.given(0), call.output
    before, after = [], []
    for k, axis in enumerate(axes):
        start, length = _item(e, call.given(1), k), dim_of(e, x, axis)
        wrapped = e.op("Where", e.op("Less", start, ints(e, [0])), start + length, start)
        begin = start if e.ints(start) == [0] else e.op("Min", e.op("Max", wrapped, ints(e, [0])), length)
        before.append(begin)
        after.append(length - begin - dim_of(e, y, axis))
    return e.op("Pad", d, concat_ints(e, [*before, *after]), None, ints(e, axes), shape=x.shape)


@linear("Pad", moves=True)
def _pad(e: Emitter, call: Call, d: Value) -> Value | Sequence[Value | None]:
    x, pads = call.given(0), call.given(1)
    known, mode = e.ints(pads), call.attrs.get("mode", "constant")
    axes = list(range(x.rank)) if call.input(3) is None else e.ints(call.input(3))
    if mode == "constant":
        if axes is not None and known is not None and min(known, default=0) >= 0:
            back = crop_like(e, d, x, [a % x.rank for a in axes], known[: len(axes)])
        else:  # a negative pad crops: what was added is cut away, what was cut away gets zeros
            back = e.op("Pad", d, -pads, None, call.input(3), shape=x.shape)
        if call.input(2) is None or not call.given(2).facts.active:
            return back
        return [back, None, e.op("ReduceSum", d, keepdims=0) - e.op("ReduceSum", back, keepdims=0)]
    if axes is None:
        return scatter_flat(e, d, e.op("Pad", places_of(e, x), pads, None, call.input(3), mode=mode), x)
    for k, axis in enumerate(axes):
        if known is not None and known[k] == 0 == known[k + len(axes)]:
            continue
        ends = [_item(e, pads, i) for i in (k, k + len(axes))]
        places = e.op("Pad", arange_like(e, x, axis), concat_ints(e, ends), mode=mode)
        d = scatter_axis(e, d, places, axis, dim_of(e, x, axis))
    return d


@linear("Gather", moves=True)
def _gather(e: Emitter, call: Call, d: Value) -> Value:
    x, indices = call.given(0), call.given(1)
    axis = int(call.attrs.get("axis", 0)) % x.rank
    flat = e.op("Reshape", as_int64(e, indices), ints(e, [-1]))
    length = dim_of(e, x, axis)
    positive = e.op("Where", e.op("Less", flat, e.const(0, np.int64)), flat + length, flat)
    if indices.rank == 0:
        merged = e.op("Unsqueeze", d, ints(e, [axis]))
    elif indices.rank == 1:
        merged = d
    else:
        merged = merge_axes(e, d, axis, axis + indices.rank)
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
        parts.append(
            [known[axis]] if known is not None else e.op("Slice", repeats, ints(e, [axis]), ints(e, [axis + 1]))
        )
        parts.append(dim_of(e, x, axis))
    split = e.op("Reshape", d, concat_ints(e, parts))
    return e.op("ReduceSum", split, ints(e, range(0, 2 * x.rank, 2)), keepdims=0, shape=x.shape)


@linear("Where", moves=True, broadcasts=True)
def _where(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    condition, nothing = call.given(0), e.const(0, d.dtype)
    return [None, e.op("Where", condition, d, nothing), e.op("Where", condition, nothing, d)]


@linear("DepthToSpace", moves=True)
def _depth_to_space(e: Emitter, call: Call, d: Value) -> Value:
    """SpaceToDepth; in mode CRD the channels it gives, (block, channel), change places."""
    x, block = call.given(0), int(call.attrs["blocksize"])
    back = e.op("SpaceToDepth", d, blocksize=block, shape=x.shape)
    if call.attrs.get("mode", "DCR") == "DCR":
        return back
    channels = e.op("Div", dim_of(e, x, 1), ints(e, [block * block]))
    sizes = concat_ints(e, [dim_of(e, x, 0), [block * block], channels, dim_of(e, x, 2), dim_of(e, x, 3)])
    split = e.op("Reshape", back, sizes, allowzero=1)
    return reshape_like(e, e.op("Transpose", split, perm=[0, 2, 1, 3, 4]), x)


@linear("SpaceToDepth", moves=True)
def _space_to_depth(e: Emitter, call: Call, d: Value) -> Value:
    return e.op("DepthToSpace", d, blocksize=int(call.attrs["blocksize"]), mode="DCR", shape=call.given(0).shape)


@linear("Trilu", moves=True)
def _trilu(e: Emitter, call: Call, d: Value) -> Value:
    """The same triangle of the cotangent."""
    return e.op("Trilu", d, call.input(1), upper=int(call.attrs.get("upper", 1)))


@linear("ReverseSequence", moves=True)
def _reverse_sequence(e: Emitter, call: Call, d: Value) -> Value:
    """Reversed twice is as before."""
    return e.op("ReverseSequence", d, call.given(1), **call.attrs)


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
    "EyeLike",
    "NonMaxSuppression",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "BlackmanWindow",
    "HammingWindow",
    "HannWindow",
    "MelWeightMatrix",
    "BitCast",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "RegexFullMatch",
    "TfIdfVectorizer",
    "ImageDecoder",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "Hardmax",
)
