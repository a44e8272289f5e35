"""DeepLIFT's rescale rule in torch, told once more: activations and pools that remember what they saw at the reference.

captum's own is compared where it can be: it has a mistake in its rule for max pooling (the derivative of the first
sample stands in for that of all, and windows that overlap overwrite each other), by which its contributions do not sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

POINTWISE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus)


class _Rescale(torch.autograd.Function):
    """(y - y0) / (x - x0), and the derivative where x did not move."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, x0: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            free = x.detach().requires_grad_()
            y = f(free)
            (slope,) = torch.autograd.grad(y.sum(), free)
        y0 = f(x0)
        ratio = torch.where((x - x0).abs() < 1e-10, slope, (y.detach() - y0) / (x - x0))
        ctx.save_for_backward(ratio)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, m: torch.Tensor) -> Any:
        (ratio,) = ctx.saved_tensors
        return m * ratio, None, None


class _CrossMaximum(torch.autograd.Function):
    """Up to the larger of y and y0 the winner gets it, and the winner at the reference the rest."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, x0: torch.Tensor, pool: nn.MaxPool2d) -> torch.Tensor:
        sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        y, winner = functional.max_pool2d(x, *sizes, return_indices=True)
        y0, winner0 = functional.max_pool2d(x0, *sizes, return_indices=True)
        ctx.save_for_backward(x, x0, y, y0, winner, winner0)
        return y

    @staticmethod
    def backward(ctx: Any, m: torch.Tensor) -> Any:
        x, x0, y, y0, winner, winner0 = ctx.saved_tensors

        def placed(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            flat = torch.zeros_like(x).flatten(2)
            return flat.scatter_add(2, places.flatten(2), values.flatten(2)).view_as(x)

        top = torch.maximum(y, y0)
        share = placed(m * (top - y0), winner) + placed(m * (y - top), winner0)
        moved = x - x0
        still = moved.abs() < 1e-10
        return torch.where(still, placed(m, winner), share / torch.where(still, 1.0, moved)), None, None


class _Remembering(nn.Module):
    """A module that notes its input in one run and compares with it in the next."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.before = inner, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before is None:
            self.before = x.detach()
            return self.inner(x)
        before, self.before = self.before, None
        if isinstance(self.inner, nn.MaxPool2d):
            return _CrossMaximum.apply(x, before, self.inner)
        return _Rescale.apply(x, before, self.inner)


def deeplift(net: nn.Module, x: np.ndarray, x0: np.ndarray, target: list[int]) -> np.ndarray:
    """Contributions in float64; every activation and pool of the net has to be a module of its own."""
    twin = copy.deepcopy(net).double().eval()
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (*POINTWISE, nn.MaxPool2d)):
                if hasattr(child, "inplace"):
                    child.inplace = False
                setattr(module, name, _Remembering(child))
    with torch.no_grad():
        twin(torch.as_tensor(np.broadcast_to(x0, x.shape).copy(), dtype=torch.float64))
    inputs = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    score = twin(inputs)[range(len(x)), target].sum()
    return (torch.autograd.grad(score, inputs)[0] * (inputs - torch.as_tensor(x0))).detach().numpy()
