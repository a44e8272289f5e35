"""What ONNX says of one operator: its type inference, its own evaluation, and how both are written in protos."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Facts, Shape, Sign, sign_of
from onnx_lrp.reference import evaluator
from onnx_lrp.values import Array, Call, Value

RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)

_LONGEST = 4096  # elements of what may be a shape, axes or sizes; what is longer are indices, of which nothing is read


@functools.cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op, opset, "")


def infer(
    kind: str,
    values: Sequence[Value | None],
    names: Sequence[str],
    attrs: dict[str, Any],
    opset: int,
    integers: Mapping[str, Array],
) -> list[Facts]:
    """What is known of the outputs of an operator.

    Args:
        kind: operator type of ai.onnx.
        values: its inputs.
        names: names of its outputs.
        attrs: its attributes.
        opset: version of ai.onnx.
        integers: the inputs whose elements are known and may be shapes or axes.

    Raises:
        Exception: inference rejects the node, in words of its own.
    """
    types = tuple(None if v is None else (v.facts.dtype, v.facts.shape) for v in values)
    arrays = (None if v is None else integers.get(v.name) for v in values)
    known = tuple(a if a is None or a.size <= _LONGEST else None for a in arrays)
    key = (kind, opset, types, len(names), tuple(map(hashable, known)), tuple((k, hashable(attrs[k])) for k in attrs))
    made = _inferred(_Question(key, known, attrs))
    absent = Sign.ANY if kind == "Clip" else Sign.ZERO  # a bound that is not given bounds nothing
    signs = [absent if v is None else v.facts.sign for v in values]
    const = all(v is None or v.facts.const for v in values) and kind not in RANDOM
    active = any(v is not None and v.facts.active for v in values)
    result = []
    for dtype, shape in made:
        live = active and dtype.kind == "f"
        result.append(Facts(dtype, shape, const=const, active=live, sign=sign_of(kind, signs, attrs)))
    return result


@dataclass(frozen=True)
class _Question:
    """What ONNX's inference is asked; two are one question if their keys are equal.

    Attributes:
        key: operator, opset, types of the inputs, number of outputs, known elements, attributes; hashable.
        integers: the elements of each input where they are known.
        attrs: the attributes.
    """

    key: tuple[Any, ...]
    integers: tuple[Array | None, ...] = field(compare=False)
    attrs: dict[str, Any] = field(compare=False)


@functools.lru_cache(4096)
def _inferred(asked: _Question) -> list[tuple[np.dtype[Any], Shape | None]]:
    """Element types and shapes of the outputs; layers that are alike are asked about once."""
    kind, opset, types, count = asked.key[:4]
    inputs = ["" if t is None else f"i{k}" for k, t in enumerate(types)]
    outputs = [f"o{k}" for k in range(count)]
    given = {name: type_proto(Facts(*t)) for name, t in zip(inputs, types, strict=True) if t is not None}
    known = zip(inputs, asked.integers, strict=True)
    data = {name: onnx.numpy_helper.from_array(array, name) for name, array in known if array is not None}
    imports = [onnx.helper.make_opsetid("", opset)]
    node = node_proto(kind, inputs, outputs, asked.attrs)
    found = onnx.shape_inference.infer_node_outputs(_schema(kind, opset), node, given, data, opset_imports=imports)
    return [_type_of(found[name]) for name in outputs]


def evaluate(call: Call, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """The outputs of an operator whose inputs are known; an empty array for one that nobody names."""
    names = [f"i{k}" if a is not None else "" for k, a in enumerate(inputs)]
    outputs = [f"o{k}" if v is not None else "" for k, v in enumerate(call.outputs)]
    node = node_proto(call.op, names, outputs, call.attrs, call.domain)
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
        if a is not None
    ]
    wanted = [onnx.helper.make_tensor_value_info(n, 0, None) for n in outputs if n]
    graph = onnx.helper.make_graph([node], "constant", infos, wanted)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(call.domain, opset)])
    results = evaluator(proto).run(None, {n: a for n, a in zip(names, inputs, strict=True) if n})
    found = iter(results)
    return [np.asarray(next(found)) if n else np.empty(0) for n in outputs]


def document(graph: onnx.GraphProto, docs: Mapping[str, tuple[str, dict[str, str]]]) -> None:
    """Give nodes their doc strings and metadata, those inside bodies too."""
    for node in graph.node:
        node.doc_string, metadata = docs.get(node.name, ("", {}))
        for key, text in metadata.items():
            node.metadata_props.add(key=key, value=text)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                document(attribute.g, docs)


def rejected(kind: str, site: str, values: Sequence[Value | None], error: Exception) -> ModelError:
    """The error to raise where inference rejects an operator that is emitted."""
    shapes = ", ".join(f"{v.name}: {v.facts.dtype}{v.facts.shape}" for v in values if v is not None)
    return ModelError(
        f"emitting {kind} for node '{site}' fails: {' '.join(str(error).split())[:200]} (inputs {shapes})"
    )


def static_lengths(value: Value, attrs: Mapping[str, Any]) -> list[int] | None:
    """What Shape gives where all the axes it is asked for are known."""
    if value.facts.shape is None:
        return None
    lengths = value.facts.shape[attrs.get("start", 0) : attrs.get("end")]
    return [d for d in lengths if isinstance(d, int)] if all(isinstance(d, int) for d in lengths) else None


def merge(a: Shape | None, b: Shape | None) -> Shape | None:
    """The better known of two shapes of the same tensor, axis by axis: a number beats a symbol beats nothing."""
    if a is None or b is None or len(a) != len(b):
        return b if a is None else a
    return tuple(y if isinstance(y, int) or x is None else x for x, y in zip(a, b, strict=True))


def named(shape: Shape | None, name: str) -> Shape | None:
    """Give every unknown axis a symbol of its own, so that equal lengths can be recognised downstream."""
    return None if shape is None else tuple(f"{name}.{i}" if d is None else d for i, d in enumerate(shape))


def hashable(value: Any) -> Any:
    """An attribute as part of a key."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return tuple(value) if isinstance(value, list) else value


def node_proto(
    kind: str, inputs: Sequence[str], outputs: Sequence[str], attrs: dict[str, Any], domain: str = ""
) -> onnx.NodeProto:
    """A node; attributes that are arrays become tensors."""
    plain = {k: onnx.numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attrs.items()}
    return onnx.helper.make_node(kind, inputs, outputs, domain=domain, **plain)


def type_proto(facts: Facts) -> onnx.TypeProto:
    """Element type and shape of a tensor."""
    return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(facts.dtype), facts.shape)


def _type_of(proto: onnx.TypeProto) -> tuple[np.dtype[Any], Shape | None]:
    tensor = proto.tensor_type
    shape: Shape | None = None
    if tensor.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape
