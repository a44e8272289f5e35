"""GridSample and RoiAlign: weighted sums of a few pixels each, linear in the picture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lrp.adjoints.registry import linear
from onnx_lrp.adjoints.shapes import (
    arange_like,
    cast_like,
    concat_ints,
    dim_of,
    ints,
    number,
    product_of,
    reshape_like,
    scatter_axis,
)
from onnx_lrp.emit import Array, Call, Emitter, Value
from onnx_lrp.errors import ModelError

# Weights of the pixels around a place, t behind the last pixel before it, as polynomials: rows 1, t, t², t³. The cubic
# ones are Keys's convolution with a = -3/4 for the pixels at -1, 0, 1, 2 (Keys 1981, IEEE Trans. ASSP 29, eq. 4).
_A = -0.75
_CUBIC = [[0, 1, 0, 0], [_A, 0, -_A, 0], [-2 * _A, -_A - 3, 2 * _A + 3, _A], [_A, _A + 2, -_A - 2, -_A]]
_WEIGHTS = {"nearest": np.array([[1.0]]), "linear": np.array([[1.0, 0], [-1, 1]]), "cubic": np.array(_CUBIC)}


# ---- GridSample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taps:
    """The pixels that each output looks at along one axis, all of shape (batch, outputs, taps).

    Attributes:
        places: positions of the pixels.
        weights: what they count; 0 outside of the picture.
        slopes: derivative of the weights by the grid's coordinate.
    """

    places: Value
    weights: Value
    slopes: Value


@linear("GridSample", settings=(1,))
def _grid_sample(e: Emitter, call: Call, d: Value) -> Sequence[Value | None]:
    """Y = Σ w x over the pixels around a place: w d is added to them, and the grid gets Σ w' x d."""
    x, grid = call.given(0), call.given(1)
    batch, channels, axes = dim_of(e, x, 0), dim_of(e, x, 1), range(x.rank - 2)
    pixels, outputs = product_of(e, x, range(2, x.rank)), product_of(e, grid, range(1, grid.rank - 1))
    points = e.op("Reshape", grid, concat_ints(e, [batch, outputs, [len(axes)]]), allowzero=1)
    taps = [_along(e, call, points, k) for k in axes]

    def weights(sloping: int | None) -> Value:
        """The weights of all axes multiplied, of one axis its slope."""
        factors = [tap.slopes if k == sloping else tap.weights for k, tap in enumerate(taps)]
        return cast_like(e, functools.reduce(functools.partial(_outer, e, "Mul"), factors), x)

    begin = e.op("Unsqueeze", arange_like(e, x, 0) * pixels, ints(e, [1, 2]))
    flat = taps[0].places
    for k in axes[1:]:
        flat = _outer(e, "Add", flat * dim_of(e, x, 2 + k), taps[k].places)
    places = flat + begin
    each = e.op("Unsqueeze", _positions_first(e, d, [batch, channels, outputs]), ints(e, [2]))
    shares = e.op("Unsqueeze", weights(None), ints(e, [3])) * each  # (batch, outputs, taps, channels)
    count = product_of(e, shares, range(3))
    rows = e.op("Reshape", shares, concat_ints(e, [count, channels]), allowzero=1)
    summed = scatter_axis(e, rows, e.op("Reshape", places, count, allowzero=1), 0, batch * pixels)
    split = e.op("Reshape", summed, concat_ints(e, [batch, pixels, channels]), allowzero=1)
    back = reshape_like(e, e.op("Transpose", split, perm=[0, 2, 1]), x)
    if not grid.facts.active:
        return [back]
    table = _positions_first(e, x, [batch, channels, pixels])
    table = e.op("Reshape", table, concat_ints(e, [batch * pixels, channels]), allowzero=1)
    matters = e.op("ReduceSum", e.op("Gather", table, places) * each, ints(e, [3]), keepdims=0)
    # The grid names the last axis first.
    parts = [e.op("ReduceSum", matters * weights(k), ints(e, [2]), keepdims=1) for k in reversed(axes)]
    return [back, reshape_like(e, cast_like(e, e.op("Concat", *parts, axis=2), grid), grid)]


def _positions_first(e: Emitter, value: Value, lengths: Sequence[Value]) -> Value:
    """A tensor (batch, channels, …) as (batch, positions, channels)."""
    return e.op("Transpose", e.op("Reshape", value, concat_ints(e, lengths), allowzero=1), perm=[0, 2, 1])


