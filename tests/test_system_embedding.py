"""The image-text embedding network: relevance of words for the similarity of a caption and an image.

The oracle is a network of the same values whose gradient times input is relevance (:mod:`tests.surrogate`), written
against the layers of the trained network; autograd does the rest.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lrp
from onnx_lrp import evaluate
from onnx_lrp.verify import verify

torch = pytest.importorskip("torch")
embedding = pytest.importorskip("exporters.embedding")

from torch import Tensor, nn  # noqa: E402

from tests.support import worst  # noqa: E402
from tests.surrogate import Surrogate, kept  # noqa: E402

POOLINGS = ("mean", "attend")
# Who sees BatchNormalization as part of the layer before it: nobody, we do, or the exporter did.
FORMS = {"present": (False, False), "folded by us": (False, True), "folded by the exporter": (True, True)}
CONCEPTS = np.array([embedding.NUMBERS[word] for word in embedding.CONCEPTS])


@functools.cache
def trained(pooling: str) -> nn.Module:
    """The small network, trained."""
    return embedding.train(pooling)


@functools.cache
def exported(pooling: str, dynamo: bool = False, double: bool = False) -> bytes:
    """The same as a file."""
    model = trained(pooling)
    return embedding.write(copy.deepcopy(model).double() if double else model, None, dynamo=dynamo).SerializeToString()


def explainer(model: bytes, method: str = "epsilon", **options: object) -> onnx_lrp.Explainer:
    return onnx_lrp.Explainer(model, method, device="cpu", **{"inputs": ["tokens"], "ledger": True, **options})


@functools.cache
def drawn(count: int = 10, seed: int = 3) -> embedding.Scenes:
    return embedding.scenes(count, seed)


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Oracle(Surrogate):
    """The rules of the network: BatchNormalization by a·x·R / stab(y), lengths and attention as constants.

    Args:
        epsilon: of all layers and sums; products with attention have 1e-6 in every book.
        folded: BatchNormalization and the layer before it have one stabilizer, not two.
        through_length: the length is differentiated like everything else, which is wrong.
    """

    def __init__(self, epsilon: float, folded: bool, through_length: bool = False) -> None:
        super().__init__(epsilon, epsilon)
        self.folded, self.through_length = folded, through_length

    def normed(self, dense: nn.Linear, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        return kept(norm(dense(x) if self.folded else self.linear(dense, x)), self.epsilon)

    def unit(self, x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True)
        return x / (length if self.through_length else length.detach())

    def branch(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        dense, norm, _, _, last = layers
        return self.unit(self.linear(last, self.apply(torch.relu, self.normed(dense, norm, x))))

    def pool(self, model: nn.Module, rows: Tensor, tokens: Tensor) -> Tensor:
        words = (tokens > 0).sum(1, keepdim=True)
        if model.score is None:
            return self.add(rows.sum(1)) / words
        said = torch.cat([(rows.sum(1) / words)[:, None].expand_as(rows), rows], -1)
        scores = (said @ model.score.weight[0]).clamp(min=0)
        weights = torch.softmax(torch.where(tokens == 0, -1e4, scores), 1).detach()
        return self.unit(self.add(kept(weights[..., None] * rows, 1e-6).sum(1)))

    def similarity(self, model: nn.Module, rows: Tensor, tokens: Tensor, image: Tensor) -> Tensor:
        """Of caption n and image n, (N,)."""
        p = self.branch(list(model.text), self.pool(model, rows, tokens))
        q = Oracle(0.0, folded=True).branch(list(model.image), image).detach()
        return self.add((p * q).sum(1))


def by_oracle(
    model: nn.Module, scenes: embedding.Scenes, epsilon: float, folded: bool, **options: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relevance of words (N, T), similarities (N,), and what all biases take (N,), in float64."""
    model, how = copy.deepcopy(model).double(), Oracle(epsilon, folded, **options)
    tokens, image = torch.tensor(scenes.tokens), torch.tensor(scenes.image).double()
    rows = model.embedding(tokens).detach().requires_grad_()
    scores = how.similarity(model, rows, tokens, image)
    (slope,) = torch.autograd.grad(scores.sum(), rows)
    dense, norm, _, _, last = model.text
    shift = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    taken = []
    for n in range(len(rows)):
        one = how.similarity(model, rows[n : n + 1], tokens[n : n + 1], image[n : n + 1]).sum()
        slopes = torch.autograd.grad(one, [dense.bias, norm.bias, last.bias])
        taken.append(sum((s * b).sum() for s, b in zip(slopes, [dense.bias, shift, last.bias], strict=True)))
    return (rows * slope).sum(-1).detach().numpy(), scores.detach().numpy(), torch.stack(taken).detach().numpy()


