"""Helpers whose form depends on shapes: static constants where the shape is known, Shape arithmetic where it is not.

No rule and no adjoint ever sees the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx

from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.facts import Dim

_INT = np.int64


def same_shape(a: Value, b: Value) -> bool:
    """True if both shapes are known to be equal (equal numbers or equal symbols)."""
    return a.facts.shape is not None and a.facts.shape == b.facts.shape and None not in a.shape


def shape_of(e: Emitter, value: Value) -> Value:
    """The shape of a tensor as an int64 vector."""
    if value.static:
        return e.const(np.array(value.shape, _INT), name="shape")
    return e.op("Shape", value, shape=(value.rank,))


def dim_of(e: Emitter, value: Value, axis: int) -> Value:
    """Length of one axis as an int64 vector of one element."""
    axis %= value.rank
    length = value.shape[axis]
    if isinstance(length, int):
        return e.const(np.array([length], _INT), name="dim")
    return e.op("Shape", value, start=axis, end=axis + 1, shape=(1,))


def product_of(e: Emitter, value: Value, axes: Iterable[int]) -> Value:
    """Number of elements along some axes together, as an int64 vector of one element."""
    lengths = [value.shape[a] for a in axes]
    if all(isinstance(n, int) for n in lengths):
        return ints(e, [math.prod(n for n in lengths if isinstance(n, int))])
    return e.op("ReduceProd", concat_ints(e, [dim_of(e, value, a) for a in axes]), keepdims=1, shape=(1,))


def ints(e: Emitter, values: Sequence[int]) -> Value:
    """An int64 vector."""
    return e.const(np.array(list(values), _INT), name="ints")


def concat_ints(e: Emitter, parts: Sequence[Value | Sequence[int]]) -> Value:
    """An int64 vector joined from vectors and plain ints."""
    values = [p if isinstance(p, Value) else ints(e, p) for p in parts if isinstance(p, Value) or len(p)]
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=0)


def reshape_like(e: Emitter, value: Value, like: Value) -> Value:
    """The same elements in the shape of another tensor."""
    if same_shape(value, like):
        return value
    unknown = [i for i, d in enumerate(like.shape) if not isinstance(d, int)]
    if len(unknown) <= 1 and 0 not in like.shape:
        # At most one unknown axis: Reshape can work it out itself, unless some other axis has length zero.
        target = [d if isinstance(d, int) else -1 for d in like.shape]
        return e.op("Reshape", value, ints(e, target), shape=like.shape)
    return e.op("Reshape", value, shape_of(e, like), shape=like.shape, allowzero=1)


def span_of(e: Emitter, value: Value, begin: int, end: int | None = None) -> Value:
    """Number of elements along the axes from begin up to end, as an int64 vector of one element."""
    lengths = value.shape[begin:end]
    if all(isinstance(d, int) for d in lengths):
        return ints(e, [math.prod(d for d in lengths if isinstance(d, int))])
    stop = value.rank if end is None else end
    sizes = e.op("Shape", value, start=begin, end=stop, shape=(stop - begin,))
    return e.op("ReduceProd", sizes, keepdims=1, shape=(1,))


def merge_axes(e: Emitter, value: Value, begin: int, end: int | None = None) -> Value:
    """The axes from begin up to end merged into one.

    Their number is counted: Reshape's -1 cannot be worked out where another axis is empty.
    """
    stop = value.rank if end is None else end
    merged = [span_of(e, value, begin, stop), *(dim_of(e, value, i) for i in range(stop, value.rank))]
    known = [(e.ints(size) or [0])[0] for size in merged]
    shape = (*value.shape[:begin], known[0] or None, *value.shape[stop:])
    if all(known):  # a zero stands for the axis as it is
        return e.op("Reshape", value, ints(e, [*[0] * begin, *known]), shape=shape)
    sizes = concat_ints(e, [*(dim_of(e, value, i) for i in range(begin)), *merged])
    return e.op("Reshape", value, sizes, shape=shape, allowzero=1)


def expand_like(e: Emitter, value: Value, like: Value) -> Value:
    """Broadcast to the shape of another tensor where axes are still of length 1 (or missing)."""
    if value.rank == like.rank and all(
        v == t or (v != 1 and t != 1) for v, t in zip(value.shape, like.shape, strict=True)
    ):
        return value
    return e.op("Expand", value, shape_of(e, like), shape=like.shape)


def size_of(e: Emitter, value: Value) -> Value:
    """Number of elements as an int64 scalar."""
    return e.op("ReduceProd", shape_of(e, value), keepdims=0)


def cast_like(e: Emitter, value: Value, like: Value) -> Value:
    """The same numbers in the element type of another tensor."""
    if value.dtype == like.dtype:
        return value
    return e.op("Cast", value, to=int(onnx.helper.np_dtype_to_tensor_dtype(like.dtype)))


def as_int64(e: Emitter, value: Value) -> Value:
    """Indices as int64, whatever integers they were."""
    return value if value.dtype == _INT else e.op("Cast", value, to=onnx.TensorProto.INT64)


def ones_like(e: Emitter, value: Value) -> Value:
    """A tensor of ones in the shape of another."""
    return filled_like(e, value, 1)


def zeros_like(e: Emitter, value: Value) -> Value:
    """A tensor of zeros in the shape of another."""
    return filled_like(e, value, 0)


def filled_like(e: Emitter, value: Value, number: float) -> Value:
    """A tensor of one number in the shape of another."""
    return e.op("ConstantOfShape", shape_of(e, value), shape=value.shape, value=np.array([number], value.dtype))


def reduce_like(e: Emitter, value: Value, like: Value) -> Value:
    """Sum away the axes along which ``like`` was broadcast to the shape of ``value``.

    Axes along which ``value`` is still of length 1 stay so.
    """
    if same_shape(value, like):
        return value
    extra = value.rank - like.rank
    if extra < 0:
        return reduce_like(e, e.op("Unsqueeze", value, ints(e, range(-extra))), like)
    axes = list(range(extra))
    undecided = False
    for i, target in enumerate(like.shape):
        length = value.shape[extra + i]
        if target == 1 and length != 1:
            axes.append(extra + i)
        elif length not in (1, target) and not isinstance(target, int):
            undecided = True  # two different symbols: either may turn out to be 1
    if undecided:
        summed = _reduce_dynamically(e, value, like)
    else:
        summed = e.op("ReduceSum", value, ints(e, axes), keepdims=1) if axes else value
    return e.op("Squeeze", summed, ints(e, range(extra))) if extra else summed


def _reduce_dynamically(e: Emitter, value: Value, like: Value) -> Value:
    """The same with axes found at run time: those whose lengths differ."""
    extra = value.rank - like.rank
    padded = concat_ints(e, [[1] * extra, shape_of(e, like)])
    differs = e.op("Not", e.op("Equal", shape_of(e, value), padded))
    axes = e.op("Reshape", e.op("NonZero", differs), ints(e, [-1]))
    kept = (1 if v == 1 else t for v, t in zip(value.shape[extra:], like.shape, strict=True))
    return e.op("ReduceSum", value, axes, keepdims=1, noop_with_empty_axes=1, shape=(*[1] * extra, *kept))


def crop_like(e: Emitter, value: Value, like: Value, axes: Sequence[int], starts: Sequence[int]) -> Value:
    """Cut a window of the length of ``like`` out of each axis, beginning at ``starts``."""
    todo = [(a, s) for a, s in zip(axes, starts, strict=True) if s or not _equal(value.shape[a], like.shape[a])]
    if not todo:
        return value
    ends = concat_ints(e, [dim_of(e, like, a) + s for a, s in todo])
    shape = tuple(like.shape[i] if i in [a for a, _ in todo] else d for i, d in enumerate(value.shape))
    return e.op("Slice", value, ints(e, [s for _, s in todo]), ends, ints(e, [a for a, _ in todo]), shape=shape)


def _equal(a: Dim, b: Dim) -> bool:
    return a is not None and a == b


def number(call: Call, name: str, default: float) -> float:
    """A number among a call's attributes; ONNX keeps these in float32, defaults too."""
    return float(np.float32(call.attrs.get(name, default)))


