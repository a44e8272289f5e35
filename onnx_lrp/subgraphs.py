"""If, Loop and Scan: what their bodies read from outside, and how a body is emitted again.

A source node's body can be read by nobody outside. So the view has one call for such a node, whose inputs are its own
and then the outer tensors that its bodies read; and whoever needs the inside lays the body out again, on tensors of its
choice, where the emitter stands. 16-bit floats are laid out in float32. Weights that live in a body become constants
of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from onnx_lrp.adjoints.shapes import ints
from onnx_lrp.bodies import in_known_operators
from onnx_lrp.emit import Array, Body, Call, Emitter, Value
from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Dim, Facts, Shape
from onnx_lrp.inference import RANDOM, named
from onnx_lrp.lifting import Track, scan
from onnx_lrp.model import ROLE, array_of, attributes_of

# Attributes that hold the bodies.
BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}
_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_INDEX, _FLAG = Facts(np.dtype(np.int64), ()), Facts(np.dtype(bool), ())


def is_control(call: Call) -> bool:
    """True for an If, Loop or Scan."""
    return call.op in BODIES and not call.domain


def free_names(graph: onnx.GraphProto) -> list[str]:
    """Names of the tensors that a body reads from outside, in order of appearance."""
    own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    free: dict[str, None] = {}
    for node in graph.node:
        inner = [n for a in node.attribute if a.HasField("g") for n in free_names(a.g)]
        free |= dict.fromkeys(n for n in (*node.input, *inner) if n and n not in own)
        own.update(node.output)
    return list(free | dict.fromkeys(o.name for o in graph.output if o.name not in own))


def read_outside(call: Call) -> list[str]:
    """Names of the outer tensors that the bodies of a call read: those of its last inputs."""
    return list(dict.fromkeys(n for key in BODIES[call.op] for n in free_names(call.attrs[key])))


def own_inputs(call: Call) -> tuple[Value | None, ...]:
    """The inputs of the node itself."""
    return call.inputs[: len(call.inputs) - len(read_outside(call))]


def weighted_nodes(call: Call, operators: Sequence[str]) -> bool:
    """True if any of these operators stands in a body of the call."""

    def inside(graph: onnx.GraphProto) -> bool:
        return any(
            n.op_type in operators or any(inside(a.g) for a in n.attribute if a.HasField("g")) for n in graph.node
        )

    return is_control(call) and any(inside(call.attrs[key]) for key in BODIES[call.op])


def read_node(node: onnx.NodeProto, names: Mapping[str, Value], site: str) -> Call:
    """A node as a call, its outputs still empty; what its bodies read are its last inputs."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    inputs = tuple(names.get(name) if name else None for name in node.input)
    role = next((p.value for p in node.metadata_props if p.key == ROLE), "")
    call = Call(node.op_type, inputs, (), attributes_of(node), site, domain, role=role)
    if is_control(call):
        call.inputs += tuple(names.get(name) for name in read_outside(call))
    return call


def literal(node: onnx.NodeProto) -> Any:
    """The array of a Constant."""
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return array_of(value)
    return np.array(value, dtype={"f": np.float32, "i": np.int64}.get(attribute.name[6:7]))


def known_lengths(e: Emitter, call: Call) -> Array | None:
    """What a call makes that asks for lengths which are known, though the tensor is no constant; else None.

    Exporters leave such questions before an If: is this axis of length 1, is the rank 3?
    """
    x = call.input(0)
    if call.domain or x is None or call.op not in ("Shape", "Size", "Gather"):
        return None
    if call.op == "Size":
        return np.array(math.prod(d for d in x.shape if isinstance(d, int))) if x.static else None
    maker = call if call.op == "Shape" else e.producers.get(x.name)
    if maker is None or maker.op != "Shape" or maker.domain or maker.given(0).facts.shape is None:
        return None
    shape = maker.given(0).shape
    places: Array = np.arange(len(shape))[maker.attrs.get("start", 0) : maker.attrs.get("end")]
    if maker is not call:
        chosen = e.array(call.input(1))
        if chosen is None:
            return None
        places = np.asarray(places[chosen])
    lengths = [d for i in places.reshape(-1) if isinstance(d := shape[i], int)]
    return np.array(lengths, np.int64).reshape(places.shape) if len(lengths) == places.size else None


def taken_branch(e: Emitter, call: Call) -> str | None:
    """The branch of an If whose condition is known before the model runs; else None."""
    if call.op != "If" or call.domain:
        return None
    condition = e.array(call.input(0))
    return None if condition is None else BODIES["If"][0 if condition.any() else 1]


