"""The pass that writes auto_pad, output_shape and overhanging windows out as plain pads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from onnx_lrp.adjoints.shapes import concat_ints, dim_of, ints, ones_like
from onnx_lrp.emit import Call
from onnx_lrp.errors import ModelError
from onnx_lrp.view import CONVOLUTIONS, View


def explicit_pads(v: View) -> None:
    """Write auto_pad out as pads; where the size is dynamic and the stride above 1, as a Pad of its own."""
    calls = []
    for call in v.calls:
        mode = str(call.attrs.get("auto_pad", "NOTSET"))
        if call.op not in (*CONVOLUTIONS, "MaxPool", "AveragePool", "LpPool") or call.domain:
            calls.append(call)
            continue
        attrs = {k: x for k, x in call.attrs.items() if k not in ("auto_pad", "storage_order")}
        call.attrs = attrs
        if call.op == "ConvTranspose":
            _explicit_transposed(call, mode)
        elif mode in ("SAME_UPPER", "SAME_LOWER"):
            calls.extend(_same_pads(v, call, mode))
            continue
        elif mode == "VALID":
            attrs.pop("pads", None)
            attrs.pop("ceil_mode", None)
        elif attrs.get("ceil_mode", 0):
            _check_windows(call)
        call.outputs = call.outputs[:1]
        calls.append(call)
    v.calls = calls


def _sliding(call: Call) -> tuple[list[int], list[int], list[int]]:
    kernel = call.attrs.get("kernel_shape") or list(call.given(1).shape[2:])
    n = len(kernel)
    return list(kernel), list(call.attrs.get("strides") or [1] * n), list(call.attrs.get("dilations") or [1] * n)


def _check_windows(call: Call) -> None:
    """Before opset 22 shape inference counts a last window of ceil_mode that lies in the padding; no runtime has it."""
    _, strides, _ = _sliding(call)
    pads = call.attrs.get("pads") or [0] * (2 * len(strides))
    for i, (length, said) in enumerate(zip(call.given(0).shape[2:], call.output.shape[2:], strict=True)):
        if isinstance(length, int) and isinstance(said, int) and (said - 1) * strides[i] >= length + pads[i]:
            raise ModelError(
                f"node '{call.site}' ({call.op}): its shape in the model counts a window that lies in the padding, "
                "which runtimes leave out; export with opset 22 or higher"
            )


def _same_pads(v: View, call: Call, mode: str) -> list[Call]:
    e, x = v.e, call.given(0)
    call.outputs = call.outputs[:1]
    call.attrs.pop("ceil_mode", None)  # it counts for explicit pads only
    kernel, strides, dilations = _sliding(call)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    lengths = x.shape[2:]
    totals = []
    for length, stride, span in zip(lengths, strides, reach, strict=True):
        if isinstance(length, int):
            totals.append(max((math.ceil(length / stride) - 1) * stride + span - length, 0))
        elif stride == 1:
            totals.append(span - 1)
        else:
            break
    lower = mode == "SAME_LOWER"
    if len(totals) == len(kernel):
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        call.attrs["pads"] = large + small if lower else small + large
        return [call]
    # total = max((ceil(n / stride) - 1) * stride + reach - n, 0), worked out at run time
    begins, ends = [], []
    with e.scope(call.site, doc=f"pads of auto_pad={mode}"):
        for i, (stride, span) in enumerate(zip(strides, reach, strict=True)):
            n = dim_of(e, x, 2 + i)
            count = e.op("Div", n + (stride - 1), ints(e, [stride]))
            total = e.op("Max", (count - 1) * stride + span - n, ints(e, [0]))
            half = e.op("Div", total, ints(e, [2]))
            begins.append(total - half if lower else half)
            ends.append(half if lower else total - half)
        fill = e.const(np.finfo(x.dtype).min if call.op == "MaxPool" else 0, x.dtype)
        axes = ints(e, range(2, x.rank))
        pads = concat_ints(e, [*begins, *ends])
        symbols = tuple(f"{call.site}.padded{i}" for i in range(len(kernel)))
        padded = e.op("Pad", x, pads, fill, axes, shape=(*x.shape[:2], *symbols))
    pad = Call(
        "Pad", (x, pads, fill, axes), (padded,), {"mode": "constant"}, call.site, note=f"auto_pad={mode} as a Pad"
    )
    call.inputs = (padded, *call.inputs[1:])
    call.attrs["pads"] = [0] * (2 * len(kernel))
    if call.op != "AveragePool" or call.attrs.pop("count_include_pad", 0):
        return [pad, call]
    # The mean over a padded window, times what its padding takes away: one over the mean of padded ones.
    with e.scope(call.site, doc=f"windows of auto_pad={mode} without their padding"):
        inner = e.op("Slice", ones_like(e, x), ints(e, [0, 0]), ints(e, [1, 1]), ints(e, [0, 1]))
        share = e.op("AveragePool", e.op("Pad", inner, pads, None, axes), **call.attrs)
        mean = replace(call, outputs=(e.op("AveragePool", padded, **call.attrs),))
        factor = e.op("Reciprocal", share, shape=(1, 1, *call.output.shape[2:]))
    return [pad, mean, Call("Mul", (mean.output, factor), call.outputs, {}, call.site, note="mean without padding")]


def _explicit_transposed(call: Call, mode: str) -> None:
    """ConvTranspose: output_shape and auto_pad decide the pads (ONNX operator text)."""
    attrs, x = call.attrs, call.given(0)
    kernel, strides, dilations = _sliding(call)
    extra = list(attrs.get("output_padding") or [0] * len(kernel))
    wanted = attrs.pop("output_shape", None)
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s if isinstance(n, int) else None for n, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        if mode == "VALID":
            attrs.pop("pads", None)
        return
    begin, end = [], []
    for n, s, k, d, o, w in zip(x.shape[2:], strides, kernel, dilations, extra, wanted[-len(kernel) :], strict=True):
        if isinstance(n, int) and isinstance(w, int):
            total = s * (n - 1) + o + d * (k - 1) + 1 - w
        elif mode.startswith("SAME"):
            total = d * (k - 1) + 1 + o - s
        else:
            raise ModelError(
                f"node '{call.site}' (ConvTranspose) has output_shape and a dynamic input size; export explicit pads"
            )
        half = total // 2
        begin.append(half if mode == "SAME_UPPER" else total - half)
        end.append(total - half if mode == "SAME_UPPER" else half)
    for i, (b, f) in enumerate(zip(begin, end, strict=True)):
        if b + f < 0:  # the output is longer than what the kernel reaches: that is output_padding
            extra[i] -= b + f
            begin[i] = end[i] = 0
    attrs["pads"] = begin + end
    if any(extra):
        attrs["output_padding"] = extra
