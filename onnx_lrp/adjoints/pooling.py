"""MaxPool, AveragePool, LpPool; MaxUnpool, Col2Im."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lrp.adjoints.reduction import lp_slopes
from onnx_lrp.adjoints.registry import linear, nonlinear
from onnx_lrp.adjoints.shapes import (
    cast_like,
    concat_ints,
    crop_like,
    dim_of,
    ints,
    ones_like,
    reshape_like,
    scatter_flat,
    shape_of,
)
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError


@dataclass(frozen=True)
class Window:
    """A pooling window with explicit pads."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    ceil: bool

    @property
    def apart(self) -> bool:
        """True if no two windows share an element."""
        return all(s >= d * (k - 1) + 1 for s, d, k in zip(self.strides, self.dilations, self.kernel, strict=True))

    @property
    def padded(self) -> bool:
        """True if there is any padding."""
        return any(self.begin) or any(self.end)

    def attrs(self, place: bool = True) -> dict[str, Any]:
        """As attributes of a pooling operator; without ``place`` only what a convolution has too, and no pads."""
        result: dict[str, Any] = {"kernel_shape": list(self.kernel), "strides": list(self.strides)}
        if any(d != 1 for d in self.dilations):
            result["dilations"] = list(self.dilations)
        if place and self.padded:
            result["pads"] = [*self.begin, *self.end]
        if place and self.ceil:
            result["ceil_mode"] = 1
        return result


def window(call: Call) -> Window:
    """The window of a pooling call with explicit pads."""
    attrs = call.attrs
    kernel = tuple(attrs["kernel_shape"])
    n = len(kernel)
    pads = tuple(attrs.get("pads") or (0,) * (2 * n))
    ones = (1,) * n
    strides, dilations = tuple(attrs.get("strides") or ones), tuple(attrs.get("dilations") or ones)
    return Window(kernel, strides, dilations, pads[:n], pads[n:], bool(attrs.get("ceil_mode", 0)))


@nonlinear("MaxPool", moves=True)
def _max_pool(e: Emitter, call: Call, d: Value) -> Value:
    """The first of the largest elements of a window takes all.

    The pool is run again with its Indices output, so that the source's own pool keeps its fast kernel; Indices are
    flat over all axes. Windows that share no element need no sum: MaxUnpool. Otherwise ScatterElements adds.
    """
    x, w = call.given(0), window(call)
    if e.portable:
        return _max_pool_by_patches(e, call, d, w)
    pooled, indices = e.ops("MaxPool", x, outputs=2, label="MaxPool_indices", **w.attrs())
    pooled.facts, indices.facts = call.output.facts, indices.facts
    if w.apart and not w.padded and not w.ceil and all(k == 1 for k in w.dilations) and len(w.kernel) <= 3:
        return e.op("MaxUnpool", d, indices, shape_of(e, x), shape=x.shape, **w.attrs())
    return scatter_flat(e, d, indices, x)


def _max_pool_by_patches(e: Emitter, call: Call, d: Value, w: Window) -> Value:
    """The same without Indices, MaxUnpool or ScatterElements, for runtimes that lack them.

    One-hot kernels copy every window into an axis of patches; the first of the largest patches takes all, and the
    transposed convolution adds it back. Padding must never win: it gets the lowest number.
    """
    x, y = call.given(0), call.output
    axes = list(range(2, x.rank))
    grow = [0] * len(axes)
    if w.ceil:  # make the overhang of the last windows explicit
        for i, a in enumerate(axes):
            have, windows = x.shape[a], y.shape[a]
            if isinstance(have, int) and isinstance(windows, int):
                reach = w.dilations[i] * (w.kernel[i] - 1) + 1
                grow[i] = max(0, (windows - 1) * w.strides[i] + reach - have - w.begin[i] - w.end[i])
            else:
                grow[i] = w.strides[i] - 1
    begin, end = list(w.begin), [p + g for p, g in zip(w.end, grow, strict=True)]
    inside = x
    if any(begin) or any(end):
        lowest = e.const(np.finfo(x.dtype).min, x.dtype)
        inside = e.op("Pad", x, ints(e, begin + end), lowest, ints(e, axes))
    # Channels join the batch, so that one small kernel serves all.
    rows = e.op("Reshape", inside, concat_ints(e, [[-1, 1], *(dim_of(e, inside, a) for a in axes)]))
    top = e.op("Reshape", d, concat_ints(e, [[-1, 1], *(dim_of(e, y, a) for a in axes)]))
    count = int(np.prod(w.kernel))
    kernel = e.const(np.eye(count, dtype=x.dtype).reshape(count, 1, *w.kernel), name="patches")
    attrs: dict[str, Any] = w.attrs(place=False)
    patches = crop_like(e, e.op("Conv", rows, kernel, **attrs), top, axes, [0] * len(axes))
    winner = e.op("ArgMax", patches, axis=1, keepdims=1)
    number = e.const(np.arange(count).reshape(-1, *[1] * len(axes)), name="number")
    share = cast_like(e, e.op("Equal", winner, number), d) * top
    spread = e.op("ConvTranspose", share, kernel, output_padding=[s - 1 for s in w.strides], **attrs)
    return reshape_like(e, _window_back(e, spread, x, axes, begin), x)


