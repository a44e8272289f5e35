"""Outputs (N, B) whose classes are samples of another input: every caption with every image."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_lrp
from onnx_lrp import InputError
from onnx_lrp.evaluate import Scorer
from onnx_lrp.verify import verify
from tests.small_models import FLOAT, INT64, build, two_towers
from tests.support import RNG, numbers, worst

WORDS, WIDTH, PIXELS = 7, 4, 6  # of two_towers


def feeds(texts: int = 9, images: int = 5) -> dict[str, np.ndarray]:
    return {"tokens": RNG.integers(0, WORDS, (texts, 3)), "image": numbers(images, PIXELS)}


def products(model: onnx.ModelProto, data: dict[str, np.ndarray]) -> np.ndarray:
    """Relevance of every word for every pair, (N, B, T): the network is linear, so it is a dot product."""
    table, w = (onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer[:2])
    return np.einsum("ntd,bd->nbt", table[data["tokens"]], data["image"].astype(np.float64) @ w)


def explainer(model: onnx.ModelProto, **options: object) -> onnx_lrp.Explainer:
    return onnx_lrp.Explainer(model, "lrp_0", device="cpu", **{"inputs": ["tokens"], **options})


@pytest.mark.parametrize("batch_size", [None, 2, 4, 100])
@pytest.mark.parametrize("images", [1, 2, 5, 9])
def test_every_text_with_every_image(images: int, batch_size: int | None) -> None:
    model, data = two_towers(), feeds(9, images)
    expected = products(model, data)
    found = explainer(model, batch_size=batch_size, output="similarity", ledger=True)(data, target="all")
    assert worst(found.relevance["tokens"].reshape(expected.shape), expected) < 1e-5
    assert worst(found.score.reshape(expected.shape[:2]), expected.sum(-1)) < 1e-5
    np.testing.assert_array_equal(found.target, np.tile(np.arange(images), 9))
    np.testing.assert_array_equal(found.inputs["tokens"], np.repeat(data["tokens"], images, 0))
    # What belongs to the images is there once, and the rows of the texts are repeated with them.
    np.testing.assert_array_equal(found.inputs["image"], data["image"])
    assert found.outputs["image_embeds"].shape == (images, WIDTH)
    assert worst(found.outputs["similarity"], np.repeat(expected.sum(-1), images, 0)) < 1e-5


@pytest.mark.parametrize("batch_size", [2, 100])
def test_one_image_for_each_text(batch_size: int) -> None:
    """By a number for all, by one each, and by the arg max; as many images as texts are no pairs."""
    model, data = two_towers(), feeds(6, 6)
    expected, run = products(model, data), explainer(model, batch_size=batch_size, output="similarity")
    each, best = RNG.permutation(6), expected.sum(-1).argmax(1)
    for target, which in ((4, np.full(6, 4)), (list(each), each), (None, best), (-1, best)):
        found = run(data, target)
        np.testing.assert_array_equal(found.target, which)
        assert worst(found.relevance["tokens"], expected[np.arange(6), which]) < 1e-5


def test_samples_of_it_keep_what_they_share() -> None:
    model, data = two_towers(), feeds(5, 5)
    found = explainer(model, output="similarity")(data)
    assert found.shared == ("image", "image_embeds")
    for part, texts in ((found[2], data["tokens"][2:3]), (found[1:4], data["tokens"][1:4])):
        np.testing.assert_array_equal(part.inputs["tokens"], texts)
        np.testing.assert_array_equal(part.inputs["image"], data["image"])
        assert part.outputs["image_embeds"].shape == (5, WIDTH)
        assert part.shared == found.shared


def test_the_other_way_round() -> None:
    """Of the transposed output, images are the samples and texts the classes; relevance is that of the images."""
    model, data = two_towers(per_image=True), feeds(4, 3)
    table, w = (onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer[:2])
    expected = np.einsum("bp,pd,nd->bnp", data["image"], w, table[data["tokens"]].sum(1))
    found = explainer(model, inputs=["image"])(data, target="all")
    assert found.shared == ("tokens", "text_embeds")
    assert worst(found.relevance["image"].reshape(expected.shape), expected) < 1e-5
    np.testing.assert_allclose(found.outputs["similarity"], found.outputs["per_image"].T)


@pytest.mark.parametrize("axes", [("texts", "images"), ("batch", "batch")])
def test_relevance_of_both_sides_is_that_of_pairs(axes: tuple[str, str]) -> None:
    """Each side has half of what a product brings, and sample i meets sample i only."""
    model, data = two_towers(axes), feeds(6, 6)
    expected = products(model, data)[np.arange(6), np.arange(6)]
    found = explainer(model, inputs=None, output="similarity")(data)
    assert worst(found.relevance["tokens"], expected / 2) < 1e-5
    assert found.relevance["image"].shape == (6, PIXELS)
    assert worst(found.relevance["image"].sum(1), expected.sum(1) / 2) < 1e-5
    assert worst(found.score, expected.sum(1)) < 1e-5
    assert found.outputs["similarity"].shape == (6, 1)
    with pytest.raises(InputError, match="sample i of the one is explained with sample i of the other"):
        explainer(model, inputs=None, output="similarity")(data, target=0)
    with pytest.raises(InputError, match="inputs have different numbers of samples"):
        explainer(model, inputs=None, output="similarity")(feeds(6, 2))


def test_lengths_are_told_by_data_flow_where_the_output_has_names_of_its_own() -> None:
    model, data = two_towers(), feeds(3, 2)
    for dimension in model.graph.output[0].type.tensor_type.shape.dim:
        dimension.dim_param = f"made_up_{dimension.dim_param}"
    expected = products(model, data)
    found = explainer(model, output="similarity")(data, target="all")
    assert worst(found.relevance["tokens"].reshape(expected.shape), expected) < 1e-5


def test_an_image_that_is_not_there() -> None:
    with pytest.raises(InputError, match="class 5 is out of range: the output has 5 classes"):
        explainer(two_towers(), output="similarity")(feeds(3, 5), target=5)


def test_all_classes_of_a_classifier() -> None:
    """Not for similarities alone: every class of every sample, in one call."""
    w = numbers(PIXELS, 3)
    nodes, inputs = [helper.make_node("MatMul", ["x", "w"], ["logits"], "dense")], {"x": (FLOAT, ("batch", PIXELS))}
    model = build(nodes, inputs, {"logits": (FLOAT, ("batch", 3))}, {"w": w})
    x = numbers(5, PIXELS)
    found = onnx_lrp.Explainer(model, "lrp_0", device="cpu")(x, target="all")
    assert worst(found.relevance["x"].reshape(5, 3, PIXELS), np.einsum("nd,dc->ncd", x, w)) < 1e-5
    np.testing.assert_array_equal(found.target, np.tile(np.arange(3), 5))

    nodes[0].input[1] = "wide"
    nodes.insert(0, helper.make_node("Expand", ["w", "shape"], ["wide"], "widen"))
    inputs |= {"shape": (INT64, (2,))}
    open_model = build(nodes, inputs, {"logits": (FLOAT, ("batch", "classes"))}, {"w": w[:, :1]})
    with pytest.raises(InputError, match="the number of classes is open in this model"):
        onnx_lrp.Explainer(open_model, "lrp_0", device="cpu")({"x": x, "shape": np.array([PIXELS, 2])}, target="all")


@pytest.mark.parametrize("images", [3, 9])
def test_a_scorer_compares_with_all_images(images: int) -> None:
    model, data = two_towers(), feeds(9, images)
    which = RNG.integers(0, images, 9)
    found = Scorer(model, which, output="similarity", batch_size=4, device="cpu")(data)
    assert worst(found, products(model, data).sum(-1)[np.arange(9), which]) < 1e-5


def test_one_side_alone_is_verified() -> None:
    checked = verify(two_towers(), feeds(), "lrp_0", reported=["tokens"])
    assert checked.ok
    assert [row.node for row in checked.layers] == ["compare", "sum"]
