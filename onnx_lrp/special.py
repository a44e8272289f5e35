"""Steps that are not tables: moving, passing, pooling, products of two live tensors, softmax, normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onnx_lrp.adjoints import OPERATORS, adjoint
from onnx_lrp.adjoints.shapes import expand_like, ints, reduce_like, same_shape
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.relevance import epsilon_rule, stabilized

Out = Sequence[Relevance | None]


def route(e: Emitter, call: Call, out: Out) -> Out:
    """Relevance goes where the values came from: the adjoint of an operator that moves or selects elements.

    Where relevance is a factor of the operator's own output it stays factored, because y_i = x_j makes
    sum_i y_i c_i equal to x_j sum_i c_i.
    """
    if not OPERATORS[call.op].moves:
        raise RuleError(f"node '{call.site}': route is for operators that move elements, {call.op} computes new ones; use norm or pass")
    factored = all(r is None or (r.of is not None and r.of is o) for r, o in zip(out, call.outputs, strict=True))
    cotangents = [None if r is None else r.factor if factored else r.whole(e) for r in out]
    pieces = adjoint(e, call, cotangents)
    e.book(call, "bias", lambda: _to_constants(e, call, out))
    return [None if p is None else Relevance(p, x if factored else None) for p, x in zip(pieces, call.inputs, strict=True)]


def _to_constants(e: Emitter, call: Call, out: Out) -> Value | None:
    """What lands on constants that were moved together with live tensors (Concat, Where, Max)."""
    constants = [i for i, v in enumerate(call.inputs) if v is not None and i not in call.active and v.dtype.kind == "f"]
    if call.op in ("Pad", "Clip") or not constants:
        return None
    pieces = adjoint(e, call, [None if r is None else r.whole(e) for r in out], constants)
    found = [(p, call.given(i)) for i, p in enumerate(pieces) if p is not None]
    total: Value | None = None
    for piece, _ in found:
        part = e.op("ReduceSum", piece, ints(e, range(1, piece.rank)), keepdims=0) if piece.rank > 1 else piece
        total = part if total is None else total + part
    return total


def pass_through(e: Emitter, call: Call, out: Out) -> Out:
    """The one live input takes all of the relevance, unchanged: activations, normalizations held constant, offsets."""
    relevance, active = out[0], call.active
    if relevance is None:
        return [None] * len(call.inputs)
    if len(active) != 1:
        # x op f(x) with a quotient: the numerator carries the signal
        if call.op != "Div":
            raise RuleError(f"node '{call.site}': pass needs one live input, this {call.op} has {len(active)}; use norm, share or gate")
        active = (0,)
    x = call.given(active[0])
    if x.rank != call.output.rank or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(x.shape, call.output.shape, strict=True)):
        if not OPERATORS[call.op].broadcasts:
            raise RuleError(f"node '{call.site}': pass needs an input in the shape of the output, this {call.op} has {x.shape} -> {call.output.shape}; use norm")
        return [Relevance(reduce_like(e, expand_like(e, relevance.whole(e), call.output), x)) if i == active[0] else None for i in range(len(call.inputs))]
    return [relevance if i == active[0] else None for i in range(len(call.inputs))]


def stop(e: Emitter, call: Call, out: Out) -> Out:
    """No relevance goes further: all of it is booked as absorbed by the node."""
    e.book(call, "bias", lambda: _sum_all(e, out))
    return [None] * len(call.inputs)


def _sum_all(e: Emitter, out: Out) -> Value | None:
    wholes = [r.whole(e) for r in out if r is not None]
    return wholes[0] if wholes else None


@dataclass(frozen=True)
class ProportionalPool:
    """MaxPool shares its relevance in proportion to the inputs of a window: the rule of a sum, as for an average pool.

    (Bach et al. 2015, sec. 2.4 treat pooling as a sum; Montavon et al. 2017 for sum pooling.)
    """

    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the input."""
        if out[0] is None:
            return [None]
        x = call.given(0)
        if call.op == "GlobalMaxPool":
            pool = replace(call, op="GlobalAveragePool", outputs=(e.op("GlobalAveragePool", x),))
        else:
            attrs = {k: v for k, v in call.attrs.items() if k != "storage_order"}
            pool = replace(call, op="AveragePool", attrs=attrs, outputs=(e.op("AveragePool", x, **attrs),))
        return epsilon_rule(self.epsilon)(e, pool, [out[0]])


def _divided(e: Emitter, call: Call, relevance: Relevance, epsilon: float) -> Value:
    """R / stab(y) of a product, with the stabilizer's part booked."""
    y = call.output
    if relevance.of is y and epsilon == 0:
        return relevance.factor
    stable = stabilized(e, y, epsilon)
    s = relevance.factor / stable if relevance.of is None else relevance.factor * e.op("Div", relevance.of, stable, label="quotient")
    e.book(call, "stabilizer", lambda: s * (stable - y) if epsilon else None)
    return s


