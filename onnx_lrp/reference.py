"""Running a model in float64 by ONNX's reference implementation: the oracle of verification."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import (
    op_conv_transpose,
    op_layer_normalization,
    op_loop,
    op_max_pool,
    op_resize,
    op_rms_normalization,
    op_scan,
)

from onnx_lrp.opsets import all_graphs, graphs_in
from onnx_lrp.recurrent_reference import GRU, LSTM, RNN

DOUBLE = TensorProto.DOUBLE
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
Array = np.ndarray[Any, Any]
# Inputs that the operator wants in float32, whatever the type of its data.
ALWAYS_FLOAT = {"Resize": (2,), "Upsample": (1,)}


def to_double(model: ModelProto) -> ModelProto:
    """Return a copy of `model` that computes in float64 wherever the original computes in floats of fewer bits."""
    copy = ModelProto()
    copy.CopyFrom(model)
    _double_graph(copy.graph)
    for function in copy.functions:
        _double_nodes(function.node, set())
    return copy


def named(model: ModelProto) -> ModelProto:
    """The model with a name for every output: onnx takes one that has none for every input that has none."""
    for number, node in enumerate(node for graph in all_graphs(model.graph) for node in graph.node):
        for k, name in enumerate(node.output):
            node.output[k] = name or f"unnamed/{number}/{k}"
    return model


class MaxUnpool(OpRun):
    """MaxUnpool as ONNX Runtime has it: onnx's own reads the indices as places in the shape it would have by itself."""

    op_domain = ""

    def _run(self, x: Array, indices: Array, shape: Array | None = None, **options: Any) -> tuple[Array]:
        if shape is None:
            kernel = options["kernel_shape"]
            strides, pads = (options.get(k) or [n] * len(kernel) * m for k, n, m in (("strides", 1, 1), ("pads", 0, 2)))
            around = np.reshape(pads, (2, -1)).sum(0)
            lengths = (np.array(x.shape[2:]) - 1) * strides + kernel - around
            shape = np.array([*x.shape[:2], *lengths])
        y = np.zeros(tuple(shape), x.dtype)
        y.reshape(-1)[indices.reshape(-1)] = x.reshape(-1)
        return (y,)


class MaxPool(op_max_pool.MaxPool):
    """MaxPool whose Indices run over the whole tensor: at stride 1 onnx's own count within each picture."""

    op_domain = ""

    def _run(self, x: Array, kernel_shape: list[int], **options: Any) -> tuple[Array, ...]:  # type: ignore[override]
        names = ("auto_pad", "ceil_mode", "dilations", "pads", "storage_order", "strides")
        given = {"storage_order": 0} | {k: v for k, v in options.items() if v is not None}
        chosen = {k: given.get(k) for k in names}
        result: tuple[Array, ...] = self._max_pool(x, kernel_shape=kernel_shape, **chosen)  # type: ignore[no-untyped-call]
        return result


class ConvTranspose(op_conv_transpose.ConvTranspose):
    """ConvTranspose with groups: onnx's own takes it that each group has one channel."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self, x: Array, w: Array, b: Array | None = None, group: int = 1, **options: object
    ) -> tuple[Array]:
        biases = [None] * group if b is None else np.split(b, group)
        parts = zip(np.split(x, group, 1), np.split(w, group), biases, strict=True)
        run: Any = super()._run
        done = [run(*part, group=1, **options)[0] for part in parts]
        return (np.concatenate(done, 1),)


class GlobalMaxPool(OpRun):
    """GlobalMaxPool that keeps the axes it reduces: onnx's own drops them for a single one."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class LayerNormalization(op_layer_normalization.LayerNormalization):
    """LayerNormalization in the type of its input, whatever it is told to compute in."""

    op_domain = ""

    def _run(self, *inputs: Array, **options: Any) -> tuple[Array, ...]:
        result: tuple[Array, ...] = super()._run(*inputs, **options | {"stash_type": 1})  # type: ignore[no-untyped-call]
        return result


class RMSNormalization(op_rms_normalization.RMSNormalization):
    """RMSNormalization in the type of its input, whatever it is told to compute in."""

    op_domain = ""

    def _run(self, *inputs: Array, **options: Any) -> tuple[Array, ...]:
        result: tuple[Array, ...] = super()._run(*inputs, **options | {"stash_type": 1})  # type: ignore[no-untyped-call]
        return result


