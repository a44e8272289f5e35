"""Cases of operators that sample pictures, transform signals, or are seen through a body of ours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.adjoint_cases import ARRAY, RNG, ints, normal
from tests.adjoint_tools import Case


def given(*inputs: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """Inputs without the absent ones at the end."""
    kept = list(inputs)
    while kept[-1] is None:
        kept.pop()
    return tuple(kept)


# ---- sampling ------------------------------------------------------------------------------------------------------


def grid_sample_cases() -> Iterator[Case]:
    """Some places lie outside: what the gradient is there, and in mode nearest, torch says."""
    for padding, corners in itertools.product(("zeros", "border", "reflection"), (0, 1)):
        attrs = {"padding_mode": padding, "align_corners": corners}
        for mode in ("linear", "nearest", "cubic"):
            inputs = (normal(2, 3, 4, 5), RNG.uniform(-1.6, 1.6, (2, 3, 4, 2)))
            yield Case("GridSample", inputs, {"mode": mode, **attrs}, opset=20, portable=True, kinked=True)
        for mode in ("linear", "nearest"):
            inputs = (normal(1, 2, 3, 4, 3), RNG.uniform(-1.6, 1.6, (1, 2, 3, 2, 3)))
            yield Case("GridSample", inputs, {"mode": mode, **attrs}, opset=20, kinked=True)
    for mode in ("bilinear", "bicubic", "nearest"):
        inputs = (normal(1, 2, 4, 5), RNG.uniform(-0.9, 0.9, (1, 3, 4, 2)))
        yield Case("GridSample", inputs, {"mode": mode}, held=(1,), note="older")
    inside = ARRAY([[-0.55, 0.31], [0.13, -0.27], [0.42, 0.6]]).reshape(1, 1, 3, 2)
    yield Case("GridSample", (normal(1, 2, 4, 5), inside), opset=20, note="inside")
    yield Case("GridSample", (normal(1, 2, 1, 1), inside), {"align_corners": 1}, opset=20, held=(1,), note="one_pixel")


def roi_align_cases() -> Iterator[Case]:
    regions = ARRAY([[0.3, 0.7, 5.1, 4.2], [-2, 1, 3, 9], [2.0, 2, 2.5, 2.2], [1, 1, 1, 1]])  # outside, small, empty
    for centre, ratio, scale in itertools.product(("half_pixel", "output_half_pixel"), (0, 1, 2), (1.0, 0.5)):
        attrs = {"coordinate_transformation_mode": centre, "sampling_ratio": ratio, "spatial_scale": scale}
        attrs |= {"output_height": 2, "output_width": 3}
        for fed in ((), (2,)):
            inputs = (normal(2, 3, 6, 5), regions, ints(0, 1, 1, 0))
            yield Case("RoiAlign", inputs, attrs, held=(1,), fed=fed, portable=True, note=f"fed{len(fed)}")
    yield Case("RoiAlign", (normal(1, 1, 4, 4), regions[:1], ints(0)), held=(1,), note="no_attributes")


def unpooling_cases() -> Iterator[Case]:
    places = ints(0, 3, 10, 13, 17, 18, 25, 31).reshape(1, 2, 2, 2)
    attrs = {"kernel_shape": [2, 2], "strides": [2, 2]}
    for fed in ((), (1,)):
        yield Case("MaxUnpool", (normal(1, 2, 2, 2), places), attrs, fed=fed, portable=True, note=f"fed{len(fed)}")
    for size in (4, 5):
        yield Case("MaxUnpool", (normal(1, 2, 2, 2), places, ints(1, 2, size, size)), attrs, fed=(1, 2), note=f"{size}")


def col2im_cases() -> Iterator[Case]:
    forms: list[tuple[tuple[int, ...], list[int], list[int], dict[str, Any]]] = [
        ((2, 12, 6), [4, 5], [2, 3], {"strides": [1, 2]}),
        ((1, 5, 5), [5, 5], [1, 5], {}),
        ((1, 9, 25), [5, 5], [3, 3], {"pads": [1, 0, 1, 2]}),
        ((1, 8, 9), [5, 5], [2, 2], {"dilations": [2, 2]}),
        ((1, 10, 12), [3, 4, 5], [1, 1, 5], {}),
    ]
    for shape, image, block, attrs in forms:
        for fed in ((), (1,)):
            inputs = (normal(*shape), ints(*image), ints(*block))
            yield Case("Col2Im", inputs, attrs, fed=fed, portable=True, note=f"{image}{block}{len(fed)}")


# ---- transforms ----------------------------------------------------------------------------------------------------


def dft_cases() -> Iterator[Case]:
    kinds = [(0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 2)]  # inverse, one-sided, real or complex
    for (inverse, onesided, numbers), length, axis in itertools.product(kinds, (None, 4, 5, 6, 7), (0, 1, -2)):
        attrs = {"inverse": inverse, "onesided": onesided}
        x, size = normal(5, 5, numbers), None if length is None else ARRAY(length)
        # There ONNX Runtime 1.32 reads the spectrum otherwise than ONNX defines.
        runs = not (inverse and onesided) or length is None
        note = f"to{length}axis{axis}"
        yield Case("DFT", (x, size, ARRAY(axis)), attrs, opset=20, in_runtime=runs, note=note)
        if axis == 1:
            yield Case("DFT", given(x, size), {**attrs, "axis": axis}, in_runtime=runs, note=f"older{note}")
    yield Case("DFT", (normal(2, 5, 1), ARRAY(7), ARRAY(1)), opset=20, fed=(1,), note="fed")
    yield Case("DFT", (normal(2, 5, 2),), opset=20, note="no_axis")


def stft_cases() -> Iterator[Case]:
    """Lengths of signal, step, window and frame; one-sided; real or complex."""
    for total, step, window, frame, onesided, numbers in (
        (11, 3, 4, None, 1, 1),
        (11, 3, 4, 4, 0, 1),
        (12, 4, None, 6, 0, 2),
        (9, 2, 5, None, 0, 2),
        (8, 1, None, None, 1, 1),
    ):
        weights, length = None if window is None else normal(window), None if frame is None else ARRAY(frame)
        inputs = given(normal(2, total, numbers), ARRAY(step), weights, length)
        runs = not (window is None and frame is None)  # ONNX Runtime fails without either
        yield Case("STFT", inputs, {"onesided": onesided}, in_runtime=runs, note=f"{step}_{window}_{frame}")


def determinant_cases() -> Iterator[Case]:
    for shape in ((1, 1), (2, 2), (3, 3), (2, 4, 4), (1, 2, 3, 3), (2, 1, 1)):
        yield Case("Det", (normal(*shape),))
    yield Case("Det", (ARRAY([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]]),), note="singular")


# ---- bodies of ours ------------------------------------------------------------------------------------------------


def deform_conv_cases() -> Iterator[Case]:
    """Groups, sets of offsets, strides, pads, dilations, with a mask and a bias or without."""
    for group, sets, strides, pads, dilations, masked, biased in (
        (1, 1, (1, 1), (0, 0, 0, 0), (1, 1), True, True),
        (2, 2, (2, 1), (1, 0, 1, 2), (1, 2), True, False),
        (1, 2, (1, 2), (1, 1, 1, 1), (1, 1), False, True),
        (2, 1, (1, 1), (0, 0, 0, 0), (2, 1), False, False),
    ):
        high, wide = ((n + pads[k] + pads[k + 2] - dilations[k] - 1) // strides[k] + 1 for k, n in enumerate((5, 6)))
        inputs = given(
            normal(2, 4, 5, 6),
            normal(2, 4 // group, 2, 2),
            RNG.uniform(-0.9, 0.9, (2, sets * 8, high, wide)),
            normal(2) if biased else None,
            normal(2, sets * 4, high, wide) if masked else None,
        )
        attrs = {"group": group, "offset_group": sets, "kernel_shape": [2, 2]}
        attrs |= {"strides": list(strides), "pads": list(pads), "dilations": list(dilations)}
        for opset in (19, 20, 22):
            yield Case("DeformConv", inputs, attrs, opset=opset, fixed=(1,), note=f"opset{opset}")


def tensor_scatter_cases() -> Iterator[Case]:
    for mode, axis in itertools.product(("linear", "circular"), (1, -2, 2)):
        begin = ints(1, 0) if mode == "linear" else ints(2, 3)
        shape = [2, 3, 4, 5]
        shape[axis] = 2
        inputs = (normal(2, 3, 4, 5), normal(*shape), begin)
        for fed in ((), (2,)):
            attrs = {"mode": mode, "axis": axis}
            yield Case("TensorScatter", inputs, attrs, opset=24, fed=fed, note=f"fed{len(fed)}")
    yield Case("TensorScatter", (normal(2, 4, 5), normal(2, 2, 5)), opset=24)


def affine_grid_cases() -> Iterator[Case]:
    for size, corners, fed in itertools.product(((2, 3, 4, 5), (1, 2, 3, 1, 2)), (0, 1), ((), (1,))):
        theta = normal(size[0], len(size) - 2, len(size) - 1)
        # The only pixel of an axis lies at -1 by the standard, where both ends are corners; ONNX Runtime puts it at 1.
        same = not (corners and 1 in size[2:])
        attrs = {"align_corners": corners}
        inputs = (theta, ints(*size))
        yield Case("AffineGrid", inputs, attrs, opset=20, fed=fed, in_runtime=same, note=f"{len(fed)}")


FAMILIES = (
    affine_grid_cases,
    grid_sample_cases,
    roi_align_cases,
    unpooling_cases,
    col2im_cases,
    dft_cases,
    stft_cases,
    determinant_cases,
    deform_conv_cases,
    tensor_scatter_cases,
)
