"""Emitting operators: the emitter types, names, folds and hash-conses what it emits.

A wrong graph fails at the line that builds it: every emitted node goes through ONNX's own type inference at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Facts, Shape, Sign, sign_of, sign_of_array
from onnx_lrp.reference import MENDED
from onnx_lrp.values import Array, Call, Operand, Value

__all__ = ["Array", "Call", "Emitter", "Forward", "Operand", "Value", "named_axes"]

_FOLD_LIMIT = 64  # elements; larger constants stay operators on the source's weights, which the runtime folds at load


@functools.cache
def _schema(op: str, opset: int, domain: str = "") -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op, opset, domain)


# A view operator: how to emit it, given (emitter, call with the new inputs).
Forward = Callable[["Emitter", Call], Value]


class Emitter:
    """Appends operators to a graph.

    Args:
        opset: version of ai.onnx to emit for.
        reserved: names that are taken by the source.
        portable: emit no operator or form that WebGPU, OpenVINO or TensorRT lacks.
    """

    def __init__(self, opset: int, reserved: Sequence[str] = (), *, portable: bool = False):
        self.opset = opset
        self.portable = portable
        self.graph = gs.Graph(opset=opset)
        self.values: dict[str, Value] = {}
        self.producers: dict[str, Call] = {}
        self.docs: dict[str, tuple[str, dict[str, str]]] = {}
        self.forwards: dict[str, Forward] = {}
        self.book: Callable[[Call, str, Callable[[], Value | None]], None] = lambda call, account, share: None
        self.parameters: dict[str, tuple[Value, Array | None]] = {}
        self.lazy: dict[str, Callable[[], Array]] = {}
        self._arrays: dict[str, Array] = {}
        self._tensors: dict[str, gs.Tensor] = {}
        self._memo: dict[Any, tuple[Value, ...]] = {}
        self._names: set[str] = set(reserved)
        self._opset_import = [onnx.helper.make_opsetid("", opset)]
        self._site, self._rule, self._doc = "model", "", ""

    # ---- values ------------------------------------------------------------------------------------------------

    def declare(self, name: str, facts: Facts, array: Array | None = None) -> Value:
        """Make a tensor of the source known; ``array`` where it is a readable constant."""
        value = Value(self, name, facts)
        self.values[name] = value
        if array is not None:
            self._arrays[name] = array
        self._names.add(name)
        return value

    def const(self, array: Array | float | int | Sequence[int], dtype: Any = None, name: str = "const") -> Value:
        """A constant tensor; equal constants exist once."""
        data = np.asarray(array, dtype=dtype)
        key = ("const", data.dtype.str, data.shape, data.tobytes())
        if key not in self._memo:
            label = f"lrp/{name}"
            if data.size == 1:
                label += f"/{data.dtype.name}_{'x'.join(map(str, data.shape)) or 'scalar'}_{data.reshape(())!s}"
            label = self._unique(label)
            facts = Facts(data.dtype, data.shape, const=True, sign=sign_of_array(data))
            self._tensors[label] = gs.Constant(label, np.ascontiguousarray(data) if data.ndim else data)
            self._memo[key] = (self.declare(label, facts, data),)
        return self._memo[key][0]

    def parameter(self, name: str, default: Array | None, facts: Facts | None = None) -> Value:
        """A graph input of the explained model; with a default it need not be fed.

        Args:
            name: its name; asked for twice it is the same input.
            default: its value where nothing is fed; None for an input that must be fed.
            facts: its type; default: that of the default value, every axis of free length.
        """
        if name not in self.parameters:
            if name in self._names:
                raise ModelError(
                    f"the model already has a tensor named '{name}', which the explanation needs as an input; rename it"
                )
            if facts is None:
                assert default is not None
                facts = Facts(default.dtype, tuple(f"{name}.{i}" for i in range(default.ndim)))
            self.parameters[name] = (self.declare(name, facts), default)
        return self.parameters[name][0]

    def array(self, value: Value | None) -> Array | None:
        """The elements of a constant, computed where they hide behind operators; None for anything else."""
        if value is None or not value.facts.const:
            return None
        if value.name in self.lazy:
            self._arrays[value.name] = self.lazy.pop(value.name)()
        if value.name not in self._arrays:
            call = self.producers.get(value.name)
            if call is None:
                return None
            inputs = [self.array(v) if v is not None else None for v in call.inputs]
            if any(a is None and v is not None for a, v in zip(inputs, call.inputs, strict=True)):
                return None
            for output, result in zip(call.outputs, self._evaluate(call, inputs), strict=False):
                if output is not None:
                    self._arrays[output.name] = result
        return self._arrays.get(value.name)

    def ints(self, value: Value | None) -> list[int] | None:
        """The elements of an integer constant as Python ints; None where they are not known."""
        array = self.array(value)
        return None if array is None else [int(i) for i in array.reshape(-1)]

    def _evaluate(self, call: Call, inputs: Sequence[Array | None]) -> list[Array]:
        names = [f"i{k}" if a is not None else "" for k, a in enumerate(inputs)]
        outputs = [f"o{k}" if v is not None else "" for k, v in enumerate(call.outputs)]
        node = _node(call.op, names, outputs, call.attrs, call.domain)
        infos = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, inputs, strict=True)
            if a is not None
        ]
        wanted = [onnx.helper.make_tensor_value_info(n, 0, None) for n in outputs if n]
        graph = onnx.helper.make_graph([node], "constant", infos, wanted)
        proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(call.domain, self.opset)])
        results = ReferenceEvaluator(proto, new_ops=MENDED).run(
            None, {n: a for n, a in zip(names, inputs, strict=True) if n}
        )
        found = iter(results)
        return [np.asarray(next(found)) if n else np.empty(0) for n in outputs]

    # ---- operators ---------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Operand, shape: Shape | None = None, label: str = "", **attrs: Any) -> Value:
        """Emit an operator with one output.

        Args:
            kind: operator type of ai.onnx.
            inputs: values, or numbers and arrays, which take the element type of the first value.
            shape: the output's shape where it is known better than inference can tell.
            label: last part of the node's name; default: the operator.
            attrs: attributes.

        Raises:
            ModelError: ONNX's type inference rejects the node.
        """
        return self.ops(kind, *inputs, outputs=1, shape=shape, label=label, **attrs)[0]

    def ops(
        self, kind: str, *inputs: Operand, outputs: int, shape: Shape | None = None, label: str = "", **attrs: Any
    ) -> tuple[Value, ...]:
        """Emit an operator with several outputs (or one); like :meth:`op`."""
        values = self._operands(inputs)
        if kind == "Shape" and values[0] is not None and (lengths := _static_lengths(values[0], attrs)) is not None:
            return (self.const(np.array(lengths, np.int64), name="shape"),)
        key = (
            kind,
            outputs,
            tuple(v.name if v else "" for v in values),
            tuple((k, _hashable(attrs[k])) for k in sorted(attrs)),
        )
        if key in self._memo:
            return self._memo[key]
        name = self._unique(f"lrp/{self._site}/{label or kind}")
        names = [name] if outputs == 1 else [self._unique(f"{name}:{i}") for i in range(outputs)]
        facts = self._infer(kind, values, names, attrs, shape)
        call = Call(kind, values, (), attrs, self._site)
        results = tuple(Value(self, n, f) for n, f in zip(names, facts, strict=True))
        call.outputs = results
        folded = self._fold(call)
        if folded is None:
            for result in results:
                self.values[result.name] = result
                self.producers[result.name] = call
                self._tensors[result.name] = gs.Variable(result.name)
            self.graph.nodes.append(
                gs.Node(
                    kind,
                    name,
                    _gs_attrs(name, attrs),
                    [self._tensor(v) for v in values],
                    [self._tensor(v) for v in results],
                )
            )
            self.docs[name] = (self._doc, {"onnx_lrp.source": self._site, "onnx_lrp.rule": self._rule})
            folded = results
        self._memo[key] = folded
        return folded

    def _operands(self, inputs: Sequence[Operand]) -> tuple[Value | None, ...]:
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        dtype = next((v.dtype for v in given if isinstance(v, Value)), np.dtype(np.float32))
        # Plain numbers and float arrays follow the tensor they meet; integer arrays (axes, shapes) keep their type.
        return tuple(
            v
            if v is None or isinstance(v, Value)
            else self.const(v)
            if isinstance(v, np.ndarray) and v.dtype.kind in "ib"
            else self.const(v, dtype)
            for v in given
        )

    def _infer(
        self,
        kind: str,
        values: Sequence[Value | None],
        names: Sequence[str],
        attrs: dict[str, Any],
        shape: Shape | None,
    ) -> list[Facts]:
        inputs = ["" if v is None else v.name for v in values]
        node = _node(kind, inputs, names, attrs)
        types = {v.name: _type_proto(v.facts) for v in values if v is not None}
        data = {
            v.name: onnx.numpy_helper.from_array(a, v.name)
            for v in values
            if v is not None and v.dtype.kind == "i" and (a := self._small_array(v)) is not None
        }
        try:
            inferred = onnx.shape_inference.infer_node_outputs(
                _schema(kind, self.opset), node, types, data, opset_imports=self._opset_import
            )
        except Exception as error:
            shapes = ", ".join(f"{v.name}: {v.facts.dtype}{v.facts.shape}" for v in values if v is not None)
            raise ModelError(
                f"emitting {kind} for node '{self._site}' fails: {' '.join(str(error).split())[:200]} (inputs {shapes})"
            ) from None
        absent = Sign.ANY if kind == "Clip" else Sign.ZERO  # a bound that is not given bounds nothing
        signs = [absent if v is None else v.facts.sign for v in values]
        const = all(v is None or v.facts.const for v in values) and kind not in _RANDOM
        active = any(v is not None and v.facts.active for v in values)
        result = []
        for name in names:
            known = _facts_of(inferred[name])
            result.append(
                replace(
                    known,
                    shape=known.shape if shape is None else shape,
                    const=const,
                    active=active and known.dtype.kind == "f",
                    sign=sign_of(kind, signs, attrs),
                )
            )
        return result

    def _small_array(self, value: Value) -> Array | None:
        """The elements of a small constant, as shape inference may want them."""
        if value.name in self._arrays:
            return self._arrays[value.name]
        known = (
            value.facts.const
            and value.static
            and math.prod(d for d in value.shape if isinstance(d, int)) <= _FOLD_LIMIT
        )
        return self.array(value) if known else None

    def _fold(self, call: Call) -> tuple[Value, ...] | None:
        """Evaluate small constant expressions now; large ones stay operators, so that no weight is ever copied."""
        outputs = [v for v in call.outputs if v is not None]
        if not call.inputs or not all(v.facts.const and v.static for v in outputs):
            return None
        if any(
            np.prod([d for d in v.shape if isinstance(d, int)]) > _FOLD_LIMIT
            for v in [*outputs, *(v for v in call.inputs if v is not None and v.static)]
        ):
            return None
        inputs = [self.array(v) for v in call.inputs]
        if any(a is None and v is not None for a, v in zip(inputs, call.inputs, strict=True)):
            return None
        arrays = self._evaluate(call, inputs)
        return tuple(self.const(a.astype(v.dtype, copy=False)) for a, v in zip(arrays, outputs, strict=True))

    def source_call(self, call: Call, names: Sequence[str], known: Sequence[Facts]) -> None:
        """Make the outputs of a source node known: what the model file says of them, and what inference adds.

        Args:
            call: the node, its outputs still empty.
            names: output names; "" for one that is absent.
            known: facts from the model, one per output.
        """
        try:
            inferred = (
                self._infer(call.op, call.inputs, [n or "_" for n in names], call.attrs, None)
                if not call.domain
                else list(known)
            )
        except (ModelError, onnx.defs.SchemaError, KeyError):
            inferred = list(known)
        const = bool(call.inputs) and all(v is None or v.facts.const for v in call.inputs) and call.op not in _RANDOM
        lengths = _static_lengths(call.given(0), call.attrs) if call.op == "Shape" and not call.domain else None
        if lengths is not None:  # what is computed from known lengths is known
            const, self._arrays[names[0]] = True, np.array(lengths, np.int64)
        outputs: list[Value | None] = []
        for k, name in enumerate(names):
            if not name:
                outputs.append(None)
                continue
            facts = inferred[k] if k < len(inferred) else known[k]
            facts = replace(
                facts, shape=named_axes(_merge(facts.shape, known[k].shape), name), const=const, dtype=known[k].dtype
            )
            value = self.declare(name, facts)
            self.producers[name] = call
            outputs.append(value)
        call.outputs = tuple(outputs)

    def again(self, call: Call, changes: dict[int, Value | None]) -> Call:
        """The same operator on other inputs; unchanged inputs give back the call itself.

        Args:
            call: what to emit again.
            changes: new input per index.
        """
        size = max([len(call.inputs), *(i + 1 for i in changes)])
        inputs = tuple(changes.get(i, call.input(i)) for i in range(size))
        if inputs == call.inputs + (None,) * (size - len(call.inputs)):
            return call
        repeated = replace(call, inputs=inputs)
        if call.op in self.forwards:
            repeated.outputs = (self.forwards[call.op](self, repeated),)
        else:
            repeated.outputs = self.ops(
                call.op, *inputs, outputs=len(call.outputs), label=f"{call.op}_again", **call.attrs
            )
        return repeated

    # ---- names and bookkeeping -----------------------------------------------------------------------------------

    @contextmanager
    def scope(self, site: str, rule: str = "", doc: str = "") -> Iterator[None]:
        """Name, rule and doc string for what is emitted inside."""
        saved = self._site, self._rule, self._doc
        self._site, self._rule, self._doc = site, rule, doc
        try:
            yield
        finally:
            self._site, self._rule, self._doc = saved

    def rename(self, value: Value, name: str) -> Value:
        """A tensor of the given name with the value's content, to be a graph output."""
        if name in self._names:
            raise ModelError(f"the model already has a tensor named '{name}'; rename it before rewriting")
        self._names.add(name)
        result = self.declare(name, value.facts)
        self._tensors[name] = gs.Variable(name)
        node = self._unique(f"lrp/{name}")
        self.graph.nodes.append(gs.Node("Identity", node, {}, [self._tensor(value)], [self._tensor(result)]))
        self.docs[node] = (f"output {name}", {"onnx_lrp.source": self._site, "onnx_lrp.rule": self._rule})
        return result

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def _tensor(self, value: Value | None) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        if value.name not in self._tensors:
            self._tensors[value.name] = gs.Variable(value.name)
        return self._tensors[value.name]

    def export(self, outputs: Sequence[Value]) -> onnx.GraphProto:
        """What was emitted and is needed for the outputs, as a GraphProto.

        Dead nodes go out; docs and metadata, which onnx-graphsurgeon does not carry, go in.
        """
        wanted = {v.name for v in outputs}
        alive = []
        for node in reversed(self.graph.nodes):
            if any(t.name in wanted for t in node.outputs):
                wanted.update(t.name for t in node.inputs)
                alive.append(node)
        pruned = gs.Graph(nodes=alive[::-1], opset=self.opset)
        proto: onnx.GraphProto = gs.export_onnx(pruned, do_type_check=False).graph
        for node in proto.node:
            doc, metadata = self.docs.get(node.name, ("", {}))
            node.doc_string = doc
            for key, text in metadata.items():
                node.metadata_props.add(key=key, value=text)
        proto.output.extend(onnx.helper.make_value_info(v.name, _type_proto(v.facts)) for v in outputs)
        for name, (value, default) in self.parameters.items():
            if name in wanted:
                proto.input.append(onnx.helper.make_value_info(name, _type_proto(value.facts)))
                if default is not None:
                    proto.initializer.append(onnx.numpy_helper.from_array(default, name))
        return proto


