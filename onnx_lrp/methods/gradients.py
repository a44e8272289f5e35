"""The gradient and its kin: the adjoint everywhere, but for what some do at a ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.backward import Relevance, Step, gradient
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.methods.contract import OneWalk
from onnx_lrp.places import Place
from onnx_lrp.target import Start


@dataclass(frozen=True)
class Gradient(OneWalk):
    """Plain gradient of the explained score (Simonyan et al. 2014)."""

    name: ClassVar[str] = "gradient"
    start: ClassVar[Start] = "one"

    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """The adjoint, for every operator that has one."""
        operator = OPERATORS.get(place.call.op)
        return (
            None
            if operator is None or operator.adjoint is None or place.call.domain
            else (gradient, "gradient", "every operator")
        )


@dataclass(frozen=True)
class InputXGradient(Gradient):
    """Input times gradient (Shrikumar et al. 2016)."""

    name: ClassVar[str] = "input_x_gradient"

    def finish(self, e: Emitter, x: Value, relevance: Relevance) -> Value:
        """Multiplied by the input."""
        return x * relevance.whole(e)


def _positive(e: Emitter, out: Sequence[Relevance | None]) -> list[Relevance | None]:
    return [None if r is None else Relevance(e.op("Relu", r.whole(e))) for r in out]


def _guided(e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
    return gradient(e, call, _positive(e, out))


def _deconvolved(e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
    return _positive(e, out)


@dataclass(frozen=True)
class GuidedBackprop(Gradient):
    """Gradient that passes a ReLU only where it is positive itself (Springenberg et al. 2015).

    At a ReLU R_in = R·[x > 0]·[R > 0] (sec. 3.4 there, fig. 1c); the gradient elsewhere, also at other activations.
    """

    name: ClassVar[str] = "guided_backprop"

    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """The adjoint of what is positive at a ReLU."""
        relu = place.call.op == "Relu" and not place.call.domain
        return (_guided, "guided", "op=Relu") if relu else super().step_for(place)


@dataclass(frozen=True)
class Deconvnet(Gradient):
    """Gradient in which the ReLU works on what comes back (Zeiler and Fergus 2014).

    At a ReLU R_in = max(R, 0), whatever x was (sec. 2.1 there); the gradient elsewhere, also at other activations.
    """

    name: ClassVar[str] = "deconvnet"

    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """What is positive, at a ReLU."""
        relu = place.call.op == "Relu" and not place.call.domain
        return (_deconvolved, "deconvnet", "op=Relu") if relu else super().step_for(place)
