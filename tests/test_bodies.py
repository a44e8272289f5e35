"""Operators that have no adjoint of their own are explained through the body that ONNX's schema gives them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import onnx_lrp
from onnx_lrp.adjoints import OPERATORS
from tests.support import RNG, run_double

SHAPE = ("N", 2, 3, 4)
CASES = {
    "attention": ("Attention", [SHAPE] * 3, {}),
    "attention_causal": ("Attention", [SHAPE] * 3, {"is_causal": 1, "scale": 0.7}),
    "attention_flat_heads": ("Attention", [("N", 3, 8)] * 3, {"q_num_heads": 2, "kv_num_heads": 2}),
    "rotary": ("RotaryEmbedding", [SHAPE, ("N", 3, 2), ("N", 3, 2)], {}),
}


def one_node(name: str) -> onnx.ModelProto:
    op, shapes, attrs = CASES[name]
    inputs = [helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, s) for k, s in enumerate(shapes)]
    node = helper.make_node(op, [i.name for i in inputs], ["y"], name="fused", **attrs)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[0])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def feeds_of(name: str) -> dict[str, np.ndarray]:
    return {
        f"x{k}": RNG.standard_normal([2 if d == "N" else d for d in s]).astype(np.float32)
        for k, s in enumerate(CASES[name][1])
    }


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_fused_operator(name: str) -> None:
    """Against central differences of the fused operator, in float64 by the reference implementation."""
    model, feeds = one_node(name), feeds_of(name)
    assert CASES[name][0] not in OPERATORS
    explained = onnx_lrp.rewrite(model, "gradient", start="input").model
    start = RNG.standard_normal(run_double(model, feeds)["y"].shape).astype(np.float32)
    found = run_double(explained, feeds | {"start": start})
    wide = {k: v.astype(np.float64) for k, v in feeds.items()}
    for key, x in wide.items():
        direction = RNG.standard_normal(x.shape)
        h = 1e-5
        up, down = (run_double(model, wide | {key: x + s * h * direction})["y"] for s in (1, -1))
        expected = ((up - down) / (2 * h) * start).sum()
        np.testing.assert_allclose((found[f"relevance/{key}"] * direction).sum(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_the_source_keeps_its_node(name: str) -> None:
    model, feeds = one_node(name), feeds_of(name)
    explained = onnx_lrp.rewrite(model, "epsilon")
    assert explained.model.graph.node[0] == model.graph.node[0]
    assert {row.node for row in explained.table} == {"fused"}
    plain, both = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y"], feeds)[0]
        for m in (model, explained.model)
    )
    np.testing.assert_array_equal(plain, both)
    relevance = onnx_lrp.Explainer(model, "epsilon")(feeds).relevance
    assert all(np.isfinite(r).all() and np.abs(r).max() > 0 for r in relevance.values())


def test_what_two_bodies_share_counts_once() -> None:
    """Two nodes on the same tensors emit the same inner tensors, which are seen once: the gradient doubles, no more."""
    model, feeds = one_node("attention"), feeds_of("attention")
    twice = onnx.ModelProto()
    twice.CopyFrom(model)
    again = twice.graph.node.add()
    again.CopyFrom(model.graph.node[0])
    again.name, again.output[0], twice.graph.node[0].output[0] = "again", "b", "a"
    twice.graph.node.append(helper.make_node("Add", ["a", "b"], ["y"], name="sum"))
    start = np.ones_like(run_double(model, feeds)["y"], np.float32)
    one, two = (
        run_double(onnx_lrp.rewrite(m, "gradient", start="input").model, feeds | {"start": start})
        for m in (model, twice)
    )
    for key in feeds:
        np.testing.assert_allclose(two[f"relevance/{key}"], 2 * one[f"relevance/{key}"], rtol=1e-9)
