"""The model once more on other inputs: the calls between some tensors and the explained one, emitted again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_lrp.emit import Call, Emitter, Value
from onnx_lrp.errors import ModelError
from onnx_lrp.facts import Dim, Shape
from onnx_lrp.inference import merge


@dataclass(frozen=True)
class Replay:
    """Counterparts of the model's tensors and calls.

    Attributes:
        values: what stands for a tensor of the model; a tensor that depends on nothing new stands for itself.
        calls: the calls that were emitted again, in order, each with the one it repeats.
    """

    values: Mapping[Value, Value]
    calls: Sequence[tuple[Call, Call]]

    def __getitem__(self, value: Value) -> Value:
        """What stands for a tensor of the model."""
        return self.values.get(value, value)

    def once(self, calls: Collection[Call]) -> list[Call]:
        """What repeats some calls of the model, in order; equal calls have become one."""
        chosen = set(calls)
        return list({again.outputs: again for again, before in self.calls if before in chosen}.values())


def leading(calls: Sequence[Call], begin: Sequence[Value], end: Sequence[Value]) -> list[Call]:
    """The calls through which anything flows from some tensors to others, shapes and conditions among it, in order.

    Args:
        calls: all calls in topological order.
        begin: where it begins; what makes these is left out.
        end: where it ends.
    """
    given = set(begin)
    reached = set(begin)
    forward = []
    for call in calls:
        made = {o for o in call.outputs if o is not None}
        if not made <= given and not reached.isdisjoint(x for x in call.inputs if x is not None):
            reached |= made
            forward.append(call)
    needed = set(end)
    chain = []
    for call in reversed(forward):
        if any(o in needed for o in call.outputs):
            chain.append(call)
            needed.update(x for x in call.inputs if x is not None and x not in given)
    return chain[::-1]


def replay(
    e: Emitter,
    calls: Sequence[Call],
    changes: Mapping[Value, Value],
    length: Callable[[Dim], Dim] = lambda dim: dim,
) -> Replay:
    """Emit calls again on other tensors.

    Args:
        e: the emitter.
        calls: those to repeat, in topological order.
        changes: the tensors they are to read instead of others.
        length: what the length of an axis is called now (axes may have grown with the batch).

    Raises:
        ModelError: a call of a foreign domain, which cannot be repeated.
    """
    values = dict(changes)
    known: set[Value] = set()
    pairs = []
    for call in calls:
        new = {i: values[x] for i, x in enumerate(call.inputs) if x is not None and x in values}
        if not new:
            continue
        if call.domain:
            raise ModelError(
                f"node '{call.site}' ({call.domain}.{call.op}) cannot be computed once more on other inputs, which "
                "this method needs; use the model before the optimisation that made it, or choose another method"
            )
        with e.scope(call.site, doc=f"{call.op} {call.site} on other inputs"):
            again = e.again(call, new)
        pairs.append((again, call))
        for before, after in zip(call.outputs, again.outputs, strict=True):
            if before is None or after is None or before in changes:
                continue
            shape = merge(after.facts.shape, _renamed(before.facts.shape, length))
            active = before.facts.active or (after in known and after.facts.active)  # equal tensors have become one
            after.facts = replace(after.facts, shape=shape, active=active, masked=before.facts.masked)
            values[before] = after
            known.add(after)
    return Replay(values, pairs)


def _renamed(shape: Shape | None, length: Callable[[Dim], Dim]) -> Shape | None:
    return None if shape is None else tuple(d if isinstance(d, int) else length(d) for d in shape)
