"""Re-weighted logits: omega from relevance one layer deep, against a surrogate whose gradient is relevance."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import onnx_lrp
from onnx_lrp import InputError
from onnx_lrp.runtime import Session
from tests.captioning_nets import WIDTH, WORDS, decoder, exported
from tests.support import numbers, run_double, worst
from tests.surrogate import Plain, Surrogate

MASKED = (0, 3)


class Said(nn.Module):
    """Logits at every position: a layer of what was seen and what was said."""

    def __init__(self, form: str = "sum") -> None:
        super().__init__()
        self.form = form
        self.see, self.say, self.out = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, WORDS)

    def summands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = torch.tanh(self.see(x))
        return c, torch.sigmoid(c * 2) * torch.tanh(self.say(x))  # one depends on the other

    def forward(self, x: Tensor) -> Tensor:
        c, h = self.summands(x)
        if self.form == "steps":  # one layer per position
            return torch.stack([self.out(c[:, t] + h[:, t]) for t in range(x.shape[1])], 1)
        if self.form == "difference":
            return self.out(c - h)
        if self.form == "probabilities":
            return torch.softmax(self.out(c + h), -1)
        return self.out(c + h)


def said(form: str = "sum", dtype: torch.dtype = torch.float32) -> Said:
    torch.manual_seed(4)
    return Said(form).to(dtype).eval()


def write(net: nn.Module, x: Tensor, *, length: bool = True, fold: bool = True) -> onnx.ModelProto:
    """The net as a file; samples and, if asked, positions are free."""
    buffer = io.BytesIO()
    axes = {0: "N", 1: "T"} if length else {0: "N"}
    torch.onnx.export(
        net,
        (x,),
        buffer,
        dynamo=False,
        opset_version=18,
        input_names=["x"],
        output_names=["logits"],
        dynamic_axes={"x": axes, "logits": axes},
        do_constant_folding=fold,
    )
    return onnx.load_from_string(buffer.getvalue())


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    return Session(model, device="cpu").run(feeds)


def weighed(out: nn.Linear, c: Tensor, h: Tensor, masked: tuple[int, ...] = (), sign: float = 1.0) -> list[Tensor]:
    """Omega of both summands and the logits of what they weigh, by the gradient of the surrogate."""
    c, h = c.detach().requires_grad_(), h.detach().requires_grad_()
    how = Surrogate(epsilon=0.01)
    z = how.linear(out, how.add(c, sign * h))
    torch.testing.assert_close(z, out(c + sign * h))
    score, word = z.max(-1)
    counts = torch.tensor([[int(w) not in masked for w in row] for row in word.reshape(len(word), -1)])
    (score * counts.reshape(score.shape)).sum().backward()
    weights = []
    for x in (c, h):
        assert x.grad is not None
        relevance = x.detach() * x.grad
        highest = relevance.abs().amax(-1, keepdim=True)
        weights.append(1 + torch.where(highest == 0, 0.0, relevance / highest))
    with torch.no_grad():
        return [*weights, out(weights[0] * c + weights[1] * sign * h)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["sum", "difference", "probabilities"])
def test_weights_and_logits_are_those_of_the_surrogate(form: str, dtype: torch.dtype) -> None:
    net = said(form, dtype)
    made = onnx_lrp.reweigh(write(net, torch.zeros(2, 3, 5, dtype=dtype)), masked=MASKED)
    x = torch.tensor(numbers(40, 7, 5)).to(dtype)
    c, h = (y.detach() for y in net.summands(x))
    expected = weighed(net.out, c, h, MASKED, -1.0 if form == "difference" else 1.0)
    found = run(made.model, x=x.numpy())
    limit = 1e-5 if dtype == torch.float32 else 1e-9
    for name, wanted in zip((*made.omegas.values(), made.logits), expected, strict=True):
        assert worst(found[name], wanted.numpy()) < limit


def test_own_outputs_come_first_and_are_unchanged() -> None:
    model = write(said(), torch.zeros(2, 3, 5))
    made = onnx_lrp.reweigh(model)
    x = numbers(4, 6, 5)
    assert [o.name for o in made.model.graph.output] == ["logits", made.logits, *made.omegas.values()]
    assert made.logits == "reweighted/logits"
    np.testing.assert_array_equal(run(made.model, x=x)["logits"], run(model, x=x)["logits"])
    assert [row.rule for row in made.table] == ["norm(epsilon=0.01)", "epsilon(epsilon=0.01)"]


def test_weights_lie_between_zero_and_two_and_reach_one_of_them() -> None:
    net = said()
    made = onnx_lrp.reweigh(write(net, torch.zeros(2, 3, 5)), masked=MASKED)
    found = run(made.model, x=numbers(64, 5, 5))
    masked = np.isin(found["logits"].argmax(-1), MASKED)
    assert 0.02 < masked.mean() < 0.98
    for name in made.omegas.values():
        omega = found[name]
        assert omega.min() >= 0
        assert omega.max() <= 2
        assert (omega[masked] == 1).all()
        reach = np.abs(omega[~masked] - 1).max(-1)
        np.testing.assert_allclose(reach, 1, atol=1e-6)
    np.testing.assert_allclose(found[made.logits][masked], found["logits"][masked], rtol=1e-5, atol=1e-6)


def test_without_any_relevance_weights_are_one() -> None:
    net = said()
    with torch.no_grad():  # the predicted word reads nothing of the sum
        net.out.weight[2], net.out.bias[2] = 0, 100
    made = onnx_lrp.reweigh(write(net, torch.zeros(2, 3, 5)))
    found = run(made.model, x=numbers(3, 4, 5))
    assert (found["logits"].argmax(-1) == 2).all()
    assert all((found[name] == 1).all() for name in made.omegas.values())
    np.testing.assert_allclose(found[made.logits], found["logits"], rtol=1e-6)


def test_a_layer_per_position_is_weighed_like_one_for_all() -> None:
    apart, whole = said("steps"), said()
    parts = onnx_lrp.reweigh(write(apart, torch.zeros(2, 3, 5), length=False), masked=MASKED)
    one = onnx_lrp.reweigh(write(whole, torch.zeros(2, 3, 5), length=False), masked=MASKED)
    x = numbers(8, 3, 5)
    assert len(parts.omegas) == 6
    found, expected = run(parts.model, x=x), run(one.model, x=x)
    assert worst(found[parts.logits], expected[one.logits]) < 1e-5
    seen = np.stack([found[name] for name in list(parts.omegas.values())[::2]], 1)
    assert worst(seen, expected[next(iter(one.omegas.values()))]) < 1e-5


@pytest.mark.parametrize("name", ["two LSTMs", "one LSTM", "weighted sum", "LSTM operator", "two heads"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_decoders_of_captions(name: str, dynamo: bool) -> None:
    net = decoder(name)
    features, words = torch.tensor(numbers(6, 4, 3, 3)), torch.tensor(np.arange(18).reshape(6, 3) % WORDS)
    made = onnx_lrp.reweigh(exported(net, features[:2], words[:2], dynamo), masked=MASKED)
    assert len(made.omegas) == 2
    found = run(made.model, features=features.numpy(), words=words.numpy())
    noted: list[Tensor] = []

    class Noting(Plain):
        def add(self, *terms: Tensor) -> Tensor:
            noted[:] = terms
            return super().add(*terms)

    with torch.no_grad():
        net.run(features, words, how=Noting())
    # The exporters may have swapped what is added.
    expected = weighed(net.out, noted[0], noted[1], MASKED)
    assert worst(found[made.logits], expected[2].numpy()) < 1e-5
    both = [found[n] for n in made.omegas.values()]
    assert min(worst(both[0], w.numpy()) for w in expected[:2]) < 1e-5
    assert min(worst(both[1], w.numpy()) for w in expected[:2]) < 1e-5
    assert worst(both[0], both[1]) > 0.01


def test_tensors_can_be_named() -> None:
    net, x = said(), numbers(3, 4, 5)
    model = write(net, torch.zeros(2, 3, 5))
    last = list(onnx_lrp.reweigh(model).omegas)[1]  # the state, which nothing else depends on
    alone, both = onnx_lrp.reweigh(model, [last]), onnx_lrp.reweigh(model)
    found, known = run(alone.model, x=x), run(both.model, x=x)
    assert list(alone.omegas) == [last]
    np.testing.assert_array_equal(found[alone.omegas[last]], known[both.omegas[last]])
    c, h = (y.detach() for y in net.summands(torch.tensor(x)))
    with torch.no_grad():
        assert worst(found[alone.logits], net.out(c + torch.tensor(found[alone.omegas[last]]) * h).numpy()) < 1e-5


def test_a_saved_file_is_the_same(tmp_path: Path) -> None:
    made = onnx_lrp.reweigh(write(said(), torch.zeros(2, 3, 5)))
    made.save(tmp_path / "reweighted.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "reweighted.onnx", providers=["CPUExecutionProvider"])
    x = numbers(2, 3, 5)
    np.testing.assert_array_equal(session.run([made.logits], {"x": x})[0], run(made.model, x=x)[made.logits])


class Chain(nn.Module):
    """No sum before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Shared(nn.Module):
    """What was seen is the same at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x.mean(1, keepdim=True))) + torch.tanh(self.b(x)))


def test_what_is_wrong_is_said_in_one_line() -> None:
    x = torch.zeros(2, 3, 5)
    with pytest.raises(InputError, match="is no linear layer of a sum of tensors that depend on inputs; name with"):
        onnx_lrp.reweigh(write(Chain(), x))
    with pytest.raises(InputError, match=r"is shared by several positions of 'logits'"):
        onnx_lrp.reweigh(write(Shared(), x))
    model = write(said(), x)
    with pytest.raises(InputError, match=r"masked: there is no class 11; the logits have 11, from 0 on"):
        onnx_lrp.reweigh(model, masked=[11])
    with pytest.raises(InputError, match=r"names nothing to be weighed"):
        onnx_lrp.reweigh(model, [])
    with pytest.raises(InputError, match=r"the model has no tensor named 'nowhere'"):
        onnx_lrp.reweigh(model, ["nowhere"])
    with pytest.raises(InputError, match=r"'logits' does not lead to 'logits'"):
        onnx_lrp.reweigh(model, ["logits"])


# ---- weights that are fed ---------------------------------------------------------------------------------------


def changed(net: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Other weights for a net, by name; the net has them afterwards."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fed_weights_reweigh_as_an_export_with_them(dtype: torch.dtype) -> None:
    net = said(dtype=dtype)
    x = torch.zeros(2, 3, 5, dtype=dtype)
    live = onnx_lrp.reweigh(onnx_lrp.weights_as_inputs(write(net, x, fold=False)), masked=MASKED)
    before = run(live.model, x=np.ones((2, 3, 5), x.numpy().dtype))
    weights = changed(net, 5)
    again = onnx_lrp.reweigh(write(net, x), masked=MASKED)
    data = numbers(9, 4, 5).astype(x.numpy().dtype)
    found, expected = run(live.model, x=data, **weights), run(again.model, x=data)
    for (_, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert worst(a, b) < (1e-5 if dtype == torch.float32 else 1e-9)
    assert worst(run(live.model, x=np.ones((2, 3, 5), data.dtype), **weights)["logits"], before["logits"]) > 0.01


def conv_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [*("epsilon", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box", "captioning", "attnlrp"),
     *("gradient", "integrated_gradients", "deeplift")],
)  # fmt: skip
def test_every_explanation_is_right_for_fed_weights(method: str) -> None:
    net, x = conv_net(), torch.zeros(1, 3, 8, 8)
    model = onnx_lrp.weights_as_inputs(write(net, x, length=False))
    images = numbers(5, 3, 8, 8)
    live = onnx_lrp.Explainer(model, method, device="cpu", ledger=method.startswith("epsilon"))
    plain = onnx_lrp.Explainer(write(net, x, length=False), method, device="cpu")
    assert live.explained.table == plain.explained.table
    assert worst(live(images).relevance["x"], plain(images).relevance["x"]) < 1e-5
    weights = changed(net, 6)
    again = onnx_lrp.Explainer(write(net, x, length=False), method, device="cpu")
    found = live({"x": images, **weights}, target=[0, 1, 2, 0, 1])
    expected = again(images, target=[0, 1, 2, 0, 1])
    assert worst(found.relevance["x"], expected.relevance["x"]) < 1e-5
    assert worst(found.relevance["x"], plain(images, target=[0, 1, 2, 0, 1]).relevance["x"]) > 0.1
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-5)


@pytest.mark.parametrize("name", ["one LSTM", "LSTM operator", "two heads"])
def test_captions_are_explained_for_fed_weights(name: str) -> None:
    net = decoder(name)
    features, words = torch.tensor(numbers(4, 4, 3, 3)), torch.tensor(np.arange(12).reshape(4, 3) % WORDS)
    plain = exported(net, features[:2], words[:2], False)
    live = onnx_lrp.Explainer(onnx_lrp.weights_as_inputs(plain), "captioning", device="cpu")
    assert live.explained.table == onnx_lrp.rewrite(plain, "captioning").table
    # Every initializer of the file as it is now and as it will be, whatever the exporter made of the parameters.
    changed(net, 8)
    later = exported(net, features[:2], words[:2], False)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in later.graph.initializer if t.data_type == 1}
    feeds = {"features": features.numpy(), "words": words.numpy()}
    found, expected = live(feeds | weights), onnx_lrp.Explainer(later, "captioning", device="cpu")(feeds)
    for tensor in ("features", "words"):
        assert worst(found.relevance[tensor], expected.relevance[tensor]) < 1e-5


def test_chosen_weights_become_inputs_with_defaults() -> None:
    model = write(said(), torch.zeros(2, 3, 5), fold=False)
    live = onnx_lrp.weights_as_inputs(model, ["out.weight", "out.bias"])
    assert [i.name for i in live.graph.input] == ["x", "out.weight", "out.bias"]
    assert [i.name for i in model.graph.input] == ["x"]
    every = onnx_lrp.weights_as_inputs(model)
    assert {i.name for i in every.graph.input} == {"x"} | {name for name, _ in said().named_parameters()}
    with pytest.raises(InputError, match=r"the model has no weights named out.wait; there are see.weight, "):
        onnx_lrp.weights_as_inputs(model, ["out.wait"])


def test_large_weights_that_are_fed_are_not_copied() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 4)).eval()
    model = write(net, torch.zeros(1, 600), length=False)
    explained = onnx_lrp.rewrite(onnx_lrp.weights_as_inputs(model), "epsilon_plus_flat").model
    assert len(explained.SerializeToString()) < 1.02 * len(model.SerializeToString()) + 20_000
    x = numbers(3, 600)
    np.testing.assert_allclose(
        run(explained, x=x)["relevance/x"], run(onnx_lrp.rewrite(model).model, x=x)["relevance/x"], rtol=1e-4, atol=1e-6
    )
    assert worst(run_double(explained, {"x": x})["relevance/x"], run(explained, x=x)["relevance/x"]) < 1e-4
