"""Models with graphs inside their nodes, on their way to the working opset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_lrp import model as models
from onnx_lrp.errors import ModelError
from onnx_lrp.opsets import WORKING_OPSET, all_graphs, opset_of
from tests.support import RNG, numbers

SHARED = Path(os.environ.get("ONNX_LRP_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "models"
VOICE = SHARED / "silero_vad_16k_if_lstm.onnx"
node = helper.make_node


def floats(name: str, shape: Sequence[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def flag(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.BOOL, [])


def branch(name: str, nodes: Sequence[NodeProto], output: str, **weights: np.ndarray) -> GraphProto:
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    return helper.make_graph(list(nodes), name, [], [floats(output)], tensors, doc_string=f"about {name}")


def nested() -> ModelProto:
    """An If in an If at opset 9: every branch captures, holds weights, and has operators that opset 18 writes anew."""
    inner = node(
        "If",
        ["other"],
        ["picked"],
        name="inner",
        then_branch=branch("averaging", [node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=1, name="same")], "m"),
        else_branch=branch("squeezing", [node("Softmax", ["b"], ["s"], axis=0, name="same")], "s"),
    )
    then = branch(
        "scaling",
        [
            node("Mul", ["x", "k"], ["a"], name="same"),
            node("Slice", ["x"], ["b0"], starts=[1], ends=[2], axes=[1]),
            node("Add", ["b0", "wide"], ["b1"]),
            node("ReduceSum", ["b1"], ["b"], axes=[1], doc_string="of many"),
            inner,
        ],
        "picked",
        k=np.array([2], np.float32),
        wide=numbers(1, 600),
    )
    other = branch(
        "softly",
        [
            node("Softmax", ["warm"], ["q"], axis=0),
            node("MatMul", ["q", "w"], ["v"]),
            node("ReduceMax", ["v"], ["r"], axes=[1]),
        ],
        "r",
    )
    # Names as ONNX's converter gives them to what it adds, as in a model that it made.
    nodes = [node("Relu", ["x"], ["warm"], name="same")]
    nodes += [node("ReduceSum", ["warm"], [f"_v_{i}"], axes=[1]) for i in range(12)]
    nodes += [
        node("If", ["c"], ["y"], name="outer", doc_string="one of two", then_branch=then, else_branch=other),
        node("Sum", ["y", *(f"_v_{i}" for i in range(12))], ["z"]),
    ]
    nodes[-2].metadata_props.add(key="origin", value="here")
    graph = helper.make_graph(
        nodes,
        "nested",
        [floats("x", ["N", 5]), flag("c"), flag("other")],
        [floats("z", ["N", 1])],
        [numpy_helper.from_array(numbers(5, 300), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
    onnx.checker.check_model(model)
    return model


def whole(source: models.Source) -> ModelProto:
    """The skeleton with its weights back in place."""
    model = ModelProto()
    model.CopyFrom(source.skeleton)
    inputs = [i for i in model.graph.input if i.name not in source.weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(source.weights.values())
    return model


def session(model: ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    return (n for graph in all_graphs(model.graph) for n in graph.node)


def test_graphs_inside_nodes_are_brought_up_and_compute_the_same() -> None:
    source = models.load(nested())
    assert opset_of(source.skeleton) == WORKING_OPSET
    onnx.checker.check_model(source.skeleton, full_check=True)
    old, new = session(source.original), session(whole(source))
    x = numbers(3, 5)
    for c in (False, True):
        for other in (False, True):
            feeds = {"x": x, "c": np.array(c), "other": np.array(other)}
            np.testing.assert_array_equal(new.run(None, feeds)[0], old.run(None, feeds)[0])


def test_docs_and_names_inside_nodes_are_kept_and_names_are_unique() -> None:
    source = models.load(nested())
    names = [n.name for n in all_nodes(source.skeleton)]
    assert len(set(names)) == len(names)
    assert "" not in names
    assert {"outer", "inner", "same", "same_0"} <= set(names)
    docs = {n.doc_string for n in all_nodes(source.skeleton)} | {
        g.doc_string for g in all_graphs(source.skeleton.graph)
    }
    assert {"one of two", "of many", "about averaging", "about softly"} <= docs
    outer = next(n for n in all_nodes(source.skeleton) if n.name == "outer")
    assert [(p.key, p.value) for p in outer.metadata_props] == [("origin", "here")]
    made = {o for n in source.skeleton.graph.node for o in n.output}
    assert {f"_v_{i}" for i in range(12)} <= made


@pytest.mark.parametrize(("outside", "inside"), [(11, 11), (13, 13), (13, 11), (17, 12), (18, 13), (20, 15)])
def test_functions_that_hold_graphs_are_inlined(outside: int, inside: int) -> None:
    """A local function with an If, called twice, of the model's opset or an older one."""
    axes = {"axes": [1], "keepdims": 1}
    function = helper.make_function(
        "my.ops",
        "Either",
        ["a", "c"],
        ["b"],
        [
            node(
                "If",
                ["c"],
                ["b"],
                then_branch=branch("most", [node("ReduceMax", ["a"], ["m"], **axes)], "m"),
                else_branch=branch("least", [node("ReduceMin", ["a"], ["n"], **axes)], "n"),
            )
        ],
        [helper.make_opsetid("", inside)],
    )
    graph = helper.make_graph(
        [
            node("Either", ["x", "c"], ["p"], domain="my.ops"),
            node("Sub", ["x", "p"], ["q"]),
            node("Either", ["q", "d"], ["y"], domain="my.ops"),
        ],
        "functions",
        [floats("x", ["N", 5]), flag("c"), flag("d")],
        [floats("y", ["N", 1])],
    )
    imports = [helper.make_opsetid("", outside), helper.make_opsetid("my.ops", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    source = models.load(model)
    assert [n.op_type for n in source.skeleton.graph.node] == ["If", "Sub", "If"]
    x = numbers(3, 5)
    for c, d in ((False, True), (True, False), (True, True)):
        p = x.max(1, keepdims=True) if c else x.min(1, keepdims=True)
        q = x - p
        y = q.max(1, keepdims=True) if d else q.min(1, keepdims=True)
        found = session(source.skeleton).run(None, {"x": x, "c": np.array(c), "d": np.array(d)})[0]
        np.testing.assert_array_equal(found, y)


def test_a_function_that_is_newer_than_its_model() -> None:
    """What ONNX's converter cannot bring down is said in one line."""
    branches = {key: branch(key, [node("Neg", ["a"], ["m"])], "m") for key in ("then_branch", "else_branch")}
    function = helper.make_function(
        "my.ops", "Either", ["a", "c"], ["b"], [node("If", ["c"], ["b"], **branches)], [helper.make_opsetid("", 17)]
    )
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("my.ops", 1)]
    call = node("Either", ["x", "c"], ["y"], domain="my.ops")
    graph = helper.make_graph([call], "newer", [floats("x", [1, 5]), flag("c")], [floats("y", [1, 5])])
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    with pytest.raises(ModelError, match=r"newer: its local functions cannot be inlined .*at one opset"):
        models.load(model)


@pytest.mark.skipif(not VOICE.exists(), reason="the trained models do not lie beside the checkout")
@pytest.mark.parametrize("rate", [16000, 8000])
def test_the_nested_voice_detector_computes_the_same(rate: int) -> None:
    """Twelve Ifs in one another from opset 15, LSTMs inside."""
    source = models.load(VOICE)
    assert opset_of(source.skeleton) == WORKING_OPSET
    sound = RNG.uniform(-1, 1, (1, 576)).astype(np.float32)
    feeds = {"input": sound, "state": numbers(2, 1, 128), "sr": np.array(rate)}
    for found, expected in zip(
        session(whole(source)).run(None, feeds), session(source.original).run(None, feeds), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
