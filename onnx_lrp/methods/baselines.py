"""Where a path begins: numbers, or graph inputs."""

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

One = float | Literal["input"]
Baseline = One | Mapping[str, One]


@dataclass(frozen=True)
class Baselines:
    """The baselines of some tensors: a number for all, "input" for graph inputs, or one of these per tensor name.

    The graph input is called ``baseline`` where one tensor has one, else ``baseline/<tensor>``; it is broadcast to the
    tensor's shape, and is zero where nothing is fed.
    """

    given: Baseline
    names: Mapping[Value, str]

    @staticmethod
    def of(v: View, given: Baseline, names: Mapping[Value, str], method: str) -> Baselines:
        """The baselines of some tensors by name.

        Raises:
            InputError: a name that is none of theirs, or what is neither number nor "input".
        """
        items = given if isinstance(given, Mapping) else {"": given}
        unknown = [n for n in items if n and n not in names.values()]
        if unknown:
            raise InputError(
                f"{method} has a baseline for '{unknown[0]}', which is not moved; moved: {', '.join(names.values())}"
            )
        for one in items.values():
            number = isinstance(one, int | float) and not isinstance(one, bool) and np.isfinite(one)
            if not number and one != "input":
                raise InputError(
                    f'a baseline is a number or "input" (feed arrays to the graph input then), not {one!r}'
                )
        return Baselines(given, names)

    def __call__(self, e: Emitter, x: Value) -> Value:
        """The baseline of a tensor, in its shape."""
        name = self.names[x]
        one = self.given.get(name, 0.0) if isinstance(self.given, Mapping) else self.given
        if one != "input":
            return expand_like(e, e.const(np.full((1,) * x.rank, one), x.dtype), x)
        fed = self.given.values() if isinstance(self.given, Mapping) else [self.given] * len(self.names)
        alone = sum(other == "input" for other in fed) == 1
        label = "baseline" if alone else f"baseline/{name}"
        fed_one = e.parameter(label, np.zeros((1,) * x.rank, x.dtype))
        return e.op("Expand", fed_one, shape_of(e, x), shape=x.shape)


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
