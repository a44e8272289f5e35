"""The elements of constants: given, read from the file when first asked for, or worked out behind operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from onnx_lrp.inference import evaluate
from onnx_lrp.values import Array, Call, Value

FOLD_LIMIT = 64  # elements; larger constants stay operators on the source's weights, which the runtime folds at load


class Constants:
    """What is known of the elements of constants.

    Args:
        producers: which call makes a tensor.
        opset: version of ai.onnx of these calls.
    """

    def __init__(self, producers: Mapping[str, Call], opset: int):
        self._producers, self._opset = producers, opset
        self._arrays: dict[str, Array] = {}
        self._unread: dict[str, Callable[[], Array]] = {}

    def give(self, name: str, array: Array) -> None:
        """Note the elements of a constant."""
        self._arrays[name] = array

    def promise(self, name: str, read: Callable[[], Array]) -> None:
        """Note how the elements of a constant are read, if anybody asks."""
        self._unread[name] = read

    def array(self, value: Value | None) -> Array | None:
        """The elements of a constant, computed where they hide behind operators; None for anything else."""
        if value is None or not value.facts.const:
            return None
        if value.name in self._unread:
            self._arrays[value.name] = self._unread.pop(value.name)()
        if value.name not in self._arrays:
            call = self._producers.get(value.name)
            if call is None or call.domain:
                return None
            inputs = [self.array(v) for v in call.inputs]
            if any(a is None and v is not None for a, v in zip(inputs, call.inputs, strict=True)):
                return None
            for output, result in zip(call.outputs, evaluate(call, inputs, self._opset), strict=False):
                if output is not None:
                    self._arrays[output.name] = result
        return self._arrays.get(value.name)

    def short(self, value: Value) -> Array | None:
        """The elements of a constant that is at hand, or short enough to be worked out: lengths, axes, pads."""
        if value.name in self._arrays:
            return self._arrays[value.name]
        return self.array(value) if value.facts.const and _few(value) else None

    def folded(self, call: Call) -> list[Array] | None:
        """The outputs of a call on few constants; None where they are no constants, or many."""
        outputs = [v for v in call.outputs if v is not None]
        if not call.inputs or not all(v.facts.const and v.static for v in outputs):
            return None
        if not all(_few(v) for v in [*outputs, *(v for v in call.inputs if v is not None and v.static)]):
            return None
        inputs = [self.array(v) for v in call.inputs]
        if any(a is None and v is not None for a, v in zip(inputs, call.inputs, strict=True)):
            return None
        arrays = evaluate(call, inputs, self._opset)
        return [np.asarray(a).astype(v.dtype, copy=False) for a, v in zip(arrays, outputs, strict=True)]


def _few(value: Value) -> bool:
    return value.static and math.prod(d for d in value.shape if isinstance(d, int)) <= FOLD_LIMIT
