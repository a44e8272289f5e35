"""The networks of the benchmarks, by name: published architectures with random weights, which cost as trained ones do.

    network("resnet50", batch=8).write(Path("resnet50.onnx"))

Every size can be made smaller, so that a test can run the same code in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from benchmarks.sizes import Sizes
from exporters import torch_nets
from exporters.minilm import Encoder
from exporters.transformers import Bert, ViT, export

Axes = dict[str, dict[int, str]]


@dataclass(frozen=True)
class Network:
    """A network with a batch of random inputs.

    Attributes:
        module: predicts from tensors; in evaluation.
        feeds: its inputs (N, ...) by name.
        output: what its output (N, classes) is called in the file.
        axes: names of the axes that stay open in the file.
        explained: the input whose relevance is asked for.
        embedding: the layer that turns token ids into the tensor that torch can differentiate by.
        held: for LXT: what else than its patches the module has to hold constant.
    """

    module: nn.Module
    feeds: dict[str, Tensor]
    output: str
    axes: Axes
    explained: str
    embedding: nn.Module | None = None
    held: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def write(self, path: Path | None = None, *, fixed: bool = False) -> onnx.ModelProto:
        """Export by TorchScript, norms folded; `fixed` leaves no axis open. Written to `path` unless that is None."""
        if fixed:
            return export(self.module, path, self.feeds, self.output, {})
        # Of a batch of one, tracing takes the length for a constant here and there.
        example = {name: x[:2] if len(x) > 1 else torch.cat([x, x]) for name, x in self.feeds.items()}
        return export(self.module, path, example, self.output, self.axes)

    def score(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The largest output (N,) of a module like this one, and the tensor whose gradient explains it."""
        if self.embedding is None:
            x = self.feeds[self.explained].detach().requires_grad_()
            return module(x).amax(1), x
        found: list[Tensor] = []

        def keep(layer: nn.Module, given: Any, made: Tensor) -> Tensor:
            found.append(made.detach().requires_grad_())
            return found[0]

        # The same layer of this module, which may be a copy.
        path = next(name for name, layer in self.module.named_modules() if layer is self.embedding)
        hook = module.get_submodule(path).register_forward_hook(keep)
        outputs = module(*self.feeds.values())
        hook.remove()
        return outputs.amax(1), found[0]

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Network:
        """The network and its inputs on a device, in a type of floats; the module itself is moved."""
        feeds = {k: x.to(device, dtype) if x.is_floating_point() else x.to(device) for k, x in self.feeds.items()}
        module = self.module.to(device, dtype)
        return Network(module, feeds, self.output, self.axes, self.explained, self.embedding, self.held)


class Classifier(nn.Module):
    """Recurrent layers over (N, T, width), the mean over their steps, and a dense layer."""

    def __init__(self, cell: str, width: int, layers: int, classes: int) -> None:
        """Build it of a `cell` of torch.nn: LSTM, GRU or RNN."""
        super().__init__()
        self.layer = getattr(nn, cell)(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes)."""
        return self.head(self.layer(x)[0].mean(1))


def _pictures(batch: int, sizes: Sizes) -> Tensor:
    return torch.randn(batch, 3, sizes.picture, sizes.picture, generator=torch.Generator().manual_seed(0))


def _convolutional(batch: int, sizes: Sizes, build: Callable[..., nn.Module], **options: int) -> Network:
    module = build(classes=max(1000 // sizes.shrink, 2), **options)
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    return Network(module, {"input": _pictures(batch, sizes)}, "logits", axes, "input")


def _vgg(batch: int, sizes: Sizes, build: Callable[..., nn.Module]) -> Network:
    options = {"width": 64 // sizes.shrink, "hidden": 4096 // sizes.shrink, "size": sizes.picture}
    return _convolutional(batch, sizes, build, **options)


def _vit(batch: int, sizes: Sizes) -> Network:
    """Of the size of ViT-B/16."""
    torch.manual_seed(0)
    options = {"dim": 768 // sizes.shrink, "hidden": 3072 // sizes.shrink, "classes": max(1000 // sizes.shrink, 2)}
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    module = ViT(size=sizes.picture, **options).eval()
    return Network(module, {"image": _pictures(batch, sizes)}, "logits", axes, "image")


def _minilm(batch: int, sizes: Sizes) -> Network:
    """Of the size of all-MiniLM-L6-v2; an embedding's largest element is explained."""
    torch.manual_seed(0)
    module = Encoder(Bert(dim=384 // sizes.shrink, hidden=1536 // sizes.shrink, layers=6)).eval()
    ids = torch.randint(1000, 30000, (batch, sizes.length or 128), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    axes: Axes = {name: {0: "batch", 1: "length"} for name in feeds} | {"result": {0: "batch"}}
    held = {"unit": lambda x: x / x.norm(dim=-1, keepdim=True).detach()}
    return Network(module, feeds, "result", axes, "input_ids", module.bert.words, held)


def _recurrent(batch: int, sizes: Sizes, cell: str) -> Network:
    width = 512 // sizes.shrink
    x = torch.randn(batch, sizes.length or 200, width, generator=torch.Generator().manual_seed(0))
    return Network(
        recurrent(cell, width), {"x": x}, "logits", {"x": {0: "N", 1: "T"}, "logits": {0: "N"}}, explained="x"
    )


def recurrent(cell: str, width: int, layers: int = 2) -> nn.Module:
    """A classifier of sequences into ten classes."""
    torch.manual_seed(0)
    return Classifier(cell, width, layers, 10).eval()


NETWORKS: dict[str, Callable[[int, Sizes], Network]] = {
    "vgg16": lambda batch, sizes: _vgg(batch, sizes, torch_nets.vgg16),
    "vgg19": lambda batch, sizes: _vgg(batch, sizes, torch_nets.vgg19),
    "resnet50": lambda batch, sizes: _convolutional(batch, sizes, torch_nets.resnet50, width=64 // sizes.shrink),
    "mobilenet_v2": lambda batch, sizes: _convolutional(
        batch, sizes, torch_nets.mobilenet_v2, width=32 // sizes.shrink
    ),
    "densenet121": lambda batch, sizes: _convolutional(batch, sizes, torch_nets.densenet121, growth=32 // sizes.shrink),
    "vit": _vit,
    "minilm": _minilm,
    "lstm": lambda batch, sizes: _recurrent(batch, sizes, "LSTM"),
    "gru": lambda batch, sizes: _recurrent(batch, sizes, "GRU"),
    "rnn": lambda batch, sizes: _recurrent(batch, sizes, "RNN"),
}


def network(name: str, batch: int = 1, sizes: Sizes | None = None) -> Network:
    """Build a network of `NETWORKS` with a batch of inputs, the same ones for the same arguments.

    Raises:
        KeyError: there is none of that name.
    """
    return NETWORKS[name](batch, sizes or Sizes())
