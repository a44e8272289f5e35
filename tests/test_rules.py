"""Every rule that is a table: golden vectors, and every layer against its dense matrix, in float64 and float32."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_lrp import rewrite
from onnx_lrp.composite import RULES
from onnx_lrp.rewrite import rewrite_with_accounts
from tests.dense_oracle import ORACLES, matrix_of
from tests.layers import BATCH, LAYERS, Net, book, quarters, run_layer
from tests.support import run_double

EPSILON = {"epsilon": 0.25}
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "epsilon": [EPSILON],
    "lrp_0": [{}],
    "norm": [EPSILON],
    "zplus": [EPSILON],
    "alpha_beta": [EPSILON, {"alpha": 1.5, "beta": 0.5} | EPSILON, {"alpha": 1, "beta": 0} | EPSILON],
    "gamma": [EPSILON, {"gamma": 2.0} | EPSILON],
    "wsquare": [EPSILON],
    "flat": [EPSILON],
    "zbox": [{"low": -2.5, "high": 3.0} | EPSILON],
}
# Rules that no matrix defines; each has its tests in test_special_rules.py, which checks that it does.
NOT_TABLES = frozenset(
    "pass route winner_takes_all proportional batchnorm_absolute share gate factor uniform softmax stop gradient".split()
)
# What is known of the layer's input, and how relevance arrives at its output.
SETTINGS = [("mixed", "plain"), ("mixed", "relu"), ("mixed", "clip"), ("mixed", "maxpool"), ("nonnegative", "plain"), ("nonnegative", "relu"), ("nonpositive", "plain")]
CASES = [(rule, number) for rule in ORACLES for number in range(len(PARAMETERS[rule]))]


def test_every_rule_has_an_oracle() -> None:
    """A rule that is added to RULES has to be added to the dense oracle, or to the special rules with their own tests."""
    assert set(RULES) == set(ORACLES) | NOT_TABLES
    assert set(PARAMETERS) == set(ORACLES)


# ---- golden vectors --------------------------------------------------------------------------------------------------

X = [1.0, -2.0, 0.5, 0.0]
WEIGHT = [[0.5, -1, 2, 1], [-1.5, 0.25, 1, -0.5], [1, 1, -1, 0.5]]
BIAS = [0.1, -0.2, 0.3]
RELEVANCE = [1.0, -0.5, 2.0]
GOLDEN: list[tuple[str, dict[str, Any], bool, list[float]]] = [
    ("epsilon", {"epsilon": 1e-6}, True, [-1.96895264, 3.74182722, 1.25816908, 0]),
    ("epsilon", {"epsilon": 0.25}, True, [-1.6340556, 3.14989608, 1.07760056, 0]),
    ("epsilon", {"epsilon": 1e-6}, False, [-1.69047501, 3.07142674, 1.11904698, 0]),
    ("zplus", {}, True, [1.67734921, 0.5555554, -0.2222213, 0]),
    ("alpha_beta", {"alpha": 2, "beta": 1}, True, [3.69560735, -0.37525225, -0.84444244, 0]),
    ("gamma", {"gamma": 0.25}, True, [-1.37366743, 3.15639113, 1.07381991, 0]),
    ("zbox", {"low": -3.0, "high": 3.0}, True, [0.82471768, 0.50118831, 0.75519899, 0.41889479]),
    ("wsquare", {}, True, [0.32645526, 0.74987207, 1.09898728, 0.27474682]),
    ("flat", {}, True, [0.62499984] * 4),
]


@pytest.mark.parametrize(("rule", "parameters", "with_bias", "expected"), GOLDEN)
def test_golden_vector(rule: str, parameters: dict[str, Any], with_bias: bool, expected: list[float]) -> None:
    """The published numbers, through a Gemm; and the oracle's own."""
    net = Net()
    extra = [net.const(BIAS)] if with_bias else []
    model = net.model(net("Gemm", net.input("x", "N", 4), net.const(WEIGHT), *extra, transB=1, name="layer"))
    explained = rewrite(model, book(({"name": "layer"}, rule, parameters)), start="input").model
    found = run_double(explained, {"x": np.array([X], np.float32), "start": np.array([RELEVANCE])})["relevance/x"]
    np.testing.assert_allclose(found, [expected], atol=1e-6)
    bias = np.array(BIAS if with_bias else [0.0] * 3)
    dense = ORACLES[rule](np.array(WEIGHT), bias, np.array(X), np.array(RELEVANCE), **parameters)
    np.testing.assert_allclose(dense.inputs, expected, atol=1e-8)


# ---- every layer -----------------------------------------------------------------------------------------------------


