"""The explained graph as a file: names, docs, metadata, order, equal bytes, the switch, what portable leaves out."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnx_lrp
from onnx_lrp import rewrite
from onnx_lrp.composite import book_names
from onnx_lrp.errors import InputError, ModelError
from tests.layers import IR, OPSET, Net
from tests.support import run_double
from tests.test_ledger import feeds_for, source
from tests.test_rules import run_single

NETS = ("picture", "vector", "token")
MANY: dict[str, Any] = {"layers": ["Relu_4:y"], "ledger": True, "start": "input"}


def names(values: Any) -> list[str]:
    return [v.name for v in values]


# ---- what is added, and what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_source_comes_first_and_unchanged(name: str) -> None:
    """Inputs, nodes, weights and outputs of the source stand first, in their order, byte for byte."""
    before, after = source(name).graph, rewrite(source(name), ledger=True).model.graph
    for part in ("input", "output", "node", "initializer"):
        old, new = getattr(before, part), getattr(after, part)
        found = {v.name: v for v in new} if part == "initializer" else new[: len(old)]
        for k, value in enumerate(old):
            assert found[value.name if part == "initializer" else k] == value, part
    added = names(after.output)[len(before.output) :]
    assert added == [*(f"relevance/{i.name}" for i in before.input), "target_used", "score", "absorbed"]
    assert names(after.input)[len(before.input) :] == ["target"]


def test_outputs_are_those_of_the_source() -> None:
    for name in NETS:
        feeds = feeds_for(name)
        before, after = run_single(source(name), feeds), run_single(rewrite(source(name)).model, feeds)
        for output, value in before.items():
            np.testing.assert_allclose(after[output], value, rtol=1e-5, atol=1e-6)


def test_the_source_is_not_touched() -> None:
    model = source("picture")
    before = model.SerializeToString()
    rewrite(model, **MANY)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_of_cycles_is_as_it_was(collects: bool) -> None:
    """After a rewriting, and after one that ends with an error."""
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        rewrite(source("picture"))
        assert gc.isenabled() == collects
        with pytest.raises(InputError):
            rewrite(source("picture"), start="nowhere")  # type: ignore[arg-type]
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("name", NETS)
def test_every_added_node_says_what_it_is(name: str) -> None:
    """Names lrp/<source node>/<step>, a doc string, and the node and rule it stands for."""
    before, after = source(name).graph, rewrite(source(name), ledger=True).model.graph
    known = {*names(before.node), *names(before.input), *(o for n in before.node for o in n.output)}
    seen = set(names(before.node))
    for node in after.node[len(before.node) :]:
        assert node.name.startswith("lrp/")
        assert node.name not in seen
        seen.add(node.name)
        assert node.doc_string, node.name
        metadata = {p.key: p.value for p in node.metadata_props}
        assert set(metadata) == {"onnx_lrp.source", "onnx_lrp.rule"}, node.name
        assert metadata["onnx_lrp.source"] in known | {"target", "model", "ledger"}, node.name
    rules = {p.value for n in after.node for p in n.metadata_props if p.key == "onnx_lrp.rule"}
    assert rules >= {"flat(epsilon=1e-06)", "route"}


def test_metadata_of_the_model() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(source("picture"))
    model.metadata_props.add(key="author", value="somebody")
    model.doc_string, model.producer_name, model.producer_version, model.model_version = "a doc", "me", "1.2", 7
    model.graph.doc_string = "another doc"
    model.graph.node[2].doc_string = "a node's doc"
    model.graph.node[2].metadata_props.add(key="k", value="v")
    after = rewrite(model, "zplus", target=1, start="contrast").model
    for part in ("doc_string", "producer_name", "producer_version", "model_version", "ir_version", "domain"):
        assert getattr(after, part) == getattr(model, part)
    assert (after.ir_version, [(o.domain, o.version) for o in after.opset_import]) == (IR, [("", OPSET)])
    assert after.graph.doc_string == "another doc"
    assert after.graph.node[2] == model.graph.node[2]
    metadata = {p.key: p.value for p in after.metadata_props}
    assert metadata["author"] == "somebody"
    info = json.loads(metadata["onnx_lrp"])
    assert info["version"] == onnx_lrp.__version__
    assert (info["method"], info["target"], info["start"], info["explained"]) == ("zplus", 1, "contrast", "Gemm_20:y")
    assert info["source_sha256"] == hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    assert "zplus" in info["parameters"]


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_opset_and_ir_version_stay(opset: int) -> None:
    net = Net(opset=opset)
    x = net("Relu", net("Conv", net.input("x", "N", 2, 5), net.weight(3, 2, 3), name="conv"))
    model = net.model(net("ReduceMean", net("MaxPool", x, kernel_shape=[2]), net.const([1, 2], np.int64)))
    after = rewrite(model, portable=True).model
    assert [(o.domain, o.version) for o in after.opset_import] == [("", opset)]
    found = run_double(after, {"x": np.ones((2, 2, 5), np.float32)})
    assert np.isfinite(found["relevance/x"]).all()


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, MANY, {"portable": True, "target": 1}], ids=["plain", "many", "portable"])
def test_the_same_bytes_twice(options: dict[str, Any]) -> None:
    first, second = (rewrite(source("picture"), "epsilon_gamma_box", **options).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Whatever seed Python hashes its strings with."""
    path = tmp_path / "model.onnx"
    path.write_bytes(source("vector").SerializeToString())
    program = (
        "import sys, hashlib, onnx_lrp\n"
        "model = onnx_lrp.rewrite(sys.argv[1], ledger=True).model\n"
        "print(hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())\n"
    )
    root = str(Path(__file__).parent.parent)
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


