"""Small transformers in torch, written on a set of operations that can be exchanged.

With :class:`Plain` they are what is exported. Other sets have the same outputs and another backward pass: that of a
relevance rule in the form "gradient with a few modifications" (Achtibat et al. 2024, sec. 3.3), or a peer's own.
"""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

Tensor = torch.Tensor
LEAST = torch.finfo(torch.float32).min


# ---- operations ------------------------------------------------------------------------------------------------------


class Plain:
    """What torch itself does."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def act(self, f: Any, x: Tensor) -> Tensor:
        return f(x)

    def norm(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    def scale(self, x: Tensor, by: Any) -> Tensor:
        return x * by

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return gate * x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


class Halved(torch.autograd.Function):
    """The same number with its gradient divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.by, None


class AttnLRP(Plain):
    """Relevance as input times gradient: the divisors of norms and the slopes of activations are held constant."""

    def act(self, f: Any, x: Tensor) -> Tensor:
        ratio = (f(x) / torch.where(x == 0, torch.ones_like(x), x)).detach()
        return x * ratio

    def norm(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.LayerNorm):
            off = x - x.mean(-1, keepdim=True)
            return off / (off.pow(2).mean(-1, keepdim=True) + layer.eps).sqrt().detach() * layer.weight + layer.bias
        return layer.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.eps).detach()

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return Halved.apply(gate * x, 2.0)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = self.scores(q, k) + _mask_of(q, mask, causal)
        return self.values(scores.softmax(-1), v)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return Halved.apply(q @ k.transpose(-1, -2), 2.0) / math.sqrt(q.shape[-1])

    def values(self, p: Tensor, v: Tensor) -> Tensor:
        return Halved.apply(p @ v, 2.0)


class CPLRP(AttnLRP):
    """Probabilities and gates are constants (Ali et al. 2022)."""

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return gate.detach() * x

    def values(self, p: Tensor, v: Tensor) -> Tensor:
        return p.detach() @ v


def _mask_of(q: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        length = q.shape[-2]
        return torch.full((length, length), -math.inf, dtype=q.dtype).triu(1)
    return torch.zeros((), dtype=q.dtype) if mask is None else mask


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A transformer whose first part is looking up, and whose second part is explained."""

    ops: Plain = Plain()

    def look_up(self, *inputs: Tensor) -> Tensor:
        """The tensor that relevance is wanted of."""
        return self.embed(inputs[0])

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.explained(self.look_up(*inputs), *inputs)

    def explained(self, x: Tensor, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def mix(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention of several heads, from layers q, k, v and o."""
        q, k, v = (self.split(self.ops.linear(layer, x)) for layer in (self.q, self.k, self.v))
        return self.ops.linear(self.o, self.join(self.ops.attention(q, k, v, mask, causal)))

    def split(self, x: Tensor, heads: int = 2) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x.reshape(x.shape[0], x.shape[1], -1)

    def layers(self, **widths: tuple[int, int]) -> None:
        for name, (inside, outside) in widths.items():
            setattr(self, name, nn.Linear(inside, outside))


class Bert(Net):
    """Norms after the sums, GELU, padding as a large negative number, scores spelled out; tanh of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(30, 16), nn.Parameter(torch.randn(12, 16) / 3)
        self.layers(q=(16, 16), k=(16, 16), v=(16, 16), o=(16, 16), up=(16, 32), down=(32, 16), pool=(16, 16))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(16) for _ in range(3)), nn.Linear(16, 3)

    def mix(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        if type(self.ops) is not Plain:
            return super().mix(x, mask)
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        return self.o(self.join(scores.softmax(-1) @ v))

    def explained(self, x: Tensor, *inputs: Tensor) -> Tensor:
        ops, padding = self.ops, (1.0 - inputs[1][:, None, None, :].to(x.dtype)) * LEAST
        x = ops.norm(self.norms[0], ops.add(x, self.places[: x.shape[1]].expand_as(x)))
        x = ops.norm(self.norms[1], ops.add(x, self.mix(x, padding)))
        y = ops.linear(self.down, ops.act(F.gelu, ops.linear(self.up, x)))
        x = ops.norm(self.norms[2], ops.add(x, y))
        return ops.linear(self.head, ops.act(torch.tanh, ops.linear(self.pool, x[:, 0])))


class Gpt(Net):
    """Norms before the layers, one layer for queries, keys and values, GELU by tanh, causal by minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(30, 16), nn.Parameter(torch.randn(12, 16) / 3)
        self.layers(qkv=(16, 48), o=(16, 16), up=(16, 32), down=(32, 16))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(16) for _ in range(3)), nn.Linear(16, 30, bias=False)

    def mix(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (self.split(part) for part in self.ops.linear(self.qkv, x).split(16, -1))
        if type(self.ops) is not Plain:
            return self.ops.linear(self.o, self.join(self.ops.attention(q, k, v, None, True)))
        here = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]))).masked_fill(~here, -math.inf)
        return self.o(self.join(scores.softmax(-1) @ v))

    def explained(self, x: Tensor, *inputs: Tensor) -> Tensor:
        ops, gelu = self.ops, functools.partial(F.gelu, approximate="tanh")
        x = ops.add(x, self.places[: x.shape[1]].expand_as(x))
        x = ops.add(x, self.mix(ops.norm(self.norms[0], x)))
        y = ops.act(gelu, ops.linear(self.up, ops.norm(self.norms[1], x)))
        x = ops.add(x, ops.linear(self.down, y))
        return ops.linear(self.head, ops.norm(self.norms[2], x)[:, -1])


