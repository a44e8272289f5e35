"""How the walk sees a model: calls in topological order, and what carries influence between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnx_lrp.adjoints import OPERATORS, Operator
from onnx_lrp.bodies import in_known_operators
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.facts import Facts, Shape, sign_of_array
from onnx_lrp.inference import merge, named
from onnx_lrp.model import Source, array_of, inferred_graph
from onnx_lrp.subgraphs import (
    BODIES,
    again,
    is_control,
    known_lengths,
    literal,
    read_node,
    see_branch,
    state_facts,
    taken_branch,
)

# Layers whose weights a rule modifies, and which rule books count as layers.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass
class View:
    """A model as the walk sees it.

    Attributes:
        e: the emitter; all tensors of the source are declared in it.
        calls: operator applications in topological order.
        inputs: values of the graph inputs that have to be fed.
        outputs: names of the graph outputs.
        alias: which value a tensor name stands for, where it is not its own.
        kept: tensors that no pass may hide, because relevance at them is asked for.
    """

    e: Emitter
    calls: list[Call]
    inputs: dict[str, Value]
    outputs: list[str]
    alias: dict[str, Value] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    def value(self, name: str) -> Value:
        """The value that stands for a tensor of the source."""
        if name in self.alias:
            return self.alias[name]
        if name not in self.e.values:
            raise InputError(
                f"the model has no tensor named '{name}'; names are listed by onnx-lrp check, or shown in Netron"
            )
        return self.e.values[name]

    def name_of(self, value: Value) -> str:
        """The name by which the source knows a value, though it may be a copy that was emitted."""
        if value.name not in self.e.docs:
            return value.name
        return next((name for name, other in self.alias.items() if other is value), value.name)

    def producers(self) -> dict[Value, Call]:
        """Which call makes a value."""
        return {v: call for call in self.calls for v in call.outputs if v is not None}

    def rewire(self, replaced: Mapping[Value, Value]) -> None:
        """Let every call and alias read the replacement of a value."""
        if not replaced:
            return
        for call in self.calls:
            call.inputs = tuple(replaced.get(x, x) if x is not None else None for x in call.inputs)
        self.alias = {name: replaced.get(x, x) for name, x in self.alias.items()}
        for old, new in replaced.items():
            self.alias[old.name] = new

    def uses(self) -> Counter[Value]:
        """How many calls read a value; kept tensors and graph outputs count as read once more."""
        counts = Counter(v for call in self.calls for v in call.inputs if v is not None)
        for name in (*self.outputs, *self.kept):
            if name in self.e.values or name in self.alias:
                counts[self.value(name)] += 1
        return counts


def complemented(call: Call) -> Value | None:
    """X if a call computes 1 - x, or another constant minus x: the complement of a gate is a gate."""
    plain = call.op == "Sub" and not call.domain and call.given(0).facts.const and not call.given(1).facts.const
    return call.given(1) if plain else None


def carried(call: Call) -> Value | None:
    """The tensor of which a call only moves, masks, scales or complements the elements; None if it does more."""
    known = None if call.domain else OPERATORS.get(call.op)
    if known is None:
        return None
    if call.op in ("Where", "Mul"):
        first = 1 if call.op == "Where" else 0
        live = [x for x in call.inputs[first:] if x is not None and not x.facts.const]
        return live[0] if len(live) == 1 else None
    return call.given(0) if known.moves or call.op in ("Cast", "Neg") else complemented(call)


def mark_active(v: View, wanted: Collection[Value], *explained: Value) -> list[Call]:
    """Mark what carries influence from the wanted values to the explained ones; the calls between them, in order."""
    for value in v.e.values.values():
        if value.facts.active:
            value.facts = replace(value.facts, active=False)
    return activate(v.calls, wanted, explained)


def activate(calls: Sequence[Call], wanted: Collection[Value], ends: Collection[Value]) -> list[Call]:
    """Mark what carries influence from the wanted values to the ends, and leave other marks; the calls between them."""
    reached, forward = reach(calls, wanted)
    needed, chain = lead(forward, reached, ends)
    for value in needed & reached:
        value.facts = replace(value.facts, active=True)
    return chain


def reach(calls: Sequence[Call], wanted: Collection[Value]) -> tuple[set[Value], list[Call]]:
    """What the wanted values have influence on, and the calls that it goes through."""
    reached = set(wanted)
    forward = []
    for call in calls:
        operator = OPERATORS.get(call.op) if not call.domain else None
        if operator is not None and operator.verb == "barrier":
            continue
        if any(x in reached for x in call.inputs):
            outputs = [o for o in call.outputs if o is not None and (o.dtype.kind == "f" or _hidden(call, operator, o))]
            reached.update(outputs)
            if outputs:
                forward.append(call)
    return reached, forward


def lead(forward: Sequence[Call], reached: Collection[Value], ends: Collection[Value]) -> tuple[set[Value], list[Call]]:
    """Which of the values reached lead to the ends (and these themselves), and the calls that they go through."""
    needed = set(ends)
    chain = []
    for call in reversed(forward):
        if any(o in needed for o in call.outputs):
            chain.append(call)
            needed.update(x for x in call.inputs if x is not None and x in reached)
    return needed, chain[::-1]


def _hidden(call: Call, operator: Operator | None, output: Value) -> bool:
    """Whether an integer tensor may carry influence after all: a quantised one, of an operator nobody sees through.

    Such an operator has to be found on the way, so that it is refused.
    """
    small = output.dtype.kind in "iu" and output.dtype.itemsize <= 2
    return call.refused is not None or (operator is None and small)


# ---- reading ---------------------------------------------------------------------------------------------------


def read_view(source: Source, portable: bool, kept: Collection[str] = ()) -> View:
    """The view of a model before any pass: one call per node, constants declared.

    A float input of fixed shape that has a default is a weight that can be fed: for rules and passes a constant, but
    one of unknown elements, so that nothing is folded from its default. Not so where relevance at it is asked for.
    """
    graph = inferred_graph(source)
    e = Emitter(source.opset, list(_names(graph)), portable=portable)
    e.forwards = {name: operator.forward for name, operator in OPERATORS.items() if operator.forward}
    e.forwards |= dict.fromkeys(BODIES, again)
    inputs: dict[str, Value] = {}
    for tensor in (*source.weights.values(), *graph.initializer):
        if tensor.name not in source.defaults:
            _declare_constant(e, tensor)
    for info in graph.input:
        facts = _facts(info, name_axes=True)
        if info.name in source.defaults:
            weight = facts.dtype.kind == "f" and _fixed(facts.shape) and info.name not in kept
            e.declare(info.name, replace(facts, const=weight))
        elif info.name not in source.constants:
            inputs[info.name] = e.declare(info.name, facts)
    known = {info.name: _facts(info) for info in (*graph.value_info, *graph.output)}
    calls = []
    for node in graph.node:
        call = read_node(node, e.values, node.name)
        if call.op == "Constant" and not call.domain:
            array = literal(node)
            e.declare(node.output[0], Facts(array.dtype, array.shape, const=True, sign=sign_of_array(array)), array)
            continue
        nothing = Facts(np.dtype(np.float32), None)
        e.source_call(call, node.output, [known.get(n, nothing) for n in node.output])
        lengths = known_lengths(e, call)
        if lengths is not None:
            call.output.facts = replace(call.output.facts, const=True)
            e.constants.give(call.output.name, np.asarray(lengths))
        _note_states(e, call)
        branch = taken_branch(e, call)
        calls.extend(in_known_operators(e, call) if branch is None else _branch_taken(e, call, branch))
    return View(e, calls, inputs, [o.name for o in graph.output])


def _note_states(e: Emitter, call: Call) -> None:
    """Shapes of a Loop's final states, of which ONNX's inference says nothing at all."""
    if not is_control(call) or call.op != "Loop" or all(y is None or y.facts.shape is not None for y in call.outputs):
        return
    try:
        facts = state_facts(e, call)
    except ModelError:  # what cannot be emitted again cannot be explained either; then that is said where it matters
        return
    for y, known in zip(call.outputs, facts, strict=False):
        if y is not None and y.facts.shape is None:
            y.facts = replace(y.facts, shape=named(known.shape, y.name))


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """All names in a graph, those inside bodies among them."""
    yield from (i.name for i in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from (node.name, *filter(None, node.output))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _names(attribute.g)


def _branch_taken(e: Emitter, call: Call, branch: str) -> list[Call]:
    """An If whose condition is known: the calls of that branch, whose results are what the If makes."""
    calls, results = see_branch(e, call, branch)
    for own, result in zip(call.outputs, results, strict=True):
        if own is None:
            continue
        own.facts = replace(result.facts, dtype=own.dtype, shape=merge(result.facts.shape, own.facts.shape))
        kind = int(onnx.helper.np_dtype_to_tensor_dtype(own.dtype))
        op, attrs = ("Identity", {}) if own.dtype == result.dtype else ("Cast", {"to": kind})
        end = Call(op, (result,), (own,), attrs, call.site, note=f"{branch} of {call.op}, whose condition is known")
        e.producers[own.name] = end
        calls.append(end)
    return calls


def _fixed(shape: Shape | None) -> bool:
    return shape is not None and all(isinstance(d, int) for d in shape)


def _declare_constant(e: Emitter, tensor: onnx.TensorProto) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    value = e.declare(tensor.name, Facts(dtype, tuple(tensor.dims), const=True))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    e.constants.promise(tensor.name, lambda: array_of(tensor))
    if math.prod(tensor.dims) <= 65536:
        array = e.array(value)
        assert array is not None
        value.facts = replace(value.facts, sign=sign_of_array(array))


def _facts(info: onnx.ValueInfoProto, name_axes: bool = False) -> Facts:
    tensor = info.type.tensor_type
    shape: Shape | None = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or (f"{info.name}.{i}" if name_axes else None)
            for i, d in enumerate(tensor.shape.dim)
        )
    return Facts(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or 1), shape)
