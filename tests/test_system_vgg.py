"""z⁺ relevance of a VGG: the whole softmax as start, x := 1 at the first layer, both rules for max pooling.

The oracle is z⁺ written out layer by layer in torch, in float64; it shares nothing with the library.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import onnx_lrp
from exporters import small_vgg, torch_nets
from exporters.vgg import FORMS
from exporters.vgg import exported as exported_as
from onnx_lrp import evaluate
from onnx_lrp.preprocess import PRESETS, to_array
from onnx_lrp.reference import run_double
from onnx_lrp.verify import verify

MODEL = Path(small_vgg.__file__).resolve().parent.parent / "examples" / "vgg" / "small_vgg.onnx"
BOOKS = {"max": "zplus_wplus", "average": "zplus_wplus_average"}
COUNT = 60


@functools.cache
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fresh pictures as pixels and as the network reads them, labels, and the pixels of the objects' boxes."""
    pictures, labels, boxes = small_vgg.dataset(COUNT, seed=77)
    return pictures, small_vgg.prepared(pictures), labels, evaluate.region_of(boxes, small_vgg.SIZE, small_vgg.SIZE)


def network() -> torch_nets.VGG:
    """The shipped network in torch."""
    return small_vgg.load(MODEL)


@functools.cache
def exported(form: str) -> onnx.ModelProto:
    return small_vgg.export(network(), None, form)


def fed(form: str) -> np.ndarray:
    x = drawn()[1]
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if form == "nhwc" else x


def tensors_of(model: onnx.ModelProto) -> list[str]:
    """Every tensor between input and logits that depends on the input; a MatMul and its Add are one layer."""
    live = {model.graph.input[0].name}
    for node in model.graph.node:
        if any(name in live for name in node.input):
            live |= set(node.output)
    ops = {node.output[0]: node.op_type for node in model.graph.node}
    last = next(n for n in ops if n in ("logits", "dense3/add"))
    return [name for name, op in ops.items() if name in live and op not in ("MatMul", "Softmax") and name != last]


@functools.cache
def explained(form: str, pool: str) -> tuple[onnx_lrp.Explanation, tuple[str, ...]]:
    """All pictures explained, every tensor reported."""
    layers = tensors_of(exported(form))
    explainer = onnx_lrp.Explainer(exported(form), BOOKS[pool], start="softmax", layers=layers, device="cpu", threads=1)
    return explainer(fed(form)), tuple(layers)


def maps(model: onnx.ModelProto, pool: str) -> np.ndarray:
    explainer = onnx_lrp.Explainer(model, BOOKS[pool], start="softmax", device="cpu", threads=1)
    return explainer(drawn()[1]).relevance["input"]


# ---- the oracle ------------------------------------------------------------------------------------------------------


def oracle(x: np.ndarray, pool: str, epsilon: float = 1e-9) -> list[np.ndarray]:
    """Relevance of what every layer reads, from the last one down to the first: z⁺ as the system's text has it."""
    net = network().double()
    layers = [layer for layer in (*net.features, net.avgpool, nn.Flatten(), *net.classifier) if not is_dropout(layer)]
    inputs, h = [], torch.from_numpy(x).double()
    for layer in layers:
        inputs.append(h)
        h = layer(h).detach()
    relevance, found = h.softmax(1), []
    for k, layer in reversed(list(enumerate(layers))):
        a = inputs[k]
        if isinstance(layer, nn.Linear):
            w = layer.weight.detach().clamp(min=0)
            relevance = a * ((relevance / (a @ w.T + epsilon)) @ w)
        elif isinstance(layer, nn.Conv2d):
            a = torch.ones_like(a) if k == 0 else a
            w = layer.weight.detach().clamp(min=0)
            z = functional.conv2d(a, w, padding=1) + epsilon
            relevance = a * functional.conv_transpose2d(relevance / z, w, padding=1)
        elif isinstance(layer, nn.MaxPool2d):
            relevance = pooled(a, relevance, pool, epsilon)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):  # the average of single pixels
            relevance = a * relevance / (a + epsilon)
        else:
            assert isinstance(layer, nn.ReLU | nn.Flatten)
            relevance = relevance.reshape(a.shape)
        found.append(relevance.numpy())
    return found