def spatial_axes(call: Call) -> list[int]:
    """Axes after batch and channel of a call's first input."""
    return list(range(2, call.given(0).rank))


def arange_like(e: Emitter, value: Value, axis: int) -> Value:
    """0, 1, … up to the length of an axis, as an int64 vector."""
    length = value.shape[axis % value.rank]
    if isinstance(length, int):
        return e.const(np.arange(length, dtype=_INT), name="range")
    stop = e.op("Squeeze", dim_of(e, value, axis), ints(e, [0]))
    return e.op("Range", e.const(0, _INT), stop, e.const(1, _INT))


def places_of(e: Emitter, value: Value) -> Value:
    """Every element's place in the flattened tensor, in the shape of the tensor."""
    places = e.op("Range", e.const(0, _INT), size_of(e, value), e.const(1, _INT))
    return e.op("Reshape", places, shape_of(e, value), shape=value.shape, allowzero=1)


def scatter_flat(e: Emitter, cotangent: Value, places: Value, like: Value) -> Value:
    """Add a cotangent's elements into zeros in the shape of ``like``, each at its place in the flattened tensor."""
    flat = ints(e, [-1])
    size = e.op("Reshape", size_of(e, like), ints(e, [1]))
    blank = e.op("ConstantOfShape", size, value=np.array([0], cotangent.dtype))
    rows = [e.op("Reshape", v, flat) for v in (places, cotangent)]
    return reshape_like(e, e.op("ScatterElements", blank, *rows, axis=0, reduction="add"), like)


