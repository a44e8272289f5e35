"""Operators without an adjoint of their own, seen through a function body: the one in ONNX's schema, or one of ours.

The source keeps its fused node. Only the view changes: the body is emitted beside it, where the walk needs its inner
tensors, and its last outputs are the source's own.
"""

from __future__ import annotations

from dataclasses import replace

import onnx
from onnx import inliner

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import QUANTIZED
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError
from onnx_lrp.inference import named
from onnx_lrp.model import attributes_of
from onnx_lrp.own_bodies import OWN_BODIES


def has_body(op: str, opset: int) -> bool:
    """True if ONNX defines the operator as a function of others."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def in_known_operators(e: Emitter, call: Call) -> list[Call]:
    """A call itself where the registry knows its operator (or nobody can help), else the calls of its body."""
    if call.domain or call.op in OPERATORS or call.op in QUANTIZED:
        return [call]
    if call.op not in OWN_BODIES and not has_body(call.op, e.opset):
        return [call]
    body = spelled_out(e, call) if call.op in OWN_BODIES else expand(e, call)
    return [call] if body is None else [inner for part in body for inner in in_known_operators(e, part)]


def spelled_out(e: Emitter, call: Call) -> list[Call]:
    """The calls of a body of ours, its result being what the source's node makes."""
    before = len(e.producers)
    with e.scope(call.site, doc=f"body of {call.op} {call.site}"):
        result = OWN_BODIES[call.op](e, call)
    last = e.producers[result.name]
    # What another body has emitted already is seen there.
    calls = [maker for maker in dict.fromkeys(list(e.producers.values())[before:]) if maker is not last]
    for part in calls:
        _name_axes(part)
    calls.append(replace(last, outputs=call.outputs))
    for part in calls:
        part.note = f"body of {call.op}"
    return calls


def _name_axes(call: Call) -> None:
    """A symbol for every axis of unknown length: two of them are not known to be equal."""
    for value in call.outputs:
        if value is not None:
            value.facts = replace(value.facts, shape=named(value.facts.shape, value.name))


def expand(e: Emitter, call: Call) -> list[Call] | None:
    """The calls that a source node stands for; None where its body does not help (control flow, unknown types)."""
    if any(v is not None and v.facts.shape is None for v in (*call.inputs, *call.outputs)):
        return None
    graph = _inlined(e, call)
    if graph is None or any(a.HasField("g") for n in graph.node for a in n.attribute):
        return None
    known: dict[str, Value | None] = {"": None}
    known |= {f"i{k}": v for k, v in enumerate(call.inputs)}
    own = {f"o{k}": v for k, v in enumerate(call.outputs) if v is not None}
    calls: list[Call] = []
    before = set(e.producers)  # what another body has emitted already is seen there
    with e.scope(call.site, doc=f"body of {call.op} {call.site}"):
        for node in graph.node:
            inputs = tuple(known[name] for name in node.input)
            attrs = attributes_of(node)
            if node.op_type == "Constant":
                known[node.output[0]] = e.const(next(iter(attrs.values())))
                continue
            if any(name in own for name in node.output):
                # The end of the body: its result is what the source's node makes.
                outputs = tuple(own.get(name) for name in node.output)
                calls.append(Call(node.op_type, inputs, outputs, attrs, call.site, note=f"body of {call.op}"))
            else:
                try:
                    made = e.ops(node.op_type, *inputs, outputs=len(node.output), **attrs)
                except (ModelError, onnx.defs.SchemaError):
                    return None
                maker = e.producers.get(made[0].name)
                if maker is not None and made[0].name not in before and all(maker is not c for c in calls):
                    maker.note = f"body of {call.op}"
                    _name_axes(maker)
                    calls.append(maker)
                outputs = made
            known |= dict(zip(node.output, outputs, strict=True))
    return calls


def _inlined(e: Emitter, call: Call) -> onnx.GraphProto | None:
    """A model of the one node with its body in its place."""
    plain = {k: onnx.numpy_helper.from_array(v) if hasattr(v, "dtype") else v for k, v in call.attrs.items()}
    names = [f"i{k}" if v is not None else "" for k, v in enumerate(call.inputs)]
    results = [f"o{k}" if v is not None else "" for k, v in enumerate(call.outputs)]
    node = onnx.helper.make_node(call.op, names, results, **plain)

    def infos(prefix: str, values: tuple[Value | None, ...]) -> list[onnx.ValueInfoProto]:
        return [
            onnx.helper.make_tensor_value_info(
                f"{prefix}{k}", onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.facts.shape
            )
            for k, v in enumerate(values)
            if v is not None
        ]

    graph = onnx.helper.make_graph([node], "one", infos("i", call.inputs), infos("o", call.outputs))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", e.opset)], ir_version=10)
    schema = onnx.defs.get_schema(call.op, e.opset, "")
    try:
        if None in call.inputs and schema.has_context_dependent_function:  # type: ignore[attr-defined]
            _give_local_function(model, schema, e.opset)
            inlined = inliner.inline_local_functions(model)
        else:
            inlined = inliner.inline_selected_functions(model, [("", call.op)], inline_schema_functions=True)
    except Exception:  # the inliner raises untyped errors for what it cannot specialise: then there is no body to see
        return None
    found: onnx.GraphProto = inlined.graph
    return None if any(n.op_type == call.op for n in found.node) else found


def _give_local_function(model: onnx.ModelProto, schema: onnx.defs.OpSchema, opset: int) -> None:
    """Make the body that a schema builds for this very node a local function of the model, and the node its call.

    The inliner asks the schema itself, but knows no type for an input that is absent.
    """
    node = model.graph.node[0]
    types = {info.name: info.type for info in model.graph.input}
    given = [types.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]  # type: ignore[attr-defined]
    body = schema.get_context_dependent_function_with_opset_version(  # type: ignore[attr-defined]
        max(versions), node.SerializeToString(), given
    )
    function = onnx.FunctionProto.FromString(body)
    function.domain = node.domain = "body"
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("body", 1))
