"""Operators of ai.onnx.ml: what the view computes is what ONNX Runtime computes; relevance and gradients by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lrp
from onnx_lrp.errors import InputError, UnsupportedOps
from onnx_lrp.verify import verify
from tests.adjoint_reference import run_onnxruntime
from tests.support import worst
from tests.test_canonical import replayed

FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
W = np.array([[0.5, -0.25, 1.0], [-1.0, 0.75, 0.5], [0.25, 0.5, -0.75]], np.float32)
B = np.array([0.25, -0.5, 0.125], np.float32)
X = np.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], np.float32)


def ml(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=op.lower(), domain="ai.onnx.ml", **attrs)


def model(
    nodes: list[onnx.NodeProto],
    outputs: dict[str, tuple[int, list[Any]]],
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    opsets: tuple[tuple[str, int], ...] = (("", 18), ("ai.onnx.ml", 1)),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "classical",
        [helper.make_tensor_value_info(n, *spec) for n, spec in (inputs or {"x": (FLOAT, ["N", 3])}).items()],
        [helper.make_tensor_value_info(n, *spec) for n, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets], ir_version=10)


def classifier(after: str, rows: int, outputs: tuple[str, ...] = ("z",), **options: Any) -> onnx.ModelProto:
    """A LinearClassifier of two classes (one row, or two) or three."""
    attrs = {
        "coefficients": W[:rows].reshape(-1).tolist(),
        "intercepts": B[:rows].tolist(),
        "classlabels_ints": list(range(max(rows, 2))),
        "post_transform": after,
    }
    types = {"label": (INT64, ["N"]), "z": (FLOAT, ["N", max(rows, 2)])}
    node = ml("LinearClassifier", ["x"], ["label", "z"], **attrs)
    return model([node], {name: types[name] for name in outputs}, **options)


def regressor(after: str, targets: int, intercepts: bool = True) -> onnx.ModelProto:
    attrs = {"coefficients": W[:targets].reshape(-1).tolist(), "targets": targets, "post_transform": after}
    if intercepts:
        attrs["intercepts"] = B[:targets].tolist()
    return model([ml("LinearRegressor", ["x"], ["z"], **attrs)], {"z": (FLOAT, ["N", targets])})


def one(op: str, *extra: str, weights: dict[str, np.ndarray] | None = None, kind: int = FLOAT, **attrs: Any) -> Any:
    inputs = {"x": (kind, ["N", 3])}
    return model([ml(op, ["x", *extra], ["z"], **attrs)], {"z": (FLOAT, ["N", None])}, inputs, weights)


MODELS = {
    **{
        f"classifier_{after}_{rows}": classifier(after, rows)
        for after in ("NONE", "LOGISTIC", "SOFTMAX")
        for rows in (1, 2, 3)
    },
    **{f"regressor_{after}_{n}": regressor(after, n) for after in ("NONE", "LOGISTIC", "SOFTMAX") for n in (1, 2)},
    "regressor_without_intercepts": regressor("NONE", 2, intercepts=False),
    "scaler": one("Scaler", offset=[1.0, 2.0, -3.0], scale=[0.5, 2.0, 4.0]),
    "scaler_of_one": one("Scaler", offset=[1.0], scale=[0.5]),
    "scaler_of_doubles": one("Scaler", offset=[1.0], scale=[0.5], kind=DOUBLE),
    **{f"normalizer_{norm}": one("Normalizer", norm=norm) for norm in ("MAX", "L1", "L2")},
    "imputer": one("Imputer", imputed_value_floats=[9.0, 8.0, 7.0], replaced_value_float=0.5),
    "imputer_of_one": one("Imputer", imputed_value_floats=[9.0], replaced_value_float=0.25),
    "extractor": one("ArrayFeatureExtractor", "i", weights={"i": np.array([[2, 0]])}),
    "vectorizer": one("FeatureVectorizer", "x", inputdimensions=[3, 3]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_view_computes_what_the_runtime_computes(name: str) -> None:
    proto = MODELS[name]
    dtype = np.float64 if proto.graph.input[0].type.tensor_type.elem_type == DOUBLE else np.float32
    found = run_onnxruntime(replayed(proto)[1], {"x": X.astype(dtype)})
    assert worst(found["replayed/z"], found["z"]) < 1e-6


JACOBIANS = {
    "scaler": np.diag([0.5, 2.0, 4.0]),
    "scaler_of_one": np.diag([0.5] * 3),
    "imputer": np.diag([1.0, 1.0, 0.0]),
    "extractor": np.array([[0, 0, 1], [1, 0, 0]]),
    "vectorizer": np.concatenate([np.eye(3), np.eye(3)]),
    "regressor_NONE_2": W[:2],
    "classifier_NONE_1": np.concatenate([-W[:1], W[:1]]),
    "classifier_NONE_3": W,
    "normalizer_L1": (np.eye(3) - np.outer(X[0], np.sign(X[0])) / 3.5) / 3.5,
    "normalizer_L2": (np.eye(3) - np.outer(X[0], X[0]) / 5.25) / np.sqrt(5.25),
    "normalizer_MAX": np.array([[0, 0, 0], [2, 1, 0], [-0.5, 0, 1]]),
    "classifier_LOGISTIC_1": np.concatenate([-W[:1], W[:1]]),  # of the logits: the head is stepped over
    "classifier_SOFTMAX_3": W,
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_gradients_by_hand(name: str) -> None:
    """One row per target, for the first sample."""
    jacobian = JACOBIANS[name]
    for target, row in enumerate(jacobian):
        explained = onnx_lrp.rewrite(MODELS[name], "gradient", target=target)
        found = run_onnxruntime(explained.model, {"x": X[:1]})
        np.testing.assert_allclose(found["relevance/x"][0], row, atol=1e-6)


@pytest.mark.parametrize(("rows", "after"), [(1, "LOGISTIC"), (1, "NONE"), (3, "SOFTMAX"), (3, "LOGISTIC")])
def test_relevance_of_a_linear_classifier(rows: int, after: str) -> None:
    """Weight times feature, of the logit of the class; with the bias it is the whole score."""
    weights, biases = (np.concatenate([-W[:1], W[:1]]), np.array([-B[0], B[0]])) if rows == 1 else (W, B)
    if after == "NONE":
        biases = np.array([1 - B[0], B[0]])  # the first of two classes has the score 1 - z
    explained = onnx_lrp.Explainer(classifier(after, rows, ("label", "z")), "lrp_0", device="cpu", ledger=True)
    for target in range(max(rows, 2)):
        found = explained(X, target=target)
        assert worst(found.relevance["x"], weights[target] * X) < 1e-5
        assert worst(found.score, X @ weights[target] + biases[target]) < 1e-5
        np.testing.assert_allclose(found.absorbed, biases[target], rtol=1e-5)


def pipeline(**options: Any) -> onnx.ModelProto:
    """Imputer, Scaler, LinearClassifier, Normalizer: as a logistic regression is exported."""
    nodes = [
        ml("Imputer", ["x"], ["filled"], imputed_value_floats=[1.0, 2.0, 3.0], replaced_value_float=float("nan")),
        ml("Scaler", ["filled"], ["scaled"], offset=[0.5, 0.5, 0.5], scale=[2.0, 4.0, 1.0]),
        ml(
            "LinearClassifier",
            ["scaled"],
            ["label", "raw"],
            coefficients=W.reshape(-1).tolist(),
            intercepts=B.tolist(),
            classlabels_ints=[0, 1, 2],
            post_transform="SOFTMAX",
        ),
        ml("Normalizer", ["raw"], ["probabilities"], norm="L1"),
    ]
    return model(nodes, {"label": (INT64, ["N"]), "probabilities": (FLOAT, ["N", 3])}, **options)


def test_a_pipeline_is_explained_by_its_logits() -> None:
    """The label comes first, and probabilities are normalised after the softmax: the logits are found all the same."""
    explainer = onnx_lrp.Explainer(pipeline(), "lrp_0", device="cpu", ledger=True)
    scaled = (X - 0.5) * [2, 4, 1]
    logits = scaled @ W.T + B
    found = explainer(X)
    np.testing.assert_array_equal(found.target, logits.argmax(1))
    np.testing.assert_array_equal(found.outputs["label"], logits.argmax(1))
    assert worst(found.score, logits.max(1)) < 1e-5
    # Scaling is other units for the same features: relevance passes it.
    assert worst(found.relevance["x"], W[logits.argmax(1)] * scaled) < 1e-5
    assert verify(pipeline(), X, "epsilon").ok


def test_missing_values_are_filled_in_and_get_no_relevance() -> None:
    x = X.copy()
    x[0, 1] = np.nan
    for method in ("lrp_0", "gradient", "input_x_gradient"):
        found = onnx_lrp.Explainer(pipeline(), method, device="cpu", target=1)(x)
        whole = onnx_lrp.Explainer(pipeline(), method, device="cpu", target=1)(X)
        assert found.relevance["x"][0, 1] == 0
        there = ~np.isnan(x)
        np.testing.assert_allclose(found.relevance["x"][there], whole.relevance["x"][there], rtol=1e-5)


def test_a_domain_imported_twice() -> None:
    opsets = (("ai.onnx.ml", 1), ("", 18), ("", 18))
    explained = onnx_lrp.rewrite(pipeline(opsets=opsets), "epsilon")
    assert [o.domain for o in explained.model.opset_import] == ["ai.onnx.ml", ""]
    run_onnxruntime(explained.model, {"x": X})


def test_two_classes_of_one_sigmoid() -> None:
    """1 - sigmoid(z) next to sigmoid(z), as networks of scikit-learn end: each class has its logit."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["z"], "dense"),
        helper.make_node("Sigmoid", ["z"], ["p"], "sigmoid"),
        helper.make_node("Sub", ["one", "p"], ["q"], "other"),
        helper.make_node("Concat", ["q", "p"], ["y"], "both", axis=1),
    ]
    weights = {"w": W[:1].T.copy(), "one": np.ones(1, np.float32)}
    proto = model(nodes, {"y": (FLOAT, ["N", 2])}, weights=weights)
    for target, sign in ((0, -1), (1, 1)):
        found = onnx_lrp.Explainer(proto, "lrp_0", device="cpu", target=target)(X * 100)  # where a sigmoid is flat
        assert worst(found.relevance["x"], sign * W[0] * X * 100) < 1e-5
    replay = run_onnxruntime(replayed(proto)[1], {"x": X})
    assert worst(replay["replayed/y"], replay["y"]) < 1e-6


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(proto: onnx.ModelProto) -> str:
    with pytest.raises(UnsupportedOps) as caught:
        onnx_lrp.rewrite(proto, "epsilon")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


