"""Small models with random weights, one per form of input that a user may have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Shape = Sequence[int | str]


def build(
    nodes: Sequence[NodeProto],
    inputs: dict[str, tuple[int, Shape]],
    outputs: dict[str, tuple[int, Shape]],
    weights: dict[str, np.ndarray],
    **metadata: str,
) -> onnx.ModelProto:
    """Return a checked model of opset 18."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Return normal numbers, the same at each call."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def conv(
    batch: int | str = "N",
    *,
    channels: int = 3,
    size: int | str = 8,
    classes: int = 5,
    half: bool = False,
    last: bool = False,
) -> onnx.ModelProto:
    """Return a classifier of pictures: Conv, Relu, mean, Gemm; `last`: channels come last."""
    dtype, kind = (np.float16, HALF) if half else (np.float32, FLOAT)
    shape = (batch, size, size, channels) if last else (batch, channels, size, size)
    nodes = [helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[0, 3, 1, 2])] if last else []
    nodes += [
        helper.make_node("Conv", ["t" if last else "x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "v", "d"], ["logits"], "dense"),
    ]
    weights = {
        "w": normal(6, channels, 3, 3, dtype=dtype),
        "b": normal(6, seed=1, dtype=dtype),
        "v": normal(6, classes, seed=2, dtype=dtype),
        "d": normal(classes, seed=3, dtype=dtype),
    }
    return build(nodes, {"x": (kind, shape)}, {"logits": (kind, (batch, classes))}, weights)


def two_inputs(batch: int | str = "N") -> onnx.ModelProto:
    """Return a model of a picture and a table, whose second output has the batch on its second axis."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], "mean"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Concat", ["f", "table"], ["all"], "concat", axis=1),
        helper.make_node("Gemm", ["all", "v"], ["logits"], "dense"),
        helper.make_node("Transpose", ["all"], ["state"], "turn", perm=[1, 0]),
    ]
    inputs = {"image": (FLOAT, (batch, 3, 4, 4)), "table": (FLOAT, (batch, 2))}
    outputs = {"logits": (FLOAT, (batch, 4)), "state": (FLOAT, (8, batch))}
    return build(nodes, inputs, outputs, {"w": normal(6, 3, 3, 3), "v": normal(8, 4, seed=1)})


def tokens() -> onnx.ModelProto:
    """Return a classifier of token ids 0 to 9: embedding, mean, Gemm."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("ReduceMean", ["e", "axes"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "v"], ["logits"], "dense"),
    ]
    weights = {"table": normal(10, 4), "axes": np.array([1], np.int64), "v": normal(4, 3, seed=1)}
    return build(nodes, {"ids": (INT64, ("N", "T"))}, {"logits": (FLOAT, ("N", 3))}, weights)


def pixels(batch: int | str = 1) -> onnx.ModelProto:
    """Return a scorer of places: its output has an axis of places and one of classes."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Reshape", ["c", "shape"], ["r"], "places"),
        helper.make_node("Transpose", ["r"], ["scores"], "turn", perm=[0, 2, 1]),
    ]
    weights = {"w": normal(2, 3, 3, 3), "shape": np.array([0, 2, 36], np.int64)}
    return build(nodes, {"x": (FLOAT, (batch, 3, 8, 8))}, {"scores": (FLOAT, (batch, 36, 2))}, weights)
