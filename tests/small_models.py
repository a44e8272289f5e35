"""Small models with random weights, one per form of input that a user may have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Shape = Sequence[int | str]


def build(
    nodes: Sequence[NodeProto],
    inputs: dict[str, tuple[int, Shape]],
    outputs: dict[str, tuple[int, Shape]],
    weights: dict[str, np.ndarray],
    **metadata: str,
) -> onnx.ModelProto:
    """Return a checked model of opset 18."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Return normal numbers, the same at each call."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def conv(
    batch: int | str = "N",
    *,
    channels: int = 3,
    size: int | str = 8,
    classes: int = 5,
    half: bool = False,
    last: bool = False,
) -> onnx.ModelProto:
    """Return a classifier of pictures: Conv, Relu, mean, Gemm; `last`: channels come last."""
    dtype, kind = (np.float16, HALF) if half else (np.float32, FLOAT)
    shape = (batch, size, size, channels) if last else (batch, channels, size, size)
    nodes = [helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[0, 3, 1, 2])] if last else []
    nodes += [
        helper.make_node("Conv", ["t" if last else "x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "v", "d"], ["logits"], "dense"),
    ]
    weights = {
        "w": normal(6, channels, 3, 3, dtype=dtype),
        "b": normal(6, seed=1, dtype=dtype),
        "v": normal(6, classes, seed=2, dtype=dtype),
        "d": normal(classes, seed=3, dtype=dtype),
    }
    return build(nodes, {"x": (kind, shape)}, {"logits": (kind, (batch, classes))}, weights)


def two_inputs(batch: int | str = "N") -> onnx.ModelProto:
    """Return a model of a picture and a table, whose second output has the batch on its second axis."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], "mean"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Concat", ["f", "table"], ["all"], "concat", axis=1),
        helper.make_node("Gemm", ["all", "v"], ["logits"], "dense"),
        helper.make_node("Transpose", ["all"], ["state"], "turn", perm=[1, 0]),
    ]
    inputs = {"image": (FLOAT, (batch, 3, 4, 4)), "table": (FLOAT, (batch, 2))}
    outputs = {"logits": (FLOAT, (batch, 4)), "state": (FLOAT, (8, batch))}
    return build(nodes, inputs, outputs, {"w": normal(6, 3, 3, 3), "v": normal(8, 4, seed=1)})


def two_towers(
    axes: tuple[str, str] = ("texts", "images"), *, per_image: bool = False, words: int = 7
) -> onnx.ModelProto:
    """Return a linear model in the manner of CLIP: similarities (N, B) of texts and images, and both embeddings.

    Args:
        axes: what the numbers of texts and of images are called.
        per_image: similarities (B, N) come first.
        words: in the vocabulary.
    """
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"], "embed"),
        helper.make_node("ReduceSum", ["rows", "axis"], ["text_embeds"], "sum", keepdims=0),
        helper.make_node("MatMul", ["image", "w"], ["image_embeds"], "dense"),
        helper.make_node("Transpose", ["image_embeds"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["text_embeds", "turned"], ["similarity"], "compare"),
    ]
    texts, images = axes
    outputs = {"similarity": axes, "text_embeds": (texts, 4), "image_embeds": (images, 4)}
    if per_image:
        nodes.append(helper.make_node("Transpose", ["similarity"], ["per_image"], "turn_back", perm=[1, 0]))
        outputs = {"per_image": (images, texts), **outputs}
    inputs = {"tokens": (INT64, (texts, "words")), "image": (FLOAT, (images, 6))}
    weights = {"table": normal(words, 4), "w": normal(6, 4, seed=1), "axis": np.array([1])}
    return build(nodes, inputs, {name: (FLOAT, shape) for name, shape in outputs.items()}, weights)


def tokens() -> onnx.ModelProto:
    """Return a classifier of token ids 0 to 9: embedding, mean, Gemm."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("ReduceMean", ["e", "axes"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "v"], ["logits"], "dense"),
    ]
    weights = {"table": normal(10, 4), "axes": np.array([1], np.int64), "v": normal(4, 3, seed=1)}
    return build(nodes, {"ids": (INT64, ("N", "T"))}, {"logits": (FLOAT, ("N", 3))}, weights)


def pixels(batch: int | str = 1) -> onnx.ModelProto:
    """Return a scorer of places: its output has an axis of places and one of classes."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Reshape", ["c", "shape"], ["r"], "places"),
        helper.make_node("Transpose", ["r"], ["scores"], "turn", perm=[0, 2, 1]),
    ]
    weights = {"w": normal(2, 3, 3, 3), "shape": np.array([0, 2, 36], np.int64)}
    return build(nodes, {"x": (FLOAT, (batch, 3, 8, 8))}, {"scores": (FLOAT, (batch, 36, 2))}, weights)


def _attention(past: bool = False) -> list[NodeProto]:
    """Return one head of attention from `x` to `h`, with the addition of `bias` to its scores."""
    nodes = [helper.make_node("MatMul", ["x", w], [y], y) for w, y in (("wq", "q"), ("wk", "k"), ("wv", "v"))]
    keys, values = ("k", "v")
    if past:
        nodes += [
            helper.make_node("Concat", [f"past.{name}", name], [f"all_{name}"], f"all_{name}", axis=1)
            for name in ("k", "v")
        ]
        keys, values = "all_k", "all_v"
    return [
        *nodes,
        helper.make_node("Transpose", [keys], ["kt"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], "qk"),
        helper.make_node("Add", ["qk", "bias"], ["scores"], "masked"),
        helper.make_node("Softmax", ["scores"], ["weights"], "softmax", axis=-1),
        helper.make_node("MatMul", ["weights", values], ["read"], "read"),
        helper.make_node("Add", ["x", "read"], ["h"], "residual"),
    ]


def _embedding(words: int, width: int, longest: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """Return what makes `words_and_places` of `input_ids`, and the weights of attention with it."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["e"], "embed"),
        helper.make_node("Shape", ["input_ids"], ["length"], "length", start=1, end=2),
        helper.make_node("Slice", ["places", "zero", "length"], ["p"], "place"),
        helper.make_node("Add", ["e", "p"], ["words_and_places"], "add_place"),
    ]
    weights = {
        "words": normal(words, width),
        "places": 0.3 * normal(longest, width, seed=1),
        "zero": np.array([0], np.int64),
    }
    weights |= {name: 0.4 * normal(width, width, seed=2 + i) for i, name in enumerate(("wq", "wk", "wv"))}
    return nodes, weights