TREE = {
    "nodes_nodeids": [0, 1, 2],
    "nodes_treeids": [0, 0, 0],
    "nodes_featureids": [0, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_values": [0.5, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
    "n_targets": 1,
    "target_ids": [0, 0],
    "target_nodeids": [1, 2],
    "target_treeids": [0, 0],
    "target_weights": [1.0, 2.0],
}


@pytest.mark.parametrize(
    ("op", "attrs", "words"),
    [
        ("TreeEnsembleRegressor", TREE, "a decision tree has no derivative"),
        ("SVMRegressor", {"kernel_type": "RBF"}, "LinearSVC"),
        ("Binarizer", {"threshold": 0.5}, "a threshold has no derivative"),
        ("OneHotEncoder", {"cats_int64s": [0, 1]}, "categories have no derivative"),
        ("LinearRegressor", {"coefficients": [1.0, 2, 3], "post_transform": "PROBIT"}, "PROBIT"),
    ],
)
def test_what_has_no_derivative_says_so(op: str, attrs: dict[str, Any], words: str) -> None:
    text = refused(model([ml(op, ["x"], ["z"], **attrs)], {"z": (FLOAT, ["N", 1])}))
    assert f"{op.lower()} (ai.onnx.ml.{op}" in text
    assert words in text


def test_probabilities_in_dictionaries_need_another_export() -> None:
    proto = classifier("SOFTMAX", 3, ("label",))
    proto.graph.node.append(ml("ZipMap", ["z"], ["maps"], classlabels_int64s=[0, 1, 2]))
    maps = onnx.helper.make_map_type_proto(INT64, onnx.helper.make_tensor_type_proto(FLOAT, []))
    proto.graph.output.append(helper.make_value_info("maps", helper.make_sequence_type_proto(maps)))
    with pytest.raises(InputError, match="'zipmap': False") as caught:
        onnx_lrp.rewrite(proto, "epsilon")
    assert len(str(caught.value).splitlines()) == 1
