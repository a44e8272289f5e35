"""Integrated gradients, SmoothGrad and DeepLIFT: captum's and zennit's values, completeness, forms, what is refused."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnx_lrp
from onnx_lrp import DeepLift, InputError, IntegratedGradients, SmoothGrad
from onnx_lrp.methods import find_method
from tests.layers import Net
from tests.peers.zennit_peer import zennit
from tests.support import run_double, to_double, worst

if TYPE_CHECKING:
    import torch

TARGETS = [3, 7, 0]
EXACT, SINGLE = 1e-8, 1e-4
CAPTUM = 1e-7  # captum keeps the weights of its steps in float32, whatever the model computes in
QUADRATURES = {
    "gauss_legendre": "gausslegendre",
    "riemann_left": "riemann_left",
    "riemann_right": "riemann_right",
    "riemann_middle": "riemann_middle",
    "riemann_trapezoid": "riemann_trapezoid",
}


@functools.cache
def net(name: str) -> torch.nn.Module:
    """Small nets, for the reference implementation computes each of many versions slowly."""
    torch = pytest.importorskip("torch")
    from exporters.torch_nets import Addition, randomize

    nn = torch.nn

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.sum, self.relu = Addition(), nn.ReLU6()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.sum(self.norm(self.convolution(x)), x))

    dense = [nn.Flatten(), nn.Linear(96, 10)]
    layers = {
        "pooled": [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()],
        "overlapping": [nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
        "residual": [nn.Conv2d(3, 6, 3, 2, 1), nn.Sigmoid(), Residual(), nn.AvgPool2d(1)],
        "strided": [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1, groups=3), nn.ReLU()],
    }
    return randomize(nn.Sequential(*layers[name], *dense)).eval()


@functools.cache
def source(name: str) -> onnx.ModelProto:
    from exporters.torch_nets import export

    return export(net(name), None, (1, 3, 8, 8))


def pictures(seed: int = 0, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)


def double(model: onnx.ModelProto, method: Any, feeds: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """Explain in float64; return all outputs."""
    return run_double(onnx_lrp.rewrite(to_double(model), method, **options).model, feeds)


def single(model: onnx.ModelProto, method: Any, feeds: Any, target: Any = None, **options: Any) -> Any:
    return onnx_lrp.Explainer(model, method, device="cpu", threads=1, **options)(feeds, target=target)


def wide(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.as_tensor(array, dtype=torch.float64)


def captum_integrated(name: str, x: np.ndarray, x0: Any, steps: int, quadrature: str) -> tuple[np.ndarray, np.ndarray]:
    import copy

    attr = pytest.importorskip("captum.attr")
    method = attr.IntegratedGradients(copy.deepcopy(net(name)).double().eval(), multiply_by_inputs=True)
    options = {"target": TARGETS, "n_steps": steps, "method": QUADRATURES[quadrature]}
    found, delta = method.attribute(wide(x), x0, return_convergence_delta=True, **options)
    return found.numpy(), delta.numpy()


# ---- integrated gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_captum_integrated_gradients(quadrature: str) -> None:
    x, x0, steps = pictures(), pictures(1), 7
    expected, delta = captum_integrated("pooled", x, wide(x0), steps, quadrature)
    if quadrature == "riemann_trapezoid":
        # captum divides by the number of nodes, of which there is one more than intervals: its weights sum to 6/7.
        rise = expected.reshape(3, -1).sum(1) - delta
        expected = expected * steps / (steps - 1)
        delta = expected.reshape(3, -1).sum(1) - rise
    method = IntegratedGradients(steps, "input", quadrature)
    exact = double(source("pooled"), method, {"input": x, "target": np.array(TARGETS), "baseline": x0})
    assert worst(exact["relevance/input"], expected) <= CAPTUM
    np.testing.assert_allclose(exact["delta"], delta, atol=CAPTUM)
    rounded = single(source("pooled"), method, {"input": x, "baseline": x0}, TARGETS)
    assert worst(rounded.relevance["input"], expected) <= SINGLE
    np.testing.assert_allclose(rounded.delta, delta, atol=1e-4 * np.abs(expected).sum())


@pytest.mark.parametrize("name", ["pooled", "overlapping", "residual"])
def test_captum_integrated_gradients_on_nets(name: str) -> None:
    """From a number, with several chunks of steps."""
    x = pictures()
    expected, delta = captum_integrated(name, x, 0.5, 10, "gauss_legendre")
    method = IntegratedGradients(10, baseline=0.5)
    exact = double(source(name), method, {"input": x, "target": np.array(TARGETS)})
    assert worst(exact["relevance/input"], expected) <= CAPTUM
    np.testing.assert_allclose(exact["delta"], delta, atol=CAPTUM)
    assert worst(single(source(name), method, x, TARGETS).relevance["input"], expected) <= SINGLE


def test_zennit_integrated_gradients() -> None:
    """zennit's definition: sums at the right ends, from zero."""
    import copy

    attribution = zennit().attribution
    x, twin = pictures(), copy.deepcopy(net("pooled")).double().eval()
    with attribution.IntegratedGradients(twin, n_iter=12) as attributor:
        _, expected = attributor(wide(x), np_one_hot())
    found = double(source("pooled"), IntegratedGradients(12, 0.0, "riemann_right"), feeds(x))
    assert worst(found["relevance/input"], expected.numpy()) <= EXACT