def is_dropout(layer: nn.Module) -> bool:
    """Dropout has no node."""
    return isinstance(layer, nn.Dropout)


def pooled(a: Tensor, relevance: Tensor, pool: str, epsilon: float) -> Tensor:
    """A pool of 2 by 2: shared as an average would be, or all to the winner."""
    if pool == "average":
        quotient = relevance / (functional.avg_pool2d(a, 2) + epsilon)
        return a * quotient.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    _, winners = functional.max_pool2d(a, 2, return_indices=True)
    return torch.zeros_like(a).flatten(2).scatter(2, winners.flatten(2), relevance.flatten(2)).reshape(a.shape)


# ---- the shipped model -----------------------------------------------------------------------------------------------


def test_the_shipped_model_is_right_and_small() -> None:
    pictures, labels, _ = small_vgg.dataset(400, seed=78)
    explainer = onnx_lrp.Explainer(MODEL, "zplus_wplus", device="cpu", threads=1)
    assert (explainer(small_vgg.prepared(pictures)).outputs["logits"].argmax(1) == labels).mean() >= 0.98
    assert MODEL.stat().st_size < 300_000


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_network(form: str) -> None:
    """NCHW by both exporters of torch, and NHWC as converters of Keras and TensorFlow write it."""
    logits = network()(torch.from_numpy(drawn()[1])).detach()
    model = exported(form)
    ops = {node.op_type for node in model.graph.node}
    assert ({"Transpose", "MatMul", "Add", "Softmax"} if form == "nhwc" else {"Gemm"}) <= ops
    found = next(iter(explained(form, "max")[0].outputs.values()))
    np.testing.assert_allclose(found, logits.softmax(1) if form == "nhwc" else logits, rtol=1e-4, atol=1e-4)


def test_pixels_are_read_as_the_model_says(tmp_path: Path) -> None:
    """Metadata "caffe": blue, green, red, less their means; the network gets what it was trained on."""
    from PIL import Image

    from onnx_lrp.cli.options import preprocessing
    from onnx_lrp.model import load

    pixels = drawn()[0][0]
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    for form in ("torchscript", "nhwc"):
        options = dict.fromkeys(("preprocess", "size", "mean", "std", "scale", "layout", "color", "resize"))
        pre, origin = preprocessing(type("Options", (), options)(), load(exported(form)))
        assert (pre.color, pre.mean, origin) == ("BGR", PRESETS["caffe"].mean, "from the model's metadata")
        np.testing.assert_array_equal(to_array(tmp_path / "picture.png", pre), fed(form)[:1])
    x = fed("torchscript")[0]
    np.testing.assert_allclose(x[0], pixels[..., 2].astype(np.float32) - 103.939, rtol=1e-6)
    assert x.min() < -50
    assert x.max() > 50


# ---- the checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", BOOKS)
@pytest.mark.parametrize("form", FORMS)
def test_conservation(form: str, pool: str) -> None:
    """The sum stays 1 within 1e-3 at every tensor between logits and input, and nothing is negative."""
    explanation, layers = explained(form, pool)
    assert len(layers) >= 15
    for name, relevance in explanation.relevance.items():
        sums = relevance.reshape(COUNT, -1).sum(1, dtype=np.float64)
        assert np.abs(sums - 1).max() <= 1e-3, name
        assert relevance.min() >= -1e-7, name
    np.testing.assert_allclose(explanation.score, 1, rtol=1e-6)


@pytest.mark.parametrize("pool", BOOKS)
@pytest.mark.parametrize("form", FORMS)
def test_agreement_with_the_oracle(form: str, pool: str) -> None:
    """Maps of every form are those of z⁺ written out in torch, within 1e-4 of the largest value."""
    found = explained(form, pool)[0].relevance["image" if form == "nhwc" else "input"]
    found = found.transpose(0, 3, 1, 2) if form == "nhwc" else found
    expected = oracle(drawn()[1], pool)[-1]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("pool", BOOKS)
