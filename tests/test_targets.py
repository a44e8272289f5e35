"""What is explained: classes, positions, starts, heads, inner tensors, inputs and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_lrp import rewrite
from onnx_lrp.errors import InputError
from tests.layers import Net, quarters
from tests.support import run_double

RNG = np.random.default_rng(5)
X = RNG.standard_normal((3, 4)).astype(np.float32)
WEIGHT = RNG.standard_normal((4, 5)).astype(np.float32)
LOGITS = X.astype(np.float64) @ WEIGHT.astype(np.float64)
BEST = LOGITS.argmax(1)


def classifier(*, head: str = "") -> onnx.ModelProto:
    """A linear classifier of four features and five classes."""
    net = Net()
    z = net("MatMul", net.input("x", "N", 4), net.const(WEIGHT), name="layer", out="logits")
    return net.model(net(head, z, out="y") if head else z)


def run(model: onnx.ModelProto, feeds: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """Explain by LRP-0, so that a linear layer gives x * W c; return all outputs in float64."""
    return run_double(rewrite(model, "lrp_0", **options).model, feeds)


def linear(start: np.ndarray) -> np.ndarray:
    """Relevance of x when the logits have this relevance."""
    return X * ((start / LOGITS) @ WEIGHT.astype(np.float64).T)


def one_hot(classes: Any) -> np.ndarray:
    return np.eye(5)[np.broadcast_to(classes, 3)]


# ---- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "used"),
    [(None, BEST), ([-1], BEST), ([2], [2, 2, 2]), ([0, 4, 1], [0, 4, 1]), ([3, -1, -7], [3, BEST[1], BEST[2]])],
    ids=str,
)
def test_class_from_the_graph_input(target: list[int] | None, used: Any) -> None:
    """Arg max by default, one class for all, one per sample; a negative one stands for the arg max."""
    feeds = {"x": X} if target is None else {"x": X, "target": np.array(target)}
    found = run(classifier(), feeds)
    hot = one_hot(used)
    np.testing.assert_array_equal(found["target_used"], used)
    np.testing.assert_allclose(found["score"], (hot * LOGITS).sum(1))
    np.testing.assert_allclose(found["relevance/x"], linear(hot * LOGITS))


@pytest.mark.parametrize("start", ["logit", "one", "contrast"])
def test_class_out_of_range_has_no_relevance(start: str) -> None:
    """No relevance rather than that of another class."""
    found = run(classifier(), {"x": X, "target": np.array([5, 1, 99])}, start=start)
    np.testing.assert_array_equal(found["target_used"], [5, 1, 99])
    assert not found["relevance/x"][[0, 2]].any()
    assert found["relevance/x"][1].any()
    np.testing.assert_array_equal(found["score"][[0, 2]], 0)


@pytest.mark.parametrize(
    ("target", "used"),
    [("argmax", BEST), (3, [3, 3, 3]), (np.int64(3), [3, 3, 3]), ([3], [3, 3, 3]), (-1, BEST)],
    ids=str,
)
def test_class_fixed_when_rewriting(target: Any, used: Any) -> None:
    """Then there is no graph input to feed."""
    explained = rewrite(classifier(), "lrp_0", target=target).model
    assert [i.name for i in explained.graph.input] == ["x"]
    found = run_double(explained, {"x": X})
    np.testing.assert_array_equal(found["target_used"], used)
    np.testing.assert_allclose(found["relevance/x"], linear(one_hot(used) * LOGITS))


@pytest.mark.parametrize("target", ["best", 1.5, None, True, [1, 2], [], ["1"], {1: 2}])
def test_class_that_makes_no_sense(target: Any) -> None:
    with pytest.raises(InputError, match="target is 'input', 'argmax' or an int, not"):
        rewrite(classifier(), "lrp_0", target=target)


@pytest.mark.parametrize("target", [5, [12], -2])
def test_class_that_the_output_does_not_have(target: Any) -> None:
    with pytest.raises(InputError, match="out of range"):
        rewrite(classifier(), "lrp_0", target=target)


# ---- starts ----------------------------------------------------------------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_start_logit_one_contrast_softmax_input() -> None:
    """What the relevance of the explained tensor begins with."""
    hot = one_hot([1, 0, 2])
    given = RNG.standard_normal((3, 5)).astype(np.float32)
    starts = {
        "logit": hot * LOGITS,
        "one": hot,
        "contrast": (hot - (1 - hot) / 4) * LOGITS,
        "softmax": softmax(LOGITS),
        "input": given,
    }
    for start, expected in starts.items():
        feeds: dict[str, Any] = {"x": X, "target": np.array([1, 0, 2])}
        if start == "input":
            feeds["start"] = given
        found = run(classifier(), feeds, start=start, layers=["logits"])
        np.testing.assert_allclose(found["relevance/logits"], expected, rtol=1e-6)
        np.testing.assert_allclose(found["relevance/x"], linear(expected), rtol=1e-6)
        score = (hot * LOGITS).sum(1) if start == "one" else expected.sum(1)
        np.testing.assert_allclose(found["score"], score, rtol=1e-6)


def test_start_by_default_is_the_logit_for_relevance_and_one_for_gradients() -> None:
    found = run_double(rewrite(classifier(), "gradient").model, {"x": X})
    np.testing.assert_allclose(found["relevance/x"], WEIGHT.T[BEST])
    found = run_double(rewrite(classifier(), "input_x_gradient").model, {"x": X})
    np.testing.assert_allclose(found["relevance/x"], X * WEIGHT.T[BEST])
    np.testing.assert_allclose(found["relevance/x"].sum(1), found["score"], rtol=1e-6)


def test_start_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="start is one of logit, one, softmax, contrast, input, not 'half'"):
        rewrite(classifier(), "lrp_0", start="half")  # type: ignore[arg-type]
    net = Net()
    model = net.model(net("MatMul", net.input("x", "N", 3, 4), net.const(WEIGHT)))
    with pytest.raises(InputError, match="contrast' needs an output with one class axis"):
        rewrite(model, "lrp_0", start="contrast")


def test_start_contrast_with_an_open_number_of_classes() -> None:
    net = Net()
    model = net.model(net("MatMul", net.input("x", "N", 4), net.input("w", 4, "C"), name="layer", out="logits"))
    explained = rewrite(model, "lrp_0", start="contrast", inputs=["x"]).model
    found = run_double(explained, {"x": X, "w": WEIGHT, "target": np.array([2])})
    hot = one_hot(2)
    np.testing.assert_allclose(found["score"], ((hot - (1 - hot) / 4) * LOGITS).sum(1))


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Softmax", "LogSoftmax", "Sigmoid"])
@pytest.mark.parametrize(
    "path", ["", "Reshape", "Unsqueeze Squeeze", "Transpose", "Flatten", "Identity Cast", "Unsqueeze ReduceMean"]
)
def test_head_is_stepped_over(head: str, path: str) -> None:
    """By data flow, through whatever only rearranges elements; the outputs stay as they are."""
    net = Net()
    y = net(head, net("MatMul", net.input("x", "N", 4), net.const(WEIGHT), out="logits"))
    for op in path.split():
        if op == "Transpose":
            y = net("Transpose", net("Unsqueeze", y, net.const([0], np.int64)), perm=[1, 0, 2])
        elif op == "Reshape":
            y = net("Reshape", y, net.const([-1, 1, 5], np.int64))
        elif op == "Cast":
            y = net("Cast", y, to=TensorProto.FLOAT)
        elif op.endswith("queeze"):
            y = net(op, y, net.const([1], np.int64))
        elif op == "ReduceMean":
            y = net(op, y, net.const([1], np.int64), keepdims=0)
        else:
            y = net(op, y)
    model = net.model(y)
    explained = rewrite(model, "lrp_0")
    assert (explained.explained, explained.head, explained.classes) == ("logits", head, (5,))
    found = run_double(explained.model, {"x": X})
    np.testing.assert_allclose(found["relevance/x"], linear(one_hot(BEST) * LOGITS))
    np.testing.assert_array_equal(found[y], run_double(model, {"x": X})[y])


def test_head_is_explained_when_it_is_named() -> None:
    explained = rewrite(classifier(head="Sigmoid"), "lrp_0", output="y")
    assert (explained.explained, explained.head) == ("y", "")
    found = run_double(explained.model, {"x": X})
    np.testing.assert_allclose(found["score"], 1 / (1 + np.exp(-LOGITS.max(1))))


def test_a_softmax_in_the_middle_is_no_head() -> None:
    net = Net()
    z = net("MatMul", net("Softmax", net("MatMul", net.input("x", "N", 4), net.const(WEIGHT))), net.weight(5, 2))
    assert rewrite(net.model(z), "lrp_0").explained == z


# ---- outputs with several axes ---------------------------------------------------------------------------------------

TOKENS = RNG.standard_normal((2, 3, 4)).astype(np.float32)
SCORES = TOKENS.astype(np.float64) @ WEIGHT.astype(np.float64)  # (2, 3, 5)


def tagger() -> onnx.ModelProto:
    """A class per token."""
    net = Net()
    return net.model(net("MatMul", net.input("x", "N", 3, 4), net.const(WEIGHT), out="logits"))


def at(places: list[tuple[int, ...]]) -> np.ndarray:
    """Relevance of the tokens when these places of the output are explained."""
    expected = np.zeros(TOKENS.shape)
    for n, (t, c) in enumerate(places):
        expected[n, t] = TOKENS[n, t] * WEIGHT[:, c]
    return expected


def best(n: int, t: int = -1, c: int = -1) -> tuple[int, int]:
    """The best place of a sample among those that match."""
    allowed = np.full((3, 5), -np.inf)
    allowed[t if t >= 0 else slice(None), c if c >= 0 else slice(None)] = 0
    place = np.unravel_index((SCORES[n] + allowed).argmax(), (3, 5))
    return int(place[0]), int(place[1])


@pytest.mark.parametrize(
    ("target", "places"),
    [
        (None, [best(0), best(1)]),
        ([[1, 2]], [(1, 2), (1, 2)]),
        ([[0, 4], [2, 1]], [(0, 4), (2, 1)]),
        ([[-1, 3]], [best(0, c=3), best(1, c=3)]),
        ([[2, -1], [-1, 0]], [best(0, t=2), best(1, c=0)]),
    ],
    ids=str,
)
def test_places_of_an_output_of_rank_three(target: Any, places: list[tuple[int, ...]]) -> None:
    """A tuple per sample; -1 takes the best along its axis."""
    feeds = {"x": TOKENS} if target is None else {"x": TOKENS, "target": np.array(target)}
    found = run(tagger(), feeds)
    np.testing.assert_array_equal(found["target_used"], places)
    np.testing.assert_allclose(found["relevance/x"], at(places))
    np.testing.assert_allclose(found["score"], [SCORES[n, t, c] for n, (t, c) in enumerate(places)])


@pytest.mark.parametrize(
    ("target", "places"),
    [
        (3, [best(0, c=3), best(1, c=3)]),
        ([1, 2], [(1, 2)] * 2),
        ((2, -1), [best(0, t=2), best(1, t=2)]),
        ("argmax", [best(0), best(1)]),
    ],
    ids=str,
)
def test_places_fixed_when_rewriting(target: Any, places: list[tuple[int, ...]]) -> None:
    """A single int is the class on the last axis, where it scores best."""
    found = run(tagger(), {"x": TOKENS}, target=target)
    np.testing.assert_array_equal(found["target_used"], places)
    np.testing.assert_allclose(found["relevance/x"], at(places))


def test_places_out_of_range() -> None:
    found = run(tagger(), {"x": TOKENS, "target": np.array([[3, 0], [1, 2]])})
    np.testing.assert_array_equal(found["target_used"], [[3, 0], [1, 2]])
    assert not found["relevance/x"][0].any()
    np.testing.assert_allclose(found["relevance/x"][1], at([(0, 0), (1, 2)])[1])
    with pytest.raises(InputError, match="an int, or 2 ints for this output"):
        rewrite(tagger(), "lrp_0", target=[1, 2, 3])
    with pytest.raises(InputError, match="out of range"):
        rewrite(tagger(), "lrp_0", target=[3, 0])


def test_places_of_a_picture() -> None:
    """Rank four with an open size: class, row and column."""
    net = Net()
    w = RNG.standard_normal((5, 2, 1, 1)).astype(np.float32)
    model = net.model(net("Conv", net.input("x", "N", 2, "H", "W"), net.const(w)))
    x = RNG.standard_normal((2, 2, 3, 4)).astype(np.float32)
    target = np.array([[4, 2, 0], [-1, 1, 3]])
    found = run(model, {"x": x, "target": target})
    c = int((w[:, :, 0, 0] @ x[1, :, 1, 3]).argmax())
    np.testing.assert_array_equal(found["target_used"], [[4, 2, 0], [c, 1, 3]])
    expected = np.zeros(x.shape)
    expected[0, :, 2, 0] = x[0, :, 2, 0] * w[4, :, 0, 0]
    expected[1, :, 1, 3] = x[1, :, 1, 3] * w[c, :, 0, 0]
    np.testing.assert_allclose(found["relevance/x"], expected, atol=1e-12)


def test_axes_of_length_one_are_no_class_axes() -> None:
    net = Net()
    z = net("MatMul", net.input("x", "N", 4), net.const(WEIGHT))
    explained = rewrite(net.model(net("Reshape", z, net.const([0, 1, 5, 1], np.int64))), "lrp_0")
    assert explained.classes == (5,)
    found = run_double(explained.model, {"x": X, "target": np.array([1, 2, 3])})
    np.testing.assert_allclose(found["relevance/x"], linear(one_hot([1, 2, 3]) * LOGITS))


@pytest.mark.parametrize("shape", [(0, 1), (0,), (0, 1, 1)])
def test_regression(shape: tuple[int, ...]) -> None:
    """An output of one number per sample, with axes of length 1 or without."""
    net = Net()
    z = net("MatMul", net.input("x", "N", 4), net.const(WEIGHT[:, :1]))
    if shape != (0, 1):
        z = net("Reshape", z, net.const([-1] if shape == (0,) else shape, np.int64))
    explained = rewrite(net.model(z), "lrp_0")
    assert explained.classes == (1,)
    found = run_double(explained.model, {"x": X})
    np.testing.assert_array_equal(found["target_used"], [0, 0, 0])
    np.testing.assert_allclose(found["score"], LOGITS[:, 0])
    np.testing.assert_allclose(found["relevance/x"], X * WEIGHT[:, 0])


# ---- inner tensors and inputs ----------------------------------------------------------------------------------------


def deep() -> onnx.ModelProto:
    """Three layers without biases: relevance is the same in every layer."""
    net = Net(seed=2)
    x = net.input("x", "N", 4)
    a = net("Relu", net("MatMul", x, net.weight(4, 6), out="a"), out="b")
    c = net("Relu", net("MatMul", a, net.weight(6, 6), out="c"), out="d")
    return net.model(net("MatMul", c, net.weight(6, 3), out="y"))


def test_layers_hold_the_whole_score() -> None:
    names = ["a", "b", "c", "d", "y"]
    explained = rewrite(deep(), "zplus", layers=names)
    assert explained.relevance == {n: f"relevance/{n}" for n in ["x", *names]}
    found = run_double(explained.model, {"x": X})
    for name in ["x", *names]:
        assert found[f"relevance/{name}"].shape == ((3, 4) if name == "x" else found[f"relevance/{name}"].shape)
        np.testing.assert_allclose(found[f"relevance/{name}"].sum(1), found["score"], rtol=1e-4)


def test_output_names_an_inner_tensor() -> None:
    explained = rewrite(deep(), "lrp_0", output="c", target=4)
    assert explained.explained == "c"
    found = run_double(explained.model, {"x": X})
    np.testing.assert_array_equal(found["target_used"], [4] * 3)
    np.testing.assert_allclose(found["relevance/x"].sum(1), found["score"], rtol=1e-9, atol=1e-12)


def test_layers_behind_the_explained_tensor_have_no_relevance() -> None:
    found = run(deep(), {"x": X}, output="a", layers=["d"])
    assert found["relevance/d"].shape == (3, 6)
    assert not found["relevance/d"].any()
    assert found["relevance/x"].any()


def test_tensors_that_cannot_be_explained() -> None:
    with pytest.raises(InputError, match="no tensor named 'z'"):
        rewrite(deep(), "lrp_0", output="z")
    with pytest.raises(InputError, match="no tensor named 'z'"):
        rewrite(deep(), "lrp_0", layers=["z"])
    with pytest.raises(InputError, match="no tensor named 'z'"):
        rewrite(deep(), "lrp_0", inputs=["z"])
    net = Net()
    label = net("ArgMax", net("MatMul", net.input("x", "N", 4), net.weight(4, 3)), axis=1, out="label")
    with pytest.raises(InputError, match=r"the first output 'label' is int64, .* name a float tensor with output="):
        rewrite(net.model(label, dtype=TensorProto.INT64), "lrp_0")
    with pytest.raises(InputError, match="output 'label' is int64"):
        rewrite(net.model(label, dtype=TensorProto.INT64), "lrp_0", output="label")


def test_an_output_that_no_input_reaches() -> None:
    """Influence that stops at a barrier would give zeros, which look like an answer."""
    net = Net()
    model = net.model(net("Floor", net.input("x", "N", 4), out="y"))
    with pytest.raises(InputError, match="'y' does not depend on x"):
        rewrite(model, "lrp_0")


def two_inputs() -> onnx.ModelProto:
    """A sum of two branches."""
    net = Net(seed=4)
    a = net("MatMul", net.input("a", "N", 4), net.weight(4, 3), out="left")
    b = net("MatMul", net.input("b", "N", 2), net.weight(2, 3), out="right")
    return net.model(net("Add", a, b, out="y"))


def test_two_float_inputs() -> None:
    feeds = {"a": quarters(RNG, (3, 4)), "b": quarters(RNG, (3, 2))}
    both = run(two_inputs(), feeds)
    total = both["relevance/a"].sum(1) + both["relevance/b"].sum(1)
    np.testing.assert_allclose(total, both["score"], atol=1e-9)
    one = run(two_inputs(), feeds, inputs=["b"])
    assert "relevance/a" not in one
    np.testing.assert_allclose(one["relevance/b"], both["relevance/b"], atol=1e-12)
    inner = run(two_inputs(), feeds, inputs=["left", "b"])
    np.testing.assert_allclose(inner["relevance/left"].sum(1), both["relevance/a"].sum(1), atol=1e-9)


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.INT32])
def test_tokens(dtype: int) -> None:
    """An integer input that picks embeddings: relevance per token, that of an embedding summed over its axis."""
    net = Net(seed=6)
    table = net.weight(7, 4)
    embedded = net("Gather", table, net.input("ids", "N", "T", dtype=dtype), out="embedded")
    mean = net("ReduceMean", embedded, net.const([1], np.int64), keepdims=0)
    model = net.model(net("Gemm", mean, net.weight(4, 3), net.weight(3), out="y"))
    ids = np.array([[1, 0, 6, 6], [2, 3, 4, 5]], np.int32 if dtype == TensorProto.INT32 else np.int64)
    explained = rewrite(model, "epsilon", layers=["embedded"], ledger=True)
    shapes = {
        o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in explained.model.graph.output
    }
    assert shapes["relevance/ids"] == ["N", "T"]
    found = run_double(explained.model, {"ids": ids})
    assert found["relevance/ids"].shape == (2, 4)
    np.testing.assert_allclose(found["relevance/ids"], found["relevance/embedded"].sum(2))
    np.testing.assert_allclose(found["relevance/ids"].sum(1) + found["absorbed"], found["score"], rtol=1e-9)
    np.testing.assert_allclose(found["relevance/ids"][0, 2], found["relevance/ids"][0, 3])


def test_tokens_that_are_cast_and_pick_from_two_tables() -> None:
    """Both embeddings belong to the token: together they hold its relevance."""
    net = Net(seed=6)
    ids = net("Cast", net.input("ids", "N", "T", dtype=TensorProto.INT64), to=TensorProto.INT32)
    picked = [net("Gather", net.weight(7, width), ids, out=f"embedded{width}") for width in (4, 3)]
    joined = net("ReduceSum", net("Concat", *picked, axis=2), net.const([1], np.int64), keepdims=0)
    model = net.model(net("MatMul", joined, net.weight(7, 3)))
    found = run_double(
        rewrite(model, "epsilon", layers=["embedded4", "embedded3"]).model, {"ids": np.array([[1, 0, 6, 6]])}
    )
    parts = found["relevance/embedded4"].sum(2) + found["relevance/embedded3"].sum(2)
    np.testing.assert_allclose(found["relevance/ids"], parts, rtol=1e-12)
    np.testing.assert_allclose(found["relevance/ids"].sum(1), found["score"], rtol=1e-5)


def test_positions_are_no_tokens() -> None:
    """Indices into the picture, or along another axis, pick no embeddings."""
    net = Net()
    x, places = net.input("x", "N", 4), net.input("places", 2, dtype=TensorProto.INT64)
    picked = net("MatMul", net("Gather", net.weight(4, 5), places, axis=1), net.const(np.ones((2, 3))))
    model = net.model(net("MatMul", net("MatMul", x, picked), net.weight(3, 2)))
    assert list(rewrite(model, "lrp_0", inputs=["x"]).relevance) == ["x"]
    with pytest.raises(InputError, match="input 'places' is int64 and feeds no embedding Gather"):
        rewrite(model, "lrp_0", inputs=["places"])


def test_an_integer_input_without_embedding() -> None:
    net = Net()
    x = net.input("x", "N", 4)
    count = net("Cast", net.input("count", "N", 1, dtype=TensorProto.INT64), to=TensorProto.FLOAT)
    model = net.model(net("Add", net("MatMul", x, net.weight(4, 3)), count))
    assert list(rewrite(model, "lrp_0").relevance) == ["x"]
    with pytest.raises(InputError, match="input 'count' is int64 and feeds no embedding Gather"):
        rewrite(model, "lrp_0", inputs=["count"])
    with pytest.raises(InputError, match="nope"):
        rewrite(model, "lrp_0", inputs=["nope"])


# ---- one class rather than another -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["logit", "one"])
def test_a_class_rather_than_another(start: str) -> None:
    """The score and the relevance are differences of those of two classes."""
    for target, against in (([1, 4, 2], [3, 0, 1]), ([2, 2, 2], [2, 1, 0])):
        feeds = {"x": X, "target": np.array(target), "against": np.array(against)}
        found = run(classifier(), feeds, start=start, against=True)
        weights = one_hot(target) - one_hot(against)
        begin = weights * (LOGITS if start == "logit" else 1)
        np.testing.assert_allclose(found["score"], (weights * LOGITS).sum(1), atol=1e-5)
        np.testing.assert_array_equal(found["against_used"], against)
        np.testing.assert_allclose(found["relevance/x"], linear(begin), rtol=1e-5, atol=1e-5)


def test_a_class_rather_than_the_next_best() -> None:
    found = run(classifier(), {"x": X}, against=True)
    np.testing.assert_array_equal(found["target_used"], BEST)
    np.testing.assert_array_equal(found["against_used"], np.argsort(-LOGITS, axis=1)[:, 1])
    worst = run(classifier(), {"x": X, "target": LOGITS.argmin(1)}, against=True)
    np.testing.assert_array_equal(worst["against_used"], BEST)


def test_what_cannot_be_subtracted() -> None:
    with pytest.raises(InputError, match="against= subtracts one class from another"):
        rewrite(classifier(), "lrp_0", start="softmax", against=True)
