"""Adjoints under many attributes: static and dynamic shapes, float64 and float32, against differences and torch.

Every case is run by ONNX's reference implementation in float64 and by ONNX Runtime in float32, with known lengths and
with every axis symbolic; all of them must agree. Numbers are drawn from a fixed seed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.quantization import ROUND_TRIP
from onnx_lrp.own_bodies import OWN_BODIES
from tests import adjoint_cases, sampling_cases
from tests.adjoint_cases import ARRAY, RNG, ints, normal, positive
from tests.adjoint_tools import Case, check, check_model, feeds_for, network

peer = pytest.importorskip("tests.adjoint_torch")


def draw(*choices: Any) -> Any:
    """One of several, at random."""
    return choices[RNG.integers(len(choices))]


def draws(n: int, low: int, high: int) -> list[int]:
    """N integers between two bounds, these included."""
    return [int(i) for i in RNG.integers(low, high + 1, n)]


# ---- sums of products ----------------------------------------------------------------------------------------------


def conv_cases() -> Iterator[Case]:
    for number in range(40):
        n = number % 3 + 1
        group, per_group, out = draw(1, 1, 2, 3), draw(1, 2), draw(1, 2)
        many = number % 10 == 9  # many channels and no strides: a convolution with flipped weights
        if many:
            group, per_group = 1, 17
        if number % 10 == 8:
            group, per_group, out = 4, 1, draw(1, 2)  # depthwise
        kernel, mode = draws(n, 1, 3), draw("NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
        strides = [1] * n if many or number % 4 == 0 else draws(n, 1, 3)
        dilations = draws(n, 1, 2) if mode in ("NOTSET", "VALID") else [1] * n
        attrs = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
        if mode == "NOTSET":
            begin = draws(n, 0, 2)
            attrs["pads"] = begin + (begin if number % 2 else draws(n, 0, 2))
        else:
            attrs["auto_pad"] = mode
        size = [d * (k - 1) + 1 + s for d, k, s in zip(dilations, kernel, draws(n, 0, 4), strict=True)]
        x, w = normal(draw(1, 2), group * per_group, *size), normal(group * out, per_group, *kernel)
        bias = normal(group * out) if number % 3 else None
        yield Case("Conv", (x, w, bias), attrs, fixed=(1, 2))
    # weights of unknown size: the attribute says how large the kernel is
    attrs = {"kernel_shape": [3], "strides": [2], "pads": [1, 0], "group": 2}
    yield Case("Conv", (normal(2, 4, 7), normal(6, 2, 3), normal(6)), attrs, note="dynamic_weights")
    yield Case("Conv", (normal(2, 2, 5, 5), normal(3, 2, 3, 3)), {}, fixed=(1,), note="no_attributes")


def conv_transpose_cases() -> Iterator[Case]:
    for number in range(30):
        n = number % 3 + 1
        group, per_group, out = draw(1, 1, 2, 3), draw(1, 2), draw(1, 2)
        kernel, strides, dilations = draws(n, 1, 3), draws(n, 1, 3), draws(n, 1, 2)
        attrs = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
        extra = [int(RNG.integers(max(s, d))) for s, d in zip(strides, dilations, strict=True)]
        if number % 2:
            attrs["output_padding"] = extra
        size = draws(n, 2, 4)
        full = [s * (i - 1) + d * (k - 1) + 1 for s, i, d, k in zip(strides, size, dilations, kernel, strict=True)]
        if number % 4 < 2:
            attrs["pads"] = [min(p, f // 3) for p, f in zip(draws(2 * n, 0, 2), full * 2, strict=True)]
        x, w = normal(draw(1, 2), group * per_group, *size), normal(group * per_group, out, *kernel)
        bias = normal(group * out) if number % 3 else None
        # ONNX Runtime wants output_padding below the stride, ONNX below stride or dilation
        runs = all(p < s for p, s in zip(extra, strides, strict=True)) or number % 2 == 0
        yield Case("ConvTranspose", (x, w, bias), attrs, fixed=(1, 2), in_runtime=runs)
    for mode, stride in itertools.product(("SAME_UPPER", "SAME_LOWER", "VALID"), (1, 2)):
        attrs = {"auto_pad": mode, "kernel_shape": [4, 3], "strides": [stride] * 2}
        yield Case("ConvTranspose", (normal(1, 2, 3, 4), normal(2, 2, 4, 3), normal(2)), attrs, fixed=(1, 2))
    for mode, longer in itertools.product(("NOTSET", "SAME_UPPER", "SAME_LOWER"), (-1, 0)):
        attrs = {"auto_pad": mode, "kernel_shape": [4, 3], "strides": [2, 2], "output_shape": [6 + longer, 8 + longer]}
        yield Case("ConvTranspose", (normal(1, 2, 3, 4), normal(2, 2, 4, 3)), attrs, fixed=(0, 1))


def gemm_cases() -> Iterator[Case]:
    biases = [None, (), (1,), (4,), (3, 1), (1, 4), (3, 4), (1, 1)]
    flags = itertools.product((0, 1), (0, 1))
    for number, (bias, (a, b)) in enumerate(itertools.product(biases, flags)):
        attrs = {"transA": a, "transB": b}
        if number % 2:
            attrs |= {"alpha": 0.5, "beta": -2.0}
        shape = normal(*((5, 3) if a else (3, 5))), normal(*((4, 5) if b else (5, 4)))
        held = (2,) if number % 2 and bias is not None else ()
        yield Case("Gemm", (*shape, None if bias is None else normal(*bias)), attrs, held=held, note=f"bias{bias}")


def matmul_cases() -> Iterator[Case]:
    shapes = [
        ((3,), (3,)),
        ((3,), (3, 4)),
        ((2, 3), (3,)),
        ((2, 3), (3, 4)),
        ((3,), (2, 3, 4)),
        ((2, 5, 3), (3,)),
        ((2, 5, 3), (3, 4)),
        ((5, 3), (2, 3, 4)),
        ((2, 5, 3), (2, 3, 4)),
        ((1, 5, 3), (2, 3, 4)),
        ((2, 5, 3), (1, 3, 4)),
        ((2, 1, 5, 3), (4, 3, 2)),
        ((4, 5, 3), (2, 4, 3, 2)),
        ((2, 1, 5, 3), (1, 4, 3, 2)),
        ((1, 1, 1, 3), (2, 4, 3, 1)),
    ]
    for a, b in shapes:
        yield Case("MatMul", (normal(*a), normal(*b)))


def normalization_cases() -> Iterator[Case]:
    for shape in ((3, 4), (2, 3, 5), (2, 3, 4, 2), (2, 3, 2, 2, 3)):
        c = shape[1]
        inputs = (normal(*shape), normal(c), normal(c), normal(c), positive(c))
        yield Case("BatchNormalization", inputs, {"epsilon": 1e-3}, held=(1, 2, 3, 4))
    for size in (1, 2, 3, 5):
        yield Case(
            "LRN",
            (normal(2, 4, 3, 2),),
            {"size": size, "alpha": 0.3, "beta": 0.6, "bias": 1.5},
            in_runtime=size % 2 == 1,
        )
    for op, shape in itertools.product(("Softmax", "LogSoftmax"), ((4,), (2, 3), (2, 3, 4))):
        for axis in range(-len(shape), len(shape)):
            yield Case(op, (normal(*shape),), {"axis": axis})
        yield Case(op, (normal(*shape),))


# ---- pooling -------------------------------------------------------------------------------------------------------


def _windows(number: int, dilated: bool) -> tuple[list[int], dict[str, Any]]:
    """Lengths of the input, and attributes of a pooling operator."""
    n = number % 3 + 1
    kernel, strides = draws(n, 1, 3), draws(n, 1, 3)
    mode = draw("NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    if mode.startswith("SAME"):  # ONNX Runtime finds negative pads where the stride is larger
        strides = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
    attrs: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    dilations = draws(n, 1, 2) if dilated and mode == "NOTSET" else [1] * n
    if dilations != [1] * n:
        attrs["dilations"] = dilations
    if mode != "NOTSET":
        attrs["auto_pad"] = mode
    else:
        attrs["ceil_mode"] = draw(0, 1)
        attrs["pads"] = [min(p, k - 1) for p, k in zip(draws(2 * n, 0, 2), kernel * 2, strict=True)]
    size = [d * (k - 1) + 1 + s for d, k, s in zip(dilations, kernel, draws(n, 1, 4), strict=True)]
    return [draw(1, 2), draw(1, 3), *size], attrs


def max_pool_cases() -> Iterator[Case]:
    for number in range(36):
        shape, attrs = _windows(number, dilated=True)
        x = normal(*shape) if number % 2 else RNG.integers(0, 3, shape).astype(np.float64)
        tied = number % 2 == 0
        opset = 22 if attrs.get("ceil_mode") else 18  # before, shape inference miscounts windows of ceil_mode
        yield Case("MaxPool", (x,), attrs, opset=opset, portable=True, kinked=tied, note="ties" * tied)
    ties = np.ones((1, 2, 4, 4))
    for attrs in ({"strides": [2, 2]}, {"strides": [1, 1]}, {"strides": [2, 2], "storage_order": 1}):
        yield Case("MaxPool", (ties,), {"kernel_shape": [2, 2], **attrs}, portable=True, kinked=True, note="all_equal")
    yield Case("MaxPool", (-positive(1, 1, 3, 3),), {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}, portable=True)
    for shape in ((2, 3, 5), (1, 2, 3, 4), (2, 1, 2, 3, 2)):
        yield Case("GlobalMaxPool", (normal(*shape),))
        yield Case("GlobalMaxPool", (RNG.integers(0, 2, shape).astype(np.float64),), kinked=True, note="ties")
        yield Case("GlobalAveragePool", (normal(*shape),))


def average_pool_cases() -> Iterator[Case]:
    for number in range(36):
        shape, attrs = _windows(number, dilated=number % 2 == 0)
        opset = 22 if attrs.get("ceil_mode") else 19 if "dilations" in attrs else 18
        yield Case("AveragePool", (normal(*shape),), {**attrs, "count_include_pad": number // 2 % 2}, opset=opset)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def broadcast_cases() -> Iterator[Case]:
    shapes = [((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (2, 3)), ((2, 3), ())]
    shapes += [((4, 1, 3), (2, 1)), ((1, 1), (4, 2, 3)), ((1, 3), (3,)), ((1,), (1,)), ((2, 1, 3), (2, 5, 1))]
    for op, (a, b) in itertools.product(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"), shapes):
        second = normal(*b) if op not in ("Div", "Pow") else positive(*b)
        yield Case(op, (positive(*a) if op == "Pow" else normal(*a), second))
    condition = ARRAY([[True, False, True], [False, False, True]])
    for (a, b), fed in itertools.product(shapes[:6], ((), (0,))):
        yield Case("Where", (condition, normal(*a), normal(*b)), fed=fed, note="fed" * len(fed))
    yield Case("Where", (ARRAY([[True], [False]]), normal(1, 3), normal(3)), note="broadcast")
    for op in ("Sum", "Mean", "Max", "Min"):
        yield Case(op, (normal(2, 3), normal(3), normal(4, 1, 1)), note="three")
        yield Case(op, (normal(2, 3),), note="one")
    for op in ("Max", "Min"):
        yield Case(op, (ARRAY([1.0, 2, 3]), ARRAY([1.0, 3, 2])), kinked=True, note="ties")
    for power in (0.0, 1.0, 2.0, 3.0, 0.5, -1.0):
        yield Case("Pow", (positive(2, 3), ARRAY(power)), held=(1,), note=f"power{power}")
    for power in (0, 1, 2, 3):
        yield Case("Pow", (normal(2, 3), ARRAY(power)), note=f"integer{power}")
        yield Case("Pow", (ARRAY([0.0, 1, -2]), ints(power)), note=f"zero{power}")
    yield Case("Pow", (normal(3), ints(0, 1, 2)), note="integers")
    yield Case("Pow", (normal(3), ints(0, 1, 2)), fed=(1,), note="fed")


def pointwise_cases() -> Iterator[Case]:
    alphas = {"LeakyRelu": 0.3, "ThresholdedRelu": 0.4, "Elu": 1.3, "Selu": 1.2, "Celu": 0.7, "HardSigmoid": 0.3}
    domains = {"Log": (0.1, 3), "Sqrt": (0.1, 3), "Acosh": (1.1, 3), "Reciprocal": (0.2, 3)}
    domains |= dict.fromkeys(("Asin", "Acos", "Atanh"), (-0.9, 0.9)) | {"Tan": (-1.2, 1.2)}
    newer = {"Gelu": 20, "Swish": 24}
    kinks = ARRAY([-3.0, -2.5, -1, 0, 0.4, 1, 2.5, 3])
    for name, operator in OPERATORS.items():
        if operator.verb != "pointwise" or name in ("Clip", "PRelu", ROUND_TRIP):  # these have more inputs
            continue
        opset, runs = newer.get(name, 18), name != "Swish"
        x = RNG.uniform(*domains.get(name, (-4, 4)), (3, 5))
        yield Case(name, (x,), opset=opset, in_runtime=runs)
        if name in alphas:
            yield Case(name, (x,), {"alpha": alphas[name]}, opset=opset)
        if name not in domains:
            yield Case(name, (kinks,), opset=opset, in_runtime=runs, kinked=True, note="kinks")
    yield Case("Gelu", (normal(3, 5),), {"approximate": "tanh"}, opset=20)
    yield Case("Swish", (normal(3, 5),), {"alpha": 1.7}, opset=24, in_runtime=False)
    low, high = ARRAY(-0.5), ARRAY(0.7)
    for bounds in ((low, high), (low,), (None, high), (), (high, low)):
        yield Case("Clip", (normal(3, 5), *bounds), note=f"bounds{len(bounds)}{bounds[:1] == (None,)}")
    yield Case(
        "Clip", (ARRAY([-1.0, 0, 0.5, 1, 2]), ARRAY(0.0), ARRAY(1.0)), held=(1, 2), kinked=True, note="on_bounds"
    )
    yield Case("Mod", (normal(3, 4) * 5, normal(4)), {"fmod": 1})
    yield Case("Mod", (normal(4) * 5, normal(3, 4)), {"fmod": 1})
    yield Case("Neg", (normal(2, 3),))
    yield Case("Identity", (normal(2, 3),))
    yield Case("Dropout", (normal(2, 3), ARRAY(0.5)), held=(1,))


def reduction_cases() -> Iterator[Case]:
    every = [axes for r in range(4) for axes in itertools.combinations(range(3), r)] + [(-1,), (-3, 1)]
    for op, axes, keep in itertools.product(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"), every, (0, 1)):
        x = normal(2, 3, 4)
        if not axes:
            yield Case(op, (x,), {"keepdims": keep}, note="all")
            yield Case(op, (x,), {"keepdims": keep, "noop_with_empty_axes": 1}, note="none")
            yield Case(op, (x, ints()), {"keepdims": keep, "noop_with_empty_axes": 1}, note="empty", in_runtime=False)
            continue
        yield Case(op, (x, ints(*axes)), {"keepdims": keep}, note="axes" + "".join(map(str, axes)))
        if axes in ((1,), (0, 2)):
            yield Case(op, (x, ints(*axes)), {"keepdims": keep}, fed=(1,), note=f"fed{len(axes)}")
    for op in ("ReduceMax", "ReduceMin"):
        yield Case(op, (RNG.integers(0, 2, (2, 3, 4)).astype(np.float64), ints(1)), kinked=True, note="ties")


# ---- movement ------------------------------------------------------------------------------------------------------


def slice_cases() -> Iterator[Case]:
    far = 2**62
    picks: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]] = [
        ((1,), (3,), None, None),
        ((0, 1), (2, 3), None, None),
        ((1,), (far,), (1,), None),
        ((-2,), (far,), (-1,), (1,)),
        ((-9,), (2,), (2,), None),
        ((0,), (-1,), (1,), (1,)),
        ((-3, 1), (-1, 4), (2, 0), (1, 1)),
        ((0,), (far,), (1,), (2,)),
        ((1, 0), (far, far), (2, 1), (2, 3)),
        ((-1,), (-far,), (1,), (-1,)),
        ((4,), (0,), (2,), (-2,)),
        ((3, -1), (0, -9), (1, 2), (-1, -3)),
        ((0, 1), (4, 5), (1, 2), (1, 2)),
        ((5,), (9,), (0,), (1,)),
        ((3,), (1,), (1,), (1,)),
    ]
    x = normal(3, 4, 5)
    for starts, ends, axes, steps in picks:
        given = [ints(*v) if v is not None else None for v in (starts, ends, axes, steps)]
        while given[-1] is None:
            given.pop()
        note = "_".join("".join(map(str, v)) for v in given if v is not None).replace(str(far), "far")
        for fed in ((), (1, 2), tuple(range(1, 1 + len(given)))):
            yield Case("Slice", (x, *given), fed=fed, note=f"{note}-fed{len(fed)}", portable=len(fed) < 3)
    yield Case("Slice", (x, ints(1).astype(np.int32), ints(3).astype(np.int32), ints(1).astype(np.int32)), note="int32")


def pad_cases() -> Iterator[Case]:
    for mode in ("constant", "reflect", "edge", "wrap"):
        for pads in ((1, 0, 2, 1), (0, 2, 0, 0), (0, 0, 1, 1)):
            for fed in ((), (1,)):
                yield Case("Pad", (normal(3, 4), ints(*pads)), {"mode": mode}, fed=fed, opset=19, portable=True)
        axes = (normal(2, 3, 4), ints(1, 2), None, ints(-1))
        yield Case("Pad", axes, {"mode": mode}, opset=19, portable=True, note="axes")
        yield Case("Pad", axes, {"mode": mode}, fed=(1, 3), opset=19, note="fed_axes")
    for pads in ((-1, 0, 0, -2), (1, -1, -1, 2)):
        for fed in ((), (1,)):
            yield Case("Pad", (normal(4, 5), ints(*pads)), fed=fed, note=f"negative{pads}")
    yield Case("Pad", (normal(3, 4), ints(1, 0, 2, 1), ARRAY(0.3)), note="value")
    yield Case("Pad", (normal(3, 4), ints(1, -1, 2, 1), ARRAY(0.3)), fed=(1,), note="value_fed")


def gather_cases() -> Iterator[Case]:
    indices = [
        ARRAY(1),
        ARRAY(-1),
        ints(0, 2, 2, -1),
        ints([0, -1], [1, 1]),
        ints([[2], [0]]),
        ints(0).astype(np.int32),
    ]
    for axis, picked in itertools.product((0, 1, -1), indices):
        for fed in ((), (1,)):
            note = "".join(map(str, np.asarray(picked).reshape(-1))) + "fed" * len(fed)
            yield Case("Gather", (normal(3, 4, 3), picked), {"axis": axis}, fed=fed, portable=True, note=note)
    yield Case("Gather", (normal(4), ints(3, 3, 0)), portable=True)


def shape_cases() -> Iterator[Case]:
    x = normal(2, 3, 4)
    for perm in itertools.permutations(range(3)):
        yield Case("Transpose", (x,), {"perm": list(perm)})
    yield Case("Transpose", (x,))
    for shape in ((6, 4), (-1,), (0, -1), (2, 1, 12), (0, 0, 2, 2)):
        for fed in ((), (1,)):
            yield Case("Reshape", (x, ints(*shape)), fed=fed, note=f"to{shape}{len(fed)}")
    for axis in (-1, 0, 1, 3):
        yield Case("Flatten", (x,), {"axis": axis})
    yield Case("Squeeze", (normal(1, 3, 1),), note="all", fixed=(0,))
    yield Case("Squeeze", (normal(1, 3, 1), ints(-1)))
    yield Case("Unsqueeze", (x, ints(0, -1)))
    for shape in ((2, 3, 4), (5, 2, 3, 4), (1,), (2, 1, 1, 4)):
        source = normal(1, 3, 1) if len(shape) < 4 else normal(3, 1)
        for fed in ((), (1,)):
            yield Case("Expand", (source, ints(*shape)), fed=fed, note=f"to{shape}{len(fed)}")
    for repeats in ((1, 2, 3), (2, 1, 1), (1, 1, 1)):
        for fed in ((), (1,)):
            yield Case("Tile", (x, ints(*repeats)), fed=fed, note=f"by{repeats}{len(fed)}")


def joining_cases() -> Iterator[Case]:
    yield Case("Concat", (normal(2, 3), normal(4, 3), normal(1, 3)), {"axis": 0})
    yield Case("Concat", (normal(2, 3, 2), normal(2, 3, 1)), {"axis": -1})
    yield Case("Concat", (normal(2, 3),), {"axis": 1})
    for sizes, unseeded in itertools.product((ints(1, 2, 3), ints(2, 2, 2)), ((), (1,), (0, 2))):
        for axis in (1, -1):
            note = f"{sizes}{unseeded}"
            yield Case("Split", (normal(2, 6), sizes), {"axis": axis}, outputs=3, unseeded=unseeded, note=note)
    yield Case("Split", (normal(2, 6), ints(1, 5)), {"axis": 1}, fed=(1,), outputs=2, note="fed")
    yield Case("Split", (normal(7, 2),), {"num_outputs": 3}, outputs=3, fixed=(0,))
    yield Case("Split", (normal(2, 6),), {"axis": 1, "num_outputs": 2}, outputs=2, unseeded=(0,))
    yield Case("Split", (normal(2, 6), ints(6)), {"axis": 1}, outputs=1)


FAMILIES = (
    conv_cases,
    conv_transpose_cases,
    gemm_cases,
    matmul_cases,
    normalization_cases,
    max_pool_cases,
    average_pool_cases,
    broadcast_cases,
    pointwise_cases,
    reduction_cases,
    slice_cases,
    pad_cases,
    gather_cases,
    shape_cases,
    joining_cases,
    *adjoint_cases.FAMILIES,
    *sampling_cases.FAMILIES,
)
CASES = [case for family in FAMILIES for case in family()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case):
    check(case, peer.autograd if case.op in peer.TORCH and not case.unseeded else None)


def test_every_operator_is_met():
    met = {case.op for case in CASES} | {"Cast", "CastLike"}  # changes of type, in test_adjoints_backend
    met |= {ROUND_TRIP}  # of the view alone: in test_quantized
    assert {name for name, operator in OPERATORS.items() if operator.adjoint is not None} | set(OWN_BODIES) == met


# ---- several operators: cotangents that stay small, tensors used twice ---------------------------------------------

HEADS = (
    "Add(x, x1)",
    "Sub(x1, x)",
    "Mul(x, x1)",
    "Div(x1, e)",
    "Max(x, x1)",
    "Mean(x, x1, x)",
    "Mul(x, x)",
    "Tanh(x)",
    "Neg(x)",
    "Clip(x, x2)",
    "Softmax <axis = 0> (x)",
    "Concat <axis = 1> (x, x)",
    "Gemm(x, x3, x1)",
    "MatMul(x, x3)",
)
WHOLE = {
    "fan_out": "p = Relu(x) q = Tanh(p) z = Add(p, q) w = Mul(z, x1) y = Add(w, x)",
    "gram": "t = Transpose(x) y = MatMul(x, t)",
    "standardized": "r = ReduceMean(x, a) z = Sub(x, r) s = Mul(z, z) v = ReduceMean(s, a) d = Sqrt(v) y = Div(z, d)",
    "split": "p, q = Split <axis = 1, num_outputs = 2> (x) t = Tanh(q) m = Mul(p, t) y = Concat <axis = 1> (m, p)",
    "gated": "g = Sigmoid(x) m = Mul(x, g) r = ReduceMax(m, a) y = Mul(r, x1)",
    "shifted": "r = ReduceSum <keepdims = 0> (x, a) u = Unsqueeze(r, a) y = Add(u, x1)",
}
SIGNATURE = "float[4,4] x, float[{}4] x1, float x2, float[4,4] x3 => float[n,m] y"
CHAINS = {
    f"{head} over {axes}": f"z = {head} r = ReduceMean(z, a) y = Exp(r)" for head in HEADS for axes in ("0", "1", "0,1")
}


@pytest.mark.parametrize("rows", ["4,", "1,", ""], ids=["same", "row", "vector"])
@pytest.mark.parametrize("chain", [*CHAINS, *WHOLE])
def test_chain(chain, rows):
    axes = chain.split(" over ")[1] if chain in CHAINS else "1"
    body = f"a = Constant <value_ints = [{axes}]> () e = Exp(x) " + (CHAINS | WHOLE)[chain]
    single = network(SIGNATURE.format(rows), body)
    feeds = feeds_for(single, 4)
    check_model(single, [x for x in feeds if x in re.split(r"\W", body)], feeds)