def test_every_layer_is_the_oracles_in_float64(pool: str) -> None:
    """The explained graph run in float64 agrees to rounding at every tensor, in the order of the layers."""
    model = exported("torchscript")
    tensors = tensors_of(model)
    graph = onnx_lrp.rewrite(model, BOOKS[pool], start="softmax", layers=tensors).model
    found = run_double(graph, {"input": drawn()[1][:8]})
    expected = oracle(drawn()[1][:8], pool)
    for name, relevance in zip(["input", *tensors], reversed(expected), strict=True):
        worst = np.abs(found[f"relevance/{name}"] - relevance).max()
        assert worst <= 1e-9 * np.abs(relevance).max(), name


@pytest.mark.parametrize("pool", BOOKS)
def test_localisation(pool: str) -> None:
    """At least three times as much relevance lies in the object's box as by chance."""
    region = drawn()[3]
    mass = evaluate.relevance_mass(explained("torchscript", pool)[0].relevance["input"], region).mean()
    assert mass >= 3 * region.mean()


@pytest.mark.parametrize("control", ["before training", "randomised"])
@pytest.mark.parametrize("pool", BOOKS)
def test_a_random_network_says_nothing(pool: str, control: str) -> None:
    """Of the mass in the box at least half goes, and entropy rises: for initial weights, and for redrawn ones.

    That the most relevant pixel lies in the box (the pointing game) is no criterion: random networks do well there.
    """
    region, own = drawn()[3], explained("torchscript", pool)[0].relevance["input"]
    model = exported("torchscript")
    if control == "before training":
        random = small_vgg.export(small_vgg.network().eval(), None)
    else:
        random = evaluate.randomised(model, seed=1, draw=evaluate.gaussian)
    other = maps(random, pool)
    assert evaluate.relevance_mass(other, region).mean() <= 0.5 * evaluate.relevance_mass(own, region).mean()
    assert evaluate.entropy(other).mean() > evaluate.entropy(own).mean() + 0.05


