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
from onnx_lrp.errors import RuleError
from tests.dense_oracle import ORACLES, matrix_of
from tests.layers import BATCH, LAYERS, Net, book, quarters, run_layer
from tests.support import run_double

EPSILON = {"epsilon": 0.25}
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "epsilon": [EPSILON],
    "lrp_0": [{}],
    "norm": [EPSILON],
    "zplus": [EPSILON, {"bias": False} | EPSILON],
    "alpha_beta": [EPSILON, {"alpha": 1.5, "beta": 0.5} | EPSILON, {"alpha": 1, "beta": 0} | EPSILON],
    "gamma": [EPSILON, {"gamma": 2.0} | EPSILON],
    "wsquare": [EPSILON],
    "wplus": [EPSILON],
    "flat": [EPSILON],
    "zbox": [{"low": -2.5, "high": 3.0} | EPSILON],
}
# Rules that no matrix defines; each has its tests in test_special_rules.py, which checks that it does.
NOT_TABLES = frozenset(
    {"pass", "route", "winner_takes_all", "proportional", "batchnorm_absolute", "share", "gate", "factor", "uniform"}
    | {"softmax", "normalization", "stop", "gradient"}
)
# What is known of the layer's input, how relevance arrives at its output, and the sign of all weights and biases.
SETTINGS = [
    ("mixed", "plain", 0),
    ("mixed", "relu", 0),
    ("mixed", "clip", 0),
    ("capped", "clip_half", 0),
    ("mixed", "clip_top", 0),
    ("mixed", "maxpool", 0),
    ("mixed", "plain", 1),
    ("mixed", "relu", -1),
    ("nonnegative", "plain", 0),
    ("nonnegative", "relu", 0),
    ("nonnegative", "relu", 1),
    ("nonnegative", "plain", -1),
    ("nonpositive", "plain", 0),
    ("nonpositive", "relu", -1),
]
# All of them for rules that split by sign; for others how relevance arrives, or what is known of the input.
ARRIVALS = [setting for setting in SETTINGS if setting[0] != "nonnegative" and setting[2] == 0]
SIGNS = [setting for setting in SETTINGS if setting[1] == "plain"]
CASES = [
    *((rule, 0, *setting) for rule in ("zplus", "alpha_beta", "gamma") for setting in SETTINGS),
    *((rule, 0, *setting) for rule in ("epsilon", "lrp_0") for setting in ARRIVALS),
    *((rule, 0, *setting) for rule in ("zbox", "wsquare", "wplus", "flat") for setting in SIGNS),
    *((rule, k, *setting) for rule in ORACLES for k in range(1, len(PARAMETERS[rule])) for setting in SETTINGS[:2]),
    ("norm", 0, *SETTINGS[0]),
]


def test_every_rule_has_an_oracle() -> None:
    """A rule that is added to RULES has to be added to the dense oracle, or to the special rules and their tests."""
    assert set(RULES) == set(ORACLES) | NOT_TABLES
    assert set(PARAMETERS) == set(ORACLES) == {rule for rule, *_ in CASES}


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
    ("zplus", {"bias": False}, True, [2.14285510, 0.57142841, -0.21428480, 0]),
    ("wplus", {}, True, [0.94285678, 0.69999976, 0.17142873, 0.68571404]),
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
def dense(layer: str, weights: int) -> tuple[np.ndarray, np.ndarray]:
    """Return W and b of a layer."""
    return matrix_of(lambda inputs: run_layer(layer, inputs, weights), LAYERS[layer].shapes)


def layers_for(rule: str) -> list[str]:
    """Return the layers that a rule is tested on."""
    return [name for name, layer in LAYERS.items() if not (layer.mean and rule in ("wsquare", "flat"))]


