"""Image captioning, system 5: the networks of exporters.captioning, trained on scenes, explained word by word.

The small captioners are read from examples/captioning, where their recipe has written them.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import onnx_lrp
from exporters import captioning
from exporters.captioning import WORDS, Captioner, Captions, captions, load_weights, published, small, write
from onnx_lrp import evaluate
from onnx_lrp.captions import CaptionExplainer, CaptionExplanation, joined
from onnx_lrp.runtime import Session
from onnx_lrp.verify import verify
from tests.captioning_oracle import relevance
from tests.support import worst
from tests.surrogate import Plain, Surrogate
from tests.test_captioning import EPSILONS, book

SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "captioning"
COLOUR, SHAPE, ON, SIDE = 1, 2, 3, 4  # places of the words in "a red disc on left"
CONTENT = [COLOUR, SHAPE, SIDE]
AREA = 64 / 576  # of the thing's box
SCENES = 40
DECODERS = ("single", "adaptive", "multihead")
FORMS = pytest.mark.parametrize("operator", [False, True], ids=["cells", "operator"])
NAMES = pytest.mark.parametrize("name", DECODERS)

# ---- what is explained -----------------------------------------------------------------------------------------------


@functools.cache
def net(name: str, operator: bool = False) -> Captioner:
    """A captioner: "single" and "attentive" as trained, the others with random weights."""
    if name in ("single", "attentive"):
        file = SHIPPED / ("captioner.npz" if name == "single" else "attentive.npz")
        return load_weights(small("single", pooled=name == "single", operator=operator), file)
    torch.manual_seed(2)
    return small(name, operator=operator, seed=2)


@functools.cache
def exported(name: str, operator: bool = False) -> onnx.ModelProto:
    return write(net(name, operator), None)


@pytest.fixture(scope="module")
def scenes() -> Captions:
    return captions(SCENES, 7)


@functools.cache
def explained(name: str, method: str = "captioning") -> list[CaptionExplanation]:
    """The right captions of the scenes."""
    only = {} if method == "captioning" else {"inputs": ["image"]}
    explainer = CaptionExplainer(exported(name), WORDS, method, device="cpu", threads=1, **only)
    drawn = captions(SCENES, 7)
    return [explainer(image, words) for image, words in zip(drawn.image, drawn.words, strict=True)]


def maps(explanations: list[CaptionExplanation]) -> np.ndarray:
    """(N, T, C, H, W)."""
    return np.stack([e.images for e in explanations])


@pytest.mark.parametrize("name", ["single", "attentive"])
def test_the_small_captioners_know_what_they_say(name: str) -> None:
    """At every place 90 % of the words are right."""
    assert captioning.accuracy(net(name), 500, seed=11).min() >= 0.9


# ---- agreement -------------------------------------------------------------------------------------------------------


def compare(name: str, operator: bool, dynamo: bool, stabilizers: tuple, scene: Captions) -> None:
    """Image and words in float32 through ONNX Runtime against the oracle in float64."""
    source, image = net(name, operator), scene.image[0]
    places = (SHAPE, SIDE) if name == "single" else (COLOUR, SHAPE)
    words = scene.words[0, : max(places) + 1]
    model = write(source, None, dynamo=dynamo, length=len(words))
    rewritten = onnx_lrp.rewrite(model, book(*stabilizers))
    session = Session(rewritten.model, device="cpu", threads=1)
    for place in places:
        word = int(scene.words[0, place + 1])
        plain, expected = (
            relevance(in_double(source), image, words, place, word, how) for how in (Plain(), Surrogate(*stabilizers))
        )
        found = session.run({"image": image[None], "words": words[None], "target": np.array([[place, word]])})
        assert found["score"][0] == pytest.approx(plain.logit, rel=3e-5)
        assert expected.logit == pytest.approx(plain.logit, rel=1e-9)
        assert worst(found["relevance/image"][0], expected.image) <= 1e-4
        assert worst(found["relevance/words"][0], expected.words) <= 1e-4


def in_double(source: Captioner) -> Captioner:
    return copy.deepcopy(source).double()


@pytest.mark.parametrize("stabilizers", EPSILONS, ids=["exact", "stabilized"])
@FORMS
@NAMES
def test_picture_and_words_agree_with_the_oracle(
    name: str, operator: bool, stabilizers: tuple, scenes: Captions
) -> None:
    compare(name, operator, False, stabilizers, scenes)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@FORMS
@NAMES
def test_the_newer_exporter_agrees_with_the_oracle(name: str, operator: bool, scenes: Captions) -> None:
    for stabilizers in EPSILONS:
        compare(name, operator, True, stabilizers, scenes)


def test_all_words_in_one_run_are_the_words_one_by_one(scenes: Captions) -> None:
    model, scene = exported("single"), captions(1, 3)
    explanation = CaptionExplainer(model, WORDS, device="cpu", threads=1)(scene.image[0], scene.words[0])
    session = Session(onnx_lrp.rewrite(model, "captioning").model, device="cpu")
    for place in range(6):
        target = np.array([[place, scene.words[0, place + 1]]])
        found = session.run({"image": scene.image, "words": scene.words[:, :-1], "target": target})
        assert worst(explanation.images[place], found["relevance/image"][0]) <= 1e-5
        assert worst(explanation.texts[place], found["relevance/words"][0]) <= 1e-5


# ---- the account -----------------------------------------------------------------------------------------------------


@FORMS
@NAMES
def test_the_account_closes_at_the_border_and_the_encoder_conserves(
    name: str, operator: bool, scenes: Captions
) -> None:
    """R(features) + R(words) + biases = logit (first states are zeros and get none); pixels get what features had."""
    model = exported(name, operator)
    relus = [n.output[0] for n in model.graph.node if n.op_type == "Relu"]
    border = relus[2]  # behind the third convolution
    explained = onnx_lrp.rewrite(model, "captioning", layers=[border], ledger=True)
    session = Session(explained.model, device="cpu", threads=1)
    count = 3  # several samples: the account is one of each
    for place in (SHAPE, SIDE):
        target = np.stack([np.full(count, place), scenes.words[:count, place + 1]], 1)
        found = session.run({"image": scenes.image[:count], "words": scenes.words[:count, :-1], "target": target})
        features, words = found[f"relevance/{border}"].sum((1, 2, 3)), found["relevance/words"].sum(1)
        np.testing.assert_allclose(features + words + found["absorbed"], found["score"], rtol=1e-3)
        assert (np.abs(found["absorbed"]) > 1e-3 * np.abs(found["score"])).all()  # it would not close without it
        np.testing.assert_allclose(found["relevance/image"].sum((1, 2, 3)), features, rtol=1e-3)


def test_the_features_get_what_the_oracle_says(scenes: Captions) -> None:
    model, source = exported("single"), net("single")
    border = [n.output[0] for n in model.graph.node if n.op_type == "Relu"][2]
    word = int(scenes.words[0, SHAPE + 1])
    rewritten = onnx_lrp.rewrite(model, "captioning", layers=[border], target=(SHAPE, word))
    feeds = {"image": scenes.image[:1], "words": scenes.words[:1, :-1]}
    found = Session(rewritten.model, device="cpu", threads=1).run(feeds)[f"relevance/{border}"][0]
    how = Surrogate(0.01, 1e-6)
    expected = relevance(in_double(source), scenes.image[0], scenes.words[0, :-1], SHAPE, word, how)
    assert worst(found, expected.features) <= 1e-4


def test_encoder_and_decoder_as_two_files(scenes: Captions) -> None:
    """Joined they are the one file, explanation and all."""
    source = net("single")
    with torch.no_grad():
        features = source.features(torch.tensor(scenes.image[:2]))
    encoder = captioning.export(
        Encoder(source), None, {"image": torch.tensor(scenes.image[:2])}, "features",
        {"image": {0: "batch"}, "features": {0: "batch"}},
    )  # fmt: skip
    decoder = captioning.export(
        source.decoder, None, {"features": features, "words": torch.tensor(scenes.words[:2, :-1])}, "logits",
        {name: {0: "batch"} for name in ("features", "words", "logits")},
    )  # fmt: skip
    found = [
        CaptionExplainer(model, WORDS, device="cpu", threads=1)(scenes.image[0], scenes.words[0])
        for model in (joined(encoder, decoder), exported("single"))
    ]
    assert worst(found[0].images, found[1].images) <= 1e-5
    assert worst(found[0].texts, found[1].texts) <= 1e-5


class Encoder(torch.nn.Module):
    def __init__(self, source: Captioner) -> None:
        super().__init__()
        self.source = source

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.source.features(image)


# ---- many heads ------------------------------------------------------------------------------------------------------


@FORMS
def test_values_of_all_heads_get_what_the_context_has(operator: bool, scenes: Captions) -> None:
    """Sum over heads of the relevance of values: the context's, but for what the stabilizer takes."""
    model, source = exported("multihead", operator), net("multihead", operator)
    weights = next(n.output[0] for n in model.graph.node if n.op_type == "Softmax")
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[0] == weights)
    layers = [product.input[1], product.output[0]]
    place, word = SIDE, int(scenes.words[0, SIDE + 1])
    rewritten = onnx_lrp.rewrite(model, "captioning", layers=layers, target=(place, word))
    found = Session(rewritten.model, device="cpu", threads=1).run(
        {"image": scenes.image[:1], "words": scenes.words[:1, :-1]}
    )
    values, context = (found[f"relevance/{name}"].astype(np.float64) for name in layers)
    with torch.no_grad():
        double = in_double(source)
        decoder = double.decoder
        features = double.features(torch.tensor(scenes.image[:1]).double())
        v = torch.relu(decoder.regions(features.flatten(2).transpose(1, 2)))
        rows = torch.cat([decoder.embedding(torch.tensor(scenes.words[:1, :-1])), v.mean(1, True).expand(-1, 6, -1)], 2)
        h = decoder.first.all(rows)[0]
        q, k, u = (decoder.split(x) for x in (decoder.query(h), decoder.key(v), decoder.value(v)))
        z = (torch.softmax(q @ k.transpose(2, 3) / (decoder.width // decoder.heads) ** 0.5, 3) @ u).numpy()
    kept = context * z / (z + np.where(z < 0, -0.01, 0.01))
    assert np.abs(context - kept).max() > 1e-3 * np.abs(context).max()
    assert values.shape[1] == decoder.heads == 8
    np.testing.assert_allclose(values.sum((2, 3)), kept.sum((2, 3)), rtol=1e-4, atol=1e-6)


# ---- is it any good --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "attentive"])
def test_relevance_lies_on_the_thing(name: str, scenes: Captions) -> None:
    """Correctness at threshold 0 is at least three times the share of the box."""
    found = maps(explained(name))
    for place in CONTENT:
        assert evaluate.box_correctness(found[:, place], scenes.boxes)[:, 0].mean() >= 3 * AREA


def test_relevance_is_nearer_to_the_thing_than_attention(scenes: Captions) -> None:
    """Where the network sees by attention alone."""
    found = explained("attentive")
    attention = np.stack([e.attention for e in found]).repeat(4, 2).repeat(4, 3)
    for place in CONTENT:
        looked = evaluate.box_correctness(attention[:, place], scenes.boxes)[:, 0].mean()
        assert evaluate.box_correctness(maps(found)[:, place], scenes.boxes)[:, 0].mean() > looked


@pytest.mark.parametrize("name", ["single", "attentive"])
def test_relevant_patches_matter_more_than_others(name: str) -> None:
    """Without the most relevant patches, a box full, words fall more than twice as far as without others."""
    model = onnx_lrp.captions.Captioner(exported(name), WORDS, device="cpu", threads=1)
    fallen = {}
    for order in ("most", "random"):
        rows = [
            evaluate.image_ablation(
                model.next, e.image, e.caption, e.images, size=4, count=4, fill=0.25, order=order, seed=i
            )
            for i, e in enumerate(explained(name))
        ]
        fallen[order] = np.mean(rows, 0)
    for place in CONTENT:
        assert fallen["most"][place] > 2 * fallen["random"][place]
        assert fallen["most"][place] > 0.1


@pytest.mark.parametrize("name", ["single", "attentive"])
def test_words_of_content_come_from_the_picture(name: str) -> None:
    """|R(image)| / |R(words)|, of the means over scenes: higher for colour, shape and side than for "on"."""
    image = np.mean([np.abs(e.images.sum((1, 2, 3))) for e in explained(name)], 0)
    words = np.mean([np.abs(e.texts.sum(1)) for e in explained(name)], 0)
    ratio = image / words
    assert (ratio[CONTENT] > ratio[ON]).all()


@pytest.mark.parametrize("method", ["gradient", "guided_backprop", "grad_cam", "guided_grad_cam"])
def test_baselines_come_in_the_same_frame(method: str) -> None:
    """A map of the same shape for every word, and Grad-CAM is that of the encoder's features."""
    found = explained("single", method)[0]
    assert found.images.shape == (6, 1 if method == "grad_cam" else 3, 24, 24)
    assert found.texts is None
    assert (np.abs(found.images).max((1, 2, 3)) > 0).all()
    if method != "grad_cam":
        return
    source, scene = net("single"), captions(SCENES, 7)
    features = source.features(torch.tensor(scene.image[:1])).detach().requires_grad_()
    words = torch.tensor(scene.words[:1])
    source.decoder(features, words[:, :-1])[0, SHAPE, words[0, SHAPE + 1]].backward()
    small_map = torch.relu((features.grad.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True))
    expected = torch.nn.functional.interpolate(small_map, (24, 24), mode="bilinear").detach().numpy()
    assert worst(found.images[SHAPE], expected[0]) <= 1e-4


# ---- published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "operator"), [("adaptive", False), ("multihead", True)])
def test_published_sizes(name: str, operator: bool, tmp_path: Path) -> None:
    """VGG16, width 512, 9586 words, 20 places: rewritten and run; the last word verified against float64."""
    path = tmp_path / "published.onnx"
    write(published(name, operator=operator), path, size=224, length=20)
    rng = np.random.default_rng(0)
    image, words = rng.random((1, 3, 224, 224)).astype(np.float32), rng.integers(1, 9500, (1, 20))
    found = verify(path, {"image": image, "words": words}, "captioning", target=(19, 77))
    print(found)
    assert found.reference
    assert found.ok