def np_one_hot() -> torch.Tensor:
    return wide(np.eye(10)[TARGETS])


def feeds(x: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"input": x, "target": np.array(TARGETS[: len(x)]), **more}


def test_the_delta_falls_with_the_steps() -> None:
    """By at least one over the square of their number, for midpoints."""
    x = pictures()
    deltas = []
    for steps in (2, 8, 32):
        found = double(source("residual"), IntegratedGradients(steps, -1.0, "riemann_middle"), feeds(x))
        scale = np.abs(found["relevance/input"]).reshape(3, -1).sum(1)
        deltas.append(float((np.abs(found["delta"]) / scale).max()))
    assert deltas[0] > deltas[1] > deltas[2]
    assert deltas[2] <= 1e-3


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_an_affine_model_is_exact(quadrature: str) -> None:
    model = Net()
    y = model("Gemm", model("Flatten", model.input("x", "N", 2, 3)), model.weight(6, 4), model.weight(4))
    proto, x = model.model(y), np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(float)
    for steps in (2, 3, 5) if quadrature == "riemann_trapezoid" else (1, 2, 5):
        found = double(proto, IntegratedGradients(steps, 0.25, quadrature), {"x": x, "target": np.array([1, 2])})
        expected = (x.astype(float) - 0.25) * weight[:, [1, 2]].T.reshape(2, 2, 3)
        assert worst(found["relevance/x"], expected) <= 1e-12
        assert np.abs(found["delta"]).max() <= 1e-12


@pytest.mark.parametrize("method", [functools.partial(IntegratedGradients, 10), functools.partial(SmoothGrad, 10)])
def test_chunks_are_equal(method: Any) -> None:
    x = pictures()
    expected = double(source("pooled"), method(chunk=1), feeds(x))["relevance/input"]
    for chunk in (3, 99):
        found = double(source("pooled"), method(chunk=chunk), feeds(x))
        assert worst(found["relevance/input"], expected) <= 1e-12
        assert worst(single(source("pooled"), method(chunk=chunk), x, TARGETS).relevance["input"], expected) <= SINGLE


@pytest.mark.parametrize("make", [IntegratedGradients, DeepLift])
def test_at_the_baseline_there_is_nothing(make: Any) -> None:
    x = pictures()
    method = IntegratedGradients(5, "input") if make is IntegratedGradients else DeepLift("input")
    found = double(source("strided"), method, feeds(x, baseline=x))
    assert not found["relevance/input"].any()
    assert not found["delta"].any()


