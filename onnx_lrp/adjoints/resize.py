"""Resize: every axis is a small matrix, got by resizing an identity matrix inside the graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnx_lrp.adjoints.registry import linear
from onnx_lrp.adjoints.shapes import arange_like, cast_like, concat_ints, dim_of, ints
from onnx_lrp.emit import Call, Emitter, Value

_KEPT = ("antialias", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "mode", "nearest_mode")


@linear("Resize", settings=(1, 2))
def _resize(e: Emitter, call: Call, d: Value) -> Value:
    """Y = M x along every axis in turn: dx = Mᵀ d."""
    x = call.given(0)
    axes = [a % x.rank for a in call.attrs.get("axes") or range(x.rank)]
    scales = _scales(e, call, axes)
    if _repeats(call, scales):
        return _sum_repeats(e, x, d, {a: round(s) for a, s in zip(axes, scales, strict=True) if s is not None})
    for k, axis in enumerate(axes):
        if _keeps_ratio(call):
            d = _along(e, d, _matrix_in_ratio(e, call, k, axes), axis)
        elif scales[k] != 1 or _crops(call):
            d = _along(e, d, _matrix(e, call, k, axis, scales[k]), axis)
    return d


def _keeps_ratio(call: Call) -> bool:
    """Whether one scale serves all axes, that of the axis which limits it."""
    return call.input(3) is not None and call.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch"


def _crops(call: Call) -> bool:
    return str(call.attrs.get("coordinate_transformation_mode", "half_pixel")) == "tf_crop_and_resize"


def _scales(e: Emitter, call: Call, axes: Sequence[int]) -> list[float | None]:
    """How much longer each axis becomes; None where it is not known."""
    if _keeps_ratio(call):
        return [None] * len(axes)
    if call.input(3) is not None:
        pairs = [(call.given(0).shape[a], call.output.shape[a]) for a in axes]
        return [
            m / n if isinstance(m, int) and isinstance(n, int) and n else 1.0 if m == n and m is not None else None
            for n, m in pairs
        ]
    known = e.array(call.given(2))
    return [None] * len(axes) if known is None else [float(s) for s in known]


def _repeats(call: Call, scales: Sequence[float | None]) -> bool:
    """Whether every element is repeated a whole number of times: nearest neighbours, enlarged."""
    whole = all(s is not None and s >= 1 and float(s).is_integer() for s in scales)
    if not whole or call.attrs.get("mode", "nearest") != "nearest":
        return False
    coordinates = str(call.attrs.get("coordinate_transformation_mode", "half_pixel"))
    rounding = str(call.attrs.get("nearest_mode", "round_prefer_floor"))
    if coordinates == "asymmetric":
        return rounding == "floor"
    return "half_pixel" in coordinates and "tf_" not in coordinates and rounding.startswith("round_")


def _sum_repeats(e: Emitter, x: Value, d: Value, repeats: dict[int, int]) -> Value:
    """Every axis becomes (length, repeats); the repeats are summed."""
    longer = [a for a, r in repeats.items() if r > 1]
    if not longer:
        return d
    parts: list[Value | Sequence[int]] = []
    summed: list[int] = []
    for axis in range(x.rank):
        parts.append(dim_of(e, x, axis))
        if axis in longer:
            summed.append(axis + len(summed) + 1)
            parts.append([repeats[axis]])
    return e.op("ReduceSum", e.op("Reshape", d, concat_ints(e, parts)), ints(e, summed), keepdims=0, shape=x.shape)


def _matrix(e: Emitter, call: Call, k: int, axis: int, scale: float | None) -> Value:
    """The matrix of one axis, transposed: the unit vectors, as channels of a picture of width 1, resized in height."""
    x, y = call.given(0), call.output
    attrs = {name: value for name, value in call.attrs.items() if name in _KEPT}
    length = dim_of(e, x, axis)
    picture = _unit_vectors(e, x, axis)
    roi = _region(e, call, k) if _crops(call) else None
    if call.input(3) is not None:
        sizes = concat_ints(e, [[1], length, dim_of(e, y, axis), [1]])
        resized = e.op("Resize", picture, roi, None, sizes, shape=(1, x.shape[axis], y.shape[axis], 1), **attrs)
    else:
        one = e.const(np.ones(1, np.float32))
        given = e.op("Slice", call.given(2), ints(e, [k]), ints(e, [k + 1]))
        scales = (
            e.op("Concat", one, one, given, one, axis=0)
            if scale is None
            else e.const(np.array([1, 1, scale, 1], np.float32), name="scales")
        )
        resized = e.op("Resize", picture, roi, scales, shape=(1, x.shape[axis], y.shape[axis], 1), **attrs)
    return e.op("Squeeze", resized, ints(e, [0, 3]))


def _unit_vectors(e: Emitter, x: Value, axis: int) -> Value:
    """The unit vectors of an axis as a picture of width 1: (1, vectors, height, 1)."""
    numbers = arange_like(e, x, axis)
    unit = cast_like(e, e.op("Equal", e.op("Unsqueeze", numbers, ints(e, [1])), numbers), x)
    return e.op("Unsqueeze", unit, ints(e, [0, 3]))


def _matrix_in_ratio(e: Emitter, call: Call, k: int, axes: Sequence[int]) -> Value:
    """The same where the ratio of all lengths is kept: the picture is as wide as the axis that sets the scale.

    All its columns are equal, before and after; the first is taken.
    """
    x, sizes, policy = call.given(0), call.given(3), str(call.attrs["keep_aspect_ratio_policy"])
    lengths = concat_ints(e, [dim_of(e, x, a) for a in axes])
    ratios = e.op("Div", *(e.op("Cast", v, to=onnx.TensorProto.FLOAT) for v in (sizes, lengths)))
    limit = e.op("ArgMin" if policy == "not_larger" else "ArgMax", ratios, axis=0, keepdims=1)
    width = e.op("Gather", lengths, limit)
    picture = e.op("Expand", _unit_vectors(e, x, axes[k]), concat_ints(e, [[1, 1, 1], width]))
    wanted = e.op("Concat", e.op("Slice", sizes, ints(e, [k]), ints(e, [k + 1])), e.op("Gather", sizes, limit), axis=0)
    attrs = {name: value for name, value in call.attrs.items() if name in _KEPT}
    resized = e.op(
        "Resize", picture, None, None, wanted, shape=(None,) * 4, axes=[2, 3], keep_aspect_ratio_policy=policy, **attrs
    )
    return e.op("Squeeze", e.op("Slice", resized, ints(e, [0]), ints(e, [1]), ints(e, [3])), ints(e, [0, 3]))


def _region(e: Emitter, call: Call, k: int) -> Value:
    """The part of one axis that tf_crop_and_resize looks at, as a region of a picture of height alone."""
    roi = call.given(1)
    count = len(call.attrs.get("axes") or range(call.given(0).rank))
    begin, end = (e.op("Slice", roi, ints(e, [i]), ints(e, [i + 1])) for i in (k, k + count))
    zero, one = (e.const(np.array([n], roi.dtype)) for n in (0, 1))
    return e.op("Concat", zero, zero, begin, zero, one, one, end, one, axis=0)


def _along(e: Emitter, d: Value, matrix: Value, axis: int) -> Value:
    """A matrix (to, from) applied along one axis."""
    rank = d.rank
    if axis == rank - 2:
        return matrix @ d
    turned = e.op("Transpose", matrix, perm=[1, 0])
    if axis == rank - 1:
        return d @ turned
    perm = [*(i for i in range(rank) if i != axis), axis]
    return e.op("Transpose", e.op("Transpose", d, perm=perm) @ turned, perm=[perm.index(i) for i in range(rank)])
