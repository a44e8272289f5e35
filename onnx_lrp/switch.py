"""The explanation behind an If, so that a client that wants the prediction alone does not pay for it.

ONNX Runtime runs every node of a graph, whichever outputs are fetched (its inference builds ignore
``only_execute_path_to_fetches``). An If on a graph input is the one construction that skips the work.
"""

from __future__ import annotations

import numpy as np
import onnx

EXPLAIN = "explain"


def behind_switch(added: onnx.GraphProto) -> onnx.GraphProto:
    """Wrap what was added into the then-branch of an If on the bool graph input ``explain`` (default true).

    With ``explain`` false the added outputs are empty tensors. Weights are derived inside the branch, where the runtime
    still folds them.
    """
    then = onnx.GraphProto(name="explanation", doc_string="runs when explain is true")
    then.node.extend(added.node)
    names = {i.name for i in added.input}
    then.initializer.extend(t for t in added.initializer if t.name not in names)
    otherwise = onnx.GraphProto(name="nothing", doc_string="runs when explain is false")
    outer = onnx.GraphProto()
    outer.input.extend(added.input)
    outer.initializer.extend(t for t in added.initializer if t.name in names)
    outer.input.append(onnx.helper.make_tensor_value_info(EXPLAIN, onnx.TensorProto.BOOL, []))
    outer.initializer.append(onnx.numpy_helper.from_array(np.array(True), EXPLAIN))
    inner = {}
    for output in added.output:
        tensor = output.type.tensor_type
        inner[output.name] = f"lrp/then/{output.name}"
        info = onnx.ValueInfoProto()
        info.CopyFrom(output)
        info.name = inner[output.name]
        then.output.append(info)
        empty = onnx.helper.make_tensor(f"lrp/else/{output.name}", tensor.elem_type, [0] * len(tensor.shape.dim), [])
        otherwise.node.append(onnx.helper.make_node("Constant", [], [empty.name], value=empty))
        otherwise.output.append(onnx.helper.make_tensor_value_info(empty.name, tensor.elem_type, [0] * len(tensor.shape.dim)))
        public = outer.output.add()
        public.CopyFrom(output)
        # Empty when switched off: no axis can be promised.
        for i, dim in enumerate(public.type.tensor_type.shape.dim):
            dim.Clear()
            dim.dim_param = f"{output.name}.{i}"
    for node in then.node:
        for k, name in enumerate(node.output):
            node.output[k] = inner.get(name, name)
        for k, name in enumerate(node.input):
            node.input[k] = inner.get(name, name)
    node = onnx.helper.make_node("If", [EXPLAIN], [o.name for o in outer.output], name="lrp/switch", then_branch=then, else_branch=otherwise)
    node.doc_string = "the explanation; skipped when explain is false"
    outer.node.append(node)
    return outer