@pytest.mark.parametrize("make", [IntegratedGradients, DeepLift])
def test_baselines(make: Any) -> None:
    """A number is the same as that number fed; one fed row serves all samples, and one per sample each its own."""
    x = pictures()
    number = single(source("pooled"), make(baseline=0.5), x, TARGETS)
    fed = make(baseline="input")
    for shape in ((1, 1, 1, 1), (1, 3, 1, 1), x.shape):
        found = single(source("pooled"), fed, {"input": x, "baseline": np.full(shape, 0.5, np.float32)}, TARGETS)
        assert worst(found.relevance["input"], number.relevance["input"]) <= 1e-5
    zero = single(source("pooled"), make(), x, TARGETS)
    assert worst(single(source("pooled"), fed, x, TARGETS).relevance["input"], zero.relevance["input"]) <= 1e-6
    own = single(source("pooled"), fed, {"input": x, "baseline": pictures(1)}, TARGETS, batch_size=2)
    alone = single(source("pooled"), fed, {"input": x[2:], "baseline": pictures(1)[2:]}, TARGETS[2])
    assert worst(own.relevance["input"][2:], alone.relevance["input"]) <= 1e-5


# ---- several inputs, tokens, fixed batches ---------------------------------------------------------------------------


def two_inputs(batch: int | str = "N") -> onnx.ModelProto:
    """A product of two branches, and a sum."""
    model = Net(seed=4)
    a, b = model.input("a", batch, 6), model.input("b", batch, 4)
    left = model("Tanh", model("Gemm", a, model.weight(6, 5), model.weight(5)))
    right = model("Sigmoid", model("MatMul", b, model.weight(4, 5)))
    return model.model(model("MatMul", model("Add", model("Mul", left, right), left), model.weight(5, 3)))


def two_feeds(count: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {n: rng.standard_normal((count, k)).astype(np.float32) for n, k in (("a", 6), ("b", 4))}


def two_in_torch(proto: onnx.ModelProto) -> Any:
    import torch

    w = [wide(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer]

    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        left, right = torch.tanh(a @ w[0] + w[1]), torch.sigmoid(b @ w[2])
        return (left * right + left) @ w[3]

    return forward


def test_several_inputs_move_together() -> None:
    attr = pytest.importorskip("captum.attr")
    proto, x = two_inputs(), two_feeds()
    start = {"a": 0.5, "b": -0.25}
    expected, delta = attr.IntegratedGradients(two_in_torch(proto)).attribute(
        tuple(wide(v) for v in x.values()),
        tuple(start.values()),
        target=[1, 2],
        return_convergence_delta=True,
        n_steps=9,
    )
    found = double(proto, IntegratedGradients(9, start), {**x, "target": np.array([1, 2])})
    for name, theirs in zip(x, expected, strict=True):
        assert worst(found[f"relevance/{name}"], theirs.numpy()) <= CAPTUM
    size = sum(np.abs(theirs.numpy()).sum(1) for theirs in expected)
    assert (np.abs(found["delta"] - delta.numpy()) <= CAPTUM * size).all()
    fed = {f"baseline/{n}": np.full((1, 1), v, np.float32) for n, v in start.items()}
    again = single(proto, IntegratedGradients(9, "input"), {**x, **fed}, [1, 2])
    for name in x:
        assert worst(again.relevance[name], found[f"relevance/{name}"]) <= SINGLE
    half = double(proto, IntegratedGradients(9, {"a": "input", "b": -0.25}), {**x, "target": np.array([1, 2])})
    none = double(proto, IntegratedGradients(9, {"a": 0.0, "b": -0.25}), {**x, "target": np.array([1, 2])})
    assert worst(half["relevance/b"], none["relevance/b"]) <= EXACT


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "deeplift"])
def test_a_fixed_batch(method: str) -> None:
    """The same values where the batch is fixed to one, and so one version is computed at a time."""
    x = two_feeds(1)
    free = double(two_inputs(), method, {**x, "target": np.array([1])})
    fixed = double(two_inputs(1), method, {**x, "target": np.array([1])})
    for name in x:
        assert worst(fixed[f"relevance/{name}"], free[f"relevance/{name}"]) <= 1e-12
        rounded = single(two_inputs(1), method, {n: np.tile(v, (2, 1)) for n, v in x.items()}, 1).relevance[name]
        assert worst(rounded[1:], free[f"relevance/{name}"]) <= SINGLE


