"""From a model to a view: the list of calls that the reverse walk will read.

A pass never touches the source's nodes. It changes how they are *seen*: a BatchNormalization as part of the Conv before
it, a MatMul and the Add after it as one linear call, a float16 tensor as its float32 copy. What a view needs beyond the
source (folded weights, explicit pads) is emitted as operators on the source's own tensors, and goes out again if unused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import concat_ints, dim_of, ints, ones_like
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.facts import Facts, Shape, sign_of_array
from onnx_lrp.model import Source, array_of, inferred_graph

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass
class View:
    """A model as the walk sees it.

    Attributes:
        e: the emitter; all tensors of the source are declared in it.
        calls: operator applications in topological order.
        inputs: values of the graph inputs that have to be fed.
        outputs: names of the graph outputs.
        alias: which value a tensor name stands for, where it is not its own.
        kept: tensors that no pass may hide, because relevance at them is asked for.
    """

    e: Emitter
    calls: list[Call]
    inputs: dict[str, Value]
    outputs: list[str]
    alias: dict[str, Value] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    def value(self, name: str) -> Value:
        """The value that stands for a tensor of the source."""
        if name in self.alias:
            return self.alias[name]
        if name not in self.e.values:
            raise InputError(
                f"the model has no tensor named '{name}'; names are listed by onnx-lrp check, or shown in Netron"
            )
        return self.e.values[name]

    def producers(self) -> dict[Value, Call]:
        """Which call makes a value."""
        return {v: call for call in self.calls for v in call.outputs if v is not None}

    def uses(self) -> Counter[Value]:
        """How many calls read a value; kept tensors and graph outputs count as read once more."""
        counts = Counter(v for call in self.calls for v in call.inputs if v is not None)
        for name in (*self.outputs, *self.kept):
            if name in self.e.values or name in self.alias:
                counts[self.value(name)] += 1
        return counts


def view(source: Source, *, fold_batchnorm: bool = True, portable: bool = False, kept: Iterable[str] = ()) -> View:
    """Read a model and run the canonical passes in order.

    Args:
        source: the model.
        fold_batchnorm: see BatchNormalization as part of a linear neighbour where data flow allows.
        portable: what the emitter may use.
        kept: tensors that must stay visible.
    """
    result = _read(source, portable)
    result.kept = set(kept)
    for run in (_see_through, _widen, _explicit_pads, _plain_gemm, _constant_division, _batchnorm_as_affine):
        run(result)
    _fold_affine(result, fold_batchnorm)
    if fold_batchnorm:
        _fold_affine_right(result)
    return result


# ---- reading ---------------------------------------------------------------------------------------------------


def _read(source: Source, portable: bool) -> View:
    graph = inferred_graph(source)
    reserved = (
        [n.name for n in graph.node] + [o for n in graph.node for o in n.output if o] + [i.name for i in graph.input]
    )
    reserved += [t.name for t in graph.initializer]
    e = Emitter(source.opset, reserved, portable=portable)
    e.forwards = {name: operator.forward for name, operator in OPERATORS.items() if operator.forward}
    inputs: dict[str, Value] = {}
    for tensor in source.weights.values():
        _declare_constant(e, tensor)
    for tensor in graph.initializer:
        if tensor.name in source.defaults:
            e.declare(tensor.name, Facts(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)))
        else:
            _declare_constant(e, tensor)
    for info in graph.input:
        if info.name in source.weights or info.name in source.defaults:
            continue
        inputs[info.name] = e.declare(info.name, _facts(info, name_axes=True))
    known = {info.name: _facts(info) for info in (*graph.value_info, *graph.output)}
    calls = []
    for node in graph.node:
        call = _call(e, node)
        if call.op == "Constant" and not call.domain:
            _declare_literal(e, node)
            continue
        nothing = Facts(np.dtype(np.float32), None)
        e.source_call(call, node.output, [known.get(n, nothing) for n in node.output])
        calls.append(call)
    return View(e, calls, inputs, [o.name for o in graph.output])


def _call(e: Emitter, node: onnx.NodeProto) -> Call:
    attrs: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif isinstance(value, onnx.TensorProto):
            value = array_of(value)
        attrs[attribute.name] = list(value) if attribute.ints or attribute.floats else value
    inputs = tuple(e.values.get(name) if name else None for name in node.input)
    return Call(node.op_type, inputs, (), attrs, node.name, "" if node.domain == "ai.onnx" else node.domain)


def _declare_constant(e: Emitter, tensor: onnx.TensorProto) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    value = e.declare(tensor.name, Facts(dtype, tuple(tensor.dims), const=True))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    e.lazy[tensor.name] = lambda: array_of(tensor)
    if math.prod(tensor.dims) <= 65536:
        array = e.array(value)
        assert array is not None
        value.facts = replace(value.facts, sign=sign_of_array(array))


def _declare_literal(e: Emitter, node: onnx.NodeProto) -> None:
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        array = array_of(value)
    else:
        array = np.array(value, dtype={"f": np.float32, "i": np.int64}.get(attribute.name[6:7]))
    e.declare(node.output[0], Facts(array.dtype, array.shape, const=True, sign=sign_of_array(array)), array)


def _facts(info: onnx.ValueInfoProto, name_axes: bool = False) -> Facts:
    tensor = info.type.tensor_type
    shape: Shape | None = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or (f"{info.name}.{i}" if name_axes else None)
            for i, d in enumerate(tensor.shape.dim)
        )
    return Facts(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or 1), shape)


# ---- passes ------------------------------------------------------------------------------------------------------


def _rewire(v: View, replaced: dict[Value, Value]) -> None:
    """Let every call and alias read the replacement of a value."""
    if not replaced:
        return
    for call in v.calls:
        call.inputs = tuple(replaced.get(x, x) if x is not None else None for x in call.inputs)
    v.alias = {name: replaced.get(x, x) for name, x in v.alias.items()}
    for old, new in replaced.items():
        v.alias[old.name] = new


def _see_through(v: View) -> None:
    """Identity, Dropout and Cast between equal types change nothing: read what lies before them."""
    replaced: dict[Value, Value] = {}
    calls = []
    for call in v.calls:
        call.inputs = tuple(replaced.get(x, x) if x is not None else None for x in call.inputs)
        x = call.input(0)
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
    for old, new in replaced.items():
        v.alias[old.name] = new


def _narrow(value: Value) -> bool:
    """True for 16-bit floats, in which relevance would lose its stabilizer: it is computed in float32."""
    return value.dtype.itemsize == 2 and value.dtype.kind in "fV" and value.dtype.name in ("float16", "bfloat16")


def _same_when_wide(a: Value, b: Value) -> bool:
    def wide(x: Value) -> np.dtype[Any]:
        return np.dtype(np.float32) if _narrow(x) else x.dtype

    return wide(a) == wide(b) and wide(a).kind == "f"


def _widen(v: View) -> None:
    """See 16-bit floats as their float32 copies, so that relevance is computed in float32."""
    e = v.e
    replaced: dict[Value, Value] = {}

    def wide(x: Value | None) -> Value | None:
        if x is None or not _narrow(x):
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


def _explicit_pads(v: View) -> None:
    """Write auto_pad out as pads; where the size is dynamic and the stride above 1, as a Pad of its own."""
    calls = []
    for call in v.calls:
        mode = str(call.attrs.get("auto_pad", "NOTSET"))
        if call.op not in (*_CONVOLUTIONS, "MaxPool", "AveragePool") or call.domain:
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


def _fold_affine(v: View, fold_batchnorm: bool) -> None:
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
    axis = 1 if linear.op in _CONVOLUTIONS else y.rank - 1
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
            if linear.op in _CONVOLUTIONS:
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


def _fold_affine_right(v: View) -> None:
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


# ---- activity ----------------------------------------------------------------------------------------------------


def mark_active(v: View, wanted: Collection[Value], explained: Value) -> list[Call]:
    """Mark what carries influence from the wanted values to the explained one; the calls between them, in order."""
    for value in v.e.values.values():
        if value.facts.active:
            value.facts = replace(value.facts, active=False)
    reached = set(wanted)
    forward = []
    for call in v.calls:
        operator = OPERATORS.get(call.op) if not call.domain else None
        if operator is not None and operator.verb == "barrier":
            continue
        if any(x in reached for x in call.inputs):
            outputs = [o for o in call.outputs if o is not None and o.dtype.kind == "f"]
            reached.update(outputs)
            if outputs:
                forward.append(call)
    needed = {explained}
    chain = []
    for call in reversed(forward):
        if any(o in needed for o in call.outputs):
            chain.append(call)
            needed.update(x for x in call.inputs if x in reached)
    for value in needed & reached:
        value.facts = replace(value.facts, active=True)
    return chain[::-1]
