"""One small network in every quantised form, and the numbers that its integers stand for.

x (N, 3, 4, 4) -> convolution -> ReLU -> max pool -> dense -> (N, 5). Scales are powers of two, so that products of
scales are exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from tests.layers import Net

X_SCALE, Y_SCALE, OUT_SCALE = np.float32(2**-5), np.float32(2**-4), np.float32(2**-3)
FORMS = ("qdq", "qdq_channels", "qdq_relu", "qdq_signed", "qlinear", "qlinear_channels", "dynamic")
QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")


@dataclass
class Quantized:
    """A network, and its float twin.

    Attributes:
        model: the network.
        w: dequantised weights of the convolution (4, 3, 3, 3).
        b: its bias.
        v: dequantised weights of the dense layer (16, 5).
        d: its bias.
        dynamic: whether grids are made for the tensors.
    """

    model: onnx.ModelProto
    w: np.ndarray
    b: np.ndarray
    v: np.ndarray
    d: np.ndarray
    dynamic: bool


def pictures() -> np.ndarray:
    """Two pictures; their ends make a dynamic scale a power of two."""
    x = np.random.default_rng(5).uniform(-3, 3, (2, 3, 4, 4)).astype(np.float32)
    x[0, 0, 0, 0], x[1, 2, 3, 3] = -128 * X_SCALE, 127 * X_SCALE
    return x


def build(form: str) -> Quantized:
    """The network in one of FORMS."""
    net = Net(opset=21)
    rng = np.random.default_rng(1)
    channels = form.endswith("channels")
    w, b = rng.integers(-9, 10, (4, 3, 3, 3)), rng.integers(-99, 99, 4)
    v, d = rng.integers(-9, 10, (16, 5)), rng.integers(-99, 99, 5)
    w_scale = np.float32([2**-5, 2**-4, 2**-5, 2**-6]) if channels else np.float32(2**-5)
    v_scale = np.float32([2**-5, 2**-6, 2**-5, 2**-6, 2**-4]) if channels else np.float32(2**-5)
    zero = 0 if channels else 3
    parts = _Parts(net, zero, channels)
    x = net.input("x", "N", 3, 4, 4)
    out = getattr(parts, form.split("_")[0])(x, form, w, w_scale, b, v, v_scale, d)
    column = w_scale.reshape(-1, 1, 1, 1)
    dynamic = form == "dynamic"
    return Quantized(
        net.model(out),
        (w - zero) * column.astype(np.float64),
        b / 128 if dynamic else b * (w_scale * X_SCALE).astype(np.float64),
        (v - zero) * v_scale.astype(np.float64),
        d / 128 if dynamic else 0.0 * d,
        dynamic,
    )


@dataclass
class _Parts:
    net: Net
    zero: int
    channels: bool

    def _grid(self, scale: Any, zero: int, dtype: Any = np.uint8) -> tuple[str, str]:
        zeros = np.full(np.shape(scale), zero)
        return self.net.const(scale), self.net.const(zeros, dtype)

    def _round_trip(self, x: str, scale: Any, zero: int, dtype: Any = np.uint8) -> str:
        grid = self._grid(scale, zero, dtype)
        return self.net("DequantizeLinear", self.net("QuantizeLinear", x, *grid), *grid)

    def qdq(self, x: str, form: str, w: Any, w_scale: Any, b: Any, v: Any, v_scale: Any, d: Any) -> str:
        net = self.net
        kernel = net("DequantizeLinear", net.const(w, np.int8), *self._grid(w_scale, self.zero, np.int8), axis=0)
        bias = net("DequantizeLinear", net.const(b, np.int32), net.const(w_scale * X_SCALE), axis=0)
        c = net("Conv", self._round_trip(x, X_SCALE, 128), kernel, bias, name="conv", pads=[1] * 4)
        if form == "qdq_relu":
            r = self._round_trip(net("Relu", c), Y_SCALE, 100)
        else:  # the grid begins at zero, and stands in for the Relu
            r = self._round_trip(c, Y_SCALE, *((-128, np.int8) if form == "qdq_signed" else (0, np.uint8)))
        p = self._round_trip(net("MaxPool", r, kernel_shape=[2, 2], strides=[2, 2]), Y_SCALE, 0)
        dense = net("DequantizeLinear", net.const(v, np.int8), *self._grid(v_scale, self.zero, np.int8), axis=1)
        y = net("MatMul", net("Flatten", p), dense, name="dense")
        return self._round_trip(y, OUT_SCALE, 100)

    def qlinear(self, x: str, form: str, w: Any, w_scale: Any, b: Any, v: Any, v_scale: Any, d: Any) -> str:
        net = self.net
        first, middle, last = self._grid(X_SCALE, 128), self._grid(Y_SCALE, 0), self._grid(OUT_SCALE, 100)
        kernel = net.const(w, np.int8), *self._grid(w_scale, self.zero, np.int8)
        q = net("QuantizeLinear", x, *first)
        c = net("QLinearConv", q, *first, *kernel, *middle, net.const(b, np.int32), name="conv", pads=[1] * 4)
        p = net("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2])
        f = net("Reshape", p, net.const([0, -1], np.int64))
        dense = net.const(v, np.int8), *self._grid(v_scale, self.zero, np.int8)
        return net("DequantizeLinear", net("QLinearMatMul", f, *middle, *dense, *last, name="dense"), *last)

    def dynamic(self, x: str, form: str, w: Any, w_scale: Any, b: Any, v: Any, v_scale: Any, d: Any) -> str:
        net = self.net

        def layer(op: str, x: str, weights: Any, scale: Any, bias: Any, name: str, **attrs: Any) -> str:
            q, step, z = net("DynamicQuantizeLinear", x, outputs=3)
            total = net(op, q, net.const(weights, np.int8), z, net.const(self.zero, np.int8), name=name, **attrs)
            scales = net("Mul", step, net.const(scale))
            return net("Add", net("Mul", net("Cast", total, to=TensorProto.FLOAT), scales), net.const(bias))

        c = layer("ConvInteger", x, w, w_scale, (b / 128).reshape(1, 4, 1, 1), "conv", pads=[1] * 4)
        p = net("MaxPool", net("Relu", c), kernel_shape=[2, 2], strides=[2, 2])
        return layer("MatMulInteger", net("Flatten", p), v, v_scale, d / 128, "dense")


def integers(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the quantising nodes of a model make, by ONNX Runtime."""
    names = [o for n in model.graph.node if n.op_type in QUANTIZERS and not n.domain for o in n.output]
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(wider.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))
