"""The captioning book on networks that describe a picture: agreement with an oracle by autograd, and the account."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import onnx_lrp
from onnx_lrp.composite import read_book
from onnx_lrp.methods import LRP
from onnx_lrp.runtime import Session
from tests.captioning_nets import CHANNELS, DECODERS, SIZE, WIDTH, WORDS, Adaptive, Decoder, Heads, captioner, decoder
from tests.captioning_nets import exported as export
from tests.layers import Net, explain
from tests.support import numbers, run_double, worst
from tests.surrogate import Plain, Surrogate

WORD = 4  # the word whose logit is explained
STEPS = 2  # how many words there are before it
EPSILONS = [(0.0, 0.0), (0.01, 1e-6)]  # of sums and linear layers, of averages and pools
EXPORTERS = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
NAMES = pytest.mark.parametrize("name", DECODERS)


@dataclass
class Sample:
    """Pictures or features, and the words so far."""

    image: Tensor
    features: Tensor
    words: Tensor


@pytest.fixture
def sample() -> Sample:
    torch.manual_seed(0)
    image, features = torch.randn(2, 3, SIZE, SIZE), torch.rand(2, CHANNELS, 3, 3)
    return Sample(image, features, torch.randint(0, WORDS, (2, STEPS)))


def book(epsilon: float, proportion: float) -> LRP:
    """The captioning book, with these stabilizers in place of 0.01 and of those that are there for zeros only."""
    composite = read_book("captioning")
    rules = ("norm", "epsilon", "gate", "alpha_beta", "proportional", "share")

    def changed(assignment: onnx_lrp.composite.Assignment) -> onnx_lrp.composite.Assignment:
        given = assignment.parameters.get("epsilon")
        if assignment.rule not in rules or given == 0.0:
            return assignment
        stabilizer = epsilon if given == 0.01 else proportion
        return replace(assignment, parameters={**assignment.parameters, "epsilon": stabilizer})

    return LRP(replace(composite, assignments=tuple(changed(a) for a in composite.assignments)))


@functools.cache
def exported(name: str, whole: bool, double: bool, dynamo: bool) -> onnx.ModelProto:
    """A network as a file: encoder and decoder, or the decoder alone."""
    net = captioner(name) if whole else decoder(name)
    net = net.double() if double else net
    first = torch.zeros((2, 3, SIZE, SIZE) if whole else (2, CHANNELS, 3, 3), dtype=next(net.parameters()).dtype)
    return export(net, first, torch.zeros((2, STEPS), dtype=torch.int64), dynamo)


def oracle(net: nn.Module, first: Tensor, words: Tensor, how: Plain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relevance of picture or features, and of words; and the logit."""
    net = net.double()
    x = first.double().requires_grad_()
    inner: Decoder = net if isinstance(net, Decoder) else net.decoder
    rows = inner.embedding(words).detach().requires_grad_()
    features = x if isinstance(net, Decoder) else net.encoder.run(x, how=how)
    logit = inner.decode(features, rows, how)[:, WORD]
    logit.sum().backward()
    return (x * x.grad).detach().numpy(), (rows * rows.grad).sum(-1).detach().numpy(), logit.detach().numpy()


@NAMES
def test_the_oracle_is_the_model(name: str, sample: Sample) -> None:
    """A surrogate has the values of the model, whatever its stabilizers."""
    net = captioner(name).double()
    with torch.no_grad():
        logits = net(sample.image.double(), sample.words).numpy()
        for epsilon, proportion in EPSILONS:
            found = net.run(sample.image.double(), sample.words, how=Surrogate(epsilon, proportion))
            assert worst(found.numpy(), logits) <= 1e-12


def test_the_nets_are_what_they_are_named(sample: Sample) -> None:
    """Each form is in the file as it should be."""
    for dynamo in (False, True):
        ops = {name: Counter(n.op_type for n in exported(name, True, False, dynamo).graph.node) for name in DECODERS}
        assert all(c["BatchNormalization"] == 2 and c["MaxPool"] == c["AveragePool"] == 1 for c in ops.values())
        assert ops["LSTM operator"]["LSTM"] == ops["LSTM operator without a first state"]["LSTM"] == 1
        assert ops["two LSTMs"]["LSTM"] == 0
        assert ops["two LSTMs"]["Sigmoid"] == STEPS * 7  # three gates of two LSTMs, one of the sentinel
        assert ops["weighted sum"]["ReduceSum"] == STEPS