def along_axis(e: Emitter, vector: Value, axis: int, rank: int) -> Value:
    """A vector as a tensor that broadcasts along all axes but one."""
    after = rank - 1 - axis % rank
    return e.op("Unsqueeze", vector, ints(e, range(1, 1 + after))) if after else vector


def scatter_axis(e: Emitter, cotangent: Value, indices: Value, axis: int, length: Value) -> Value:
    """Add slices of a cotangent into zeros: the adjoint of picking ``indices`` (a vector) along one axis.

    Args:
        e: the emitter.
        cotangent: what to add; its axis is as long as ``indices``.
        indices: positions, not negative; they may repeat.
        axis: the axis.
        length: how long the axis of the result is (int64 vector of one element).
    """
    rank = cotangent.rank
    axis %= rank
    front = [axis, *(i for i in range(rank) if i != axis)]
    back = [front.index(i) for i in range(rank)]
    turned = cotangent if axis == 0 else e.op("Transpose", cotangent, perm=front)
    size = concat_ints(e, [length, *(dim_of(e, turned, i) for i in range(1, rank))])
    known = e.ints(length)
    shape = (known[0] if known else None, *turned.shape[1:])
    if e.portable:
        # WebGPU and TensorRT add nothing while scattering: multiply by a one-hot matrix instead.
        stop = e.op("Squeeze", length, ints(e, [0]))
        places = e.op("Unsqueeze", e.op("Range", e.const(0, _INT), stop, e.const(1, _INT)), ints(e, [1]))
        hit = cast_like(e, e.op("Equal", places, indices), cotangent)
        rows = merge_axes(e, turned, 1)
        summed = e.op("Reshape", hit @ rows, size, shape=shape)
    else:
        blank = e.op("ConstantOfShape", size, value=np.array([0], cotangent.dtype), shape=shape)
        column = e.op("Unsqueeze", indices, ints(e, [1]))
        summed = e.op("ScatterND", blank, column, turned, reduction="add", shape=shape)
    return summed if axis == 0 else e.op("Transpose", summed, perm=back)


def sum_per_sample(e: Emitter, value: Value, batch: Dim) -> Value | None:
    """Sum over everything but the batch, (N,); None where no axis can be it.

    Args:
        e: the emitter.
        value: a tensor whose batch may stand on any axis.
        batch: how long the batch is, or what its length is called.
    """
    if value.rank == 0:
        return e.op("Reshape", value, ints(e, [1]))
    axis, first = 0, value.shape[0]
    # One row may be that of all samples, or (of three axes or more) one step of a sequence with the samples second.
    if first != batch and (first != 1 or value.rank > 2):
        # An open length without a name is no other one's.
        matching = [i for i, d in enumerate(value.shape) if batch is not None and d == batch]
        if len(matching) == 1 or (matching and first == 1):
            axis = matching[0]
        elif first == 1:
            # Inference names the same length anew where it cannot tell: behind one step, the only open axis is samples.
            free = [i for i, d in enumerate(value.shape) if not isinstance(d, int)]
            axis = free[0] if len(free) == 1 and isinstance(batch, str) else 0
        elif batch == 1:
            return e.op("Reshape", e.op("ReduceSum", value, keepdims=0), ints(e, [1]))
        elif isinstance(first, int) and isinstance(batch, int):
            return None
    rest = [i for i in range(value.rank) if i != axis]
    return e.op("ReduceSum", value, ints(e, rest), keepdims=0) if rest else value
