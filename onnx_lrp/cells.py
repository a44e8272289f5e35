"""One step of an LSTM, GRU or RNN, as the body of a Scan.

States in, and what the inputs bring to every gate; states out, and the hidden state once more as what is put together.
What a gate is made of is one linear layer of input and state, the role "layer": its output with all biases is what a
rule divides by. The product of a gate and its signal has the role "gate", by which the rules for gates (Arras et al.
2017, sec. 3.1) know it. Summands of a layer that are made elsewhere have the role "summand".

Equations: ONNX operator schemas LSTM-14, GRU-14, RNN-14; what these leave open is as ONNX Runtime has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnx_lrp.model import ROLE

# Gates per operator, in the order of its weights.
GATES = {
    "LSTM": ("input_gate", "output_gate", "forget_gate", "candidate"),
    "GRU": ("update_gate", "reset_gate", "candidate"),
    "RNN": ("candidate",),
}
STATES = {"LSTM": ("hidden", "cell"), "GRU": ("hidden",), "RNN": ("hidden",)}
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}

# Which of alpha and beta an activation takes, and what ONNX Runtime takes where nothing is given.
_ALPHA = {"Affine": 0.0, "LeakyRelu": 0.01, "ThresholdedRelu": 0.0, "ScaledTanh": 0.0, "HardSigmoid": 0.2, "Elu": 1.0}
_BETA = {"Affine": 0.0, "ScaledTanh": 0.0, "HardSigmoid": 0.5}
_PLAIN = ("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus")


@dataclass(frozen=True)
class Function:
    """An activation with its parameters."""

    name: str
    alpha: float
    beta: float


@dataclass(frozen=True)
class Form:
    """What a step looks like.

    Attributes:
        op: LSTM, GRU or RNN.
        attrs: attributes of the operator.
        functions: its activations in one direction.
        dtype: element type.
        peephole: gates of an LSTM see the cell.
        late: there is a bias that a GRU resets together with what its state brings.
        masked: samples may have ended.
    """

    op: str
    attrs: dict[str, Any]
    functions: Sequence[Function]
    dtype: np.dtype[Any]
    peephole: bool
    late: bool
    masked: bool

    @property
    def slices(self) -> list[str]:
        """What a step gets besides the states: what the inputs bring to each gate, and which samples have not ended."""
        return [f"brought/{gate}" for gate in GATES[self.op]] + ["mask"] * self.masked


def strange(attrs: dict[str, Any]) -> str:
    """An activation that is not known; "" if there is none."""
    return next((f for f in attrs.get("activations") or () if f not in _PLAIN and f not in _ALPHA), "")


def functions_of(op: str, attrs: dict[str, Any], directions: int) -> list[list[Function]]:
    """The activations of every direction; alpha and beta are handed out in order to those that take one."""
    defaults = _DEFAULTS[op]
    names = list(attrs.get("activations") or defaults * directions)
    alphas, betas = (list(attrs.get(f"activation_{k}") or ()) for k in ("alpha", "beta"))

    def number(known: dict[str, float], name: str, given: list[float]) -> float:
        return (given.pop(0) if given else known[name]) if name in known else 0.0

    found = [Function(n, number(_ALPHA, n, alphas), number(_BETA, n, betas)) for n in names]
    return [found[d * len(defaults) : (d + 1) * len(defaults)] for d in range(directions)]


def step_of(form: Form) -> onnx.GraphProto:
    """The body of a Scan over the steps.

    It reads from outside: ``recurrent/<gate>`` (H, H), ``peephole/<gate>`` (H), ``late`` (H).
    """
    return _Step(form).graph()


class _Step:
    """A step on its way to a graph; tensors are names."""

    def __init__(self, form: Form):
        self.form = form
        self.nodes: list[onnx.NodeProto] = []
        self.numbers: dict[str, float] = {}

    def graph(self) -> onnx.GraphProto:
        form = self.form
        states = STATES[form.op]
        new = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[form.op]()
        if form.masked:  # a sample that has ended keeps its state
            new = [self.op("Where", "mask", y, before) for y, before in zip(new, states, strict=True)]
        results = [self.op("Identity", y) for y in (*new, new[0])]
        kind = helper.np_dtype_to_tensor_dtype(form.dtype)
        inputs = [
            helper.make_tensor_value_info(n, onnx.TensorProto.BOOL if n == "mask" else kind, None)
            for n in (*states, *form.slices)
        ]
        outputs = [helper.make_tensor_value_info(n, kind, None) for n in results]
        numbers = [onnx.numpy_helper.from_array(np.array(x, form.dtype), n) for n, x in self.numbers.items()]
        return helper.make_graph(self.nodes, form.op, inputs, outputs, numbers)

    def op(self, kind: str, *inputs: str | float, role: str = "", name: str = "", **attrs: Any) -> str:
        """Write a node; its output is named after it."""
        names = [x if isinstance(x, str) else self._number(x) for x in inputs]
        label = name or f"{kind}_{len(self.nodes)}"
        node = helper.make_node(kind, names, [f"{label}:0"], name=label, **attrs)
        if role:
            node.metadata_props.add(key=ROLE, value=role)
        self.nodes.append(node)
        return f"{label}:0"

    def _number(self, x: float) -> str:
        self.numbers[f"number/{x!r}"] = x
        return f"number/{x!r}"

    def _gated(self, gate: str, signal: str) -> str:
        return self.op("Mul", gate, signal, role="gate")

    def _layer(self, gate: str, state: str, besides: str) -> str:
        """What goes into a gate: what the state brings, and what is brought besides."""
        return self.op("Add", self.op("MatMul", state, f"recurrent/{gate}"), besides, role="layer", name=gate)

    def _clipped(self, x: str) -> str:
        """What goes into an activation (but not into the last one of an LSTM)."""
        bound = self.form.attrs.get("clip")
        return self.op("Clip", x, -float(bound), float(bound)) if bound else x

    def _activation(self, number: int) -> Callable[[str], str]:
        f = self.form.functions[number]

        def apply(x: str) -> str:
            if f.name == "Affine":
                return self.op("Add", self.op("Mul", x, f.alpha), f.beta)
            if f.name == "ScaledTanh":
                return self.op("Mul", self.op("Tanh", self.op("Mul", x, f.beta)), f.alpha)
            given: dict[str, Any] = {"alpha": f.alpha, "beta": f.beta}
            attrs = {k: number for k, number in given.items() if f.name in {"alpha": _ALPHA, "beta": _BETA}[k]}
            return self.op(f.name, x, **attrs)

        return apply

    def _lstm(self) -> list[str]:
        f, g, last = (self._activation(k) for k in range(3))

        def pressed(gate: str, cell: str) -> str:
            """What goes into a gate, with what it sees of the cell through its peephole."""
            besides = f"brought/{gate}"
            if self.form.peephole and gate != "candidate":
                besides = self.op("Add", besides, self.op("Mul", cell, f"peephole/{gate}"), role="summand")
            return self._clipped(self._layer(gate, "hidden", besides))

        enter = f(pressed("input_gate", "cell"))
        coupled = self.form.attrs.get("input_forget", 0)
        keep = self.op("Sub", 1.0, enter, role="complement") if coupled else f(pressed("forget_gate", "cell"))
        candidate = g(pressed("candidate", "cell"))
        new = self.op("Add", self._gated(enter, candidate), self._gated(keep, "cell"))
        return [self._gated(f(pressed("output_gate", new)), last(new)), new]

    def _gru(self) -> list[str]:
        f, g = (self._activation(k) for k in range(2))
        update, reset = (
            f(self._clipped(self._layer(gate, "hidden", f"brought/{gate}"))) for gate in ("update_gate", "reset_gate")
        )
        if self.form.attrs.get("linear_before_reset", 0):
            state = self.op("MatMul", "hidden", "recurrent/candidate", role="summand")
            state = self.op("Add", state, "late", role="summand") if self.form.late else state
            pressed = self.op("Add", self._gated(reset, state), "brought/candidate", name="candidate")
        else:
            pressed = self._layer("candidate", self._gated(reset, "hidden"), "brought/candidate")
        new = self._gated(self.op("Sub", 1.0, update, role="complement"), g(self._clipped(pressed)))
        return [self.op("Add", new, self._gated(update, "hidden"))]

    def _rnn(self) -> list[str]:
        return [self._activation(0)(self._clipped(self._layer("candidate", "hidden", "brought/candidate")))]
