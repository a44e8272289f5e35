"""From a model to a view: the canonical passes in order.

A pass never touches the source's nodes. It changes how they are *seen*: a BatchNormalization as part of the Conv
before it, a MatMul and the Add after it as one linear call, a float16 tensor as its float32 copy. What a view needs
beyond the source (folded weights, explicit pads) is emitted as operators on the source's own tensors, and goes out
again if unused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from onnx_lrp.adjoints.shapes import ints
from onnx_lrp.attention import see_transformers
from onnx_lrp.classical import see_logits_of_two_classes, see_primitives
from onnx_lrp.emit import Value
from onnx_lrp.errors import ModelError
from onnx_lrp.folding import fold_affine, fold_affine_right
from onnx_lrp.gates import see_gated_sums, see_weighted
from onnx_lrp.model import Source
from onnx_lrp.pads import explicit_pads
from onnx_lrp.quantized import see_dequantized
from onnx_lrp.recurrent import see_layers, see_steps
from onnx_lrp.summands import see_summands
from onnx_lrp.view import View, read_view


def view(source: Source, *, fold_batchnorm: bool = True, portable: bool = False, kept: Iterable[str] = ()) -> View:
    """Read a model and run the canonical passes in order.

    Args:
        source: the model.
        fold_batchnorm: see BatchNormalization as part of a linear neighbour where data flow allows.
        portable: what the emitter may use.
        kept: tensors that must stay visible.
    """
    asked = set(kept)
    result = read_view(source, portable, asked)
    result.kept = asked
    see(result, fold_batchnorm)
    return result


def see(v: View, fold_batchnorm: bool = True) -> None:
    """Run the passes on a view, be it of a model or of a body inside it."""
    for run in (
        see_primitives,
        _see_through,
        see_logits_of_two_classes,
        see_dequantized,
        _widen,
        see_steps,
        see_layers,
        explicit_pads,
        _plain_gemm,
        _constant_division,
        see_transformers,
        _batchnorm_as_affine,
    ):
        run(v)
    fold_affine(v, fold_batchnorm)
    if fold_batchnorm:
        fold_affine_right(v)
    see_summands(v)
    see_gated_sums(v)
    see_weighted(v)


def _see_through(v: View) -> None:
    """Identity, Dropout and Cast between equal types change nothing: read what lies before them."""
    replaced: dict[Value, Value] = {}
    calls = []
    for call in v.calls:
        call.inputs = tuple(replaced.get(x, x) if x is not None else None for x in call.inputs)
        x = call.input(0)
        if call.op == "CastLike" and not call.domain and call.input(1) is not None:  # a constant stays one
            kind = onnx.helper.np_dtype_to_tensor_dtype(call.given(1).dtype)
            call.op, call.inputs, call.attrs = "Cast", call.inputs[:1], {"to": int(kind)}
            call.output.facts = replace(call.output.facts, const=call.given(0).facts.const)
        through = call.op in ("Identity", "Dropout") and not call.domain
        through |= call.op == "Cast" and x is not None and _same_when_wide(x, call.output)
        if call.op == "Dropout" and call.input(2) is not None:
            flag = v.e.array(call.input(2))
            through &= flag is not None and not flag.any()
        if through and x is not None and call.output.dtype.kind == "f":
            replaced[call.output] = x
        else:
            calls.append(call)
    v.calls = calls
    v.alias = {name: replaced.get(x, x) for name, x in v.alias.items()}
    v.alias |= {old.name: new for old, new in replaced.items()}


def _same_when_wide(a: Value, b: Value) -> bool:
    def wide(x: Value) -> np.dtype[Any]:
        return np.dtype(np.float32) if x.narrow else x.dtype

    return wide(a) == wide(b) and wide(a).kind == "f"


def _widen(v: View) -> None:
    """See 16-bit floats as their float32 copies, so that relevance is computed in float32."""
    e = v.e
    replaced: dict[Value, Value] = {}

    def wide(x: Value | None) -> Value | None:
        if x is None or not x.narrow:
            return x
        if x not in replaced:
            with e.scope(x.name, doc=f"float32 copy of {x.name}"):
                replaced[x] = e.op("Cast", x, to=onnx.TensorProto.FLOAT, shape=x.facts.shape)
        return replaced[x]

    for call in v.calls:
        call.inputs = tuple(wide(x) for x in call.inputs)
        call.outputs = tuple(wide(x) for x in call.outputs)
    v.inputs = {name: wide(x) or x for name, x in v.inputs.items()}
    v.alias = {name: wide(x) or x for name, x in v.alias.items()}
    for old, new in replaced.items():
        v.alias[old.name] = new


def _plain_gemm(v: View) -> None:
    """Gemm with alpha = beta = 1: the factors go into the weights and the bias."""
    for call in v.calls:
        if call.op != "Gemm" or call.domain:
            continue
        alpha, beta = float(call.attrs.get("alpha", 1.0)), float(call.attrs.get("beta", 1.0))
        weight = 1 if call.given(1).facts.const else 0
        inputs = list(call.inputs)
        with v.e.scope(call.site, doc="alpha and beta folded"):
            if alpha != 1.0 and call.given(weight).facts.const:
                inputs[weight] = call.given(weight) * alpha
                call.attrs = call.attrs | {"alpha": 1.0}
            bias = call.input(2)
            if bias is not None and bias.facts.const and beta != 1.0:
                inputs[2] = bias * beta
                call.attrs = call.attrs | {"beta": 1.0}
        call.inputs = tuple(inputs)


def _constant_division(v: View) -> None:
    """X / c is x * (1/c)."""
    for call in v.calls:
        if call.op == "Div" and call.given(1).facts.const and call.output.dtype.kind == "f":
            with v.e.scope(call.site, doc="reciprocal of the constant divisor"):
                call.inputs = (call.given(0), v.e.op("Reciprocal", call.given(1)))
            call.op, call.note = "Mul", "division by a constant"


def _batchnorm_as_affine(v: View) -> None:
    """Y = x * slope + offset with slope = scale / sqrt(var + eps), offset = B - mean * slope."""
    e = v.e
    for call in v.calls:
        if call.op != "BatchNormalization" or call.domain or len(call.inputs) < 5:
            continue
        x, scale, shift, mean, var = (call.given(i) for i in range(5))
        if call.attrs.get("training_mode", 0):
            raise ModelError(
                f"node '{call.site}' (BatchNormalization) is in training mode; export the model in evaluation mode"
            )
        with e.scope(call.site, doc="BatchNormalization as x * slope + offset"):
            slope = scale / e.op("Sqrt", var + float(call.attrs.get("epsilon", 1e-5)))
            offset = shift - mean * slope
            if x.rank > 2:
                column = ints(e, [-1] + [1] * (x.rank - 2))
                slope, offset = e.op("Reshape", slope, column), e.op("Reshape", offset, column)
        call.inputs, call.outputs, call.attrs = (x, slope, offset), call.outputs[:1], {}