class GroupNormalization(OpRun):
    """GroupNormalization in the type of its input: its function body computes in float32."""

    op_domain = ""

    def _run(self, x: Array, scale: Array, bias: Array, num_groups: int, epsilon: float, **_: object) -> tuple[Array]:
        rows = x.reshape(x.shape[0], num_groups, -1)
        z = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + epsilon)
        # Before opset 21 there is one scale per group.
        slope, offset = (np.repeat(v, x.shape[1] // v.size).reshape(-1, *[1] * (x.ndim - 2)) for v in (scale, bias))
        return (z.reshape(x.shape) * slope + offset,)


class MeanVarianceNormalization(OpRun):
    """MeanVarianceNormalization in the type of its input: its function body has constants in float32."""

    op_domain = ""

    def _run(self, x: Array, axes: list[int]) -> tuple[Array]:
        along = tuple(axes)
        return ((x - x.mean(along, keepdims=True)) / (x.std(along, keepdims=True) + 1e-9),)


class GatherElements(OpRun):
    """GatherElements with fewer indices than elements along the other axes: onnx's own wants as many."""

    op_domain = ""

    def _run(self, x: Array, indices: Array, axis: int) -> tuple[Array]:
        places: list[Array] = list(np.indices(indices.shape))
        places[axis] = indices
        return (x[tuple(places)],)


class GlobalLpPool(OpRun):
    """GlobalLpPool, which onnx has not."""

    op_domain = ""

    def _run(self, x: Array, p: int) -> tuple[Array]:
        return ((np.abs(x) ** p).sum(tuple(range(2, x.ndim)), keepdims=True) ** (1 / p),)


class LRN(OpRun):
    """LRN over all channels, in any number of dimensions: onnx's own fills as many channels as there are samples."""

    op_domain = ""

    def _run(self, x: Array, alpha: float, beta: float, bias: float, size: int) -> tuple[Array]:
        before, channels = (size - 1) // 2, x.shape[1]
        padded = np.pad(x**2, [(0, 0), (before, size - 1 - before)] + [(0, 0)] * (x.ndim - 2))
        squares = sum(padded[:, k : k + channels] for k in range(size))
        return ((x / (bias + alpha / size * squares) ** beta).astype(x.dtype),)


class LpNormalization(OpRun):
    """LpNormalization by absolute values: onnx's own sums the numbers as they are."""

    op_domain = ""

    def _run(self, x: Array, axis: int, p: int) -> tuple[Array]:
        norm = np.linalg.norm(x, p, axis, keepdims=True)
        return (np.where(norm == 0, 0, x / np.where(norm == 0, 1, norm)),)


def sample(x: Array, places: Array, mode: str, padding: str, corners: bool = False) -> Array:
    """Values of pictures between their pixels.

    Args:
        x: pictures, (N, C, lengths…).
        places: where, counted in pixels, (N, points, axes).
        mode: nearest, linear or cubic.
        padding: zeros, border or reflection.
        corners: reflect at the centres of the outermost pixels instead of their edges.

    Returns:
        (N, C, points).
    """
    lengths = np.array(x.shape[2:])
    low, high = (0 * lengths, lengths - 1) if corners else (lengths * 0 - 0.5, lengths - 0.5)

    def inside(p: Array) -> Array:
        if padding == "reflection":
            span = np.maximum(high - low, 1)
            rest = np.mod(p - low, 2 * span)
            p = low + np.minimum(rest, 2 * span - rest)
        return p if padding == "zeros" else np.clip(p, 0, lengths - 1)

    if mode != "cubic":
        places = inside(places)
    begin = np.rint(places) if mode == "nearest" else np.floor(places)
    t, a, y = places - begin, -0.75, np.zeros((*x.shape[:2], places.shape[1]), x.dtype)
    weights = {
        "nearest": {0: t * 0 + 1},
        "linear": {0: 1 - t, 1: t},
        "cubic": {
            k: np.where(s <= 1, (a + 2) * s**3 - (a + 3) * s**2 + 1, a * (s**3 - 5 * s**2 + 8 * s - 4))
            for k in (-1, 0, 1, 2)
            for s in [np.abs(t - k)]
        },
    }[mode]
    for taps in itertools.product(weights, repeat=len(lengths)):
        weight = np.stack([weights[k][..., i] for i, k in enumerate(taps)]).prod(0)
        at = begin + np.array(taps)
        at = inside(at) if mode == "cubic" else at
        there = np.all(np.logical_and(at >= 0, at < lengths), axis=-1, keepdims=True)[..., 0]
        index = tuple(np.clip(at, 0, lengths - 1).astype(int).transpose(2, 0, 1))
        for n in range(len(x)):
            y[n] += x[n][(slice(None), *(i[n] for i in index))] * weight[n] * there[n]
    return y


class GridSample(OpRun):
    """GridSample with places in the type of the grid: onnx's own have float32."""

    op_domain = ""

    def _run(self, x: Array, grid: Array, mode: str, padding_mode: str, align_corners: int) -> tuple[Array]:
        lengths, n = np.array(x.shape[2:]), grid.reshape(len(grid), -1, grid.shape[-1])[..., ::-1]
        places = (n + 1) / 2 * (lengths - 1) if align_corners else ((n + 1) * lengths - 1) / 2
        found = sample(x, places, mode.removeprefix("bi"), padding_mode, bool(align_corners))
        return (found.reshape(*x.shape[:2], *grid.shape[1:-1]),)


class Resize(op_resize.Resize):
    """Resize with the weights of mode cubic in float64: of onnx's own the coefficient, a float32, decides."""

    op_domain = ""

    def _run(self, *inputs: Array, **options: Any) -> tuple[Array]:  # type: ignore[override]
        run: Any = super()._run
        result: tuple[Array] = run(*inputs, **options | {"cubic_coeff_a": float(options["cubic_coeff_a"])})
        return result


class DequantizeLinear(OpRun):
    """DequantizeLinear at every opset and in the type of its scale: onnx's own begins at opset 19, in float32."""

    op_domain = ""

    def _run(self, q: Array, scale: Array, zero: Array | None = None, **attributes: Any) -> tuple[Array]:
        axis, block = attributes.get("axis", 1), attributes.get("block_size") or 0
        steps = _along(scale, q, axis, block)
        zeros = 0.0 if zero is None else _along(zero, q, axis, block).astype(np.float64)
        return (((q.astype(np.float64) - zeros) * steps).astype(scale.dtype),)


def _along(scale: Array, x: Array, axis: int, block: int) -> Array:
    """Scales of a quantised tensor, broadcast to it: one, one per place along an axis, or one per block."""
    if block:
        return np.repeat(scale, block, axis).take(range(x.shape[axis]), axis)
    return (
        scale.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]) if scale.size > 1 else scale.ravel()[0]
    )


