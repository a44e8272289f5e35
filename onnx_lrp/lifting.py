"""Scans whose steps do only what has to wait for the step before.

What depends on the slices of a step alone is the same operator on all steps at once: it is computed before the Scan,
which runs over the result. So a weighted layer of a step's input is one MatMul, whatever the number of steps. Of what
is left, products with such factors one after another are one product: their factors are multiplied beforehand, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import concat_ints, ints
from onnx_lrp.emit import Body, Call, Emitter, Value
from onnx_lrp.facts import Facts
from onnx_lrp.graphs import read_by
from onnx_lrp.inference import merge


@dataclass(frozen=True)
class Track:
    """A tensor with a slice for every step.

    Attributes:
        value: the tensor.
        axis: along which it has a slice for every step.
        back: the slice of the first step is the last one.
    """

    value: Value
    axis: int = 0
    back: bool = False


def scan(
    e: Emitter,
    body: Body,
    begin: Sequence[Value],
    tracks: Sequence[Track],
    facts: Sequence[Facts],
    ends: Sequence[tuple[int, bool]],
) -> tuple[Value, ...]:
    """Emit a Scan, and what its steps do not have to wait for outside of it.

    Args:
        e: the emitter; the body is filled, and no longer the one that the emitter fills.
        body: its inputs are the states and the slices, its outputs the states and what is put together.
        begin: what the states begin with.
        tracks: what it runs over.
        facts: what is known of the results.
        ends: for all that is put together, along which axis, and whether from the last step on.

    Returns:
        The last states, and what is put together.
    """
    body.prune()
    return _Scan(e, body, list(begin), list(tracks)).emitted(facts, ends)


# An operand outside of the Scan: the same in all steps, or one slice for every step, along the first axis.
_Outer = Value | Track
# How an operator does all steps at once: (emitter, call inside, its inputs outside) -> its outputs; None: it cannot.
_AtOnce = Callable[[Emitter, Call, Sequence["_Outer | None"]], Sequence[Value] | None]


class _Scan:
    """A Scan on its way."""

    def __init__(self, e: Emitter, body: Body, begin: list[Value], tracks: list[Track]):
        self.e, self.body, self.begin, self.tracks = e, body, begin, tracks
        count = len(begin)
        self.slices = dict(zip(body.inputs[count:], tracks, strict=True))
        self.states = dict(zip(body.inputs[:count], begin, strict=True))
        self.outside: dict[Value, _Outer] = {}  # what is known outside, of tensors of the body
        self.back = tracks[0].back if tracks else False

    def emitted(self, facts: Sequence[Facts], ends: Sequence[tuple[int, bool]]) -> tuple[Value, ...]:
        """The results."""
        body, count = self.body, len(self.begin)
        for call in list(body.calls.values()):
            self._lift(call)
        lifted = [v for v in body.outputs[count:] if isinstance(self.outside.get(v), Track)]
        ready = {k: self.outside[v] for k, v in enumerate(body.outputs[count:]) if v in lifted}
        body.outputs = [v for k, v in enumerate(body.outputs) if k < count or k - count not in ready]
        self._leave_what_waits()
        left = [k for k in range(len(ends)) if k not in ready]
        made: tuple[Value, ...] = ()
        if body.outputs:
            chosen = [ends[k] for k in left]
            attrs = {"scan_output_axes": [a for a, _ in chosen], "scan_output_directions": [int(b) for _, b in chosen]}
            attrs = attrs if chosen else {}
            tracks = [self.slices[v] for v in body.inputs[count:]]
            made = self.e.control(
                "Scan",
                *self.begin,
                *(t.value for t in tracks),
                bodies={"body": body},
                facts=[*facts[:count], *(facts[count + k] for k in left)],
                num_scan_inputs=len(tracks),
                scan_input_axes=[t.axis for t in tracks],
                scan_input_directions=[int(t.back) for t in tracks],
                **attrs,
            )
        results = dict(zip(left, made[count:], strict=True))
        for k, track in ready.items():
            assert isinstance(track, Track)
            results[k] = self._laid(track, *ends[k], facts[count + k])
        return (*made[:count], *(results[k] for k in range(len(ends))))

    # ---- all steps at once -----------------------------------------------------------------------------------------

    def _lift(self, call: Call) -> None:
        """Emit a call outside, if all that it reads is known there."""
        known = all(v is None or v.facts.shape is not None for v in (*call.inputs, *call.outputs))
        if not known or any(isinstance(a, Body) for a in call.attrs.values()):
            return
        if call.op == "Shape" and (sizes := self._lengths(call)) is not None:
            self.outside[call.output] = sizes
            return
        operands = [None if v is None else self._seen(v) for v in call.inputs]
        if any(v is not None and o is None for v, o in zip(call.inputs, operands, strict=True)):
            return
        e, kept = self.e, self.body.outputs
        with e.scope(call.site, doc=f"{call.op} of {call.site} for all steps at once"):
            if not any(isinstance(o, Track) for o in operands):
                if call.op in _INVARIANT and not any(v in kept for v in call.outputs):
                    same = e.ops(call.op, *operands, outputs=len(call.outputs), **call.attrs)  # type: ignore[arg-type]
                    self.outside |= dict(zip(filter(None, call.outputs), same, strict=True))
                return
            found = None if call.op not in _AT_ONCE else _AT_ONCE[call.op](e, call, operands)
        for v, stacked in zip(filter(None, call.outputs), found or (), strict=False):
            if v.facts.shape is not None:
                shape = merge(stacked.facts.shape, (self._length, *v.facts.shape))
                stacked.facts = replace(stacked.facts, shape=shape)
            self.outside[v] = Track(stacked, 0, self.back)

    @property
    def _length(self) -> int | str | None:
        return next((t.value.shape[t.axis] for t in self.tracks if t.value.facts.shape is not None), None)

    def _seen(self, v: Value) -> _Outer | None:
        """A tensor that a call of the body reads, as it is outside; slices along the first axis."""
        if v in self.slices:
            if v not in self.outside:
                self.outside[v] = self._ordered(self.slices[v])
            return self.outside[v]
        if v in self.outside:
            return self.outside[v]
        return None if self.e.lives_in(v, self.body) else v

    def _ordered(self, track: Track) -> Track:
        """A track along the first axis, in the common order."""
        e, value = self.e, track.value
        if track.axis:
            perm = [track.axis, *(i for i in range(value.rank) if i != track.axis)]
            value = e.op("Transpose", value, perm=perm)
        return Track(value if track.back == self.back else _turned(e, value, 0), 0, self.back)

    def _laid(self, track: Track, axis: int, back: bool, facts: Facts) -> Value:
        """All steps as a result of the Scan has them."""
        e, value = self.e, track.value
        value = value if track.back == back else _turned(e, value, 0)
        if axis:
            value = e.op("Transpose", value, perm=[*range(1, axis + 1), 0, *range(axis + 1, value.rank)])
        return e.op("Identity", value, shape=facts.shape)

    def _lengths(self, call: Call) -> Value | None:
        """What Shape gives, the same in all steps."""
        v = call.given(0)
        if v in self.states:
            return self.e.op("Shape", self.states[v], **call.attrs)
        track = self._seen(v)
        if not isinstance(track, Track):
            return None
        bounds = {"start": 0} | call.attrs
        attrs: dict[str, Any] = {k: int(i) + (int(i) >= 0) for k, i in bounds.items() if i is not None}
        return self.e.op("Shape", track.value, **attrs)

    # ---- what is left ----------------------------------------------------------------------------------------------

    def _leave_what_waits(self) -> None:
        """The body with what is known outside as slices or outer tensors."""
        body, count = self.body, len(self.begin)
        inside = {v for v in self.outside if v not in self.slices}
        body.calls = {n: c for n, c in body.calls.items() if not inside.issuperset(filter(None, c.outputs))}
        self._multiply_out()
        read = Counter(name for call in body.calls.values() for name in read_by(call))
        read.update(v.name for v in body.outputs)
        given = body.inputs[:count]
        for v, outer in self.outside.items():
            if v.name not in read or v in self.slices:
                continue
            if isinstance(outer, Track):
                self.slices[v] = outer
        for v in self.slices:
            if v.name in read:
                given.append(v)
        same = {v: o for v, o in self.outside.items() if isinstance(o, Value) and v.name in read}
        body.inputs = given
        for name, call in body.calls.items():
            body.calls[name] = replace(call, inputs=tuple(x and same.get(x, x) for x in call.inputs))
        nested = {n for c in body.calls.values() for n in read_by(c)}
        copies = {f"{v.name}/same": Call("Identity", (o,), (v,)) for v, o in same.items() if v.name in nested}
        body.calls = copies | body.calls
        if len(given) == count:
            given.append(next(iter(self.slices)))  # a Scan runs over something
        results, body.outputs = body.outputs, []
        for v in results:
            body.output(v)

    def _multiply_out(self) -> None:
        """See chains of products with what is known outside as one product each."""
        body = self.body
        uses = Counter(name for call in body.calls.values() for name in read_by(call))
        uses.update(v.name for v in body.outputs)
        factors = [parts for call in body.calls.values() if (parts := self._factor(call)) is not None]
        links = Counter(base.name for base, _, _ in factors)
        chains: dict[Value, tuple[Value, list[_Outer], list[_Outer]]] = {}
        absorbed: set[Value] = set()
        for call in body.calls.values():
            parts = self._factor(call)
            if parts is None:
                continue
            base, factor, divides = parts
            # A link that only products read is part of each of them.
            within = base in chains and uses[base.name] == links[base.name]
            start = chains[base] if within else (base, [], [])
            absorbed |= {base} if within else set()
            chains[call.output] = (start[0], [*start[1], *[factor] * (not divides)], [*start[2], *[factor] * divides])
        makers = {c.outputs[0]: n for n, c in body.calls.items()}
        for v, (base, up, down) in chains.items():
            if v in absorbed or len(up) + len(down) < 2:
                continue
            with self.e.scope(v.name, doc="factors of a product, for all steps at once"):
                factor = self._product(up, down)
            maker, known = body.calls[makers[v]], self._inside(factor, v)
            body.calls[makers[v]] = replace(maker, op="Mul", inputs=(base, known), attrs={})
        body.prune()  # links of chains

    def _factor(self, call: Call) -> tuple[Value, _Outer, bool] | None:
        """Of a product or quotient: what waits, what is known outside, and whether that divides."""
        if call.op not in ("Mul", "Div") or call.output.dtype.kind != "f":
            return None
        a, b = call.given(0), call.given(1)
        known = self._seen(b)
        if known is not None:
            return (a, known, call.op == "Div") if self._seen(a) is None else None
        other = self._seen(a)
        return (b, other, False) if other is not None and call.op == "Mul" else None

    def _product(self, up: Sequence[_Outer], down: Sequence[_Outer]) -> _Outer:
        """Up over down."""

        def times(parts: Sequence[_Outer]) -> _Outer:
            result = parts[0]
            for part in parts[1:]:
                result = self._combined("Mul", result, part)
            return result

        if not down:
            return times(up)
        if not up:
            return self._combined("Div", self.e.const(1, _value(down[0]).dtype), times(down))
        return self._combined("Div", times(up), times(down))

    def _combined(self, op: str, a: _Outer, b: _Outer) -> _Outer:
        operands = _aligned(self.e, [a, b])
        value = self.e.op(op, *operands)
        return Track(value, 0, self.back) if isinstance(a, Track) or isinstance(b, Track) else value

    def _inside(self, outer: _Outer, like: Value) -> Value:
        """What is known outside as the body reads it."""
        if isinstance(outer, Value):
            return outer
        shape = outer.value.facts.shape
        facts = Facts(like.dtype, None if shape is None else shape[1:])
        v = self.e.local(f"{self.body.name}/factor", facts, self.body)
        self.slices[v] = outer
        return v


def _value(outer: _Outer) -> Value:
    return outer.value if isinstance(outer, Track) else outer


def _turned(e: Emitter, value: Value, axis: int) -> Value:
    """The last slice first."""
    far = ints(e, [np.iinfo(np.int64).min])
    return e.op("Slice", value, ints(e, [-1]), far, ints(e, [axis]), ints(e, [-1]), shape=value.facts.shape)


# ---- operators on all steps ------------------------------------------------------------------------------------------


def _aligned(e: Emitter, operands: Sequence[_Outer | None]) -> list[Value | None]:
    """Operands that are broadcast against one another in every step, so that they are in all steps at once."""
    ranks = [0 if o is None else o.value.rank - 1 if isinstance(o, Track) else o.rank for o in operands]
    aligned: list[Value | None] = []
    for o, rank in zip(operands, ranks, strict=True):
        if isinstance(o, Track) and rank < max(ranks):
            aligned.append(e.op("Unsqueeze", o.value, ints(e, range(1, 1 + max(ranks) - rank))))
        else:
            aligned.append(o.value if isinstance(o, Track) else o)
    return aligned


def _elementwise(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    return e.ops(call.op, *_aligned(e, operands), outputs=1, **call.attrs)


def _of_first(e: Emitter, call: Call, operands: Sequence[_Outer | None], **attrs: object) -> Sequence[Value] | None:
    """The operator on its first input, which is the only one that differs from step to step."""
    first, *rest = operands
    if not isinstance(first, Track) or any(isinstance(o, Track) for o in rest):
        return None
    return e.ops(call.op, first.value, *rest, outputs=len(call.outputs), **call.attrs | attrs)  # type: ignore[arg-type]


def _along(axis: int, rank: int) -> int:
    """An axis of a slice, as one of the tensor of all slices."""
    return axis % rank + 1


def _with_axis(default: int) -> _AtOnce:
    def at_once(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
        axis = _along(int(call.attrs.get("axis", default)), call.given(0).rank)
        return _of_first(e, call, operands, axis=axis)

    return at_once


def _concat(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    if not all(isinstance(o, Track) for o in operands):
        return None
    values = [o.value for o in operands if isinstance(o, Track)]
    return e.ops("Concat", *values, outputs=1, axis=_along(int(call.attrs["axis"]), call.output.rank))


def _matmul(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    a, b = operands[:2]
    assert a is not None
    assert b is not None
    if isinstance(b, Track):
        small = isinstance(a, Track) and call.given(0).rank != call.given(1).rank
        if small or call.given(1).rank < 2 or (isinstance(a, Value) and a.rank != 2):
            return None
    elif b.rank != 2:
        return None
    return e.ops("MatMul", _value(a), _value(b), outputs=1)


def _gemm(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    (a, b), c = operands[:2], operands[2] if len(operands) > 2 else None
    if not isinstance(a, Track) or not isinstance(b, Value) or isinstance(c, Track) or call.attrs.get("transA", 0):
        return None
    b = e.op("Transpose", b, perm=[1, 0]) if call.attrs.get("transB", 0) else b
    product = a.value @ b
    alpha, beta = float(call.attrs.get("alpha", 1.0)), float(call.attrs.get("beta", 1.0))
    product = product if alpha == 1.0 else product * alpha
    return (product if c is None else product + (c if beta == 1.0 else c * beta),)


def _transpose(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    perm = call.attrs.get("perm") or range(call.given(0).rank)[::-1]
    return _of_first(e, call, operands, perm=[0, *(i + 1 for i in perm)])


def _with_axes(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    """Axes are the second input: those of the result for Unsqueeze, else those of the input."""
    axes = e.ints(call.input(1))
    if not axes or len(operands) != 2:
        return None
    rank = (call.output if call.op == "Unsqueeze" else call.given(0)).rank
    return _of_first(e, call, [operands[0], ints(e, [_along(i, rank) for i in axes])])


def _slice(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    axes = e.ints(call.input(3))
    if axes is None:
        return None
    moved = [*operands]
    moved[3] = ints(e, [_along(i, call.given(0).rank) for i in axes])
    return _of_first(e, call, moved)


def _expand(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    x, shape = operands
    if not isinstance(x, Track) or not isinstance(shape, Value) or not isinstance(shape.shape[0], int):
        return None
    missing = shape.shape[0] - (x.value.rank - 1)
    value = e.op("Unsqueeze", x.value, ints(e, range(1, 1 + missing))) if missing > 0 else x.value
    ones = [1] * (1 + max(-missing, 0))
    return e.ops("Expand", value, concat_ints(e, [ones, shape]), outputs=1)


def _reshape(e: Emitter, call: Call, operands: Sequence[_Outer | None]) -> Sequence[Value] | None:
    x, y = operands[0], call.output
    if not isinstance(x, Track) or not y.static or 0 in y.shape:
        return None
    return e.ops("Reshape", x.value, ints(e, [0, *(d for d in y.shape if isinstance(d, int))]), outputs=1)


_BROADCAST = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "PRelu", "Mod", "Where"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
)
_UNARY = ("Identity", "Cast", "Not", "Sign", "IsNaN", "IsInf", "Neg", "Floor", "Ceil", "Round", "Clip")
# Operators on lengths and constants: the same in all steps, if what they read is.
_INVARIANT = (
    *("Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Cast", "ConstantOfShape", "Range", "ReduceProd"),
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Where", "Expand", "Transpose", "Size"),
)


def _table() -> Mapping[str, _AtOnce]:
    pointwise = (name for name, operator in OPERATORS.items() if operator.verb == "pointwise")
    table: dict[str, _AtOnce] = dict.fromkeys((*pointwise, *_UNARY), _of_first)
    table |= dict.fromkeys(_BROADCAST, _elementwise)
    table |= dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "Squeeze", "Unsqueeze"), _with_axes)
    table |= dict.fromkeys(("Split", "Gather"), _with_axis(0)) | dict.fromkeys(
        ("Softmax", "LogSoftmax"), _with_axis(-1)
    )
    table |= {"Concat": _concat, "MatMul": _matmul, "Gemm": _gemm, "Transpose": _transpose}
    return table | {"Slice": _slice, "Expand": _expand, "Reshape": _reshape}


_AT_ONCE = _table()
