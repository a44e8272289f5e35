"""Adjoints, run and compared: building models that return gradients, and oracles that know nothing of ours.

Three oracles: the operator itself, differenced (exact where it is linear); Richardson extrapolation of its central
differences; and torch's autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lrp import model as models
from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.adjoints.shapes import expand_like, zeros_like
from onnx_lrp.backward import Relevance, Step, gradient, reverse
from onnx_lrp.canonical import see, view
from onnx_lrp.control import Around, Inside
from onnx_lrp.emit import Call, Value
from onnx_lrp.facts import Facts
from onnx_lrp.places import Beyond
from onnx_lrp.reference import to_double
from onnx_lrp.subgraphs import is_control
from onnx_lrp.view import View
from tests.adjoint_reference import run_onnxruntime, run_reference

Array = np.ndarray
Feeds = Mapping[str, Array]
TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}
EXACT, SLOPE, SINGLE = 1e-9, 1e-7, 1e-5


# ---- models that return gradients ----------------------------------------------------------------------------------


def influenced(v: View, wanted: Sequence[Value]) -> list[Call]:
    """Mark everything that depends on the wanted values as active; the calls on the way, in order."""
    reached = set(wanted)
    calls = []
    for call in v.calls:
        outputs = [o for o in call.outputs if o is not None and o.dtype.kind == "f"]
        if outputs and reached.intersection(call.inputs) and (is_control(call) or OPERATORS[call.op].adjoint):
            calls.append(call)
            reached.update(outputs)
    for value in reached:
        value.facts = replace(value.facts, active=True)
    return calls


def _gradient_step(call: Call) -> Step:
    """The gradient, also inside a Scan."""
    if not is_control(call):
        return gradient
    around = Around([Beyond()] * len(call.inputs), [Beyond()] * len(call.outputs))
    return Inside(around, lambda *inside: _gradient_step, lambda: nullcontext(list), see, False)


def gradient_model(
    proto: onnx.ModelProto, wanted: Sequence[str], *, portable: bool = False, seeded: Collection[str] | None = None
) -> onnx.ModelProto:
    """The model with an input ``cotangent/<output>`` per float output and an output ``gradient/<x>`` per wanted x.

    Args:
        proto: the model.
        wanted: what to differentiate by.
        portable: which form of the adjoints to emit.
        seeded: outputs that get a cotangent; default: all.
    """
    source = models.load(proto)
    v = view(source, portable=portable, kept=wanted)
    e, values = v.e, [v.value(name) for name in wanted]
    calls = influenced(v, values)
    seeds = {}
    for name in v.outputs:
        y = v.value(name)
        if y.facts.active and (seeded is None or name in seeded):
            seeds[y] = Relevance(e.parameter(f"cotangent/{name}", None, Facts(y.dtype, y.shape)))
    found = reverse(e, calls, seeds, _gradient_step, values)
    outputs = []
    for name, x in zip(wanted, values, strict=True):
        full = expand_like(e, found[x].whole(e), x) if x in found else zeros_like(e, x)
        outputs.append(e.rename(full, f"gradient/{name}"))
    return models.assemble(source, e.export(outputs), {})


def cotangents_for(outputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    """A random cotangent per float output of a model."""
    rng = np.random.default_rng(seed)
    return {f"cotangent/{n}": rng.standard_normal(y.shape) for n, y in outputs.items() if y.dtype == np.float64}


def paired(outputs: Mapping[str, Array], cotangents: Mapping[str, Array]) -> float:
    """<y, u> over all outputs that have a cotangent."""
    return float(sum((outputs[name.removeprefix("cotangent/")] * u).sum() for name, u in cotangents.items()))


# ---- models from text -----------------------------------------------------------------------------------------------


def network(signature: str, body: str, opset: int = 18) -> onnx.ModelProto:
    """A model from ONNX's text; inputs whose names do not begin with x become weights with random numbers.

    Args:
        signature: inputs => outputs.
        body: nodes.
        opset: version of the operator set.
    """
    inputs, outputs = signature.split("=>")
    text = f'<ir_version: 9, opset_import: ["": {opset}]> network ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(3)
    free = [i for i in proto.graph.input if i.name.startswith("x")]
    for info in proto.graph.input:
        if info not in free:
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            numbers = rng.uniform(0.5, 2, shape) if info.name == "var" else rng.standard_normal(shape)
            array = numbers.astype(TYPES[info.type.tensor_type.elem_type])
            proto.graph.initializer.append(numpy_helper.from_array(array, info.name))
    del proto.graph.input[:]
    proto.graph.input.extend(free)
    return proto


def feeds_for(proto: onnx.ModelProto, lengths: int) -> dict[str, np.ndarray]:
    """Random inputs; axes without a length get the given one."""
    rng = np.random.default_rng(4)
    feeds = {}
    for info in proto.graph.input:
        shape = [d.dim_value or lengths for d in info.type.tensor_type.shape.dim]
        feeds[info.name] = rng.standard_normal(shape).astype(TYPES[info.type.tensor_type.elem_type])
    return feeds


# ---- oracles -------------------------------------------------------------------------------------------------------


def close(found: Array, expected: Array, tolerance: float) -> bool:
    """Equal up to a tolerance relative to the largest number or 1; infinite and missing ones must agree in place."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return False
    finite = np.isfinite(expected)
    scale = np.abs(expected[finite]).max(initial=1e-30)
    return bool(np.abs(found - expected)[finite].max(initial=0.0) <= tolerance * max(scale, 1.0))


