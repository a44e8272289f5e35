"""Pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx_lrp.emit import Call, Emitter
from onnx_lrp.errors import RuleError
from onnx_lrp.special.common import Out, nothing
from onnx_lrp.tables import epsilon_rule


@dataclass(frozen=True)
class ProportionalPool:
    """MaxPool shares its relevance in proportion to the inputs of a window: the rule of a sum, as for an average pool.

    (Bach et al. 2015, sec. 2.4 treat pooling as a sum; Montavon et al. 2017 for sum pooling.)
    """

    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the input."""
        if call.op not in ("MaxPool", "GlobalMaxPool"):
            raise RuleError(
                f"node '{call.site}': proportional is for MaxPool, GlobalMaxPool and Mul, not {call.op}; use norm"
            )
        if out[0] is None:
            return nothing(call)
        kind, attrs = call.op.replace("Max", "Average"), dict(call.attrs)
        attrs.pop("storage_order", None)
        dilations = attrs.pop("dilations", None) or []
        if any(d != 1 for d in dilations):
            if e.opset < 19:
                raise RuleError(
                    f"node '{call.site}': proportional needs opset 19 for a pool with dilations (AveragePool has none "
                    f"at opset {e.opset}); use winner_takes_all"
                )
            attrs["dilations"] = dilations
        pool = replace(call, op=kind, attrs=attrs, outputs=(e.op(kind, call.given(0), **attrs),))
        return epsilon_rule(self.epsilon)(e, pool, [out[0]])
