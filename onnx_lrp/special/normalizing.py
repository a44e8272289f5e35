"""Normalizations and softmax."""

from __future__ import annotations

from onnx_lrp.adjoints.shapes import expand_like, ints
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter
from onnx_lrp.errors import RuleError
from onnx_lrp.relevance import stabilized
from onnx_lrp.special.common import Out, nothing


def batchnorm_absolute(e: Emitter, call: Call, out: Out) -> Out:
    """BatchNormalization y = a·x + c keeps |ax| / (|ax| + |c|) of the relevance (Hui & Binder 2019, eq. 10)."""
    if call.op != "BatchNormalization":
        raise RuleError(f"node '{call.site}': batchnorm_absolute is for BatchNormalization, not {call.op}; use epsilon")
    if out[0] is None:
        return nothing(call)
    x, slope, offset = call.given(0), call.given(1), call.given(2)
    signal, shift = e.op("Abs", x * slope), e.op("Abs", offset)
    total = signal + shift + 1e-12
    relevance = expand_like(e, out[0].whole(e), call.output)
    e.book(call, "bias", lambda: relevance * (shift / total))
    e.book(call, "stabilizer", lambda: relevance * (1e-12 / total))
    return [Relevance(relevance * (signal / total)), *nothing(call)[1:]]


def softmax(e: Emitter, call: Call, out: Out) -> Out:
    """R_i = x_i (R_i - y_i sum R): the Taylor rule of a softmax inside the model (Achtibat et al. 2024, prop. 3.1).

    For LogSoftmax the same expansion of y_j = x_j - log sum exp x: R_i = x_i (c_i - p_i sum c) with c = R / stab(y).
    """
    if call.op not in ("Softmax", "LogSoftmax"):
        raise RuleError(f"node '{call.site}': softmax is for Softmax and LogSoftmax, not {call.op}; use pass")
    if out[0] is None:
        return nothing(call)
    x, y = call.given(0), call.output
    axis = ints(e, [int(call.attrs.get("axis", -1)) % y.rank])
    whole = expand_like(e, out[0].whole(e), y)
    # A mask of minus infinity takes part with weight zero.
    finite = e.op("Where", e.op("IsInf", x), e.const(0, x.dtype), x)
    if call.op == "Softmax":
        p, c = y, whole
        offset = 1.0 - finite
    else:
        stable = stabilized(e, y, 1e-6)
        p, c = e.op("Exp", y), whole / stable
        offset = y - finite
        e.book(call, "stabilizer", lambda: c * (stable - y))
    e.book(call, "bias", lambda: c * (offset + e.op("ReduceSum", p * finite, axis, keepdims=1)))
    return [Relevance(finite * (c - p * e.op("ReduceSum", c, axis, keepdims=1)))]
