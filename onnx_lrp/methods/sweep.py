"""The walk on many versions of the inputs, inside one graph: a Loop that takes a few versions a turn and adds up.

Every turn computes the model on its versions and walks back through them. Where the model's batch is free, the versions
of a turn stand in one batch; where it is fixed, a turn has one version. So memory is set by the turn, not by the number
of versions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lrp.adjoints.shapes import concat_ints, dim_of, expand_like, ints
from onnx_lrp.backward import Relevance, Step, reverse
from onnx_lrp.emit import Array, Call, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.facts import Dim, Facts, Sign
from onnx_lrp.replay import leading, replay
from onnx_lrp.subgraphs import is_control
from onnx_lrp.view import View

_INT = np.dtype(np.int64)

# (emitter, input, numbers of the versions (k,)) -> the versions (k, *shape of the input)
Versions = Callable[[Emitter, Value, Value], Value]


@dataclass(frozen=True)
class Sweep:
    """A way to run a walk: on many versions of some tensors, which move together.

    Attributes:
        view: the model.
        explained: the explained tensor.
        moved: the tensors of which there are versions; none depends on another.
        versions: makes them.
        weights: what each version counts in the sum.
        chunk: how many versions a turn takes, where the model's batch is free.
    """

    view: View
    explained: Value
    moved: Sequence[Value]
    versions: Versions
    weights: Array
    chunk: int

    def __call__(
        self,
        e: Emitter,
        calls: Sequence[Call],
        seeds: Mapping[Value, Relevance],
        step_for: Callable[[Call], Step],
        wanted: Collection[Value],
    ) -> dict[Value, Relevance]:
        """The weighted sum over the versions of what the walk finds; see :func:`onnx_lrp.backward.reverse`."""
        chain = leading(self.view.calls, self.moved, [self.explained])
        batch = _common_batch(self.view, chain, self.moved, [*seeds, *wanted])
        chunk = 1 if batch is None else even_chunk(len(self.weights), self.chunk)
        turns = -(-len(self.weights) // chunk)
        start = {y: r.whole(e) for y, r in seeds.items()}
        zeros = [_zeros(e, x) for x in wanted]
        with e.body("versions") as body:
            turn = body.input("turn", Facts(_INT, ()))
            again = body.input("again", Facts(np.dtype(bool), ()))
            sums = [body.input("sum", Facts(x.dtype, x.facts.shape)) for x in wanted]
            first = e.op("Reshape", turn * chunk, ints(e, [1]))
            numbers = e.op("Slice", e.const(np.arange(len(self.weights))), first, first + chunk, ints(e, [0]))
            fold = _Fold(batch, self.view)
            changes = {x: fold.into_batch(e, self.versions(e, x, numbers), x) for x in self.moved}
            changes |= {x: fold.repeated(e, x, numbers) for x in fold.besides(chain, changes)}
            for x in self.moved:
                changes[x].facts = _live(changes[x].facts)
            copy = replay(e, chain, changes, fold.length)
            active, originals = copy.once(calls), dict(copy.calls)
            begin = {copy[y]: Relevance(fold.repeated(e, r, numbers)) for y, r in start.items()}
            found = reverse(e, active, begin, lambda call: step_for(originals[call]), [copy[x] for x in wanted])
            body.output(again)
            for x, total in zip(wanted, sums, strict=True):
                body.output(self._added(e, total, found.get(copy[x]), copy[x], x, numbers, fold))
        facts = [Facts(x.dtype, x.facts.shape) for x in wanted]
        trips = e.const(np.array(turns, _INT))
        results = e.control("Loop", trips, e.const(np.array(True)), *zeros, bodies={"body": body}, facts=facts)
        return {x: Relevance(result) for x, result in zip(wanted, results, strict=True)}

    def _added(
        self,
        e: Emitter,
        total: Value,
        found: Relevance | None,
        twin: Value,
        x: Value,
        numbers: Value,
        fold: _Fold,
    ) -> Value:
        """A sum so far, and what one turn found."""
        if found is None:
            return total
        apart = fold.out_of_batch(e, expand_like(e, found.whole(e), twin), x, numbers)
        counts = e.op("Reshape", e.op("Gather", e.const(self.weights), numbers), ints(e, [-1] + [1] * x.rank))
        return e.op("Add", total, e.op("ReduceSum", apart * counts, ints(e, [0]), keepdims=0), shape=x.shape)


def even_chunk(count: int, most: int) -> int:
    """How many versions a turn takes: at most so many, and as evenly over the turns as can be."""
    turns = -(-count // most)
    return -(-count // turns)


def independent(v: View, tensors: Sequence[Value], method: str) -> None:
    """See that none of the tensors depends on another.

    Raises:
        InputError: one does, so that both cannot be moved.
    """
    for x in tensors:
        for y in tensors:
            if x is not y and leading(v.calls, [x], [y]):
                raise InputError(
                    f"{method} moves what it reports on, and '{v.name_of(y)}' depends on '{v.name_of(x)}'; "
                    "name one of them, with inputs="
                )


@dataclass(frozen=True)
class _Fold:
    """Versions and samples in one batch axis; or one version at a time, where ``batch`` is None.

    Attributes:
        batch: what the length of the batch axis is called.
        view: the model.
    """

    batch: str | None
    view: View

    def length(self, dim: Dim) -> Dim:
        """What the length of an axis is called in the copy: those that the model makes may grow with the batch."""
        if self.batch is None or dim is None or dim in self._fixed:
            return dim
        return f"{dim}/versions"

    @property
    def _fixed(self) -> set[Dim]:
        """Names of axes of the inputs that are no batch."""
        return {d for x in self.view.inputs.values() for d in x.shape} - {self.batch}

    def into_batch(self, e: Emitter, versions: Value, like: Value) -> Value:
        """(k, N, …) as (k·N, …); (1, *shape) as the shape."""
        if self.batch is None:
            return e.op("Reshape", versions, _shape(e, like), shape=like.facts.shape, allowzero=1)
        rest = [dim_of(e, like, i) for i in range(1, like.rank)]
        length = dim_of(e, like, 0) * dim_of(e, versions, 0)
        shape = (self.length(self.batch), *like.shape[1:])
        return e.op("Reshape", versions, concat_ints(e, [length, *rest]), shape=shape, allowzero=1)

    def repeated(self, e: Emitter, x: Value, numbers: Value) -> Value:
        """(N, …) once for each version."""
        if self.batch is None:
            return x
        count = e.op("Shape", numbers)
        rest = [dim_of(e, x, i) for i in range(x.rank)]
        shape = (None, *x.shape)
        return self.into_batch(e, e.op("Expand", x, concat_ints(e, [count, *rest]), shape=shape), x)

    def out_of_batch(self, e: Emitter, x: Value, like: Value, numbers: Value) -> Value:
        """(k·N, …) as (k, N, …); the shape as (1, *shape)."""
        lengths = [e.op("Shape", numbers), *(dim_of(e, like, i) for i in range(like.rank))]
        return e.op("Reshape", x, concat_ints(e, lengths), shape=(None, *like.shape), allowzero=1)

    def besides(self, chain: Sequence[Call], changes: Mapping[Value, Value]) -> list[Value]:
        """Tensors from outside that have a row per sample, and so need one per version."""
        if self.batch is None:
            return []
        return [x for x in _outside(chain, changes) if x.shape and x.shape[0] == self.batch]


def _outside(chain: Sequence[Call], moved: Collection[Value]) -> list[Value]:
    """What the calls read besides constants, the moved tensors and one another's outputs."""
    made = {o for call in chain for o in call.outputs}
    read = {x: None for call in chain for x in call.inputs if x is not None and not x.facts.const}
    return [x for x in read if x not in made and x not in moved]


