"""LSTM, GRU and RNN in numpy, for the oracle: onnx's own know neither direction, lengths, activations nor clip.

Written from the equations of the operators' schemas, one sample and one step at a time. What these leave open is as in
ONNX Runtime: the input of an LSTM's last activation is not clipped, and a sequence of no steps ends in zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]


def _function(name: str, alpha: Iterator[float], beta: Iterator[float]) -> Function:
    """An activation; alpha and beta are taken from what is given for those that have one, in order.

    The schemas leave some defaults open: they are those of ONNX Runtime, in float32 as all attributes.
    """
    if name == "Affine":
        a, b = next(alpha, 0.0), next(beta, 0.0)
        return lambda x: a * x + b
    if name == "ScaledTanh":
        a, b = next(alpha, 0.0), next(beta, 0.0)
        return lambda x: a * np.tanh(b * x)
    if name == "HardSigmoid":
        a, b = next(alpha, float(np.float32(0.2))), next(beta, 0.5)
        return lambda x: np.clip(a * x + b, 0, 1)
    if name == "LeakyRelu":
        a = next(alpha, float(np.float32(0.01)))
        return lambda x: np.where(x < 0, a * x, x)
    if name == "ThresholdedRelu":
        a = next(alpha, 0.0)
        return lambda x: np.where(x > a, x, 0)
    if name == "Elu":
        a = next(alpha, 1.0)
        return lambda x: np.where(x < 0, a * np.expm1(x), x)
    plain: dict[str, Function] = {
        "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "Tanh": np.tanh,
        "Relu": lambda x: np.maximum(x, 0),
        "Softsign": lambda x: x / (1 + np.abs(x)),
        "Softplus": lambda x: np.logaddexp(0, x),
    }
    return plain[name]


class _Recurrent(OpRun):
    """What the three have in common."""

    op_domain = ""
    gates = 1
    functions: tuple[str, ...] = ("Tanh",)

    def _run(self, x: Array, w: Array, r: Array, *rest: Array | None, **attrs: Any) -> tuple[Array, ...]:
        given = dict(enumerate(rest))
        b, lengths, h0, c0, p = (given.get(k) for k in range(5))
        if attrs.get("layout"):
            x = x.swapaxes(0, 1)
            h0, c0 = (None if s is None else s.swapaxes(0, 1) for s in (h0, c0))
        steps, batch, _ = x.shape
        ways, _, hidden = r.shape
        names = list(attrs.get("activations") or self.functions * ways)
        alpha, beta = (iter(attrs.get(f"activation_{k}") or ()) for k in ("alpha", "beta"))
        functions = [_function(str(name), alpha, beta) for name in names]
        y = np.zeros((steps, ways, batch, hidden), x.dtype)
        last = [np.zeros((ways, batch, hidden), x.dtype) for _ in range(2)]
        for d in range(ways):
            backwards = d == 1 or attrs.get("direction") == "reverse"
            own = functions[d * len(self.functions) : (d + 1) * len(self.functions)]
            for n in range(batch):
                state = [np.zeros(hidden, x.dtype) if s is None else s[d, n] for s in (h0, c0)]
                count = steps if lengths is None else int(lengths[n])
                bias = np.zeros(2 * self.gates * hidden, x.dtype) if b is None else b[d]
                peep = np.zeros(3 * hidden, x.dtype) if p is None else p[d]
                for t in range(count)[:: -1 if backwards else 1]:
                    state = self._step(x[t, n], state, (w[d], r[d], bias, peep), own, attrs)
                    y[t, d, n] = state[0]
                for k in range(2):  # no step, no state: ONNX Runtime has zeros
                    last[k][d, n] = state[k] if count else 0
        results = [y, *last]
        if attrs.get("layout"):
            results = [y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in last)]
        return tuple(results[: len(self.onnx_node.output)])

    @staticmethod
    def _clipped(z: Array, attrs: dict[str, Any]) -> Array:
        bound = attrs.get("clip")
        return np.clip(z, -bound, bound) if bound else z

    def _step(self, x: Array, state: list[Array], weights: Any, functions: Any, attrs: dict[str, Any]) -> list[Array]:
        raise NotImplementedError


class RNN(_Recurrent):
    """RNN with all its attributes."""

    def _step(self, x: Array, state: list[Array], weights: Any, functions: Any, attrs: dict[str, Any]) -> list[Array]:
        w, r, b, _ = weights
        wb, rb = np.split(b, 2)
        return [functions[0](self._clipped(w @ x + r @ state[0] + wb + rb, attrs)), state[1]]


class GRU(_Recurrent):
    """GRU with all its attributes."""

    gates, functions = 3, ("Sigmoid", "Tanh")

    def _step(self, x: Array, state: list[Array], weights: Any, functions: Any, attrs: dict[str, Any]) -> list[Array]:
        (wz, wr, wh), (rz, rr, rh) = (np.split(v, 3) for v in weights[:2])
        bz, br, bh, cz, cr, ch = np.split(weights[2], 6)
        h, (f, g) = state[0], functions
        z = f(self._clipped(wz @ x + rz @ h + bz + cz, attrs))
        r = f(self._clipped(wr @ x + rr @ h + br + cr, attrs))
        inner = r * (rh @ h + ch) if attrs.get("linear_before_reset") else rh @ (r * h) + ch
        return [(1 - z) * g(self._clipped(wh @ x + inner + bh, attrs)) + z * h, state[1]]


class LSTM(_Recurrent):
    """LSTM with all its attributes."""

    gates, functions = 4, ("Sigmoid", "Tanh", "Tanh")

    def _step(self, x: Array, state: list[Array], weights: Any, functions: Any, attrs: dict[str, Any]) -> list[Array]:
        w, r, b, p = weights
        (h, c), (f, g, last) = state, functions
        wb, rb = np.split(b, 2)
        i, o, forget, new = np.split(w @ x + r @ h + wb + rb, 4)
        pi, po, pf = np.split(p, 3)
        i = f(self._clipped(i + pi * c, attrs))
        forget = 1 - i if attrs.get("input_forget") else f(self._clipped(forget + pf * c, attrs))
        cell = forget * c + i * g(self._clipped(new, attrs))
        o = f(self._clipped(o + po * cell, attrs))
        return [o * last(cell), cell]
