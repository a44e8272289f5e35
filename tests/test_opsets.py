"""Operators in the form of their time: from opset 7 to the newest that ONNX Runtime loads, IR versions 3 to 13."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import onnx_lrp
from tests.adjoint_reference import run_onnxruntime
from tests.support import run_double, worst

OPSETS = range(7, 27)
RNG = np.random.default_rng(11)
W, B = RNG.standard_normal((4, 3, 3, 3)), RNG.standard_normal(4)
# Exact in float32, slope and offset too: what is folded at rewriting is folded in float32.
EPSILON = 2.0**-10
SCALE, SHIFT, MEAN = RNG.integers(1, 8, (3, 4)) / 4
VAR = np.array([1, 4, 0.25, 16]) - EPSILON
DENSE = RNG.standard_normal((4 * 5 * 5, 6))
BIAS = RNG.standard_normal(6)
X = RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)


def ir_of(opset: int) -> int:
    """The IR version of the time; at 3 initializers are listed among the inputs."""
    return {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 19: 9, 20: 9, 24: 11, 25: 12, 26: 13}.get(
        opset, 7 if opset < 15 else 8 if opset < 19 else 10
    )


class Graph:
    """A model under construction, each operator in the form that its opset has."""

    def __init__(self, opset: int):
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def weight(self, array: np.ndarray, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(array, dtype)
        return name

    def __call__(self, op: str, *inputs: str, out: str = "", **attrs: object) -> str:
        name = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attrs))
        return name

    def moved(self, op: str, x: str, since: int, **ints: list[int]) -> str:
        """An operator whose attributes became inputs, in the order given, at some opset."""
        if self.opset < since:
            return self(op, x, **ints)
        return self(op, x, *(self.weight(np.array(v), np.int64) for v in ints.values()))

    def reduced(self, op: str, x: str, since: int, axes: list[int]) -> str:
        if self.opset < since:
            return self(op, x, axes=axes, keepdims=1)
        return self(op, x, self.weight(np.array(axes), np.int64), keepdims=1)

    def padded(self, x: str, pads: list[int]) -> str:
        if self.opset < 11:
            return self("Pad", x, pads=pads, mode="constant", value=0.25)
        return self("Pad", x, self.weight(np.array(pads), np.int64), self.weight(np.array(0.25)))

    def clipped(self, x: str, low: float, high: float) -> str:
        if self.opset < 11:
            return self("Clip", x, min=low, max=high)
        return self("Clip", x, self.weight(np.array(low)), self.weight(np.array(high)))

    def doubled(self, x: str) -> str:
        """Nearest neighbours, twice as high and wide."""
        scales = [1.0, 1.0, 2.0, 2.0]
        if self.opset < 9:
            return self("Upsample", x, mode="nearest", scales=scales)
        if self.opset == 9:
            return self("Upsample", x, self.weight(np.array(scales)), mode="nearest")
        if self.opset == 10:
            return self("Resize", x, self.weight(np.array(scales)), mode="nearest")
        nearest = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
        roi = self.weight(np.zeros(0)) if self.opset < 13 else ""
        return self("Resize", x, roi, self.weight(np.array(scales)), **nearest)

    def dropped(self, x: str) -> str:
        if self.opset < 12:
            return self("Dropout", x, ratio=0.5)
        return self("Dropout", x, self.weight(np.array(0.5)))

    def model(self, outputs: dict[str, list[int | str]]) -> onnx.ModelProto:
        ir = ir_of(self.opset)
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *X.shape[1:]])]
        if ir < 4:
            inputs += [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in self.weights.items()
            ]
        graph = helper.make_graph(
            self.nodes,
            "of_its_time",
            inputs,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            [numpy_helper.from_array(a, n) for n, a in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir)
        onnx.checker.check_model(model)
        return model


def network(opset: int) -> onnx.ModelProto:
    """Every operator whose form changed over the opsets, in one small network."""
    g = Graph(opset)
    h = g("Conv", g.padded("x", [0, 0, 1, 1, 0, 0, 1, 1]), g.weight(W), g.weight(B))
    h = g("BatchNormalization", h, *(g.weight(v) for v in (SCALE, SHIFT, MEAN, VAR)), epsilon=EPSILON)
    h = g.dropped(g.clipped(h, -0.8, 2.5))
    h = g("AveragePool", g.doubled(h), kernel_shape=[2, 2], strides=[1, 1])
    h = g("MaxPool", h, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0])
    h = g.moved("Slice", h, 10, starts=[0, 0], ends=[5, 5], axes=[2, 3])
    h = g.moved("Unsqueeze", g.moved("Squeeze", g.moved("Unsqueeze", h, 13, axes=[1]), 13, axes=[1]), 13, axes=[4])
    h = g.moved("Squeeze", g.reduced("ReduceMean", h, 18, [4]), 13, axes=[4])
    h = g("Sub", h, g.reduced("ReduceSum", h, 13, [1]))
    h = g("Mul", h, g("Softmax", h, axis=1))  # before opset 13 over all that follows, then over the channels
    g("Gemm", g("Flatten", h), g.weight(DENSE), g.weight(BIAS), out="logits")
    return g.model({"logits": ["N", 6]})


def in_torch(x: torch.Tensor, opset: int) -> torch.Tensor:
    """The same network."""
    f = torch.nn.functional
    w = [torch.from_numpy(np.asarray(a, np.float32)).double() for a in (W, B, SCALE, SHIFT, MEAN, VAR, DENSE, BIAS)]
    h = f.conv2d(f.pad(x, (1, 1, 1, 1), value=0.25), w[0], w[1])
    h = f.batch_norm(h, w[4], w[5], w[2], w[3], eps=EPSILON).clamp(float(np.float32(-0.8)), float(np.float32(2.5)))
    h = f.avg_pool2d(f.interpolate(h, scale_factor=2, mode="nearest"), 2, 1)
    h = f.max_pool2d(f.pad(h, (1, 0, 1, 0), value=-torch.inf), 3, 2)[:, :, :5, :5]
    h = h - h.sum(1, keepdim=True)
    weights = h.softmax(1) if opset >= 13 else h.flatten(1).softmax(1).reshape(h.shape)
    return (h * weights).flatten(1) @ w[6] + w[7]


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int) -> None:
    """Outputs as before the rewriting, gradient as torch's; relevance finite and conserved."""
    model = network(opset)
    plain = run_onnxruntime(model, {"x": X})
    explained = onnx_lrp.rewrite(model, "gradient", target=2).model
    assert explained.opset_import[0].version == max(opset, 18)
    np.testing.assert_allclose(run_onnxruntime(explained, {"x": X})["logits"], plain["logits"], rtol=1e-5, atol=1e-5)
    x = torch.from_numpy(X).double().requires_grad_()
    logits = in_torch(x, opset)
    assert worst(plain["logits"], logits.detach().numpy()) <= 1e-5
    logits[:, 2].sum().backward()
    assert worst(run_double(explained, {"x": X})["relevance/x"], x.grad.numpy()) <= 1e-9
    assert worst(run_onnxruntime(explained, {"x": X})["relevance/x"], x.grad.numpy()) <= 1e-5
    found = run_double(onnx_lrp.rewrite(model, ledger=True).model, {"x": X})
    total = found["relevance/x"].sum((1, 2, 3)) + found["absorbed"]
    np.testing.assert_allclose(total, found["score"], rtol=1e-9)