@pytest.mark.parametrize("method", ["integrated_gradients", "deeplift"])
def test_an_empty_batch(method: str) -> None:
    session = onnx_lrp.Explainer(two_inputs(), method, device="cpu").session
    found = session.run(two_feeds(0))
    assert found["relevance/a"].shape == (0, 6)
    assert found["delta"].shape == (0,)


def tokens() -> onnx.ModelProto:
    """Embeddings, their mean, a dense layer; the number of tokens is read off the ids."""
    model = Net(seed=5)
    ids = model.input("ids", "N", "T", dtype=TensorProto.INT64)
    rows = model("Gather", model.weight(11, 6), ids)
    shape = model("Concat", model("Shape", ids), model.const([2, 3], np.int64), axis=0)
    heads = model("Tanh", model("Reshape", rows, shape))
    mean = model("ReduceMean", heads, model.const([1], np.int64), keepdims=0)
    return model.model(model("MatMul", model("Flatten", mean), model.weight(6, 4)))


def test_tokens_move_in_their_embeddings() -> None:
    import torch

    proto, ids = tokens(), np.array([[1, 5, 5, 2], [0, 3, 10, 7]])
    table, dense = (
        wide(onnx.numpy_helper.to_array(t)) for t in (proto.graph.initializer[0], proto.graph.initializer[-1])
    )
    rows, steps = table[torch.as_tensor(ids)], 6
    expected = torch.zeros_like(rows)
    places, weights = np.polynomial.legendre.leggauss(steps)
    for place, weight in zip(places, weights, strict=True):
        moved = (rows * (place + 1) / 2).detach().requires_grad_()
        score = (torch.tanh(moved).mean(1) @ dense)[[0, 1], [2, 3]].sum()
        expected += torch.autograd.grad(score, moved)[0] * weight / 2
    found = double(proto, IntegratedGradients(steps), {"ids": ids, "target": np.array([2, 3])})
    assert worst(found["relevance/ids"], (expected * rows).sum(-1).numpy()) <= EXACT


@pytest.mark.parametrize("method", [functools.partial(IntegratedGradients, 6), DeepLift])
def test_paths_that_begin_at_tokens(method: Any) -> None:
    """The same as from the rows of these tokens, one for all, one per place, or another text per sample."""
    proto, ids = tokens(), np.array([[1, 5, 5, 2], [0, 3, 10, 7]])
    table = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(float)
    for start in ([[4]], [[4, 0, 9, 2]], [[4, 0, 9, 2], [1, 1, 8, 7]]):
        asked = {"ids": ids, "target": np.array([2, 3])}
        found = double(proto, method(baseline={"ids": "tokens"}), {**asked, "baseline": np.array(start)})
        expected = double(proto, method(baseline="input"), {**asked, "baseline": table[start]})
        for name in ("relevance/ids", "delta"):
            assert worst(found[name], expected[name]) <= EXACT
    assert np.abs(found["relevance/ids"][1, 3]).max() == 0  # token 7 is token 7
    alone = single(proto, method(baseline="tokens"), {"ids": ids, "baseline": [[4]]}, [2, 3], batch_size=1)
    expected = double(proto, method(baseline="input"), {**asked, "baseline": table[[[4]]]})
    assert worst(alone.relevance["ids"], expected["relevance/ids"]) <= SINGLE
    zeroth = double(proto, method(baseline="tokens"), asked)["relevance/ids"]
    assert np.abs(zeroth[1, 0]) == 0
    assert worst(zeroth, double(proto, method(baseline=0.0), asked)["relevance/ids"]) > 1e-3


def test_only_tokens_begin_at_tokens() -> None:
    with pytest.raises(InputError, match="for the embeddings of token ids, which 'a' is not"):
        onnx_lrp.rewrite(two_inputs(), IntegratedGradients(baseline="tokens"))


