"""Rules that hold a divisor or a gate constant: relevance stays a multiple of the tensor, and nothing is divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrp import rewrite
from tests.layers import Net, accounts, explain, quarters, rewritten
from tests.support import RNG, numbers, run_double


# What a normalization is with its divisor held constant, in numpy: (attributes, x -> (slope, mean to take off)).
def _deviation(x: np.ndarray, axes: tuple[int, ...], epsilon: float = 1e-5) -> np.ndarray:
    return np.sqrt(x.var(axes, keepdims=True) + np.float32(epsilon))


NORMS: dict[str, tuple[dict[str, Any], tuple[int, ...] | None, Callable[[np.ndarray], np.ndarray]]] = {
    "LayerNormalization": ({"axis": 2}, (2, 3), lambda x: _deviation(x, (2, 3))),
    "RMSNormalization": ({"axis": 3}, None, lambda x: np.sqrt((x * x).mean(3, keepdims=True) + np.float32(1e-5))),
    "InstanceNormalization": ({}, (2, 3), lambda x: _deviation(x, (2, 3))),
    "GroupNormalization": (
        {"num_groups": 2},
        None,
        lambda x: np.repeat(_deviation(x.reshape(len(x), 2, -1), (2,)), 2, 1)[..., None],
    ),
    "MeanVarianceNormalization": ({"axes": [0, 2]}, (0, 2), lambda x: _deviation(x, (0, 2), 0) + 1e-9),
    "LpNormalization": ({"axis": 2, "p": 1}, None, lambda x: np.abs(x).sum(2, keepdims=True)),
}


class Shaped(Net):
    """A net that says what shape its normalization has: of a GroupNormalization inference says nothing."""

    def model(self, *outputs: str, dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
        proto = super().model(*outputs, dtype=dtype)
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info("layer:y", dtype, ["N", 4, 3, 2]))
        return proto


def _normalized(net: Net, op: str, x: str) -> tuple[str, np.ndarray, np.ndarray]:
    """A normalization of (N, 4, 3, 2), with its slope and offset as they broadcast."""
    shape = {"LayerNormalization": (3, 2), "RMSNormalization": (2,)}.get(op, (4,))
    slope, offset = quarters(RNG, shape, zeros=False), quarters(RNG, shape, zeros=False)
    given = {"RMSNormalization": [slope], "LpNormalization": [], "MeanVarianceNormalization": []}.get(
        op, [slope, offset]
    )
    z = net(op, x, *(net.const(c) for c in given), name="layer", **NORMS[op][0])
    wide = (4, 1, 1) if shape == (4,) else shape
    slope = slope.reshape(wide) if given else np.ones(1)
    return str(z), slope, offset.reshape(wide) if len(given) == 2 else np.zeros(1)


@pytest.mark.parametrize("arrival", ["plain", "factored"])
@pytest.mark.parametrize("op", NORMS)
def test_normalization_holds_its_divisor_constant(op: str, arrival: str) -> None:
    """R_x = x J^T (R / y) with J that of (x - mean) * slope / divisor, the divisor a number; the offset is booked."""
    net = Shaped(opset=23 if op == "RMSNormalization" else 21)
    z, slope, offset = _normalized(net, op, net.input("x", "N", 4, 3, 2))
    x = numbers(2, 4, 3, 2)
    feeds = {"x": x, "r": numbers(2, 4, 3, 2)}
    known = net("Cast", z, to=1) if op == "GroupNormalization" else z  # inference needs the type
    rows = end = net("Reshape", known, net.const([-1, 4, 3, 2], np.int64))
    if arrival == "factored":
        end, feeds["r"] = net("Gemm", net("Flatten", rows), net.weight(24, 3), name="head"), numbers(2, 3)
    found = explain(net, end, "normalization", feeds, layers=(rows,), epsilon=0.0, exact=True)
    divisor = NORMS[op][2](x.astype(float))
    axes = NORMS[op][1]
    grouped = x.astype(float).reshape(2, 2, -1) if op == "GroupNormalization" else x.astype(float)

    def centred(v: np.ndarray) -> np.ndarray:
        if op == "GroupNormalization":
            rows = v.reshape(2, 2, -1)
            return (rows - rows.mean(2, keepdims=True)).reshape(v.shape)
        return v if axes is None else v - v.mean(axes, keepdims=True)

    y = centred(grouped.reshape(x.shape)) / divisor * slope + offset
    forward = run_double(net.model(end), {"x": x, "r": feeds["r"]})[end] if arrival == "plain" else y
    np.testing.assert_allclose(forward, y, rtol=1e-5, atol=1e-6)
    c = found[f"relevance/{rows}"] / y
    np.testing.assert_allclose(found["relevance/x"], x * centred(c * slope / divisor), rtol=1e-4, atol=1e-6)
    booked = accounts(net, end, "normalization", feeds, epsilon=0.0, exact=True)
    np.testing.assert_allclose(booked.get("bias", 0.0), (c * offset).sum(), rtol=1e-4, atol=1e-6)


def test_normalization_golden() -> None:
    net = Net()
    scale, shift = net.const([2, -1, 0.5]), net.const([0.1, 0, -0.2])
    z = net("LayerNormalization", net.input("x", "N", 3), scale, shift, name="layer", epsilon=1e-5)
    feeds = {"x": np.array([[1, -2, 0.5]], np.float32), "r": np.array([[1, -0.5, 2]], np.float32)}
    found = explain(net, z, "normalization", feeds)["relevance/x"]
    np.testing.assert_allclose(found, [[-4.25355806, 9.58466413, 4.52294506]], rtol=2e-6)


def test_normalization_spelled_out_is_the_fused_one() -> None:
    """Mean, difference, square, mean, root and quotient by the rules of sums and quotients."""
    net = Net()
    x, slope, offset = net.input("x", "N", 4), net.weight(4), net.weight(4)
    fused = net("LayerNormalization", x, slope, offset, name="fused", epsilon=1e-5)
    off = net("Sub", x, net("ReduceMean", x, net.const([1], np.int64)))
    square = net("ReduceMean", net("Pow", off, net.const(2.0)), net.const([1], np.int64))
    spelled = net("Div", off, net("Sqrt", net("Add", square, net.const(1e-5))))
    spelled = net("Add", net("Mul", spelled, slope), offset)
    weights, feeds = net.weight(4, 3), {"x": numbers(2, 4)}
    found = [
        run_double(rewrite(net.model(net("MatMul", y, weights)), "attnlrp").model, feeds)["relevance/x"]
        for y in (fused, spelled)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)


ACTIVATIONS: dict[str, dict[str, Any]] = {
    **{op: {} for op in ("Relu", "LeakyRelu", "ThresholdedRelu", "Abs", "HardSwish", "Mish", "Tanh", "Erf", "Elu")},
    **{op: {} for op in ("Selu", "Celu", "Softsign", "Sin", "Sinh", "Asinh", "Neg", "Sigmoid", "Exp", "Softplus")},
}


@pytest.mark.parametrize("op", [*ACTIVATIONS, "Gelu", "Gelu tanh", "Swish", "Clip", "Pow", "LRN", "Mul", "Div"])
def test_pass_exact_is_pass(op: str) -> None:
    """What arrives as a multiple of the output is the same relevance, and finite where the input is zero."""
    net = Net(opset=24)
    x = net.input("x", "N", 4, 1)
    kind, attrs = op.split()[0], {"approximate": "tanh"} if op == "Gelu tanh" else {}
    more = {
        "Clip": [net.const(-0.5), net.const(0.75)],
        "Pow": [net.const(3.0)],
        "Mul": [net.const([0.5])],
        "Div": [net("Exp", x)],
    }.get(op, [])
    if op == "LRN":
        attrs = {"size": 3}
    z = net(kind, x, *more, name="layer", **attrs)
    end = net("Gemm", net("Flatten", z), net.weight(4, 3), name="head")
    feeds = {"x": numbers(5, 4, 1), "r": numbers(5, 3)}
    feeds["x"][0] = 0
    explained = rewritten(net.model(end), "pass", (z,), exact=True).model
    found = run_double(explained, {"x": feeds["x"], "start": feeds["r"]})
    limit = 1e-6 if kind == "Gelu" else 1e-9  # its reference has constants in float32
    np.testing.assert_allclose(found["relevance/x"], found[f"relevance/{z}"], rtol=limit, atol=1e-12)