def slope(phi: Callable[[float], float]) -> tuple[float, bool]:
    """phi'(0) by central differences and two Richardson steps, at the width where these agree best.

    Returns:
        The derivative, and whether phi has one there: False at a kink, where the differences of both sides disagree.
    """

    def central(h: float) -> float:
        return (phi(h) - phi(-h)) / (2 * h)

    best, doubt = math.nan, math.inf
    for h in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        a, b, c = central(h), central(h / 2), central(h / 4)
        once, twice = (4 * b - a) / 3, (4 * c - b) / 3
        estimate = (16 * twice - once) / 15
        spread = max(abs(estimate - twice), abs(twice - once) * 1e-3)
        if spread < doubt:
            best, doubt = estimate, spread
        if doubt <= 1e-10 * abs(best):
            break
    h = 1e-6
    bend = (phi(h) - 2 * phi(0.0) + phi(-h)) / h
    return best, bool(doubt <= 1e-8 * max(1.0, abs(best)) and abs(bend) <= 1e-3 * max(1.0, abs(best)))


def attributes(node: onnx.NodeProto, opset: int) -> dict[str, Any]:
    """Attributes of a node as Python values, defaults among them."""
    schema = onnx.defs.get_schema(node.op_type, opset).attributes
    given = [s.default_value for s in schema.values() if s.default_value.name] + list(node.attribute)
    values = {a.name: helper.get_attribute_value(a) for a in given}
    return {name: x.decode() if isinstance(x, bytes) else x for name, x in values.items()}


def is_linear(op: str, index: int, attrs: Mapping[str, Any]) -> bool:
    """Whether an operator is linear in one of its inputs, so that one difference is its derivative."""
    operator = OPERATORS.get(op)  # None: seen through its body
    if attrs.get("reduction", "none") in ("mul", "max", "min"):
        return False
    return operator is not None and operator.verb in ("linear", "bilinear") and index not in operator.settings