def _outer(e: Emitter, op: str, a: Value, b: Value) -> Value:
    """Every tap of one axis with every tap of another."""
    pairs = e.op(op, e.op("Unsqueeze", a, ints(e, [3])), e.op("Unsqueeze", b, ints(e, [2])))
    sizes = [dim_of(e, pairs, 0), dim_of(e, pairs, 1), product_of(e, pairs, (2, 3))]
    return e.op("Reshape", pairs, concat_ints(e, sizes), allowzero=1)


def _along(e: Emitter, call: Call, points: Value, k: int) -> _Taps:
    """The taps of one spatial axis, as ONNX Runtime (and torch) finds them.

    Coordinates run from -1 to 1: over the centres of the pixels with align_corners, else over their outer edges. What
    lies outside is clamped or reflected: in mode cubic every tap by itself, in other modes their place as a whole.
    """
    x, axis = call.given(0), 2 + k
    column = x.rank - 3 - k
    mode = str(call.attrs.get("mode", "linear")).removeprefix("bi")  # opset 16 says bilinear and bicubic
    padding, corners = str(call.attrs.get("padding_mode", "zeros")), bool(call.attrs.get("align_corners", 0))
    n = e.op("Slice", points, ints(e, [column]), ints(e, [column + 1]), ints(e, [2]))
    length = cast_like(e, dim_of(e, x, axis), n)
    scale = (length - 1.0) * 0.5 if corners else length * 0.5
    place = (n + 1.0) * scale - (0.0 if corners else 0.5)
    if mode != "cubic" and padding != "zeros":
        place, inward = _brought_inside(e, place, length, padding, corners)
        scale = scale * inward
    begin = e.op("Round" if mode == "nearest" else "Floor", place)
    polynomials = _WEIGHTS[mode]
    count = len(polynomials)
    weights = _polynomial(e, polynomials, place - begin)
    slopes = _polynomial(e, polynomials[1:] * np.arange(1, count)[:, None], place - begin) * scale
    places = begin + (np.arange(polynomials.shape[1]) - float(mode == "cubic"))
    if mode == "cubic" and padding != "zeros":
        places, _ = _brought_inside(e, places, length, padding, corners)
    clamped = e.op("Max", e.op("Min", places, length - 1.0), 0.0)
    if padding == "zeros":
        within = cast_like(e, e.op("Equal", clamped, places), n)
        weights, slopes = weights * within, slopes * within
    return _Taps(e.op("Cast", clamped, to=onnx.TensorProto.INT64), weights, slopes)


def _polynomial(e: Emitter, coefficients: Array, t: Value) -> Value:
    """Polynomials in t, one per column of their coefficients, by Horner's scheme."""
    total = t * np.zeros(coefficients.shape[1])
    for row in coefficients[::-1]:
        total = total * t + row
    return total


def _brought_inside(e: Emitter, place: Value, length: Value, padding: str, corners: bool) -> tuple[Value, Value]:
    """A place inside the picture for one that may be outside; and the derivative of that."""
    inward: Value | float = 1.0
    if padding == "reflection":
        low, span = (0.0, e.op("Max", length - 1.0, 1.0)) if corners else (-0.5, length)
        beyond = e.op("Abs", place - low)
        flips = e.op("Floor", beyond / span)
        rest, odd = beyond - flips * span, flips - e.op("Floor", flips * 0.5) * 2.0
        inward = e.op("Sign", place - low) * (1.0 - odd * 2.0)
        place = rest + odd * (span - rest * 2.0) + low
    clamped = e.op("Max", e.op("Min", place, length - 1.0), 0.0)
    moves = e.op("And", e.op("Greater", place, 0.0), e.op("Less", place, length - 1.0))
    return clamped, cast_like(e, moves, place) * inward


# ---- RoiAlign --------------------------------------------------------------------------------------------------------