def own(model: bytes, scenes: embedding.Scenes, method: str = "epsilon", **options: object) -> onnx_lrp.Explanation:
    """Every caption explained with the image that it belongs to."""
    feeds = {"tokens": scenes.tokens, "image": scenes.image}
    if options.pop("double", False):
        feeds["image"] = feeds["image"].astype(np.float64)
    return explainer(model, method, batch_size=64, **options)(feeds, target=list(range(len(scenes.tokens))))


# ---- 1: agreement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_relevance_is_the_oracles(pooling: str, form: str) -> None:
    dynamo, folded = FORMS[form]
    expected, scores, _ = by_oracle(trained(pooling), drawn(), 1e-6, folded)
    found = own(exported(pooling, dynamo), drawn(), fold_batchnorm=folded)
    assert worst(found.score, scores) < 1e-5
    assert worst(found.relevance["tokens"], expected) < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_relevance_is_the_oracles_in_float64(pooling: str, form: str) -> None:
    dynamo, folded = FORMS[form]
    found = own(exported(pooling, dynamo, double=True), drawn(), double=True, fold_batchnorm=folded)
    expected, scores, _ = by_oracle(trained(pooling), drawn(), 1e-6, folded)
    assert worst(found.score, scores) < 1e-9
    assert worst(found.relevance["tokens"], expected) < 1e-9


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_a_stabilizer_all_forms_are_one(pooling: str) -> None:
    expected, _, _ = by_oracle(trained(pooling), drawn(), 0.0, folded=True)
    for dynamo, folded in FORMS.values():
        found = own(exported(pooling, dynamo, double=True), drawn(), "lrp_0", double=True, fold_batchnorm=folded)
        assert worst(found.relevance["tokens"], expected) < 1e-9


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_with_a_stabilizer_folding_shows(epsilon: float, tmp_path: Path) -> None:
    """One model, two maps: the reason why BatchNormalization is folded unless that is declined."""
    book = tmp_path / "book.toml"
    rule = f'rule = "epsilon"\nepsilon = {epsilon}\n'
    places = ('op = ["Gemm", "BatchNormalization", "ReduceSum"]', 'op = "MatMul", live = 1')
    entries = "\n".join(f"[[assign]]\nwhere = {{ {place} }}\n{rule}" for place in places)
    book.write_text(f'title = "large stabilizers"\nbase = "_base"\n{entries}', encoding="utf-8")
    maps = {}
    for form, (dynamo, folded) in FORMS.items():
        found = own(exported("mean", dynamo, double=True), drawn(), str(book), double=True, fold_batchnorm=folded)
        maps[form] = found.relevance["tokens"]
        assert worst(maps[form], by_oracle(trained("mean"), drawn(), epsilon, folded)[0]) < 1e-9
    assert worst(maps["folded by us"], maps["folded by the exporter"]) < 1e-6
    assert worst(maps["present"], maps["folded by us"]) > epsilon / 10


# ---- 2: conservation with an account ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_words_and_biases_add_up_to_the_similarity(pooling: str, form: str) -> None:
    dynamo, folded = FORMS[form]
    found = own(exported(pooling, dynamo), drawn(), fold_batchnorm=folded)
    assert found.absorbed is not None
    np.testing.assert_allclose(found.total() + found.absorbed, found.score, atol=1e-4)
    # The account is that of the biases, which is not small.
    _, _, taken = by_oracle(trained(pooling), drawn(), 1e-6, folded)
    np.testing.assert_allclose(found.absorbed, taken, atol=1e-4)
    assert np.abs(taken).mean() > 0.02


