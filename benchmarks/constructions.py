"""Which ONNX operators compute an adjoint fastest: the measurements that the lowering's choices rest on.

    python -m benchmarks.constructions --write docs/performance.md

Each family is one thing to be computed, with several ways to compute it, at shapes that networks have. Every way is
tried in context: what it reads comes out of a convolution and what it makes goes into one (depthwise 1x1, hardly more
than a pass over memory), so that leaving ONNX Runtime's blocked layout and coming back is paid for. Ways that are not
equal to the first one are refused, not timed. Ways take turns; numbers are medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.measure import Call, command, described, publish, samples
from onnx_lrp.runtime import session_options

Array = np.ndarray
OPSET, IR = 18, 9
BLOCK = 16  # channels of which ONNX Runtime's blocked layout takes multiples
LIMIT = 1e-5  # of the largest element: what a way may differ from the first by
EPSILON = 1e-6
STEEP = 3e38  # HardSigmoid with this slope is a step: 1 for whatever is above zero
LOWEST = float(np.finfo(np.float32).min)
ENOUGH = 0.05  # seconds that a sample lasts at least


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


# ---- convolutions, stride 1 ------------------------------------------------------------------------------------------


def flipped(w: Array, group: int = 1) -> Array:
    """Weights with in- and output channels exchanged per group, and height and width reversed."""
    m, c, *k = w.shape
    turned = w.reshape(group, m // group, c, *k).swapaxes(1, 2).reshape(group * c, m // group, *k)
    return turned[..., ::-1, ::-1]


def _flipped_conv(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    w = flipped(weights_of(case), case.group)
    return {g.conv(t["d"], w, pads=case.kernel - 1 - case.pad, group=case.group): picture(case)}


def _transposed(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    return {g.transposed(t["d"], weights_of(case), case): picture(case)}


def _product(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
    if case.kernel > 1 or case.group > 1:
        return None
    w = weights_of(case).reshape(case.outputs, case.channels).T
    rows = g("Reshape", t["d"], ints(0, case.outputs, case.size**2))
    return {g("Reshape", g("MatMul", w, rows), ints(0, *picture(case)[1:])): picture(case)}


# Lavin and Gray 2016: B^T, G and A^T of F(2x2, 3x3) and F(4x4, 3x3).
WINOGRAD = {
    2: (
        np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
        np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    ),
    4: (
        np.array(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ]
        ),
        np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
        np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
    ),
}


def _winograd(g: Graph, t: Mapping[str, str], case: Case, m: int) -> Made | None:
    """Tiles of m x m, by a depthwise convolution with one kernel for each element of a transformed tile."""
    if case.kernel != 3 or case.group > 1:
        return None
    to_tile, to_kernel, back = WINOGRAD[m]
    tile, k, tiles = m + 2, (m + 2) ** 2, -(-case.size // m)
    read, made = case.outputs, case.channels
    kernels = np.tile(np.einsum("ai,bj->abij", to_tile, to_tile).reshape(k, 1, tile, tile), (read, 1, 1, 1))
    w = np.einsum("ai,mcij,bj->abmc", to_kernel, flipped(weights_of(case)), to_kernel).reshape(k, made, read)
    end = tiles * m - case.size + 1
    v = g.conv(t["d"], kernels.astype(float), pads=[1, 1, end, end], stride=m, group=read)
    v = g("Transpose", g("Reshape", v, ints(0, read, k, tiles**2)), perm=[0, 2, 1, 3])
    product = g("Transpose", g("MatMul", w, v), perm=[0, 2, 1, 3])
    y = g("MatMul", np.einsum("ai,bj->abij", back, back).reshape(m * m, k).astype(float), product)
    y = g("DepthToSpace", g("Reshape", y, ints(0, made * m * m, tiles, tiles)), blocksize=m, mode="CRD")
    return {g.cut(y, 0, case.size) if tiles * m != case.size else y: picture(case)}


def _stride_one(case: Case) -> str:
    return "Conv, flipped" if case.group > 1 or case.channels >= BLOCK else "ConvTranspose"


STRIDE_ONE = Family(
    "Adjoint of Conv, stride 1",
    lambda case: {"d": numbers(*cotangent(case))},
    {
        "Conv, flipped": _flipped_conv,
        "ConvTranspose": _transposed,
        "MatMul": _product,
        "Winograd 2×2": functools.partial(_winograd, m=2),
        "Winograd 4×4": functools.partial(_winograd, m=4),
    },
    _stride_one,
    [
        Case(64, 64, 224, 3),
        Case(128, 128, 112, 3),
        Case(256, 256, 56, 3),
        Case(512, 512, 28, 3),
        Case(512, 512, 14, 3),
        Case(64, 64, 56, 3),
        Case(64, 64, 56, 3, batch=8),
        Case(512, 512, 7, 3),
        Case(64, 256, 56),
        Case(256, 64, 56),
        Case(256, 1024, 14),
        Case(512, 2048, 7, batch=8),
        Case(3, 64, 224, 3),
        Case(96, 96, 112, 3, group=96),
        Case(576, 576, 14, 3, group=576),
        Case(128, 128, 28, 3, group=32),
    ],
    {"Winograd 4×4": 1e-4},
)


# ---- convolutions with strides ---------------------------------------------------------------------------------------


def taps(case: Case, rest: int) -> list[tuple[int, int]]:
    """For places of one axis with this rest by the stride: taps of the kernel, and how far off the cotangent they read.

    Place u = s·q + rest of the input met tap k at place i of the output where s·i = u + pad - k.
    """
    first, shift = (rest + case.pad) % case.stride, (rest + case.pad) // case.stride
    return [(k, shift - j) for j, k in enumerate(range(first, case.kernel, case.stride))]


def _by_rest(w: Array, case: Case, rows: int, columns: int, low: int, length: int) -> Array:
    """The kernel (C, M, length, length) that makes the places with these rests."""
    made = np.zeros((w.shape[1], w.shape[0], length, length))
    for k, i in taps(case, rows):
        for kk, j in taps(case, columns):
            made[:, :, i - low, j - low] = w[:, :, k, kk].T
    return made


def sub_pixel(g: Graph, d: str, w: Array, case: Case) -> str:
    """One Conv that makes the s·s places of every stride as channels, then DepthToSpace."""
    rests = range(case.stride)
    offsets = [i for rest in rests for _, i in taps(case, rest)]
    low, high = min(offsets), max(offsets)
    length = high - low + 1
    kernel = np.concatenate([_by_rest(w, case, a, b, low, length) for a in rests for b in rests])
    end = -(-case.size // case.stride) - case.small + length - 1 + low
    return g.shuffled(g.conv(d, kernel, pads=[-low, -low, end, end]), case)


def _sub_pixel(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
    return None if case.kernel < case.stride else {sub_pixel(g, t["d"], weights_of(case), case): picture(case)}


def _small_convs(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
    """The same with a Conv of its own for each of the s·s places, none of them with taps that are zero."""
    if case.kernel < case.stride:
        return None
    w, parts = weights_of(case), []
    wanted = -(-case.size // case.stride)
    for a in range(case.stride):
        for b in range(case.stride):
            rows, columns = taps(case, a), taps(case, b)
            lows = [min(0, *(i for _, i in found)) for found in (rows, columns)]
            lengths = [max(i for _, i in found) - low + 1 for found, low in zip((rows, columns), lows, strict=True)]
            kernel = np.zeros((case.channels, case.outputs, *lengths))
            for k, i in rows:
                for kk, j in columns:
                    kernel[:, :, i - lows[0], j - lows[1]] = w[:, :, k, kk].T
            ends = [wanted - case.small + n - 1 + low for n, low in zip(lengths, lows, strict=True)]
            parts.append(g.conv(t["d"], kernel, pads=[-lows[0], -lows[1], *ends]))
    return {g.shuffled(g("Concat", *parts, axis=1), case): picture(case)}


def _stuffed(g: Graph, x: str, channels: int, case: Case) -> str:
    """Zeros between the places, by channels of zeros and DepthToSpace."""
    zeros = g("Pad", x, ints(0, 0, 0, 0, 0, (case.stride**2 - 1) * channels, 0, 0))
    return g("DepthToSpace", zeros, blocksize=case.stride, mode="DCR")


def _zeros_between(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
    begin = case.kernel - 1 - case.pad
    end = case.size - case.small * case.stride - begin + case.kernel - 1
    if end < 0:
        return None
    stuffed = _stuffed(g, t["d"], case.outputs, case)
    return {g.conv(stuffed, flipped(weights_of(case)), pads=[begin, begin, end, end]): picture(case)}


def _conv_then_zeros(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
    if case.kernel > 1:
        return None
    made = _stuffed(g, g.conv(t["d"], flipped(weights_of(case))), case.channels, case)
    return {g.cut(made, 0, case.size) if case.small * case.stride != case.size else made: picture(case)}


STRIDED = Family(
    "Adjoint of Conv with strides",
    lambda case: {"d": numbers(*cotangent(case))},
    {
        "ConvTranspose": _transposed,
        "Conv, sub-pixel": _sub_pixel,
        "a Conv for each place": _small_convs,
        "zeros between, Conv": _zeros_between,
        "Conv, zeros between": _conv_then_zeros,
    },
    lambda case: "ConvTranspose",
    [
        Case(128, 128, 56, 3, 2),
        Case(256, 256, 28, 3, 2),
        Case(512, 512, 14, 3, 2),
        Case(512, 512, 14, 3, 2, batch=8),
        Case(256, 512, 56, 1, 2),
        Case(1024, 2048, 14, 1, 2),
        Case(1024, 2048, 14, 1, 2, batch=8),
        Case(3, 64, 224, 7, 2),
        Case(3, 64, 224, 7, 2, batch=8),
        Case(3, 32, 224, 3, 2),
        Case(3, 768, 224, 16, 16),
    ],
)

DEPTHWISE = Family(
    "Adjoint of a depthwise Conv with strides",
    lambda case: {"d": numbers(*cotangent(case))},
    {
        "ConvTranspose": _transposed,
        "zeros between, Conv": lambda g, t, case: {
            g.conv(
                _stuffed(g, t["d"], case.outputs, case),
                flipped(weights_of(case), case.group),
                pads=[1, 1, case.size - 2 * case.small + 1, case.size - 2 * case.small + 1],
                group=case.group,
            ): picture(case)
        },
        "Conv, sub-pixel": lambda g, t, case: _depthwise_sub_pixel(g, t, case),
    },
    lambda case: "ConvTranspose",
    [Case(96, 96, 112, 3, 2, group=96), Case(144, 144, 56, 3, 2, group=144), Case(576, 576, 14, 3, 2, group=576)],
)


def _depthwise_sub_pixel(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    """s·s kernels for every channel, whose results lie side by side: DepthToSpace in the order CRD."""
    w = weights_of(case)
    offsets = [i for rest in range(case.stride) for _, i in taps(case, rest)]
    low, length = min(offsets), max(offsets) - min(offsets) + 1
    kernel = np.zeros((case.channels, case.stride, case.stride, length, length))
    for a in range(case.stride):
        for b in range(case.stride):
            for k, i in taps(case, a):
                for kk, j in taps(case, b):
                    kernel[:, a, b, i - low, j - low] = w[:, 0, k, kk]
    end = -(-case.size // case.stride) - case.small + length - 1 + low
    flat = kernel.reshape(-1, 1, length, length)
    made = g.conv(t["d"], flat, pads=[-low, -low, end, end], group=case.channels)
    made = g("DepthToSpace", made, blocksize=case.stride, mode="CRD")
    return {g.cut(made, 0, case.size) if case.size % case.stride else made: picture(case)}


# ---- z-plus of inputs of either sign ---------------------------------------------------------------------------------


def parts_of(w: Array) -> tuple[Array, Array]:
    """max(w, 0) and min(w, 0)."""
    return np.maximum(w, 0), np.minimum(w, 0)


def _parts(g: Graph, x: str) -> tuple[str, str]:
    return g("Relu", x), g("Min", x, np.array(0.0))


def _picked(g: Graph, x: str, both: str) -> str:
    """X times the first half of the channels where x is above zero, times the second where it is not."""
    first, second = g.many("Split", both, outputs=2, axis=1, num_outputs=2)
    return g("Mul", x, g("Where", g("Greater", x, np.array(0.0)), first, second))


def _two_back(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    shares = [
        g("Mul", part, g.transposed(t["d"], w, case))
        for part, w in zip(_parts(g, t["x"]), parts_of(weights_of(case)), strict=True)
    ]
    return {g("Add", *shares): picture(case)}


def _stacked_back(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    return {_picked(g, t["x"], g.transposed(t["d"], np.hstack(parts_of(weights_of(case))), case)): picture(case)}


def _stacked_sub_pixel(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    return {_picked(g, t["x"], sub_pixel(g, t["d"], np.hstack(parts_of(weights_of(case))), case)): picture(case)}


def _two_forward(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    parts = zip(_parts(g, t["x"]), parts_of(weights_of(case)), strict=True)
    z = [g.conv(part, w, pads=case.pad, stride=case.stride) for part, w in parts]
    return _forward(g, t, case, g("Add", *z))


def _stacked_forward(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    both = g("Concat", *_parts(g, t["x"]), axis=1)
    z = g.conv(both, np.hstack(parts_of(weights_of(case))), pads=case.pad, stride=case.stride)
    return _forward(g, t, case, z)


def _forward(g: Graph, t: Mapping[str, str], case: Case, z: str) -> Made:
    y = g.conv(t["x"], weights_of(case), pads=case.pad, stride=case.stride)
    return {y: cotangent(case), z: cotangent(case)}


def _half_forward(g: Graph, t: Mapping[str, str], case: Case, *, folded: bool) -> Made:
    """x+ w+ + x- w- = (x w + |x| |w|) / 2, of which the forward pass has the first summand."""
    w = weights_of(case)
    y, magnitude = (
        g.conv(x, kernel, pads=case.pad, stride=case.stride)
        for x, kernel in ((t["x"], w), (g("Abs", t["x"]), np.abs(w) / 2 if folded else np.abs(w)))
    )
    half = np.array(0.5)
    z = g("Add", g("Mul", y, half), magnitude) if folded else g("Mul", g("Add", y, magnitude), half)
    return {y: cotangent(case), z: cotangent(case)}


FIRST_BACK = Family(
    "z⁺ backwards to pictures of either sign",
    lambda case: {"x": numbers(*picture(case)), "d": numbers(*cotangent(case), seed=2)},
    {
        "two ConvTransposes": _two_back,
        "one, weights stacked": _stacked_back,
        "Conv, sub-pixel, stacked": _stacked_sub_pixel,
    },
    lambda case: "two ConvTransposes",
    [
        Case(3, 64, 224, 7, 2),
        Case(3, 64, 224, 7, 2, batch=8),
        Case(3, 64, 224, 3),
        Case(3, 64, 224, 3, batch=8),
        Case(3, 32, 224, 3, 2),
        Case(3, 96, 224, 11, 4),
        Case(1, 32, 28, 3, batch=32),
    ],
)
SIGNED_FORWARD = Family(
    "z⁺ forward of inputs of either sign, with the forward pass",
    lambda case: {"x": numbers(*picture(case))},
    {
        "two Convs": _two_forward,
        "one, channels stacked": _stacked_forward,
        "(y + |x| ∗ |w|) / 2": functools.partial(_half_forward, folded=False),
        "y / 2 + |x| ∗ |w / 2|": functools.partial(_half_forward, folded=True),
    },
    lambda case: "two Convs",
    [
        Case(3, 64, 224, 7, 2),
        Case(3, 64, 224, 3),
        Case(24, 144, 56),
        Case(64, 384, 14, batch=8),
        Case(160, 960, 7),
    ],
)


# ---- pooling ---------------------------------------------------------------------------------------------------------


def _pool_inputs(case: Case) -> dict[str, Array]:
    """Nonnegative, and in quarters, so that many windows have several largest elements."""
    coarse = np.maximum(np.round(numbers(*picture(case)) * 4) / 4, 0)
    return {"x": coarse, "d": numbers(*cotangent(case), seed=2)}


def _window(case: Case) -> dict[str, list[int]]:
    return {"kernel_shape": [case.kernel] * 2, "strides": [case.stride] * 2, "pads": [case.pad] * 4}


def _pooled(back: Callable[[Graph, str, str, str, Case], str | None]) -> Way:
    """The forward pool, and what `back` makes of what it read, what it made, and the cotangent."""

    def way(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
        p = g("MaxPool", t["x"], **_window(case))
        made = back(g, t["x"], p, t["d"], case)
        return None if made is None else {p: cotangent(case), made: picture(case)}

    return way


def _unpooled(g: Graph, x: str, p: str, d: str, case: Case) -> str | None:
    if case.kernel != case.stride:
        return None
    _, indices = g.many("MaxPool", x, outputs=2, **_window(case))
    return g("MaxUnpool", d, indices, ints(*picture(case)), **_window(case))


def _scattered(g: Graph, x: str, p: str, d: str, case: Case) -> str:
    _, indices = g.many("MaxPool", x, outputs=2, **_window(case))
    flat = [g("Reshape", v, ints(-1)) for v in (indices, d)]
    size = math.prod(picture(case))
    zeros = g("ConstantOfShape", ints(size), value=numpy_helper.from_array(np.zeros(1, np.float32)))
    added = {} if case.kernel == case.stride else {"reduction": "add"}
    return g("Reshape", g("ScatterElements", zeros, *flat, axis=0, **added), ints(*picture(case)))


def _grown(g: Graph, x: str, case: Case) -> str:
    scales = np.array([1, 1, case.stride, case.stride], float)
    near = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g("Resize", x, None, scales, **near)


def _masked(g: Graph, x: str, p: str, d: str, case: Case) -> str | None:
    if not case.tiled:
        return None
    largest = g("Cast", g("Equal", x, _grown(g, p, case)), to=TensorProto.FLOAT)
    return g("Mul", largest, _grown(g, d, case))


def _first_masked(g: Graph, x: str, p: str, d: str, case: Case) -> str | None:
    """Of the largest, the one that counts most in a map of ranks that falls along the window."""
    if not case.tiled:
        return None
    ranks = np.arange(case.kernel**2, 0, -1.0).reshape(case.kernel, case.kernel)
    ranks = np.tile(ranks, (case.small, case.small))[None, None]
    largest = g("Cast", g("Equal", x, _grown(g, p, case)), to=TensorProto.FLOAT)
    key = g("Mul", largest, ranks)
    best = _grown(g, g("MaxPool", key, **_window(case)), case)
    return g("Where", g("Equal", key, best), _grown(g, d, case), np.array(0.0))


def _spaced(g: Graph, x: str, p: str, d: str, case: Case) -> str | None:
    """Windows become an axis by SpaceToDepth; ArgMax gives the first of the largest."""
    if not case.tiled:
        return None
    count, rest = case.kernel**2, cotangent(case)[1:]
    windows = g("Reshape", g("SpaceToDepth", x, blocksize=case.stride), ints(case.batch, count, *rest))
    winner = g("ArgMax", windows, axis=1, keepdims=1)
    mask = g("Equal", winner, np.arange(count).reshape(count, 1, 1, 1))
    share = g("Where", mask, g("Unsqueeze", d, ints(1)), np.array(0.0))
    flat = g("Reshape", share, ints(case.batch, count * rest[0], *rest[1:]))
    return g("DepthToSpace", flat, blocksize=case.stride, mode="DCR")


def _patches(g: Graph, x: str, p: str, d: str, case: Case) -> str:
    """The windows as an axis, by one-hot kernels; the transposed convolution adds them back."""
    count, n = case.kernel**2, case.batch * case.channels
    kernel = np.eye(count).reshape(count, 1, case.kernel, case.kernel)
    pads = [0, 0, case.pad, case.pad] * 2
    inside = g("Pad", x, ints(*pads), np.array(LOWEST)) if case.pad else x
    rows = g("Reshape", inside, ints(n, 1, *[case.size + 2 * case.pad] * 2))
    winner = g("ArgMax", g.conv(rows, kernel, stride=case.stride), axis=1, keepdims=1)
    mask = g("Cast", g("Equal", winner, np.arange(count).reshape(count, 1, 1)), to=TensorProto.FLOAT)
    share = g("Mul", mask, g("Reshape", d, ints(n, 1, case.small, case.small)))
    return g("Reshape", g.transposed(share, kernel, case, group=1), ints(*picture(case)))


def _slices(g: Graph, x: str, p: str, d: str, case: Case) -> str:
    """A Slice for every place in the window; what was taken before is not taken again; added up by rests."""
    s, pad = case.stride, case.pad
    inside = g("Pad", x, ints(*([0, 0, pad, pad] * 2)), np.array(LOWEST)) if pad else x
    reach = s * (case.small - 1) + 1
    later = max((case.kernel - 1) // s, -(-(pad + case.size) // s) - case.small)  # windows beyond the last one
    sums: dict[tuple[int, int], str] = {}
    taken: str | None = None
    for i in range(case.kernel):
        for j in range(case.kernel):
            part = g("Slice", inside, ints(i, j), ints(i + reach, j + reach), ints(2, 3), ints(s, s))
            won = g("Equal", part, p)
            free = won if taken is None else g("And", won, g("Not", taken))
            taken = won if taken is None else g("Or", taken, won)
            share = g("Where", free, d, np.array(0.0))
            shift = (i // s, j // s)
            moved = g("Pad", share, ints(0, 0, *shift, 0, 0, later - shift[0], later - shift[1])) if later else share
            rest = (i % s, j % s)
            sums[rest] = g("Add", sums[rest], moved) if rest in sums else moved
    parts = [sums[a, b] for a in range(s) for b in range(s)]
    whole = g("DepthToSpace", g("Concat", *parts, axis=1), blocksize=s, mode="DCR") if s > 1 else parts[0]
    return g.cut(whole, pad, pad + case.size) if (case.small + later) * s != case.size else whole


MAX_POOL = Family(
    "MaxPool backwards, with the forward pool",
    _pool_inputs,
    {
        "Indices, ScatterElements": _pooled(_scattered),
        "Indices, MaxUnpool": _pooled(_unpooled),
        "Resize, Equal": _pooled(_masked),
        "Resize, Equal, ranks": _pooled(_first_masked),
        "SpaceToDepth, ArgMax": _pooled(_spaced),
        "one-hot Conv, ArgMax": _pooled(_patches),
        "a Slice for each place": _pooled(_slices),
    },
    lambda case: "Indices, MaxUnpool" if case.kernel == case.stride else "Indices, ScatterElements",
    [
        Case(64, size=224, kernel=2, stride=2),
        Case(256, size=56, kernel=2, stride=2),
        Case(256, size=56, kernel=2, stride=2, batch=8),
        Case(64, size=112, kernel=3, stride=2),
        Case(64, size=112, kernel=3, stride=2, batch=8),
        Case(256, size=28, kernel=3, stride=1),
    ],
)


def _averaged(back: Callable[[Graph, str, Case], str | None]) -> Way:
    def way(g: Graph, t: Mapping[str, str], case: Case) -> Made | None:
        made = back(g, t["d"], case)
        return None if made is None else {made: picture(case)}

    return way


def _ones(case: Case, channels: int) -> Array:
    return np.full((channels, 1, case.kernel, case.kernel), case.kernel**-2.0)


def _spread_rows(g: Graph, d: str, case: Case) -> str:
    share = g("Mul", d, np.array(case.kernel**-2.0))
    rows = g("Reshape", share, ints(-1, 1, case.small, case.small))
    ones = np.ones((1, 1, case.kernel, case.kernel))
    return g("Reshape", g.transposed(rows, ones, case, group=1), ints(*picture(case)))


def _spread_broadcast(g: Graph, d: str, case: Case) -> str | None:
    if not case.tiled:
        return None
    k, n = case.kernel, case.small
    share = g("Mul", d, np.array(k**-2.0))
    six = g("Reshape", share, ints(case.batch, case.channels, n, 1, n, 1))
    return g("Reshape", g("Expand", six, ints(1, 1, 1, k, 1, k)), ints(*picture(case)))


def _spread_resize(g: Graph, d: str, case: Case) -> str | None:
    return _grown(g, g("Mul", d, np.array(case.kernel**-2.0)), case) if case.tiled else None


def _spread_pool(g: Graph, d: str, case: Case) -> str | None:
    return g("AveragePool", d, count_include_pad=1, **_window(case)) if case.stride == 1 else None


def _spread_conv(g: Graph, d: str, case: Case) -> str | None:
    if case.stride > 1:
        return None
    return g.conv(d, _ones(case, case.channels), pads=case.pad, group=case.channels)


AVERAGE_POOL = Family(
    "AveragePool backwards",
    lambda case: {"d": numbers(*cotangent(case))},
    {
        "ConvTranspose, channels in the batch": _averaged(_spread_rows),
        "ConvTranspose, depthwise": _averaged(
            lambda g, d, case: g.transposed(d, _ones(case, case.channels), case, group=case.channels)
        ),
        "Resize": _averaged(_spread_resize),
        "Expand": _averaged(_spread_broadcast),
        "AveragePool": _averaged(_spread_pool),
        "Conv, depthwise": _averaged(_spread_conv),
    },
    lambda case: "ConvTranspose, channels in the batch",
    [
        Case(128, size=56, kernel=2, stride=2),
        Case(512, size=14, kernel=2, stride=2),
        Case(128, size=56, kernel=2, stride=2, batch=8),
        Case(64, size=112, kernel=3, stride=2),
        Case(192, size=28, kernel=3, stride=1),
    ],
)


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _elementwise(make: Callable[[Graph, Mapping[str, str], Case], str]) -> Way:
    return lambda g, t, case: {make(g, t, case): picture(case)}


def _greater(g: Graph, y: str) -> str:
    return g("Greater", y, np.array(0.0))


ZERO = np.array(0.0)
PLACES = [
    Case(64, size=224),
    Case(256, size=56),
    Case(64, size=56),
    Case(64, size=56, batch=8),
    Case(512, size=7),
    Case(2048, size=7, batch=8),
]
RELU = Family(
    "Gradient of Relu: the cotangent where y > 0",
    lambda case: {"d": numbers(*picture(case)), "y": np.maximum(numbers(*picture(case), seed=2), 0)},
    {
        "Greater, Cast, Mul": _elementwise(
            lambda g, t, case: g("Mul", t["d"], g("Cast", _greater(g, t["y"]), to=TensorProto.FLOAT))
        ),
        "Greater, Where": _elementwise(lambda g, t, case: g("Where", _greater(g, t["y"]), t["d"], ZERO)),
        "Sign, Mul": _elementwise(lambda g, t, case: g("Mul", t["d"], g("Sign", t["y"]))),
        "HardSigmoid, Mul": _elementwise(
            lambda g, t, case: g("Mul", t["d"], g("HardSigmoid", t["y"], alpha=STEEP, beta=0.0))
        ),
    },
    lambda case: "Greater, Cast, Mul",
    PLACES,
)


def _not_negative(g: Graph, z: str) -> str:
    """1 where z is 0 or above, else 0."""
    return g("HardSigmoid", z, alpha=STEEP, beta=1.0)


def _signed_epsilon(g: Graph, z: str) -> str:
    return g("Where", g("Less", z, ZERO), np.array(-EPSILON), np.array(EPSILON))


def _epsilon_by_conv(g: Graph, z: str, case: Case) -> str:
    """Epsilon · (2 step - 1) by a depthwise 1x1 Conv, which stays in the blocked layout."""
    n = case.channels
    bias, scale = np.full(n, -EPSILON), np.full((n, 1, 1, 1), 2 * EPSILON)
    return g("Conv", _not_negative(g, z), scale, bias, kernel_shape=[1, 1], group=n)


STABILIZER = Family(
    "c / (z + ε sign z), z of either sign",
    lambda case: {"c": numbers(*picture(case)), "z": numbers(*picture(case), seed=2)},
    {
        "Less, Where, Add": _elementwise(
            lambda g, t, case: g("Div", t["c"], g("Add", t["z"], _signed_epsilon(g, t["z"])))
        ),
        "Less, Where of z ± ε": _elementwise(
            lambda g, t, case: g(
                "Div",
                t["c"],
                g(
                    "Where",
                    g("Less", t["z"], ZERO),
                    g("Sub", t["z"], np.array(EPSILON)),
                    g("Add", t["z"], np.array(EPSILON)),
                ),
            )
        ),
        "Sign, Add, Sign, Mul, Add": _elementwise(
            lambda g, t, case: g(
                "Div",
                t["c"],
                g(
                    "Add",
                    t["z"],
                    g("Mul", g("Sign", g("Add", g("Sign", t["z"]), np.array(0.5))), np.array(EPSILON)),
                ),
            )
        ),
        "HardSigmoid, Mul, Add, Add": _elementwise(
            lambda g, t, case: g(
                "Div",
                t["c"],
                g(
                    "Add",
                    t["z"],
                    g("Sub", g("Mul", _not_negative(g, t["z"]), np.array(2 * EPSILON)), np.array(EPSILON)),
                ),
            )
        ),
        "HardSigmoid, Conv, Add": _elementwise(
            lambda g, t, case: g("Div", t["c"], g("Add", t["z"], _epsilon_by_conv(g, t["z"], case)))
        ),
    },
    lambda case: "Less, Where, Add",
    PLACES,
)
OWN_SHARE = Family(
    "c · z / (z + ε sign z), z of either sign",
    lambda case: {"c": numbers(*picture(case)), "z": numbers(*picture(case), seed=2)},
    {
        "Less, Where, Add, Div, Mul": _elementwise(
            lambda g, t, case: g("Mul", t["c"], g("Div", t["z"], g("Add", t["z"], _signed_epsilon(g, t["z"]))))
        ),
        "Abs, Add, Div, Mul": _elementwise(
            lambda g, t, case: g(
                "Mul", t["c"], g("Div", g("Abs", t["z"]), g("Add", g("Abs", t["z"]), np.array(EPSILON)))
            )
        ),
    },
    lambda case: "Less, Where, Add, Div, Mul",
    PLACES,
)


# ---- products, sums and broadcasts -----------------------------------------------------------------------------------


def _stacked(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    w = weights_of(case)
    both = g.conv(t["x"], np.concatenate([w, np.maximum(w, 0)]), pads=case.pad)
    return dict.fromkeys(g.many("Split", both, outputs=2, axis=1, num_outputs=2), cotangent(case))


STACKED = Family(
    "Conv by w and by w⁺ of one input",
    lambda case: {"x": np.maximum(numbers(*picture(case)), 0)},
    {
        "two Convs": lambda g, t, case: {
            g.conv(t["x"], w, pads=case.pad): cotangent(case)
            for w in (weights_of(case), np.maximum(weights_of(case), 0))
        },
        "one Conv, Split": _stacked,
    },
    lambda case: "two Convs",
    [Case(64, 64, 56, 3), Case(256, 256, 14, 3), Case(64, 256, 56), Case(256, 64, 56), Case(512, 128, 28, batch=8)],
)


def _rows(case: Case) -> tuple[int, ...]:
    return (case.batch, case.size, case.channels)


LAST_AXIS = Family(
    "Sum over the last axis of (N, T, C)",
    lambda case: {"x": numbers(*_rows(case))},
    {
        "ReduceSum": lambda g, t, case: {
            g("ReduceSum", t["x"], ints(-1), keepdims=1): (case.batch, case.size, 1),
        },
        "MatMul with ones": lambda g, t, case: {
            g("MatMul", t["x"], np.ones((case.channels, 1))): (case.batch, case.size, 1),
        },
    },
    lambda case: "ReduceSum",
    [Case(768, size=197), Case(384, size=128, batch=8), Case(64, size=2048)],
)
PLACE_SUM = Family(
    "Sum over height and width",
    lambda case: {"x": np.abs(numbers(*picture(case)))},
    {
        "ReduceSum": lambda g, t, case: {
            g("ReduceSum", t["x"], ints(2, 3), keepdims=1): (case.batch, case.channels, 1, 1)
        },
        "GlobalAveragePool, Mul": lambda g, t, case: {
            g("Mul", g("GlobalAveragePool", t["x"]), np.array(float(case.size**2))): (case.batch, case.channels, 1, 1)
        },
        "MatMul with ones": lambda g, t, case: {
            g(
                "Reshape",
                g("MatMul", g("Reshape", t["x"], ints(0, 0, -1)), np.ones((case.size**2, 1))),
                ints(0, 0, 1, 1),
            ): (case.batch, case.channels, 1, 1)
        },
    },
    lambda case: "ReduceSum",
    [Case(64, size=112), Case(512, size=14, batch=8)],
)
BROADCAST = Family(
    "A number per channel times all its places",
    lambda case: {"x": numbers(*picture(case)), "c": numbers(case.batch, case.channels, 1, 1, seed=2)},
    {
        "Mul": _elementwise(lambda g, t, case: g("Mul", t["x"], t["c"])),
        "Expand, Mul": _elementwise(lambda g, t, case: g("Mul", t["x"], g("Expand", t["c"], ints(*picture(case))))),
    },
    lambda case: "Mul",
    [Case(64, size=112), Case(2048, size=7, batch=8)],
)


def _dense(case: Case) -> Array:
    return np.random.default_rng(1).standard_normal((case.channels, case.outputs)) / math.sqrt(case.outputs)


def _dense_shape(case: Case) -> tuple[int, ...]:
    return (case.batch, case.channels) if case.size == 1 else _rows(case)


def _gemm_back(g: Graph, t: Mapping[str, str], case: Case) -> Made:
    flat = t["d"] if case.size == 1 else g("Reshape", t["d"], ints(-1, case.outputs))
    made = g("Gemm", flat, _dense(case), transB=1)
    return {made if case.size == 1 else g("Reshape", made, ints(*_rows(case))): _dense_shape(case)}


DENSE = Family(
    "Adjoint of a product with constant weights",
    lambda case: {"d": numbers(*_dense_shape(case)[:-1], case.outputs)},
    {
        "Transpose, MatMul": lambda g, t, case: {
            g("MatMul", t["d"], g("Transpose", _dense(case), perm=[1, 0])): _dense_shape(case)
        },
        "Gemm": _gemm_back,
    },
    lambda case: "Gemm" if case.size == 1 else "Transpose, MatMul",
    [Case(4096, 4096), Case(4096, 4096, batch=8), Case(768, 3072, size=197), Case(384, 1536, size=128, batch=8)],
)

FAMILIES = {
    "stride_one": STRIDE_ONE,
    "strided": STRIDED,
    "depthwise": DEPTHWISE,
    "first_back": FIRST_BACK,
    "signed_forward": SIGNED_FORWARD,
    "max_pool": MAX_POOL,
    "average_pool": AVERAGE_POOL,
    "relu": RELU,
    "stabilizer": STABILIZER,
    "own_share": OWN_SHARE,
    "stacked": STACKED,
    "dense": DENSE,
    "last_axis": LAST_AXIS,
    "place_sum": PLACE_SUM,
    "broadcast": BROADCAST,
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def bound(model: onnx.ModelProto, given: Mapping[str, Array], threads: int) -> tuple[Call, list[Array]]:
    """A call with inputs and outputs bound beforehand, and what it computes."""
    options = session_options(threads, fixed_batch=True)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(given))
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for output, array in zip(session.get_outputs(), found, strict=True):
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(np.array(array)))
    return functools.partial(session.run_with_iobinding, binding), found


def difference(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest difference of any output, by its largest element."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


@dataclass
class Row:
    """What was measured of one case.

    Attributes:
        family: title of what is computed.
        case: its shapes.
        used: the way that onnx_lrp takes.
        ms: median of each way that is right, in milliseconds.
        least: its minimum.
        error: what each way differs from the first by, of the largest element; too much for those not timed.
    """

    family: str
    case: str
    used: str
    ms: dict[str, float]
    least: dict[str, float]
    error: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest way."""
        return min(self.ms, key=lambda way: self.ms[way])

    @property
    def lost(self) -> float:
        """How much longer onnx_lrp's way takes, as a ratio."""
        return self.ms[self.used] / self.ms[self.best]


