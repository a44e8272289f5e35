"""Explainer and Explanation: batches, chunks, fixed batches, targets, several inputs, files."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import onnx_lrp
from onnx_lrp import Explainer, InputError, ModelError
from tests.small_models import FLOAT, build, conv, normal, pixels, tokens, two_inputs

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def explainer(model=None, method="epsilon", **options):
    return Explainer(model or conv(), method, device="cpu", threads=1, **options)


def same(one, other):
    for mine, theirs in ((one.relevance, other.relevance), (one.outputs, other.outputs)):
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            np.testing.assert_allclose(array, theirs[name], **CLOSE)
    np.testing.assert_array_equal(one.target, other.target)
    np.testing.assert_allclose(one.score, other.score, **CLOSE)


def test_a_batch_is_its_samples():
    explain, x = explainer(ledger=True), normal(7, 3, 8, 8)
    whole = explain(x)
    assert len(whole) == 7
    assert whole.relevance["x"].shape == x.shape
    assert whole.target.dtype == np.int64
    np.testing.assert_allclose(whole.total() + whole.absorbed, whole.score, **CLOSE)
    for i in range(7):
        same(explain(x[i : i + 1]), whole[i])
    same(whole[-1], whole[6])
    same(whole[2:4], explain(x[2:4]))
    with pytest.raises(IndexError):
        whole[7]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunks_are_one_run(size):
    x = normal(7, 3, 8, 8)
    same(explainer(batch_size=size)(x), explainer(batch_size=7)(x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_fixed_batch_takes_any_number(batch, count):
    x, classes = normal(count, 3, 8, 8), np.arange(count) % 5
    fixed = explainer(conv(batch))
    assert fixed.fixed
    same(fixed(x), explainer()(x))
    same(fixed(x, target=classes), explainer()(x, target=classes))


def test_targets():
    explain, x = explainer(batch_size=2), normal(3, 3, 8, 8)
    best = explain(x)
    np.testing.assert_array_equal(best.target, best.outputs["logits"].argmax(1))
    np.testing.assert_array_equal(explain(x, target=2).target, [2, 2, 2])
    each = explain(x, target=[4, -1, 0])
    np.testing.assert_array_equal(each.target, [4, best.target[1], 0])
    np.testing.assert_allclose(each.score, each.outputs["logits"][range(3), each.target], **CLOSE)
    same(explain(x, target=np.array([1], np.int32)), explain(x, target=1))
    for wrong, words in (
        (5, "0 to 4"),
        (-2, "out of range"),
        ([1, 2], "one per sample"),
        (1.5, "float64"),
        (True, "bool"),
        ([[1], [2, 3]], "ragged"),
        ([], "class index"),
    ):
        with pytest.raises(InputError, match=words):
            explain(x, target=wrong)
    with pytest.raises(InputError, match="fixed target"):
        explainer(target="argmax")(x, target=1)


@pytest.mark.parametrize("batch", [1, "N"])
def test_targets_of_outputs_with_places(batch):
    explain, x = explainer(pixels(batch)), normal(2, 3, 8, 8)
    assert explain(x).target.shape == (2, 2)
    np.testing.assert_array_equal(explain(x, target=(5, 1)).target, [[5, 1], [5, 1]])
    np.testing.assert_array_equal(explain(x, target=[(5, 1), (30, 0)]).target, [[5, 1], [30, 0]])
    assert (explain(x, target=1).target[:, 1] == 1).all()
    with pytest.raises(InputError, match="out of range"):
        explain(x, target=(36, 0))


@pytest.mark.parametrize("batch", [1, 2, "N"])
def test_several_inputs(batch):
    feeds = {"image": normal(5, 3, 4, 4), "table": normal(5, 2, seed=1)}
    explain = explainer(two_inputs(batch), batch_size=2)
    result = explain(feeds)
    assert result.relevance["image"].shape == (5, 3, 4, 4)
    assert result.relevance["table"].shape == (5, 2)
    assert result.outputs["state"].shape == (8, 5), "the batch is the second axis here"
    np.testing.assert_allclose(result.outputs["state"][6:].T, feeds["table"], **CLOSE)
    np.testing.assert_allclose(result.total(), result.score, rtol=1e-3)
    same(explainer(two_inputs(), batch_size=5)(feeds), result)
    assert explain({"table": feeds["table"], "image": feeds["image"]}).relevance.keys() == {"image", "table"}
    with pytest.raises(InputError, match="dict with image, table"):
        explain(feeds["image"])
    with pytest.raises(InputError, match="'table' is missing"):
        explain({"image": feeds["image"]})
    with pytest.raises(InputError, match="different numbers of samples"):
        explain({"image": feeds["image"], "table": feeds["table"][:3]})


def test_an_input_that_is_no_batch_is_fed_whole():
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"], "scale"),
        helper.make_node("Gemm", ["s", "v"], ["logits"], "dense"),
    ]
    inputs = {"x": (FLOAT, (1, 4)), "scale": (FLOAT, (4,))}
    model = build(nodes, inputs, {"logits": (FLOAT, (1, 3))}, {"v": normal(4, 3)})
    x, scale = normal(4, 4), np.array([1, 2, 3, 4], np.float32)
    result = explainer(model, inputs=["x"])({"x": x, "scale": scale})
    np.testing.assert_allclose(result.outputs["logits"], (x * scale) @ normal(4, 3), **CLOSE)


def test_scalars_are_inputs():
    nodes = [helper.make_node("Mul", ["x", "s"], ["m"], "scale"), helper.make_node("Gemm", ["m", "v"], ["y"], "dense")]
    inputs = {"x": (FLOAT, ("N", 4)), "s": (FLOAT, ())}
    explain = explainer(build(nodes, inputs, {"y": (FLOAT, ("N", 3))}, {"v": normal(4, 3)}), inputs=["x"], batch_size=2)
    result = explain({"x": normal(5, 4), "s": 2.0})
    np.testing.assert_allclose(result.outputs["y"], normal(5, 4) * 2 @ normal(4, 3), **CLOSE)


def test_other_types_are_cast_where_nothing_is_lost():
    explain, x = explainer(), normal(2, 3, 8, 8)
    same(explain(x.astype(np.float64)), explain(x))
    same(explain(x.tolist()), explain(x))
    same(explain(np.asfortranarray(x)), explain(x))
    whole = (x * 10).astype(np.int32)
    same(explain(whole), explain(whole.astype(np.float32)))
    half = explainer(conv(half=True))(x)
    assert half.outputs["logits"].dtype == np.float16
    assert half.relevance["x"].dtype == np.float32
    np.testing.assert_allclose(half.relevance["x"], explain(x).relevance["x"], atol=2e-2)


def test_tokens():
    explain = explainer(tokens(), ledger=True)
    result = explain([[1, 2, 3], [9, 0, 9]])
    assert result.relevance["ids"].shape == (2, 3)
    np.testing.assert_allclose(result.total() + result.absorbed, result.score, **CLOSE)
    same(explain(np.array([[1.0, 2.0, 3.0]])), result[0])
    with pytest.raises(InputError, match="fractions"):
        explain([[1.5, 2.0]])
    with pytest.raises(ModelError, match="ONNX Runtime fails"):
        explain([[1, 99]])


def test_arrays_that_do_not_fit_are_named():
    explain, x = explainer(), normal(2, 3, 8, 8)
    bad = x.copy()
    bad[1, 0, 3, 3] = np.nan
    cases = [
        (x[0], r"add a batch axis: x\[None\]"),
        (x[:, :2], r"wants shape \(N, 3, 8, 8\), got \(2, 2, 8, 8\)"),
        (x[:0], "holds nothing"),
        (bad, "NaN"),
        (np.full_like(x, np.inf), "infinite"),
        (x.astype(np.complex64), "complex64"),
        (np.full(x.shape, "a"), "numeric array"),
        ([[1], [2, 3]], "got no array"),
        ({"y": x}, "no input 'y'; inputs are x"),
        ({"x": x, "target": [1, 1]}, "give classes as target="),
        ({}, "'x' is missing"),
        (None, "numeric array"),
    ]
    for inputs, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            explain(inputs)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="too large"):
        explainer(conv(half=True))(x * 1e6)
    with pytest.raises(InputError, match="batch_size"):
        explainer(batch_size=0)
    with pytest.raises(InputError, match="device is auto, cpu or cuda"):
        Explainer(conv(), device="tpu")


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    explain, x = explainer(), normal(2, 3, 8, 8)
    same(explain(torch.tensor(x)), explain(x))
    with pytest.raises(InputError, match="detach"):
        explain(torch.tensor(x, requires_grad=True))


def test_saving(tmp_path):
    result = explainer(ledger=True)(normal(2, 3, 8, 8))
    path = result.save(tmp_path / "r.npz")
    with np.load(path) as file:
        assert set(file) == {"relevance/x", "output/logits", "target", "score", "absorbed"}
        np.testing.assert_array_equal(file["relevance/x"], result.relevance["x"])
    image = pytest.importorskip("PIL.Image")
    for part in (result, result[0]):
        with image.open(part.save(tmp_path / "r.png", labels=list("abcde"), heading="two")) as picture:
            assert min(picture.size) > 200
    given = np.zeros((16, 16, 3), np.uint8)
    result[0].save(tmp_path / "given.png", pictures=[given], colormap="bwr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given.png", "r.npz", "r.png"], "no temporary files"
    for name, words in (("r.txt", "saved as"), ("missing/r.npz", "cannot be written"), ("missing/r.png", "cannot be")):
        with pytest.raises(InputError, match=words):
            result.save(tmp_path / name)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (conv(), normal(1, 3, 8, 8)),
        (conv(last=True), normal(3, 8, 8, 3)),
        (conv(channels=1), normal(2, 1, 8, 8)),
        (two_inputs(), {"image": normal(2, 3, 4, 4), "table": normal(2, 2)}),
        (tokens(), [[1, 2, 3]]),
        (pixels(), normal(1, 3, 8, 8)),
    ],
)
def test_everything_can_be_drawn(model, inputs, tmp_path):
    pytest.importorskip("PIL.Image")
    explainer(model)(inputs).save(tmp_path / "figure.png")
    layers = explainer(model, layers=[model.graph.node[0].output[0]])(inputs)
    layers.save(tmp_path / "layers.png")


def test_figures_choose_by_shape():
    pytest.importorskip("PIL.Image")
    from onnx_lrp.explanation import Explanation
    from onnx_lrp.show import figure

    def explanation(*shape, tokens=False):
        values = normal(*shape)
        inputs = {"x": values.astype(np.int64) if tokens else values}
        outputs, count = {"y": normal(shape[0], 3)}, shape[0]
        return Explanation(outputs, {"x": values}, np.zeros(count, np.int64), np.ones(count), None, inputs, "epsilon")

    kinds = {
        (1, 3, 8, 8): "image",
        (1, 8, 8, 3): "image",
        (1, 1, 8, 8): "image",
        (1, 28, 1): "series",
        (1, 1, 28): "series",
        (1, 128): "series",
        (1, 64): "features",
        (1, 40, 50): "map",
        (1, 5, 8, 8): "map",
        (1, 2, 3, 8, 8): "map",
        (1,): "features",
    }
    for shape, kind in kinds.items():
        case = explanation(*shape)
        assert figure._kind("x", case.relevance["x"], case.inputs) == kind
        figure.explanation_figure(case)
    figure.explanation_figure(explanation(2, 7, tokens=True))
    many = figure.explanation_figure(explanation(100, 3, 4, 4))
    assert many.height < 64 * 300
    with pytest.raises(InputError, match="no sample"):
        figure.explanation_figure(explanation(1, 3)[1:])
    with pytest.raises(InputError, match="too many"):
        figure.comparison_figure([[explanation(1, 3, 4, 4)]] * 65, ["a"])


def test_class_names():
    from onnx_lrp.show.figure import class_name

    result = explainer()(normal(1, 3, 8, 8), target=3)
    assert class_name(result, 0) == "class 3"
    assert class_name(result, 0, ["a", "b", "c", "d", "e"]) == "d"
    assert class_name(result, 0, ["a"]) == "class 3"
    assert class_name(explainer(pixels())(normal(1, 3, 8, 8), target=(7, 1)), 0, ["no", "yes"]) == "yes at 7"
    assert class_name(explainer(conv(classes=1))(normal(1, 3, 8, 8)), 0) == "output"


def test_options_of_rewriting_are_passed_on():
    x = normal(2, 3, 8, 8)
    result = explainer(layers=["r"], start="softmax", ledger=True)(x)
    assert result.relevance["r"].shape == (2, 6, 8, 8)
    np.testing.assert_allclose(result.score, 1, **CLOSE)
    assert explainer().providers == ["CPUExecutionProvider"]
    assert Explainer(conv(), providers=["CPUExecutionProvider"]).providers == ["CPUExecutionProvider"]
    assert onnx_lrp.Explainer(conv(), "epsilon")(x).absorbed is None


def test_a_model_that_gives_nan_itself_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A sample of zeros divided by its own length, as in a file whose + 1e-8 the exporter took away."""
    nodes = [helper.make_node("ReduceL2", ["x", "axes"], ["length"]), helper.make_node("Div", ["x", "length"], ["y"])]
    axes = {"axes": np.array([1])}
    model = build(nodes, {"x": (FLOAT, ["N", 3])}, {"y": (FLOAT, ["N", 3])}, axes)
    explainer = onnx_lrp.Explainer(model, "epsilon", device="cpu")
    assert np.isfinite(explainer(np.ones((2, 3), np.float32)).score).all()
    assert not caplog.records
    explainer(np.array([[1, 2, 3], [0, 0, 0]], np.float32))
    (record,) = caplog.records
    assert "'y' is NaN for 1 of 2 samples (the first is sample 1)" in record.getMessage()
