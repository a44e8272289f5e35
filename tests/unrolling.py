"""A model without its control flow: the branches that certain inputs take, and the steps that they run, written out.

The result has plain operators only, and computes for these inputs what the model computes. It knows nothing of how the
library goes through If, Loop and Scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lrp.reference import run_double

Array = np.ndarray


def unrolled(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> onnx.ModelProto:
    """The model as it runs on these inputs."""
    writer = _Writer(proto, feeds)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    own = {name: name for name in writer.known}
    results = writer.write(proto.graph.node, own, "")
    for output in proto.graph.output:
        if results[output.name] != output.name:
            writer.node("Identity", [results[output.name]], [output.name])
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(writer.nodes)
    onnx.checker.check_model(copy)
    return copy


class _Writer:
    """Writes nodes out, and computes each at once."""

    def __init__(self, proto: onnx.ModelProto, feeds: Mapping[str, Array]):
        self._opset = proto.opset_import[0].version
        self.nodes: list[onnx.NodeProto] = []
        self.known = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer} | dict(feeds)
        self._count = 0

    def fresh(self, label: str) -> str:
        self._count += 1
        return f"{label}_{self._count}"

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, **attrs: object) -> str:
        """Write a node that is not the model's."""
        node = helper.make_node(op, inputs, outputs or [self.fresh(op)], self.fresh("node"), **attrs)
        self._compute(node)
        return node.output[0]

    def constant(self, array: object) -> str:
        return self.node("Constant", [], value=numpy_helper.from_array(np.asarray(array)))

    def _compute(self, node: onnx.NodeProto) -> None:
        inputs = [n for n in dict.fromkeys(node.input) if n]
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(self.known[n].dtype), self.known[n].shape)
            for n in inputs
        ]
        outputs = [helper.make_tensor_value_info(n, 0, None) for n in node.output]
        graph = helper.make_graph([node], "one", infos, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)], ir_version=9)
        self.known |= run_double(model, {n: self.known[n] for n in inputs})
        self.nodes.append(node)

    def write(self, nodes: Sequence[onnx.NodeProto], names: dict[str, str], prefix: str) -> dict[str, str]:
        """Write the nodes of a graph; its tensors by the names that they have now."""
        names = dict(names)
        for node in nodes:
            inputs = [names[n] if n else "" for n in node.input]
            attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type in ("If", "Loop", "Scan"):
                results = {"If": self._if, "Loop": self._loop, "Scan": self._scan}[node.op_type](inputs, attrs, names)
                names |= {n: r for n, r in zip(node.output, results, strict=True) if n}
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = self.fresh(prefix + (node.name or node.op_type))
            renamed = [n if not prefix else self.fresh(prefix + n) for n in node.output]
            del copy.input[:], copy.output[:]
            copy.input.extend(inputs)
            copy.output.extend(renamed)
            self._compute(copy)
            names |= dict(zip(node.output, renamed, strict=True))
        return names

    def _inside(self, graph: onnx.GraphProto, inputs: Sequence[str], names: dict[str, str]) -> list[str]:
        inner = dict(names)
        for tensor in graph.initializer:
            inner[tensor.name] = self.constant(numpy_helper.to_array(tensor))
        inner |= {i.name: n for i, n in zip(graph.input, inputs, strict=True)}
        found = self.write(graph.node, inner, f"{graph.name}/")
        return [found[o.name] for o in graph.output]

    def _if(self, inputs: list[str], attrs: dict, names: dict[str, str]) -> list[str]:
        taken = "then_branch" if self.known[inputs[0]].any() else "else_branch"
        return self._inside(attrs[taken], [], names)

    def _loop(self, inputs: list[str], attrs: dict, names: dict[str, str]) -> list[str]:
        body, states = attrs["body"], inputs[2:]
        most = int(self.known[inputs[0]].reshape(())) if inputs[0] else 10**9
        go = not inputs[1] or bool(self.known[inputs[1]].any())
        rows: list[list[str]] = []
        while go and len(rows) < most:
            given = [self.constant(np.array(len(rows))), self.constant(np.array(True)), *states]
            condition, *results = self._inside(body, given, names)
            go, states = bool(self.known[condition].any()), results[: len(states)]
            rows.append(results[len(states) :])
        ends = body.output[1 + len(states) :]
        return states + [self._together([r[k] for r in rows], 0, end) for k, end in enumerate(ends)]

    def _scan(self, inputs: list[str], attrs: dict, names: dict[str, str]) -> list[str]:
        body, count = attrs["body"], attrs["num_scan_inputs"]
        states, scanned = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
        ends = body.output[len(states) :]
        back_in, axes_in = (attrs.get(f"scan_input_{k}") or [0] * count for k in ("directions", "axes"))
        back_out, axes_out = (attrs.get(f"scan_output_{k}") or [0] * len(ends) for k in ("directions", "axes"))
        length = self.known[scanned[0]].shape[axes_in[0]]
        rows: list[list[str]] = []
        for step in range(length):
            places = [length - 1 - step if back else step for back in back_in]
            slices = [
                self.node("Gather", [x, self.constant(np.array(place))], axis=axis)
                for x, place, axis in zip(scanned, places, axes_in, strict=True)
            ]
            results = self._inside(body, [*states, *slices], names)
            states = results[: len(states)]
            rows.append(results[len(states) :])
        columns = [[r[k] for r in rows][:: -1 if back_out[k] else 1] for k in range(len(ends))]
        return states + [self._together(c, a, end) for c, a, end in zip(columns, axes_out, ends, strict=True)]

    def _together(self, parts: list[str], axis: int, info: onnx.ValueInfoProto) -> str:
        """The results of all steps along a new axis."""
        if not parts:
            dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            lengths = [d.dim_value for d in info.type.tensor_type.shape.dim]
            return self.constant(np.zeros((*lengths[:axis], 0, *lengths[axis:]), dtype))
        axes = self.constant(np.array([axis]))
        return self.node("Concat", [self.node("Unsqueeze", [x, axes]) for x in parts], axis=axis)
