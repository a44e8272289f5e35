"""What is recognised by data flow: attention in its forms, masks, softmax spelled out, gates; and that numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrp import rewrite
from onnx_lrp.errors import UnsupportedOps
from tests.layers import Net
from tests.support import numbers, run_double

Arrays = dict[str, np.ndarray]


def noted(model: Any, method: str = "attnlrp") -> list[str]:
    """What the rule table says was recognised."""
    words = ("attention: ", "activation: ", "divisor held", "gated product", "exp(x)")
    return [note for row in rewrite(model, method).table for note in row.why.split("; ") if note.startswith(words)]


# ---- gates -----------------------------------------------------------------------------------------------------------


def _gelu(net: Net, x: str, first: bool) -> str:
    """x * (1 + erf(x / sqrt 2)) * 0.5, the half before or after."""
    gate = net("Add", net("Erf", net("Div", x, net.const(np.sqrt(2.0)))), net.const(1.0))
    if first:
        return str(net("Mul", net("Mul", x, net.const(0.5)), gate))
    return str(net("Mul", net("Mul", x, gate), net.const(0.5)))


def _gelu_tanh(net: Net, x: str) -> str:
    cube = net("Mul", net("Pow", x, net.const(3.0)), net.const(0.044715))
    inner = net("Mul", net("Add", x, cube), net.const(np.sqrt(2 / np.pi)))
    return str(net("Mul", net("Mul", x, net.const(0.5)), net("Add", net("Tanh", inner), net.const(1.0))))


SPELLED = {
    "gelu": lambda n, x: _gelu(n, x, True),
    "gelu, half last": lambda n, x: _gelu(n, x, False),
    "gelu by tanh": _gelu_tanh,
    "quick gelu": lambda n, x: n("Mul", x, n("Sigmoid", n("Mul", x, n.const(1.702)))),
    "silu": lambda n, x: n("Mul", n("Sigmoid", x), x),
    "mish": lambda n, x: n("Mul", x, n("Tanh", n("Softplus", x))),
    "hard swish": lambda n, x: n("Mul", x, n("HardSigmoid", x, alpha=1 / 6, beta=0.5)),
}


@pytest.mark.parametrize("name", SPELLED)
def test_a_gated_activation_passes_all(name: str) -> None:
    """Relevance before it is relevance after it, by either book."""
    net = Net()
    x = net("Gemm", net.input("x", "N", 5), net.weight(5, 4))
    y = SPELLED[name](net, x)
    model = net.model(net("Gemm", y, net.weight(4, 3)))
    assert noted(model) == ["activation: input times gate"]
    assert {row.rule for row in rewrite(model, "epsilon").table if row.why.endswith("input times gate")} == {"gate"}
    for book in ("attnlrp", "cp_lrp"):
        found = run_double(rewrite(model, book, layers=[x, y], target=1).model, {"x": numbers(4, 5)})
        before, after = found[f"relevance/{x}"], found[f"relevance/{y}"]
        np.testing.assert_allclose(before, after, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["Reciprocal", "Div", "Pow"])
def test_one_over_a_norm_is_a_constant(form: str) -> None:
    net = Net()
    x = net.input("x", "N", 4)
    mean = net("Add", net("ReduceMean", net("Mul", x, x), net.const([1], np.int64)), net.const(1e-5))
    if form == "Pow":
        factor = net("Pow", mean, net.const(-0.5))
    else:
        root = net("Sqrt", mean)
        factor = net("Reciprocal", root) if form == "Reciprocal" else net("Div", net.const(1.0), root)
    weights = net.weight(4, 3)
    model = net.model(net("MatMul", net("Mul", factor, x), weights))
    assert "divisor held constant" in noted(model)
    feeds = {"x": numbers(3, 4)}
    found = run_double(rewrite(model, "attnlrp", target=2).model, feeds)["relevance/x"]
    array = next(np.frombuffer(w.raw_data, np.float32) for w in net.weights if w.name == weights)
    v = feeds["x"].astype(float)
    expected = v * array.reshape(4, 3)[:, 2] / np.sqrt((v * v).mean(1, keepdims=True) + np.float32(1e-5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("way", ["l2", "l1, clipped", "sum of squares", "reciprocal"])
@pytest.mark.parametrize("book", ["lrp_0", "attnlrp"])
def test_a_norm_that_something_is_divided_by_is_a_constant(book: str, way: str) -> None:
    """An embedding over its norm keeps the relevance that it has without the norm, element by element."""
    net = Net()
    x = net("Gemm", net.input("x", "N", 5), net.weight(5, 4))
    axis = net.const([1], np.int64)
    if way == "l1, clipped":
        norm = net("Clip", net("ReduceL1", x, axis), net.const(1e-12))
    elif way == "sum of squares":
        norm = net("Sqrt", net("Add", net("ReduceSumSquare", x, axis), net.const(1e-12)))
    else:
        norm = net("ReduceL2", x, axis)
    y = net("Mul", x, net("Reciprocal", norm)) if way == "reciprocal" else net("Div", x, norm)
    model = net.model(net("Gemm", y, net.weight(4, 3)))
    explained = rewrite(model, book, layers=[x], target=1, output=None)
    assert next(row.why for row in explained.table if row.op.startswith("Reduce")).endswith("divisor held constant")
    data = numbers(3, 5)
    found = run_double(explained.model, {"x": data})
    weights = {i.name: onnx.numpy_helper.to_array(i).astype(float) for i in model.graph.initializer}
    first, second = (w for w in weights.values() if w.shape in ((5, 4), (4, 3)))
    inner = data @ first
    length = np.abs(inner).sum(1, keepdims=True) if "l1" in way else np.sqrt((inner**2).sum(1, keepdims=True))
    y_values = inner / length
    expected = y_values * second[:, 1]
    if (book, way) == ("lrp_0", "reciprocal"):  # a gate, whose product has the stabilizer of the base book
        expected *= y_values / (y_values + 1e-6 * np.sign(y_values))
    np.testing.assert_allclose(found[f"relevance/{x}"], expected, rtol=1e-9)


def test_a_norm_that_is_no_divisor_has_no_rule() -> None:
    net = Net()
    x = net("Gemm", net.input("x", "N", 5), net.weight(5, 4))
    norm = net("ReduceL2", x, net.const([1], np.int64))
    with pytest.raises(UnsupportedOps, match="ReduceL2"):
        rewrite(net.model(net("Gemm", norm, net.weight(1, 3))), "attnlrp")


def test_a_gate_that_depends_on_other_elements_is_a_branch() -> None:
    """x times the sigmoid of a layer of x: half each for attnlrp, all to the signal for cp_lrp."""
    net = Net()
    x = net("Gemm", net.input("x", "N", 4), net.weight(4, 4))
    gate = net("Sigmoid", net("Gemm", x, net.weight(4, 4)))
    signal = net("Neg", x)
    y = net("Mul", gate, signal)
    model = net.model(net("Gemm", y, net.weight(4, 3)))
    assert noted(model) == ["gated product"]
    for book, part in (("attnlrp", 0.5), ("cp_lrp", 1.0)):
        found = run_double(rewrite(model, book, layers=[signal, y], target=0).model, {"x": numbers(4, 4)})
        np.testing.assert_allclose(found[f"relevance/{signal}"], part * found[f"relevance/{y}"], rtol=1e-9)


# ---- attention -------------------------------------------------------------------------------------------------------


def softmax_of(x: np.ndarray) -> np.ndarray:
    """Softmax along the last axis; zero for rows that are masked whole."""
    top = np.exp(x - np.where(np.isfinite(x), x, -1e300).max(-1, keepdims=True))
    total = top.sum(-1, keepdims=True)
    return np.where(total > 0, top / np.where(total > 0, total, 1), 0)


@pytest.mark.parametrize("masked", ["add", "where", "least", "none", "whole row"])
@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("book", ["attnlrp", "cp_lrp"])
def test_attention_by_hand(book: str, spelled: bool, masked: str) -> None:
    """Softmax(q k / 2 + mask) v: each product by its rule, in numpy; all is finite and booked."""
    net = Net()
    q, k, v = (net.input(n, "N", 3, 4) for n in "qkv")
    hidden = np.zeros((3, 3), bool)
    if masked != "none":
        hidden[:, 2] = True
    if masked == "whole row":
        hidden[1] = True
    scores = net("Div", net("MatMul", q, net("Transpose", k, perm=[0, 2, 1]), name="qk"), net.const(2.0))
    if masked == "where":
        scores = net("Where", net.const(hidden, bool), net.const(-np.inf), scores)
    elif masked != "none":
        least = np.finfo(np.float32).min if masked == "least" else -np.inf
        scores = net("Add", scores, net.const(np.where(hidden, least, 0)))
    if spelled:
        top = net("Exp", net("Sub", scores, net("ReduceMax", scores, net.const([2], np.int64))))
        p = net("Div", top, net("ReduceSum", top, net.const([2], np.int64)))
    else:
        p = net("Softmax", scores)
    if masked == "whole row":
        p = net("Where", net("IsNaN", p), net.const(0.0), p)
    y = net("MatMul", p, v, name="pv")
    weights = net.weight(12, 2)
    model = net.model(net("MatMul", net("Reshape", y, net.const([0, 12], np.int64)), weights))
    assert [note for note in noted(model, book) if "attention" in note] == ["attention: scores", "attention: values"]
    feeds = {n: numbers(2, 3, 4) for n in "qkv"}
    found = run_double(rewrite(model, book, target=1, ledger=True).model, feeds)
    a, b, c = (feeds[n].astype(float) for n in "qkv")
    array = next(np.frombuffer(w.raw_data, np.float32) for w in net.weights if w.name == weights).reshape(12, 2)
    prob = softmax_of(np.where(hidden, -np.inf, a @ b.swapaxes(1, 2) / 2))
    grad = np.broadcast_to(array[:, 1].reshape(3, 4).astype(float), (2, 3, 4))
    half = 0.5 if book == "attnlrp" else 1.0
    expected: Arrays = {"v": half * c * (prob.swapaxes(1, 2) @ grad)}
    to_p = half * grad @ c.swapaxes(1, 2) * (book == "attnlrp")
    to_s = prob * (to_p - (to_p * prob).sum(-1, keepdims=True)) / 2
    expected |= {"q": a * (to_s @ b) / 2, "k": b * (to_s.swapaxes(1, 2) @ a) / 2}
    for n, values in expected.items():
        np.testing.assert_allclose(found[f"relevance/{n}"], values, rtol=1e-9, atol=1e-12)
    total = sum(found[f"relevance/{n}"].sum((1, 2)) for n in "qkv") + found["absorbed"]
    np.testing.assert_allclose(total, found["score"], rtol=1e-9, atol=1e-12)


def test_scores_behind_a_mask_can_be_reported() -> None:
    """Minus infinity holds no relevance, and no NaN comes of it."""
    net = Net()
    x = net.input("x", "N", 3)
    scores = net("Add", x, net.const([0, -np.inf, 0]))
    model = net.model(net("MatMul", net("Softmax", scores), net.weight(3, 2)))
    found = run_double(rewrite(model, "attnlrp", layers=[scores]).model, {"x": numbers(2, 3)})
    np.testing.assert_array_equal(found[f"relevance/{scores}"][:, 1], 0)
    np.testing.assert_allclose(found[f"relevance/{scores}"], found["relevance/x"], rtol=1e-9)
    assert found["relevance/x"].any()


@pytest.mark.parametrize("form", ["mask", "precision"])
def test_gradient_of_rows_that_are_masked_whole(form: str) -> None:
    """Zero for their queries, and finite for all, as torch has it if the row is left out."""
    torch = pytest.importorskip("torch")
    net = Net(opset=24 if form == "precision" else 23)
    names = [net.input(n, "N", 2, 3, 4) for n in "qkv"]
    keep = np.array([[True, True, False], [False] * 3, [True, False, True]])
    attrs = {"softmax_precision": 1, "qk_matmul_output_mode": 3} if form == "precision" else {}
    y = net("Attention", *names, net.const(keep, bool), name="layer", **attrs)
    feeds = {n: numbers(2, 2, 3, 4) for n in "qkv"}
    r = numbers(2, 2, 3, 4)
    explained = rewrite(net.model(y), "gradient", start="input", output=y).model
    found = run_double(explained, {**feeds, "start": r})
    q, k, v = inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in feeds.values()]
    scores = (q @ k.transpose(-1, -2) / 2)[..., [0, 2], :].masked_fill(~torch.tensor(keep[[0, 2]]), -torch.inf)
    result = scores.softmax(-1) @ v
    grads = torch.autograd.grad(result, inputs, torch.tensor(r[..., [0, 2], :], dtype=torch.float64))
    for n, expected in zip("qkv", grads, strict=True):
        np.testing.assert_allclose(found[f"relevance/{n}"], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert not found["relevance/q"][..., 1, :].any()


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": 1},
    "capped": {"softcap": 2.0},
    "scaled": {"scale": 0.3},
    "flat": {"q_num_heads": 4, "kv_num_heads": 2},
    "grouped": {},
}


def reference_attention(torch: Any, q: Any, k: Any, v: Any, name: str, book: str) -> Any:
    """The gradient form of the rules, in torch."""

    def halved(x: Any) -> Any:
        return (x + x.detach()) / 2

    if name == "flat":
        q, k, v = (x.unflatten(2, (h, 4)).transpose(1, 2) for x, h in ((q, 4), (k, 2), (v, 2)))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = halved(q @ k.transpose(-1, -2)) * (0.3 if name == "scaled" else q.shape[-1] ** -0.5)
    if name == "capped":
        s = s * (2 * torch.tanh(s / 2) / s).detach()
    if name == "causal":
        s = s + torch.full(s.shape[-2:], -torch.inf, dtype=s.dtype).triu(1)
    p = s.softmax(-1)
    y = halved(p @ v) if book == "attnlrp" else p.detach() @ v
    return y.transpose(1, 2).flatten(2) if name == "flat" else y


@pytest.mark.parametrize("book", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", ATTENTION)
def test_the_fused_operator_is_seen_through(name: str, book: str) -> None:
    torch = pytest.importorskip("torch")
    net = Net(opset=23)
    shapes = {"flat": [(3, 16), (3, 8), (3, 8)], "grouped": [(4, 3, 4), (2, 3, 4), (2, 3, 4)]}.get(
        name, [(2, 3, 4)] * 3
    )
    q, k, v = (net.input(n, "N", *shape) for n, shape in zip("qkv", shapes, strict=True))
    y = net("Attention", q, k, v, name="layer", **ATTENTION[name])
    model = net.model(y)
    notes = [note for note in noted(model, book) if "attention" in note]
    assert notes == ["attention: scores", "attention: values"]
    feeds = {n: numbers(2, *shape) for n, shape in zip("qkv", shapes, strict=True)}
    r = numbers(*run_double(model, feeds)[y].shape)
    explained = rewrite(model, book, start="input", output=y).model
    inputs = {n: torch.tensor(x, dtype=torch.float64, requires_grad=True) for n, x in feeds.items()}
    result = reference_attention(torch, *inputs.values(), name, book)
    found = run_double(explained, {**feeds, "start": r * result.detach().numpy()})
    grads = torch.autograd.grad(result, list(inputs.values()), torch.tensor(r, dtype=torch.float64), allow_unused=True)
    for (n, x), g in zip(inputs.items(), grads, strict=True):
        expected = 0 * x if g is None else x * g
        np.testing.assert_allclose(found[f"relevance/{n}"], expected.detach().numpy(), rtol=2e-4, atol=1e-5)


def test_what_onnxruntime_fused_is_refused_with_a_way_out() -> None:
    for op in ("Attention", "MultiHeadAttention", "SkipLayerNormalization", "EmbedLayerNormalization"):
        net = Net()
        x = net.input("x", "N", 3, 4)
        fused = net(op, x, net.weight(4, 12), net.weight(12), name="fused", domain="com.microsoft", num_heads=2)
        net.nodes.append(onnx.helper.make_node("Add", [fused, x], ["y"], name="end"))
        model = _foreign(net)
        with pytest.raises(UnsupportedOps, match=rf"com\.microsoft\.{op}") as caught:
            rewrite(model, "attnlrp")
        assert "before ONNX Runtime's optimisation" in caught.value.nodes[0].hint


def _foreign(net: Net) -> onnx.ModelProto:
    """A model with operators of ONNX Runtime's own."""
    end = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3, 4])
    graph = onnx.helper.make_graph(net.nodes, "net", net.inputs, [end], net.weights)
    domains = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