def _common_batch(v: View, chain: Sequence[Call], moved: Sequence[Value], others: Sequence[Value]) -> str | None:
    """The name of the free batch axis that moved tensors, the explained one, and all that is read share; else None.

    Several versions fit in one batch only where nothing depends on how long it is but through these tensors.
    """
    if any(is_control(call) and call.role != "recurrent" for call in chain):
        return None  # which way it goes may depend on every version in the batch
    names = {x.shape[0] if x.shape else None for x in (*moved, *others)}
    name = names.pop()
    if names or not isinstance(name, str):
        return None
    for x in _outside(chain, moved):
        if x.facts.shape is None or name in x.shape[1:]:
            return None
        if any(not isinstance(d, int) for d in x.shape) and x.shape[0] != name:
            return None  # an axis of unknown relation to the batch
        if x.dtype.kind == "i" and x not in v.inputs.values():
            return None  # perhaps a shape, worked out from an input that is not moved
    return name


def _shape(e: Emitter, like: Value) -> Value:
    return concat_ints(e, [dim_of(e, like, i) for i in range(like.rank)]) if like.rank else ints(e, [])


def _zeros(e: Emitter, x: Value) -> Value:
    return e.op("ConstantOfShape", _shape(e, x), shape=x.shape, value=np.array([0], x.dtype))


def _live(facts: Facts) -> Facts:
    return Facts(facts.dtype, facts.shape, False, Sign.ANY, True)