@linear("RoiAlign", settings=(1,))
def _roi_align(e: Emitter, call: Call, d: Value) -> Value:
    """Of each region and channel y = A x Bᵀ with one matrix per axis: dx = Σ Aᵀ d B over the regions of a picture.

    Regions are held constant.
    """
    if str(call.attrs.get("mode", "avg")).lower() != "avg":
        raise ModelError(f"node '{call.site}' (RoiAlign) has mode=max, which cannot be explained; mode=avg can")
    x, batch = call.given(0), call.given(2)
    rows, columns = _bins(e, call, 1, "output_height", 2), _bins(e, call, 0, "output_width", 3)
    high, channels = ints(e, [int(call.attrs.get("output_height", 1))]), dim_of(e, x, 1)
    # (regions, channels, high, wide) @ (regions, 1, wide, W), then the sum over regions and bins as one matrix product
    spread = e.op("Transpose", d @ e.op("Unsqueeze", columns, ints(e, [1])), perm=[0, 2, 1, 3])
    count = dim_of(e, d, 0) * high
    flat = e.op("Reshape", spread, concat_ints(e, [count, channels * dim_of(e, x, 3)]), allowzero=1)
    mine = cast_like(e, e.op("Equal", e.op("Unsqueeze", arange_like(e, x, 0), ints(e, [1])), batch), x)
    of_picture = e.op("Unsqueeze", mine, ints(e, [2, 3])) * e.op(
        "Unsqueeze", rows, ints(e, [0])
    )  # (N, regions, high, H)
    joined = e.op("Reshape", of_picture, concat_ints(e, [dim_of(e, x, 0), count, dim_of(e, x, 2)]), allowzero=1)
    summed = e.op("Transpose", joined, perm=[0, 2, 1]) @ flat
    sizes = concat_ints(e, [dim_of(e, x, 0), dim_of(e, x, 2), channels, dim_of(e, x, 3)])
    return e.op("Transpose", e.op("Reshape", summed, sizes, allowzero=1), perm=[0, 2, 1, 3], shape=x.shape)


def _bins(e: Emitter, call: Call, side: int, name: str, axis: int) -> Value:
    """What each pixel of one axis counts in each bin, (regions, bins, pixels): the mean over the bin's samples."""
    x, regions, bins = call.given(0), call.given(1), int(call.attrs.get(name, 1))
    half = str(call.attrs.get("coordinate_transformation_mode", "half_pixel")) == "half_pixel"
    ends = regions * number(call, "spatial_scale", 1.0) - (0.5 if half else 0.0)
    start, stop = (e.op("Slice", ends, ints(e, [k]), ints(e, [k + 1]), ints(e, [1])) for k in (side, side + 2))
    extent = stop - start if half else e.op("Max", stop - start, 1.0)  # (regions, 1)
    ratio = int(call.attrs.get("sampling_ratio", 0))
    if ratio > 0:
        samples: Value | float = float(ratio)
        order = e.const(np.arange(ratio), extent.dtype)
    else:  # as many as the bin is pixels long, which differs from region to region
        samples = e.op("Ceil", extent / float(bins))
        most = e.op("ReduceMax", e.op("Concat", samples, e.const(np.ones((1, 1)), extent.dtype), axis=0), keepdims=0)
        order = e.op("Range", e.const(0, extent.dtype), most, e.const(1, extent.dtype))
    step = extent / float(bins)
    corner = e.op("Unsqueeze", start + step * np.arange(float(bins)), ints(e, [2]))  # (regions, bins, 1)
    divisor = e.op("Max", samples, 1.0) if isinstance(samples, Value) else samples
    within = step / divisor * (order + 0.5)  # (regions, samples)
    place = e.op("Unsqueeze", corner + e.op("Unsqueeze", within, ints(e, [1])), ints(e, [3]))
    length = cast_like(e, dim_of(e, x, axis), extent)
    there = e.op("Not", e.op("Or", e.op("Less", place, -1.0), e.op("Greater", place, length)))
    clamped = e.op("Max", e.op("Min", place, length - 1.0), 0.0)
    tent = e.op("Relu", 1.0 - e.op("Abs", clamped - cast_like(e, arange_like(e, x, axis), extent)))
    counted = tent * cast_like(e, there, extent)  # (regions, bins, samples, pixels)
    if isinstance(samples, Value):
        used = cast_like(e, e.op("Less", order, samples), extent)
        counted = counted * e.op("Unsqueeze", used, ints(e, [1, 3]))
        divisor = e.op("Unsqueeze", divisor, ints(e, [2]))
    return e.op("ReduceSum", counted, ints(e, [2]), keepdims=0) / divisor