# ---- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@EXPORTERS
@NAMES
@pytest.mark.parametrize(("epsilon", "proportion"), EPSILONS, ids=["exact", "stabilized"])
def test_picture_and_words_agree_with_the_oracle(
    name: str, dynamo: bool, epsilon: float, proportion: float, sample: Sample
) -> None:
    """In float32 through ONNX Runtime, and in float64 through ONNX's reference (one exporter: the other takes long)."""
    image, words, logit = oracle(captioner(name), sample.image, sample.words, Surrogate(epsilon, proportion))
    feeds = {"image": sample.image.numpy(), "words": sample.words.numpy()}
    for double in (False,) if dynamo else (False, True):
        model = onnx_lrp.rewrite(exported(name, True, double, dynamo), book(epsilon, proportion), target=WORD).model
        if double:
            found = run_double(model, feeds | {"image": feeds["image"].astype(np.float64)})
        else:
            found = Session(model, device="cpu", threads=1).run(feeds)
        limit = 1e-9 if double else 1e-4
        assert worst(found["relevance/image"], image) <= limit
        assert worst(found["relevance/words"], words) <= limit
        assert worst(found["score"], logit) <= limit


@pytest.mark.filterwarnings("ignore")
def test_the_book_has_the_stabilizers_of_the_paper(sample: Sample) -> None:
    """As it is bundled: 0.01 everywhere but in averages, pools and shortcuts."""
    expected = oracle(captioner("one LSTM"), sample.image, sample.words, Surrogate(0.01, 1e-6))
    model = onnx_lrp.rewrite(exported("one LSTM", True, True, False), "captioning", target=WORD).model
    found = run_double(model, {"image": sample.image.numpy().astype(np.float64), "words": sample.words.numpy()})
    assert worst(found["relevance/image"], expected[0]) <= 1e-9
    assert worst(found["relevance/words"], expected[1]) <= 1e-9


def test_gates_keys_and_queries_matter_to_the_words(sample: Sample) -> None:
    """The oracle tells this book from one that shares between weights and values."""
    expected = oracle(captioner("two LSTMs"), sample.image, sample.words, Surrogate(0.0))[1]
    model = onnx_lrp.rewrite(exported("two LSTMs", True, True, False), "lrp_0", target=WORD).model
    found = run_double(model, {"image": sample.image.numpy().astype(np.float64), "words": sample.words.numpy()})
    assert worst(found["relevance/words"], expected) > 1e-4


# ---- the account -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@NAMES
def test_the_account_closes_at_the_border(name: str, sample: Sample) -> None:
    """Features, words, and what biases, first states and stabilizers take make up the logit."""
    explained = onnx_lrp.rewrite(exported(name, False, False, False), "captioning", target=WORD, ledger=True)
    feeds = {"features": sample.features.numpy(), "words": sample.words.numpy()}
    found = Session(explained.model, device="cpu", threads=1).run(feeds)
    total = found["relevance/features"].sum((1, 2, 3)) + found["relevance/words"].sum(1) + found["absorbed"]
    assert np.abs(found["absorbed"]).min() > 1e-3  # the account would not close without it
    np.testing.assert_allclose(total, found["score"], rtol=1e-3)


def test_what_the_first_states_take_is_booked(sample: Sample) -> None:
    """Of a decoder without biases and stabilizers the first states take what is missing, and no gate does."""
    net = decoder("one LSTM")
    with torch.no_grad():
        for key, value in net.named_parameters():
            if "bias" in key:
                value.zero_()
    model = export(net.double(), sample.features.double(), sample.words, False)
    explained = onnx_lrp.rewrite(model, book(0.0, 0.0), target=WORD, ledger=True)
    feeds = {"features": sample.features.double().numpy(), "words": sample.words.numpy()}
    absorbed = run_double(explained.model, feeds)["absorbed"]
    state = net.state.data[:2].expand(2, 2, WIDTH).clone().requires_grad_()
    net.begin = lambda count, which: (state[:, 0], state[:, 1])  # type: ignore[method-assign]
    net.decode(sample.features.double(), net.embedding(sample.words), Surrogate())[:, WORD].sum().backward()
    assert worst(absorbed, (state * state.grad).sum((1, 2)).detach().numpy()) <= 1e-9


