"""Products of two live tensors: halves, gates, factors held constant."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from onnx_lrp.adjoints import OPERATORS, adjoint
from onnx_lrp.adjoints.shapes import expand_like, reduce_like
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.gates import gateness
from onnx_lrp.relevance import adjoint_of_bias, stabilized
from onnx_lrp.special.common import Out, nothing
from onnx_lrp.special.moving import stop
from onnx_lrp.special.pooling import ProportionalPool
from onnx_lrp.tables import epsilon_rule


def _live_factors(call: Call, rule: str) -> list[int]:
    operator = OPERATORS[call.op]
    if operator.verb != "bilinear":
        raise RuleError(f"node '{call.site}': {rule} is for products, {call.op} is {operator.verb}; use norm or pass")
    return [i for i in operator.factors if i in call.active]


def _shared(
    e: Emitter, call: Call, relevance: Relevance, epsilon: float, exact: bool, parts: Mapping[int, float]
) -> Out:
    """R / stab(y) times factor i times the other one, to every factor i by its part; the bias keeps what it brings."""
    y, slot = call.output, OPERATORS[call.op].bias
    if relevance.of is y and (exact or epsilon == 0):
        s = relevance.factor
    else:
        stable = stabilized(e, y, epsilon)
        s = (
            relevance.factor / stable
            if relevance.of is None
            else relevance.factor * e.op("Div", relevance.of, stable, label="quotient")
        )
        e.book(call, "stabilizer", lambda: s * (stable - y))
    bias = None if slot is None else call.input(slot)
    parts = dict(parts)
    if bias is not None and slot is not None:
        if slot in call.active:
            parts[slot] = 1.0
        else:
            e.book(call, "bias", lambda: adjoint_of_bias(e, call, s, slot, bias))
    shares: list[Relevance | None] = list(nothing(call))
    for part in dict.fromkeys(parts.values()):
        group = [i for i in parts if parts[i] == part]
        pieces = adjoint(e, call, [s if part == 1.0 else s * part], group)
        for i in group:
            piece = pieces[i]
            shares[i] = None if piece is None else Relevance(piece, call.given(i))
    return shares


@dataclass(frozen=True)
class _Product(abc.ABC):
    """A product of two live tensors of which each factor gets a part; with one live factor it is a linear layer.

    Attributes:
        epsilon: the stabilizer.
        exact: nothing is divided where relevance arrives as a multiple of the product.
    """

    epsilon: float = 1e-6
    exact: bool = False
    rule: ClassVar[str]

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs."""
        live = _live_factors(call, self.rule)
        if out[0] is None:
            return nothing(call)
        parts = self.parts(e, call, out[0], live)
        if parts is None:
            return epsilon_rule(self.epsilon, self.exact)(e, call, out)
        return _shared(e, call, out[0], self.epsilon, self.exact, parts)

    @abc.abstractmethod
    def parts(self, e: Emitter, call: Call, relevance: Relevance, live: Sequence[int]) -> Mapping[int, float] | None:
        """What part each factor gets; None where the product is an ordinary linear layer."""


@dataclass(frozen=True)
class Share(_Product):
    """A product of two live tensors: each gets half, by the epsilon rule on 2·y (Achtibat et al. 2024, prop. 3.3).

    Of a gate and its signal (Arras et al. 2019, sec. 11.2.3: LRP-half) also a factor that is not live has its half.
    """

    rule: ClassVar[str] = "share"

    def parts(self, e: Emitter, call: Call, relevance: Relevance, live: Sequence[int]) -> Mapping[int, float] | None:
        """Half to each."""
        if call.role == "gate":
            epsilon = 0.0 if self.exact and relevance.of is call.output else self.epsilon
            for _ in range(2 - len(live)):
                e.book(call, "bias", partial(_half, e, call, relevance, epsilon))
        elif len(live) < 2:
            return None
        return dict.fromkeys(live, 0.5)


def _half(e: Emitter, call: Call, relevance: Relevance, epsilon: float) -> Value:
    """Half of the relevance of a product, less what its stabilizer takes."""
    y = call.output
    return expand_like(e, relevance.whole(e), y) * (y / stabilized(e, y, epsilon)) * 0.5


@dataclass(frozen=True)
class Proportional:
    """A product of two tensors: each gets the part that its value has in the sum of both.

    R_g = g / (g + s) · R for a gate g and its signal s, stabilized (Ding et al. 2017; Arras et al. 2019, sec. 11.2.3:
    LRP-prop). Max pools share likewise, see :class:`ProportionalPool`.
    """

    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs; what a constant factor gets is booked."""
        if call.op != "Mul":
            return ProportionalPool(self.epsilon)(e, call, out)
        if out[0] is None:
            return nothing(call)
        total = call.given(0) + call.given(1)
        stable = stabilized(e, total, self.epsilon)
        q = expand_like(e, out[0].whole(e), call.output) / stable
        e.book(call, "stabilizer", lambda: q * (stable - total))
        shares = list(nothing(call))
        for i in range(2):
            if i in call.active:
                shares[i] = Relevance(reduce_like(e, q, call.given(i)), call.given(i))
            else:
                e.book(call, "bias", partial(Relevance(q, call.given(i)).whole, e))
        return shares


@dataclass(frozen=True)
class Gate(_Product):
    """Gate times signal: the signal takes all (Arras et al. 2017, sec. 3.1).

    The gate is the factor that comes out of a Sigmoid, HardSigmoid or Softmax, else out of a Tanh or Erf, else out of
    another activation (or the one named); if both factors do alike or neither does, the first is the signal. Of a
    product whose role is that of a gate, the first factor is the gate; where its signal is no live one, nothing takes
    the relevance.
    """

    gate: Literal["auto", "first", "second"] = "auto"
    rule: ClassVar[str] = "gate"

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs; all of it is booked where the signal is a constant."""
        if call.role == "gate" and _live_factors(call, self.rule) == [0]:
            return stop(e, call, out)
        return super().__call__(e, call, out)

    def parts(self, e: Emitter, call: Call, relevance: Relevance, live: Sequence[int]) -> Mapping[int, float] | None:
        """All to the signal."""
        return None if len(live) < 2 else {self.signal(e, call): 1.0}

    def signal(self, e: Emitter, call: Call) -> int:
        """Index of the factor that is the signal."""
        if call.role == "gate":
            return 1
        if self.gate != "auto":
            return 1 if self.gate == "first" else 0
        return 1 if gateness(e.producers, call.given(0)) > gateness(e.producers, call.given(1)) else 0


@dataclass(frozen=True)
class Constant(_Product):
    """A product in which one live factor is held constant: the epsilon rule on the other side."""

    factor: int = 0
    rule: ClassVar[str] = "factor"

    def parts(self, e: Emitter, call: Call, relevance: Relevance, live: Sequence[int]) -> Mapping[int, float] | None:
        """All to the other factor."""
        return None if len(live) < 2 else {1 - self.factor: 1.0}
