"""Modifiers: what a rule does to inputs, weights and biases before the forward operator sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from onnx_lrp.adjoints.shapes import ones_like
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.facts import Sign

# (emitter, tensor, "low" or "high") -> the bound, broadcastable to the tensor
Bounds = Callable[[Emitter, Value, str], Value]


@dataclass(frozen=True)
class Modifier:
    """How a rule changes a tensor before the forward operator sees it.

    Attributes:
        kind: same x, positive max(x, 0), negative min(x, 0), square x², one 1, zero 0 (the term or bias goes out),
            raised x + amount·max(x, 0), lowered x + amount·min(x, 0), low and high (the bounds of the z-box rule).
        amount: factor of raised and lowered.
    """

    kind: Literal["same", "positive", "negative", "square", "one", "zero", "raised", "lowered", "low", "high"]
    amount: float = 0.0

    def __call__(self, e: Emitter, x: Value, bounds: Bounds | None = None) -> Value | None:
        """Emit it; None stands for a tensor of zeros."""
        match self.kind:
            case "same":
                return x
            case "positive":
                return positive(e, x)
            case "negative":
                return negative(e, x)
            case "square":
                return squared(e, x)
            case "one":
                return ones_like(e, x)
            case "zero":
                return None
            case "raised":
                part = positive(e, x)
                return x if part is None else x * (1 + self.amount) if part is x else x + part * self.amount
            case "lowered":
                part = negative(e, x)
                return x if part is None else x * (1 + self.amount) if part is x else x + part * self.amount
        if bounds is None:
            raise RuleError("the bounds of the z-box rule apply to inputs of the model only")
        return bounds(e, x, self.kind)

    def of_unit(self, sign: int) -> float:
        """What a weight of 1 or -1 that is no tensor (a sum's) becomes, as a factor of the weight as it is."""
        match self.kind:
            case "positive" | "negative":
                return float((sign > 0) == (self.kind == "positive"))
            case "square" | "one":
                return float(sign)
            case "raised" | "lowered":
                return 1.0 + self.amount if (sign > 0) == (self.kind == "raised") else 1.0
        return 1.0


def positive(e: Emitter, x: Value) -> Value | None:
    """max(x, 0), where it is not known to be x itself or zero."""
    if x.nonnegative:
        return x
    return None if x.nonpositive else e.op("Relu", x, label="positive")


def negative(e: Emitter, x: Value) -> Value | None:
    """min(x, 0), where it is not known to be x itself or zero."""
    if x.nonpositive:
        return x
    return None if x.nonnegative else e.op("Min", x, 0.0, label="negative")


def squared(e: Emitter, x: Value) -> Value:
    """x², known to be nonnegative."""
    result = e.op("Mul", x, x, label="square")
    result.facts = replace(result.facts, sign=Sign.POSITIVE)
    return result


SAME, POSITIVE, NEGATIVE, SQUARE, ONE, ZERO = (
    Modifier(k) for k in ("same", "positive", "negative", "square", "one", "zero")
)
LOW, HIGH = Modifier("low"), Modifier("high")


def raised(gamma: float) -> Modifier:
    """X + gamma·max(x, 0)."""
    return Modifier("raised", gamma)


def lowered(gamma: float) -> Modifier:
    """X + gamma·min(x, 0)."""
    return Modifier("lowered", gamma)