def stack(rule: str, sign: str, arrival: str, weights: int) -> tuple[onnx.ModelProto, dict[str, tuple[list[str], str]]]:
    """Put all layers side by side in one model; return it, and per layer the tensors it reads and makes."""
    net = Net(sign=weights)
    tensors, ends = {}, []
    for name in layers_for(rule):
        layer = LAYERS[name]
        inputs = []
        for i, shape in enumerate(layer.shapes):
            axes: list[int | str] = list(shape)
            axes.insert(layer.batch_axis, "N")
            x = net.input(f"{name}/x{i}", *axes)
            if sign == "capped":
                x = net("Clip", x, "", net.const(0.5))
            elif sign != "mixed":
                x = net("Relu", x)
            inputs.append(net("Neg", x) if sign == "nonpositive" else x)
        net.rng = np.random.default_rng(sorted(LAYERS).index(name))
        z = layer.build(net, inputs, f"layer/{name}")
        tensors[name] = (inputs, z)
        if arrival == "relu":
            z = net("Relu", z)
        elif arrival == "clip":
            z = net("Clip", z, net.const(0), net.const(1.5))
        elif arrival == "clip_half":
            z = net("Clip", z, net.const(0.5), net.const(1.5))
        elif arrival == "clip_top":
            z = net("Clip", z, "", net.const(1.5))
        elif arrival == "maxpool":
            rows = net("Reshape", z, net.const([0, 1, 1, -1], np.int64))
            z = net("MaxPool", rows, kernel_shape=[1, 2], strides=[1, 1 if len(ends) % 2 else 2])
        ends.append(net("Flatten", z))
    joined = net("Concat", *ends, axis=1)
    if arrival != "plain":
        width = (
            onnx.shape_inference.infer_shapes(net.model(joined)).graph.output[0].type.tensor_type.shape.dim[1].dim_value
        )
        joined = net("Gemm", joined, net.weight(width, 4), net.weight(4), name="head")
    return net.model(joined), tensors


def feeds_of(model: onnx.ModelProto, zeros: bool) -> dict[str, np.ndarray]:
    """Return numbers for every graph input.

    With zeros they are quarters, so that some outputs are exactly zero, and the last sample is all zeros.
    """
    rng = np.random.default_rng(0)
    feeds = {}
    for info in model.graph.input:
        shape = tuple(d.dim_value or BATCH for d in info.type.tensor_type.shape.dim)
        x = quarters(rng, shape) if zeros else rng.standard_normal(shape).astype(np.float32)
        batch_axis = [bool(d.dim_param) for d in info.type.tensor_type.shape.dim].index(True)
        if zeros:
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


def known_sign(sign: str, x: np.ndarray) -> np.ndarray:
    """Return what the layer sees of a graph input."""
    x = x.astype(np.float64)
    if sign == "capped":
        return np.minimum(x, 0.5)
    return {"mixed": x, "nonnegative": np.maximum(x, 0), "nonpositive": -np.maximum(x, 0)}[sign]


def rows_of(array: np.ndarray, layer: str) -> np.ndarray:
    """Return an input of a layer, one row per sample."""
    return np.moveaxis(array, LAYERS[layer].batch_axis, 0).reshape(BATCH, -1)


@pytest.mark.parametrize(("rule", "number", "sign", "arrival", "weights"), CASES)
def test_against_the_dense_matrix(rule: str, number: int, sign: str, arrival: str, weights: int) -> None:
    """Relevance of every layer's input is that of its dense matrix: 1e-9 in float64, 1e-5 in float32."""
    parameters = PARAMETERS[rule][number]
    model, tensors = stack(rule, sign, arrival, weights)
    wanted = [t for inputs, z in tensors.values() for t in (*inputs, z)]
    explained = rewrite(model, book(({"name": "layer/*"}, rule, parameters)), layers=wanted, start="input").model
    # LRP-0 of relevance that is a multiple of the output itself divides nothing: 0/0 is that multiple there.
    feeds = feeds_of(model, zeros=(rule, arrival) != ("lrp_0", "maxpool"))
    start = next(i for i in explained.graph.input if i.name == "start").type.tensor_type.shape.dim[1].dim_value
    feeds["start"] = np.random.default_rng(1).standard_normal((BATCH, start)).astype(np.float32)
    exact, rounded = run_double(explained, feeds), run_single(explained, feeds)
    wrong = []
    for name, (inputs, z) in tensors.items():
        w, b = dense(name, weights)
        xs = [known_sign(sign, feeds[f"{name}/x{i}"]) for i in range(len(inputs))]
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