def test_inner_tensors_move() -> None:
    """A tensor inside the model is moved itself where it is named with inputs=."""
    layer = next(n.output[0] for n in source("pooled").graph.node if n.op_type == "Relu")
    x = pictures()
    found = double(source("pooled"), IntegratedGradients(20), feeds(x), inputs=[layer])
    score = double(source("pooled"), "gradient", feeds(x))["score"]
    total = found[f"relevance/{layer}"].reshape(3, -1).sum(1)
    assert found[f"relevance/{layer}"].shape == (3, 6, 8, 8)
    rise = total - found["delta"]
    assert np.isfinite(rise).all()
    assert (np.abs(rise - score) < np.abs(score) + 10).all()


# ---- SmoothGrad ------------------------------------------------------------------------------------------------------


def test_zennit_smoothgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    """zennit's definition on the very same noise; its last copy is the picture itself."""
    import copy

    import torch

    attribution, x, samples = zennit().attribution, pictures(), 5
    drawn = iter(noise(samples, x.shape[1:]))
    monkeypatch.setattr(torch, "randn_like", lambda like: wide(next(drawn)).expand_as(like))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: wide(next(drawn)).expand(*shape))
    twin = copy.deepcopy(net("pooled")).double().eval()
    with attribution.SmoothGrad(twin, noise_level=0.2, n_iter=samples + 1) as attributor:
        _, theirs = attributor(wide(x), np_one_hot())
    plain = double(source("pooled"), "gradient", feeds(x))["relevance/input"]
    found = double(source("pooled"), SmoothGrad(samples, 0.2), feeds(x))["relevance/input"]
    assert worst((found * samples + plain) / (samples + 1), theirs.numpy()) <= EXACT