# ---- names that are taken --------------------------------------------------------------------------------------------

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("target", {}),
    ("target_used", {}),
    ("score", {}),
    ("relevance/x", {}),
    ("absorbed", {"ledger": True}),
    ("start", {"start": "input"}),
    ("low", {"method": "epsilon_gamma_box"}),
    ("explain", {"switch": True}),
]


@pytest.mark.parametrize("place", ["input", "inner", "weight", "output"])
@pytest.mark.parametrize(("taken", "options"), TAKEN, ids=[t[0] for t in TAKEN])
def test_a_name_that_is_taken(taken: str, options: dict[str, Any], place: str) -> None:
    """One clear sentence that names the tensor."""
    net = Net()
    x = net.input("x", "N", 4)
    weight = net.weight(4, 4)
    if place == "weight":
        net.weights[-1].name = weight = taken
    h = net("MatMul", x, weight, out=taken if place == "inner" else "")
    if place == "input":
        h = net("Add", h, net.input(taken, "N", 4))
    model = net.model(net("Relu", h, out=taken if place == "output" else ""))
    with pytest.raises(ModelError, match=rf"the model already has a tensor named '{taken}'.*; rename it"):
        rewrite(model, **{"inputs": ["x"]} | options)


def test_a_target_that_is_fixed_needs_no_name() -> None:
    net = Net()
    model = net.model(net("MatMul", net.input("target", "N", 4), net.weight(4, 3)))
    assert names(rewrite(model, target="argmax").model.graph.input) == ["target"]


# ---- the switch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_switch(name: str) -> None:
    """On (the default) it is the plain explained model; off it is the source, and relevance is empty."""
    options: dict[str, Any] = {"ledger": True}
    plain, switched = (rewrite(source(name), switch=s, **options).model for s in (False, True))
    onnx.checker.check_model(switched, full_check=True)
    assert names(switched.graph.input) == [*names(plain.graph.input), "explain"]
    assert names(switched.graph.output) == names(plain.graph.output)
    feeds = feeds_for(name) | {"target": np.array([1, 0, 1])}
    expected = run_single(plain, feeds)
    for extra in ({}, {"explain": np.array(True)}):
        found = run_single(switched, feeds | extra)
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value, rtol=0, atol=1e-5 * np.abs(value).max())
    found = run_single(switched, feeds | {"explain": np.array(False)})
    own = run_single(source(name), feeds_for(name))
    for output, value in found.items():
        if output in own:
            np.testing.assert_allclose(value, own[output], rtol=1e-5, atol=1e-6)
        else:
            assert value.size == 0, output


def test_switch_with_further_inputs() -> None:
    model = rewrite(source("picture"), "epsilon_gamma_box", switch=True, start="input").model
    feeds = feeds_for("picture") | {"start": np.ones((3, 5), np.float32)}
    assert names(model.graph.input) == ["x", "target", "start", "low", "high", "explain"]
    plain = run_single(rewrite(source("picture"), "epsilon_gamma_box", start="input").model, feeds)
    found = run_single(model, feeds)
    expected = plain["relevance/x"]
    np.testing.assert_allclose(found["relevance/x"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- portable --------------------------------------------------------------------------------------------------------


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph and its subgraphs."""
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found.extend(all_nodes(attribute.g))
    return found


def forbidden(model: onnx.ModelProto) -> list[str]:
    """Return what WebGPU, OpenVINO or TensorRT lack."""
    found = [f"function {f.name}" for f in model.functions]
    for node in all_nodes(model.graph):
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MaxPool" and len(node.output) > 1:
            found.append(f"{node.name}: Indices")
        if node.op_type == "MaxUnpool":
            found.append(node.name)
        if node.op_type.startswith("Scatter") and attrs.get("reduction", b"none") != b"none":
            found.append(f"{node.name}: reduction")
        if node.domain not in ("", "ai.onnx"):
            found.append(node.name)
    return found


def pools() -> onnx.ModelProto:
    """Everything whose adjoint is easiest with what portable forbids."""
    net = Net()
    x = net.input("x", "N", 2, 8, 9)
    x = net("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    x = net("Gather", x, net.const([0, 1, 1, 3], np.int64), axis=2)
    x = net("Slice", x, *(net.const(i, np.int64) for i in ([3], [0], [3], [-2])))
    x = net("Pad", x, net.const([0, 0, 0, 1, 0, 0, 0, 1], np.int64), mode="reflect")
    return net.model(net("GlobalMaxPool", x))


@pytest.mark.parametrize("method", [*book_names(), "gradient"])
def test_portable_leaves_out_what_others_lack(method: str) -> None:
    for model in (pools(), *(source(name) for name in NETS)):
        assert not forbidden(rewrite(model, method, portable=True).model)


def test_portable_says_the_same() -> None:
    assert forbidden(rewrite(pools(), "gradient").model)  # or the test above would prove nothing
    feeds = {"x": np.random.default_rng(0).integers(-2, 3, (3, 2, 8, 9)).astype(np.float32)}
    for method in ("epsilon_plus", "gradient"):
        plain, portable = (run_single(rewrite(pools(), method, portable=p).model, feeds) for p in (False, True))
        for output, value in plain.items():
            np.testing.assert_allclose(portable[output], value, rtol=1e-5, atol=1e-6)


def test_only_standard_operators_are_emitted() -> None:
    for name in NETS:
        model = rewrite(source(name), ledger=True).model
        assert {n.domain for n in all_nodes(model.graph)} == {""}
        onnx.checker.check_model(model, full_check=True)
    assert TensorProto.DOUBLE not in {t.data_type for t in model.graph.initializer}
