"""What is done element by element, products with constant weights, sums and broadcasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from onnx import TensorProto

from benchmarks.ways.graph import (
    ZERO,
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
    weights_of,
)

EPSILON = 1e-6
STEEP = 2.0**127  # HardSigmoid with this slope is a step: 1 from the smallest normal number on


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _elementwise(make: Callable[[Graph, Mapping[str, str], Case], str]) -> Way:
    return lambda g, t, case: {make(g, t, case): picture(case)}


def _greater(g: Graph, y: str) -> str:
    return g("Greater", y, np.array(0.0))


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
    lambda case: "HardSigmoid, Mul",
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
    lambda case: "Abs, Add, Div, Mul",
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
