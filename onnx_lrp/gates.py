"""What says "how much": tensors that are gates or probabilities, told by data flow, and sums of what they gate.

A gate comes out of a Sigmoid, HardSigmoid or Softmax, or is something over its own sum. Moved, cut, joined, masked,
scaled by a constant, subtracted from one, or multiplied by another gate it is a gate still.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.emit import Call, Value
from onnx_lrp.view import View, complemented

# How near a tensor is to a switch: of two factors the nearer one is the gate.
SWITCH, SLOPE, ACTIVATION, SIGNAL = 3, 2, 1, 0
_GATES = {"Sigmoid": SWITCH, "HardSigmoid": SWITCH, "Softmax": SWITCH, "Tanh": SLOPE, "Erf": SLOPE}
_LONGEST = 32  # calls that are looked at
_WAVES = ("Sin", "Cos")  # of places, in rotary embeddings: no activations
# Products of which one factor may be a gate or probabilities.
PRODUCTS = ("MatMul", "Gemm", "Einsum", "Mul")
ON_THE_WAY = ("Add", "Clip", "Max", "Expand", "Unsqueeze", "Reshape")  # between a sum and what it divides


def gateness(makers: Mapping[str, Call], value: Value) -> int:
    """SWITCH for what comes out of a Sigmoid or Softmax, SLOPE for a Tanh or Erf, ACTIVATION for another activation.

    Args:
        makers: the call that makes a tensor, by its name.
        value: the tensor.
    """
    return _grade(makers, value, {})


def _grade(makers: Mapping[str, Call], value: Value, known: dict[str, int]) -> int:
    """The same, every tensor on the way looked at once."""
    if value.name not in known:
        known[value.name] = _graded(makers, value, known)
    return known[value.name]


def _graded(makers: Mapping[str, Call], value: Value, known: dict[str, int]) -> int:
    maker = makers.get(value.name)
    if maker is None or maker.domain or maker.op in _WAVES:
        return SIGNAL
    if maker.op in _GATES:
        return _GATES[maker.op]
    if maker.role == "gate":  # an activation that is its input times a gate
        return ACTIVATION
    if maker.op == "Div" and _share_of_sum(makers, maker):
        return SWITCH
    operator, live = OPERATORS.get(maker.op), _live(maker)
    through = operator is not None and (operator.moves or maker.op in ("Clip", "Neg", "Cast"))
    through |= maker.op in ("Mul", "Div") and live == [maker.given(0)]
    if through or complemented(maker) is not None:
        return min((_grade(makers, x, known) for x in live), default=SIGNAL)
    if maker.op == "Mul":
        grades = [_grade(makers, x, known) for x in live]
        return SWITCH if all(grade == SWITCH for grade in grades) else grades[0] if len(grades) == 1 else SIGNAL
    pointwise = operator is not None and operator.verb == "pointwise"
    return ACTIVATION if pointwise and not _of_lengths(makers, value) else SIGNAL


def _of_lengths(makers: Mapping[str, Call], value: Value) -> bool:
    """Whether a tensor is computed from integers alone, as the scale of attention is from lengths: no signal."""
    waiting, seen = [value], set()
    while waiting:
        x = waiting.pop()
        if x in seen or x.facts.const or x.dtype.kind != "f":
            continue
        seen.add(x)
        maker = makers.get(x.name)
        if maker is None or maker.domain or len(seen) > _LONGEST or _embeds(maker):
            return False
        waiting += [i for i in maker.inputs if i is not None]
    return True


def _embeds(call: Call) -> bool:
    """Whether a call picks rows for ids: these are what the model is about."""
    return call.op == "Gather" and call.given(0).dtype.kind == "f"


def _live(call: Call) -> list[Value]:
    """Inputs that are numbers and no constants."""
    return [x for x in call.inputs if x is not None and x.dtype.kind == "f" and not x.facts.const]


def _share_of_sum(makers: Mapping[str, Call], call: Call) -> bool:
    """Whether a Div computes x / sum(x) of something that is not negative, perhaps with a stabilizer."""
    x, maker = call.given(0), makers.get(call.given(1).name)
    while maker is not None and maker.op in ON_THE_WAY:
        before = _live(maker)
        maker = makers.get(before[0].name) if len(before) == 1 else None
    return maker is not None and maker.op == "ReduceSum" and maker.given(0) is x and x.nonnegative


def see_weighted(v: View) -> None:
    """Give products of which one factor is a switch, and no other activation, the role of weighted values."""
    for call in v.calls:
        if call.op in PRODUCTS and not call.domain and call.role in ("", "gated") and len(_live(call)) == 2:
            grades = [gateness(v.e.producers, x) for x in _live(call)]
            if max(grades) == SWITCH and min(grades) < SWITCH:
                call.role = "values"


def see_gated_sums(v: View) -> None:
    """Give the products in a sum of gated signals, f·c + i·g or β·s + (1 - β)·c, the role of a gate, which comes first.

    So that a signal which is a constant, such as the first state of an LSTM written out step by step, takes what is its
    part: were it taken for the scale of its gate, the gate would get relevance.
    """
    makers = v.producers()
    for call in v.calls:
        if call.op not in ("Add", "Sum") or call.domain:
            continue
        terms = [makers[x] for x in call.inputs if x in makers]
        if len(terms) < len(call.inputs) or not all(_gated(v.e.producers, term) for term in terms):
            continue
        for term in terms:
            if term.role != "gate":
                first, second = (gateness(v.e.producers, term.given(i)) for i in (0, 1))
                term.inputs = term.inputs if first > second else term.inputs[::-1]
                term.role = "gate"


def _gated(makers: Mapping[str, Call], call: Call) -> bool:
    """Whether a call is a product of a gate and a signal."""
    if call.op != "Mul" or call.domain:
        return False
    return call.role == "gate" or SWITCH in (gateness(makers, call.given(0)), gateness(makers, call.given(1)))
