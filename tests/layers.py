"""Small layers of every linear and bilinear operator, to be explained and compared with their dense matrix.

Numbers are multiples of 1/4, so sums are exact in float32, too: outputs that are zero are exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lrp.composite import Assignment, Composite
from onnx_lrp.methods import LRP
from onnx_lrp.rewrite import Explained, rewrite_with_accounts
from tests.support import run_double

Arrays = dict[str, np.ndarray]
OPSET, IR = 18, 10
BATCH = 3


@dataclass
class Net:
    """A graph under construction: every method returns the name of the tensor it makes."""

    opset: int = OPSET
    sign: int = 0
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the random numbers."""
        self.rng = np.random.default_rng(self.seed)

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def const(self, array: Any, dtype: Any = np.float32) -> str:
        """Add an initializer."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        """Add an initializer of quarters of either sign (or of one, if the net has a sign), none of them zero."""
        numbers = quarters(self.rng, shape, zeros=False)
        return self.const(np.abs(numbers) * self.sign if self.sign else numbers)

    def __call__(self, op: str, *inputs: str, name: str = "", outputs: int = 1, out: str = "", **attrs: Any) -> Any:
        """Add a node."""
        label = name or f"{op}_{len(self.nodes)}"
        names = [out or f"{label}:y"] if outputs == 1 else [f"{label}:y{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=label, **attrs))
        return names[0] if outputs == 1 else names

    def model(self, *outputs: str, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """Return the model with these outputs, their shapes inferred."""
        infos = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR)
        found = {v.name: v for v in onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output}
        for info in proto.graph.output:
            info.CopyFrom(found[info.name])
        return proto


def quarters(rng: np.random.Generator, shape: tuple[int, ...], zeros: bool = True) -> np.ndarray:
    """Return random multiples of 1/4 in [-2, 2]."""
    numbers = rng.integers(-8, 9, shape)
    if not zeros:
        numbers = np.where(numbers == 0, rng.integers(1, 9, shape), numbers)
    return (numbers / 4).astype(np.float32)


@dataclass(frozen=True)
class Layer:
    """One layer under test.

    Attributes:
        shapes: shapes of its live inputs, without the batch axis.
        build: adds its nodes, given the net, the names of its inputs and the name of its node; returns its output.
        batch_axis: where the batch stands in its input.
        mean: True where all weights are one over the number of summands: wsquare and flat differ by a part of epsilon.
    """

    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[Net, list[str], str], str]
    batch_axis: int = 0
    mean: bool = False


def _gemm(*weight: int, bias: tuple[int, ...] | None = (4,), **attrs: Any) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        extra = [] if bias is None else [net.weight(*bias)]
        return net("Gemm", *x, net.weight(*weight), *extra, name=name, **attrs)

    return build


def _conv(*weight: int, bias: int | None, op: str = "Conv", **attrs: Any) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        extra = [] if bias is None else [net.weight(bias)]
        return net(op, *x, net.weight(*weight), *extra, name=name, **attrs)

    return build


def _matmul(*weight: int, bias: tuple[int, ...] | None = None) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        if bias is None:
            return net("MatMul", *x, net.weight(*weight), name=name)
        return net("Add", net("MatMul", *x, net.weight(*weight), name=name), net.weight(*bias), name=f"{name}/bias")

    return build


def _with_constant(op: str, *shape: int, first: bool = False) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        c = net.weight(*shape)
        return net(op, c, *x, name=name) if first else net(op, *x, c, name=name)

    return build


def _plain(op: str, *ints: int | list[int], **attrs: Any) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        return net(op, *x, *(net.const(i, np.int64) for i in ints), name=name, **attrs)

    return build


def _batchnorm(channels: int) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        shift, mean = net.weight(channels), net.weight(channels)
        variance = net.const(np.resize([4.0, 1.0, 0.25], channels))
        return net("BatchNormalization", *x, net.weight(channels), shift, mean, variance, name=name, epsilon=0.0)

    return build


def _left(net: Net, x: list[str], name: str) -> str:
    return net("MatMul", net.weight(4, 5), *x, name=name)


def _einsum(equation: str, *weight: int) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        constant = [net.weight(*weight)] if weight else []
        return net("Einsum", *x, *constant, name=name, equation=equation)

    return build


def _resize(*factors: float, **attrs: Any) -> Callable[[Net, list[str], str], str]:
    def build(net: Net, x: list[str], name: str) -> str:
        return net("Resize", *x, "", net.const(factors), name=name, **attrs)

    return build


LAYERS: dict[str, Layer] = {
    "gemm": Layer(((5,),), _gemm(5, 4)),
    "gemm_transposed": Layer(((5,),), _gemm(4, 5, bias=(1, 4), transB=1)),
    "gemm_no_bias": Layer(((5,),), _gemm(4, 5, bias=None, transB=1)),
    "gemm_alpha_beta": Layer(((5,),), _gemm(4, 5, bias=(), transB=1, alpha=0.5, beta=2.0)),
    "gemm_trans_a": Layer(((5,),), _gemm(5, 4, transA=1), batch_axis=1),
    "gemm_trans_both": Layer(((5,),), _gemm(4, 5, bias=None, transA=1, transB=1), batch_axis=1),
    "matmul": Layer(((5,),), _matmul(5, 4)),
    "matmul_add": Layer(((5,),), _matmul(5, 4, bias=(4,))),
    "matmul_tokens": Layer(((2, 5),), _matmul(5, 3, bias=(3,))),
    "matmul_left": Layer(((5, 2),), _left),
    "conv_1d": Layer(((2, 7),), _conv(3, 2, 3, bias=3, strides=[2], pads=[2, 1])),
    "conv_2d": Layer(((2, 4, 5),), _conv(3, 2, 3, 2, bias=3, pads=[1, 0, 1, 1])),
    "conv_2d_groups": Layer(((4, 5, 4),), _conv(6, 2, 3, 3, bias=6, group=2, strides=[2, 1], pads=[1, 1, 0, 1])),
    "conv_2d_depthwise": Layer(((3, 4, 4),), _conv(3, 1, 2, 2, bias=None, group=3, dilations=[2, 1])),
    "conv_3d": Layer(((2, 3, 3, 4),), _conv(2, 2, 2, 2, 2, bias=2, strides=[1, 1, 2], pads=[0, 1, 0, 0, 1, 0])),
    "conv_transpose": Layer(
        ((2, 3, 3),),
        _conv(2, 3, 3, 3, bias=3, op="ConvTranspose", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    ),
    "conv_transpose_groups": Layer(((4, 4),), _conv(4, 2, 3, bias=None, op="ConvTranspose", group=2, strides=[2])),
    "batchnorm": Layer(((4,),), _batchnorm(4)),
    "batchnorm_2d": Layer(((3, 2, 2),), _batchnorm(3)),
    "add_constant": Layer(((3, 2, 2),), _with_constant("Add", 3, 1, 1)),
    "add_two": Layer(((4,), (4,)), _plain("Add")),
    "add_broadcast": Layer(((3, 2, 2), (3, 1, 1)), _plain("Add")),
    "sub_two": Layer(((4,), (4,)), _plain("Sub")),
    "sub_constant": Layer(((4,),), _with_constant("Sub", 4)),
    "sub_from_constant": Layer(((4,),), _with_constant("Sub", 4, first=True)),
    "sum_three": Layer(((4,), (1,), (4,)), _plain("Sum")),
    "mul_constant": Layer(((3, 2, 2),), _with_constant("Mul", 3, 1, 1)),
    "mul_constant_first": Layer(((1,),), _with_constant("Mul", 1, 5, first=True)),
    "neg": Layer(((4,),), _plain("Neg")),
    "mean_two": Layer(((4,), (4,)), _plain("Mean"), mean=True),
    "average_pool": Layer(((2, 4, 4),), _plain("AveragePool", kernel_shape=[2, 2], strides=[2, 2]), mean=True),
    "average_pool_padded": Layer(
        ((2, 5, 4),), _plain("AveragePool", kernel_shape=[2, 2], strides=[2, 1], pads=[1, 1, 0, 0]), mean=True
    ),
    "global_average": Layer(((2, 4, 2),), _plain("GlobalAveragePool"), mean=True),
    "reduce_mean": Layer(((4, 2),), _plain("ReduceMean", [1], keepdims=0), mean=True),
    "reduce_sum": Layer(((4, 2),), _plain("ReduceSum", [-1], keepdims=1), mean=True),
    "times_einsum": Layer(((2, 5),), _einsum("bti,oi->bto", 4, 5)),
    "total_einsum": Layer(((2, 3),), _einsum("bij->bj"), mean=True),
    "total_running": Layer(((4, 2),), _plain("CumSum", 1), mean=True),
    "upsized": Layer(((1, 2, 4),), _resize(1, 1, 2, 0.5, mode="linear"), mean=True),
}


def run_layer(name: str, inputs: list[np.ndarray], sign: int = 0) -> np.ndarray:
    """Run one layer alone in float64 by onnx's reference implementation; the batch comes first."""
    layer = LAYERS[name]
    net = Net(sign=sign, seed=sorted(LAYERS).index(name))
    names = []
    for i, x in enumerate(inputs):
        shape: list[int | str] = list(x.shape[1:])
        shape.insert(layer.batch_axis, "N")
        names.append(net.input(f"x{i}", *shape))
    output = layer.build(net, names, "layer")
    feeds = {n: np.moveaxis(x, 0, layer.batch_axis) for n, x in zip(names, inputs, strict=True)}
    return run_double(net.model(output), feeds)[output]