class Loop(op_loop.Loop):
    """Loop that puts its results together along a new axis: onnx's own joins them along the first they have."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self, trips: Array | None = None, go: Array | None = None, *states: Array, **options: Any
    ) -> tuple[Array, ...]:
        body: Any = getattr(self, "body")  # noqa: B009
        outer, count = dict(options.get("context") or {}), len(states)
        results: list[list[Array]] = [[] for _ in body.output_names[1 + count :]]
        step = 0
        while (trips is None or step < int(np.reshape(trips, ()))) and (go is None or bool(np.reshape(go, ()))):
            given = [np.array(step, np.int64), np.array(True), *states]
            go, *made = body.run(None, outer | dict(zip(body.input_names, given, strict=True)))
            states = tuple(made[:count])
            for so_far, result in zip(results, made[count:], strict=True):
                so_far.append(result)
            step += 1
        return (*states, *_stacked(body, results, [0] * len(results), [0] * len(results)))


class Scan(op_scan.Scan):
    """Scan along any axis, in any direction: onnx's own goes forward along the first."""

    op_domain = ""

    def __init__(self, node: NodeProto, params: dict[str, Any]):
        OpRun.__init__(self, node, params)  # onnx's own refuses here

    def _run(self, *inputs: Array, num_scan_inputs: int, **options: Any) -> tuple[Array, ...]:  # type: ignore[override]
        body: Any = getattr(self, "body")  # noqa: B009
        outer, count = dict(options.get("context") or {}), len(inputs) - num_scan_inputs
        outputs = len(body.output_names) - count
        axes, back = (options.get(f"scan_input_{key}") or [0] * num_scan_inputs for key in ("axes", "directions"))
        rows = [np.moveaxis(x, axis, 0) for x, axis in zip(inputs[count:], axes, strict=True)]
        rows = [x[::-1] if turned else x for x, turned in zip(rows, back, strict=True)]
        states: Sequence[Array] = inputs[:count]
        results: list[list[Array]] = [[] for _ in range(outputs)]
        for step in range(len(rows[0])):
            given = [*states, *(x[step] for x in rows)]
            made = body.run(None, outer | dict(zip(body.input_names, given, strict=True)))
            states = made[:count]
            for so_far, result in zip(results, made[count:], strict=True):
                so_far.append(result)
        axes, back = (options.get(f"scan_output_{key}") or [0] * outputs for key in ("axes", "directions"))
        return (*states, *_stacked(body, results, axes, back))


def _stacked(body: Any, results: Sequence[list[Array]], axes: Sequence[int], back: Sequence[int]) -> list[Array]:
    """The results of all steps, each put together along its axis; of no step, as the model says they would be."""
    found = []
    infos = body.proto_.output[len(body.proto_.output) - len(results) :]
    for info, rows, axis, turned in zip(infos, results, axes, back, strict=True):
        if rows:
            found.append(np.stack(rows[::-1] if turned else rows, axis))
            continue
        lengths = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        found.append(np.zeros((*lengths[:axis], 0, *lengths[axis:]), dtype))
    return found


