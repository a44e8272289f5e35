"""SmoothGrad: the mean of gradients under noise, which is made in the graph and is the same in every run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnx_lrp.adjoints.shapes import concat_ints, dim_of, ints, zeros_like
from onnx_lrp.emit import Emitter, Value
from onnx_lrp.errors import InputError
from onnx_lrp.methods.contract import Found, Plan, Walk
from onnx_lrp.methods.gradients import Gradient
from onnx_lrp.methods.sweep import Sweep
from onnx_lrp.replay import leading
from onnx_lrp.target import Start
from onnx_lrp.view import View

_WORD = np.uint32


@dataclass(frozen=True)
class SmoothGrad:
    """Mean gradient over noisy copies of the input (Smilkov et al. 2017): 1/n * sum of dF(x + g_k) / dx.

    g is Gaussian with a standard deviation of ``noise`` times the range of the sample, max(x) - min(x) (sec. 3.1
    there). Its numbers depend on the seed and on the place within a sample alone: a sample has the same map in every
    run, runtime and batch.

    Attributes:
        samples: n.
        noise: standard deviation of the noise as a share of the sample's range; the paper finds 0.1 to 0.2 good.
        seed: another seed, other noise.
        chunk: how many copies are computed at once where the model's batch is free: more memory, fewer turns.
    """

    samples: int = 20
    noise: float = 0.1
    seed: int = 0
    chunk: int = 4
    name: ClassVar[str] = "smoothgrad"
    start: ClassVar[Start] = "one"
    tensors: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """See that the numbers make sense."""
        for key, value, low in (("samples", self.samples, 1), ("chunk", self.chunk, 1), ("seed", self.seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
                raise InputError(f"{self.name}: {key} is a whole number of at least {low}, not {value!r}")
        if not (isinstance(self.noise, int | float) and math.isfinite(self.noise) and self.noise >= 0):
            raise InputError(f"{self.name}: noise is a share of the sample's range, 0 or more, not {self.noise!r}")

    def plan(self, v: View, explained: Value, reported: Mapping[Value, str]) -> Plan:
        """A walk for every noisy copy."""
        moved = [x for x in reported if not any(leading(v.calls, [y], [x]) for y in reported if y is not x)]

        def noisy(e: Emitter, x: Value, numbers: Value) -> Value:
            axes = ints(e, range(1, x.rank))
            low, high = (e.op(op, x, axes, keepdims=1) for op in ("ReduceMin", "ReduceMax"))
            spread = (high - low) * self.noise
            return x + normal(e, x, numbers, self.seed + moved.index(x)) * spread

        def report(e: Emitter, x: Value, found: Found) -> Value:
            return found[0][x].whole(e) if x in found[0] else zeros_like(e, x)

        even = np.full(self.samples, 1 / self.samples, explained.dtype)
        run = Sweep(v, explained, moved, noisy, even, self.chunk)
        return Plan([Walk(Gradient().step_for, list(reported), run)], report)


def normal(e: Emitter, like: Value, numbers: Value, seed: int) -> Value:
    """Standard normal numbers (k, 1, *rest) for tensors (N, *rest): one set per number, for all samples alike.

    Made by counting: a hash of the place (PCG-RXS-M-XS, O'Neill 2014, sec. 6.3) gives uniform numbers, Box and
    Muller's transform normal ones.
    """
    rest = [dim_of(e, like, i) for i in range(1, like.rank)]
    size = e.op("ReduceProd", concat_ints(e, rest), keepdims=0) if rest else e.const(np.array(1))
    place = e.op("Cast", e.op("Range", e.const(np.array(0)), size, e.const(np.array(1))), to=_to(_WORD))
    which = _scrambled(e, e.op("Cast", numbers, to=_to(_WORD)) + _word(e, seed * 2654435761 % 2**32))
    first = _scrambled(e, place + e.op("Reshape", which, ints(e, [-1, 1])))
    second = _scrambled(e, first)
    # The upper 24 bits, at the middles of their intervals: float32 holds them exactly, and the logarithm stays finite.
    a, b = ((e.op("Cast", _shifted(e, word, 8), to=_to(like.dtype)) + 0.5) * 2.0**-24 for word in (first, second))
    drawn = e.op("Sqrt", e.op("Log", a) * -2.0) * e.op("Cos", b * (2 * math.pi))
    return e.op("Reshape", drawn, concat_ints(e, [[-1, 1], *rest]), shape=(None, 1, *like.shape[1:]), allowzero=0)


def _scrambled(e: Emitter, word: Value) -> Value:
    """PCG's hash of 32-bit words; their arithmetic wraps around."""
    state = word * _word(e, 747796405) + _word(e, 2891336453)
    shift = _shifted(e, state, 28) + _word(e, 4)
    mixed = e.op("BitwiseXor", e.op("BitShift", state, shift, direction="RIGHT"), state) * _word(e, 277803737)
    return e.op("BitwiseXor", _shifted(e, mixed, 22), mixed)


def _shifted(e: Emitter, word: Value, bits: int) -> Value:
    return e.op("BitShift", word, _word(e, bits), direction="RIGHT")


def _word(e: Emitter, number: int) -> Value:
    return e.const(np.array(number, _WORD))


def _to(dtype: np.typing.DTypeLike) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
