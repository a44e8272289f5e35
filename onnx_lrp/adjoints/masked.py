"""What attention masks leave in a tensor: minus infinity in scores, and NaN in rows that are masked whole."""

from __future__ import annotations

from onnx_lrp.emit import Emitter, Value


def filled(e: Emitter, value: Value, masked: bool | None = None) -> Value:
    """The tensor with 0 for what no relevance and no gradient goes with, where it may hold such (or is said to).

    Infinity and NaN are what a tensor minus itself is not zero for.
    """
    if not (value.facts.masked if masked is None else masked):
        return value
    if value.name in e.fillings:  # the model does it itself
        return e.fillings[value.name]
    zero = e.const(0, value.dtype)
    return e.op("Where", e.op("Equal", value - value, zero), value, zero)
