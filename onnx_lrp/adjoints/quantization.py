"""Numbers on a grid: quantised and dequantised again, in one operator that ONNX does not have.

A quantised model computes with integers q, which stand for the floats (q - zero) * scale. The walk sees those floats,
and the step onto the grid, y = (clip(round(x / scale) + zero) - zero) * scale, as one operator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from onnx_lrp.adjoints.registry import Cotangents, Operator, enter
from onnx_lrp.adjoints.shapes import along_axis, arange_like, cast_like, ints, shape_of
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.facts import Sign

ROUND_TRIP = "QuantizeDequantize"
# What a pass sees as float operators and round trips (onnx_lrp/quantized.py).
QUANTIZED = (
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)


@dataclass(frozen=True)
class Grid:
    """The floats that a quantised tensor can stand for.

    Attributes:
        scale: step width: one number, or a vector along ``axis``, or (with ``block``) a tensor of blocks.
        zero: the integer that stands for 0.0, in the shape of the scale; None for 0.
        dtype: integer (or 8-bit float) type.
        axis: the axis along which the scale varies.
        block: number of elements along that axis which share a scale; 0 for no blocks.
    """

    scale: Value
    zero: Value | None
    dtype: np.dtype[Any]
    axis: int = 0
    block: int = 0

    @property
    def uniform(self) -> bool:
        """True for one scale for the whole tensor."""
        return self.scale.rank == 0

    @property
    def ends(self) -> tuple[float, float]:
        """The extreme numbers of the type, and half a step beyond them, where rounding still leads back."""
        limits: Any = ml_dtypes
        if "int" in self.dtype.name:
            info = limits.iinfo(self.dtype)
            return float(info.min) - 0.5, float(info.max) + 0.5
        largest = float(limits.finfo(self.dtype).max)
        return -largest, largest

    def sign(self, e: Emitter) -> Sign:
        """Which signs its floats can have."""
        zero = np.zeros(1) if self.zero is None else e.array(self.zero)
        if zero is None:
            return Sign.ANY
        low, high = self.ends
        sign = Sign.POSITIVE if (zero.astype(np.float64) < high - 1).any() else Sign.ZERO
        return sign | (Sign.NEGATIVE if (zero.astype(np.float64) > low + 1).any() else Sign.ZERO)

    def attributes(self) -> dict[str, Any]:
        """Attributes of QuantizeLinear and DequantizeLinear.

        Where there is one scale, ONNX ignores the axis. It is given nevertheless, and not as exporters leave it: so the
        runtime does not take these nodes for the model's own, whose readers decide which integer kernels it uses.
        """
        return {"axis": self.axis} | ({"block_size": self.block} if self.block else {})


def dequantized(e: Emitter, q: Value, grid: Grid) -> Value:
    """The floats that a quantised tensor stands for, in the type of the scale."""
    if q.dtype != grid.dtype:  # inference does not know what an operator of another domain makes, nor what follows
        q.facts = replace(q.facts, dtype=grid.dtype)
    y = e.op("DequantizeLinear", q, grid.scale, grid.zero, shape=q.facts.shape, **grid.attributes())
    if not y.facts.const:
        y.facts = replace(y.facts, sign=y.facts.sign & grid.sign(e))
    return y


def _forward(e: Emitter, call: Call) -> Value:
    """Onto the grid and back; a grid that was made for the tensor is made anew."""
    x, grid = call.given(0), call.attrs["grid"]
    if call.attrs["dynamic"]:
        q, scale, zero = e.ops("DynamicQuantizeLinear", x, outputs=3)
        return dequantized(e, q, Grid(scale, zero, q.dtype))
    scale = cast_like(e, grid.scale, x)
    zero = grid.zero
    if zero is None:  # it says which type is meant
        zero = e.op("Expand", e.const(np.zeros((), grid.dtype)), shape_of(e, scale))
    q = e.op("QuantizeLinear", x, scale, zero, **grid.attributes())
    return dequantized(e, q, Grid(scale, zero, grid.dtype, grid.axis, grid.block))


def _adjoint(e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int]) -> Cotangents:
    """Straight through the rounding, nothing beyond the ends of the grid: there it is a Clip.

    That is the derivative with which networks are trained for quantisation (Bengio et al. 2013; Jacob et al. 2018),
    and it has to know the ends: quantisers drop a Relu or Clip that the grid stands in for.
    """
    d, x = cotangents[0], call.given(0)
    assert d is not None
    grid: Grid = call.attrs["grid"]
    for end, ordered, clips in zip(grid.ends, ("LessOrEqual", "GreaterOrEqual"), call.attrs["clips"], strict=True):
        if clips:
            steps = e.const(end, x.dtype) - (0.0 if grid.zero is None else cast_like(e, grid.zero, x))
            bound = _along(e, steps * cast_like(e, grid.scale, x), x, grid)
            d = e.op("Where", e.op(ordered, bound, x), d, e.const(0, d.dtype))
    return [d]


def _along(e: Emitter, value: Value, x: Value, grid: Grid) -> Value:
    """One number per scale, broadcast to a tensor on the grid."""
    if grid.uniform:
        return value
    axis = grid.axis % x.rank
    if not grid.block:
        return along_axis(e, value, axis, x.rank)
    return e.op("Gather", value, e.op("Div", arange_like(e, x, axis), ints(e, [grid.block])), axis=axis)


enter(Operator(ROUND_TRIP, "pointwise", _adjoint, moves=True, elementwise=True, forward=_forward))
