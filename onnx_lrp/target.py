"""What is explained: the explained tensor, the class in it, and the relevance to begin with, as a subgraph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
import onnx

from onnx_lrp.adjoints.quantization import ROUND_TRIP
from onnx_lrp.adjoints.shapes import (
    along_axis,
    arange_like,
    dim_of,
    expand_like,
    ints,
    merge_axes,
    reshape_like,
    shape_of,
    zeros_like,
)
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.facts import Dim, Facts
from onnx_lrp.view import CONVOLUTIONS, View

Target = Literal["input", "argmax"] | int | Sequence[int]
Start = Literal["logit", "one", "softmax", "contrast", "input"]

# What is seen of a graph input that has a row for every row of relevance.
Fed = Callable[[Value], Value]

STARTS = ("logit", "one", "softmax", "contrast", "input")
_HEADS = ("Softmax", "LogSoftmax", "Sigmoid")
_SAME_ELEMENTS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", ROUND_TRIP)
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
_INT = np.int64


@dataclass(frozen=True)
class Seed:
    """Where the walk begins.

    Attributes:
        relevance: that of the explained tensor.
        used: the classes explained, int64 (N,), or (N, k) where the output has k class axes.
        score: the explained score (N,); (1,) for an explained tensor without axes.
        single: the explained tensor is a vector of classes, without an axis of samples.
        against: the classes that are subtracted, int64 (N,); None where none are.
    """

    relevance: Relevance
    used: Value
    score: Value
    single: bool = False
    against: Value | None = None


def find_explained(view: View, output: str | None) -> tuple[Value, str]:
    """The explained tensor: a named one, or the first float output, or what feeds its Softmax, LogSoftmax or Sigmoid.

    The first float output, for classifiers may put the label before the scores. The head is found by data flow: through
    operators that only rearrange elements, whatever the nodes are called, and through a normalization of probabilities.
    """
    makers: dict[Value, Call] = view.producers()
    floats = [name for name in view.outputs if view.value(name).dtype.kind == "f"]
    name = output if output is not None else (floats or view.outputs)[0]
    value = view.value(name)
    maker = makers.get(value)
    if maker is not None and maker.op == "ZipMap":
        raise InputError(
            f"output '{name}' is a list of dictionaries (ZipMap), which has no relevance; "
            "export with options={id(model): {'zipmap': False}}"
        )
    if value.dtype.kind != "f":
        which = "the first output" if output is None else "output"
        raise InputError(f"{which} '{name}' is {value.dtype}, which has no relevance; name a float tensor with output=")
    if output is not None:
        return value, ""
    while maker is not None and _keeps_ranks(maker) and maker.given(0).dtype.kind == "f":
        maker = makers.get(maker.given(0))
    if maker is not None and maker.op in _HEADS and not maker.domain:
        return maker.given(0), maker.op
    return value, ""


def _keeps_ranks(call: Call) -> bool:
    """Whether probabilities are the same after it, but for their places or their sum (a mean of one is, too)."""
    if call.op in _REDUCTIONS:
        longer = [d for d in call.given(0).shape if d != 1]
        return longer == [d for d in call.output.shape if d != 1] and None not in longer
    return call.op in _SAME_ELEMENTS or (call.op == "LpNormalization" and call.attrs.get("p", 2) == 1)


def is_single(view: View, explained: Value, head: str) -> bool:
    """Whether an explained vector holds the classes of one sample, and not one score per sample.

    It does if a softmax runs along it, or if neither convolutions nor, without such, graph inputs have as many samples.
    """
    if explained.rank != 1 or explained.shape[0] == 1:
        return False
    if head in ("Softmax", "LogSoftmax"):
        return True
    seen = [call.given(0) for call in view.calls if call.op in CONVOLUTIONS and not call.domain]
    samples = [v.shape[0] for v in seen or view.inputs.values() if v.facts.shape]
    return isinstance(explained.shape[0], int) and explained.shape[0] not in samples


def class_axes(value: Value) -> list[int]:
    """Axes of an output over which classes (or positions) run: all but the batch and those of length 1."""
    return [i for i, d in enumerate(value.shape) if i > 0 and d != 1]


def _as_it_is(parameter: Value) -> Value:
    return parameter


def seed(
    e: Emitter,
    explained: Value,
    target: Target,
    start: Start,
    *,
    single: bool = False,
    against: bool = False,
    fed: Fed = _as_it_is,
    many: bool = False,
) -> Seed:
    """Emit the choice of the class and the relevance to begin with.

    Args:
        e: the emitter.
        explained: the explained tensor; axis 0 is the batch.
        target: "input" for a graph input ``target``, "argmax", an int, or one int per class axis. On an output with
            several class axes an int runs over the last one, and picks the place where that class scores highest;
            -1 stands for the arg max along its axis.
        start: what relevance begins with; see CONTRACT of the package.
        single: the explained tensor is a vector of classes, without an axis of samples.
        against: the score is that of the class minus that of another one at the same place: graph input ``against``,
            whose default -1 stands for the highest of the others.
        fed: what is seen here of a graph input that has a row for every row of relevance.
        many: K classes of every sample are fed: ``start`` has N·K rows, and on an output with one class axis -k stands
            for the k-th highest.
    """
    if against and start not in ("logit", "one"):
        raise InputError(f"against= subtracts one class from another, and leaves nothing for start='{start}'")
    with e.scope("target", doc="choice of the explained class"):
        z = e.op("Unsqueeze", explained, ints(e, [0])) if single else explained
        axes = class_axes(z)
        wanted = _wanted(e, target, [z.shape[axis] for axis in axes] or [1], fed)
        if len(axes) > 1:
            hot, used = _pick_position(e, z, axes, wanted)
        else:
            hot, used = _pick_class(e, z, axes, wanted, many)
        other = None
        if against:
            hot, other = _minus_other(e, z, axes, hot, fed)
        if start == "input":
            relevance = Relevance(_fed_start(e, explained, z, fed, many))
        else:
            relevance = _begin(e, z, axes, hot, start)
        whole = relevance.whole(e) if start != "one" else z * hot
        rest = list(range(1, z.rank))
        score = e.op("ReduceSum", whole, ints(e, rest), keepdims=0, label="score") if rest else whole
        score = score if score.rank else e.op("Reshape", score, ints(e, [1]))
        if single:
            relevance = Relevance(reshape_like(e, relevance.factor, explained), relevance.of and explained)
    return Seed(relevance, used, score, single, other)


def no_class(e: Emitter, explained: Value, score: Value) -> Seed:
    """What stands in the place of a class where a method explains none: class -1, and the method's own score.

    Args:
        e: the emitter.
        explained: the explained tensor.
        score: (N,).
    """
    with e.scope("target", doc="no class is explained"):
        used = e.op("ConstantOfShape", shape_of(e, score), shape=score.shape, value=np.array([-1], _INT))
    return Seed(Relevance(zeros_like(e, explained)), used, score)


def _wanted(e: Emitter, target: Target, lengths: Sequence[Dim], fed: Fed) -> Value | None:
    """The wanted class as int64 (n, number of class axes); None for the arg max."""
    width = len(lengths)
    if isinstance(target, str) and target == "argmax":
        return None
    if isinstance(target, str) and target == "input":
        shape = ("target_batch",) if width == 1 else ("target_batch", width)
        default = np.full((1,) if width == 1 else (1, width), -1, _INT)
        value = fed(e.parameter("target", default, Facts(np.dtype(_INT), shape)))
        return e.op("Unsqueeze", value, ints(e, [1])) if width == 1 else value
    given = [target] if isinstance(target, Integral) else target
    if (
        not isinstance(given, list | tuple | np.ndarray)
        or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in given)
        or len(given) not in (1, width)
    ):
        several = "an int" if width == 1 else f"an int, or {width} ints for this output"
        raise InputError(f"target is 'input', 'argmax' or {several}, not {target!r}")
    indices = [-1] * (width - len(given)) + [int(i) for i in given]
    for index, length in zip(indices, lengths, strict=True):
        if index < -1 or (isinstance(length, int) and index >= length):
            raise InputError(
                f"class {index} is out of range: the output has {length} classes, 0 to {length} - 1 (-1: arg max)"
            )
    return e.const(np.array([indices], _INT), name="class")


def _to_float(e: Emitter, condition: Value, like: Value) -> Value:
    return e.op("Cast", condition, to=int(onnx.helper.np_dtype_to_tensor_dtype(like.dtype)))


def _pick_class(e: Emitter, z: Value, axes: list[int], wanted: Value | None, ranked: bool) -> tuple[Value, Value]:
    """One-hot over the one class axis, and the class."""
    rows = e.op("Reshape", z, ints(e, [-1, 1])) if z.rank < 2 else z if z.rank == 2 else merge_axes(e, z, 1)
    best = _at_rank(e, rows, wanted) if ranked and wanted is not None else e.op("ArgMax", rows, axis=1, keepdims=1)
    index = best if wanted is None else e.op("Where", e.op("Less", wanted, e.const(0, _INT)), best, wanted)
    hot = _to_float(e, e.op("Equal", index, arange_like(e, rows, 1)), z)
    hot = expand_like(e, hot, rows) if hot.shape != rows.shape else hot
    used = e.op("Squeeze", e.op("Add", index, best * 0), ints(e, [1]), label="target_used")
    return reshape_like(e, hot, z), used


def _at_rank(e: Emitter, rows: Value, wanted: Value) -> Value:
    """The class (N, 1) of the rank that a negative number (N, 1) says, -1 the highest; the lowest for any below."""
    count = dim_of(e, rows, 1)
    _, order = e.ops("TopK", rows, count, outputs=2, axis=1)
    _, ranks = e.ops("TopK", order, count, outputs=2, axis=1, largest=0)  # of every class, as order lists all classes
    last = e.op("Squeeze", count, ints(e, [0])) - 1
    here = e.op("Equal", ranks, e.op("Clip", -1 - wanted, e.const(0, _INT), last))
    numbers = e.op("Cast", here, to=onnx.TensorProto.INT64) * arange_like(e, rows, 1)
    return e.op("ReduceSum", numbers, ints(e, [1]), keepdims=1)


def _pick_position(e: Emitter, z: Value, axes: list[int], wanted: Value | None) -> tuple[Value, Value]:
    """One-hot at the place where the score is highest among those that match the wanted index of every axis."""
    allowed: Value | None = None
    if wanted is not None:
        for k, axis in enumerate(axes):
            index = e.op("Slice", wanted, ints(e, [k]), ints(e, [k + 1]), ints(e, [1]))
            index = e.op("Reshape", index, ints(e, [-1] + [1] * (z.rank - 1)))
            here = e.op("Equal", index, along_axis(e, arange_like(e, z, axis), axis, z.rank))
            here = e.op("Or", here, e.op("Less", index, e.const(0, _INT)))
            allowed = here if allowed is None else e.op("And", allowed, here)
    masked = z if allowed is None else e.op("Where", allowed, z, e.const(np.finfo(z.dtype).min, z.dtype))
    rows = merge_axes(e, masked, 1)
    best = e.op("ArgMax", rows, axis=1, keepdims=1)
    hot = reshape_like(e, _to_float(e, e.op("Equal", best, arange_like(e, rows, 1)), z), z)
    if allowed is not None:
        # An index out of range matches nothing: no relevance rather than a wrong one.
        hot = hot * _to_float(e, allowed, z)
    rest, parts = best, []
    for axis in reversed(axes):
        length = dim_of(e, z, axis)
        parts.append(e.op("Mod", rest, length))
        rest = e.op("Div", rest, length)
    used = e.op("Concat", *parts[::-1], axis=1, label="target_used")
    if wanted is not None:
        used = e.op("Where", e.op("Less", wanted, e.const(0, _INT)), used, wanted, label="target_used")
    return hot, used


def _minus_other(e: Emitter, z: Value, axes: list[int], hot: Value, fed: Fed) -> tuple[Value, Value]:
    """The one-hot weights with -1 at another class of the same place, and that class (N,)."""
    if not axes:
        raise InputError("against= wants a second class, and the output has one value only")
    axis = axes[-1]
    given = fed(e.parameter("against", np.full(1, -1, _INT), Facts(np.dtype(_INT), ("against_batch",))))
    index = e.op("Reshape", given, ints(e, [-1] + [1] * (z.rank - 1)))
    classes = along_axis(e, arange_like(e, z, axis), axis, z.rank)
    # The place of the target, along all axes but that of the classes; nowhere where the target is out of range.
    place = e.op("Greater", e.op("ReduceSum", hot, ints(e, [axis]), keepdims=1), e.const(0, z.dtype))
    others = e.op("And", e.op("Less", index, e.const(0, _INT)), e.op("Equal", hot, e.const(0, z.dtype)))
    free = e.op("And", place, e.op("Or", e.op("Equal", index, classes), others))
    rows = merge_axes(e, e.op("Where", free, z, e.const(np.finfo(z.dtype).min, z.dtype)), 1)
    best = e.op("ArgMax", rows, axis=1, keepdims=1)
    other = reshape_like(e, _to_float(e, e.op("Equal", best, arange_like(e, rows, 1)), z), z) * _to_float(e, free, z)
    rest = [i for i in range(1, z.rank) if i != axis]
    flat = e.op("ReduceMax", other, ints(e, rest), keepdims=0) if rest else other
    found = e.op("ArgMax", flat, axis=1, keepdims=0)
    return hot - other, e.op("Where", e.op("Less", given, e.const(0, _INT)), found, given, label="against_used")


def _fed_start(e: Emitter, explained: Value, z: Value, fed: Fed, many: bool) -> Value:
    """Relevance of the explained tensor as it is fed, as z has it: with an axis of samples."""
    shape = ("start_rows", *z.shape[1:]) if many else explained.shape
    given = fed(e.parameter("start", None, Facts(explained.dtype, shape)))
    return given if given.rank == z.rank else e.op("Unsqueeze", given, ints(e, [0]))


def _begin(e: Emitter, z: Value, axes: list[int], hot: Value, start: Start) -> Relevance:
    """Relevance of the explained tensor, as z has it: with an axis of samples."""
    if start == "one":
        return Relevance(hot)
    if start == "logit":
        return Relevance(hot, z)
    if start == "softmax":
        if not axes:
            return Relevance(e.op("Sigmoid", z))
        return Relevance(e.op("Softmax", z, axis=axes[-1]))
    if start == "contrast":
        # target minus the mean of the others
        if len(axes) != 1:
            raise InputError("start='contrast' needs an output with one class axis; use start='logit'")
        count = z.shape[axes[0]]
        others = e.const(count - 1, z.dtype) if isinstance(count, int) else _to_float(e, dim_of(e, z, axes[0]) - 1, z)
        chosen = e.op("ReduceSum", hot, ints(e, [axes[0]]), keepdims=1)  # 0 where the target is out of range
        return Relevance(hot - (chosen - hot) / others, z)
    raise InputError(f"start is one of {', '.join(STARTS)}, not '{start}'")
