"""Sums whose zeros share, too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from onnx_lrp.adjoints.shapes import expand_like, reduce_like
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.relevance import rectifier
from onnx_lrp.special.common import Out, nothing
from onnx_lrp.tables import epsilon_rule


@dataclass(frozen=True)
class Sum:
    """A sum shares by the epsilon rule; where it is exactly zero every summand gets an equal part.

    For the shortcuts of residual networks (Sun et al. 2022, whose code does so). Elsewhere a sum that is zero would
    hand x / epsilon of its relevance to every summand x.
    """

    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the summands."""
        if call.op not in ("Add", "Sub", "Sum"):
            raise RuleError(f"node '{call.site}': equal_at_zero is for Add, Sub and Sum, not {call.op}; leave it away")
        relevance, y = out[0], call.output
        if relevance is None:
            return nothing(call)
        proportional = epsilon_rule(self.epsilon)
        if relevance.of is y or rectifier(e, relevance.of, y):
            return proportional(e, call, out)  # where the sum is zero there is no relevance
        zero, whole = e.op("Equal", y, e.const(0, y.dtype)), expand_like(e, relevance.whole(e), y)
        other = e.op("Where", zero, e.const(0, y.dtype), whole)
        shares = list(proportional(e, call, [Relevance(other)]))
        equal = e.op("Where", zero, whole, e.const(0, y.dtype)) / len(call.inputs)
        for i, x in enumerate(call.inputs):
            if i in call.active and x is not None:
                share, part = shares[i], reduce_like(e, equal, x)
                shares[i] = Relevance(part if share is None else part + share.whole(e))
            else:
                e.book(call, "bias", partial(_same, equal))
        return shares


def _same(value: Value) -> Value:
    return value
