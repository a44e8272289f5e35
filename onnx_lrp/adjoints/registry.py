"""The registry: five verbs, each stating an operator's algebra, and the adjoint that follows from it.

linear      jointly linear in all active inputs         Add, Concat, Reshape, AveragePool
bilinear    linear in each factor, perhaps a bias       Mul, MatMul, Gemm, Conv
pointwise   y_i = f(x_i)                                Relu, Tanh, Clip
nonlinear   anything else                               Softmax, MaxPool, Div
barrier     no derivative, by design                    Shape, ArgMax, Equal
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from onnx_lrp.adjoints.shapes import expand_like, reduce_like, same_shape
from onnx_lrp.emit import Call, Emitter, Forward, Value

Verb = Literal["linear", "bilinear", "pointwise", "nonlinear", "barrier"]
Cotangents = Sequence[Value | None]
# (emitter, call, cotangent of each output, indices of the inputs wanted) -> cotangent of each input
Adjoint = Callable[[Emitter, Call, Cotangents, Collection[int]], Cotangents]
# (emitter, calls, their common cotangent) -> cotangent of each call's first factor
Joint = Callable[[Emitter, Sequence[Call], Value], Sequence[Value]]


@dataclass(frozen=True)
class Operator:
    """What the registry knows of an operator.

    Attributes:
        name: operator type.
        verb: its algebra.
        adjoint: vector-Jacobian product; None for a barrier.
        moves: every output element is a copy of one input element, or a constant (so relevance moves along).
        elementwise: the adjoint accepts a cotangent that still has to be broadcast to the output's shape.
        broadcasts: inputs may be smaller than the output; the adjoint's result is summed down to the input's shape.
        factors: the two factors of a bilinear operator.
        bias: index of its additive input; None where it has none.
        bias_shape: shape of a bias where the call has none; None where a scalar will do.
        settings: indices of float inputs that say how it works, and are no part of the sum.
        forward: how to emit it, if it is a view that ONNX has no operator for.
        joint: adjoints of several calls that differ in their second factor alone, for one cotangent, in one product;
            None where that is no gain.
    """

    name: str
    verb: Verb
    adjoint: Adjoint | None = None
    moves: bool = False
    elementwise: bool = False
    broadcasts: bool = False
    factors: tuple[int, int] = (0, 1)
    bias: int | None = None
    bias_shape: Callable[[Call], tuple[Any, ...] | None] | None = None
    settings: tuple[int, ...] = ()
    forward: Forward | None = None
    joint: Joint | None = None


OPERATORS: dict[str, Operator] = {}


def enter(operator: Operator) -> None:
    """Add an operator; the verbs below do so."""
    if operator.name in OPERATORS:
        raise ValueError(f"operator {operator.name} is registered twice")
    OPERATORS[operator.name] = operator


def linear(
    *names: str,
    moves: bool = False,
    elementwise: bool = False,
    broadcasts: bool = False,
    settings: tuple[int, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an operator that is linear in all active inputs: ``f(e, call, d) -> cotangent(s)`` for one output."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        def adjoint(e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int]) -> Cotangents:
            result = f(e, call, cotangents[0] if len(cotangents) == 1 else cotangents)
            return result if isinstance(result, list | tuple) else (result,)

        for name in names:
            enter(Operator(name, "linear", adjoint, moves, elementwise, broadcasts, settings=settings))
        return f

    return register


def bilinear(
    name: str,
    first: Callable[[Emitter, Call, Value], Value],
    second: Callable[[Emitter, Call, Value], Value],
    *,
    bias: int | None = None,
    bias_adjoint: Callable[[Emitter, Call, Value], Value] | None = None,
    bias_shape: Callable[[Call], tuple[Any, ...] | None] | None = None,
    broadcasts: bool = False,
    elementwise: bool = False,
    forward: Forward | None = None,
    joint: Joint | None = None,
) -> None:
    """Register an operator that is linear in each of its first two inputs: one adjoint per factor, one for the bias."""

    def adjoint(e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int]) -> Cotangents:
        d = cotangents[0]
        assert d is not None
        pieces = [first, second, bias_adjoint or (lambda e, call, d: d)]
        return [pieces[i](e, call, d) if i in wanted else None for i in range(len(call.inputs))]

    enter(
        Operator(
            name,
            "bilinear",
            adjoint,
            broadcasts=broadcasts,
            elementwise=elementwise,
            bias=bias,
            bias_shape=bias_shape,
            forward=forward,
            joint=joint,
        )
    )


def pointwise(name: str, *derivatives: Callable[[Emitter, Call, Value, Value], Value | float]) -> None:
    """Register y_i = f(x_i) by its derivative ``f'(e, call, x, y)``.

    Parameters of f are in attrs or in further inputs, each of which has a derivative of its own.
    """

    def adjoint(e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int]) -> Cotangents:
        d, x, y = cotangents[0], call.given(0), call.output
        assert d is not None
        return [d * derivative(e, call, x, y) if i in wanted else None for i, derivative in enumerate(derivatives)]

    enter(Operator(name, "pointwise", adjoint, elementwise=True, broadcasts=len(derivatives) > 1))


def nonlinear(
    *names: str, moves: bool = False, broadcasts: bool = False, every: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register any other differentiable operator: ``f(e, call, d) -> cotangent(s)``.

    With ``every``, d is the cotangents of all outputs, None for zero; without, that of the first output.
    """

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        def adjoint(e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int]) -> Cotangents:
            result = f(e, call, cotangents if every else cotangents[0])
            return result if isinstance(result, list | tuple) else (result,)

        for name in names:
            enter(Operator(name, "nonlinear", adjoint, moves=moves, broadcasts=broadcasts))
        return f

    return register


