"""Any number of samples, none among them; and models that have no axis of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_lrp
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.methods import method_names
from onnx_lrp.verify import verify
from tests.adjoint_reference import run_onnxruntime, run_reference
from tests.layers import Net
from tests.small_models import conv, pixels, tokens, two_inputs
from tests.support import numbers, run_double, to_double, worst
from tests.test_recurrent import Cell

# Grad-CAM is for pictures, and hadamard for a product of two tensors in the model.
METHODS = [m for m in method_names() if "grad_cam" not in m and m != "hadamard"]
Feeds = dict[str, np.ndarray]


def pooled() -> onnx.ModelProto:
    """Convolution, batch norm, both pools, Gemm, softmax."""
    net = Net()
    h = net("Conv", net.input("x", "N", 3, 8, 8), net.weight(4, 3, 3, 3), pads=[1, 1, 1, 1])
    h = net("BatchNormalization", h, *(net.const(np.full(4, v)) for v in (1, 0.1, 0.2, 1)))
    h = net("MaxPool", net("Relu", h), kernel_shape=[2, 2], strides=[2, 2])
    h = net("Flatten", net("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2]))
    return net.model(net("Softmax", net("Gemm", h, net.weight(16, 5))))


def attention() -> onnx.ModelProto:
    """Self-attention with a residual and a layer norm, over any number of tokens."""
    net = Net()
    x = net.input("x", "N", "T", 4)
    q, k, v = (net("MatMul", x, net.weight(4, 4)) for _ in range(3))
    a = net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 2, 1])), axis=-1)
    h = net("Add", net("MatMul", a, v), x)
    h = net("LayerNormalization", h, net.const(np.ones(4)), net.const(np.zeros(4)))
    return net.model(net("Gemm", net("ReduceMean", h, net.const([1], np.int64), keepdims=0), net.weight(4, 3)))


def squeeze_and_excite() -> onnx.ModelProto:
    """A picture of any size: SAME padding, a gate per channel, the largest of each."""
    net = Net()
    h = net("Conv", net.input("x", "N", 3, "H", "W"), net.weight(4, 3, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2])
    h = net("Mul", h, net("Sigmoid", net("Conv", net("GlobalAveragePool", h), net.weight(4, 4, 1, 1))))
    return net.model(net("Gemm", net("ReduceMax", h, net.const([2, 3], np.int64), keepdims=0), net.weight(4, 3)))


def upsampled() -> onnx.ModelProto:
    """A series: transposed convolution, Resize, the largest of each channel."""
    net = Net()
    h = net("ConvTranspose", net.input("x", "N", 2, 5), net.weight(2, 3, 3))
    h = net("GlobalMaxPool", net("Resize", h, "", net.const([1, 1, 2]), mode="linear"))
    return net.model(net("Gemm", net("Flatten", h), net.weight(3, 3)))


def recurrent() -> onnx.ModelProto:
    """An LSTM over four steps, mean over these; samples first, as the explanation takes them."""
    model = Cell("LSTM", initial=False, outputs="y").model(np.float32, weights=True)
    nodes = list(model.graph.node)
    nodes[0].input[0] = "turned"
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]))
    model.graph.node.extend(nodes)
    model.graph.node.append(helper.make_node("ReduceMean", ["y"], ["m"], axes=[0, 1], keepdims=0))
    model.opset_import[0].version = 17
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 3]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("m", TensorProto.FLOAT, ["N", 5]))
    return model


def double(model: onnx.ModelProto, feeds: Feeds) -> Feeds:
    """All outputs in float64."""
    wide = {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in feeds.items()}
    return run_reference(to_double(model), wide)


# Models, and the shape of one sample of each input.
FREE: dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, tuple[int, ...]]]] = {
    "conv": (conv, {"x": (3, 8, 8)}),
    "two_inputs": (two_inputs, {"image": (3, 4, 4), "table": (2,)}),
    "tokens": (tokens, {"ids": (6,)}),
    "pixels": (lambda: pixels("N"), {"x": (3, 8, 8)}),
    "pooled": (pooled, {"x": (3, 8, 8)}),
    "attention": (attention, {"x": (5, 4)}),
    "squeeze_and_excite": (squeeze_and_excite, {"x": (3, 7, 9)}),
    "upsampled": (upsampled, {"x": (2, 5)}),
    "recurrent": (recurrent, {"x": (4, 3)}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FREE)
def test_as_many_samples_as_are_fed(name: str, method: str) -> None:
    """None gives none, and two together what each gives alone (in float64)."""
    build, shapes = FREE[name]
    explained = onnx_lrp.rewrite(build(), method)

    def feeds(count: int) -> Feeds:
        found = {}
        for key, shape in shapes.items():
            full = (count, *shape)
            found[key] = np.arange(np.prod(full)).reshape(full) % 10 if key == "ids" else numbers(*full)
        return found

    # ONNX Runtime's own LSTM ends the process where there is no sample.
    empty = run_onnxruntime(explained.model, feeds(0)) if name != "recurrent" else None
    both = feeds(2)
    together = double(explained.model, both)
    for key, output in explained.relevance.items():
        # Token ids have one number per token.
        assert empty is None or empty[output].shape == feeds(0)[key].shape
        for k in range(2):
            one = {n: a[[k]] for n, a in both.items()}
            alone = double(explained.model, one)[output]
            assert worst(together[output][[k]], alone) <= 1e-9


def vector(head: str = "") -> onnx.ModelProto:
    net = Net()
    h = net("Relu", net("MatMul", net.input("x", 6), net.weight(6, 5)))
    h = net("Add", net("MatMul", h, net.weight(5, 4)), net.weight(4), out="logits")
    return net.model(net(head, h, axis=0) if head else h)


def picture() -> onnx.ModelProto:
    """Three channels in, three classes out, no axis of samples on either."""
    net = Net()
    h = net("Unsqueeze", net.input("x", 3, 8, 8), net.const([0], np.int64))
    h = net("Flatten", net("GlobalAveragePool", net("Relu", net("Conv", h, net.weight(4, 3, 3, 3)))))
    return net.model(net("Squeeze", net("Gemm", h, net.weight(4, 3)), net.const([0], np.int64), out="logits"))


def length() -> onnx.ModelProto:
    net = Net()
    x = net.input("x", "L")
    return net.model(net("ReduceSum", net("Mul", x, x), net.const([0], np.int64), keepdims=0, out="logits"))


def number() -> onnx.ModelProto:
    net = Net()
    h = net("Tanh", net("Mul", net.input("x"), net.weight(4)))
    return net.model(net("ReduceSum", h, net.const([0], np.int64), keepdims=0, out="logits"))


ALONE: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[int, ...]]] = {
    "vector": (vector, (6,)),
    "vector_softmax": (lambda: vector("Softmax"), (6,)),
    "picture": (picture, (3, 8, 8)),
    "length": (length, (7,)),
    "number": (number, ()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALONE)
def test_models_without_an_axis_of_samples(name: str, method: str) -> None:
    build, shape = ALONE[name]
    feeds = {"x": np.asarray(numbers(*shape), np.float32)}
    found = onnx_lrp.Explainer(build(), method, device="cpu")(feeds)
    assert found.relevance["x"].shape == shape
    # Excitation backprop takes the slope of an activation, and so does not conserve.
    if (name, method) != ("number", "excitation_backprop"):
        assert verify(build(), feeds, method).ok


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("target", [-1, 2])
def test_the_class_is_picked_in_a_vector(name: str, target: int) -> None:
    """The gradient of the score that is picked, by differences."""
    build, shape = ALONE[name]
    if name in ("length", "number") and target > 0:
        return
    x = np.asarray(numbers(*shape), np.float32).astype(np.float64)
    explained = onnx_lrp.rewrite(build(), "gradient", target=target)
    found = run_double(explained.model, {"x": x})

    def score(x: np.ndarray) -> float:
        logits = run_double(inner, {"x": x})["logits"].reshape(-1)
        return float(logits[chosen])

    inner = build()
    if "logits" not in {o.name for o in inner.graph.output}:
        inner.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None]))
    logits = run_double(inner, {"x": x})["logits"].reshape(-1)
    chosen = int(logits.argmax()) if target < 0 else target
    np.testing.assert_array_equal(found["target_used"].reshape(-1), [chosen])
    np.testing.assert_allclose(found["score"].reshape(-1), [logits[chosen]])
    direction = np.asarray(numbers(*shape), np.float64)
    h = 1e-6
    slope = (score(x + h * direction) - score(x - h * direction)) / (2 * h)
    np.testing.assert_allclose((found["relevance/x"] * direction).sum(), slope, rtol=1e-6)


def test_verification_of_a_fixed_batch() -> None:
    """The sums of all samples are compared with the scores of all."""
    found = verify(conv(3))
    assert found.ok
    assert found.other <= 1e-5


# ---- lengths that are fixed ------------------------------------------------------------------------------------------


def squeezed_where_it_can() -> onnx.ModelProto:
    """What torch leaves of a squeeze: an If whose branches differ in rank, by the length of an axis."""
    text = """<ir_version: 9, opset_import: ["": 18]> squeezed (float[N, S, 3] x) => (float[N, K] y) {
        w = Constant <value: tensor = float[3, 2] {1, 2, 3, -1, 0.5, 1}> ()
        length = Shape <start: int = 1, end: int = 2> (x)
        one = Constant <value_ints: ints = [1]> ()
        many = Equal (length, one)
        single = Squeeze (many)
        z = If (single) <
            then_branch = squeezing () => (float[N, 3] squeezed) { squeezed = Squeeze (x, one) },
            else_branch = keeping () => (float[N, S, 3] kept) { kept = Identity (x) }
        >
        h = MatMul (z, w)
        y = Tanh (h)
    }"""
    return onnx.parser.parse_model(text)


def test_lengths_that_are_fixed_decide_ranks() -> None:
    model, x = squeezed_where_it_can(), np.array([[[0.1, 0.2, 0.3]], [[0.5, -1.0, 0.25]]], np.float32)
    with pytest.raises(ModelError, match=r"the rank of tensor .* is unknown .* fix the lengths .* with shapes="):
        onnx_lrp.rewrite(model, "gradient", inputs=["x"])
    explainer = onnx_lrp.Explainer(model, "gradient", shapes={"x": (None, 1, None)}, device="cpu")
    found = explainer(x, target=[0, 1])
    weight = np.array([[1, 2], [3, -1], [0.5, 1]])
    logits = x[:, 0] @ weight
    expected = (1 - np.tanh(logits) ** 2)[[0, 1], [0, 1], None] * weight.T
    np.testing.assert_allclose(found.relevance["x"][:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "shapes: the model has no input 'z'; inputs are x"),
        ({"x": (1, 2)}, r"input 'x' is of shape \('N', 'S', 3\), which cannot be \(1, 2\)"),
        ({"x": (1, 2, 4)}, r"input 'x' is of shape \('N', 'S', 3\), which cannot be \(1, 2, 4\)"),
    ],
)
def test_lengths_that_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        onnx_lrp.rewrite(squeezed_where_it_can(), "gradient", shapes=shapes)
