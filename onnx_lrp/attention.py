"""The passes that recognise the parts of transformers by data flow, whoever exported them.

Softmax spelled out; scores (queries times keys), values (probabilities times values) and what masks leave between;
activations that are their input times a gate; normalizations that multiply by one over a norm. A pass marks the role of
a call, by which rule books know it, and says in the rule table what it saw.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.emit import Call, Value
from onnx_lrp.facts import Facts
from onnx_lrp.gates import ON_THE_WAY, PRODUCTS, gateness
from onnx_lrp.view import View, carried

# What may stand between the scores and their softmax, and between two tensors of equal shape that are the same but for
# what happens to each element.
_SUMS = ("Add", "Sub", "Sum")
_ELEMENTWISE = (*_SUMS, "Mul", "Div", "Pow", "Max", "Min", "Where", "Cast", "Neg")
# Norms of several elements, and what may stand between them and what they divide.
_NORMS = ("ReduceL1", "ReduceL2", "ReduceSumSquare")
_TO_DIVISOR = (*ON_THE_WAY, "Sqrt", "Pow", "Mul", "Cast")
_LONGEST = 32  # calls in an activation that is spelled out


def see_transformers(v: View) -> None:
    """Run the passes of this room."""
    _spelled_softmax(v)
    _attention(v)
    _gates(v)
    _divisors(v)


def _note(call: Call, role: str, note: str) -> None:
    call.role = role
    call.note = "; ".join(filter(None, (call.note, note)))


# ---- softmax and attention -------------------------------------------------------------------------------------------


def _spelled_softmax(v: View) -> None:
    """See exp(x - max x) / sum exp(x - max x), along one axis, as a Softmax of x."""
    makers = v.producers()
    for call in v.calls:
        if call.op != "Div" or call.domain:
            continue
        top, total = makers.get(call.given(0)), makers.get(call.given(1))
        if top is None or total is None or (top.op, total.op) != ("Exp", "ReduceSum"):
            continue
        axes = v.e.ints(total.input(1))
        if total.given(0) is not top.output or axes is None or len(axes) != 1 or not total.attrs.get("keepdims", 1):
            continue
        x = top.given(0)
        shift = makers.get(x)
        if shift is not None and shift.op == "Sub":
            largest = makers.get(shift.given(1))
            if largest is not None and largest.op == "ReduceMax" and largest.given(0) is shift.given(0):
                x = shift.given(0)
        call.op, call.inputs, call.attrs = "Softmax", (x,), {"axis": axes[0]}
        _note(call, "", "exp(x) / sum exp(x)")


def _attention(v: View) -> None:
    """Mark the products before and after each softmax, and what masks leave between."""
    makers = v.producers()
    readers: dict[Value, list[Call]] = defaultdict(list)
    for call in v.calls:
        for x in dict.fromkeys(call.inputs):
            if x is not None:
                readers[x].append(call)
    for call in v.calls:
        if call.op != "Softmax" or call.domain:
            continue
        for product in _before(call.given(0), makers):
            if not product.role:
                _note(product, "scores", "attention: scores")
        for product in _after(v, call.output, readers):
            if not product.role:
                _note(product, "values", "attention: values")


def _before(x: Value, makers: Mapping[Value, Call]) -> Iterator[Call]:
    """The products of two tensors whose masked, scaled and capped results are x; those results are marked."""
    waiting, seen = [x], set()
    while waiting:
        value = waiting.pop()
        maker = makers.get(value)
        if maker is None or value in seen or maker.domain:
            continue
        seen.add(value)
        if maker.op in PRODUCTS and sum(not i.facts.const for i in maker.inputs[:2] if i is not None) == 2:
            if maker.op != "Mul":
                yield maker
            continue
        between = carried(maker)
        if between is not None or maker.op in (*_SUMS, "Where", "Tanh", "Div", "Min", "Max", "Clip"):
            value.facts = _masked(value)
            waiting += [i for i in maker.inputs if i is not None and i.dtype.kind == "f" and not i.facts.const]


def _masked(value: Value) -> Facts:
    return replace(value.facts, masked=True)


def _after(v: View, y: Value, readers: Mapping[Value, list[Call]]) -> Iterator[Call]:
    """The products of what becomes of probabilities y and another tensor."""
    waiting, seen = [y], set()
    while waiting:
        value = waiting.pop()
        for call in readers[value]:
            if call in seen or call.domain or call.op not in OPERATORS:
                continue
            seen.add(call)
            others = [x for x in call.inputs[:2] if x is not value and x is not None]
            if call.op in PRODUCTS and len(others) == 1 and not others[0].facts.const:
                yield call
                if call.op != "Mul":
                    continue
            elif call.op == "Where" and _zero(v, [x for x in call.inputs[1:] if x is not value]):
                # Probabilities of rows that are masked whole, and with them NaN, are replaced.
                value.facts, y.facts = _masked(value), _masked(y)
                test = v.e.producers.get(call.given(0).name)
                if test is not None and test.op == "IsNaN" and test.given(0) is value is call.input(2):
                    v.e.fillings[value.name] = call.output
            elif carried(call) is not value:
                continue
            waiting += [o for o in call.outputs if o is not None]


def _zero(v: View, values: list[Value | None]) -> bool:
    array = v.e.array(values[0]) if len(values) == 1 else None
    return array is not None and not array.any()


# ---- products with a gate --------------------------------------------------------------------------------------------


def _gates(v: View) -> None:
    """Mark products with a gate.

    Of x times g(x), element by element, and of x times one over a norm, the gate comes first. Of two branches, the one
    that comes out of an activation is the gate.
    """
    makers = v.producers()
    for call in v.calls:
        if call.op != "Mul" or call.domain or call.role or any(x is None or x.facts.const for x in call.inputs):
            continue
        for gate, signal in ((call.given(1), call.given(0)), (call.given(0), call.given(1))):
            if _is_reciprocal(v, gate, makers):
                note = "divisor held constant"
            elif _only_of(gate, _unscaled(signal, makers), makers):
                note = "activation: input times gate"
            else:
                continue
            call.inputs = (gate, signal)
            _note(call, "gate", note)
            break
        else:
            if len({gateness(v.e.producers, x) for x in call.inputs if x is not None}) == 2:
                _note(call, "gated", "gated product")


def _unscaled(x: Value, makers: Mapping[Value, Call]) -> Value:
    """The tensor that x is a constant multiple of."""
    while True:
        maker = makers.get(x)
        if maker is None or maker.op not in ("Mul", "Neg", "Cast") or carried(maker) is None:
            return x
        before = carried(maker)
        assert before is not None
        if before.facts.shape != x.facts.shape:
            return x
        x = before


def _only_of(y: Value, x: Value, makers: Mapping[Value, Call]) -> bool:
    """Whether each element of y is a function of the same element of x."""
    waiting, seen, met = [y], set(), False
    while waiting:
        value = waiting.pop()
        if value is x:
            met = True
            continue
        if value in seen:
            continue
        seen.add(value)
        maker = makers.get(value)
        if maker is None or maker.domain or len(seen) > _LONGEST or value.facts.shape != x.facts.shape:
            return False
        known = OPERATORS.get(maker.op)
        if known is None or (known.verb != "pointwise" and maker.op not in _ELEMENTWISE):
            return False
        waiting += [i for i in maker.inputs if i is not None and not i.facts.const]
    return met


def _is_reciprocal(v: View, x: Value, makers: Mapping[Value, Call]) -> bool:
    """Whether x is one over something, moved or scaled."""
    while True:
        maker = makers.get(x)
        if maker is None or maker.domain:
            return False
        if maker.op == "Reciprocal" or (maker.op == "Div" and maker.given(0).facts.const):
            return True
        if maker.op == "Pow":
            exponent = v.e.array(maker.given(1))
            return exponent is not None and bool(np.all(exponent < 0))
        before = carried(maker)
        if before is None:
            return False
        x = before


def _divisors(v: View) -> None:
    """Mark the norms that something is divided by, or multiplied by one over: these are held constant."""
    makers = v.producers()
    for call in v.calls:
        if call.op not in ("Div", "Reciprocal") or call.domain:
            continue
        maker = makers.get(call.given(1 if call.op == "Div" else 0))
        while maker is not None and maker.op in _TO_DIVISOR:
            live = [x for x in maker.inputs if x is not None and x.dtype.kind == "f" and not x.facts.const]
            maker = makers.get(live[0]) if len(live) == 1 else None
        if maker is not None and maker.op in _NORMS and not maker.role:
            _note(maker, "divisor", "divisor held constant")
