"""Nothing is lost: relevance and what biases and stabilizers took add up to the score, node by node and in all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_lrp.composite import book_names
from onnx_lrp.emit import Emitter
from onnx_lrp.rewrite import Explained, rewrite_with_accounts
from tests.dense_oracle import ORACLES, Shares
from tests.layers import BATCH, Net, book, quarters
from tests.support import run_double
from tests.test_rules import PARAMETERS, dense, feeds_of, known_sign, rows_of, run_single, stack

EXACT = 1e-9
SETTINGS = [("mixed", "plain", 0), ("nonnegative", "relu", 1), ("nonnegative", "plain", -1), ("mixed", "clip", 0)]


def accounts_of(explained: Explained, found: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return per node what each of its accounts holds, per sample."""
    nodes: dict[str, dict[str, np.ndarray]] = {}
    for entry in explained.ledger:
        account = nodes.setdefault(entry.node, {})
        account[entry.account] = account.get(entry.account, 0) + found[entry.output]
    return nodes


@pytest.mark.parametrize(("sign", "arrival", "weights"), SETTINGS)
@pytest.mark.parametrize("rule", ORACLES)
def test_accounts_of_every_layer(rule: str, sign: str, arrival: str, weights: int) -> None:
    """Bias and stabilizer take what the dense matrix says, for every layer, and all together is the score."""
    parameters = PARAMETERS[rule][0]
    model, tensors = stack(rule, sign, arrival, weights)
    method = book(({"name": "layer/*"}, rule, parameters))
    wanted = [z for _, z in tensors.values()]
    explained = rewrite_with_accounts(model, method, layers=wanted, start="input", accounts="node")
    feeds = feeds_of(model, zeros=True)
    width = next(i for i in explained.model.graph.input if i.name == "start").type.tensor_type.shape.dim[1].dim_value
    feeds["start"] = np.random.default_rng(1).standard_normal((BATCH, width)).astype(np.float32)
    found = run_double(explained.model, feeds)
    nodes = accounts_of(explained, found)
    wrong = []
    for name, (inputs, z) in tensors.items():
        w, b = dense(name, weights)
        xs = [known_sign(sign, feeds[f"{name}/x{i}"]) for i in range(len(inputs))]
        x = np.concatenate([rows_of(v, name) for v in xs], axis=1)
        r = found[f"relevance/{z}"].reshape(BATCH, -1)
        shares: list[Shares] = [ORACLES[rule](w, b, x[n], r[n], **parameters) for n in range(BATCH)]
        for account in ("bias", "stabilizer"):
            expected = np.array([getattr(s, account) for s in shares])
            booked = np.broadcast_to(nodes[f"layer/{name}"].get(account, 0.0), BATCH)
            error = np.abs(booked - expected).max() / max(np.abs(expected).max(), np.abs(r).sum(), 1e-9)
            if not error <= EXACT:
                wrong.append(f"{name} {account}: {error:.1e}")
    assert not wrong
    total = found["absorbed"].copy()
    for name, (inputs, _) in tensors.items():
        for i in range(len(inputs)):
            total += rows_of(found[f"relevance/{name}/x{i}"], name).sum(1)
    np.testing.assert_allclose(total, found["score"], rtol=EXACT, atol=EXACT * np.abs(feeds["start"]).sum())


# ---- whole nets ------------------------------------------------------------------------------------------------------


def _batchnorm(net: Net, x: str, channels: int) -> str:
    """A BatchNormalization whose slope is exact in float32."""
    variance = net.const(np.resize([4.0, 1.0, 0.25], channels))
    constants = [net.weight(channels), net.weight(channels), net.weight(channels), variance]
    return str(net("BatchNormalization", x, *constants, epsilon=0.0))


