"""zennit as an oracle, called by the names that our own methods and rules have."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

COMPOSITES = (
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "excitation_backprop",
)
RULES = {
    "epsilon": "Epsilon",
    "zplus": "ZPlus",
    "alpha_beta": "AlphaBeta",
    "gamma": "Gamma",
    "zbox": "ZBox",
    "wsquare": "WSquare",
    "flat": "Flat",
    "norm": "Norm",
    "pass": "Pass",
}


def zennit() -> ModuleType:
    """Import zennit, which asks for torchvision, with our own blocks in the place of torchvision's."""
    pytest.importorskip("torch")
    # Left in place once set: zennit's modules keep references to them, and nothing else here asks for torchvision.
    if "torchvision" not in sys.modules:
        from exporters.torch_nets import BasicBlock, Bottleneck

        blocks = ModuleType("torchvision.models.resnet")
        blocks.BasicBlock, blocks.Bottleneck = BasicBlock, Bottleneck  # type: ignore[attr-defined]
        for name in ("torchvision", "torchvision.models", "torchvision.models.vgg"):
            sys.modules[name] = ModuleType(name)
        sys.modules[blocks.__name__] = blocks
    package = pytest.importorskip("zennit")
    for part in ("attribution", "composites", "layer", "rules", "torchvision"):
        pytest.importorskip(f"zennit.{part}")
    return package


def zennit_relevance(
    module: torch.nn.Module,
    x: np.ndarray,
    composite: str,
    target: int | list[int],
    start: str = "logit",
    double: bool = True,
    **options: Any,
) -> np.ndarray:
    """Return zennit's relevance at the input for the composite of that name, with `options` such as `low` and `high`.

    `target` is one class for all, or one per sample; relevance starts there from the class's logit or from 1.
    """
    import torch

    package = zennit()
    dtype = torch.float64 if double else torch.float32
    net = exact_batchnorm(copy.deepcopy(module).to(dtype).eval())
    given = {
        name: torch.as_tensor(value, dtype=dtype) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    canonizers = [package.torchvision.ResNetCanonizer()]
    rules = package.composites.COMPOSITES[composite](canonizers=canonizers, **given)

    def seed(logits: torch.Tensor) -> torch.Tensor:
        classes = torch.as_tensor(target).expand(len(logits))
        chosen = torch.nn.functional.one_hot(classes, logits.shape[-1]).to(logits)
        return chosen * logits.detach() if start == "logit" else chosen

    with package.attribution.Gradient(net, rules) as attributor:
        _, relevance = attributor(torch.as_tensor(x, dtype=dtype), seed)
    return relevance.detach().numpy()


def zennit_conditional(
    module: torch.nn.Module,
    x: np.ndarray,
    composite: str | None,
    target: list[int],
    masks: Sequence[tuple[str, np.ndarray]],
    exclude_parallel: bool,
) -> np.ndarray:
    """Return the relevance at the input, in float64, conditional on channels of the outputs of some modules.

    As in zennit-crp: the backward pass multiplies what arrives at a module's output by its mask (N or 1, C, 1, 1). With
    `exclude_parallel` there is one backward pass from each module to the next, so that nothing goes around; `masks`
    then begins with the module next to the output. Without a composite it is the gradient of the score.
    """
    import torch

    package = zennit()
    net = exact_batchnorm(copy.deepcopy(module).double().eval())
    modules = dict(net.named_modules())
    canonizers = [package.torchvision.ResNetCanonizer()]
    rules = None if composite is None else package.composites.COMPOSITES[composite](canonizers=canonizers)
    held: dict[str, torch.Tensor] = {}

    def hook(name: str, mask: torch.Tensor) -> Callable[..., None]:
        def forward(_: Any, __: Any, output: torch.Tensor) -> None:
            held[name] = output
            if not exclude_parallel:
                output.register_hook(lambda grad: grad * mask)

        return forward

    with contextlib.nullcontext() if rules is None else rules.context(net):
        for name, mask in masks:
            modules[name].register_forward_hook(hook(name, torch.as_tensor(mask, dtype=torch.float64)))
        inputs = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
        logits = net(inputs)
        relevance = torch.nn.functional.one_hot(torch.as_tensor(target), logits.shape[-1]).to(logits)
        relevance = relevance if composite is None else relevance * logits.detach()
        begin = logits
        for name, mask in masks if exclude_parallel else ():
            (relevance,) = torch.autograd.grad(begin, held[name], relevance, retain_graph=True)
            begin, relevance = held[name], relevance * torch.as_tensor(mask, dtype=torch.float64)
        (found,) = torch.autograd.grad(begin, inputs, relevance)
    return found.numpy()


def zennit_rule(layer: torch.nn.Module, x: np.ndarray, rule: str, relevance: np.ndarray, **options: Any) -> np.ndarray:
    """Return zennit's relevance of one layer's input, in float64, for a rule under our name of it."""
    import torch

    given = {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in options.items()
    }
    hook = getattr(zennit().rules, RULES[rule])(**given)
    net = copy.deepcopy(layer).double()
    handles = hook.register(net)
    x_tensor = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(net(x_tensor), x_tensor, torch.as_tensor(relevance, dtype=torch.float64))
    handles.remove()
    return found.numpy()


def seen_sums(net: torch.nn.Module) -> torch.nn.Module:
    """Let zennit see the sums of inverted residuals, which its canonizers do not know, as they do a ResNet's blocks."""
    import torch

    from exporters.torch_nets import InvertedResidual

    total = zennit().layer.Sum

    class Stacked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = total()

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.total(torch.stack([left, right], -1))

    for block in net.modules():
        if isinstance(block, InvertedResidual) and block.add is not None:
            block.add = Stacked()
    return net


def exact_batchnorm(net: torch.nn.Module) -> torch.nn.Module:
    """Move each epsilon into the running variance.

    zennit merges a batch norm into its convolution but leaves a batch norm behind that still divides by sqrt(1 + eps).
    """
    import torch

    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            assert layer.running_var is not None
            layer.running_var.add_(layer.eps)
            layer.eps = 0.0
    return net
