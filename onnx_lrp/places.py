"""Where a call stands in the data flow, and whether the conditions of a rule book hold there."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.emit import Call, Value
from onnx_lrp.view import WEIGHTED, complemented

KINDS = ("linear", "bilinear", "pointwise", "nonlinear", "movement")
POSITIONS = ("first", "last", "inner", "preprocessing")
ROLES = ("gate",)


@dataclass(frozen=True)
class Place:
    """Where a call stands in the data flow.

    Attributes:
        call: the call.
        depth: number of weighted layers (Conv, ConvTranspose, Gemm, MatMul) between it and the explained inputs.
        height: the same towards the explained tensor.
        producers: operators that feed its live inputs, also through operators that only move elements, and 1 - x.
        consumers: operators that read its outputs, likewise.
    """

    call: Call
    depth: int
    height: int
    producers: frozenset[str]
    consumers: frozenset[str]

    @property
    def weighted(self) -> bool:
        """True for a layer with constant weights."""
        return _counts(self.call) == 1

    def at(self, position: str) -> bool:
        """Whether the call stands at a named position.

        first: a weighted layer that no weighted layer precedes; last: one that none follows; preprocessing: what comes
        before the first ones; inner: what has weighted layers on both sides.
        """
        if position == "preprocessing":
            return self.depth == 0 and self.height > 0 and not self.weighted
        if position == "first":
            return self.depth == 0 and self.weighted
        if position == "last":
            return self.height == 0 and self.weighted
        return self.depth > 0 and self.height > 0


def _counts(call: Call) -> int:
    """1 for a layer with constant weights, else 0."""
    return int(call.op in WEIGHTED and len(call.active) == 1)


def places(calls: Sequence[Call]) -> dict[int, Place]:
    """Place of every call, by its id."""
    maker = {o: c for c in calls for o in c.outputs if o is not None}
    readers: dict[Value, list[Call]] = {}
    for call in calls:
        for i in call.active:
            readers.setdefault(call.given(i), []).append(call)
    above = {id(call): [maker[call.given(i)] for i in call.active if call.given(i) in maker] for call in calls}
    below = {id(c): [r for o in c.outputs if o is not None for r in readers.get(o, [])] for c in calls}
    depth, producers = _seen(calls, above)
    height, consumers = _seen(calls[::-1], below)
    return {id(c): Place(c, depth[id(c)], height[id(c)], producers[id(c)], consumers[id(c)]) for c in calls}


def _seen(
    calls: Sequence[Call], neighbours: Mapping[int, Sequence[Call]]
) -> tuple[dict[int, int], dict[int, frozenset[str]]]:
    """Looking from every call in one direction: how many weighted layers lie there, and which operators come next."""
    layers: dict[int, int] = {}
    operators: dict[int, frozenset[str]] = {}
    for call in calls:
        near = neighbours[id(call)]
        layers[id(call)] = max((layers[id(n)] + _counts(n) for n in near), default=0)
        behind = (operators[id(n)] for n in near if _keeps_elements(n.op) or complemented(n) is not None)
        operators[id(call)] = frozenset(n.op for n in near).union(*behind)
    return layers, operators


def _keeps_elements(op: str) -> bool:
    """True for operators that move elements, or put them on a grid."""
    operator = OPERATORS.get(op)
    return operator is not None and operator.moves and operator.verb in ("linear", "pointwise")


def kind_of(op: str) -> str:
    """What a rule book calls an operator: its verb, or movement for linear operators that only move elements."""
    operator = OPERATORS.get(op)
    if operator is None:
        return "unknown"
    return "movement" if operator.moves and operator.verb == "linear" else operator.verb


def as_list(value: Any) -> list[Any]:
    """A condition's value as a list: any of its items will do."""
    return list(value) if isinstance(value, list | tuple) else [value]


def matches(where: Mapping[str, Any], place: Place) -> bool:
    """Whether a call fulfils all conditions of an entry."""
    return all(_holds(key, as_list(wanted), place) for key, wanted in where.items())


def _holds(key: str, options: Sequence[Any], place: Place) -> bool:
    match key:
        case "op":
            return place.call.op in options
        case "kind":
            return kind_of(place.call.op) in options
        case "role":
            return place.call.role in options
        case "name":
            return any(fnmatch.fnmatchcase(place.call.site, pattern) for pattern in options)
        case "position":
            return any(place.at(p) for p in options)
        case "depth":
            return place.depth in options
        case "producer":
            return not place.producers.isdisjoint(options)
        case "consumer":
            return not place.consumers.isdisjoint(options)
        case "live":
            return len(place.call.active) in options
    raise AssertionError(f"no condition is called '{key}'")
