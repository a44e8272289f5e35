"""Sums of products: Conv, ConvTranspose, Gemm, MatMul."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lrp.adjoints.registry import bilinear
from onnx_lrp.adjoints.shapes import concat_ints, crop_like, dim_of, ints, spatial_axes
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Dim

# Towards few channels ConvTranspose is faster than a Conv with flipped weights (1.9 against 4.8 ms, 64 -> 3 channels).
_FEW_CHANNELS = 16


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides: kernel, strides, dilations, pads at the beginning and the end of each axis, groups."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    group: int

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance between the first and the last tap of the kernel, per axis."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def pads(self) -> list[int]:
        """Pads as ONNX writes them."""
        return [*self.begin, *self.end]

    @property
    def symmetric(self) -> bool:
        """True if both ends of every axis are padded alike."""
        return self.begin == self.end


def geometry(call: Call) -> Geometry:
    """The geometry of a Conv or ConvTranspose with explicit pads."""
    attrs = call.attrs
    weight = call.given(1)
    kernel = tuple(attrs.get("kernel_shape") or weight.shape[2:])
    if not all(isinstance(k, int) for k in kernel):
        raise ModelError(f"node '{call.site}' ({call.op}): the kernel's size is not known; export with static weights")
    n = len(kernel)
    pads = tuple(attrs.get("pads") or (0,) * (2 * n))
    ones = (1,) * n
    return Geometry(
        kernel,
        tuple(attrs.get("strides") or ones),
        tuple(attrs.get("dilations") or ones),
        pads[:n],
        pads[n:],
        int(attrs.get("group", 1)),
    )


def _flipped(e: Emitter, weight: Value, group: int, kernel: tuple[int, ...]) -> Value:
    """Weights (M, C/g, k…) with in- and output channels exchanged per group and every spatial axis reversed.

    A few operators on the source's own weights: the runtime folds them when the session is made.
    """
    n = len(kernel)
    if group == 1:
        turned = e.op("Transpose", weight, perm=[1, 0, *range(2, 2 + n)])
    else:
        m, c = weight.shape[:2]
        assert isinstance(m, int)
        assert isinstance(c, int)
        turned = weight
        if m != group or c != 1:
            split = e.op("Reshape", weight, ints(e, [group, m // group, c, *kernel]))
            swapped = e.op("Transpose", split, perm=[0, 2, 1, *range(3, 3 + n)])
            turned = e.op("Reshape", swapped, ints(e, [group * c, m // group, *kernel]))
    axes = [2 + i for i, k in enumerate(kernel) if k > 1]
    if not axes:
        return turned
    last = ints(e, [-1] * len(axes))
    far = ints(e, [np.iinfo(np.int64).min] * len(axes))
    return e.op("Slice", turned, last, far, ints(e, axes), last, shape=turned.shape)


def _conv_attrs(g: Geometry) -> dict[str, Any]:
    return {
        "kernel_shape": list(g.kernel),
        "strides": list(g.strides),
        "dilations": list(g.dilations),
        "pads": g.pads,
        "group": g.group,
    }


def conv_input(e: Emitter, call: Call, d: Value) -> Value:
    """Adjoint of Conv with respect to its input."""
    return _conv_back(e, call, d, call.given(1), call.given(0).shape[1])


def _conv_back(e: Emitter, call: Call, d: Value, weight: Value, channels: Dim) -> Value:
    """The same with other weights, for an input of so many channels."""
    x, g = call.given(0), geometry(call)
    m, c = weight.shape[:2]
    pads = [r - p for r, p in zip(g.reach * 2, g.pads, strict=True)]
    known = isinstance(m, int) and isinstance(c, int) and (g.group > 1 or c >= _FEW_CHANNELS)
    if known and all(s == 1 for s in g.strides) and min(pads) >= 0:
        attrs = _conv_attrs(g) | {"pads": pads}
        shape = (x.shape[0], channels, *x.shape[2:])
        return e.op("Conv", d, _flipped(e, weight, g.group, g.kernel), shape=shape, **attrs)
    return _transposed(e, d, weight, x, g)


def _conv_joint(e: Emitter, calls: Sequence[Call], d: Value) -> Sequence[Value]:
    """Convolutions of one cotangent with several weights: towards few channels side by side in one.

    A picture has few channels, and its cotangent is large: it is unfolded once (9 against 13 ms, 64 -> 3 + 3 channels).
    """
    weights = [call.given(1) for call in calls]
    c = weights[0].shape[1]
    if geometry(calls[0]).group != 1 or not isinstance(c, int) or c >= _FEW_CHANNELS:
        return [conv_input(e, call, d) for call in calls]
    stacked = _conv_back(e, calls[0], d, e.op("Concat", *weights, axis=1, label="stacked"), c * len(calls))
    return e.ops("Split", stacked, ints(e, [c] * len(calls)), outputs=len(calls), axis=1)


def _transposed(e: Emitter, d: Value, weight: Value, x: Value, g: Geometry) -> Value:
    """ConvTranspose back to the size of ``x``; asymmetric pads are cut off afterwards (CUDA has no kernel for them)."""
    attrs = _conv_attrs(g)
    axes = list(range(2, 2 + len(g.kernel)))
    # What the strides leave over at the end of each axis, 0 to stride - 1 elements, comes back as output_padding.
    left = [
        (n + b + f - r - 1) % s if isinstance(n, int) else s - 1
        for n, b, f, r, s in zip((x.shape[a] for a in axes), g.begin, g.end, g.reach, g.strides, strict=True)
    ]
    attrs["output_padding"] = left
    if g.symmetric:
        loose = [a for a, s in zip(axes, g.strides, strict=True) if s > 1]
        return crop_like(e, e.op("ConvTranspose", d, weight, **attrs), x, loose, [0] * len(loose))
    attrs["pads"] = [0] * (2 * len(axes))
    return crop_like(e, e.op("ConvTranspose", d, weight, **attrs), x, axes, list(g.begin))


def _weight_gradient(e: Emitter, x: Value, d: Value, weight: Value, g: Geometry) -> Value:
    """Correlate input and cotangent: batch and channels change places, strides and dilations too."""
    n = len(g.kernel)
    axes = list(range(2, 2 + n))
    if g.group == 1:
        turned = e.op("Transpose", x, perm=[1, 0, *axes])
    else:
        c = dim_of(e, weight, 1)
        sizes = [dim_of(e, x, a) for a in axes]
        split = e.op("Reshape", x, concat_ints(e, [dim_of(e, x, 0), [g.group], c, *sizes]))
        swapped = e.op("Transpose", split, perm=[2, 1, 0, *range(3, 3 + n)])
        joined = dim_of(e, x, 0) * ints(e, [g.group])
        turned = e.op("Reshape", swapped, concat_ints(e, [c, joined, *sizes]))
    kernel = e.op("Transpose", d, perm=[1, 0, *axes])
    attrs: dict[str, Any] = {"strides": list(g.dilations), "dilations": list(g.strides), "pads": g.pads}
    grown = e.op("Conv", turned, kernel, group=g.group, shape=(None,) * weight.rank, **attrs)
    swapped = e.op("Transpose", grown, perm=[1, 0, *axes])
    return crop_like(e, swapped, weight, axes, [0] * n)


def conv_weight(e: Emitter, call: Call, d: Value) -> Value:
    """Adjoint of Conv with respect to its weights."""
    return _weight_gradient(e, call.given(0), d, call.given(1), geometry(call))


def _channel_sum(e: Emitter, call: Call, d: Value) -> Value:
    return e.op("ReduceSum", d, ints(e, [0, *spatial_axes(call)]), keepdims=0)


bilinear(
    "Conv",
    conv_input,
    conv_weight,
    bias=2,
    bias_adjoint=_channel_sum,
    bias_shape=lambda call: (call.given(1).shape[0],),
    joint=_conv_joint,
)


def conv_transpose_input(e: Emitter, call: Call, d: Value) -> Value:
    """Adjoint of ConvTranspose with respect to its input: the Conv with the same weights."""
    x, g = call.given(0), geometry(call)
    extra = call.attrs.get("output_padding") or [0] * len(g.kernel)
    longer = [2 + i for i, (p, s) in enumerate(zip(extra, g.strides, strict=True)) if p >= s]
    return crop_like(e, e.op("Conv", d, call.given(1), **_conv_attrs(g)), x, longer, [0] * len(longer))


def conv_transpose_weight(e: Emitter, call: Call, d: Value) -> Value:
    """Adjoint of ConvTranspose with respect to its weights."""
    return _weight_gradient(e, d, call.given(0), call.given(1), geometry(call))


def _transpose_channels(call: Call) -> tuple[Any, ...] | None:
    per_group = call.given(1).shape[1]
    return (per_group * int(call.attrs.get("group", 1)),) if isinstance(per_group, int) else None


bilinear(
    "ConvTranspose",
    conv_transpose_input,
    conv_transpose_weight,
    bias=2,
    bias_adjoint=_channel_sum,
    bias_shape=_transpose_channels,
)


def _gemm_flags(call: Call) -> tuple[int, int, float]:
    return int(call.attrs.get("transA", 0)), int(call.attrs.get("transB", 0)), float(call.attrs.get("alpha", 1.0))


def gemm_a(e: Emitter, call: Call, d: Value) -> Value:
    """Y = alpha A' B' + beta C: dA' = alpha d B'^T, written without a Transpose."""
    trans_a, trans_b, alpha = _gemm_flags(call)
    b = call.given(1)
    if trans_a:
        return e.op("Gemm", b, d, transA=trans_b, transB=1, alpha=alpha)
    return e.op("Gemm", d, b, transB=1 - trans_b, alpha=alpha)


def gemm_b(e: Emitter, call: Call, d: Value) -> Value:
    """DB' = alpha A'^T d."""
    trans_a, trans_b, alpha = _gemm_flags(call)
    a = call.given(0)
    if trans_b:
        return e.op("Gemm", d, a, transA=1, transB=trans_a, alpha=alpha)
    return e.op("Gemm", a, d, transA=1 - trans_a, alpha=alpha)


bilinear(
    "Gemm",
    gemm_a,
    gemm_b,
    bias=2,
    bias_adjoint=lambda e, call, d: d if call.attrs.get("beta", 1.0) == 1.0 else d * call.attrs["beta"],
    broadcasts=True,
)


def _swap(e: Emitter, value: Value) -> Value:
    """The last two axes exchanged."""
    n = value.rank
    return e.op("Transpose", value, perm=[*range(n - 2), n - 1, n - 2])


def matmul_a(e: Emitter, call: Call, d: Value) -> Value:
    """DA = d B^T; vectors get an axis of length 1 on their side."""
    a, b = call.given(0), call.given(1)
    if b.rank == 1:
        column = d if a.rank == 1 else e.op("Unsqueeze", d, ints(e, [-1]))
        return column * b
    if a.rank == 1:
        return e.op("Squeeze", b @ e.op("Unsqueeze", d, ints(e, [-1])), ints(e, [-1]))
    return d @ _swap(e, b)


def matmul_b(e: Emitter, call: Call, d: Value) -> Value:
    """DB = A^T d."""
    a, b = call.given(0), call.given(1)
    if a.rank == 1:
        row = d if b.rank == 1 else e.op("Unsqueeze", d, ints(e, [-2]))
        return row * (a if b.rank == 1 else e.op("Unsqueeze", a, ints(e, [-1])))
    if b.rank == 1:
        return e.op("Squeeze", _swap(e, a) @ e.op("Unsqueeze", d, ints(e, [-1])), ints(e, [-1]))
    return _swap(e, a) @ d


def _matmul_forward(e: Emitter, call: Call) -> Value:
    product = e.op("MatMul", call.given(0), call.given(1), label="MatMul_again")
    bias = call.input(2)
    return product if bias is None else product + bias


# MatMul and a constant Add after it are seen as one linear call: the view has a third input, the bias.
bilinear("MatMul", matmul_a, matmul_b, bias=2, broadcasts=True, forward=_matmul_forward)
