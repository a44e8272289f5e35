"""Where a path begins: numbers, graph inputs, or other tokens."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_lrp.adjoints.shapes import expand_like, shape_of, sum_per_sample
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.target import Seed
from onnx_lrp.view import View

One = float | Literal["input", "tokens"]
Baseline = One | Mapping[str, One]

_FED = ("input", "tokens")


@dataclass(frozen=True)
class Baselines:
    """The baselines of some tensors: a number for all, a word for graph inputs, or one of these per tensor name.

    "input" is a graph input of the baseline's own elements: it is broadcast to the tensor's shape, and is zero where
    nothing is fed. "tokens", for the rows that token ids pick from a table, is one of ids (1, 1), (1, T) or (N, T),
    whose rows are the baseline; token 0 where nothing is fed. Either is called ``baseline`` where one tensor has one,
    else ``baseline/<tensor>``.

    Attributes:
        given: what was asked for.
        names: of the tensors.
        tables: of each tensor of rows, the table that they are picked from.
    """

    given: Baseline
    names: Mapping[Value, str]
    tables: Mapping[Value, Value]

    @staticmethod
    def of(v: View, given: Baseline, names: Mapping[Value, str], method: str) -> Baselines:
        """The baselines of some tensors by name.

        Raises:
            InputError: a name that is none of theirs, what is neither number nor a known word, or "tokens" for what
                are no rows of tokens.
        """
        items = given if isinstance(given, Mapping) else {"": given}
        unknown = [n for n in items if n and n not in names.values()]
        if unknown:
            raise InputError(
                f"{method} has a baseline for '{unknown[0]}', which is not moved; moved: {', '.join(names.values())}"
            )
        for one in items.values():
            number = isinstance(one, int | float) and not isinstance(one, bool) and np.isfinite(one)
            if not number and not (isinstance(one, str) and one in _FED):
                raise InputError(
                    'a baseline is a number or "input" (feed arrays to the graph input then), for token ids also '
                    f'"tokens" (feed ids), not {one!r}'
                )
        made = v.producers()
        tables = {x: made[x].given(0) for x in names if x in made and made[x].op == "Gather"}
        found = Baselines(given, names, tables)
        for x, name in names.items():
            if found.one(x) == "tokens" and x not in tables:
                why = f"for the embeddings of token ids, which '{name}' is not"
                raise InputError(f'baseline "tokens" is {why}; give a number or "input"')
        return found

    def one(self, x: Value) -> One:
        """What was asked for, for a tensor."""
        return self.given.get(self.names[x], 0.0) if isinstance(self.given, Mapping) else self.given

    def __call__(self, e: Emitter, x: Value) -> Value:
        """The baseline of a tensor, in its shape."""
        one = self.one(x)
        if one not in _FED:
            return expand_like(e, e.const(np.full((1,) * x.rank, one), x.dtype), x)
        fed = {self.names[other] for other in self.names if self.one(other) in _FED}
        label = "baseline" if len(fed) == 1 else f"baseline/{self.names[x]}"
        if one == "tokens":
            table = self.tables[x]
            ids = e.parameter(label, np.zeros((1,) * (x.rank - 1), np.int64))
            start = e.op("Gather", table, ids, axis=0)
        else:
            start = e.parameter(label, np.zeros((1,) * x.rank, x.dtype))
        return e.op("Expand", start, shape_of(e, x), shape=x.shape)


def completeness_delta(e: Emitter, parts: Sequence[Value], z: Value, z0: Value, seed: Seed) -> Value:
    """How far contributions are from what they are to sum to, per sample (N,).

    Args:
        e: the emitter.
        parts: contributions of all inputs.
        z: the explained tensor.
        z0: the same at the baseline.
        seed: what the walk began with: its weights make of z the score that is explained.
    """

    def per_sample(x: Value) -> Value:
        # A model without an axis of samples has one.
        found = sum_per_sample(e, x, 1 if seed.single or z.rank == 0 else z.shape[0])
        if found is None:
            raise InputError(f"no axis of '{x.name}' {x.shape} has a row per sample, so contributions cannot be summed")
        return found

    total = functools.reduce(operator.add, map(per_sample, parts))
    return total - per_sample((z - z0) * seed.relevance.whole(e))
