"""The loop that the small transformers are trained by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, peak: float, steps: int, loss_of: Callable[[], Tensor]
) -> None:
    """Train in place, at a rate that rises to its peak and falls again, with gradients of length 1 at most.

    Args:
        model: the network; left in evaluation mode.
        optimizer: of its parameters.
        peak: the highest rate.
        steps: how many batches.
        loss_of: draws the next batch, and gives the loss on it.
    """
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}", flush=True)
    model.eval()