def see_branch(e: Emitter, call: Call, branch: str) -> tuple[list[Call], list[Value]]:
    """The calls of an If's branch, emitted beside it, and its results."""
    calls, names = lay_out(e, call, branch, [])
    return calls, [names[o.name] for o in call.attrs[branch].output]


# ---- laying out ----------------------------------------------------------------------------------------------------


def lay_out(e: Emitter, call: Call, key: str, given: Sequence[Value]) -> tuple[list[Call], dict[str, Value]]:
    """Emit the nodes of a body where the emitter stands.

    Args:
        e: the emitter.
        call: the If, Loop or Scan.
        key: the attribute that holds the body.
        given: the body's inputs.

    Returns:
        Its calls in topological order, and its tensors by name.

    Raises:
        ModelError: a node of it cannot be emitted again.
    """
    graph = call.attrs[key]
    outside = read_outside(call)
    captured = call.inputs[len(call.inputs) - len(outside) :]
    names = {name: _wide(e, value) for name, value in zip(outside, captured, strict=True) if value is not None}
    names |= {info.name: value for info, value in zip(graph.input, given, strict=True)}
    if graph.sparse_initializer:
        raise ModelError(f"node '{call.site}' ({call.op}) holds sparse weights; export the model with dense ones")
    if not all(i.type.HasField("tensor_type") for i in graph.input):
        raise ModelError(
            f"node '{call.site}' ({call.op}) carries a sequence or an optional from step to step, which cannot be "
            "explained; export the model with tensors in their place, or explain a tensor before it with output="
        )
    if call.op == "Scan" and call.input(0) is None:
        raise ModelError(
            f"node '{call.site}' (Scan) is of the form before opset 9; export the model with opset 9 or higher"
        )
    for tensor in graph.initializer:
        names[tensor.name] = _constant(e, array_of(tensor), f"{call.site}/{tensor.name}")
    calls: list[Call] = []
    for number, node in enumerate(graph.node):
        site = f"{call.site}/{key}/{node.name or f'{node.op_type}_{number}'}"
        if node.op_type == "Constant" and not node.domain:
            names[node.output[0]] = _constant(e, literal(node), site)
            continue
        inner = read_node(node, names, site)
        with e.scope(site, doc=f"{inner.op} of {call.op} {call.site} once more"), e.staying():
            made = _emitted(e, inner, len(node.output))
        calls.extend(made)
        names |= {name: v for name, v in zip(node.output, inner.outputs, strict=False) if name and v is not None}
    return calls, names


def _emitted(e: Emitter, call: Call, outputs: int) -> list[Call]:
    """Emit one node of a body; the calls that it is seen as."""
    if call.domain or call.op in RANDOM or call.op.startswith(("Sequence", "Optional")):
        kind = f"{call.domain}.{call.op}" if call.domain else call.op
        raise ModelError(
            f"node '{call.site}' ({kind}) stands in a body that has to be computed once more, which this operator "
            "cannot be; explain a tensor before it with output=, or export the model without it"
        )
    branch = taken_branch(e, call)
    if branch is not None:
        calls, results = see_branch(e, call, branch)
        call.outputs = tuple(results)
        return calls
    if is_control(call):
        call.outputs = again(e, call)
        for y in call.outputs:
            y.facts = replace(y.facts, shape=named(y.facts.shape, y.name))
        return [call]
    lengths = known_lengths(e, call)
    if lengths is not None:
        call.outputs = (e.const(lengths),)
        return []
    call.attrs = {k: _wide_attribute(k, a) for k, a in call.attrs.items()}
    call.outputs = tuple(e.repeated(call.op, call.inputs, outputs, call.attrs))
    constant = all(v is None or v.facts.const for v in call.outputs)
    return [] if constant else in_known_operators(e, call)


def _wide(e: Emitter, value: Value) -> Value:
    """A tensor, if of 16-bit floats its float32 copy."""
    if not value.narrow:
        return value
    with e.scope(value.name, doc=f"float32 copy of {value.name}"):
        return e.op("Cast", value, to=onnx.TensorProto.FLOAT, shape=value.facts.shape)


def _wide_attribute(key: str, attribute: Any) -> Any:
    if key in ("to", "dtype") and attribute in _NARROW:
        return int(onnx.TensorProto.FLOAT)
    return _wide_array(attribute) if isinstance(attribute, np.ndarray) else attribute


