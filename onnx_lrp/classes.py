"""Several classes of every sample in one run: the walk once per class, all that depends on the inputs alone once.

A Scan runs over the classes. Its body is filled with the choice of the class, the walk and the report; the emitter puts
what depends on no class before the Scan: the forward pass, the passes and quotients of rules. The emitted Scan is then
lifted: dense layers after the last convolution become one product for all classes. What is left holds the relevance of
one class at a time, so memory does not grow with their number but by the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from onnx_lrp.adjoints.shapes import dim_of, ints, merge_axes
from onnx_lrp.emit import Body, Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.facts import Dim, Facts
from onnx_lrp.lifting import Track, scan
from onnx_lrp.view import View

ROWS = "rows"  # what the length N·K of the outputs is called


class OneClass:
    """One class per sample: everything lies in the model's own graph."""

    def fed(self, parameter: Value) -> Value:
        """What the walk sees of a graph input that has a row for every row of relevance, or one for all."""
        return parameter

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The block in which the class is chosen, walked from and reported on."""
        yield

    def stacked(self, found: Mapping[str, Value], axes: Mapping[str, int]) -> dict[str, Value]:
        """What was found in the block for all classes: N·K rows on the axis of samples, which is given."""
        return dict(found)


class ManyClasses(OneClass):
    """K classes of each of N samples, those of the first sample first: a Scan over them.

    K is told by the longest graph input that has a row per class: N·K rows; others have as many, N, or one.

    Args:
        e: the emitter.
        explained: the explained tensor, samples first.
        single: it has no axis of samples: there is one.
    """

    def __init__(self, e: Emitter, explained: Value, single: bool):
        self._e, self._explained = e, explained
        self._alone = single or not explained.rank
        self._slices: dict[Value, Value] = {}  # graph input -> what the body gets of it in a turn
        self._body: Body | None = None

    def fed(self, parameter: Value) -> Value:
        """The rows of one turn, (N, …)."""
        assert self._body is not None
        if parameter not in self._slices:
            batch: Dim = 1 if self._alone else self._explained.shape[0]
            facts = Facts(parameter.dtype, (batch, *parameter.shape[1:]))
            self._slices[parameter] = self._body.input("class", facts)
        return self._slices[parameter]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The body of the Scan."""
        with self._e.body("classes") as self._body:
            yield

    def stacked(self, found: Mapping[str, Value], axes: Mapping[str, int]) -> dict[str, Value]:
        """N·K rows of each."""
        e, body = self._e, self._body
        assert body is not None
        for value in found.values():
            body.output(value)
        at = [axes[name] for name in found]
        with e.scope("classes", doc="the classes of every sample, one after the other"):
            tracks = [Track(rows) for rows in self._tracks()]
            facts = [
                Facts(x.dtype, (*x.shape[: i + 1], None, *x.shape[i + 1 :]))
                for x, i in zip(found.values(), at, strict=True)
            ]
            made = scan(e, body, [], tracks, facts, [(i + 1, False) for i in at])
            rows = [merge_axes(e, all_classes, i, i + 2) for all_classes, i in zip(made, at, strict=True)]
        for x, y, i in zip(found.values(), rows, at, strict=True):
            y.facts = Facts(x.dtype, (*x.shape[:i], ROWS, *x.shape[i + 1 :]))
        return dict(zip(found, rows, strict=True))

    def _tracks(self) -> list[Value]:
        """The rows of all turns (K, N, …) of every graph input."""
        e = self._e
        samples = ints(e, [1]) if self._alone else dim_of(e, self._explained, 0)
        lengths = {p: dim_of(e, p, 0) for p in self._slices}
        rows = e.op("Max", samples, *lengths.values())
        count = e.op("Squeeze", rows, ints(e, [0]))
        numbers = e.op("Range", e.const(np.array(0)), count, e.const(np.array(1)))
        # Fails where there are not as many classes of each sample.
        by_sample = e.op("Reshape", numbers, e.op("Concat", samples, ints(e, [-1]), axis=0), shape=(None, None))
        turns = e.op("Transpose", by_sample, perm=[1, 0])
        return [e.op("Gather", p, e.op("Div", turns * length, rows), axis=0) for p, length in lengths.items()]


def sample_axis(v: View, x: Value, explained: Value, *, single: bool) -> int | None:
    """The axis of a tensor on which the samples of the explained one lie; None where there is none.

    It is the first one of that length. Where inference lost what a length is called, samples come first.
    """
    batch: Dim = 1 if single or not explained.rank else explained.shape[0]
    if x.facts.shape is None:
        return None
    if batch in x.shape:
        return x.shape.index(batch)
    called = {d for value in v.inputs.values() for d in value.facts.shape or ()}
    lost = isinstance(batch, str) and batch not in called
    first = x.shape[0] if x.rank else 1
    return 0 if isinstance(first, str) and (lost or first not in called) else None


def over_classes(
    e: Emitter, explained: Value, axes: Mapping[str, int | None], *, single: bool, target: object
) -> ManyClasses:
    """A Scan over the classes of every sample.

    Args:
        e: the emitter.
        explained: the explained tensor.
        axes: the axis of samples of every tensor whose relevance is reported, by its name.
        single: the explained tensor has no axis of samples.
        target: how the class is chosen.

    Raises:
        InputError: classes are not fed, or a tensor has no axis of samples.
    """
    if not (isinstance(target, str) and target == "input"):
        raise InputError(f"multi_target=True is for classes that are fed, so for target='input', not {target!r}")
    bad = [name for name, axis in axes.items() if axis is None]
    if bad:
        raise InputError(
            f"multi_target=True: '{bad[0]}' has no axis of samples, on which relevance of several classes would lie; "
            "name other tensors with inputs= and layers="
        )
    return ManyClasses(e, explained, single)
