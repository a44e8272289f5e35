"""Textbook networks in plain torch, with random weights, for tests, benchmarks and examples.

The architectures are those of the papers (VGG, ResNet, MobileNet, DenseNet); every size is a parameter, so that a test
can have a network of the same shape that runs in milliseconds. Weights are random but scaled (Kaiming), and the running
statistics of BatchNormalization are random too: with the initial ones (mean 0, variance 1) a wrong fold would go
unnoticed.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import onnx
import torch
from torch import Tensor, nn

VGG16 = (2, 2, 3, 3, 3)
VGG19 = (2, 2, 4, 4, 4)
RESNET18 = (2, 2, 2, 2)
RESNET50 = (3, 4, 6, 3)
RESNET152 = (3, 8, 36, 3)
DENSENET121 = (6, 12, 24, 16)
# Expansion, channels, depth and stride of each stage (Sandler et al. 2018, table 2).
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

M = TypeVar("M", bound=nn.Module)


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2014): stages of 3x3 convolutions with a pooling each, then dense layers."""

    def __init__(
        self,
        depths: Sequence[int] = VGG16,
        *,
        width: int = 64,
        size: int | tuple[int, int] = 224,
        hidden: int = 4096,
        classes: int = 1000,
        channels: int = 3,
        batchnorm: bool = False,
        groups: int = 1,
    ) -> None:
        """Build a net whose stages have `width`, 2, 4, 8 and 8 times `width` channels, for pictures of `size`.

        `groups` splits every convolution but the first into that many groups, which VGG itself does not do.
        """
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for stage, depth in enumerate(depths):
            after = width * 2 ** min(stage, 3)
            for _ in range(depth):
                split = 1 if before == channels else groups
                layers.append(nn.Conv2d(before, after, 3, padding=1, groups=split, bias=not batchnorm))
                layers.extend([nn.BatchNorm2d(after)] if batchnorm else [])
                layers.append(nn.ReLU())
                before = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        height, wide = (size, size) if isinstance(size, int) else size
        grid = (max(height >> len(depths), 1), max(wide >> len(depths), 1))
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Linear(before * grid[0] * grid[1], hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of pictures."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Addition(nn.Module):
    """The sum of two branches as a module, since tools that hook modules cannot see a `+`."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left + right."""
        return left + right


class Concatenation(nn.Module):
    """Channels side by side as a module, for the same reason."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the channels (N, C, ...) of both."""
        return torch.cat([left, right], 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    expansion = 1

    def __init__(self, before: int, planes: int, stride: int = 1, groups: int = 1) -> None:
        """Build a block from `before` channels to `planes`."""
        super().__init__()
        # A module that merges batch norms walks the children in order: each bn must stand right after its convolution.
        self.conv1 = nn.Conv2d(before, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(before, planes, stride)
        self.add = Addition()
        self.relu2 = nn.ReLU()

    @property
    def relu(self) -> nn.Module:
        """One ReLU for tools that replace `forward` by one which uses a single module for all of them."""
        return self.relu2

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu2(self.add(skip, out))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a skip connection; the stride is at the 3x3, as in most trained models."""

    expansion = 4

    def __init__(self, before: int, planes: int, stride: int = 1, groups: int = 1) -> None:
        """Build a block from `before` channels to 4 x `planes`."""
        super().__init__()
        after = planes * self.expansion
        self.conv1 = nn.Conv2d(before, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(planes, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = _downsample(before, after, stride)
        self.add = Addition()
        self.relu3 = nn.ReLU()

    @property
    def relu(self) -> nn.Module:
        """One ReLU for tools that replace `forward` by one which uses a single module for all of them."""
        return self.relu3

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu3(self.add(skip, out))


def _downsample(before: int, after: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and before == after:
        return None
    return nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))


class ResNet(nn.Module):
    """ResNet (He et al. 2015): a 7x7 stem, stages of residual blocks, a global average, one dense layer."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck] = Bottleneck,
        depths: Sequence[int] = RESNET50,
        *,
        width: int = 64,
        classes: int = 1000,
        channels: int = 3,
        groups: int = 1,
    ) -> None:
        """Build a net whose stages have `width`, 2, 4 and 8 times `width` planes; any picture size will do."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        before = width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            for index in range(depth):
                blocks.append(block(before, planes, 2 if stage > 0 and index == 0 else 1, groups))
                before = planes * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the maps of the last block, a 32nd of the picture's size."""
        return self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of pictures."""
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


class MobileNet(nn.Module):
    """MobileNet v1 (Howard et al. 2017): pairs of a depthwise 3x3 and a pointwise convolution."""

    def __init__(
        self,
        outputs: Sequence[int] = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024),
        strides: Iterable[int] = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1),
        *,
        width: int = 32,
        classes: int = 1000,
        channels: int = 3,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        """Build a net with a stem of `width` channels and one depthwise pair per entry of `outputs`."""
        super().__init__()
        layers = _normalized(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), activation)
        before = width
        for after, stride in zip(outputs, strides, strict=True):
            depthwise = nn.Conv2d(before, before, 3, stride=stride, padding=1, groups=before, bias=False)
            layers += _normalized(depthwise, activation)
            layers += _normalized(nn.Conv2d(before, after, 1, bias=False), activation)
            before = after
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of pictures."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _normalized(conv: nn.Conv2d, activation: type[nn.Module]) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), activation()]


class InvertedResidual(nn.Module):
    """A wide depthwise 3x3 between two pointwise convolutions, the last one linear; a skip where the shape stays."""

    def __init__(self, before: int, after: int, stride: int, expansion: int, activation: type[nn.Module]) -> None:
        """Build a block from `before` channels to `after`, with `expansion` x `before` between them."""
        super().__init__()
        wide = before * expansion
        layers = [] if expansion == 1 else _normalized(nn.Conv2d(before, wide, 1, bias=False), activation)
        depthwise = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        layers += _normalized(depthwise, activation)
        layers += [nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.layers = nn.Sequential(*layers)
        self.add = Addition() if stride == 1 and before == after else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return self.layers(x) if self.add is None else self.add(x, self.layers(x))


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018): inverted residuals with linear bottlenecks."""

    def __init__(
        self, *, width: int = 32, classes: int = 1000, channels: int = 3, activation: type[nn.Module] = nn.ReLU6
    ) -> None:
        """Build a net with a stem of `width` channels; the paper's has 32, and all others follow it."""
        super().__init__()
        layers = _normalized(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), activation)
        before = width
        for expansion, planes, depth, stride in MOBILENET_V2:
            for index in range(depth):
                after = max(planes * width // 32, 1)
                first = stride if index == 0 else 1
                layers.append(InvertedResidual(before, after, first, expansion, activation))
                before = after
        layers += _normalized(nn.Conv2d(before, 40 * width, 1, bias=False), activation)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(40 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of pictures."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, norms and ReLUs before each; what comes in is passed on beside what is made."""

    def __init__(self, before: int, growth: int) -> None:
        """Build a layer from `before` channels to `growth` more."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.ReLU(),
            nn.Conv2d(before, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )
        self.join = Concatenation()

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) with `growth` channels more."""
        return self.join(x, self.layers(x))


class DenseNet(nn.Module):
    """DenseNet (Huang et al. 2017), with bottlenecks and compression: every layer reads all before it in its stage."""

    def __init__(
        self,
        depths: Sequence[int] = DENSENET121,
        *,
        growth: int = 32,
        classes: int = 1000,
        channels: int = 3,
    ) -> None:
        """Build a net with a stem of 2 x `growth` channels, to which every layer adds `growth`; a stage halves them."""
        super().__init__()
        before = 2 * growth
        layers = _normalized(nn.Conv2d(channels, before, 7, stride=2, padding=3, bias=False), nn.ReLU)
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        for stage, depth in enumerate(depths):
            if stage:
                half = nn.Conv2d(before, before // 2, 1, bias=False)
                layers += [nn.BatchNorm2d(before), nn.ReLU(), half, nn.AvgPool2d(2)]
                before //= 2
            for _ in range(depth):
                layers.append(DenseLayer(before, growth))
                before += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of pictures."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def randomize(module: M, seed: int = 0) -> M:
    """Give `module` random weights, biases and running statistics, set it to evaluation, and return it.

    The last batch norm of a residual block gets small scales, as trained ones have; without that the activations of a
    deep ResNet double at every block.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = math.prod(layer.weight.shape[1:])
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * math.sqrt(2 / fan_in))
                if layer.bias is not None:
                    layer.bias.copy_(uniform(layer.bias, -0.1, 0.1))
            elif (
                isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
                and layer.running_mean is not None
                and layer.running_var is not None
            ):
                layer.weight.copy_(uniform(layer.weight, 0.7, 1.3))
                layer.bias.copy_(uniform(layer.bias, -0.2, 0.2))
                layer.running_mean.copy_(uniform(layer.running_mean, -0.3, 0.3))
                layer.running_var.copy_(uniform(layer.running_var, 0.5, 1.5))
        for layer in module.modules():
            if isinstance(layer, BasicBlock | Bottleneck):
                last = layer.bn2 if isinstance(layer, BasicBlock) else layer.bn3
                last.weight.mul_(0.4)
    return module.eval()


def vgg16(*, seed: int = 0, **options: object) -> VGG:
    """Return VGG16 with random weights; `options` as in `VGG`."""
    return randomize(VGG(VGG16, **options), seed)  # type: ignore[arg-type]


def vgg19(*, seed: int = 0, **options: object) -> VGG:
    """Return VGG19 with random weights; `options` as in `VGG`."""
    return randomize(VGG(VGG19, **options), seed)  # type: ignore[arg-type]


def resnet18(*, seed: int = 0, **options: object) -> ResNet:
    """Return ResNet-18 with random weights; `options` as in `ResNet`."""
    return randomize(ResNet(BasicBlock, RESNET18, **options), seed)  # type: ignore[arg-type]


def resnet50(*, seed: int = 0, **options: object) -> ResNet:
    """Return ResNet-50 with random weights; `options` as in `ResNet`."""
    return randomize(ResNet(Bottleneck, RESNET50, **options), seed)  # type: ignore[arg-type]


def resnet152(*, seed: int = 0, **options: object) -> ResNet:
    """Return ResNet-152 with random weights; `options` as in `ResNet`."""
    return randomize(ResNet(Bottleneck, RESNET152, **options), seed)  # type: ignore[arg-type]


def mobilenet(*, seed: int = 0, **options: object) -> MobileNet:
    """Return MobileNet v1 with random weights; `options` as in `MobileNet`."""
    return randomize(MobileNet(**options), seed)  # type: ignore[arg-type]


def mobilenet_v2(*, seed: int = 0, **options: object) -> MobileNetV2:
    """Return MobileNetV2 with random weights; `options` as in `MobileNetV2`."""
    return randomize(MobileNetV2(**options), seed)  # type: ignore[arg-type]


def densenet121(*, seed: int = 0, **options: object) -> DenseNet:
    """Return DenseNet-121 with random weights; `options` as in `DenseNet`."""
    return randomize(DenseNet(DENSENET121, **options), seed)  # type: ignore[arg-type]


def export(
    module: nn.Module,
    path: str | Path | None,
    shape: Sequence[int],
    dynamic_batch: bool = True,
    opset: int = 18,
    folded: bool = False,
    dynamic_size: bool = False,
) -> onnx.ModelProto:
    """Export `module` with an input `input` of `shape` and an output `logits`; write it to `path` unless that is None.

    The TorchScript exporter is used, since torch's newer one always folds batch norms into their convolutions. With
    `folded` it folds them as well; without, the nodes stay, in inference form. `dynamic_size` leaves the height and
    width open.
    """
    open_axes = ({0: "batch"} if dynamic_batch else {}) | ({2: "height", 3: "width"} if dynamic_size else {})
    axes = {"input": open_axes} | ({"logits": {0: "batch"}} if dynamic_batch else {})
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    first = next(module.parameters(), None)
    example = torch.zeros(tuple(shape), dtype=torch.float32 if first is None else first.dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder, "model.onnx") if path is None else Path(path)
        warnings.simplefilter("ignore")  # about the exporter's age, and about shapes that the trace takes as constant
        torch.onnx.export(
            module.eval(),
            (example,),
            file,
            dynamo=False,
            opset_version=opset,
            training=mode,
            do_constant_folding=folded,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes=axes,
        )
        return onnx.load(file)
