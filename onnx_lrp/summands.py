"""Layers whose outputs are added up, seen as one layer of several inputs.

W·x + U·h + b is a linear layer, whether an exporter writes one operator or five. Its stabilizer belongs to the whole
sum: applied to W·x by itself as well, relevance would depend on the exporter. So the layers inside such a sum get the
role of a part, by which a rule book can give them a rule without a stabilizer of its own.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.emit import Call, Value
from onnx_lrp.view import WEIGHTED, View

_SUMS = ("Add", "Sub", "Sum")


def see_summands(v: View) -> None:
    """Give the role "part" to layers with constant weights, and to sums of such, that enter sums of layers only."""
    affine = _affine(v)
    readers: dict[Value, list[Call]] = {}
    for call in v.calls:
        for x in dict.fromkeys(call.inputs):
            if x in affine:
                readers.setdefault(x, []).append(call)
    ends = {v.value(name) for name in v.outputs if name in v.e.values or name in v.alias}
    summed: set[Value] = set()  # tensors that enter sums of layers, and nothing else
    for call in reversed(v.calls):
        outputs = [o for o in call.outputs if o is not None and o in affine and o not in ends]
        entered = {o for o in outputs if readers.get(o) and all(_enters(r, affine, summed) for r in readers[o])}
        summed |= entered
        if outputs and entered.issuperset(outputs) and not OPERATORS[call.op].moves:
            call.role = call.role or "part"


def _affine(v: View) -> set[Value]:
    """Outputs of layers with constant weights, and of sums and movements of such (and of constants)."""
    found: set[Value] = set()
    for call in v.calls:
        if call.domain or call.op not in OPERATORS:
            continue
        if call.op in WEIGHTED:
            layer = sum(not x.facts.const for x in call.inputs if x is not None) == 1
            layer &= not call.given(0).facts.const or not call.given(1).facts.const
        else:
            operator = OPERATORS[call.op]
            live = [x for x in call.inputs if x is not None and x.dtype.kind == "f" and not x.facts.const]
            layer = bool(live) and all(x in found for x in live)
            layer &= call.op in _SUMS or (operator.moves and operator.verb == "linear")
        if layer:
            found.update(o for o in call.outputs if o is not None)
    return found


def _enters(reader: Call, affine: Collection[Value], summed: Collection[Value]) -> bool:
    """Whether what a call reads enters sums of layers only."""
    if reader.outputs[0] not in affine:
        return False
    return reader.op in _SUMS or all(o in summed for o in reader.outputs if o is not None)
