"""Rules that are no tables: each against its formula in numpy, with plain and with factored relevance, and its ledger.

Those for products of two live tensors are in test_product_rules.py, normalizations in test_exact_rules.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnx_lrp.errors import RuleError
from onnx_lrp.rewrite import rewrite_with_accounts
from tests import test_exact_rules, test_product_rules
from tests.dense_oracle import ORACLES, matrix_of
from tests.layers import Net, accounts, book, explain, quarters, rewritten
from tests.support import RNG, numbers, run_double
from tests.test_rules import NOT_TABLES


def test_every_special_rule_has_a_test() -> None:
    """A rule that is added has to have a test of its name here, or among those of products."""
    tests = {*globals(), *vars(test_product_rules), *vars(test_exact_rules)}
    assert not [rule for rule in NOT_TABLES if not any(name.startswith(f"test_{rule}") for name in tests)]


# ---- pass, stop, uniform, gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Relu", "Tanh", "Sigmoid", "Erf"])
def test_pass_leaves_relevance_alone(op: str) -> None:
    net = Net()
    z = net(op, net.input("x", "N", 4), name="layer")
    feeds = {"x": numbers(3, 4), "r": numbers(3, 4)}
    np.testing.assert_array_equal(explain(net, z, "pass", feeds)["relevance/x"], feeds["r"])


@pytest.mark.parametrize("shape", [("N", 3, 1), ("N", 1, 4), ("N", 1, "T"), ("N", 1, 1)])
def test_pass_sums_what_was_broadcast(shape: tuple[int | str, ...]) -> None:
    """An offset or slope that is larger than the input stretches it."""
    net = Net()
    z = net("Add", net.input("x", *shape), net.const(numbers(1, 3, 4)), name="layer")
    x = numbers(*(2 if d == "N" else 1 if d == "T" else d for d in shape))
    r = numbers(2, 3, 4)
    expected = r.astype(np.float64)
    for axis, length in enumerate(x.shape):
        expected = expected.sum(axis, keepdims=True) if length == 1 else expected
    np.testing.assert_allclose(explain(net, z, "pass", {"x": x, "r": r})["relevance/x"], expected, rtol=1e-12)


def test_pass_keeps_a_dynamic_size_without_arithmetic() -> None:
    """One number per channel cannot stretch a picture of unknown size: nothing has to be summed."""
    net = Net()
    z = net("Mul", net.input("x", "N", 3, "H", "W"), net.weight(3, 1, 1), name="layer")
    result = rewritten(net.model(z), "pass")
    assert "ReduceSum" not in {n.op_type for n in result.model.graph.node if n.name.startswith("lrp/layer")}


def test_pass_of_a_quotient_goes_to_the_numerator() -> None:
    net = Net()
    a, b = net.input("a", "N", 4), net.input("b", "N", 1)
    feeds = {"a": numbers(2, 4), "b": numbers(2, 1), "r": numbers(2, 4)}
    found = explain(net, net("Div", a, b, name="layer"), "pass", feeds)
    np.testing.assert_array_equal(found["relevance/a"], feeds["r"])
    np.testing.assert_array_equal(found["relevance/b"], 0 * feeds["b"])


def test_pass_refuses_two_live_inputs_and_other_shapes() -> None:
    net = Net()
    model = net.model(net("Mul", net.input("a", "N", 4), net.input("b", "N", 4), name="layer"))
    with pytest.raises(RuleError, match="needs one live input"):
        rewritten(model, "pass")
    net = Net()
    model = net.model(net("ReduceSum", net.input("a", "N", 4), net.const([1], np.int64), name="layer", keepdims=0))
    with pytest.raises(RuleError, match="in the shape of the output"):
        rewritten(model, "pass")


def test_stop_absorbs_everything() -> None:
    net = Net()
    x = net.input("x", "N", 4)
    a, b = net("Split", x, net.const([1, 3], np.int64), name="layer", outputs=2, axis=1)
    z = net("Add", a, net("ReduceSum", b, net.const([1], np.int64)), name="sum")
    feeds = {"x": numbers(2, 4), "r": numbers(2, 1)}
    found = explain(net, z, "stop", feeds)
    np.testing.assert_array_equal(found["relevance/x"], 0 * feeds["x"])
    assert abs(found["absorbed"]).sum() > 0.1


def test_stop_counts_relevance_that_is_still_small() -> None:
    """A global average hands down one number per channel; the picture has it at every place."""
    net = Net()
    z = net("GlobalAveragePool", net("Relu", net.input("x", "N", 2, 3, 3), name="layer"), name="pool")
    feeds = {"x": np.abs(numbers(2, 2, 3, 3)) + 1, "r": numbers(2, 2, 1, 1)}
    found = explain(net, z, "stop", feeds)
    assert not found["relevance/x"].any()


@pytest.mark.parametrize("op", ["Add", "Mul", "Max", "Sum"])
def test_uniform_gives_equal_parts(op: str) -> None:
    net = Net()
    a, b = net.input("a", "N", 4), net.input("b", "N", 1)
    feeds = {"a": numbers(2, 4), "b": numbers(2, 1), "r": numbers(2, 4)}
    found = explain(net, net(op, a, b, name="layer"), "uniform", feeds)
    np.testing.assert_allclose(found["relevance/a"], feeds["r"] / 2, rtol=1e-7)
    np.testing.assert_allclose(found["relevance/b"], feeds["r"].astype(float).sum(1, keepdims=True) / 2)


def test_uniform_refuses_what_changes_the_shape() -> None:
    net = Net()
    model = net.model(net("Concat", net.input("a", "N", 4), net.input("b", "N", 4), name="layer", axis=1))
    with pytest.raises(RuleError, match="uniform needs inputs in the shape"):
        rewritten(model, "uniform")


def test_gradient_is_the_adjoint() -> None:
    net = Net()
    z = net("Tanh", net.input("x", "N", 4), name="layer")
    feeds = {"x": numbers(3, 4), "r": numbers(3, 4)}
    explained = rewritten(net.model(z), "gradient").model
    found = run_double(explained, {"x": feeds["x"], "start": feeds["r"]})["relevance/x"]
    np.testing.assert_allclose(found, feeds["r"] * (1 - np.tanh(feeds["x"].astype(np.float64)) ** 2), rtol=1e-12)


# ---- route -----------------------------------------------------------------------------------------------------------

MOVES: dict[str, tuple[tuple[int, ...], Callable[[Net, str], str]]] = {
    "reshape": ((2, 6), lambda n, x: n("Reshape", x, n.const([0, 3, 4], np.int64), name="layer")),
    "flatten": ((2, 3), lambda n, x: n("Flatten", x, name="layer")),
    "transpose": ((2, 3), lambda n, x: n("Transpose", x, name="layer", perm=[0, 2, 1])),
    "squeeze": ((1, 3), lambda n, x: n("Squeeze", x, n.const([1], np.int64), name="layer")),
    "unsqueeze": ((3,), lambda n, x: n("Unsqueeze", x, n.const([1], np.int64), name="layer")),
    "concat_twice": ((3,), lambda n, x: n("Concat", x, x, name="layer", axis=1)),
    "slice_step": ((7,), lambda n, x: _sliced(n, x, [6], [0], [1], [-2])),
    "slice": ((2, 5), lambda n, x: _sliced(n, x, [1], [4], [2], [1])),
    "pad": ((3,), lambda n, x: n("Pad", x, n.const([0, 1, 0, 2], np.int64), name="layer")),
    "pad_seven": ((3,), lambda n, x: n("Pad", x, n.const([0, 1, 0, 2], np.int64), n.const(7.0), name="layer")),
    "pad_reflect": ((4,), lambda n, x: n("Pad", x, n.const([0, 2, 0, 1], np.int64), name="layer", mode="reflect")),
    "gather": ((3, 2), lambda n, x: n("Gather", x, n.const([2, 0, 2], np.int64), name="layer", axis=1)),
    "expand": ((1, 3), lambda n, x: n("Expand", x, n.const([1, 2, 1], np.int64), name="layer")),
    "tile": ((2,), lambda n, x: n("Tile", x, n.const([1, 3], np.int64), name="layer")),
    "concat_constant": (
        (3,),
        lambda n, x: n("Concat", x, n("Expand", n.weight(1, 2), _rows(n, x)), name="layer", axis=1),
    ),
    "where_constant": ((3,), lambda n, x: n("Where", n.const([True, False, True], bool), x, n.weight(3), name="layer")),
}


def _sliced(n: Net, x: str, *parts: list[int]) -> str:
    return str(n("Slice", x, *(n.const(p, np.int64) for p in parts), name="layer"))


def _rows(n: Net, x: str) -> str:
    """The shape (N, 1)."""
    return str(n("Concat", n("Shape", x, start=0, end=1), n.const([1], np.int64), axis=0))


@pytest.mark.parametrize("arrival", ["plain", "factored"])
@pytest.mark.parametrize("name", MOVES)
def test_route_is_the_transposed_matrix(name: str, arrival: str) -> None:
    """R_x = W^T R, with W of zeros and ones, and what lands on constants is booked."""
    shape, build = MOVES[name]

    def layer(inputs: list[np.ndarray]) -> np.ndarray:
        net = Net()
        z = build(net, net.input("x", "N", *shape))
        return run_double(net.model(z), {"x": inputs[0]})[z]

    w, b = matrix_of(layer, [shape])
    net = Net()
    z = end = build(net, net.input("x", "N", *shape))
    feeds = {"x": numbers(2, *shape)}
    if arrival == "factored":
        end = net("Gemm", net("Flatten", z), net.weight(len(b), 3), net.weight(3), name="head")
        feeds["r"] = numbers(2, 3)
    else:
        feeds["r"] = numbers(2, *layer([feeds["x"]]).shape[1:])
    found = explain(net, end, "route", feeds, layers=(z,))
    r = found[f"relevance/{z}"].reshape(2, -1)
    np.testing.assert_allclose(found["relevance/x"].reshape(2, -1), r @ w, rtol=1e-9, atol=1e-12)
    booked = accounts(net, end, "route", feeds)
    np.testing.assert_allclose(booked.get("bias", 0.0), r[:, ~w.any(1)].sum(), rtol=1e-9, atol=1e-12)


def test_route_refuses_what_computes() -> None:
    net = Net()
    model = net.model(net("Add", net.input("a", "N", 4), net.input("b", "N", 4), name="layer"))
    with pytest.raises(RuleError, match="route is for operators that move elements"):
        rewritten(model, "route")
    net = Net()
    model = net.model(net("Transpose", net.input("a", "N", 4, 2), name="layer", perm=[0, 2, 1]))
    with pytest.raises(RuleError, match="moves elements; use route"):
        rewritten(model, "zplus")


# ---- maxima ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrival", ["plain", "factored"])
@pytest.mark.parametrize(("kernel", "stride", "pads"), [(2, 2, [0] * 4), (3, 2, [1, 0, 1, 1]), (2, 1, [0] * 4)])
def test_winner_takes_all_first_of_equal_ones(kernel: int, stride: int, pads: list[int], arrival: str) -> None:
    """MaxPool: small whole numbers, so that most windows hold ties; a loop over the windows says who wins."""
    net = Net()
    x = net.input("x", "N", 2, 6, 5)
    z = net("MaxPool", x, name="layer", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)
    image = RNG.integers(-1, 2, (2, 2, 6, 5)).astype(np.float32)
    pooled = run_double(net.model(z), {"x": image})[z]
    end, r = z, numbers(*pooled.shape)
    if arrival == "factored":
        end, r = net("Gemm", net("Flatten", z), net.weight(pooled[0].size, 3), name="head"), numbers(2, 3)
    found = explain(net, end, "winner_takes_all", {"x": image, "r": r}, layers=(z,))
    expected = np.zeros(image.shape)
    for n, c, i, j in np.ndindex(pooled.shape):
        top, left = i * stride - pads[0], j * stride - pads[1]
        places = [
            (h, w) for h in range(top, top + kernel) for w in range(left, left + kernel) if 0 <= h < 6 and 0 <= w < 5
        ]
        h, w = max(places, key=lambda p: (image[n, c, p[0], p[1]], -p[0], -p[1]))
        expected[n, c, h, w] += found[f"relevance/{z}"][n, c, i, j]
    np.testing.assert_allclose(found["relevance/x"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize(("axes", "keepdims"), [([1], 1), ([-1], 0), ([1, 3], 0), ([2, 3], 1), ([1, 2, 3], 1)])
def test_winner_takes_all_of_reductions(op: str, axes: list[int], keepdims: int) -> None:
    """The first in the order of memory, as in a MaxPool."""
    net = Net()
    z = net(op, net.input("x", "N", 3, 2, "W"), net.const(axes, np.int64), name="layer", keepdims=keepdims)
    x = RNG.integers(-1, 2, (2, 3, 2, 4)).astype(np.float32)
    r = numbers(*run_double(net.model(z), {"x": x})[z].shape)
    found = explain(net, z, "winner_takes_all", {"x": x, "r": r})["relevance/x"]
    dims = [a % 4 for a in axes]
    whole = r.reshape([1 if i in dims else d for i, d in enumerate(x.shape)])
    expected = np.zeros(x.shape)
    for place in np.ndindex(whole.shape):
        window = tuple(slice(None) if i in dims else p for i, p in enumerate(place))
        part = x[window]
        first = np.unravel_index((part.argmax if op == "ReduceMax" else part.argmin)(), part.shape)
        expected[window][first] = whole[place]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("arrival", ["plain", "factored"])
@pytest.mark.parametrize("op", ["Max", "Min"])
def test_winner_takes_all_of_several_inputs(op: str, arrival: str) -> None:
    """The first input that holds the extreme takes all; what a constant takes is booked, sample by sample."""
    net = Net()
    a, b = net.input("a", "N", 4), net.input("b", "N", 1)
    constant = np.array([[0, 1, 0, -1]], np.float32)
    z = end = net(op, a, b, net.const(constant), name="layer")
    feeds = {"a": RNG.integers(-1, 2, (6, 4)).astype(np.float32), "b": RNG.integers(-1, 2, (6, 1)).astype(np.float32)}
    feeds["r"] = numbers(6, 4)
    if arrival == "factored":
        end = net("Gemm", z, net.weight(4, 4), net.weight(4), name="head")
    found = explain(net, end, "winner_takes_all", feeds, layers=(z,))
    stacked = np.stack(np.broadcast_arrays(feeds["a"], feeds["b"], constant))
    winner = stacked.argmax(0) if op == "Max" else stacked.argmin(0)
    r = found[f"relevance/{z}"]
    np.testing.assert_allclose(found["relevance/a"], r * (winner == 0), rtol=1e-12)
    np.testing.assert_allclose(found["relevance/b"], (r * (winner == 1)).sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(accounts(net, end, "winner_takes_all", feeds)["bias"], (r * (winner == 2)).sum())


def test_winner_takes_all_of_a_global_pool() -> None:
    net = Net()
    z = net("GlobalMaxPool", net.input("x", "N", 2, 2, 3), name="layer")
    x = np.array([[[0, 2, 2], [2, 1, 0]], [[-1, -1, -1], [-1, -1, -1]]], np.float32)[None]
    r = np.array([[[[3.0]], [[5.0]]]], np.float32)
    found = explain(net, z, "winner_takes_all", {"x": x, "r": r})["relevance/x"]
    np.testing.assert_array_equal(found, [[[[0, 3, 0], [0, 0, 0]], [[5, 0, 0], [0, 0, 0]]]])


@pytest.mark.parametrize(
    "attrs", [{"kernel_shape": [2, 2], "strides": [2, 2]}, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}, None]
)
def test_proportional_is_the_rule_of_the_average_pool(attrs: dict[str, Any] | None) -> None:
    """A MaxPool shares as the AveragePool of the same windows would."""
    kind = "MaxPool" if attrs is not None else "GlobalMaxPool"
    shape = (2, 4, 5)

    def average(inputs: list[np.ndarray]) -> np.ndarray:
        net = Net()
        z = net(kind.replace("Max", "Average"), net.input("x", "N", *shape), **(attrs or {}))
        return run_double(net.model(z), {"x": inputs[0]})[z]

    w, b = matrix_of(average, [shape])
    net = Net()
    z = net(kind, net.input("x", "N", *shape), name="layer", **(attrs or {}))
    x = numbers(2, *shape)  # no mean is exactly zero, where the oracle's rounded 1/n would decide its sign
    r = numbers(*average([x]).shape)
    found = explain(net, z, "proportional", {"x": x, "r": r}, epsilon=0.25)["relevance/x"]
    for n in range(2):
        expected = ORACLES["norm"](w, b, x[n].reshape(-1).astype(float), r[n].reshape(-1).astype(float), epsilon=0.25)
        np.testing.assert_allclose(found[n].reshape(-1), expected.inputs, rtol=1e-9, atol=1e-12)


def test_proportional_needs_a_pool_that_onnx_can_average() -> None:
    for opset, fails in ((18, True), (22, False)):
        net = Net(opset=opset)
        model = net.model(net("MaxPool", net.input("x", "N", 1, 8), name="layer", kernel_shape=[2], dilations=[2]))
        if fails:
            with pytest.raises(RuleError, match="opset 19"):
                rewritten(model, "proportional")
        else:
            rewritten(model, "proportional")


# ---- normalization and softmax ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 4])
def test_batchnorm_absolute_keeps_the_share_of_the_slope(rank: int) -> None:
    net = Net()
    scale, shift, mean = (quarters(RNG, (3,), zeros=False) for _ in range(3))
    variance = np.array([0.25, 1, 4], np.float32)
    shape = (3, 2, 2)[: rank - 1]
    constants = [net.const(c) for c in (scale, shift, mean, variance)]
    z = net("BatchNormalization", net.input("x", "N", *shape), *constants, name="layer", epsilon=0.0)
    feeds = {"x": numbers(2, *shape), "r": numbers(2, *shape)}
    found = explain(net, z, "batchnorm_absolute", feeds)["relevance/x"]
    slope = (scale / np.sqrt(variance.astype(float))).reshape(-1, *([1] * (rank - 2)))
    offset = shift.reshape(slope.shape) - mean.reshape(slope.shape) * slope
    kept = np.abs(slope * feeds["x"]) / (np.abs(slope * feeds["x"]) + np.abs(offset))
    np.testing.assert_allclose(found, feeds["r"] * kept, rtol=1e-9, atol=1e-12)


def test_softmax_golden() -> None:
    net = Net()
    z = net("Softmax", net.input("x", "N", 3), name="layer")
    feeds = {"x": np.array([[1, -2, 0.5]], np.float32), "r": np.array([[1, -0.5, 2]], np.float32)}
    found = explain(net, z, "softmax", feeds)["relevance/x"]
    np.testing.assert_allclose(found, [[-0.50937224, 1.15029444, 0.54225973]], atol=1e-8)


@pytest.mark.parametrize(("op", "axis"), [("Softmax", 1), ("Softmax", -1), ("LogSoftmax", 1), ("LogSoftmax", 2)])
def test_softmax_is_the_taylor_rule(op: str, axis: int) -> None:
    """R_i = x_i sum_j J_ji R_j / y_j, with the Jacobian by central differences."""
    net = Net()
    z = net(op, net.input("x", "N", 3, 2), name="layer", axis=axis)
    model = net.model(z)
    feeds = {"x": numbers(1, 3, 2), "r": numbers(1, 3, 2)}
    found = explain(net, z, "softmax", feeds)["relevance/x"].reshape(-1)
    x, h = feeds["x"].astype(float), 1e-6
    steps = (h * np.eye(6)).reshape(6, 3, 2)
    jacobian = (run_double(model, {"x": x + steps})[z] - run_double(model, {"x": x - steps})[z]).reshape(6, 6) / (2 * h)
    y = run_double(model, {"x": x})[z].reshape(-1)
    stable = y if op == "Softmax" else y + 1e-6 * np.sign(y)  # a LogSoftmax may come near zero
    expected = x.reshape(-1) * (jacobian @ (feeds["r"].reshape(-1) / stable))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


def test_softmax_bears_a_mask_of_minus_infinity() -> None:
    net = Net()
    z = net("Softmax", net("Add", net.input("x", "N", 3), net.const([0, -np.inf, 0])), name="layer")
    feeds = {"x": numbers(2, 3), "r": numbers(2, 3) * np.array([1, 0, 1], np.float32)}
    method = book(({"name": "layer"}, "softmax", {}), ({"op": "Add"}, "pass", {}))
    explained = rewrite_with_accounts(net.model(z), method, output=z, start="input").model
    found = run_double(explained, {"x": feeds["x"], "start": feeds["r"]})["relevance/x"]
    x, r = (feeds[name][:, [0, 2]].astype(float) for name in ("x", "r"))
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(found[:, [0, 2]], x * (r - p * r.sum(1, keepdims=True)), rtol=1e-9)
    np.testing.assert_array_equal(found[:, 1], 0)


def test_norm_golden_sum_of_two() -> None:
    net = Net()
    z = net("Add", net.input("a", "N", 3), net.input("b", "N", 3), name="layer")
    r = np.array([[1, -0.5, 2]], np.float32)
    a, b = np.array([[1, -2, 0.5]], np.float32), np.array([[0.5, 1, -1.5]], np.float32)
    found = explain(net, z, "norm", {"a": a, "b": b, "r": r}, epsilon=1e-8)
    np.testing.assert_allclose(found["relevance/a"], [[0.66666666, -1, -1]], atol=1e-7)
    np.testing.assert_allclose(found["relevance/b"], [[0.33333333, 0.5, 3]], atol=1e-7)


def test_share_golden_matrix_product() -> None:
    net = Net()
    z = net("MatMul", net.input("a", "N", 2), net.input("b", 2, 2), name="layer")
    feeds = {
        "a": np.array([[1, 2], [-1, 0.5]], np.float32),
        "b": np.array([[0.5, -1], [1.5, 2]], np.float32),
        "r": np.array([[1, -0.5], [2, 0.25]], np.float32),
    }
    found = explain(net, z, "share", feeds, epsilon=1e-8)
    np.testing.assert_allclose(found["relevance/a"], [[0.1547619, 0.0952381], [-1.9375, 3.0625]], atol=1e-7)
    expected = [[-1.92857139, 0.14583333], [3.42857137, -0.27083333]]
    np.testing.assert_allclose(found["relevance/b"], expected, atol=1e-6)  # LXT's 1e-8 knows no sign


def test_rules_for_one_kind_of_operator_say_so() -> None:
    for rule in ("proportional", "batchnorm_absolute", "softmax", "normalization"):
        net = Net()
        model = net.model(net("Relu", net.input("x", "N", 3), name="layer"))
        with pytest.raises(RuleError, match=rf"node 'layer': {rule} is for .*, not Relu; use"):
            rewritten(model, rule)