@pytest.mark.parametrize("pooling", POOLINGS)
def test_relevance_begins_as_the_products_of_both_vectors(pooling: str) -> None:
    """R_k = p_k q_k, which sums to the similarity; in float64, since the stabilizer alone takes nearly 1e-6."""
    proto = onnx.load_from_string(exported(pooling))
    p = next(n.output[0] for n in proto.graph.node if n.op_type == "Div" and n.name.startswith("/text"))
    found = own(exported(pooling, double=True), drawn(), double=True, layers=[p])
    np.testing.assert_allclose(found.relevance[p].sum(1), found.score, rtol=0, atol=1e-6)
    with torch.no_grad():
        tokens, image = torch.tensor(drawn().tokens), torch.tensor(drawn().image)
        model = trained(pooling)
        products = model.text(model.pool(model.embedding(tokens), tokens)) * model.image(image)
    assert worst(found.relevance[p], products.numpy()) < 1e-5


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_biases_words_have_it_all(pooling: str, dynamo: bool) -> None:
    model = copy.deepcopy(trained(pooling))
    with torch.no_grad():
        for layer in model.text:
            if isinstance(layer, nn.Linear | nn.BatchNorm1d):
                layer.bias.zero_()
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_mean.zero_()
    file = embedding.write(model, None, dynamo=dynamo).SerializeToString()
    for fold in (True, False):
        found = own(file, drawn(), fold_batchnorm=fold)
        np.testing.assert_allclose(found.total(), found.score, atol=1e-4)


# ---- 3: faithfulness -------------------------------------------------------------------------------------------------


