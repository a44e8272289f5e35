"""Captions by search, and the measures and pictures of their explanations; models are small tables."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrp import InputError, evaluate, show
from onnx_lrp.captions import Captioner, CaptionExplainer, Vocabulary, joined

WORDS = ("<pad>", "a", "b", "c", "<start>", "<end>")
START, END = 4, 5
IMAGE = np.array([[[0.5, 2.0], [1.0, 3.0]]], np.float32)


def model(last: bool = False, head: str = "", length: int | str = "T", picture: str = "image") -> onnx.ModelProto:
    """Logits of the next word: a table's row of the word before, times the mean of the picture; a Markov chain."""
    rng = np.random.default_rng(3)
    table = rng.normal(0, 1.5, (len(WORDS), len(WORDS))).astype(np.float32)
    table[:, [0, START]] = -9
    nodes = [
        helper.make_node("Gather", ["table", "words"], ["rows"]),
        helper.make_node("ReduceMean", [picture, "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["scale"]),
        helper.make_node("Mul", ["rows", "scale"], ["scaled"]),
    ]
    if last:
        nodes.append(helper.make_node("Gather", ["scaled", "minus"], ["raw"], axis=1))
    else:
        nodes.append(helper.make_node("Identity", ["scaled"], ["raw"]))
    nodes.append(helper.make_node(head or "Identity", ["raw"], ["logits"]))
    arrays = {"table": table, "axes": np.array([1, 2, 3]), "shape": np.array([-1, 1, 1]), "minus": np.array(-1)}
    shape = ["N", len(WORDS)] if last else ["N", length, len(WORDS)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info(picture, TensorProto.FLOAT, ["N", 1, 2, 2]),
            helper.make_tensor_value_info("words", TensorProto.INT64, ["N", length]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def captioner(**options: Any) -> Captioner:
    return Captioner(model(**options), WORDS, device="cpu", threads=1)


def chances(image: np.ndarray) -> np.ndarray:
    """The chain's probabilities, (words, words)."""
    table = numpy_helper.to_array(model().graph.initializer[0]).astype(np.float64) * image.mean()
    powers = np.exp(table)
    return powers / powers.sum(1, keepdims=True)


# ---- search ----------------------------------------------------------------------------------------------------------

FORMS = [{}, {"last": True}, {"head": "Softmax"}, {"head": "LogSoftmax"}, {"length": 5}]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_probabilities_of_words(form: dict[str, Any]) -> None:
    """From logits, their logarithms or probabilities; at every place or the last; of free or fixed length."""
    found, caption = captioner(**form), np.array([START, 1, 3, 2])
    expected = chances(IMAGE)
    np.testing.assert_allclose(found.along(IMAGE, caption), expected[caption[:-1]], rtol=1e-5)
    texts = np.array([[START, 1], [START, 2]])
    np.testing.assert_allclose(found.next(IMAGE[None], texts), expected[[1, 2]], rtol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_greedy_captions_take_the_likeliest_word(form: dict[str, Any]) -> None:
    expected = [START]
    while expected[-1] != END and len(expected) < 6:
        expected.append(int(chances(IMAGE)[expected[-1]].argmax()))
    assert captioner(**form).describe(IMAGE, length=5).tolist() == expected


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.1])
def test_a_wide_beam_finds_the_likeliest_caption_of_all(scale: float) -> None:
    """Against all captions of up to four words; in pale pictures what greed takes is another one."""
    image = (IMAGE * scale).astype(np.float32)
    chance = chances(image)
    best = (-np.inf, [START])
    for length in range(4):
        for middle in itertools.product(range(5), repeat=length):
            caption = [START, *middle, END]
            score = sum(np.log(chance[a, b]) for a, b in itertools.pairwise(caption))
            best = max(best, (score, caption))
    assert captioner().describe(image, beams=200, length=4).tolist() == best[1]
    assert (captioner().describe(image, length=4).tolist() == best[1]) == (scale == 1)


def test_a_caption_that_does_not_end_stops_at_its_length() -> None:
    endless = model()
    table = numpy_helper.to_array(endless.graph.initializer[0]).copy()
    table[:, END] = -99
    endless.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    found = Captioner(endless, WORDS, device="cpu").describe(IMAGE, length=3)
    assert len(found) == 4
    assert END not in found


def test_words_and_numbers() -> None:
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.numbers("a c <end>").tolist() == [START, 1, 3, END]
    assert vocabulary.numbers(["<start>", "b"]).tolist() == vocabulary.numbers([2]).tolist() == [START, 2]
    assert vocabulary.text([START, 1, 3, END, 0]) == "a c"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary(("a", "b")), "lacks '<start>'"),
        (lambda: Vocabulary(WORDS).numbers("a x"), "lacks 'x'"),
        (lambda: Vocabulary(WORDS).numbers([17]), "word 17 is out of range"),
        (lambda: Vocabulary(WORDS).numbers(""), "holds no word"),
        (lambda: Captioner(model(), (*WORDS, "d")), "tells 6 words, the vocabulary has 7"),
        (lambda: Captioner(model(), WORDS, output="what"), "no output 'what'"),
        (lambda: CaptionExplainer(model(), WORDS, attention="where"), "no output 'where'"),
        (lambda: captioner(length=2).along(IMAGE, np.array([START, 1, 2, 3])), "takes 2 words, these are 3"),
        (lambda: captioner(length=2, last=True).describe(IMAGE), "tells the next one only"),
        (lambda: captioner().describe(IMAGE, beams=0), "beams is 1 or more"),
        (lambda: captioner().describe(np.full_like(IMAGE, np.nan)), "NaN"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_model_that_is_no_captioner() -> None:
    plain = model()
    del plain.graph.input[1]
    plain.graph.initializer.append(numpy_helper.from_array(np.array([[1]]), "words"))
    with pytest.raises(InputError, match="takes a picture as floats and words"):
        Captioner(plain, WORDS, device="cpu")


# ---- explanations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"last": True}], ids=str)
def test_every_word_is_explained(form: dict[str, Any]) -> None:
    """Of a chain, the word before gets all there is, and words that were not read get nothing."""
    explainer = CaptionExplainer(model(**form), WORDS, "input_x_gradient", device="cpu", threads=1)
    found = explainer(IMAGE, "a c b <end>")
    assert found.before == ("<start>", "a", "c", "b")
    assert found.words == ("a", "c", "b", "<end>")
    assert found.images.shape == (4, 1, 2, 2)
    table = numpy_helper.to_array(model().graph.initializer[0])
    expected = np.array([table[a, b] for a, b in itertools.pairwise([START, 1, 3, 2, END])]) * IMAGE.mean()
    np.testing.assert_allclose(found.score, expected, rtol=1e-5)
    np.testing.assert_allclose(found.texts, np.diag(expected), rtol=1e-5)
    np.testing.assert_allclose(found.images.sum((1, 2, 3)), expected, rtol=1e-5)
    np.testing.assert_allclose(found.modality(), 1, rtol=1e-5)


def test_without_a_caption_the_model_says_one() -> None:
    explainer = CaptionExplainer(model(), WORDS, "gradient", device="cpu", inputs=["image"])
    found = explainer(IMAGE)
    assert found.caption.tolist() == captioner().describe(IMAGE).tolist()
    assert found.texts is None
    with pytest.raises(InputError, match="was not reported"):
        found.modality()


def test_an_encoder_and_a_decoder_become_one_model() -> None:
    encoder = helper.make_model(
        helper.make_graph(
            [helper.make_node("Mul", ["photo", "two"], ["features"])],
            "encoder",
            [helper.make_tensor_value_info("photo", TensorProto.FLOAT, ["N", 1, 2, 2])],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 1, 2, 2])],
            [numpy_helper.from_array(np.float32(2), "two")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    for picture in ("features", "other"):
        found = Captioner(joined(encoder, model(picture=picture)), WORDS, device="cpu")
        assert (found.picture, found.words) == ("photo", "words")
        caption = np.array([START, 1, 3])
        np.testing.assert_allclose(found.along(IMAGE, caption), chances(2 * IMAGE)[caption[:-1]], rtol=1e-5)


# ---- measures --------------------------------------------------------------------------------------------------------


def test_correctness_by_hand() -> None:
    relevance = np.array([[[4.0, 1, 0, 0], [2, 0, 0, -9], [0, 0, 1, 2]]])
    boxes = [np.array([[0, 0, 1, 2], [2, 2, 4, 3]])]
    found = evaluate.box_correctness(relevance, boxes, [0, 0.25, 0.5, 0.9])
    # Left column of two: 6 of 10; above 0.25 of 4: 6 of 8; above a half: 4 of 4.
    np.testing.assert_allclose(found, [[0.6, 6 / 8, 1, 1]])
    second = evaluate.box_correctness(relevance, [boxes[0][1]], [0, 0.25])
    np.testing.assert_allclose(second, [[0.3, 2 / 8]])


def test_correctness_scores_every_box_on_the_same_map() -> None:
    """The best box is found wherever it stands in the list, and the relevance stays what it was."""
    relevance = np.random.default_rng(0).normal(size=(2, 3, 6, 6))
    before = relevance.copy()
    boxes = np.array([[0, 0, 3, 3], [3, 0, 6, 3], [0, 3, 3, 6]])
    single = np.max([evaluate.box_correctness(relevance, [b, b]) for b in boxes], 0)
    for order in itertools.permutations(range(3)):
        np.testing.assert_allclose(evaluate.box_correctness(relevance, [boxes[list(order)]] * 2), single)
    np.testing.assert_array_equal(relevance, before)


def test_correctness_clips_channel_by_channel() -> None:
    relevance = np.zeros((1, 2, 1, 2))
    relevance[0, :, 0, 0] = 5, -5
    np.testing.assert_allclose(evaluate.box_correctness(relevance, [[0, 0, 1, 1]], [0]), [[1]])
    np.testing.assert_allclose(evaluate.box_correctness(-np.abs(relevance), [[0, 0, 1, 1]], [0]), [[0]])


def words_of(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """A model to ask: word 1 is as likely as the first pixel says, word 2 as likely as there are 1s in the text."""
    found = np.zeros((len(texts), 3))
    found[:, 1] = images[:, 0, 0, 0]
    found[:, 2] = (texts == 1).mean(1)
    return found


def test_image_ablation_paints_the_most_relevant_patches() -> None:
    image = np.ones((1, 4, 4), np.float32)
    relevance = np.zeros((2, 1, 4, 4))
    relevance[0, 0, 1, 1], relevance[1, 0, 3, 3] = 1, 1
    caption = np.array([0, 1, 1])
    fallen = evaluate.image_ablation(words_of, image, caption, relevance, size=2, count=1, fill=0.25)
    np.testing.assert_allclose(fallen, [0.75, 0])
    painted = evaluate.without_patches(image, relevance, size=2, count=1, fill=0.25)
    assert painted.shape == (2, 1, 4, 4)
    assert (painted[0] == 0.25).sum() == (painted[1] == 0.25).sum() == 4
    everything = evaluate.image_ablation(words_of, image, caption, relevance, size=2, count=4, order="random")
    np.testing.assert_allclose(everything, [1, 1])
    with pytest.raises(InputError, match="5 patches of 4"):
        evaluate.without_patches(image, relevance, size=2, count=5)
    with pytest.raises(InputError, match="relevance is of 2 words, the caption has 1"):
        evaluate.image_ablation(words_of, image, caption[:2], relevance, size=2, count=1)


def test_word_ablation_leaves_the_most_relevant_words_out() -> None:
    caption = np.array([0, 1, 2, 1, 2])  # the last word is told by 0 1 2 1: half of them are 1s
    relevance = np.zeros((4, 4))
    relevance[3] = [9, 1, 0, 1]  # <start> stays, however relevant
    fallen = evaluate.word_ablation(words_of, np.zeros((1, 1, 1)), caption, relevance, count=2, first=3)
    assert np.isnan(fallen[:3]).all()
    assert fallen[3] == pytest.approx(0.5)  # 0 2 is left
    relevance[3] = [9, 0, 1, 0]
    fallen = evaluate.word_ablation(words_of, np.zeros((1, 1, 1)), caption, relevance, count=1, first=3)
    assert fallen[3] == pytest.approx(0.5 - 2 / 3)
    with pytest.raises(InputError, match="a row per word"):
        evaluate.word_ablation(words_of, np.zeros((1, 1, 1)), caption, relevance[:3])


def test_auc_counts_pairs() -> None:
    rng = np.random.default_rng(1)
    values, truth = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[truth] for b in values[~truth]]
    assert evaluate.auc(values, truth) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert evaluate.auc([0.1, 0.9], [False, True]) == 1
    with pytest.raises(InputError, match="one kind"):
        evaluate.auc(values, np.ones(60))


def test_statistics_of_maps() -> None:
    maps = np.random.default_rng(2).normal(size=(5, 3, 4, 4))
    found = evaluate.map_statistics(maps)
    flat = maps.mean(1).reshape(5, -1)
    np.testing.assert_allclose(found["mean positive"], [row[row > 0].sum() / 16 for row in flat])
    np.testing.assert_allclose(found["mean magnitude"], np.abs(flat).mean(1))
    np.testing.assert_allclose(found["quantile 0.5"], np.median(flat, 1))
    np.testing.assert_allclose(found["max"], flat.max(1))
    assert set(evaluate.aucs(found, [True, True, False, False, True])) == set(found)


@pytest.mark.parametrize(
    ("relevance", "boxes", "message"),
    [
        (np.ones((1, 4, 4)), [[0, 0, 5, 2]], "not inside of a picture 4 wide and 4 high"),
        (np.ones((2, 4, 4)), [[0, 0, 1, 1]], "1 sets of boxes for 2 maps"),
        (np.ones((1, 4, 4)), [np.zeros((0, 4))], "sample 0 has no box"),
        (np.ones((4, 4)), [], "maps are finite"),
        (np.full((1, 4, 4), np.nan), [[0, 0, 1, 1]], "maps are finite"),
    ],
)
def test_bad_boxes(relevance: np.ndarray, boxes: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate.box_correctness(relevance, boxes)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_figure_has_a_map_per_word_and_method() -> None:
    explainers = [
        CaptionExplainer(model(), WORDS, "epsilon", device="cpu", ledger=True),
        CaptionExplainer(model(), WORDS, "gradient", device="cpu", inputs=["image"]),
    ]
    found = [explainer(IMAGE, "a c") for explainer in explainers]
    small, both = show.caption_figure(found[1:]), show.caption_figure(found)
    assert both.height > small.height + 100  # another row, and the matrix
    longer = show.caption_figure([explainers[1](IMAGE, "a c b")])
    assert longer.width - small.width == 128
    assert longer.height == small.height
    with pytest.raises(InputError, match="of one caption"):
        show.caption_figure([found[0], explainers[1](IMAGE, "a b")])


def test_a_matrix_is_coloured_row_by_row_and_empty_above_the_diagonal() -> None:
    sheet = np.asarray(show.word_matrix([[5, 7], [-1, 0.5]], ["<start>", "a"], ["a", "b"]))
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 100)
    blue = (sheet[..., 2] > 200) & (sheet[..., 0] < 100)
    assert red.sum() > 500  # 5 is the first row's largest that was read
    assert blue.sum() > 500  # -1 is the second row's
    above = np.asarray(show.word_matrix([[5, 0], [-1, 0.5]], ["<start>", "a"], ["a", "b"]))
    np.testing.assert_array_equal(sheet, above)  # what was not read is neither drawn nor a measure of the rest
    with pytest.raises(InputError, match="a matrix of 1 words by 2"):
        show.word_matrix([[1]], ["a", "b"], ["c"])


def test_maps_that_do_not_go_with_the_words() -> None:
    with pytest.raises(InputError, match="1 maps for 2 words"):
        show.caption_grid(np.zeros((4, 4, 3), np.uint8), ["a", "b"], {"x": np.zeros((1, 4, 4))})
