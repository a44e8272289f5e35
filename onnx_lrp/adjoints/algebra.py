"""Discrete Fourier transform and determinant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnx_lrp.adjoints.registry import linear, nonlinear
from onnx_lrp.adjoints.shapes import along_axis, arange_like, as_int64, cast_like, concat_ints, dim_of, ints
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError


def _transform_axis(e: Emitter, call: Call) -> int:
    """The axis of a DFT, counted from zero: an attribute up to opset 19, an input since."""
    rank = call.given(0).rank
    if e.opset < 20:
        return int(call.attrs.get("axis", 1)) % rank
    if call.input(2) is None:
        return rank - 2
    known = e.ints(call.input(2))
    if known is None:
        raise ModelError(f"node '{call.site}' (DFT): its axis is computed at run time; export it as a constant")
    return known[0] % rank


def transformed(e: Emitter, value: Value, axis: int, length: Value | None = None, **attrs: Any) -> Value:
    """DFT of one axis, in the form of the opset.

    Args:
        e: the emitter.
        value: real or complex numbers, the last axis of length 1 or 2.
        axis: the axis, counted from zero.
        length: of the signal; default: that of the axis.
        attrs: inverse, onesided.
    """
    if e.opset < 20:
        return e.op("DFT", value, length, axis=axis, **attrs)
    return e.op("DFT", value, length, e.const(axis, np.int64), **attrs)


def _fitted(e: Emitter, value: Value, axis: int, length: Value) -> Value:
    """Zeros added to the end of an axis, or its end cut off, so that it has a length (int64 vector of one element)."""
    missing = length - dim_of(e, value, axis)
    if e.ints(missing) == [0]:
        return value
    return e.op("Pad", value, concat_ints(e, [[0], missing]), None, ints(e, [axis]))


@linear("DFT", settings=(1, 2))
def _dft(e: Emitter, call: Call, d: Value) -> Value:
    """Y = F x, its transpose for real and imaginary parts the conjugate: dx = F* d, where F* = n F⁻¹.

    x is cut or padded to length n, so dx is padded or cut. One-sided, the transform keeps the first half of the
    spectrum: d is zero in the other. The one-sided inverse takes the other half for the mirror image of the first: it
    counts twice, but for the first and (n even) the last of its numbers. (There, ONNX Runtime 1.32 departs from ONNX
    where n is neither 2m - 2 nor 2m - 1 for m numbers given.)
    """
    x, axis = call.given(0), _transform_axis(e, call)
    inverse, onesided = (int(call.attrs.get(name, 0)) for name in ("inverse", "onesided"))
    given, length = call.input(1), dim_of(e, x, axis)
    if given is not None:
        length = e.op("Reshape", as_int64(e, given), ints(e, [1]))
    elif inverse and onesided:
        length = (length - 1) * 2
    count = cast_like(e, length, x)
    if inverse and onesided:
        back = transformed(e, d, axis, onesided=1)
        places = arange_like(e, back, axis)
        once = e.op("Or", e.op("Equal", places, e.const(0, np.int64)), e.op("Equal", places * 2, length))
        times = e.op("Where", once, e.const(1, x.dtype), e.const(2, x.dtype))
        back = back * along_axis(e, times, axis, x.rank) / count
    else:
        back = transformed(e, _fitted(e, d, axis, length), axis, inverse=1 - inverse)
        back = back / count if inverse else back * count
    if x.shape[-1] != 2:  # of real numbers the real part
        back = _fitted(e, back, x.rank - 1, dim_of(e, x, -1))
    return _fitted(e, back, axis, dim_of(e, x, axis))


@nonlinear("Det")
def _det(e: Emitter, call: Call, d: Value) -> Value:
    """The derivative by an element is its cofactor: ± the determinant without its row and column (singular or not)."""
    x = call.given(0)
    rank = x.rank
    numbers = arange_like(e, x, -1)
    shorter = e.op("Slice", numbers, ints(e, [0]), ints(e, [-1]))
    column = e.op("Unsqueeze", numbers, ints(e, [1]))
    later = e.op("Cast", e.op("Not", e.op("Less", shorter, column)), to=onnx.TensorProto.INT64)
    others = shorter + later  # row i: all numbers but i
    rows = e.op("Gather", x, others, axis=rank - 2)  # (…, n, n-1, n)
    both = e.op("Gather", rows, others, axis=rank)  # (…, n, n-1, n, n-1)
    perm = [*range(rank - 1), rank, rank - 1, rank + 1]
    minors = e.op("Det", e.op("Transpose", both, perm=perm), shape=(None,) * rank)
    even = e.op("Equal", e.op("Mod", numbers + column, e.const(2, np.int64)), e.const(0, np.int64))
    signs = e.op("Where", even, e.const(1, x.dtype), e.const(-1, x.dtype))
    return minors * signs * e.op("Unsqueeze", d, ints(e, [-2, -1]))
