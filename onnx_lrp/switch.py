"""The explanation behind an If, so that a client that wants the prediction alone does not pay for it.

ONNX Runtime runs every node of a graph, whichever outputs are fetched (its inference builds ignore
``only_execute_path_to_fetches``). An If on a graph input is the one construction that skips work. The whole model goes
into both branches, for a forward pass whose inner tensors are read from outside could no longer be fused: measured on
ResNet-50, the else-branch then costs what the source model costs, and the then-branch what the plain explained model
costs. Weights stay outside, once.

ONNX Runtime's blocked layout takes convolution weights that are constants of their own graph only, not of an outer one.
A Reshape to the same shape inside the branch, which it folds at load, makes them so (without it: 1.3 times the
forward).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

EXPLAIN = "explain"


def behind_switch(
    model: onnx.ModelProto, source_nodes: int, source_outputs: Sequence[str], weights: Mapping[str, Sequence[int]]
) -> None:
    """Move a model's nodes into the branches of an If on the bool graph input ``explain`` (default true), in place.

    Args:
        model: source and explanation in one graph, the source's nodes first.
        source_nodes: how many nodes are the source's.
        source_outputs: the source's outputs; with ``explain`` false all others are empty tensors.
        weights: shapes of the source's large constants.
    """
    graph = model.graph
    then = _branch("explanation", "runs when explain is true", graph, len(graph.node), [o.name for o in graph.output])
    otherwise = _branch("prediction", "runs when explain is false", graph, source_nodes, source_outputs)
    for output in graph.output:
        if output.name in source_outputs:
            continue
        kind, rank = output.type.tensor_type.elem_type, len(output.type.tensor_type.shape.dim)
        empty = onnx.helper.make_tensor(f"nothing/{output.name}", kind, [0] * rank, [])
        otherwise.node.append(onnx.helper.make_node("Constant", [], [empty.name], value=empty))
        otherwise.output.append(onnx.helper.make_tensor_value_info(empty.name, kind, [0] * rank))
        for i, dim in enumerate(output.type.tensor_type.shape.dim):  # of either length: no axis can be promised
            dim.Clear()
            dim.dim_param = f"{output.name}.{i}"
    for branch in (then, otherwise):
        _own_kernels(graph, branch, weights)
    names = [o.name for o in graph.output]
    node = onnx.helper.make_node("If", [EXPLAIN], names, name="lrp/switch", then_branch=then, else_branch=otherwise)
    node.doc_string = "prediction and explanation, or the prediction alone"
    del graph.node[:]
    graph.node.append(node)
    del graph.value_info[:]  # what they describe lives in the branches now
    graph.input.append(onnx.helper.make_tensor_value_info(EXPLAIN, onnx.TensorProto.BOOL, []))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), EXPLAIN))


def _branch(name: str, doc: str, graph: onnx.GraphProto, count: int, outputs: Sequence[str]) -> onnx.GraphProto:
    """The first nodes of a graph as a branch that yields some of its outputs."""
    branch = onnx.GraphProto(name=name, doc_string=doc)
    branch.node.extend(list(graph.node)[:count])
    inner = {o.name: f"{name}/{o.name}" for o in graph.output}
    _rename(branch.node, inner)
    made = {o for node in branch.node for o in node.output}
    for output in graph.output:
        if output.name not in outputs:
            continue
        if inner[output.name] not in made:  # an output that is an input or a constant
            branch.node.append(onnx.helper.make_node("Identity", [output.name], [inner[output.name]]))
        info = branch.output.add()
        info.CopyFrom(output)
        info.name = inner[output.name]
    return branch


def _own_kernels(graph: onnx.GraphProto, branch: onnx.GraphProto, weights: Mapping[str, Sequence[int]]) -> None:
    """Make weights and biases of convolutions constants of the branch, by a Reshape that changes nothing."""
    fed = {i.name for i in graph.input} - weights.keys()
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if t.name not in fed} | dict(weights)
    copies: dict[str, onnx.NodeProto] = {}
    for node in branch.node:
        for k, name in enumerate(node.input):
            if node.op_type != "Conv" or k == 0 or name not in shapes:
                continue
            if name not in copies:
                shape = f"shape/{name}"
                if shape not in shapes:
                    array = np.array(shapes[name], np.int64)
                    graph.initializer.append(onnx.numpy_helper.from_array(array, shape))
                    shapes[shape] = array.shape
                copies[name] = onnx.helper.make_node("Reshape", [name, shape], [f"{branch.name}/{name}"])
            node.input[k] = f"{branch.name}/{name}"
    nodes = [*copies.values(), *branch.node]
    del branch.node[:]
    branch.node.extend(nodes)


def _rename(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Rename tensors that these nodes make, there and wherever they are read, subgraphs included."""
    made = {o for node in nodes for o in node.output}
    _apply(nodes, {old: new for old, new in names.items() if old in made})


def _apply(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for tensors in (node.input, node.output):
            for k, tensor in enumerate(tensors):
                tensors[k] = names.get(tensor, tensor)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _apply(graph.node, names)
                for output in graph.output:
                    output.name = names.get(output.name, output.name)