def noise(samples: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The noise of a graph, read off a model that is the sum of its input's squares: its gradient is 2 (x + g)."""
    model = Net()
    x = model.input("x", "N", *shape)
    y = model("ReduceSum", model("Mul", x, x), model.const(range(1, len(shape) + 1), np.int64), keepdims=1)
    proto = model.model(model("Flatten", y))
    ramp = np.zeros((1, *shape), np.float32)
    ramp.flat[-1] = 1.0  # a range of one
    sums = [np.zeros((1, *shape))]
    for count in range(1, samples + 1):
        mean = double(proto, SmoothGrad(count, 1.0, seed), {"x": ramp})["relevance/x"] / 2 - ramp
        sums.append(mean * count)
    return np.diff(np.stack(sums), axis=0)[:, 0]


def test_the_noise_is_normal() -> None:
    """Kolmogorov's and Smirnov's distance of 20,000 numbers, their moments, and no echo between copies or places."""
    from math import erf

    drawn = noise(8, (50, 50))
    ordered = np.sort(drawn.reshape(-1))
    normal_cdf = np.array([(1 + erf(v / np.sqrt(2))) / 2 for v in ordered])
    assert np.abs(normal_cdf - np.arange(1, len(ordered) + 1) / len(ordered)).max() < 1.63 / np.sqrt(len(ordered))
    rows = drawn.reshape(8, -1)
    echoes = np.corrcoef(rows) - np.eye(8)
    assert np.abs(echoes).max() < 4 / np.sqrt(rows.shape[1])
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 4 / np.sqrt(rows.size)
    other = noise(1, (50, 50), seed=1)
    assert abs(np.corrcoef(other[0].reshape(-1), rows[0])[0, 1]) < 4 / np.sqrt(rows.shape[1])


def test_smoothgrad_does_not_depend_on_the_batch() -> None:
    x, explainer = pictures(), onnx_lrp.Explainer(source("pooled"), "smoothgrad", device="cpu", threads=1)
    whole = explainer(x, target=TARGETS).relevance["input"]
    np.testing.assert_array_equal(explainer(x, target=TARGETS).relevance["input"], whole)
    for i in range(3):
        assert worst(explainer(x[i : i + 1], target=TARGETS[i]).relevance["input"], whole[i : i + 1]) <= 1e-5
    exact = double(source("pooled"), "smoothgrad", feeds(x))["relevance/input"]
    assert worst(whole, exact) <= SINGLE
    other = single(source("pooled"), SmoothGrad(seed=1), x, TARGETS).relevance["input"]
    assert worst(other, whole) > 1e-2


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    x, layer = pictures(), next(n.output[0] for n in source("pooled").graph.node if n.op_type == "Relu")
    found = double(source("pooled"), SmoothGrad(3, 0.0), feeds(x), layers=[layer])
    plain = double(source("pooled"), "gradient", feeds(x), layers=[layer])
    for name in ("relevance/input", f"relevance/{layer}"):
        assert worst(found[name], plain[name]) <= 1e-12


# ---- DeepLIFT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pooled", "overlapping", "residual", "strided"])
def test_deeplift_by_definition(name: str) -> None:
    from tests.peers.deeplift_peer import deeplift

    x, x0 = pictures(), pictures(1)
    expected = deeplift(net(name), x, x0, TARGETS)
    found = double(source(name), DeepLift("input"), feeds(x, baseline=x0))
    assert worst(found["relevance/input"], expected) <= EXACT
    assert np.abs(found["delta"]).max() <= 1e-9
    rounded = single(source(name), DeepLift("input"), {"input": x, "baseline": x0}, TARGETS)
    assert worst(rounded.relevance["input"], expected) <= SINGLE
    assert np.abs(rounded.delta).max() <= 1e-4


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_captum_deeplift(start: float) -> None:
    """On a net without max pooling, where captum's contributions sum to what they should."""
    import copy

    attr = pytest.importorskip("captum.attr")
    x, twin = pictures(), copy.deepcopy(net("strided")).double().eval()
    baseline = wide(np.full(x.shape, start))
    expected, delta = attr.DeepLift(twin).attribute(wide(x), baseline, target=TARGETS, return_convergence_delta=True)
    assert delta.abs().max() <= 1e-9
    found = double(source("strided"), DeepLift(start), feeds(x))
    assert worst(found["relevance/input"], expected.detach().numpy()) <= EXACT
    rounded = single(source("strided"), DeepLift(start), x, TARGETS)
    assert worst(rounded.relevance["input"], expected.detach().numpy()) <= SINGLE


def test_deeplift_of_products_and_softmax() -> None:
    """Contributions of products, attention and normalization sum to the rise of the score, too."""
    proto, x = two_inputs(), two_feeds()
    found = double(proto, DeepLift({"a": 0.5, "b": -0.25}), {**x, "target": np.array([1, 2])})
    assert np.abs(found["delta"]).max() <= 1e-12
    model = Net(seed=6)
    a = model.input("a", "N", 5, 4)
    q, k = (model("MatMul", a, model.weight(4, 4)) for _ in range(2))
    weights = model("Softmax", model("MatMul", q, model("Transpose", k, perm=[0, 2, 1])), axis=-1)
    y = model("LayerNormalization", model("MatMul", weights, a), model.weight(4), model.weight(4))
    proto = model.model(model("ReduceMean", y, model.const([1], np.int64), keepdims=0))
    a = np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32) / 4
    found = double(proto, DeepLift(0.25), {"a": a, "target": np.array([1, 2])})
    assert np.abs(found["delta"]).max() <= 1e-9


def test_deeplift_of_a_product_by_hand() -> None:
    """Each factor gets its own change times the mean of the other."""
    model = Net()
    y = model("Mul", model.input("a", "N", 1), model.input("b", "N", 1))
    x = {"a": np.array([[3.0]], np.float32), "b": np.array([[5.0]], np.float32)}
    found = double(model.model(y), DeepLift({"a": 1.0, "b": 1.0}), x)
    assert found["relevance/a"].item() == pytest.approx(2 * 3, abs=1e-12)
    assert found["relevance/b"].item() == pytest.approx(4 * 2, abs=1e-12)


# ---- forms and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["integrated_gradients:steps=6", "smoothgrad:samples=4", "deeplift"])
@pytest.mark.parametrize("option", ["switch", "portable"])
def test_forms(method: str, option: str) -> None:
    x = pictures()
    expected = single(source("pooled"), method, x, TARGETS).relevance["input"]
    assert worst(single(source("pooled"), method, x, TARGETS, **{option: True}).relevance["input"], expected) <= SINGLE


