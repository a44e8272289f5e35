"""Adjoints of convolutions, with strides and without, and z-plus of inputs of either sign."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from benchmarks.ways.graph import (
    BLOCK,
    Array,
    Case,
    Family,
    Graph,
    Made,
    cotangent,
    ints,
    numbers,
    picture,
    weights_of,
)

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
    both = g.transposed(t["d"], np.hstack(parts_of(weights_of(case))), case)
    pieces = g.many("Split", both, outputs=2, axis=1, num_outputs=2)
    shares = [g("Mul", part, piece) for part, piece in zip(_parts(g, t["x"]), pieces, strict=True)]
    return {g("Add", *shares): picture(case)}


def _picked_back(g: Graph, t: Mapping[str, str], case: Case) -> Made:
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
        "one, stacked, Where": _picked_back,
        "Conv, sub-pixel, stacked": _stacked_sub_pixel,
    },
    lambda case: "one, weights stacked",
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
        "(y + abs(x) ∗ abs(w)) / 2": functools.partial(_half_forward, folded=False),
        "y / 2 + abs(x) ∗ abs(w / 2)": functools.partial(_half_forward, folded=True),
    },
    lambda case: "y / 2 + abs(x) ∗ abs(w / 2)",
    [
        Case(3, 64, 224, 7, 2),
        Case(3, 64, 224, 3),
        Case(24, 144, 56),
        Case(64, 384, 14, batch=8),
        Case(160, 960, 7),
    ],
)
