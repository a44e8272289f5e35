"""A VGG in torch as the converters of Keras and TensorFlow write it: the same function, other nodes.

Pictures come with their channels last; a Transpose turns them for the convolutions, and another one back before they
are flattened, so that the first dense layer has its rows in another order. Padding is SAME_UPPER, dense layers are
MatMul and Add with weights (in, out), and the output is a softmax. TensorFlow itself is not needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, checker, helper, numpy_helper
from torch import Tensor, nn

from exporters.torch_nets import VGG


def channels_last(net: VGG, size: int, *, opset: int = 18) -> onnx.ModelProto:
    """Write a network down node by node.

    Args:
        net: a VGG without batch norms, whose average pooling does nothing (it does not at the size it was built for).
        size: height and width of its pictures.
        opset: of the model.

    Returns:
        A model from "image" (N, size, size, 3) to "probabilities" (N, classes).
    """
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, array: Any) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def numbers(tensor: Tensor) -> Any:
        return tensor.detach().numpy()

    x = node("Transpose", "to_channels_first", "image", perm=[0, 3, 1, 2])
    stage, layer, channels, grid = 1, 1, 3, size
    for module in net.features:
        name = f"block{stage}_conv{layer}"
        if isinstance(module, nn.Conv2d):
            kernel, bias = (
                weight(f"{name}/kernel", numbers(module.weight)),
                weight(f"{name}/bias", numbers(module.bias)),
            )
            x = node("Conv", name, x, kernel, bias, kernel_shape=[3, 3], auto_pad="SAME_UPPER")
            channels = module.out_channels
        elif isinstance(module, nn.ReLU):
            x, layer = node("Relu", f"{name}/relu", x), layer + 1
        elif isinstance(module, nn.MaxPool2d):
            shape = {"kernel_shape": [2, 2], "strides": [2, 2]}
            x = node("MaxPool", f"block{stage}_pool", x, auto_pad="SAME_UPPER", **shape)
            stage, layer, grid = stage + 1, 1, -(-grid // 2)
        else:
            raise ValueError(f"{type(module).__name__} has no place here; give a VGG without batch norms")
    x = node("Transpose", "to_channels_last", x, perm=[0, 2, 3, 1])
    x = node("Reshape", "flatten", x, weight("flatten/shape", np.array([-1, grid * grid * channels])))
    dense = [module for module in net.classifier if isinstance(module, nn.Linear)]
    for k, module in enumerate(dense, 1):
        matrix, name = numbers(module.weight), f"dense{k}"
        if k == 1:  # torch flattens channel by channel, this pixel by pixel
            pixelwise = matrix.reshape(-1, channels, grid, grid).transpose(0, 2, 3, 1)
            matrix = pixelwise.reshape(len(matrix), -1)
        x = node("MatMul", f"{name}/matmul", x, weight(f"{name}/kernel", matrix.T))
        x = node("Add", f"{name}/add", x, weight(f"{name}/bias", numbers(module.bias)))
        if k < len(dense):
            x = node("Relu", f"{name}/relu", x)
    node("Softmax", "probabilities", x, axis=-1)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", size, size, 3])
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", dense[-1].out_features])
    graph = helper.make_graph(nodes, "channels_last", [image], [output], weights)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="onnx_lrp exporters")
    if not any(t.ByteSize() > 2**30 for t in weights):
        checker.check_model(model, full_check=True)
    return model
