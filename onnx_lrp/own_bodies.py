"""Function bodies for operators that ONNX gives none, written with operators that have an adjoint.

A body is a function of the emitter and the call that emits the operator's result; :mod:`bodies` sees the call through
it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_lrp.adjoints.algebra import transformed
from onnx_lrp.adjoints.contraction import geometry
from onnx_lrp.adjoints.shapes import arange_like, as_int64, cast_like, concat_ints, dim_of, ints, shape_of
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError

Body = Callable[[Emitter, Call], Value]


def _scalar(e: Emitter, value: Value) -> Value:
    return e.op("Reshape", as_int64(e, value), ints(e, []))


def _numbers(e: Emitter, count: Value) -> Value:
    """0, 1, … up to a count."""
    return e.op("Range", e.const(0, np.int64), count, e.const(1, np.int64))


def _stft(e: Emitter, call: Call) -> Value:
    """Frames of the signal, times the window, each transformed."""
    signal, window = call.given(0), call.input(2)
    if signal.rank == 2:
        signal = e.op("Unsqueeze", signal, ints(e, [2]))
    step, total = _scalar(e, call.given(1)), dim_of(e, signal, 1)
    if call.input(3) is not None:
        length = _scalar(e, call.given(3))
    else:
        length = _scalar(e, total if window is None else dim_of(e, window, 0))
    frames = e.op("Div", _scalar(e, total) - length, step) + 1
    begins = e.op("Unsqueeze", _numbers(e, frames) * step, ints(e, [1]))
    pieces = e.op("Gather", signal, begins + _numbers(e, length), axis=1)  # (batch, frames, length, 1 or 2)
    if window is not None:
        pieces = pieces * e.op("Unsqueeze", window, ints(e, [1]))
    return transformed(e, pieces, 2, onesided=int(call.attrs.get("onesided", 1)))


def _deform_conv(e: Emitter, call: Call) -> Value:
    """GridSample where the kernel's taps look, times the mask, times the weights: a matrix product per group.

    (Zhu et al. 2019, "Deformable ConvNets v2", eq. 1.)
    """
    x, weight, offset = (call.given(i) for i in range(3))
    bias, mask, g = call.input(3), call.input(4), geometry(call)
    sets, taps = int(call.attrs.get("offset_group", 1)), int(np.prod(g.kernel))
    batch, channels = dim_of(e, x, 0), dim_of(e, x, 1)
    high, wide = dim_of(e, offset, 2), dim_of(e, offset, 3)
    # Where each tap looks: (batch, sets, taps, 2, high, wide), its own place plus what the offset adds.
    moved = e.op("Reshape", offset, concat_ints(e, [batch, [sets, taps, 2], high, wide]), allowzero=1)
    per_axis = []
    for k, axis in enumerate((2, 3)):
        tap = (np.indices(g.kernel)[k] * g.dilations[k]).reshape(-1, 1, 1) - g.begin[k]
        grown = e.op("Unsqueeze", arange_like(e, offset, axis) * g.strides[k], ints(e, [1] if k == 0 else [0]))
        place = cast_like(e, grown + tap.astype(np.int64), x) + e.op("Gather", moved, e.const(k, np.int64), axis=3)
        per_axis.append((place * 2.0 + 1.0) / cast_like(e, dim_of(e, x, axis), x) - 1.0)
    grid = e.op("Concat", *(e.op("Unsqueeze", v, ints(e, [5])) for v in reversed(per_axis)), axis=5)
    grid = e.op("Reshape", grid, concat_ints(e, [batch * sets, high * taps, wide, [2]]), allowzero=1)
    sizes = concat_ints(e, [batch * sets, channels / sets, dim_of(e, x, 2), dim_of(e, x, 3)])
    mode = "linear" if e.opset >= 20 else "bilinear"
    seen = e.op("GridSample", e.op("Reshape", x, sizes, allowzero=1), grid, mode=mode)
    if mask is not None:
        sizes = concat_ints(e, [batch, [sets], channels / sets, [taps], high, wide])
        each = e.op("Reshape", seen, sizes, allowzero=1)
        counts = e.op("Reshape", mask, concat_ints(e, [batch, [sets, 1, taps], high, wide]), allowzero=1)
        seen = each * counts
    rows = concat_ints(e, [batch, [g.group], channels * taps / g.group, high * wide])
    kernel = e.op("Reshape", weight, concat_ints(e, [[g.group, -1], dim_of(e, weight, 1) * taps]))
    product = kernel @ e.op("Reshape", seen, rows, allowzero=1)
    sizes = concat_ints(e, [batch, dim_of(e, weight, 0), high, wide])
    result = e.op("Reshape", product, sizes, allowzero=1, shape=call.output.shape)
    return result if bias is None else result + e.op("Unsqueeze", bias, ints(e, [1, 2]))


def _tensor_scatter(e: Emitter, call: Call) -> Value:
    """ScatterElements, the update's rows following one another from where the sample begins."""
    cache, update, begin = call.given(0), call.given(1), call.input(2)
    axis = int(call.attrs.get("axis", -2)) % cache.rank
    places = e.op("Reshape", arange_like(e, update, axis), ints(e, [-1, *[1] * (cache.rank - 1 - axis)]))
    if begin is not None:
        places = places + e.op("Reshape", as_int64(e, begin), ints(e, [-1, *[1] * (cache.rank - 1)]))
    if call.attrs.get("mode", "linear") == "circular":
        places = e.op("Mod", places, dim_of(e, cache, axis))
    return e.op("ScatterElements", cache, e.op("Expand", places, shape_of(e, update)), update, axis=axis)


def _affine_grid(e: Emitter, call: Call) -> Value:
    """Places from -1 to 1 along every axis, the last axis first, and a one: times the matrix of each sample."""
    theta, size = call.given(0), call.given(1)
    axes = size.shape[0]
    if not isinstance(axes, int):
        raise ModelError(f"node '{call.site}' (AffineGrid): the length of its input size is not known")
    corners, rank = bool(call.attrs.get("align_corners", 0)), axes - 2
    lengths = [e.op("Slice", size, ints(e, [k]), ints(e, [k + 1])) for k in range(2, axes)]
    columns: list[Value] = []
    for k, length in enumerate(lengths):
        numbers, count = (cast_like(e, v, theta) for v in (_numbers(e, _scalar(e, length)), length))
        # A single place is at -1, as ONNX Runtime has it.
        along = numbers * 2.0 / e.op("Max", count - 1.0, 1.0) - 1.0 if corners else (numbers * 2.0 + 1.0) / count - 1.0
        row = e.op("Reshape", along, ints(e, [-1 if i == k else 1 for i in range(rank)]))
        columns.insert(0, e.op("Unsqueeze", e.op("Expand", row, concat_ints(e, lengths)), ints(e, [-1])))
    ones = e.op("ConstantOfShape", concat_ints(e, [*lengths, [1]]), value=np.ones(1, theta.dtype))
    places = e.op("Reshape", e.op("Concat", *columns, ones, axis=-1), ints(e, [-1, rank + 1]))
    grid = places @ e.op("Transpose", theta, perm=[0, 2, 1])
    return e.op("Reshape", grid, concat_ints(e, [dim_of(e, theta, 0), *lengths, [rank]]), shape=call.output.shape)


OWN_BODIES: dict[str, Body] = {
    "STFT": _stft,
    "DeformConv": _deform_conv,
    "TensorScatter": _tensor_scatter,
    "AffineGrid": _affine_grid,  # the one in its schema has branches
}