def off_slope(
    linear: bool, proto: onnx.ModelProto, feeds: Feeds, name: str, cotangents: Feeds, found: Array
) -> float | None:
    """How far <v, gradient> is from the derivative of <y, u> along a random v.

    Args:
        linear: the model is linear in that input: one difference is exact.
        proto: the model.
        feeds: its inputs.
        name: the input.
        cotangents: u.
        found: the gradient.

    Returns:
        The difference in tolerances: 1e-9 where the operator is linear in the input, 1e-7 elsewhere; None at a kink.
    """
    v = np.random.default_rng(len(name) + sum(map(ord, name))).standard_normal(found.shape)

    def phi(t: float) -> float:
        return paired(run_reference(proto, {**feeds, name: feeds[name] + t * v}), cotangents)

    if linear:
        expected, smooth, tolerance = phi(1.0) - phi(0.0), True, EXACT
    else:
        (expected, smooth), tolerance = slope(phi), SLOPE
    scale = max(float(np.abs(v * found).sum()), abs(expected), 1e-3)
    return abs(float((v * found).sum()) - expected) / (scale * tolerance) if smooth else None


# ---- cases of a single operator -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operator application.

    Attributes:
        op: operator type.
        inputs: arrays; None for an absent optional input.
        attrs: attributes.
        fed: inputs that are integers, and yet fed at run time; other integers are constants of the model.
        held: float inputs that are not differentiated by.
        own: float inputs that keep their type and are not differentiated by; constants of the model if not fed.
        fixed: inputs whose axes keep their lengths in the dynamic form.
        outputs: number of outputs.
        unseeded: outputs without a cotangent.
        opset: version of the operator set.
        portable: the adjoint has a portable form, to be tested as well.
        kinked: at a kink or tie, where only torch says what the derivative is to be.
        in_runtime: ONNX Runtime runs the operator in this form.
        note: rest of its name.
    """

    op: str
    inputs: tuple[Array | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    fed: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    outputs: int = 1
    unseeded: tuple[int, ...] = ()
    opset: int = 18
    portable: bool = False
    kinked: bool = False
    in_runtime: bool = True
    note: str = ""

    def __str__(self) -> str:
        shapes = "_".join(
            "x".join(map(str, x.shape)) or "scalar" for x in self.inputs if x is not None and x.dtype.kind == "f"
        )
        given = "_".join(f"{k}{v}" for k, v in self.attrs.items()).replace(" ", "").replace("[", "").replace("]", "")
        return "-".join(filter(None, (self.op, shapes, given, self.note)))

    @property
    def wanted(self) -> list[int]:
        """Inputs to differentiate by."""
        return [i for i, x in enumerate(self.inputs) if self._floats(i, x) and i not in self.held]

    def _floats(self, index: int, x: Array | None) -> bool:
        return x is not None and x.dtype.kind == "f" and index not in self.own

    def feeds(self, dtype: Any = np.float64) -> dict[str, Array]:
        """Graph inputs."""
        return {
            f"x{i}": x.astype(dtype) if self._floats(i, x) else x
            for i, x in enumerate(self.inputs)
            if self._floats(i, x) or i in self.fed
        }

    def model(self, dtype: Any = np.float64, *, dynamic: bool = False) -> onnx.ModelProto:
        """A model of the operator alone; ``dynamic``: every axis is a symbol of its own."""
        feeds = self.feeds(dtype)
        infos = []
        for name, x in feeds.items():
            free = dynamic and int(name[1:]) not in self.fixed and name[1:] not in map(str, self.fed)
            shape = [f"{name}_{axis}" for axis in range(x.ndim)] if free else x.shape
            infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), shape))
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        constants = [numpy_helper.from_array(self.inputs[int(n[1:])], n) for n in names if n and n not in feeds]
        outputs = [f"y{k}" for k in range(self.outputs)]
        results = [
            helper.make_tensor_value_info(y, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None) for y in outputs
        ]
        node = helper.make_node(self.op, names, outputs, **self.attrs)
        graph = helper.make_graph([node], "case", infos, results, constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        for info, y in zip(proto.graph.output, run_reference(proto, feeds).values(), strict=True):
            info.type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * y.ndim)  # the rank, no lengths
            info.type.tensor_type.shape.SetInParent()
            if y.dtype.kind != "f":
                info.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(y.dtype)
        return proto

    def gradients(
        self,
        run: Callable[[onnx.ModelProto, Feeds], dict[str, Array]],
        cotangents: Feeds,
        dtype: Any = np.float64,
        *,
        dynamic: bool = False,
        portable: bool = False,
    ) -> dict[str, Array]:
        """All outputs of the model with gradients."""
        seeded = [name.removeprefix("cotangent/") for name in cotangents]
        names = [f"x{i}" for i in self.wanted]
        proto = gradient_model(self.model(dtype, dynamic=dynamic), names, portable=portable, seeded=seeded)
        return run(proto, {**self.feeds(dtype), **{name: u.astype(dtype) for name, u in cotangents.items()}})


def check(case: Case, peer: Callable[..., list[Array]] | None) -> None:
    """Compare the adjoint with its oracles, and all its forms with each other.

    Args:
        case: the operator application.
        peer: torch's autograd where torch has the operator, else None.
    """
    proto, feeds = case.model(), case.feeds()
    cotangents = cotangents_for(run_reference(proto, feeds))
    cotangents = {name: u for k, (name, u) in enumerate(cotangents.items()) if k not in case.unseeded}
    found = case.gradients(run_reference, cotangents)
    for i in case.wanted:
        error = (
            off_slope(is_linear(case.op, i, case.attrs), proto, feeds, f"x{i}", cotangents, found[f"gradient/x{i}"])
            if not case.kinked
            else 0
        )
        assert error is not None, "there is a kink here"
        assert error <= 1, f"x{i}: the slope differs by {error:.1e} tolerances"
    assert peer is not None or not case.kinked
    if peer is not None:
        (cotangent,) = cotangents.values()
        expected = peer(case.op, attributes(proto.graph.node[0], case.opset), case.inputs, cotangent, case.wanted)
        for i, gradient in zip(case.wanted, expected, strict=True):
            assert close(found[f"gradient/x{i}"], gradient, EXACT), f"x{i}: not torch's"
    forms = [(run_reference, np.float64, EXACT)] + [(run_onnxruntime, np.float32, SINGLE)] * case.in_runtime
    for run, dtype, tolerance in forms:
        for portable in (False, True)[: 1 + case.portable]:
            for dynamic in (False, True):
                other = case.gradients(run, cotangents, dtype, dynamic=dynamic, portable=portable)
                for name, x in found.items():
                    assert close(other[name], x, tolerance), f"{run.__name__}, {dynamic=}, {portable=}: {name}"


def check_model(proto: onnx.ModelProto, wanted: Sequence[str], feeds: Feeds) -> None:
    """Compare the gradients of a model in float32 with slopes in float64, with lengths known and unknown."""
    double, wide = to_double(proto), {name: x.astype(np.float64) for name, x in feeds.items()}
    cotangents = cotangents_for(run_reference(double, wide))
    found = run_reference(gradient_model(double, wanted), {**wide, **cotangents})
    for name in wanted:
        error = off_slope(False, double, wide, name, cotangents, found[f"gradient/{name}"])
        assert error is not None, "there is a kink here"
        assert error <= 1, f"{name}: the slope differs by {error:.1e} tolerances"
    narrow = {**feeds, **{name: u.astype(np.float32) for name, u in cotangents.items()}}
    for form in (proto, loosened(proto)):
        single = run_onnxruntime(gradient_model(form, wanted), narrow)
        exact = run_reference(gradient_model(to_double(form), wanted), {**wide, **cotangents})
        for name, x in found.items():
            assert close(exact[name], x, EXACT), name
            assert close(single[name], x, SINGLE), name


def loosened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a symbol for every length of its inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for info in copy.graph.input:
        for axis, dimension in enumerate(info.type.tensor_type.shape.dim):
            dimension.dim_param = f"{info.name}_{axis}"
    return copy
