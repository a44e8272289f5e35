"""Normalizations and softmax."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lrp.adjoints import adjoint
from onnx_lrp.adjoints.masked import filled
from onnx_lrp.adjoints.normalization import NORMALIZATIONS, linear_part
from onnx_lrp.adjoints.shapes import along_axis, expand_like, ints, reduce_like
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


@dataclass(frozen=True)
class Softmax:
    """R_i = x_i (R_i - y_i sum R): the Taylor rule of a softmax inside the model (Achtibat et al. 2024, prop. 3.1).

    For LogSoftmax the same expansion of y_j = x_j - log sum exp x: R_i = x_i (c_i - p_i sum c) with c = R / stab(y).
    Relevance that arrives as R = y·c has R_i = x_i J_i^T c, J being the Jacobian; with ``exact`` it leaves as that
    multiple of x.
    """

    exact: bool = False

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the input."""
        if call.op not in ("Softmax", "LogSoftmax"):
            raise RuleError(f"node '{call.site}': softmax is for Softmax and LogSoftmax, not {call.op}; use pass")
        if out[0] is None:
            return nothing(call)
        x, y = call.given(0), call.output
        axis = ints(e, [int(call.attrs.get("axis", -1)) % y.rank])
        exact = self.exact and out[0].of is y
        # A mask of minus infinity takes part with weight zero.
        finite = e.op("Where", e.op("IsInf", x), e.const(0, x.dtype), x)
        whole = expand_like(e, out[0].whole(e), y)
        if call.op == "Softmax":
            p, c = filled(e, y), whole
            offset = 1.0 - finite
        elif exact:
            p, c = e.op("Exp", y), expand_like(e, out[0].factor, y)
            offset = y - finite
        else:
            stable = stabilized(e, y, 1e-6)
            p, c = e.op("Exp", y), whole / stable
            offset = y - finite
            e.book(call, "stabilizer", lambda: c * (stable - y))
        e.book(call, "bias", lambda: c * (offset + e.op("ReduceSum", p * finite, axis, keepdims=1)))
        if exact:
            return [None if g is None else Relevance(g, x) for g in adjoint(e, call, [out[0].factor])]
        return [Relevance(finite * (c - p * e.op("ReduceSum", c, axis, keepdims=1)))]


@dataclass(frozen=True)
class Normalization:
    """The divisor is held constant, and what is left is a linear layer: the epsilon rule (Achtibat et al. 2024, 3.3.3).

    So the mean that is taken off counts as a summand, and the offset that is added keeps what it brings.
    """

    epsilon: float = 1e-6
    exact: bool = False

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs."""
        if call.op not in NORMALIZATIONS:
            raise RuleError(
                f"node '{call.site}': normalization is for {', '.join(NORMALIZATIONS)}, not {call.op}; use pass"
            )
        relevance, y, shift = out[0], call.output, call.input(2)
        if relevance is None:
            return nothing(call)
        if self.exact and relevance.of is y:
            c = expand_like(e, relevance.factor, y)
        else:
            stable = stabilized(e, y, self.epsilon)
            c = expand_like(e, relevance.whole(e) / stable, y)
            e.book(call, "stabilizer", lambda: c * (stable - y))
        shares: list[Relevance | None] = list(nothing(call))
        shares[0] = Relevance(linear_part(e, call, c), call.given(0))
        if shift is not None:
            wide = shift if call.op == "LayerNormalization" else along_axis(e, shift, 1, y.rank)
            if 2 in call.active:
                shares[2] = Relevance(reduce_like(e, c * wide, shift))
            else:
                e.book(call, "bias", lambda: c * wide)
        return shares