def wins(relevance: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """How often a word of the first kind beats one of the second, ties counted half: the area under the ROC curve."""
    difference = relevance[first][:, None] - relevance[second][None, :]
    return float(((difference > 0) + (difference == 0) / 2).mean())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_concepts_beat_fillers_and_carry_the_similarity(pooling: str) -> None:
    scenes = drawn(200, 17)
    found = own(exported(pooling), scenes)
    tokens, relevance = scenes.tokens, found.relevance["tokens"]
    concept, word = np.isin(tokens, CONCEPTS), tokens > 0
    assert np.mean([wins(r, c, w & ~c) for r, c, w in zip(relevance, concept, word, strict=True)]) >= 0.9

    score = evaluate.Scorer(exported(pooling), np.arange(200), device="cpu")
    delete, rng = evaluate.replaced_tokens("tokens", 0), np.random.default_rng(0)
    feeds = {"tokens": tokens, "image": scenes.image}

    def drop(order: np.ndarray) -> float:
        gone = np.zeros(tokens.shape, bool)
        gone[np.arange(200), np.where(word, order, -np.inf).argmax(1)] = True
        return float((found.score - score(delete(feeds, gone))).mean())

    top, lowest = drop(relevance), drop(-relevance)
    random = np.mean([drop(rng.random(tokens.shape)) for _ in range(10)])
    print(f"{pooling}: top word {top:.3f}, random {random:.3f}, lowest {lowest:.3f}")
    assert top >= 2 * random
    assert lowest < random


# ---- 4: a batch is its samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ten_captions_with_two_images_are_twenty_explanations(pooling: str, dynamo: bool) -> None:
    scenes, run = drawn(), explainer(exported(pooling, dynamo))
    image = scenes.image[:2]
    found = run({"tokens": scenes.tokens, "image": image}, target="all")
    assert found.relevance["tokens"].shape == (20, embedding.LENGTH)
    assert found.target.tolist() == [0, 1] * 10
    for n in range(10):
        for b in range(2):
            single, row = run({"tokens": scenes.tokens[n : n + 1], "image": image[b : b + 1]}), 2 * n + b
            assert worst(found.relevance["tokens"][row : row + 1], single.relevance["tokens"]) < 1e-5
            np.testing.assert_allclose(found.score[row], single.score[0], atol=1e-6)
            np.testing.assert_allclose(found.absorbed[row], single.absorbed[0], atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_words_does_not_matter(pooling: str) -> None:
    scenes = drawn()
    order = np.stack([np.random.default_rng(n).permutation(embedding.LENGTH) for n in range(10)])
    moved = embedding.Scenes(np.take_along_axis(scenes.tokens, order, 1), scenes.image, scenes.concepts)
    before, after = (own(exported(pooling), s).relevance["tokens"] for s in (scenes, moved))
    assert worst(after, np.take_along_axis(before, order, 1)) < 1e-5


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling: str) -> None:
    scenes = drawn()
    longer = embedding.Scenes(np.pad(scenes.tokens, ((0, 0), (0, 11))), scenes.image, scenes.concepts)
    before, after = (own(exported(pooling), s).relevance["tokens"] for s in (scenes, longer))
    assert worst(after[:, : embedding.LENGTH], before) < 1e-5
    assert not after[:, embedding.LENGTH :].any()


def test_padding_that_is_summed_in_is_reported_apart(tmp_path: Path) -> None:
    """The original sums the row of padding into its mean: that relevance is real, and no word's."""
    pytest.importorskip("tokenizers")
    model, scenes = copy.deepcopy(trained("mean")), drawn()
    with torch.no_grad():
        model.embedding.weight[0] = 0.3 * model.embedding.weight[embedding.NUMBERS["dog"]]
    (tmp_path / "tokenizer.json").write_text(embedding.tokenizer(), encoding="utf-8")
    file = embedding.write(model, None).SerializeToString()
    found = own(file, scenes, tokenizer=tmp_path / "tokenizer.json")
    expected, _, _ = by_oracle(model, scenes, 1e-6, folded=True)
    assert worst(found.relevance["tokens"], expected) < 1e-4
    for tokens, relevance, text in zip(scenes.tokens, expected, found.tokens(), strict=True):
        assert abs(text.totals["padding"] - relevance[tokens == 0].sum()) < 1e-5
        assert abs(text.totals["content"] - relevance[tokens > 0].sum()) < 1e-5
    assert max(abs(text.totals["padding"]) for text in found.tokens()) > 0.01


# ---- 5: the negative control -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_through_the_length_nothing_is_left(pooling: str, dynamo: bool) -> None:
    """A vector of length one does not change when what it is made of grows: its gradient times input is zero."""
    scenes, model = drawn(), trained(pooling)
    proto = onnx.load_from_string(exported(pooling, dynamo))
    before = [n.input[0] for n in proto.graph.node if n.op_type == "ReduceL2"][-2]  # of the text; the image comes last
    plain = own(exported(pooling, dynamo), scenes, "input_x_gradient", layers=[before], ledger=False)
    np.testing.assert_allclose(plain.relevance[before].sum(1), 0.0, atol=1e-6)
    relevance = own(exported(pooling, dynamo), scenes, layers=[before])
    np.testing.assert_allclose(relevance.relevance[before].sum(1), relevance.score, atol=1e-5)

    tokens, image = torch.tensor(scenes.tokens), torch.tensor(scenes.image)
    rows = model.embedding(tokens).detach().requires_grad_()
    scores = (model.text(model.pool(rows, tokens)) * model.image(image)).sum(1)
    (slope,) = torch.autograd.grad(scores.sum(), rows)
    assert worst(plain.relevance["tokens"], (rows * slope).sum(-1).detach().numpy()) < 1e-4


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_explanation_that_went_through_the_length_would_be_caught(pooling: str) -> None:
    right, _, _ = by_oracle(trained(pooling), drawn(), 1e-6, folded=True)
    wrong, _, _ = by_oracle(trained(pooling), drawn(), 1e-6, folded=True, through_length=True)
    assert worst(wrong, right) > 0.1


# ---- the formulas of the original ------------------------------------------------------------------------------------


def test_the_formulas_of_the_original_lose_the_similarity() -> None:
    """What its code computes at three places, beside what is right (docs/systems/embedding.md); in numpy."""
    model, scenes = copy.deepcopy(trained("mean")).double(), drawn(200, 17)
    dense, norm, _, _, last = model.text
    with torch.no_grad():
        tokens = torch.tensor(scenes.tokens)
        before = dense(model.pool(model.embedding(tokens), tokens))
        x, y, q = before.numpy(), norm(before).numpy(), model.image(torch.tensor(scenes.image).double()).numpy()
        g, v, m, b = (t.numpy() for t in (norm.weight, norm.running_var, norm.running_mean, norm.bias))
        w, bias = last.weight.numpy(), last.bias.numpy()

    def st(z: np.ndarray) -> np.ndarray:
        return np.where(z < 0, z - 1e-6, z + 1e-6)

    h = np.maximum(y, 0)
    u = h @ w.T + bias
    p = u / np.linalg.norm(u, axis=1, keepdims=True)
    score = (p * q).sum(1)
    right, wrong = p * q, p * score[:, None] / q
    np.testing.assert_allclose(right.sum(1), score)
    print(
        f"start: off by {np.abs(wrong.sum(1) - score).mean():.3g} on average, {np.abs(wrong.sum(1) - score).max():.3g}"
    )
    assert np.abs(wrong.sum(1) - score).mean() > 1

    arrived = h * ((right / st(u)) @ w)
    a = g / np.sqrt(v + norm.eps)
    right, kept_back = a * x * arrived / st(y), (b - a * m) * arrived / st(y)
    np.testing.assert_allclose((right + kept_back).sum(1), arrived.sum(1), atol=1e-5)
    denominator = np.sqrt(v) * y + norm.eps
    wrong = x * (g * arrived / denominator).sum(1, keepdims=True)  # every channel gets the sum over all channels
    alike = np.mean([np.corrcoef(r, o)[0, 1] for r, o in zip(right, wrong, strict=True)])
    off = np.abs(wrong.sum(1) - right.sum(1))
    print(f"BatchNormalization: off by {off.mean():.3g} on average, channels correlate with r = {alike:.2f}")
    assert off.mean() > 1
    # Without the sum, the stabilizer alone: harmless behind a ReLU, where no relevance arrives for y < 0.
    alone = g * x * arrived / denominator
    print(f"its stabilizer alone: {np.abs(alone - right).max() / np.abs(right).max():.1e}")


# ---- the published sizes ---------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_published_sizes_are_rewritten_run_and_verified(pooling: str, dynamo: bool, tmp_path: Path) -> None:
    """16000 words of 300, branches of 2048 and 512, 31 tokens; weights are random."""
    model, rng = embedding.published(pooling), np.random.default_rng(0)
    file = tmp_path / "published.onnx"
    embedding.write(model, file, dynamo=dynamo)
    tokens = rng.integers(1, 16000, (8, 31)) * (np.arange(31) < rng.integers(4, 32, (8, 1)))
    image = rng.random((5, 2048)).astype(np.float32)
    feeds = {"tokens": tokens, "image": image}

    begin = time.perf_counter()
    rewritten = onnx_lrp.rewrite(file, "epsilon", inputs=["tokens"], ledger=True)
    seconds = time.perf_counter() - begin
    size = rewritten.model.ByteSize() / file.stat().st_size
    found = explainer(str(file))(feeds, target="all")
    np.testing.assert_allclose(found.total() + found.absorbed, found.score, atol=1e-4)
    with torch.no_grad():
        expected = model(torch.tensor(tokens), torch.tensor(image)).numpy()
    np.testing.assert_allclose(found.score, expected.reshape(-1), atol=1e-5)
    for options in ({"reported": ["tokens"]}, {"reported": ["tokens"], "fold_batchnorm": False}, {}):
        checked = verify(file, feeds, "epsilon", **options)
        assert checked.ok, str(checked)
    print(f"{pooling}, dynamo {dynamo}: rewritten in {seconds:.2f} s to {size:.3f} of the size; {checked.other:.1e}")
    assert size < 1.01