def _wide_array(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _constant(e: Emitter, array: Any, name: str) -> Value:
    return e.const(_wide_array(array), name=name)


# ---- the same node once more ---------------------------------------------------------------------------------------


def again(e: Emitter, call: Call) -> tuple[Value, ...]:
    """Emit an If, Loop or Scan once more."""
    return {"If": _if, "Loop": _loop, "Scan": _scan}[call.op](e, call)


def loop_states_before(e: Emitter, call: Call) -> tuple[Value, list[Value]]:
    """Emit a Loop once more to note its states before every step.

    Returns:
        The numbers of the steps, int64 (steps,); and every state, (steps, *shape).
    """
    noted = list(_loop(e, call, note=True)[len(states_of(call)) :])
    return noted[0], noted[1:]


def scan_states_before(e: Emitter, call: Call) -> list[Track]:
    """The states of a Scan before every step.

    What a Scan puts out of a state says what it was before the next step. For the other states it is emitted once more.
    """
    begin, over = states_of(call), Scanned(call)
    known = {k: _before(e, begin[k], track) for k, track in _put_out(call).items()}
    rest = [k for k in range(len(begin)) if k not in known]
    if rest:
        with e.body("states") as body:
            state = {k: body.input("state", Facts(begin[k].dtype, begin[k].facts.shape)) for k in (*rest, *known)}
            slices = [body.input("slice", sliced(t.value, t.axis)) for t in over.tracks]
            given = [state[k] for k in range(len(begin))] + slices
            names = lay_out(e, call, "body", given)[1]
            for k in rest:
                body.output(names[call.attrs["body"].output[k].name])
            for k in rest:
                body.output(state[k])
        facts = [Facts(begin[k].dtype, begin[k].facts.shape) for k in rest]
        facts += [stacked(f, over.length, 0) for f in facts]
        tracks = [*known.values(), *over.tracks]
        noted = scan(e, body, [begin[k] for k in rest], tracks, facts, [(0, False)] * len(rest))
        known |= {k: Track(value) for k, value in zip(rest, noted[len(rest) :], strict=True)}
    return [known[k] for k in range(len(begin))]


def _put_out(call: Call) -> dict[int, Track]:
    """The states of a Scan that are also put together over the steps, as they leave each: number -> the result."""
    graph, count, over = call.attrs["body"], len(states_of(call)), Scanned(call)
    same = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}

    def origin(name: str) -> str:
        return origin(same[name]) if name in same else name

    made = [origin(o.name) for o in graph.output]
    found = {}
    for j, y in enumerate(call.outputs[count:]):
        for k in range(count):
            if y is not None and y.facts.shape is not None and made[count + j] == made[k]:
                found[k] = Track(y, over.output_axis(j, y.rank - 1), bool(over.output_directions[j]))
    return found


def _before(e: Emitter, begin: Value, after: Track) -> Track:
    """A state before every step, from what it begins with and what it is after every step."""
    y, axis = after.value, after.axis
    first = e.op("Unsqueeze", begin, ints(e, [axis]))
    whole = e.op("Concat", y, first, axis=axis) if after.back else e.op("Concat", first, y, axis=axis)
    bounds = ([1], [np.iinfo(np.int64).max]) if after.back else ([0], [-1])
    cut = e.op("Slice", whole, *(ints(e, b) for b in bounds), ints(e, [axis]), shape=y.facts.shape)
    return Track(cut, axis, after.back)


def states_of(call: Call) -> list[Value]:
    """What a Loop's or Scan's states begin with."""
    own = own_inputs(call)
    own = own[2:] if call.op == "Loop" else own[: len(own) - call.attrs["num_scan_inputs"]]
    return [v for v in own if v is not None]


def state_facts(e: Emitter, call: Call) -> list[Facts]:
    """What is known of the states in every step: a length that a step may change is unknown."""
    facts = [Facts(x.dtype, x.facts.shape) for x in states_of(call)]
    if call.op == "Scan":
        return facts  # their shapes stay, by definition
    for _ in range(3):
        with e.body("trial") as body:
            given = [body.input("iteration", _INDEX), body.input("again", _FLAG)]
            given += [body.input("state", f) for f in facts]
            names = lay_out(e, call, "body", given)[1]
            after = [names[o.name].facts.shape for o in call.attrs["body"].output[1 : 1 + len(facts)]]
        wider = [
            replace(f, shape=named(_common(f.shape, s), f"{call.site}.state{k}"))
            for k, (f, s) in enumerate(zip(facts, after, strict=True))
        ]
        if wider == facts:
            break
        facts = wider
    return facts


