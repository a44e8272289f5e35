"""Gradients of random small graphs against torch's autograd.

A graph is drawn node by node from a table of steps. Each step adds ONNX nodes and does the same in torch, so that both
sides see the same graph: tensors read several times, products of a tensor with itself, several inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.adjoint_reference import run_onnxruntime, run_reference
from tests.adjoint_tools import EXACT, close, gradient_model

torch = pytest.importorskip("torch")
F = torch.nn.functional

GRAPHS, BATCH, FLOAT32 = 100, 2, 1e-4


class Graph:
    """A graph under construction, in ONNX and in torch: ``pool`` holds pairs (name, tensor)."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.inputs: dict[str, Any] = {}
        self.pool: list[tuple[str, Any]] = []
        self.read: set[str] = set()
        self.seen: set[str] = set()

    def input(self, *shape: int) -> None:
        name = f"x{len(self.inputs)}"
        tensor = torch.tensor(self.rng.standard_normal(shape), requires_grad=True)
        self.inputs[name] = tensor
        self.pool.append((name, tensor))

    def pick(self, rank: int | None = None) -> tuple[str, Any]:
        """One of the latest tensors, of some rank."""
        fitting = [p for p in self.pool if rank is None or p[1].ndim == rank][-6:]
        if not fitting:
            raise LookupError
        return fitting[self.rng.integers(len(fitting))]

    def weight(self, *shape: int) -> tuple[str, Any]:
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1))

    def constant(self, array: Any) -> tuple[str, Any]:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(array)
        return name, torch.tensor(self.weights[name])

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))[0]

    def emit(self, op: str, names: Sequence[str], tensors: Any, **attrs: Any) -> None:
        """A node and what torch makes of it: a tensor, or one per output."""
        results = tensors if isinstance(tensors, tuple) else (tensors,)
        outputs = [f"t{len(self.pool)}_{k}" for k in range(len(results))]
        self.nodes.append(helper.make_node(op, names, outputs, **attrs))
        self.read.update(names)
        self.seen.add(op)
        self.pool.extend(zip(outputs, results, strict=True))

    def model(self, dtype: Any, outputs: Sequence[str]) -> onnx.ModelProto:
        """The ONNX model, its first axis of free length."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        infos = [helper.make_tensor_value_info(name, kind, ["N", *x.shape[1:]]) for name, x in self.inputs.items()]
        results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        tensors = [
            numpy_helper.from_array(w if w.dtype.kind == "i" else w.astype(dtype), n) for n, w in self.weights.items()
        ]
        graph = helper.make_graph(self.nodes, "random", infos, results, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        shapes = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.output}
        for info in model.graph.output:
            info.CopyFrom(shapes[info.name])
        return model


# ---- steps -----------------------------------------------------------------------------------------------------------

STEPS: list[Callable[[Graph], None]] = []
UNARY: dict[str, Callable[[Any], Any]] = {
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Softplus": F.softplus,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Elu": F.elu,
    "Mish": F.mish,
    "Identity": lambda x: x.clone(),
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
}
REDUCE: dict[str, Callable[..., Any]] = {
    "ReduceSum": torch.sum,
    "ReduceMean": torch.mean,
    "ReduceMax": torch.amax,
    "ReduceL2": torch.linalg.vector_norm,
    "ReduceLogSumExp": torch.logsumexp,
}


def step(f: Callable[[Graph], None]) -> Callable[[Graph], None]:
    STEPS.append(f)
    return f


@step
def unary(g: Graph) -> None:
    op = list(UNARY)[g.rng.integers(len(UNARY))]
    name, x = g.pick(4 if op == "GlobalAveragePool" else None)
    g.emit(op, [name], UNARY[op](x))


@step
def binary(g: Graph) -> None:
    """Of two tensors that broadcast, perhaps of one with itself."""
    op = ["Add", "Sub", "Mul", "Max", "Min"][g.rng.integers(5)]
    name, x = g.pick()
    other, y = g.pick(x.ndim)
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        other, y = name, x
    f = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Max": torch.maximum, "Min": torch.minimum}[op]
    g.emit(op, [name, other], f(x, y))


@step
def quotient(g: Graph) -> None:
    """X / (1 + y²)."""
    name, x = g.pick()
    g.emit("Mul", [name, name], x * x)
    square, y = g.pool[-1]
    one, number = g.constant(1.0)
    g.emit("Add", [square, one], y + number)
    below, z = g.pool[-1]
    g.emit("Div", [name, below], x / z)


@step
def matmul(g: Graph) -> None:
    name, x = g.pick()
    weight, w = g.weight(x.shape[-1], int(g.rng.integers(2, 5)))
    g.emit("MatMul", [name, weight], x @ w)


@step
def gemm(g: Graph) -> None:
    name, x = g.pick(2)
    weight, w = g.weight(3, x.shape[1])
    bias, b = g.weight(3)
    g.emit("Gemm", [name, weight, bias], x @ w.T + b, transB=1)


@step
def gram(g: Graph) -> None:
    """A product of two live tensors."""
    name, x = g.pick(3)
    g.emit("Transpose", [name], x.transpose(1, 2), perm=[0, 2, 1])
    turned, y = g.pool[-1]
    g.emit("MatMul", [name, turned], x @ y)


@step
def conv(g: Graph) -> None:
    name, x = g.pick(4)
    stride = int(g.rng.integers(1, 3))
    weight, w = g.weight(3, x.shape[1], 3, 3)
    bias, b = g.weight(3)
    g.emit("Conv", [name, weight, bias], F.conv2d(x, w, b, stride, 1), strides=[stride] * 2, pads=[1] * 4)


@step
def pool(g: Graph) -> None:
    name, x = g.pick(4)
    if min(x.shape[2:]) < 2:
        raise LookupError
    op, f = (("MaxPool", F.max_pool2d), ("AveragePool", F.avg_pool2d))[g.rng.integers(2)]
    g.emit(op, [name], f(x, 2, 1), kernel_shape=[2, 2], strides=[1, 1])


@step
def reduction(g: Graph) -> None:
    op = list(REDUCE)[g.rng.integers(len(REDUCE))]
    name, x = g.pick()
    if x.ndim < 2:
        raise LookupError
    axis, keep = int(g.rng.integers(1, x.ndim)), bool(g.rng.integers(2))
    y = REDUCE[op](x, dim=axis, keepdim=keep)
    g.emit(op, [name, g.ints(axis)], y, keepdims=int(keep))


@step
def softmax(g: Graph) -> None:
    name, x = g.pick()
    op, f = (("Softmax", torch.softmax), ("LogSoftmax", torch.log_softmax))[g.rng.integers(2)]
    g.emit(op, [name], f(x, -1), axis=-1)


@step
def norm(g: Graph) -> None:
    name, x = g.pick()
    scale, s = g.weight(x.shape[-1])
    shift, b = g.weight(x.shape[-1])
    y = F.layer_norm(x, x.shape[-1:], s, b, 2**-7)
    g.emit("LayerNormalization", [name, scale, shift], y, epsilon=2**-7)


@step
def reshape(g: Graph) -> None:
    name, x = g.pick()
    g.emit("Reshape", [name, g.ints(0, -1)], x.reshape(len(x), -1)) if x.ndim > 1 else softmax(g)


@step
def transpose(g: Graph) -> None:
    name, x = g.pick(4)
    g.emit("Transpose", [name], x.permute(0, 2, 3, 1), perm=[0, 2, 3, 1])


@step
def cut(g: Graph) -> None:
    name, x = g.pick()
    axis = x.ndim - 1
    if x.ndim < 2 or x.shape[axis] < 2:
        raise LookupError
    g.emit("Slice", [name, g.ints(1), g.ints(999), g.ints(axis)], x.narrow(axis, 1, x.shape[axis] - 1))


@step
def split(g: Graph) -> None:
    name, x = g.pick()
    if x.ndim < 2 or x.shape[-1] < 3:
        raise LookupError
    sizes = [1, x.shape[-1] - 1]
    g.emit("Split", [name, g.ints(*sizes)], tuple(t.clone() for t in x.split(sizes, -1)), axis=-1)


@step
def concat(g: Graph) -> None:
    name, x = g.pick()
    other, y = g.pick(x.ndim)
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        other, y = name, x
    g.emit("Concat", [name, other], torch.cat([x, y], -1), axis=-1) if x.ndim > 1 else softmax(g)


@step
def gather(g: Graph) -> None:
    name, x = g.pick()
    if x.ndim < 2:
        raise LookupError
    picked = [int(i) for i in g.rng.integers(0, x.shape[-1], 3)]
    g.emit("Gather", [name, g.ints(*picked)], x[..., picked], axis=-1)


@step
def pad(g: Graph) -> None:
    name, x = g.pick(4)
    mode = ("constant", "edge")[g.rng.integers(2)]
    y = F.pad(x, (1, 0, 0, 1), "replicate" if mode == "edge" else mode)
    g.emit("Pad", [name, g.ints(0, 0, 0, 1, 0, 0, 1, 0)], y, mode=mode)


def drawn(seed: int) -> tuple[Graph, list[str]]:
    """A graph of 5 to 15 nodes, and what it gives back: what nobody reads, up to three tensors."""
    g = Graph(seed)
    g.input(BATCH, 2, 4, 3)
    g.input(BATCH, 4)
    if seed % 2:
        g.input(BATCH, 3, 4)
    size = int(g.rng.integers(5, 14))
    while len(g.nodes) < size:
        try:
            STEPS[g.rng.integers(len(STEPS))](g)
        except LookupError:
            continue
    ends = [name for name, _ in g.pool if name not in g.read and name not in g.inputs]
    return g, ends[-3:]


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_gradient_is_that_of_torch(seed: int) -> None:
    g, outputs = drawn(seed)
    assert 5 <= len(g.nodes) <= 15
    tensors = dict(g.pool)
    u = {f"cotangent/{n}": g.rng.standard_normal(tuple(tensors[n].shape)) for n in outputs}
    total = sum((tensors[n] * torch.tensor(u[f"cotangent/{n}"])).sum() for n in outputs)
    leaves = list(g.inputs.values())
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    feeds = {name: x.detach().numpy() for name, x in g.inputs.items()}
    for run, dtype, tolerance in ((run_reference, np.float64, EXACT), (run_onnxruntime, np.float32, FLOAT32)):
        model = gradient_model(g.model(dtype, outputs), list(g.inputs))
        found = run(model, {name: x.astype(dtype) for name, x in {**feeds, **u}.items()})
        for n in outputs:
            assert close(found[n], tensors[n].detach().numpy(), tolerance), f"{n} itself differs"
        for (name, x), gradient in zip(g.inputs.items(), expected, strict=True):
            wanted = np.zeros(tuple(x.shape)) if gradient is None else gradient.numpy()
            assert close(found[f"gradient/{name}"], wanted, tolerance), f"{run.__name__}: {name}"


def test_the_graphs_are_mixed() -> None:
    """Every step is drawn; many graphs have several outputs, and tensors that are read twice."""
    graphs = [drawn(seed) for seed in range(GRAPHS)]
    assert set.union(*(g.seen for g, _ in graphs)) >= {
        *UNARY,
        *REDUCE,
        "Conv",
        "MaxPool",
        "AveragePool",
        "Split",
        "Gather",
    }
    assert sum(len(outputs) > 1 for _, outputs in graphs) > GRAPHS / 3
