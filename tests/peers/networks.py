"""The small networks on which we are compared with other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _vgg(**options: Any) -> torch.nn.Module:
    from exporters.torch_nets import VGG, randomize

    return randomize(VGG((1, 2, 2), **{"width": 8, "size": 32, "hidden": 32, "classes": 10} | options))


def _resnet(block: str, **options: Any) -> torch.nn.Module:
    from exporters import torch_nets as nets

    return nets.randomize(nets.ResNet(getattr(nets, block), (1, 1, 1), **{"width": 8, "classes": 10} | options))


def _mobilenet(relu: bool = False) -> torch.nn.Module:
    from torch import nn

    from exporters.torch_nets import mobilenet

    activation = nn.ReLU if relu else nn.ReLU6
    return mobilenet(outputs=(16, 24, 24), strides=(1, 2, 1), width=8, classes=10, activation=activation)


def positive_vgg() -> torch.nn.Module:
    """Make a net whose convolutions have no bias, since captum's rules treat that otherwise than ours."""
    net = _vgg()
    for layer in net.features:
        if hasattr(layer, "bias"):
            layer.bias.data.zero_()
    return net


def _on_a_grid(net: torch.nn.Module) -> torch.nn.Module:
    """Round all weights to multiples of 1/8: sums are then exact in any order, so equal values stay exactly equal."""
    for parameter in net.parameters():
        parameter.data = (parameter.data * 8).round().clamp(-8, 8) / 8
    return net


def _overlapping() -> torch.nn.Module:
    from torch import nn

    from exporters.torch_nets import randomize

    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(512, 10)]
    return randomize(nn.Sequential(*layers))


NETS: dict[str, Callable[[], torch.nn.Module]] = {
    "vgg": _vgg,
    "vgg_batchnorm": lambda: _vgg(batchnorm=True),
    "vgg_grouped": lambda: _vgg(groups=4),
    "resnet_basic": lambda: _resnet("BasicBlock"),
    "resnet_bottleneck": lambda: _resnet("Bottleneck"),
    "resnext": lambda: _resnet("Bottleneck", groups=4),
    "mobilenet": _mobilenet,
    "mobilenet_relu": lambda: _mobilenet(relu=True),
    "vgg_positive": positive_vgg,
    "ties": lambda: _on_a_grid(_vgg()),
    "ties_overlapping": lambda: _on_a_grid(_overlapping()),
    "vgg_odd": lambda: _vgg(size=(37, 41)),
}
