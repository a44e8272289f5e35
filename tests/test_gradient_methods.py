"""Methods of the gradient family: captum's values, batches, layers of Grad-CAM, and what is refused."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnx_lrp
from onnx_lrp import GradCAM, Gradient, GuidedGradCAM, InputError
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.methods import Found, Plan, Walk
from onnx_lrp.view import View
from tests.layers import Net
from tests.peers.captum_peer import captum_gradient
from tests.peers.networks import NETS
from tests.support import run_double, to_double, worst

if TYPE_CHECKING:
    import torch

PLAIN = ("gradient", "input_x_gradient", "guided_backprop", "deconvnet")
METHODS = (*PLAIN, "grad_cam", "guided_grad_cam")
TARGETS = [3, 7, 0]
EXACT, SINGLE = 1e-8, 1e-4
# The module of each net that gives the tensor that Grad-CAM finds by itself.
LAYERS: dict[str, Callable[[Any], Any]] = {
    "vgg": lambda net: net.features[-2],
    "vgg_batchnorm": lambda net: net.features[-2],
    "vgg_odd": lambda net: net.features[-2],
    "resnet_basic": lambda net: net.blocks[-1].relu2,
    "resnet_bottleneck": lambda net: net.blocks[-1].relu3,
    "mobilenet_relu": lambda net: net.features[-1],
}


@functools.cache
def net(name: str) -> torch.nn.Module:
    pytest.importorskip("torch")
    return NETS[name]()


@functools.cache
def source(name: str) -> onnx.ModelProto:
    from exporters.torch_nets import export

    return export(net(name), None, (1, *shape(name)))


def shape(name: str) -> tuple[int, int, int]:
    return (3, 37, 41) if name == "vgg_odd" else (3, 32, 32)


def pictures(name: str = "vgg") -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(TARGETS), *shape(name))).astype(np.float32)


def double(model: onnx.ModelProto, method: Any, x: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """Explain TARGETS in float64; return all outputs."""
    feeds = {model.graph.input[0].name: x, "target": np.array(TARGETS[: len(x)])}
    return run_double(onnx_lrp.rewrite(to_double(model), method, **options).model, feeds)


def single(model: onnx.ModelProto, method: Any, x: np.ndarray, **options: Any) -> onnx_lrp.Explanation:
    return onnx_lrp.Explainer(model, method, device="cpu", threads=1, **options)(x, target=TARGETS[: len(x)])


# ---- as captum has it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_captum(name: str, method: str) -> None:
    x = pictures(name)
    expected = captum_gradient(net(name), x, method, TARGETS, LAYERS[name])
    exact, rounded = double(source(name), method, x), single(source(name), method, x)
    assert len(rounded.relevance) == len(expected)
    for tensor, found in rounded.relevance.items():
        theirs = expected["input" if tensor == "input" else "layer"]
        assert worst(exact[f"relevance/{tensor}"], theirs) <= EXACT, tensor
        assert worst(found, theirs) <= SINGLE, tensor


@pytest.mark.parametrize("fold", [True, False])
def test_captum_at_a_named_layer(fold: bool) -> None:
    """A convolution before its batch norm, which a pass would hide if nobody named it."""
    name, x = "vgg_batchnorm", pictures()
    layer = next(node.output[0] for node in reversed(source(name).graph.node) if node.op_type == "Conv")
    for make, method in ((GradCAM, "grad_cam"), (GuidedGradCAM, "guided_grad_cam")):
        expected = captum_gradient(net(name), x, method, TARGETS, lambda net: net.features[-4])
        found = double(source(name), make(layer), x, fold_batchnorm=fold)
        assert worst(found["relevance/input"], expected["input"]) <= EXACT
        if "layer" in expected:
            assert worst(found[f"relevance/{layer}"], expected["layer"]) <= EXACT


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_relus_by_hand() -> None:
    """One ReLU, every pair of signs of what went in and what comes back."""
    model = Net()
    weight = np.array([[3.0, -3.0]] * 3, np.float32) * [[1.0], [2.0], [-1.0]]
    y = model("MatMul", model("Relu", model.input("x", "N", 3)), model.const(weight))
    proto, x = model.model(y), np.array([[1.0, -1.0, 2.0], [1.0, -1.0, 2.0]], np.float32)
    feeds = {"x": x, "target": np.array([0, 1])}
    expected = {
        "gradient": [[3, 0, -3], [-3, 0, 3]],
        "input_x_gradient": [[3, 0, -6], [-3, 0, 6]],
        "guided_backprop": [[3, 0, 0], [0, 0, 3]],
        "deconvnet": [[3, 6, 0], [0, 0, 3]],
    }
    for method in PLAIN:
        explained = onnx_lrp.rewrite(proto, method)
        np.testing.assert_array_equal(run_double(explained.model, feeds)["relevance/x"], expected[method])
    assert [row.rule for row in onnx_lrp.rewrite(proto, "guided_backprop").table] == ["guided", "gradient"]
    assert [row.rule for row in onnx_lrp.rewrite(proto, "deconvnet").table] == ["deconvnet", "gradient"]


def head(net: Net, x: str, channels: int = 4) -> onnx.ModelProto:
    """Global average and a dense layer."""
    pooled = net("Flatten", net("GlobalAveragePool", x))
    return net.model(net("MatMul", pooled, net.weight(channels, 8)))


def test_grad_cam_by_hand() -> None:
    """Behind a global average the weights are those of the dense layer over the number of places."""
    model = Net()
    maps = model("Relu", model("Conv", model.input("x", "N", 3, 4, 4), model.weight(4, 3, 1, 1)), out="maps")
    proto, x = head(model, maps), pictures()[:, :, :4, :4]
    found = double(proto, "grad_cam", x, layers=["x"])
    weights = [onnx.numpy_helper.to_array(t).astype(float) for t in proto.graph.initializer]
    activations = np.maximum(np.einsum("oc,nchw->nohw", weights[0][:, :, 0, 0], x), 0)
    expected = np.maximum(np.einsum("cn,nchw->nhw", weights[1][:, TARGETS], activations) / 16, 0)[:, None]
    np.testing.assert_allclose(found["relevance/maps"], expected, rtol=1e-6)
    np.testing.assert_array_equal(found["relevance/x"], found["relevance/maps"])


# ---- batches and forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_samples(method: str) -> None:
    x = pictures()
    whole = single(source("vgg"), method, x, batch_size=2)
    for i in range(len(x)):
        explainer = onnx_lrp.Explainer(source("vgg"), method, device="cpu", threads=1)
        for tensor, alone in explainer(x[i : i + 1], target=TARGETS[i]).relevance.items():
            assert worst(whole.relevance[tensor][i : i + 1], alone) <= 1e-5


@pytest.mark.parametrize("method", METHODS[-2:])
def test_forms(method: str) -> None:
    """Open height and width, a switch, the portable form: all the same."""
    from exporters.torch_nets import export

    x, name = pictures(), "resnet_basic"
    expected = single(source(name), method, x).relevance["input"]
    open_size = export(net(name), None, (1, *shape(name)), dynamic_size=True)
    for model, options in (
        (open_size, {}),
        (source(name), {"switch": True}),
        (source(name), {"portable": True}),
    ):
        assert worst(single(model, method, x, **options).relevance["input"], expected) <= SINGLE
    larger = np.random.default_rng(1).standard_normal((1, 3, 45, 70)).astype(np.float32)
    channels = 1 if method == "grad_cam" else 3
    assert single(open_size, method, larger).relevance["input"].shape == (1, channels, 45, 70)


@pytest.mark.parametrize("method", METHODS[-2:])
def test_channels_last(method: str) -> None:
    """A picture with its channels last gets its map in its own order of axes."""

    def build(last: bool) -> onnx.ModelProto:
        model = Net()
        x = model.input("x", "N", *((8, 10, 3) if last else (3, 8, 10)))
        x = model("Mul", x, model.const(np.float32(2)))
        x = model("Transpose", x, perm=[0, 3, 1, 2]) if last else x
        maps = model("Relu", model("Conv", x, model.weight(4, 3, 3, 3), strides=[2, 2]))
        return head(model, maps)

    x = pictures()[:, :, :8, :10]
    expected = double(build(False), method, x)["relevance/x"].transpose(0, 2, 3, 1)
    found = double(build(True), method, x.transpose(0, 2, 3, 1))["relevance/x"]
    assert worst(found, expected) <= EXACT


def test_further_layers() -> None:
    """What is named besides gets the map at its own size."""
    first = next(node.output[0] for node in source("vgg").graph.node if node.op_type == "MaxPool")
    found = single(source("vgg"), "grad_cam", pictures(), layers=[first])
    assert found.relevance[first].shape == (3, 1, 16, 16)
    found = single(source("vgg"), "guided_grad_cam", pictures(), layers=[first])
    assert found.relevance[first].shape == (3, 8, 16, 16)


@dataclass(frozen=True)
class Both(onnx_lrp.LRP):
    """Two walks: by a rule book to the first convolution, and then to the input; their sum is reported."""

    layer: str = ""

    def plan(self, v: View, explained: Value, reported: Sequence[Value]) -> Plan:
        layer = v.value(self.layer)
        walks = [Walk(self.step_for, [layer]), Walk(self.step_for, reported), Walk(Gradient().step_for, reported)]
        return Plan(walks, self._sum, {self.layer: layer})

    def _sum(self, e: Emitter, x: Value, found: Found) -> Value:
        return functools.reduce(operator.add, [part[x].whole(e) for part in found if x in part])


@pytest.mark.parametrize("book", ["epsilon_plus_flat", "epsilon_alpha2_beta1"])
def test_several_walks(book: str) -> None:
    """Each finds what it would find alone, though expressions are shared."""
    x, layer = pictures(), next(node.output[0] for node in source("vgg").graph.node if node.op_type == "Relu")
    both = double(source("vgg"), Both(book, layer=layer), x, start="logit")
    one, inner = (double(source("vgg"), book, x, inputs=[name]) for name in ("input", layer))
    gradient = double(source("vgg"), "gradient", x, start="logit")
    assert worst(both["relevance/input"], one["relevance/input"] + gradient["relevance/input"]) <= EXACT
    assert worst(both[f"relevance/{layer}"], inner[f"relevance/{layer}"]) <= EXACT


# ---- the layer that is found -----------------------------------------------------------------------------------------


def found_layer(model: onnx.ModelProto, **options: Any) -> str:
    _, layer = onnx_lrp.rewrite(model, "grad_cam", **options).relevance
    return layer


def start(dtype: int = TensorProto.FLOAT) -> tuple[Net, str]:
    """A first convolution."""
    model = Net()
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    weight = model.const(np.ones((4, 3, 1, 1)) / 4, kind)
    return model, model("Conv", model.input("x", "N", 3, 8, 8, dtype=dtype), weight, out="first")


def test_layer_after_sums_and_activations() -> None:
    model, x = start()
    a = model("Relu", x)
    b = model("Add", model("Conv", a, model.weight(4, 4, 1, 1)), a)
    c = model("Mul", b, model("Sigmoid", b), out="block")
    assert found_layer(head(model, model("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2]))) == "block"


def test_layer_of_joined_branches() -> None:
    model, x = start()
    branches = [model("Relu", model("Conv", x, model.weight(2, 4, 1, 1))) for _ in range(2)]
    assert found_layer(head(model, model("Concat", *branches, axis=1, out="joined"))) == "joined"


def test_layer_before_convolutions_of_one_place() -> None:
    """A dense layer may be written as a convolution behind the global pooling; so may a gate."""
    model, x = start()
    a = model("Relu", x)
    squeezed = model("Conv", model("GlobalAveragePool", a), model.weight(4, 4, 1, 1))
    gated = model("Mul", a, model("Sigmoid", squeezed), out="gated")
    dense = model("Conv", model("GlobalAveragePool", gated), model.weight(4, 4, 1, 1))
    assert found_layer(head(model, model("HardSwish", dense))) == "gated"


def test_layer_before_a_map_of_classes() -> None:
    """What is explained is not its own layer."""
    model, x = start()
    y = model("Conv", model("Relu", x, out="inner"), model.weight(5, 4, 1, 1))
    assert found_layer(model.model(y)) == "inner"


def test_layer_of_a_model_in_16_bits() -> None:
    """It is called what the model calls it."""
    model, x = start(TensorProto.FLOAT16)
    pooled = model("Flatten", model("GlobalAveragePool", model("Relu", x, out="maps")))
    y = model("MatMul", pooled, model.const(np.ones((4, 8)), np.float16))
    proto = model.model(y, dtype=TensorProto.FLOAT16)
    assert found_layer(proto) == "maps"
    picture = np.abs(pictures()[:1, :, :8, :8]).astype(np.float16)
    assert single(proto, "grad_cam", picture).relevance["x"].any()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GradCAM, GuidedGradCAM])
def test_layers_that_are_refused(make: Any) -> None:
    model, x = start()
    pooled = model("Flatten", model("GlobalAveragePool", model("Relu", x)), out="flat")
    y = model("MatMul", pooled, model.weight(4, 8))
    model("Relu", x, out="aside")
    proto = model.model(y)
    with pytest.raises(InputError, match="no tensor named 'nope'"):
        onnx_lrp.rewrite(proto, make("nope"))
    with pytest.raises(InputError, match=r"needs a layer of shape \(N, C, h, w\), 'flat' is float32 of shape"):
        onnx_lrp.rewrite(proto, make("flat"))
    with pytest.raises(InputError, match="layer 'aside' does not lie between x and"):
        onnx_lrp.rewrite(proto, make("aside"))


@pytest.mark.parametrize("method", METHODS[-2:])
def test_models_that_are_refused(method: str) -> None:
    model = Net()
    dense = model.model(model("MatMul", model.input("x", "N", 4), model.weight(4, 8)))
    with pytest.raises(InputError, match=r"lays its map over pictures \(N, C, H, W\), 'x' has shape"):
        onnx_lrp.rewrite(dense, method)
    model = Net()
    flat = model("Flatten", model("Relu", model.input("x", "N", 3, 2, 2)))
    with pytest.raises(InputError, match="finds no convolution with a map of more than one place before"):
        onnx_lrp.rewrite(model.model(model("MatMul", flat, model.weight(12, 8))), method)


# ---- the shipped model -----------------------------------------------------------------------------------------------


def test_grad_cam_points_at_the_object() -> None:
    """The largest value of the map lies in the box of the object that decides."""
    from exporters import shapes

    rng = np.random.default_rng(20261)
    drawn = [shapes.draw(rng, k % 6) for k in range(60)]
    x = np.stack([p for p, _, _ in drawn]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    file = Path(shapes.__file__).resolve().parent.parent / "examples" / "shapes" / "shapes.onnx"
    explainer = onnx_lrp.Explainer(file, "grad_cam", device="cpu", threads=1)
    maps = explainer(x, target=[label for _, label, _ in drawn]).relevance["image"][:, 0]
    hits = []
    for cam, (_, _, (left, top, right, bottom)) in zip(maps, drawn, strict=True):
        row, column = np.unravel_index(cam.argmax(), cam.shape)
        hits.append(top <= row < bottom and left <= column < right)
    assert np.mean(hits) >= 0.9