def measured(family: Family, case: Case, threads: int, rounds: int) -> Row:
    """Build, compare and time the ways of one case."""
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    expected: list[Array] | None = None
    for way in family.ways:
        built = model_of(family, way, case)
        if built is None:
            continue
        call, found = bound(*built, threads)
        expected = found if expected is None else expected
        errors[way] = difference(found, expected)
        if errors[way] <= family.limits.get(way, LIMIT):
            calls[way] = call
    times = samples(calls, rounds, ENOUGH)
    medians, least = ({way: pick(found) for way, found in times.items()} for pick in (statistics.median, min))
    return Row(family.title, str(case), family.used(case), medians, least, errors)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One family's lines: the fastest way is bold, onnx_lrp's in italics."""
    ways = list(dict.fromkeys(way for row in rows for way in row.error))
    yield f"\n**{rows[0].family}**, ms\n"
    yield "| | " + " | ".join(ways) + " | *onnx_lrp's* / best |"
    yield "| --- |" + " ---: |" * (len(ways) + 1)
    for row in rows:
        cells = []
        for way in ways:
            text = f"{row.ms[way]:.3g}" if way in row.ms else f"off by {row.error[way]:.0e}" if way in row.error else ""
            text = f"*{text}*" if way == row.used else text
            cells.append(f"**{text}**" if way == row.best else text)
        yield f"| {row.case} | " + " | ".join(cells) + f" | {row.lost:.2f} |"


def report(args: argparse.Namespace, arguments: Sequence[str], found: list[Row]) -> Iterator[str]:
    """Measure everything, and yield the lines of the report; rows are put into `found`."""
    yield described(("onnxruntime", "onnx", "numpy"), args.threads)
    yield f"Medians of {args.rounds}, in context. {command('constructions', arguments)}"
    for name in args.families:
        family = FAMILIES[name]
        rows = [measured(family, case, args.threads, args.rounds) for case in family.cases]
        found += rows
        yield from table(rows)
    yield "\nWhere onnx_lrp's way is not the best by more than 5 %:\n"
    for row in found:
        # One lucky sample makes no winner: both the medians and the minima have to say so.
        if row.lost > 1.05 and row.least[row.used] > 1.05 * row.least[row.best]:
            saved = row.ms[row.used] - row.ms[row.best]
            yield f"- {row.family}; {row.case}: {row.best}, not {row.used}, saves {saved:.2g} ms ({row.lost:.2f} ×)."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.constructions", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the report between its markers there")
    given = parser.parse_args(arguments)
    found: list[Row] = []
    publish(report(given, list(sys.argv[1:] if arguments is None else arguments), found), given.write, "constructions")
    if given.json:
        rows = [vars(row) | {"best": row.best, "lost": row.lost} for row in found]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
