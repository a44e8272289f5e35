"""The explanation of a Hadamard product: a small bilinear network by torch, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnx_lrp import Explainer, Hadamard, InputError, rewrite
from onnx_lrp.cli import main
from tests.layers import Net, quarters
from tests.support import run_double, worst

if TYPE_CHECKING:
    import torch

torch = pytest.importorskip("torch")
EXACT, SINGLE = 1e-9, 1e-5
SIZES = {"image": (3, 3, 6, 7), "tokens": (3, 5)}


def small(net: Net, *shape: int) -> str:
    """Add weights that leave a Tanh where it bends."""
    return net.const(quarters(net.rng, shape, zeros=False) / 4)


def mlb(scale: float = 1.0) -> onnx.ModelProto:
    """Low-rank bilinear attention over a picture, steered by words, and the product of both: two Muls of one shape.

    `scale` multiplies the weights of the answers, which come after the product.
    """
    net = Net(seed=3)
    image, tokens = net.input("image", "N", 3, 6, 7), net.input("tokens", "N", "T", dtype=TensorProto.INT64)
    embedded = net("Gather", small(net, 9, 4), tokens, out="embedded")
    q = net("Tanh", net("ReduceMean", net("Tanh", embedded), net.const([1], np.int64), keepdims=0))
    maps = net("Relu", net("Conv", image, small(net, 5, 3, 3, 3), small(net, 5)))
    maps = net("Relu", net("Conv", maps, small(net, 5, 5, 2, 2), small(net, 5)), out="maps")
    places = net("Transpose", net("Reshape", maps, net.const([0, 0, -1], np.int64)), perm=[0, 2, 1])
    seen = net("Tanh", net("MatMul", places, small(net, 5, 4)))
    asked = net("Unsqueeze", net("Tanh", net("MatMul", q, small(net, 4, 4))), net.const([1], np.int64))
    joint = net("Mul", net("Expand", asked, net("Shape", seen)), seen, name="attention")
    alpha = net("Softmax", net("MatMul", joint, small(net, 4, 1)), axis=1)
    looked = net("Squeeze", net("MatMul", net("Transpose", alpha, perm=[0, 2, 1]), places), net.const([1], np.int64))
    v = net("Tanh", net("Gemm", looked, small(net, 5, 6), small(net, 6)), out="V")
    other = net("Tanh", net("Gemm", q, small(net, 4, 6), small(net, 6)), out="Q")
    product = net("Mul", v, other, name="product", out="F")
    return net.model(net("Gemm", product, net.const(scale * np.ones((6, 4)))))


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "image": rng.standard_normal(SIZES["image"]).astype(np.float32),
        "tokens": rng.integers(0, 9, SIZES["tokens"]),
    }


def reference(factor: str | None, guided: bool) -> dict[str, np.ndarray]:
    """The gradients by autograd: of the picture through V, of the words through Q, or of both through one factor."""
    w = [torch.tensor(numpy_helper.to_array(t), dtype=torch.float64) for t in mlb().graph.initializer]
    floats = [t for t in w if not (t.ndim == 1 and t.dtype == torch.float64 and t.numel() in (1, 3))]

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return grad.clamp(min=0) * (x > 0) if guided else grad * (x > 0)

    table, k1, b1, k2, b2, ws, wa, wp, wv, bv, wq, bq, _ = floats
    image = torch.tensor(feeds()["image"], dtype=torch.float64, requires_grad=True)
    embedded = table[torch.tensor(feeds()["tokens"])].requires_grad_()
    q = embedded.tanh().mean(1).tanh()
    conv = torch.nn.functional.conv2d
    maps = Guided.apply(conv(Guided.apply(conv(image, k1, b1)), k2, b2))
    maps.retain_grad()
    places = maps.flatten(2).transpose(1, 2)
    alpha = (((q @ wa).tanh()[:, None] * (places @ ws).tanh()) @ wp).softmax(1)
    v = ((alpha * places).sum(1) @ wv + bv).tanh()
    other = (q @ wq + bq).tanh()
    product = (v * other).detach()
    energies = {"V": (v - product).square().sum(1) / 2, "Q": (other - product).square().sum(1) / 2}
    found: dict[str, Any] = {}
    used = ("V", "Q") if factor is None else (factor,)
    for name, mine in (("image", "V"), ("maps", "V"), ("embedded", "Q")):
        leaf = {"image": image, "maps": maps, "embedded": embedded}[name]
        by = factor or mine
        grads = torch.autograd.grad(energies[by].sum(), leaf, retain_graph=True, allow_unused=True)
        found[name] = np.zeros(leaf.shape) if grads[0] is None else grads[0].numpy()
    found["tokens"] = found["embedded"].sum(2)
    found["score"] = sum(energies[name] for name in used).detach().numpy()
    return found


OPTIONS = [(None, True), (None, False), (0, True), (0, False), (1, False)]


@pytest.mark.parametrize(("factor", "guided"), OPTIONS)
def test_torch(factor: int | None, guided: bool) -> None:
    """The picture reaches V alone; the words reach both factors, and Q is their own."""
    method = Hadamard("product", factor, guided)
    expected = reference(None if factor is None else "VQ"[factor], guided)
    layers = ["maps", "embedded"]
    exact = run_double(rewrite(mlb(), method, layers=layers).model, feeds())
    rounded = Explainer(mlb(), method, layers=layers, device="cpu", threads=1)(feeds())
    assert worst(exact["score"], expected["score"]) <= EXACT
    assert worst(rounded.score, expected["score"]) <= SINGLE
    for name in ("image", "tokens", *layers):
        if not expected[name].any():  # Q knows nothing of the picture
            assert factor == 1
            assert not exact[f"relevance/{name}"].any()
            continue
        assert worst(exact[f"relevance/{name}"], expected[name]) <= EXACT, name
        assert worst(rounded.relevance[name], expected[name]) <= SINGLE, name
    np.testing.assert_array_equal(exact["target_used"], [-1] * 3)


def test_the_relu_is_guided_only_if_asked() -> None:
    guided, plain = (reference(None, g)["image"] for g in (True, False))
    assert np.abs(guided - plain).max() > 1e-3 * np.abs(plain).max()
    assert {r.rule for r in rewrite(mlb(), Hadamard("product")).table if r.op == "Relu"} == {"guided"}
    assert {r.rule for r in rewrite(mlb(), Hadamard("product", guided=False)).table if r.op == "Relu"} == {"gradient"}


def test_magnitudes_of_tokens() -> None:
    """The sum of magnitudes over the features of each word, and nothing else is changed."""
    exact = run_double(rewrite(mlb(), Hadamard("product", magnitude=True)).model, feeds())
    expected = reference(None, True)
    assert worst(exact["relevance/tokens"], np.abs(expected["embedded"]).sum(2)) <= EXACT
    assert worst(exact["relevance/image"], expected["image"]) <= EXACT


def test_what_one_input_gets_does_not_depend_on_which_are_reported() -> None:
    both = run_double(rewrite(mlb(), Hadamard("product")).model, feeds())
    for name in ("image", "tokens"):
        alone = run_double(rewrite(mlb(), Hadamard("product"), inputs=[name]).model, feeds())
        np.testing.assert_allclose(alone[f"relevance/{name}"], both[f"relevance/{name}"], rtol=1e-12)


def test_answers_have_no_say_but_the_question_has() -> None:
    """The weights behind the product change no bit; other words change what is seen in the picture."""
    one, other = (Explainer(mlb(s), Hadamard("product"), device="cpu", threads=1) for s in (1.0, -3.0))
    a, b = one(feeds()), other(feeds())
    for name in a.relevance:
        np.testing.assert_array_equal(a.relevance[name], b.relevance[name])
    np.testing.assert_array_equal(a.score, b.score)
    changed = one(feeds() | {"tokens": feeds()["tokens"][::-1].copy()})
    assert worst(changed.relevance["image"], a.relevance["image"]) > 1e-3


def test_the_product_by_the_name_of_its_node_or_tensor() -> None:
    by_node, by_tensor = (run_double(rewrite(mlb(), Hadamard(n)).model, feeds()) for n in ("product", "F"))
    np.testing.assert_array_equal(by_node["relevance/image"], by_tensor["relevance/image"])
    inner = rewrite(mlb(), Hadamard("attention"), inputs=["image"]).model
    assert run_double(inner, feeds())["relevance/image"].any()


def two_branches(op: str = "Mul") -> onnx.ModelProto:
    """One input into both factors: each explains it."""
    net = Net(seed=1)
    x = net.input("x", "N", 4)
    a, b = (net("Tanh", net("MatMul", x, net.weight(4, 3))) for _ in range(2))
    return net.model(net("MatMul", net(op, a, b, name="only"), net.weight(3, 2)))


def test_an_input_of_both_factors_alike_is_explained_by_both() -> None:
    model = two_branches()
    x = np.random.default_rng(0).standard_normal((2, 4))
    both, first, second = (run_double(rewrite(model, Hadamard(factor=k)).model, {"x": x}) for k in (None, 0, 1))
    np.testing.assert_allclose(both["relevance/x"], first["relevance/x"] + second["relevance/x"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(both["score"], first["score"] + second["score"], rtol=1e-9)
    assert first["relevance/x"].any()
    assert second["relevance/x"].any()
    by_name = run_double(rewrite(model, "hadamard").model, {"x": x})
    np.testing.assert_array_equal(by_name["relevance/x"], both["relevance/x"])


def test_refused() -> None:
    with pytest.raises(
        InputError, match=r"several Mul .*: attention, product; name one, such as hadamard:node=product"
    ):
        rewrite(mlb(), "hadamard")
    with pytest.raises(InputError, match=r"'Softmax_22' is no Mul of two tensors.*: attention, product;"):
        rewrite(mlb(), Hadamard("Softmax_22"))
    with pytest.raises(InputError, match=r"needs a Mul of two tensors of one shape .*; there is none"):
        rewrite(two_branches("Add"), "hadamard")
    with pytest.raises(InputError, match="factor is 0 or 1"):
        Hadamard(factor=2)
    with pytest.raises(InputError, match="magnitude is True or False"):
        Hadamard(magnitude=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="image has no influence on the factors of product"):
        rewrite(mlb(), Hadamard("product", factor=1), inputs=["image"])
    with pytest.raises(InputError, match="explains no class"):
        rewrite(two_branches(), "hadamard", target=1)


def test_squares_and_broadcast_products_are_no_candidates() -> None:
    """x * x has one factor, a gate of another shape is no factor, and a constant is no input."""
    net = Net(seed=1)
    x = net.input("x", "N", 4)
    a = net("MatMul", x, net.weight(4, 3))
    square = net("Mul", a, a)
    gate = net("Mul", square, net("Sigmoid", net("MatMul", x, net.weight(4, 1))))
    y = net("Mul", gate, net.weight(3))
    with pytest.raises(InputError, match="there is none"):
        rewrite(net.model(y), "hadamard")


def test_a_gate_for_all_places_of_an_open_size_is_no_candidate() -> None:
    """Attention multiplies every place by one vector: also where the number of places is not known."""
    net = Net(seed=1)
    image, x = net.input("image", "N", 3, "H", "W"), net.input("x", "N", 3)
    gate = net("Unsqueeze", net("Tanh", x), net.const([2, 3], np.int64))
    pooled = net("ReduceMean", net("Mul", gate, net("Tanh", image)), net.const([2, 3], np.int64), keepdims=0)
    product = net("Mul", pooled, net("Sigmoid", x), name="meeting")
    explained = rewrite(net.model(product), "hadamard")
    rng = np.random.default_rng(0)
    found = run_double(explained.model, {"image": rng.standard_normal((2, 3, 4, 5)), "x": rng.standard_normal((2, 3))})
    assert found["relevance/image"].any()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The product is named behind the method."""
    monkeypatch.chdir(tmp_path)
    onnx.save(mlb(), "mlb.onnx")
    np.savez("sample.npz", **{k: v[:1] for k, v in feeds().items()})
    assert main(["explain", "mlb.onnx", "sample.npz", "-m", "hadamard:node=product", "-o", "h.npz"]) == 0
    assert "explained   no class, score" in capsys.readouterr().out
    with np.load("h.npz") as found:
        assert worst(found["relevance/image"], reference(None, True)["image"][:1]) <= SINGLE
    both = ["-m", "hadamard:node=product,guided=False", "-m", "gradient"]
    assert main(["explain", "mlb.onnx", "sample.npz", *both, "-o", "both.png", "-q"]) == 0
    assert main(["rewrite", "mlb.onnx", "-m", "hadamard:node=product", "-q"]) == 0
    for argv, words in (
        (["-m", "hadamard"], "attention, product; name one, such as hadamard:node=product"),
        (["-m", "hadamard:node=product", "--start", "one"], "leave --output, --start, --against and --target away"),
        (["-m", "hadamard:node=product", "-t", "1"], "by a method that explains no class"),
    ):
        capsys.readouterr()
        assert main(["explain", "mlb.onnx", "sample.npz", *argv, "-o", "no.png"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert main(["methods"]) == 0
    assert "hadamard" in capsys.readouterr().out