def reader(words: int = 40, *, classes: int = 3, hidden: bool = False) -> onnx.ModelProto:
    """Return a classifier of texts: words, segments and places, one attention with a mask, the mean of what counts.

    `hidden`: a score for every word at every place instead, as of a masked language model.
    """
    width = 8
    nodes, weights = _embedding(words, width, 32)
    nodes += [
        helper.make_node("Gather", ["segments", "token_type_ids"], ["s"], "segment"),
        helper.make_node("Add", ["words_and_places", "s"], ["x"], "add_segment"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], "mask", to=FLOAT),
        helper.make_node("Sub", ["one", "mask"], ["off"], "off"),
        helper.make_node("Mul", ["off", "low"], ["lowered"], "lowered"),
        helper.make_node("Unsqueeze", ["lowered", "one_axis"], ["bias"], "bias"),
        *_attention(),
    ]
    weights |= {
        "segments": 0.3 * normal(2, width, seed=7),
        "one": np.array(1, np.float32),
        "low": np.array(-1e4, np.float32),
        "one_axis": np.array([1], np.int64),
    }
    ids: tuple[int, Shape] = (INT64, ("N", "T"))
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    if hidden:
        nodes.append(helper.make_node("MatMul", ["h", "head"], ["logits"], "head"))
        weights["head"] = normal(width, words, seed=8)
        return build(nodes, inputs, {"logits": (FLOAT, ("N", "T", words))}, weights)
    nodes += [
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"], "wide"),
        helper.make_node("Mul", ["h", "wide"], ["kept"], "kept"),
        helper.make_node("ReduceSum", ["kept", "one_axis"], ["sum"], "sum", keepdims=0),
        helper.make_node("ReduceSum", ["wide", "one_axis"], ["count"], "count", keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"], "mean"),
        helper.make_node("Gemm", ["mean", "head", "shift"], ["logits"], "head"),
    ]
    weights |= {
        "last": np.array([2], np.int64),
        "head": normal(width, classes, seed=8),
        "shift": 0.1 * normal(classes, seed=9),
    }
    return build(nodes, inputs, {"logits": (FLOAT, ("N", classes))}, weights)


def writer(words: int = 40, *, mask: bool = True, past: bool = False) -> onnx.ModelProto:
    """Return a causal language model of one attention; `past`: it takes the keys and values of tokens before."""
    width, longest = 8, 32
    nodes, weights = _embedding(words, width, longest)
    nodes = [*nodes[:-1], helper.make_node("Add", ["e", "p"], ["x"], "add_place")]
    inputs: dict[str, tuple[int, Shape]] = {"input_ids": (INT64, ("N", "T"))}
    weights |= {
        "later": np.triu(np.full((longest, longest), -1e4, np.float32), 1),
        "rows_columns": np.array([0, 1], np.int64),
        "head": normal(width, words, seed=8),
    }
    begin, end = "zero", "length"
    if past:
        # Tokens before are read, too: rows begin behind them, columns with them.
        inputs |= {f"past.{name}": (FLOAT, ("N", "P", width)) for name in ("k", "v")}
        nodes[1:1] = [
            helper.make_node("Shape", ["past.k"], ["begin"], "past_length", start=1, end=2),
        ]
        nodes += [helper.make_node("Add", ["begin", "length"], ["end"], "whole_length")]
        begin, end = "begin", "end"
        place = next(n for n in nodes if n.name == "place")
        place.input[1:] = ["begin", "end"]
        nodes.sort(key=lambda n: n.name not in ("embed", "length", "past_length", "whole_length"))
    nodes += [
        helper.make_node("Slice", ["later", begin, end, "zero"], ["rows"], "rows"),
        helper.make_node("Slice", ["rows", "zero", end, "one_axis"], ["causal"], "columns"),
    ]
    weights["one_axis"] = np.array([1], np.int64)
    del weights["rows_columns"]
    if mask:
        inputs["attention_mask"] = (INT64, ("N", "all" if past else "T"))
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], "mask", to=FLOAT),
            helper.make_node("Sub", ["one", "mask"], ["off"], "off"),
            helper.make_node("Mul", ["off", "low"], ["lowered"], "lowered"),
            helper.make_node("Unsqueeze", ["lowered", "one_axis"], ["unread"], "unread"),
            helper.make_node("Add", ["causal", "unread"], ["bias"], "bias"),
        ]
        weights |= {"one": np.array(1, np.float32), "low": np.array(-1e4, np.float32)}
    else:
        nodes.append(helper.make_node("Unsqueeze", ["causal", "zero"], ["bias"], "bias"))
    nodes += [*_attention(past), helper.make_node("MatMul", ["h", "head"], ["logits"], "head")]
    return build(nodes, inputs, {"logits": (FLOAT, ("N", "T", words))}, weights)
