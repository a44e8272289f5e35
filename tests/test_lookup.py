"""The small causal transformer that ships: its answers, and whether explanations point at the evidence.

The recipe of the model draws the texts, so it is known which token the answer comes from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import onnx_lrp
from onnx_lrp import evaluate
from onnx_lrp.cli import main

causal = pytest.importorskip("exporters.causal")

FOLDER = Path(__file__).parents[1] / "examples" / "lookup"
MODEL = FOLDER / "lookup.onnx"
COUNT = 200


@pytest.fixture(scope="module")
def texts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of fresh texts, where the value asked for stands, and the value."""
    ids, where = causal.texts(COUNT, seed=11)
    return ids, where[:, 0], np.take_along_axis(ids, where, 1)[:, 0]


@pytest.fixture(scope="module")
def relevance(texts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """Per token, of the answer at the last place, by method."""
    ids, _, answer = texts
    target = [(ids.shape[1] - 1, int(token)) for token in answer]
    found = {}
    for method in ("attnlrp", "cp_lrp", "input_x_gradient"):
        explainer = onnx_lrp.Explainer(MODEL, method, device="cpu", batch_size=COUNT)
        found[method] = explainer({"input_ids": ids}, target=target).relevance["input_ids"]
    found["rollout"] = evaluate.AttentionRollout(MODEL, device="cpu")({"input_ids": ids})[:, -1]
    return found


def better(one: np.ndarray, other: np.ndarray) -> bool:
    """True if the first is larger on average, by more than two standard errors of the difference."""
    difference = one - other
    return bool(difference.mean() > 2 * difference.std(ddof=1) / np.sqrt(len(difference)))


def test_it_looks_values_up(texts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    ids, _, answer = texts
    session = evaluate.Scorer(MODEL, 0, device="cpu").session
    logits = session.run({"input_ids": ids})["logits"]
    assert (logits[:, -1].argmax(-1) == answer).mean() > 0.99


def test_the_tokenizer_has_its_words() -> None:
    file = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert list(file["model"]["vocab"]) == list(causal.WORDS)
    assert file == json.loads(causal.tokenizer())


def test_the_value_asked_for_is_the_evidence(
    texts: tuple[np.ndarray, np.ndarray, np.ndarray], relevance: dict[str, np.ndarray]
) -> None:
    """Of the positive relevance before the question it has more than half by attnlrp, and less by the baselines."""
    _, where, _ = texts
    share = {}
    for name, found in relevance.items():
        positive = np.maximum(found[:, :-1], 0)
        share[name] = positive[np.arange(COUNT), where] / (positive.sum(1) + 1e-12)
    assert share["attnlrp"].mean() > 0.5
    assert (relevance["attnlrp"][:, :-1].argmax(1) == where).mean() > 0.85
    assert better(share["attnlrp"], share["input_x_gradient"])
    assert better(share["attnlrp"], share["rollout"])


def test_attnlrp_is_the_more_faithful(
    texts: tuple[np.ndarray, np.ndarray, np.ndarray], relevance: dict[str, np.ndarray]
) -> None:
    """Blanking tokens in its order moves the score more than in that of gradient x input, or of attention rollout."""
    ids, _, answer = texts
    score = evaluate.Scorer(MODEL, answer, position=-1, device="cpu")
    allowed = np.ones(ids.shape, bool)
    allowed[:, -1] = False  # the question stays
    blank = evaluate.replaced_tokens("input_ids", causal.BLANK)
    area = {
        name: evaluate.faithfulness(score, {"input_ids": ids}, found, blank, steps=16, allowed=allowed)
        for name, found in relevance.items()
    }
    assert better(area["attnlrp"], area["input_x_gradient"])
    assert better(area["attnlrp"], area["rollout"])


def test_the_command_names_the_book_for_attention(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asked for another rule book it says so in a line, and not where the book is the right one, or no book at all."""
    pytest.importorskip("tokenizers")
    call = ["explain", str(MODEL), "a 7 b 3 ? a", "-o", str(tmp_path / "page.html")]
    hint = "attnlrp was made: -m attnlrp"
    assert main([*call, "-m", "epsilon"]) == 0
    assert hint in capsys.readouterr().out
    for method in ("attnlrp", "input_x_gradient"):
        assert main([*call, "-m", method]) == 0
        assert hint not in capsys.readouterr().out