def picture_net(net: Net) -> str:
    """Preprocessing, Conv, BatchNormalization, overlapping pools, a shortcut, Concat, padding, a global average."""
    x = net.input("x", "N", 3, 8, 8)
    x = net("Mul", net("Sub", x, net.weight(3, 1, 1)), net.weight(3, 1, 1))
    x = net("Conv", x, net.weight(4, 3, 3, 3), net.weight(4), pads=[1, 1, 1, 1])
    x = net("MaxPool", net("Relu", _batchnorm(net, x, 4)), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    side = _batchnorm(net, net("Conv", x, net.weight(4, 2, 3, 3), pads=[1, 1, 1, 1], group=2), 4)
    x = net("Relu", net("Add", x, side))
    pooled = net("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    x = net("Concat", net("Conv", x, net.weight(2, 4, 1, 1), net.weight(2)), pooled, axis=1)
    x = net("Clip", _batchnorm(net, x, 6), net.const(0), net.const(6))
    x = net("ConvTranspose", x, net.weight(6, 2, 2, 2), net.weight(2), strides=[2, 2])
    x = net("Pad", net("Relu", x), net.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64), net.const(0.5))
    x = net("Flatten", net("GlobalAveragePool", x))
    return str(net("Softmax", net("Gemm", x, net.weight(5, 2), net.weight(5), transB=1)))


def vector_net(net: Net) -> str:
    """Two inputs; sums of all kinds, constants among the summands, gates, products, maxima."""
    a, b = net.input("x", "N", 4), net.input("y", "N", 4)
    h = net("Relu", net("Gemm", a, net.weight(4, 6), net.weight(6)))
    g = net("Add", net("MatMul", b, net.weight(4, 6)), net.weight(6))
    h = net("Sum", h, g, net.weight(1, 6))
    h = net("Sub", net.weight(6), net("Mean", h, g, net.weight(6)))
    h = net("Add", net("Mul", h, net("Sigmoid", g)), net("Mul", h, g))
    h = net("Max", h, net.const(np.full((1, 1), -0.5)))
    h = net("Where", net.const([True, True, False, True, True, True], bool), h, net.weight(6))
    h = net("Div", net("Tanh", net("Neg", h)), net.const(4))
    left, right = net("Split", h, net.const([2, 4], np.int64), outputs=2, axis=1)
    h = net("Concat", net("ReduceSum", left, net.const([1], np.int64)), right, axis=1)
    h = net(
        "Reshape",
        net("ReduceMax", net("Unsqueeze", h, net.const([2], np.int64)), net.const([2], np.int64)),
        net.const([0, 5], np.int64),
    )
    return str(net("Gemm", h, net.weight(5, 3), net.weight(3)))


def token_net(net: Net) -> str:
    """Embedding, one head of attention, a mean over the tokens."""
    ids = net.input("x", "N", "T", dtype=TensorProto.INT64)
    x = net("Gather", net.weight(9, 4), ids)
    q, k, v = (net("Add", net("MatMul", x, net.weight(4, 4)), net.weight(4)) for _ in range(3))
    scores = net("Div", net("MatMul", q, net("Transpose", k, perm=[0, 2, 1])), net.const(2))
    x = net("Add", x, net("MatMul", net("Softmax", scores), v))
    x = net("ReduceMean", x, net.const([1], np.int64), keepdims=0)
    return str(net("Gemm", x, net.weight(4, 3), net.weight(3)))


def upscaled_net(net: Net) -> str:
    """Pixels shuffled, pictures resized, groups normalized, elements picked and placed."""
    x = net.input("x", "N", 4, 4, 4)
    x = net("Conv", net("DepthToSpace", x, blocksize=2), net.weight(4, 1, 2, 2), net.weight(4), strides=[2, 2])
    x = net("InstanceNormalization", x, net.weight(4), net.weight(4))
    x = net("PRelu", x, net.weight(4, 1, 1))
    x = net("Resize", x, "", net.const([1, 1, 2, 2]), mode="linear")
    x = net("Conv", x, net.weight(5, 4, 2, 2), net.weight(5))
    x = net("SpaceToDepth", net("Pad", x, net.const([0, 0, 0, 0, 0, 0, 1, 1], np.int64)), blocksize=2)
    x = net("LayerNormalization", net("Flatten", x), net.weight(320), net.weight(320))
    x, _ = net("TopK", x, net.const([6], np.int64), outputs=2)
    rest = net("Einsum", x, net.weight(5, 6), equation="ni,oi->no")
    x = net("Trilu", net("CumSum", net("Einsum", x, rest, equation="ni,nj->nij"), net.const(2, np.int64)))
    x = net("GatherND", x, net.const(np.array([[[0, 1], [0, 3], [2, 2]]] * BATCH), np.int64), batch_dims=1)
    x = net("LpNormalization", x)
    x = net("ScatterElements", net.weight(BATCH, 4), net.const([[3, 0, 1]] * BATCH, np.int64), x, axis=1)
    x = net("ScatterElements", x, net.const([[2, 2]] * BATCH, np.int64), net.weight(BATCH, 2), axis=1, reduction="add")
    return str(net("Gemm", x, net.weight(4, 3), net.weight(3)))


NETS: dict[str, Callable[[Net], str]] = {
    "picture": picture_net,
    "vector": vector_net,
    "token": token_net,
    "upscaled": upscaled_net,
}


@functools.cache
def source(name: str) -> onnx.ModelProto:
    """Return one of the nets."""
    net = Net(seed=3)
    return net.model(NETS[name](net))


def feeds_for(name: str, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Return inputs of one of the nets."""
    rng = np.random.default_rng(4)
    if name == "token":
        return {"x": rng.integers(0, 9, (batch, 5))}
    if name == "vector":
        return {"x": quarters(rng, (batch, 4)), "y": rng.standard_normal((batch, 4)).astype(np.float32)}
    shape = (4, 4, 4) if name == "upscaled" else (3, 8, 8)
    return {"x": rng.standard_normal((batch, *shape)).astype(np.float32)}


def missing(found: dict[str, np.ndarray], names: list[str]) -> tuple[np.ndarray, float]:
    """Return score - relevance - absorbed per sample, and the size of the numbers involved."""
    parts = [found[f"relevance/{n}"].reshape(BATCH, -1) for n in names]
    size = sum(float(np.abs(p).sum()) for p in parts) + float(np.abs(found["absorbed"]).sum())
    return found["score"] - sum(p.sum(1) for p in parts) - found["absorbed"], size


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold no floats: what is folded is rounded to float32, and that is seen in float64."""
    fold = Emitter._fold
    monkeypatch.setattr(Emitter, "_fold", lambda e, call: None if call.output.dtype.kind == "f" else fold(e, call))


@pytest.mark.usefixtures("unfolded")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rules", book_names())
def test_every_rule_book_conserves(rules: str, name: str) -> None:
    """Score = relevance + absorbed in float64, and nothing is left at any node, but where the gradient is the rule."""
    explained = rewrite_with_accounts(source(name), rules, accounts="node")
    found = run_double(explained.model, feeds_for(name))
    left, size = missing(found, list(explained.relevance))
    loses = {row.node for row in explained.table if row.rule == "gradient"}
    assert loses or np.abs(left).max() <= EXACT * size
    for node, account in accounts_of(explained, found).items():
        if node in loses:
            continue
        rest = account.get("out", 0) - account.get("in", 0) - account.get("bias", 0) - account.get("stabilizer", 0)
        assert np.abs(rest).max() <= EXACT * size, node


@pytest.mark.parametrize(
    "options",
    [
        {"fold_batchnorm": False},
        {"portable": True},
        {"start": "softmax"},
        {"start": "contrast"},
        {"target": 2},
        {"layers": ["Relu_4:y", "Flatten_19:y"]},
    ],
    ids=str,
)
def test_options_conserve(options: dict[str, Any]) -> None:
    """So do the options; and every inner tensor that all paths run through holds the whole score."""
    explained = rewrite_with_accounts(source("picture"), "epsilon_plus_flat", accounts="total", **options)
    found = run_double(explained.model, feeds_for("picture"))
    left, size = missing(found, ["x"])
    assert np.abs(left).max() <= EXACT * size


@pytest.mark.usefixtures("unfolded")
def test_an_input_that_is_not_reported_counts_as_a_constant() -> None:
    """With inputs=["x"] the other input is a bias like any other."""
    explained = rewrite_with_accounts(source("vector"), "epsilon", inputs=["x"], accounts="total")
    found = run_double(explained.model, feeds_for("vector"))
    assert list(explained.relevance) == ["x"]
    left, size = missing(found, ["x"])
    assert np.abs(left).max() <= EXACT * size


def test_absorbed_in_float32() -> None:
    """The ledger as users get it."""
    explained = rewrite_with_accounts(source("picture"), "epsilon_plus_flat", accounts="total")
    found = run_single(explained.model, feeds_for("picture"))
    assert found["absorbed"].shape == (BATCH,)
    left, size = missing(found, ["x"])
    assert np.abs(left).max() <= 1e-5 * size


def test_rules_that_do_not_conserve_are_seen() -> None:
    """The plain gradient of a tanh loses relevance, and the ledger does not pretend otherwise."""
    net = Net()
    model = net.model(net("Tanh", net.input("x", "N", 4), name="layer"))
    explained = rewrite_with_accounts(model, book(({"name": "layer"}, "gradient", {})), accounts="total", start="one")
    found = run_double(explained.model, {"x": np.full((BATCH, 4), 2.0, np.float32)})
    assert np.abs(missing(found, ["x"])[0]).min() > 0.5
