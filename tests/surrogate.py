"""An oracle for relevance that knows no rules: a network with the same values whose gradient times input is relevance.

Nets are written once, against the operations of :class:`Plain`. Run with those they are the model, which is exported;
run with :class:`Surrogate` they have the same values and another gradient. Every operation f of a surrogate has the
form f(x) = x·k + (f(x) - x·k) with a constant k that depends on the rule, so that input times gradient is, layer by
layer, what the rule says. Nothing here walks backwards: autograd does.

    epsilon    k = z / stab(z): what the stabilizer keeps
    pass       k = f(x) / x
    gate       the gate is a constant
    z+         z+ · (z / z+): the same value, shared as z+ is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, Tensor]


class Plain:
    """Operations as they are."""

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)

    def conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return layer(x)

    def batchnorm(self, layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return layer(x)

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """An activation."""
        return function(x)

    def add(self, *terms: Tensor) -> Tensor:
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def shortcut(self, x: Tensor, around: Tensor) -> Tensor:
        """The sum at the end of a residual block."""
        return x + around

    def mean(self, x: Tensor, dim: int) -> Tensor:
        return x.mean(dim)

    def gate(self, gate: Tensor, signal: Tensor) -> Tensor:
        """A product of which the first factor says how much of the second."""
        return gate * signal

    def attend(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sums of values (..., keys, width), weighted by probabilities (..., queries, keys)."""
        return weights @ values

    def max_pool(self, x: Tensor, size: int) -> Tensor:
        return functional.max_pool2d(x, size)

    def average_pool(self, x: Tensor, size: int) -> Tensor:
        return functional.avg_pool2d(x, size)

    def cell(self, cell: nn.LSTMCell, x: Tensor, state: State) -> State:
        """One step of an LSTM."""
        return cell(x, state)

    def lstm(self, layer: nn.LSTM, x: Tensor, state: State | None) -> Tensor:
        """All steps (N, T, H) of an LSTM of one layer, from the state (1, N, H) or from zeros."""
        return layer(x, state)[0]


class Surrogate(Plain):
    """Operations of the same value whose gradient times input is relevance.

    Args:
        epsilon: of linear layers, weighted sums and sums.
        proportion: of averages, pools, shortcuts and z+: stabilizers that are there for zeros only.
    """

    def __init__(self, epsilon: float = 0.0, proportion: float = 0.0):
        self.epsilon, self.proportion = epsilon, proportion

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return kept(layer(x), self.epsilon)

    def conv(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        positive = layer._conv_forward(x.clamp(min=0), layer.weight.clamp(min=0), None)
        negative = layer._conv_forward(x.clamp(max=0), layer.weight.clamp(max=0), None)
        return shared_as(layer(x), positive + negative, self.proportion)

    def batchnorm(self, layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        assert layer.running_var is not None
        assert layer.running_mean is not None
        slope = (layer.weight / (layer.running_var + layer.eps).sqrt())[:, None, None]
        signal, offset = slope * x, layer.bias[:, None, None] - slope * layer.running_mean[:, None, None]
        part = signal.abs() / (signal.abs() + offset.abs())
        return of_value(layer(x), signal, ((signal + offset) * part).detach())

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return of_value(function(x), x, function(x))

    def add(self, *terms: Tensor) -> Tensor:
        return kept(super().add(*terms), self.epsilon)

    def shortcut(self, x: Tensor, around: Tensor) -> Tensor:
        return kept(x + around, self.proportion)

    def mean(self, x: Tensor, dim: int) -> Tensor:
        return kept(x.mean(dim), self.proportion)

    def gate(self, gate: Tensor, signal: Tensor) -> Tensor:
        return gate.detach() * signal

    def attend(self, weights: Tensor, values: Tensor) -> Tensor:
        return kept(weights.detach() @ values, self.epsilon)

    def max_pool(self, x: Tensor, size: int) -> Tensor:
        return shared_as(functional.max_pool2d(x, size), functional.avg_pool2d(x, size), self.proportion)

    def average_pool(self, x: Tensor, size: int) -> Tensor:
        return kept(functional.avg_pool2d(x, size), self.proportion)

    def cell(self, cell: nn.LSTMCell, x: Tensor, state: State) -> State:
        return self.step((cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), x, state)

    def lstm(self, layer: nn.LSTM, x: Tensor, state: State | None) -> Tensor:
        weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
        zero = x.new_zeros(len(x), layer.hidden_size)
        now, steps = (zero, zero) if state is None else (state[0][0], state[1][0]), []
        for t in range(x.shape[1]):
            now = self.step(weights, x[:, t], now)
            steps.append(now[0])
        return torch.stack(steps, 1)

    def step(self, weights: Sequence[Tensor], x: Tensor, state: State) -> State:
        """Gates are constants and the signal takes all (Arras et al. 2017, sec. 3.1).

        What inputs and state bring to the candidate is one sum, biases among it: one stabilizer for both.
        """
        w, u, b, d = weights
        i, forget, g, o = (functional.linear(x, w, b) + functional.linear(state[0], u, d)).chunk(4, -1)
        i, forget, o = (torch.sigmoid(gate).detach() for gate in (i, forget, o))
        c = self.add(forget * state[1], i * self.apply(torch.tanh, kept(g, self.epsilon)))
        return o * self.apply(torch.tanh, c), c


def of_value(value: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """The value, whose gradient by x times x is the share (a constant); where x is zero it is zero."""
    k = torch.where(x == 0, 0.0, share / torch.where(x == 0, 1.0, x)).detach()
    return x * k + (value - x * k).detach()


def kept(z: Tensor, epsilon: float) -> Tensor:
    """Z, with its gradient scaled by what a stabilizer leaves of it: z / (z + epsilon·sign(z)), sign(0) = +1."""
    if epsilon == 0:
        return z
    return of_value(z, z, z * z / stabilized(z, epsilon))


def shared_as(value: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """The value, shared like z: its gradient times input is value / (z + epsilon·sign(z)) times that of z."""
    stable = stabilized(z, epsilon)
    return of_value(value, z, value * z / torch.where(stable == 0, 1.0, stable))


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    """Z + epsilon·sign(z) with sign(0) = +1."""
    return torch.where(z < 0, z - epsilon, z + epsilon)
