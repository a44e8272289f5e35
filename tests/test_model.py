"""Reading and writing models: every form of source, external data, metadata, opsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lrp
from onnx_lrp import model as models
from onnx_lrp.opsets import WORKING_OPSET, opset_of
from onnx_lrp.runtime import Session

SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes" / "shapes.onnx"


def dense(width: int = 600) -> onnx.ModelProto:
    """A Gemm with weights large enough to be set aside, and documentation everywhere."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.standard_normal((width, 3)).astype(np.float32), "w")
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="dense", doc_string="the only layer")
    node.metadata_props.add(key="origin", value="here")
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [weights],
        doc_string="about the graph",
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    model.producer_name, model.producer_version, model.domain, model.doc_string = "me", "7", "org.example", "about"
    model.metadata_props.add(key="labels", value="a,b,c")
    return model


def relevance(source: object, **options: object) -> np.ndarray:
    x = np.random.default_rng(1).random((2, 600), dtype=np.float32)
    return onnx_lrp.Explainer(source, "epsilon", device="cpu", **options)(x).relevance["x"]


def test_every_form_of_source_gives_the_same_relevance(tmp_path: Path) -> None:
    model = dense()
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    expected = relevance(path)
    for source in (str(path), path.read_bytes(), model, gs.import_onnx(model)):
        np.testing.assert_array_equal(relevance(source), expected)


def test_the_source_is_not_modified() -> None:
    model = dense()
    before = model.SerializeToString(deterministic=True)
    onnx_lrp.rewrite(model)
    assert model.SerializeToString(deterministic=True) == before


def test_documentation_and_versions_are_kept() -> None:
    source = dense()
    model = onnx_lrp.rewrite(source).model
    for field in ("producer_name", "producer_version", "domain", "doc_string", "ir_version"):
        assert getattr(model, field) == getattr(source, field)
    assert model.graph.doc_string == "about the graph"
    assert model.graph.node[0] == source.graph.node[0]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 19)]
    assert {p.key: p.value for p in model.metadata_props}["labels"] == "a,b,c"


def test_old_opsets_and_ir_versions_are_lifted() -> None:
    """At IR 3 initializers are listed among the inputs and are constants all the same."""
    w = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Softmax", ["a"], ["y"], axis=1)],
        "old",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4]), ("w", [4, 4]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [w],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 7)], ir_version=3)
    explained = onnx_lrp.rewrite(model, "epsilon")
    assert [i.name for i in explained.model.graph.input] == ["x", "target"]
    assert explained.explained == "a"
    assert opset_of(explained.model) == WORKING_OPSET
    x = np.arange(1, 5, dtype=np.float32)[None]
    np.testing.assert_allclose(onnx_lrp.Explainer(model, "epsilon")(x).relevance["x"], [[0, 0, 0, 4]], atol=1e-5)


def test_an_initializer_that_can_be_fed_is_no_constant() -> None:
    model = dense()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [600, 3]))
    explainer = onnx_lrp.Explainer(model, "epsilon")
    x = np.ones((1, 600), np.float32)
    other = np.zeros((600, 3), np.float32)
    other[:, 1] = 2
    np.testing.assert_allclose(explainer({"x": x, "w": other}).score, [1200], rtol=1e-6)
    assert [row.rule for row in explainer.explained.table] == ["epsilon(epsilon=1e-06)"]
    both = onnx_lrp.rewrite(model, "epsilon", inputs=["x", "w"])
    assert [row.rule for row in both.table] == ["share"]


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save_model(dense(), path, save_as_external_data=True, location="net.bin", size_threshold=0)
    assert (tmp_path / "net.bin").exists()
    return path


def test_external_data_is_taken_in(external: Path, tmp_path: Path) -> None:
    explained = onnx_lrp.rewrite(external, "epsilon")
    out = tmp_path / "elsewhere"
    out.mkdir()
    explained.save(out / "net.lrp.onnx")
    np.testing.assert_array_equal(relevance(external), relevance(dense()))
    assert [p.name for p in out.iterdir()] == ["net.lrp.onnx"]
    ort.InferenceSession(out / "net.lrp.onnx", providers=["CPUExecutionProvider"])


def test_above_the_limit_external_data_stays_by_reference(
    external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_PROTOBUF_LIMIT", 7000)
    explained = onnx_lrp.rewrite(external, "epsilon")
    assert explained.model.ByteSize() < 6000  # the weights are 7200 bytes
    Session(explained.model, device="cpu", folder=explained.source.folder)
    out = tmp_path / "elsewhere"
    out.mkdir()
    explained.save(out / "net.lrp.onnx")
    assert {p.name for p in out.iterdir()} == {"net.lrp.onnx", "net.bin"}
    session = ort.InferenceSession(out / "net.lrp.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).random((2, 600), dtype=np.float32)
    np.testing.assert_array_equal(session.run(["relevance/x"], {"x": x})[0], relevance(external))


def test_above_the_limit_weights_in_the_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explained = onnx_lrp.rewrite(dense(), "epsilon")
    monkeypatch.setattr(models, "_PROTOBUF_LIMIT", 100)
    explained.save(tmp_path / "net.lrp.onnx")
    assert (tmp_path / "net.lrp.onnx.data").exists()
    session = ort.InferenceSession(tmp_path / "net.lrp.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[1].name == "relevance/x"


def test_local_functions_are_inlined() -> None:
    relu = helper.make_function(
        "my.ops", "Act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 19)]
    )
    model = dense()
    model.graph.node.append(helper.make_node("Act", ["y"], ["z"], domain="my.ops", name="act"))
    model.graph.output[0].name = "z"
    model.functions.append(relu)
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    explained = onnx_lrp.rewrite(model)
    assert [row.op for row in explained.table] == ["Gemm", "Relu"]


def test_weights_are_derived_and_never_copied() -> None:
    """What is added does not grow with the weights: a Gemm of 600 and one of 60,000 inputs grow by the same bytes."""
    books = ("epsilon", "zplus", "epsilon_gamma_box", "epsilon_plus_flat")
    small, large = (
        [onnx_lrp.rewrite(source, book).model.ByteSize() - source.ByteSize() for book in books]
        for source in (dense(600), dense(60000))
    )
    np.testing.assert_allclose(large, small, atol=100)
