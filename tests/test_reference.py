"""The float64 run lets go of what nobody reads any more, and gives what onnx's own run gives."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_lrp.reference import evaluator, run_double
from tests.layers import Net

STEPS, SIZE = 40, 100_000


def chain() -> onnx.ModelProto:
    """Many steps, of which the third is an output, too."""
    net = Net(seed=1)
    x = net.input("x", "N", SIZE)
    made = [x]
    for k in range(STEPS):
        made.append(net("Tanh" if k % 2 else "Neg", made[-1]))
    return net.model(net("Add", made[-1], x), made[3])


def test_a_long_chain_takes_the_memory_of_a_few_steps() -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((1, SIZE))}
    model = chain()
    expected = evaluator(model).run(None, feeds)
    tracemalloc.start()
    found = run_double(model, feeds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * SIZE * 8  # of 8 bytes each: eight tensors, and not forty
    for a, b in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_branch_reads_what_nobody_else_does() -> None:
    """A tensor whose last reader stands inside of an If, two graphs deep."""

    def branch(name: str, nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])

    def choose(condition: str, output: str, then: onnx.GraphProto, otherwise: onnx.GraphProto) -> onnx.NodeProto:
        return helper.make_node("If", [condition], [output], then_branch=then, else_branch=otherwise)

    double = branch("double", [helper.make_node("Add", ["h", "h"], ["twice"])], "twice")
    negative = branch("negative", [helper.make_node("Neg", ["h"], ["minus"])], "minus")
    inner = branch("inner", [choose("c", "chosen", double, negative)], "chosen")
    other = branch("other", [helper.make_node("Identity", ["x"], ["same"])], "same")
    nodes = [
        helper.make_node("Exp", ["x"], ["h"]),
        helper.make_node("Sin", ["x"], ["s"]),
        helper.make_node("Cos", ["s"], ["t"]),
        choose("c", "y", inner, other),
        helper.make_node("Add", ["y", "t"], ["z"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    x = np.array([0.5, -1.0])
    for chosen, expected in ((True, 2 * np.exp(x)), (False, x)):
        found = run_double(model, {"x": x, "c": np.array(chosen)})
        np.testing.assert_allclose(found["z"], expected + np.cos(np.sin(x)), rtol=1e-12)
