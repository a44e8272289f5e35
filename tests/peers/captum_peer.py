"""captum as an oracle for layer-wise relevance propagation and the gradient family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

RULES = ("epsilon", "gamma", "alpha1_beta0")


def captum_relevance(
    module: torch.nn.Module,
    x: np.ndarray,
    rule: str,
    target: int | list[int],
    epsilon: float = 1e-9,
    double: bool = True,
    pool_epsilon: float | None = None,
    rule_on_dense: bool = True,
    **options: Any,
) -> np.ndarray:
    """Return captum's relevance at the input, with `rule` on convolutions and dense layers and epsilon elsewhere.

    Batch norms are folded first, since captum would treat each as a layer of its own. `epsilon` stabilizes every rule;
    captum's own value is the default. captum stabilizes max pooling too; a `pool_epsilon` as small as 1e-30 makes that
    the plain routing to the winner. `rule_on_dense=False` leaves dense layers to the epsilon rule.
    """
    import torch

    attribution = pytest.importorskip("captum.attr")
    dtype = torch.float64 if double else torch.float32
    net = fold_batchnorm(copy.deepcopy(module).to(dtype).eval())
    set_rules(net, rule, epsilon, pool_epsilon, rule_on_dense, **options)
    lrp = attribution.LRP(net)
    relevance = lrp.attribute(torch.as_tensor(x, dtype=dtype).requires_grad_(), target=target)
    return relevance.detach().numpy()


def captum_gradient(
    module: torch.nn.Module,
    x: np.ndarray,
    method: str,
    target: list[int],
    layer: Callable[[Any], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Return captum's attributions in float64 by a method of the gradient family, as "input" and "layer".

    captum's Grad-CAM ends at the layer and keeps negative values unless told otherwise, and its guided Grad-CAM
    enlarges by the nearest neighbour: here both are set as in the paper. Maps are enlarged by its own interpolation,
    which is torch's with align_corners=False.
    """
    import torch

    attr = pytest.importorskip("captum.attr")
    net = copy.deepcopy(module).double().eval()
    inputs = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    found: dict[str, torch.Tensor] = {}
    if method == "gradient":
        found["input"] = attr.Saliency(net).attribute(inputs, target=target, abs=False)
    elif method == "grad_cam":
        assert layer is not None
        options = {"target": target, "relu_attributions": True}
        found["layer"] = attr.LayerGradCam(net, layer(net)).attribute(inputs, **options)
        found["input"] = attr.LayerAttribution.interpolate(found["layer"], x.shape[2:], "bilinear")
    elif method == "guided_grad_cam":
        assert layer is not None
        guided = attr.GuidedGradCam(net, layer(net))
        found["input"] = guided.attribute(inputs, target=target, interpolate_mode="bilinear")
    else:
        kinds = {
            "input_x_gradient": "InputXGradient",
            "guided_backprop": "GuidedBackprop",
            "deconvnet": "Deconvolution",
        }
        found["input"] = getattr(attr, kinds[method])(net).attribute(inputs, target=target)
    return {name: values.detach().numpy() for name, values in found.items()}


def set_rules(
    net: torch.nn.Module,
    rule: str,
    epsilon: float = 1e-9,
    pool_epsilon: float | None = None,
    rule_on_dense: bool = True,
    **options: Any,
) -> None:
    """Give every layer of `net` its rule; needed anew before each call, since captum deletes them after one."""
    from torch import nn

    from exporters.torch_nets import Addition, Concatenation

    rules = pytest.importorskip("captum.attr._utils.lrp_rules")
    special = {"gamma": rules.GammaRule, "alpha1_beta0": rules.Alpha1_Beta0_Rule}
    plain = (nn.Linear, nn.BatchNorm2d, Addition, Concatenation, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and rule_on_dense):
            chosen = special[rule](**options) if rule in special else rules.EpsilonRule()
        elif isinstance(layer, plain):
            chosen = rules.EpsilonRule()
        else:
            continue
        pooled = isinstance(layer, nn.MaxPool2d | Concatenation) and pool_epsilon is not None
        chosen.STABILITY_FACTOR = pool_epsilon if pooled else epsilon
        layer.rule = chosen


def fold_batchnorm(net: torch.nn.Module) -> torch.nn.Module:
    """Fold every batch norm of `net` into the convolution that was made right before it, and return `net`."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for parent in net.modules():
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                # captum's identity rule fails on nn.Identity, which returns the very tensor it was given; it passes
                # relevance through a dropout, which does nothing in evaluation.
                setattr(parent, name, nn.Dropout().eval())
            before = (name, child)
    return net
