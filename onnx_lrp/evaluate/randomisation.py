"""Does an explanation depend on what the model has learnt? Randomise its weights, and compare the maps.

Adebayo et al. 2018, sanity checks for saliency maps: a map that stays the same when the weights are random shows the
input and not the model. z⁺ in deep stacks, guided backpropagation and deconvolution are known to change little (Sixt et
al. 2020).

    maps = lambda model: onnx_lrp.Explainer(model, "epsilon_plus")(x).relevance["image"]
    for step in evaluate.randomisation("model.onnx", maps):
        print(step.layer, step.similarity.mean())
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lrp import model as models
from onnx_lrp.errors import InputError
from onnx_lrp.model import ModelLike
from onnx_lrp.runtime import Array

Draw = Callable[[np.random.Generator, Array], Array]  # weights -> random ones of the same shape and type
Similarity = Callable[[Array, Array], Array]  # two maps of N samples -> (N,)

# Operators that have weights, and which inputs these are.
_WEIGHTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "DeformConv": (1,),
    "ConvInteger": (1,),
    "QLinearConv": (3,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "Einsum": (0, 1),
    "Gather": (0,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
# What may stand between an initializer and the operator whose weight it is.
_THROUGH = ("Identity", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "DequantizeLinear", "Dropout")


@dataclass(frozen=True)
class Step:
    """One step of a randomisation test.

    Attributes:
        layer: name of the node whose weights went last.
        similarity: of the maps of the randomised model to the model's own, (N,).
    """

    layer: str
    similarity: Array


def shuffled(rng: np.random.Generator, weights: Array) -> Array:
    """The same weights in another order: their distribution stays, and so does the scale of what they give."""
    return np.asarray(rng.permuted(weights.reshape(-1)).reshape(weights.shape))


def gaussian(rng: np.random.Generator, weights: Array) -> Array:
    """Normal weights around zero, with the root mean square of the old ones: like those of a network before training.

    Raises:
        InputError: the weights are integers, of a quantised model.
    """
    if not np.issubdtype(weights.dtype, np.floating):
        raise InputError("weights of quantised layers are integers: give draw=shuffled")
    spread = np.sqrt(np.mean(np.square(weights, dtype=np.float64)))
    return np.asarray(rng.normal(0, spread, weights.shape).astype(weights.dtype))


def randomised(model: ModelLike, *, seed: int = 0, draw: Draw = shuffled) -> onnx.ModelProto:
    """A copy of the model with random weights in all layers; biases and normalizations stay.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        seed: of the randomness; the same seed gives the same model.
        draw: how weights are drawn: `shuffled`, `gaussian`, or a function of one's own.

    Returns:
        The model; inputs, outputs and structure are the same.

    Raises:
        InputError: the model has no weights to randomise.
    """
    proto, layers = _layers(model)
    rng = np.random.default_rng(seed)
    for _, tensors in layers:
        _redraw(tensors, rng, draw)
    return proto


def cascading(
    model: ModelLike, *, seed: int = 0, draw: Draw = shuffled, order: Literal["cascading", "independent"] = "cascading"
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Copies of the model whose weights are random from the last layer down to this one, from this one to the first.

    Adebayo et al. 2018, sec. 3: cascading randomisation, or independent: of this one layer alone.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        seed: of the randomness.
        draw: how weights are drawn.
        order: `cascading` keeps the random weights of the layers behind, `independent` does not.

    Yields:
        Name of the layer's node, and the model. The last one of `cascading` is fully random.

    Raises:
        InputError: the model has no weights to randomise.
    """
    proto, layers = _layers(model)
    rng = np.random.default_rng(seed)
    for name, tensors in layers:
        before = [onnx.TensorProto.FromString(t.SerializeToString()) for t in tensors]
        _redraw(tensors, rng, draw)
        found = onnx.ModelProto()
        found.CopyFrom(proto)
        yield name, found
        if order == "independent":
            for tensor, kept in zip(tensors, before, strict=True):
                tensor.CopyFrom(kept)


def randomisation(
    model: ModelLike,
    explain: Callable[[onnx.ModelProto], Array],
    *,
    similarity: Similarity | None = None,
    seed: int = 0,
    draw: Draw = shuffled,
    order: Literal["cascading", "independent"] = "cascading",
) -> Iterator[Step]:
    """How alike maps stay while the weights become random, layer by layer from the last to the first.

    Args:
        model: path, bytes, ModelProto or onnx_graphsurgeon Graph.
        explain: a model to maps (N, ...). Let it explain the same classes each time.
        similarity: of two sets of maps; default `rank_similarity`.
        seed: of the randomness.
        draw: how weights are drawn.
        order: as for `cascading`.

    Yields:
        One step per layer.
    """
    similarity = similarity or rank_similarity
    own = explain(models.load(model).original)
    for name, changed in cascading(model, seed=seed, draw=draw, order=order):
        yield Step(name, similarity(own, explain(changed)))


