"""LSTM, GRU and RNN seen as the operators that they stand for: layers of the inputs, and a Scan over the steps.

The source keeps its fused node, and what follows reads the fused outputs. Only the view changes: a MatMul for every
gate makes what the inputs bring to it in all steps; a Scan for every direction runs over these, whose body is written
in :mod:`onnx_lrp.cells`; and its results are joined to what the node makes. The hidden states before every step are
those that the fused operator has put out, so that they need no second run. A single step is no loop, and is written
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_lrp.adjoints.shapes import arange_like, as_int64, concat_ints, dim_of, ints
from onnx_lrp.cells import GATES, STATES, Form, Function, functions_of, step_of, strange
from onnx_lrp.emit import Call, Operand, Value
from onnx_lrp.subgraphs import free_names
from onnx_lrp.unroll import is_short, unrolled
from onnx_lrp.view import View

_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


def see_steps(v: View) -> None:
    """See recurrent operators as their steps; those that cannot be seen so are refused."""
    known = {id(call) for call in v.calls}
    calls: list[Call] = []
    for call in v.calls:
        if call.op not in GATES or call.domain:
            calls.append(call)
            continue
        reason = _obstacle(call)
        if reason:
            call.refused = (reason, "explain a tensor before it with output=, or export the model without it")
            calls.append(call)
            continue
        with v.e.scope(call.site, doc=f"steps of {call.op} {call.site}"):
            steps = _Steps(v, call).run()
        # Equal expressions exist once, also those of two nodes.
        fresh = [step for step in steps if id(step) not in known]
        known.update(id(step) for step in fresh)
        calls.extend(fresh)
    v.calls = calls


def see_layers(v: View) -> None:
    """See what goes into a gate as one linear layer: a MatMul of the state, to which the rest is added as a bias."""
    uses, makers = v.uses(), v.producers()
    merged: dict[Call, Call] = {}
    for call in v.calls:
        maker = makers.get(call.given(0)) if call.role == "layer" and call.op == "Add" else None
        if maker is not None and maker.op == "MatMul" and len(maker.inputs) == 2 and uses[maker.output] == 1:
            call.op, call.inputs = "MatMul", (*maker.inputs, call.given(1))
            merged[maker] = call
    v.calls = [call for call in v.calls if call not in merged]


def _obstacle(call: Call) -> str:
    """Why a recurrent operator cannot be seen as its steps; "" if it can."""
    if any(not isinstance(n, int) for n in call.given(2).shape):
        return "the size of its weights is unknown"
    if call.given(0).shape[int(call.attrs.get("layout", 0))] == 0:
        return "its sequence has no steps"
    function = strange(call.attrs)
    return f"its activation {function} is unknown" if function else ""


class _Steps:
    """One recurrent operator on its way to calls."""

    def __init__(self, v: View, call: Call):
        self.e, self.call = v.e, call
        self.made: dict[int, Call] = {}
        self.batch_first = bool(call.attrs.get("layout", 0))
        self.gates = GATES[call.op]
        self.x = self._time_first(call.given(0))
        self.size = int(call.given(2).shape[2] or 0)
        self.states = [None if s is None else self._time_first(s) for s in (call.input(5), call.input(6))]
        self._one_batch(self.x, *(s for s in self.states if s is not None))
        self.mask, self.begun = self._masks()

    def run(self) -> list[Call]:
        """The calls in order; the last ones make the outputs of the node."""
        ways = _DIRECTIONS[str(self.call.attrs.get("direction", "forward"))]
        functions = functions_of(self.call.op, self.call.attrs, len(ways))
        found = [self._direction(d, backwards, functions[d]) for d, backwards in enumerate(ways)]
        outputs = [*self.call.outputs, None, None, None]
        zero = self.e.const(0, self.x.dtype)
        if outputs[0] is not None:
            tracks = [track if self.mask is None else self.op("Where", self.mask, track, zero) for track, _ in found]
            tracks = [self.op("Unsqueeze", track, ints(self.e, [1])) for track in tracks]
            self._finish(self._joined(tracks, 1), outputs[0], [2, 0, 1, 3])
        for k, output in enumerate(outputs[1:3]):
            if output is not None:
                last = [s for _, states in found if (s := states[k]) is not None]
                if self.begun is not None:  # where there was no step at all, ONNX Runtime has zeros
                    last = [self.op("Where", self.begun, s, zero) for s in last]
                last = [self.op("Unsqueeze", s, ints(self.e, [0])) for s in last]
                self._finish(self._joined(last, 0), output, [1, 0, 2])
        return list(self.made.values())

    # ---- emitting ------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Operand, role: str = "", **attrs: Any) -> Value:
        """Emit an operator, as one of the calls that the walk sees."""
        return self.ops(kind, *inputs, outputs=1, role=role, **attrs)[0]

    def ops(self, kind: str, *inputs: Operand, outputs: int, role: str = "", **attrs: Any) -> tuple[Value, ...]:
        """The same for several outputs."""
        values = self.e.ops(kind, *inputs, outputs=outputs, **attrs)
        maker = self.e.producers.get(values[0].name)
        if maker is not None:  # a small constant is folded
            maker.note, maker.role = f"step of {self.call.op}", role
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

    def _parts(self, value: Value, count: int) -> tuple[Value, ...]:
        """Cut a tensor into equal pieces along its last axis."""
        if count == 1:
            return (value,)
        return self.ops("Split", value, ints(self.e, [self.size] * count), outputs=count, axis=-1)

    def _time_first(self, value: Value) -> Value:
        return self.op("Transpose", value, perm=[1, 0, 2]) if self.batch_first else value

    def _of(self, value: Value | None, d: int) -> Value | None:
        """What a tensor (weights, biases, states) holds for a direction, without the axis of directions."""
        if value is None:
            return None
        if value.shape[0] == 1:
            return self.op("Squeeze", value, ints(self.e, [0]))
        return self.op("Gather", value, self.e.const(d, np.int64), axis=0)

    @staticmethod
    def _one_batch(*values: Value) -> None:
        """Data and states (three axes, samples second) have equally many samples, whatever their number is called."""
        counts = [v.shape[1] for v in values]
        count = next((n for n in counts if isinstance(n, int)), counts[0])
        for v in values:
            v.facts = replace(v.facts, shape=(v.shape[0], count, v.shape[2]))

    def _masks(self) -> tuple[Value | None, Value | None]:
        """Which steps (T, N, 1) a sample has, and which samples (N, 1) have any; None where that is all."""
        lengths, e = self.call.input(4), self.e
        if lengths is None:
            return None, None
        steps, known = self.x.shape[0], e.array(lengths)
        lengths = as_int64(e, lengths)
        begun = e.op("Unsqueeze", e.op("Greater", lengths, e.const(0, np.int64)), ints(e, [1]))
        begun_everywhere = known is not None and (known > 0).all()
        if known is not None and isinstance(steps, int) and (known >= steps).all():
            return None, None if begun_everywhere else begun
        column = e.op("Unsqueeze", arange_like(e, self.x, 0), ints(e, [1, 2]))
        mask = e.op("Less", column, e.op("Unsqueeze", lengths, ints(e, [0, 2])), shape=(*self.x.shape[:2], 1))
        return mask, None if begun_everywhere else begun

    # ---- one direction -------------------------------------------------------------------------------------------

    def _direction(
        self, d: int, backwards: bool, functions: Sequence[Function]
    ) -> tuple[Value, tuple[Value | None, Value | None]]:
        """The hidden state after every step (T, N, H) in order of time, and the last states (N, H)."""
        e, call = self.e, self.call
        outer, brought = self._weights(d)
        peephole, masked = call.input(7) is not None, self.mask is not None
        graph = step_of(Form(call.op, call.attrs, functions, self.x.dtype, peephole, "late" in outer, masked))
        begin = [self._of(s, d) for s in self.states[: len(STATES[call.op])]]
        shape = concat_ints(e, [dim_of(e, self.x, 1), [self.size]])
        zeros = e.op("ConstantOfShape", shape, shape=(self.x.shape[1], self.size), value=np.array([0], self.x.dtype))
        slices = [*brought, *([] if self.mask is None else [self.mask])]
        last = [self._fused_state(1 + k, d) for k in range(len(begin))]
        track = self._fused_track(d, backwards, begin[0])
        back = int(backwards)
        attrs = {"body": graph, "num_scan_inputs": len(slices), "scan_input_directions": [back] * len(slices)}
        steps = Call(
            "Scan",
            (*(zeros if s is None else s for s in begin), *slices, *(outer[name] for name in free_names(graph))),
            (*last, track),
            attrs | {"scan_output_directions": [back]},
            call.site,
            note=f"steps of {call.op}",
            role="recurrent",
        )
        written_out = self.x.shape[0] == 1 or (e.portable and is_short(steps))
        for part in unrolled(e, steps) if written_out else [steps]:
            self.made[id(part)] = part
        return track, (last[0], last[1] if len(last) > 1 else None)

    def _weights(self, d: int) -> tuple[dict[str, Value], list[Value]]:
        """What the body of the Scan reads from outside, and what the inputs bring to each gate (T, N, H)."""
        gates, call = self.gates, self.call
        inputs, states = (
            self._parts(self.op("Transpose", self._of(call.given(k), d), perm=[1, 0]), len(gates)) for k in (1, 2)
        )
        outer = {f"recurrent/{gate}": w for gate, w in zip(gates, states, strict=True)}
        biases: Sequence[Value | None] = [None] * len(gates)
        given = self._of(call.input(3), d)
        if given is not None:
            parts = self._parts(given, 2 * len(gates))
            pairs = list(zip(parts[: len(gates)], parts[len(gates) :], strict=True))
            if call.op == "GRU" and call.attrs.get("linear_before_reset", 0):
                outer["late"] = pairs[-1][1]  # what the state brings is reset together with its bias
            biases = [
                a if gate == "candidate" and "late" in outer else self.op("Add", a, b)
                for gate, (a, b) in zip(gates, pairs, strict=True)
            ]
        watch = self._of(call.input(7), d)
        if watch is not None:
            outer |= {f"peephole/{gate}": p for gate, p in zip(gates, self._parts(watch, 3), strict=False)}
        brought = []
        for weight, bias in zip(inputs, biases, strict=True):
            product = self.op("MatMul", self.x, weight, role="summand")
            brought.append(product if bias is None else self.op("Add", product, bias, role="summand"))
        return outer, brought

    # ---- what the fused operator makes -----------------------------------------------------------------------------

    def _fused_state(self, output: int, d: int) -> Value | None:
        """The last state (N, H) of a direction, if it is asked for."""
        value = self.call.outputs[output] if output < len(self.call.outputs) else None
        return None if value is None else self._chosen(value, 1 if self.batch_first else 0, d)

    def _fused_track(self, d: int, backwards: bool, begin: Value | None) -> Value:
        """The hidden state after every step (T, N, H); where a sample has ended anything, but what it begins with."""
        e, call = self.e, self.call
        whole = call.outputs[0] if call.outputs else None
        if whole is None:
            steps, count, _ = self.x.shape
            shape = (count, steps, None, self.size) if self.batch_first else (steps, None, count, self.size)
            whole = e.op(call.op, *call.inputs, shape=shape, **call.attrs)
        track = self._chosen(whole, 2 if self.batch_first else 1, d)
        track = e.op("Transpose", track, perm=[1, 0, 2]) if self.batch_first else track
        if backwards and self.mask is not None and begin is not None:  # it comes to its last steps first
            track = e.op("Where", self.mask, track, begin)
        return e.op("Identity", track, label="hidden", shape=(*self.x.shape[:2], self.size))

    def _chosen(self, value: Value, axis: int, d: int) -> Value:
        """What a result holds for a direction."""
        e = self.e
        if self.call.attrs.get("direction", "forward") != "bidirectional":
            return e.op("Squeeze", value, ints(e, [axis]))
        return e.op("Gather", value, e.const(d, np.int64), axis=axis)
