"""Emitting operators: the emitter types, names, folds and hash-conses what it emits.

A wrong graph fails at the line that builds it: every emitted node goes through ONNX's own type inference at once.

Inside a body of a Loop or Scan, what does not depend on the body's own inputs is emitted before it, once: so weights
derived in a loop are derived outside. Outside an If that holds for constants alone, because what a branch computes may
be invalid where the other one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_lrp.constants import Constants
from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Facts, Shape, sign_of_array
from onnx_lrp.graphs import Body, alive, calls_in, read_by
from onnx_lrp.inference import (
    RANDOM,
    document,
    hashable,
    infer,
    merge,
    named,
    rejected,
    static_lengths,
    type_proto,
)
from onnx_lrp.values import Array, Call, Operand, Value

__all__ = ["Array", "Body", "Call", "Emitter", "Forward", "Operand", "Value"]

# A view operator, or one with bodies: how to emit it, given (emitter, call with the new inputs).
Forward = Callable[["Emitter", Call], "Value | tuple[Value, ...]"]


class Emitter:
    """Appends operators to a graph.

    Args:
        opset: version of ai.onnx to emit for.
        reserved: names that are taken by the source.
        portable: emit no operator or form that WebGPU, OpenVINO or TensorRT lacks.
    """

    def __init__(self, opset: int, reserved: Sequence[str] = (), *, portable: bool = False):
        self.opset = opset
        self.portable = portable
        self._bodies = [Body(self, "model", once=False)]  # those that are being filled, the innermost last
        self._home: dict[str, Body] = {}  # where a tensor lives, if not in the model's own graph
        self.values: dict[str, Value] = {}
        self.producers: dict[str, Call] = {}
        self.docs: dict[str, tuple[str, dict[str, str]]] = {}
        self.forwards: dict[str, Forward] = {}
        self.book: Callable[[Call, str, Callable[[], Value | None]], None] = lambda call, account, share: None
        self.parameters: dict[str, tuple[Value, Array | None]] = {}
        self.constants = Constants(self.producers, opset)
        self.fillings: dict[str, Value] = {}  # for tensors that may hold NaN: the same with 0 there, where it exists
        self._tensors: dict[str, gs.Tensor] = {}
        self._captured: dict[str, gs.Tensor] = {}  # constants as bodies read them
        self._names: set[str] = set(reserved)
        self._numbered: dict[str, int] = {}  # the last number behind a name that is taken
        self._staying = False
        self._site, self._rule, self._doc = "model", "", ""

    # ---- values ------------------------------------------------------------------------------------------------

    def declare(self, name: str, facts: Facts, array: Array | None = None) -> Value:
        """Make a tensor of the source known; ``array`` where it is a readable constant."""
        value = Value(self, name, facts)
        self.values[name] = value
        if array is not None:
            self.constants.give(name, array)
        self._names.add(name)
        return value

    def const(self, array: Array | float | int | Sequence[int], dtype: Any = None, name: str = "const") -> Value:
        """A constant tensor; equal constants exist once."""
        data = np.asarray(array, dtype=dtype)
        key = ("const", data.dtype.str, data.shape, data.tobytes())
        memo = self._bodies[0].memo
        if key not in memo:
            label = f"lrp/{name}"
            if data.size == 1:
                label += f"/{data.dtype.name}_{'x'.join(map(str, data.shape)) or 'scalar'}_{data.reshape(())!s}"
            label = self._unique(label)
            facts = Facts(data.dtype, data.shape, const=True, sign=sign_of_array(data))
            self._tensors[label] = gs.Constant(label, np.ascontiguousarray(data) if data.ndim else data)
            memo[key] = (self.declare(label, facts, data),)
        return memo[key][0]

    def parameter(self, name: str, default: Array | None, facts: Facts | None = None) -> Value:
        """A graph input of the explained model; with a default it need not be fed.

        Args:
            name: its name; asked for twice it is the same input.
            default: its value where nothing is fed; None for an input that must be fed.
            facts: its type; default: that of the default value, every axis of free length.
        """
        if name not in self.parameters:
            if name in self._names:
                raise ModelError(
                    f"the model already has a tensor named '{name}', which the explanation needs as an input; rename it"
                )
            if facts is None:
                assert default is not None
                facts = Facts(default.dtype, tuple(f"{name}.{i}" for i in range(default.ndim)))
            self.parameters[name] = (self.declare(name, facts), default)
        return self.parameters[name][0]

    def array(self, value: Value | None) -> Array | None:
        """The elements of a constant, computed where they hide behind operators; None for anything else."""
        return self.constants.array(value)

    def ints(self, value: Value | None) -> list[int] | None:
        """The elements of an integer constant as Python ints; None where they are not known."""
        array = self.array(value)
        return None if array is None else [int(i) for i in array.reshape(-1)]

    # ---- operators ---------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Operand, shape: Shape | None = None, label: str = "", **attrs: Any) -> Value:
        """Emit an operator with one output.

        Args:
            kind: operator type of ai.onnx.
            inputs: values, or numbers and arrays, which take the element type of the first value.
            shape: the output's shape where it is known better than inference can tell.
            label: last part of the node's name; default: the operator.
            attrs: attributes.

        Raises:
            ModelError: ONNX's type inference rejects the node.
        """
        return self.ops(kind, *inputs, outputs=1, shape=shape, label=label, **attrs)[0]

    def ops(
        self, kind: str, *inputs: Operand, outputs: int, shape: Shape | None = None, label: str = "", **attrs: Any
    ) -> tuple[Value, ...]:
        """Emit an operator with several outputs (or one); like :meth:`op`."""
        values = self._operands(inputs)
        if kind == "Shape" and values[0] is not None and (lengths := static_lengths(values[0], attrs)) is not None:
            return (self.const(np.array(lengths, np.int64), name="shape"),)
        key = (
            kind,
            outputs,
            tuple(v.name if v else "" for v in values),
            tuple((k, hashable(attrs[k])) for k in sorted(attrs)),
        )
        stays = self._staying and not all(v is None or v.facts.const for v in values)
        for body in self._bodies[-1:] if stays else self._bodies:
            if key in body.memo:
                return body.memo[key]
        call, name = self._typed(kind, values, outputs, label, attrs)
        for v in call.outputs:
            if v is not None and shape is not None:
                v.facts = replace(v.facts, shape=shape)
        body = self._bodies[-1]
        if not stays:
            body = self._body_for(kind, values, all(v is None or v.facts.const for v in call.outputs))
        results = self._fold(call) or self._append(call, name, body)
        if kind not in RANDOM:
            body.memo[key] = results
        return results

    def repeated(
        self, kind: str, inputs: Sequence[Value | None], outputs: int, attrs: dict[str, Any]
    ) -> Sequence[Value]:
        """A node of the source once more, in the body that is being filled, though an equal one may exist elsewhere.

        So its outputs are its own: what is known of them holds there alone.
        """
        if kind not in RANDOM and all(v is None or v.facts.const for v in inputs):
            return self.ops(kind, *inputs, outputs=outputs, **attrs)
        return self._append(*self._typed(kind, inputs, outputs, "", attrs), self._bodies[-1])

    def _typed(
        self, kind: str, values: Sequence[Value | None], outputs: int, label: str, attrs: dict[str, Any]
    ) -> tuple[Call, str]:
        """A call that is not emitted yet, and the name of its node."""
        name = self._unique(f"lrp/{self._site}/{label or kind}")
        names = [name] if outputs == 1 else [self._unique(f"{name}:{i}") for i in range(outputs)]
        facts = self._infer(kind, values, names, attrs)
        made = tuple(Value(self, n, f) for n, f in zip(names, facts, strict=True))
        return Call(kind, tuple(values), made, attrs, self._site), name

    def _append(self, call: Call, name: str, body: Body) -> tuple[Value, ...]:
        """A node at the end of a body."""
        results = tuple(v for v in call.outputs if v is not None)
        for result in results:
            self.values[result.name] = result
            self.producers[result.name] = call
            self._home[result.name] = body
        read = call.inputs
        if call.op == "Conv" and body is not self._bodies[0]:
            read = (*read[:1], *(self._kernel(v, body) for v in read[1:]))
        body.calls[name] = replace(call, inputs=read)
        self.docs[name] = (self._doc, {"onnx_lrp.source": self._site, "onnx_lrp.rule": self._rule})
        return results

    def _operands(self, inputs: Sequence[Operand]) -> tuple[Value | None, ...]:
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        dtype = next((v.dtype for v in given if isinstance(v, Value)), np.dtype(np.float32))
        # Plain numbers and float arrays follow the tensor they meet; integer arrays (axes, shapes) keep their type.
        return tuple(
            v
            if v is None or isinstance(v, Value)
            else self.const(v)
            if isinstance(v, np.ndarray) and v.dtype.kind in "ib"
            else self.const(v, dtype)
            for v in given
        )

    def _infer(
        self, kind: str, values: Sequence[Value | None], names: Sequence[str], attrs: dict[str, Any]
    ) -> list[Facts]:
        known = {v.name: a for v in values if v and v.dtype.kind == "i" and (a := self.constants.short(v)) is not None}
        try:
            return infer(kind, values, names, attrs, self.opset, known)
        except Exception as error:
            raise rejected(kind, self._site, values, error) from None

    def _fold(self, call: Call) -> tuple[Value, ...] | None:
        """Evaluate small constant expressions now; large ones stay operators, so that no weight is ever copied."""
        arrays = self.constants.folded(call)
        return None if arrays is None else tuple(self.const(a) for a in arrays)

    def source_call(self, call: Call, names: Sequence[str], known: Sequence[Facts]) -> None:
        """Make the outputs of a source node known: what the model file says of them, and what inference adds.

        Args:
            call: the node, its outputs still empty.
            names: output names; "" for one that is absent.
            known: facts from the model, one per output.
        """
        plain = not call.domain and not any(isinstance(a, onnx.GraphProto) for a in call.attrs.values())
        try:
            inferred = (
                self._infer(call.op, call.inputs, [n or "_" for n in names], call.attrs) if plain else list(known)
            )
        except (ModelError, onnx.defs.SchemaError, KeyError):
            inferred = list(known)
        const = bool(call.inputs) and all(v is None or v.facts.const for v in call.inputs) and call.op not in RANDOM
        const = const and (plain or bool(call.domain))
        outputs: list[Value | None] = []
        for k, name in enumerate(names):
            if not name:
                outputs.append(None)
                continue
            facts = inferred[k] if k < len(inferred) else known[k]
            facts = replace(
                facts, shape=named(merge(facts.shape, known[k].shape), name), const=const, dtype=known[k].dtype
            )
            value = self.declare(name, facts)
            self.producers[name] = call
            outputs.append(value)
        call.outputs = tuple(outputs)

    def again(self, call: Call, changes: Mapping[int, Value | None]) -> Call:
        """The same operator on other inputs; unchanged inputs give back the call itself.

        Args:
            call: what to emit again.
            changes: new input per index.
        """
        size = max([len(call.inputs), *(i + 1 for i in changes)])
        inputs = tuple(changes.get(i, call.input(i)) for i in range(size))
        if inputs == call.inputs + (None,) * (size - len(call.inputs)):
            return call
        repeated = replace(call, inputs=inputs)
        if call.op in self.forwards:
            made = self.forwards[call.op](self, repeated)
            repeated.outputs = made if isinstance(made, tuple) else (made,)
        else:
            repeated.outputs = self.ops(
                call.op, *inputs, outputs=len(call.outputs), label=f"{call.op}_again", **call.attrs
            )
        return repeated

    # ---- bodies ------------------------------------------------------------------------------------------------

    @contextmanager
    def body(self, name: str, *, once: bool = True) -> Iterator[Body]:
        """A graph for a Loop, Scan or If: what is emitted inside the block goes there, and may read everything outside.

        Args:
            name: its name.
            once: emit before it what depends on nothing inside; False for a branch of an If.
        """
        made = Body(self, self._unique(f"lrp/{self._site}/{name}"), once)
        self._bodies.append(made)
        try:
            yield made
        finally:
            self._bodies.pop()

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Inside the block nothing but constants is emitted before the body, or found there: as the walk sees a body.

        So what is known of its tensors, and which calls make them, is a matter of that body alone.
        """
        saved, self._staying = self._staying, True
        try:
            yield
        finally:
            self._staying = saved

    @property
    def depth(self) -> int:
        """How many bodies are being filled, one in the other."""
        return len(self._bodies) - 1

    def control(
        self, kind: str, *inputs: Value | None, bodies: Mapping[str, Body], facts: Sequence[Facts], **attrs: Any
    ) -> tuple[Value, ...]:
        """Emit an If, Loop or Scan.

        Args:
            kind: operator type.
            inputs: its inputs.
            bodies: its filled bodies by the names of their attributes.
            facts: what is known of its outputs.
            attrs: its other attributes.
        """
        name = self._unique(f"lrp/{self._site}/{kind}")
        for body in bodies.values():
            body.prune()
        outputs = tuple(Value(self, self._unique(f"{name}:{i}"), f) for i, f in enumerate(facts))
        call = Call(kind, inputs, outputs, {**attrs, **bodies}, self._site)
        return self._append(call, name, self._body_of(call))

    def _body_of(self, call: Call) -> Body:
        """Where a node with bodies belongs: as far out as what it and they read allows."""
        inside = (c.op for a in call.attrs.values() if isinstance(a, Body) for c in calls_in(a))
        if self._staying or not RANDOM.isdisjoint(inside):
            return self._bodies[-1]
        read = [self.values[n] for n in read_by(call) if self._home.get(n, self._bodies[0]) in self._bodies]
        return self._body_for(call.op, read, const=False)

    def local(self, name: str, facts: Facts, body: Body) -> Value:
        """A tensor that lives in a body, as one of its inputs."""
        value = self.declare(self._unique(name), facts)
        self._home[value.name] = body
        return value

    def lives_in(self, value: Value, body: Body) -> bool:
        """Whether a tensor is an input of a body, or made there."""
        return self._home.get(value.name) is body

    def copied(self, value: Value, body: Body) -> Value:
        """A tensor by a name of its own, to be an output of a body."""
        if self._home.get(value.name) is body and value not in (*body.inputs, *body.outputs):
            return value
        name = self._unique(f"{body.name}/output")
        result = Value(self, name, replace(value.facts, const=False))
        self._append(Call("Identity", (value,), (result,), {}, self._site), name, body)
        return result

    def _kernel(self, value: Value | None, body: Body) -> Value | None:
        """Weights of a convolution as a constant of its body, by a Reshape that changes nothing and is folded at load.

        ONNX Runtime's blocked layout takes constants of the convolution's own graph only.
        """
        if value is None or not value.facts.const or not value.static or self._home.get(value.name) is body:
            return value
        key = ("kernel", value.name)
        if key not in body.memo:
            name = self._unique(f"{body.name}/kernel")
            shape = self.const(np.array(value.shape, np.int64), name="shape")
            result = Value(self, name, value.facts)
            body.memo[key] = self._append(Call("Reshape", (value, shape), (result,), {}, self._site), name, body)
        return body.memo[key][0]

    def _body_for(self, kind: str, values: Iterable[Value | None], const: bool) -> Body:
        """Where an operator belongs: as far out as what it reads allows."""
        if kind in RANDOM:
            return self._bodies[-1]
        outer = self._bodies[0]
        depth = max((self._bodies.index(self._home.get(v.name, outer)) for v in values if v is not None), default=0)
        for body in self._bodies[:depth:-1]:
            if not (body.once or const):
                return body
        return self._bodies[depth]

    # ---- names and bookkeeping -----------------------------------------------------------------------------------

    @contextmanager
    def scope(self, site: str, rule: str = "", doc: str = "") -> Iterator[None]:
        """Name, rule and doc string for what is emitted inside."""
        saved = self._site, self._rule, self._doc
        self._site, self._rule, self._doc = site, rule, doc
        try:
            yield
        finally:
            self._site, self._rule, self._doc = saved

    def rename(self, value: Value, name: str) -> Value:
        """A tensor of the given name with the value's content, to be a graph output."""
        if name in self._names:
            raise ModelError(f"the model already has a tensor named '{name}'; rename it before rewriting")
        self._names.add(name)
        result = self.declare(name, value.facts)
        node = self._unique(f"lrp/{name}")
        self._bodies[0].calls[node] = Call("Identity", (value,), (result,), {}, self._site)
        self.docs[node] = (f"output {name}", {"onnx_lrp.source": self._site, "onnx_lrp.rule": self._rule})
        return result

    def _unique(self, name: str) -> str:
        candidate, number = name, self._numbered.get(name, 1)
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._numbered[name] = number
        self._names.add(candidate)
        return candidate

    def _tensor(self, value: Value | None, body: Body) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        if body is not self._bodies[0] and isinstance(self._tensors.get(value.name), gs.Constant):
            return self._captured.setdefault(value.name, gs.Variable(value.name))  # it lives in the model's own graph
        if value.name not in self._tensors:
            self._tensors[value.name] = gs.Variable(value.name)
        return self._tensors[value.name]

    def _nodes(self, calls: Mapping[str, Call], body: Body) -> list[gs.Node]:
        """Calls of a body as onnx-graphsurgeon has them: tensors among their attributes are its Constants."""
        nodes = []
        for name, call in calls.items():
            attrs = {
                k: self._graph(a)
                if isinstance(a, Body)
                else gs.Constant(f"{name}:{k}", a)
                if isinstance(a, np.ndarray)
                else a
                for k, a in call.attrs.items()
            }
            inputs, outputs = ([self._tensor(v, body) for v in values] for values in (call.inputs, call.outputs))
            nodes.append(gs.Node(call.op, name, attrs, inputs, outputs))
        return nodes

    def _graph(self, body: Body) -> gs.Graph:
        """A filled body."""
        for v in (*body.inputs, *body.outputs):
            tensor = self._tensor(v, body)
            tensor.dtype, tensor.shape = v.dtype, None if v.facts.shape is None else list(v.facts.shape)
        inputs, outputs = ([self._tensor(v, body) for v in values] for values in (body.inputs, body.outputs))
        return gs.Graph(self._nodes(body.calls, body), inputs, outputs, name=body.name, opset=self.opset)

    def export(self, outputs: Sequence[Value]) -> onnx.GraphProto:
        """What was emitted and is needed for the outputs, as a GraphProto.

        Dead nodes go out; docs and metadata, which onnx-graphsurgeon does not carry, go in.
        """
        needed, wanted = alive(self._bodies[0].calls, {v.name for v in outputs})
        pruned = gs.Graph(self._nodes(needed, self._bodies[0]), opset=self.opset)
        proto: onnx.GraphProto = gs.export_onnx(pruned, do_type_check=False).graph
        document(proto, self.docs)
        missing = wanted - {t.name for t in proto.initializer}
        read_inside = (t for n, t in self._tensors.items() if isinstance(t, gs.Constant) and n in missing)
        proto.initializer.extend(onnx.numpy_helper.from_array(np.asarray(t.values), t.name) for t in read_inside)
        proto.output.extend(onnx.helper.make_value_info(v.name, type_proto(v.facts)) for v in outputs)
        for name, (value, default) in self.parameters.items():
            if name in wanted:
                proto.input.append(onnx.helper.make_value_info(name, type_proto(value.facts)))
                if default is not None:
                    proto.initializer.append(onnx.numpy_helper.from_array(default, name))
        return proto
