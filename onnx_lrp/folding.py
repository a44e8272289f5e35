"""The passes that see constant slopes and offsets (BatchNormalization, bias Add) as part of a linear neighbour."""

from __future__ import annotations

from dataclasses import replace

from onnx_lrp.adjoints.shapes import ints
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.view import CONVOLUTIONS, WEIGHTED, View


def _affine_of(call: Call, source: Value) -> tuple[Value | None, Value | None] | None:
    """Slope and offset if a call computes source * slope + offset with constants."""
    others = [x for x in call.inputs if x is not source and x is not None]
    if (
        call.domain
        or source not in call.inputs
        or not all(x.facts.const for x in others)
        or call.inputs.count(source) != 1
    ):
        return None
    if call.op == "BatchNormalization" and call.inputs[0] is source:
        return call.given(1), call.given(2)
    if call.op == "Mul":
        return others[0], None
    if call.op in ("Add", "Sum") and len(others) == 1:
        return None, others[0]
    if call.op == "Sub" and call.inputs[0] is source:
        return None, -others[0]
    return None


def _channel_vector(e: Emitter, constant: Value, rank: int, axis: int) -> Value | None:
    """A constant that varies along one axis of a tensor only, as a vector (or a scalar); None if it does not fit."""
    if constant.facts.shape is None or constant.rank > rank:
        return None
    shape = (1,) * (rank - constant.rank) + constant.shape
    if any(d != 1 for i, d in enumerate(shape) if i != axis):
        return None
    return constant if constant.rank == 1 else e.op("Reshape", constant, ints(e, [-1]))


def fold_affine(v: View, fold_batchnorm: bool) -> None:
    """See a constant slope or offset after a linear call (BatchNormalization, bias Add) as part of its weights."""
    uses, makers = v.uses(), v.producers()
    calls = []
    for call in v.calls:
        maker = next((makers[x] for x in call.inputs if x in makers and makers[x].op in WEIGHTED), None)
        merged = None
        if maker is not None and uses[maker.output] == 1 and maker.given(1).facts.const and not maker.domain:
            affine = _affine_of(call, maker.output)
            if affine is not None and (fold_batchnorm or affine[0] is None):
                merged = _with_affine(v.e, maker, call, *affine)
        if merged is None or maker is None:
            calls.append(call)
            continue
        maker.op, maker.inputs, maker.attrs, maker.outputs, maker.note = (
            merged.op,
            merged.inputs,
            merged.attrs,
            call.outputs,
            merged.note,
        )
        makers[call.output] = maker
    # A folded call stands where its linear part stood: what was added are constants, and what it feeds comes later.
    v.calls = calls


def _with_affine(e: Emitter, linear: Call, call: Call, slope: Value | None, offset: Value | None) -> Call | None:
    y = linear.output
    axis = 1 if linear.op in CONVOLUTIONS else y.rank - 1
    weight, bias = linear.given(1), linear.input(2)
    if call.output.facts.shape is None or y.facts.shape is None or call.output.rank != y.rank:
        return None
    if (bias is not None and not bias.facts.const) or not all(_fits(k, y) for k in (slope, offset) if k is not None):
        return None
    with e.scope(linear.site, doc=f"weights of {linear.site} with {call.op} {call.site} folded in"):
        if slope is not None:
            along = 1 if call.op == "BatchNormalization" else axis
            vector = _channel_vector(e, slope, y.rank, along) if along == axis else None
            if vector is None:
                return None
            scaled = _scale_outputs(e, linear, weight, vector)
            if scaled is None:
                return None
            weight = scaled
            bias = None if bias is None else bias * vector
        if offset is not None:
            if linear.op in CONVOLUTIONS:
                vector = _channel_vector(e, offset, y.rank, axis)
                channels = weight.shape[0] if linear.op == "Conv" else None
                if vector is None:
                    return None
                if bias is None and vector.shape != (channels,):
                    if not isinstance(channels, int):
                        return None if vector.shape == (1,) else _merged(linear, call, weight, vector)
                    vector = e.op("Expand", vector, ints(e, [channels]))
            else:
                vector = offset
                if offset.rank > y.rank or (linear.op == "Gemm" and offset.rank > 2):
                    return None
            bias = vector if bias is None else bias + vector
    return _merged(linear, call, weight, bias)


