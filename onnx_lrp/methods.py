"""Explanation methods: each says which step a call takes and what the walk begins with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.backward import Relevance, Step, gradient
from onnx_lrp.composite import Composite, book_names, read_book
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.places import Place
from onnx_lrp.target import Start


class Method(Protocol):
    """What a method has to say."""

    @property
    def name(self) -> str:
        """Its name, written into the explained model."""

    @property
    def start(self) -> Start:
        """What relevance begins with by default."""

    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """The step of a call, the rule's name and why; None where there is none."""

    def finish(self, e: Emitter, x: Value, relevance: Relevance) -> Value:
        """What is reported for an input."""


@dataclass(frozen=True)
class LRP:
    """Layer-wise relevance propagation by a rule book.

    Attributes:
        rules: name of a bundled rule book, path of a .toml file, or a Composite.
    """

    rules: str | os.PathLike[str] | Composite = "epsilon_plus_flat"
    composite: Composite = field(init=False, repr=False)
    start: ClassVar[Start] = "logit"

    def __post_init__(self) -> None:
        """Read the rule book."""
        composite = self.rules if isinstance(self.rules, Composite) else read_book(self.rules)
        object.__setattr__(self, "composite", composite)

    @property
    def name(self) -> str:
        """Name of the rule book."""
        return self.composite.name

    def step_for(self, place: Place) -> tuple[Step, str, str] | None:
        """The step that the rule book assigns."""
        found = self.composite.find(place)
        if found is None:
            return None
        where = ", ".join(f"{k}={'/'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in found.where.items())
        return found.step(), str(found), where or "everything"

    def finish(self, e: Emitter, x: Value, relevance: Relevance) -> Value:
        """Relevance, multiplied out."""
        return relevance.whole(e)


@dataclass(frozen=True)
class Gradient:
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

    def finish(self, e: Emitter, x: Value, relevance: Relevance) -> Value:
        """The gradient."""
        return relevance.whole(e)


@dataclass(frozen=True)
class InputXGradient(Gradient):
    """Input times gradient (Shrikumar et al. 2016)."""

    name: ClassVar[str] = "input_x_gradient"

    def finish(self, e: Emitter, x: Value, relevance: Relevance) -> Value:
        """Multiplied by the input."""
        return x * relevance.whole(e)


_GRADIENT_FAMILY: dict[str, Callable[[], Method]] = {"gradient": Gradient, "input_x_gradient": InputXGradient}


def method_names() -> list[str]:
    """All registered names."""
    return [*book_names(), *_GRADIENT_FAMILY]


def find_method(method: str | os.PathLike[str] | Method) -> Method:
    """A method by registered name, by the path of a rule book, or the object itself.

    Raises:
        InputError: no such method.
        RuleError: the rule book is malformed.
    """
    if not isinstance(method, str | os.PathLike):
        if all(hasattr(method, part) for part in ("name", "start", "step_for", "finish")):
            return method
        raise InputError(
            f"a method is a name, the path of a rule book, or an object such as LRP(...), not {type(method).__name__}"
        )
    text = os.fspath(method)
    if text in _GRADIENT_FAMILY:
        return _GRADIENT_FAMILY[text]()
    if text in book_names() or text.endswith(".toml"):
        return LRP(text)
    raise InputError(
        f"there is no method '{text}'; there are {', '.join(method_names())}, or the path of a rule book (.toml)"
    )
