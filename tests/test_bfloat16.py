"""bfloat16 models: relevance in float32. ONNX Runtime's CPU kernels move and cast such tensors; the rest is float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lrp
from onnx_lrp.verify import verify
from tests.adjoint_reference import run_onnxruntime
from tests.support import run_double, worst

BF16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
W = np.random.default_rng(0).standard_normal((4, 3)).astype(ml_dtypes.bfloat16)
B = np.array([0.5, -1, 2], ml_dtypes.bfloat16)
X = np.array([[1, -2, 0.5, 3], [0.25, 1, -1, 2]], np.float32)  # exact in bfloat16


def model(nodes: list[onnx.NodeProto], kind: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "bfloat16",
        [helper.make_tensor_value_info("x", kind, ["N", 4])],
        [helper.make_tensor_value_info("y", kind, ["N", 3])],
        [numpy_helper.from_array(W, "w"), numpy_helper.from_array(B, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def stored() -> onnx.ModelProto:
    """Weights are stored, and tensors moved, in bfloat16; sums are made in float32."""
    cast = [helper.make_node("Cast", [n], [f"{n}_f"], f"cast_{n}", to=FLOAT) for n in ("w", "b")]
    nodes = [
        *cast,
        helper.make_node("Cast", ["x"], ["x_b"], "narrow", to=BF16),
        helper.make_node("Transpose", ["x_b"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("Transpose", ["t"], ["u"], "back", perm=[1, 0]),
        helper.make_node("Cast", ["u"], ["u_f"], "wide", to=FLOAT),
        helper.make_node("MatMul", ["u_f", "w_f"], ["z"], "dense"),
        helper.make_node("Add", ["z", "b_f"], ["y"], "bias"),
    ]
    return model(nodes, FLOAT)


def whole() -> onnx.ModelProto:
    return model([helper.make_node("Gemm", ["x", "w", "b"], ["y"], "dense")], BF16)


@pytest.mark.parametrize("target", [0, 2])
def test_relevance_by_hand(target: int) -> None:
    w, b = W.astype(np.float64), B.astype(np.float64)
    expected = X * w[:, target]
    for method, values in (("lrp_0", expected), ("gradient", np.broadcast_to(w[:, target], X.shape))):
        explained = onnx_lrp.rewrite(stored(), method, target=target)
        found = run_onnxruntime(explained.model, {"x": X})
        assert worst(found["relevance/x"], values) < 1e-6
        np.testing.assert_array_equal(found["y"], run_onnxruntime(stored(), {"x": X})["y"])
        explained = onnx_lrp.rewrite(whole(), method, target=target)
        assert explained.model.graph.output[1].type.tensor_type.elem_type == FLOAT
        exact = run_double(explained.model, {"x": X})
        assert worst(exact["relevance/x"], values) < 1e-12
        assert worst(exact["score"], (X @ w + b)[:, target]) < 1e-12


def test_biases_are_folded_and_verified() -> None:
    table = {row.node: row for row in onnx_lrp.rewrite(stored(), "epsilon").table}
    assert "folded" in table["dense"].why
    assert verify(stored(), X[:1], "epsilon").ok
