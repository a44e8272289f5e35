"""Relevance rules as tables, and the one interpreter that runs them.

A rule is a few branches, a branch a few terms, a term three modifiers: of input, weight and bias. Per branch

    z = sum over terms of op(x~, w~, b~);   s = R / stab(z);   R_in += sum over terms of x~ * adjoint(s).

A rule never knows operator names. It re-emits the forward operator on modified inputs and applies that operator's
adjoint, so it serves a 3-D grouped Conv, a Gemm and a broadcast Mul alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from onnx_lrp.adjoints import OPERATORS, adjoints
from onnx_lrp.adjoints.masked import filled
from onnx_lrp.adjoints.shapes import expand_like, ints, reduce_like, same_shape, zeros_like
from onnx_lrp.backward import Relevance
from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import RuleError
from onnx_lrp.modifiers import NEGATIVE, POSITIVE, SAME, ZERO, Bounds, Modifier, negative, positive


@dataclass(frozen=True)
class Term:
    """One application of the forward operator.

    Attributes:
        x: modifier of the inputs.
        w: modifier of the weight.
        b: modifier of the bias.
        factor: what the term counts in its branch.
    """

    x: Modifier = SAME
    w: Modifier = SAME
    b: Modifier = SAME
    factor: float = 1.0


@dataclass(frozen=True)
class Branch:
    """Terms with one common denominator.

    Attributes:
        terms: its terms.
        weight: what the branch counts in the rule.
        where: only where the unmodified output has this sign; the denominator has it there too.
    """

    terms: tuple[Term, ...]
    weight: float = 1.0
    where: Literal["positive", "negative"] | None = None


@dataclass(frozen=True)
class Rule:
    """A relevance rule: a step of the walk.

    Attributes:
        name: its name.
        branches: its branches.
        epsilon: the stabilizer, z + epsilon·sign(z) with sign(0) = +1.
        bounds: of the z-box rule.
        exact: no stabilizer where relevance arrives as a multiple of the output itself: then nothing is divided.
    """

    name: str
    branches: tuple[Branch, ...]
    epsilon: float = 1e-6
    bounds: Bounds | None = None
    exact: bool = False

    def __call__(self, e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
        """Relevance of the inputs."""
        relevance = out[0]
        if relevance is None:
            return [None] * len(call.inputs)
        if self.exact and relevance.of is call.output:
            return replace(self, epsilon=0.0, exact=False)(e, call, out)
        roles = roles_of(call, self.name)
        shares: list[list[tuple[Value | None, Value]]] = [[] for _ in call.inputs]
        for branch in self.branches:
            _run(e, call, roles, self, branch, relevance, shares)
        if any(branch.where for branch in self.branches):
            e.book(call, "stabilizer", lambda: _masked(e, call, relevance))
        return [_collect(e, x, share) if share else None for x, share in zip(call.inputs, shares, strict=True)]


@dataclass(frozen=True)
class Roles:
    """Which inputs of a call a rule treats as input, weight and bias."""

    inputs: tuple[int, ...]
    weight: int | None
    biases: tuple[int, ...]
    slot: int | None

    @property
    def operands(self) -> tuple[int, ...]:
        """Inputs and weight."""
        return self.inputs if self.weight is None else (*self.inputs, self.weight)

    def summand(self, index: int) -> bool:
        """True for an input that is added as it is, so that its weight is 1 (or -1) and no tensor."""
        return self.weight is None or index == self.slot


def roles_of(call: Call, rule: str = "a rule") -> Roles:
    """The roles of a linear or bilinear call with one live factor.

    Raises:
        RuleError: both factors are live, or the operator is not linear.
    """
    operator = OPERATORS[call.op]
    active = call.active
    if operator.verb == "bilinear":
        live = [i for i in operator.factors if i in active]
        if len(live) == 2:
            raise RuleError(
                f"node '{call.site}': {rule} needs a constant weight, but both factors of this {call.op} depend on the "
                "input; use share, gate or factor"
            )
        others = [i for i in operator.factors if i not in live and call.input(i) is not None]
        weight = others[0] if live and others else None
        biases = (operator.bias,) if operator.bias is not None and operator.bias not in active else ()
        return Roles(active, weight, biases, operator.bias)
    if operator.verb != "linear":
        raise RuleError(f"node '{call.site}': {rule} is for linear operators, {call.op} is {operator.verb}; use pass")
    if operator.moves:
        raise RuleError(f"node '{call.site}': {rule} is for sums, this {call.op} moves elements; use route")
    if call.attrs.get("reduction") == "mul":
        raise RuleError(f"node '{call.site}': {rule} is for sums, this {call.op} multiplies; use stop")
    floats = [i for i, v in enumerate(call.inputs) if v and v.dtype.kind == "f" and i not in operator.settings]
    live, constants = [i for i in floats if i in active], [i for i in floats if i not in active]
    return Roles(tuple(live), None, tuple(constants), None)


def _sign(call: Call, index: int) -> int:
    """The weight of a summand."""
    return -1 if call.op == "Neg" or (call.op == "Sub" and index == 1) else 1


def _input(e: Emitter, call: Call, roles: Roles, rule: Rule, term: Term, index: int) -> Value | None:
    """An input as a term wants it; a summand takes the modifier of its weight along."""
    x = term.x(e, call.given(index), rule.bounds)
    factor = term.w.of_unit(_sign(call, index)) if roles.summand(index) else 1.0
    return None if x is None or factor == 0 else x if factor == 1 else x * factor


def _bias(e: Emitter, call: Call, term: Term, index: int) -> Value | None:
    """A bias as a term wants it: what is subtracted counts with its sign turned."""
    b = call.given(index)
    if _sign(call, index) > 0:
        return term.b(e, b)
    turned = term.b(e, -b)
    return None if turned is None else -turned


def _run(
    e: Emitter,
    call: Call,
    roles: Roles,
    rule: Rule,
    branch: Branch,
    relevance: Relevance,
    shares: list[list[tuple[Value | None, Value]]],
) -> None:
    """Emit one branch and add its shares."""
    found = _forward(e, call, roles, rule, branch)
    if found is None:  # nothing contributes: of the denominator only the stabilizer is left
        if branch.where is None:
            e.book(call, "stabilizer", lambda: expand_like(e, relevance.whole(e), call.output) * branch.weight)
        return
    terms, z, held = found
    lighter = _halved(e, call, roles, rule, branch, relevance)
    if lighter is not None:
        z, held = lighter, True
    # What is only added to another layer was divided there by the sum of all, stabilizer included.
    epsilon = 0.0 if call.role == "summand" and relevance.of is z else rule.epsilon
    quotient = _quotient(e, call, relevance, z, epsilon, branch, held)
    if quotient is None:
        return
    quotient = quotient if branch.weight == 1.0 else quotient * branch.weight
    _account(e, call, roles, terms, quotient, epsilon, z, exact=relevance.of is z)
    terms = [(term, applied, live) for term, applied, live in terms if live]
    found_pieces = adjoints(e, [applied for _, applied, _ in terms], quotient, [live for *_, live in terms])
    for (term, applied, live), pieces in zip(terms, found_pieces, strict=True):
        for i in live:
            piece, x = pieces[i], applied.input(i)
            if piece is None:
                continue
            piece = piece if term.factor == 1.0 else piece * term.factor
            if term.x.kind != "one":
                shares[i].append((x, piece))
            else:  # the weight alone shares
                shares[i].append((None, -piece if roles.summand(i) and _sign(call, i) < 0 else piece))


# A term, the operator applied as it says, and the inputs that are not zero there.
Applied = tuple[Term, Call, tuple[int, ...]]


def _forward(
    e: Emitter, call: Call, roles: Roles, rule: Rule, branch: Branch
) -> tuple[list[Applied], Value, bool] | None:
    """The terms that are not zero, applied; their sum; whether that holds epsilon already. None if all are zero.

    Where the sum is known to be nonnegative the stabilizer is a plain addition, and the operator's own bias input
    takes it for free.
    """
    prepared: list[tuple[Term, dict[int, Value | None], tuple[int, ...]]] = []
    for term in branch.terms:
        changes = {i: _input(e, call, roles, rule, term, i) for i in roles.inputs}
        if roles.weight is not None:
            changes[roles.weight] = term.w(e, call.given(roles.weight))
        has_bias = False
        for i in roles.biases:
            changes[i] = None if call.input(i) is None else _bias(e, call, term, i)
            has_bias |= changes[i] is not None
        vanishes = any(changes[i] is None for i in roles.operands if not roles.summand(i))  # a product does
        live = tuple(i for i in roles.inputs if changes[i] is not None and (roles.summand(i) or not vanishes))
        if not live and not has_bias:
            continue
        for i in roles.operands:
            if changes[i] is None:
                changes[i] = call.given(i) * 0.0
        if roles.slot is None:
            for i in roles.biases:
                if changes[i] is None:
                    changes[i] = call.given(i) * 0.0  # a constant summand cannot be left out of an Add
        prepared.append((term, changes, live))
    if not prepared:
        return None
    held = False
    if all(t.factor == 1.0 for t, _, _ in prepared) and rule.epsilon > 0 and roles.slot is not None:
        held = _hold_epsilon(e, call, roles, rule.epsilon, [changes for _, changes, _ in prepared])
    applied = [(term, e.again(call, changes), live) for term, changes, live in prepared]
    z: Value | None = None
    for term, again, _ in applied:
        part = again.output
        if z is None:
            z = part if term.factor == 1.0 else part * term.factor
        elif term.factor == -1.0:
            z = z - part
        else:
            z = z + (part if term.factor == 1.0 else part * term.factor)
    assert z is not None
    return applied, z, held


# z⁺ where the input may have either sign.
_BOTH_SIGNS = (Term(POSITIVE, POSITIVE, POSITIVE), Term(NEGATIVE, NEGATIVE, ZERO))


def _halved(e: Emitter, call: Call, roles: Roles, rule: Rule, branch: Branch, relevance: Relevance) -> Value | None:
    """The denominator of z⁺ for an input of either sign, stabilizer included, by one application instead of two.

    Since x⁺w⁺ + x⁻w⁻ = (xw + |x||w|) / 2 and b⁺ = (b + |b|) / 2, it is half of y + op(|x|, |w|, |b|). Where relevance
    is a multiple of a = max(y, 0), nothing flows where y is negative, so a stands for y: a sum of nonnegative numbers,
    in which nothing cancels. None where that does not hold; nor behind a Clip, for there y would have to be read, which
    takes the Clip out of the runtime's fused convolution and costs what is gained.
    """
    if branch.terms != _BOTH_SIGNS or branch.where or rule.epsilon <= 0 or len(roles.inputs) != 1:
        return None
    (i,), weight, slot = roles.inputs, roles.weight, roles.slot
    if rectifier(e, relevance.of, call.output) != "Relu" or call.given(i).nonnegative or weight is None or slot is None:
        return None
    maker = e.producers.get(call.output.name)
    if maker is None or maker.op != call.op:
        return None  # y was not made with these weights, which are folded or cast: it is rounded otherwise
    changes: dict[int, Value | None] = {i: e.op("Abs", call.given(i)), weight: e.op("Abs", call.given(weight)) * 0.5}
    bias = call.input(slot)
    changes[slot] = None if bias is None else e.op("Abs", bias) * 0.5
    if not _hold_epsilon(e, call, roles, rule.epsilon, [changes]):
        return None
    assert relevance.of is not None
    return e.again(call, changes).output + relevance.of * 0.5


def _hold_epsilon(
    e: Emitter, call: Call, roles: Roles, epsilon: float, prepared: list[dict[int, Value | None]]
) -> bool:
    """Add epsilon to the bias of the first term if every product and bias is known to be nonnegative."""
    first = prepared[0]
    for changes in prepared:
        factors = [v for i in roles.operands if (v := changes[i]) is not None]
        same = all(v.nonnegative for v in factors) or (len(factors) == 2 and all(v.nonpositive for v in factors))
        biases = [changes[i] for i in roles.biases]
        if not same or any(b is not None and not b.nonnegative for b in biases):
            return False
    slot = roles.slot
    assert slot is not None
    if slot in roles.inputs:
        return False
    if all(changes.get(i, call.input(i)) is call.input(i) for changes in prepared for i in changes):
        return False  # the forward output itself is z: no second pass for the sake of epsilon
    bias = first.get(slot)
    if bias is None:
        shape = OPERATORS[call.op].bias_shape
        lengths = shape(call) if shape else ()
        if lengths is None or not all(isinstance(n, int) for n in lengths):
            return False
        bias = e.const(np.array(epsilon), call.output.dtype)
        first[slot] = e.op("Expand", bias, ints(e, lengths)) if lengths else bias
    else:
        first[slot] = bias + epsilon
    return True


def rectifier(e: Emitter, of: Value | None, z: Value) -> str | None:
    """Relu or Clip, if ``of`` is that of ``z`` and therefore zero wherever ``z`` is not positive; else None."""
    maker = e.producers.get(of.name) if of is not None else None
    if maker is not None and maker.op == "Cast":  # the float32 copy of a float16 tensor
        maker = e.producers.get(maker.given(0).name)
    if maker is None or of is None or maker.op not in ("Relu", "Clip") or not of.nonnegative or maker.input(0) is not z:
        return None
    low = maker.input(1)
    if low is not None and not (low.nonnegative and low.nonpositive):
        return None  # a Clip whose low end is not zero
    return maker.op


def _quotient(
    e: Emitter, call: Call, relevance: Relevance, z: Value, epsilon: float, branch: Branch, held: bool
) -> Value | None:
    """R / stab(z), masked where the branch says so; None where that is known to be zero.

    The sign of the stabilizer is left out wherever it is known, or wherever nothing flows on the other side.
    """
    c, of, y = relevance.factor, relevance.of, call.output
    rectified = rectifier(e, of, y)
    if branch.where == "negative" and rectified:
        return None
    if held:
        stable = z
    elif branch.where is not None:
        # Where the mask lets relevance through, z has the sign of the unmodified output; elsewhere it must not vanish.
        stable = (
            (positive(e, z) or z * 0.0) + epsilon
            if branch.where == "positive"
            else (negative(e, z) or z * 0.0) - epsilon
        )
    elif of is z:
        if epsilon == 0:
            return expand_like(e, c, z)
        size = z if z.nonnegative else e.op("Abs", z)
        return e.op("Mul", c, e.op("Div", size, size + epsilon, label="quotient"), label="signal")  # of z / stab(z)
    elif rectified and z is y and of is not None:
        if epsilon == 0 and rectified == "Relu":
            return c * e.op("Sign", of)
        # a / (max(z, 0) + eps): where z is not positive a is zero, and nothing flows
        stable = stabilized(e, of if rectified == "Relu" else e.op("Relu", z), epsilon)
    else:
        stable = stabilized(e, z, epsilon)
    q = (
        e.op("Div", c, stable, label="signal")
        if of is None
        else e.op("Mul", c, e.op("Div", of, stable, label="quotient"), label="signal")
    )
    if branch.where is not None and not rectified:
        zero = e.const(0, y.dtype)
        mask = e.op("Greater", y, zero) if branch.where == "positive" else e.op("Less", y, zero)
        q = e.op("Where", mask, q, zero)
    return q


def stabilized(e: Emitter, z: Value, epsilon: float) -> Value:
    """Z + epsilon·sign(z) with sign(0) = +1; for epsilon = 0, z with its zeros replaced by ones."""
    if epsilon == 0:
        zero = e.const(0, z.dtype)
        return e.op("Where", e.op("Equal", z, zero), e.const(1, z.dtype), z)
    if z.nonnegative:
        return z + epsilon
    if z.nonpositive and not z.nonnegative:
        return e.op("Where", e.op("Less", z, e.const(0, z.dtype)), z - epsilon, e.const(epsilon, z.dtype))
    return z + e.op(
        "Where", e.op("Less", z, e.const(0, z.dtype)), e.const(-epsilon, z.dtype), e.const(epsilon, z.dtype)
    )


def _account(
    e: Emitter, call: Call, roles: Roles, terms: list[Applied], s: Value, epsilon: float, z: Value, *, exact: bool
) -> None:
    """Book what biases and the stabilizer take, each from its own formula: sum of b~·s and of epsilon·sign(z)·s."""

    def bias() -> Value | None:
        total: Value | None = None
        for term, applied, _ in terms:
            for i in roles.biases:
                original = None if call.input(i) is None else _bias(e, call, term, i)  # no epsilon rides on this one
                if original is None:
                    continue
                signal = s if term.factor == 1.0 else s * term.factor
                pulled = adjoint_of_bias(e, applied, signal, i, original)
                total = pulled if total is None else total + pulled
            if roles.inputs == (roles.slot,):  # a product of constants, to which something live is added
                pulled = s * (applied.output - applied.given(roles.inputs[0]))
                total = pulled if total is None else total + pulled
        return total

    def stabilizer() -> Value | None:
        if epsilon == 0:  # a sum that is zero was divided by one
            return None if exact else e.op("Where", e.op("Equal", z, e.const(0, z.dtype)), s, e.const(0, z.dtype))
        if z.nonnegative:
            return s * epsilon
        return s * e.op(
            "Where", e.op("Less", z, e.const(0, z.dtype)), e.const(-epsilon, z.dtype), e.const(epsilon, z.dtype)
        )

    e.book(call, "bias", bias)
    e.book(call, "stabilizer", stabilizer)


def _masked(e: Emitter, call: Call, relevance: Relevance) -> Value | None:
    """What sits on outputs that are exactly zero, which neither branch of a rule with a mask lets through."""
    y = call.output
    if relevance.of is y or rectifier(e, relevance.of, y):
        return None
    whole = expand_like(e, relevance.whole(e), y)
    return e.op("Where", e.op("Equal", y, e.const(0, y.dtype)), whole, e.const(0, y.dtype))


def adjoint_of_bias(e: Emitter, call: Call, s: Value, index: int, bias: Value) -> Value:
    """Bias ⊙ s in the shape of the output, per element: what the additive input takes there."""
    s = expand_like(e, s, call.output)
    bias = filled(e, bias, masked=call.output.facts.masked)
    if call.op in ("ScatterElements", "ScatterND"):
        # What a constant brings is what is there when all else is zero.
        alone: dict[int, Value | None] = {i: zeros_like(e, call.given(i)) for i in (0, 2)}
        return s * e.again(call, alone | {index: bias}).output
    if OPERATORS[call.op].verb == "linear":
        return s * _signed_input(e, call, index, bias)
    if call.op in ("Conv", "ConvTranspose"):
        bias = e.op("Reshape", bias, ints(e, [-1] + [1] * (call.output.rank - 2)))
    return s * bias


def _signed_input(e: Emitter, call: Call, index: int, value: Value) -> Value:
    return -value if _sign(call, index) < 0 else value / len(call.inputs) if call.op == "Mean" else value


def _collect(e: Emitter, x: Value | None, shares: list[tuple[Value | None, Value]]) -> Relevance:
    """Sum an input's shares: still factored if all are factors of the same tensor."""
    assert x is not None
    groups: dict[Value | None, Value] = {}
    for of, piece in shares:
        groups[of] = piece if of not in groups else groups[of] + piece
    if len(groups) == 1:
        of, factor = next(iter(groups.items()))
        return Relevance(factor, of)
    total: Value | None = None
    for of, factor in groups.items():
        part = factor if of is None else of * factor
        part = reduce_like(e, part, x) if not same_shape(part, x) else part
        total = part if total is None else total + part
    assert total is not None
    return Relevance(total)