@pytest.mark.filterwarnings("ignore")
@NAMES
def test_the_encoder_conserves(name: str, sample: Sample) -> None:
    """From the features to the pixels: alpha 1, beta 0 loses nothing; what the norms keep is booked."""
    model = exported(name, True, False, False)
    border = next(n.output[0] for n in model.graph.node if n.op_type == "AveragePool")
    explained = onnx_lrp.rewrite(model, "captioning", layers=[border], target=WORD, ledger=True)
    feeds = {"image": sample.image.numpy(), "words": sample.words.numpy()}
    found = Session(explained.model, device="cpu", threads=1).run(feeds)
    pixels, features = found["relevance/image"].sum((1, 2, 3)), found[f"relevance/{border}"].sum((1, 2, 3))
    before = features + found["relevance/words"].sum(1) - found["score"]  # what the decoder absorbed, turned round
    np.testing.assert_allclose(pixels + found["absorbed"] + before, features, rtol=1e-3)


def test_the_encoder_conserves_without_norms(sample: Sample) -> None:
    """Without norms, and with biases that leave some units on, pixels get all that the features had."""
    net = captioner("one LSTM")
    net.encoder.norm1, net.encoder.norm2 = (nn.BatchNorm2d(CHANNELS).eval() for _ in range(2))
    for norm in (net.encoder.norm1, net.encoder.norm2):
        norm.eps = 0.0
    model = export(net, sample.image, sample.words, False)
    border = next(n.output[0] for n in model.graph.node if n.op_type == "AveragePool")
    explained = onnx_lrp.rewrite(model, "captioning", layers=[border], target=WORD)
    found = run_double(explained.model, {"image": sample.image.numpy(), "words": sample.words.numpy()})
    pixels, features = found["relevance/image"].sum((1, 2, 3)), found[f"relevance/{border}"].sum((1, 2, 3))
    np.testing.assert_allclose(pixels, features, rtol=1e-3)