# ---- the box of z-box ------------------------------------------------------------------------------------------------


def box_net(static: bool) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """Return a Conv of two channels and its dense matrix."""
    net = Net()
    z = net("Conv", net.input("x", 2 if static else "N", 2, 3, 3), net.weight(3, 2, 2, 2), net.weight(3), name="layer")
    model = net.model(z)

    def layer(inputs: list[np.ndarray]) -> np.ndarray:
        rows = [run_double(model, {"x": part})[z] for part in np.split(inputs[0], len(inputs[0]) // size)]
        return np.concatenate(rows)

    size = 2 if static else 1
    w, b = matrix_of(lambda inputs: layer([np.repeat(inputs[0], size, 0)])[::size], [(2, 3, 3)])
    return model, w, b


LOW, HIGH = np.array([-2.0, -1.5]), np.array([2.0, 3.0])
CHANNELS = {"low": LOW.reshape(1, 2, 1, 1), "high": HIGH.reshape(1, 2, 1, 1)}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("parameters", "feeds"),
    [
        ({"low": LOW.tolist(), "high": HIGH.tolist()}, {}),
        ({"low": "input", "high": "input"}, CHANNELS),
        ({"low": "input", "high": 3.0}, {"low": np.full((1, 1, 1, 1), -1.0)}),
        ({}, {}),
    ],
    ids=["per channel", "fed", "one fed", "own range"],
)
def test_zbox_bounds(parameters: dict[str, Any], feeds: dict[str, np.ndarray], static: bool) -> None:
    """Bounds are numbers, numbers per channel, or graph inputs that default to the range of each sample."""
    model, w, b = box_net(static)
    method = book(({"name": "layer"}, "zbox", parameters | EPSILON))
    explained = rewrite(model, method, start="input").model
    rng = np.random.default_rng(2)
    x, r = rng.standard_normal((2, 2, 3, 3)), rng.standard_normal((2, 3, 2, 2))
    found = run_double(explained, {"x": x, "start": r, **feeds})["relevance/x"]
    for n in range(2):
        bounds = {"low": x[n].min(), "high": x[n].max()}
        for key in bounds:
            if isinstance(parameters.get(key, "input"), str):
                bounds[key] = feeds.get(key, bounds[key])
            else:
                bounds[key] = np.reshape(parameters[key], (-1, 1, 1))
            bounds[key] = np.broadcast_to(bounds[key], (1, 2, 3, 3)).reshape(-1)
        expected = ORACLES["zbox"](w, b, x[n].reshape(-1), r[n].reshape(-1), **bounds, **EPSILON).inputs
        np.testing.assert_allclose(found[n].reshape(-1), expected, rtol=1e-9, atol=1e-12)


def test_zbox_of_two_inputs() -> None:
    """A picture and a vector have bounds of their own, since one tensor cannot bound both."""
    net = Net()
    picture, vector = net.input("picture", "N", 2, 3, 3), net.input("vector", "N", 4)
    h = net("Flatten", net("Conv", picture, net.weight(3, 2, 3, 3), name="layer/1"))
    z = net("Add", h, net("Gemm", vector, net.weight(4, 3), name="layer/2"))
    explained = rewrite(net.model(z), book(({"name": "layer/*"}, "zbox", {}))).model
    named = {i.name: len(i.type.tensor_type.shape.dim) for i in explained.graph.input}
    ranks = {name: rank for name, rank in named.items() if name.startswith(("low", "high"))}
    assert sorted(ranks.values()) == [2, 2, 4, 4]
    rng = np.random.default_rng(3)
    feeds = {"picture": rng.standard_normal((2, 2, 3, 3)), "vector": rng.standard_normal((2, 4))}
    assert all(np.isfinite(found).all() for found in run_double(explained, feeds).values())


def test_zbox_wants_a_number_for_every_channel() -> None:
    model, _, _ = box_net(static=False)
    with pytest.raises(RuleError, match="zbox has 3 numbers for low, but 'x' has 2 channels"):
        rewrite(model, book(({"name": "layer"}, "zbox", {"low": [-1.0, -1.0, -1.0], "high": 1.0})))
