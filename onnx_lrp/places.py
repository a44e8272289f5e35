"""Where a call stands in the data flow, and whether the conditions of a rule book hold there."""

from __future__ import annotations

import fnmatch
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.emit import Call, Value
from onnx_lrp.subgraphs import weighted_nodes
from onnx_lrp.view import WEIGHTED, complemented

KINDS = ("linear", "bilinear", "pointwise", "nonlinear", "movement")
POSITIONS = ("first", "last", "inner", "preprocessing")
ROLES = ("gate", "gated", "scores", "values", "layer", "summand", "part", "complement", "divisor")


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

    @property
    def live(self) -> int:
        """How many inputs depend on the explained ones; what is added in a layer of a gate does not count."""
        return _live(self.call)

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
    """1 for a layer with constant weights, or a body with such, else 0."""
    return int((call.op in WEIGHTED and _live(call) == 1) or weighted_nodes(call, WEIGHTED))


def _live(call: Call) -> int:
    added = call.role == "layer" and OPERATORS[call.op].bias in call.active
    return max(len(call.active) - added, min(len(call.active), 1))


@dataclass(frozen=True)
class Beyond:
    """What lies behind a tensor, looking from it in one direction.

    Attributes:
        layers: number of weighted layers.
        operators: which operators come next, also through operators that only move elements.
    """

    layers: int = 0
    operators: frozenset[str] = frozenset()

    def __or__(self, other: Beyond) -> Beyond:
        """What lies behind two tensors."""
        return Beyond(max(self.layers, other.layers), self.operators | other.operators)

    def through(self, call: Call) -> Beyond:
        """What lies behind a call with this behind it."""
        through = _keeps_elements(call.op) or complemented(call) is not None
        behind = self.operators if through else frozenset()
        return Beyond(self.layers + _counts(call), frozenset([call.op]) | behind)


class Places:
    """Where calls stand.

    Args:
        calls: the calls in topological order.
        before: what lies before tensors that come in from outside, if these are the calls of a body.
        after: what lies after tensors that go out.
    """

    def __init__(self, calls: Sequence[Call], before: Mapping[Value, Beyond], after: Mapping[Value, Beyond]):
        self._before, self._after = dict(before), dict(after)
        above: dict[Call, Beyond] = {}
        for call in calls:
            above[call] = _joined(self.before(call.given(i)) for i in call.active)
            self._before |= dict.fromkeys(filter(None, call.outputs), above[call].through(call))
        self._places: dict[Call, Place] = {}
        for call in reversed(calls):
            below = _joined(self.after(y) for y in call.outputs)
            for i in call.active:
                self._after[call.given(i)] = self.after(call.given(i)) | below.through(call)
            here = above[call]
            self._places[call] = Place(call, here.layers, below.layers, here.operators, below.operators)

    def __getitem__(self, call: Call) -> Place:
        """Where a call stands."""
        return self._places[call]

    def before(self, value: Value | None) -> Beyond:
        """What lies before a tensor."""
        return Beyond() if value is None else self._before.get(value, Beyond())

    def after(self, value: Value | None) -> Beyond:
        """What lies after a tensor."""
        return Beyond() if value is None else self._after.get(value, Beyond())


def _joined(parts: Iterable[Beyond]) -> Beyond:
    return functools.reduce(operator.or_, parts, Beyond())


def _keeps_elements(op: str) -> bool:
    """True for operators that move elements, or put them on a grid."""
    known = OPERATORS.get(op)
    return known is not None and known.moves and known.verb in ("linear", "pointwise")


def kind_of(op: str) -> str:
    """What a rule book calls an operator: its verb, or movement for linear operators that only move elements."""
    known = OPERATORS.get(op)
    if known is None:
        return "unknown"
    return "movement" if known.moves and known.verb == "linear" else known.verb


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
            return place.live in options
    raise AssertionError(f"no condition is called '{key}'")