def rank_similarity(first: Array, second: Array, *, absolute: bool = False) -> Array:
    """Spearman's rank correlation of two maps over all their entries, (N,), from -1 to 1.

    Adebayo et al. 2018, sec. 3.1, who give it with and without the sign. 0 where a map is constant: it ranks nothing.

    Args:
        first: maps (N, ...).
        second: maps of the same shape.
        absolute: compare magnitudes.

    Raises:
        InputError: shapes differ, or scipy is not installed (`pip install onnx-lrp[evaluate]`).
    """
    stats = _library("scipy.stats", "scipy")
    pairs = _pairs(np.abs(first) if absolute else first, np.abs(second) if absolute else second)
    return np.array(
        [0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else stats.spearmanr(a.ravel(), b.ravel())[0] for a, b in pairs]
    )


def ssim(first: Array, second: Array, *, absolute: bool = False) -> Array:
    """Structural similarity of two maps (Wang et al. 2004), (N,), 1 where they are the same.

    As in Adebayo et al. 2018, sec. 3.1: channels are summed and every map scaled to 0..1 first, so that only its
    structure counts. Gaussian windows of a standard deviation of 1.5 pixels, 11 pixels wide.

    Args:
        first: maps (N, H, W), or (N, C, H, W); 11 pixels and more each way.
        second: maps of the same shape.
        absolute: compare magnitudes.

    Raises:
        InputError: shapes differ, maps are too small, or scikit-image is not installed
            (`pip install onnx-lrp[evaluate]`).
    """
    metrics = _library("skimage.metrics", "scikit-image")
    found = []
    for pair in _pairs(first, second):
        a, b = (_unit(x, absolute=absolute) for x in pair)
        if a.ndim != 2 or min(a.shape) < 11:
            raise InputError(f"ssim wants maps (N, H, W) of 11 pixels and more each way, got {np.shape(first)}")
        options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        found.append(metrics.structural_similarity(a, b, data_range=1.0, **options))
    return np.array(found)


def _unit(x: Array, *, absolute: bool) -> Array:
    x = x.sum(0) if x.ndim == 3 else x
    x = np.abs(x) if absolute else x
    span = float(np.ptp(x))
    return (x - x.min()) / span if span else np.zeros_like(x)


def _pairs(first: Array, second: Array) -> list[tuple[Array, Array]]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim < 2:
        raise InputError(f"maps of one shape (N, ...) are compared, got {a.shape} and {b.shape}")
    return list(zip(a, b, strict=True))


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"this wants {package}, which is not installed: pip install onnx-lrp[evaluate]") from None


# ---- where weights are -----------------------------------------------------------------------------------------------


def _layers(model: ModelLike) -> tuple[onnx.ModelProto, list[tuple[str, list[onnx.TensorProto]]]]:
    """A copy of the model, and its layers, last first, with their weights; shared ones go with the last layer."""
    proto = onnx.ModelProto()
    proto.CopyFrom(models.load(model).original)
    taken: set[int] = set()
    layers = []
    for name, tensors in reversed(list(_walk(proto.graph, {}))):
        new = [t for t in tensors if id(t) not in taken]
        taken |= {id(t) for t in new}
        if new:
            layers.append((name, new))
    if not layers:
        raise InputError("the model has no weights to randomise: no layer reads an initializer of two axes and more")
    return proto, layers


Known = Mapping[str, onnx.TensorProto | str]  # a tensor's elements, or the tensor that it merely is another form of


def _walk(graph: onnx.GraphProto, outer: Known) -> Iterator[tuple[str, list[onnx.TensorProto]]]:
    """Layers in the order of the file, those of subgraphs among them."""
    known = {**outer, **{t.name: t for t in graph.initializer}}
    for place, node in enumerate(graph.node):
        if node.op_type == "Constant":
            known.update({name: a.t for name in node.output for a in node.attribute if a.name == "value"})
        elif node.op_type in _THROUGH:
            known[node.output[0]] = node.input[0]
        for inner in (g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)):
            yield from _walk(inner, known)
        found = [_elements(node.input[i], known) for i in _WEIGHTS.get(node.op_type, ()) if i < len(node.input)]
        tensors = [t for t in found if t is not None and len(t.dims) >= 2]
        if tensors:
            yield node.name or f"{node.op_type}_{place}", tensors


def _elements(name: str, known: Known) -> onnx.TensorProto | None:
    at: onnx.TensorProto | str | None = name
    while isinstance(at, str):
        at = known.get(at)
    return at


def _redraw(tensors: list[onnx.TensorProto], rng: np.random.Generator, draw: Draw) -> None:
    for tensor in tensors:
        weights = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(draw(rng, weights).astype(weights.dtype), tensor.name))
