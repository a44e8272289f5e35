"""Relevance of LSTM, GRU and RNN as gradient times input of a network with the same values, in torch.

Activations are x times a constant, sums and layers keep their value but pass on only what the stabilizer leaves
(y = k·y + (1 - k)·y held constant, k = y / stab(y)), and a product is linear in the factors by their shares. Written
one sample and one step at a time from the schemas of the operators; it knows nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]
LAYER, GATE, SUM = 0.01, 0.02, 0.03  # the stabilizers of the book
BOOK = f"""
title = "every stabilizer another"
base = "_base"
[[assign]]
where = {{ op = "MatMul", live = 1 }}
rule = "epsilon"
epsilon = {LAYER}
[[assign]]
where = {{ role = "gate" }}
rule = "RULE"
epsilon = {GATE}
[[assign]]
where = {{ op = "Add" }}
rule = "norm"
epsilon = {SUM}
"""


def number(attribute: float) -> float:
    """An attribute; ONNX keeps it in float32."""
    return float(torch.tensor(attribute, dtype=torch.float32))


def same(found: Tensor, value: Tensor) -> Tensor:
    """A value with the gradient of another tensor."""
    return found + (value - found).detach()


def stable(y: Tensor, epsilon: float) -> Tensor:
    return (y + epsilon * (2.0 * (y >= 0) - 1.0).to(y.dtype)).detach()


def divided(y: Tensor, epsilon: float) -> Tensor:
    """What a layer or sum passes on."""
    return same(y * (y.detach() / stable(y, epsilon)), y)


def held(f: Function, x: Tensor) -> Tensor:
    """An activation: relevance passes."""
    y = f(x)
    return same(x * torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)).detach(), y)


def product(rule: str, gate: Tensor, signal: Tensor) -> Tensor:
    """Gate times signal by a rule."""
    y = gate * signal
    if rule == "proportional":
        return same((gate + signal) * (y.detach() / stable(gate + signal, GATE)), y)
    to_signal = gate.detach() * signal
    shares = to_signal if rule == "gate" else (to_signal + gate * signal.detach()) / 2
    return same(shares * (y.detach() / stable(y, GATE)), y)


def _function(name: str, alpha: Iterator[float], beta: Iterator[float]) -> Function:
    if name == "Affine":
        a, b = next(alpha), next(beta)
        return lambda x: divided(a * x + b, SUM)
    if name == "ScaledTanh":
        a, b = next(alpha), next(beta)
        return lambda x: held(lambda y: a * torch.tanh(b * y), x)
    plain: dict[str, Function] = {
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Relu": torch.relu,
        "Softsign": torch.nn.functional.softsign,
        "Softplus": torch.nn.functional.softplus,
    }
    if name in plain:
        return lambda x: held(plain[name], x)
    default = {"HardSigmoid": 0.2, "LeakyRelu": 0.01, "ThresholdedRelu": 0.0, "Elu": 1.0}[name]
    a = next(alpha, number(default))
    b = next(beta, 0.5) if name == "HardSigmoid" else 0.0
    tuned: dict[str, Function] = {
        "HardSigmoid": lambda x: torch.clip(a * x + b, 0, 1),
        "LeakyRelu": lambda x: torch.where(x < 0, a * x, x),
        "ThresholdedRelu": lambda x: torch.where(x > a, x, 0.0),
        "Elu": lambda x: torch.where(x < 0, a * torch.expm1(x), x),
    }
    return lambda x: held(tuned[name], x)


DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def surrogate(
    op: str, attrs: Mapping[str, Any], arrays: Mapping[str, Tensor], lengths: tuple[int, ...] | None, rule: str
) -> dict[str, Tensor]:
    """The outputs y, h and c."""
    x, states = arrays["x"], [arrays.get("h0"), arrays.get("c0")]
    if attrs.get("layout"):
        x, states = x.swapaxes(0, 1), [None if s is None else s.swapaxes(0, 1) for s in states]
    steps, batch, _ = x.shape
    ways, hidden = arrays["R"].shape[0], arrays["R"].shape[2]
    alpha, beta = (map(number, attrs.get(f"activation_{k}") or ()) for k in ("alpha", "beta"))
    functions = [_function(n, alpha, beta) for n in attrs.get("activations") or DEFAULTS[op] * ways]
    nothing = torch.zeros(hidden, dtype=x.dtype)
    columns, lasts = [], []
    for d in range(ways):
        own = functions[d * len(DEFAULTS[op]) : (d + 1) * len(DEFAULTS[op])]
        cell = {"LSTM": lstm, "GRU": gru, "RNN": rnn}[op](attrs, arrays, d, own, rule)
        for n in range(batch):
            state = [nothing if s is None else s[d, n] for s in states]
            count = steps if lengths is None else lengths[n]
            made = [nothing] * steps
            order = range(count)
            for t in reversed(order) if d == 1 or attrs.get("direction") == "reverse" else order:
                state = cell(x[t, n], *state)
                made[t] = state[0]
            columns.append(torch.stack(made))
            lasts.append(state if count else [nothing, nothing])
    y = torch.stack(columns).reshape(ways, batch, steps, hidden).permute(2, 0, 1, 3)
    last = [torch.stack([s[k] for s in lasts]).reshape(ways, batch, hidden) for k in range(2)]
    if attrs.get("layout"):
        y, last = y.permute(2, 0, 1, 3), [s.swapaxes(0, 1) for s in last]
    return {"y": y, "h": last[0], "c": last[1]}


def parts_of(arrays: Mapping[str, Tensor], d: int, gates: int) -> tuple[Any, Any, Any, Any]:
    """Weights of inputs and states and both biases, by gate."""
    w, r = (arrays[k][d].chunk(gates) for k in ("W", "R"))
    b = arrays["B"][d] if "B" in arrays else torch.zeros(2 * arrays["W"].shape[1], dtype=arrays["W"].dtype)
    return w, r, b[: len(b) // 2].chunk(gates), b[len(b) // 2 :].chunk(gates)


def clipped(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    bound = number(attrs.get("clip", 0))
    return held(lambda y: torch.clip(y, -bound, bound), x) if bound else x


def rest(gate: Tensor, pressed: Tensor) -> Tensor:
    """One minus a gate: relevance passes, to what went into it where the gate is zero and cannot carry it."""
    return torch.where(gate == 0, held(lambda _: 1 - gate.detach(), pressed), held(lambda g: 1 - g, gate))


def lstm(attrs: Any, arrays: Any, d: int, functions: Any, rule: str) -> Callable[..., list[Tensor]]:
    w, r, b, rb = parts_of(arrays, d, 4)
    f, g, last = functions
    peep = arrays["P"][d].chunk(3) if "P" in arrays else None

    def step(x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        def pressed(k: int, seen: Tensor) -> Tensor:
            z = w[k] @ x + r[k] @ h + b[k] + rb[k]
            return clipped(attrs, divided(z if peep is None or k == 3 else z + peep[k] * seen, LAYER))

        entering = pressed(0, c)
        enter = f(entering)
        keep = rest(enter, entering) if attrs.get("input_forget") else f(pressed(2, c))
        new = divided(product(rule, enter, g(pressed(3, c))) + product(rule, keep, c), SUM)
        return [product(rule, f(pressed(1, new)), last(new)), new]

    return step


def gru(attrs: Any, arrays: Any, d: int, functions: Any, rule: str) -> Callable[..., list[Tensor]]:
    w, r, b, rb = parts_of(arrays, d, 3)
    f, g = functions

    def step(x: Tensor, h: Tensor, _: Tensor) -> list[Tensor]:
        into = [clipped(attrs, divided(w[k] @ x + r[k] @ h + b[k] + rb[k], LAYER)) for k in (0, 1)]
        update, reset = map(f, into)
        if attrs.get("linear_before_reset"):
            z = divided(w[2] @ x + b[2] + product(rule, reset, r[2] @ h + rb[2]), SUM)
        else:
            z = divided(w[2] @ x + r[2] @ product(rule, reset, h) + b[2] + rb[2], LAYER)
        new = product(rule, rest(update, into[0]), g(clipped(attrs, z)))
        return [divided(new + product(rule, update, h), SUM), h]

    return step


def rnn(attrs: Any, arrays: Any, d: int, functions: Any, rule: str) -> Callable[..., list[Tensor]]:
    (w,), (r,), (b,), (rb,) = parts_of(arrays, d, 1)
    return lambda x, h, _: [functions[0](clipped(attrs, divided(w @ x + r @ h + b + rb, LAYER))), h]


def relevance(outputs: Mapping[str, Tensor], name: str, start: Tensor, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """Relevance of the tensors that have a gradient, from that of an output."""
    y = outputs[name]
    (torch.where(y == 0, 0.0, start / torch.where(y == 0, 1.0, y)).detach() * y).sum().backward()
    live = {k: v for k, v in arrays.items() if v.requires_grad}
    return {k: (v.detach() * v.grad).numpy() if v.grad is not None else 0 * v.detach().numpy() for k, v in live.items()}