def _common(a: Shape | None, b: Shape | None) -> Shape | None:
    """What two shapes have in common."""
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(x if x == y else None for x, y in zip(a, b, strict=True))


def _either(a: Facts, b: Facts) -> Facts:
    return Facts(a.dtype, _common(a.shape, b.shape), False, a.sign | b.sign)


def _if(e: Emitter, call: Call) -> tuple[Value, ...]:
    bodies: dict[str, Body] = {}
    for key in BODIES["If"]:
        with e.body(key, once=False) as body:
            for y in see_branch(e, call, key)[1]:
                body.output(y)
        bodies[key] = body
    ends = [bodies[key].outputs for key in BODIES["If"]]
    facts = [_either(a.facts, b.facts) for a, b in zip(*ends, strict=True)]
    return e.control("If", call.given(0), bodies=bodies, facts=facts)


def _loop(e: Emitter, call: Call, note: bool = False) -> tuple[Value, ...]:
    begin, known = states_of(call), state_facts(e, call)
    with e.body("body") as body:
        given = [body.input("iteration", _INDEX), body.input("again", _FLAG)]
        given += [body.input("state", f) for f in known]
        names = lay_out(e, call, "body", given)[1]
        ends = [names[o.name] for o in call.attrs["body"].output]
        noted = [given[0], *given[2:]] if note else ends[1 + len(begin) :]
        for y in (*ends[: 1 + len(begin)], *noted):
            body.output(y)
    facts = known + [replace(stacked(y.facts, None, 0), const=False) for y in noted]
    return e.control("Loop", *call.inputs[:2], *begin, bodies={"body": body}, facts=facts)


def _scan(e: Emitter, call: Call) -> tuple[Value, ...]:
    begin, over = states_of(call), Scanned(call)
    with e.body("body") as body:
        given = [body.input("state", Facts(x.dtype, x.facts.shape)) for x in begin]
        given += [body.input("slice", sliced(t.value, t.axis)) for t in over.tracks]
        names = lay_out(e, call, "body", given)[1]
        results = [names[o.name] for o in call.attrs["body"].output]
        for y in results:
            body.output(y)
    made = results[len(begin) :]
    ends = [(over.output_axis(k, y.rank), bool(over.output_directions[k])) for k, y in enumerate(made)]
    facts = [Facts(x.dtype, x.facts.shape) for x in begin]
    facts += [stacked(y.facts, over.length, axis) for y, (axis, _) in zip(made, ends, strict=True)]
    return scan(e, body, begin, over.tracks, facts, ends)


def stacked(facts: Facts, length: Dim, axis: int) -> Facts:
    """What is known of the results of all steps, one after another along an axis."""
    shape = None if facts.shape is None else (*facts.shape[:axis], length, *facts.shape[axis:])
    return Facts(facts.dtype, shape, False, facts.sign)


def sliced(x: Value, axis: int) -> Facts:
    """What is known of a slice of a tensor."""
    return Facts(x.dtype, (*x.shape[:axis], *x.shape[axis + 1 :]), False, x.facts.sign)


class Scanned:
    """What a Scan runs over: its scan inputs, and along which axes and in which directions."""

    def __init__(self, call: Call):
        attrs = call.attrs
        self.count = int(attrs["num_scan_inputs"])
        own = own_inputs(call)
        self.first = len(own) - self.count
        self.inputs = [call.given(self.first + i) for i in range(self.count)]
        outputs = len(call.attrs["body"].output) - self.first
        self.directions = list(attrs.get("scan_input_directions") or [0] * self.count)
        self.output_directions = list(attrs.get("scan_output_directions") or [0] * outputs)
        self._output_axes: list[int] = list(attrs.get("scan_output_axes") or [0] * outputs)
        axes = list(attrs.get("scan_input_axes") or [0] * self.count)
        self.axes = [axis % x.rank for axis, x in zip(axes, self.inputs, strict=True)]

    @property
    def tracks(self) -> list[Track]:
        """Its scan inputs."""
        backs = map(bool, self.directions)
        return [Track(x, axis, back) for x, axis, back in zip(self.inputs, self.axes, backs, strict=True)]

    @property
    def length(self) -> Dim:
        """How many steps there are."""
        lengths = [x.shape[axis] for x, axis in zip(self.inputs, self.axes, strict=True)]
        return next((d for d in lengths if isinstance(d, int)), lengths[0])

    def output_axis(self, index: int, rank: int) -> int:
        """The axis along which results of this rank are put together."""
        return self._output_axes[index] % (rank + 1)
