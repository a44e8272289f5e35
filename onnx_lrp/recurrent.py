"""LSTM, GRU and RNN seen as the operators that they stand for, step by step.

The source keeps its fused node, and what follows reads the fused outputs. Only the view changes: the steps are emitted
beside it, where the walk needs their inner tensors. One MatMul makes what the inputs bring to all gates of all steps;
each step adds what its state brings. The product of a gate and its signal has the role of a gate, by which the rule for
gates (Arras et al. 2017, sec. 3.1) knows it.

Equations: ONNX operator schemas LSTM-14, GRU-14, RNN-14; what these leave open is as ONNX Runtime has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_lrp.adjoints.shapes import ints
from onnx_lrp.emit import Call, Operand, Value
from onnx_lrp.view import View

# Gates per operator, in the order of its weights: input, output, forget, cell; update, reset, hidden.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}

LONGEST = 256  # steps that are written out; the explained graph grows by some fifty operators with each

# Which of alpha and beta an activation takes, and what ONNX Runtime takes where nothing is given.
_ALPHA = {"Affine": 0.0, "LeakyRelu": 0.01, "ThresholdedRelu": 0.0, "ScaledTanh": 0.0, "HardSigmoid": 0.2, "Elu": 1.0}
_BETA = {"Affine": 0.0, "ScaledTanh": 0.0, "HardSigmoid": 0.5}
_PLAIN = ("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus")

Activation = Callable[[Value], Value]
State = tuple[Value | None, ...]  # hidden (and cell) state, (1, N, H); None where it is zero
Step = Callable[[int, State], list[Value]]


def unroll(v: View) -> None:
    """See recurrent operators as their steps; those that cannot be seen so are refused."""
    known = {id(call) for call in v.calls}
    calls: list[Call] = []
    for call in v.calls:
        if call.op not in GATES or call.domain:
            calls.append(call)
            continue
        reason = _obstacle(call)
        if reason:
            call.refused = (reason, "export the model with a fixed sequence length")
            calls.append(call)
            continue
        with v.e.scope(call.site, doc=f"steps of {call.op} {call.site}"):
            steps = _Steps(v, call).run()
        # Equal expressions exist once, also those of two nodes.
        fresh = [step for step in steps if id(step) not in known]
        known.update(id(step) for step in fresh)
        calls.extend(fresh)
    v.calls = calls


def _obstacle(call: Call) -> str:
    """Why a recurrent operator cannot be written out step by step; "" if it can."""
    length = call.given(0).shape[int(call.attrs.get("layout", 0))]
    if not isinstance(length, int):
        return "the length of its sequence is dynamic, and only a fixed one is explained"
    if not 0 < length <= LONGEST:
        return f"its sequence has {length} steps, and 1 to {LONGEST} are explained"
    functions = call.attrs.get("activations") or ()
    strange = [f for f in functions if f not in _PLAIN and f not in _ALPHA]
    return f"its activation {strange[0]} is unknown" if strange else ""


class _Steps:
    """One recurrent operator on its way to calls."""

    def __init__(self, v: View, call: Call):
        self.e, self.call = v.e, call
        self.made: dict[int, Call] = {}
        self.batch_first = bool(call.attrs.get("layout", 0))
        self.x = self._time_first(call.given(0))
        self.length = int(self.x.shape[0] or 0)
        self.states = [None if s is None else self._time_first(s) for s in (call.input(5), call.input(6))]
        self._one_batch(self.x, *(s for s in self.states if s is not None))
        self.masks = self._masks()

    def run(self) -> list[Call]:
        """The calls in order; the last ones make the outputs of the node."""
        ways = _DIRECTIONS[str(self.call.attrs.get("direction", "forward"))]
        functions = self._activations(len(ways))
        found = [self._direction(d, backwards, functions[d]) for d, backwards in enumerate(ways)]
        outputs = [*self.call.outputs, None, None, None]
        if outputs[0] is not None:
            tracks = [self.op("Unsqueeze", self._joined(steps, 0), ints(self.e, [1])) for steps, _ in found]
            self._finish(self._joined(tracks, 1), outputs[0], [2, 0, 1, 3])
        for k, output in enumerate(outputs[1:3]):
            if output is not None:
                last = [state[k] for _, state in found]
                self._finish(self._joined([s for s in last if s is not None], 0), output, [1, 0, 2])
        return list(self.made.values())

    # ---- emitting ------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Operand, **attrs: Any) -> Value:
        """Emit an operator, as one of the calls that the walk sees."""
        return self.ops(kind, *inputs, outputs=1, **attrs)[0]

    def ops(self, kind: str, *inputs: Operand, outputs: int, **attrs: Any) -> tuple[Value, ...]:
        """The same for several outputs."""
        values = self.e.ops(kind, *inputs, outputs=outputs, **attrs)
        maker = self.e.producers.get(values[0].name)
        if maker is not None:  # a small constant is folded
            maker.note = f"step of {self.call.op}"
            self.made.setdefault(id(maker), maker)
        return values

    def _finish(self, value: Value, output: Value, perm: list[int]) -> None:
        """Give a result to the output of the source's node."""
        if self.batch_first:
            call = Call("Transpose", (value,), (output,), {"perm": perm}, self.call.site)
        else:
            call = Call("Identity", (value,), (output,), {}, self.call.site)
        call.note = f"output of {self.call.op}"
        self.made[id(call)] = call

    def _joined(self, parts: Sequence[Value], axis: int) -> Value:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def _parts(self, value: Value, sizes: Sequence[int], axis: int = -1) -> tuple[Value, ...]:
        """Cut a tensor into pieces along an axis."""
        if len(sizes) == 1:
            return (value,)
        return self.ops("Split", value, ints(self.e, sizes), outputs=len(sizes), axis=axis)

    def _sum(self, first: Value, *others: Value | None) -> Value:
        """The sum of those terms that are not zero."""
        for term in others:
            first = first if term is None else self.op("Add", first, term)
        return first

    def _gated(self, gate: Value, signal: Value) -> Value:
        """A gate times its signal."""
        value = self.op("Mul", gate, signal)
        maker = self.e.producers.get(value.name)
        if maker is not None:
            maker.role = "gate"
        return value

    def _time_first(self, value: Value) -> Value:
        return self.op("Transpose", value, perm=[1, 0, 2]) if self.batch_first else value

    def _of(self, index: int, direction: int) -> Value | None:
        """What an input (weights, biases) holds for a direction, without the axis of directions."""
        value = self.call.input(index)
        if value is None:
            return None
        if value.shape[0] == 1:
            return self.op("Squeeze", value, ints(self.e, [0]))
        return self.op("Gather", value, self.e.const(direction, np.int64), axis=0)

    @staticmethod
    def _one_batch(*values: Value) -> None:
        """Data and states (three axes, samples second) have equally many samples, whatever their number is called."""
        counts = [v.shape[1] for v in values]
        count = next((n for n in counts if isinstance(n, int)), counts[0])
        for v in values:
            v.facts = replace(v.facts, shape=(v.shape[0], count, v.shape[2]))

    def _initial(self, number: int, direction: int) -> Value | None:
        """An initial state (1, N, H) of a direction; None where it is zero."""
        value, d = self.states[number], direction
        if value is None or value.shape[0] == 1:
            return value
        shape = (1, *value.shape[1:])
        return self.op("Slice", value, ints(self.e, [d]), ints(self.e, [d + 1]), ints(self.e, [0]), shape=shape)

    # ---- what the attributes say ---------------------------------------------------------------------------------

    def _masks(self) -> list[Value | None]:
        """For every step which samples are that long, as (1, N, 1); None where all are."""
        lengths, e = self.call.input(4), self.e
        if lengths is None:
            return [None] * self.length
        column = e.op("Unsqueeze", lengths, ints(e, [0, 2]))
        masks = [e.op("Greater", column, e.const(t, lengths.dtype)) for t in range(self.length)]
        known = [e.array(mask) for mask in masks]
        return [None if k is not None and k.all() else mask for mask, k in zip(masks, known, strict=True)]

    def _activations(self, directions: int) -> list[list[Activation]]:
        """The activations of every direction; alpha and beta are handed out in order to those that take one."""
        attrs, defaults = self.call.attrs, _DEFAULTS[self.call.op]
        names = list(attrs.get("activations") or defaults * directions)
        alphas, betas = (list(attrs.get(f"activation_{k}") or ()) for k in ("alpha", "beta"))

        def number(known: dict[str, float], name: str, given: list[float]) -> float:
            return (given.pop(0) if given else known[name]) if name in known else 0.0

        functions = [self._activation(n, number(_ALPHA, n, alphas), number(_BETA, n, betas)) for n in names]
        size = len(defaults)
        return [functions[d * size : (d + 1) * size] for d in range(directions)]

    def _activation(self, name: str, alpha: float, beta: float) -> Activation:
        def apply(x: Value) -> Value:
            if name == "Affine":
                return self.op("Add", self.op("Mul", x, alpha), beta)
            if name == "ScaledTanh":
                return self.op("Mul", self.op("Tanh", self.op("Mul", x, beta)), alpha)
            attrs = ({"alpha": alpha} if name in _ALPHA else {}) | ({"beta": beta} if name in _BETA else {})
            return self.op(name, x, **attrs)

        return apply

    def _clipped(self, x: Value) -> Value:
        """What goes into an activation (but not into the last one of an LSTM)."""
        bound = self.call.attrs.get("clip")
        return x if not bound else self.op("Clip", x, -float(bound), float(bound))

    # ---- one direction -------------------------------------------------------------------------------------------

    def _direction(self, d: int, backwards: bool, functions: Sequence[Activation]) -> tuple[list[Value], State]:
        """The hidden states (1, N, H) in order of time, and the last state."""
        cell = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self.call.op](d, functions)
        state: State = tuple(self._initial(number, d) for number in range(2 if self.call.op == "LSTM" else 1))
        zero = self.e.const(0, self.x.dtype)
        steps: list[Value] = []
        for t in range(self.length)[:: -1 if backwards else 1]:
            new, mask = cell(t, state), self.masks[t]
            if mask is not None:  # a sample that has ended keeps its state, and puts out zeros
                held = [self.op("Where", mask, n, zero if s is None else s) for n, s in zip(new, state, strict=True)]
                steps.append(self.op("Where", mask, new[0], zero))
                state = tuple(held)
            else:
                steps.append(new[0])
                state = tuple(new)
        if self.masks[0] is not None:  # where there was no step at all, ONNX Runtime has zeros
            state = tuple(None if s is None else self.op("Where", self.masks[0], s, zero) for s in state)
        return steps[:: -1 if backwards else 1], state

    def _weights(self, d: int) -> tuple[Value, Value, Value | None, Value | None]:
        """Weights of inputs (I, gates * H) and states (H, gates * H), and the biases of both (gates * H) or none."""
        inputs, states = (self.op("Transpose", self._of(index, d), perm=[1, 0]) for index in (1, 2))
        biases = self._of(3, d)
        if biases is None:
            return inputs, states, None, None
        size = int(biases.shape[0] or 0) // 2
        b, rb = self._parts(biases, [size, size])
        return inputs, states, b, rb

    def _from_inputs(self, weights: Value, bias: Value | None) -> tuple[Value, ...]:
        """What the inputs bring to the gates, (1, N, gates * H) for each step."""
        return self._parts(self._sum(self.op("MatMul", self.x, weights), bias), [1] * self.length, axis=0)

    def _from_state(self, state: Value | None, weights: Value) -> Value | None:
        """What the state brings to the gates; None where it is zero."""
        return None if state is None else self.op("MatMul", state, weights)

    def _lstm(self, d: int, functions: Sequence[Activation]) -> Step:
        weights, recurrent, b, rb = self._weights(d)
        brought = self._from_inputs(weights, b and self._sum(b, rb))
        size, peep, (f, g, h) = _size(recurrent), self._of(7, d), functions
        watch: Sequence[Value | None] = [None] * 3 if peep is None else self._parts(peep, [size] * 3)

        def seen(gate: Value, cell: Value | None, weight: Value | None) -> Value:
            """The gate with what it sees of the cell through its peephole."""
            return gate if cell is None or weight is None else self._sum(gate, self.op("Mul", cell, weight))

        def step(t: int, state: State) -> list[Value]:
            before, cell = state
            gates = self._sum(brought[t], self._from_state(before, recurrent))
            i, o, forget, c = self._parts(gates, [size] * 4)
            enter = f(self._clipped(seen(i, cell, watch[0])))
            kept = None
            if cell is not None:
                coupled = self.call.attrs.get("input_forget", 0)
                keep = self.op("Sub", 1.0, enter) if coupled else f(self._clipped(seen(forget, cell, watch[2])))
                kept = self._gated(keep, cell)
            new = self._sum(self._gated(enter, g(self._clipped(c))), kept)
            return [self._gated(f(self._clipped(seen(o, new, watch[1]))), h(new)), new]

        return step

    def _gru(self, d: int, functions: Sequence[Activation]) -> Step:
        weights, recurrent, b, rb = self._weights(d)
        size, (f, g) = _size(recurrent), functions
        switches, hidden = self._parts(recurrent, [2 * size, size])
        bias, late = b and self._sum(b, rb), None
        after = bool(self.call.attrs.get("linear_before_reset", 0))
        if after and b is not None and rb is not None:
            # What the state brings is reset together with its bias.
            (first, own), (second, late) = (self._parts(v, [2 * size, size], axis=0) for v in (b, rb))
            bias = self.op("Concat", self.op("Add", first, second), own, axis=0)
        brought = self._from_inputs(weights, bias)

        def step(t: int, state: State) -> list[Value]:
            (before,) = state
            both, own = self._parts(brought[t], [2 * size, size])
            gates = self._sum(both, self._from_state(before, switches))
            update, reset = (f(self._clipped(part)) for part in self._parts(gates, [size, size]))
            if after:
                terms = [v for v in (self._from_state(before, hidden), late) if v is not None]
                through = self._gated(reset, self._sum(*terms)) if terms else None
            else:
                through = self._from_state(before and self._gated(reset, before), hidden)
            new = self._gated(self.op("Sub", 1.0, update), g(self._clipped(self._sum(own, through))))
            return [self._sum(new, before and self._gated(update, before))]

        return step

    def _rnn(self, d: int, functions: Sequence[Activation]) -> Step:
        weights, recurrent, b, rb = self._weights(d)
        brought = self._from_inputs(weights, b and self._sum(b, rb))

        def step(t: int, state: State) -> list[Value]:
            total = self._sum(brought[t], self._from_state(state[0], recurrent))
            return [functions[0](self._clipped(total))]

        return step


def _size(recurrent: Value) -> int:
    """The hidden size, from the weights of the states."""
    return int(recurrent.shape[0] or 0)