@functools.cache
def dense(layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return W and b of a layer."""
    return matrix_of(lambda inputs: run_layer(layer, inputs), LAYERS[layer].shapes)


def layers_for(rule: str) -> list[str]:
    """Return the layers that a rule is tested on."""
    return [name for name, layer in LAYERS.items() if not (layer.mean and rule in ("wsquare", "flat"))]


def stack(rule: str, sign: str, arrival: str) -> tuple[onnx.ModelProto, dict[str, tuple[list[str], str]]]:
    """Put all layers side by side in one model; return it, and per layer the tensors it reads and makes."""
    net = Net()
    tensors, ends = {}, []
    for name in layers_for(rule):
        layer = LAYERS[name]
        inputs = []
        for i, shape in enumerate(layer.shapes):
            axes: list[int | str] = list(shape)
            axes.insert(layer.batch_axis, "N")
            x = net.input(f"{name}/x{i}", *axes)
            if sign != "mixed":
                x = net("Relu", x)
            inputs.append(net("Neg", x) if sign == "nonpositive" else x)
        net.rng = np.random.default_rng(sorted(LAYERS).index(name))
        z = layer.build(net, inputs, f"layer/{name}")
        tensors[name] = (inputs, z)
        if arrival == "relu":
            z = net("Relu", z)
        elif arrival == "clip":
            z = net("Clip", z, net.const(0), net.const(1.5))
        elif arrival == "maxpool":
            rows = net("Reshape", z, net.const([0, 1, 1, -1], np.int64))
            z = net("MaxPool", rows, kernel_shape=[1, 2], strides=[1, 1 if len(ends) % 2 else 2])
        ends.append(net("Flatten", z))
    joined = net("Concat", *ends, axis=1)
    if arrival != "plain":
        width = onnx.shape_inference.infer_shapes(net.model(joined)).graph.output[0].type.tensor_type.shape.dim[1].dim_value
        joined = net("Gemm", joined, net.weight(width, 4), net.weight(4), name="head")
    return net.model(joined), tensors


def feeds_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Return quarters for every graph input; the last sample is all zeros, so that outputs without a bias are, too."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for info in model.graph.input:
        shape = tuple(d.dim_value or BATCH for d in info.type.tensor_type.shape.dim)
        x = quarters(rng, shape)
        batch_axis = [bool(d.dim_param) for d in info.type.tensor_type.shape.dim].index(True)
        np.moveaxis(x, batch_axis, 0)[-1] = 0
        feeds[info.name] = x
    return feeds


def run_single(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model in float32 by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def rows_of(array: np.ndarray, layer: str) -> np.ndarray:
    """Return an input of a layer, one row per sample."""
    return np.moveaxis(array, LAYERS[layer].batch_axis, 0).reshape(BATCH, -1)


@pytest.mark.parametrize(("sign", "arrival"), SETTINGS)
@pytest.mark.parametrize(("rule", "number"), CASES)
def test_against_the_dense_matrix(rule: str, number: int, sign: str, arrival: str) -> None:
    """Relevance of every layer's input is that of its dense matrix: 1e-9 in float64, 1e-5 in float32."""
    parameters = PARAMETERS[rule][number]
    model, tensors = stack(rule, sign, arrival)
    wanted = [t for inputs, z in tensors.values() for t in (*inputs, z)]
    explained = rewrite(model, book(({"name": "layer/*"}, rule, parameters)), layers=wanted, start="input").model
    feeds = feeds_of(model)
    start = next(i for i in explained.graph.input if i.name == "start").type.tensor_type.shape.dim[1].dim_value
    feeds["start"] = np.random.default_rng(1).standard_normal((BATCH, start)).astype(np.float32)
    exact, rounded = run_double(explained, feeds), run_single(explained, feeds)
    signed = {"mixed": lambda x: x, "nonnegative": lambda x: np.maximum(x, 0), "nonpositive": lambda x: -np.maximum(x, 0)}[sign]
    wrong = []
    for name, (inputs, z) in tensors.items():
        w, b = dense(name)
        xs = [signed(feeds[f"{name}/x{i}"].astype(np.float64)) for i in range(len(inputs))]
        x = np.concatenate([rows_of(v, name) for v in xs], axis=1)
        r = exact[f"relevance/{z}"].reshape(BATCH, -1)
        expected = np.stack([ORACLES[rule](w, b, x[n], r[n], **parameters).inputs for n in range(BATCH)])
        for found, limit in ((exact, 1e-9), (rounded, 1e-5)):
            rows = np.concatenate([rows_of(found[f"relevance/{t}"], name) for t in inputs], axis=1)
            scale = np.abs(expected).max() or 1.0
            error = np.abs(rows - expected).max() / scale
            if not error <= limit:
                wrong.append(f"{name}: {error:.1e} > {limit}")
    assert not wrong


def test_accounts() -> None:
    """Placeholder of the ledger, see test_ledger.py."""
    assert rewrite_with_accounts
