"""Moving: relevance goes where values came from, to the winner, nowhere, or evenly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import onnx

from onnx_lrp.adjoints import OPERATORS, adjoint
from onnx_lrp.adjoints.reduction import reduced_axes
from onnx_lrp.adjoints.shapes import (
    along_axis,
    arange_like,
    expand_like,
    ints,
    merge_axes,
    ones_like,
    reduce_like,
    reshape_like,
    same_shape,
)
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.special.common import Out, nothing


def route(e: Emitter, call: Call, out: Out) -> Out:
    """Relevance goes where the values came from: the adjoint of an operator that moves or selects elements.

    Where relevance is a factor of the operator's own output it stays factored, because y_i = x_j makes
    sum_i y_i c_i equal to x_j sum_i c_i.
    """
    if not OPERATORS[call.op].moves:
        raise RuleError(
            f"node '{call.site}': route is for operators that move elements, {call.op} computes new ones; "
            "use norm or pass"
        )
    factored = all(r is None or (r.of is not None and r.of is o) for r, o in zip(out, call.outputs, strict=True))
    cotangents = [None if r is None else r.factor if factored else r.whole(e) for r in out]
    kept = _filled(e, call)
    if factored and kept is not None:
        return [Relevance(out[0].factor, v) if v is kept and out[0] else None for v in call.inputs]
    pieces = adjoint(e, call, cotangents)
    _book_constants(e, call, out)
    return [
        None if p is None else Relevance(p, x if factored else None) for p, x in zip(pieces, call.inputs, strict=True)
    ]


def _filled(e: Emitter, call: Call) -> Value | None:
    """The tensor in which a Where replaces NaN by 0: a multiple of it is 0 there, whatever the factor."""
    x = call.input(2) if call.op == "Where" else None
    return x if x is not None and e.fillings.get(x.name) is call.output else None


def _book_constants(e: Emitter, call: Call, out: Out) -> None:
    """Book what lands on constants that were moved together with live tensors: Concat, Where, Max, padding."""
    if call.op == "Pad":
        e.book(call, "bias", partial(_on_padding, e, call, out))
        return
    for i, v in enumerate(call.inputs):
        if v is not None and i not in call.active and v.dtype.kind == "f":
            e.book(call, "bias", partial(_on_constant, e, call, out, i))


def _on_constant(e: Emitter, call: Call, out: Out, index: int) -> Value | None:
    """What one constant input gets, at the output's size, so that the samples can be told apart."""
    if OPERATORS[call.op].broadcasts:
        full = (v if v is None or v.dtype.kind != "f" else expand_like(e, v, call.output) for v in call.inputs)
        call = replace(call, inputs=tuple(full))
    return adjoint(e, call, [None if r is None else r.whole(e) for r in out], [index])[index]


def _on_padding(e: Emitter, call: Call, out: Out) -> Value | None:
    """What lands on constant padding."""
    if out[0] is None or call.attrs.get("mode", "constant") != "constant":
        return None
    inside = e.op("Pad", ones_like(e, call.given(0)), call.given(1), None, call.input(3), shape=call.output.shape)
    return expand_like(e, out[0].whole(e), call.output) * (1.0 - inside)


def winner_takes_all(e: Emitter, call: Call, out: Out) -> Out:
    """The winner of a maximum takes all of the relevance; of equal ones the first (Bach et al. 2015, eq. 61)."""
    reduces = call.op in ("ReduceMax", "ReduceMin")
    axes = reduced_axes(e, call) if reduces else []
    if out[0] is None or axes is None or not (reduces or call.op in ("Max", "Min")):
        return route(e, call, out)
    # The adjoint of these lets equal ones share, as the gradient has it: mark the first instead.
    factored = out[0].of is call.output
    c = out[0].factor if factored else out[0].whole(e)
    shares = [_first_along(e, call, c, axes)] if reduces else _first_input(e, call, c)
    for i, (share, v) in enumerate(zip(shares, call.inputs, strict=False)):
        if i not in call.active and v is not None:
            e.book(call, "bias", partial(Relevance(share, call.output if factored else None).whole, e))
    result = list(nothing(call))
    for i in call.active:
        result[i] = Relevance(reduce_like(e, shares[i], call.given(i)), call.given(i) if factored else None)
    return result


def _number(value: Value) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))


def _first_input(e: Emitter, call: Call, c: Value) -> list[Value]:
    """The relevance at every place of the first input that has the extreme value there."""
    y = call.output
    left = expand_like(e, c, y)
    shares = []
    zero = e.const(0, y.dtype)
    for v in call.inputs:
        assert v is not None
        hit = e.op("Equal", v, y)
        shares.append(e.op("Where", hit, left, zero))
        left = e.op("Where", hit, zero, left)
    return shares


def _first_along(e: Emitter, call: Call, c: Value, axes: list[int]) -> Value:
    """The relevance at the first element, in the order of memory, that has the extreme value along the axes."""
    x = call.given(0)
    if not axes:
        return expand_like(e, c, call.output)
    kept = [i for i in range(x.rank) if i not in axes]
    perm = [*kept, *axes]
    rows = x if perm == list(range(x.rank)) else e.op("Transpose", x, perm=perm)
    flat = rows if len(axes) == 1 else merge_axes(e, rows, len(kept))
    winner = e.op("ArgMax" if call.op == "ReduceMax" else "ArgMin", flat, axis=-1, keepdims=1)
    hit = e.op("Cast", e.op("Equal", winner, along_axis(e, arange_like(e, flat, -1), -1, flat.rank)), to=_number(x))
    hit = reshape_like(e, hit, rows)
    back = hit if rows is x else e.op("Transpose", hit, perm=[perm.index(i) for i in range(x.rank)])
    c = expand_like(e, c, call.output)
    return back * (c if call.attrs.get("keepdims", 1) else e.op("Unsqueeze", c, ints(e, axes)))


def stop(e: Emitter, call: Call, out: Out) -> Out:
    """No relevance goes further: all of it is booked as absorbed by the node."""
    for r, o in zip(out, call.outputs, strict=True):
        if r is not None and o is not None:
            e.book(call, "bias", partial(expand_like, e, r.whole(e), o))
    return nothing(call)


def uniform(e: Emitter, call: Call, out: Out) -> Out:
    """Every live input gets an equal part, whatever it holds."""
    if out[0] is None:
        return nothing(call)
    active, y = call.active, call.output
    if not OPERATORS[call.op].broadcasts and not all(same_shape(call.given(i), y) for i in active):
        raise RuleError(
            f"node '{call.site}': uniform needs inputs in the shape of the output, which {call.op} has not; "
            "use norm or route"
        )
    whole = expand_like(e, out[0].whole(e), y)
    part = whole if len(active) == 1 else whole / len(active)
    return [Relevance(reduce_like(e, part, call.given(i))) if i in active else None for i in range(len(call.inputs))]