_OPERATORS: list[type[OpRun]] = [
    DequantizeLinear,
    MaxUnpool,
    MaxPool,
    ConvTranspose,
    GlobalMaxPool,
    LayerNormalization,
    RMSNormalization,
    GroupNormalization,
    MeanVarianceNormalization,
    GatherElements,
    GlobalLpPool,
    LpNormalization,
    LRN,
    GridSample,
    Resize,
    GRU,
    LSTM,
    RNN,
    Loop,
    Scan,
]


def evaluator(model: ModelProto) -> ReferenceEvaluator:
    """ONNX's reference implementation of a model, mended where it is wrong."""
    return ReferenceEvaluator(model, new_ops=_OPERATORS)


def run_double(
    model: ModelProto, feeds: Mapping[str, Array], held: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Run `model` in float64 by onnx's reference implementation.

    Args:
        model: the model.
        feeds: its inputs; floats are widened.
        held: tensors inside the model that are to be taken as they are, and not computed.
    """
    double, held = named(to_double(model)), held or {}
    nodes = [n for n in double.graph.node if held.keys().isdisjoint(n.output)]
    del double.graph.node[:]
    double.graph.node.extend(nodes)
    for name, array in held.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        double.graph.input.append(helper.make_tensor_value_info(name, DOUBLE if kind in FLOATS else kind, array.shape))
    session = evaluator(double)
    del double.graph.initializer[:]  # the session has them as arrays
    fed = {n: x.astype(np.float64) if _is_float(x) else x for n, x in {**feeds, **held}.items()}
    return _run(session, double.graph, fed)


def _run(session: ReferenceEvaluator, graph: GraphProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What `session.run` gives; but onnx's keeps every tensor to the end, and this one none after its last reader.

    Explanations of deep networks for large pictures would need many times the memory otherwise.
    """
    nodes, wanted = session.rt_nodes_, set(session.output_names)
    last = {name: k for k, node in enumerate(graph.node) for name in _read_by(node)}
    known: dict[str, Any] = {"": None, **session.rt_inits_, **feeds}
    for k, (node, source) in enumerate(zip(nodes, graph.node, strict=True)):
        inputs = [known[name] for name in node.input]
        made = node.run(*inputs, context=known) if node.need_context() else node.run(*inputs)
        known |= dict(zip(node.output, made, strict=False))
        for name in {*_read_by(source), *source.output} - wanted - {""}:
            if last.get(name, k) <= k:
                known.pop(name, None)
    return {name: known[name] for name in session.output_names}


def _read_by(node: NodeProto) -> Iterator[str]:
    """The tensors that a node reads, or that a node of a graph inside of it does."""
    yield from node.input
    for graph in graphs_in(node).values():
        for inner in all_graphs(graph):
            yield from (name for part in inner.node for name in part.input)
            yield from (output.name for output in inner.output)


def _is_float(x: Array) -> bool:
    return helper.np_dtype_to_tensor_dtype(x.dtype) in FLOATS


def _double_graph(graph: GraphProto) -> None:
    kept = _double_nodes(graph.node, {tensor.name for tensor in graph.initializer})
    for tensor in graph.initializer:
        if tensor.name not in kept:
            tensor.CopyFrom(_widened(tensor))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type in FLOATS and info.name not in kept:
            info.type.tensor_type.elem_type = DOUBLE


def _double_nodes(nodes: Iterable[NodeProto], constants: set[str]) -> set[str]:
    """Widen the constants and casts of `nodes`, and return the names of the tensors that must stay float32."""
    nodes = list(nodes)
    constants = constants | {node.output[0] for node in nodes if node.op_type == "Constant"}
    kept = {
        node.input[index]
        for node in nodes
        for index in ALWAYS_FLOAT.get(node.op_type, ())
        if index < len(node.input) and node.input[index] in constants
    }
    for node in nodes:
        if node.op_type == "Constant" and node.output[0] in kept:
            continue
        if node.op_type == "ConstantOfShape" and not node.attribute:  # without a value it makes float32 zeros
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
        for attribute in node.attribute:
            _double_attribute(node.op_type, attribute)
    return kept


def _double_attribute(op_type: str, attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.TENSOR:
        attribute.t.CopyFrom(_widened(attribute.t))
    elif attribute.type == AttributeProto.GRAPH:
        _double_graph(attribute.g)
    elif attribute.type == AttributeProto.GRAPHS:
        for graph in attribute.graphs:
            _double_graph(graph)
    elif op_type == "Constant" and attribute.name in {"value_float", "value_floats"}:
        numbers = np.asarray(attribute.f if attribute.name == "value_float" else list(attribute.floats), np.float64)
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(numbers)))
    elif attribute.name in {"to", "dtype", "stash_type"} and attribute.i in FLOATS:
        attribute.i = DOUBLE


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in FLOATS:
        return tensor
    return numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
