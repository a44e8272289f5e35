"""What a construction is: the shapes it is tried at, the graph it is built in, and the convolutions around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray
OPSET, IR = 18, 9
BLOCK = 16  # channels of which ONNX Runtime's blocked layout takes multiples, with AVX-512 or without
LIMIT = 1e-5  # of the largest element: what a way may differ from the first by
ZERO = np.array(0.0)


@dataclass(frozen=True)
class Case:
    """Shapes of one measurement.

    Attributes:
        channels: of the operator's input.
        made: channels of its output; default: as many.
        size: height and width of its input; number of places for what has one axis of them.
        kernel: height and width of kernel or window.
        stride: of kernel or window.
        group: of a convolution.
        batch: samples.
    """

    channels: int
    made: int = 0
    size: int = 1
    kernel: int = 1
    stride: int = 1
    group: int = 1
    batch: int = 1

    @property
    def outputs(self) -> int:
        """Channels of the operator's output."""
        return self.made or self.channels

    @property
    def pad(self) -> int:
        """Padding at every side, with which stride 1 keeps the size; windows that do not overlap have none."""
        return 0 if self.kernel == self.stride else (self.kernel - 1) // 2

    @property
    def small(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def left(self) -> int:
        """What the stride leaves over at the end, and ConvTranspose gives back as output_padding."""
        return (self.size + 2 * self.pad - self.kernel) % self.stride

    @property
    def tiled(self) -> bool:
        """True if windows lie side by side and leave nothing over."""
        return self.kernel == self.stride and self.left == 0

    def __str__(self) -> str:
        channels = f"{self.channels} → {self.made}" if self.made else f"{self.channels}"
        parts = [channels, f"{self.size}²" if self.size > 1 else "", f"{self.kernel}×{self.kernel}" * (self.kernel > 1)]
        parts += [f"stride {self.stride}" * (self.stride > 1), f"{self.group} groups" * (self.group > 1)]
        return ", ".join(filter(None, [*parts, f"batch {self.batch}"]))


Operand = str | Array | None


class Graph:
    """A graph in the making: operators by name, arrays as initializers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Operand, **attrs: Any) -> str:
        """Add an operator, and return its output."""
        return self.many(op, *inputs, outputs=1, **attrs)[0]

    def many(self, op: str, *inputs: Operand, outputs: int, **attrs: Any) -> list[str]:
        """Add an operator with several outputs, and return them."""
        names = ["" if x is None else x if isinstance(x, str) else self.const(x) for x in inputs]
        made = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, **attrs))
        return made

    def const(self, array: Array) -> str:
        """Add an initializer, and return its name; floats become float32."""
        array = np.asarray(array)
        kept = array.astype(np.float32) if array.dtype.kind == "f" else array
        self.weights.append(
            numpy_helper.from_array(np.ascontiguousarray(kept).reshape(array.shape), f"w{len(self.weights)}")
        )
        return self.weights[-1].name

    def conv(self, x: str, w: Array, *, pads: Sequence[int] | int = 0, stride: int = 1, group: int = 1) -> str:
        """Add a convolution of two dimensions; `pads` is one number, or one for each begin, then for each end."""
        padded = [pads] * 4 if isinstance(pads, int) else list(pads)
        k = list(w.shape[2:])
        return self("Conv", x, w, kernel_shape=k, pads=padded, strides=[stride] * 2, group=group)

    def transposed(self, d: str, w: Array, case: Case, group: int | None = None) -> str:
        """Add the ConvTranspose that goes back to the case's size."""
        return self(
            "ConvTranspose",
            d,
            w,
            kernel_shape=[case.kernel] * 2,
            pads=[case.pad] * 4,
            strides=[case.stride] * 2,
            output_padding=[case.left] * 2,
            group=case.group if group is None else group,
        )

    def shuffled(self, x: str, case: Case) -> str:
        """Add a DepthToSpace by the case's stride, and cut off what is beyond its size."""
        y = self("DepthToSpace", x, blocksize=case.stride, mode="DCR") if case.stride > 1 else x
        return self.cut(y, 0, case.size) if case.size % case.stride else y

    def cut(self, x: str, begin: int, end: int) -> str:
        """Add a Slice of height and width."""
        return self("Slice", x, ints(begin, begin), ints(end, end), ints(2, 3))

    def guarded(self, x: str, shape: Sequence[int]) -> str:
        """Add a depthwise 1x1 convolution, where the blocked layout takes the channels; it keeps signs and ties."""
        if len(shape) != 4 or shape[1] % BLOCK:
            return x
        channels = shape[1]
        return self.conv(x, np.linspace(0.75, 1.25, channels).reshape(channels, 1, 1, 1), group=channels)

    def model(self, inputs: Mapping[str, Array], outputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
        """The model that the graph is of."""
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()]
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, "construction", given, made, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def ints(*values: int) -> Array:
    """Integers as ONNX wants axes, shapes and places."""
    return np.array(values, np.int64)


# (graph, the family's inputs by name, case) -> outputs, each with its shape; None where the way does not apply
Made = dict[str, tuple[int, ...]]
Way = Callable[[Graph, Mapping[str, str], Case], "Made | None"]


@dataclass(frozen=True)
class Family:
    """One thing to be computed.

    Attributes:
        title: what it is.
        inputs: random inputs of a case.
        ways: how it may be computed; the first one is what the others are compared with.
        used: the way that onnx_lrp takes.
        cases: the shapes.
        limits: ways that may differ by more than LIMIT, since they round more.
    """

    title: str
    inputs: Callable[[Case], dict[str, Array]]
    ways: Mapping[str, Way]
    used: Callable[[Case], str]
    cases: Sequence[Case]
    limits: Mapping[str, float] = field(default_factory=dict)


def model_of(family: Family, way: str, case: Case) -> tuple[onnx.ModelProto, dict[str, Array]] | None:
    """The model that computes a case in one way, between convolutions, and its inputs; None where it does not apply."""
    graph, given = Graph(), family.inputs(case)
    tensors = {name: graph.guarded(name, array.shape) for name, array in given.items()}
    made = family.ways[way](graph, tensors, case)
    if made is None:
        return None
    outputs = {graph.guarded(name, shape): shape for name, shape in made.items()}
    return graph.model(given, outputs), given


def numbers(*shape: int, seed: int = 0) -> Array:
    """Random numbers of either sign."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights_of(case: Case) -> Array:
    """Random weights (M, C / group, k, k) of the case's convolution, in float64."""
    shape = (case.outputs, case.channels // case.group, case.kernel, case.kernel)
    return np.random.default_rng(1).standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def picture(case: Case, channels: int | None = None) -> tuple[int, ...]:
    """Shape of what the operator reads."""
    return (case.batch, channels or case.channels, case.size, case.size)


def cotangent(case: Case) -> tuple[int, ...]:
    """Shape of what it makes."""
    return (case.batch, case.outputs, case.small, case.small)
