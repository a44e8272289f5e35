"""The one reverse walk. Every method is this walk with another step and another seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from onnx_lrp.adjoints import adjoint
from onnx_lrp.adjoints.masked import filled
from onnx_lrp.adjoints.shapes import expand_like
from onnx_lrp.emit import Call, Emitter, Value


@dataclass(frozen=True)
class Relevance:
    """What the walk carries for a tensor: ``factor`` itself, or the product ``of * factor`` not multiplied out.

    A linear layer needs R / z only; carried as R = a * c that is c * (a / z), where a / z is bounded and R itself is
    never formed: cheaper, and safe where R would overflow or vanish.
    """

    factor: Value
    of: Value | None = None

    def whole(self, e: Emitter) -> Value:
        """The relevance multiplied out."""
        return self.factor if self.of is None else e.op("Mul", filled(e, self.of), self.factor, label="relevance")


# (emitter, call, relevance of each output) -> relevance of each input; None is zero
Step = Callable[[Emitter, Call, Sequence[Relevance | None]], Sequence[Relevance | None]]


def add(e: Emitter, a: Relevance | None, b: Relevance | None, like: Value) -> Relevance | None:
    """The sum of two relevances of one tensor, still factored where both are factors of the same tensor."""
    if a is None or b is None:
        return a or b
    with e.scope(like.name, doc=f"relevance of {like.name} from several readers"):
        if a.of is b.of:
            return Relevance(e.op("Add", a.factor, b.factor, label="sum"), a.of)
        left, right = (expand_like(e, r.whole(e), like) for r in (a, b))
        return Relevance(e.op("Add", left, right, label="sum"))


class Conditions:
    """What a walk heeds besides its steps: here nothing, every path counts in full."""

    def settled(self, e: Emitter, x: Value, relevance: Relevance) -> Relevance:
        """What becomes of a tensor's relevance when all its readers have added theirs."""
        return relevance

    def passes(self, output: Value, x: Value) -> bool:
        """Whether relevance may go from an output of a call to an input of it."""
        return True


_FREE = Conditions()


def reverse(
    e: Emitter,
    calls: Sequence[Call],
    seeds: Mapping[Value, Relevance],
    step_for: Callable[[Call], Step],
    wanted: Collection[Value],
    conditions: Conditions = _FREE,
) -> dict[Value, Relevance]:
    """Walk from the tensors with a seed back to the wanted ones.

    Relevance is accumulated per value, never per name or position: ``Mul(x, x)`` reaches x twice.

    Args:
        e: the emitter.
        calls: the active calls in topological order.
        seeds: relevance to begin with; one tensor may lie on the way from another.
        step_for: which step a call takes.
        wanted: values whose relevance is kept.
        conditions: what to heed besides.

    Returns:
        Relevance of the wanted values that any relevance reached.
    """
    relevance: dict[Value, Relevance] = dict(seeds)
    made = {o for call in calls for o in call.outputs}
    for call in reversed(calls):
        for o in call.outputs:
            if o is not None and o in relevance:
                relevance[o] = conditions.settled(e, o, relevance[o])
        ways = [(o, call.given(i)) for o in call.outputs if o in relevance for i in call.active]
        ways = [(o, x) for o, x in ways if conditions.passes(o, x)]
        if not ways:
            continue
        starts, ends = {o for o, _ in ways}, {x for _, x in ways}
        out = [relevance[o] if o in starts else None for o in call.outputs]
        for x, share in zip(call.inputs, step_for(call)(e, call, out), strict=False):
            if x in ends and share is not None:
                total = add(e, relevance.get(x), share, x)
                assert total is not None
                relevance[x] = total
    return {x: relevance[x] if x in made else conditions.settled(e, x, relevance[x]) for x in wanted if x in relevance}


def gradient(e: Emitter, call: Call, out: Sequence[Relevance | None]) -> Sequence[Relevance | None]:
    """The step of the gradient family: the adjoint, nothing else."""
    cotangents = adjoint(e, call, [None if r is None else r.whole(e) for r in out])
    return [None if g is None else Relevance(g) for g in cotangents]