@EXPORTERS
def test_values_of_all_heads_get_what_the_context_has(dynamo: bool, sample: Sample) -> None:
    """Sum over heads of the relevance of values: that of the context, but for the stabilizer's loss."""
    net = decoder("two heads").double()
    assert isinstance(net, Heads)
    model = exported("two heads", False, True, dynamo)
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    weights = next(n.output[0] for n in model.graph.node if n.op_type == "Softmax")
    product = next(n for n in products if n.input[0] == weights)
    explained = onnx_lrp.rewrite(model, "captioning", layers=[product.input[1], product.output[0]], target=WORD)
    found = run_double(explained.model, {"features": sample.features.double().numpy(), "words": sample.words.numpy()})
    values, context = found[f"relevance/{product.input[1]}"], found[f"relevance/{product.output[0]}"]
    with torch.no_grad():
        v, _ = net.seen(sample.features.double(), Plain())
        now, told = net.begin(sample.words, 0), v.mean(1)
        for t in range(STEPS):
            now = net.first(torch.cat([net.embedding(sample.words)[:, t], told], 1), now)
        q, k, u = (net.split(x) for x in (net.query(now[0])[:, None], net.key(v), net.value(v)))
        z = (torch.softmax(q @ k.transpose(2, 3) / (WIDTH // 2) ** 0.5, 3) @ u).numpy()
    lost = context * (1 - z / (z + np.where(z < 0, -0.01, 0.01)))
    assert np.abs(lost).max() > 1e-3 * np.abs(context).max()
    np.testing.assert_allclose(values.sum((1, 2, 3)), (context - lost).sum((1, 2, 3)), rtol=1e-9)


# ---- forms of attention ----------------------------------------------------------------------------------------------


def _gathered(net: Net, p: str) -> str:
    return net("Gather", p, net.const([1, 0, 2], np.int64), axis=1)


def _sliced(net: Net, p: str) -> str:
    front = net("Concat", net("Slice", p, *(net.const([i], np.int64) for i in (0, 2, 1))), p, axis=1)
    return net("Slice", front, *(net.const([i], np.int64) for i in (2, 5, 1)))


def _masked(net: Net, p: str) -> str:
    return net("Where", net.const([True, False, True], np.bool_), p, net.const(0.0))


def _renormalized(net: Net, p: str) -> str:
    masked = _masked(net, p)
    total = net("ReduceSum", masked, net.const([1], np.int64), keepdims=1)
    return net("Div", masked, net("Add", total, net.const(1e-8)))


FORMS = {
    "as it is": lambda net, p: p,
    "gathered": _gathered,
    "joined and sliced": _sliced,
    "expanded": lambda net, p: net("Expand", p, net.const([1, 3], np.int64)),
    "masked": _masked,
    "masked and renormalized": _renormalized,
    "complement": lambda net, p: net("Sub", net.const(1.0), p),
    "of two softmaxes": lambda net, p: net("Mul", p, net("Softmax", net("Gemm", "k", net.weight(3, 3)), axis=1)),
    "scaled": lambda net, p: net("Mul", p, net.const(0.5)),
    "spelled out": lambda net, p: net(
        "Div", net("Exp", "k", name="exp"), net("ReduceSum", "exp:y", net.const([1], np.int64), keepdims=1)
    ),
}


@pytest.mark.parametrize("product", ["MatMul", "Einsum", "Mul"])
@pytest.mark.parametrize("form", FORMS)
def test_probabilities_are_constants_in_every_form(form: str, product: str) -> None:
    """Keys get nothing, values in proportion to what they bring."""
    net = Net()
    k, v = net.input("k", "N", 3), net.input("v", "N", 3, 2)
    p = net("Reshape", FORMS[form](net, net("Softmax", k, axis=1)), net.const([0, 1, 3], np.int64))
    if product == "Mul":
        turned = net("Transpose", p, perm=[0, 2, 1])
        z = net("ReduceSum", net("Mul", turned, v), net.const([1], np.int64), keepdims=1, name="sum")
    else:
        z = net(product, p, v, **({"equation": "nij,njk->nik"} if product == "Einsum" else {}))
    weights = net("Transpose", p, perm=[0, 2, 1], name="weights")
    model = net.model(net("Flatten", z), weights)
    explained = onnx_lrp.rewrite(model, "captioning", output=model.graph.output[0].name, target=1)
    feeds = {"k": numbers(2, 3), "v": numbers(2, 3, 2)}
    found = run_double(explained.model, feeds)
    part = found[weights][..., 0] * feeds["v"][..., 1]
    total = part.sum(1, keepdims=True)
    expected = np.zeros((2, 3, 2))
    expected[..., 1] = part * total / (total + np.where(total < 0, -1, 1) * np.float32(0.01))
    assert not found["relevance/k"].any()
    np.testing.assert_allclose(found["relevance/v"], expected, rtol=1e-9, atol=1e-12)


def test_the_sentinel_is_part_of_the_sum_in_the_form_of_one_product(sample: Sample) -> None:
    """Regions and sentinel joined, weighted by one softmax: the sentinel's relevance goes to its cell."""

    class Joined(Adaptive):
        def attention(self, v, x, before, now, how):  # type: ignore[no-untyped-def]
            gate = torch.sigmoid(self.gate_x(x) + self.gate_h(before[0]))
            sentinel = how.gate(gate, how.apply(torch.tanh, now[1]))
            asked = self.query(now[0])
            scores = self.score(torch.tanh(self.key(v) + asked[:, None]))[..., 0]
            alone = self.score(torch.tanh(self.key_s(sentinel) + asked))
            weights = torch.softmax(torch.cat([scores, alone], 1), 1)
            return how.attend(weights[:, None], torch.cat([v, sentinel[:, None]], 1))[:, 0]

    torch.manual_seed(4)
    net = Joined().eval().double()
    model = export(net, sample.features.double(), sample.words, False)
    found = run_double(
        onnx_lrp.rewrite(model, "captioning", target=WORD).model,
        {"features": sample.features.double().numpy(), "words": sample.words.numpy()},
    )
    features, words, _ = oracle(net, sample.features, sample.words, Surrogate(0.01, 1e-6))
    assert worst(found["relevance/features"], features) <= 1e-9
    assert worst(found["relevance/words"], words) <= 1e-9


# ---- what the book needed --------------------------------------------------------------------------------------------


def test_norm_with_equal_parts_at_zero() -> None:
    """A sum that is zero gives every summand the same, constants among them; another one shares in proportion."""
    net = Net()
    z = net("Sum", net.input("a", "N", 4), net.input("b", "N", 4), net.const([0.0, 0.0, 1.0, -1.0]), name="layer")
    a = np.array([[1.0, 0.0, 2.0, 3.0]], np.float32)
    b = np.array([[-1.0, 0.0, -3.0, 4.0]], np.float32)
    r = np.array([[6.0, 3.0, -9.0, 12.0]], np.float32)
    found = explain(net, z, "norm", {"a": a, "b": b, "r": r}, epsilon=0.0, equal_at_zero=True)
    np.testing.assert_allclose(found["relevance/a"], [[2, 1, -3, 6]], rtol=1e-12)
    np.testing.assert_allclose(found["relevance/b"], [[2, 1, -3, 8]], rtol=1e-12)
    np.testing.assert_allclose(found["absorbed"], [2 + 1 - 3 - 2], rtol=1e-12)


def test_alpha_beta_without_biases() -> None:
    """Denominators of products alone, for inputs of either sign."""
    net = Net()
    z = net(
        "Gemm", net.input("x", "N", 3), net.const([[1.0, -2], [3, 1], [-1, 0.5]]), net.const([5.0, 7]), name="layer"
    )
    x, r = np.array([[1.0, -2, 0.5]], np.float32), np.array([[2.0, -1]], np.float32)
    found = explain(net, z, "alpha_beta", {"x": x, "r": r}, alpha=1.0, beta=0.0, epsilon=0.0, bias=False)
    parts = x.T * np.array([[1.0, -2], [3, 1], [-1, 0.5]])
    positive = np.maximum(parts, 0)
    np.testing.assert_allclose(found["relevance/x"], (positive / positive.sum(0) * r).sum(1)[None], rtol=1e-9)
    np.testing.assert_allclose(found["absorbed"], 0, atol=1e-12)


@pytest.mark.parametrize("fold", [None, True, False])
def test_a_book_says_whether_norms_are_folded(fold: bool | None) -> None:
    """And an option of its own has the last word."""
    net = Net()
    y = net("Conv", net.input("x", "N", 2, 4, 4), net.weight(3, 2, 3, 3), name="conv")
    scale = [net.const(np.full(3, c)) for c in (1.5, 0.5, 0.25, 2.0)]
    model = net.model(net("Flatten", net("BatchNormalization", y, *scale, name="norm")))
    ops = {name: {row.op for row in onnx_lrp.rewrite(model, name, fold_batchnorm=fold).table} for name in BOOKS}
    assert ("BatchNormalization" in ops["epsilon"]) == (fold is False)
    assert ("BatchNormalization" in ops["captioning"]) == (not fold)


BOOKS = ("epsilon", "captioning")


@pytest.mark.parametrize(("both", "rules"), [(True, {"lrp_0", "norm"}), (False, {"epsilon", "norm"})])
def test_layers_that_are_added_up_are_one_layer(both: bool, rules: set[str]) -> None:
    """A layer whose output something else reads as well stabilizes for itself."""
    net = Net()
    x, h = net.input("x", "N", 4), net.input("h", "N", 3)
    one, other = net("Gemm", x, net.weight(4, 5)), net("Gemm", h, net.weight(3, 5))
    z = net("Add", one, other)
    model = net.model(z if both else net("Concat", z, net("Tanh", one), net("Tanh", other), axis=1))
    table = onnx_lrp.rewrite(model, "captioning").table
    found = {row.rule.split("(")[0] for row in table if row.op in ("Gemm", "Add")}
    assert found == rules


def test_layers_of_one_input_are_summed_as_one(sample: Sample) -> None:
    """W·x + U·x + b as three operators or as one: the same relevance, stabilizer and all."""
    w, u, b = numbers(4, 5), numbers(4, 5), numbers(5)
    one, several = Net(), Net()
    x = one.input("x", "N", 4)
    whole = one.model(one("Gemm", x, one.const(w + u), one.const(b)))
    x = several.input("x", "N", 4)
    parts = several("MatMul", x, several.const(w)), several("MatMul", x, several.const(u))
    split = several.model(several("Add", several("Add", *parts), several.const(b)))
    feeds = {"x": numbers(3, 4)}
    found = [
        run_double(onnx_lrp.rewrite(m, "captioning", target=2).model, feeds)["relevance/x"] for m in (whole, split)
    ]
    assert worst(found[1], found[0]) <= 1e-6  # w + u is rounded