def _fits(constant: Value, y: Value) -> bool:
    """True if a constant is broadcast to the shape of y, and not y to that of the constant."""
    return all(c in (1, d) for c, d in zip(constant.shape[::-1], y.shape[::-1], strict=False))


def _merged(linear: Call, call: Call, weight: Value, bias: Value | None) -> Call:
    note = "; ".join(filter(None, (linear.note, f"{call.op} '{call.site}' folded in")))
    inputs = (linear.inputs[0], weight) if bias is None else (linear.inputs[0], weight, bias)
    return replace(linear, inputs=inputs, note=note)


def _scale_outputs(e: Emitter, linear: Call, weight: Value, vector: Value) -> Value | None:
    """Weights with every output channel multiplied by its slope."""
    ones = [1] * (weight.rank - 2)
    if linear.op == "Conv":
        return weight * e.op("Reshape", vector, ints(e, [-1, 1, *ones]))
    if linear.op == "ConvTranspose":
        group = int(linear.attrs.get("group", 1))
        if group == 1:
            return weight * e.op("Reshape", vector, ints(e, [1, -1, *ones]))
        if not weight.static or vector.shape == (1,):
            return weight * vector if vector.shape == (1,) else None
        c, m = int(weight.shape[0] or 0), int(weight.shape[1] or 0)
        split = e.op("Reshape", weight, ints(e, [group, c // group, m, *(int(k or 0) for k in weight.shape[2:])]))
        return e.op(
            "Reshape",
            split * e.op("Reshape", vector, ints(e, [group, 1, m, *ones])),
            ints(e, [int(d or 0) for d in weight.shape]),
        )
    if linear.op == "Gemm" and linear.attrs.get("transB", 0):
        return weight * e.op("Reshape", vector, ints(e, [-1, 1]))
    return weight * vector if linear.op == "Gemm" or weight.rank >= 2 else None


def fold_affine_right(v: View) -> None:
    """See a BatchNormalization as part of the linear call after it: W' = W * slope, b' = b + W . offset.

    Only without padding: padded zeros are not shifted by the offset.
    """
    e, uses, makers = v.e, v.uses(), v.producers()
    gone: set[int] = set()
    for call in v.calls:
        if (
            call.op not in ("Conv", "Gemm")
            or call.domain
            or not call.given(1).facts.const
            or call.attrs.get("transA", 0)
        ):
            continue
        norm = makers.get(call.given(0))
        if norm is None or norm.op != "BatchNormalization" or uses[norm.output] != 1:
            continue
        if not norm.given(1).facts.const or any(call.attrs.get("pads") or [0]) or int(call.attrs.get("group", 1)) != 1:
            continue
        weight, bias, rank = call.given(1), call.input(2), norm.output.rank
        if bias is not None and not bias.facts.const:
            continue
        slope, offset = (_channel_vector(e, norm.given(i), rank, 1) for i in (1, 2))
        if slope is None or offset is None or (call.op == "Conv" and rank < 3):
            continue
        with e.scope(call.site, doc=f"weights of {call.site} with BatchNormalization {norm.site} folded in"):
            column = (
                ints(e, [-1, 1])
                if call.op == "Gemm" and not call.attrs.get("transB", 0)
                else ints(e, [1, -1, *([1] * (weight.rank - 2))])
            )
            axes = [0] if call.op == "Gemm" and not call.attrs.get("transB", 0) else list(range(1, weight.rank))
            shift = e.op("ReduceSum", weight * e.op("Reshape", offset, column), ints(e, axes), keepdims=0)
            scaled = weight * e.op("Reshape", slope, column)
            call.inputs = (norm.given(0), scaled, shift if bias is None else bias + shift)
        call.note = "; ".join(filter(None, (call.note, f"BatchNormalization '{norm.site}' folded in")))
        gone.add(id(norm))
    v.calls = [c for c in v.calls if id(c) not in gone]
