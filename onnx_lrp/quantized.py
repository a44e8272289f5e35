"""The pass that sees quantised tensors as the floats they stand for: their *shadows*.

A shadow is a DequantizeLinear on the source's own integer tensor, so it is what the model really computed with. Between
shadows the view has the float operators that the integer kernels stand for, and QuantizeDequantize where a tensor is
put on its grid (onnx_lrp/adjoints/quantization.py). Weights are dequantised in the graph and count as constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import QUANTIZED, ROUND_TRIP, Grid, dequantized
from onnx_lrp.adjoints.shapes import ints, shape_of
from onnx_lrp.emit import Call, Value
from onnx_lrp.facts import Sign
from onnx_lrp.view import WEIGHTED, View

# Integer operators between quantised ones whose result, dequantised, is theirs on dequantised inputs.
_ORDERED = ("Relu", "Clip", "Max", "Min", "Identity")
_INTEGER = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}
_HINT = "export the model with QuantizeLinear and DequantizeLinear around float operators (QDQ)"


def see_dequantized(v: View) -> None:
    """See a quantised model as a float model on dequantised tensors."""
    if any(c.op in QUANTIZED for c in v.calls):
        _Pass(v).run()


@dataclass(frozen=True)
class _Sum:
    """An int32 tensor made by ConvInteger or MatMulInteger: the call, and its operands with their grids."""

    call: Call
    operands: tuple[tuple[Value, Grid], ...]


class _Pass:
    """One run of the pass.

    Attributes:
        shadows: integer tensor -> its floats and its grid.
        sums: int32 tensor -> where it comes from.
        replaced: float tensor -> what stands for it.
        calls: the new view.
        makers: which call of the new view makes a value.
        floats: all shadows.
        done: ids of calls that the view has as part of another one.
    """

    def __init__(self, v: View):
        self.v, self.e = v, v.e
        self.shadows: dict[Value, tuple[Value, Grid]] = {}
        self.sums: dict[Value, _Sum] = {}
        self.replaced: dict[Value, Value] = {}
        self.calls: list[Call] = []
        self.makers: dict[Value, Call] = {}
        self.source_makers = v.producers()
        self.readers: dict[Value, list[Call]] = {}
        for call in v.calls:
            for x in call.inputs:
                if x is not None:
                    self.readers.setdefault(x, []).append(call)
        self.outputs = {v.value(name) for name in v.outputs}
        self.floats: set[Value] = set()
        self.done: set[int] = set()

    def run(self) -> None:
        """See every call in turn."""
        for call in self.v.calls:
            call.inputs = tuple(self.replaced.get(x, x) if x is not None else None for x in call.inputs)
            step = _STEPS.get(call.op) if not call.domain else None
            with self.e.scope(call.site, doc=f"what the integers of {call.site} stand for"):
                if step is None or all(x is None or x.facts.const for x in call.inputs):
                    self._other(call)
                else:
                    step(self, call)
        self.v.calls = self.calls
        self.v.rewire(self.replaced)
        self._open_the_last()

    def _add(self, call: Call) -> None:
        self.calls.append(call)
        self.makers.update((o, call) for o in call.outputs if o is not None)

    def _open_the_last(self) -> None:
        """No clip behind the last layer, save at zero: a score beyond the end of its grid still has a gradient.

        At zero the grid may stand in for a Relu.
        """
        layers: set[Value | None] = set()
        for call in reversed(self.calls):
            leads = not layers.isdisjoint(call.outputs)
            if call.op == ROUND_TRIP and not leads and not call.attrs["dynamic"]:
                sign = call.attrs["grid"].sign(self.e)
                call.attrs["clips"] = (Sign.NEGATIVE not in sign, Sign.POSITIVE not in sign)
            if leads or call.op in WEIGHTED:
                layers.update(call.inputs)

    # ---- onto the grid and back ------------------------------------------------------------------------------------

    def quantize(self, call: Call) -> None:
        """QuantizeLinear: the step onto the grid."""
        grid = self._grid(call.given(1), call.input(2), call.output, call.attrs)
        self._put_on_grid(call, self._inner(call.given(0)), call.output, grid)

    def quantize_dynamically(self, call: Call) -> None:
        """DynamicQuantizeLinear: the grid is made for the tensor, so nothing lies beyond its ends."""
        q, scale, zero = (o for o in call.outputs[:3])
        assert q is not None
        assert scale is not None
        grid = Grid(scale, zero, q.dtype)
        self._put_on_grid(call, call.given(0), q, grid, dynamic=True)

    def _put_on_grid(self, call: Call, x: Value, q: Value, grid: Grid, dynamic: bool = False) -> None:
        shadow = dequantized(self.e, q, grid)
        shadow.facts = replace(shadow.facts, shape=x.facts.shape, sign=shadow.facts.sign & x.facts.sign)
        self._know(q, shadow, grid)
        attrs = {"grid": grid, "clips": (not dynamic, not dynamic), "dynamic": dynamic}
        site = f"{call.site}/quantize" if call.op in ("QLinearConv", "QLinearMatMul") else call.site
        self._add(Call(ROUND_TRIP, (x,), (shadow,), attrs, site, note=f"scale of {call.op} held constant"))

    def dequantize(self, call: Call) -> None:
        """DequantizeLinear: what it makes is the shadow."""
        q = call.given(0)
        if q.dtype == np.int32 and q not in self.shadows:
            self._other(call)
            return
        shadow = self._shadow(q, self._grid(call.given(1), call.input(2), q, call.attrs))
        if shadow.facts.shape is None:
            shadow.facts = replace(shadow.facts, shape=call.output.facts.shape)
        self.replaced[call.output] = shadow

    def _grid(self, scale: Value, zero: Value | None, q: Value, attrs: dict[str, Any]) -> Grid:
        axis, block = int(attrs.get("axis", 1)), int(attrs.get("block_size", 0))
        dtype = zero.dtype if zero is not None else q.dtype if q.dtype.kind != "f" else np.dtype(np.uint8)
        if scale.static and math.prod(scale.shape) == 1 and not block:  # type: ignore[arg-type]
            return Grid(self._scalar(scale), None if zero is None else self._scalar(zero), dtype)
        if zero is not None and zero.facts.shape == () and scale.rank:
            zero = self.e.op("Expand", zero, shape_of(self.e, scale))
        return Grid(scale, zero, dtype, axis, block)

    def _scalar(self, value: Value) -> Value:
        return value if value.facts.shape == () else self.e.op("Reshape", value, ints(self.e, []))

    def _same(self, a: Grid, b: Grid) -> bool:
        def equal(x: Value | None, y: Value | None) -> bool:
            if x is y:
                return True
            left = np.zeros(()) if x is None else self.e.array(x)
            right = np.zeros(()) if y is None else self.e.array(y)
            return left is not None and right is not None and np.array_equal(left, right)

        return (
            equal(a.scale, b.scale) and equal(a.zero, b.zero) and (a.uniform or (a.axis, a.block) == (b.axis, b.block))
        )

    def _shadow(self, q: Value, grid: Grid) -> Value:
        """The floats that a quantised tensor stands for on a grid."""
        e = self.e
        if q in self.shadows:
            shadow, own = self.shadows[q]
            return shadow if self._same(own, grid) else self._on_other_grid(q, shadow, own, grid)
        maker = self.makers.get(q)
        shadow = dequantized(e, q, grid)
        if q.facts.const:
            return shadow
        self._know(q, shadow, grid)
        if maker is None:
            self.v.inputs = {n: shadow if x is q else x for n, x in self.v.inputs.items()}
            self.v.alias[q.name] = shadow
            return shadow
        if not maker.domain and self._keeps_grid(maker) and grid.uniform:
            zero = dequantized(e, e.const(np.zeros((), q.dtype)), grid)
            inputs = [x if x is None or x.dtype != q.dtype else self._shadow(x, grid) for x in maker.inputs]
            if maker.op == "Relu":
                maker.op, inputs = "Clip", [inputs[0], zero]
            if maker.op == "Pad" and maker.input(2) is None and maker.attrs.get("mode", "constant") == "constant":
                inputs = [*inputs[:2], zero, *inputs[3:]]
            maker.inputs = tuple(inputs)
        elif not maker.domain:
            maker.refused = (f"{maker.op} on quantised integers is not seen through", _HINT)
        maker.outputs = tuple(shadow if o is q else o for o in maker.outputs)
        self.makers[shadow] = maker
        return shadow

    def _know(self, q: Value, shadow: Value, grid: Grid) -> None:
        self.shadows[q] = shadow, grid
        self.floats.add(shadow)

    def _keeps_grid(self, call: Call) -> bool:
        operator = OPERATORS.get(call.op)
        return operator is not None and (operator.moves or call.op in _ORDERED)

    def _on_other_grid(self, q: Value, shadow: Value, own: Grid, grid: Grid) -> Value:
        """The same integers, read with another scale and zero than they were written with."""
        e = self.e
        if not (own.uniform and grid.uniform):
            result = dequantized(e, q, grid)
            why = ("it reads its input along another axis than it was quantised", _HINT)
            self._add(Call("DequantizeLinear", (shadow,), (result,), {}, q.name, refused=why))
            return result
        ratio = grid.scale / own.scale
        scaled, result = shadow * ratio, dequantized(e, q, grid)
        offset = dequantized(e, e.const(0, q.dtype) if own.zero is None else own.zero, grid)
        self._add(Call("Mul", (shadow, ratio), (scaled,), {}, q.name, note="read on another grid"))
        self._add(Call("Add", (scaled, offset), (result,), {}, q.name, note="read on another grid"))
        return result

    def _inner(self, x: Value) -> Value:
        """The tensor that is put on a grid; computed a second time where it lies inside of what the runtime fuses.

        ONNX Runtime replaces DequantizeLinear, operator, QuantizeLinear by one integer kernel if nobody else reads
        what is between them. If the explanation read it, the model's outputs would be those of other kernels.
        """
        maker = self.makers.get(x)
        if (
            maker is None
            or maker.domain
            or len(maker.outputs) != 1
            or len(self.readers.get(x, ())) != 1
            or x in self.outputs
            or x.facts.const
        ):
            return x
        if self.floats.isdisjoint(maker.inputs):
            before = maker.given(0)
            again = self._inner(before) if maker.op in ("Relu", "Clip") else before
            if again is before:
                return x
            maker.inputs = (again, *maker.inputs[1:])
        with self.e.scope(maker.site, doc=f"{maker.op} {maker.site} on dequantised tensors"):
            again = self.e.op(maker.op, *maker.inputs, shape=x.facts.shape, **maker.attrs)
        maker.outputs = (again,)
        self.makers[again] = maker
        self.replaced[x] = again
        return again

    # ---- integer layers --------------------------------------------------------------------------------------------

    def linear_layer(self, call: Call) -> None:
        """QLinearConv and QLinearMatMul: the float layer on shadows, put on the grid of the output."""
        e, y = self.e, call.output
        conv = call.op == "QLinearConv"
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (call.given(i) for i in range(8))
        rows, columns = (1, 0) if conv else (x.rank - 2, w.rank - 1)
        x_grid = self._grid(x_scale, x_zero, x, {"axis": rows})
        w_grid = self._grid(w_scale, w_zero, w, {"axis": columns})
        operands = [self._shadow(x, x_grid), self._shadow(w, w_grid)]
        if conv and (bias := call.input(8)) is not None:
            step = x_grid.scale * w_grid.scale
            operands.append(self._shadow(bias, Grid(step, None, bias.dtype)))
        kind = "Conv" if conv else "MatMul"
        z = e.op(kind, *operands, shape=y.facts.shape, **call.attrs)
        self._add(Call(kind, tuple(operands), (z,), call.attrs, call.site, note=f"{call.op} on dequantised tensors"))
        self._put_on_grid(call, z, y, self._grid(y_scale, y_zero, y, {}))

    def integer_layer(self, call: Call) -> None:
        """ConvInteger and MatMulInteger: remembered until their int32 sums become floats."""
        conv = call.op == "ConvInteger"
        axes = (1, 0) if conv else (call.given(0).rank - 2, call.given(1).rank - 1)
        operands = []
        for i, axis in enumerate(axes):
            q, zero = call.given(i), call.input(i + 2)
            one = self.e.const(np.ones((), np.float32))
            if zero is not None and zero.static and math.prod(zero.shape) != 1:  # type: ignore[arg-type]
                one = self.e.op("Expand", one, shape_of(self.e, zero))
            unit = self._grid(one, zero, q, {"axis": axis})
            root = self._root(q)
            grid = self.shadows[root][1] if root in self.shadows else unit
            operands.append((q, grid if not q.facts.const and self._zero(grid, unit) else unit))
        self.sums[call.output] = _Sum(call, tuple(operands))

    def _zero(self, a: Grid, b: Grid) -> bool:
        return self._same(replace(a, scale=b.scale), b)

    def _root(self, q: Value) -> Value:
        """The tensor whose elements an integer tensor holds, moved."""
        maker = self.makers.get(q)
        while maker is not None and q not in self.shadows and not maker.domain and self._keeps_grid(maker):
            q = maker.given(0)
            maker = self.makers.get(q)
        return q

    def cast(self, call: Call) -> None:
        """The sums of an integer layer as floats: the float layer, with the scales that follow if they are its own."""
        source, y = call.given(0), call.output
        total = self.sums.get(source)
        if total is None or y.dtype.kind not in "fV":
            root = self._root(source)
            if root in self.shadows and y.dtype.kind == "f":
                call.inputs = (self.shadows[root][0],)
                call.refused = ("Cast takes quantised integers for numbers", _HINT)
            self._other(call)
            return
        readers = self.readers.get(y, [])
        if (
            len(readers) == 1
            and readers[0].op == "Mul"
            and y not in self.outputs
            and self._scaled(total, y, readers[0])
        ):
            return
        operands = []
        for q, grid in total.operands:
            x = self._shadow(q, grid)
            unit = replace(grid, scale=self.e.const(np.ones((), np.float32))) if grid.uniform else grid
            if self._same(grid, unit):
                operands.append(x)
                continue
            inverse, plain = self.e.op("Reciprocal", grid.scale), dequantized(self.e, q, unit)
            self._add(Call("Mul", (x, inverse), (plain,), {}, f"{total.call.site}/steps", note="in steps of the grid"))
            operands.append(plain)
        self._layer(total, tuple(operands), y)

    def _scaled(self, total: _Sum, y: Value, mul: Call) -> bool:
        """See ``sum * scales`` as the layer on shadows, if the scales are those of its operands; whether it is so."""
        other = mul.given(1) if mul.given(0) is y else mul.given(0)
        maker = self.source_makers.get(other)
        factors = [other] if maker is None or maker.op != "Mul" or maker.domain else [maker.given(0), maker.given(1)]
        operands: list[Value] = []
        for q, grid in total.operands:
            if q.facts.const:
                constant = next((f for f in factors if f.facts.const), None)
                if constant is not None:
                    fitted = self._weight_grid(total.call, grid, constant)
                    if fitted is None:
                        return False
                    factors.remove(constant)
                    grid = fitted
                operands.append(self._shadow(q, grid))
                continue
            own = next((f for f in factors if f is grid.scale), None)
            if own is None:
                return False
            factors.remove(own)
            operands.append(self._shadow(q, grid))
        if factors or mul.output.dtype != operands[0].dtype:
            return False
        self._layer(total, tuple(operands), mul.output)
        self.done.add(id(mul))
        return True

    def _weight_grid(self, call: Call, grid: Grid, scale: Value) -> Grid | None:
        """The grid of weights whose scale is multiplied to the output: one number, or one per output channel."""
        if not scale.static:
            return None
        if math.prod(scale.shape) == 1:  # type: ignore[arg-type]
            scalar = self._scalar(scale)
            full = scalar if grid.uniform else self.e.op("Expand", scalar, shape_of(self.e, grid.scale))
            return replace(grid, scale=full)
        conv = call.op == "ConvInteger"
        place = -(call.output.rank - 1) if conv else -1
        if scale.rank < -place or scale.shape[place] != math.prod(scale.shape):  # type: ignore[arg-type]
            return None
        vector = self.e.op("Reshape", scale, ints(self.e, [-1]))
        zero = grid.zero
        if zero is not None and grid.uniform:
            zero = self.e.op("Expand", zero, shape_of(self.e, vector))
        return replace(grid, scale=vector, zero=zero, axis=0 if conv else call.given(1).rank - 1)

    def _layer(self, total: _Sum, operands: tuple[Value, ...], y: Value) -> None:
        call = total.call
        note = f"{call.op} on dequantised tensors"
        self._add(Call(_INTEGER[call.op], operands, (y,), call.attrs, call.site, note=note))
        if y.facts.shape is None and call.output.facts.shape is not None:
            y.facts = replace(y.facts, shape=call.output.facts.shape)

    # ---- everything else -------------------------------------------------------------------------------------------

    def _other(self, call: Call) -> None:
        """Other operators stay; one that computes with quantised integers in a way of its own is refused."""
        if id(call) in self.done:
            return
        known = [x for x in call.inputs if x is not None and (x in self.sums or self._root(x) in self.shadows)]
        operator = None if call.domain else OPERATORS.get(call.op)
        barrier = operator is not None and operator.verb == "barrier"
        summed = any(x in self.sums for x in known)
        if known and not barrier and (summed or call.domain or not self._keeps_grid(call)):
            call.inputs = tuple(self._flow(x) if x is not None and x in known else x for x in call.inputs)
            if not call.domain and call.refused is None:
                call.refused = (f"{call.op} on quantised integers is not seen through", _HINT)
        self._add(call)

    def _flow(self, x: Value) -> Value:
        """A float tensor that carries the influence of integers nobody sees through."""
        if x in self.sums:
            q, grid = next(o for o in self.sums[x].operands if not o[0].facts.const)
            return self._shadow(q, grid)
        return self.shadows[self._root(x)][0]


_STEPS = dict(
    zip(
        QUANTIZED,
        (
            _Pass.quantize,
            _Pass.quantize_dynamically,
            _Pass.dequantize,
            _Pass.linear_layer,
            _Pass.linear_layer,
            _Pass.integer_layer,
            _Pass.integer_layer,
        ),
        strict=True,
    )
) | {"Cast": _Pass.cast}
