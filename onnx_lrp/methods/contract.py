"""What a method has to say: the walks it needs, and what is reported from what they find."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from onnx_lrp.adjoints.shapes import expand_like, ints, zeros_like
from onnx_lrp.backward import Relevance, Step, reverse
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.places import Place
from onnx_lrp.target import Seed, Start
from onnx_lrp.view import View

# The step of a call, the rule's name and why; None where there is none.
StepFor = Callable[[Place], tuple[Step, str, str] | None]
# What every walk found: relevance of the wanted tensors that any reached.
Found = Sequence[Mapping[Value, Relevance]]
# How a walk is run: as reverse is, from the same arguments.
Run = Callable[
    [Emitter, Sequence[Call], Mapping[Value, Relevance], Callable[[Call], Step], Collection[Value]],
    dict[Value, Relevance],
]


def nothing(e: Emitter, found: Found, seed: Seed) -> Mapping[str, Value]:
    """No outputs besides."""
    return {}


def summed(e: Emitter, rows: Value) -> Value:
    """What a token gets: the sum over the features of its embedding."""
    return e.op("ReduceSum", rows, ints(e, [-1]), keepdims=0)


@dataclass(frozen=True)
class Walk:
    """One reverse walk, from the explained tensor unless it says otherwise.

    Attributes:
        step_for: the step of a call, the rule's name and why; None where there is none.
        wanted: the tensors whose relevance it is to find.
        run: how it is run: once through the model, or in another way with the same result type.
        seeds: the tensors it begins at, each with its relevance, which may be computed in the graph; None: the
            explained tensor, with what target and start say.
    """

    step_for: StepFor
    wanted: Sequence[Value]
    run: Run = reverse
    seeds: Mapping[Value, Relevance] | None = None


@dataclass(frozen=True)
class Plan:
    """What a method does with one model.

    Attributes:
        walks: its reverse walks.
        report: what is reported for a tensor, from what the walks found.
        layers: further tensors that it reports on of its own accord.
        extras: further outputs by name, one number per sample.
        score: what is explained, (N,), for a method that explains no class: then target, start and output have no say.
        per_token: what a token gets of what its row of the embedding (..., D) got.
    """

    walks: Sequence[Walk]
    report: Callable[[Emitter, Value, Found], Value]
    layers: Mapping[str, Value] = field(default_factory=dict)
    extras: Callable[[Emitter, Found, Seed], Mapping[str, Value]] = nothing
    score: Value | None = None
    per_token: Callable[[Emitter, Value], Value] = summed


class Method(Protocol):
    """What a method has to say."""

    @property
    def name(self) -> str:
        """Its name, written into the explained model."""

    @property
    def start(self) -> Start:
        """What relevance begins with by default."""

    @property
    def tensors(self) -> Sequence[str]:
        """Tensors of the model that its parameters name."""

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """What it does with a model, to explain one tensor by the reported ones, which go by these names.

        Raises:
            InputError: its parameters do not fit the model.
        """


class OneWalk(abc.ABC):
    """A method of one walk to the reported tensors."""

    tensors: ClassVar[Sequence[str]] = ()

    @abc.abstractmethod
    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """The step of a call, the rule's name and why; None where there is none."""

    def finish(self, e: Emitter, x: Value, relevance: Relevance) -> Value:
        """What is reported for a tensor: its relevance, multiplied out."""
        return relevance.whole(e)

    def report(self, e: Emitter, x: Value, found: Found) -> Value:
        """What is reported for a tensor, in its shape; zeros where no relevance came."""
        (relevance,) = found
        return expand_like(e, self.finish(e, x, relevance[x]), x) if x in relevance else zeros_like(e, x)

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """One walk to the reported tensors."""
        return Plan([Walk(self.step_for, list(reported))], self.report)
