"""LRP-inference fine-tuning (Sun et al. 2022) from end to end: omega, p^, weights that are fed, what tuning does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import onnx_lrp
from exporters import captioning
from exporters.captioning import Captioner, Decoder, MultiHead, small, write
from exporters.captioning_tuning import (
    LENGTH,
    PAD,
    SHARE,
    STOPS,
    WIDTH,
    WORDS,
    Features,
    Weights,
    caption,
    captioner,
    experiment,
    for_testing,
    for_training,
    measured,
    seen,
    surprise,
    table,
    train,
    tune,
    write_decoder,
)
from onnx_lrp.runtime import Session
from tests.support import worst
from tests.surrogate import Surrogate


@pytest.fixture(scope="module")
def net() -> Captioner:
    """A captioner that was trained for a few steps, behind an encoder that was not."""
    torch.set_num_threads(1)
    made = captioner(small(seed=7).encoder.requires_grad_(False), 100)
    train(made, seen(made, for_training(100, 300)), 100, steps=60)
    return made


@pytest.fixture(scope="module")
def data(net: Captioner) -> Features:
    return seen(net, for_testing(100, 60))


def oracle(decoder: Decoder, features: Tensor, words: Tensor, masked: tuple[int, ...] = STOPS) -> list[Tensor]:
    """Omega of c and h, and p^, of a decoder."""
    with torch.no_grad():
        c, h, _ = decoder.summands(features, words)
    return weighed(decoder.out, c, h, masked)


def weighed(out: nn.Linear, c: Tensor, h: Tensor, masked: tuple[int, ...]) -> list[Tensor]:
    """Omega of c and h, and p^, by the gradient of a surrogate whose gradient times input is relevance."""
    c, h = c.clone().requires_grad_(), h.clone().requires_grad_()
    how = Surrogate(epsilon=0.01)
    score, word = how.linear(out, how.add(c, h)).max(-1)
    score[~torch.isin(word, torch.tensor(masked))].sum().backward()
    weights = []
    for x in (c, h):
        assert x.grad is not None
        relevance = x.detach() * x.grad
        highest = relevance.abs().amax(-1, keepdim=True)
        weights.append(1 + torch.where(highest == 0, 0.0, relevance / highest))
    with torch.no_grad():
        return [*weights, out(weights[0] * c + weights[1] * h)]


def in_graph(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """Omega of c and h, and p^, of a model that is re-weighted here."""
    made = onnx_lrp.reweigh(model, masked=STOPS)
    found = Session(made.model, device="cpu").run(feeds)
    return [found[name] for name in (*made.omegas.values(), made.logits)]


def test_omega_lies_between_zero_and_two_and_is_one_for_masked_words(net: Captioner, data: Features) -> None:
    omega = Weights(net.decoder)(data.features, data.words[:, :-1])
    with torch.no_grad():
        stops = torch.isin(net.decoder(data.features, data.words[:, :-1]).argmax(-1), torch.tensor(STOPS))
    assert 0.1 < stops.float().mean() < 0.9
    for x in omega:
        assert x.shape == (60, LENGTH, net.decoder.width)
        assert x.min() >= 0
        assert x.max() <= 2
        assert (x[stops] == 1).all()
        torch.testing.assert_close((x[~stops] - 1).abs().amax(-1), torch.ones(int((~stops).sum())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighed_logits_in_the_graph_are_those_of_torch(net: Captioner, data: Features, dtype: torch.dtype) -> None:
    decoder = MultiHead(32, WIDTH, len(WORDS), heads=4)  # cells, since the runtime has no LSTM in float64
    decoder.load_state_dict(net.decoder.state_dict())
    decoder.to(dtype)
    features, words = data.features.to(dtype), data.words[:, :-1]
    torch.set_default_dtype(dtype)  # of what the export is tried on
    try:
        found = in_graph(write_decoder(decoder), features=features.numpy(), words=words.numpy())
    finally:
        torch.set_default_dtype(torch.float32)
    expected = oracle(decoder, features, words)
    limit = 1e-5 if dtype == torch.float32 else 1e-9
    for a, b in zip(found, expected, strict=True):
        assert worst(a, b.numpy()) < limit


@pytest.mark.parametrize("name", ["single", "adaptive", "multihead"])
def test_every_decoder_of_the_paper_is_reweighed(name: captioning.Decoding) -> None:
    made = small(name)
    drawn = captioning.captions(6, 3)
    image, words = torch.tensor(drawn.image), torch.tensor(drawn.words[:, :-1])
    masked = tuple(WORDS.index(w) for w in ("<pad>", "a"))  # the same numbers in both vocabularies
    live = onnx_lrp.reweigh(write(made, None, attention=False), masked=masked)
    found = Session(live.model, device="cpu").run({"image": drawn.image, "words": words.numpy()})
    with torch.no_grad():
        features = made.features(image)
    expected = oracle(made.decoder, features, words, masked)
    for output, wanted in zip((*live.omegas.values(), live.logits), expected, strict=True):
        assert worst(found[output], wanted.numpy()) < 1e-5


def test_fed_weights_are_as_good_as_a_new_export(net: Captioner, data: Features) -> None:
    decoder = captioner(net.encoder, 0).decoder  # other weights than those that the file is made with
    weights = Weights(decoder)
    decoder.load_state_dict(net.decoder.state_dict())
    words = data.words[:, :-1]
    found = weights(data.features, words)
    again = in_graph(write_decoder(decoder), features=data.features.numpy(), words=words.numpy())
    for a, b in zip(found, again[:2], strict=True):
        assert worst(a.numpy(), b) < 1e-5
    before = in_graph(
        write_decoder(captioner(net.encoder, 0).decoder), features=data.features.numpy(), words=words.numpy()
    )
    assert worst(found[0].numpy(), before[0]) > 0.1


def test_every_parameter_is_an_input_by_its_name(net: Captioner) -> None:
    names = {name for name, _ in net.decoder.named_parameters()}
    assert set(Weights(net.decoder).session.optional) == names


def test_no_gradient_goes_through_omega(net: Captioner, data: Features) -> None:
    """The gradient of the loss is that with omega as a number: finite differences of one weight, omega kept."""
    decoder = net.decoder
    words, wanted = data.words[:, :-1], data.words[:, 1:]
    omega_c, omega_h = Weights(decoder)(data.features, words)
    assert not omega_c.requires_grad
    assert not omega_h.requires_grad

    def loss() -> Tensor:
        c, h, _ = decoder.summands(data.features, words)
        return surprise(decoder.out(omega_c * c + omega_h * h), wanted)

    decoder.zero_grad()
    loss().backward()
    slope = decoder.out.weight.grad
    assert slope is not None
    at = np.unravel_index(int(slope.abs().argmax()), slope.shape)
    step, ends = 1e-2, []
    with torch.no_grad():
        for sign in (1, -1):
            decoder.out.weight[at] += sign * step
            ends.append(loss().item())
            decoder.out.weight[at] -= sign * step
    decoder.zero_grad()
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope[at].item(), rel=0.02)


def test_tuning_is_of_the_last_layer_and_lowers_both_losses(net: Captioner) -> None:
    made = captioner(net.encoder, 0)
    made.load_state_dict(net.state_dict())
    data = seen(made, for_training(101, 300))
    words, wanted = data.words[:, :-1], data.words[:, 1:]

    def losses() -> list[float]:
        omega_c, omega_h = Weights(made.decoder)(data.features, words)
        with torch.no_grad():
            c, h, _ = made.decoder.summands(data.features, words)
            out = made.decoder.out
            return [surprise(out(c + h), wanted).item(), surprise(out(omega_c * c + omega_h * h), wanted).item()]

    before = losses()
    tune(made, data, 1, 40, share=0.5)
    after = losses()
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.9 * before[1]
    changed = {n for (n, a), b in zip(made.named_parameters(), net.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == {"decoder.out.weight", "decoder.out.bias"}


def test_stop_words_count_in_p_hat_as_in_p(net: Captioner, data: Features) -> None:
    """Where the prediction is a stop word, p^ is p."""
    words = data.words[:, :-1]
    omega_c, omega_h = Weights(net.decoder)(data.features, words)
    with torch.no_grad():
        c, h, _ = net.decoder.summands(data.features, words)
        plain, weighed = net.decoder.out(c + h), net.decoder.out(omega_c * c + omega_h * h)
    stops = torch.isin(plain.argmax(-1), torch.tensor(STOPS))
    torch.testing.assert_close(plain[stops], weighed[stops])
    assert (plain[~stops] - weighed[~stops]).abs().max() > 0.1


def test_the_tuned_captioner_as_a_file(net: Captioner, tmp_path: Path) -> None:
    """Pictures and words in; logits, p^ and omega out, as in torch; captions by the file are those by torch."""
    made = captioner(net.encoder, 0)
    made.load_state_dict(net.state_dict())
    tune(made, seen(made, for_training(101, 300)), 1, 10, share=SHARE)
    onnx_lrp.reweigh(write(made, None, length=LENGTH, attention=False), masked=STOPS).save(tmp_path / "tuned.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tuned.onnx", providers=["CPUExecutionProvider"])
    drawn = for_testing(3, 5)
    data = seen(made, drawn)
    expected = oracle(made.decoder, data.features, data.words[:, :-1])
    _, weighed, *omegas = session.run(None, {"image": drawn.image, "words": drawn.words[:, :-1]})
    assert worst(weighed, expected[2].numpy()) < 1e-5
    for a, b in zip(omegas, expected[:2], strict=True):
        assert worst(a, b.numpy()) < 1e-5
    words = np.full((5, LENGTH), PAD)
    words[:, 0] = drawn.words[:, 0]
    over = np.zeros(5, bool)
    for t in range(LENGTH):
        best = session.run(["logits"], {"image": drawn.image, "words": words})[0][:, t].argmax(-1)
        best[over] = PAD
        over |= best == WORDS.index("<end>")
        words = np.concatenate([words[:, : t + 1], best[:, None], words[:, t + 2 :]], 1)
    np.testing.assert_array_equal(words, caption(made, data.features))


def test_measures_of_captions_that_are_known() -> None:
    """The right captions, told by heart, hallucinate nothing; captions of other pictures do."""
    drawn = for_testing(0, 200)

    class ByHeart(nn.Module):
        def __init__(self, words: Tensor) -> None:
            super().__init__()
            self.words = words

        def forward(self, features: Tensor, words: Tensor) -> Tensor:
            said = self.words[:, 1 : words.shape[1] + 1]
            return nn.functional.one_hot(said, len(WORDS)).float()

    words = torch.tensor(drawn.words)
    data = Features(torch.zeros(200, 32, 6, 6), words)
    net = Captioner(nn.Identity(), ByHeart(words), (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]
    assert measured(net, data) == dict.fromkeys(("hallucinated", "exact", "precision", "recall", "f1"), 1.0) | {
        "hallucinated": 0.0
    }
    net.decoder = ByHeart(words.roll(1, 0))  # type: ignore[assignment]
    wrong = measured(net, data)
    shapes = [{WORDS[i] for i in row} & set(captioning.SHAPES) for row in drawn.words]
    expected = np.mean([len(shapes[n - 1] - shapes[n]) > 0 for n in range(200)])
    assert wrong["hallucinated"] == pytest.approx(expected)
    assert wrong["f1"] < 0.9


def test_what_goes_together_in_training_and_not_in_testing() -> None:
    def share(words: np.ndarray) -> dict[str, float]:
        has = {w: (words == WORDS.index(w)).any(1) for w in captioning.SHAPES}
        usual = (has["disc"] & has["square"]) | (has["triangle"] & has["cross"])
        alone = ~(has["square"] | has["cross"])
        return {"usual": usual.mean(), "alone": alone.mean()}

    assert share(for_training(0).words) == pytest.approx({"usual": 0.9, "alone": 0.05}, abs=0.02)
    assert share(for_testing(0).words) == pytest.approx({"usual": 1 / 3, "alone": 1 / 3}, abs=0.05)


@pytest.mark.heavy
def test_tuned_captioners_make_up_fewer_things_over_five_starts() -> None:
    """The experiment as reported: by mean over starts fewer hallucinations, and more captions that are right."""
    torch.set_num_threads(1)
    results = experiment(range(5))
    print(table(results))
    for name, sign in (("hallucinated", -1), ("exact", 1), ("precision", 1), ("recall", 1), ("f1", 1)):
        better = sign * (results[name][SHARE] - results[name][1.0])
        assert len(better) == 5
        assert better.mean() > 0


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["adaptive", "multihead"])
def test_published_sizes(name: captioning.Decoding) -> None:
    """VGG16, width 512, 9586 words, 20 steps: the graph is written, small, and right."""
    made = captioning.published(name)
    model = write(made, None, size=224, length=20, attention=False)
    live = onnx_lrp.reweigh(model, masked=[0])
    assert len(live.model.SerializeToString()) < 1.001 * len(model.SerializeToString()) + 100_000
    rng = np.random.default_rng(0)
    feeds = {"image": rng.random((2, 3, 224, 224), np.float32), "words": rng.integers(1, 9000, (2, 20))}
    # What VGG16 rounds otherwise than torch is not at stake: omega and p^ of what the graph itself sums up, in float64.
    shown = onnx.ModelProto()
    shown.CopyFrom(live.model)
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in live.omegas)
    found = Session(shown, device="cpu").run(feeds)
    c, h = (torch.tensor(found[name]).double() for name in live.omegas)
    expected = weighed(made.decoder.out.double(), c, h, (0,))
    for output, wanted in zip((*live.omegas.values(), live.logits), expected, strict=True):
        assert worst(found[output], wanted.numpy()) < 1e-5
    with torch.no_grad():
        made.float()
        features = made.features(torch.tensor(feeds["image"]))
    whole = oracle(made.decoder, features, torch.tensor(feeds["words"]), (0,))
    assert worst(found[live.logits], whole[2].numpy()) < 1e-5
