"""To one graph at the working opset: local functions inlined, operators brought up, every node with a name."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping

import onnx
from onnx import inliner, shape_inference, version_converter

from onnx_lrp.errors import ModelError, one_line

WORKING_OPSET = 18  # the lowest that all emitted forms are written for; sources below are converted by ONNX's converter

_MADE = re.compile(r"_v_\d+")  # what ONNX's converter calls the tensors that it adds


def opset_of(proto: onnx.ModelProto | onnx.FunctionProto) -> int:
    """Version of the ai.onnx domain that a model or a function imports."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def graphs_in(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    """The graphs that a node holds (branches of an If, body of a Loop or Scan), by attribute."""
    found = {a.name: a.g for a in node.attribute if a.HasField("g")}
    return found | {f"{a.name}/{i}": g for a in node.attribute for i, g in enumerate(a.graphs)}


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in graphs_in(node).values():
            yield from all_graphs(inner)


def inlined(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A model with the bodies of its local functions in the place of their calls.

    Comes before the conversion of opsets, in which ONNX's converter drops the functions.

    Raises:
        ModelError: a function's opset is newer than the model's, or the inliner fails otherwise.
    """
    if not model.functions:
        return model
    mixed = any(opset_of(f) not in (0, opset_of(model)) for f in model.functions)
    try:
        # To lift a function of an older opset, the inliner has to know the types at its call.
        typed = shape_inference.infer_shapes(model) if mixed else model
        return inliner.inline_local_functions(typed, convert_version=mixed)
    except Exception as error:  # the inliner raises whatever it meets
        raise ModelError(
            f"{name}: its local functions cannot be inlined ({one_line(error)}); "
            "export model and functions at one opset"
        ) from None


def to_working_opset(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Bring a model below the working opset up to it, in all its graphs; above it stays as it is.

    Raises:
        ModelError: ONNX's converter does not know how.
    """
    version = opset_of(model)
    if version < WORKING_OPSET:
        source = onnx.ModelProto()
        source.CopyFrom(model)
        # The converter numbers what it adds graph by graph, blind to the graphs around and inside. So names that look
        # like its own (of an earlier conversion) step aside, and what it adds is numbered again over the whole model.
        own = {n: f"kept/{n}" for g in all_graphs(source.graph) for n in _names(g) if _MADE.fullmatch(n)}
        _rename(source.graph, own)
        try:
            converted = version_converter.convert_version(source, WORKING_OPSET)
        except Exception as error:  # the converter raises whatever its adapters raise
            raise ModelError(
                f"{name}: ONNX's converter cannot bring opset {version} to {WORKING_OPSET} ({one_line(error)}); "
                f"export with opset_version={WORKING_OPSET} or higher"
            ) from None
        _number(converted.graph, {}, set(own))
        _rename(converted.graph, {new: old for old, new in own.items()})
        for field in ("doc_string", "producer_name", "producer_version", "domain", "model_version"):
            setattr(converted, field, getattr(model, field))
        if not converted.metadata_props:
            converted.metadata_props.extend(model.metadata_props)
        for opset in model.opset_import:
            if opset.domain not in {o.domain for o in converted.opset_import} | {"", "ai.onnx"}:
                converted.opset_import.append(opset)
        _restore_docs(model.graph, converted.graph)
        model = converted
    # IR 8 is what opset 18 belongs to. Anything newer stays: onnx's own default would not load in ONNX Runtime.
    model.ir_version = max(model.ir_version, 8)
    return model


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, so that messages and rule books can speak of it.

    Unique over all graphs of the model; a name that is met again gets a number.
    """
    nodes = [node for g in all_graphs(graph) for node in g.node]
    taken, used = {node.name for node in nodes}, {""}
    for node in nodes:
        stem, number = node.name or node.op_type, 0
        while node.name in used:
            candidate = f"{stem}_{number}"
            number += 1
            if candidate not in taken and candidate not in used:
                node.name = candidate
        used.add(node.name)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the tensors that a graph itself makes or declares."""
    yield from (i.name for i in graph.input)
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    yield from (o for n in graph.node for o in n.output)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors in a graph and in the graphs inside it."""
    if names:
        for inner in all_graphs(graph):
            _rename_here(inner, names)


def _rename_here(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.name = names.get(item.name, item.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(n, n) for n in field]


def _number(graph: onnx.GraphProto, around: MutableMapping[str, str], taken: set[str]) -> None:
    """Number the tensors that the converter added, each graph's own on top of those it sees around it."""
    made: dict[str, str] = {}
    for name in _names(graph):
        if _MADE.fullmatch(name):
            number = len(taken)
            while f"_v_{number}" in taken:
                number += 1
            made[name] = f"_v_{number}"
            taken.add(made[name])
    seen = ChainMap(made, around)
    _rename_here(graph, seen)
    for node in graph.node:
        for inner in graphs_in(node).values():
            _number(inner, seen, taken)


def _restore_docs(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """The converter drops what it does not need: put node names, docs and metadata back, found by output name."""
    after.doc_string = before.doc_string
    known = {n.output[0]: n for n in before.node if n.output}
    for node in after.node:
        source = known.get(node.output[0]) if node.output else None
        if source is not None:
            node.name = node.name or source.name
            node.doc_string = source.doc_string
            if not node.metadata_props:
                node.metadata_props.extend(source.metadata_props)
            inner = graphs_in(source)
            for key, graph in graphs_in(node).items():
                if key in inner:
                    _restore_docs(inner[key], graph)
