"""Cases of operators that pick, place, rearrange, resize and normalize, under many attributes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.adjoint_tools import Case

ARRAY = np.array
RNG = np.random.default_rng(21)


def normal(*shape: int) -> np.ndarray:
    """Random numbers of both signs."""
    return RNG.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    """Random numbers between 0.5 and 1.5."""
    return RNG.uniform(0.5, 1.5, shape)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def distinct(*shape: int) -> np.ndarray:
    """Numbers that are well apart, in random order."""
    return RNG.permutation(np.arange(float(np.prod(shape)))).reshape(shape) / 3 - 1


# ---- picking and placing -------------------------------------------------------------------------------------------


def picking_cases() -> Iterator[Case]:
    x = normal(3, 4, 5)
    for axis, fed in itertools.product((0, 1, -1), ((), (1,))):
        n = x.shape[axis]
        for shape in (x.shape, (2, 3, 4), (3, 4, 1)):
            indices = RNG.integers(-n, n, shape)
            note = f"{shape}{len(fed)}"
            yield Case("GatherElements", (x, indices), {"axis": axis}, fed=fed, portable=True, note=note)
    yield Case("GatherElements", (normal(4), ints(3, 3, -1)), portable=True)
    yield Case("GatherElements", (normal(4, 2), ints([0, 1]).astype(np.int32)), note="int32")
    for batch, depth, fed in itertools.product((0, 1, 2), (1, 2, 3), ((), (1,))):
        if batch + depth > 3:
            continue
        lead = (*x.shape[:batch], 4, 2)
        sizes = x.shape[batch : batch + depth]
        indices = np.stack([RNG.integers(-n, n, lead) for n in sizes], -1)
        attrs = {"batch_dims": batch}
        note = f"{depth}deep{len(fed)}"
        yield Case("GatherND", (x, indices), attrs, fed=fed, portable=True, note=note)
    yield Case("GatherND", (x, ints(1, -1)), note="one")
    for k, axis, largest, fed in itertools.product((1, 3), (0, 1, -1), (0, 1), ((), (1,))):
        note = f"k{k}-{len(fed)}"
        attrs = {"axis": axis, "largest": largest}
        yield Case("TopK", (distinct(3, 4, 5), ints(k)), attrs, fed=fed, outputs=2, portable=True, note=note)
    for axis, fed in itertools.product((0, 1, -1), ((), (1,))):
        condition = ARRAY([True, False, True])
        yield Case("Compress", (x, condition), {"axis": axis}, fed=fed, portable=True, note=f"{len(fed)}")
    for fed in ((), (1,)):
        yield Case("Compress", (normal(2, 3), ARRAY([False, True, True, False, True])), fed=fed, note=f"flat{len(fed)}")


def choosing_cases() -> Iterator[Case]:
    for axis, sort in itertools.product((None, 0, 1, -1), (0, 1)):
        attrs = {"sorted": sort} if axis is None else {"axis": axis, "sorted": sort}
        repeated = np.repeat(distinct(3, 4), 2, axis=1 if axis is None else axis)
        yield Case("Unique", (distinct(3, 4),), attrs)
        yield Case("Unique", (distinct(3, 4),), attrs, outputs=4, portable=True, note="all")
        yield Case("Unique", (repeated,), attrs, outputs=4, kinked=True, note="repeated")
    for axis, fed in itertools.product((-1, 0, 1), ((), (0,))):
        attrs = {"axis": axis}
        yield Case("OneHot", (ints(0, 2, -1), ARRAY(3), normal(2)), attrs, fed=fed, portable=True, note=f"{len(fed)}")
    yield Case("OneHot", (ints([0, 7], [1, 1]), ARRAY(3), normal(2)), {"axis": 1}, note="out_of_range")


def reducing_cases() -> Iterator[Case]:
    """Scattering that multiplies, or keeps the largest or smallest."""
    x = normal(3, 4, 5)
    zero, update = x.copy(), normal(2, 3, 4)
    zero[0, 0], update[:, 0, :2] = 0, 0
    for reduction, fed in itertools.product(("mul", "max", "min"), ((), (1,))):
        attrs, note = {"reduction": reduction}, f"{len(fed)}"
        for axis in (0, 1, -1):
            indices = RNG.integers(-x.shape[axis], x.shape[axis], (2, 3, 4))
            inputs = (x, indices, normal(2, 3, 4))
            yield Case("ScatterElements", inputs, {"axis": axis, **attrs}, fed=fed, note=note)
        yield Case("ScatterND", (x, ints([0], [-1], [0]), normal(3, 4, 5)), attrs, fed=fed, note=note)
        yield Case("ScatterND", (x, ints([[0, 1], [2, -1]]), normal(1, 2, 5)), attrs, fed=fed, note=f"pairs{note}")
        ties = ARRAY([1.0, 2, 2, 0]), ints(0, 0, 1, 1, 2), ARRAY([1.0, 1, 3, 3, 2])
        if reduction != "mul":
            yield Case("ScatterElements", ties, attrs, fed=fed, kinked=True, note=f"ties{note}")
    yield Case("ScatterElements", (zero, RNG.integers(0, 3, (2, 3, 4)), update), {"reduction": "mul"}, note="zeros")


def placing_cases() -> Iterator[Case]:
    x = normal(3, 4, 5)
    for axis, reduction, fed in itertools.product((0, 1, -1), ("none", "add"), ((), (1,))):
        n = x.shape[axis]
        shape = [2, 3, 4]
        count = shape[axis]
        order = np.argsort(RNG.random((*(s for i, s in enumerate(shape) if i != axis % 3), n)), -1)[..., :count]
        indices = np.moveaxis(order, -1, axis)
        if reduction == "add":  # places may repeat
            indices = RNG.integers(-n, n, shape)
        attrs = {"axis": axis, "reduction": reduction}
        yield Case("ScatterElements", (x, indices, normal(*shape)), attrs, fed=fed, portable=True, note=f"{len(fed)}")
    for reduction, fed in itertools.product(("none", "add"), ((), (1,))):
        attrs = {"reduction": reduction}
        rows = ints([0], [2]) if reduction == "none" else ints([0], [-1], [0])
        yield Case("ScatterND", (x, rows, normal(len(rows), 4, 5)), attrs, fed=fed, portable=True, note=f"{len(fed)}")
        pairs = ints([[0, 1], [2, -1]])
        yield Case("ScatterND", (x, pairs, normal(1, 2, 5)), attrs, fed=fed, note=f"pairs{len(fed)}")
        points = ints([0, 1, 2], [2, -1, 0])
        yield Case("ScatterND", (x, points, normal(2)), attrs, fed=fed, note=f"points{len(fed)}")


def rearranging_cases() -> Iterator[Case]:
    for block, mode in itertools.product((1, 2, 3), ("DCR", "CRD")):
        yield Case("DepthToSpace", (normal(2, 2 * block**2, 2, 3),), {"blocksize": block, "mode": mode})
    for block in (1, 2, 3):
        yield Case("SpaceToDepth", (normal(2, 3, 2 * block, block),), {"blocksize": block})
    for k, upper, fed in itertools.product((None, 0, 1, -2, 9), (0, 1), ((), (1,))):
        if k is None and fed:
            continue
        given = () if k is None else (ARRAY(k),)
        yield Case("Trilu", (normal(2, 3, 4), *given), {"upper": upper}, fed=fed, note=f"{k}-{len(fed)}")
    for batch, fed in itertools.product((0, 1), ((), (1,))):
        attrs = {"batch_axis": batch, "time_axis": 1 - batch}
        yield Case("ReverseSequence", (normal(4, 4, 2), ints(1, 4, 3, 2)), attrs, fed=fed, note=f"{len(fed)}")
    for axis, exclusive, reverse in itertools.product((0, 1, -1), (0, 1), (0, 1)):
        attrs = {"exclusive": exclusive, "reverse": reverse}
        yield Case("CumSum", (normal(2, 3, 4), ARRAY(axis)), attrs, note=f"axis{axis}")
    yield Case("CumSum", (normal(2, 3), ARRAY(1)), fed=(1,), note="fed")


# ---- resizing ------------------------------------------------------------------------------------------------------


def resize_cases() -> Iterator[Case]:
    x, small = normal(1, 2, 4, 5), normal(1, 1, 3, 4)
    nothing = None
    places = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    for mode, place in itertools.product(("nearest", "linear", "cubic"), places):
        attrs = {"mode": mode, "coordinate_transformation_mode": place}
        for scales in ((2, 2), (1.6, 0.7), (1, 1.5)):
            factors = ARRAY([1, 1, *scales], np.float32)
            # for corners of lengths that are no whole numbers, runtimes round before they align
            same = place != "align_corners" or scales == (2, 2)
            for fed in ((), (2,)):
                note = f"by{scales}{len(fed)}"
                yield Case("Resize", (x, nothing, factors), attrs, own=(2,), fed=fed, in_runtime=same, note=note)
        for sizes, fed in itertools.product(((8, 10), (3, 9)), ((), (3,))):
            given = (x, nothing, nothing, ints(1, 2, *sizes))
            yield Case("Resize", given, attrs, fed=fed, note=f"to{sizes}{len(fed)}")
    for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        for place, scale in itertools.product(("half_pixel", "asymmetric"), (3.0, 1.5)):
            attrs = {"nearest_mode": rounding, "coordinate_transformation_mode": place}
            given = (small, nothing, ARRAY([1, 1, scale, scale], np.float32))
            yield Case("Resize", given, attrs, own=(2,), note=f"by{scale}")
    for mode in ("linear", "cubic"):
        attrs = {"mode": mode, "antialias": 1}
        yield Case("Resize", (x, nothing, ARRAY([1, 1, 0.6, 0.6], np.float32)), attrs, own=(2,), opset=18)
    attrs = {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}
    yield Case("Resize", (x, nothing, ARRAY([1, 1, 1.4, 0.8], np.float32)), attrs, own=(2,))
    attrs = {"mode": "linear", "axes": [2, 3]}
    yield Case("Resize", (x, nothing, nothing, ints(7, 3)), attrs, note="axes")
    crop = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0}
    roi = ARRAY([0, 0, 0.2, -0.3, 1, 1, 0.8, 0.9], np.float32)
    yield Case("Resize", (x, roi, nothing, ints(1, 2, 3, 6)), crop, own=(1,), in_runtime=False)
    for policy, mode, sizes in itertools.product(
        ("not_larger", "not_smaller"), ("nearest", "linear", "cubic"), ((8, 9), (3, 9), (7, 3))
    ):
        attrs = {"mode": mode, "keep_aspect_ratio_policy": policy, "axes": [2, 3]}
        for fed in ((), (3,)):
            inputs = (x, nothing, nothing, ints(*sizes))
            yield Case("Resize", inputs, attrs, fed=fed, note=f"kept{sizes}{len(fed)}")


# ---- products ------------------------------------------------------------------------------------------------------


def einsum_cases() -> Iterator[Case]:
    two = {
        "ij,jk->ik": ((2, 3), (3, 4)),
        "ij,jk": ((2, 3), (3, 4)),
        "bij,bjk->bik": ((2, 3, 4), (2, 4, 5)),
        "bhid,bhjd->bhij": ((1, 2, 3, 4), (1, 2, 5, 4)),
        "bhij,bhjd->bihd": ((1, 2, 3, 4), (1, 2, 4, 5)),
        "...ij,...jk->...ik": ((2, 3, 4), (2, 4, 5)),
        "...ij,jk->...ik": ((2, 3, 4), (4, 5)),
        "i,j->ij": ((3,), (4,)),
        "i,i->": ((3,), (3,)),
        "i,i": ((3,), (3,)),
        "ij,k->ik": ((2, 3), (4,)),
        "ij,ij->i": ((2, 3), (2, 3)),
        "bi,oi->bo": ((2, 3), (4, 3)),
        "b i j , j k -> b k i": ((2, 3, 4), (4, 5)),
        "ii,ij->j": ((3, 3), (3, 4)),
        "iij,j->i": ((3, 3, 2), (2,)),
    }
    for equation, (a, b) in two.items():
        yield Case("Einsum", (normal(*a), normal(*b)), {"equation": equation}, fixed=(0,) if "ii" in equation else ())
    several = {
        "ij,jk,kl->il": ((2, 3), (3, 4), (4, 2)),
        "bi,bj,bk->bijk": ((2, 3), (2, 2), (2, 4)),
        "i,i,i->": ((3,), (3,), (3,)),
        "...i,ij,...j->...": ((2, 3), (3, 4), (2, 4)),
        "ij,ij,ij,ij->i": ((2, 3),) * 4,
        "iij,j,k->ik": ((3, 3, 2), (2,), (4,)),
    }
    for equation, shapes in several.items():
        fixed = (0,) if "ii" in equation else ()
        yield Case("Einsum", tuple(normal(*s) for s in shapes), {"equation": equation}, fixed=fixed)
    one = {"ij->ji": (2, 3), "ij->i": (2, 3), "ij->": (2, 3)}
    one |= {"...ii->...i": (2, 3, 3), "ii->": (3, 3), "i...->...": (2, 3)}
    for equation, shape in one.items():
        yield Case("Einsum", (normal(*shape),), {"equation": equation}, fixed=(0,))


# ---- norms ---------------------------------------------------------------------------------------------------------


def layer_cases() -> Iterator[Case]:
    for shape in ((2, 3), (2, 3, 4), (2, 3, 2, 4)):
        for axis in range(-len(shape), len(shape)):
            inner = shape[axis:]
            attrs = {"axis": axis, "epsilon": 1e-2}
            for bias in ((), (normal(*inner),)):
                yield Case(
                    "LayerNormalization", (normal(*shape), normal(*inner), *bias), attrs, note="bias" * len(bias)
                )
            yield Case("RMSNormalization", (normal(*shape), normal(*inner)), attrs, opset=23)
            for p in (1, 2):
                yield Case("LpNormalization", (normal(*shape),), {"axis": axis, "p": p})
    given = (normal(2, 3, 4), normal(4), normal(4))
    for unseeded in ((), (0,), (1,), (2,), (0, 1), (0, 2)):
        yield Case("LayerNormalization", given, outputs=3, unseeded=unseeded, note=f"all{unseeded}")
    for shape in ((2, 4, 5), (1, 4, 2, 3), (2, 4, 2, 2, 2)):
        x, scale, bias = normal(*shape), normal(4), normal(4)
        yield Case("InstanceNormalization", (x, scale, bias), {"epsilon": 1e-2})
        for groups in (1, 2, 4):
            attrs = {"num_groups": groups, "epsilon": 1e-2}
            yield Case("GroupNormalization", (x, scale, bias), attrs, opset=21)
    yield Case("MeanVarianceNormalization", (normal(2, 3, 4, 2),))
    yield Case("MeanVarianceNormalization", (normal(2, 3, 4),), {"axes": [0, 2]})
    yield Case("LpNormalization", (ARRAY([[3.0, 0, 4], [1, 2, -3]]),), {"p": 2}, note="a_zero")


def norm_cases() -> Iterator[Case]:
    smooth = ("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd", "ReduceLogSum", "ReduceL1")
    for op, axes, keep in itertools.product(smooth, ((), (0,), (-1,), (0, 2)), (0, 1)):
        x = positive(2, 3, 4) if op == "ReduceLogSum" else normal(2, 3, 4)
        given = (x, ints(*axes)) if axes else (x,)
        yield Case(op, given, {"keepdims": keep}, note=f"axes{axes}")
        if axes in ((0,), (0, 2)):
            yield Case(op, given, {"keepdims": keep}, fed=(1,), note=f"fed{axes}")
    zeros = ARRAY([[1.0, 2, 0], [0, 3, 0], [4, -1, 2], [0, 0, 0]])
    for axes in ((0,), (1,), (0, 1)):
        yield Case("ReduceProd", (zeros, ints(*axes)), note=f"zeros{axes}")
    zeros = ARRAY([[1.0, 0, 2, 3], [0, 0, -1, 2], [4, 1, 0, 0]])
    for axis, exclusive, reverse in itertools.product((0, 1, -1), (0, 1), (0, 1)):
        attrs = {"exclusive": exclusive, "reverse": reverse}
        yield Case("CumProd", (normal(2, 3, 4), ARRAY(axis)), attrs, opset=26, note=f"axis{axis}")
        yield Case("CumProd", (zeros, ARRAY(axis)), attrs, opset=26, note=f"axis{axis}zeros")
    yield Case("CumProd", (normal(2, 3), ARRAY(1)), opset=26, fed=(1,), note="fed")
    for p, shape in itertools.product((1, 2, 3), ((2, 3, 5), (1, 2, 3, 4))):
        yield Case("GlobalLpPool", (normal(*shape),), {"p": p})
        n = len(shape) - 2
        for pads, strides in itertools.product((0, 1), (1, 2)):
            attrs = {"kernel_shape": [3] * n, "p": p, "pads": [pads] * 2 * n, "strides": [strides] * n}
            yield Case("LpPool", (normal(*shape),), attrs)
    yield Case("LpPool", (normal(1, 2, 5, 4),), {"kernel_shape": [2, 3], "auto_pad": "SAME_UPPER"})
    yield Case("PRelu", (normal(2, 3, 4), normal(3, 1)))
    yield Case("PRelu", (normal(2, 3), normal(1)))
    yield Case("PRelu", (normal(2, 3), normal(2, 3)))
    yield Case("PRelu", (ARRAY([-1.0, 0, 2]), ARRAY([0.3])), kinked=True, note="kinks")
    yield Case("Shrink", (normal(3, 5),), {"lambd": 0.4, "bias": 0.3})


FAMILIES = (
    picking_cases,
    choosing_cases,
    placing_cases,
    reducing_cases,
    rearranging_cases,
    resize_cases,
    einsum_cases,
    layer_cases,
    norm_cases,
)