def _window_back(e: Emitter, spread: Value, x: Value, axes: list[int], begin: list[int]) -> Value:
    """Cut the window of x out of what a transposed convolution spread, with zeros where no window reached."""
    ends = [dim_of(e, x, a) + b for a, b in zip(axes, begin, strict=True)]
    short = [e.op("Max", end - dim_of(e, spread, a), ints(e, [0])) for end, a in zip(ends, axes, strict=True)]
    known = [e.ints(s) for s in short]
    if any(k is None or k[0] for k in known):
        spread = e.op("Pad", spread, concat_ints(e, [[0] * len(axes), *short]), None, ints(e, axes))
    return crop_like(e, spread, x, axes, begin)


@linear("AveragePool")
def _average_pool(e: Emitter, call: Call, d: Value) -> Value:
    """Cotangent / count, spread over each window."""
    return _spread_windows(e, call, d / window_count(e, call))


def _spread_windows(e: Emitter, call: Call, share: Value) -> Value:
    """Add what each window gets to all its elements: a transposed convolution with ones; channels join the batch."""
    x, w = call.given(0), window(call)
    axes = list(range(2, 2 + len(w.kernel)))
    rows = e.op("Reshape", share, concat_ints(e, [[-1, 1], *(dim_of(e, share, a) for a in axes)]))
    ones = e.const(np.ones((1, 1, *w.kernel), x.dtype), name="ones")
    attrs: dict[str, Any] = w.attrs(place=False)
    spread = e.op("ConvTranspose", rows, ones, output_padding=[s - 1 for s in w.strides], **attrs)
    return reshape_like(e, _window_back(e, spread, x, axes, list(w.begin)), x)


def window_count(e: Emitter, call: Call) -> Value | float:
    """How many elements each window of an AveragePool divides by: a number, or a map of the output's size."""
    w = window(call)
    full = float(np.prod(w.kernel))
    if not w.ceil and (not w.padded or call.attrs.get("count_include_pad", 0)):
        return full
    # The pool's own opinion: the mean of ones over a window of known size, with padding counted as zero.
    x = call.given(0)
    ones = ones_like(e, e.op("Slice", x, ints(e, [0, 0]), ints(e, [1, 1]), ints(e, [0, 1]), shape=(1, 1, *x.shape[2:])))
    if call.attrs.get("count_include_pad", 0):
        pads = [0, 0, *w.begin, 0, 0, *w.end]
        ones = e.op("Pad", ones, ints(e, pads), e.const(1, x.dtype))
        begin = end = (0,) * len(w.kernel)
    else:
        begin, end = w.begin, w.end
    axes = list(range(2, 2 + len(w.kernel)))
    grow = [w.strides[i] - 1 + w.dilations[i] * (k - 1) if w.ceil else 0 for i, k in enumerate(w.kernel)]
    padded = e.op("Pad", ones, ints(e, [*begin, *(p + g for p, g in zip(end, grow, strict=True))]), None, ints(e, axes))
    kernel = e.const(np.ones((1, 1, *w.kernel), x.dtype), name="ones")
    count = e.op("Conv", padded, kernel, **w.attrs(place=False))
    return crop_like(e, count, call.output, axes, [0] * len(axes))


@nonlinear("LpPool")
def _lp_pool(e: Emitter, call: Call, d: Value) -> Value:
    """Y = (Σ |x|^p)^(1/p) over a window: dx = sign(x) |x|^(p-1) · Σ over the windows of x of d y^(1-p)."""
    inner, outer = lp_slopes(e, call.given(0), call.output, int(call.attrs.get("p", 2)))
    return _spread_windows(e, call, d * inner) * outer


@nonlinear("GlobalLpPool")
def _global_lp_pool(e: Emitter, call: Call, d: Value) -> Value:
    """The same with one window over all positions."""
    inner, outer = lp_slopes(e, call.given(0), call.output, int(call.attrs.get("p", 2)))
    return d * inner * outer


@linear("MaxUnpool", moves=True)
def _max_unpool(e: Emitter, call: Call, d: Value) -> Value:
    """Every element gets d of the place it went to.

    Places count in the flattened output, as ONNX Runtime reads them; onnx's reference reads them in the shape that the
    output has without its third input, the output's shape.
    """
    return e.op("Gather", e.op("Reshape", d, ints(e, [-1])), call.given(1), shape=call.given(0).shape)


@linear("Col2Im")
def _col2im(e: Emitter, call: Call, d: Value) -> Value:
    """The windows of the cotangent, cut out by a convolution with one-hot kernels; channels join the batch."""
    block, x = e.ints(call.input(2)), call.given(0)
    if block is None:
        raise ModelError(f"node '{call.site}' (Col2Im): block_shape is not known; export it as a constant")
    count, axes = int(np.prod(block)), range(2, 2 + len(block))
    rows = e.op("Reshape", d, concat_ints(e, [[-1, 1], *(dim_of(e, d, a) for a in axes)]))
    kernel = e.const(np.eye(count, dtype=x.dtype).reshape(count, 1, *block), name="patches")
    attrs = {name: call.attrs[name] for name in ("strides", "dilations", "pads") if name in call.attrs}
    return reshape_like(e, e.op("Conv", rows, kernel, kernel_shape=block, **attrs), x)