def book(*entries: tuple[dict[str, Any], str, dict[str, Any]]) -> LRP:
    """A rule book from (where, rule, parameters), with what moves, passes and wins below."""
    rest: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
        ({"kind": "movement"}, "route", {}),
        ({"kind": "pointwise"}, "pass", {}),
        ({"op": ["MaxPool", "ReduceMax"]}, "winner_takes_all", {}),
        ({"kind": ["linear", "bilinear"]}, "epsilon", {"epsilon": 0.25}),
    ]
    return LRP(Composite("test", "test", tuple(Assignment(*entry) for entry in (*entries, *rest))))


# ---- one node under a rule ---------------------------------------------------------------------------------------


def explain(net: Net, z: str, rule: str, feeds: Arrays, layers: tuple[str, ...] = (), **parameters: Any) -> Arrays:
    """Explain z with the rule at node "layer", relevance of z given by the feed "r"; return all outputs in float64."""
    result = rewritten(net.model(z), rule, layers, **parameters)
    found = run_double(result.model, {"start" if k == "r" else k: v for k, v in feeds.items()})
    live = [n for n in result.relevance if n in feeds]
    total = sum(found[f"relevance/{n}"].astype(float).sum() for n in live) + found["absorbed"].sum()
    np.testing.assert_allclose(total, found["score"].sum(), rtol=1e-9, atol=1e-9)
    return found


def rewritten(model: onnx.ModelProto, rule: str, layers: tuple[str, ...] = (), **parameters: Any) -> Explained:
    """Return the explained model."""
    method = book(({"name": "layer"}, rule, parameters))
    output = model.graph.output[0].name  # named, so that a softmax at the end is not stepped over
    return rewrite_with_accounts(model, method, output=output, layers=layers, start="input", accounts="total")


def accounts(net: Net, z: str, rule: str, feeds: Arrays, **parameters: Any) -> dict[str, float]:
    """Return what the node "layer" booked, summed over the batch."""
    method = book(({"name": "layer"}, rule, parameters))
    result = rewrite_with_accounts(net.model(z), method, start="input", accounts="node")
    found = run_double(result.model, {"start" if k == "r" else k: v for k, v in feeds.items()})
    booked: dict[str, float] = {}
    for entry in result.ledger:
        if entry.node == "layer":
            booked[entry.account] = booked.get(entry.account, 0.0) + float(found[entry.output].sum())
    return booked