def test_the_first_layer_does_not_see_how_bright_a_pixel_is() -> None:
    """x := 1 is z⁺ with inputs of one: not the flat rule, whose weights are one, nor w², which squares them.

    Two pictures that the rest of the network takes alike get the same map, whatever their pixels.
    """
    model = exported("torchscript")
    start = "/features/features.0/Conv_output_0"  # begin there, with relevance of one's own
    x, other = drawn()[1][:4], drawn()[1][4:8]
    r = np.abs(np.random.default_rng(0).standard_normal((4, 8, 32, 32))).astype(np.float32)

    def first(book: str, pictures: np.ndarray) -> np.ndarray:
        explainer = onnx_lrp.Explainer(model, book, output=start, start="input", device="cpu", threads=1)
        return explainer({"input": pictures, "start": r}).relevance["input"]

    w = network().features[0].weight.detach().clamp(min=0).double()
    ones = torch.ones(4, 3, 32, 32, dtype=torch.float64)
    z = functional.conv2d(ones, w, padding=1) + 1e-9
    expected = functional.conv_transpose2d(torch.from_numpy(r).double() / z, w, padding=1).numpy()
    for pictures in (x, other):
        np.testing.assert_allclose(first("zplus_wplus", pictures), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(first("epsilon_plus_flat", x) - expected).max() > 0.1 * expected.max()
    assert np.abs(first("zplus", x) - expected).max() > 0.1 * expected.max()


@pytest.mark.parametrize("pool", BOOKS)
def test_class_sensitivity_is_low(pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not judged: z⁺ maps of two classes are much alike (Sixt et al. 2020), which the docs say."""
    explainer = onnx_lrp.Explainer(exported("torchscript"), BOOKS[pool], start="one", device="cpu", threads=1)
    first, second = (explainer(drawn()[1], target=k).relevance["input"].reshape(COUNT, -1) for k in (0, 1))
    cosine = (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))
    with capsys.disabled():
        print(f"\ncosine of the maps of two classes, {pool}: {cosine.mean():.4f}")
    assert np.isfinite(cosine).all()


@pytest.mark.parametrize("form", ["torchscript", "nhwc"])
@pytest.mark.parametrize("pool", BOOKS)
def test_verify_closes(pool: str, form: str) -> None:
    """Outputs as they were, relevance as in float64, and of the score of 1 no bias takes any."""
    result = verify(exported(form), fed(form)[:1], BOOKS[pool], start="softmax")
    assert result.ok, str(result)
    assert result.score == pytest.approx(1, rel=1e-6)
    assert {layer.bias for layer in result.layers} == {0.0}
    assert {layer.rule.split("(")[0] for layer in result.layers} >= {"wplus", "zplus"}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Explained by channel, in the picture's own colours although the model reads blue first; and the control."""
    from PIL import Image

    from onnx_lrp.cli import main
    from onnx_lrp.show import render

    monkeypatch.chdir(tmp_path)
    Image.fromarray(drawn()[0][0]).save("picture.png")
    options = ["picture.png", "-m", BOOKS["average"], "--start", "softmax", "--threads", "1"]
    assert main(["explain", str(MODEL), *options, "--colormap", "rgb", "-o", "map.png"]) == 0
    assert "explained   disc (0), score 1" in capsys.readouterr().out
    relevance = explained("torchscript", "average")[0].relevance["input"][0]
    size = Image.open("picture.png").height * 8
    expected = np.asarray(render(relevance[::-1], "rgb", (size, size)), float)
    sheet = np.asarray(Image.open("map.png"), float)
    top, left = 24 + 38 + 26, 24 + size + 14
    near = [
        np.abs(sheet[y : y + size, x : x + size] - expected).mean()
        for y in range(top - 6, top + 6)
        for x in range(left - 6, left + 6)
    ]
    assert min(near) < 1
    assert main(["explain", str(MODEL), *options, "-o", "own.npz"]) == 0
    assert main(["explain", str(MODEL), *options, "-o", "random.npz", "--randomise", "3"]) == 0
    assert "with random weights (seed 3)" in capsys.readouterr().out
    own, random = (np.load(name)["relevance/input"] for name in ("own.npz", "random.npz"))
    np.testing.assert_allclose(own[0], relevance, rtol=1e-4, atol=1e-7)
    model = evaluate.randomised(exported("torchscript"), seed=3, draw=evaluate.gaussian)
    np.testing.assert_allclose(random[0], maps(model, "average")[0], rtol=1e-3, atol=1e-6)
    assert main(["verify", str(MODEL), *options]) == 0
    assert "zplus(bias=False, epsilon=1e-09)" in capsys.readouterr().out


# ---- published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("depth", [16, 19])
@pytest.mark.parametrize("form", ["torchscript", "nhwc"])
def test_published_sizes(depth: int, form: str, tmp_path: Path) -> None:
    """VGG16 and VGG19 at 224 pixels, random weights: rewritten, run, verified, and conserving at every pool."""
    path = tmp_path / "vgg.onnx"
    onnx.save(exported_as(torch_nets.vgg16() if depth == 16 else torch_nets.vgg19(), 224, form), path)
    feeds = small_vgg.prepared(np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3)).astype(np.uint8))
    feeds = np.ascontiguousarray(feeds.transpose(0, 2, 3, 1)) if form == "nhwc" else feeds
    pools = [node.output[0] for node in onnx.load(path).graph.node if node.op_type == "MaxPool"]
    assert len(pools) == 5
    for pool, book in BOOKS.items():
        relevance = onnx_lrp.Explainer(path, book, start="softmax", layers=pools, device="cpu")(feeds).relevance
        sums = {name: float(r.sum(dtype=np.float64)) for name, r in relevance.items()}
        assert all(math.isclose(total, 1, abs_tol=1e-3) for total in sums.values()), (pool, sums)
        assert min(r.min() for r in relevance.values()) >= -1e-7
    result = verify(path, feeds, BOOKS["average"], start="softmax")
    assert result.ok, str(result)
    off = max(abs(total - 1) for total in sums.values())
    print(f"\nVGG{depth} {form}: sums off by {off:.0e}, verify: {result.reference}, other {result.other:.0e}")
