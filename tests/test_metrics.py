"""Metrics of explanations against numbers worked out by hand, and by other libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from scipy.ndimage import gaussian_filter

import onnx_lrp
from onnx_lrp import evaluate
from onnx_lrp.errors import InputError
from tests.support import numbers

SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "shapes.onnx"

# ---- where relevance lies --------------------------------------------------------------------------------------------

MAP = np.array([[[4.0, 1.0, -2.0], [0.0, 3.0, 2.0]]])  # positive: 10, of these 8 in the first two columns
LEFT = evaluate.region_of([[0, 0, 2, 2]], 2, 3)


def test_regions_of_boxes() -> None:
    np.testing.assert_array_equal(LEFT, [[[True, True, False], [True, True, False]]])
    two = evaluate.region_of([[[0, 0, 1, 1], [2, 1, 3, 2]]], 2, 3)
    np.testing.assert_array_equal(two, [[[True, False, False], [False, False, True]]])
    assert not evaluate.region_of([[1, 1, 1, 5]], 2, 3).any(), "an empty box covers nothing"


def test_mass_in_a_region() -> None:
    np.testing.assert_allclose(evaluate.relevance_mass(MAP, LEFT), [0.8])
    channels = np.stack([MAP[0] - 1, np.ones_like(MAP[0])])[None]
    np.testing.assert_allclose(evaluate.relevance_mass(channels, LEFT), [0.8], err_msg="channels are summed")
    np.testing.assert_array_equal(evaluate.relevance_mass(-np.abs(MAP), LEFT), [0], err_msg="nothing is for it")


def test_rank_in_a_region() -> None:
    """Of the four most relevant pixels 4, 3, 2, 1 the region has three."""
    np.testing.assert_allclose(evaluate.relevance_rank(MAP, LEFT), [3 / 4])
    flat = np.ones_like(MAP)
    np.testing.assert_allclose(evaluate.relevance_rank(flat, LEFT), [4 / 6], err_msg="a flat map is chance")
    tied = np.array([[[2.0, 1.0, 1.0], [2.0, 1.0, 0.0]]])  # two sure places, and two for the three ties, one inside: no
    np.testing.assert_allclose(evaluate.relevance_rank(tied, LEFT), [(2 + 2 / 3 * 2) / 4])
    np.testing.assert_array_equal(evaluate.relevance_rank(MAP, np.zeros_like(LEFT)), [0])


def test_pointing() -> None:
    maps, left = np.concatenate([MAP, MAP[..., ::-1], -np.abs(MAP)]), LEFT.repeat(3, 0)
    np.testing.assert_array_equal(evaluate.pointing(maps, left), [True, False, False])


def test_entropy() -> None:
    one, half = np.zeros((1, 2, 2)), np.array([[[1.0, 1.0], [0.0, -3.0]]])
    one[0, 1, 1] = 5
    found = [float(evaluate.entropy(m)[0]) for m in (one, half, np.ones((1, 2, 2)), np.zeros((1, 2, 2)))]
    np.testing.assert_allclose(found, [0, 0.5, 1, 1], atol=1e-12)


def test_maps_and_regions_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"region is bool \(1, 2, 3\)"):
        evaluate.relevance_mass(MAP, LEFT[:, :, :2])
    with pytest.raises(InputError, match="region is bool"):
        evaluate.relevance_mass(MAP, LEFT.astype(int))
    with pytest.raises(InputError, match="finite"):
        evaluate.entropy(MAP * np.nan)
    with pytest.raises(InputError, match="boxes are"):
        evaluate.region_of([1, 2, 3, 4], 2, 3)


# ---- randomised weights ----------------------------------------------------------------------------------------------


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_all_weights_and_nothing_else_is_shuffled() -> None:
    source = onnx.load(SHAPES)
    before, after = weights(source), weights(evaluate.randomised(source, seed=1))
    for name, array in before.items():
        assert after[name].shape == array.shape
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(np.sort(after[name], None), np.sort(array, None))
        assert (after[name] == array).all() == (array.ndim < 2), name
    same, other = weights(evaluate.randomised(source, seed=1)), weights(evaluate.randomised(source, seed=2))
    assert all((same[name] == after[name]).all() for name in before)
    assert any((other[name] != after[name]).any() for name in before)


def test_gaussian_weights_keep_their_size() -> None:
    source = onnx.load(SHAPES)
    before, after = weights(source), weights(evaluate.randomised(source, draw=evaluate.gaussian))
    for name, array in before.items():
        if array.size > 1000:
            assert np.sqrt(np.mean(after[name] ** 2)) == pytest.approx(np.sqrt(np.mean(array**2)), rel=0.1)
            assert abs(after[name].mean()) < 0.1 * array.std()


def test_cascading_goes_from_the_last_layer_to_the_first() -> None:
    source = onnx.load(SHAPES)
    before = weights(source)
    steps = list(evaluate.cascading(source))
    convolutions = [n.name for n in source.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert [name for name, _ in steps] == convolutions[::-1]
    changed = [sum((array != before[name]).any() for name, array in weights(model).items()) for _, model in steps]
    assert changed == list(range(1, len(steps) + 1))
    alone = [model for _, model in evaluate.cascading(source, order="independent")]
    assert all(sum((a != before[name]).any() for name, a in weights(m).items()) == 1 for m in alone)


def test_weights_behind_other_forms_and_in_branches() -> None:
    """Constants, transposed and quantised weights, embeddings, weights that two layers share, and those of an If."""
    table, square = numbers(5, 4), numbers(4, 4)
    shared = helper.make_node("MatMul", ["b", "square"], ["c"], "inner")
    branch = helper.make_graph([shared], "branch", [], [helper.make_tensor_value_info("c", 1, [None, 4])])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("Identity", ["square"], ["alias"]),
        helper.make_node("Transpose", ["alias"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "turned"], ["a"], "first"),
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(numbers(4, 4))),
        helper.make_node("MatMul", ["a", "w"], ["b"], "second"),
        helper.make_node("If", ["yes"], ["y"], "if", then_branch=branch, else_branch=branch),
    ]
    inputs = [helper.make_tensor_value_info("ids", 7, ["N"]), helper.make_tensor_value_info("yes", 9, [])]
    given = {"table": table, "square": square}
    outputs = [helper.make_tensor_value_info("y", 1, ["N", 4])]
    stored = [numpy_helper.from_array(a, name) for name, a in given.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert [name for name, _ in evaluate.cascading(model)] == ["inner", "second", "embed"], "first shares with inner"


def test_the_explanation_of_a_random_model_is_another() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((3, 3, 64, 64), np.float32)

    def maps(model: onnx.ModelProto) -> np.ndarray:
        return onnx_lrp.Explainer(model, "epsilon_plus", device="cpu")(x, target=2).relevance["image"].sum(1)

    steps = list(evaluate.randomisation(SHAPES, maps))
    assert steps[-1].layer == "block1/conv"
    assert steps[-1].similarity.shape == (3,)
    assert abs(steps[-1].similarity).max() < 0.5
    same = list(evaluate.randomisation(SHAPES, maps, draw=lambda rng, w: w))
    np.testing.assert_allclose([step.similarity for step in same], 1)


def test_models_without_weights_and_integer_weights() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, 1, ["N", 3]) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    with pytest.raises(InputError, match="no weights to randomise"):
        evaluate.randomised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    with pytest.raises(InputError, match="draw=shuffled"):
        evaluate.gaussian(np.random.default_rng(0), np.ones((2, 2), np.int8))


# ---- how alike maps are ----------------------------------------------------------------------------------------------


def test_rank_similarity() -> None:
    a = np.array([[1.0, 2.0, 3.0, 9.0]])
    np.testing.assert_allclose(evaluate.rank_similarity(a, a**3), [1])
    np.testing.assert_allclose(evaluate.rank_similarity(a, -a), [-1])
    np.testing.assert_allclose(evaluate.rank_similarity(a, -a, absolute=True), [1])
    tied = np.array([[1.0, 1.0, 2.0, 2.0]])  # ranks 1.5 1.5 3.5 3.5
    np.testing.assert_allclose(evaluate.rank_similarity(a, tied), [4 / np.sqrt(5 * 4)])
    np.testing.assert_array_equal(evaluate.rank_similarity(a, np.ones_like(a)), [0])
    with pytest.raises(InputError, match="one shape"):
        evaluate.rank_similarity(a, a[:, :2])


def test_ssim_is_that_of_its_definition() -> None:
    """Wang et al. 2004, eq. 13, at the pixels whose window lies in the picture."""
    x, y = np.random.default_rng(0).normal(size=(2, 1, 20, 24))
    a, b = ((m[0] - m.min()) / np.ptp(m) for m in (x, y))

    def blur(m: np.ndarray) -> np.ndarray:
        return gaussian_filter(m, 1.5, truncate=3.5)[5:-5, 5:-5]

    ma, mb = blur(a), blur(b)
    va, vb, vab = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    wanted = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    np.testing.assert_allclose(evaluate.ssim(x, y), [wanted.mean()], rtol=1e-9)
    np.testing.assert_allclose(evaluate.ssim(x, 3 * x + 1), [1], err_msg="scaled to 0..1 first")
    np.testing.assert_allclose(evaluate.ssim(np.abs(x), -np.abs(x), absolute=True), [1])
    np.testing.assert_allclose(evaluate.ssim(x, np.zeros_like(x)).shape, (1,))
    with pytest.raises(InputError, match="11 pixels"):
        evaluate.ssim(x[:, :10], y[:, :10])


# ---- completeness ----------------------------------------------------------------------------------------------------


def test_completeness_with_and_without_the_ledger() -> None:
    x = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    kept = onnx_lrp.Explainer(SHAPES, "epsilon", ledger=True, device="cpu")(x)
    assert evaluate.completeness(kept).max() < 1e-3
    bare = onnx_lrp.Explainer(SHAPES, "epsilon", device="cpu")(x)
    np.testing.assert_allclose(evaluate.completeness(bare), abs(kept.absorbed / kept.score), rtol=1e-2)


def test_completeness_above_a_baseline() -> None:
    x = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    coarse, fine = (
        evaluate.completeness(
            onnx_lrp.Explainer(SHAPES, onnx_lrp.IntegratedGradients(steps=steps), device="cpu")(x, target=1)
        )
        for steps in (2, 100)
    )
    rise = (lambda s: s(x) - s(0 * x))(lambda v: evaluate.Scorer(SHAPES, 1, device="cpu")({"image": v}))
    found = onnx_lrp.Explainer(SHAPES, onnx_lrp.IntegratedGradients(steps=2), device="cpu")(x, target=1)
    np.testing.assert_allclose(coarse, abs(found.total() - rise) / abs(rise), rtol=1e-3)
    assert fine.max() < coarse.max()


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_right_wrong_and_missed() -> None:
    predicted = [["a", "red", "disc", "disc"], ["a", "red", "square"], ["a", "cross"]]
    references = [[["a", "red", "disc"], ["a", "disc"]], [["the", "blue", "square"]], [["a", "red", "cross"]]]
    red, disc, never = evaluate.word_scores(predicted, references, ["red", "disc", "never"])
    assert (red.true, red.false, red.missed) == (1, 1, 1)
    assert (red.precision, red.recall, red.f1) == (0.5, 0.5, 0.5)
    assert (disc.precision, disc.recall, disc.f1) == (1, 1, 1)
    assert (never.precision, never.recall, never.f1) == (0, 0, 0)
    with pytest.raises(InputError, match="one set per caption"):
        evaluate.word_scores(predicted, references[:2], ["red"])


def test_frequent_words() -> None:
    captions = [["a", "red", "disc"], ["a", "disc", "disc"], ["a", "blue", "square"]]
    assert evaluate.frequent_words(captions, 3, without=["a"]) == ["disc", "blue", "red"]
