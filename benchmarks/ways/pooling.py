"""Pools backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from onnx import TensorProto, numpy_helper

from benchmarks.ways.graph import (
    Array,
    Case,
    Family,
    Graph,
    Made,
    Way,
    cotangent,
    ints,
    numbers,
    picture,
)

LOWEST = float(np.finfo(np.float32).min)


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