@pytest.mark.parametrize("method", ["integrated_gradients:steps=6", "smoothgrad:samples=4", "deeplift"])
def test_weights_are_not_copied(method: str) -> None:
    plain = source("pooled").ByteSize()
    assert onnx_lrp.rewrite(source("pooled"), method).model.ByteSize() <= plain * 1.05 + 60_000


@pytest.mark.parametrize("method", ["integrated_gradients:steps=6", "smoothgrad:samples=4", "deeplift"])
def test_verify(method: str) -> None:
    from onnx_lrp.verify import verify

    assert verify(source("residual"), pictures(count=1), method).ok


def test_parameters_in_words() -> None:
    assert find_method("integrated_gradients:steps=9,baseline=input,quadrature=riemann_left") == IntegratedGradients(
        9, "input", "riemann_left"
    )
    assert find_method("smoothgrad:noise=0.5") == SmoothGrad(noise=0.5)
    assert find_method("deeplift:baseline=-1") == DeepLift(-1)
    with pytest.raises(InputError, match=r"'smoothgrad' has no parameter 'stpes=3'; it takes samples=20, noise=0\.1"):
        find_method("smoothgrad:stpes=3")
    with pytest.raises(InputError, match="'gradient' has no parameter 'x=3'; it takes none"):
        find_method("gradient:x=3")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntegratedGradients(0), "steps is a whole number of at least 1, not 0"),
        (lambda: IntegratedGradients(1, quadrature="riemann_trapezoid"), "steps is a whole number of at least 2"),
        (lambda: IntegratedGradients(chunk=0), "chunk is a whole number of at least 1"),
        (lambda: IntegratedGradients(quadrature="simpson"), "quadrature is one of gauss_legendre, .*not 'simpson'"),
        (lambda: SmoothGrad(samples=True), "samples is a whole number"),
        (lambda: SmoothGrad(noise=-0.1), "noise is a share of the sample's range, 0 or more, not -0.1"),
        (lambda: SmoothGrad(seed=-1), "seed is a whole number of at least 0"),
    ],
)
def test_numbers_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("make", [IntegratedGradients, DeepLift])
def test_what_is_refused(make: Any) -> None:
    layer = next(n.output[0] for n in source("pooled").graph.node if n.op_type == "Relu")
    with pytest.raises(InputError, match=f"moves what it reports on, and '{layer}' depends on 'input'"):
        onnx_lrp.rewrite(source("pooled"), make(), layers=[layer])
    with pytest.raises(InputError, match="has a baseline for 'nope', which is not moved; moved: input"):
        onnx_lrp.rewrite(source("pooled"), make(baseline={"nope": 0.0}))
    with pytest.raises(InputError, match='a baseline is a number or "input"'):
        onnx_lrp.rewrite(source("pooled"), make(baseline="zero"))


@pytest.mark.parametrize("method", ["integrated_gradients", "deeplift"])
def test_samples_on_any_axis(method: str) -> None:
    """A state with its samples second, as recurrent networks have it: contributions sum sample by sample."""
    model = Net(seed=8)
    a, state = model.input("a", "N", 4), model.input("state", 2, "N", 4)
    summed = model("ReduceSum", model("Tanh", state), model.const([0], np.int64), keepdims=0)
    proto = model.model(model("MatMul", model("Mul", model("Sigmoid", a), summed), model.weight(4, 3)))
    rng = np.random.default_rng(2)
    x = {"a": rng.standard_normal((3, 4)), "state": rng.standard_normal((2, 3, 4))}
    wide_feeds = {n: v.astype(np.float32) for n, v in x.items()}
    found = double(proto, method, {**wide_feeds, "target": np.array([0, 2, 1])})
    logits = run_double(proto, wide_feeds)[proto.graph.output[0].name][range(3), [0, 2, 1]]
    total = found["relevance/a"].sum(1) + found["relevance/state"].sum((0, 2))
    assert found["delta"].shape == (3,)
    np.testing.assert_allclose(total - found["delta"], logits, atol=1e-9)  # at the baseline of zeros it is zero
    assert np.abs(found["delta"]).max() <= 1e-6