_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def _static_lengths(value: Value, attrs: dict[str, Any]) -> list[int] | None:
    """What Shape gives where all the axes it is asked for are known."""
    if value.facts.shape is None:
        return None
    lengths = value.facts.shape[attrs.get("start", 0) : attrs.get("end")]
    return [d for d in lengths if isinstance(d, int)] if all(isinstance(d, int) for d in lengths) else None


def _merge(a: Shape | None, b: Shape | None) -> Shape | None:
    """The better known of two shapes of the same tensor, axis by axis: a number beats a symbol beats nothing."""
    if a is None or b is None or len(a) != len(b):
        return b if a is None else a
    return tuple(y if isinstance(y, int) or x is None else x for x, y in zip(a, b, strict=True))


def named_axes(shape: Shape | None, name: str) -> Shape | None:
    """Give every unknown axis a symbol of its own, so that equal lengths can be recognised downstream."""
    return None if shape is None else tuple(f"{name}.{i}" if d is None else d for i, d in enumerate(shape))


def _hashable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return tuple(value) if isinstance(value, list) else value


def _node(
    kind: str, inputs: Sequence[str], outputs: Sequence[str], attrs: dict[str, Any], domain: str = ""
) -> onnx.NodeProto:
    plain = {k: onnx.numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attrs.items()}
    return onnx.helper.make_node(kind, inputs, outputs, domain=domain, **plain)


def _gs_attrs(name: str, attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes as onnx-graphsurgeon wants them: tensors as its Constants."""
    return {k: gs.Constant(f"{name}:{k}", v) if isinstance(v, np.ndarray) else v for k, v in attrs.items()}


def _type_proto(facts: Facts) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(facts.dtype), facts.shape)


def _facts_of(proto: onnx.TypeProto) -> Facts:
    tensor = proto.tensor_type
    shape: Shape | None = None
    if tensor.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return Facts(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)
