"""Values and calls: what the walk, the rules and the adjoints speak of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Facts, Shape, Sign

Array = np.ndarray[Any, Any]


class Emits(Protocol):
    """What a value needs of its emitter."""

    def op(self, kind: str, *inputs: Operand) -> Value:
        """Emit an operator with one output."""


class Value:
    """A tensor of the graph: its name, what is known of it, and arithmetic that emits nodes."""

    __slots__ = ("_emitter", "facts", "name")

    def __init__(self, emitter: Emits, name: str, facts: Facts):
        self._emitter, self.name, self.facts = emitter, name, facts

    def __repr__(self) -> str:
        return f"Value({self.name!r}, {self.facts.dtype}, {self.facts.shape})"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.facts.dtype

    @property
    def shape(self) -> Shape:
        """Shape; ModelError where not even the rank is known."""
        if self.facts.shape is None:
            raise ModelError(
                f"the rank of tensor '{self.name}' is unknown (perhaps the branches of an If differ in it); fix the "
                "lengths of the model's inputs with shapes=, or export with static ranks"
            )
        return self.facts.shape

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def static(self) -> bool:
        """True if every axis has a known length."""
        return self.facts.shape is not None and all(isinstance(d, int) for d in self.facts.shape)

    @property
    def narrow(self) -> bool:
        """True for 16-bit floats, in which relevance would lose its stabilizer: it is computed in float32."""
        return self.dtype.itemsize == 2 and self.dtype.name in ("float16", "bfloat16")

    @property
    def nonnegative(self) -> bool:
        """True if no element can be negative."""
        return Sign.NEGATIVE not in self.facts.sign

    @property
    def nonpositive(self) -> bool:
        """True if no element can be positive."""
        return Sign.POSITIVE not in self.facts.sign

    def __add__(self, other: Operand) -> Value:
        return self._emitter.op("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self._emitter.op("Sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self._emitter.op("Mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self._emitter.op("Div", self, other)

    def __matmul__(self, other: Operand) -> Value:
        return self._emitter.op("MatMul", self, other)

    def __radd__(self, other: Operand) -> Value:
        return self._emitter.op("Add", other, self)

    def __rsub__(self, other: Operand) -> Value:
        return self._emitter.op("Sub", other, self)

    def __rmul__(self, other: Operand) -> Value:
        return self._emitter.op("Mul", other, self)

    def __rtruediv__(self, other: Operand) -> Value:
        return self._emitter.op("Div", other, self)

    def __neg__(self) -> Value:
        return self._emitter.op("Neg", self)


Operand = Value | float | int | Array | None


@dataclass(eq=False)
class Call:
    """One operator application: the user's node, a view of it, or one re-emitted on other inputs.

    Attributes:
        op: operator type.
        inputs: its inputs; None for an optional one that is absent.
        outputs: its outputs; None for one that nobody names.
        attrs: attributes as Python values.
        site: name of the source node it stands for.
        domain: operator set it belongs to; "" for ai.onnx.
        note: how the view came to see it, for the rule table.
        refused: why a pass found that it cannot be explained, and what the user can do about it.
        role: what a pass recognised it as: "gate" for a product of which the first factor says how much of the second;
            "gated" for one of two branches, one of which comes out of an activation; "scores" for the product before
            a softmax, "values" for the one after it; "layer" for a linear layer of several, such as one of input and
            state that goes into a gate, "summand" for what goes into that from elsewhere; "part" for a layer that only
            enters sums of layers; "complement" for one minus a gate; "divisor" for a norm that something is divided
            by; "recurrent" for the steps of an LSTM, GRU or RNN.
    """

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    site: str = ""
    domain: str = ""
    note: str = ""
    refused: tuple[str, str] | None = None
    role: str = ""

    @property
    def output(self) -> Value:
        """The first output."""
        if self.outputs[0] is None:
            raise ModelError(f"node '{self.site}' ({self.op}) has no first output")
        return self.outputs[0]

    def input(self, index: int) -> Value | None:
        """Input by index; None where absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def given(self, index: int) -> Value:
        """Input by index; ModelError where absent."""
        value = self.input(index)
        if value is None:
            raise ModelError(
                f"node '{self.site}' ({self.op}) misses its input {index}; check how the model was exported"
            )
        return value

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the inputs that carry influence from the explained inputs."""
        return tuple(i for i, v in enumerate(self.inputs) if v is not None and v.facts.active)

    def __repr__(self) -> str:
        return f"Call({self.op}, {self.site!r})"