@dataclass(frozen=True)
class Share:
    """A product of two live tensors: each gets half, by the epsilon rule on 2·y (Achtibat et al. 2024, prop. 3.3)."""

    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs; a product with one live factor is an ordinary linear layer."""
        relevance = out[0]
        if relevance is None:
            return [None] * len(call.inputs)
        factors = OPERATORS[call.op].factors
        live = [i for i in factors if i in call.active]
        if len(live) < 2:
            return epsilon_rule(self.epsilon)(e, call, out)
        s = _divided(e, call, relevance, self.epsilon)
        pieces = adjoint(e, call, [s * 0.5], live)
        return [None if p is None else Relevance(p, x) for p, x in zip(pieces, call.inputs, strict=True)]


# Operators whose output says "how much": what they multiply is the signal.
_GATES = ("Sigmoid", "HardSigmoid", "Softmax", "Erf", "Tanh")


@dataclass(frozen=True)
class Gate:
    """Gate times signal: the signal takes all (Arras et al. 2017, sec. 3.1).

    The gate is the factor that comes out of a Sigmoid, HardSigmoid or Softmax (or the one named); if both or neither
    do, the first factor is the signal.
    """

    gate: Literal["auto", "first", "second"] = "auto"
    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs."""
        live = [i for i in OPERATORS[call.op].factors if i in call.active]
        if out[0] is None:
            return [None] * len(call.inputs)
        if len(live) < 2:
            return epsilon_rule(self.epsilon)(e, call, out)
        return Constant(1 - self.signal(e, call), self.epsilon)(e, call, out)

    def signal(self, e: Emitter, call: Call) -> int:
        """Index of the factor that is the signal."""
        if self.gate != "auto":
            return 1 if self.gate == "first" else 0
        first, second = (_is_gate(e, call.given(i)) for i in (0, 1))
        return 1 if first and not second else 0


def _is_gate(e: Emitter, value: Value) -> bool:
    maker = e.producers.get(value.name)
    while maker is not None and OPERATORS.get(maker.op) is not None and OPERATORS[maker.op].moves and maker.input(0) is not None:
        maker = e.producers.get(maker.given(0).name)
    return maker is not None and maker.op in _GATES


@dataclass(frozen=True)
class Constant:
    """A product in which one live factor is held constant: the epsilon rule on the other side."""

    factor: int = 0
    epsilon: float = 1e-6

    def __call__(self, e: Emitter, call: Call, out: Out) -> Out:
        """Relevance of the inputs."""
        relevance = out[0]
        if relevance is None:
            return [None] * len(call.inputs)
        live = [i for i in OPERATORS[call.op].factors if i in call.active]
        side = next((i for i in live if i != self.factor), live[0])
        piece = adjoint(e, call, [_divided(e, call, relevance, self.epsilon)], [side])[side]
        assert piece is not None
        return [Relevance(piece, call.given(i)) if i == side else None for i in range(len(call.inputs))]


def batchnorm_absolute(e: Emitter, call: Call, out: Out) -> Out:
    """BatchNormalization y = a·x + c keeps |ax| / (|ax| + |c|) of the relevance (Hui & Binder 2019, eq. 10)."""
    if out[0] is None:
        return [None] * len(call.inputs)
    if call.op != "BatchNormalization":
        raise RuleError(f"node '{call.site}': batchnorm_absolute is for BatchNormalization, not {call.op}")
    x, slope, offset = call.given(0), call.given(1), call.given(2)
    signal, shift = e.op("Abs", x * slope), e.op("Abs", offset)
    total = signal + shift + 1e-12
    relevance = expand_like(e, out[0].whole(e), call.output)
    e.book(call, "bias", lambda: relevance * (shift / total))
    e.book(call, "stabilizer", lambda: relevance * (1e-12 / total))
    return [Relevance(relevance * (signal / total)), None, None]


def softmax(e: Emitter, call: Call, out: Out) -> Out:
    """R_i = x_i (R_i - y_i sum R): the Taylor rule of a softmax inside the model (Achtibat et al. 2024, prop. 3.1)."""
    if out[0] is None:
        return [None]
    x, y = call.given(0), call.output
    relevance = expand_like(e, out[0].whole(e), y)
    axis = int(call.attrs.get("axis", -1)) % y.rank
    centred = relevance - y * e.op("ReduceSum", relevance, ints(e, [axis]), keepdims=1)
    # A mask of minus infinity takes part with weight zero.
    finite = e.op("Where", e.op("IsInf", x), e.const(0, x.dtype), x)
    result = finite * centred
    e.book(call, "bias", lambda: relevance - result)
    return [Relevance(result)]


def winner_takes_all(e: Emitter, call: Call, out: Out) -> Out:
    """The winner of a maximum takes all of the relevance; of equal ones the first (Bach et al. 2015, eq. 61)."""
    return route(e, call, out)


def uniform(e: Emitter, call: Call, out: Out) -> Out:
    """Every live input of the same shape gets an equal part."""
    if out[0] is None:
        return [None] * len(call.inputs)
    active = call.active
    whole = expand_like(e, out[0].whole(e), call.output) * (1 / len(active))
    return [Relevance(reduce_like(e, whole, call.given(i)) if not same_shape(whole, call.given(i)) else whole) if i in active else None for i in range(len(call.inputs))]