def barrier(*names: str) -> None:
    """Register operators that have no derivative by design: influence stops there."""
    for name in names:
        enter(Operator(name, "barrier"))


def adjoint(
    e: Emitter, call: Call, cotangents: Cotangents, wanted: Collection[int] | None = None
) -> list[Value | None]:
    """Vector-Jacobian product of one call.

    Args:
        e: the emitter.
        call: the operator application.
        cotangents: one per output, None for zero.
        wanted: indices of the inputs whose cotangent is needed; default: the active ones.

    Returns:
        One cotangent per input, in the input's shape (axes may be left at length 1 where the cotangent is
        constant along them); None where not wanted or zero.
    """
    operator = OPERATORS[call.op]
    assert operator.adjoint is not None
    indices = call.active if wanted is None else wanted
    # A cotangent may stay small where it only multiplies; before anything is summed it must have its full shape.
    if not (operator.elementwise and all(same_shape(call.given(i), call.output) for i in indices)):
        cotangents = [
            d if d is None or o is None else expand_like(e, d, o) for d, o in zip(cotangents, call.outputs, strict=True)
        ]
    results = operator.adjoint(e, call, cotangents, indices)
    shaped: list[Value | None] = [None] * len(call.inputs)
    for i in indices:
        result, target = results[i] if i < len(results) else None, call.given(i)
        if result is None:
            continue
        if operator.broadcasts:
            result = reduce_like(e, result, target)
        elif not operator.elementwise and result.rank == target.rank and not same_shape(result, target):
            # An adjoint has its input's shape: say so where inference lost the symbols.
            keep = [g if g == 1 and t != 1 else t for g, t in zip(result.shape, target.shape, strict=True)]
            result.facts = replace(result.facts, shape=tuple(keep))
        shaped[i] = result
    return shaped


def adjoints(
    e: Emitter, calls: Sequence[Call], cotangent: Value, wanted: Sequence[Collection[int]]
) -> list[list[Value | None]]:
    """Vector-Jacobian products of calls that have a cotangent in common: in one product where that is a gain.

    Args:
        e: the emitter.
        calls: applications of one operator, which differ in their inputs only.
        cotangent: of the output of each.
        wanted: for each call, indices of the inputs whose cotangent is needed.

    Returns:
        For each call what :func:`adjoint` returns.
    """
    joint = OPERATORS[calls[0].op].joint if len(calls) > 1 else None
    if joint is None or any(tuple(indices) != (0,) for indices in wanted):
        return [adjoint(e, call, [cotangent], indices) for call, indices in zip(calls, wanted, strict=True)]
    pieces = joint(e, calls, expand_like(e, cotangent, calls[0].output))
    return [[piece, *[None] * (len(call.inputs) - 1)] for call, piece in zip(calls, pieces, strict=True)]
