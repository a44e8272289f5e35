"""Perturbation curves and attention rollout, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrp import evaluate
from onnx_lrp.errors import InputError
from tests.support import numbers

# ---- perturbation ----------------------------------------------------------------------------------------------------

X = np.array([[4.0, 1.0, 2.0, 1.0], [0.0, 3.0, 0.0, 1.0]])


def total(feeds: evaluate.perturbation.Feeds) -> np.ndarray:
    """A score that is the sum of its features: each takes with it what it is worth."""
    return feeds["x"].sum(1)


def zeroed(feeds: evaluate.perturbation.Feeds, gone: np.ndarray) -> evaluate.perturbation.Feeds:
    return {"x": np.where(gone, 0, feeds["x"])}


def test_deletion_by_hand() -> None:
    """The most relevant features go first, ties in their own order; the area is the trapezoids'."""
    found = evaluate.deletion(total, {"x": X}, X, zeroed, steps=4)
    np.testing.assert_array_equal(found.share, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(found.scores, [[8, 4, 2, 1, 0], [4, 1, 0, 0, 0]])
    np.testing.assert_allclose(found.area(), [(8 / 2 + 4 + 2 + 1) / 4, (4 / 2 + 1) / 4])


def test_insertion_by_hand() -> None:
    found = evaluate.insertion(total, {"x": X}, X, zeroed, steps=4)
    np.testing.assert_array_equal(found.scores, [[0, 4, 6, 7, 8], [0, 3, 4, 4, 4]])


def test_least_relevant_first() -> None:
    found = evaluate.curve(total, {"x": X}, X, zeroed, order="least", steps=4)
    np.testing.assert_array_equal(found.scores, [[8, 7, 6, 4, 0], [4, 4, 4, 3, 0]])


def test_faithfulness_is_the_area_between_the_curves() -> None:
    found = evaluate.faithfulness(total, {"x": X}, X, zeroed, steps=4)
    np.testing.assert_allclose(found, [(3 + 4 + 3) / 4, (3 + 4 + 3) / 4])
    wrong = evaluate.faithfulness(total, {"x": X[:1]}, -X[:1], zeroed, steps=4)
    assert wrong[0] < 0, "relevance turned upside down says the contrary"


def test_features_that_may_not_go_stay() -> None:
    """Shares are those of what may be deleted, whose number differs between samples."""
    allowed = np.array([[False, True, True, True], [False, True, False, True]])
    found = evaluate.deletion(total, {"x": X}, X, zeroed, steps=2, allowed=allowed)
    np.testing.assert_array_equal(found.scores, [[8, 4 + 1 - 0, 4], [4, 1, 0]])
    back = evaluate.insertion(total, {"x": X}, X, zeroed, steps=2, allowed=allowed)
    np.testing.assert_array_equal(back.scores[:, [0, -1]], [[4, 8], [0, 4]])


def test_random_order_is_fixed_by_its_seed() -> None:
    x = numbers(20, 50)
    curves = [evaluate.curve(total, {"x": x}, x, zeroed, order="random", seed=seed).scores for seed in (1, 1, 2)]
    np.testing.assert_array_equal(curves[0], curves[1])
    assert not np.array_equal(curves[0], curves[2])
    whole = x.sum(1, keepdims=True)
    drift = curves[0] - whole * (1 - np.linspace(0, 1, 11))
    assert np.abs(drift.mean(0)).max() < 4 * np.sqrt(50) / np.sqrt(20), "on average features go evenly"


@pytest.mark.parametrize(
    ("relevance", "options", "match"),
    [
        (X[None], {}, r"\(N, F\), got \(1, 2, 4\)"),
        (X * np.nan, {}, "finite"),
        (X, {"allowed": np.ones((2, 3))}, r"allowed is of shape \(2, 3\)"),
        (X, {"steps": 0}, "steps is 1 or more"),
    ],
)
def test_what_is_refused(relevance: np.ndarray, options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        evaluate.deletion(total, {"x": X}, relevance, zeroed, **options)


def test_patches_and_their_relevance_lie_alike() -> None:
    """Deleting the patch of most pooled relevance deletes the brightest corner of the picture."""
    picture = np.zeros((2, 3, 4, 6), np.float32)
    picture[0, :, 2:, 2:4] = 1.0  # patch 4 of 2 x 3
    picture[1, 1, 1, 5] = 1.0  # in patch 2
    relevance = evaluate.pooled(picture, 2)
    np.testing.assert_array_equal(relevance, [[0, 0, 0, 0, 12, 0], [0, 0, 1, 0, 0, 0]])
    gone = evaluate.patches("image", 2, fill=-1.0)({"image": picture, "other": X}, relevance > 0)
    assert (gone["image"][0, :, 2:, 2:4] == -1).all()
    assert (gone["image"][1, :, :2, 4:] == -1).all()
    assert (gone["image"] == -1).sum() == 2 * 12
    assert gone["other"] is X
    with pytest.raises(InputError, match="multiples"):
        evaluate.pooled(picture, 4)


def test_tokens_are_replaced_or_hidden() -> None:
    ids, mask = np.array([[5, 6, 7]]), np.array([[1, 1, 0]])
    gone = np.array([[True, False, False]])
    given = {"input_ids": ids, "attention_mask": mask}
    np.testing.assert_array_equal(evaluate.replaced_tokens("input_ids", 103)(given, gone)["input_ids"], [[103, 6, 7]])
    np.testing.assert_array_equal(evaluate.hidden_tokens("attention_mask")(given, gone)["attention_mask"], [[0, 1, 0]])
    assert ids[0, 0] == 5, "what was given is left alone"


# ---- models ----------------------------------------------------------------------------------------------------------


def attending(heads: int = 2, layers: int = 2, side_by_side: bool = False, extra: bool = False) -> onnx.ModelProto:
    """Self-attention without weights but one per layer: x + softmax(x W xᵀ) x, on heads that are slices of x."""
    nodes, weights = [], []
    x = "x"
    for layer in range(layers):
        parts = []
        for head in range(heads):
            name = f"l{layer}h{head}"
            weights.append(numpy_helper.from_array(numbers(4, 4), f"{name}_w"))
            nodes += [
                helper.make_node("MatMul", ["x" if side_by_side else x, f"{name}_w"], [f"{name}_q"]),
                helper.make_node("Unsqueeze", [f"{name}_q", "one"], [f"{name}_u"]),
            ]
            parts.append(f"{name}_u")
        lifted, mixed = f"l{layer}_k", f"l{layer}_mixed"
        nodes += [
            helper.make_node("Concat", parts, [f"l{layer}_q"], axis=1),
            helper.make_node("Unsqueeze", ["x" if side_by_side else x, "one"], [lifted]),
            helper.make_node("Transpose", [lifted], [f"{lifted}t"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [f"l{layer}_q", f"{lifted}t"], [f"l{layer}_scores"]),
            helper.make_node("Softmax", [f"l{layer}_scores"], [f"l{layer}_p"], axis=-1),
            helper.make_node("IsNaN", [f"l{layer}_p"], [f"l{layer}_nan"]),  # as torch's exporters write it
            helper.make_node("Where", [f"l{layer}_nan", "zero", f"l{layer}_p"], [f"l{layer}_safe"]),
            helper.make_node("MatMul", [f"l{layer}_safe", lifted], [mixed]),
            helper.make_node("ReduceMean", [mixed, "one"], [f"{mixed}_mean"], keepdims=0),
            helper.make_node("Add", [x, f"{mixed}_mean"], [f"l{layer}_out"]),
        ]
        x = f"l{layer}_out"
    if extra:  # a softmax that weighs nothing
        nodes.append(helper.make_node("Softmax", [x], ["classes"], axis=-1))
        weights.append(numpy_helper.from_array(numbers(4, 3), "head"))
        nodes.append(helper.make_node("MatMul", ["classes", "head"], ["scores"]))
        x = "scores"
    weights += [
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", 4])
    made = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", "T", 3 if extra else 4])
    graph = helper.make_graph(nodes, "attending", [given], [made], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def rolled(model: onnx.ModelProto, x: np.ndarray, heads: int, layers: int) -> np.ndarray:
    """Attention rollout in a few lines of numpy, on the model's own weights, one sample at a time."""
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    found = []
    for state in x.astype(np.float64):
        total = np.eye(len(state))
        for layer in range(layers):
            scores = np.stack([state @ weights[f"l{layer}h{h}_w"] @ state.T for h in range(heads)])
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            state = state + (p @ state).mean(0)
            total = (0.5 * p.mean(0) + 0.5 * np.eye(len(state))) @ total
        found.append(total)
    return np.stack(found)


@pytest.mark.parametrize("extra", [False, True])
def test_rollout_of_a_model(extra: bool) -> None:
    model, x = attending(extra=extra), numbers(3, 5, 4) * 0.5
    found = evaluate.AttentionRollout(model, device="cpu")({"x": x})
    np.testing.assert_allclose(found, rolled(model, x, 2, 2), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    assert evaluate.attention_model(model)[1] == ["attention/l0_p", "attention/l1_p"]


def test_rollout_by_hand() -> None:
    """Two tokens, two heads: the second layer looks back at the first token with half its heads."""
    first = np.array([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]])  # mean: rows (1, 0), (1/2, 1/2)
    second = np.array([[[[0.0, 1.0], [0.0, 1.0]]]])
    # layers mixed with the residual: (1, 0), (1/4, 3/4), then (1/2, 1/2), (0, 1)
    np.testing.assert_allclose(evaluate.rollout([first, second]), [[[0.625, 0.375], [0.25, 0.75]]])


def test_rollout_wants_one_branch_of_attention() -> None:
    with pytest.raises(InputError, match="does not come after the one before it"):
        evaluate.attention_model(attending(side_by_side=True))
    with pytest.raises(InputError, match="holds no attention"):
        evaluate.attention_model(attending(layers=0, extra=True))
    with pytest.raises(InputError, match="one layer at least"):
        evaluate.rollout([])


def test_scores_of_a_model() -> None:
    model, x = attending(), numbers(3, 5, 4)
    outputs = evaluate.Scorer(model, 2, position=-1, device="cpu")
    whole = outputs.session.run({"x": x})["l1_out"]
    np.testing.assert_array_equal(outputs({"x": x}), whole[:, -1, 2])
    each = evaluate.Scorer(model, np.array([0, 3, 1]), position=1, device="cpu")
    np.testing.assert_array_equal(each({"x": x}), whole[[0, 1, 2], 1, [0, 3, 1]])
    with pytest.raises(InputError, match="give target="):
        evaluate.Scorer(model, 0, device="cpu")({"x": x})
    with pytest.raises(InputError, match="no tensor 'logits'"):
        evaluate.Scorer(model, 0, output="logits", device="cpu")
