"""How the walk sees a model: calls in topological order, and what carries influence between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnx_lrp.adjoints import OPERATORS, Operator
from onnx_lrp.bodies import in_known_operators
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.facts import Facts, Shape, sign_of_array
from onnx_lrp.model import Source, array_of, attributes_of, inferred_graph

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


def mark_active(v: View, wanted: Collection[Value], *explained: Value) -> list[Call]:
    """Mark what carries influence from the wanted values to the explained ones; the calls between them, in order."""
    for value in v.e.values.values():
        if value.facts.active:
            value.facts = replace(value.facts, active=False)
    reached = set(wanted)
    forward = []
    for call in v.calls:
        operator = OPERATORS.get(call.op) if not call.domain else None
        if operator is not None and operator.verb == "barrier":
            continue
        if any(x in reached for x in call.inputs):
            outputs = [o for o in call.outputs if o is not None and (o.dtype.kind == "f" or _hidden(call, operator, o))]
            reached.update(outputs)
            if outputs:
                forward.append(call)
    needed = set(explained)
    chain = []
    for call in reversed(forward):
        if any(o in needed for o in call.outputs):
            chain.append(call)
            needed.update(x for x in call.inputs if x in reached)
    for value in needed & reached:
        value.facts = replace(value.facts, active=True)
    return chain[::-1]


def _hidden(call: Call, operator: Operator | None, output: Value) -> bool:
    """Whether an integer tensor may carry influence after all: a quantised one, of an operator nobody sees through.

    Such an operator has to be found on the way, so that it is refused.
    """
    small = output.dtype.kind in "iu" and output.dtype.itemsize <= 2
    return call.refused is not None or (operator is None and small)


# ---- reading ---------------------------------------------------------------------------------------------------


def read_view(source: Source, portable: bool) -> View:
    """The view of a model before any pass: one call per node, constants declared."""
    graph = inferred_graph(source)
    reserved = (
        [n.name for n in graph.node] + [o for n in graph.node for o in n.output if o] + [i.name for i in graph.input]
    )
    reserved += [t.name for t in graph.initializer]
    e = Emitter(source.opset, reserved, portable=portable)
    e.forwards = {name: operator.forward for name, operator in OPERATORS.items() if operator.forward}
    inputs: dict[str, Value] = {}
    for tensor in source.weights.values():
        _declare_constant(e, tensor)
    for tensor in graph.initializer:
        if tensor.name in source.defaults:
            e.declare(tensor.name, Facts(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)))
        else:
            _declare_constant(e, tensor)
    for info in graph.input:
        if info.name in source.weights or info.name in source.defaults:
            continue
        inputs[info.name] = e.declare(info.name, _facts(info, name_axes=True))
    known = {info.name: _facts(info) for info in (*graph.value_info, *graph.output)}
    calls = []
    for node in graph.node:
        call = _call(e, node)
        if call.op == "Constant" and not call.domain:
            _declare_literal(e, node)
            continue
        nothing = Facts(np.dtype(np.float32), None)
        e.source_call(call, node.output, [known.get(n, nothing) for n in node.output])
        calls.extend(in_known_operators(e, call))
    return View(e, calls, inputs, [o.name for o in graph.output])


def _call(e: Emitter, node: onnx.NodeProto) -> Call:
    inputs = tuple(e.values.get(name) if name else None for name in node.input)
    return Call(
        node.op_type, inputs, (), attributes_of(node), node.name, "" if node.domain == "ai.onnx" else node.domain
    )


def _declare_constant(e: Emitter, tensor: onnx.TensorProto) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    value = e.declare(tensor.name, Facts(dtype, tuple(tensor.dims), const=True))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    e.lazy[tensor.name] = lambda: array_of(tensor)
    if math.prod(tensor.dims) <= 65536:
        array = e.array(value)
        assert array is not None
        value.facts = replace(value.facts, sign=sign_of_array(array))


def _declare_literal(e: Emitter, node: onnx.NodeProto) -> None:
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        array = array_of(value)
    else:
        array = np.array(value, dtype={"f": np.float32, "i": np.int64}.get(attribute.name[6:7]))
    e.declare(node.output[0], Facts(array.dtype, array.shape, const=True, sign=sign_of_array(array)), array)


def _facts(info: onnx.ValueInfoProto, name_axes: bool = False) -> Facts:
    tensor = info.type.tensor_type
    shape: Shape | None = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or (f"{info.name}.{i}" if name_axes else None)
            for i, d in enumerate(tensor.shape.dim)
        )
    return Facts(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or 1), shape)
