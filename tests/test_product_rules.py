"""Rules for products of two live tensors: share, gate and factor, against their formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrp.errors import RuleError
from onnx_lrp.rewrite import rewrite_with_accounts
from tests.layers import Arrays, Net, book, explain, quarters, rewritten
from tests.support import RNG, numbers, run_double

PRODUCT_A, PRODUCT_B = [[1, 2], [-1, 0.5]], [[0.5, -1], [1.5, 2]]


def test_share_golden_matmul() -> None:
    """Each factor of O = A B gets half of R, by the epsilon rule on 2 O (values of the published definition)."""
    net = Net()
    z = net("MatMul", net.input("a", "N", 2), net.input("b", 2, 2), name="layer")
    r = np.array([[1, -0.5], [2, 0.25]], np.float32)
    feeds = {"a": np.array(PRODUCT_A, np.float32), "b": np.array(PRODUCT_B, np.float32), "start": r}
    explained = rewritten(net.model(z), "share", epsilon=1e-9).model
    del explained.graph.output[4:]  # without the ledger: this product has no batch
    found = run_double(explained, feeds)
    np.testing.assert_allclose(found["relevance/a"], [[0.1547619, 0.0952381], [-1.9375, 3.0625]], atol=1e-7)
    np.testing.assert_allclose(found["relevance/b"], [[-1.92857139, 0.14583333], [3.42857137, -0.27083333]], atol=1e-7)


def _product(rule: str, arrival: str = "plain", **parameters: Any) -> tuple[Arrays, Arrays]:
    """A batched MatMul of two live tensors, its feeds and what was found."""
    net = Net()
    z = end = net("MatMul", net.input("a", "N", 3, 2), net.input("b", "N", 2, 4), name="layer")
    feeds = {"a": quarters(RNG, (2, 3, 2)), "b": quarters(RNG, (2, 2, 4))}
    feeds["r"] = numbers(2, 3, 4)
    if arrival == "factored":
        end, feeds["r"] = net("Gemm", net("Flatten", z), net.weight(12, 3), name="head"), numbers(2, 3)
    found = explain(net, end, rule, feeds, layers=(z,), **parameters)
    return feeds, found | {"r": found[f"relevance/{z}"]}


def _stable(z: np.ndarray, epsilon: float) -> np.ndarray:
    return z + np.where(z < 0, -epsilon, epsilon)


@pytest.mark.parametrize("arrival", ["plain", "factored"])
def test_share_halves_between_two_factors(arrival: str) -> None:
    feeds, found = _product("share", arrival, epsilon=0.25)
    a, b = feeds["a"].astype(float), feeds["b"].astype(float)
    c = found["r"] / (2 * _stable(a @ b, 0.25))
    np.testing.assert_allclose(found["relevance/a"], a * (c @ b.swapaxes(1, 2)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["relevance/b"], b * (a.swapaxes(1, 2) @ c), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("constant", "side"), [("first", "b"), ("second", "a")])
def test_factor_is_held_constant(constant: str, side: str) -> None:
    feeds, found = _product("factor", constant=constant, epsilon=0.25)
    a, b = feeds["a"].astype(float), feeds["b"].astype(float)
    c = found["r"] / _stable(a @ b, 0.25)
    expected = {"a": a * (c @ b.swapaxes(1, 2)), "b": b * (a.swapaxes(1, 2) @ c)}
    for name in "ab":
        wanted = expected[name] if name == side else 0 * expected[name]
        np.testing.assert_allclose(found[f"relevance/{name}"], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("live_bias", [False, True])
@pytest.mark.parametrize(("rule", "parts"), [("share", (0.5, 0.5)), ("factor", (0.0, 1.0)), ("gate", (1.0, 0.0))])
def test_share_factor_gate_leave_the_bias_its_part(rule: str, parts: tuple[float, float], live_bias: bool) -> None:
    """Gemm of two live factors and a bias, constant or live."""
    net = Net()
    c = net.input("c", "N", 3) if live_bias else net.const(np.array([1.0, -2.0, 0.5]))
    z = net("Gemm", net.input("a", "N", "N"), net.input("b", "N", 3), c, name="layer")
    feeds = {"a": quarters(RNG, (2, 2)), "b": quarters(RNG, (2, 3)), "r": numbers(2, 3)}
    if live_bias:
        feeds["c"] = quarters(RNG, (2, 3))
    explained = rewritten_alone(net.model(z), rule, epsilon=0.25)
    found = run_double(explained, {"start" if k == "r" else k: v for k, v in feeds.items()})
    a, b = feeds["a"].astype(float), feeds["b"].astype(float)
    bias = feeds["c"].astype(float) if live_bias else np.array([[1.0, -2.0, 0.5]])
    s = feeds["r"] / _stable(a @ b + bias, 0.25)
    np.testing.assert_allclose(found["relevance/a"], parts[0] * a * (s @ b.T), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["relevance/b"], parts[1] * b * (a.T @ s), rtol=1e-9, atol=1e-12)
    if live_bias:
        np.testing.assert_allclose(found["relevance/c"], bias * s, rtol=1e-9, atol=1e-12)


def rewritten_alone(model: onnx.ModelProto, rule: str, **parameters: Any) -> onnx.ModelProto:
    """Return the explained model without a ledger."""
    return rewrite_with_accounts(model, book(({"name": "layer"}, rule, parameters)), start="input").model


def test_share_of_a_square_reaches_its_input_twice() -> None:
    net = Net()
    x = net.input("x", "N", 4)
    feeds = {"x": numbers(2, 4), "r": numbers(2, 4)}
    found = explain(net, net("Mul", x, x, name="layer"), "share", feeds, epsilon=0.0)
    np.testing.assert_allclose(found["relevance/x"], feeds["r"], rtol=1e-6)


def _through(*ops: str) -> Callable[[Net, str], str]:
    def build(net: Net, x: str) -> str:
        for op in ops:
            x = net(op, x, net.const([0, 4], np.int64)) if op == "Reshape" else net(op, x)
        return x

    return build


GATES: list[tuple[str, tuple[str, ...], tuple[str, ...], str]] = [
    ("sigmoid first", ("Sigmoid",), (), "b"),
    ("sigmoid second", (), ("Sigmoid",), "a"),
    ("hard sigmoid", ("HardSigmoid",), (), "b"),
    ("softmax", (), ("Softmax",), "a"),
    ("behind a reshape", ("Sigmoid", "Reshape"), (), "b"),
    ("output gate of an LSTM", ("Sigmoid",), ("Tanh",), "b"),
    ("candidate of an LSTM", ("Tanh",), ("Sigmoid",), "a"),
    ("tanh of a softplus", (), ("Softplus", "Tanh"), "a"),
    ("neither", (), (), "a"),
    ("both", ("Sigmoid",), ("Sigmoid",), "a"),
]


@pytest.mark.parametrize(("first", "second", "signal"), [g[1:] for g in GATES], ids=[g[0] for g in GATES])
def test_gate_lets_the_signal_take_all(first: tuple[str, ...], second: tuple[str, ...], signal: str) -> None:
    """Relevance that reaches an input goes through the factor that is the signal."""
    net = Net()
    a, b = net.input("a", "N", 4), net.input("b", "N", 4)
    z = net("Mul", _through(*first)(net, a), _through(*second)(net, b), name="layer")
    feeds = {"a": numbers(2, 4), "b": numbers(2, 4), "r": numbers(2, 4)}
    method = book(({"name": "layer"}, "gate", {"epsilon": 0.0}), ({"op": "Softmax"}, "pass", {}))
    explained = rewrite_with_accounts(net.model(z), method, start="input").model
    found = run_double(explained, {"a": feeds["a"], "b": feeds["b"], "start": feeds["r"]})
    other = "b" if signal == "a" else "a"
    np.testing.assert_allclose(found[f"relevance/{signal}"], feeds["r"], rtol=1e-6)
    np.testing.assert_array_equal(found[f"relevance/{other}"], 0 * feeds["r"])


@pytest.mark.parametrize(("gate", "signal"), [("first", "b"), ("second", "a")])
def test_gate_can_be_named(gate: str, signal: str) -> None:
    _, found = _product("gate", gate=gate, epsilon=0.25)
    assert found[f"relevance/{signal}"].any()
    assert not found[f"relevance/{'ab'.replace(signal, '')}"].any()


@pytest.mark.parametrize("rule", ["share", "gate", "factor"])
def test_share_gate_factor_of_one_live_factor_are_epsilon(rule: str) -> None:
    net = Net()
    z = net("Mul", net.const(quarters(RNG, (4,), zeros=False)), net.input("x", "N", 4), name="layer")
    feeds = {"x": quarters(RNG, (2, 4)), "r": numbers(2, 4)}
    ours = explain(net, z, rule, feeds, epsilon=0.25)["relevance/x"]
    np.testing.assert_array_equal(ours, explain(net, z, "epsilon", feeds, epsilon=0.25)["relevance/x"])


@pytest.mark.parametrize("rule", ["share", "gate", "factor"])
def test_share_gate_factor_refuse_sums(rule: str) -> None:
    net = Net()
    model = net.model(net("Add", net.input("a", "N", 4), net.input("b", "N", 4), name="layer"))
    with pytest.raises(RuleError, match="is for products"):
        rewritten(model, rule)