class Rms(nn.Module):
    """The norm of LLaMA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + torch.randn(width) / 4), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Llama(Net):
    """RMS norms, rotary embeddings, four heads of queries on two of keys and values, a gated MLP, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Embedding(30, 16), nn.ModuleList(Rms(16) for _ in range(3))
        widths = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16), "gate": (16, 32), "up": (16, 32)}
        self.layers(**widths, down=(32, 16), head=(16, 30))
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                layer.bias = None
        self.register_buffer("speed", 1 / 100 ** (torch.arange(0, 4, 2) / 4))

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2]).to(self.speed.dtype)[:, None] * self.speed
        angle = torch.cat((angle, angle), -1)
        a, b = x.chunk(2, -1)
        ops, crossed = self.ops, torch.cat((self.ops.scale(b, -1.0), a), -1)
        return ops.add(ops.scale(x, angle.cos()), ops.scale(crossed, angle.sin()))

    def mix(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (self.ops.linear(layer, x) for layer in (self.q, self.k, self.v))
        q, k, v = self.turned(self.split(q, 4)), self.turned(self.split(k)), self.split(v)
        k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for z in (k, v))
        return self.ops.linear(self.o, self.join(self.ops.attention(q, k, v, None, True)))

    def explained(self, x: Tensor, *inputs: Tensor) -> Tensor:
        ops = self.ops
        x = ops.add(x, self.mix(ops.norm(self.norms[0], x)))
        y = ops.norm(self.norms[1], x)
        y = ops.gated(ops.act(F.silu, ops.linear(self.gate, y)), ops.linear(self.up, y))
        x = ops.add(x, ops.linear(self.down, y))
        return ops.linear(self.head, ops.norm(self.norms[2], x)[:, -1])


class Vit(Net):
    """A convolution that cuts patches, a class token, norms before the layers, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(10, 16) / 3)
        self.layers(q=(16, 16), k=(16, 16), v=(16, 16), o=(16, 16), up=(16, 32), down=(32, 16), head=(16, 5))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))

    def look_up(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def explained(self, x: Tensor, *inputs: Tensor) -> Tensor:
        ops = self.ops
        x = ops.linear(self.patch, x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)
        x = ops.add(x, self.places.expand_as(x))
        x = ops.add(x, self.mix(ops.norm(self.norms[0], x)))
        y = ops.act(F.gelu, ops.linear(self.up, ops.norm(self.norms[1], x)))
        x = ops.add(x, ops.linear(self.down, y))
        return ops.linear(self.head, ops.norm(self.norms[2], x[:, 0]))


NETS: dict[str, type[Net]] = {"bert": Bert, "gpt": Gpt, "llama": Llama, "vit": Vit}
# Whether torch's newer exporter is used, and the opset: the older one knows no attention, and ends at 20.
EXPORTS = {"dynamo-18": (True, 18), "dynamo-23": (True, 23), "script-18": (False, 18), "script-20": (False, 20)}


@functools.cache
def net(name: str) -> Net:
    """One of the models, the same at each call."""
    torch.manual_seed(0)
    made = NETS[name]().eval()
    for layer in made.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.normal_(layer.weight, 1, 0.25)
            nn.init.normal_(layer.bias, 0, 0.25)
    return made


def inputs_of(name: str, batch: int = 2, length: int = 6) -> dict[str, np.ndarray]:
    """Inputs, the last text of a batch being padded."""
    rng = np.random.default_rng(5)
    if name == "vit":
        return {"x": rng.standard_normal((batch, 3, 12, 12)).astype(np.float32)}
    feeds = {"x": rng.integers(0, 30, (batch, length))}
    if name == "bert":
        feeds["mask"] = np.ones((batch, length), np.int64)
        feeds["mask"][-1, length - 2 :] = 0
    return feeds


@functools.cache
def exported(name: str, how: str, half: bool = False) -> onnx.ModelProto:
    """A model as ONNX, batch and length open."""
    import copy

    dynamo, opset = EXPORTS[how]
    model, feeds = net(name), inputs_of(name)
    model = copy.deepcopy(model).half() if half else model
    args = tuple(
        torch.as_tensor(x).half() if half and x.dtype.kind == "f" else torch.as_tensor(x) for x in feeds.values()
    )
    names = [["n", "t"] if name != "vit" else ["n"]] * len(args)
    shared: dict[str, Any] = {"opset_version": opset, "input_names": list(feeds), "output_names": ["logits"]}
    file = io.BytesIO()
    if dynamo:
        free = tuple(dict.fromkeys(range(len(axes)), torch.export.Dim.DYNAMIC) for axes in names)
        # The model reads *inputs: one group of arguments.
        program = torch.onnx.export(
            model, args, None, dynamo=True, dynamic_shapes={"inputs": free}, verbose=False, **shared
        )
        return program.model_proto
    axes = {x: dict(enumerate(labels)) for x, labels in zip(feeds, names, strict=True)}
    torch.onnx.export(model, args, file, dynamo=False, dynamic_axes=axes, **shared)
    return onnx.load_from_string(file.getvalue())


def relevance_by(ops: Plain, name: str, feeds: dict[str, np.ndarray], times_input: bool = True) -> np.ndarray:
    """What the backward pass of a set of operations says, in float64, of the greatest output of each sample.

    Relevance is input times gradient, or the gradient itself; summed over the embedding's axis for texts.
    """
    import copy

    model = copy.deepcopy(net(name)).double()
    model.ops = ops
    inputs = [torch.as_tensor(v) for v in feeds.values()]
    inputs = [v.double() if v.is_floating_point() else v for v in inputs]
    x = model.look_up(*inputs).detach().requires_grad_()
    score = model.explained(x, *inputs).max(-1).values
    (grad,) = torch.autograd.grad(score, x, score.detach() if not times_input else torch.ones_like(score))
    found = (x * grad if times_input else grad).detach()
    return (found if name == "vit" else found.sum(-1)).numpy()
